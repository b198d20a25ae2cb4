"""Statistics of a convolution's output, of the batch or of each sample: each tile's, then merged in a fixed tree.

    mean = Σ y / n,    M2 = Σ (y − mean)²    of y as rounded to its dtype, over the pixels of a tile that exist
    merged: mean = Σ n_i·mean_i / n,    M2 = Σ (M2_i + n_i·(mean_i − mean)²)      (Chan, Golub, LeVeque 1979)

Bytes: 8 per channel and tile, written and read once, then a 128th of it; `stats_of` reads y, which other kernels
have at hand; `add_shares` reads what several programs have summed of y, and writes y. Accumulation: float32 (float64
for float64).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import BATCH, SAMPLES, no_stats, stats_dtype

from .common import PROPAGATE_ALL, block, cdiv, dense, sum_products
from .launching import accumulator, launch


@triton.jit
def store_stats(
    ys, rows, slab, k, K, mean_ptr, m2_ptr, count_ptr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of a tile in its slab: ys are ROWS rows [pixels, BLOCK_K], of which the first ``rows`` [pixels]
    exist."""
    count = tl.sum(tl.minimum(rows, ROWS), 0)
    n = tl.maximum(count, 1).to(ACC)  # a tile beyond the border may hold none
    # Rows are added element by element, and over the warps once at the end: that goes through shared memory.
    total = tl.where((rows > 0)[:, None], ys[0].to(ACC), 0.0)
    for i in tl.static_range(1, ROWS):
        total += tl.where((rows > i)[:, None], ys[i].to(ACC), 0.0)
    mean = tl.sum(total, 0) / n
    squares = tl.zeros([rows.shape[0], BLOCK_K], ACC)
    for i in tl.static_range(ROWS):
        apart = tl.where((rows > i)[:, None], ys[i].to(ACC) - mean[None, :], 0.0)
        squares = tl.fma(apart, apart, squares)  # fused, so that `tl.sum` fuses nothing: see `sum_products`
    m2 = tl.sum(squares, 0)
    index = slab.row.to(tl.int64) * K + k
    tl.store(mean_ptr + index, mean, mask=k < K)
    tl.store(m2_ptr + index, m2, mask=k < K)
    tl.store(count_ptr + slab.count, count.to(ACC))


@triton.jit
def _formed(y_ptr, sums_ptr, bias, m, k, pixels, K, shares, stride):
    """y at pixels ``m`` [BLOCK_P] and channels ``k`` [BLOCK_K] as it is or will be stored; where; and what exists. Sums
    of one share lie ``stride`` pixels behind those of the one before."""
    mask = (m < pixels)[:, None] & (k < K)[None, :]
    index = m[:, None] * K + k[None, :]
    if sums_ptr is not None:
        total = tl.load(sums_ptr + index, mask=mask, other=0.0)
        for share in range(1, shares):
            total += tl.load(sums_ptr + share * stride.to(tl.int64) * K + index, mask=mask, other=0.0)
        y = (total + bias[None, :]).to(y_ptr.dtype.element_ty)
    else:
        y = tl.load(y_ptr + index, mask=mask, other=0.0)
    return y, index, mask


