"""How networks run on a CPU: as the modules they are, but for what ATen does badly or twice there.

Normalising while the next convolution reads gains nothing in ATen, where every operation is a pass over memory of its
own, and the calls it takes cost time. So under ``backend="auto"`` and policy "speed" a layer is its modules, called one
after another in channels_last memory, in which oneDNN convolves up to three times as fast, with exceptions: over many
pixels a batch norm in training adds up in short sums (see :func:`fastunet.aten.batch_norm_act`), and without gradients
a normalisation by running statistics is folded into the weights before it, and a large concatenation is convolved in
its two parts. (oneDNN can apply the ReLU too, but makes 0 of NaN.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import aten, layout, ops
from fastunet.activation import Context, Norm, Placed, check_weight, running_stats

_FEW_PIXELS = 8192  # below, ATen adds up well enough, and merging short sums takes longer
_FRESH = 32 << 20  # bytes from where on each allocation is fresh memory, which the system clears page by page


def enter(x: Tensor) -> Tensor:
    """The network's input in the layout in which it is convolved fastest."""
    usual = x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    return layout.channels_last(x) if usual else x


def layer(
    placed: Placed, conv: nn.Conv2d | nn.ConvTranspose2d, norm: Norm | None, slope: float, context: Context
) -> Tensor:
    """A convolution and what follows it, of stored tensors.

    Raises:
        ValueError, TypeError: parameters or statistics on another device or in another dtype; RuntimeError: ATen's.
    """
    parts = placed.parts()
    _check_devices(parts[0], conv, norm)
    if conv.weight.dtype != parts[0].dtype:
        check_weight(parts[0], conv.weight)
    y: Tensor
    if (
        isinstance(norm, nn.BatchNorm2d)
        and context.tuned
        and not (norm.training or torch.is_grad_enabled())
        and _folds(parts, conv, norm)
    ):
        y = _folded(parts, conv, norm)
    else:
        y = conv(_joined(parts))
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
        else:
            y = norm(y)
    return aten.activate(y, slope, inplace=True)


def _check_devices(z: Tensor, conv: nn.Module, norm: Norm | None) -> None:
    """Refuse tensors elsewhere than z: of one on the meta device ATen makes numbers that nobody computed."""
    device = z.device
    for module in (conv, norm):
        if module is None:
            continue
        # Not module.weight and so on: a module's attributes are slow, slower than all the rest of this.
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and t.device != device and t.dim():
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


def _many_pixels(y: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether ATen's batch norm of y would lose digits, and ``norm`` is of the usual kind."""
    if y.numel() < _FEW_PIXELS * y.shape[1] or y.dtype != torch.float32 or not aten.adds_one_by_one(y):
        return False
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    tracked = norm.momentum is not None and all(t is not None for t in buffers)
    usual = tracked or all(t is None for t in buffers)
    return usual and all(t is None or t.dtype == y.dtype for t in (norm.weight, norm.bias, *buffers[:2]))


def _batch_norm(y: Tensor, norm: nn.BatchNorm2d, slope: float) -> Tensor:
    z, mean, var = ops.batch_norm_act(y, norm.weight, norm.bias, norm.eps, slope)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        assert norm.num_batches_tracked is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        norm.num_batches_tracked.add_(1)
        count = y.numel() // y.shape[1]
        aten.update_running_stats(norm.running_mean, norm.running_var, mean, var, count, norm.momentum)
    return z


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _folds(parts: list[Tensor], conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> bool:
    """Whether scaling the weights takes less time than normalising what they make, and loses nothing."""
    weight, z = conv.weight, parts[0]
    if z.numel() * weight.shape[0] < 4 * weight.numel() * z.shape[1]:
        return False
    kind, filters = z.dtype, weight.shape[0 if isinstance(conv, nn.Conv2d) else 1]
    mean, var = norm.running_mean, norm.running_var
    return (
        (kind == torch.float32 or kind == torch.float64)  # of which no digits are lost by rounding the weights again
        and not torch.is_autocast_enabled("cpu")
        and weight.dtype == kind
        and mean is not None
        and var is not None
        # A single value would be broadcast here; nn.BatchNorm2d refuses it.
        and all(t is None or (t.dtype == kind and t.shape[0] == filters) for t in (mean, var, norm.weight, norm.bias))
    )


def _folded(parts: list[Tensor], conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(…)) by running statistics, as one convolution."""
    mean, var, gain, shift = norm.running_mean, norm.running_var, norm.weight, norm.bias
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + norm.eps)
    if gain is not None:
        scale *= gain
    centre = mean if conv.bias is None else mean - conv.bias
    bias = -centre * scale if shift is None else torch.addcmul(shift, centre, scale, value=-1)
    if isinstance(conv, nn.Conv2d):
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        if _apart(parts):
            return _convolved_apart(parts, weight, bias, conv)
        return F.conv2d(_joined(parts), weight, bias, conv.stride, conv.padding)
    weight = conv.weight * scale.view(-1, 1, 1)
    z = _joined(parts)
    return F.conv_transpose2d(z, weight, bias, conv.stride, conv.padding, conv.output_padding)  # type: ignore[arg-type]


def _apart(parts: list[Tensor]) -> bool:
    """Whether to convolve two tensors one after the other takes less time than to write them into one, and can be."""
    return (
        len(parts) == 2
        and 4 * sum(z.numel() for z in parts) >= _FRESH
        and all(z.dtype == torch.float32 and aten.adds_one_by_one(z) for z in parts)  # in channels_last memory
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _convolved_apart(parts: list[Tensor], weight: Tensor, bias: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution of two tensors' concatenation: of the first, to which oneDNN adds that of the second."""
    weights = [w.contiguous(memory_format=torch.channels_last) for w in weight.split([z.shape[1] for z in parts], 1)]
    y = F.conv2d(parts[0], weights[0], bias, conv.stride, conv.padding)
    settings = ([*conv.padding], [*conv.stride], [1, 1], 1)
    torch.ops.mkldnn._convolution_pointwise_.binary(
        y, parts[1], weights[1], None, *settings, "add", 1.0, None, [], None
    )
    return y
