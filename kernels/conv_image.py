"""3×3 convolution of pictures: so few channels that one matrix product holds all taps.

    y[m,k] = bias[k] + Σ_t x[m,t] · W[k,t],    t = (r·3 + s)·C + c < 9·C ≤ 64,    m a pixel of the batch
    dW[k,t] = Σ_m dY[m,k] · x[m,t]                     slabs of pixels, summed in a fixed order

x[m,t] is gathered from the neighbours of pixel m, 0 outside the picture; a picture has no prologue.

Layout: activations NHWC, weights (K,3,3,C). Bytes: forward reads x and W and writes y, the gradient reads dY and x.
Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import NOTHING, SAMPLES, stats_dtype

from .common import Source, act, block, cdiv, dense, empty_nhwc, load_affine, nhwc, normalise, slab_of, sum_slabs
from .launching import accumulator, launch, precision
from .statistics import Partials, of_nothing, stats_of, store_stats

_MOST_TAPS = 64
# Constants, so that the order of summation is the same on every GPU.
_PROGRAMS = 2048
_SLABS = 512


@triton.jit
def _bits(a, b, c, d):
    return a.to(tl.int32) + 2 * b.to(tl.int32) + 4 * c.to(tl.int32) + 8 * d.to(tl.int32)


@triton.jit
def _divide(n, size):
    """n // size and n % size where 0 ≤ n < size + 2^16: exact in float32, and without a division for each n."""
    beyond = n - size
    times = tl.where(beyond < 0, 0, ((beyond.to(tl.float32) + 0.5) * (1.0 / size)).to(tl.int32) + 1)
    return times, n - times * size


