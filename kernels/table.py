"""What tiles.json says: the algorithm and the tile of a convolution, by kernel, architecture and shape.

An entry is one line. Its ``key`` is (kind, architecture, dtype, precision, channels of the sources, filters, width,
batch): it holds for one kernel ("conv3x3_fwd", "conv3x3_dgrad", "conv3x3_wgrad"; of other convolutions what their
launchers ask ``choose_strided`` for, by the sizes that they ask with), for 16-bit tensors of either dtype, for pictures
of that width, up to the next power of two, and for the batches that no other entry is nearer to. What it says:

- ``algorithm``, of 3×3 convolutions of stride 1: what backend "auto" takes. "triton", where it is left out; "stored",
  Triton's kernel on sources normalised in a pass before it; "cudnn", ATen's matrix products between edges in Triton.
- ``tile``: what Triton takes wherever it serves, instead of the rule in ``tiles.py``.
- ``source``: the row of measurements that proved it (``python -m benchmarks.tune``).

No entry for any batch: the algorithm that :func:`_rule` gives, and the rule's tile.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunet.architecture import architecture

from . import replay
from .common import power_of_2
from .launching import MOST_REMEMBERED, precision

PATH = Path(__file__).parent / "tiles.json"
Key = tuple[str, str, str, str, str, int, int, int]


class Arithmetic(NamedTuple):
    """What of a tensor decides, beside sizes."""

    architecture: str
    dtype: str
    precision: str

    @property
    def narrow(self) -> bool:
        """Whether it is of 16 bits."""
        return self.dtype == "16-bit"

    @property
    def exact(self) -> bool:
        """Whether it is float32, multiplied as such."""
        return self.dtype == "float32" and self.precision == "ieee"


def arithmetic(x: Tensor) -> Arithmetic:
    """How a tensor is multiplied."""
    return Arithmetic(architecture(x.device), _NAMES[x.dtype], precision(x.dtype))


_NAMES = {torch.float16: "16-bit", torch.bfloat16: "16-bit", torch.float32: "float32", torch.float64: "float64"}


class Entry(NamedTuple):
    """One line of the table, without its key."""

    algorithm: str
    tile: list[Any] | None
    source: str


class Choice(NamedTuple):
    """An algorithm, and a tile for the kernels of it that are Triton's."""

    algorithm: str
    tile: Any


_forced: dict[str, Any] = {}
_asked: dict[str, tuple[Key, Any]] | None = None


@contextmanager
def observed() -> Iterator[dict[str, tuple[Key, Any]]]:
    """Collect, by kind, under what key a tile is looked for and what the rule gives: for the tuner."""
    global _asked
    kept, _asked = _asked, {}
    replay.forget()  # calls made again ask for nothing
    try:
        yield _asked
    finally:
        _asked = kept
        replay.forget()


@contextmanager
def forced(choices: Mapping[str, Any]) -> Iterator[None]:
    """Inside, convolutions of these kinds are Triton's with the tile chosen, or by the algorithm of the name chosen, or
    both as a :class:`Choice` says."""
    kept = dict(_forced)
    _forced.update(choices)
    replay.forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(kept)
        replay.forget()


def key(kind: str, sources: Sequence[int], filters: int, width: int, batch: int, how: Arithmetic) -> Key:
    """What an entry is found by; ``sources`` are the channels of each."""
    return kind, *how, "+".join(map(str, sources)), filters, power_of_2(width), power_of_2(batch)


@functools.cache
def entries() -> dict[tuple[Any, ...], dict[int, Entry]]:
    """The entries of ``tiles.json`` by :func:`key`, the batch apart."""
    found: dict[tuple[Any, ...], dict[int, Entry]] = {}
    for line in json.loads(PATH.read_text()):
        *layer, batch = line["key"]
        entry = Entry(line.get("algorithm", "triton"), line.get("tile"), line["source"])
        found.setdefault(tuple(layer), {})[batch] = entry
    return found


def _entry(wanted: Key) -> Entry | None:
    """The entry for ``wanted``, or for the batch nearest to its."""
    *layer, batch = wanted
    near = entries().get(tuple(layer))
    return near[min(near, key=lambda other: max(batch / other, other / batch))] if near else None


@functools.lru_cache(MOST_REMEMBERED)
def algorithm(kind: str, sources: tuple[int, ...], filters: int, width: int, batch: int, how: Arithmetic) -> str:
    """The algorithm that backend "auto" takes: one of :data:`fastunet.kernels.conv.FUNCTIONS`."""
    entry = _entry(key(kind, sources, filters, width, batch, how))
    return _rule(kind, sources, filters, how) if entry is None else entry.algorithm


def _rule(kind: str, sources: Sequence[int], filters: int, how: Arithmetic) -> str:
    """What is the fastest where nothing was measured, by what was: on an H200 cuDNN's products reach up to twice the
    rate of Triton's, and for few channels the passes around them cost more than that saves."""
    if how.architecture != "sm_90" or not how.narrow:
        return "triton"
    narrowest = min(*sources, filters)
    if kind == "conv3x3_act":  # the fused epilogue saves a pass, and two sources a concatenation
        return "cudnn" if narrowest >= 128 * len(sources) else "triton"
    if narrowest >= 64 and filters >= 128:
        return "cudnn"
    return "stored" if kind == "conv3x3_fwd" else "triton"


def algorithm_forced(kind: str) -> str | None:
    """The algorithm that every backend takes inside :func:`forced`."""
    choice = _forced.get(kind)
    if isinstance(choice, Choice):
        return choice.algorithm
    return choice if choice is None or isinstance(choice, str) else "triton"


def overruled(rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule`` (kind, batch, sources, filters, height, width, how, tma, …), overruled wherever the table has a tile
    that fits the call."""

    @functools.lru_cache(MOST_REMEMBERED)
    def both(*args: Any) -> tuple[Key, Any, Any]:
        """The key, the rule's tile, and the table's."""
        tile = rule(*args)
        kind, batch, sources, filters, _, width, how, *_ = args
        wanted = key(kind, sources, filters, width, batch, how)
        entry = _entry(wanted)
        if entry is None or entry.tile is None:
            return wanted, tile, tile
        found = type(tile)(*entry.tile)
        # The table's tile does not fit where TMA could be used when it was measured and cannot now, or the reverse, nor
        # where it takes more pictures a program than the batch has.
        return wanted, tile, found if found.tma == tile.tma and found.images <= batch else tile

    @functools.wraps(rule)
    def choose(kind: str, *args: Any) -> Any:
        wanted, tile, found = both(kind, *args)
        if _asked is not None:
            _asked[kind] = wanted, tile
        choice = _forced.get(kind)
        if isinstance(choice, Choice):
            return choice.tile
        return choice if isinstance(choice, tuple) else found

    _REMEMBERED.append(both)
    return choose


_REMEMBERED: list[Any] = [entries, algorithm]


def forget() -> None:
    """Read ``tiles.json`` again."""
    replay.forget()
    for function in _REMEMBERED:
        function.cache_clear()
