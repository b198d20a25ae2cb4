"""Weight gradient of 3×3 convolutions of stride 1.

    dW[k,r,s,c] = Σ_{n,h,w} z[n,h,w,c] · dY[n, h − r + 1, w − s + 1, k],    z = act(scale·(x − centre) + shift)

Summed over the pixels of the source, not of dY: then the operand that is normalised needs no padding, and what lies
outside dY is zero by itself. A program sums one column s of the filter, its three rows r in an accumulator each, for
BLOCK_C channels and BLOCK_K outputs over a slab of tiles: of ROWS rows of IMAGES·COLUMNS pixels it loads and normalises
each row of z once, in registers, and multiplies it with three of the ROWS + 2 rows of dY. The slabs are summed in a
fixed order.

Layout: activations NHWC, dW (K,3,3,C). Bytes: reads dY and each source, writes and reads the slabs of dW.
Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels.common import (
    OPTIONS,
    Source,
    accumulator,
    add_product,
    cdiv,
    held,
    hold,
    launch,
    load_affine,
    precision,
    real_word,
    release,
    sum_slabs,
    tile_place,
)
from fastunet.kernels.conv3x3 import cropped, load_row, operand, replace
from fastunet.kernels.tiles import choose
from fastunet.layout import stats_dtype

SIZES = ["N", "H", "W", "top", "left", "H1", "W1", "top1", "left1", "P", "Q", "tiles", "tiles_h", "tiles_w",
         "tiles1", "tiles1_h", "tiles1_w", "slabs"]  # fmt: skip


@triton.jit
def _accumulate(
    accs, start, stop, x, affine_ptr, real_ptr, dy, s, c, C, k, K, N, H, W, top, left, P, Q, tiles_h, tiles_w,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add tiles start … stop of a source placed at (top, left) in dY's frame (P, Q)."""
    h_low, h_high = tl.maximum(0, -top), tl.minimum(H, P - top)
    w_low, w_high = tl.maximum(0, -left), tl.minimum(W, Q - left)
    scale, shift, centre = load_affine(affine_ptr, c + tl.arange(0, BLOCK_C), C, HAS_AFFINE, ACC)
    none = tl.zeros([BLOCK_K], ACC)
    for tile in tl.range(start, stop):
        n, h, w = tile_place(tile, tiles_h, tiles_w, IMAGES, ROWS, COLUMNS)
        rows = ()
        for i in tl.static_range(ROWS + 2):
            row = load_row(
                dy, dy, none, none, none, n, h + top + (i - 1), w + left + 1 - s, k, N, P, Q, K, 0, P, 0, Q,
                False, False, True, TMA, IMAGES, COLUMNS, BLOCK_K, ACC,
            )  # fmt: skip
            rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking
        for i in tl.static_range(ROWS):
            z = load_row(
                x, real_ptr, scale, shift, centre, n, h + i, w, c, N, H, W, C, h_low, h_high, w_low, w_high,
                HAS_AFFINE, RELU, MASKED, TMA, IMAGES, COLUMNS, BLOCK_C, ACC, 0,
            )  # fmt: skip
            for r in tl.static_range(3):  # dY's row h + i − r + 1 is number i − r + 2
                accs = replace(accs, r, add_product(accs[r], z, rows[i - r + 2], HELD, ACC, PRECISION))
    return accs


