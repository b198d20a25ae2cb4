"""Convolutions onto a grid as coarse as the input's or half of it: 3×3 of stride 2, and 1×1.

    y[n,p,q,k] = bias[k] + Σ_{r,s,c} z[n, p·stride + r − pad, q·stride + s − pad, c] · W[k,c,r,s]
    z = act(scale·(x − centre) + shift)

The gradients with respect to z of transposed convolutions of stride 2 (2×2, and 3×3) and of 1×1 convolutions are the
same sum over dY; the epilogue of the dgrad kernel turns them into dx and daffine. One main loop serves both.

A program computes images·columns pixels of one row, for a block of outputs. A step multiplies the KSIZE filters of one
column s with a block of channels. z is zero outside its source: padding comes after normalisation. TMA (Hopper and
later) fills zeros in by itself; act(shift) is masked only in tiles that touch the border.

Layout: activations NHWC, weights (outputs, taps, channels) or (channels, taps, outputs). Bytes: forward reads the
source and W and writes y; dgrad reads dY, W and the source and writes dx. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import SAMPLES

from .affine import affine_gradient, affine_slabs
from .common import Source, affine_of, cdiv, dense, empty_nhwc, load_affine, slab_of
from .gemm import (
    Filters,
    Image,
    Pixel,
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
from .samples import by_tile, several, through, tile_stats, value
from .statistics import Partials, of_nothing, stats_of, store_stats
from .strided import as_rows, taps
from .tiles import choose_strided, movable, movable_rows

SIZES = ["N", "H", "W", "P", "Q", "tiles_h", "tiles_w"]


@triton.jit
def _accumulate(
    acc, start, stop, source, filters, at, KSIZE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """Add steps start … stop, each a block of channels at one column of the filter."""
    PAD: tl.constexpr = WIDE - 1
    TAPS: tl.constexpr = 2 * WIDE - 1  # a row
    for step in tl.range(start, stop):
        s = step % TAPS
        c = step // TAPS * TILE.reduction
        affine = load_affine(source.affine, c + tl.arange(0, TILE.reduction), source.C)
        for r in tl.static_range(KSIZE):
            pixel = Pixel(at.n, STRIDE * at.h + r - PAD, at.w)
            z = load_pixels(source, affine, pixel, s - PAD, c, None, TILE.reduction, MASKED, TILE, NUM.acc, WIDE)
            acc = add_product(acc, z, load_tap(filters, c, r * TAPS + s, TILE), NUM)
    return acc


@triton.jit
def _sum(
    source, filters, at, KSIZE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """The sum [images·columns, outputs] at the tile whose first pixel is ``at``."""
    acc = zeros(TILE.images * TILE.columns, TILE.outputs, 1, NUM)[0]
    steps = tl.cdiv(source.C, TILE.reduction) * (2 * WIDE - 1)
    # As in conv3x3.py: two loops, of which one is empty.
    MAY_MASK: tl.constexpr = source.affine is not None or not isinstance(source.x, tl.core.tensor_descriptor_base)
    free = steps
    if MAY_MASK:
        above = (at.h >= WIDE - 1) & (at.w >= WIDE - 1) & (at.n + TILE.images <= source.N)
        below = (STRIDE * (at.h + 1) <= source.H) & (WIDE * (at.w + TILE.columns) <= source.W)
        free = tl.where(above & below, steps, 0)
    acc = _accumulate(acc, 0, free, source, filters, at, KSIZE, STRIDE, WIDE, False, TILE, NUM)
    if MAY_MASK:
        acc = _accumulate(acc, free, steps, source, filters, at, KSIZE, STRIDE, WIDE, True, TILE, NUM)
    return release(acc, NUM)


@triton.jit(do_not_specialize=SIZES)
def _conv_down_fwd_kernel(
    x, affine_ptr, real_ptr, w, bias_ptr, y, mean_ptr, m2_ptr, count_ptr, N, H, W, P, Q, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr, SAMPLES_Y: tl.constexpr,
    TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, TILE.outputs)
    number = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * TILE.outputs
    at = first_pixel(number, tiles_h, tiles_w, TILE)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, at.n, C)
    acc = _sum(
        Image(x, N, H, W, C, affine_ptr, SLOPE, real_ptr), Filters(w, 0, C, k, K, KSIZE * (2 * STRIDE - 1), True), at,
        KSIZE, STRIDE, STRIDE, TILE, NUM,
    )  # fmt: skip
    filters = k + tl.arange(0, TILE.outputs)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + filters, mask=filters < K, other=0.0).to(NUM.acc)[None, :]
    rounded = acc.to(NUM.dtype)
    store_pixels(Image(y, N, P, Q, K, None, None, None), rounded, at, 0, k, TILE.outputs, TILE)
    if mean_ptr is not None:
        pixel = tl.arange(0, TILE.images * TILE.columns)
        rows = ((at.n + pixel // TILE.columns < N) & (at.w + pixel % TILE.columns < Q)).to(tl.int32)
        slab = slab_of(number, at.n, N, tiles_h * tiles_w, SAMPLES_Y)
        store_stats((rounded,), rows, slab, filters, K, mean_ptr, m2_ptr, count_ptr, 1, TILE.outputs, NUM.acc)


@triton.jit(do_not_specialize=SIZES)
def _conv_down_dgrad_kernel(
    dy, w, x, affine_ptr, dx, partial_ptr, N, H, W, P, Q, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """dx (N,P,Q,C) and daffine from dY (N,H,W,K)."""
    WIDE: tl.constexpr = 2 if KSIZE == 3 else 1
    blocks = tl.cdiv(C, TILE.outputs)
    number = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * TILE.outputs
    at = first_pixel(number, tiles_h, tiles_w, TILE)
    g = _sum(
        Image(dy, N, H, W, K, None, None, None), Filters(w, 0, K, c, C, KSIZE * (2 * WIDE - 1), KSIZE > 1), at,
        KSIZE, STRIDE, WIDE, TILE, NUM,
    )  # fmt: skip
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, at.n, C)
    source_gradient(
        (g,), Image(x, N, P, Q, C, affine_ptr, SLOPE, None), dx, partial_ptr,
        slab_of(number, at.n, N, tiles_h * tiles_w, SAMPLES).row, at, c, 1, TILE, NUM,
    )  # fmt: skip


# ---- launchers ---------------------------------------------------------------------------------------------------


def conv_down(
    source: Source, weight: Tensor, bias: Tensor | None, stats: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, K, ⌈H/stride⌉, ⌈W/stride⌉), and its mean and biased variance, (K,) or (N, K), empty without ``stats``.

    ``weight`` is (K, C, 3, 3) for stride 2, (K, C, 1, 1) for stride 1.
    """
    filters, channels, ksize = weight.shape[:3]
    result = empty_nhwc(source.x, source.x.shape[0], filters, cdiv(source.height, stride), cdiv(source.width, stride))
    if result.numel() == 0:
        return result, *of_nothing(result, filters, stats)
    weight = taps(weight)
    apart = source.samples or stats == SAMPLES
    x, y = as_rows(source.x, ksize, stride, apart), as_rows(result, ksize, 1, apart)
    batch, _, height, width = y.shape
    tma, tma_w, tma_y = movable(x, stride), movable_rows(weight), movable(y)
    tile = choose_strided(f"conv{ksize}x{ksize}_down", batch, channels, filters, height, width, x, tma)
    (source,), merged = by_tile(tile, [source]), tile_stats(tile, stats)
    x = as_rows(source.x, ksize, stride, apart)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    partials = Partials(source.x, tiles, filters, merged)
    launch(
        _conv_down_fwd_kernel, (tiles * cdiv(filters, tile.outputs),),
        operand(x, tile, tile.reduction, tma, stride), source.affine, real_word(x.device),
        describe(weight, tuple(weight.shape), (tile.outputs, 1, tile.reduction), tma_w),
        dense(bias), operand(y, tile, tile.outputs, tma_y), *partials.pointers,
        batch, x.shape[2], x.shape[3], height, width, channels, filters, tiles_h, tiles_w,
        KSIZE=ksize, STRIDE=stride, SLOPE=source.act,
        SAMPLES=source.samples, SAMPLES_Y=merged == SAMPLES, **tile.constants(x),
    )  # fmt: skip
    return result, *(partials.merged() if merged == stats else stats_of(result, stats))


