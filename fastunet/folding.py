"""Inference on a CPU: a convolution, the batch norm behind it and the concatenation before it as convolutions alone.

A normalisation by running statistics scales and shifts each channel, which the weights and the bias before it can do. A
large concatenation is not written: oneDNN convolves one part and adds to that the convolution of the other. And it
reads weights in blocks of its own, into which each call of PyTorch's convolution brings them first. Where a layer
computes many values for each of its weights, all of that is done once and kept; each call then compares, number by
number, what it was made of, for of a write through ``weight.data`` nothing else tells. (oneDNN can apply the ReLU too,
but makes 0 of NaN.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet.dispatch import free

_MANY = 2  # values that a layer must compute for each weight: below, to fold and to keep it costs more than it saves
_LARGE = 4 << 20  # bytes of a concatenation from where on it takes longer than a second convolution that adds


class _OneDnn(NamedTuple):
    """What inductor too calls of oneDNN; PyTorch promises none of these names."""

    convolve: Any  # the convolution, by weights reordered or not
    add: Any  # it, added to what is there
    reorder: Any

    @classmethod
    def found(cls) -> _OneDnn | None:
        """None, where this PyTorch lacks one."""
        operators, functions = torch.ops.mkldnn, torch._C._nn
        try:
            return cls(
                operators._convolution_pointwise.default,
                operators._convolution_pointwise_.binary,
                functions.mkldnn_reorder_conv2d_weight,
            )
        except AttributeError:
            return None


_ONEDNN = _OneDnn.found() if torch.backends.mkldnn.is_available() else None


class _Layer(NamedTuple):
    """What a convolution and a batch norm by running statistics compute with."""

    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None = None
    var: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0


class _Kept(NamedTuple):
    """What was made of a layer for oneDNN."""

    conv: ReferenceType[nn.Conv2d]
    norm: type  # None's without
    numbers: tuple[Tensor | None, ...]  # copies of the tensors of which it was made: of a _Layer
    eps: float
    settings: tuple[Any, ...]  # padding, stride, dilation and groups
    widths: tuple[int, ...]  # input channels of each weight
    weights: list[Tensor]
    bias: Tensor | None


_kept: dict[int, _Kept] = {}  # by the convolution's id


def everything() -> Iterator[Tensor | None]:
    """All tensors that are kept."""
    return (t for kept in [*_kept.values()] for t in (*kept.numbers, *kept.weights, kept.bias))


def allowed() -> bool:
    """Whether oneDNN's own operators may be called at all: they have no derivatives, and neither autocast nor a mode
    that replaces functions sees them."""
    return (
        _ONEDNN is not None and bool(torch.backends.mkldnn.enabled) and free() and not torch.is_autocast_enabled("cpu")
    )


def by_kept(parts: list[Tensor], conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.Module | None) -> Tensor | None:
    """norm(conv(…)) by what was kept of the two, where that is :func:`allowed`; None if nothing was, or it is another
    layer or input by now. (The host has little time for this: it reads a module's dictionaries.)"""
    kept = _kept.get(id(conv))
    if kept is None or kept.conv() is not conv or type(norm) is not kept.norm:
        return None
    numbers: tuple[Tensor | None, ...] = (conv._parameters.get("weight"), conv._parameters.get("bias"))
    if norm is not None:
        if norm.training or norm.eps != kept.eps:
            return None
        own, buffers = norm._parameters, norm._buffers
        numbers += buffers.get("running_mean"), buffers.get("running_var"), own.get("weight"), own.get("bias")
    if (conv.padding, conv.stride) != kept.settings[:2] or not _are_usual(parts, kept.widths):
        return None
    try:
        for before, now in zip(kept.numbers, numbers, strict=True):
            if before is not now and not (before.dtype is now.dtype and torch.equal(before, now)):  # type: ignore[union-attr,arg-type]
                return None
    except (RuntimeError, AttributeError):  # another device, or nothing
        return None
    return _run(parts, kept)


def _are_usual(parts: list[Tensor], widths: tuple[int, ...]) -> bool:
    """Whether ``parts`` are what oneDNN's operators take, which check less than ATen's; they may have to be joined."""
    batch, channels = len(parts[0]), 0
    for z in parts:
        if not (z.dtype == torch.float32 and z.is_cpu and z.stride(1) == 1):
            return False
        if not (z.is_contiguous(memory_format=torch.channels_last) and z.shape[0] == batch and z.numel()):
            return False
        channels += z.shape[1]
    return channels == sum(widths) and (len(widths) == 1 or (len(parts) == 2 and parts[0].shape[1] == widths[0]))


def _run(parts: list[Tensor], kept: _Kept) -> Tensor:
    assert _ONEDNN is not None
    weights, bias, settings = kept.weights, kept.bias, kept.settings
    if len(weights) == 1:
        y: Tensor = _ONEDNN.convolve(joined(parts), weights[0], bias, *settings, "none", [], "")
        return y
    y = _ONEDNN.convolve(parts[0], weights[0], None, *settings, "none", [], "")
    _ONEDNN.add(y, parts[1], weights[1], bias, *settings, "add", 1.0, None, [], None)
    return y


def convolve(parts: list[Tensor], conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d | None) -> Tensor:
    """norm(conv(…)) of one tensor or the concatenation of two; nobody wants gradients, and ``norm`` has running
    statistics and normalises by them.

    Raises:
        RuntimeError: ATen's, for what does not fit together.
    """
    weight, bias, z = conv.weight, conv.bias, parts[0]
    filters_at = 0 if isinstance(conv, nn.Conv2d) else 1
    # The layer computes so much that changes of its weights save time.
    if z.numel() * weight.shape[filters_at] >= _MANY * weight.numel() * z.shape[1]:
        layer = _Layer(weight, bias)
        if norm is not None:
            layer = _Layer(weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        if _fits(layer, z.dtype, filters_at):
            plain = type(weight) in (nn.Parameter, Tensor)  # no tensor that only looks like one
            if type(conv) is nn.Conv2d and plain and _are_usual(parts, weight.shape[1:2]) and allowed():
                return _run(parts, _keep(parts, conv, layer, norm))
            weight, bias = _folded(layer, filters_at)
            norm = None
    x = joined(parts)
    if isinstance(conv, nn.Conv2d):
        y = F.conv2d(x, weight, bias, conv.stride, conv.padding)
    else:
        y = F.conv_transpose2d(x, weight, bias, conv.stride, conv.padding, conv.output_padding)  # type: ignore[arg-type]
    if norm is None:
        return y
    return torch.batch_norm(y, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.0, norm.eps, False)


def joined(parts: list[Tensor]) -> Tensor:
    """The concatenation of one or two tensors."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _fits(layer: _Layer, dtype: torch.dtype, filters_at: int) -> bool:
    """Whether a layer can be folded without loss, and is of the sizes and dtypes that ATen would ask for."""
    size = layer.weight.shape[filters_at : filters_at + 1]  # a single value would be broadcast; ATen refuses it
    return (
        dtype in (torch.float32, torch.float64)  # of which no digits are lost by rounding the weights again
        and not torch.is_autocast_enabled("cpu")
        and layer.weight.dtype == dtype
        and all(t is None or (t.dtype == dtype and t.shape == size) for t in layer[1:-1])
    )


def _folded(layer: _Layer, filters_at: int) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of the one convolution that a layer is."""
    weight, bias, mean, var, gain, shift, eps = layer
    if mean is None or var is None:
        return weight, bias
    scale = (var + eps).rsqrt_()
    if gain is not None:
        scale *= gain
    centre = mean if bias is None else mean - bias
    moved = -centre * scale if shift is None else torch.addcmul(shift, centre, scale, value=-1)
    return weight * scale.view(-1, 1, 1, 1).transpose(0, filters_at), moved


def _keep(parts: list[Tensor], conv: nn.Conv2d, layer: _Layer, norm: nn.Module | None) -> _Kept:
    assert _ONEDNN is not None
    if len(parts) == 2 and 4 * (parts[0].numel() + parts[1].numel()) < _LARGE:
        parts = [joined(parts)]
    widths, settings = tuple(z.shape[1] for z in parts), (conv.padding, conv.stride, (1, 1), 1)
    copies = [None if t is None else t.detach().clone() for t in layer[:-1]]
    weight, bias = _folded(_Layer._make([*copies, layer.eps]), 0)  # of dense memory, for which oneDNN takes a bias's
    weights = [
        _ONEDNN.reorder(w.contiguous().to_mkldnn(), *settings, z.shape)
        for w, z in zip(weight.split(widths, 1), parts, strict=True)
    ]
    numbers = tuple(copies[:2] if norm is None else copies)
    key, others = id(conv), _kept
    reference = ref(conv, lambda _: others.pop(key, None))
    kept = _kept[key] = _Kept(reference, type(norm), numbers, layer.eps, settings, widths, weights, bias)
    return kept
