"""Gradients of the convolutions of :mod:`fastunet.kernels.conv`, each exact.

With M = N·H·W of the output, z the normalised sources and g the gradient with respect to z:

    dY = dy + dmean/M + (2/M)·dvar·(y − mean)                       one pass, also Σ dY for the bias
    dW[k,r,s,c] = Σ dY·z                                            slabs of pixels, summed in a fixed order
    g = the other convolution of dY with W;  m = not (z ≤ 0)
    dx = g·m·scale;  dscale = Σ g·m·(x − centre);  dshift = Σ g·m;  dcentre = −scale·dshift      in dgrad's epilogue

The gradient of a convolution is a transposed one and the reverse, so dgrad runs a forward's main loop.

dY is rounded by :func:`fastunet.kernels.common.dither`: else what dmean and dvar give it would be lost in 16 bits.
It has a pass of its own. wgrad reads each of its rows for three columns of the filter: forming it there saves one read,
but makes the main loop three times as long (on Hopper 1.87 issue slots per tensor clock, not 0.62) and spills.

Layout: activations NHWC, weights as in the forward. Bytes: reads dy and y, writes dY, reads it twice, reads each source
twice, writes each dx; dW's slabs are written and read once. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import frame, memory_format, stats_dtype

from . import conv_aten
from .affine import affine_act_backward, no_gradients
from .common import GOLDEN, Source, block, cdiv, dense, dither, empty_nhwc, nhwc, sum_slabs
from .conv import chosen, computing, joined, multiplying, placed
from .conv_down import conv_down_dgrad
from .conv_few import conv_few_backward
from .conv_few import serves as few
from .conv_image import conv_image_wgrad, serves
from .conv_strided_wgrad import conv_strided_wgrad
from .conv_up import conv_up_dgrad
from .launching import accumulator, launch
from .pool import pool_backward

# ---- kernels ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pixels", "chunk"])
def _form_dy_kernel(
    dy_ptr, out_ptr, y_ptr, dmean_ptr, dvar_ptr, mean_ptr, sum_ptr, pixels, chunk, K,
    SAMPLES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dY for ``chunk`` rows of K values, and their sum per k for the bias; stored only if it differs from dy."""
    slab = tl.program_id(0).to(tl.int64)
    if SAMPLES:
        n = tl.program_id(2).to(tl.int64)
        slab = slab * tl.num_programs(2) + n
        if dy_ptr is not None:
            dy_ptr += n * pixels * K
        if out_ptr is not None:
            out_ptr += n * pixels * K
        if dmean_ptr is not None:
            dmean_ptr += n * K
        if dvar_ptr is not None:
            y_ptr += n * pixels * K
            dvar_ptr += n * K
            mean_ptr += n * K
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    level = tl.zeros([BLOCK_K], ACC)
    slope = tl.zeros([BLOCK_K], ACC)
    mean = tl.zeros([BLOCK_K], ACC)
    count = pixels.to(ACC)
    if dmean_ptr is not None:
        level = tl.load(dmean_ptr + k, mask=k < K, other=0.0) / count
    if dvar_ptr is not None:
        slope = tl.load(dvar_ptr + k, mask=k < K, other=0.0) * (2.0 / count)
        mean = tl.load(mean_ptr + k, mask=k < K, other=0.0)
    total = tl.zeros([BLOCK_K], ACC)
    first = tl.program_id(0).to(tl.int64) * chunk
    golden = tl.full([], GOLDEN, tl.uint32)
    dtype: tl.constexpr = ACC if out_ptr is None else out_ptr.dtype.element_ty
    for start in range(0, chunk, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = ((m < chunk) & (first + m < pixels))[:, None] & (k < K)[None, :]
        index = (first + m)[:, None] * K + k[None, :]
        d = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        if dy_ptr is not None:
            d += tl.load(dy_ptr + index, mask=mask, other=0.0).to(ACC)
        if dvar_ptr is not None:
            d += slope[None, :] * (tl.load(y_ptr + index, mask=mask, other=0.0).to(ACC) - mean[None, :])
        d += level[None, :]
        if sum_ptr is not None:
            total += tl.sum(tl.where(mask, d, 0.0), 0)
        if out_ptr is not None:
            turn = ((first + m).to(tl.uint32) * golden * K)[:, None] + (k.to(tl.uint32) * golden)[None, :]
            tl.store(out_ptr + index, dither(d, turn, dtype).to(dtype), mask=mask)
    if sum_ptr is not None:
        tl.store(sum_ptr + slab * K + k, total, mask=k < K)


# ---- launchers ---------------------------------------------------------------------------------------------------


def _form_dy(
    dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, y: Tensor, mean: Tensor, need_sum: bool
) -> tuple[Tensor, Tensor]:
    """dY in NHWC memory, and its sum per channel if asked for (else empty)."""
    like = y if dy is None else dy
    batch, filters, height, width = like.shape
    dy = None if dy is None else nhwc(dy)
    forms = dmean is not None or dvar is not None
    samples = batch if forms and mean.dim() == 2 else 1
    pixels = batch // max(samples, 1) * height * width
    if not (forms or need_sum):
        assert dy is not None
        return dy, like.new_empty(0)
    out = empty_nhwc(like, *like.shape) if forms or dy is None else dy
    if like.numel() == 0:
        return out, like.new_zeros(filters if need_sum else 0)
    block_k = block(filters, 64, 1)
    block_m = min(4096 // block_k, 1024)
    chunk = block_m * max(1, cdiv(samples * pixels, block_m * 2048))
    programs = cdiv(pixels, chunk)
    sums = like.new_empty((programs * samples, filters), dtype=stats_dtype(like.dtype)) if need_sum else None
    launch(
        _form_dy_kernel, (programs, cdiv(filters, block_k), samples),
        dy, out if forms else None, None if dvar is None else nhwc(y),
        dense(dmean), dense(dvar), None if dvar is None else mean.contiguous(), sums, pixels, chunk, filters,
        SAMPLES=forms and mean.dim() == 2, BLOCK_M=block_m, BLOCK_K=block_k, ACC=accumulator(like.dtype), num_warps=4,
    )  # fmt: skip
    return out, like.new_empty(0, dtype=stats_dtype(like.dtype)) if sums is None else sum_slabs(sums)


def _backward3x3(
    dy: Tensor, weight: Tensor, sources: Sequence[Source], size: Sequence[int], mask: Sequence[bool], mixed: bool
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Gradients of the sources, and dW in stats_dtype or the weight's, of a 3×3 convolution of stride 1."""
    about = weight.shape[0], size[1], mixed
    asked = [source for source, wanted in zip(sources, mask, strict=False) if wanted]
    weighed = mask[2] and dy.numel() > 0
    whole = weighed and len(asked) == len(sources)
    if whole and all(chosen(kind, sources, *about) == "cudnn" for kind in ("conv3x3_dgrad", "conv3x3_wgrad")):
        return conv_aten.conv3x3_backward(dy, weight, sources)
    pairs = [no_gradients(source.x) for source in sources]
    if asked:
        dgrad, _ = computing("conv3x3_dgrad", asked, *about)
        pairs = dgrad(dy, weight, sources, mask)
    if not weighed:
        return pairs, weight.new_empty(0)
    if len(sources) == 1 and serves(sources[0], size, weight):
        return pairs, conv_image_wgrad(dy, sources[0])
    wgrad, sources = computing("conv3x3_wgrad", sources, *about)
    return pairs, wgrad(dy, weight, sources)


def _down_backward(
    dy: Tensor, dbias: Tensor, weight: Tensor, sources: Sequence[Source], size: Sequence[int], stride: int,
    mask: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Gradients of the sources, and dW and dbias in stats_dtype, of a convolution that is not 3×3 of stride 1."""
    source = joined(sources, size)
    dweight = weight.new_empty(0)
    if few(weight):
        dz, daffine, dweight, dbias = conv_few_backward(dy, weight, source, (mask[0] or mask[1], mask[2], mask[3]))
    elif mask[2] and dy.numel():
        dweight = conv_strided_wgrad(dy, weight, source, False)
    if not (mask[0] or mask[1]):
        return [empty for _ in sources for empty in no_gradients(source.x)], dweight, dbias
    if not few(weight):
        dz, daffine = conv_up_dgrad(dy, weight, source) if stride == 2 else conv_down_dgrad(dy, weight, source, 1)
    if source is sources[0]:
        return [dz, daffine], dweight, dbias
    grads: list[Tensor] = []
    shares = dz.split([each.channels for each in sources], 1)
    for each, share, wanted in zip(sources, shares, mask, strict=False):
        part = frame(share, (each.height, each.width), -each.top, -each.left)
        grads += affine_act_backward(part, each.x, each.affine, each.slope) if wanted else no_gradients(each.x)
    return grads, dweight, dbias


def _like(dweight: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    """dW with weight's dtype and strides; zeros where nothing was summed; empty where it is not ``wanted``."""
    if not wanted:
        return weight.new_empty(0)
    if dweight.numel() == 0:
        return torch.zeros_like(weight)
    return dweight.to(weight.dtype).contiguous(memory_format=memory_format(weight))


def conv2d_backward(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    dp: Tensor | None,
    y: Tensor,
    mean: Tensor,
    pool_scale: Tensor | None,
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    weight: Tensor,
    z: Tensor,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    mask: Sequence[bool],
    mixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv2d_backward`, and for ``mixed`` :func:`fastunet.kernels.conv.conv2d`."""
    sources = placed(x0, affine0, slope0, x1, affine1, slope1, offset, doubled)
    filters = multiplying(x0, weight)
    if dp is not None:
        stats = None if dmean is None or dvar is None else (dmean, dvar, mean)
        dy = pool_backward(y, pool_scale, dp, dy, stats)
        if stats is not None:
            dmean, dvar = None, None
    dy, dbias = _form_dy(dy, dmean, dvar, y, mean, mask[3] and not few(weight))
    if weight.shape[-1] == 3 and stride == 1:
        pairs, dweight = _backward3x3(dy, filters, sources, size, mask, mixed)
        grads = [gradient for pair in pairs for gradient in pair]
    else:
        grads, dweight, dbias = _down_backward(dy, dbias, filters, sources, size, stride, mask)
    if x1 is None:
        grads += no_gradients(x0)
    return grads[0], grads[1], grads[2], grads[3], _like(dweight, weight, mask[2]), dbias.to(weight.dtype)


def conv_transpose2d_backward(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    y: Tensor,
    mean: Tensor,
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv_transpose2d_backward`."""
    source, filters = Source(x, affine, slope), multiplying(x, weight)
    dy, dbias = _form_dy(dy, dmean, dvar, y, mean, mask[2])
    dx, daffine = conv_down_dgrad(dy, filters, source, 2) if mask[0] else no_gradients(x)
    dweight = conv_strided_wgrad(dy, filters, source, True) if mask[1] and dy.numel() else weight.new_empty(0)
    return dx, daffine, _like(dweight, weight, mask[1]), dbias.to(weight.dtype)
