"""Dtypes and memory formats that both backends agree on, and the zero frame around a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of what a convolution gives mean and variance: of nothing, of the batch (C,), or of each sample (N, C).
NOTHING, BATCH, SAMPLES = 0, 1, 2


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, affines and accumulators for tensors of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(*tensors: Tensor | None) -> torch.memory_format:
    """What PyTorch would give: channels_last if any of ``tensors`` is and could not as well be contiguous."""
    for t in tensors:
        if t is not None and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def channels_last(x: Tensor) -> Tensor:
    """``x`` in dense channels_last memory; itself if it already is. With one channel its stride must say so too: ATen
    looks at it."""
    if x.is_contiguous(memory_format=torch.channels_last) and x.stride(1) == 1:
        return x
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def frame(z: Tensor, size: Sequence[int], top: int, left: int) -> Tensor:
    """z placed at (top, left) in a zero frame of ``size``; negative offsets crop, as does what sticks out."""
    height, width = z.shape[-2:]
    pad = [left, size[1] - width - left, top, size[0] - height - top]
    return F.pad(z, pad) if torch.compiler.is_compiling() or any(pad) else z  # compiled: one graph for every size


def activation(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for what operators return activations in: channels_last, whatever came in."""
    return like.new_empty(shape).contiguous(memory_format=torch.channels_last)


def lowered(x: Tensor, parameter: Tensor | None, form: torch.memory_format = torch.preserve_format) -> Any:
    """A weight or bias as what multiplies ``x``, in its dtype: itself, or a copy of one that is wider."""
    if parameter is None or parameter.dtype == x.dtype:
        return parameter
    return parameter.to(x.dtype, memory_format=form)


def no_stats(like: Tensor) -> Tensor:
    """What stands for statistics, or the gradient of an affine, that nobody asked for: empty, in their dtype."""
    return like.new_empty(0, dtype=stats_dtype(like.dtype))
