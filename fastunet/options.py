"""Values of options on the command line, checked; what is wrong is one sentence."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastunet.backend import resolve_backend
from fastunet.data import LAYOUTS, Colour, Dataset, open_dataset
from fastunet.errors import UserError

MAX_INTEGER = (1 << 63) - 1  # of PyTorch's
MAX_CHANNELS = 1 << 16  # of a network's first level: sixteen times as many are still numbers that PyTorch multiplies


def at_least(least: int, most: int = MAX_INTEGER) -> Callable[[str], int]:
    """A whole number of at least ``least``, and at most ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {most}, got {text}")
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
    """A number above 0 that float32 holds, or an optimiser could not compute with it."""
    if not 0 < _number(text) <= torch.finfo(torch.float32).max:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 3.4e38, got {text}")
    return float(text)


def chosen_device(name: str) -> torch.device:
    """The device asked for, tried out, with a backend that runs there; "auto" is cuda if there is one.

    Raises:
        UserError: it is not there, or the backend that was asked for does not run there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tried = torch.zeros(1, device=name)
        tried.item()  # of "meta" there is no number
        device = tried.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} is not available here: take cpu or a device that 'fastunet info' lists"
        ) from error
    try:
        resolve_backend("auto", device, torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
    return device


@contextmanager
def enough_memory(where: str, advice: str) -> Iterator[None]:
    """What runs out of the memory of a GPU or of the machine is a sentence: ``where`` it did, and what to do.

    Raises:
        UserError: it ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not told and not re.search("allocate memory|not enough memory", str(error)):  # of the machine: no class
            raise
        raise UserError(f"{where} ran out of memory: {advice}") from error


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The pictures and their masks, for :func:`opened_data`."""
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of pictures, or of a data set's folders")
    parser.add_argument(
        "masks", type=Path, nargs="?", metavar="MASKS", help="folder of their masks: the same names, or with _mask"
    )
    data = parser.add_argument_group("what the folders hold")
    data.add_argument(
        "--layout", choices=LAYOUTS, help="found out, unless the masks number cells or have MSRC-v2's colours"
    )
    data.add_argument("--table", type=Path, metavar="FILE", help="text file of classes: 'value,name' or 'r,g,b,name'")
    data.add_argument("--split", metavar="LIST", help="take the pictures of this text file, or of the data set's list")
    data.add_argument("--ignore", type=_value, nargs="+", default=[], metavar="VALUE", help="of masks: does not count")


def opened_data(args: argparse.Namespace) -> Dataset:
    """The data set that the options name, every file checked."""
    options = ("IMAGES", "MASKS")
    return open_dataset(
        args.images,
        args.masks,
        layout=args.layout,
        table=args.table,
        split=args.split,
        ignore=args.ignore,
        options=options,
    )


def _value(text: str) -> int | Colour:
    """A value of a mask: "255", or a colour "224,224,192"."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"expected a number or a colour r,g,b, got {text}")
    return numbers[0], numbers[1], numbers[2]
