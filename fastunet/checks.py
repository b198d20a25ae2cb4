"""Checks of what users hand over, tensors, numbers and labels: each error is one sentence."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NEVER = -(2**63)  # the ignore_index that ignores nothing: no mask holds this value
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FEW_OPERATIONS = (torch.uint16, torch.uint32, torch.uint64)  # dtypes for which PyTorch has no minimum


def said(value: Any) -> str:
    """What came, for a message: one short line whatever it is."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_tensor(name: str, x: Any) -> None:
    """Raise TypeError if ``x`` is no tensor in dense memory."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {name} as a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"expected {name} as a dense tensor, got {x.layout}; convert it with .to_dense()")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError if ``value`` is no real number, ValueError if it is not finite."""
    if type(value) not in (int, float) and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"expected {name} as a number, got {said(value)}; pass an int or a float")
    if not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite, got {value!r}; pass a finite number")


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raise TypeError if ``value`` is no integer, ValueError if it is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} as an integer, got {said(value)}; pass a whole number")
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}; pass {least} or more")


def check_flags(optional: bool = False, **flags: Any) -> None:
    """Raise TypeError if one is neither true nor false, as bool, 0 or 1; nor None, if that is an answer too."""
    for name, value in flags.items():
        if isinstance(value, bool) or (optional and value is None):
            continue
        if not (isinstance(value, (int, np.bool_)) and value in (0, 1)):
            answers = "True, False or None" if optional else "True or False"
            raise TypeError(f"expected {name} to be {answers}, got {said(value)}; pass one of those")


def check_criterion(criterion: Any) -> None:
    """Raise TypeError if ``criterion`` cannot be called with logits and labels: a class has to be constructed first."""
    if isinstance(criterion, type):
        name = criterion.__name__
        raise TypeError(f"expected a loss to call, got the class {name}; construct it with {name}()")
    if not callable(criterion):
        raise TypeError(f"expected a loss to call, got {said(criterion)}; pass one of fastunet.losses")


def misfit(model: nn.Module, state_dict: Any, strict: bool) -> str | None:
    """Why ``model`` cannot load ``state_dict``, in a sentence; None if that cannot be seen from its keys and shapes."""
    kind = type(model).__name__
    if not isinstance(state_dict, Mapping):
        return f"expected a state_dict, got {said(state_dict)}; pass what model.state_dict() returned"
    own, given = model.state_dict(), {name: x for name, x in state_dict.items() if name != "mask_values"}
    for name, x in given.items():
        if isinstance(x, Mapping) and own.keys() & x.keys():
            return (
                f"expected the state_dict of a {kind}, got a dict with one in its entry {said(name)}; pass that entry"
            )
        if name in own and not isinstance(x, Tensor):
            return f"expected {name} as a torch.Tensor, got {said(x)}; pass what model.state_dict() returned"
    missing = [name for name in own if name not in given] if strict else []
    unknown = [name for name in given if name not in own] if strict else []
    prefix = str(next(iter(unknown), "")).partition(".")[0] + "."
    if unknown and all(name == f"{prefix}{other}" for name, other in zip(given, own, strict=False)):
        return f"expected the state_dict of a {kind}, got one whose keys begin with {prefix!r}; take that off the keys"
    sizes = [name for name, x in given.items() if name in own and x.dim() and x.shape != own[name].shape]
    wrong = [_counted(names, how) for names, how in ((missing, "missing"), (unknown, "unknown")) if names]
    if sizes:
        first = sizes[0]
        wrong.append(_counted(sizes, f"of shape {tuple(given[first].shape)}, here {tuple(own[first].shape)}"))
    if not wrong:
        return None
    return (
        f"expected the state_dict of a {kind} with the same arguments, got one with {', and with '.join(wrong)}; "
        "construct the network as the one that was saved"
    )


def _counted(names: Sequence[object], how: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{said(names[0])} {how}{more}"


def checked_ignore_index(ignore_index: Any) -> int | None:
    """``ignore_index``, an int or None; TypeError for what is neither."""
    if ignore_index is None or type(ignore_index) is int:
        return ignore_index
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(
            f"expected ignore_index as an integer or None, got {said(ignore_index)}; pass the label of pixels that do "
            "not count"
        )
    return int(ignore_index)


def check_labels(labels: Tensor, n_classes: int, ignore_index: int | None = -100) -> None:
    """Raise ValueError if a label is neither in 0 … n_classes − 1 nor ``ignore_index``; waits for a GPU.

    The losses call this for labels on the CPU. On a GPU it would stall every step, so there a label out of range
    counts as a pixel that belongs to no class: check a data set once, when it is loaded. TypeError for what has no
    integers in it.
    """
    check_tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"expected integer labels, got {labels.dtype}; convert them with .long()")
    check_integer("n_classes", n_classes)
    ignore_index = checked_ignore_index(ignore_index)
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
