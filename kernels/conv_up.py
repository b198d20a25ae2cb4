"""Convolutions onto a grid twice as fine as the input's: transposed ones of stride 2, 2×2 and 3×3.

    y[n,p,q,k] = bias[k] + Σ_{r,s,c} z[n, (p + pad − r)/2, (q + pad − s)/2, c] · W[c,k,r,s]   (where exact)
    z = act(scale·(x − centre) + shift)

The gradient with respect to z of a 3×3 convolution of stride 2 is the same sum over dY; the epilogue of the dgrad
kernel turns it into dx and daffine. One main loop serves both.

Of 2×2, which strided.py turns into 2×1, a program computes the rows 2p and 2p + 1 of y from IMAGES·COLUMNS pixels of
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

from fastunet.kernels.common import (
    OPTIONS,
    Source,
    accumulator,
    add_product,
    cdiv,
    describe,
    element,
    empty_nhwc,
    held,
    hold,
    launch,
    load_affine,
    load_tap,
    precision,
    real_word,
    release,
    sum_slabs,
    tile_place,
)
from fastunet.kernels.conv3x3 import load_row, operand, replace
from fastunet.kernels.statistics import merge_stats, store_stats
from fastunet.kernels.strided import as_rows, parts, source_gradient, store_pixels, taps
from fastunet.kernels.tiles import choose_strided, movable, movable_rows
from fastunet.layout import stats_dtype

SIZES = ["N", "H", "W", "P", "Q", "tiles_h", "tiles_w"]


@triton.jit
def _accumulate(
    accs, start, stop, x, affine_ptr, real_ptr, w, n, p, q, a, N, H, W, C, k, K,
    KSIZE: tl.constexpr, HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add steps start … stop, each a block of channels over one row of x, to the two parts."""
    if KSIZE == 2:
        for step in tl.range(start, stop):
            c = step * BLOCK_C
            scale, shift, centre = load_affine(affine_ptr, c + tl.arange(0, BLOCK_C), C, HAS_AFFINE, ACC)
            z = load_row(
                x, real_ptr, scale, shift, centre, n, p, q, c, N, H, W, C, 0, H, 0, W,
                HAS_AFFINE, RELU, MASKED, TMA, IMAGES, COLUMNS, BLOCK_C, ACC,
            )  # fmt: skip
            for r in tl.static_range(2):
                weights = load_tap(w, k, c, r, K, C, 2, False, TMA, BLOCK_C, BLOCK_K)
                accs = replace(accs, r, add_product(accs[r], z, weights, HELD, ACC, PRECISION))
    else:
        for step in tl.range(start, stop):
            down = step & a  # row 2p of y meets row p of x, row 2p + 1 also row p + 1
            c = (step >> a) * BLOCK_C
            scale, shift, centre = load_affine(affine_ptr, c + tl.arange(0, BLOCK_C), C, HAS_AFFINE, ACC)
            for right in tl.static_range(2):
                z = load_row(
                    x, real_ptr, scale, shift, centre, n, p + down, q + right, c, N, H, W, C, 0, H, 0, W,
                    HAS_AFFINE, RELU, MASKED, TMA, IMAGES, COLUMNS, BLOCK_C, ACC,
                )  # fmt: skip
                for b in tl.static_range(2):
                    if b >= right:
                        tap = (a + 1 - 2 * down) * 3 + b + 1 - 2 * right
                        weights = load_tap(w, k, c, tap, K, C, 9, False, TMA, BLOCK_C, BLOCK_K)
                        accs = replace(accs, b, add_product(accs[b], z, weights, HELD, ACC, PRECISION))
    return accs


