"""Convolutions onto a grid as coarse as the input's or half of it: 3×3 of stride 2, and 1×1.

    y[n,p,q,k] = bias[k] + Σ_{r,s,c} z[n, p·stride + r − pad, q·stride + s − pad, c] · W[k,c,r,s]
    z = act(scale·(x − centre) + shift)

The gradients with respect to z of transposed convolutions of stride 2 (2×2, and 3×3) and of 1×1 convolutions are the
same sum over dY; the epilogue of the dgrad kernel turns them into dx and daffine. One main loop serves both.

A program computes IMAGES·COLUMNS pixels of one row, for BLOCK_K outputs. A step multiplies the KSIZE filters of one
column s with BLOCK_C channels. z is zero outside its source: padding comes after normalisation. TMA (Hopper and later)
fills zeros in by itself; act(shift) is masked only in tiles that touch the border.

Layout: activations NHWC, weights (outputs, taps, channels) or (channels, taps, outputs). Bytes: forward reads the
source and W and writes y; dgrad reads dY, W and the source and writes dx. Accumulation: float32 (float64 for float64).
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
from fastunet.kernels.statistics import merge_stats, store_stats
from fastunet.kernels.strided import as_rows, load_pixels, parts, source_gradient, store_pixels, taps
from fastunet.kernels.tiles import choose_strided, movable, movable_rows
from fastunet.layout import stats_dtype

SIZES = ["N", "H", "W", "P", "Q", "tiles_h", "tiles_w"]


@triton.jit
def _accumulate(
    acc, start, stop, x, affine_ptr, real_ptr, w, n, p, q, N, H, W, C, k, K,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr, K_FIRST: tl.constexpr,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, TMA_W: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add steps start … stop, each a block of channels at one column of the filter."""
    PAD: tl.constexpr = WIDE - 1
    TAPS: tl.constexpr = 2 * WIDE - 1  # a row
    for step in tl.range(start, stop):
        s = step % TAPS
        c = step // TAPS * BLOCK_C
        scale, shift, centre = load_affine(affine_ptr, c + tl.arange(0, BLOCK_C), C, HAS_AFFINE, ACC)
        for r in tl.static_range(KSIZE):
            z = load_pixels(
                x, real_ptr, scale, shift, centre, n, STRIDE * p + r - PAD, q, s - PAD, c, N, H, W, C, WIDE,
                HAS_AFFINE, RELU, MASKED, TMA, IMAGES, COLUMNS, BLOCK_C, ACC,
            )  # fmt: skip
            weights = load_tap(w, k, c, r * TAPS + s, K, C, KSIZE * TAPS, K_FIRST, TMA_W, BLOCK_C, BLOCK_K)
            acc = add_product(acc, z, weights, HELD, ACC, PRECISION)
    return acc


