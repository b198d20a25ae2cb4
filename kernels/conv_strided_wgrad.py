"""Weight gradients of the convolutions of conv_down.py and conv_up.py.

    down  dW[k,r,s,c] = Σ_{n,p,q} z[n, p·stride + r − pad, q·stride + s − pad, c] · dY[n,p,q,k]
    up    dW[c,r,s,k] = Σ_{n,p,q} z[n,p,q,c] · dY[n, 2p + r − pad, 2q + s − pad, k]
    z = act(scale·(x − centre) + shift)

Tiles are of the coarser picture's pixels: dY's down, the source's up. A program sums one column s of the filter, its
KSIZE rows in an accumulator each, for a block of channels and one of outputs over a slab of tiles of images·columns
pixels of one row; what several rows of the filter read is loaded and normalised once. The slabs are summed in a fixed
order.

Layout: activations NHWC, dW (K,taps,C) or (C,taps,K) as the weights. Bytes: reads dY and the source, writes and reads
the slabs of dW. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import stats_dtype

from .common import Source, affine_of, cdiv, load_affine, replace, sum_slabs
from .gemm import Image, Pixel, add_product, first_pixel, load_pixels, operand, release, zeros
from .launching import launch, real_word
from .samples import by_tile
from .strided import as_rows
from .tiles import choose_strided, movable, slabs_of

SIZES = ["N", "H", "W", "P", "Q", "tiles", "tiles_h", "tiles_w", "slabs"]


@triton.jit(do_not_specialize=SIZES)
def _conv_strided_wgrad_kernel(
    x, affine_ptr, real_ptr, dy, partial_ptr,
    N, H, W, P, Q, C, K, tiles, tiles_h, tiles_w, slabs,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    MASKED: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """partial[slab, …] from x (N,H,W,C) and dY (N,P,Q,K); tiles cover the coarser of the two."""
    WIDE: tl.constexpr = 2 if KSIZE == 3 else 1
    PAD: tl.constexpr = WIDE - 1
    TAPS: tl.constexpr = 2 * WIDE - 1  # a row
    blocks_c = tl.cdiv(C, TILE.reduction)
    blocks_k = tl.cdiv(K, TILE.outputs)
    program = tl.program_id(0)
    s = program % TAPS
    c = program // TAPS % blocks_c * TILE.reduction
    k = program // TAPS // blocks_c % blocks_k * TILE.outputs
    slab = program // TAPS // blocks_c // blocks_k
    dy = Image(dy, N, P, Q, K, None, None, None)
    common = load_affine(affine_ptr, c + tl.arange(0, TILE.reduction), C)
    none = ()
    accs = zeros(TILE.reduction, TILE.outputs, KSIZE, NUM)
    per_slab = tl.cdiv(tiles, slabs)
    for number in tl.range(slab * per_slab, tl.minimum(slab * per_slab + per_slab, tiles)):
        at = first_pixel(number, tiles_h, tiles_w, TILE)
        affine = common
        if SAMPLES:
            affine = load_affine(affine_of(affine_ptr, at.n, C), c + tl.arange(0, TILE.reduction), C)
        if UP:
            z = load_pixels(
                Image(x, N, H, W, C, affine_ptr, SLOPE, real_ptr), affine, at, 0, c, None,
                TILE.reduction, MASKED, TILE, NUM.acc, 1, 0,
            )  # fmt: skip
            for r in tl.static_range(KSIZE):
                pixel = Pixel(at.n, STRIDE * at.h + r - PAD, at.w)
                row = load_pixels(dy, none, pixel, s - PAD, k, None, TILE.outputs, True, TILE, NUM.acc, WIDE)
                accs = replace(accs, r, add_product(accs[r], z, row, NUM))
        else:
            column = s + (WIDE - PAD)
            rows = ()
            for i in tl.static_range(PAD + 1):
                pixel = Pixel(at.n, at.h + i, at.w + 1 - column // WIDE)
                row = load_pixels(dy, none, pixel, 0, k, None, TILE.outputs, True, TILE, NUM.acc)
                rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking
            for a in tl.static_range(STRIDE):
                z = load_pixels(
                    Image(x, N, H, W, C, affine_ptr, SLOPE, real_ptr), affine, Pixel(at.n, STRIDE * at.h + a, at.w),
                    column % WIDE, c, None, TILE.reduction, MASKED, TILE, NUM.acc, WIDE, 0,
                )  # fmt: skip
                for r in tl.static_range(KSIZE):
                    if (r + PAD) % STRIDE == a:  # the row of the filter that lies on row STRIDE·h + a of x, over dY's
                        # row h, or h + 1
                        accs = replace(accs, r, add_product(accs[r], z, rows[1 if r < PAD else 0], NUM))
    channel = (c + tl.arange(0, TILE.reduction))[:, None]
    filters = (k + tl.arange(0, TILE.outputs))[None, :]
    mask = (channel < C) & (filters < K)
    for r in tl.static_range(KSIZE):
        tap = r * TAPS + s
        if UP:
            index = ((slab.to(tl.int64) * C + channel) * (KSIZE * TAPS) + tap) * K + filters
        else:
            index = ((slab.to(tl.int64) * K + filters) * (KSIZE * TAPS) + tap) * C + channel
        tl.store(partial_ptr + index, release(accs[r], NUM), mask=mask)


def conv_strided_wgrad(dy: Tensor, weight: Tensor, source: Source, up: bool) -> Tensor:
    """dW, shaped like ``weight``, in channels_last memory and stats_dtype.

    Of a convolution, 3×3 of stride 2 or 1×1, with W (K, C, ·, ·); if ``up`` of a transposed one, with W (C, K, ·, ·).
    """
    ksize = weight.shape[-1]
    stride = 1 if ksize == 1 else 2
    wide = 2 if ksize == 3 else 1
    apart = source.samples
    x, dy = as_rows(source.x, ksize, 1 if up else stride, apart), as_rows(dy, ksize, stride if up else 1, apart)
    channels, filters, (batch, _, height, width) = x.shape[1], dy.shape[1], (x if up else dy).shape
    tma_x, tma_y = movable(x, 1 if up else wide), movable(dy, wide if up else 1)
    kind = f"conv{ksize}x{ksize}_{'up' if up else 'down'}_wgrad"
    tile = choose_strided(kind, batch, channels, filters, height, width, x, tma_x and tma_y)
    (source,) = by_tile(tile, [source])
    x = as_rows(source.x, ksize, 1 if up else stride, apart)
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    masked = batch % tile.images or width % tile.columns or x.shape[2] != height * (1 if up else stride)
    masked = masked or x.shape[3] != width * (1 if up else wide)
    blocks = cdiv(channels, tile.reduction) * cdiv(filters, tile.outputs) * (2 * wide - 1)
    slabs = slabs_of(tiles, blocks)
    partial = dy.new_empty((slabs, weight.shape[0], ksize, ksize, weight.shape[1]), dtype=stats_dtype(dy.dtype))
    launch(
        _conv_strided_wgrad_kernel, (slabs * blocks,),
        operand(x, tile, tile.reduction, tma_x, 1 if up else wide), source.affine, real_word(dy.device),
        operand(dy, tile, tile.outputs, tma_y, wide if up else 1), partial,
        batch, x.shape[2], x.shape[3], dy.shape[2], dy.shape[3], channels, filters, tiles, tiles_h, tiles_w, slabs,
        KSIZE=ksize, STRIDE=stride, UP=up, SLOPE=source.act, SAMPLES=source.samples, MASKED=bool(masked),
        **tile.constants(dy),
    )  # fmt: skip
    return sum_slabs(partial).permute(0, 3, 1, 2)
