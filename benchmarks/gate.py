"""The compile gate: every kernel, compiled for every chip with no GPU, and its machine code read.

``python -m benchmarks.gate [--arch sm_90 ...] [--json]`` prints a table and exits with 1 on a broken rule:

- every kernel of fastunet.kernels is reached by a case, and compiles;
- nothing spills to local memory, and shared memory fits the chip;
- every dot of a tensor-core dtype becomes tensor-core instructions;
- no instruction computes in float64;
- on NVIDIA, where all channel counts are multiples of 64 and the dtype has 16 bits, activations are loaded 16 bytes at
  a time and never stored one by one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: the interpreter compiles nothing

import torch

from benchmarks.cases import CASES, Case
from benchmarks.machine_code import CHIPS, Resources, read
from benchmarks.recorder import Launch, Specialisation, find_kernels, record, specialise
from fastunet import kernels

DEFAULT_CHIPS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Entry:
    """One binary: what was compiled, for which chip, what it costs, and which rules it breaks."""

    kernel: str
    case: str
    chip: str
    warps: int
    constants: dict[str, str]
    resources: Resources | None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One binary to compile; ``wide`` promises 16-byte accesses."""

    case: str
    chip: str
    wide: bool
    specialisation: Specialisation


def collect(cases: Iterable[Case], backend: ModuleType = kernels) -> dict[Case, list[Launch]]:
    """The launches each case makes."""
    kept = torch.backends.cudnn.allow_tf32
    found = {}
    try:
        for case in cases:
            with record() as launches:
                # float32 has two kernels: on the tensor cores, which is PyTorch's default, and exact.
                for allowed in (True, False) if case.dtype == torch.float32 else (True,):
                    torch.backends.cudnn.allow_tf32 = allowed
                    case.launch(backend)
            found[case] = launches
    finally:
        torch.backends.cudnn.allow_tf32 = kept
    return found


def plan(launches: dict[Case, list[Launch]], chips: Sequence[str]) -> list[Task]:
    """The binaries that ``launches`` need on ``chips``, each once."""
    tasks: dict[str, Task] = {}
    for case, made in launches.items():
        channels = [n for n in (case.shape[1], case.filters, case.skip) if n]
        wide = all(n % 64 == 0 for n in channels) and case.dtype.itemsize == 2
        for chip in chips:
            for launch in made:
                wanted = specialise(launch, CHIPS[chip].target)
                activations = any(kind in ("*bf16", "*fp16") for kind in wanted.signature.values())
                tasks.setdefault(wanted.key, Task(case.name, chip, wide and activations, wanted))
    return list(tasks.values())


def judge(task: Task) -> Entry:
    """Compile one binary, read it, and apply the rules."""
    wanted = task.specialisation
    names = list(wanted.signature)
    constants = {names[path[0]]: str(value) for path, value in wanted.constants.items()}
    about = (wanted.name, task.case, task.chip, wanted.options["num_warps"], constants)
    try:
        found = read(wanted.compile(), CHIPS[task.chip])
    except Exception as error:
        return Entry(*about, None, [f"does not compile: {type(error).__name__}: {error}"])
    return Entry(*about, found, list(_broken_rules(found, task)))


def _broken_rules(found: Resources, task: Task) -> Iterable[str]:
    limit = CHIPS[task.chip].shared_limit
    if found.spilled_bytes:
        yield f"spills {found.spilled_bytes} bytes a thread"
    if found.shared_bytes > limit:
        yield f"wants {found.shared_bytes} bytes of shared memory and the chip has {limit}"
    if found.dots and not found.tensor:
        yield "has a dot but no tensor-core instruction"
    if found.float64 and "fp64" not in str(task.specialisation.signature):
        yield f"computes in float64 ({found.float64} instructions)"
    if task.wide and CHIPS[task.chip].target.backend == "cuda":
        if found.loads and (max(found.loads) < 16 or min(found.loads) < 4):
            yield f"loads {_accesses(found.loads)} where 16 bytes at a time are possible"
        if 2 in found.stores:  # wider but short of 16: sums in float32, which the code does not tell apart
            yield f"stores {_accesses(found.stores)} where 16 bytes at a time are possible"


def run(tasks: list[Task], jobs: int) -> list[Entry]:
    """Judge every task, ``jobs`` at a time."""
    global _tasks
    _tasks = tasks
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_judge_number, range(len(tasks)), chunksize=1)


_tasks: list[Task] = []  # inherited by the forked workers: jit functions do not pickle


def _judge_number(number: int) -> Entry:
    return judge(_tasks[number])


def table(entries: Iterable[Entry]) -> str:
    """The entries as text, a line each, with the broken rules beneath."""
    head = ("kernel", "case", "chip", "warps", "regs", "spill", "shared", "tensor", "loads", "stores", "f64")
    lines: list[tuple[str, ...]] = [head]
    for entry in entries:
        lines.append((entry.kernel, entry.case, entry.chip, str(entry.warps), *_cells(entry.resources)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cells(found: Resources | None) -> tuple[str, ...]:
    if found is None:
        return ("-",) * 7
    tensor = " ".join(f"{name}:{count}" for name, count in found.tensor.items()) or "-"
    loads = _accesses(found.loads) + (f" tma:{found.tma}" if found.tma else "")
    plain = (found.registers, found.spilled_bytes, found.shared_bytes)
    return (*map(str, plain), tensor, loads or "-", _accesses(found.stores) or "-", str(found.float64))


def _accesses(widths: dict[int, int]) -> str:
    return " ".join(f"{width}B:{count}" for width, count in sorted(widths.items(), reverse=True))


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES, backend: ModuleType = kernels) -> int:
    """The command; returns its exit status. ``cases`` and ``backend`` are for tests that plant faults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description="Compile every kernel with no GPU.")
    parser.add_argument(
        "--arch", nargs="+", choices=sorted(CHIPS), default=DEFAULT_CHIPS, metavar="ARCH",
        help=f"chips to compile for, of {', '.join(CHIPS)}; default: {' '.join(DEFAULT_CHIPS)}",
    )  # fmt: skip
    parser.add_argument("--only", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time; default: all cores")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases if options.only in case.name]
    if not chosen:
        parser.error(f"no case is called '{options.only}'; leave out --only to see the names of all")
    launches = collect(chosen, backend)
    entries = run(plan(launches, options.arch), options.jobs)
    problems = [f"{e.kernel} for {e.chip} ({e.case}) {text}" for e in entries for text in e.problems]
    if not options.only:
        reached = {launch.kernel.__name__ for made in launches.values() for launch in made}
        missed = sorted(find_kernels(modules_of(backend)).keys() - reached)
        problems += [f"{name} is reached by no case: add one to benchmarks/cases.py" for name in missed]
    print(json.dumps([asdict(entry) for entry in entries], indent=1) if options.json else table(entries))
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(f"{len(entries)} binaries, {len(problems)} broken rules", file=sys.stderr)
    return 1 if problems else 0


def modules_of(package: ModuleType) -> list[ModuleType]:
    """``package`` and the modules in it."""
    names = [module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))]
    return [package, *(importlib.import_module(f"{package.__name__}.{name}") for name in names)]


if __name__ == "__main__":
    sys.exit(main())
