"""The oldest versions that are served, and one sentence below them; imported before anything that needs newer ones."""

from __future__ import annotations

import sys

PYTHON = (3, 10)
TORCH = (2, 10)
TRITON = (3, 6)


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor of "2.10.0+cpu" or "3.6.0a1"."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:2])


def refusal(name: str, package: str, least: tuple[int, ...], version: str) -> str | None:
    """Why ``version`` cannot be used, in a sentence; None if it can."""
    if numbers(version) >= least:
        return None
    wanted = ".".join(map(str, least))
    how = f"pip install '{package}>={wanted}'" if package else "take another interpreter"
    return f"expected {name} {wanted} or newer, got {version}; {how}"


def check() -> None:
    """Raise ImportError for a Python or a PyTorch that is too old."""
    told = refusal("Python", "", PYTHON, ".".join(map(str, sys.version_info[:3])))
    if told is None:
        import torch

        told = refusal("PyTorch", "torch", TORCH, torch.__version__)
    if told is not None:
        raise ImportError(told)


check()
