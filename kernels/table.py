"""Measured tiles: what ``python -m benchmarks.tune`` wrote to ``tiles.json`` overrules the rule in ``tiles.py``.

An entry holds for one kernel, architecture, dtype, number of channels, and picture width up to the next power of two.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import triton
from torch import Tensor

from fastunet.architecture import architecture
from fastunet.kernels.common import precision

PATH = Path(__file__).parent / "tiles.json"
P = ParamSpec("P")
T = TypeVar("T")
Key = tuple[str, str, str, str, int, int, int]

_forced: dict[str, Any] = {}
_asked: dict[str, tuple[Key, Any]] | None = None


@contextmanager
def observed() -> Iterator[dict[str, tuple[Key, Any]]]:
    """Collect, by kind, under what key a tile is looked for and what the rule gives: for the tuner."""
    global _asked
    kept, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = kept


@contextmanager
def forced(kind: str, tile: Any) -> Iterator[None]:
    """Inside, every kernel of this kind takes ``tile``: for the tuner."""
    kept = dict(_forced)
    _forced[kind] = tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(kept)


def key(kind: str, channels: int, outputs: int, width: int, operand: Tensor) -> Key:
    """What an entry is found by."""
    dtype = str(operand.dtype).removeprefix("torch.")
    place = (architecture(operand.device), dtype, precision(operand.dtype))
    return kind, *place, channels, outputs, int(triton.next_power_of_2(width))


@functools.cache
def entries() -> dict[Key, list[Any]]:
    """The tiles of ``tiles.json`` by :func:`key`."""
    return {tuple(entry["key"]): entry["tile"] for entry in json.loads(PATH.read_text())}


def measured(rule: Callable[P, T]) -> Callable[P, T]:
    """``rule`` (see ``tiles.choose``), overruled wherever the table has a tile that fits the call."""

    @functools.wraps(rule)
    def choose(*args: P.args, **kwargs: P.kwargs) -> T:
        tile: Any = rule(*args, **kwargs)
        kind, batch, channels, outputs, _, width, operands, *_ = cast(Any, args)
        if _asked is not None:
            _asked[kind] = key(kind, channels, outputs, width, operands[0]), tile
        if kind in _forced:
            return cast(T, _forced[kind])
        if not entries():
            return cast(T, tile)
        values = entries().get(key(kind, channels, outputs, width, operands[0]))
        if values is None:
            return cast(T, tile)
        found = type(tile)(*values)
        # Without TMA now, or with it only now; or more pictures a program than there are.
        return cast(T, found if found.tma == tile.tma and found.images <= batch else tile)

    return choose
