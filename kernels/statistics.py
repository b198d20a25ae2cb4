"""Batch statistics of a convolution's output: each tile's, then merged in a fixed tree.

    mean = Σ y / n,    M2 = Σ (y − mean)²    of y as rounded to its dtype, over the pixels of a tile that exist
    merged: mean = Σ n_i·mean_i / n,    M2 = Σ (M2_i + n_i·(mean_i − mean)²)      (Chan, Golub, LeVeque 1979)

Bytes: 8 per channel and tile, written and read once, then a 64th of it. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels.common import OPTIONS, block


@triton.jit
def store_stats(
    ys, rows, tile, k, K, mean_ptr, m2_ptr, count_ptr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of a tile: ys are its ROWS rows [pixels, BLOCK_K], of which the first ``rows`` [pixels] exist."""
    count = tl.sum(tl.minimum(rows, ROWS), 0)
    n = tl.maximum(count, 1).to(ACC)  # a parity may have no pixel in the tile
    total = tl.zeros([BLOCK_K], ACC)
    for i in tl.static_range(ROWS):
        total += tl.sum(tl.where((rows > i)[:, None], ys[i].to(ACC), 0.0), 0)
    mean = total / n
    m2 = tl.zeros([BLOCK_K], ACC)
    for i in tl.static_range(ROWS):
        apart = tl.where((rows > i)[:, None], ys[i].to(ACC) - mean[None, :], 0.0)
        m2 += tl.sum(apart * apart, 0)
    place = tile.to(tl.int64) * K + k
    tl.store(mean_ptr + place, mean, mask=k < K)
    tl.store(m2_ptr + place, m2, mask=k < K)
    tl.store(count_ptr + tile, count.to(ACC))


@triton.jit(do_not_specialize=["tiles"])
def _merge_stats_kernel(
    mean_ptr, m2_ptr, count_ptr, out_mean_ptr, out_m2_ptr, out_count_ptr, tiles, K,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Merge GROUP tiles' (mean, M2, count) into one; the last merge stores the variance."""
    group = tl.program_id(0)
    t = group * GROUP + tl.arange(0, GROUP)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (t < tiles)[:, None] & (k < K)[None, :]
    place = t.to(tl.int64)[:, None] * K + k[None, :]
    n = tl.load(count_ptr + t, mask=t < tiles, other=0.0)
    mean = tl.load(mean_ptr + place, mask=mask, other=0.0)
    m2 = tl.load(m2_ptr + place, mask=mask, other=0.0)
    total = tl.sum(n, 0)
    merged = tl.sum(mean * n[:, None], 0) / tl.maximum(total, 1.0)
    apart = mean - merged[None, :]
    spread = tl.sum(m2 + apart * apart * n[:, None], 0)
    if LAST:
        spread = spread / tl.maximum(total, 1.0)
    out = group.to(tl.int64) * K + k
    tl.store(out_mean_ptr + out, merged, mask=k < K)
    tl.store(out_m2_ptr + out, spread, mask=k < K)
    if tl.program_id(1) == 0:
        tl.store(out_count_ptr + group, total)


def merge_stats(mean: Tensor, m2: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K,) from the tiles' (tiles, K) means and M2 and (tiles,) counts."""
    group = 64
    tiles, filters = mean.shape
    block_k = block(filters, 32)
    while True:
        groups = triton.cdiv(tiles, group)
        merged = mean.new_empty((groups, filters)), mean.new_empty((groups, filters)), mean.new_empty(groups)
        _merge_stats_kernel[(groups, triton.cdiv(filters, block_k))](
            mean, m2, count, *merged, tiles, filters,
            GROUP=group, BLOCK_K=block_k, LAST=groups == 1, **OPTIONS, num_warps=4,
        )  # fmt: skip
        mean, m2, count = merged
        tiles = groups
        if groups == 1:
            return mean[0], m2[0]