@triton.jit
def _sum(
    x, affine_ptr, real_ptr, w, n, p, q, N, H, W, C, k, K,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr, K_FIRST: tl.constexpr,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, TMA: tl.constexpr, TMA_W: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum [IMAGES·COLUMNS, BLOCK_K] at the tile whose first pixel is (p, q)."""
    acc = hold(tl.zeros([IMAGES * COLUMNS, BLOCK_K], ACC), HELD)
    steps = tl.cdiv(C, BLOCK_C) * (2 * WIDE - 1)
    # As in conv3x3.py: two loops, of which one is empty.
    MAY_MASK: tl.constexpr = HAS_AFFINE or not TMA
    free = steps
    if MAY_MASK:
        above = (p >= WIDE - 1) & (q >= WIDE - 1) & (n + IMAGES <= N)
        below = (STRIDE * (p + 1) <= H) & (WIDE * (q + COLUMNS) <= W)
        free = tl.where(above & below, steps, 0)
    acc = _accumulate(
        acc, 0, free, x, affine_ptr, real_ptr, w, n, p, q, N, H, W, C, k, K, KSIZE, STRIDE, WIDE, K_FIRST,
        HAS_AFFINE, RELU, False, TMA, TMA_W, IMAGES, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
    )  # fmt: skip
    if MAY_MASK:
        acc = _accumulate(
            acc, free, steps, x, affine_ptr, real_ptr, w, n, p, q, N, H, W, C, k, K, KSIZE, STRIDE, WIDE, K_FIRST,
            HAS_AFFINE, RELU, True, TMA, TMA_W, IMAGES, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
        )  # fmt: skip
    return release(acc, HELD, ACC)


@triton.jit(do_not_specialize=SIZES)
def _conv_down_fwd_kernel(
    x, affine_ptr, real_ptr, w, bias_ptr, y, mean_ptr, m2_ptr, count_ptr, N, H, W, P, Q, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr,
    BIAS: tl.constexpr, STATS: tl.constexpr, TMA: tl.constexpr, TMA_W: tl.constexpr, TMA_Y: tl.constexpr,
    HELD: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * BLOCK_K
    n, p, q = tile_place(tile, tiles_h, tiles_w, IMAGES, 1, COLUMNS)
    acc = _sum(
        x, affine_ptr, real_ptr, w, n, p, q, N, H, W, C, k, K, KSIZE, STRIDE, STRIDE, True,
        AFFINE, RELU, TMA, TMA_W, IMAGES, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
    )  # fmt: skip
    filters = k + tl.arange(0, BLOCK_K)
    if BIAS:
        acc += tl.load(bias_ptr + filters, mask=filters < K, other=0.0).to(ACC)[None, :]
    rounded = acc.to(DTYPE)
    store_pixels(y, rounded, n, p, q, 0, k, N, P, Q, K, 1, TMA_Y, IMAGES, COLUMNS, BLOCK_K)
    if STATS:
        pixel = tl.arange(0, IMAGES * COLUMNS)
        rows = ((n + pixel // COLUMNS < N) & (q + pixel % COLUMNS < Q)).to(tl.int32)
        store_stats((rounded,), rows, tile, filters, K, mean_ptr, m2_ptr, count_ptr, 1, BLOCK_K, ACC)


@triton.jit(do_not_specialize=SIZES)
def _conv_down_dgrad_kernel(
    dy, w, x, affine_ptr, dx, partial_ptr, N, H, W, P, Q, C, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr,
    TMA: tl.constexpr, TMA_W: tl.constexpr, TMA_X: tl.constexpr, HELD: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (N,P,Q,C) and daffine from dY (N,H,W,K)."""
    blocks = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C
    n, p, q = tile_place(tile, tiles_h, tiles_w, IMAGES, 1, COLUMNS)
    g = _sum(
        dy, dy, dy, w, n, p, q, N, H, W, K, c, C, KSIZE, STRIDE, 2 if KSIZE == 3 else 1, KSIZE > 1,
        False, False, TMA, TMA_W, IMAGES, COLUMNS, BLOCK_K, BLOCK_C, HELD, ACC, PRECISION,
    )  # fmt: skip
    source_gradient(
        (g,), x, affine_ptr, dx, partial_ptr, tile, n, p, q, c, N, P, Q, C,
        AFFINE, RELU, 1, TMA_X, IMAGES, COLUMNS, BLOCK_C, ACC, DTYPE,
    )  # fmt: skip


# ---- launchers ---------------------------------------------------------------------------------------------------


def conv_down(
    source: Source, weight: Tensor, bias: Tensor | None, stats: bool, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, K, ⌈H/stride⌉, ⌈W/stride⌉), and its mean and biased variance (K,) if ``stats``, else empty.

    ``weight`` is (K, C, 3, 3) for stride 2, (K, C, 1, 1) for stride 1.
    """
    filters, channels, ksize = weight.shape[:3]
    result = empty_nhwc(source.x, source.x.shape[0], filters, cdiv(source.height, stride), cdiv(source.width, stride))
    dtype = stats_dtype(result.dtype)
    if result.numel() == 0:
        mean = result.new_zeros(filters if stats else 0, dtype=dtype)
        return result, mean, mean.clone()
    weight = taps(weight)
    x, y = as_rows(source.x, ksize, stride), as_rows(result, ksize, 1)
    batch, _, height, width = y.shape
    tma, tma_w, tma_y = movable(x, stride), movable_rows(weight), movable(y)
    tile = choose_strided(f"conv{ksize}x{ksize}_down", batch, channels, filters, height, width, x, tma)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    partials = [x.new_empty((tiles, filters) if stats else 0, dtype=dtype) for _ in range(2)]
    counts = x.new_empty(tiles if stats else 0, dtype=dtype)
    launch(
        _conv_down_fwd_kernel, (tiles * cdiv(filters, tile.outputs),),
        parts(x, tile, tile.reduction, stride, tma), source.affine_or_x, real_word(x.device),
        describe(weight, tuple(weight.shape), (tile.outputs, 1, tile.reduction), tma_w),
        x if bias is None else bias.contiguous(), parts(y, tile, tile.outputs, 1, tma_y), *partials, counts,
        batch, x.shape[2], x.shape[3], height, width, channels, filters, tiles_h, tiles_w,
        KSIZE=ksize, STRIDE=stride, AFFINE=source.affine is not None, RELU=source.relu,
        BIAS=bias is not None, STATS=stats, TMA=tma, TMA_W=tma_w, TMA_Y=tma_y, HELD=held(x),
        IMAGES=tile.images, COLUMNS=tile.columns, BLOCK_C=tile.reduction, BLOCK_K=tile.outputs,
        ACC=accumulator(x.dtype), DTYPE=element(x.dtype), PRECISION=precision(x.dtype),
        **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return result, *(merge_stats(partials[0], partials[1], counts) if stats else partials)


def conv_down_dgrad(dy: Tensor, weight: Tensor, source: Source, stride: int) -> tuple[Tensor, Tensor]:
    """(dx, daffine) of the source, from dY.

    Of a transposed convolution of stride 2, whose ``weight`` is (C, K, ·, ·); or of stride 1 and 1×1, (K, C, 1, 1).
    """
    ksize, channels = weight.shape[-1], source.channels
    wide = 2 if ksize == 3 else 1
    gradient = empty_nhwc(source.x, *source.x.shape)
    dtype = stats_dtype(gradient.dtype)
    if gradient.numel() == 0:
        return gradient, gradient.new_zeros((3, channels) if source.affine is not None else 0, dtype=dtype)
    weight = taps(weight)
    x, dx, dy = as_rows(source.x, ksize, 1), as_rows(gradient, ksize, 1), as_rows(dy, ksize, stride)
    filters = dy.shape[1]
    batch, _, height, width = x.shape
    tma, tma_w, tma_x = movable(dy, wide), movable_rows(weight), movable(x) and movable(dx)
    tile = choose_strided(f"conv{ksize}x{ksize}_down_dgrad", batch, filters, channels, height, width, dy, tma)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    partial = x.new_empty((tiles, 3, channels) if source.affine is not None else 0, dtype=dtype)
    part = tile.outputs // 2 if tile.outputs >= 64 else tile.outputs
    first, second = (tile.outputs, tile.reduction) if ksize > 1 else (tile.reduction, tile.outputs)
    launch(
        _conv_down_dgrad_kernel, (tiles * cdiv(channels, tile.outputs),),
        parts(dy, tile, tile.reduction, wide, tma),
        describe(weight, tuple(weight.shape), (first, 1, second), tma_w),
        parts(x, tile, part, 1, tma_x), source.affine_or_x, parts(dx, tile, part, 1, tma_x), partial,
        batch, dy.shape[2], dy.shape[3], height, width, channels, filters, tiles_h, tiles_w,
        KSIZE=ksize, STRIDE=stride, AFFINE=source.affine is not None, RELU=source.relu,
        TMA=tma, TMA_W=tma_w, TMA_X=tma_x, HELD=held(dy),
        IMAGES=tile.images, COLUMNS=tile.columns, BLOCK_C=tile.outputs, BLOCK_K=tile.reduction,
        ACC=accumulator(x.dtype), DTYPE=element(x.dtype), PRECISION=precision(x.dtype),
        **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return gradient, sum_slabs(partial) if source.affine is not None else partial
