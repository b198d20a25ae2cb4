"""Typed functions over the fused operations: arguments are checked and every error is one sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastunet import ops
from fastunet.activation import Activation, Placed, compute_dtype, in_either
from fastunet.backend import check_backend
from fastunet.checks import check_criterion, check_flags, check_integer, check_number, check_tensor
from fastunet.dispatch import call
from fastunet.layout import memory_format, stats_dtype
from fastunet.losses import StatsLoss, dice_loss, softmax_stats
from fastunet.metrics import soft_miou as miou

__all__ = ["conv_bn_relu", "dice_loss", "head_loss", "miou", "softmax_stats", "upsample_pad_concat"]


def _check_4d(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"expected {name} of shape (N, C, H, W), got {tuple(x.shape)}; reshape it")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point {name}, got {x.dtype}; convert it with .float()")


def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Every other tensor lies where x does."""
    for name, t in others.items():
        if t is None:
            continue
        check_tensor(name, t)
        if t.device != x.device:
            raise ValueError(f"expected {name} on {x.device}, where x is, got it on {t.device}; move one of them")


def _check_vector(name: str, v: Tensor | None, channels: int, dtype: torch.dtype) -> None:
    if v is None:
        return
    if v.shape != (channels,):
        raise ValueError(
            f"expected {name} of shape ({channels},), one value per filter, got {tuple(v.shape)}; change one of them"
        )
    if not v.is_floating_point():
        raise TypeError(f"expected {name} in floating point, got {v.dtype}; convert it with .float()")
    if v.dtype == torch.float64 != dtype:
        raise TypeError(f"expected {name} no wider than x, which is {dtype}, got {v.dtype}; convert one of them")


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """ReLU(BN(conv(x))): the batch statistics come out of the convolution, the normalisation is one pass.

    Args:
        x: (N, C, H, W), floating point.
        weight: (K, C, 3, 3), padding 1, or (K, C, 1, 1).
        bn_weight, bn_bias: (K,) scale and shift of the normalisation, or None.
        running_mean, running_var: (K,), updated in place if ``training``; needed if not ``training``.
        bias: (K,) added by the convolution, or None.
        training: normalise by the statistics of the batch (biased variance) instead of the running ones.
        momentum: running ← running + momentum·(batch − running), with the unbiased variance.
        eps: added to the variance.
        stride: 1, or 2 for a 3×3 weight.
        relu: False leaves the normalised value as it is.
        backend: see :func:`fastunet.backend.resolve_backend`.

    Returns:
        (N, K, H', W') in x's dtype (autocast's where enabled), H' = ⌈H / stride⌉; channels_last if x or weight is.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or one value per channel in training.
    """
    check_backend(backend)
    _check_4d("x", x)
    _check_4d("weight", weight)
    _check_devices(
        x, weight=weight, bn_weight=bn_weight, bn_bias=bn_bias, bias=bias,
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    check_number("momentum", momentum)
    check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"expected eps of at least 0, got {eps}; pass 1e-5, as PyTorch")
    check_integer("stride", stride)
    check_flags(training=training, relu=relu)
    filters, channels, *kernel = weight.shape
    if kernel not in ([3, 3], [1, 1]) or channels != x.shape[1]:
        raise ValueError(
            f"expected weight of shape (K, {x.shape[1]}, 3, 3) or (K, {x.shape[1]}, 1, 1) for an x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}; change one of them"
        )
    if 0 in x.shape[1:] or filters == 0:
        raise ValueError(
            f"expected an x with channels and pixels and a weight with filters, got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}; pass larger ones"
        )
    if stride != 1 and (stride != 2 or kernel != [3, 3]):
        raise ValueError(
            f"expected stride 1, or 2 for a 3×3 weight, got stride {stride} and a {kernel[0]}×{kernel[1]} one; pass "
            "stride=1 and take a part of the result"
        )
    for name, v in (("bn_weight", bn_weight), ("bn_bias", bn_bias), ("bias", bias)):
        _check_vector(name, v, filters, x.dtype)
    for name, v in (("running_mean", running_mean), ("running_var", running_var)):
        _check_vector(name, v, filters, torch.float64)
    if (running_mean is None) != (running_var is None):
        given = "running_var" if running_mean is None else "running_mean"
        raise ValueError(f"expected running_mean and running_var or neither, got {given} alone; pass both")
    if not training and (running_mean is None or running_var is None):
        raise ValueError(
            "expected running_mean and running_var when training=False, got neither; pass both, or training=True"
        )
    dtype = compute_dtype(x)
    if weight.dtype != dtype and dtype == x.dtype:
        raise TypeError(f"expected x and weight of one dtype, got {x.dtype} and {weight.dtype}; convert one of them")
    placed = Placed.of(Activation(x.to(dtype)))
    y, mean, var, *_ = call(
        ops.conv2d, *placed.first.source, None, None, 1.0,
        in_either(weight, dtype), None if bias is None else in_either(bias, dtype),
        stride, placed.size, placed.offset, placed.doubled, training, True, False, None, backend,
    )  # fmt: skip
    count = y.numel() // filters
    if training and count == 1:
        raise ValueError(
            f"expected more than 1 value per channel in training, got an output of {tuple(y.shape)}; pass a larger "
            "batch or picture, or training=False"
        )
    running: tuple[Any, ...] = ()
    if training and count and running_mean is not None and running_var is not None:
        running = running_mean, running_var, count, momentum
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(stats_dtype(dtype)), running_var.to(stats_dtype(dtype))
    operator = ops.bn_affine_running if running else ops.bn_affine
    affine = call(operator, mean, var, bn_weight, bn_bias, *running, eps, backend)
    z: Tensor = call(ops.affine_act, y, affine, 0.0 if relu else 1.0, backend)
    return z.contiguous(memory_format=memory_format(x, weight))


