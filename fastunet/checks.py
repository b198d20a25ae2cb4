"""Checks of what users hand over, tensors, numbers and labels: each error is one sentence."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

NEVER = -(2**63)  # the ignore_index that ignores nothing: no mask holds this value
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)  # dtypes for which PyTorch has no minimum


def check_tensor(name: str, x: Any) -> None:
    """Raise TypeError if ``x`` is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {name} as a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError if ``value`` is no real number, ValueError if it is not finite."""
    if type(value) not in (int, float) and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"expected {name} as a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite, got {value!r}")


def checked_ignore_index(ignore_index: Any) -> int | None:
    """``ignore_index``, an int or None; TypeError for what is neither."""
    if ignore_index is None or type(ignore_index) is int:
        return ignore_index
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"expected ignore_index as an integer or None, got {ignore_index!r}")
    return int(ignore_index)


def check_labels(labels: Tensor, n_classes: int, ignore_index: int | None = -100) -> None:
    """Raise ValueError if a label is neither in 0 … n_classes − 1 nor ``ignore_index``; waits for a GPU.

    The losses call this for labels on the CPU. On a GPU it would stall every step, so there a label out of range
    counts as a pixel that belongs to no class: check a data set once, when it is loaded.
    """
    if labels.numel() == 0 or labels.dtype == torch.bool:
        return
    seen = labels.to(torch.int64) if labels.dtype in _FEW_OPERATIONS else labels
    low, high = (int(t) for t in seen.aminmax())
    if low >= 0 and high < n_classes:
        return
    wide = seen.to(torch.int64)  # uint8 would wrap a negative ignore_index around
    wrong = wide[(wide < 0) | (wide >= n_classes)]
    wrong = wrong if ignore_index is None else wrong[wrong != ignore_index]
    if wrong.numel() > 0:
        value = int(wrong[0]) % 2**64 if labels.dtype == torch.uint64 else int(wrong[0])
        raise ValueError(
            f"expected labels from 0 to {n_classes - 1} or ignore_index={ignore_index}, got {value}; map the mask's "
            "values to class indices"
        )


def check_in_graph(labels: Tensor, n_classes: int, ignore_index: int | None) -> None:
    """:func:`check_labels` for a compiler: its RuntimeError comes when the graph runs, and does not say which label."""
    if labels.dtype == torch.bool:
        return
    wide = labels.to(torch.int64)
    fits = (wide >= 0) & (wide < n_classes)
    if ignore_index is not None:
        fits |= wide == ignore_index
    message = f"expected labels from 0 to {n_classes - 1} or ignore_index={ignore_index}, got others; map their values"
    torch._assert_async(fits.all(), message)
