"""2×2 max-pool of a source, on raw values.

Forward:   p  = x at the winner of each 2×2 window: the largest x if scale > 0 (or there is no affine), the smallest if
           scale < 0, the first if scale = 0; a NaN wins over everything, and ties go to the first, as in PyTorch.
           act(scale·(p − centre) + shift) is then the max-pool of act(scale·(x − centre) + shift), which is monotone.
Backward:  dx = dskip + (dp at the winner, 0 elsewhere); the winner is found again from x, no index is stored. Where x
           is a convolution's output whose statistics have gradients too, they are added in the same pass.

Layout: NHWC; a program has one row of windows, a block of its columns and a block of channels. Bytes, once each:
forward reads x and writes a quarter of it; backward reads x, dskip and dp (a quarter) and writes dx. Comparisons and
the sum are in float32 (float64 for float64 tensors), which holds every 16-bit value exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import flat_tile
from .common import GOLDEN, affine_of, by_sample, cdiv, dense, dither, empty_nhwc, nhwc
from .launching import accumulator, launch

_ACCESSES = 1  # 16-byte accesses per thread and pixel of a window


@triton.jit
def _contest(best, winner, x, number: tl.constexpr, negative, flat):
    """Let pixel ``number`` of the windows challenge the best so far; values are signed so that the largest wins."""
    x = tl.where(negative, -x, x)
    better = ((x > best) & (flat == 0)) | (x != x)
    return tl.where(better, x, best), tl.where(better, number, winner)


@triton.jit
def _winner(x0, x1, x2, x3, negative, flat):
    """Signed value and number (0..3, row by row) of the winner of each window."""
    best = tl.where(negative, -x0, x0)
    winner = tl.zeros(best.shape, tl.int32)
    best, winner = _contest(best, winner, x1, 1, negative, flat)
    best, winner = _contest(best, winner, x2, 2, negative, flat)
    return _contest(best, winner, x3, 3, negative, flat)


@triton.jit
def _order(affine_ptr, c, C):
    """Whether the scale of channels ``c`` is negative, and whether it is zero: two rows (1, channels)."""
    scale = tl.full(c.shape, 1.0, tl.float32)
    if affine_ptr is not None:
        scale = tl.load(affine_ptr + c, mask=c < C, other=1.0)
    return (scale < 0)[None, :], (scale == 0)[None, :]


@triton.jit(do_not_specialize=["H", "W", "blocks"])
def _max_pool2x2_fwd_kernel(
    x_ptr, affine_ptr, p_ptr, H, W, C, blocks,
    SAMPLES: tl.constexpr, ACC: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    q = pid // blocks  # row of windows, counted through the batch
    first = ((q // (H // 2)).to(tl.int64) * H + q % (H // 2) * 2) * W  # the pixel at its left end
    w = (pid % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (w < W // 2)[:, None] & (c < C)[None, :]
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, q // (H // 2), C)
    negative, flat = _order(affine_ptr, c, C)
    row = W.to(tl.int64) * C
    index = (first + 2 * w)[:, None] * C + c[None, :]
    x0 = tl.load(x_ptr + index, mask=inside, other=0.0).to(ACC)
    x1 = tl.load(x_ptr + index + C, mask=inside, other=0.0).to(ACC)
    x2 = tl.load(x_ptr + index + row, mask=inside, other=0.0).to(ACC)
    x3 = tl.load(x_ptr + index + row + C, mask=inside, other=0.0).to(ACC)
    best, _ = _winner(x0, x1, x2, x3, negative, flat)
    p_index = (q.to(tl.int64) * (W // 2) + w)[:, None] * C + c[None, :]
    tl.store(p_ptr + p_index, tl.where(negative, -best, best), mask=inside)


@triton.jit(do_not_specialize=["pixels", "H", "W", "blocks"])
def _max_pool2x2_bwd_kernel(
    x_ptr, affine_ptr, dp_ptr, dskip_ptr, dmean_ptr, dvar_ptr, mean_ptr, dx_ptr, pixels, H, W, C, blocks,
    SAMPLES: tl.constexpr, SAMPLES_Y: tl.constexpr, ACC: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``pixels`` are those that mean_ptr's statistics are of."""
    pid = tl.program_id(0)
    q = pid // blocks  # row of windows, those cut off at an odd end included
    rows = (H + 1) // 2
    n = (q // rows).to(tl.int64)
    h = q % rows * 2
    w = (pid % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = (c < C)[None, :]
    in0 = (2 * w < W)[:, None] & channel
    in1 = (2 * w + 1 < W)[:, None] & channel
    below = tl.where(h + 1 < H, W, 0)  # the row below an odd end has no columns
    in2 = (2 * w < below)[:, None] & channel
    in3 = (2 * w + 1 < below)[:, None] & channel
    index = ((n * H + h) * W + 2 * w)[:, None] * C + c[None, :]
    row = W.to(tl.int64) * C
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    negative, flat = _order(affine_ptr, c, C)
    x0 = tl.load(x_ptr + index, mask=in0, other=0.0).to(ACC)
    x1 = tl.load(x_ptr + index + C, mask=in1, other=0.0).to(ACC)
    x2 = tl.load(x_ptr + index + row, mask=in2, other=0.0).to(ACC)
    x3 = tl.load(x_ptr + index + row + C, mask=in3, other=0.0).to(ACC)
    _, winner = _winner(x0, x1, x2, x3, negative, flat)
    dp_index = ((n * (H // 2) + h // 2) * (W // 2) + w)[:, None] * C + c[None, :]
    dp = tl.load(dp_ptr + dp_index, mask=in3, other=0.0).to(ACC)
    dx0 = tl.where(winner == 0, dp, 0.0)
    dx1 = tl.where(winner == 1, dp, 0.0)
    dx2 = tl.where(winner == 2, dp, 0.0)
    dx3 = tl.where(winner == 3, dp, 0.0)
    if dskip_ptr is not None:
        dx0 += tl.load(dskip_ptr + index, mask=in0, other=0.0).to(ACC)
        dx1 += tl.load(dskip_ptr + index + C, mask=in1, other=0.0).to(ACC)
        dx2 += tl.load(dskip_ptr + index + row, mask=in2, other=0.0).to(ACC)
        dx3 += tl.load(dskip_ptr + index + row + C, mask=in3, other=0.0).to(ACC)
    if mean_ptr is not None:
        if SAMPLES_Y:
            mean_ptr += n * C
            dmean_ptr += n * C
            dvar_ptr += n * C
        count = pixels.to(ACC)
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)[None, :]
        level = (tl.load(dmean_ptr + c, mask=c < C, other=0.0) / count)[None, :]
        slope = (tl.load(dvar_ptr + c, mask=c < C, other=0.0) * (2.0 / count))[None, :]
        dtype: tl.constexpr = dx_ptr.dtype.element_ty
        golden = tl.full([], GOLDEN, tl.uint32)
        turn, right, down = index.to(tl.uint32) * golden, golden * C, row.to(tl.uint32) * golden
        dx0 = dither(dx0 + level + slope * (x0 - mean), turn, dtype)
        dx1 = dither(dx1 + level + slope * (x1 - mean), turn + right, dtype)
        dx2 = dither(dx2 + level + slope * (x2 - mean), turn + down, dtype)
        dx3 = dither(dx3 + level + slope * (x3 - mean), turn + down + right, dtype)
    tl.store(dx_ptr + index, dx0, mask=in0)
    tl.store(dx_ptr + index + C, dx1, mask=in1)
    tl.store(dx_ptr + index + row, dx2, mask=in2)
    tl.store(dx_ptr + index + row + C, dx3, mask=in3)


def max_pool2x2(x: Tensor, affine: Tensor | None) -> Tensor:
    """2×2 max-pool of a source on raw values: (N, C, H, W) to (N, C, H // 2, W // 2), channels_last, x's dtype.

    Raises:
        ValueError: a picture of fewer than 2×2 pixels.
    """
    batch, channels, height, width = x.shape
    if height < 2 or width < 2:
        raise ValueError(f"max_pool2x2 needs pictures of at least 2×2 pixels, got {height}×{width}; use larger ones")
    p = empty_nhwc(x, batch, channels, height // 2, width // 2)
    if p.numel() > 0:
        block_w, block_c = flat_tile(channels, x.element_size(), _ACCESSES)
        blocks = cdiv(width // 2, block_w)
        launch(
            _max_pool2x2_fwd_kernel, (batch * (height // 2) * blocks, cdiv(channels, block_c)),
            nhwc(x), dense(affine), p, height, width, channels, blocks,
            SAMPLES=by_sample(affine), ACC=accumulator(x.dtype), BLOCK_W=block_w, BLOCK_C=block_c,
        )  # fmt: skip
    return p


def max_pool2x2_backward(x: Tensor, affine: Tensor | None, dp: Tensor | None, dskip: Tensor | None) -> Tensor:
    """dx = dskip + dp at the winner of each window, like x in shape and dtype; either gradient may be None."""
    if dp is None:
        if dskip is None:
            return torch.zeros_like(x, memory_format=torch.channels_last)
        return dskip.clone(memory_format=torch.channels_last)
    return pool_backward(x, affine, dp, dskip, None)


def pool_backward(
    x: Tensor,
    scale: Tensor | None,
    dp: Tensor,
    dskip: Tensor | None,
    stats: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """:func:`max_pool2x2_backward` by the signs of ``scale`` (C, or an affine; None: positive); with
    ``stats`` = (dmean, dvar, mean), of the batch or of each sample, also their share of x's gradient,
    dmean/M + (2/M)·dvar·(x − mean)."""
    x = nhwc(x)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    if x.numel() > 0:
        block_w, block_c = flat_tile(channels, x.element_size(), _ACCESSES)
        blocks = cdiv((width + 1) // 2, block_w)
        dmean, dvar, mean = (None, None, None) if stats is None else stats
        apart = mean is not None and mean.dim() == 2
        launch(
            _max_pool2x2_bwd_kernel, (batch * ((height + 1) // 2) * blocks, cdiv(channels, block_c)),
            x, dense(scale), nhwc(dp), None if dskip is None else nhwc(dskip), dense(dmean), dense(dvar), dense(mean),
            dx, (1 if apart else batch) * height * width, height, width, channels, blocks,
            SAMPLES=by_sample(scale), SAMPLES_Y=apart, ACC=accumulator(x.dtype), BLOCK_W=block_w, BLOCK_C=block_c,
        )  # fmt: skip
    return dx
