"""How networks run on a CPU: as the modules they are, but for what ATen does badly or twice there.

Normalising while the next convolution reads gains nothing in ATen, where every operation is a pass over memory of its
own, and the calls it takes cost time. So under ``backend="auto"`` and policy "speed" a layer is its modules, called one
after another in channels_last memory, in which oneDNN convolves up to three times as fast, with exceptions: over many
pixels a batch norm in training adds up in short sums (see :func:`fastunet.aten.batch_norm_act`), and without gradients
normalisations and large concatenations become part of the convolutions (:mod:`fastunet.folding`).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from fastunet import aten, folding, layout, ops
from fastunet.activation import Context, Norm, Placed, check_weight, running_stats

_FEW_PIXELS = 8192  # below, ATen adds up well enough, and merging short sums takes longer


def enter(x: Tensor) -> Tensor:
    """The network's input in the layout in which it is convolved fastest."""
    _keep_memory()
    usual = x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    return layout.channels_last(x) if usual else x


@functools.cache
def _keep_memory() -> None:
    """Let glibc keep up to 64 MB that are freed. Otherwise it returns them to the system, which clears each page anew
    for the next call, and for a small network that takes a third as long as the network.

    It keeps twice the size of the largest block so far, up to 32 MB, that was mapped on its own and freed. So one is
    allocated here and freed; as no page of it is touched, it costs no memory.
    """
    np.empty(32 * 10**6, np.uint8)


def layer(
    placed: Placed, conv: nn.Conv2d | nn.ConvTranspose2d, norm: Norm | None, slope: float, context: Context
) -> Tensor:
    """A convolution and what follows it, of stored tensors.

    Raises:
        ValueError, TypeError: parameters or statistics on another device or in another dtype; RuntimeError: ATen's.
    """
    parts = placed.parts()
    if context.kept:
        found = folding.by_kept(parts, conv, norm)
        if found is not None:
            return found.relu_() if slope == 0 else aten.activate(found, slope, inplace=True)
    _check_devices(parts[0], conv, norm)
    if conv.weight.dtype != parts[0].dtype:
        check_weight(parts[0], conv.weight)
    y: Tensor
    if (
        context.tuned
        and (norm is None or (isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None))
        and not (torch.is_grad_enabled() and _differentiated(parts, conv, norm))
    ):
        y = folding.convolve(parts, conv, norm)
    else:
        y = conv(folding.joined(parts))
        if norm is None:
            return aten.activate(y, slope, inplace=True)
        if (
            context.precise
            and type(norm) is nn.BatchNorm2d
            and (norm.training or norm.running_mean is None)
            and _many_pixels(y, norm)
        ):
            if slope >= 0:
                return _batch_norm(y, norm, slope)
            y = _batch_norm(y, norm, 1.0)
        elif context.precise and type(norm) is nn.GroupNorm and _loses_digits(y):
            y = layout.channels_last(norm(y.contiguous()))
        else:
            y = norm(y)
    return aten.activate(y, slope, inplace=True)


def _check_devices(z: Tensor, conv: nn.Module, norm: Norm | None) -> None:
    """Refuse tensors elsewhere than z: of one on the meta device ATen makes numbers that nobody computed."""
    device, here = z.device, z.is_cpu
    for module in (conv, norm):
        if module is None:
            continue
        # Not module.weight and so on: a module's attributes are slow, slower than all the rest of this.
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and not (here and t.is_cpu) and t.device != device and t.dim():
                raise ValueError(f"expected a layer on {device}, where its input is, got a part of it on {t.device}")
    if norm is not None and not isinstance(norm, nn.GroupNorm):
        buffers = norm._buffers
        if (buffers.get("running_mean") is None) != (buffers.get("running_var") is None):
            running_stats(norm)  # raises the error


def max_pool2x2(z: Tensor) -> Tensor:
    """nn.MaxPool2d(2) of a stored tensor, without the indices that a backward would want."""
    height, width = z.shape[-2] // 2 * 2, z.shape[-1] // 2 * 2
    rows = torch.maximum(z[..., 0:height:2, :], z[..., 1:height:2, :])
    return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def dense(z: Tensor) -> Tensor:
    """``z``, whose gradient is copied to dense memory first: a part of a concatenation's is not, and ATen's backward of
    upsampling is several times slower then."""
    if z.requires_grad:
        z.register_hook(layout.channels_last)
    return z


def _loses_digits(y: Tensor) -> bool:
    """Whether ATen's batch or group norm of y would lose digits."""
    return y.numel() >= _FEW_PIXELS * y.shape[1] and y.dtype == torch.float32 and aten.adds_one_by_one(y)


def _many_pixels(y: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether ATen's batch norm of y would lose digits, and ``norm`` is of the usual kind and fits y."""
    tensors, of_y = (norm.weight, norm.bias, norm.running_mean, norm.running_var), (y.dtype, y.shape[1:2])
    return _loses_digits(y) and all(t is None or (t.dtype, t.shape) == of_y for t in tensors)


def _batch_norm(y: Tensor, norm: nn.BatchNorm2d, slope: float) -> Tensor:
    z, mean, var = ops.batch_norm_act(y, norm.weight, norm.bias, norm.eps, slope)
    if norm.training and norm.track_running_stats:
        momentum, batches = norm.momentum, norm.num_batches_tracked
        if batches is not None:
            batches.add_(1)
            if momentum is None:  # the mean of all batches, as torch.optim.swa_utils.update_bn asks for
                momentum = 1 / float(batches)
        if norm.running_mean is not None:
            assert norm.running_var is not None
            count = y.numel() // y.shape[1]
            aten.update_running_stats(norm.running_mean, norm.running_var, mean, var, count, momentum or 0.0)
    return z


def _differentiated(parts: list[Tensor], conv: nn.Module, norm: nn.Module | None) -> bool:
    """Whether a backward may want to know how the layer's result came about."""
    modules = (conv,) if norm is None else (conv, norm)
    tensors = (*parts, *(p for module in modules for p in module.parameters()))
    return any(t.requires_grad for t in tensors)
