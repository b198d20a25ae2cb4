"""What convolutions of stride 2 share: pictures read and written every second column.

Kernels see a picture of width W as WIDE pictures of width W / WIDE: pixel (h, WIDE·q + b) is pixel (h, q) of part b.
Where WIDE is 2, TMA sees a tensor (N, H, W / WIDE, WIDE, C), whose strides fall.

A 2×2 filter of stride 2 is one of 2×1: two pixels that lie side by side in memory are one with twice the channels, and
(C,2,2,K) weights are (C,2,1,2·K) weights. So WIDE is 2 for 3×3 filters only.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels.affine import source_backward, store_affine_gradient
from fastunet.kernels.common import describe, halves, load_affine, load_channels, nhwc, normalise_real
from fastunet.kernels.tiles import Tile

MOST_COLUMNS = 2**30  # of a picture, whose columns 32 bits number, those of a last tile beyond it too


@triton.jit
def load_pixels(
    x, real_ptr, scale, shift, centre, n, h, q, s, c, N, H, W, C, WIDE: tl.constexpr,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
    AXIS: tl.constexpr = 1,
):  # fmt: skip
    """Pixels (h, WIDE·(q + i) + s), i < COLUMNS, of IMAGES pictures, BLOCK_C channels from c on; normalised, 0 out of
    bounds, with channels along ``AXIS``. −WIDE ≤ s."""
    pixel = tl.arange(0, IMAGES * COLUMNS)
    image = n + pixel // COLUMNS
    w = WIDE * (q + pixel % COLUMNS) + s
    width = tl.where((h >= 0) & (h < H), W, 0)
    real = tl.where(image < N, w, -1).to(tl.uint32) < width.to(tl.uint32)
    if TMA:
        if WIDE == 1:
            z = x.load([n, h, q + s, c]).reshape(IMAGES * COLUMNS, BLOCK_C)
        else:
            column = s + WIDE  # not negative
            z = x.load([n, h, q + column // WIDE - 1, column % WIDE, c]).reshape(IMAGES * COLUMNS, BLOCK_C)
        if AXIS == 0:
            z = z.T
    else:
        z = load_channels(x, image, h, w, c, H, W, C, real, MASKED, BLOCK_C, AXIS)
    if HAS_AFFINE or RELU:
        z = normalise_real(z, real, real_ptr, scale, shift, centre, HAS_AFFINE, RELU, MASKED, ACC, AXIS)
    return z


@triton.jit
def store_pixels(
    y, value, n, h, q, b, k, N, H, W, K, WIDE: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store value [IMAGES·COLUMNS, BLOCK_K] at pixels (h, WIDE·(q + i) + b), as far as they exist."""
    if TMA:
        if WIDE == 1:
            y.store([n, h, q, k], value.reshape(IMAGES, 1, COLUMNS, BLOCK_K))
        else:
            y.store([n, h, q, b, k], value.reshape(IMAGES, 1, COLUMNS, 1, BLOCK_K))
    else:
        pixel = tl.arange(0, IMAGES * COLUMNS)
        image = n + pixel // COLUMNS
        w = WIDE * (q + pixel % COLUMNS) + b
        channel = k + tl.arange(0, BLOCK_K)
        mask = ((image < N) & (w < tl.where(h < H, W, 0)))[:, None] & (channel < K)[None, :]
        tl.store(y + ((image.to(tl.int64) * H + h) * W + w)[:, None] * K + channel[None, :], value, mask=mask)


