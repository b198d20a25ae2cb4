"""benchmarks/gate.json: what the gate found when it was last updated, an entry a line: a diff shows a regression.

It names the Triton that compiled it: another one makes other machine code, and its numbers are not compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.machine_code import Resources

FILE = Path(__file__).with_name("gate.json")
Numbers = dict[str, Any]  # what one entry costs: int, float or str by name

# What is worse when it rises (1) or falls (-1). More registers alone cost nothing: blocks says when they do.
WORSE = {"spilled": 1, "shared": 1, "blocks": -1, "widest load": -1, "widest store": -1, "f64": 1}
WORSE_IN_LOOP = {"issue slots": 1, "least slots": 1, "loop waits": 1, "loop STS": 1, "loop LDS": 1}


def numbers(found: Resources) -> Numbers:
    """``found`` as it is written: short names, and nothing that is zero."""
    everything: Numbers = {
        "registers": found.registers,
        "spilled": found.spilled_bytes,
        "shared": found.shared_bytes,
        "blocks": found.blocks,
        "widest load": max(found.loads, default=0),
        "widest store": max(found.stores, default=0),
        "tma": found.tma,
        "f64": found.float64,
        "tensor": " ".join(f"{name}:{count}" for name, count in found.tensor.items()),
    }
    if found.loop:
        everything |= {
            "loop": found.loop.instructions,
            "loop tensor": found.loop.tensor,
            "issue slots": found.loop.issue_slots,
            "least slots": found.loop.least_slots,
            "loop waits": found.loop.waits,
            "loop STS": found.loop.shared_stores,
            "loop LDS": found.loop.shared_loads,
            "loop LDGSTS": found.loop.async_copies,
            "loop TMA": found.loop.bulk_copies,
        }
    return {name: value for name, value in everything.items() if value}


@dataclass(frozen=True)
class Recorded:
    """The file's content: the Triton that compiled it, and the numbers by entry."""

    triton: str
    entries: Mapping[str, Numbers]

    @property
    def comparable(self) -> bool:
        """Whether the Triton at hand makes the machine code that was recorded."""
        return self.triton == str(triton.__version__)


def load(file: Path) -> Recorded:
    """What ``file`` holds; nothing, of no Triton, if there is no such file."""
    if not file.exists():
        return Recorded("", {})
    content = json.loads(file.read_text(encoding="utf-8"))
    return Recorded(content["triton"], content["entries"])


def save(file: Path, entries: Mapping[str, Numbers]) -> None:
    """Write ``entries`` as compiled by the Triton at hand, sorted, one a line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
    temporary = file.with_suffix(".tmp")
    temporary.write_text(f'{{"triton": "{triton.__version__}", "entries": {{\n{lines}\n}}}}\n', encoding="utf-8")
    os.replace(temporary, file)


def regressions(now: Numbers, before: Numbers) -> Iterator[str]:
    """What is worse than it was."""
    both_loop = "loop" in now and "loop" in before
    if "least slots" in now or "least slots" in before:  # written where they are not the most
        now, before = ({"least slots": x.get("issue slots", 0)} | x for x in (now, before))
    for name, sign in (WORSE | WORSE_IN_LOOP if both_loop else WORSE).items():
        new, old = (float(x.get(name, 0)) for x in (now, before))
        if sign * (new - old) > 0:
            yield f"has {name} {new:g} and had {old:g}"
    kinds = [_kinds(x) for x in (now, before)]
    if kinds[1] - kinds[0]:
        yield f"has tensor instructions {' '.join(sorted(kinds[0])) or 'none'} and had {' '.join(sorted(kinds[1]))}"


def _kinds(about: Numbers) -> set[str]:
    return {part.partition(":")[0] for part in str(about.get("tensor", "")).split()}
