"""The compile gate: every kernel, compiled for every chip with no GPU, and its machine code read.

``python -m benchmarks.gate`` finds what fastunet launches: the launches of benchmarks/cases.py and of the table of
tiles, and those of training steps and inferences of every network, noted on the meta device once for each chip. An
entry is a kernel, its tile, dtype, warps and stages, on one chip; of its variants (with statistics, with a bias, …)
that which does most stands for it, of those that are timed if any is. Of each kernel on each chip the gate compiles the
entry that benchmarks/gate.json says has the most registers, with and without tensor instructions; ``--all`` compiles
every entry, ``--variants`` every variant too. It prints a table, the worst of each kernel on each chip, and exits with
1 on a broken rule:

- every kernel of fastunet.kernels is launched by something, and compiles;
- nothing spills to local memory, and shared memory fits the chip;
- every dot of a tensor-core dtype becomes tensor-core instructions, whose wgmma are not serialised;
- no instruction computes in float64;
- on NVIDIA, where the dtype has 16 bits and all channel counts are multiples of 16, activations are loaded 16 bytes at
  a time and never stored one by one, unless the classes of a head are odd;
- the main loop keeps within benchmarks/gate_file.py (benchmarks/main_loop.py says how it is found and counted);
- benchmarks/gate.json has an entry for each launch, and under the Triton that wrote it no number is worse than there.
  ``--update`` rewrites the file.

Another Triton than the file's makes other machine code. What spills there, and main loops beyond the limits, are named
and break no rule.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: the interpreter compiles nothing

import torch
import triton
from tqdm import tqdm

import fastunet
from benchmarks import gate_file
from benchmarks.cases import CASES, UNTIMED, Case
from benchmarks.chips import CHIPS
from benchmarks.gate_file import FILE, Cost, load, numbers, regressions, save
from benchmarks.isolation import on_all_cores
from benchmarks.machine_code import Resources, read
from benchmarks.nets import NetCase
from benchmarks.recorder import Launch, Specialisation, find_kernels, flat, record, specialise
from benchmarks.trace import Call, trace
from fastunet import kernels
from fastunet.architecture import as_if_on
from fastunet.kernels.table import entries as tiles_measured

NETWORKS = (
    *map(NetCase, ("unet", "unet-bilinear", "strided")), NetCase("plain", classes=22), NetCase("brain", base=32),
    NetCase("nnunet", base=32),
)  # fmt: skip
# Of networks. float16 compiles to the same code with other type names, and CASES have some of it and of float32.
DTYPE = torch.bfloat16
# One chip with asynchronous copies, one with the tensor memory accelerator and warpgroups, one of AMD's.
QUICK = ("sm_80", "sm_90", "gfx942")
SIZES = ((8, 512), (1, 256))


@dataclass(frozen=True)
class Task:
    """One binary to compile, and the first that launches it."""

    chip: str
    origin: str
    wanted: Specialisation

    @functools.cached_property
    def name(self) -> str:
        """Of the entry: kernel, dtype, tile, warps and stages, chip. Its variants differ in what they are asked for."""
        tile = " ".join(f"{name}={value}" for name, value in self._constants.items() if _is_tile(name, value))
        options = self.wanted.options
        return f"{self._head} {tile} warps={options['num_warps']} stages={options['num_stages']} {self.chip}"

    @functools.cached_property
    def variant(self) -> str:
        """Equal for two launches that share one binary; the number stands for types and alignments of arguments."""
        aligned = sorted((i, about) for i, about in self.wanted.attributes.items() if about)
        everything = self._constants, self.wanted.signature, aligned, sorted(self.wanted.asked.items())
        mark = hashlib.sha256(str(everything).encode()).hexdigest()[:6]
        return f"{self.name} {' '.join(self.asked)} #{mark}"

    @property
    def asked(self) -> list[str]:
        """What the variant does: its true constants, and the operands that it has."""
        operands = [name for name, kind in self.wanted.signature.items() if kind.startswith(("*", "tensordesc"))]
        acts = [name for name, value in self._constants.items() if _is_slope(name) and value is not None]
        return operands + [name for name, value in self._constants.items() if value is True] + acts

    @property
    def leaky(self) -> bool:
        """Whether something has a slope below zero, for which a leaky ReLU multiplies once more than a ReLU."""
        return any(_is_slope(name) and value not in (None, 0) for name, value in self._constants.items())

    @property
    def by_sample(self) -> bool:
        """Whether an affine or statistics are of each sample."""
        return any(name.lower().startswith("samples") and value for name, value in self._constants.items())

    @property
    def rank(self) -> tuple[bool, int, int, str]:
        """Greater for a variant that does more, leaky ones and those by sample last; of equals for one whose sizes and
        addresses are better aligned."""
        return (
            not (self.leaky or self.by_sample),
            len(self.asked),
            sum(map(bool, self.wanted.attributes.values())),
            self.variant,
        )

    @property
    def _constants(self) -> dict[str, Any]:
        names = list(self.wanted.signature)
        return flat({names[path[0]]: value for path, value in self.wanted.constants.items()})

    @property
    def _head(self) -> str:
        return f"{self.wanted.name} {self.dtype}"

    @property
    def dtype(self) -> str:
        """Of the first tensor."""
        found = re.search(r"(?:\*|tensordesc<)(\w+)", " ".join(self.wanted.signature.values()))
        return found[1] if found else "none"

    @property
    def wide(self) -> bool:
        """Whether 16-byte accesses are possible: a 16-bit tensor comes first, and channel counts divide by 16."""
        return self.dtype in ("bf16", "fp16") and self.wanted.sizes_aligned

    @property
    def odd(self) -> bool:
        """Whether a head has an odd number of classes, or so few that it has no matrix product: its weights, bias and
        results come one by one."""
        return bool(self._constants.get("K", 0) % 2) or self.wanted.name.startswith("_conv_few_")


def _is_slope(name: str) -> bool:
    return "SLOPE" in name


def _is_tile(name: str, value: Any) -> bool:
    return (
        value is not None
        and not _is_slope(name)
        and not isinstance(value, bool)
        and name not in ("warps", "stages", "shares")
    )


@dataclass(frozen=True)
class Judged:
    """What one binary costs, and which rules it breaks: those that hold for every Triton, and those about costs."""

    task: Task
    resources: Resources | None
    problems: list[str]
    costly: list[str]

    @property
    def numbers(self) -> Cost:
        return numbers(self.resources) if self.resources else {}

    @property
    def as_json(self) -> dict[str, Any]:
        task = self.task
        about = {"entry": task.name, "kernel": task.wanted.name, "chip": task.chip, "origin": task.origin}
        return about | {"numbers": self.numbers, "problems": self.problems + self.costly}


Judgement = tuple[Resources | None, list[str], list[str]]  # an entry's, without the task


# ---- what there is to compile ------------------------------------------------------------------------------------


@contextmanager
def _as_on(chip: str, tf32: bool) -> Iterator[None]:
    """Launchers choose as on ``chip``, and float32 convolutions may or may not use TF32."""
    kept = torch.backends.cudnn.allow_tf32, torch.version.hip
    torch.backends.cudnn.allow_tf32 = tf32
    torch.version.hip = "0" if CHIPS[chip].amd else None
    try:
        with as_if_on(chip):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.version.hip = kept


def _launched(
    chip: str, cases: Iterable[Case], networks: Iterable[NetCase], backend: ModuleType
) -> Iterator[tuple[str, Launch]]:
    """(origin, launch) of everything that is launched on ``chip``."""
    for tf32 in (True, False):
        with _as_on(chip, tf32):
            for case in cases:
                if tf32 or case.dtype == torch.float32:
                    with record() as launches:
                        case.launch(backend)
                    yield from ((case.name, launch) for launch in launches)
    with _as_on(chip, True):
        for network in networks:
            with torch.device("meta"), trace(chip) as calls:
                _steps(network)
            yield from ((network.net, launch) for launch in _launches(calls))


def tabled(chip: str) -> Iterator[Case]:
    """A 3×3 convolution for each entry of the table of tiles that names a tile for ``chip``."""
    modes = {"conv3x3_fwd": "inference", "conv3x3_dgrad": "dgrad", "conv3x3_wgrad": "wgrad"}
    for (kind, architecture, dtype, _, sources, filters, width), batches in tiles_measured().items():
        first, *others = map(int, sources.split("+"))
        for batch, entry in batches.items():
            if entry.tile and architecture == chip and kind in modes:
                like = DTYPE if dtype == "16-bit" else getattr(torch, dtype)
                shape = batch, first, width, width
                yield Case("conv2d", shape, like, modes[kind], filters=filters, skip=sum(others))  # type: ignore[arg-type]


def _steps(network: NetCase) -> None:
    """For each size one training step, without a loss, and one inference."""
    net = network.model(fastunet).to(DTYPE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for batch, size in SIZES:
        x = torch.empty((batch, 3, size, size), dtype=DTYPE).contiguous(memory_format=torch.channels_last)
        y = net.train()(x)
        y.backward(torch.empty_like(y))
        with torch.no_grad():
            net.eval()(x)


def _launches(calls: Iterable[Call]) -> Iterator[Launch]:
    for call in calls:
        yield from call.launches
        yield from _launches(call.inner)


def find(
    chip: str, cases: Iterable[Case], networks: Iterable[NetCase], backend: ModuleType, variants: bool = False
) -> dict[str, Task]:
    """What ``chip`` has to compile, by name: of each entry the variant that does most, or all ``variants``."""
    tasks: dict[str, Task] = {}
    seen = set()
    for origin, launch in _launched(chip, cases, networks, backend):
        if (key := launch.key) in seen:  # specialising takes longer than launching
            continue
        seen.add(key)
        task = Task(chip, origin, specialise(launch, CHIPS[chip].target))
        name = task.variant if variants else task.name
        other = tasks.setdefault(name, task)
        if task.rank > other.rank:
            tasks[name] = task
    return tasks


def heaviest(tasks: Iterable[Task], recorded: Mapping[str, Cost]) -> list[Task]:
    """One task of each kind: that with the most registers in the record, or that has no record.

    A kind is a kernel on a chip, with or without tensor instructions.
    """
    chosen: dict[tuple[str, str, bool], tuple[float, Task]] = {}
    for task in tasks:
        about = recorded.get(task.name, {})
        kind = (task.wanted.name, task.chip, "tensor" in about)
        weight = float(about.get("registers", float("inf")))
        if kind not in chosen or weight > chosen[kind][0]:
            chosen[kind] = (weight, task)
    return [task for _, task in chosen.values()]


# ---- compiling and judging ---------------------------------------------------------------------------------------


def judge(task: Task, before: Cost | None) -> Judgement:
    """Compile one binary, read it, and apply the rules; ``before`` is what the record says, if it counts."""
    try:
        found = read(task.wanted.compile(), CHIPS[task.chip])
    except Exception as error:
        return None, [f"does not compile: {type(error).__name__}: {error}"], []
    problems = list(_broken_rules(found, task))
    if before is not None:
        problems += [f"{text}: see the change, then --update" for text in regressions(numbers(found), before)]
    return found, problems, list(_costs(found, task))


def _broken_rules(found: Resources, task: Task) -> Iterator[str]:
    limit = CHIPS[task.chip].shared_limit
    if found.shared_bytes > limit:
        yield f"wants {found.shared_bytes} bytes of shared memory and the chip has {limit}"
    elif not found.blocks:
        yield f"does not fit on the chip with {found.registers} registers a thread"
    if found.dots and not found.tensor:
        yield "has a dot but no tensor-core instruction"
    if found.serialised:
        yield "its wgmma are serialised: the tensor cores drain after each of them, not after each dot"
    if found.float64 and "fp64" not in str(task.wanted.signature):
        yield f"computes in float64 ({found.float64} instructions)"
    if task.wide and not CHIPS[task.chip].amd:
        # Where TMA moves the activations, all other loads are of vectors with one value a channel.
        if found.loads and not found.tma and (max(found.loads) < 16 or (min(found.loads) < 4 and not task.odd)):
            yield f"loads {_accesses(found.loads)} where 16 bytes at a time are possible"
        # Stores of 4 or 8 bytes may be sums in float32, which the machine code does not tell apart: they pass.
        if 2 in found.stores and not task.odd:
            yield f"stores {_accesses(found.stores)} where 16 bytes at a time are possible"


def _costs(found: Resources, task: Task) -> Iterator[str]:
    if found.spilled_bytes:
        yield f"spills {found.spilled_bytes} bytes a thread"
    for held in gate_file.LIMITS:
        if (loop := found.loop) and re.search(held.pattern, task.name):
            slots = loop.issue_slots or 0
            least = slots if loop.least_slots is None else loop.least_slots
            if slots > held.issue_slots and not task.leaky:
                yield f"issues {slots} slots a tensor clock in its main loop, over {held.issue_slots}"
            if least > held.least_slots and not task.leaky:
                yield f"issues {least} slots a tensor clock in the cheapest of its main loops, over {held.least_slots}"
            if loop.shared_stores > held.shared_stores:
                yield f"stores {loop.shared_stores} times to shared memory in its main loop"


def _accesses(widths: dict[int, int]) -> str:
    return " ".join(f"{width}B:{count}" for width, count in sorted(widths.items(), reverse=True))


def run(tasks: list[Task], before: Mapping[str, Cost], jobs: int) -> list[Judged]:
    """Judge every task, ``jobs`` at a time."""
    work = [functools.partial(judge, task, before.get(task.name)) for task in tasks]
    found: dict[int, Judgement] = {}
    for number, judgement, failure in tqdm(on_all_cores(work, jobs=jobs), "compiling", len(work), disable=None):
        found[number] = judgement or (None, [f"does not compile: {failure}"], [])
    return [Judged(task, *found[number]) for number, task in enumerate(tasks)]


# ---- the command -------------------------------------------------------------------------------------------------


def table(groups: Mapping[str, list[Judged]]) -> str:
    """A line for each group: the worst of its entries in each respect."""
    highest = ("registers", "spilled", "shared", "f64")
    lowest = ("blocks", "widest load", "widest store")
    slots = ("issue slots", "least slots")
    in_loop = ("loop", "loop tensor", *slots, "loop waits", "loop STS", "loop LDS", "loop LDGSTS", "loop TMA")
    lines: list[Sequence[str]] = [("binaries", *highest, *lowest, *in_loop, "tensor", "entry")]
    for name, entries in groups.items():
        about = [entry.numbers for entry in entries if entry.resources]
        loops = [numbers for numbers in about if "loop" in numbers]
        cells = [str(max((x.get(key, 0) for x in about), default="-")) for key in highest]
        cells += [str(min((x.get(key, 0) for x in about), default="-")) for key in lowest]
        cells += [str(max((x.get(key, 0) for x in loops), default="-")) for key in in_loop]
        tensor = sorted({part.partition(":")[0] for x in about for part in x.get("tensor", "").split()}) or ["-"]
        lines.append((str(len(entries)), *cells, " ".join(tensor), name))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(
    arguments: Sequence[str] | None = None,
    cases: Sequence[Case] = CASES,
    networks: Sequence[NetCase] = NETWORKS,
    backend: ModuleType = kernels,
    file: Path = FILE,
) -> int:
    """The command; returns its exit status. The last four are for tests that plant faults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description="Compile every kernel with no GPU.")
    parser.add_argument(
        "--arch", nargs="+", choices=sorted(CHIPS), metavar="ARCH",
        help=f"chips to compile for, of {', '.join(CHIPS)}; default: {' '.join(QUICK)}, or all of them with --all "
        "or --update",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="compile every entry, not one or two of each kernel")
    parser.add_argument("--variants", action="store_true", help="compile every variant of every entry; no comparison")
    parser.add_argument("--update", action="store_true", help="compile every entry and write benchmarks/gate.json")
    parser.add_argument("--only", metavar="TEXT", default="", help="only entries whose name contains TEXT")
    parser.add_argument("--verbose", action="store_true", help="print every entry, not the worst of each kernel")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time; default: all cores")
    options = parser.parse_args(arguments)
    options.arch = options.arch or list(CHIPS if options.all or options.update else QUICK)
    recorded = load(file)
    if options.update and options.only:
        parser.error("--update needs every entry of a chip: leave out --only, and name chips with --arch")
    if options.update and not recorded.comparable and recorded.entries and len(options.arch) < len(CHIPS):
        parser.error(f"{file.name} is of Triton {recorded.triton}: leave out --arch, so that all of it is of this one")

    found: dict[str, Task] = {}
    for chip in tqdm(options.arch, "tracing", disable=None):
        every, rare = ([*cases, *tabled(chip)], UNTIMED) if backend is kernels else (cases, ())
        # Where a timed and an untimed case make the same entry, the timed one replaces the other.
        found |= find(chip, rare, (), backend, options.variants)
        found |= find(chip, every, networks, backend, options.variants)
    chosen = [task for task in found.values() if options.only in task.name]
    if not chosen:
        parser.error(f"no entry has '{options.only}' in its name; --verbose prints the names")
    if not (options.all or options.update or options.variants):
        chosen = heaviest(chosen, recorded.entries)
    comparing = recorded.comparable and not options.update and not options.variants
    before = recorded.entries if comparing else {}
    entries = run(chosen, before, options.jobs)

    known = recorded.comparable or not recorded.entries or options.update
    problems = [
        f"{entry.task.variant} ({entry.task.origin}) {text}"
        for entry in entries
        for text in entry.problems + (entry.costly if known else [])
    ]
    reached = {task.wanted.name for task in found.values()}
    missed = sorted(find_kernels(modules_of(backend)).keys() - reached)
    problems += [f"{name} is launched by no case or network: add a case to benchmarks/cases.py" for name in missed]
    stale = {name for name in recorded.entries if name.rpartition(" ")[2] in options.arch} - found.keys()
    if options.update:
        kept = {name: recorded.entries[name] for name in recorded.entries.keys() - stale if recorded.comparable}
        save(file, kept | {entry.task.name: entry.numbers for entry in entries if entry.resources})
    elif before:
        problems += [f"{name} is not in {file.name}: --update" for name in sorted(found.keys() - before.keys())]

    if options.json:
        print(json.dumps([entry.as_json for entry in entries], indent=1))
    else:
        groups: dict[str, list[Judged]] = {}
        for entry in sorted(entries, key=lambda entry: (entry.task.wanted.name, entry.task.chip)):
            group = entry.task.variant if options.verbose else f"{entry.task.wanted.name} {entry.task.chip}"
            groups.setdefault(group, []).append(entry)
        print(table(groups))
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    if before:
        for line in _news(entries, before, stale):
            print(f"{line}; --update writes it to {file.name}", file=sys.stderr)
    elif not recorded.comparable and not options.update:
        if not known:
            for entry in entries:
                for text in entry.costly:
                    print(f"{entry.task.variant} ({entry.task.origin}) {text}", file=sys.stderr)
        print(f"{file.name} is not of Triton {triton.__version__}: only the rules count", file=sys.stderr)
    print(f"{len(entries)} of {len(found)} binaries, {len(problems)} broken rules", file=sys.stderr)
    return 1 if problems else 0


def _news(entries: Iterable[Judged], before: Mapping[str, Cost], stale: Iterable[str]) -> Iterator[str]:
    """What differs from the record and breaks no rule."""
    for entry in entries:
        old = before.get(entry.task.name, entry.numbers)
        changed = [name for name in old | entry.numbers if old.get(name) != entry.numbers.get(name)]
        if changed and not entry.problems:
            said = ", ".join(f"{name} {old.get(name, 0)} -> {entry.numbers.get(name, 0)}" for name in changed)
            yield f"{entry.task.name}: {said}"
    for name in sorted(stale):
        yield f"{name} is launched no more"


def modules_of(package: ModuleType) -> list[ModuleType]:
    """``package`` and the modules in it."""
    names = [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))]
    return [package, *(importlib.import_module(f"{package.__name__}.{name}") for name in names)]


if __name__ == "__main__":
    sys.exit(main())
