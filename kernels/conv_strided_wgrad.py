"""Weight gradients of the convolutions of conv_down.py and conv_up.py.

    down  dW[k,r,s,c] = Σ_{n,p,q} z[n, p·stride + r − pad, q·stride + s − pad, c] · dY[n,p,q,k]
    up    dW[c,r,s,k] = Σ_{n,p,q} z[n,p,q,c] · dY[n, 2p + r − pad, 2q + s − pad, k]
    z = act(scale·(x − centre) + shift)

Summed over the pixels of the source: then the operand that is normalised needs no padding, and what lies outside dY is
zero by itself. A program sums one column s of the filter, its KSIZE rows in an accumulator each, for BLOCK_C channels
and BLOCK_K outputs over a slab of tiles of IMAGES·COLUMNS pixels of one row; what several rows of the filter read is
loaded and normalised once. The slabs are summed in a fixed order.

Layout: activations NHWC, dW (K,taps,C) or (C,taps,K) as the weights. Bytes: reads dY and the source, writes and reads
the slabs of dW. Accumulation: float32 (float64 for float64).
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
from fastunet.kernels.conv3x3 import replace
from fastunet.kernels.strided import as_rows, load_pixels, parts
from fastunet.kernels.tiles import choose_strided, movable
from fastunet.layout import stats_dtype

SIZES = ["N", "H", "W", "P", "Q", "tiles", "tiles_h", "tiles_w", "slabs"]


@triton.jit(do_not_specialize=SIZES)
def _conv_strided_wgrad_kernel(
    x, affine_ptr, real_ptr, dy, partial_ptr,
    N, H, W, P, Q, C, K, tiles, tiles_h, tiles_w, slabs,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
    AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, TMA_X: tl.constexpr, TMA_Y: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[slab, …] from x (N,H,W,C) and dY (N,P,Q,K); tiles cover the coarser of the two."""
    WIDE: tl.constexpr = 2 if KSIZE == 3 else 1
    PAD: tl.constexpr = WIDE - 1
    TAPS: tl.constexpr = 2 * WIDE - 1  # a row
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_k = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    s = program % TAPS
    c = program // TAPS % blocks_c * BLOCK_C
    k = program // TAPS // blocks_c % blocks_k * BLOCK_K
    slab = program // TAPS // blocks_c // blocks_k
    scale, shift, centre = load_affine(affine_ptr, c + tl.arange(0, BLOCK_C), C, AFFINE, ACC)
    none = tl.zeros([BLOCK_K], ACC)
    accs = (hold(tl.zeros([BLOCK_C, BLOCK_K], ACC), HELD),) * KSIZE
    per_slab = tl.cdiv(tiles, slabs)
    for tile in tl.range(slab * per_slab, tl.minimum(slab * per_slab + per_slab, tiles)):
        n, p, q = tile_place(tile, tiles_h, tiles_w, IMAGES, 1, COLUMNS)
        if UP:
            z = load_pixels(
                x, real_ptr, scale, shift, centre, n, p, q, 0, c, N, H, W, C,
                1, AFFINE, RELU, MASKED, TMA_X, IMAGES, COLUMNS, BLOCK_C, ACC, 0,
            )  # fmt: skip
            for r in tl.static_range(KSIZE):
                row = load_pixels(
                    dy, dy, none, none, none, n, STRIDE * p + r - PAD, q, s - PAD, k, N, P, Q, K,
                    WIDE, False, False, True, TMA_Y, IMAGES, COLUMNS, BLOCK_K, ACC,
                )  # fmt: skip
                accs = replace(accs, r, add_product(accs[r], z, row, HELD, ACC, PRECISION))
        else:
            column = s + (WIDE - PAD)
            rows = ()
            for i in tl.static_range(PAD + 1):
                row = load_pixels(
                    dy, dy, none, none, none, n, p + i, q + 1 - column // WIDE, 0, k, N, P, Q, K,
                    1, False, False, True, TMA_Y, IMAGES, COLUMNS, BLOCK_K, ACC,
                )  # fmt: skip
                rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking
            for a in tl.static_range(STRIDE):
                z = load_pixels(
                    x, real_ptr, scale, shift, centre, n, STRIDE * p + a, q, column % WIDE, c, N, H, W, C,
                    WIDE, AFFINE, RELU, MASKED, TMA_X, IMAGES, COLUMNS, BLOCK_C, ACC, 0,
                )  # fmt: skip
                for r in tl.static_range(KSIZE):
                    if (r + PAD) % STRIDE == a:  # the row of the filter that lies on row STRIDE·p + a of x, over
                        # dY's row p, or p + 1
                        accs = replace(
                            accs, r, add_product(accs[r], z, rows[1 if r < PAD else 0], HELD, ACC, PRECISION)
                        )
    channel = (c + tl.arange(0, BLOCK_C))[:, None]
    filters = (k + tl.arange(0, BLOCK_K))[None, :]
    mask = (channel < C) & (filters < K)
    for r in tl.static_range(KSIZE):
        tap = r * TAPS + s
        if UP:
            place = ((slab.to(tl.int64) * C + channel) * (KSIZE * TAPS) + tap) * K + filters
        else:
            place = ((slab.to(tl.int64) * K + filters) * (KSIZE * TAPS) + tap) * C + channel
        tl.store(partial_ptr + place, release(accs[r], HELD, ACC), mask=mask)