@triton.jit
def source_gradient(
    gs, x, affine_ptr, dx, partial_ptr, tile, n, h, q, c, N, H, W, C,
    AFFINE: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store dx, and this tile's share of daffine, from the gradients gs of the WIDE parts of z's row h: by halves where
    the registers do not suffice otherwise."""
    if BLOCK_C >= 64:
        low, high = halves(gs, WIDE, IMAGES * COLUMNS, BLOCK_C)
        _narrow_gradient(
            low, x, affine_ptr, dx, partial_ptr, tile, n, h, q, c, N, H, W, C,
            AFFINE, RELU, WIDE, TMA, IMAGES, COLUMNS, BLOCK_C // 2, ACC, DTYPE,
        )  # fmt: skip
        _narrow_gradient(
            high, x, affine_ptr, dx, partial_ptr, tile, n, h, q, c + BLOCK_C // 2, N, H, W, C,
            AFFINE, RELU, WIDE, TMA, IMAGES, COLUMNS, BLOCK_C // 2, ACC, DTYPE,
        )  # fmt: skip
    else:
        _narrow_gradient(
            gs, x, affine_ptr, dx, partial_ptr, tile, n, h, q, c, N, H, W, C,
            AFFINE, RELU, WIDE, TMA, IMAGES, COLUMNS, BLOCK_C, ACC, DTYPE,
        )  # fmt: skip


@triton.jit
def _narrow_gradient(
    gs, x, affine_ptr, dx, partial_ptr, tile, n, h, q, c, N, H, W, C,
    AFFINE: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same for few channels."""
    channel = c + tl.arange(0, BLOCK_C)
    scale, shift, centre = load_affine(affine_ptr, channel, C, AFFINE, ACC)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_C], ACC)
    pixel = tl.arange(0, IMAGES * COLUMNS)
    w_stop = tl.where(h < H, W, 0)
    for b in tl.static_range(WIDE):
        g = gs[b]
        if AFFINE or RELU:
            value = load_pixels(
                x, x, scale, shift, centre, n, h, q, b, c, N, H, W, C, WIDE, False, False, True, TMA,
                IMAGES, COLUMNS, BLOCK_C, ACC,
            )  # fmt: skip
            real = (n + pixel // COLUMNS < N) & (WIDE * (q + pixel % COLUMNS) + b < w_stop)
            g = tl.where(real[:, None], g, 0.0)
            g, gx, masked = source_backward(g, value, scale, shift, centre, AFFINE, RELU, ACC)
            if AFFINE:
                sum_gx += tl.sum(gx, 0)
                sum_g += tl.sum(masked, 0)
        store_pixels(dx, g.to(DTYPE), n, h, q, b, c, N, H, W, C, WIDE, TMA, IMAGES, COLUMNS, BLOCK_C)
    if AFFINE:
        store_affine_gradient(partial_ptr, tile, channel, C, scale, sum_gx, sum_g)


# ---- for the launchers -------------------------------------------------------------------------------------------


def as_rows(x: Tensor, ksize: int, stride: int) -> Tensor:
    """An NHWC tensor as the filter sees it that has ``stride`` on it: itself if that is 3×3.

    Of 2×2, each row or pair of rows is a picture, and pairs of pixels are one. Of 1×1, all pixels are one row if 32
    bits number them. So the tiles of small pictures come out full.
    """
    if ksize == 3 or (ksize == 1 and x.shape[0] * x.shape[2] * x.shape[3] > MOST_COLUMNS):
        return x
    pixels = x.permute(0, 2, 3, 1)
    shape = (1, 1, -1) if ksize == 1 else (-1, stride, pixels.shape[2] // stride)
    return pixels.reshape(*shape, x.shape[1] * stride).permute(0, 3, 1, 2)


def taps(weight: Tensor) -> Tensor:
    """Weights as (first, taps, second), where filters of 2×2 are 2×1."""
    ksize = weight.shape[-1]
    return nhwc(weight).permute(0, 2, 3, 1).reshape(weight.shape[0], 9 if ksize == 3 else ksize, -1)


def parts(x: Tensor, tile: Tile, channels: int, wide: int, tma: bool) -> Any:
    """An NHWC activation as the kernels read and write it, ``channels`` at a time."""
    batch, depth, height, width = x.shape
    if wide == 1:
        return describe(x, (batch, height, width, depth), (tile.images, 1, tile.columns, channels), tma)
    shape, blocks = (batch, height, width // wide, wide, depth), (tile.images, 1, tile.columns, 1, channels)
    return describe(x, shape, blocks, tma)