@triton.jit(do_not_specialize=["pixels", "shares", "rounds"])
def _batch_stats_kernel(
    y_ptr, sums_ptr, bias_ptr, mean_ptr, m2_ptr, count_ptr, pixels, K, shares, rounds,
    SAMPLES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The statistics of a tile of rounds·2·BLOCK_P pixels of y (pixels, K), which is formed first if there are sums.

    Sums are taken of the difference to the mean of the first pixels: what is subtracted from the sum of squares is then
    no larger than what remains.
    """
    number = tl.program_id(0)
    columns = K
    stride = pixels
    if SAMPLES:  # a tile's results of all samples lie side by side
        n = tl.program_id(2).to(tl.int64)
        y_ptr += n * pixels * K
        if sums_ptr is not None:
            sums_ptr += n * pixels * K
        mean_ptr += n * K
        m2_ptr += n * K
        columns = K * tl.num_programs(2)
        stride = pixels * tl.num_programs(2)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = number.to(tl.int64) * rounds * (2 * BLOCK_P)
    m = first + tl.arange(0, BLOCK_P)
    bias = tl.zeros([BLOCK_K], ACC)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)
    pivot = tl.zeros([BLOCK_K], ACC)
    if mean_ptr is not None:
        y, _, mask = _formed(y_ptr, sums_ptr, bias, m, k, pixels, K, shares, stride)
        some = tl.minimum(pixels - first, BLOCK_P).to(ACC)
        pivot = tl.sum(tl.where(mask, y.to(ACC), 0.0), 0) / some
    total = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    squares = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    for _ in range(rounds):
        for _ in tl.static_range(2):  # loads of both are in flight at once
            y, index, mask = _formed(y_ptr, sums_ptr, bias, m, k, pixels, K, shares, stride)
            if sums_ptr is not None:
                tl.store(y_ptr + index, y, mask=mask)
            if mean_ptr is not None:
                apart = tl.where(mask, y.to(ACC) - pivot[None, :], 0.0)
                total += apart
                squares += apart * apart
            m += BLOCK_P
    if mean_ptr is not None:
        count = tl.maximum(tl.minimum(pixels - first, rounds * (2 * BLOCK_P)), 1).to(ACC)
        apart = tl.sum(total, 0)
        out = number.to(tl.int64) * columns + k
        tl.store(mean_ptr + out, pivot + apart / count, mask=k < K)
        m2 = tl.maximum(tl.sum(squares, 0) - apart * (apart / count), 0.0, propagate_nan=PROPAGATE_ALL)
        tl.store(m2_ptr + out, m2, mask=k < K)
        tl.store(count_ptr + number, count)


class Partials:
    """Where tiles leave mean, M2 and count of ``channels`` channels, of the batch or of each sample: ``pointers`` for
    the kernel, each None if there are to be no ``stats``. There are so many ``tiles`` of the batch."""

    def __init__(self, x: Tensor, tiles: int, channels: int, stats: int):
        self.x, self.shape, dtype = x, stats_shape(x, channels, stats), stats_dtype(x.dtype)
        self.pointers: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None)
        if stats:
            tiles //= x.shape[0] if stats == SAMPLES else 1
            mean, m2 = (x.new_empty((tiles, math.prod(self.shape)), dtype=dtype) for _ in range(2))
            self.pointers = mean, m2, x.new_empty(tiles, dtype=dtype)

    def merged(self, channels: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, (K,) or (N, K), empty if they are not wanted; of tiles that hold several pixels'
        ``channels`` side by side each counts as a tile."""
        mean, m2, count = self.pointers
        if mean is None or m2 is None or count is None:
            return no_stats(self.x), no_stats(self.x)
        if channels is None or channels == mean.shape[1]:
            mean, var = merge_stats(mean, m2, count)
            return mean.view(self.shape), var.view(self.shape)
        return merge_stats(mean.view(-1, channels), m2.view(-1, channels), count, mean.shape[1] // channels)


def stats_shape(x: Tensor, channels: int, stats: int) -> tuple[int, ...]:
    """Of mean and variance of so many channels, of the batch or of each sample."""
    return (channels,) if stats == BATCH else (x.shape[0], channels) if stats == SAMPLES else (0,)


def of_nothing(x: Tensor, channels: int, stats: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of no pixels: zeros, or empty if there are to be no ``stats``."""
    zeros = x.new_zeros(stats_shape(x, channels, stats), dtype=stats_dtype(x.dtype))
    return zeros, zeros.clone()


def stats_of(y: Tensor, stats: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of y (N, K, H, W) in NHWC memory: (K,), or (N, K) of each sample; empty without
    ``stats``."""
    if y.numel() == 0 or not stats:
        return of_nothing(y, y.shape[1], stats)
    _, mean, var = _batch_stats(y, None, None, stats)
    return mean, var


def add_shares(sums: Tensor, y: Tensor, bias: Tensor | None, stats: int) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` (N, K, H, W), which is written: ``sums`` (shares, N, H, W, K) added in their order, and the bias; and y's
    mean and biased variance, (K,) or (N, K), empty without ``stats``."""
    return _batch_stats(y, sums, bias, stats)


def _batch_stats(y: Tensor, sums: Tensor | None, bias: Tensor | None, stats: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, its mean and its variance; those of each sample side by side."""
    apart = y.shape[0] if stats == SAMPLES else 1
    filters = y.shape[1]
    pixels = y.numel() // (filters * apart)
    block_k = block(filters, 64)
    block_p = (64 if filters % 16 == 0 else 32) // y.element_size()  # fewer of elements that have an address each
    # Programs enough for a large GPU, of a few pixels each; the same on every GPU, for the same bits.
    rounds = max(1, min(8, apart * pixels * cdiv(filters, block_k) // (2 * block_p * 2048)))
    tiles = cdiv(pixels, rounds * 2 * block_p)
    partials = Partials(y, tiles * apart, filters, stats)
    launch(
        _batch_stats_kernel, (tiles, cdiv(filters, block_k), apart),
        y, sums, dense(bias), *partials.pointers, pixels, filters, 0 if sums is None else sums.shape[0], rounds,
        SAMPLES=stats == SAMPLES, BLOCK_P=block_p, BLOCK_K=block_k, ACC=accumulator(y.dtype), num_warps=4,
    )  # fmt: skip
    return y, *partials.merged()


@triton.jit(do_not_specialize=["tiles"])
def _merge_stats_kernel(
    mean_ptr, m2_ptr, count_ptr, out_mean_ptr, out_m2_ptr, out_count_ptr, tiles, K,
    COUNTED: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Merge GROUP tiles' (mean, M2, count) into one, COUNTED tiles having one count; the last merge, whose count
    nobody needs, stores the variance."""
    group = tl.program_id(0)
    t = group * GROUP + tl.arange(0, GROUP)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (t < tiles)[:, None] & (k < K)[None, :]
    index = t.to(tl.int64)[:, None] * K + k[None, :]
    n = tl.load(count_ptr + t // COUNTED, mask=t < tiles, other=0.0)
    mean = tl.load(mean_ptr + index, mask=mask, other=0.0)
    m2 = tl.load(m2_ptr + index, mask=mask, other=0.0)
    total = tl.sum(n, 0)
    merged = sum_products(mean * n[:, None]) / tl.maximum(total, 1.0)
    apart = mean - merged[None, :]
    spread = tl.sum(m2 + apart * apart * n[:, None], 0)
    if out_count_ptr is None:
        spread = spread / tl.maximum(total, 1.0)
    out = group.to(tl.int64) * K + k
    tl.store(out_mean_ptr + out, merged, mask=k < K)
    tl.store(out_m2_ptr + out, spread, mask=k < K)
    if out_count_ptr is not None:  # noqa: SIM102 - known when it is compiled
        if tl.program_id(1) == 0:
            tl.store(out_count_ptr + group, total)


def merge_stats(mean: Tensor, m2: Tensor, count: Tensor, counted: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K,) from the tiles' (tiles, K) means and M2, and their (tiles / counted,) counts, each
    of ``counted`` tiles in a row."""
    tiles, filters = mean.shape
    while True:
        # A second launch costs the host more than narrow rows cost the GPU.
        group = 128 if tiles <= 128 else 1024
        groups, block_k = cdiv(tiles, group), block(filters, 4096 // group, 4)
        last = groups == 1
        merged = [mean.new_empty(filters if last else (groups, filters)) for _ in range(2)]
        counts = None if last else mean.new_empty(groups)
        launch(
            _merge_stats_kernel, (groups, cdiv(filters, block_k)),
            mean, m2, count, *merged, counts, tiles, filters,
            COUNTED=counted, GROUP=group, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
        mean, m2 = merged
        if counts is None:
            return mean, m2
        count, tiles, counted = counts, groups, 1
