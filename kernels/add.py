"""The sum of two sources, as at the end of a residual block, and the activation function behind it.

Forward:   z  = act(s),  s = a + b,  a and b the sources' values, each act(scale·(x − centre) + shift) by its own affine
Backward:  g  = dz·m, where m is act's slope at s, which is made again; then of each source as in ``affine.py``
           dx = scale·h, daffine = [Σ h·(x − centre),  Σ h,  −scale·Σ h], where h is g before the source's own act

Layout: NHWC memory, read as a matrix (pixels, C) of the batch, or of each sample where an affine differs by sample.
Bytes, once each: forward reads x and skip and writes z; backward reads dz, x and skip and writes dx and dskip, plus 12
bytes per channel, program and affine for the sums, which are added in a fixed order. Accumulation in float32 (float64
for float64 tensors): the sum is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affine import (
    affine_gradient,
    affine_slabs,
    before_act,
    flat_tile,
    pictures,
    source_backward,
    store_affine_gradient,
)
from .common import act, activate, affine_of, by_sample, cdiv, dense, empty_nhwc, load_affine, nhwc, normalise
from .launching import accumulator, launch

_ACCESSES = 1  # 16-byte accesses per thread, tensor and step, of which there are three to five
_ROUNDS = 8  # steps per program of the backward: the sums it writes stay below 1 % of its traffic


@triton.jit(do_not_specialize=["pixels"])
def _add_act_fwd_kernel(
    x_ptr, affine_ptr, skip_ptr, skip_affine_ptr, z_ptr, pixels, C,
    SAMPLES: tl.constexpr, SKIP_SAMPLES: tl.constexpr,
    SLOPE: tl.constexpr, SKIP_SLOPE: tl.constexpr, SUM_SLOPE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    if SKIP_SAMPLES:
        skip_affine_ptr = affine_of(skip_affine_ptr, n, C)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    index = (n * pixels + p)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    skip = tl.load(skip_ptr + index, mask=inside, other=0.0)
    a = normalise(x, load_affine(affine_ptr, c, C), SLOPE, ACC)
    b = normalise(skip, load_affine(skip_affine_ptr, c, C), SKIP_SLOPE, ACC)
    tl.store(z_ptr + index, activate(a + b, SUM_SLOPE), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _add_act_bwd_kernel(
    dz_ptr, x_ptr, affine_ptr, skip_ptr, skip_affine_ptr, dx_ptr, partial_ptr, dskip_ptr, skip_partial_ptr, pixels, C,
    SAMPLES: tl.constexpr, SKIP_SAMPLES: tl.constexpr,
    SLOPE: tl.constexpr, SKIP_SLOPE: tl.constexpr, SUM_SLOPE: tl.constexpr,
    ACC: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    share = slab * tl.num_programs(2) + n
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    if SKIP_SAMPLES:
        skip_affine_ptr = affine_of(skip_affine_ptr, n, C)
    affine = load_affine(affine_ptr, c, C)
    skip_affine = load_affine(skip_affine_ptr, c, C)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    skip_sum_gx = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    skip_sum_g = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i in range(ROUNDS):
        p = (slab * ROUNDS + i) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        index = (n * pixels + p)[:, None] * C + c[None, :]
        g = tl.load(dz_ptr + index, mask=inside, other=0.0).to(ACC)
        x = tl.load(x_ptr + index, mask=inside, other=0.0)
        skip = tl.load(skip_ptr + index, mask=inside, other=0.0)
        if SUM_SLOPE is not None:
            s = normalise(x, affine, SLOPE, ACC) + normalise(skip, skip_affine, SKIP_SLOPE, ACC)
            g = before_act(g, s, SUM_SLOPE)
        dx, gx, gz = source_backward(g, x, affine, SLOPE, ACC)
        tl.store(dx_ptr + index, dx, mask=inside)
        dskip, skip_gx, skip_gz = source_backward(g, skip, skip_affine, SKIP_SLOPE, ACC)
        tl.store(dskip_ptr + index, dskip, mask=inside)
        if affine_ptr is not None:
            sum_gx += gx
            sum_g += gz
        if skip_affine_ptr is not None:
            skip_sum_gx += skip_gx
            skip_sum_g += skip_gz
    if affine_ptr is not None:
        store_affine_gradient(partial_ptr, share, c, C, affine.scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))
    if skip_affine_ptr is not None:
        sums = tl.sum(skip_sum_gx, 0), tl.sum(skip_sum_g, 0)
        store_affine_gradient(skip_partial_ptr, share, c, C, skip_affine.scale, sums[0], sums[1])


def add_act(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor,
    skip_affine: Tensor | None,
    skip_slope: float,
    sum_slope: float,
) -> Tensor:
    """act of the sum of two sources (N, C, H, W), whose slope below zero is ``sum_slope``: channels_last, x's dtype."""
    z = empty_nhwc(x, *x.shape)
    channels = x.shape[1]
    apart, skip_apart = by_sample(affine), by_sample(skip_affine)
    samples, pixels = pictures(x, affine, skip_affine)
    if x.numel() > 0:
        block_p, block_c = flat_tile(channels, x.element_size(), _ACCESSES)
        launch(
            _add_act_fwd_kernel, (cdiv(pixels, block_p), cdiv(channels, block_c), samples),
            nhwc(x), dense(affine), nhwc(skip), dense(skip_affine), z, pixels, channels,
            SAMPLES=apart, SKIP_SAMPLES=skip_apart,
            SLOPE=act(slope), SKIP_SLOPE=act(skip_slope), SUM_SLOPE=act(sum_slope),
            ACC=accumulator(x.dtype), BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return z


def add_act_backward(
    dz: Tensor,
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor,
    skip_affine: Tensor | None,
    skip_slope: float,
    sum_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, daffine, dskip, dskip_affine) of :func:`add_act`; of an affine that is None: empty."""
    x, skip = nhwc(x), nhwc(skip)
    dx, dskip = torch.empty_like(x), torch.empty_like(skip)
    channels = x.shape[1]
    apart, skip_apart = by_sample(affine), by_sample(skip_affine)
    samples, pixels = pictures(x, affine, skip_affine)
    block_p, block_c = flat_tile(channels, x.element_size(), _ACCESSES)
    slabs = cdiv(pixels, block_p * _ROUNDS)
    partial = affine_slabs(x, affine, slabs * samples)
    skip_partial = affine_slabs(skip, skip_affine, slabs * samples)
    if x.numel() > 0:
        launch(
            _add_act_bwd_kernel, (slabs, cdiv(channels, block_c), samples),
            nhwc(dz), x, dense(affine), skip, dense(skip_affine), dx, partial, dskip, skip_partial, pixels, channels,
            SAMPLES=apart, SKIP_SAMPLES=skip_apart,
            SLOPE=act(slope), SKIP_SLOPE=act(skip_slope), SUM_SLOPE=act(sum_slope),
            ACC=accumulator(x.dtype), ROUNDS=_ROUNDS, BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return dx, affine_gradient(x, partial), dskip, affine_gradient(skip, skip_partial)
