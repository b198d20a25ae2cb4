"""The threads: all of a batch of CTAs in step, basic block by basic block, masked where they diverge.

Of the groups of threads that wait to go on, the one that is least far in the text goes first: those that took a branch
and those that did not meet again behind it. A CTA's barrier lets its threads on when all that are alive wait there
(PTX ISA 9.7.13, *barrier*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.ptx.asynchronous import Asynchronous, Tensor
from benchmarks.ptx.findings import Findings, StoppedError
from benchmarks.ptx.memory import GlobalMemory, SharedMemory
from benchmarks.ptx.program import Program, ends_block
from benchmarks.ptx.values import UNSIGNED, Array, i4, i8, u4

LANES = 1024  # threads that run in step: the more, the less Python for each
MOST_STEPS = 100_000  # blocks that a batch may run through: more is a loop without end

# The order in which threads run: all in step, or each warp as far as it comes, from the first one on or the last.
IN_STEP, FIRST_WARP, LAST_WARP = 0, 1, -1

Mask = Any  # which threads: an array of bools, or None: all
Step = Callable[["Threads", Mask], None]


@dataclass
class Launch:
    """A launch on its way: its memory, parameters, and grid."""

    memory: GlobalMemory
    parameters: dict[str, bytes]
    tensors: dict[int, Tensor]  # descriptors, by their addresses
    grid: tuple[int, int, int]
    shared: int  # bytes a CTA
    findings: Findings


class Threads:
    """Registers and places of the threads of some CTAs of a launch."""

    def __init__(self, program: Program, launch: Launch, programs: Sequence[int]) -> None:
        self.program, self.launch, self.findings = program, launch, launch.findings
        self.size, self.ctas = program.threads, len(programs)
        self.warps, self.lanes = self.size // 32, self.size * self.ctas
        self.all = np.arange(self.lanes)
        self.cta = np.repeat(np.arange(self.ctas), self.size)
        thread = np.tile(np.arange(self.size, dtype=u4), self.ctas)
        self.warp, self.lane = (thread // 32).astype(i4), thread % u4(32)
        self.program_id = np.repeat(np.asarray(programs, u4), self.size)
        self.number = self.program_id * u4(self.size) + thread + u4(1)  # over the grid, from 1
        self.epoch = np.zeros(self.ctas, i4)
        x, y, z = map(u4, launch.grid)
        self.special: dict[str, Any] = {
            "%tid.x": thread, "%tid.y": u4(0), "%tid.z": u4(0), "%ntid.x": u4(self.size),
            "%laneid": self.lane, "%warpid": self.warp.astype(u4),
            "%ctaid.x": self.program_id % x, "%ctaid.y": self.program_id // x % y,
            "%ctaid.z": self.program_id // x // y,
            "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "%cluster_ctarank": u4(0),
        }  # fmt: skip
        self.memory = launch.memory
        self.shared = SharedMemory(self, launch.shared, program.granules["shared"])
        self.asynchronous = Asynchronous(self)
        # What nothing has written is all ones: NaN, of which a result shows.
        self.registers: list[Any] = []
        self.grow()

    def grow(self) -> None:
        """Give registers that were met since a place."""
        for size in self.program.sizes[len(self.registers) :]:
            self.registers.append(UNSIGNED[size](np.iinfo(UNSIGNED[size]).max) if size else np.bool_(False))

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
    """A kernel, ready to run: its instructions are made into functions when they are first met."""

    def __init__(self, text: str) -> None:
        self.program = Program(text)
        self._steps: dict[int, list[tuple[Step, int | None, bool, int]]] = {}
        self.ran: set[int] = set()  # lines of the instructions that some thread executed

    def run(self, launch: Launch, programs: Sequence[int] | None = None, order: int = IN_STEP) -> None:
        """Run the programs of a grid, in this order: all, first to last."""
        if programs is None:
            programs = range(launch.grid[0] * launch.grid[1] * launch.grid[2])
        batch = max(1, LANES // self.program.threads)
        threads = None
        for start in range(0, len(programs), batch):
            threads = Threads(self.program, launch, programs[start : start + batch])
            with np.errstate(all="ignore"):  # as on a GPU
                self._run(threads, order)
            threads.asynchronous.finish()
        if threads is not None:
            launch.memory.finish(threads)

    def _block(self, number: int, t: Threads) -> list[tuple[Step, int | None, bool, int]]:
        """The steps of a block without its end: (step, number of its predicate, whether that is negated, line)."""
        steps = self._steps.get(number)
        if steps is None:
            from benchmarks.ptx.instructions import step

            steps = []
            for one in self.program.block(number):
                predicate = None if one.predicate is None else self.program.register(one.predicate)
                if not ends_block(one):
                    steps.append((step(self.program, one), predicate, one.negated, one.line))
            self._steps[number] = steps
            t.grow()
        return steps

    def _run(self, t: Threads, order: int) -> None:
        flow = _Flow(t, order)
        for _ in range(MOST_STEPS):
            found = flow.next()
            if found is None:
                return
            number, mask = found
            if number >= self.program.blocks:
                flow.exit(mask)
                continue
            for run, predicate, negated, line in self._block(number, t):
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
        code = self.program.block(number)
        last = code[-1] if code else None
        if last is None or not ends_block(last):
            flow.add(number + 1, mask)
            return
        self.ran.add(last.line)
        there: Mask = mask
        stay: Mask = None
        if last.predicate is not None:
            value = t.full(t.registers[self.program.register(last.predicate) or 0])
            value = ~value if last.negated else value
            there = value if mask is None else value & mask
            stay = ~value if mask is None else ~value & mask
        if last.words[0] == "bra":
            target = self.program.block_at[self.program.labels[last.operands[0]]]
            flow.add(target, there, waits=target == number)
        elif last.words[0] in ("ret", "exit"):
            flow.exit(there)
        elif last.words[0] == "trap":
            t.found("trap", last.line)
            flow.exit(there)
        else:
            assert last.predicate is None, str(last)
            assert last.operands in (["0"], []), f"a barrier of some threads is not understood: {last}"
            flow.wait(number + 1, there)
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
            places = np.unique(self.waiting[(self.t.cta == cta) & go])
            if len(places) > 1:
                self.t.found("threads of a CTA meet at different barriers", 0, str(places))
        self.waiting[go] = -1
