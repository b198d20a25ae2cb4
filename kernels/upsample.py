"""Bilinear or nearest ×2 of a source, padded or cropped to a skip source and concatenated with it, in one pass.

Forward:   y = cat(skip's value, u centred in skip's size) along the channels, in either order, where u is interpolated
           from z = act(scale·(x − centre) + shift) and rounded once
Backward:  dz[h, w] = Σ weight_h·weight_w·dy over the 4×4 outputs 2h−1 .. 2h+2 by 2w−1 .. 2w+2: a gather in a fixed
           order, without atomics or a zero fill; dx and daffine follow from dz in the same pass, as in ``affine.py``

Coordinates. Output o reads sources i = max(o − 1, 0) // 2 and i + 1 (at most H − 1), with weights 1 − λ and λ:
    align_corners=False   at o/2 − 1/4            λ = 1/4 for odd o, 3/4 for even o
    nearest (None)        at ⌊o/2⌋                λ = 0 for odd o, 1 for even o
    align_corners=True    at o·(H − 1)/(2H − 1)   λ = (H − 1 − i)/(2H − 1) for odd o, (2H − 2 − i)/(2H − 1) for even o
and λ = 0 for o = 0: exact in integers up to the last division, where PyTorch rounds o·(H − 1)/(2H − 1) in float32.
So outputs 2i + 1 and 2i + 2 lie between sources i and i + 1, from i = −1 on: a forward program takes one row of such
cells, in which four source values give four outputs.

Layout: NHWC. Bytes: forward reads x (four times, all but one from the caches) and skip and writes y; backward reads dy
(likewise), x and skip and writes dx and dskip. Accumulation in float32 (float64 for float64 tensors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import (
    affine_gradient,
    affine_slabs,
    flat_tile,
    no_gradients,
    source_backward,
    source_gradient,
    store_affine_gradient,
)
from .common import act, affine_of, by_sample, cdiv, dense, empty_nhwc, load_affine, nhwc, normalise, slab_of
from .launching import accumulator, launch

_ACCESSES = 1  # 16-byte accesses per thread and tap
_ROUNDS = 4  # tiles of one row per program of the backward, which share a slab of sums


@triton.jit
def _fraction(o, size, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """λ of output ``o`` ≥ 0: the weight of the second of its two sources, of ``size``."""
    even = o % 2 == 0
    if ALIGN_CORNERS is None:
        fraction = tl.where(even, 1.0, 0.0).to(ACC)
    elif ALIGN_CORNERS:
        i = tl.maximum(o - 1, 0) // 2
        numerator = size - 1 - i + tl.where(even, size - 1, 0)
        fraction = numerator.to(ACC) / (2 * size - 1).to(ACC)
    else:
        fraction = tl.where(even, 0.75, 0.25).to(ACC)
    return tl.where(o == 0, 0.0, fraction)


@triton.jit
def _weight(o, tap: tl.constexpr, size, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """The weight in output ``o`` = 2i − 1 + tap of source i: λ as the second of its sources, for taps 0 and 1, or 1 − λ
    as the first; 1 at the ends, where both sources are the same."""
    fraction = _fraction(tl.maximum(o, 0), size, ALIGN_CORNERS, ACC)
    weight = fraction if tap < 2 else 1.0 - fraction
    return tl.where((o == 0) | (o == 2 * size - 1), 1.0, weight)


@triton.jit
def _lerp(a, b, fraction, ALIGN_CORNERS: tl.constexpr):
    if ALIGN_CORNERS is None:  # 0·NaN is NaN
        return tl.where(fraction > 0.5, b, a)
    else:
        return (1.0 - fraction) * a + fraction * b


@triton.jit(do_not_specialize=["H", "W", "YH", "YW", "top", "left", "first_h", "first_w", "cells_h", "blocks"])
def _upsample_concat_fwd_kernel(
    x_ptr, affine_ptr, skip_ptr, skip_affine_ptr, y_ptr,
    C, CS, H, W, YH, YW, top, left, first_h, first_w, cells_h, blocks,
    SLOPE: tl.constexpr, SKIP_SLOPE: tl.constexpr, SAMPLES: tl.constexpr, SKIP_SAMPLES: tl.constexpr,
    SKIP_FIRST: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Cells from (first_h, first_w) on, the first that touch y (YH, YW), which holds output (0, 0) at (top, left); cell
    −1 is the first that holds an output."""
    pid = tl.program_id(0)
    q = pid // blocks
    n = (q // cells_h).to(tl.int64)
    i = first_h + q % cells_h
    j = first_w + (pid % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    # The four outputs of a cell are rows h, h + 1 by columns w, w + 1 of y.
    h = 2 * i + 1 + top
    w = 2 * j + 1 + left
    end0 = tl.where((h >= 0) & (h < YH), YW, 0)  # a row outside y has no columns
    end1 = tl.where((h + 1 >= 0) & (h + 1 < YH), YW, 0)
    in00 = ((w >= 0) & (w < end0))[:, None]
    in01 = ((w + 1 >= 0) & (w + 1 < end0))[:, None]
    in10 = ((w >= 0) & (w < end1))[:, None]
    in11 = ((w + 1 >= 0) & (w + 1 < end1))[:, None]
    pixel = ((n * YH + h) * YW + w)[:, None]
    stride = C + CS
    group = tl.program_id(1)
    up_groups = tl.cdiv(C, BLOCK_C)
    if group < up_groups:
        c = group * BLOCK_C + tl.arange(0, BLOCK_C)
        channel = (c < C)[None, :]
        if SAMPLES:
            affine_ptr = affine_of(affine_ptr, n, C)
        affine = load_affine(affine_ptr, c, C)
        source = ((j >= -1) & (j < tl.where((i >= -1) & (i < H), W, -1)))[:, None] & channel
        row0 = (n * H + tl.maximum(i, 0)) * W
        row1 = (n * H + tl.minimum(i + 1, H - 1)) * W
        j0 = tl.maximum(j, 0)
        j1 = tl.minimum(j + 1, W - 1)
        z00 = tl.load(x_ptr + (row0 + j0)[:, None] * C + c[None, :], mask=source, other=0.0)
        z01 = tl.load(x_ptr + (row0 + j1)[:, None] * C + c[None, :], mask=source, other=0.0)
        z10 = tl.load(x_ptr + (row1 + j0)[:, None] * C + c[None, :], mask=source, other=0.0)
        z11 = tl.load(x_ptr + (row1 + j1)[:, None] * C + c[None, :], mask=source, other=0.0)
        z00 = normalise(z00, affine, SLOPE, ACC)
        z01 = normalise(z01, affine, SLOPE, ACC)
        z10 = normalise(z10, affine, SLOPE, ACC)
        z11 = normalise(z11, affine, SLOPE, ACC)
        lambda_h0 = _fraction(tl.maximum(2 * i + 1, 0), H, ALIGN_CORNERS, ACC)
        lambda_h1 = _fraction(tl.maximum(2 * i + 2, 0), H, ALIGN_CORNERS, ACC)
        lambda_w0 = _fraction(tl.maximum(2 * j + 1, 0), W, ALIGN_CORNERS, ACC)[:, None]
        lambda_w1 = _fraction(tl.maximum(2 * j + 2, 0), W, ALIGN_CORNERS, ACC)[:, None]
        above0 = _lerp(z00, z01, lambda_w0, ALIGN_CORNERS)
        above1 = _lerp(z00, z01, lambda_w1, ALIGN_CORNERS)
        below0 = _lerp(z10, z11, lambda_w0, ALIGN_CORNERS)
        below1 = _lerp(z10, z11, lambda_w1, ALIGN_CORNERS)
        # The padding is zero after the activation: 0, not act(shift).
        end0 = tl.where((i >= 0) & (i < H), W, 0)
        end1 = tl.where((i + 1 >= 0) & (i + 1 < H), W, 0)
        y00 = tl.where(((j >= 0) & (j < end0))[:, None], _lerp(above0, below0, lambda_h0, ALIGN_CORNERS), 0.0)
        y01 = tl.where(((j + 1 >= 0) & (j + 1 < end0))[:, None], _lerp(above1, below1, lambda_h0, ALIGN_CORNERS), 0.0)
        y10 = tl.where(((j >= 0) & (j < end1))[:, None], _lerp(above0, below0, lambda_h1, ALIGN_CORNERS), 0.0)
        y11 = tl.where(((j + 1 >= 0) & (j + 1 < end1))[:, None], _lerp(above1, below1, lambda_h1, ALIGN_CORNERS), 0.0)
        index = pixel * stride + (CS if SKIP_FIRST else 0) + c[None, :]
        tl.store(y_ptr + index, y00, mask=in00 & channel)
        tl.store(y_ptr + index + stride, y01, mask=in01 & channel)
        index += YW.to(tl.int64) * stride
        tl.store(y_ptr + index, y10, mask=in10 & channel)
        tl.store(y_ptr + index + stride, y11, mask=in11 & channel)
    elif skip_ptr is not None:
        c = (group - up_groups) * BLOCK_C + tl.arange(0, BLOCK_C)
        channel = (c < CS)[None, :]
        if SKIP_SAMPLES:
            skip_affine_ptr = affine_of(skip_affine_ptr, n, CS)
        skip_affine = load_affine(skip_affine_ptr, c, CS)
        index = pixel * CS + c[None, :]
        row = YW.to(tl.int64) * CS
        z00 = tl.load(skip_ptr + index, mask=in00 & channel, other=0.0)
        z01 = tl.load(skip_ptr + index + CS, mask=in01 & channel, other=0.0)
        z10 = tl.load(skip_ptr + index + row, mask=in10 & channel, other=0.0)
        z11 = tl.load(skip_ptr + index + row + CS, mask=in11 & channel, other=0.0)
        z00 = normalise(z00, skip_affine, SKIP_SLOPE, ACC)
        z01 = normalise(z01, skip_affine, SKIP_SLOPE, ACC)
        z10 = normalise(z10, skip_affine, SKIP_SLOPE, ACC)
        z11 = normalise(z11, skip_affine, SKIP_SLOPE, ACC)
        index = pixel * stride + (0 if SKIP_FIRST else C) + c[None, :]
        tl.store(y_ptr + index, z00, mask=in00 & channel)
        tl.store(y_ptr + index + stride, z01, mask=in01 & channel)
        index += YW.to(tl.int64) * stride
        tl.store(y_ptr + index, z10, mask=in10 & channel)
        tl.store(y_ptr + index + stride, z11, mask=in11 & channel)


@triton.jit(do_not_specialize=["N", "H", "W", "YH", "YW", "top", "left", "segments"])
def _upsample_bwd_kernel(
    dy_ptr, x_ptr, affine_ptr, dx_ptr, partial_ptr, N, C, dy_stride, H, W, YH, YW, top, left, segments,
    SLOPE: tl.constexpr, SAMPLES: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    ACC: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx and daffine from dy, whose pointer is at the first channel of the upsampled half."""
    slab = tl.program_id(0)
    q = slab // segments
    n = (q // H).to(tl.int64)
    h = q % H
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = (c < C)[None, :]
    sum_gx = tl.zeros([BLOCK_W, BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_W, BLOCK_C], ACC)
    first_h, end_h = tl.maximum(top, 0), tl.minimum(top + 2 * H, YH)  # the part of y that holds outputs
    first_w, end_w = tl.maximum(left, 0), tl.minimum(left + 2 * W, YW)
    start = (slab % segments) * (ROUNDS * BLOCK_W)
    stop = tl.minimum(start + ROUNDS * BLOCK_W, W)
    while start < stop:
        w = start + tl.arange(0, BLOCK_W)
        inside = (w < W)[:, None] & channel
        dz = tl.zeros([BLOCK_W, BLOCK_C], ACC)
        for r in tl.static_range(4):
            oh = 2 * h - 1 + r
            yh = oh + top
            end = tl.where((yh >= first_h) & (yh < end_h), end_w, 0)  # a row outside has no columns
            row = tl.zeros([BLOCK_W, BLOCK_C], ACC)
            for s in tl.static_range(4):
                # Nearest: 2×2 outputs of weight 1. Triton 3.6 knows no chain of comparisons.
                if ALIGN_CORNERS is not None or ((r == 1 or r == 2) and (s == 1 or s == 2)):
                    ow = 2 * w - 1 + s
                    yw = ow + left
                    index = ((n * YH + yh) * YW + yw)[:, None] * dy_stride + c[None, :]
                    dy = tl.load(dy_ptr + index, mask=((yw >= first_w) & (yw < end))[:, None] & inside, other=0.0)
                    row += _weight(ow, s, W, ALIGN_CORNERS, ACC)[:, None] * dy.to(ACC)
            dz += _weight(oh, r, H, ALIGN_CORNERS, ACC) * row
        x_index = ((n * H + h) * W + w)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + x_index, mask=inside, other=0.0)
        affine = load_affine(affine_ptr, c, C)  # here: the taps need the registers
        dx, gx, g = source_backward(dz, x, affine, SLOPE, ACC)
        tl.store(dx_ptr + x_index, dx, mask=inside)
        if affine_ptr is not None:
            sum_gx += gx
            sum_g += g
        start += BLOCK_W
    if affine_ptr is not None:
        affine = load_affine(affine_ptr, c, C)
        slab = slab_of(slab, n, N, H * segments, SAMPLES).row
        store_affine_gradient(partial_ptr, slab, c, C, affine.scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))


def _tile(x: Tensor, *channels: int) -> tuple[int, int]:
    """(pixels, channels) of a tile for tensors like ``x`` with these numbers of channels; an eighth of the pixels where
    accesses are of single elements, as 16 taps with an address for each element do not fit into the registers."""
    block_w, block_c = flat_tile(max(channels), x.element_size(), _ACCESSES)
    return block_w if all(c % 16 == 0 for c in channels) else max(block_w // 8, 1), block_c


def _centred(x: Tensor, skip: Tensor | None) -> tuple[int, int, int, int]:
    """(height, width, top, left): the result's size, and where in it the doubled picture begins."""
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    if skip is None:
        return height, width, 0, 0
    return skip.shape[2], skip.shape[3], (skip.shape[2] - height) // 2, (skip.shape[3] - width) // 2


def upsample_concat(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    skip_slope: float,
    align_corners: bool | None,
    skip_first: bool,
) -> Tensor:
    """×2 of a source (N, C, H, W), bilinear, or nearest if ``align_corners`` is None.

    Centred in the size of a skip source (N, CS, YH, YW) by zero padding or cropping, and concatenated with it:
    (N, C + CS, YH, YW), or (N, C, 2H, 2W) without one; channels_last, x's dtype.
    """
    batch, channels, height, width = x.shape
    skip_channels = 0 if skip is None else skip.shape[1]
    y_height, y_width, top, left = _centred(x, skip)
    y = empty_nhwc(x, batch, channels + skip_channels, y_height, y_width)
    if y.numel() == 0:
        return y
    # Output o belongs to cell (o − 1) // 2: from that of y's first row or column to that of its last.
    first_h, first_w = (-top - 1) // 2, (-left - 1) // 2
    cells_h, cells_w = (y_height - top) // 2 - first_h, (y_width - left) // 2 - first_w
    block_w, block_c = _tile(x, channels, skip_channels)
    blocks = cdiv(cells_w, block_w)
    groups = cdiv(channels, block_c) + cdiv(skip_channels, block_c)
    launch(
        _upsample_concat_fwd_kernel, (batch * cells_h * blocks, groups),
        nhwc(x), dense(affine), None if skip is None else nhwc(skip), dense(skip_affine), y, channels, skip_channels,
        height, width, y_height, y_width, top, left, first_h, first_w, cells_h, blocks,
        SLOPE=act(slope), SKIP_SLOPE=act(skip_slope), SAMPLES=by_sample(affine), SKIP_SAMPLES=by_sample(skip_affine),
        SKIP_FIRST=skip_first, ALIGN_CORNERS=align_corners,
        ACC=accumulator(x.dtype), BLOCK_W=block_w, BLOCK_C=block_c,
    )  # fmt: skip
    return y


def upsample_concat_backward(
    dy: Tensor,
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    skip_slope: float,
    align_corners: bool | None,
    skip_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, daffine, dskip, dskip_affine) of :func:`upsample_concat`; those of what is None are empty."""
    dy = nhwc(dy)
    channels, skip_channels = x.shape[1], 0 if skip is None else skip.shape[1]
    y_height, y_width, top, left = _centred(x, skip)
    dz = dy[:, skip_channels:] if skip_first else dy[:, :channels]
    dx, daffine = upsample_gradient(
        dz, dy.shape[1], (y_height, y_width), top, left, x, affine, slope, align_corners, skip_channels
    )
    if skip is None:
        return dx, daffine, *no_gradients(x)
    dz_skip = dy[:, :skip_channels] if skip_first else dy[:, channels:]
    return dx, daffine, *source_gradient(dz_skip, dy.shape[1], skip, skip_affine, skip_slope)


def upsample_gradient(
    dz: Tensor, stride: int, size: Sequence[int], top: int, left: int, x: Tensor, affine: Tensor | None, slope: float,
    align_corners: bool | None = None, beside: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, daffine) of a source that lies, ×2, at (top, left) in a frame of ``size``, from the gradient ``dz`` of that:
    some channels of an NHWC tensor whose pixels lie ``stride`` elements apart. ``beside``: how many channels of a skip
    source are in it too."""
    x = nhwc(x)
    batch, channels, height, width = x.shape
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    block_w, block_c = _tile(x, channels, beside)
    segments = cdiv(width, block_w * _ROUNDS)
    slabs = batch * height * segments
    partial = affine_slabs(x, affine, slabs)
    if x.numel() > 0:
        launch(
            _upsample_bwd_kernel, (slabs, cdiv(channels, block_c)),
            dz, x, dense(affine), dx, partial, batch, channels, stride, height, width, *size, top, left, segments,
            SLOPE=act(slope), SAMPLES=by_sample(affine), ALIGN_CORNERS=align_corners,
            ACC=accumulator(x.dtype), ROUNDS=_ROUNDS, BLOCK_W=block_w, BLOCK_C=block_c,
        )  # fmt: skip
    return dx, affine_gradient(x, partial)
