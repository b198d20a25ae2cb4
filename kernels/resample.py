"""The value of a source at another size: 2×2 average-pooled, or with its last row or column repeated.

z = act(scale·(x − centre) + shift) is made while x is read.

Average:   y[h, w] = (z[2h, 2w] + z[2h, 2w + 1] + z[2h + 1, 2w] + z[2h + 1, 2w + 1]) / 4; an odd end is dropped
           dz[h, w] = dy[h // 2, w // 2] / 4, 0 at an odd end
Pad:       y[h, w] = z[min(h, H − 1), min(w, W − 1)] for one more row or column, or both or none
           dz[h, w] = the sum of dy where y is z[h, w]: one number, two in the last row or column, four in the corner
In both dx and daffine follow from dz in the same pass, as in ``affine.py``.

Layout: NHWC; a program has a part of a row and a block of channels, of one picture. Bytes, once each: forward reads x
and writes y; backward reads x and dy and writes dx, plus 12 bytes per channel and program for the sums, which are added
in a fixed order. Accumulation in float32 (float64 for float64 tensors); y is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import affine_gradient, affine_slabs, source_backward, store_affine_gradient, tile_of
from .common import act, affine_of, by_sample, cdiv, dense, empty_nhwc, load_affine, nhwc, normalise
from .launching import accumulator, launch

_ACCESSES = 1  # 16-byte accesses per thread and pixel
_ROUNDS = 4  # parts of one row per program of the backward, which share a slab of sums


@triton.jit(do_not_specialize=["H", "W", "blocks"])
def _avg_pool2x2_fwd_kernel(
    x_ptr, affine_ptr, y_ptr, H, W, C, blocks,
    SAMPLES: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    h = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    w = tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (w < W // 2)[:, None] & (c < C)[None, :]
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    affine = load_affine(affine_ptr, c, C)
    row = W.to(tl.int64) * C
    index = ((n * H + 2 * h) * W + 2 * w)[:, None] * C + c[None, :]
    z0 = normalise(tl.load(x_ptr + index, mask=inside, other=0.0), affine, SLOPE, ACC)
    z1 = normalise(tl.load(x_ptr + index + C, mask=inside, other=0.0), affine, SLOPE, ACC)
    z2 = normalise(tl.load(x_ptr + index + row, mask=inside, other=0.0), affine, SLOPE, ACC)
    z3 = normalise(tl.load(x_ptr + index + row + C, mask=inside, other=0.0), affine, SLOPE, ACC)
    y_index = ((n * (H // 2) + h) * (W // 2) + w)[:, None] * C + c[None, :]
    tl.store(y_ptr + y_index, (z0 + z1 + z2 + z3) * 0.25, mask=inside)


@triton.jit(do_not_specialize=["H", "W", "YH", "YW", "blocks"])
def _pad_replicate_fwd_kernel(
    x_ptr, affine_ptr, y_ptr, H, W, C, YH, YW, blocks,
    SAMPLES: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    h = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    w = tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (w < YW)[:, None] & (c < C)[None, :]
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    affine = load_affine(affine_ptr, c, C)
    index = ((n * H + tl.minimum(h, H - 1)) * W + tl.minimum(w, W - 1))[:, None] * C + c[None, :]
    z = normalise(tl.load(x_ptr + index, mask=inside, other=0.0), affine, SLOPE, ACC)
    tl.store(y_ptr + ((n * YH + h) * YW + w)[:, None] * C + c[None, :], z, mask=inside)


@triton.jit
def _gradient_of_average(dy_ptr, n, h, w, H, W, c, C, channel, ACC: tl.constexpr):
    """dz at pixels w of row h."""
    within = tl.where(h < H // 2 * 2, W // 2 * 2, 0)  # an odd end has no columns
    index = ((n * (H // 2) + h // 2) * (W // 2) + w // 2)[:, None] * C + c[None, :]
    return tl.load(dy_ptr + index, mask=(w < within)[:, None] & channel, other=0.0).to(ACC) * 0.25


@triton.jit
def _gradient_of_pad(dy_ptr, n, h, w, H, W, YH, YW, c, C, channel, ACC: tl.constexpr):
    """dz at pixels w of row h: dy there, and in the row and column that repeat it."""
    index = ((n * YH + h) * YW + w)[:, None] * C + c[None, :]
    below = YW.to(tl.int64) * C
    right = w == tl.where(YW > W, W - 1, -1)
    under = w < tl.where(h == tl.where(YH > H, H - 1, -1), W, 0)
    dz = tl.load(dy_ptr + index, mask=(w < W)[:, None] & channel, other=0.0).to(ACC)
    dz += tl.load(dy_ptr + index + C, mask=right[:, None] & channel, other=0.0).to(ACC)
    dz += tl.load(dy_ptr + index + below, mask=under[:, None] & channel, other=0.0).to(ACC)
    dz += tl.load(dy_ptr + index + below + C, mask=(right & under)[:, None] & channel, other=0.0).to(ACC)
    return dz


@triton.jit(do_not_specialize=["H", "W", "YH", "YW", "segments"])
def _resample_bwd_kernel(
    dy_ptr, x_ptr, affine_ptr, dx_ptr, partial_ptr, H, W, C, YH, YW, segments,
    POOL: tl.constexpr, SAMPLES: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx and daffine, of the average pool if POOL, else of the pad."""
    slab = tl.program_id(0)
    n = tl.program_id(2).to(tl.int64)
    h = (slab // segments).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = (c < C)[None, :]
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    affine = load_affine(affine_ptr, c, C)
    sum_gx = tl.zeros([BLOCK_W, BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_W, BLOCK_C], ACC)
    for i in range(ROUNDS):
        w = (slab % segments * ROUNDS + i) * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = (w < W)[:, None] & channel
        index = ((n * H + h) * W + w)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + index, mask=inside, other=0.0)
        if POOL:
            dz = _gradient_of_average(dy_ptr, n, h, w, H, W, c, C, channel, ACC)
        else:
            dz = _gradient_of_pad(dy_ptr, n, h, w, H, W, YH, YW, c, C, channel, ACC)
        dx, gx, g = source_backward(dz, x, affine, SLOPE, ACC)
        tl.store(dx_ptr + index, dx, mask=inside)
        if affine_ptr is not None:
            sum_gx += gx
            sum_g += g
    if affine_ptr is not None:
        share = slab.to(tl.int64) * tl.num_programs(2) + n
        store_affine_gradient(partial_ptr, share, c, C, affine.scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))


