"""Which GPU architecture a tensor's device is, or stands for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_pretended: str | None = None


@contextmanager
def as_if_on(architecture: str) -> Iterator[None]:
    """Inside, tensors on the CPU and the meta device count as lying on a GPU of ``architecture`` ("sm_90").

    For counting and compiling with no GPU, and for running every path in the interpreter.
    """
    global _pretended
    kept, _pretended = _pretended, architecture
    try:
        yield
    finally:
        _pretended = kept


def pretended() -> str | None:
    """The architecture that is pretended, if one is."""
    return _pretended


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", …: of a GPU; the one pretended, else "sm_90", of what is none."""
    if device.type != "cuda":
        return _pretended or "sm_90"
    return _of_gpu(device.index)


@functools.cache
def _of_gpu(index: int | None) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
