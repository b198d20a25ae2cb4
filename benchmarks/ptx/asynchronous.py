"""What goes on beside the threads: copies into shared memory, bulk tensor copies, and the products of warpgroups.

Everything arrives as late as the PTX ISA allows: what ``cp.async`` copies at the ``wait_group`` that covers it, what a
bulk copy brings when somebody waits for its ``mbarrier``, the sums of ``wgmma`` at the wait that covers them (their
registers are NaN until then). So whoever does not wait, or waits for one group too few, sees what a GPU may show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ptx.findings import StoppedError
from benchmarks.ptx.memory import ASYNCHRONOUS
from benchmarks.ptx.values import UNSIGNED, Array, i4, i8, u1, u4

if TYPE_CHECKING:
    from benchmarks.ptx.machine import Mask, Threads

_UNDELIVERED = u4(0x7FC0DEAD)  # a NaN in float32, and in both halves as bfloat16


@dataclass(frozen=True)
class Tensor:
    """What a tensor map says (PTX ISA 5.5): outermost dimension first, strides in elements."""

    address: int
    element: int  # bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    swizzle: int  # 0: none, else of 16 << swizzle bytes
    fill: bytes  # an element out of bounds

    @property
    def bytes(self) -> int:
        """Of a block."""
        return int(np.prod(self.block)) * self.element


@dataclass
class Barrier:
    """An ``mbarrier`` object (9.7.13, *mbarrier*)."""

    count: int
    warp: int  # that made it, and when
    epoch: int
    pending: int = 0
    bytes: int = 0  # expected, less those that arrived
    phase: int = 0
    copies: list[_Copy] = field(default_factory=list)  # under way
    delivered: list[Array] = field(default_factory=list)  # granules, in the last phase
    waited: dict[int, int] = field(default_factory=dict)  # the epoch in which each warp last waited

    def turn(self) -> None:
        """Begin the next phase if this one is complete."""
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass
class _Copy:
    """A bulk copy into shared memory that is under way."""

    lane: int
    tensor: Tensor
    corner: list[int]
    address: Array  # of its 16-byte pieces
    granules: Array
    line: int


@dataclass
class _Read:
    """Shared memory that an asynchronous instruction of a thread, or of a warpgroup, reads."""

    lanes: Array  # one of each warp
    group: int
    granules: Array


@dataclass
class _Sums:
    """The accumulators of some warpgroups between a ``wgmma`` and its wait."""

    values: Array  # (registers, lanes) float32
    registers: list[int]
    marks: list[Any]  # what lies in the registers meanwhile
    group: Array  # of the last one that adds to them, by lane; −1: not under way
    operands: list[tuple[Array, int, Any, int]]  # (groups, register, what was in it, line): what is read meanwhile


def swizzled(address: Array, mode: int) -> Array:
    """Where bytes of shared memory lie: bits 4… exchanged with bits 7… (5.5, swizzling modes of 32, 64, 128 bytes)."""
    result: Array = address ^ ((address >> 7 & (1 << mode) - 1) << 4) if mode else address
    return result


class Asynchronous:
    """All that is under way for a batch of CTAs."""

    def __init__(self, t: Threads) -> None:
        self.t = t
        self.copies: list[tuple[Array, Array, Array, Array, Array, int]] = []  # cp.async, by lane
        self.committed = np.zeros(t.lanes, i4)  # groups of cp.async, by lane
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.bulk_committed = np.zeros(t.lanes, i4)
        self.bulk_reads: list[_Read] = []
        self.sums: list[_Sums] = []
        self.products_committed = np.zeros(t.lanes, i4)
        self.product_reads: list[_Read] = []
        self._spins = 0
        self._operands: dict[Any, tuple[Array, Array]] = {}

    def finish(self) -> None:
        """All threads have ended."""
        shared = [barrier.copies for barrier in self.barriers.values() if barrier.copies]
        if self.copies or shared or self.bulk_reads or self.product_reads or self.sums:
            self.t.found("asynchronous work is under way when the program ends", 0)

    # ---- cp.async: 9.7.9, Data Movement and Conversion Instructions ----

    def copy(self, to: Array, source: Array, size: int, wanted: Array, lanes: Array, line: int) -> None:
        """cp.async: begin to copy ``size`` bytes a lane, of which the first ``wanted`` come from global memory and the
        rest are 0."""
        t, shared = self.t, self.t.shared
        data = np.zeros((len(lanes), size), u1)
        if (wanted > size).any():
            t.found("cp.async of more bytes than it writes", line)
        for part in np.unique(wanted[(wanted > 0) & (wanted <= size)]):
            which = wanted == part
            data[which, :part] = t.memory.load(t, source[which], int(part), lanes[which], line)
        address = shared.place(to, size, lanes, line)
        granules = shared.granules(address, size)
        shared.write(granules, lanes, line, arrives=True)
        shared.begin_arrival(granules)
        self.copies.append((lanes, self.committed[lanes], address, data, granules, line))

    def commit_copies(self, mask: Mask) -> None:
        """cp.async.commit_group."""
        self.committed = self.committed + (1 if mask is None else mask)

    def wait_copies(self, most: int | None, mask: Mask) -> None:
        """cp.async.wait_group: all but the last ``most`` groups arrive; cp.async.wait_all (None): all copies."""
        shared, kept = self.t.shared, []
        for lanes, group, address, data, granules, line in self.copies:
            done = np.ones(len(lanes), bool) if most is None else group < self.committed[lanes] - most
            if mask is not None:
                done &= mask[lanes]
            if not done.all():
                rest = ~done
                kept.append((lanes[rest], group[rest], address[rest], data[rest], granules[rest], line))
            if done.any():
                shared.arrive(granules[done])
                shared.write(granules[done], lanes[done], line)
                shared.data[address[done][:, None] + np.arange(data.shape[1])] = data[done]
        self.copies = kept

    # ---- mbarrier: 9.7.13, Parallel Synchronization and Communication Instructions ----

    def _barrier(self, lanes: Array, address: Array, line: int) -> Barrier:
        """The object at the address of the first of these lanes, which are of one CTA."""
        t = self.t
        barrier = self.barriers.get((int(t.cta[lanes[0]]), int(address[lanes[0]])))
        if barrier is None:
            t.found("use of an mbarrier where none is", line)
            raise StoppedError("use of an mbarrier where none is")
        if barrier.epoch == t.epoch_of(lanes[0]) and (t.warp[lanes] != barrier.warp).any():
            t.found("shared race: an mbarrier that another warp made, no barrier between", line)
        return barrier

    def make(self, address: Array, count: int, lanes: Array, line: int) -> None:
        """mbarrier.init."""
        t = self.t
        for lane in lanes:
            self.barriers[int(t.cta[lane]), int(address[lane])] = Barrier(
                count, int(t.warp[lane]), int(t.epoch_of(lane)), count
            )

    def unmake(self, address: Array, lanes: Array, line: int) -> None:
        """mbarrier.inval."""
        t = self.t
        for lane in lanes:
            barrier = self._barrier(np.array([lane]), address, line)
            if barrier.copies:
                t.found("mbarrier.inval while a copy is under way", line)
            others = {warp for warp, epoch in barrier.waited.items() if epoch == t.epoch_of(lane)} - {int(t.warp[lane])}
            if others:
                t.found("shared race: mbarrier.inval while another warp may wait, no barrier between", line)
            del self.barriers[int(t.cta[lane]), int(address[lane])]

    def arrive(self, address: Array, count: int, expected: int, lanes: Array, line: int) -> None:
        """mbarrier.arrive, and with ``expected`` bytes of copies mbarrier.arrive.expect_tx."""
        for lane in lanes:
            barrier = self._barrier(np.array([lane]), address, line)
            barrier.bytes += expected
            barrier.pending -= count
            if barrier.pending < 0:
                self.t.found("more arrive at an mbarrier than it waits for", line)
            barrier.turn()

    def wait(self, address: Array, parity: Array, lanes: Array, line: int) -> Array:
        """mbarrier.try_wait.parity: whether the phase is complete, by lane. What it waits for arrives now."""
        t, shared = self.t, self.t.shared
        done = np.zeros(t.lanes, bool)
        which = t.cta[lanes].astype(i8) << 40 | address[lanes].astype(i8) << 1 | (parity[lanes] & 1).astype(i8)
        for one in np.unique(which):
            waiting = lanes[which == one]
            barrier = self._barrier(waiting, address, line)
            if barrier.phase == int(parity[waiting[0]]) & 1 and barrier.copies:
                copies, barrier.copies, barrier.delivered = barrier.copies, [], []
                for copy in copies:
                    self._deliver(copy)
                    barrier.bytes -= copy.tensor.bytes
                    barrier.delivered.append(copy.granules)
                barrier.turn()
            if barrier.phase != int(parity[waiting[0]]) & 1:
                done[waiting] = True
                warps = np.unique(t.warp[waiting])
                barrier.waited.update(dict.fromkeys(map(int, warps), int(t.epoch_of(waiting[0]))))
                bits = u4(sum(1 << int(warp) for warp in warps))
                for granules in barrier.delivered:
                    shared.acquired[granules] |= bits
        self._spins = 0 if done[lanes].all() else self._spins + 1
        if self._spins > 1000:
            t.found("an mbarrier whose phase is never complete", line)
            raise StoppedError("an mbarrier whose phase is never complete")
        return done

    # ---- cp.async.bulk.tensor: 9.7.9 ----

    def _tensor(self, address: Any, line: int) -> Tensor:
        tensor = self.t.launch.tensors.get(int(address))
        if tensor is None:
            self.t.found("bulk copy without a tensor map", line)
            raise StoppedError("bulk copy without a tensor map")
        return tensor

    def _box(self, tensor: Tensor, corner: list[int], line: int) -> tuple[Array, Array]:
        """Of a block's elements: where they lie in the region, in elements; and which are within the tensor."""
        rank = len(tensor.shape)
        offset, inside = np.zeros((1,) * rank, i8), np.ones((1,) * rank, bool)
        for k in range(rank):  # coordinates come innermost first
            shape = [-1 if k == other else 1 for other in range(rank)]
            i = corner[rank - 1 - k] + np.arange(tensor.block[k], dtype=i8).reshape(shape)
            offset = offset + i * tensor.strides[k]
            inside = inside & (i >= 0) & (i < tensor.shape[k])
        region = self.t.memory.region(tensor.address)
        offset = (offset + (tensor.address & (1 << 40) - 1) // tensor.element).ravel()
        inside = np.broadcast_to(inside, tensor.block).ravel()
        last = len(region.data) // tensor.element
        if inside.any() and (offset[inside].min() < 0 or offset[inside].max() >= last):
            self.t.found("global access out of bounds", line, f"a tensor map reaches beyond {region.name}")
            raise StoppedError("a tensor map reaches beyond its tensor")
        return offset, inside

    def _pieces(self, tensor: Tensor, address: int, lane: int, line: int) -> Array:
        """Where in shared memory the 16-byte pieces of a block lie."""
        t = self.t
        if address % (128 << tensor.swizzle if tensor.swizzle else 128):
            t.found("bulk copy to a shared address that is not aligned", line, hex(address))
        ends = np.array([address, address + tensor.bytes - 16])
        t.shared.place(ends, 16, np.array([lane, lane]), line)
        place = address + 16 * np.arange(tensor.bytes // 16, dtype=i8)
        return swizzled(place, tensor.swizzle) + t.shared.base[lane]

    def _owners(self, lane: int, count: int) -> Array:
        return np.full(count, lane)

    def load(self, to: Array, tensors: Array, corner: list[Array], barriers: Array, lanes: Array, line: int) -> None:
        """cp.async.bulk.tensor into shared memory: begin; the mbarrier is told."""
        shared = self.t.shared
        for lane in map(int, lanes):
            tensor = self._tensor(tensors[lane], line)
            barrier = self._barrier(np.array([lane]), barriers, line)
            address = self._pieces(tensor, int(to[lane]), lane, line)
            granules = shared.granules(address, 16)
            shared.check_fenced(granules, line)
            shared.write(granules, self._owners(lane, len(granules)), line, arrives=True)
            shared.begin_arrival(granules)
            barrier.copies.append(_Copy(lane, tensor, [int(c[lane]) for c in corner], address, granules, line))

    def _deliver(self, copy: _Copy) -> None:
        t, tensor = self.t, copy.tensor
        shared, region = t.shared, t.memory.region(tensor.address)
        kind = UNSIGNED[tensor.element]
        offset, inside = self._box(tensor, copy.corner, copy.line)
        data = np.frombuffer(tensor.fill * len(offset), kind).copy()
        data[inside] = region.view(tensor.element)[offset[inside]]
        granules = offset[inside] * tensor.element // t.memory.granule
        t.memory.read(t, region, granules[:, None], self._owners(copy.lane, len(granules)), copy.line)
        shared.arrive(copy.granules)
        shared.view(16)[copy.address // 16] = data.view("V16")
        shared.writer[copy.granules] = int(t.epoch_of(copy.lane)) << 8 | ASYNCHRONOUS
        shared.acquired[copy.granules] = 0

    def store(self, source: Array, tensors: Array, corner: list[Array], lanes: Array, line: int) -> None:
        """cp.async.bulk.tensor from shared memory: what lies there now is written; it is read until the wait."""
        t, shared = self.t, self.t.shared
        for lane in map(int, lanes):
            tensor = self._tensor(tensors[lane], line)
            address = self._pieces(tensor, int(source[lane]), lane, line)
            granules = shared.granules(address, 16)
            shared.check_fenced(granules, line)
            shared.read(granules, self._owners(lane, len(granules)), line, "bulk copy")
            shared.begin_reading(granules)
            self.bulk_reads.append(_Read(np.array([lane]), int(self.bulk_committed[lane]), granules))
            data = np.ascontiguousarray(shared.view(16)[address // 16]).view(UNSIGNED[tensor.element])
            offset, inside = self._box(tensor, [int(c[lane]) for c in corner], line)
            region = t.memory.region(tensor.address)
            place = offset[inside]
            written = (place * tensor.element // t.memory.granule)[:, None]
            if len(place):
                owners = self._owners(lane, len(place))
                t.memory.wrote(t, region, written, owners, line, region.view(tensor.element), place, data[inside])

    def commit_bulk(self, mask: Mask) -> None:
        """cp.async.bulk.commit_group."""
        self.bulk_committed = self.bulk_committed + (1 if mask is None else mask)

    def wait_bulk(self, most: int, mask: Mask) -> None:
        """cp.async.bulk.wait_group."""
        self.bulk_reads = self._waited(self.bulk_reads, self.bulk_committed - most, mask)

    def _waited(self, reads: list[_Read], until: Array, mask: Mask) -> list[_Read]:
        """End the reads of groups before ``until``, by lane; the others."""
        kept = []
        for read in reads:
            lane = read.lanes[0]
            if (mask is None or mask[lane]) and read.group < until[lane]:
                self.t.shared.end_reading(read.granules, read.lanes)
            else:
                kept.append(read)
        return kept

    # ---- wgmma: 9.7.15, Asynchronous Warpgroup Level Matrix Instructions ----

    def matrix(
        self, descriptor: int, rows: int, columns: int, size: int, transposed: bool, lane: int, line: int
    ) -> Array:
        """The bits of the matrix (rows, columns of the reduction) that a descriptor says where in shared memory is.

        Its fields: address, leading and stride byte offset, base offset, swizzling mode. Without swizzle, and with,
        a core matrix is 8 rows of 16 bytes; transposed, the reduction is the slower dimension.
        """
        t, shared = self.t, self.t.shared
        key = descriptor, rows, columns, size, transposed
        if key not in self._operands:
            start, leading, stride = ((descriptor >> place & 0x3FFF) << 4 for place in (0, 16, 32))
            mode = (0, 3, 2, 1)[descriptor >> 62 & 3]
            assert not descriptor >> 49 & 7, "a matrix descriptor with a base offset is not understood"
            i, k = np.arange(rows, dtype=i8)[:, None], np.arange(columns, dtype=i8)[None, :]
            width = 16 << mode
            if not transposed and mode == 0:
                place = i % 8 * 16 + i // 8 * stride + k * size // 16 * leading + k * size % 16
            elif not transposed:
                place = i % 8 * width + i // 8 * stride + k * size
            elif mode == 0:
                place = i * size // 16 * stride + k % 8 * 16 + k // 8 * leading + i * size % 16
            else:
                place = i * size % width + i * size // width * leading + k % 8 * width + k // 8 * stride
            place = swizzled(start + place, mode)
            if place.min() < 0 or place.max() + size > shared.size:
                t.found("shared access out of bounds", line, "a matrix descriptor")
                raise StoppedError("shared access out of bounds")
            self._operands[key] = place, np.unique(place // shared.granule)
        place, granules = self._operands[key]
        base = int(shared.base[lane])
        granules = granules + base // shared.granule
        warps = lane + 32 * np.arange(4)
        shared.check_fenced(granules, line)
        for warp in warps:
            shared.read(granules[:, None], self._owners(int(warp), len(granules)), line, "wgmma")
        shared.begin_reading(granules)
        self.product_reads.append(_Read(warps, int(self.products_committed[lane]), granules))
        return shared.view(size)[(place + base) // size]

    def add_product(
        self,
        registers: list[int],
        product: Callable[[], Array],
        kept: Any,
        first: Array,
        operands: list[int],
        line: int,
    ) -> None:
        """wgmma.mma_async: sums ← product + kept · sums, (registers, lanes), for warpgroups by their first lanes."""
        t = self.t
        lanes = (first[:, None] + np.arange(128)).ravel()
        sums = next((s for s in self.sums if s.registers == registers), None)
        if any(s is not sums and set(s.registers) & set(registers) for s in self.sums):
            t.found("wgmma adds to registers of another one that is under way", line)
        if sums is None:
            values = np.stack([t.full(t.registers[r]) for r in registers]).view(np.float32)
            sums = _Sums(values, registers, [None] * len(registers), np.full(t.lanes, -1, i4), [])
            self.sums.append(sums)
        elif (sums.group[lanes] < 0).any():  # of other warpgroups
            idle = sums.group < 0
            for row, register in zip(sums.values, registers, strict=True):
                row[idle] = t.full(t.registers[register]).view(np.float32)[idle]
        added = product()
        old = sums.values[:, lanes]
        sums.values[:, lanes] = added + np.where(t.full(kept)[lanes], old, np.float32(0))
        sums.group[lanes] = self.products_committed[lanes]
        groups = np.where(np.isin(t.all, lanes), self.products_committed, -1)
        sums.operands += [(groups, register, t.registers[register], line) for register in operands]
        under_way = sums.group >= 0
        for i, register in enumerate(registers):
            t.registers[register] = np.where(under_way, _UNDELIVERED, t.full(t.registers[register]))
            sums.marks[i] = t.registers[register]

    def commit_products(self, mask: Mask) -> None:
        """wgmma.commit_group."""
        self.products_committed = self.products_committed + (1 if mask is None else mask)

    def wait_products(self, most: int, mask: Mask, line: int) -> None:
        """wgmma.wait_group: the sums that all but the last ``most`` groups add to are there."""
        t, until = self.t, self.products_committed - most
        self.product_reads = self._waited(self.product_reads, until, mask)
        kept = []
        for sums in self.sums:
            held = []
            for groups, register, value, at in sums.operands:
                if t.registers[register] is not value:
                    t.found("a register is rewritten while a wgmma reads it", at)
                elif (groups >= until).any():
                    held.append((groups, register, value, at))
            sums.operands = held
            done = (sums.group >= 0) & (sums.group < until)
            if mask is not None:
                done &= mask
            if not done.any():
                kept.append(sums)
                continue
            for i, register in enumerate(sums.registers):
                if t.registers[register] is not sums.marks[i]:
                    t.found("a register is rewritten while a wgmma adds to it", line)
                values = sums.values[i].view(u4)
                t.registers[register] = values if done.all() else np.where(done, values, t.full(t.registers[register]))
                sums.marks[i] = t.registers[register]
            sums.group[done] = -1
            if (sums.group >= 0).any():
                kept.append(sums)
        self.sums = kept
