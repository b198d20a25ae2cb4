"""Values of options on the command line, checked; what is wrong is one sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from fastunet.backend import resolve_backend
from fastunet.errors import UserError


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return value

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def share(text: str) -> float:
    """A number between 0 and 1."""
    if not 0 < _number(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return float(text)


def factor(text: str) -> float:
    """A number above 0 and up to 1."""
    if not 0 < _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text}")
    return float(text)


def percent(text: str) -> float:
    """A number between 0 and 100."""
    if not 0 < _number(text) < 100:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 100, got {text}")
    return float(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return float(text)


def chosen_device(name: str) -> torch.device:
    """The device asked for, tried out, with a backend that runs there; "auto" is cuda if there is one.

    Raises:
        UserError: it is not there, or the backend that was asked for does not run there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} is not available here: take cpu or a device that 'fastunet info' lists"
        ) from error
    try:
        resolve_backend("auto", device, torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
    return device
