"""The torch backend: every operation of :mod:`fastunet.ops` as a composition of ATen calls.

Any device and any floating dtype, float64 included. It is the CPU path, the fallback on GPUs that Triton does not
serve, and the twin the Triton kernels are compared with. Each function has the name and the signature of its twin in
:mod:`fastunet.kernels`. Activations come out in channels_last memory, whatever they came in as: ATen is several times
faster there, on CPUs as on GPUs.

A *source* is three arguments ``(x, affine, slope)`` that stand for the tensor ``z = act(scale·(x − centre) + shift)``:
``x`` is (N, C, H, W); ``affine`` is None (identity) or (3, C) with rows scale, shift, centre, or (N, 3, C) where
samples differ, in float32 (float64 for a float64 ``x``); ``slope`` is act's below zero: 1 the identity, 0 ReLU, between
them a leaky ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.layout import NOTHING, SAMPLES, channels_last, frame, lowered, memory_format, no_stats, stats_dtype
from fastunet.softmax_stats import softmax_stats, softmax_stats_backward

aten = torch.ops.aten


# ---- sources -----------------------------------------------------------------------------------------------------


def activate(z: Tensor, slope: float, inplace: bool = False) -> Tensor:
    """act(z), whose slope below zero is ``slope``; z itself for the identity. ``inplace`` serves slopes from 0 on: a
    derivative can tell from the value of those where z is above zero."""
    if slope == 1:
        return z
    return F.relu(z, inplace) if slope == 0 else F.leaky_relu(z, slope, inplace and slope > 0)


def activate_backward(dz: Tensor, z: Tensor, slope: float) -> Tensor:
    """The gradient before act from that of its value ``z``, for slopes from 0 on; at NaN it is PyTorch's."""
    if slope == 0:
        dx: Tensor = aten.threshold_backward(dz, z, 0)
    else:
        dx = aten.leaky_relu_backward(dz, z, slope, True)
    return dx