def conv_down_dgrad(dy: Tensor, weight: Tensor, source: Source, stride: int) -> tuple[Tensor, Tensor]:
    """(dx, daffine) of the source, from dY.

    Of a transposed convolution of stride 2, whose ``weight`` is (C, K, ·, ·); or of stride 1 and 1×1, (K, C, 1, 1).
    """
    ksize, channels = weight.shape[-1], source.channels
    wide = 2 if ksize == 3 else 1
    gradient = empty_nhwc(source.x, *source.x.shape)
    if gradient.numel() == 0:
        return gradient, affine_gradient(source.x, affine_slabs(source.x, source.affine, 0))
    apart = source.samples
    x, dx = as_rows(source.x, ksize, 1, apart), as_rows(gradient, ksize, 1, apart)
    given, dy = (dy, weight), as_rows(dy, ksize, stride, apart)
    weight = taps(weight)
    filters = dy.shape[1]
    batch, _, height, width = x.shape
    tma, tma_w, tma_x = movable(dy, wide), movable_rows(weight), movable(x) and movable(dx)
    tile = choose_strided(f"conv{ksize}x{ksize}_down_dgrad", batch, filters, channels, height, width, dy, tma)
    if several(tile, [source]):
        return through(conv_down_dgrad(*given, value(source), stride)[0], source)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    partial = affine_slabs(source.x, source.affine, tiles)
    part = tile.part
    first, second = (tile.outputs, tile.reduction) if ksize > 1 else (tile.reduction, tile.outputs)
    launch(
        _conv_down_dgrad_kernel, (tiles * cdiv(channels, tile.outputs),),
        operand(dy, tile, tile.reduction, tma, wide),
        describe(weight, tuple(weight.shape), (first, 1, second), tma_w),
        operand(x, tile, part, tma_x), source.affine, operand(dx, tile, part, tma_x), partial,
        batch, dy.shape[2], dy.shape[3], height, width, channels, filters, tiles_h, tiles_w,
        KSIZE=ksize, STRIDE=stride, SLOPE=source.act, SAMPLES=source.samples, **tile.constants(dy),
    )  # fmt: skip
    return gradient, affine_gradient(source.x, partial)