def conv_strided_wgrad(dy: Tensor, weight: Tensor, source: Source, up: bool) -> Tensor:
    """dW, shaped like ``weight``, in channels_last memory and stats_dtype.

    Of a convolution, 3×3 of stride 2 or 1×1, with W (K, C, ·, ·); if ``up`` of a transposed one, with W (C, K, ·, ·).
    """
    ksize = weight.shape[-1]
    stride = 1 if ksize == 1 else 2
    wide = 2 if ksize == 3 else 1
    x, dy = as_rows(source.x, ksize, 1 if up else stride), as_rows(dy, ksize, stride if up else 1)
    channels, filters, (batch, _, height, width) = x.shape[1], dy.shape[1], (x if up else dy).shape
    tma_x, tma_y = movable(x, 1 if up else wide), movable(dy, wide if up else 1)
    kind = f"conv{ksize}x{ksize}_{'up' if up else 'down'}_wgrad"
    tile = choose_strided(kind, batch, channels, filters, height, width, x, tma_x and tma_y)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    masked = batch % tile.images or width % tile.columns or x.shape[2] != height * (1 if up else stride)
    masked = masked or x.shape[3] != width * (1 if up else wide)
    blocks = cdiv(channels, tile.reduction) * cdiv(filters, tile.outputs) * (2 * wide - 1)
    # Enough programs to fill a large GPU a few times, of a few tiles each; the same on every GPU, for the same bits.
    slabs = max(1, min(cdiv(tiles, 4), cdiv(264, blocks)))
    partial = dy.new_empty((slabs, weight.shape[0], ksize, ksize, weight.shape[1]), dtype=stats_dtype(dy.dtype))
    launch(
        _conv_strided_wgrad_kernel, (slabs * blocks,),
        parts(x, tile, tile.reduction, 1 if up else wide, tma_x), source.affine_or_x, real_word(dy.device),
        parts(dy, tile, tile.outputs, wide if up else 1, tma_y), partial,
        batch, x.shape[2], x.shape[3], dy.shape[2], dy.shape[3], channels, filters, tiles, tiles_h, tiles_w, slabs,
        KSIZE=ksize, STRIDE=stride, UP=up, AFFINE=source.affine is not None, RELU=source.relu,
        MASKED=bool(masked), TMA_X=tma_x, TMA_Y=tma_y,
        IMAGES=tile.images, COLUMNS=tile.columns, BLOCK_C=tile.reduction, BLOCK_K=tile.outputs,
        HELD=held(dy), ACC=accumulator(dy.dtype), PRECISION=precision(dy.dtype),
        **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return sum_slabs(partial).permute(0, 3, 1, 2)
