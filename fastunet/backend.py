"""Which of the two backends, :mod:`fastunet.aten` or :mod:`fastunet.kernels`, serves a call."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fastunet import aten
from fastunet.architecture import pretended
from fastunet.versions import TRITON, numbers, refusal

BACKENDS = ("auto", "torch", "triton")

# By whether the interpreter runs them: its bfloat16 arithmetic is wrong, and only it computes in float64.
_KERNEL_DTYPES = {
    False: (torch.float32, torch.float16, torch.bfloat16),
    True: (torch.float32, torch.float16, torch.float64),
}
_KERNEL_DTYPES_SAID = {
    False: "float32, float16 and bfloat16",
    True: "float32, float16 and float64 in the interpreter",
}


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def triton_unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on this device, in a few words; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'fastunet[triton]')"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, as builds for ROCm have it
        version = "4"
    if refusal("Triton", "triton", TRITON, version) is not None:
        return f"Triton {version} is too old (pip install 'triton>=3.6')"
    if interpreting():
        if numbers(version) < (3, 8) and numbers(np.__version__) >= (2, 4):
            older = f"an older NumPy than {np.__version__} (pip install 'numpy<2.4')"
            return f"the interpreter of Triton {version} needs {older}"
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    if device_type != "cuda":
        return f"Triton kernels need a CUDA device and the tensors are on {device_type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


def _unavailable(device_type: str, index: int | None) -> str | None:
    """:func:`triton_unavailable`, which Dynamo calls and does not trace: it cannot follow Python's imports."""
    return triton_unavailable(device_type, index)


# What torch.compiler.assume_constant_result does; but that imports Dynamo, which takes a second.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def check_backend(backend: str) -> None:
    """Raise ValueError for a ``backend`` that is none, before an operator prints its schema."""
    if backend not in BACKENDS:
        raise ValueError(
            f"expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}; check FASTUNET_BACKEND too"
        )


def requested(backend: str) -> str:
    """``backend``, or what FASTUNET_BACKEND says in place of "auto"."""
    return os.environ.get("FASTUNET_BACKEND", backend) if backend == "auto" else backend


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend ("torch" or "triton") that serves tensors of ``dtype`` on ``device``.

    ``backend="auto"`` takes FASTUNET_BACKEND if that is set, else Triton wherever its kernels run: CUDA GPUs of
    compute capability 8.0 or newer, or CPU tensors under TRITON_INTERPRET=1. float64 on a GPU and bfloat16 in the
    interpreter (whose bfloat16 arithmetic is wrong) go to torch.

    Raises:
        ValueError: unknown backend, or "triton" asked for where it cannot run.
    """
    return _resolved(requested(backend), device, dtype)


def _resolved(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """:func:`resolve_backend` of what was requested."""
    if backend not in BACKENDS:
        check_backend(backend)
    if backend == "torch":
        return backend
    kind = device.type
    reason = None if kind == "meta" and pretended() else _unavailable(kind, device.index)
    if reason is None and dtype.is_floating_point:
        interpreted = kind != "cuda" and interpreting()  # on a GPU, interpreting is a reason above
        if dtype not in _KERNEL_DTYPES[interpreted]:
            reason = f"the Triton kernels take {_KERNEL_DTYPES_SAID[interpreted]}, and the tensors are {dtype}"
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"expected a backend that runs here, got 'triton': {reason}; take 'auto' or 'torch'")
        return backend
    if reason is None:
        return "triton"
    if kind == "cuda":
        _warn_once(f"fastunet runs on the torch backend: {reason}")
    return "torch"


def _module(backend: str) -> ModuleType:
    if backend == "torch":
        return aten
    from fastunet import kernels

    return kernels


# The argument whose dtype and device decide the backend: the first of these that an operator has.
_DECIDING = ("x0", "x", "logits", "mask", "mean", "var")


@functools.cache
def deciding(name: str) -> int:
    """The position of the argument of operator ``name`` whose dtype and device decide the backend."""
    names = [argument.name for argument in getattr(torch.ops.fastunet, name).default._schema.arguments]
    return next(names.index(x) for x in _DECIDING if x in names)


def serving(name: str, args: Sequence[Any]) -> tuple[str, Callable[..., Any]]:
    """The backend that serves operator ``name`` called with ``args``, and its function, which takes no ``backend``.

    Under "auto" the Triton backend leaves the matrix products of those layers to cuDNN for which its table says so.
    """
    like = args[deciding(name)]
    backend = requested(args[-1])
    resolved = _resolved(backend, like.device, like.dtype)
    function = getattr(_module(resolved), name)
    if resolved == "triton" and backend == "auto" and name in ("conv2d", "conv2d_act", "conv2d_backward"):
        function = functools.partial(function, mixed=True)
    return resolved, function


_repeat: Callable[..., Any] | None = None


def repeating(device_type: str, index: int | None) -> Callable[..., Any] | None:
    """:func:`fastunet.kernels.replay.call`, for what Triton serves on this device; None where it runs nowhere."""
    global _repeat
    if triton_unavailable(device_type, index) is not None:
        return None
    if _repeat is None:
        from fastunet.kernels import replay

        _repeat = replay.call
    return _repeat