@triton.jit(do_not_specialize=SIZES)
def _conv3x3_wgrad_kernel(
    x, affine_ptr, x1, affine1_ptr, real_ptr, dy, partial_ptr,
    N, H, W, top, left, H1, W1, top1, left1, P, Q, C, C1, K, tiles, tiles_h, tiles_w, tiles1, tiles1_h, tiles1_w, slabs,
    AFFINE: tl.constexpr, RELU: tl.constexpr, TWO: tl.constexpr, AFFINE1: tl.constexpr, RELU1: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[slab, k, r, s, c] over the slab's tiles, for the channels of one source and then of the other."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    blocks0 = tl.cdiv(C, BLOCK_C)
    blocks = blocks0
    if TWO:
        blocks += tl.cdiv(C1, BLOCK_C)
    program = tl.program_id(0)
    s = program % 3
    block = program // 3 % blocks
    k = program // 3 // blocks % blocks_k * BLOCK_K
    slab = program // 3 // blocks // blocks_k
    accs = (hold(tl.zeros([BLOCK_C, BLOCK_K], ACC), HELD),) * 3
    c = block * BLOCK_C
    c_stop = C
    per_slab = tl.cdiv(tiles, slabs)
    start = slab * per_slab
    stop = tl.minimum(start + per_slab, tiles)
    if TWO:
        stop = tl.where(block < blocks0, stop, start)  # two loops, of which one is empty
    accs = _accumulate(
        accs, start, stop, x, affine_ptr, real_ptr, dy, s, c, C, k, K, N, H, W, top, left, P, Q, tiles_h, tiles_w,
        AFFINE, RELU, MASKED, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
    )  # fmt: skip
    if TWO:
        per_slab = tl.cdiv(tiles1, slabs)
        start = slab * per_slab
        stop = tl.where(block < blocks0, start, tl.minimum(start + per_slab, tiles1))
        accs = _accumulate(
            accs, start, stop, x1, affine1_ptr, real_ptr, dy, s, tl.maximum(c - blocks0 * BLOCK_C, 0), C1, k, K,
            N, H1, W1, top1, left1, P, Q, tiles1_h, tiles1_w,
            AFFINE1, RELU1, MASKED, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
        )  # fmt: skip
        c_stop = tl.where(block < blocks0, C, C + C1)
        c = tl.where(block < blocks0, c, c - blocks0 * BLOCK_C + C)
    channel = c + tl.arange(0, BLOCK_C)
    filters = k + tl.arange(0, BLOCK_K)
    mask = (channel < c_stop)[:, None] & (filters < K)[None, :]
    row = ((slab.to(tl.int64) * K + filters) * 9 + s)[None, :]
    for r in tl.static_range(3):
        tl.store(partial_ptr + (row + 3 * r) * (C + C1) + channel[:, None], release(accs[r], HELD, ACC), mask=mask)


def conv3x3_wgrad(dy: Tensor, weight: Tensor, sources: Sequence[Source]) -> Tensor:
    """dW (K, C, 3, 3), channels_last memory in stats_dtype, from dY (N, K, P, Q) and the sources."""
    first, second = sources[0], sources[-1]
    batch, filters, height, width = dy.shape
    channels = weight.shape[1]
    tile = choose(
        "conv3x3_wgrad", batch, [source.channels for source in sources], filters, height, width,
        [dy, *(source.x for source in sources)], pointers=any(cropped(source, (height, width)) for source in sources),
    )  # fmt: skip
    grids = [
        (
            cdiv(batch, tile.images),
            cdiv(source.height, tile.rows),
            cdiv(source.width, tile.columns),
        )
        for source in (first, second)
    ]
    tiles, tiles1 = (a * b * c for a, b, c in grids)
    exact = [tile.images, tile.rows, tile.columns]
    masked = any(
        size % part for source in sources for size, part in zip((batch, *source.x.shape[2:]), exact, strict=True)
    )
    masked = masked or any(cropped(source, (height, width)) for source in sources)
    blocks = sum(cdiv(source.channels, tile.reduction) for source in sources) * cdiv(filters, tile.outputs)
    # Enough programs to fill a large GPU a few times, of a few tiles each; the same on every GPU, for the same bits.
    slabs = max(1, min(cdiv(tiles, 4), cdiv(264, 3 * blocks)))
    partial = dy.new_empty((slabs, filters, 3, 3, channels), dtype=stats_dtype(dy.dtype))
    launch(
        _conv3x3_wgrad_kernel, (slabs * blocks * 3,),
        operand(first.x, tile, tile.reduction), first.affine_or_x,
        operand(second.x, tile, tile.reduction), second.affine_or_x, real_word(dy.device),
        operand(dy, tile, tile.outputs), partial,
        batch, first.height, first.width, first.top, first.left, second.height, second.width, second.top, second.left,
        height, width, first.channels, channels - first.channels, filters,
        tiles, grids[0][1], grids[0][2], tiles1, grids[1][1], grids[1][2], slabs,
        AFFINE=first.affine is not None, RELU=first.relu, TWO=len(sources) == 2,
        AFFINE1=second.affine is not None, RELU1=second.relu, MASKED=masked, TMA=tile.tma,
        IMAGES=tile.images, ROWS=tile.rows, COLUMNS=tile.columns, BLOCK_C=tile.reduction, BLOCK_K=tile.outputs,
        HELD=held(dy), ACC=accumulator(dy.dtype), PRECISION=precision(dy.dtype),
        **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return sum_slabs(partial).permute(0, 3, 1, 2)
