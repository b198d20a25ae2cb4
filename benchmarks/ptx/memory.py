"""Global and shared memory, each with a shadow that says who touched what, and when.

Time is counted in *epochs*: how often a CTA has passed ``bar.sync``. Within an epoch nothing orders what two warps do
(lanes of one warp are taken to run in step, as Triton takes them); between programs of a launch nothing does. Chapter 8
of the PTX ISA, the memory consistency model, says so; 8.2.4, *Memory Operations on Vector Data Types*, makes a vector
access several scalar ones, so shadows are kept by granules: the least that the kernel accesses at once.

- **Shared memory** remembers for each granule the last warp that wrote it, the last epoch in which each warp read it,
  and what asynchronous instructions do with it: a copy that is under way to it, a ``wgmma`` or a bulk copy that still
  reads it, ordinary stores that the asynchronous proxy may not see yet.
- **Global memory** is the tensors' own memory, each storage a region whose addresses are apart from all others'.
  Shadows are zero where nothing was touched, so that the kernel gives them pages only where something was: a tensor of
  more than 2³¹ elements costs what is read of it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ptx.findings import StoppedError
from benchmarks.ptx.values import UNSIGNED, Array, f4, i4, i8, u1, u4, u8

if TYPE_CHECKING:
    from benchmarks.ptx.machine import Threads

REGION_BITS = 40  # of an address, within a region
_OFFSET = (1 << REGION_BITS) - 1

ASYNCHRONOUS, UPDATE = 255, 254  # writers that are no warps: a copy, and atomic instructions
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def sparse(count: int, kind: Any) -> Array:
    """Zeros, of which those that are touched take up memory."""
    size = max(count, 1) * np.dtype(kind).itemsize
    if size < 1 << 20:
        return np.zeros(count, kind)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return np.frombuffer(pages, kind, count)


def _words(size: int) -> Any:
    """The dtype of accesses of so many bytes."""
    return UNSIGNED.get(size) or np.dtype(f"V{size}")


@dataclass
class Region:
    """One storage, as a launch sees it."""

    data: Array  # bytes
    name: str
    writer: Array | None = None  # by granule: 1 + the last thread that wrote it, numbered over the grid
    epoch: Array | None = None  # and when
    reads: list[tuple[Array, Array]] = field(default_factory=list)  # (granules, programs)

    def view(self, size: int) -> Array:
        """The memory as accesses of so many bytes."""
        return self.data[: len(self.data) // size * size].view(_words(size))


class GlobalMemory:
    """The storages of a launch."""

    def __init__(self, granule: int) -> None:
        self.granule = granule
        self.regions: dict[int, Region] = {}

    def add(self, data: Array, name: str) -> int:
        """The address of a storage, whose bytes are ``data``."""
        number = len(self.regions) + 1
        self.regions[number] = Region(data, name)
        return number << REGION_BITS

    def rename(self, address: int, name: str) -> None:
        """The storage is another argument's as well."""
        self.regions[address >> REGION_BITS].name += f"={name}"

    def region(self, address: int) -> Region:
        """The region in which an address lies."""
        return self.regions[address >> REGION_BITS]

    # Addresses, data and ``lanes`` (the threads that access) are arrays of one length from here on.

    def _regions(
        self, t: Threads, address: Array, size: int, lanes: Array, line: int
    ) -> Iterator[tuple[Region, Array, Any]]:
        """(region, offsets, which of the lanes) for each region that is accessed within its bounds."""
        number = address >> u8(REGION_BITS)
        first = number[0]
        for one in [first] if (number == first).all() else np.unique(number):
            which = slice(None) if one == first and (number == first).all() else np.flatnonzero(number == one)
            region = self.regions.get(int(one))
            offset = (address[which] & u8(_OFFSET)).astype(i8)
            if region is None:
                t.found("global access out of bounds", line, f"no tensor lies at {int(address[which][0]):#x}")
                continue
            outside = offset + size > len(region.data)
            if outside.any():
                k = int(np.flatnonzero(outside)[0])
                detail = f"{size} bytes at {offset[k]} of {region.name}, which has {len(region.data)}"
                t.found("global access out of bounds", line, f"{detail}, by {t.tell(lanes[which][k])}")
                which = np.arange(len(lanes))[which][~outside]
                offset = offset[~outside]
            if (offset % size).any():
                t.found("misaligned global access", line, f"{size} bytes of {region.name}")
                raise StoppedError("misaligned global access")
            if len(offset):
                yield region, offset, which

    def _granules(self, offset: Array, size: int) -> Array:
        return (offset // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def load(self, t: Threads, address: Array, size: int, lanes: Array, line: int) -> Array:
        """What lies there, (lanes, size) bytes; 0 out of bounds."""
        out = np.zeros((len(lanes), size), u1)
        for region, offset, which in self._regions(t, address, size, lanes, line):
            out[which] = np.ascontiguousarray(region.view(size)[offset // size]).view(u1).reshape(-1, size)
            self.read(t, region, self._granules(offset, size), lanes[which], line)
        return out

    def read(self, t: Threads, region: Region, granules: Array, lanes: Array, line: int) -> None:
        """Note that these lanes read these granules, a row each."""
        region.reads.append((granules, t.program_id[lanes]))
        if region.writer is None or region.epoch is None:
            return
        writer = region.writer[granules]
        me = t.number[lanes][:, None]
        same_program = (writer - u4(1)) // u4(t.size) == t.program_id[lanes][:, None]
        unordered = same_program & (region.epoch[granules] == t.epoch_of(lanes)[:, None])
        if ((writer != 0) & (writer != me) & unordered).any():
            t.found("global race: read after write, no barrier between", line, region.name)

    def store(self, t: Threads, address: Array, data: Array, lanes: Array, line: int) -> None:
        """Write (lanes, size) bytes."""
        size = data.shape[1]
        for region, offset, which in self._regions(t, address, size, lanes, line):
            new = np.ascontiguousarray(data[which]).view(_words(size)).reshape(-1)
            self.wrote(
                t, region, self._granules(offset, size), lanes[which], line, region.view(size), offset // size, new
            )

    def wrote(
        self,
        t: Threads,
        region: Region,
        granules: Array,
        lanes: Array,
        line: int,
        view: Array,
        index: Array,
        new: Array,
    ) -> None:
        """Write ``new`` into the region's ``view`` at ``index``, and note that these lanes wrote these granules."""
        if region.writer is None or region.epoch is None:
            count = -(-len(region.data) // self.granule)
            region.writer, region.epoch = sparse(count, u4), sparse(count, i4)
        writer = region.writer[granules]
        me = t.number[lanes][:, None]
        other = (writer != 0) & (writer != me)
        clash = False
        if other.any():
            elsewhere = (writer - u4(1)) // u4(t.size) != t.program_id[lanes][:, None]
            unordered = elsewhere | (region.epoch[granules] == t.epoch_of(lanes)[:, None])
            clash = bool(((other & unordered).any(1) & (view[index] != new)).any())
        view[index] = new
        if clash or (view[index] != new).any():
            t.found("global race: two threads write different values to one address", line, region.name)
        region.writer[granules] = me
        region.epoch[granules] = t.epoch_of(lanes)[:, None]

    def update(self, t: Threads, address: Array, function: Any, operand: Array, lanes: Array, line: int) -> None:
        """Combine what lies there with the operands; among themselves such updates are no races."""
        for region, offset, which in self._regions(t, address, operand.itemsize, lanes, line):
            function.at(region.view(operand.itemsize).view(operand.dtype), offset // operand.itemsize, operand[which])

    def finish(self, t: Threads) -> None:
        """At the end of a launch: whether any program read what another one wrote, in whatever order."""
        for region in self.regions.values():
            if region.writer is not None:
                for granules, program in region.reads:
                    writer = region.writer[granules]
                    if ((writer != 0) & ((writer - u4(1)) // u4(t.size) != program[:, None])).any():
                        t.found("global race: a program reads what another one writes", 0, region.name)
                        break
            region.reads.clear()


class SharedMemory:
    """The shared memory of a batch of CTAs, one after the other."""

    def __init__(self, t: Threads, size: int, granule: int) -> None:
        self.t, self.size, self.granule = t, size, granule
        self.each = -(-max(size, 16) // 1024) * 1024  # swizzles look at the address's last 10 bits
        self.data = np.full(t.ctas * self.each, 255, u1)  # as ordinary accesses see it
        self.other = self.data.copy()  # as the asynchronous proxy does
        self.base = t.cta * i8(self.each)  # by lane
        count = len(self.data) // granule
        self.writer = np.full(count, -1, i4)  # epoch · 256 + warp; −1: nobody
        self.acquired = np.zeros(count, u4)  # warps, by bit, that have waited for the copy that wrote it
        self.reader = np.full((t.warps, count), -1, i4)  # the last epoch in which each warp read it
        self.arriving = np.zeros(count, i4)  # copies that are under way to it
        self.reading = np.zeros(count, i4)  # asynchronous instructions that still read it
        self.unfenced = np.zeros(count, bool)  # stored to, with no proxy fence since
        self._some_arriving = self._some_reading = False

    def view(self, size: int, asynchronous: bool = False) -> Array:
        """The memory as accesses of so many bytes, of either proxy."""
        return (self.other if asynchronous else self.data).view(_words(size))

    def granules(self, address: Array, size: int) -> Array:
        """The granules, a row for each address."""
        return (address // self.granule)[:, None] + np.arange(max(size // self.granule, 1))

    def locate(self, address: Array, size: int, lanes: Array, line: int) -> Array:
        """The addresses in :attr:`data` of those within the CTAs' windows, which must hold them."""
        address = address.astype(i8)
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            detail = f"{size} bytes at {int(address[outside][0])} of {self.size}"
            self.t.found("shared access out of bounds", line, detail)
            raise StoppedError("shared access out of bounds")
        if (address % size).any():
            self.t.found("misaligned shared access", line, f"{size} bytes")
            raise StoppedError("misaligned shared access")
        return address + self.base[lanes]

    # ---- ordinary accesses, by addresses in the CTAs' windows ----

    def load(self, address: Array, size: int, lanes: Array, line: int) -> Array:
        """What lies there, (lanes, size) bytes."""
        address = self.locate(address, size, lanes, line)
        self.read(self.granules(address, size), lanes, line)
        return np.ascontiguousarray(self.view(size)[address // size]).view(u1).reshape(-1, size)

    def store(self, address: Array, data: Array, lanes: Array, line: int) -> None:
        """Write (lanes, size) bytes."""
        size = data.shape[1]
        address = self.locate(address, size, lanes, line)
        view, index = self.view(size), address // size
        new = np.ascontiguousarray(data).view(_words(size)).reshape(-1)
        granules = self.granules(address, size)
        self.write(granules, lanes, line, changed=(view[index] != new)[:, None])
        self.unfenced[granules] = True
        view[index] = new
        lost = view[index] != new
        if lost.any():
            one = address == address[np.flatnonzero(lost)[0]]
            warps = np.unique(self.t.warp[lanes[one]])
            who = "lanes of one warp" if len(warps) == 1 else "two warps"
            numbers = np.ascontiguousarray(data[one]).view(f4 if size % 4 == 0 else u1)
            differ = (numbers != numbers[0]).any(0)  # of the words of a vector
            values = " and ".join(map(str, np.unique(numbers[:, differ][:, 0])[:2]))
            detail = f"{int(lost.sum())} lanes lose, at one address {values}"
            self.t.found(f"{who} store different values to one address", line, detail)

    def update(self, address: Array, function: Any, operand: Array, lanes: Array, line: int) -> Array:
        """Combine what lies there with the operands, one lane after the other; what each found there.

        Among themselves such updates are no races.
        """
        address = self.locate(address, operand.itemsize, lanes, line)
        view, index = self.view(operand.itemsize).view(operand.dtype), address // operand.itemsize
        granules = self.granules(address, operand.itemsize)
        ordinary = self.writer[granules] & 255 != UPDATE
        owners = np.repeat(lanes, granules.shape[1])[ordinary.ravel()]
        self._check_read(granules[ordinary][:, None], owners, line, "update")
        self.write(granules, lanes, line, changed=ordinary)
        old = np.empty_like(operand)
        for i, (at, value) in enumerate(zip(index, operand, strict=True)):
            old[i] = view[at]
            view[at] = function(view[at], value)
        self.writer[granules] = self.t.epoch_of(lanes)[:, None] << 8 | UPDATE
        self.unfenced[granules] = True
        return old

    def read(self, granules: Array, lanes: Array, line: int, what: str = "read") -> None:
        """Check and note that these lanes read these granules, a row each."""
        self._check_read(granules, lanes, line, what)
        self.reader[self.t.warp[lanes][:, None], granules] = self.t.epoch_of(lanes)[:, None]

    def _check_read(self, granules: Array, lanes: Array, line: int, what: str) -> None:
        warp, epoch = self.t.warp[lanes][:, None], self.t.epoch_of(lanes)[:, None]
        if self._some_arriving and (self.arriving[granules] > 0).any():
            self.t.found(f"shared race: {what} of bytes that a copy has not delivered", line)
        writer = self.writer[granules]
        fresh = (writer >> 8 == epoch) & (writer & 255 != warp)
        if fresh.any():
            copied = writer & 255 == ASYNCHRONOUS
            waited = (self.acquired[granules] >> warp.astype(u4)) & u4(1) == 1
            if (fresh & ~(copied & waited)).any():
                self.t.found(f"shared race: {what} after another warp's write, no barrier between", line)
        if (writer < 0).any():
            self.t.found(f"{what} of shared memory that nothing wrote", line)

    def write(self, granules: Array, lanes: Array, line: int, changed: Any = True, arrives: bool = False) -> None:
        """Check and note that these lanes write these granules, a row each; or begin a copy that ``arrives`` later."""
        warp, epoch = self.t.warp[lanes][:, None], self.t.epoch_of(lanes)[:, None]
        if self._some_arriving and (self.arriving[granules] > 0).any():
            self.t.found("shared race: write to bytes that a copy is under way to", line)
        if self._some_reading and (self.reading[granules] > 0).any():
            self.t.found("shared race: write to bytes that an asynchronous instruction still reads", line)
        for other in range(self.t.warps):
            if ((self.reader[other][granules] == epoch) & (warp != other)).any():
                self.t.found("shared race: write after another warp's read, no barrier between", line)
        writer = self.writer[granules]
        mine = epoch << 8 | warp
        clash = (writer >> 8 == epoch) & (writer != mine) & changed
        if clash.any():
            self.t.found("shared race: two warps write, no barrier between", line)
        if not arrives:
            self.writer[granules] = mine

    # ---- asynchronous ones ----

    def begin_arrival(self, granules: Array) -> None:
        """A copy to these granules is under way."""
        np.add.at(self.arriving, granules, 1)
        self._some_arriving = True

    def arrive(self, granules: Array) -> None:
        """It is delivered."""
        np.subtract.at(self.arriving, granules, 1)
        self._some_arriving = bool(self.arriving.any())

    def begin_reading(self, granules: Array) -> None:
        """An asynchronous instruction reads these granules until it has been waited for."""
        np.add.at(self.reading, granules, 1)
        self._some_reading = True

    def end_reading(self, granules: Array, lanes: Array) -> None:
        """It has been waited for, by these lanes (one of each warp)."""
        np.subtract.at(self.reading, granules, 1)
        self._some_reading = bool(self.reading.any())
        for lane in lanes:
            self.reader[self.t.warp[lane], granules] = self.t.epoch_of(lane)

    def check_fenced(self, granules: Array, line: int) -> None:
        """The asynchronous proxy accesses these granules (8.6, *Proxies*)."""
        if self.unfenced[granules].any():
            self.t.found("asynchronous access to ordinary stores with no fence.proxy.async between", line)

    def fence(self, lanes: Array) -> None:
        """What these lanes' warps stored, and all that was stored in earlier epochs, is the other proxy's to see."""
        t = self.t
        for cta in np.unique(t.cta[lanes]):
            part = slice(int(cta) * self.each // self.granule, (int(cta) + 1) * self.each // self.granule)
            writer = self.writer[part]
            seen = writer >> 8 < t.epoch[cta]
            seen |= np.isin(writer & 255, np.unique(t.warp[lanes[t.cta[lanes] == cta]]))
            first = int(cta) * self.each // self.granule
            now = first + np.flatnonzero(self.unfenced[part] & seen)
            self.other.reshape(-1, self.granule)[now] = self.data.reshape(-1, self.granule)[now]
            self.unfenced[now] = False
