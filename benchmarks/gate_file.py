"""What the gate compares with: benchmarks/gate.json, and the limits beyond the gate's rules.

gate.json is what the gate found when it was last updated, an entry a line: a diff shows a regression. It names the
Triton that compiled it: another one makes other machine code, and its numbers are not compared. Limits are kept by
patterns in entries' names: a bound that a kernel has reached belongs to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.machine_code import Resources
from benchmarks.measure import rewrite

FILE = Path(__file__).with_name("gate.json")
Cost = dict[str, Any]  # what one entry costs: int, float or str by name

# What is worse when it rises (1) or falls (-1). More registers cost nothing unless fewer blocks fit, which is here.
WORSE = {"spilled": 1, "shared": 1, "blocks": -1, "widest load": -1, "widest store": -1, "f64": 1}
WORSE_IN_LOOP = {"issue slots": 1, "least slots": 1, "loop waits": 1, "loop STS": 1, "loop LDS": 1}


def numbers(found: Resources) -> Cost:
    """``found`` as it is written: short names, and nothing that is zero."""
    everything: Cost = {
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
    entries: Mapping[str, Cost]

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


def save(file: Path, entries: Mapping[str, Cost]) -> None:
    """Write ``entries`` as compiled by the Triton at hand, sorted, one a line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
    rewrite(file, f'{{"triton": "{triton.__version__}", "entries": {{\n{lines}\n}}}}\n')


def regressions(now: Cost, before: Cost) -> Iterator[str]:
    """What is worse than it was."""
    both_loop = "loop" in now and "loop" in before
    if "least slots" in now or "least slots" in before:  # which is written where it is not the most
        now, before = ({"least slots": x.get("issue slots", 0)} | x for x in (now, before))
    for name, sign in (WORSE | WORSE_IN_LOOP if both_loop else WORSE).items():
        new, old = (float(x.get(name, 0)) for x in (now, before))
        if sign * (new - old) > 0:
            yield f"has {name} {new:g} and had {old:g}"
    kinds = [_kinds(x) for x in (now, before)]
    if kinds[1] - kinds[0]:
        yield f"has tensor instructions {' '.join(sorted(kinds[0])) or 'none'} and had {' '.join(sorted(kinds[1]))}"


def _kinds(about: Cost) -> set[str]:
    return {part.partition(":")[0] for part in str(about.get("tensor", "")).split()}


# ---- limits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """What the main loop of some entries may cost.

    Of a forward's two loops the one that masks counts, which only tiles at the border run, unless ``least_slots`` says
    otherwise.
    """

    pattern: str
    issue_slots: float = float("inf")  # per tensor clock
    least_slots: float = float("inf")  # of the cheaper loop
    shared_stores: float = float("inf")  # instructions; 0: no round trip through shared memory


# The bounds of the convolutions: 1.3 slots with a prologue, 0.7 without, 1.9 for wgrad.
LIMITS = (
    # On Hopper not of a source that is cropped: TMA cannot bring it, and a tile of its own loads it by pointers.
    Limit(
        r"^_conv3x3_fwd_kernel bf16 HEAD=0 (?!.* reduction=32 .* stages=3 sm_90).* outputs=(64|128) .* sm_(80|90)$",
        issue_slots=1.3,
        shared_stores=0,
    ),
    # Under a head nothing is normalised, unless the layers before it are not the usual ones: then 0.92.
    Limit(r"^_conv3x3_fwd_kernel bf16 HEAD=(16|32) .* sm_(80|90)$", issue_slots=0.95, shared_stores=0),
    Limit(r"^_conv3x3_dgrad_kernel bf16 .* outputs=(64|128) reduction=(32|64) .* sm_(80|90)$", 0.7, shared_stores=0),
    Limit(r"^_conv3x3_wgrad_kernel bf16 .* outputs=(32|64|128) .* sm_(80|90)$", issue_slots=1.9, shared_stores=0),
    # Two programs of 64 pixels and 4 warps a processor took 0.8 of the time of one of 1.17 slots on an H200.
    Limit(r"^_conv_up_fwd_kernel bf16 .* sm_(80|90)$", issue_slots=1.5, shared_stores=0),
    Limit(r"^_conv_down_fwd_kernel bf16 KSIZE=3 .* outputs=(128|256) .* sm_(80|90)$", issue_slots=1.3, shared_stores=0),
    # With stride 2 no value that was normalised serves two taps: with 64 filters only tiles inside the picture keep to
    # 1.3, or nearly.
    Limit(r"^_conv_down_fwd_kernel bf16 KSIZE=3 .* outputs=64 .* sm_(80|90)$", 1.65, least_slots=1.32, shared_stores=0),
    Limit(r"^_conv_(up|down)_dgrad_kernel bf16 KSIZE=[23] (?!.* outputs=32 ).* sm_(80|90)$", 0.7, shared_stores=0),
    # Of 32 channels a value that was loaded serves half as many products.
    Limit(r"^_conv_(up|down)_dgrad_kernel bf16 KSIZE=[23] .* outputs=32 .* sm_(80|90)$", 0.79, shared_stores=0),
    Limit(r"^_conv_strided_wgrad_kernel bf16 KSIZE=[23] .* sm_(80|90)$", issue_slots=1.9, shared_stores=0),
)
