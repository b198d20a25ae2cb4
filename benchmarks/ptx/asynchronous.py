"""What goes on beside the threads: copies into shared memory, bulk tensor copies, and the products of warpgroups.

Everything arrives as late as the PTX ISA allows: what ``cp.async`` copies at the ``wait_group`` that covers it, what a
bulk copy brings when somebody waits for its ``mbarrier``, the sums of ``wgmma`` at the wait that covers them (their
registers are NaN until then). So whoever does not wait, or waits for one group too few, sees what a GPU may show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ptx.findings import StoppedError
from benchmarks.ptx.memory import ASYNCHRONOUS
from benchmarks.ptx.values import UNSIGNED, Array, f4, i4, i8, u1, u4

if TYPE_CHECKING:
    from benchmarks.ptx.machine import Mask, Threads

_UNDELIVERED = u4(0x7FC0DEAD)  # a NaN in float32, and in both halves as bfloat16


@dataclass(frozen=True)
class TensorMap:
    """A tensor map (PTX ISA 5.5): outermost dimension first, strides in elements."""

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
    tensor: TensorMap
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
    finish: Callable[[], None] = lambda: None  # what it does, as late as may be


@dataclass
class _Product:
    """A ``wgmma`` that is under way: sums ← product + kept · sums."""

    first: Array  # lanes of its warpgroups
    group: Array  # of each
    kept: Array
    compute: Callable[[Array], Array]  # for some of the warpgroups: (registers, lanes)
    operands: list[tuple[int, Array]]  # registers that it reads, and what was in them
    line: int


@dataclass
class _Sums:
    """The accumulators of some warpgroups between a ``wgmma`` and its wait."""

    values: Array  # (registers, lanes) float32
    registers: list[int]
    under_way: Array  # lanes
    products: list[_Product] = field(default_factory=list)  # in their order


def swizzled(address: Array, mode: int) -> Array:
    """Where bytes of shared memory lie: bits 4… exchanged with bits 7… (5.5, swizzling modes of 32, 64, 128 bytes)."""
    result: Array = address ^ ((address >> 7 & (1 << mode) - 1) << 4) if mode else address
    return result


class Asynchronous:
    """All that is under way for a batch of CTAs."""

    def __init__(self, t: Threads) -> None:
        self.t = t
        self.copies: list[tuple[Array, Array, Array, Array, Array, int]] = []  # cp.async, by lane
        # Groups of cp.async, of bulk copies and of wgmma that were committed, by lane.
        self.committed = {what: np.zeros(t.lanes, i4) for what in ("copies", "bulk", "products")}
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.bulk_reads: list[_Read] = []
        self.sums: list[_Sums] = []
        self.fenced: dict[int, Any] = {}  # the registers at the last wgmma.fence
        self.product_reads: list[_Read] = []
        self._spins = 0
        self._matrices: dict[Any, tuple[Array, Array]] = {}

    def commit(self, what: str, mask: Mask) -> None:
        """The commit_group of cp.async, of bulk copies, or of wgmma."""
        self.committed[what] = self.committed[what] + (1 if mask is None else mask)

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
        address = shared.locate(to, size, lanes, line)
        granules = shared.granules(address, size)
        shared.write(granules, lanes, line, arrives=True)
        shared.begin_arrival(granules)
        self.copies.append((lanes, self.committed["copies"][lanes], address, data, granules, line))

    def wait_copies(self, most: int | None, mask: Mask) -> None:
        """cp.async.wait_group: all but the last ``most`` groups arrive; cp.async.wait_all (None): all copies."""
        shared, kept = self.t.shared, []
        for lanes, group, address, data, granules, line in self.copies:
            done = np.ones(len(lanes), bool) if most is None else group < self.committed["copies"][lanes] - most
            if mask is not None:
                done &= mask[lanes]
            if not done.all():
                rest = ~done
                kept.append((lanes[rest], group[rest], address[rest], data[rest], granules[rest], line))
            if done.any():
                shared.arrive(granules[done])
                shared.write(granules[done], lanes[done], line)
                shared.data[address[done][:, None] + np.arange(data.shape[1])] = data[done]
                shared.unfenced[granules[done]] = True
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
            t, warp = self.t, int(self.t.warp[lane])
            if any(epoch == t.epoch_of(lane) for other, epoch in barrier.waited.items() if other != warp):
                t.found("shared race: an mbarrier begins a phase while another warp may wait for the last one", line)
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

    def _tensor(self, address: Any, line: int) -> TensorMap:
        tensor = self.t.grid.tensors.get(int(address))
        if tensor is None:
            self.t.found("bulk copy without a tensor map", line)
            raise StoppedError("bulk copy without a tensor map")
        return tensor

    def _box(self, tensor: TensorMap, corner: list[int], line: int) -> tuple[Array, Array]:
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

    def _pieces(self, tensor: TensorMap, address: int, lane: int, line: int) -> Array:
        """Where in shared memory the 16-byte pieces of a block lie."""
        t = self.t
        if address % (128 << tensor.swizzle if tensor.swizzle else 128):
            t.found("bulk copy to a shared address that is not aligned", line, hex(address))
        ends = np.array([address, address + tensor.bytes - 16])
        t.shared.locate(ends, 16, np.array([lane, lane]), line)
        pieces = address + 16 * np.arange(tensor.bytes // 16, dtype=i8)
        return swizzled(pieces, tensor.swizzle) + t.shared.base[lane]

    def load(self, to: Array, tensors: Array, corner: list[Array], barriers: Array, lanes: Array, line: int) -> None:
        """cp.async.bulk.tensor into shared memory: begin; the mbarrier is told."""
        shared = self.t.shared
        for lane in map(int, lanes):
            tensor = self._tensor(tensors[lane], line)
            barrier = self._barrier(np.array([lane]), barriers, line)
            address = self._pieces(tensor, int(to[lane]), lane, line)
            granules = shared.granules(address, 16)
            shared.check_fenced(granules, line)
            shared.write(granules, np.full(len(granules), lane), line, arrives=True)
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
        t.memory.read(t, region, granules[:, None], np.full(len(granules), copy.lane), copy.line)
        shared.arrive(copy.granules)
        for asynchronous in (False, True):
            shared.view(16, asynchronous)[copy.address // 16] = data.view("V16")
        shared.writer[copy.granules] = int(t.epoch_of(copy.lane)) << 8 | ASYNCHRONOUS
        shared.acquired[copy.granules] = 0

    def store(self, source: Array, tensors: Array, corner: list[Array], lanes: Array, line: int) -> None:
        """cp.async.bulk.tensor from shared memory, which is read, and written to the tensor, at the wait."""
        shared = self.t.shared
        for lane in map(int, lanes):
            tensor = self._tensor(tensors[lane], line)
            address = self._pieces(tensor, int(source[lane]), lane, line)
            granules = shared.granules(address, 16)
            shared.check_fenced(granules, line)
            shared.read(granules, np.full(len(granules), lane), line, "bulk copy")
            shared.begin_reading(granules)
            at = [int(c[lane]) for c in corner]
            finish = functools.partial(self._write_tensor, tensor, address, at, lane, line)
            self.bulk_reads.append(_Read(np.array([lane]), int(self.committed["bulk"][lane]), granules, finish))

    def _write_tensor(self, tensor: TensorMap, address: Array, corner: list[int], lane: int, line: int) -> None:
        t = self.t
        data = np.ascontiguousarray(t.shared.view(16, asynchronous=True)[address // 16])
        offset, inside = self._box(tensor, corner, line)
        region, index = t.memory.region(tensor.address), offset[inside]
        if len(index):
            granules = (index * tensor.element // t.memory.granule)[:, None]
            new = data.view(UNSIGNED[tensor.element])[inside]
            owners = np.full(len(index), lane)
            t.memory.wrote(t, region, granules, owners, line, region.view(tensor.element), index, new)

    def wait_bulk(self, most: int, mask: Mask) -> None:
        """cp.async.bulk.wait_group."""
        self.bulk_reads = self._waited(self.bulk_reads, self.committed["bulk"] - most, mask)

    def _waited(self, reads: list[_Read], until: Array, mask: Mask) -> list[_Read]:
        """End the reads of groups before ``until``, by lane; the others."""
        kept = []
        for read in reads:
            lane = read.lanes[0]
            if (mask is None or mask[lane]) and read.group < until[lane]:
                read.finish()
                self.t.shared.end_reading(read.granules, read.lanes)
            else:
                kept.append(read)
        return kept

    # ---- wgmma: 9.7.15, Asynchronous Warpgroup Level Matrix Instructions ----

    def _matrix(self, descriptor: int, rows: int, columns: int, size: int, transposed: bool) -> tuple[Array, Array]:
        """Where in a CTA's window the elements (rows, columns of the reduction) of a matrix are, and their granules.

        The fields of a descriptor: address, leading and stride byte offset, base offset, swizzling mode. A core matrix
        is 8 rows of 16 bytes, or of the width of the swizzle; transposed, the reduction is the slower dimension.
        """
        key = descriptor, rows, columns, size, transposed
        if key not in self._matrices:
            start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
            mode = (0, 3, 2, 1)[descriptor >> 62 & 3]
            assert not descriptor >> 49 & 7, "a matrix descriptor with a base offset is not understood"
            i, k = np.arange(rows, dtype=i8)[:, None], np.arange(columns, dtype=i8)[None, :]
            width = 16 << mode
            if not transposed and mode == 0:
                address = i % 8 * 16 + i // 8 * stride + k * size // 16 * leading + k * size % 16
            elif not transposed:
                address = i % 8 * width + i // 8 * stride + k * size
            elif mode == 0:
                address = i * size // 16 * stride + k % 8 * 16 + k // 8 * leading + i * size % 16
            else:
                address = i * size % width + i * size // width * leading + k % 8 * width + k // 8 * stride
            address = swizzled(start + address, mode)
            self._matrices[key] = address, np.unique(address // self.t.shared.granule)
        return self._matrices[key]

    def begin_matrix(self, descriptor: Any, shape: tuple[int, int, int, bool], lane: int, line: int) -> None:
        """A warpgroup, from ``lane`` on, begins to read a matrix: (rows, columns, bytes of an element, transposed)."""
        t, shared = self.t, self.t.shared
        address, granules = self._matrix(int(descriptor), *shape)
        if address.min() < 0 or address.max() + shape[2] > shared.size:
            t.found("shared access out of bounds", line, "a matrix descriptor")
            raise StoppedError("shared access out of bounds")
        granules = granules + int(shared.base[lane]) // shared.granule
        warps = lane + 32 * np.arange(4)
        shared.check_fenced(granules, line)
        for warp in warps:
            shared.read(granules[:, None], np.full(len(granules), int(warp)), line, "wgmma")
        shared.begin_reading(granules)
        self.product_reads.append(_Read(warps, int(self.committed["products"][lane]), granules))

    def matrix(self, descriptor: Any, shape: tuple[int, int, int, bool], lane: int) -> Array:
        """The bits of a matrix as they are now."""
        address, _ = self._matrix(int(descriptor), *shape)
        return self.t.shared.view(shape[2], asynchronous=True)[(address + int(self.t.shared.base[lane])) // shape[2]]

    def add_product(
        self,
        registers: list[int],
        compute: Callable[[Array], Array],
        kept: Any,
        first: Array,
        operands: list[int],
        line: int,
    ) -> None:
        """wgmma.mma_async: sums ← product + kept · sums, for warpgroups by their first lanes."""
        t, lanes = self.t, _warpgroups(first)
        sums = next((s for s in self.sums if s.registers == registers), None)
        if any(s is not sums and s.under_way[lanes].any() and set(s.registers) & set(registers) for s in self.sums):
            t.found("wgmma adds to registers of another one that is under way", line)
        if sums is None:
            sums = _Sums(np.zeros((len(registers), t.lanes), f4), registers, np.zeros(t.lanes, bool))
            self.sums.append(sums)
        fresh = lanes[~sums.under_way[lanes]]
        accesses = [*((r, lanes) for r in operands), *((r, fresh) for r in registers)]
        if any(self._changed(r, self.fenced.get(r), where) for r, where in accesses):
            t.found("wgmma of registers that were written after the last wgmma.fence", line)
        for row, register in zip(sums.values, registers, strict=True):
            row[fresh] = t.full(t.registers[register]).view(f4)[fresh]
        sums.under_way[lanes] = True
        for register in registers:
            t.registers[register] = np.where(sums.under_way, _UNDELIVERED, t.full(t.registers[register]))
        read = [(register, t.full(t.registers[register])) for register in operands]
        group = self.committed["products"][first]
        sums.products.append(_Product(first, group, t.full(kept)[first], compute, read, line))

    def fence_registers(self) -> None:
        """wgmma.fence: products may read what registers hold now, and add to it."""
        self.fenced = dict(enumerate(self.t.registers))

    def moved(self, register: int | None, source: int | None) -> None:
        """mov into a register, from a ``source`` register or (None) a constant.

        LLVM copies sums to the registers of the next wgmma behind the fence, which ptxas undoes: a copy of what the
        fence saw, or a constant, counts as written before the fence.
        """
        now = self.t.registers
        if register is not None and self.fenced and (source is None or self.fenced.get(source) is now[source]):
            self.fenced[register] = now[register]

    def _changed(self, register: int, before: Any, lanes: Array) -> bool:
        """Whether a register no longer holds in these lanes what it did before; None is nothing."""
        t, now = self.t, self.t.registers[register]
        return now is not before and bool(before is None or (t.full(now)[lanes] != t.full(before)[lanes]).any())

    def wait_products(self, most: int, mask: Mask, line: int) -> None:
        """wgmma.wait_group: the sums that all but the last ``most`` groups add to are there."""
        until = self.committed["products"] - most
        self.product_reads = self._waited(self.product_reads, until, mask)
        for sums in self.sums:
            left = []
            for product in sums.products:
                done = product.group < until[product.first]
                if mask is not None:
                    done &= mask[product.first]
                if done.any():
                    self._add(sums, product, done)
                if not done.all():
                    rest = ~done
                    left.append(
                        replace(product, first=product.first[rest], group=product.group[rest], kept=product.kept[rest])
                    )
            sums.products = left
            self._hand_out(sums, line)
        self.sums = [sums for sums in self.sums if sums.products]

    def _add(self, sums: _Sums, product: _Product, which: Array) -> None:
        """Compute a product for some of its warpgroups, now, and add it."""
        t, first = self.t, product.first[which]
        lanes = _warpgroups(first)
        if any(self._changed(register, before, lanes) for register, before in product.operands):
            t.found("a register is rewritten while a wgmma reads it", product.line)
        old = np.where(np.repeat(product.kept[which], 128), sums.values[:, lanes], f4(0))
        sums.values[:, lanes] = product.compute(first) + old

    def _hand_out(self, sums: _Sums, line: int) -> None:
        """Put sums that nothing adds to any more into their registers."""
        t, busy = self.t, np.zeros(self.t.lanes, bool)
        for product in sums.products:
            busy[_warpgroups(product.first)] = True
        done = sums.under_way & ~busy
        if not done.any():
            return
        for row, register in zip(sums.values, sums.registers, strict=True):
            now = t.full(t.registers[register])
            if (now[done] != _UNDELIVERED).any():
                t.found("a register is rewritten while a wgmma adds to it", line)
            t.registers[register] = np.where(done, row.view(u4), now)
            self.fenced[register] = t.registers[register]  # nobody has written it since
        sums.under_way = busy


def _warpgroups(first: Array) -> Array:
    """The lanes of warpgroups, by their first ones."""
    return (first[:, None] + np.arange(128)).ravel()
