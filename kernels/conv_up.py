"""Convolutions onto a grid twice as fine as the input's: transposed ones of stride 2, 2×2 and 3×3.

    y[n,p,q,k] = bias[k] + Σ_{r,s,c} z[n, (p + pad − r)/2, (q + pad − s)/2, c] · W[c,k,r,s]   (where exact)
    z = act(scale·(x − centre) + shift)

The gradient with respect to z of a 3×3 convolution of stride 2 is the same sum over dY; the epilogue of the dgrad
kernel turns it into dx and daffine. One main loop serves both.

Of 2×2, which strided.py turns into 2×1, a program computes the rows 2p and 2p + 1 of y from images·columns pixels of
row p of x. Of 3×3 it computes the even and the odd columns of one row of y: row 2p needs one row of the filter and row
p of x, row 2p + 1 two of each; over two neighbouring pixels of x lie three columns of the filter. Either way two
accumulators share what was loaded and normalised once. Beyond its last row and column x counts as zeros.

Layout: activations NHWC, weights (channels, taps, outputs). Bytes: forward reads the source and W and writes y; dgrad
reads dY, W and the source and writes dx. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import NOTHING, SAMPLES

from .affine import affine_gradient, affine_slabs
from .common import Slab, Source, affine_of, cdiv, dense, empty_nhwc, load_affine, replace, slab_of
from .gemm import (
    Filters,
    Image,
    Pixel,
    Window,
    add_product,
    first_pixel,
    load_pixels,
    load_tap,
    operand,
    release,
    source_gradient,
    store_pixels,
    zeros,
)
from .launching import describe, launch, real_word
from .samples import several, stored, through, value
from .statistics import Partials, of_nothing, stats_of, store_stats
from .strided import as_rows, taps
from .tiles import choose_strided, movable, movable_rows

SIZES = ["N", "H", "W", "P", "Q", "tiles_h", "tiles_w"]


@triton.jit
def _accumulate(
    accs, start, stop, source, filters, at, a,
    KSIZE: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """Add steps start … stop, each a block of channels over one row of x, to the two parts."""
    whole = Window(0, source.H, 0, source.W)
    if KSIZE == 2:
        for step in tl.range(start, stop):
            c = step * TILE.reduction
            affine = load_affine(source.affine, c + tl.arange(0, TILE.reduction), source.C)
            z = load_pixels(source, affine, at, 0, c, whole, TILE.reduction, MASKED, TILE, NUM.acc)
            for r in tl.static_range(2):
                accs = replace(accs, r, add_product(accs[r], z, load_tap(filters, c, r, TILE), NUM))
    else:
        for step in tl.range(start, stop):
            down = step & a  # row 2h of y meets row h of x, row 2h + 1 also row h + 1
            c = (step >> a) * TILE.reduction
            affine = load_affine(source.affine, c + tl.arange(0, TILE.reduction), source.C)
            for right in tl.static_range(2):
                pixel = Pixel(at.n, at.h + down, at.w + right)
                z = load_pixels(source, affine, pixel, 0, c, whole, TILE.reduction, MASKED, TILE, NUM.acc)
                for b in tl.static_range(2):
                    if b >= right:
                        tap = (a + 1 - 2 * down) * 3 + b + 1 - 2 * right
                        accs = replace(accs, b, add_product(accs[b], z, load_tap(filters, c, tap, TILE), NUM))
    return accs


@triton.jit
def _first_pixel(number, tiles_h, tiles_w, KSIZE: tl.constexpr, TILE: tl.constexpr):
    """The first pixel of x of tile ``number``, and which of its two rows of y the tile is, if 3×3."""
    if KSIZE == 2:
        at = first_pixel(number, tiles_h, tiles_w, TILE)
        a = 0
    else:
        at = first_pixel(number // 2, tiles_h, tiles_w, TILE)
        a = number % 2
    return at, a


@triton.jit
def _sum(source, filters, at, a, KSIZE: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr):
    """The two parts [images·columns, outputs] over the tile at ``at``; of 3×3, in row 2·at.h + a of y."""
    accs = zeros(TILE.images * TILE.columns, TILE.outputs, 2, NUM)
    steps = tl.cdiv(source.C, TILE.reduction) * (1 + a)
    # As in conv3x3.py: two loops, of which one is empty.
    MAY_MASK: tl.constexpr = source.affine is not None or not isinstance(source.x, tl.core.tensor_descriptor_base)
    free = steps
    if MAY_MASK:
        inside = (at.h + a < source.H) & (at.w + TILE.columns + KSIZE - 2 <= source.W)
        free = tl.where(inside & (at.n + TILE.images <= source.N), steps, 0)
    accs = _accumulate(accs, 0, free, source, filters, at, a, KSIZE, False, TILE, NUM)
    if MAY_MASK:
        accs = _accumulate(accs, free, steps, source, filters, at, a, KSIZE, True, TILE, NUM)
    return (release(accs[0], NUM), release(accs[1], NUM))


@triton.jit(do_not_specialize=SIZES)
def _conv_up_fwd_kernel(
    x, affine_ptr, real_ptr, w, bias_ptr, y, mean_ptr, m2_ptr, count_ptr, N, H, W, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, TILE.outputs)
    number = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * TILE.outputs
    at, a = _first_pixel(number, tiles_h, tiles_w, KSIZE, TILE)
    TAPS: tl.constexpr = 2 if KSIZE == 2 else 9
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, at.n, C)
    accs = _sum(
        Image(x, N, H, W, C, affine_ptr, SLOPE, real_ptr), Filters(w, 0, C, k, K, TAPS, False), at, a, KSIZE, TILE, NUM
    )
    filters = k + tl.arange(0, TILE.outputs)
    if bias_ptr is not None:
        column = filters
        if KSIZE == 2:
            column = filters % (K // 2)
        bias = tl.load(bias_ptr + column, mask=filters < K, other=0.0).to(NUM.acc)
    for i in tl.static_range(2):
        acc = accs[i]
        if bias_ptr is not None:
            acc += bias[None, :]
        rounded = acc.to(NUM.dtype)
        accs = replace(accs, i, rounded)
        row = Pixel(at.n, 2 * at.h + (i if KSIZE == 2 else a), at.w)
        result = Image(y, N, 2 * H, (KSIZE - 1) * W, K, None, None, None)
        store_pixels(result, rounded, row, 0 if KSIZE == 2 else i, k, TILE.outputs, TILE, KSIZE - 1)
    if mean_ptr is not None:
        pixel = tl.arange(0, TILE.images * TILE.columns)
        rows = tl.where((at.n + pixel // TILE.columns < N) & (at.w + pixel % TILE.columns < W), 2, 0)
        store_stats(accs, rows, Slab(number, number), filters, K, mean_ptr, m2_ptr, count_ptr, 2, TILE.outputs, NUM.acc)


@triton.jit(do_not_specialize=SIZES)
def _conv_up_dgrad_kernel(
    dy, w, x, affine_ptr, dx, partial_ptr, N, H, W, P, Q, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """dx (N,P,Q,C) and daffine from dY (N,H,W,K)."""
    blocks = tl.cdiv(C, TILE.outputs)
    number = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * TILE.outputs
    at, a = _first_pixel(number, tiles_h, tiles_w, KSIZE, TILE)
    gs = _sum(Image(dy, N, H, W, K, None, None, None), Filters(w, 0, K, c, C, 9, False), at, a, KSIZE, TILE, NUM)
    row = Pixel(at.n, 2 * at.h + a, at.w)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, at.n, C)
    source_gradient(
        gs, Image(x, N, P, Q, C, affine_ptr, SLOPE, None), dx, partial_ptr,
        slab_of(number, at.n, N, 2 * tiles_h * tiles_w, SAMPLES).row, row, c, 2, TILE, NUM,
    )  # fmt: skip


# ---- launchers ---------------------------------------------------------------------------------------------------


def conv_up(source: Source, weight: Tensor, bias: Tensor | None, stats: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, K, 2·H, 2·W), and its mean and biased variance, (K,) or (N, K), empty without ``stats``, with
    W (C, K, ·, ·). Those of samples take a pass of their own."""
    channels, filters, ksize = weight.shape[:3]
    result = empty_nhwc(source.x, source.x.shape[0], filters, 2 * source.height, 2 * source.width)
    if result.numel() == 0:
        return result, *of_nothing(result, filters, stats)
    given, weight = weight, taps(weight)
    x, y = as_rows(source.x, ksize, 1, source.samples), as_rows(result, ksize, 2, source.samples)
    batch, _, height, width = x.shape
    outputs = y.shape[1]
    tma = movable(x) and movable_rows(weight) and movable(y, ksize - 1)
    tile = choose_strided(f"conv{ksize}x{ksize}_up", batch, channels, outputs, height, width, x, tma)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    tiles *= ksize - 1  # rows of y
    if several(tile, [source]):
        return conv_up(stored(source), given, bias, stats)
    merged = NOTHING if stats == SAMPLES else stats
    partials = Partials(source.x, tiles, outputs, merged)
    launch(
        _conv_up_fwd_kernel, (tiles * cdiv(outputs, tile.outputs),),
        operand(x, tile, tile.reduction, tma), source.affine, real_word(x.device),
        describe(weight, tuple(weight.shape), (tile.reduction, 1, tile.outputs), tma),
        dense(bias), operand(y, tile, tile.outputs, tma, ksize - 1), *partials.pointers,
        batch, height, width, channels, outputs, tiles_h, tiles_w,
        KSIZE=ksize, SLOPE=source.act, SAMPLES=source.samples, **tile.constants(x),
    )  # fmt: skip
    if merged != stats:
        return result, *stats_of(result, stats)
    return result, *partials.merged(filters)  # of a pixel pair, each a tile of its own


