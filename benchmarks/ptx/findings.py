"""What is found wrong while a kernel runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.ptx.program import Program


class StoppedError(Exception):
    """A kernel cannot go on: it would crash or hang on a GPU."""


@dataclass
class Finding:
    """Something wrong at one instruction of one kernel, however often it happened."""

    what: str
    kernel: str
    line: int  # of the PTX
    instruction: str
    source: str  # file and line of the kernel's source
    detail: str  # of the first time
    times: int = 1

    def __str__(self) -> str:
        where = f"{self.kernel} ({self.source}), PTX line {self.line}: {self.instruction}"
        return f"{self.what}: {where}; {self.detail} ({self.times} times)"


class Findings:
    """The findings of some launches."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, int], Finding] = {}

    def add(self, what: str, program: Program, line: int, detail: str = "") -> None:
        """Note it; the same at the same instruction is counted."""
        key = what, program.name, line
        known = self._found.get(key)
        if known is None:
            text = program.lines[line - 1].strip() if line else ""
            self._found[key] = Finding(what, program.name, line, text, program.sources.get(line, "?"), detail)
        else:
            known.times += 1

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)
