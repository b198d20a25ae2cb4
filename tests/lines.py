"""Which lines do the tests run? Python's as coverage sees them; a kernel's in the interpreter, or as executed PTX.

    make coverage                              the whole suite, and the PTX that its tests execute
    make coverage ARGS="tests/test_pool.py"    what some tests run: any arguments of pytest

It prints how many lines of each package run, of each file under 90 % those that do not, and the lines of
``@triton.jit`` functions that run nowhere. The exit status of the whole is 1 if a test fails, a package has less than
90 % outside of such functions, or a line inside one never runs. From Python 3.12 on that takes little longer than the
tests alone; before, three times as long.

Triton's interpreter keeps the numbers of a kernel's lines, and so does PTX in its ``.loc``, of which those count whose
instructions some thread executed (:mod:`benchmarks.ptx`).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("fastunet", "kernels", "benchmarks")
LEAST = 90  # per cent, of each package outside of kernels
PTX = [("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_80", "fp32"), ("sm_90", "tf32")]  # what tests/test_ptx.py executes

# Absolute, because the tests start processes elsewhere; a worker of pytest's ends by os._exit.
SETTINGS = """
[run]
source_dirs = {folders}
data_file = {data}
parallel = true
sigterm = true
patch = subprocess, _exit, fork
concurrency = thread, multiprocessing
disable_warnings = no-data-collected, module-not-imported
"""


@dataclass(frozen=True)
class File:
    """The lines of a file: those that can run and those that did not; and the same of its kernels' bodies."""

    name: str
    lines: set[int]
    missing: set[int]
    kernel: set[int]
    kernel_missing: set[int]


def percent(files: Sequence[File]) -> float:
    """Of the lines outside of kernels those that run."""
    return 100 - 100 * sum(len(file.missing) for file in files) / max(sum(len(file.lines) for file in files), 1)


def of_kernels(text: str) -> dict[int, int]:
    """The lines of the bodies of ``@triton.jit`` functions, each with the first line of its statement."""
    found = {}
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef) and any(
            ast.unparse(mark).startswith("triton.jit") for mark in function.decorator_list
        ):
            for statement in (one for part in function.body for one in ast.walk(part) if isinstance(one, ast.stmt)):
                inner = getattr(statement, "body", None)
                last = inner[0].lineno - 1 if inner else statement.end_lineno
                found |= dict.fromkeys(range(statement.lineno, last + 1), statement.lineno)
    return found


def measured(arguments: Sequence[str], whole: bool) -> tuple[int, list[File]]:
    """pytest's exit status, and every file of the packages; with the PTX's lines if this is the whole suite."""
    import coverage

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings, data = str(folder / "settings"), str(folder / "data")
        folders = ",".join(str(ROOT / package) for package in PACKAGES)
        Path(settings).write_text(SETTINGS.format(folders=folders, data=data), encoding="utf-8")
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", *arguments]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        core = {"COVERAGE_CORE": "sysmon"} if sys.version_info >= (3, 12) else {}
        status = subprocess.run(command, cwd=ROOT, env=kept | core).returncode
        seen = coverage.Coverage(config_file=settings)
        seen.combine([name])
        executed = executed_lines() if whole else {}
        paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
        return status, [_file(seen, path, executed.get(path.name, set())) for path in paths]


def _file(seen: Any, path: Path, executed: set[int]) -> File:
    _, lines, _, missing, _ = seen.analysis2(str(path))
    of_kernel = of_kernels(path.read_text(encoding="utf-8")) if path.parent.name == "kernels" else {}
    inside = set(of_kernel)
    elsewhere = {of_kernel[line] for line in executed & inside}
    return File(
        path.relative_to(ROOT).as_posix(),
        set(lines) - inside,
        set(missing) - inside,
        set(lines) & inside,
        set(missing) & inside - elsewhere,
    )


def executed_lines() -> dict[str, set[int]]:
    """The lines that executed PTX comes from, by the names of their files."""
    found = defaultdict(set)
    for chip, dtype in PTX:
        command = [sys.executable, "-m", "benchmarks.ptx", "--quick", "--json", "--chip", chip, "--dtype", dtype]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        for trial in json.loads(done.stdout):
            for file, line in (place.split(":") for place in trial["lines"]):
                found[file].add(int(line))
    return found


def spans(lines: set[int]) -> str:
    """Numbers as text: 3, 5-9."""
    found: list[list[int]] = []
    for line in sorted(lines):
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found)


def report(files: Sequence[File]) -> bool:
    """Print what runs; whether that is enough."""
    enough = True
    for package in PACKAGES:
        mine = [file for file in files if file.name.startswith(f"{package}/")]
        enough &= percent(mine) >= LEAST
        print(f"{package:<36}{sum(len(file.lines) for file in mine):>6} lines{percent(mine):>7.1f} % run")
        for file in mine:
            if percent([file]) < LEAST:
                print(
                    f"    {file.name:<32}{len(file.lines):>6}      {percent([file]):>7.1f} % not {spans(file.missing)}"
                )
    print(f"{'bodies of @triton.jit functions':<36}{sum(len(file.kernel) for file in files):>6} lines", end="")
    print(f"{sum(len(file.kernel_missing) for file in files):>9} never run")
    for file in files:
        if file.kernel_missing:
            print(f"    {file.name:<32} {spans(file.kernel_missing)}")
    return enough and not any(file.kernel_missing for file in files)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.lines", description=str(__doc__).partition("\n")[0])
    parser.add_argument("-n", default="2", metavar="JOBS", help="processes (default: %(default)s)")
    chosen, some = parser.parse_known_args(arguments)
    status, files = measured(["-n", chosen.n, *some], whole=not some)
    enough = report(files)
    return status or int(not some and not enough)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