def avg_pool2x2(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """2×2 average-pool of a source's value: (N, C, H, W) to (N, C, H // 2, W // 2), channels_last, x's dtype."""
    batch, channels, height, width = x.shape
    y = empty_nhwc(x, batch, channels, height // 2, width // 2)
    if y.numel() > 0:
        block_w, block_c = tile_of(x, _ACCESSES)
        blocks = cdiv(width // 2, block_w)
        launch(
            _avg_pool2x2_fwd_kernel, (height // 2 * blocks, cdiv(channels, block_c), batch),
            nhwc(x), dense(affine), y, height, width, channels, blocks,
            SAMPLES=by_sample(affine), SLOPE=act(slope), ACC=accumulator(x.dtype), BLOCK_W=block_w, BLOCK_C=block_c,
        )  # fmt: skip
    return y


def pad_replicate(x: Tensor, affine: Tensor | None, slope: float, rows: int, columns: int) -> Tensor:
    """A source's value with its last row repeated if ``rows`` is 1, its last column if ``columns`` is: (N, C, H + rows,
    W + columns), channels_last, x's dtype."""
    batch, channels, height, width = x.shape
    y = empty_nhwc(x, batch, channels, height + rows, width + columns)
    if y.numel() > 0:
        block_w, block_c = tile_of(x, _ACCESSES)
        blocks = cdiv(width + columns, block_w)
        launch(
            _pad_replicate_fwd_kernel, ((height + rows) * blocks, cdiv(channels, block_c), batch),
            nhwc(x), dense(affine), y, height, width, channels, height + rows, width + columns, blocks,
            SAMPLES=by_sample(affine), SLOPE=act(slope), ACC=accumulator(x.dtype), BLOCK_W=block_w, BLOCK_C=block_c,
        )  # fmt: skip
    return y


def _backward(dy: Tensor, x: Tensor, affine: Tensor | None, slope: float, pool: bool) -> tuple[Tensor, Tensor]:
    x = nhwc(x)
    dx = torch.empty_like(x)
    batch, channels, height, width = x.shape
    block_w, block_c = tile_of(x, _ACCESSES)
    segments = cdiv(width, block_w * _ROUNDS)
    slabs = height * segments
    partial = affine_slabs(x, affine, slabs * batch)
    if x.numel() > 0:
        launch(
            _resample_bwd_kernel, (slabs, cdiv(channels, block_c), batch),
            nhwc(dy), x, dense(affine), dx, partial, height, width, channels, *dy.shape[2:], segments,
            POOL=pool, SAMPLES=by_sample(affine), SLOPE=act(slope), ACC=accumulator(x.dtype), ROUNDS=_ROUNDS,
            BLOCK_W=block_w, BLOCK_C=block_c,
        )  # fmt: skip
    return dx, affine_gradient(x, partial)


def avg_pool2x2_backward(dy: Tensor, x: Tensor, affine: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    """Gradients (dx, daffine) of :func:`avg_pool2x2`; daffine is empty without an affine."""
    return _backward(dy, x, affine, slope, True)


def pad_replicate_backward(dy: Tensor, x: Tensor, affine: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    """Gradients (dx, daffine) of :func:`pad_replicate`; daffine is empty without an affine."""
    return _backward(dy, x, affine, slope, False)
