"""Sources made explicit (``affine_act``), and the affine of a batch normalisation (``bn_affine``).

Forward:   z  = act(scale·(x − centre) + shift)
Backward:  g  = dz·m, where m is act's slope, as PyTorch has it at 0 and NaN
           dx = scale·g
           daffine = [Σ g·(x − centre),  Σ g,  −scale·Σ g]     over batch and picture

Layout: NHWC memory, read as a matrix (pixels, C), a tile of pixels × channels per step. Bytes, once each: forward reads
x and writes z; backward reads dz and x and writes dx, plus 12 bytes per channel and program for the sums, which are
added in a fixed order. Accumulation in float32 (float64 for float64 tensors).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import stats_dtype

from .common import act, block, by_sample, cdiv, dense, load_affine, nhwc, normalise, sum_slabs
from .launching import accumulator, launch

_ACCESSES = 2  # 16-byte accesses per thread, tensor and step: bytes enough in flight without crowding the registers
_ROUNDS = 8  # steps per program of the backward: the sums it writes stay below 1 % of its traffic
_BN_BLOCK = 128


@triton.jit
def before_act(g, z, SLOPE: tl.constexpr):
    """The gradient of z, before act, from that of act(z), which is not the identity."""
    if SLOPE == 0:
        before = tl.where(z <= 0, 0.0, g)
    else:
        before = tl.where(z > 0, g, g * SLOPE)
    return before


@triton.jit
def source_backward(dz, x, affine, SLOPE: tl.constexpr, ACC: tl.constexpr):
    """(dx, g·(x − centre), g) of a tile (pixels, channels), where g is the gradient before act; all in ACC."""
    g = dz.to(ACC)
    if SLOPE is not None:
        g = before_act(g, normalise(x, affine, None, ACC), SLOPE)
    dx = g
    gx = g  # which nobody reads without an affine
    if len(affine) > 0:
        dx = g * affine.scale[None, :]
        gx = g * (x.to(ACC) - affine.centre[None, :])
    return dx, gx, g


@triton.jit
def store_affine_gradient(partial_ptr, slab, c, C, scale, sum_gx, sum_g):
    """Write one program's share of daffine, (3, C), into slab number ``slab``."""
    row_ptr = partial_ptr + slab.to(tl.int64) * 3 * C + c
    tl.store(row_ptr, sum_gx, mask=c < C)
    tl.store(row_ptr + C, sum_g, mask=c < C)
    tl.store(row_ptr + 2 * C, -scale * sum_g, mask=c < C)


@triton.jit(do_not_specialize=["pixels"])
def _affine_act_fwd_kernel(
    x_ptr, affine_ptr, z_ptr, pixels, C, z_stride,
    SAMPLES: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if SAMPLES:
        n = tl.program_id(2).to(tl.int64)
        x_ptr += n * pixels * C
        z_ptr += n * pixels * z_stride
        affine_ptr += n * 3 * C
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    index = p[:, None] * C + c[None, :]
    affine = load_affine(affine_ptr, c, C)
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    z = normalise(x, affine, SLOPE, ACC)
    tl.store(z_ptr + p[:, None] * z_stride + c[None, :], z, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _affine_act_bwd_kernel(
    dz_ptr, x_ptr, affine_ptr, dx_ptr, z_ptr, partial_ptr, pixels, C, stride,
    SAMPLES: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(0).to(tl.int64)
    share = slab
    if SAMPLES:
        n = tl.program_id(2).to(tl.int64)
        share = slab * tl.num_programs(2) + n
        dz_ptr += n * pixels * stride
        x_ptr += n * pixels * C
        dx_ptr += n * pixels * C
        affine_ptr += n * 3 * C
        if z_ptr is not None:
            z_ptr += n * pixels * stride
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    affine = load_affine(affine_ptr, c, C)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i in range(ROUNDS):
        p = (slab * ROUNDS + i) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < C)[None, :]
        index = p[:, None] * C + c[None, :]
        value = p[:, None] * stride + c[None, :]
        dz = tl.load(dz_ptr + value, mask=inside, other=0.0)
        x = tl.load(x_ptr + index, mask=inside, other=0.0)
        if z_ptr is not None:
            tl.store(z_ptr + value, normalise(x, affine, SLOPE, ACC), mask=inside)
        dx, gx, g = source_backward(dz, x, affine, SLOPE, ACC)
        tl.store(dx_ptr + index, dx, mask=inside)
        if affine_ptr is not None:
            sum_gx += gx
            sum_g += g
    if affine_ptr is not None:
        store_affine_gradient(partial_ptr, share, c, C, affine.scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))


@triton.jit(do_not_specialize=["count"])
def _bn_affine_fwd_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, affine_ptr, C, count,
    MOMENTUM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    var = tl.load(var_ptr + c, mask=inside, other=1.0)
    if running_mean_ptr is not None:
        values = tl.maximum(count, 2).to(ACC)
        unbiased = tl.where(count > 1, var * (values / (values - 1.0)), var)
        running = tl.load(running_mean_ptr + c, mask=inside, other=0.0)
        moved = running.to(ACC) + MOMENTUM * (mean - running.to(ACC))
        tl.store(running_mean_ptr + c, moved.to(running.dtype), mask=inside)
        running = tl.load(running_var_ptr + c, mask=inside, other=0.0)
        moved = running.to(ACC) + MOMENTUM * (unbiased - running.to(ACC))
        tl.store(running_var_ptr + c, moved.to(running.dtype), mask=inside)
    scale = tl.rsqrt(var + EPS)
    shift = tl.zeros([BLOCK_C], ACC)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask=inside, other=0.0).to(ACC)
    tl.store(affine_ptr + c, scale, mask=inside)
    tl.store(affine_ptr + C + c, shift, mask=inside)
    tl.store(affine_ptr + 2 * C + c, mean, mask=inside)


