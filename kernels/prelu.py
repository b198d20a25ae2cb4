"""A source's affine and a PReLU behind it, whose slope below zero is a parameter of each channel, in one pass.

Forward:   z  = s if s > 0 else slopes·s, with s = scale·(x − centre) + shift
Backward:  g  = dz if s > 0 else slopes·dz, s being made again; dx and daffine follow from g as in ``affine.py``
           dslopes = Σ dz·s over the pixels where s is not above 0

Layout: NHWC memory, read as a matrix (pixels, C) of the batch, or of each sample where affines differ. Bytes, once
each: forward reads x and writes z; backward reads dz and x and writes dx, plus 16 bytes per channel and program for the
sums, which are added in a fixed order. Accumulation in float32 (float64 for float64 tensors).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import stats_dtype

from .affine import (
    affine_gradient,
    affine_slabs,
    flat_tile,
    pictures,
    source_backward,
    store_affine_gradient,
    tile_of,
)
from .common import affine_of, by_sample, cdiv, dense, empty_nhwc, load_affine, nhwc, normalise, sum_slabs
from .launching import accumulator, launch

_ACCESSES = 1  # 16-byte accesses per thread, tensor and step
_ROUNDS = 8  # steps per program of the backward


@triton.jit(do_not_specialize=["pixels"])
def _affine_prelu_fwd_kernel(
    x_ptr, affine_ptr, slopes_ptr, z_ptr, pixels, C,
    SAMPLES: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    index = (n * pixels + p)[:, None] * C + c[None, :]
    slopes = tl.load(slopes_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    s = normalise(tl.load(x_ptr + index, mask=inside, other=0.0), load_affine(affine_ptr, c, C), None, ACC)
    tl.store(z_ptr + index, tl.where(s > 0, s, s * slopes), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _affine_prelu_bwd_kernel(
    dz_ptr, x_ptr, affine_ptr, slopes_ptr, dx_ptr, partial_ptr, dslopes_ptr, pixels, C,
    SAMPLES: tl.constexpr, ACC: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    share = slab * tl.num_programs(2) + n
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    affine = load_affine(affine_ptr, c, C)
    slopes = tl.load(slopes_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sum_below = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i in range(ROUNDS):
        p = (slab * ROUNDS + i) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        index = (n * pixels + p)[:, None] * C + c[None, :]
        dz = tl.load(dz_ptr + index, mask=inside, other=0.0).to(ACC)
        x = tl.load(x_ptr + index, mask=inside, other=0.0)
        s = normalise(x, affine, None, ACC)
        sum_below += tl.where(s > 0, 0.0, dz * s)
        dx, gx, g = source_backward(tl.where(s > 0, dz, dz * slopes), x, affine, None, ACC)
        tl.store(dx_ptr + index, dx, mask=inside)
        if affine_ptr is not None:
            sum_gx += gx
            sum_g += g
    tl.store(dslopes_ptr + share * C + c, tl.sum(sum_below, 0), mask=c < C)
    if affine_ptr is not None:
        store_affine_gradient(partial_ptr, share, c, C, affine.scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))


def affine_prelu(x: Tensor, affine: Tensor | None, slopes: Tensor) -> Tensor:
    """prelu(scale·(x − centre) + shift) for x (N, C, H, W) and slopes (C,) or (1,): channels_last, x's dtype."""
    z = empty_nhwc(x, *x.shape)
    channels = x.shape[1]
    samples, pixels = pictures(x, affine)
    if x.numel() > 0:
        block_p, block_c = tile_of(x, _ACCESSES)
        launch(
            _affine_prelu_fwd_kernel, (cdiv(pixels, block_p), cdiv(channels, block_c), samples),
            nhwc(x), dense(affine), slopes.expand(channels).contiguous(), z, pixels, channels,
            SAMPLES=by_sample(affine), ACC=accumulator(x.dtype), BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return z


def affine_prelu_backward(
    dz: Tensor, x: Tensor, affine: Tensor | None, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, daffine, dslopes) of :func:`affine_prelu`; daffine is empty without an affine."""
    x = nhwc(x)
    dx = torch.empty_like(x)
    channels = x.shape[1]
    samples, pixels = pictures(x, affine)
    # Of odd channels no fewer pixels, as there are in the forward: with half as many the compiler for sm_100 spills.
    block_p, block_c = flat_tile(channels, x.element_size(), _ACCESSES)
    slabs = cdiv(pixels, block_p * _ROUNDS)
    partial = affine_slabs(x, affine, slabs * samples)
    shares = x.new_empty((slabs * samples, channels), dtype=stats_dtype(x.dtype))
    if x.numel() > 0:
        launch(
            _affine_prelu_bwd_kernel, (slabs, cdiv(channels, block_c), samples),
            nhwc(dz), x, dense(affine), slopes.expand(channels).contiguous(), dx, partial, shares, pixels, channels,
            SAMPLES=by_sample(affine), ACC=accumulator(x.dtype), ROUNDS=_ROUNDS, BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    below = sum_slabs(shares)
    dslopes = below if slopes.shape[0] == channels else below.sum(0, keepdim=True)
    return dx, affine_gradient(x, partial), dslopes.to(slopes.dtype)
