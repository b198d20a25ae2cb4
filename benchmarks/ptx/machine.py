"""The threads: all of a batch of CTAs in step, basic block by basic block, masked where they diverge.

Of the groups of threads that wait to go on, the one that is least far in the text goes first: those that took a branch
and those that did not meet again behind it. A CTA's barrier lets its threads on when all that are alive wait there
(PTX ISA 9.7.13, *barrier*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.ptx.asynchronous import Asynchronous, TensorMap
from benchmarks.ptx.findings import Findings, StoppedError
from benchmarks.ptx.instructions import effect
from benchmarks.ptx.memory import GlobalMemory, SharedMemory
from benchmarks.ptx.program import Program, Statement, UnknownError, ends_block
from benchmarks.ptx.values import UNSIGNED, Array, i4, i8, u4

LANES = 1024  # threads that run in step: the more, the less Python for each
MOST_BLOCKS = 100_000  # blocks that a batch may run through: more is a loop without end

# The order in which threads run: all in step, or each warp as far as it comes, from the first one on or the last.
IN_STEP, FIRST_WARP, LAST_WARP = 0, 1, -1

Mask = Any  # which threads: an array of bools, or None: all
Effect = Callable[["Threads", Mask], None]  # of an instruction


@dataclass
class Grid:
    """The programs of one launch: how many, their memory and parameters."""

    memory: GlobalMemory
    parameters: dict[str, bytes]
    tensors: dict[int, TensorMap]  # by their addresses
    size: tuple[int, int, int]
    shared: int  # bytes a CTA
    findings: Findings


class Threads:
    """The threads of some CTAs of a grid, and what they hold."""

    def __init__(self, program: Program, grid: Grid, programs: Sequence[int]) -> None:
        self.program: Program = program
        self.grid: Grid = grid
        self.findings = grid.findings
        self.size: int = program.threads
        self.ctas = len(programs)
        self.warps, self.lanes = self.size // 32, self.size * self.ctas
        self.all = np.arange(self.lanes)
        self.cta = np.repeat(np.arange(self.ctas), self.size)
        self.thread: Array = np.tile(np.arange(self.size, dtype=u4), self.ctas)
        self.warp, self.lane = (self.thread // 32).astype(i4), self.thread % u4(32)
        self.program_id: Array = np.repeat(np.asarray(programs, u4), self.size)
        self.number = self.program_id * u4(self.size) + self.thread + u4(1)  # over the grid, from 1
        self.epoch = np.zeros(self.ctas, i4)
        self.memory: GlobalMemory = grid.memory
        self.shared: SharedMemory = SharedMemory(self, grid.shared, program.granules["shared"])
        self.asynchronous: Asynchronous = Asynchronous(self)
        # What nothing has written is all ones: NaN, of which a result shows.
        self.registers: list[Any] = [
            UNSIGNED[size](np.iinfo(UNSIGNED[size]).max) if size else np.bool_(False) for size in program.sizes
        ]

    # ---- for instructions ----

    def full(self, x: Any) -> Array:
        """A value for every thread, of one that may be the same for all."""
        return x if getattr(x, "shape", ()) == (self.lanes,) else np.broadcast_to(x, (self.lanes,))

    def active(self, mask: Mask) -> Array:
        """The numbers of the threads of a mask."""
        return self.all if mask is None else np.flatnonzero(mask)

    def epoch_of(self, lanes: Any) -> Any:
        """The epoch of these threads' CTAs."""
        return self.epoch[self.cta[lanes]]

    def put(self, register: int | None, value: Any, mask: Mask) -> None:
        """Write the bits of a register, of the right width, where the mask says."""
        if register is None:
            return
        if mask is not None:
            value = np.where(mask, value, self.registers[register])
        elif value.shape == (1,):
            value = value[0]
        self.registers[register] = value

    def put_rows(self, register: int, rows: Array, lanes: Array, mask: Mask) -> None:
        """Write a register of the ``lanes`` that the mask holds, an element each."""
        if mask is not None:
            new = np.array(self.full(self.registers[register]))
            new[lanes] = rows
            rows = new
        self.registers[register] = rows

    def whole_warps(self, mask: Mask, line: int, width: int = 32) -> Array:
        """The first lanes of the warps (or warpgroups) that a mask holds, which must hold none in part."""
        first = self.all[::width]
        if mask is None:
            return first
        groups = mask.reshape(-1, width)
        if (groups.any(1) != groups.all(1)).any():
            self.found(f"{'warp' if width == 32 else 'warpgroup'}-wide instruction for a part of it", line)
        return first[groups.any(1)]

    def found(self, what: str, line: int, detail: str = "") -> None:
        """Note a finding."""
        self.findings.add(what, self.program, line, detail)

    def tell(self, lane: Any) -> str:
        """Which thread."""
        return f"thread {lane % self.size} of program {self.program_id[lane]}"


