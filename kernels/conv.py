"""Convolutions as implicit GEMMs whose inputs are normalised on load.

Forward, over the taps (r, s) and channels c of one or two sources z = act(scale·(x − centre) + shift):

    conv2d            y[n,p,q,k] = bias[k] + Σ z[n, p·stride + r − pad, q·stride + s − pad, c] · W[k,c,r,s]
    conv_transpose2d  y[n,p,q,k] = bias[k] + Σ z[n, (p + pad − r)/2, (q + pad − s)/2, c] · W[c,k,r,s]   (where exact)

z is zero outside its source: padding comes after normalisation. With statistics, each tile also yields the mean and the
centred sum of squares of its y as rounded to y's dtype; a fixed tree merges them into mean and biased variance.

The gradient of a convolution is a transposed one and the reverse: both directions share one main loop, `accumulate`.
A transposed stride-2 tile covers pixels of one parity, for which only every second tap exists: no work is wasted.

Layout: activations NHWC, weights as channels_last memory, (K,R,S,C) for conv2d and (C,R,S,K) for conv_transpose2d; one
copy of the weights serves forward and dgrad. Bytes: each source and W are read, y is written. Accumulation: float32
(float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.aten import stats_dtype
from fastunet.kernels.algorithms import computing
from fastunet.kernels.common import (
    OPTIONS,
    Source,
    accumulator,
    block,
    empty_nhwc,
    load_affine,
    nhwc,
    normalise,
    precision,
)
from fastunet.kernels.conv3x3 import conv3x3
from fastunet.kernels.conv_image import conv_image, serves
from fastunet.kernels.pool import max_pool2x2
from fastunet.kernels.statistics import merge_stats, store_stats

SIZES = ["N", "H", "W", "P", "Q", "PF", "QF", "top", "left", "tiles_h", "tiles_w"]


# ---- the shared main loop ----------------------------------------------------------------------------------------


@triton.jit
def accumulate(
    acc, x_ptr, affine_ptr, w_ptr,
    n, p, q, inside,                 # image; frame coordinates [M] of the output pixels; which of them exist
    H, W, HF, WF, top, left,         # the source's size, the frame's, the source's place in the frame
    C, c_first, C_TOTAL, k, K_FIRST, K, K_TOTAL,
    r_first, s_first,                # transposed: the first tap of this tile's parity
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, REDUCE_FASTEST: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_K] += Σ over taps and channels of one source; W is read at channels c_first + c and K_FIRST + k."""
    # The part of the source inside the frame, in the source's coordinates: beyond it the value is 0, not act(shift).
    h_low, h_high = tl.maximum(0, -top), tl.minimum(H, HF - top)
    w_low, w_high = tl.maximum(0, -left), tl.minimum(W, WF - left)
    image = n.to(tl.int64) * H
    step: tl.constexpr = STRIDE if TRANSPOSED else 1
    taps_s = (KSIZE - s_first + step - 1) // step
    taps = (KSIZE - r_first + step - 1) // step * taps_s
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        scale, shift, centre = load_affine(affine_ptr, c, C, HAS_AFFINE, ACC)
        for tap in range(taps):
            r = r_first + tap // taps_s * step
            s = s_first + tap % taps_s * step
            if TRANSPOSED:
                h, w = (p + PAD - r) // STRIDE - top, (q + PAD - s) // STRIDE - left
            else:
                h, w = p * STRIDE + r - PAD - top, q * STRIDE + s - PAD - left
            real = inside & (h >= h_low) & (h < h_high) & (w >= w_low) & (w < w_high)
            mask = real[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + ((image + h) * W + w)[:, None] * C + c[None, :], mask=mask, other=0.0)
            if HAS_AFFINE or RELU:
                z = tl.where(mask, normalise(x, scale, shift, centre, HAS_AFFINE, RELU, ACC), 0.0).to(x.dtype)
            else:
                z = x
            tap_index = r * KSIZE + s
            if REDUCE_FASTEST:  # W[k][r][s][c]
                place = ((K_FIRST + k)[None, :] * (KSIZE * KSIZE) + tap_index) * C_TOTAL + (c_first + c)[:, None]
            else:  # W[c][r][s][k]
                place = ((c_first + c)[:, None] * (KSIZE * KSIZE) + tap_index) * K_TOTAL + (K_FIRST + k)[None, :]
            weights = tl.load(w_ptr + place, mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(z, weights, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def tile_pixels(index, tiles_h, tiles_w, top, left, TRANSPOSED: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
          TILE_H: tl.constexpr, TILE_W: tl.constexpr):  # fmt: skip
    """Image n, pixels (p, q) [TILE_H·TILE_W] of tile ``index``, and the first taps of its parity (else 0)."""
    column = index % tiles_w
    row = index // tiles_w % tiles_h
    rest = index // tiles_w // tiles_h
    pixel = tl.arange(0, TILE_H * TILE_W)
    p = row * TILE_H + pixel // TILE_W
    q = column * TILE_W + pixel % TILE_W
    r_first = 0
    s_first = 0
    if TRANSPOSED and STRIDE == 2:
        odd_p = rest % 4 // 2
        odd_q = rest % 2
        rest = rest // 4
        p = p * 2 + odd_p
        q = q * 2 + odd_q
        r_first = (odd_p + top + PAD) & 1
        s_first = (odd_q + left + PAD) & 1
    return rest, p, q, r_first, s_first


# ---- forward -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, "H1", "W1", "top1", "left1"])
def _conv_fwd_kernel(
    x_ptr, affine_ptr, x1_ptr, affine1_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, m2_ptr, count_ptr,
    H, W, top, left, H1, W1, top1, left1, PF, QF, P, Q, C, C1, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    AFFINE: tl.constexpr, RELU: tl.constexpr, TWO: tl.constexpr, AFFINE1: tl.constexpr, RELU1: tl.constexpr,
    BIAS: tl.constexpr, STATS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks_k
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n, p, q, r_first, s_first = tile_pixels(tile, tiles_h, tiles_w, 0, 0, TRANSPOSED, STRIDE, PAD, TILE_H, TILE_W)
    inside = (p < P) & (q < Q)
    acc = tl.zeros([TILE_H * TILE_W, BLOCK_K], ACC)
    acc = accumulate(
        acc, x_ptr, affine_ptr, w_ptr, n, p, q, inside, H, W, PF, QF, top, left, C, 0, C + C1, k, 0, K, K,
        r_first, s_first, KSIZE, STRIDE, PAD, TRANSPOSED, AFFINE, RELU, not TRANSPOSED, BLOCK_C, ACC, PRECISION,
    )  # fmt: skip
    if TWO:
        acc = accumulate(
            acc, x1_ptr, affine1_ptr, w_ptr, n, p, q, inside, H1, W1, PF, QF, top1, left1, C1, C, C + C1, k, 0, K, K,
            r_first, s_first, KSIZE, STRIDE, PAD, TRANSPOSED, AFFINE1, RELU1, not TRANSPOSED, BLOCK_C, ACC, PRECISION,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    mask = inside[:, None] & (k < K)[None, :]
    tl.store(y_ptr + ((n.to(tl.int64) * P + p) * Q + q)[:, None] * K + k[None, :], y, mask=mask)
    if STATS:
        store_stats((y,), inside.to(tl.int32), tile, k, K, mean_ptr, m2_ptr, count_ptr, 1, BLOCK_K, ACC)


# ---- launchers ---------------------------------------------------------------------------------------------------


def tile_shape(height: int, width: int, pixels: int) -> tuple[int, int]:
    """(TILE_H, TILE_W) of at most ``pixels`` and at least 16, at most 16 wide, not much larger than the picture."""
    columns = block(width, 16, 4)
    return block(height, pixels // columns, 16 // columns), columns


def _forward(
    sources: Sequence[Source],
    frame: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    stats: bool,
    stride: int,
    pad: int,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var of either convolution over the sources in their frame."""
    first, second = sources[0], sources[-1]
    x, batch = first.x, first.x.shape[0]
    ksize = weight.shape[-1]
    filters = weight.shape[1] if transposed else weight.shape[0]
    if transposed:
        height, width = 2 * first.height, 2 * first.width
        parities, tile_height, tile_width = 4, first.height, first.width
    else:
        height, width = ((n + 2 * pad - ksize) // stride + 1 for n in frame)
        parities, tile_height, tile_width = 1, height, width
    y = empty_nhwc(x, batch, filters, height, width)
    dtype = stats_dtype(x.dtype)
    if y.numel() == 0:
        mean = x.new_zeros(filters if stats else 0, dtype=dtype)
        return y, mean, mean.clone()
    narrow = x.dtype != torch.float32
    tile_h, tile_w = tile_shape(tile_height, tile_width, 128 if narrow else 64)
    tiles_h, tiles_w = triton.cdiv(tile_height, tile_h), triton.cdiv(tile_width, tile_w)
    tiles = batch * parities * tiles_h * tiles_w
    partials = [x.new_empty((tiles, filters) if stats else 0, dtype=dtype) for _ in range(2)]
    counts = x.new_empty(tiles if stats else 0, dtype=dtype)
    block_k = block(filters, 64 if narrow else 32)
    block_c = block(max(s.channels for s in sources), 32 if narrow else 16)
    _conv_fwd_kernel[(tiles * triton.cdiv(filters, block_k),)](
        x, first.affine_or_x, second.x, second.affine_or_x, nhwc(weight), x if bias is None else bias.contiguous(), y,
        *partials, counts,
        first.height, first.width, first.top, first.left, second.height, second.width, second.top, second.left,
        frame[0], frame[1], height, width, first.channels, second.channels if len(sources) == 2 else 0, filters,
        tiles_h, tiles_w,
        KSIZE=ksize, STRIDE=stride, PAD=pad, TRANSPOSED=transposed,
        AFFINE=first.affine is not None, RELU=first.relu, TWO=len(sources) == 2,
        AFFINE1=second.affine is not None, RELU1=second.relu, BIAS=bias is not None, STATS=stats,
        TILE_H=tile_h, TILE_W=tile_w, BLOCK_C=block_c, BLOCK_K=block_k,
        ACC=accumulator(x.dtype), PRECISION=precision(x.dtype),
        **OPTIONS, num_warps=8 if narrow else 4, num_stages=3 if narrow and not transposed and len(sources) == 1 else 2,
    )  # fmt: skip
    if not stats:
        return y, partials[0], partials[1]
    return y, *merge_stats(partials[0], partials[1], counts)


def conv2d(
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    stats: bool,
    save: bool,
    pool: bool,
    pool_scale: Tensor | None,
    mixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv2d`; nothing normalised is stored, so there is nothing to ``save``.

    ``mixed`` allows other algorithms than Triton's where the table says that they are faster.
    """
    sources = [Source(x0, affine0, relu0, offset[0], offset[1])]
    if x1 is not None:
        sources.append(Source(x1, affine1, relu1, offset[2], offset[3]))
    pooled: Tensor | None = None
    if len(sources) == 1 and stride == 1 and serves(sources[0], size, weight):
        y, mean, var = conv_image(sources[0], weight, bias, stats)
    elif weight.shape[-1] == 3 and stride == 1:
        compute = computing("conv3x3_fwd", sources, weight.shape[0], size[1], mixed)
        if compute is conv3x3:
            y, mean, var, pooled = conv3x3(sources, size, weight, bias, stats, pool, pool_scale)
        else:
            y, mean, var = compute(sources, size, weight, bias, stats)
    else:
        y, mean, var = _forward(sources, size, weight, bias, stats, stride, weight.shape[-1] // 2, False)
    if pooled is None:
        pooled = max_pool2x2(y, pool_scale) if pool else x0.new_empty(0)
    return y, mean, var, x0.new_empty(0), pooled


def conv_transpose2d(
    x: Tensor, affine: Tensor | None, relu: bool, weight: Tensor, bias: Tensor | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv_transpose2d`."""
    pad = 1 if weight.shape[-1] == 3 else 0
    return _forward([Source(x, affine, relu)], x.shape[-2:], weight, bias, stats, 2, pad, True)