@triton.jit
def _place(tile, tiles_h, tiles_w, KSIZE: tl.constexpr, IMAGES: tl.constexpr, COLUMNS: tl.constexpr):
    """First picture, row and column of x of tile number ``tile``, and which of y's rows it is if 3×3."""
    if KSIZE == 2:
        n, p, q = tile_place(tile, tiles_h, tiles_w, IMAGES, 1, COLUMNS)
        a = 0
    else:
        n, p, q = tile_place(tile // 2, tiles_h, tiles_w, IMAGES, 1, COLUMNS)
        a = tile % 2
    return n, p, q, a


@triton.jit
def _sum(
    x, affine_ptr, real_ptr, w, n, p, q, a, N, H, W, C, k, K,
    KSIZE: tl.constexpr, HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The two parts [IMAGES·COLUMNS, BLOCK_K] over the tile at (p, q); of 3×3, in row 2p + a of y."""
    accs = (hold(tl.zeros([IMAGES * COLUMNS, BLOCK_K], ACC), HELD),) * 2
    steps = tl.cdiv(C, BLOCK_C) * (1 + a)
    # As in conv3x3.py: two loops, of which one is empty.
    MAY_MASK: tl.constexpr = HAS_AFFINE or not TMA
    free = steps
    if MAY_MASK:
        inside = (p + a < H) & (q + COLUMNS + KSIZE - 2 <= W) & (n + IMAGES <= N)
        free = tl.where(inside, steps, 0)
    accs = _accumulate(
        accs, 0, free, x, affine_ptr, real_ptr, w, n, p, q, a, N, H, W, C, k, K, KSIZE, HAS_AFFINE, RELU, False, TMA,
        IMAGES, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
    )  # fmt: skip
    if MAY_MASK:
        accs = _accumulate(
            accs, free, steps, x, affine_ptr, real_ptr, w, n, p, q, a, N, H, W, C, k, K,
            KSIZE, HAS_AFFINE, RELU, True, TMA, IMAGES, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
        )  # fmt: skip
    return (release(accs[0], HELD, ACC), release(accs[1], HELD, ACC))


@triton.jit(do_not_specialize=SIZES)
def _conv_up_fwd_kernel(
    x, affine_ptr, real_ptr, w, bias_ptr, y, mean_ptr, m2_ptr, count_ptr, N, H, W, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, BIAS: tl.constexpr, STATS: tl.constexpr,
    TMA: tl.constexpr, HELD: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * BLOCK_K
    n, p, q, a = _place(tile, tiles_h, tiles_w, KSIZE, IMAGES, COLUMNS)
    accs = _sum(
        x, affine_ptr, real_ptr, w, n, p, q, a, N, H, W, C, k, K, KSIZE, AFFINE, RELU, TMA,
        IMAGES, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
    )  # fmt: skip
    filters = k + tl.arange(0, BLOCK_K)
    if BIAS:
        place = filters
        if KSIZE == 2:
            place = filters % (K // 2)
        bias = tl.load(bias_ptr + place, mask=filters < K, other=0.0).to(ACC)
    for i in tl.static_range(2):
        acc = accs[i]
        if BIAS:
            acc += bias[None, :]
        rounded = acc.to(DTYPE)
        accs = replace(accs, i, rounded)
        row = 2 * p + (i if KSIZE == 2 else a)
        store_pixels(
            y, rounded, n, row, q, 0 if KSIZE == 2 else i, k, N, 2 * H, (KSIZE - 1) * W, K, KSIZE - 1, TMA,
            IMAGES, COLUMNS, BLOCK_K,
        )  # fmt: skip
    if STATS:
        pixel = tl.arange(0, IMAGES * COLUMNS)
        rows = tl.where((n + pixel // COLUMNS < N) & (q + pixel % COLUMNS < W), 2, 0)
        store_stats(accs, rows, tile, filters, K, mean_ptr, m2_ptr, count_ptr, 2, BLOCK_K, ACC)


@triton.jit(do_not_specialize=SIZES)
def _conv_up_dgrad_kernel(
    dy, w, x, affine_ptr, dx, partial_ptr, N, H, W, P, Q, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr,
    TMA: tl.constexpr, TMA_X: tl.constexpr, HELD: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (N,P,Q,C) and daffine from dY (N,H,W,K)."""
    blocks = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C
    n, p, q, a = _place(tile, tiles_h, tiles_w, KSIZE, IMAGES, COLUMNS)
    gs = _sum(
        dy, dy, dy, w, n, p, q, a, N, H, W, K, c, C, KSIZE, False, False, TMA,
        IMAGES, COLUMNS, BLOCK_K, BLOCK_C, HELD, ACC, PRECISION,
    )  # fmt: skip
    source_gradient(
        gs, x, affine_ptr, dx, partial_ptr, tile, n, 2 * p + a, q, c, N, P, Q, C,
        AFFINE, RELU, 2, TMA_X, IMAGES, COLUMNS, BLOCK_C, ACC, DTYPE,
    )  # fmt: skip


# ---- launchers ---------------------------------------------------------------------------------------------------


def conv_up(source: Source, weight: Tensor, bias: Tensor | None, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, K, 2·H, 2·W), and its mean and biased variance (K,) if ``stats``, else empty, with W (C, K, ·, ·)."""
    channels, filters, ksize = weight.shape[:3]
    result = empty_nhwc(source.x, source.x.shape[0], filters, 2 * source.height, 2 * source.width)
    dtype = stats_dtype(result.dtype)
    if result.numel() == 0:
        mean = result.new_zeros(filters if stats else 0, dtype=dtype)
        return result, mean, mean.clone()
    weight = taps(weight)
    x, y = as_rows(source.x, ksize, 1), as_rows(result, ksize, 2)
    batch, _, height, width = x.shape
    outputs = y.shape[1]
    tma = movable(x) and movable_rows(weight) and movable(y, ksize - 1)
    tile = choose_strided(f"conv{ksize}x{ksize}_up", batch, channels, outputs, height, width, x, tma)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    tiles *= ksize - 1  # rows of y
    partials = [x.new_empty((tiles, outputs) if stats else 0, dtype=dtype) for _ in range(2)]
    counts = x.new_empty(tiles if stats else 0, dtype=dtype)
    launch(
        _conv_up_fwd_kernel, (tiles * cdiv(outputs, tile.outputs),),
        operand(x, tile, tile.reduction), source.affine_or_x, real_word(x.device),
        describe(weight, tuple(weight.shape), (tile.reduction, 1, tile.outputs), tma),
        x if bias is None else bias.contiguous(), parts(y, tile, tile.outputs, ksize - 1, tma),
        *partials, counts,
        batch, height, width, channels, outputs, tiles_h, tiles_w,
        KSIZE=ksize, AFFINE=source.affine is not None, RELU=source.relu, BIAS=bias is not None, STATS=stats,
        TMA=tma, HELD=held(x),
        IMAGES=tile.images, COLUMNS=tile.columns, BLOCK_C=tile.reduction, BLOCK_K=tile.outputs,
        ACC=accumulator(x.dtype), DTYPE=element(x.dtype), PRECISION=precision(x.dtype),
        **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not stats:
        return result, partials[0], partials[1]
    mean, m2 = (partial.view(-1, filters) for partial in partials)
    return result, *merge_stats(mean, m2, counts, outputs // filters)  # of a pixel pair, each a tile of its own


def conv_up_dgrad(dy: Tensor, weight: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """(dx, daffine) of the source of a 3×3 convolution of stride 2, from dY (N, K, P, Q) and W (K, C, 3, 3)."""
    x, channels = source.x, source.channels
    dx = empty_nhwc(x, *x.shape)
    dtype = stats_dtype(x.dtype)
    if dx.numel() == 0:
        return dx, x.new_zeros((3, channels) if source.affine is not None else 0, dtype=dtype)
    weight = taps(weight)
    batch, filters, height, width = dy.shape
    tma, tma_x = movable(dy) and movable_rows(weight), movable(x, 2) and movable(dx, 2)
    tile = choose_strided("conv3x3_up_dgrad", batch, filters, channels, height, width, dy, tma)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    tiles *= 2  # rows of dx
    partial = x.new_empty((tiles, 3, channels) if source.affine is not None else 0, dtype=dtype)
    part = tile.outputs // 2 if tile.outputs >= 64 else tile.outputs
    launch(
        _conv_up_dgrad_kernel, (tiles * cdiv(channels, tile.outputs),),
        operand(dy, tile, tile.reduction),
        describe(weight, tuple(weight.shape), (tile.reduction, 1, tile.outputs), tma),
        parts(x, tile, part, 2, tma_x), source.affine_or_x, parts(dx, tile, part, 2, tma_x), partial,
        batch, height, width, source.height, source.width, channels, filters, tiles_h, tiles_w,
        KSIZE=3, AFFINE=source.affine is not None, RELU=source.relu, TMA=tma, TMA_X=tma_x, HELD=held(dy),
        IMAGES=tile.images, COLUMNS=tile.columns, BLOCK_C=tile.outputs, BLOCK_K=tile.reduction,
        ACC=accumulator(x.dtype), DTYPE=element(x.dtype), PRECISION=precision(x.dtype),
        **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx, sum_slabs(partial) if source.affine is not None else partial