class Machine:
    """A kernel, read and ready to run; raises :class:`.program.UnknownError` if something in it is not understood."""

    def __init__(self, text: str) -> None:
        self.program = program = Program(text)
        # Of each block (effect, number of its predicate, whether that is negated, line), and what ends it.
        self._effects: list[list[tuple[Effect, int | None, bool, int]]] = []
        self._ends: list[tuple[Statement | None, int | None]] = []
        for number in range(program.blocks):
            block = program.block(number)
            read = [(effect(program, one), self._predicate(one), one.negated, one.line) for one in block]
            ends = bool(block) and ends_block(block[-1])
            self._effects.append(read[:-1] if ends else read)
            self._ends.append((block[-1], read[-1][1]) if ends else (None, None))
        self.ran: set[int] = set()  # lines of the instructions that some thread executed

    def _predicate(self, one: Statement) -> int | None:
        if one.predicate is None:
            return None
        number = self.program.register(one.predicate)
        if number is None:
            raise UnknownError(f"a predicate that is not understood: @{one.predicate} {one}")
        return number

    def run(self, grid: Grid, programs: Sequence[int] | None = None, order: int = IN_STEP) -> None:
        """Run the programs of a grid, in this order: all, first to last."""
        if programs is None:
            programs = range(math.prod(grid.size))
        batch = max(1, LANES // self.program.threads)
        threads = None
        for start in range(0, len(programs), batch):
            threads = Threads(self.program, grid, programs[start : start + batch])
            with np.errstate(all="ignore"):  # as on a GPU
                self._run(threads, order)
            threads.asynchronous.finish()
        if threads is not None:
            grid.memory.finish(threads)

    def _run(self, t: Threads, order: int) -> None:
        flow = _Flow(t, order)
        for _ in range(MOST_BLOCKS):
            found = flow.next()
            if found is None:
                return
            number, mask = found
            if number >= self.program.blocks:
                flow.exit(mask)
                continue
            for run, predicate, negated, line in self._effects[number]:
                wanted = mask
                if predicate is not None:
                    value = t.registers[predicate]
                    wanted = t.full(~value if negated else value)
                    if mask is not None:
                        wanted = wanted & mask
                    if wanted.all():
                        wanted = None
                    elif not wanted.any():
                        continue
                self.ran.add(line)
                run(t, wanted)
            self._end(flow, number, mask, t)
        raise StoppedError(f"{self.program.name} does not end")

    def _end(self, flow: _Flow, number: int, mask: Mask, t: Threads) -> None:
        last, predicate = self._ends[number]
        if last is None:
            flow.add(number + 1, mask)
            return
        self.ran.add(last.line)
        there: Mask = mask
        stay: Mask = None
        if predicate is not None:
            value = t.full(t.registers[predicate])
            value = ~value if last.negated else value
            there = value if mask is None else value & mask
            stay = ~value if mask is None else ~value & mask
        if last.words[0] == "bra":
            target = self.program.block_at[self.program.labels[last.operands[0]]]
            flow.add(target, there, waits=target == number)
        elif last.words[0] in ("bar", "barrier"):
            flow.wait(number + 1, there)
        else:
            if last.words[0] == "trap":
                t.found("trap", last.line)
            flow.exit(there)
        if stay is not None:
            flow.add(number + 1, stay)


class _Flow:
    """Who goes on where: all threads in step, or warp by warp, each as far as it comes."""

    def __init__(self, t: Threads, order: int) -> None:
        self.t, self.order = t, order
        self.groups: dict[tuple[int, int], Mask] = {}  # by the turn of a warp, and the block
        self.resting: set[int] = set()  # turns of warps that wait in a loop for what another one does
        self.alive = np.ones(t.lanes, bool)
        self.waiting = np.full(t.lanes, -1, i8)  # for the others of the CTA, to go on at this block
        self.add(0, None)

    def next(self) -> tuple[int, Mask] | None:
        """The group whose turn it is: of the first warp's threads those that are least far."""
        if not self.groups:
            return None
        if self.order == IN_STEP:
            key = min(self.groups)
            return key[1], self.groups.pop(key)
        for key in sorted(self.groups, key=lambda key: (key[0] in self.resting, key)):
            group = self._full(self.groups[key])
            mask = group
            if key[1] in self.t.program.meetings:  # a warpgroup meets before its instructions
                whole = (mask | ~self.alive).reshape(-1, min(128, self.t.size)).all(1)
                mask = mask & np.repeat(whole, min(128, self.t.size))
            if mask.any():
                del self.groups[key]
                rest = group & ~mask
                if rest.any():
                    self.groups[key] = rest
                if key[0] in self.resting:  # as are all others
                    self.resting.clear()
                return key[1], mask
        raise StoppedError("a warpgroup that does not meet")

    def add(self, number: int, mask: Mask, waits: bool = False) -> None:
        """These threads go on at a block; if that is the one they come from, they may wait for others there."""
        if mask is not None and not mask.any():
            return
        if self.order == IN_STEP:
            self._join((0, number), mask)
            return
        for warp in range(self.t.warps):
            part = (self.t.warp == warp) & self._full(mask)
            if part.any():
                turn = self.order * (warp // 4 * 4 if number in self.t.program.meetings else warp)
                self._join((turn, number), part)
                if waits:
                    self.resting.add(turn)

    def _full(self, mask: Mask) -> Array:
        return self.alive if mask is None else mask

    def _join(self, key: tuple[int, int], mask: Mask) -> None:
        if key in self.groups:
            there = self.groups[key]
            mask = None if mask is None or there is None else mask | there
        self.groups[key] = None if mask is None or mask.all() else mask

    def exit(self, mask: Mask) -> None:
        """These threads end."""
        self.alive &= False if mask is None else ~mask
        self._release()

    def wait(self, number: int, mask: Mask) -> None:
        """These threads reach a barrier behind which a block begins."""
        self.waiting[self.alive if mask is None else mask] = number
        self._release()

    def _release(self) -> None:
        waits = self.waiting >= 0
        if not waits.any():
            return
        shape = self.t.ctas, self.t.size
        ready = (waits | ~self.alive).reshape(shape).all(1) & waits.reshape(shape).any(1)
        self.t.epoch += ready
        go = waits & np.repeat(ready, self.t.size)
        for number in np.unique(self.waiting[go]):
            self.add(int(number), go & (self.waiting == number))
        for cta in np.flatnonzero(ready):
            blocks = np.unique(self.waiting[(self.t.cta == cta) & go])
            if len(blocks) > 1:
                self.t.found("threads of a CTA meet at different barriers", 0, f"before blocks {blocks}")
        self.waiting[go] = -1
