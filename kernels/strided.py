"""What convolutions of stride 2 share: pictures read and written every second row and column.

Pixel (STRIDE·p + a, WIDE·q + b) of a picture is pixel (p, q) of its part (a, b). TMA sees a picture as one tensor
(N, rows, WIDE, W / WIDE, C) for each a: ``even`` has the rows with a = 0, ``odd`` those with a = 1. Kernels without TMA
get the whole picture twice.

A 2×2 filter of stride 2 is one of 2×1: two pixels that lie side by side in memory are one with twice the channels, and
(C,2,2,K) weights are (C,2,1,2·K) weights. So WIDE is 2 for 3×3 filters only.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastunet.kernels.affine import source_backward, store_affine_gradient
from fastunet.kernels.common import load_affine, nhwc, normalise
from fastunet.kernels.tiles import Tile


@triton.jit
def load_pixels(
    even, odd, scale, shift, centre, n, p, q, r: tl.constexpr, s, c, N, H, W, C,
    PAD: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pixels (STRIDE·p + r − PAD, WIDE·(q + i) + s − PAD), i < COLUMNS, of IMAGES pictures, BLOCK_C channels from c on;
    normalised, 0 out of bounds."""
    pixel = tl.arange(0, IMAGES * COLUMNS)
    image = n + pixel // COLUMNS
    h = STRIDE * p + (r - PAD)
    w = WIDE * (q + pixel % COLUMNS) + s - PAD
    w_stop = tl.where((h >= 0) & (h < H), W, 0)
    real = (image < N) & (w >= 0) & (w < w_stop)
    if TMA:
        column = s + (WIDE - PAD)  # not negative
        place = [n, p + (r - PAD) // STRIDE, column % WIDE, q + column // WIDE - 1, c]
        if (r - PAD) % STRIDE == 0:
            z = even.load(place).reshape(IMAGES * COLUMNS, BLOCK_C)
        else:
            z = odd.load(place).reshape(IMAGES * COLUMNS, BLOCK_C)
    else:
        channel = c + tl.arange(0, BLOCK_C)
        mask = (channel < C)[None, :]
        if MASKED:
            mask = mask & real[:, None]
        address = ((image.to(tl.int64) * H + h) * W + w)[:, None] * C + channel[None, :]
        z = tl.load(even + address, mask=mask, other=0.0)
    if HAS_AFFINE or RELU:
        z = normalise(z, scale, shift, centre, HAS_AFFINE, RELU, ACC).to(z.dtype)
        if MASKED:
            z = tl.where(real[:, None], z, 0.0)
    return z


@triton.jit
def store_pixels(
    even, odd, y, n, p, q, a: tl.constexpr, b: tl.constexpr, k, N, H, W, K,
    STRIDE: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store y [IMAGES·COLUMNS, BLOCK_K] at pixels (STRIDE·p + a, WIDE·(q + i) + b), as far as they exist."""
    if TMA:
        block = y.reshape(IMAGES, 1, 1, COLUMNS, BLOCK_K)
        if a == 0:
            even.store([n, p, b, q, k], block)
        else:
            odd.store([n, p, b, q, k], block)
    else:
        pixel = tl.arange(0, IMAGES * COLUMNS)
        image = n + pixel // COLUMNS
        h = STRIDE * p + a
        w = WIDE * (q + pixel % COLUMNS) + b
        channel = k + tl.arange(0, BLOCK_K)
        mask = ((image < N) & (w < tl.where(h < H, W, 0)))[:, None] & (channel < K)[None, :]
        tl.store(even + ((image.to(tl.int64) * H + h) * W + w)[:, None] * K + channel[None, :], y, mask=mask)


@triton.jit
def load_tap(w, k, c, tap, K, C, TAPS: tl.constexpr, K_FIRST: tl.constexpr, TMA: tl.constexpr,
             BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The weights [BLOCK_C, BLOCK_K] at ``tap``, from memory (K,TAPS,C) if K_FIRST, else (C,TAPS,K)."""
    if TMA:
        if K_FIRST:
            weights = w.load([k, tap, c]).reshape(BLOCK_K, BLOCK_C).T
        else:
            weights = w.load([c, tap, k]).reshape(BLOCK_C, BLOCK_K)
    else:
        channel = (c + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        filters = (k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        if K_FIRST:
            address = (filters * TAPS + tap) * C + channel
        else:
            address = (channel * TAPS + tap) * K + filters
        weights = tl.load(w + address, mask=(channel < C) & (filters < K), other=0.0)
    return weights


@triton.jit
def source_gradient(
    gs, x_even, x_odd, affine_ptr, dx_even, dx_odd, partial_ptr, tile, n, p, q, c, N, H, W, C,
    AFFINE: tl.constexpr, RELU: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store dx, and this tile's share of daffine, from the gradients gs of z's STRIDE² parts: by halves where the
    registers do not suffice otherwise."""
    if BLOCK_C >= 64:
        low = ()
        high = ()
        for i in tl.static_range(STRIDE * STRIDE):
            first, second = gs[i].reshape(IMAGES * COLUMNS, 2, BLOCK_C // 2).permute(0, 2, 1).split()
            low = low + (first,)  # noqa: RUF005 - Triton knows no unpacking
            high = high + (second,)  # noqa: RUF005
        _narrow_gradient(
            low, x_even, x_odd, affine_ptr, dx_even, dx_odd, partial_ptr, tile, n, p, q, c, N, H, W, C,
            AFFINE, RELU, STRIDE, TMA, IMAGES, COLUMNS, BLOCK_C // 2, ACC, DTYPE,
        )  # fmt: skip
        _narrow_gradient(
            high, x_even, x_odd, affine_ptr, dx_even, dx_odd, partial_ptr, tile, n, p, q, c + BLOCK_C // 2, N, H, W, C,
            AFFINE, RELU, STRIDE, TMA, IMAGES, COLUMNS, BLOCK_C // 2, ACC, DTYPE,
        )  # fmt: skip
    else:
        _narrow_gradient(
            gs, x_even, x_odd, affine_ptr, dx_even, dx_odd, partial_ptr, tile, n, p, q, c, N, H, W, C,
            AFFINE, RELU, STRIDE, TMA, IMAGES, COLUMNS, BLOCK_C, ACC, DTYPE,
        )  # fmt: skip


@triton.jit
def _narrow_gradient(
    gs, x_even, x_odd, affine_ptr, dx_even, dx_odd, partial_ptr, tile, n, p, q, c, N, H, W, C,
    AFFINE: tl.constexpr, RELU: tl.constexpr, STRIDE: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same for at most 64 channels."""
    channel = c + tl.arange(0, BLOCK_C)
    scale, shift, centre = load_affine(affine_ptr, channel, C, AFFINE, ACC)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_C], ACC)
    pixel = tl.arange(0, IMAGES * COLUMNS)
    for a in tl.static_range(STRIDE):
        for b in tl.static_range(STRIDE):
            g = gs[a * STRIDE + b]
            if AFFINE or RELU:
                x = load_pixels(
                    x_even, x_odd, scale, shift, centre, n, p, q, a, b, c, N, H, W, C,
                    0, STRIDE, STRIDE, False, False, True, TMA, IMAGES, COLUMNS, BLOCK_C, ACC,
                )  # fmt: skip
                w = STRIDE * (q + pixel % COLUMNS) + b
                real = (n + pixel // COLUMNS < N) & (w < tl.where(STRIDE * p + a < H, W, 0))
                g, gx, masked = source_backward(
                    tl.where(real[:, None], g, 0.0), x, scale, shift, centre, AFFINE, RELU, ACC
                )
                if AFFINE:
                    sum_gx += tl.sum(gx, 0)
                    sum_g += tl.sum(masked, 0)
            store_pixels(
                dx_even,
                dx_odd,
                g.to(DTYPE),
                n,
                p,
                q,
                a,
                b,
                c,
                N,
                H,
                W,
                C,
                STRIDE,
                STRIDE,
                TMA,
                IMAGES,
                COLUMNS,
                BLOCK_C,
            )
    if AFFINE:
        store_affine_gradient(partial_ptr, tile, channel, C, scale, sum_gx, sum_g)


# ---- for the launchers -------------------------------------------------------------------------------------------


def as_rows(x: Tensor, ksize: int, stride: int) -> Tensor:
    """An NHWC tensor as the filter sees it that has ``stride`` on it: itself if that is 3×3.

    Of 2×2, each row or pair of rows is a picture, and pairs of pixels are one. Of 1×1, all pixels are one row. So the
    tiles of small pictures come out full.
    """
    if ksize == 3:
        return x
    pixels = x.permute(0, 2, 3, 1)
    shape = (1, 1, -1) if ksize == 1 else (-1, stride, pixels.shape[2] // stride)
    return pixels.reshape(*shape, x.shape[1] * stride).permute(0, 3, 1, 2)


def parts(x: Tensor, tile: Tile, channels: int, stride: int, wide: int, tma: bool) -> tuple[Any, Any]:
    """(even, odd) of an NHWC activation as the kernels read and write it, ``channels`` at a time."""
    if not tma:
        return x, x
    batch, depth, height, width = x.shape
    strides = [height * width * depth, stride * width * depth, depth, wide * depth, 1]
    block = [tile.images, 1, 1, tile.columns, channels]
    even, *odd = (
        TensorDescriptor(
            x[:, :, a:], [batch, triton.cdiv(height - a, stride), wide, width // wide, depth], strides, block
        )
        for a in range(stride)
    )
    return even, odd[0] if odd else even


def taps(weight: Tensor) -> Tensor:
    """Weights as (first, taps, second) where filters of 2×2 are 2×1."""
    ksize = weight.shape[-1]
    return nhwc(weight).permute(0, 2, 3, 1).reshape(weight.shape[0], ksize * (3 if ksize == 3 else 1), -1)