def upsample_pad_concat(
    x: Tensor, skip: Tensor, *, align_corners: bool | None = True, skip_first: bool = True, backend: str = "auto"
) -> Tensor:
    """×2 of ``x``, centred in ``skip``'s size by zero padding or cropping, concatenated with ``skip``.

    The networks here need no concatenation: their convolutions read two sources, the skip connection where its producer
    wrote it. The padding is F.pad(up, [dx // 2, dx − dx // 2, dy // 2, dy − dy // 2]) with dy, dx the differences in
    size; negative ones crop. The kernels' backward is a gather: the same bits on every run.

    Args:
        x: (N, C, h, w), floating point.
        skip: (N, S, H, W) of x's dtype and device.
        align_corners: of the bilinear interpolation, as in torch.nn.Upsample; None: the nearest pixel instead.
        skip_first: concatenate (skip, up) rather than (up, skip).
        backend: see :func:`fastunet.backend.resolve_backend`.

    Returns:
        (N, S + C, H, W); channels_last if x or skip is.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_backend(backend)
    _check_4d("x", x)
    _check_4d("skip", skip)
    _check_devices(x, skip=skip)
    check_flags(skip_first=skip_first)
    check_flags(optional=True, align_corners=align_corners)
    if x.shape[0] != skip.shape[0]:
        raise ValueError(f"expected x and skip of one batch size, got {x.shape[0]} and {skip.shape[0]}; pass as many")
    if x.dtype != skip.dtype:
        raise TypeError(f"expected x and skip of one dtype, got {x.dtype} and {skip.dtype}; convert one of them")
    if 0 in x.shape[1:]:
        raise ValueError(
            f"expected an x with channels and pixels to upsample, got shape {tuple(x.shape)}; pass a larger one"
        )
    cat: Tensor = ops.upsample_concat(x, None, 1.0, skip, None, 1.0, align_corners, skip_first, backend)
    return cat.contiguous(memory_format=memory_format(x, skip))


def head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    criterion: StatsLoss,
    pixel_weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``criterion`` of a 1×1 convolution's logits, which are never stored: the end of a network of your own.

    What :meth:`fastunet.UNet.loss` does there: one kernel reads x and labels, and one more in the backward.

    Args:
        x: (N, C, H, W), floating point.
        weight, bias: (K, C, 1, 1) and (K,) or None, in x's dtype; K up to 256.
        labels: as in :func:`softmax_stats` for logits (N, K, H, W).
        criterion: a loss of :mod:`fastunet.losses`, as it is there.
        pixel_weight: (N, H, W), of a loss with a cross-entropy.
        backend: see :func:`fastunet.backend.resolve_backend`.

    Returns:
        The loss in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, dtypes or labels that do not fit, or another criterion.
    """
    _check_4d("x", x)
    _check_4d("weight", weight)
    _check_devices(x, weight=weight, bias=bias)
    check_criterion(criterion)
    if not (isinstance(criterion, StatsLoss) and criterion.plain()):
        raise TypeError(f"expected a loss of fastunet.losses, got {type(criterion).__name__}; give it the logits")
    check_backend(backend)
    return criterion.from_stats(criterion.head_stats(Activation(x), weight, bias, labels, pixel_weight, backend))
