"""The affine of a group or instance normalisation, from the statistics of each sample's channels.

    centre = Σ mean / G;  spread = Σ (var + (mean − centre)²) / G    over a group of G channels, of as many pixels each
    scale = weight·rstd,  rstd = rsqrt(spread + eps);  shift = bias
    dweight = Σ dscale·rstd;  dbias = Σ dshift                       over the samples, in their order
    dvar = −rstd³/(2·G)·Σ dscale·weight;  dmean = Σ dcentre / G + 2·dvar·(mean − centre)

Layout: statistics (N, C), affines (N, 3, C). Bytes per sample and channel: forward reads 8 and writes 12, backward
reads 20 and writes 8. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, dense, power_of_2
from .launching import accumulator, launch

_CHANNELS = 256  # of a program, if a group has no more


@triton.jit
def _group(mean_ptr, var_ptr, index, inside, G: tl.constexpr, EPS: tl.constexpr):
    """(mean − centre, centre, rstd) of groups × channels; the last two have one column."""
    mean = tl.load(mean_ptr + index, mask=inside, other=0.0)
    var = tl.load(var_ptr + index, mask=inside, other=0.0)
    if G == 1:
        centre = mean
        apart = tl.zeros_like(mean)
        spread = var
    else:
        centre = (tl.sum(mean, 1) / G)[:, None]
        apart = tl.where(inside, mean - centre, 0.0)
        spread = (tl.sum(var + apart * apart, 1) / G)[:, None]
    return apart, centre, tl.rsqrt(spread + EPS)


@triton.jit
def _group_affine_fwd_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, affine_ptr, groups,
    G: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """BLOCK_N groups of one sample."""
    n = tl.program_id(1).to(tl.int64)
    C = groups * G
    group = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_G)
    inside = (group < groups)[:, None] & (i < G)[None, :]
    c = group[:, None] * G + i[None, :]
    _, centre, rstd = _group(mean_ptr, var_ptr, n * C + c, inside, G, EPS)
    scale = tl.zeros([BLOCK_N, BLOCK_G], ACC) + rstd
    shift = tl.zeros([BLOCK_N, BLOCK_G], ACC)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    row_ptr = affine_ptr + n * 3 * C + c
    tl.store(row_ptr, scale, mask=inside)
    tl.store(row_ptr + C, shift, mask=inside)
    tl.store(row_ptr + 2 * C, tl.zeros([BLOCK_N, BLOCK_G], ACC) + centre, mask=inside)


@triton.jit(do_not_specialize=["batch"])
def _group_affine_bwd_kernel(
    daffine_ptr, mean_ptr, var_ptr, weight_ptr, dmean_ptr, dvar_ptr, dweight_ptr, dbias_ptr, batch, groups,
    G: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """BLOCK_N groups of every sample."""
    C = groups * G
    group = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_G)
    inside = (group < groups)[:, None] & (i < G)[None, :]
    c = group[:, None] * G + i[None, :]
    dweight = tl.zeros([BLOCK_N, BLOCK_G], ACC)
    dbias = tl.zeros([BLOCK_N, BLOCK_G], ACC)
    weight = tl.full([BLOCK_N, BLOCK_G], 1.0, ACC)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    for sample in range(batch):
        n = tl.cast(sample, tl.int64)
        apart, _, rstd = _group(mean_ptr, var_ptr, n * C + c, inside, G, EPS)
        row_ptr = daffine_ptr + n * 3 * C + c
        dscale = tl.load(row_ptr, mask=inside, other=0.0)
        dcentre = tl.load(row_ptr + 2 * C, mask=inside, other=0.0)
        dbias += tl.load(row_ptr + C, mask=inside, other=0.0)
        dweight += dscale * rstd
        drstd = dscale * weight
        if G > 1:
            drstd = tl.sum(drstd + 0.0, 1)[:, None]  # each product rounded: see `sum_products`
            dcentre = (tl.sum(dcentre, 1) / G)[:, None]
        dvar = -0.5 * drstd * rstd * rstd * rstd / G
        tl.store(dvar_ptr + n * C + c, tl.zeros([BLOCK_N, BLOCK_G], ACC) + dvar, mask=inside)
        tl.store(dmean_ptr + n * C + c, dcentre + 2.0 * dvar * apart, mask=inside)
    tl.store(dweight_ptr + c, dweight, mask=inside)
    tl.store(dbias_ptr + c, dbias, mask=inside)


def _blocks(channels: int, groups: int) -> tuple[int, dict[str, int]]:
    """How many programs there are for a sample's groups, and what is compiled into each."""
    size = channels // groups
    block_g = power_of_2(size)
    block_n = max(1, min(_CHANNELS // block_g, power_of_2(groups)))
    return cdiv(groups, block_n), {"G": size, "BLOCK_N": block_n, "BLOCK_G": block_g}


def group_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """See :func:`fastunet.aten.group_affine`; one launch."""
    batch, channels = mean.shape
    affine = mean.new_empty((batch, 3, channels))
    if affine.numel():
        programs, blocks = _blocks(channels, groups)
        launch(
            _group_affine_fwd_kernel, (programs, batch),
            mean.contiguous(), var.contiguous(), dense(weight), dense(bias), affine, groups,
            EPS=eps, ACC=accumulator(mean.dtype), num_warps=4, **blocks,
        )  # fmt: skip
    return affine


def group_affine_backward(
    daffine: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.group_affine_backward`; one launch."""
    batch, channels = mean.shape
    dmean, dvar = daffine.new_empty(mean.shape), daffine.new_empty(mean.shape)
    dweight, dbias = daffine.new_empty(channels), daffine.new_empty(channels)
    if channels:
        programs, blocks = _blocks(channels, groups)
        launch(
            _group_affine_bwd_kernel, (programs,),
            daffine.contiguous(), mean.contiguous(), var.contiguous(), dense(weight), dmean, dvar, dweight, dbias,
            batch, groups, EPS=eps, ACC=accumulator(mean.dtype), num_warps=4, **blocks,
        )  # fmt: skip
    return dmean, dvar, dweight, dbias