def conv_up_dgrad(dy: Tensor, weight: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """(dx, daffine) of the source of a 3×3 convolution of stride 2, from dY (N, K, P, Q) and W (K, C, 3, 3)."""
    x, channels = source.x, source.channels
    dx = empty_nhwc(x, *x.shape)
    if dx.numel() == 0:
        return dx, affine_gradient(source.x, affine_slabs(source.x, source.affine, 0))
    given, weight = weight, taps(weight)
    batch, filters, height, width = dy.shape
    tma, tma_x = movable(dy) and movable_rows(weight), movable(x, 2) and movable(dx, 2)
    tile = choose_strided("conv3x3_up_dgrad", batch, filters, channels, height, width, dy, tma)
    if several(tile, [source]):
        return through(conv_up_dgrad(dy, given, value(source))[0], source)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    tiles *= 2  # rows of dx
    partial = affine_slabs(source.x, source.affine, tiles)
    part = tile.part
    launch(
        _conv_up_dgrad_kernel, (tiles * cdiv(channels, tile.outputs),),
        operand(dy, tile, tile.reduction, tma),
        describe(weight, tuple(weight.shape), (tile.reduction, 1, tile.outputs), tma),
        operand(x, tile, part, tma_x, 2), source.affine, operand(dx, tile, part, tma_x, 2), partial,
        batch, height, width, source.height, source.width, channels, filters, tiles_h, tiles_w,
        KSIZE=3, SLOPE=source.act, SAMPLES=source.samples, **tile.constants(dy),
    )  # fmt: skip
    return dx, affine_gradient(source.x, partial)
