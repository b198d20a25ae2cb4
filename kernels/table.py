"""What tiles.json says: the algorithm and the tile of a convolution, by kernel, architecture and shape.

An entry is one line. Its ``key`` is (kind, architecture, dtype, precision, channels of the sources, filters, width,
batch): it holds for one kernel ("conv3x3_fwd", "conv3x3_dgrad", "conv3x3_wgrad"; of other convolutions what their
launchers ask ``choose_strided`` for, by the sizes that they ask with), for 16-bit tensors of either dtype, for pictures
of that width, up to the next power of two, and for the batches that no other entry is nearer to. What it says:

- ``algorithm``, of 3×3 convolutions of stride 1: what backend "auto" takes. "triton", if it is left out; "cudnn",
  ATen's matrix products between edges in Triton; "winograd", only where a measured row says so.
- ``tile``: what Triton takes wherever it serves, instead of the rule in ``tiles.py``.
- ``source``: "modelled" (``python -m benchmarks.tune --model``), or the row of measurements that proved it.

No entry for any batch: Triton, with the rule's tile.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import triton
from torch import Tensor

from fastunet.architecture import architecture
from fastunet.kernels.common import precision

PATH = Path(__file__).parent / "tiles.json"
P = ParamSpec("P")
T = TypeVar("T")
Key = tuple[str, str, str, str, str, int, int, int]


class Entry(NamedTuple):
    """One line of the table, without its key."""

    algorithm: str
    tile: list[Any] | None
    source: str


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
def forced(choices: Mapping[str, Any]) -> Iterator[None]:
    """Inside, convolutions of these kinds are Triton's with the tile chosen, or by the algorithm of the name chosen."""
    kept = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(kept)


def key(kind: str, sources: Sequence[int], filters: int, width: int, operand: Tensor) -> Key:
    """What an entry is found by; ``sources`` are the channels of each, ``operand`` one that is multiplied."""
    dtype = "16-bit" if operand.element_size() == 2 else str(operand.dtype).removeprefix("torch.")
    place = (architecture(operand.device), dtype, precision(operand.dtype))
    sizes = (filters, int(triton.next_power_of_2(width)), int(triton.next_power_of_2(operand.shape[0])))
    return kind, *place, "+".join(map(str, sources)), *sizes


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


def algorithm(kind: str, sources: Sequence[int], filters: int, width: int, operand: Tensor) -> str:
    """The algorithm that backend "auto" takes: one of :data:`fastunet.kernels.algorithms.FUNCTIONS`."""
    entry = _entry(key(kind, sources, filters, width, operand))
    return "triton" if entry is None else entry.algorithm


def algorithm_forced(kind: str) -> str | None:
    """The algorithm that every backend takes inside :func:`forced`."""
    choice = _forced.get(kind)
    return choice if choice is None or isinstance(choice, str) else "triton"


def overruled(rule: Callable[P, T]) -> Callable[P, T]:
    """``rule`` (see ``tiles.py``), overruled wherever the table has a tile that fits the call."""

    @functools.wraps(rule)
    def choose(*args: P.args, **kwargs: P.kwargs) -> T:
        tile: Any = rule(*args, **kwargs)
        kind, batch, sources, filters, _, width, operands, *_ = cast(Any, args)
        wanted = key(kind, sources, filters, width, operands[0])
        if _asked is not None:
            _asked[kind] = wanted, tile
        if isinstance(_forced.get(kind), tuple):
            return cast(T, _forced[kind])
        entry = _entry(wanted)
        if entry is None or entry.tile is None:
            return cast(T, tile)
        found = type(tile)(*entry.tile)
        # Without TMA now, or with it only now; or more pictures a program than there are.
        return cast(T, found if found.tma == tile.tma and found.images <= batch else tile)

    return choose