@triton.jit
def _gather(x_ptr, first, t, pixels, H, W, C: tl.constexpr, BLOCK_M: tl.constexpr):
    """x[m,t] of BLOCK_M pixels from number ``first`` on: [pixels, taps]; zero outside the picture and beyond 9·C.

    A bit for each way out of the picture: it is taken where the pixel lies at that edge and the tap goes over it. C is
    a constant and offsets have 64 bits so that all that depends on the tap alone is a constant of the instruction.
    """
    i = tl.arange(0, BLOCK_M)
    m = first + i
    row, w = _divide(first % W + i, W)
    _, h = _divide(first // W % H + row, H)
    tap = t // C
    r = tap // 3
    s = tap % 3
    at_edge = _bits(w == 0, w == W - 1, h == 0, h == H - 1) + tl.where(m < pixels, 16, 48)
    over_edge = _bits(s == 0, s == 2, r == 0, r == 2) + tl.where(t < 9 * C, 32, 48)
    mask = (at_edge[:, None] & over_edge[None, :]) == 0
    pixel_ptr = x_ptr + m.to(tl.int64)[:, None] * C
    tap_ptr = pixel_ptr + ((r - 1).to(tl.int64) * W * C)[None, :] + ((s - 1) * C + t % C).to(tl.int64)[None, :]
    return tl.load(tap_ptr, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["pixels", "tiles", "each", "H", "W"])
def _conv_image_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, affine_ptr, y_ptr, mean_ptr, m2_ptr, count_ptr, pixels, tiles, each, H, W, K,
    C: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``each`` tiles of BLOCK_M pixels, for which the weights are loaded once."""
    t = tl.arange(0, BLOCK_T)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    index = k.to(tl.int64)[None, :] * (9 * C) + t[:, None]
    weights = tl.load(w_ptr + index, mask=(t < 9 * C)[:, None] & (k < K)[None, :], other=0.0)
    start = tl.program_id(0) * each
    for i in tl.range(0, tl.minimum(each, tiles - start)):
        number = start + i
        first = number * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        x = _gather(x_ptr, first, t, pixels, H, W, C, BLOCK_M)
        acc = tl.dot(x, weights, input_precision=PRECISION, out_dtype=ACC)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
        if affine_ptr is not None or SLOPE is not None:
            acc = normalise(acc, load_affine(affine_ptr, k, K), SLOPE, ACC)
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + m.to(tl.int64)[:, None] * K + k[None, :], y, mask=(m < pixels)[:, None] & (k < K)[None, :])
        if mean_ptr is not None:
            per_sample = H * W // BLOCK_M  # tiles, if samples have whole ones
            slab = slab_of(number, number // tl.maximum(per_sample, 1), pixels // (H * W), per_sample, SAMPLES)
            store_stats((y,), (m < pixels).to(tl.int32), slab, k, K, mean_ptr, m2_ptr, count_ptr, 1, BLOCK_K, ACC)


@triton.jit(do_not_specialize=["pixels", "per_slab", "H", "W"])
def _conv_image_wgrad_kernel(
    dy_ptr, x_ptr, partial_ptr, pixels, per_slab, H, W, K,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_K, BLOCK_T], ACC)
    for start in tl.range(0, per_slab, BLOCK_M):
        first = slab * per_slab + start
        m = first + tl.arange(0, BLOCK_M)
        mask = (m < pixels)[:, None] & (k < K)[None, :]
        dy = tl.load(dy_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)
        x = _gather(x_ptr, first, t, pixels, H, W, C, BLOCK_M)
        acc = tl.dot(dy.T, x, acc, input_precision=PRECISION, out_dtype=ACC)
    index = (slab.to(tl.int64) * K + k)[:, None] * (9 * C) + t[None, :]
    tl.store(partial_ptr + index, acc, mask=(k < K)[:, None] & (t < 9 * C)[None, :])


# ---- launchers ---------------------------------------------------------------------------------------------------


def serves(source: Source, size: Sequence[int], weight: Tensor) -> bool:
    """Whether a convolution of this one source is one of pictures."""
    plain = source.plain and source.fills(size)
    pixels = source.x.shape[0] * source.height * source.width
    return plain and weight.shape[-1] == 3 and 9 * weight.shape[1] <= _MOST_TAPS and pixels < 2**30  # 32-bit numbers


def _blocks(x: Tensor, filters: int) -> tuple[int, int, int, int]:
    """Pixels, taps and outputs a program, and its warps."""
    narrow = x.element_size() == 2
    if narrow:  # of fewer taps than 32 ptxas lets each product wait for the one before
        return 128, block(9 * x.shape[1], _MOST_TAPS, 32), block(filters, 64), 4
    return 32, block(9 * x.shape[1], _MOST_TAPS), block(filters, 32), 4


def conv_image(
    source: Source, weight: Tensor, bias: Tensor | None, stats: int, affine: Tensor | None = None, slope: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, K, H, W), normalised by ``affine`` and ``slope``; its mean and biased variance, (K,) or (N, K), empty
    without ``stats``."""
    x, filters = source.x, weight.shape[0]
    y = empty_nhwc(x, x.shape[0], filters, source.height, source.width)
    if y.numel() == 0:
        return y, *of_nothing(x, filters, stats)
    pixels = y.numel() // filters
    block_m, block_t, block_k, warps = _blocks(x, filters)
    tiles = cdiv(pixels, block_m)
    each = cdiv(tiles, _PROGRAMS)
    # A tile may end in one sample and go on in the next.
    merged = NOTHING if stats == SAMPLES and source.height * source.width % block_m else stats
    partials = Partials(x, tiles, filters, merged)
    launch(
        _conv_image_fwd_kernel, (cdiv(tiles, each), cdiv(filters, block_k)),
        x, nhwc(weight), dense(bias), dense(affine), y, *partials.pointers,
        pixels, tiles, each, source.height, source.width, filters,
        C=source.channels, SLOPE=act(slope), SAMPLES=merged == SAMPLES,
        BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_K=block_k, ACC=accumulator(x.dtype), PRECISION=precision(x.dtype),
        num_warps=warps,
    )  # fmt: skip
    return y, *(partials.merged() if merged == stats else stats_of(y, stats))


def conv_image_wgrad(dy: Tensor, source: Source) -> Tensor:
    """dW (K, C, 3, 3), channels_last memory in stats_dtype, from dY (N, K, H, W)."""
    x, filters = source.x, dy.shape[1]
    pixels = dy.numel() // filters
    block_m, block_t, block_k, warps = _blocks(x, filters)
    per_slab = block_m * cdiv(cdiv(pixels, block_m), _SLABS)  # whole blocks
    slabs = cdiv(pixels, per_slab)
    partial = dy.new_empty((slabs, filters, 3, 3, source.channels), dtype=stats_dtype(dy.dtype))
    launch(
        _conv_image_wgrad_kernel, (slabs, cdiv(filters, block_k)),
        dy, x, partial, pixels, per_slab, source.height, source.width, filters,
        C=source.channels, BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_K=block_k,
        ACC=accumulator(dy.dtype), PRECISION=precision(dy.dtype), num_warps=warps, num_stages=2,
    )  # fmt: skip
    return sum_slabs(partial).permute(0, 3, 1, 2)