def affine_act(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """z = act(scale·(x − centre) + shift), in x's dtype; a new tensor."""
    z = _normalise(x, affine, slope)
    return channels_last(x.clone() if z is x else z)


def affine_act_backward(dz: Tensor, x: Tensor, affine: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    """Gradients (dx, daffine) of :func:`affine_act`; daffine is empty without an affine."""
    dx, daffine = _normalise_backward(dz, x, affine, slope, _normalise(x, affine, slope) if slope >= 0 else None)
    return channels_last(dz.clone() if dx is dz else dx), daffine


def affine_prelu(x: Tensor, affine: Tensor | None, slopes: Tensor) -> Tensor:
    """prelu(scale·(x − centre) + shift) with slopes below zero (C,) or (1,), in x's dtype."""
    return channels_last(F.prelu(_normalise(channels_last(x), affine, 1.0), slopes.to(x.dtype)))


def affine_prelu_backward(
    dz: Tensor, x: Tensor, affine: Tensor | None, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, daffine, dslopes) of :func:`affine_prelu`; daffine is empty without an affine."""
    x = channels_last(x)
    s = _normalise(x, affine, 1.0)
    above = s > 0
    below = torch.where(above, 0, dz * s).sum((0, 2, 3), dtype=stats_dtype(x.dtype))
    g = torch.where(above, dz, dz * _by_sample(slopes.to(x.dtype)))
    dx, daffine = _normalise_backward(g, x, affine, 1.0, None)
    return channels_last(dx), daffine, (below.sum(0, True) if slopes.numel() == 1 else below).to(slopes.dtype)


def add_act(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor,
    skip_affine: Tensor | None,
    skip_slope: float,
    sum_slope: float,
) -> Tensor:
    """act of the sum of two sources of one shape, whose slope below zero is ``sum_slope``; in their dtype."""
    z = _normalise(channels_last(x), affine, slope) + _normalise(channels_last(skip), skip_affine, skip_slope)
    return channels_last(activate(z, sum_slope, inplace=True))


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
    """Gradients (dx, daffine, dskip, dskip_affine) of :func:`add_act`; those of affines that are None are empty."""
    sources = ((channels_last(x), affine, slope), (channels_last(skip), skip_affine, skip_slope))
    a, b = (_normalise(*source) for source in sources)
    g = channels_last(dz)
    if sum_slope == 0:
        g = aten.threshold_backward(g, a + b, 0)
    elif sum_slope != 1:
        g = aten.leaky_relu_backward(g, a + b, sum_slope, False)
    found = []
    for source, value in zip(sources, (a, b), strict=True):
        dx, daffine = _normalise_backward(g, *source, value)
        found += [channels_last(g.clone() if dx is g else dx), daffine]
    dx, daffine, dskip, dskip_affine = found
    return dx, daffine, dskip, dskip_affine


def _scaled(x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor) -> Tensor:
    """scale·(x − centre) + shift per channel, in one pass; F.batch_norm would do, but refuses eps = 0 in torch 2.11."""
    one = torch.ones_like(centre)
    return torch.batch_norm(x, scale, shift, centre, one, False, 0.0, 0.0, torch.backends.cudnn.enabled)


def _normalise(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """The value of a source; a plain one is returned as it is."""
    if affine is None:
        return activate(x, slope)
    if x.numel() == 0:
        return torch.empty_like(x)
    if affine.dim() == 3:
        scale, shift, centre = map(_by_sample, affine.unbind(1))
        return activate(torch.addcmul(shift, x - centre, scale).to(x.dtype), slope, inplace=True)
    scale, shift, centre = affine.contiguous().unbind(0)
    z = _scaled(x, scale, shift, centre)
    return activate(z, slope, inplace=True)


def _by_sample(row: Tensor) -> Tensor:
    """A value per sample and channel, (N, C), or per channel, (C,), beside pixels."""
    return row.view(-1, row.shape[-1], 1, 1)


def _normalise_backward(
    dz: Tensor, x: Tensor, affine: Tensor | None, slope: float, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients (dx, daffine) from that of the source's value ``z``, which is read for a slope from 0 to below 1."""
    if slope < 0:
        dz = aten.leaky_relu_backward(dz, _normalise(x, affine, 1.0), slope, False)
    elif slope != 1:
        assert z is not None
        dz = activate_backward(dz, z, slope)
    if affine is None:
        return dz, no_stats(x)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(affine)
    if affine.dim() == 3:
        scale, _, centre = affine.unbind(1)
        dscale = (dz * (x - _by_sample(centre))).sum((2, 3))
        dshift = dz.sum((2, 3), dtype=affine.dtype)
        dx = (dz * _by_sample(scale)).to(x.dtype)
        return dx, torch.stack([dscale, dshift, -scale * dshift], 1)
    scale, _, centre = affine.contiguous().unbind(0)  # ATen's channels_last kernels assume dense rows
    one = torch.ones_like(centre)  # also passed as saved statistics, which CUDA requires
    on_cpu = x.device.type == "cpu"
    by_pixel = adds_one_by_one(x)
    if by_pixel or not on_cpu:
        # Of contiguous memory CUDA's batch norm rounds products and partial sums to 16 bits while it adds them up.
        x, dz = channels_last(x), channels_last(dz)
    else:
        dz = dz.contiguous(memory_format=memory_format(x))  # a stride that means nothing, of one picture, misleads ATen
    dx, dscale, dshift = aten.native_batch_norm_backward(
        dz, x, scale, centre, one, centre, one, False, 0.0, [True, not on_cpu, not on_cpu]
    )
    if by_pixel:
        dscale, dshift = _pixel_dots(_blocks(x, _LONG), _blocks(dz, _LONG), centre)
    elif on_cpu:  # where ATen's batch norm adds up the pixels of a plane one by one too
        dscale = (dz * (x - _by_sample(centre))).sum((0, 2, 3))
        dshift = dz.sum((0, 2, 3), dtype=affine.dtype)
    return dx, torch.stack([dscale, dshift, -scale * dshift])


# ---- sums over pixels --------------------------------------------------------------------------------------------

_COLUMNS = 2048  # long enough for a CPU, in its caches
_SHORT, _LONG = 256, 512  # pixels in a sum: of values and their squares, of products
MANY_PIXELS = 1 << 17  # from here on, adding up one by one loses more than float32's other roundings


def adds_one_by_one(x: Tensor) -> bool:
    """Whether ATen's batch norm adds up the values of each channel one by one: in channels_last memory on a CPU, where
    the variance of 2 million pixels keeps three digits."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and x.stride(1) == 1
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _blocks(x: Tensor, rows: int) -> list[Tensor]:
    """channels_last memory as blocks (up to ``rows``, pixels · C, 1, 1), views of it: many pixels to a row, and one in
    what is left over.

    A batch norm of a block, with every pixel of a row as channels of its own, has short sums and long vectors.
    """
    channels, start = x.shape[1], x.storage_offset()
    pixels = x.numel() // channels
    # Of few pixels no more to a row than there are rows: what is left over is added up one by one.
    a_row = max(1, min(_COLUMNS // channels, math.isqrt(pixels)))
    if a_row < 8:
        rows //= 2
    at_once = [(begin, min(rows, pixels // a_row - begin), a_row) for begin in range(0, pixels // a_row, rows)]
    if pixels % a_row:
        at_once.append((pixels // a_row, pixels % a_row, 1))
    return [
        x.as_strided((n, k * channels, 1, 1), (k * channels, 1, 1, 1), start + begin * a_row * channels)
        for begin, n, k in at_once
    ]


def _pixel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of channels_last memory, merged from those of short sums."""
    channels, blocks = x.shape[1], _blocks(x, _SHORT)
    found = [torch.batch_norm_update_stats(block, None, None, 0.0) for block in blocks]
    joined = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    means, variances = (each.view(-1, channels) for each in joined)
    if len({len(block) for block in blocks}) == 1:  # every sum is of as many pixels
        mean = means.mean(0)
        between = means.sub_(mean)
        return mean, variances.addcmul_(between, between).mean(0)
    shares = [means.new_full((block.shape[1] // channels, 1), len(block) * channels / x.numel()) for block in blocks]
    share, means, variances = torch.cat(shares).double(), means.double(), variances.double()
    mean = (means * share).sum(0)
    var = ((variances + (means - mean).square()) * share).sum(0)
    return mean.to(x.dtype), var.to(x.dtype)


def _pixel_dots(blocks: list[Tensor], gradients: list[Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """Σ dz·(x − centre) and Σ dz over the pixels, per channel, of the blocks of x and of dz."""
    channels = centre.numel()
    centres = centre.repeat(blocks[0].shape[1] // channels)
    ones = torch.ones_like(centres)
    dots = []
    for block, g in zip(blocks, gradients, strict=True):
        columns = block.shape[1]
        _, *sums = aten.native_batch_norm_backward(
            g, block, None, None, None, centres[:columns], ones[:columns], True, 0.0, [False, True, True]
        )
        dots.append([each.view(-1, channels) for each in sums])
    dscale, dshift = (torch.cat(each).sum(0) for each in zip(*dots, strict=True))
    return dscale, dshift


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm in training and act, of a slope from 0 on, of float32 channels_last memory: (z, mean, biased
    variance)."""
    mean, var = _pixel_stats(x)
    z = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
    return activate(z, slope, inplace=True), mean, var


def batch_norm_act_backward(
    dz: Tensor, x: Tensor, z: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias) of :func:`batch_norm_act`: dx = scale·(g − Σg/M − x̂·Σg·x̂/M), g that before act."""
    dz = channels_last(dz)
    rstd = torch.rsqrt(var + eps)
    count = x.numel() // x.shape[1]
    g = dz if slope == 1 else activate_backward(dz, z, slope)
    if count < MANY_PIXELS:
        dx, dweight, dbias = aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, rstd, True, eps, [True, True, True]
        )
        return dx, dweight, dbias
    blocks, gradients = _blocks(x, _LONG), _blocks(g, _LONG)
    dscale, dbias = _pixel_dots(blocks, gradients, mean)
    dweight = dscale * rstd
    scale = rstd if weight is None else rstd * weight
    rise = scale * dweight * rstd / -count
    level = scale * dbias / -count - rise * mean
    repeated = torch.stack([scale, rise, level]).repeat(1, blocks[0].shape[1] // mean.numel())[..., None, None]
    dx = torch.empty_like(x) if slope == 1 else g
    for block, g, out in zip(blocks, gradients, _blocks(dx, _LONG), strict=True):  # while a block is in the caches
        scale, rise, level = repeated[:, : block.shape[1]]
        torch.addcmul(level, g, scale, out=out).addcmul_(block, rise)
    return dx, dweight, dbias


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float | Tensor
) -> None:
    """running ← running + momentum·(batch − running) in place, with the unbiased variance of ``count`` values."""
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)


def bn_affine(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The affine of a batch normalisation: rows weight·rsqrt(var + eps), bias, mean; (3, C) in mean's dtype."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return torch.stack([scale, shift, mean])


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
    """:func:`bn_affine` and :func:`update_running_stats`."""
    update_running_stats(running_mean, running_var, mean, var, count, momentum)
    return bn_affine(mean, var, weight, bias, eps)


def bn_affine_backward(
    daffine: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dmean, dvar, dweight, dbias) of :func:`bn_affine`, all in daffine's dtype."""
    dscale, dshift, dcentre = daffine.unbind(0)
    rstd = torch.rsqrt(var + eps)
    dvar = -0.5 * dscale * rstd**3
    if weight is not None:
        dvar = dvar * weight
    return dcentre.clone(), dvar, dscale * rstd, dshift.clone()


def group_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """The affine (N, 3, C) of a group normalisation from mean and biased variance (N, C) of each sample's channels;
    with as many groups as channels, of an instance normalisation."""
    parts = mean.shape[0], groups, mean.shape[1] // groups
    within = mean.view(parts)
    centre = within.mean(2, keepdim=True)
    rstd = torch.rsqrt((var.view(parts) + (within - centre).square()).mean(2, keepdim=True) + eps)
    scale, centre = (t.expand_as(within).reshape(mean.shape) for t in (rstd, centre))
    if weight is not None:
        scale = scale * weight
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean)
    return torch.stack([scale, shift, centre], 1)


def group_affine_backward(
    daffine: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dmean, dvar, dweight, dbias) of :func:`group_affine`, all in daffine's dtype."""
    parts = mean.shape[0], groups, mean.shape[1] // groups
    dscale, dshift, dcentre = daffine.unbind(1)
    within = mean.view(parts)
    apart = within - within.mean(2, keepdim=True)
    rstd = torch.rsqrt((var.view(parts) + apart.square()).mean(2, keepdim=True) + eps)
    dweight = (dscale.reshape(parts) * rstd).view(mean.shape).sum(0)
    drstd = (dscale if weight is None else dscale * weight).reshape(parts).sum(2, keepdim=True)
    share = -0.5 * drstd * rstd**3 / within.shape[2]  # of the group's variance
    dvar = share.expand_as(within).reshape(mean.shape)
    dmean = dcentre.reshape(parts).mean(2, keepdim=True) + 2 * share * apart
    return dmean.view(mean.shape), dvar, dweight, dshift.sum(0)


# ---- convolutions ------------------------------------------------------------------------------------------------


def _stats(y: Tensor, stats: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of y as rounded to its dtype, in stats_dtype: over (N, H, W), two (C,) tensors, or of
    samples over (H, W), two (N, C) tensors; empty where none are asked for."""
    if stats == NOTHING:
        return no_stats(y), no_stats(y)
    dtype = stats_dtype(y.dtype)
    if y.numel() == 0:
        shape = y.shape[:2] if stats == SAMPLES else y.shape[1:2]
        return y.new_zeros(shape, dtype=dtype), y.new_zeros(shape, dtype=dtype)
    wide = y.to(dtype) if y.device.type == "cpu" else y  # on a CPU 16-bit input gives 16-bit statistics
    if stats == SAMPLES:
        var, mean = torch.var_mean(wide.to(dtype), (2, 3), correction=0)
        return mean, var
    if adds_one_by_one(wide):
        return _pixel_stats(wide)
    mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
    return mean, var


def _form_dy(dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, y: Tensor, mean: Tensor) -> Tensor:
    """The gradient of the raw convolution output: dy + dmean/M + (2/M)·dvar·(y − mean), with M = N·H·W."""
    if dy is not None and dmean is None and dvar is None:
        return dy
    if y.numel() == 0:
        return torch.zeros_like(y)
    count = y.numel() // mean.numel()
    rise = torch.zeros_like(mean) if dvar is None else dvar * (2.0 / count)
    level = torch.zeros_like(mean) if dmean is None else dmean / count
    wide = y.to(mean.dtype)  # one rounding, at the end
    if mean.dim() == 2:
        total = torch.addcmul(_by_sample(level), wide - _by_sample(mean), _by_sample(rise))
    else:
        total = _scaled(wide, rise, level, mean)
    if dy is not None:
        total += dy
        if y.dtype.itemsize == 2:
            total = _dither(total, y.dtype)
    return total.to(y.dtype)


def _dither(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x (N, C, H, W), moved by less than half of the last digit of a 16-bit ``dtype``, to be rounded to that:
    as :func:`fastunet.kernels.common.dither`, for what is added to numbers of that dtype. x itself is written over."""
    about = torch.finfo(dtype)
    batch, channels, height, width = x.shape
    pixel, channel = (torch.arange(n, device=x.device) for n in (batch * height * width, channels))
    turns = (pixel * channels * 2654435769).int().view(batch, height, width, 1), (channel * 2654435769).int()
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest below |x|
    digit = power.clamp(about.smallest_normal, about.max / 2)  # infinity stays what it is
    x.addcmul_(torch.add(*turns).movedim(3, 1), digit, value=about.eps * 0.5**32)
    # Below a power of two digits are half as large: what would come to lie there goes up to it.
    return torch.maximum(x.abs(), power).copysign_(x)


def _beside(weight: Tensor, z: Tensor) -> torch.memory_format:
    """The layout in which ATen convolves z with ``weight`` without copying the larger of the two.

    Deep layers have more weights than pixels, and contiguous weights would be copied to channels_last and back.
    """
    few_pixels = weight.is_contiguous() and weight.numel() > z.numel()
    return torch.contiguous_format if few_pixels else torch.channels_last


def _convolved(z: Tensor, form: torch.memory_format) -> Tensor:
    """z in a layout, as a convolution's gradients read it. One channel gets the strides that PyTorch gives it: by one
    that means nothing oneDNN chooses sums which lose a digit."""
    z = z.contiguous(memory_format=form)
    return z.view(z.shape) if z.shape[1] == 1 else z


def _unambiguous(weight: Tensor) -> Tensor:
    """``weight``, whose gradient ATen would lay out by a stride that means nothing, of a single filter, and refuse."""
    return weight.contiguous() if weight.shape[0] == 1 else weight


def _unframe(g: Tensor, size: Sequence[int], top: int, left: int) -> Tensor:
    """The adjoint of :func:`frame`: the gradient of a tensor of ``size`` that was placed at (top, left)."""
    return frame(g, size, -top, -left)


_Source = tuple[Tensor, Tensor | None, float, bool, int, int]  # x, affine, slope, doubled, (top, left) in the frame


def _sources(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    offset: Sequence[int],
    doubled: Sequence[bool],
) -> list[_Source]:
    first = (x0, affine0, slope0, doubled[0], offset[0], offset[1])
    return [first] if x1 is None else [first, (x1, affine1, slope1, doubled[1], offset[2], offset[3])]


def _twice(z: Tensor) -> Tensor:
    """z with each of its pixels twice in both directions."""
    return F.interpolate(z, scale_factor=2.0, mode="nearest")


def _twice_backward(g: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of z, of that ``shape``, from that of :func:`_twice`."""
    dz: Tensor = aten.upsample_nearest2d_backward(channels_last(g), list(g.shape[2:]), list(shape), None, None)
    return dz


def _placed(sources: list[_Source], size: Sequence[int]) -> Tensor:
    """The sources' values, concatenated along the channels in a zero frame of ``size``."""
    parts = []
    for x, affine, slope, doubled, *corner in sources:
        z = _normalise(channels_last(x), affine, slope)
        parts.append(frame(_twice(z) if doubled else z, size, *corner))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _filter_gradients(dweight: Tensor, dbias: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of a weight, in its dtype and layout, and of its bias; empty where they are not ``wanted``."""
    return (
        dweight.to(weight.dtype).contiguous(memory_format=memory_format(weight)) if wanted[0] else weight.new_empty(0),
        dbias.to(weight.dtype) if wanted[1] else weight.new_empty(0),
    )


def conv2d(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    stats: int,
    save: bool,
    pool: bool,
    pool_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convolution of one or two sources, concatenated along the channels in a zero frame; of a ``doubled`` one its
    nearest ×2 lies there.

    Returns y; its mean and variance, of the batch (C,) if ``stats`` is 1, of each sample (N, C) if it is 2; the
    normalised operand if ``save`` asks for it; and if ``pool`` what is 2×2-pooled from y for a normalisation by a scale
    with the signs of ``pool_scale`` (None: positive; see :func:`max_pool2x2`). What was not asked for is empty.
    """
    weight, bias = lowered(x0, weight), lowered(x0, bias)
    z = _placed(_sources(x0, affine0, slope0, x1, affine1, slope1, offset, doubled), size)
    y = channels_last(
        F.conv2d(z.contiguous(memory_format=_beside(weight, z)), weight, bias, stride, weight.shape[-1] // 2)
    )
    mean, var = _stats(y, stats)
    itself = affine0 is None and slope0 == 1 and x1 is None and not doubled[0]
    plain = itself and list(size) == list(x0.shape[-2:])
    kept = x0.new_empty(0) if plain or not save else channels_last(z)
    pooled = max_pool2x2(y, pool_affine(pool_scale, y)) if pool else x0.new_empty(0)
    return y, mean, var, kept, pooled


def conv2d_act(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    affine: Tensor | None,
    slope: float,
    pool: bool,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A 3×3 convolution of stride 1 as :func:`conv2d`, and its result normalised by an ``affine`` that does not depend
    on it.

    Returns z = act(scale·(y − centre) + shift), or under a head the 1×1 convolution of z by ``head_weight``
    (J, K, 1, 1) and ``head_bias``, for which z need not be stored; and if ``pool``, without a head, z 2×2-pooled, else
    an empty tensor.
    """
    y, *_ = conv2d(
        x0, affine0, slope0, x1, affine1, slope1, weight, bias, 1, size, offset, doubled, NOTHING, False, False, None
    )
    z = channels_last(_normalise(y, affine, slope))
    pooled = max_pool2x2(z, None) if pool else z.new_empty(0)
    if head_weight is not None:
        z = channels_last(F.conv2d(z, lowered(z, head_weight), lowered(z, head_bias)))
    return z, pooled


def pool_affine(scale: Tensor | None, y: Tensor) -> Tensor | None:
    """An affine of y's channels with the signs of ``scale``: all that pooling reads."""
    if scale is None:
        return None
    scale = scale.detach().to(stats_dtype(y.dtype))
    return torch.stack([scale, torch.zeros_like(scale), torch.zeros_like(scale)])


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx0, daffine0, dx1, daffine1, dweight, dbias); those not asked for in ``mask`` (source 0, source 1,
    weight, bias) are empty."""
    sources = _sources(x0, affine0, slope0, x1, affine1, slope1, offset, doubled)
    if dp is not None:
        dy = max_pool2x2_backward(y, pool_affine(pool_scale, y), dp, dy)
    dy = _form_dy(dy, dmean, dvar, y, mean)
    if z.numel() == 0:
        z = _placed(sources, size)
    need_dz = mask[0] or mask[1]
    pad = weight.shape[-1] // 2
    form = _beside(weight, z)
    dz, dweight, dbias = aten.convolution_backward(
        dy.contiguous(memory_format=form),
        _convolved(z, form),
        _unambiguous(lowered(x0, weight)),
        [weight.shape[0]],
        [stride] * 2,
        [pad] * 2,
        [1, 1],
        False,
        [0, 0],
        1,
        [need_dz, mask[2], mask[3]],
    )
    grads: list[Tensor] = []
    start = 0
    for (x, affine, slope, twice, top, left), wanted in zip(sources, mask, strict=False):
        stop = start + x.shape[1]
        if wanted and twice:
            g = _unframe(dz[:, start:stop], [2 * n for n in x.shape[2:]], top, left)
            # Not from z, where a crop may have left the first of a pixel's four out.
            value = _normalise(channels_last(x), affine, slope)
            grads += _normalise_backward(_twice_backward(g, x.shape), x, affine, slope, value)
        elif wanted:
            g = _unframe(dz[:, start:stop], x.shape[-2:], top, left)
            normalised = _unframe(z[:, start:stop], x.shape[-2:], top, left)
            grads += _normalise_backward(g, x, affine, slope, normalised)
        else:
            grads += [x.new_empty(0), no_stats(x)]
        start = stop
    if x1 is None:
        grads += [x0.new_empty(0), no_stats(x0)]
    dx0, daffine0, dx1, daffine1 = grads
    return (
        channels_last(dx0) if mask[0] else dx0,
        daffine0,
        channels_last(dx1) if mask[1] else dx1,
        daffine1,
        *_filter_gradients(dweight, dbias, weight, mask[2:]),
    )


def _transpose_geometry(weight: Tensor) -> tuple[list[int], list[int]]:
    """(padding, output_padding) that make a stride-2 transposed convolution double the size: kernel 2 or 3."""
    return ([0, 0], [0, 0]) if weight.shape[-1] == 2 else ([1, 1], [1, 1])


def conv_transpose2d(
    x: Tensor, affine: Tensor | None, slope: float, weight: Tensor, bias: Tensor | None, stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stride-2 transposed convolution of one source to twice its size; weight is (C, K, 2, 2) or (C, K, 3, 3)."""
    weight, bias = lowered(x, weight), lowered(x, bias)
    padding, output_padding = _transpose_geometry(weight)
    z = _normalise(channels_last(x), affine, slope)
    y = channels_last(
        F.conv_transpose2d(z.contiguous(memory_format=_beside(weight, z)), weight, bias, 2, padding, output_padding)
    )
    mean, var = _stats(y, stats)
    return y, mean, var


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
    """Gradients (dx, daffine, dweight, dbias); those not asked for in ``mask`` (source, weight, bias) are empty."""
    padding, output_padding = _transpose_geometry(weight)
    dy = _form_dy(dy, dmean, dvar, y, mean)
    z = _normalise(channels_last(x), affine, slope)
    form = _beside(weight, z)
    dz, dweight, dbias = aten.convolution_backward(
        dy.contiguous(memory_format=form),
        _convolved(z, form),
        _unambiguous(lowered(x, weight)),
        [weight.shape[1]],
        [2, 2],
        padding,
        [1, 1],
        True,
        output_padding,
        1,
        list(mask),
    )
    if mask[0]:
        dx, daffine = _normalise_backward(dz, x, affine, slope, z)
        dx = channels_last(dx)
    else:
        dx, daffine = x.new_empty(0), no_stats(x)
    return dx, daffine, *_filter_gradients(dweight, dbias, weight, mask[1:])


# ---- pooling and upsampling --------------------------------------------------------------------------------------


def _signed(x: Tensor, affine: Tensor | None) -> Tensor:
    """x, negated in the channels whose scale is negative: there the largest z comes from the smallest x."""
    if affine is None or (x.device.type == "cpu" and bool((affine.select(-2, 0) > 0).all())):
        return x
    return torch.where(_by_sample(affine.select(-2, 0)) < 0, -x, x)


def _max_pool(x: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    """The winning signed values of each 2×2 window and their flat indices; the first where scale = 0 and no NaN."""
    signed = _signed(x, affine)
    values, indices = aten.max_pool2d_with_indices(signed, [2, 2], [2, 2])
    if affine is not None and signed is not x:
        height, width = values.shape[-2:]
        flat = (_by_sample(affine.select(-2, 0)) == 0) & ~values.isnan()
        rows = torch.arange(height, device=x.device).view(-1, 1) * (2 * x.shape[-1])
        first = rows + 2 * torch.arange(width, device=x.device)
        values = torch.where(flat, signed[..., : 2 * height : 2, : 2 * width : 2], values)
        indices = torch.where(flat, first, indices)
    return values, indices


def max_pool2x2(x: Tensor, affine: Tensor | None) -> Tensor:
    """2×2 max-pool of a source, on raw values: BN and act are monotone for slopes from 0 on, so the scale's sign tells
    the winner.

    The result has the same affine and activation as ``x``. Scale > 0 takes the maximum, < 0 the minimum, = 0 the first;
    NaN propagates. Odd rows and columns at the end are dropped, as in ``nn.MaxPool2d(2)``.
    """
    x = channels_last(x)
    if affine is None:
        return F.max_pool2d(x, 2)
    values, _ = _max_pool(x, affine)
    return channels_last(_signed(values, affine))


def max_pool2x2_backward(x: Tensor, affine: Tensor | None, dp: Tensor | None, dskip: Tensor | None) -> Tensor:
    """dx = dskip + dp at the winner of each window (recomputed from x); either gradient may be None."""
    x = channels_last(x)
    dx = torch.zeros_like(x) if dskip is None else dskip
    if dp is not None:
        _, indices = _max_pool(x, affine)
        dx = dx + aten.max_pool2d_with_indices_backward(dp, x, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)
    return dx.clone(memory_format=torch.channels_last) if dx is dskip else channels_last(dx)


def avg_pool2x2(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """2×2 average-pool of a source's value: (N, C, H, W) to (N, C, H // 2, W // 2); an odd end is dropped."""
    z = _normalise(channels_last(x), affine, slope)
    if min(x.shape) < 1 or min(x.shape[2:]) < 2:
        return channels_last(x.new_empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)))
    return channels_last(F.avg_pool2d(z, 2))


def avg_pool2x2_backward(dy: Tensor, x: Tensor, affine: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    """Gradients (dx, daffine) of :func:`avg_pool2x2`; daffine is empty without an affine."""
    x = channels_last(x)
    if dy.numel() == 0:
        return affine_act_backward(torch.zeros_like(x), x, affine, slope)
    dz = aten.avg_pool2d_backward(channels_last(dy), x, [2, 2], [2, 2], [0, 0], False, True, None)
    return affine_act_backward(dz, x, affine, slope)


def pad_replicate(x: Tensor, affine: Tensor | None, slope: float, rows: int, columns: int) -> Tensor:
    """A source's value with its last row repeated if ``rows`` is 1, and its last column if ``columns`` is."""
    z = _normalise(channels_last(x), affine, slope)
    if rows:
        z = torch.cat([z, z[:, :, -1:]], 2)
    if columns:
        z = torch.cat([z, z[..., -1:]], 3)
    return channels_last(z.clone() if z is x else z)


def pad_replicate_backward(dy: Tensor, x: Tensor, affine: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    """Gradients (dx, daffine) of :func:`pad_replicate`; daffine is empty without an affine."""
    height, width = x.shape[2:]
    dz = dy[..., :width].clone()
    dz[..., -1:] += dy[..., width:].sum(3, True)
    folded = dz[:, :, :height]
    folded[:, :, -1:] += dz[:, :, height:].sum(2, True)
    return affine_act_backward(folded, channels_last(x), affine, slope)


def _centred(outer: Tensor, height: int, width: int) -> tuple[list[int], int, int]:
    """Size of ``outer`` and the (top, left) that centre height × width in it, as F.pad(diff // 2, diff − diff // 2)."""
    size = list(outer.shape[-2:])
    return size, (size[0] - height) // 2, (size[1] - width) // 2


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
    """×2 of a source, bilinear, or nearest if ``align_corners`` is None; with a skip source: centred in its size (zero
    pad or crop) and concatenated with it."""
    mode = "nearest" if align_corners is None else "bilinear"
    z = _normalise(channels_last(x), affine, slope)
    up = F.interpolate(z, scale_factor=2.0, mode=mode, align_corners=align_corners)
    if skip is None:
        return channels_last(up)
    size, top, left = _centred(skip, *up.shape[-2:])
    parts = [_normalise(channels_last(skip), skip_affine, skip_slope), frame(up, size, top, left)]
    return channels_last(torch.cat(parts if skip_first else parts[::-1], 1))


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
    """Gradients (dx, daffine, dskip, dskip_affine); the last two are empty without a skip."""
    doubled = [2 * x.shape[-2], 2 * x.shape[-1]]
    dskip, dskip_affine = x.new_empty(0), no_stats(x)
    if skip is not None:
        split = [skip.shape[1], x.shape[1]] if skip_first else [x.shape[1], skip.shape[1]]
        first, second = dy.split(split, 1)
        dz_skip, dy = (first, second) if skip_first else (second, first)
        dskip, dskip_affine = affine_act_backward(dz_skip, skip, skip_affine, skip_slope)
        _, top, left = _centred(skip, *doubled)
        dy = _unframe(dy, doubled, top, left)
    if align_corners is None:
        dz = _twice_backward(dy, x.shape)
    else:
        dz = aten.upsample_bilinear2d_backward(channels_last(dy), doubled, list(x.shape), align_corners, None, None)
    dx, daffine = affine_act_backward(dz, x, affine, slope)
    return dx, daffine, dskip, dskip_affine


# ---- the logit-free head -----------------------------------------------------------------------------------------


def _of_sample(affine: Tensor | None, n: int) -> Tensor | None:
    """What of an affine holds for sample n."""
    return affine if affine is None or affine.dim() == 2 else affine[n : n + 1]


def _head_runs(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Runs of one sample's pixels that fit a CPU's cache, so that there is no tensor of the logits' size.

    (sample, pixels, x (1, C, 1, P), its value (P, C), logits (1, K, 1, P), labels, pixel weights); value and logits in
    stats_dtype.
    """
    batch, channels, height, width = x.shape
    rows = channels_last(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    filters, bias = lowered(x, weight).flatten(1).to(stats_dtype(x.dtype)), lowered(x, bias)
    step = max(1, (1 << 18 if x.device.type == "cpu" else 1 << 23) // max(channels, weight.shape[0]))
    flat, weights = (None if t is None else t.flatten(-2) for t in (labels, pixel_weight))
    for n in range(batch):
        for start in range(0, height * width, step):
            pixels = slice(start, start + step)
            part = rows[n, pixels].t()[None, :, None]
            z = _normalise(part, _of_sample(affine, n), slope)[0, :, 0].t().to(filters.dtype)
            # (K, P): with the few classes adjacent instead, their statistics would take twice as long on a CPU.
            logits = filters @ z.t()
            if bias is not None:
                logits += bias.to(filters.dtype).unsqueeze(1)
            yield (
                n,
                pixels,
                part,
                z,
                logits[None, :, None],
                None if flat is None else flat[n : n + 1, ..., None, pixels],
                None if weights is None else weights[n : n + 1, None, pixels],
            )


def head_stats(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
) -> Tensor:
    """:func:`softmax_stats` (N, K, 7) of the logits that weight (K, C, 1, 1) and bias make of a source.

    The logits are never stored: they exist for a run of pixels at a time, unrounded, in stats_dtype.
    """
    stats = x.new_zeros((x.shape[0], weight.shape[0], 7), dtype=stats_dtype(x.dtype))
    for n, _, _, _, logits, label, w in _head_runs(x, affine, slope, weight, bias, labels, pixel_weight):
        assert label is not None
        stats[n] += softmax_stats(logits, label, w, mode, ignore_index, wanted)[0]
    return stats


def head_stats_backward(
    dstats: Tensor,
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, daffine, dweight, dbias); those not asked for in ``mask`` (source, weight, bias) are empty."""
    filters = lowered(x, weight).flatten(1).to(dstats.dtype)
    dfilters, dbias = torch.zeros_like(filters), filters.new_zeros(filters.shape[0])
    dx = torch.empty_like(x, memory_format=torch.channels_last) if mask[0] else x.new_empty(0)
    daffine = no_stats(x) if affine is None or not mask[0] else torch.zeros_like(affine)
    rows = dx.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1]) if dx.numel() else dx
    for n, pixels, part, z, logits, label, w in _head_runs(x, affine, slope, weight, bias, labels, pixel_weight):
        assert label is not None
        g = softmax_stats_backward(dstats[n : n + 1], logits, label, w, mode, ignore_index, wanted)[0, :, 0]
        if mask[1]:
            dfilters += g @ z
        if mask[2]:
            dbias += g.sum(1)
        if mask[0]:
            dz = (g.t() @ filters).to(x.dtype).t()[None, :, None]
            dpart, share = _normalise_backward(dz, part, _of_sample(affine, n), slope, z.to(x.dtype).t()[None, :, None])
            rows[n, pixels] = dpart[0, :, 0].t()
            if affine is not None:
                (daffine if affine.dim() == 2 else daffine[n : n + 1]).add_(share)
    return dx, daffine, *_filter_gradients(dfilters.view(weight.shape), dbias, weight, mask[1:])


def predict(logits: Tensor, output: str, threshold: float, dtype: torch.dtype) -> Tensor:
    """What :func:`head_predict` gives, of logits (N, K, H, W)."""
    if output == "argmax":
        return logits.argmax(1).to(torch.uint8)
    wide = logits.to(stats_dtype(logits.dtype))
    p = wide.softmax(1) if output == "softmax" else wide.sigmoid()
    return channels_last((p > threshold).to(torch.uint8) if output == "threshold" else p.to(dtype))


def head_predict(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    output: str,
    threshold: float,
    dtype: torch.dtype,
) -> Tensor:
    """What the logits that weight (K, C, 1, 1) and bias make of a source say; the logits are never stored.

    ``output`` "argmax": the class of the largest, uint8 (N, H, W); the first of equals, and NaN wins. "threshold":
    σ(logit) > threshold, uint8 0 or 1 (N, K, H, W). "softmax", "sigmoid": probabilities (N, K, H, W) in ``dtype``,
    computed in stats_dtype. Four dimensions are channels_last.
    """
    batch, height, width, classes = x.shape[0], *x.shape[2:], weight.shape[0]
    kind = torch.uint8 if output in ("argmax", "threshold") else dtype
    out = x.new_empty((batch, height * width, 1 if output == "argmax" else classes), dtype=kind)
    for n, pixels, _, _, logits, _, _ in _head_runs(x, affine, slope, weight, bias):
        out[n, pixels] = predict(logits, output, threshold, dtype).view(1, out.shape[2], -1)[0].t()
    if output == "argmax":
        return out.view(batch, height, width)
    return channels_last(out.view(batch, height, width, classes).permute(0, 3, 1, 2))


# ---- confusion matrix --------------------------------------------------------------------------------------------


def confusion_matrix(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float) -> Tensor:
    """(C + 1, C) int64 counts of pixels by [label, prediction]; the last row is for labels that are no class.

    ``logits`` (N, C, H, W) predict the class of the largest (the first of equals, and NaN wins); (N, 1, H, W) predict
    class 1 above ``threshold`` and else 0, and C is 2. Pixels labelled ``ignore_index`` (N, H, W) do not count.
    """
    classes = max(logits.shape[1], 2)
    guess = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > threshold).to(torch.int64)
    return confusion_matrix_of_masks(guess, labels, classes, ignore_index)


def confusion_matrix_of_masks(mask: Tensor, labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """:func:`confusion_matrix` of predicted classes, an integer or bool mask of the labels' shape.

    The last row is for pixels whose label or prediction is no class.
    """
    guess, truth = mask.to(torch.int64), labels.to(torch.int64)
    known = (guess >= 0) & (guess < classes)
    row = torch.where((truth >= 0) & (truth < classes) & known, truth, classes)
    row = torch.where(truth == ignore_index, classes + 1, row)
    cell = row * classes + torch.where(known, guess, 0)
    counts = torch.bincount(cell.flatten(), minlength=(classes + 2) * classes)
    return counts[: (classes + 1) * classes].view(classes + 1, classes)