@triton.jit
def _bn_affine_bwd_kernel(
    daffine_ptr, var_ptr, weight_ptr, dmean_ptr, dvar_ptr, dweight_ptr, dbias_ptr, C,
    EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    rstd = tl.rsqrt(tl.load(var_ptr + c, mask=inside, other=1.0) + EPS)
    dweight = tl.load(daffine_ptr + c, mask=inside, other=0.0) * rstd
    dvar = -0.5 * dweight * rstd * rstd
    if weight_ptr is not None:
        dvar *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    tl.store(dweight_ptr + c, dweight, mask=inside)
    tl.store(dvar_ptr + c, dvar, mask=inside)
    tl.store(dbias_ptr + c, tl.load(daffine_ptr + C + c, mask=inside, other=0.0), mask=inside)
    tl.store(dmean_ptr + c, tl.load(daffine_ptr + 2 * C + c, mask=inside, other=0.0), mask=inside)


def flat_tile(channels: int, element_size: int, accesses: int) -> tuple[int, int]:
    """(pixels, channels) that 4 warps read in ``accesses`` 16-byte accesses per thread; at most 128 × 64."""
    block_c = block(channels, 64, 4)
    return min(128, accesses * 128 * 16 // element_size // block_c), block_c


def tile_of(x: Tensor, accesses: int) -> tuple[int, int]:
    """:func:`flat_tile` of x; half the pixels where accesses are of single elements, each with its own address."""
    block_p, block_c = flat_tile(x.shape[1], x.element_size(), accesses)
    return block_p if x.shape[1] % 16 == 0 else block_p // 2, block_c


def pictures(x: Tensor, *affines: Tensor | None) -> tuple[int, int]:
    """How many samples x is read as, all as one unless some of its ``affines`` differ by sample; and pixels of each."""
    samples = x.shape[0] if any(map(by_sample, affines)) else 1
    return samples, x.numel() // max(x.shape[1] * samples, 1)


def affine_slabs(x: Tensor, affine: Tensor | None, programs: int) -> Tensor | None:
    """Where so many ``programs`` leave their shares of the gradient of x's affine, if it has one; where samples differ,
    as many for each."""
    if affine is None:
        return None
    slabs = programs if affine.dim() == 2 else programs // max(affine.shape[0], 1)
    return x.new_empty((slabs, *affine.shape), dtype=stats_dtype(x.dtype))


def affine_gradient(x: Tensor, partial: Tensor | None) -> Tensor:
    """daffine from those shares, empty without an affine."""
    return x.new_empty(0, dtype=stats_dtype(x.dtype)) if partial is None else sum_slabs(partial)


def no_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for (dx, daffine) of a source whose gradients were not asked for."""
    return x.new_empty(0), affine_gradient(x, None)


def affine_act(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """z = act(scale·(x − centre) + shift) for x (N, C, H, W): a new channels_last tensor of x's dtype."""
    if (affine is None and slope == 1) or x.numel() == 0:
        return x.clone(memory_format=torch.channels_last)
    z = torch.empty_like(x, memory_format=torch.channels_last)
    store_value(z, x.shape[1], x, affine, slope)
    return z


def store_value(z: Tensor, stride: int, x: Tensor, affine: Tensor | None, slope: float) -> None:
    """Fill ``z``, an NHWC tensor or some channels of one, whose pixels lie ``stride`` elements apart, with a source's
    value."""
    channels = x.shape[1]
    samples, pixels = pictures(x, affine)
    if pixels * samples:
        block_p, block_c = flat_tile(channels, x.element_size(), _ACCESSES)
        launch(
            _affine_act_fwd_kernel, (cdiv(pixels, block_p), cdiv(channels, block_c), samples),
            nhwc(x), dense(affine), z, pixels, channels, stride,
            SAMPLES=by_sample(affine), SLOPE=act(slope), ACC=accumulator(x.dtype), BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip


def affine_act_backward(dz: Tensor, x: Tensor, affine: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    """Gradients (dx, daffine) of :func:`affine_act`: dx like x; daffine (3, C), empty without an affine."""
    if affine is None and slope == 1:
        return dz.clone(memory_format=torch.channels_last), affine_gradient(x, None)
    return source_gradient(nhwc(dz), x.shape[1], x, affine, slope)


def source_gradient(
    dz: Tensor, stride: int, x: Tensor, affine: Tensor | None, slope: float, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx, daffine) of a source from the gradient ``dz`` of its value, an NHWC tensor or some channels of one, whose
    pixels lie ``stride`` elements apart. ``z``, laid out as dz, is filled with the value itself."""
    x = nhwc(x)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    channels = x.shape[1]
    samples, pixels = pictures(x, affine)
    block_p, block_c = flat_tile(channels, x.element_size(), _ACCESSES)
    slabs = cdiv(pixels, block_p * _ROUNDS)
    partial = affine_slabs(x, affine, slabs * samples)
    if x.numel() > 0:
        launch(
            _affine_act_bwd_kernel, (slabs, cdiv(channels, block_c), samples),
            dz, x, dense(affine), dx, z, partial, pixels, channels, stride,
            SAMPLES=by_sample(affine), SLOPE=act(slope), ACC=accumulator(x.dtype), ROUNDS=_ROUNDS,
            BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
    return dx, affine_gradient(x, partial)


def _bn_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    running: tuple[Tensor, Tensor] | tuple[None, None], count: int, momentum: float,
) -> Tensor:  # fmt: skip
    channels = mean.shape[0]
    affine = mean.new_empty((3, channels))
    if channels:
        launch(
            _bn_affine_fwd_kernel, (cdiv(channels, _BN_BLOCK),),
            mean.contiguous(), var.contiguous(), dense(weight), dense(bias), *running, affine, channels, count,
            MOMENTUM=momentum, EPS=eps, ACC=accumulator(mean.dtype), BLOCK_C=_BN_BLOCK,
        )  # fmt: skip
    return affine


def bn_affine(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The affine of a batch normalisation: rows weight·rsqrt(var + eps), bias, mean; (3, C) in mean's dtype."""
    return _bn_affine(mean, var, weight, bias, eps, (None, None), 0, 0.0)


def bn_affine_running(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    count: int,
    momentum: float,
    eps: float,
) -> Tensor:
    """See :func:`fastunet.aten.bn_affine_running`; one launch."""
    running = running_mean.contiguous(), running_var.contiguous()
    affine = _bn_affine(mean, var, weight, bias, eps, running, count, momentum)
    for mine, theirs in zip(running, (running_mean, running_var), strict=True):
        if mine is not theirs:  # a buffer that is not dense in memory
            theirs.copy_(mine)
    return affine


def bn_affine_backward(
    daffine: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dmean, dvar, dweight, dbias) of :func:`bn_affine`: (C,) each, in daffine's dtype."""
    channels = var.shape[0]
    dmean, dvar, dweight, dbias = (daffine.new_empty(channels) for _ in range(4))
    if channels:
        launch(
            _bn_affine_bwd_kernel, (cdiv(channels, _BN_BLOCK),),
            daffine.contiguous(), var.contiguous(), dense(weight), dmean, dvar, dweight, dbias, channels,
            EPS=eps, ACC=accumulator(var.dtype), BLOCK_C=_BN_BLOCK,
        )  # fmt: skip
    return dmean, dvar, dweight, dbias
