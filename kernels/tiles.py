"""Which tile a kernel takes for a shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastunet.architecture import architecture

from .common import block, cdiv
from .launching import numbers
from .table import Arithmetic, arithmetic, overruled


class Tile(NamedTuple):
    """``images`` × ``rows`` × ``columns`` pixels and ``outputs`` channels a program, ``reduction`` channels a step; of
    ``shares`` programs a tile each sums a part of the channels."""

    images: int
    rows: int
    columns: int
    outputs: int
    reduction: int
    warps: int
    stages: int
    tma: bool = False
    shares: int = 1

    def grid(self, batch: int, height: int, width: int) -> tuple[int, int, int]:
        """Tiles in all, along the height, along the width."""
        tiles_h, tiles_w = cdiv(height, self.rows), cdiv(width, self.columns)
        return cdiv(batch, self.images) * tiles_h * tiles_w, tiles_h, tiles_w

    @property
    def part(self) -> int:
        """Of the outputs those that an epilogue works on at a time: half of many, or the registers do not suffice."""
        return self.outputs // 2 if self.outputs >= 64 else self.outputs

    def constants(self, x: Tensor, hold: bool = True) -> dict[str, Any]:
        """What is compiled into a kernel of this tile that multiplies ``x``; see :func:`numbers` for ``hold``. Of
        programs that share a tile not their number: as many binaries would do the same."""
        tile = self if self.shares == 1 else self._replace(shares=2)
        return {"TILE": tile, "NUM": numbers(x, hold), "num_warps": self.warps, "num_stages": self.stages}


# Multiprocessors of the largest common GPU of an architecture.
PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 188}
PROCESSORS |= {"gfx942": 304, "gfx950": 256}


def choose(
    kind: str, batch: int, sources: Sequence[int], filters: int, height: int, width: int, operands: Sequence[Tensor],
    pointers: bool = False, prologue: bool = False,
) -> Tile:  # fmt: skip
    """The tile of a 3×3 convolution of sources of so many channels each, for so many filters; with a ``prologue`` it
    normalises what it reads."""
    tma = not pointers and all(map(movable, operands))
    tile: Tile = _choose(kind, batch, tuple(sources), filters, height, width, arithmetic(operands[0]), tma, prologue)
    return tile


@overruled
def _choose(
    kind: str, batch: int, sources: Sequence[int], filters: int, height: int, width: int, how: Arithmetic, tma: bool,
    prologue: bool,
) -> Tile:  # fmt: skip
    tile = _unshared(kind, batch, sources, filters, width, how, tma, prologue)
    if kind == "conv3x3_wgrad":
        return tile
    reduced, kept = (sources, [filters]) if kind == "conv3x3_fwd" else ([filters], sources)
    programs = tile.grid(batch, height, width)[0] * sum(cdiv(each, tile.outputs) for each in kept)
    steps = sum(cdiv(each, tile.reduction) for each in reduced)
    slots = PROCESSORS.get(how.architecture, 0) * 8 // tile.warps
    # A share that is too small has more sums to store than products to form.
    most = min(slots // max(programs, 1), steps // 2, 8)
    return tile._replace(shares=1 << most.bit_length() - 1 if most > 1 else 1)


def _unshared(
    kind: str, batch: int, sources: Sequence[int], filters: int, width: int, how: Arithmetic, tma: bool, prologue: bool
) -> Tile:
    channels, outputs = max(sources), filters
    if kind == "conv3x3_dgrad":
        channels, outputs = outputs, channels
    narrow, exact, name = how.narrow, how.exact, how.architecture
    wgrad = kind == "conv3x3_wgrad"
    # Of odd channels each element is loaded alone and takes registers for its address: fewer at a time leave enough.
    odd = any(each % 16 for each in sources)
    step = 16 if odd else 32
    # wgmma multiplies 64 rows; what lies outside the picture is left out. wgrad sums over pixels, 256 a step: with
    # fewer columns more rows share what lies above and below.
    pixels = 32 if (wgrad and name == "sm_90") or (odd and not narrow) else 64
    columns = block(width, pixels)
    images = min(pixels // columns, block(batch, pixels, 1))
    columns = pixels // images
    if exact:
        return Tile(1, 1, block(width, 16), block(outputs, 32), block(channels, 32), 8, 2)
    if not narrow:
        if wgrad:
            return Tile(1, 1, block(width, 32), block(outputs, 32), block(channels, step), 4, 2, tma)
        step = 16 if name == "sm_100" else step
        return Tile(images, 1, columns, block(outputs, 32), block(channels, step), 8, 2, tma)
    if not tma:
        # CDNA prefetches into registers: it has none to spare for a second row or a third stage.
        rows, warps, stages = (1, 4, 2) if name.startswith("gfx") else (2, 8, 3)
        if odd:
            rows, warps = rows if kind == "conv3x3_fwd" else 1, 4
        if wgrad:
            both = 32 * rows  # narrower, several warps would load and normalise the same pixels
            return Tile(1, 2 * rows, block(width, 32), block(outputs, both), block(channels, both), 4, 2)
        return Tile(images, rows, columns, block(outputs, 64), block(channels, step), warps, stages)
    rows = 2 if name == "sm_90" else 1  # 128 accumulators a thread leave registers for the epilogue on Hopper only
    if wgrad:
        reduction = block(channels, 128, 64)
        # sm_100 has the accumulators in its tensor memory: the registers of 4 warps are enough.
        warps = reduction // 16 if name == "sm_90" else 4
        return Tile(images, 256 // pixels, columns, block(outputs, 64), reduction, warps, 2, True)
    # On Hopper half the outputs for twice the programs, of which two share a processor: while one stores, the other
    # multiplies. An H200 takes 0.84 of the time so, but not where each normalises what it reads.
    pairs = name == "sm_90" and not prologue
    # Not where pictures are so small that most of a wider tile would lie outside them.
    if outputs >= (64 if pairs else 65) and batch * block(width, 128) >= 128:
        images = min(128 // block(width, 128), block(batch, 128, 1))
        outputs, warps = (64, 4) if pairs else (128, 8)
        return Tile(images, rows, 128 // images, outputs, block(channels, 64), warps, 2, True)
    return Tile(images, 2 * rows, columns, block(outputs, 64), block(channels, 64), 4, 2, True)


def choose_strided(
    kind: str, batch: int, channels: int, outputs: int, height: int, width: int, operand: Tensor, tma: bool
) -> Tile:
    """The tile of another convolution, of one source and for so many outputs, with TMA or without."""
    tile: Tile = _choose_strided(kind, batch, (channels,), outputs, height, width, arithmetic(operand), tma)
    return tile


@overruled
def _choose_strided(
    kind: str, batch: int, sources: Sequence[int], outputs: int, height: int, width: int, how: Arithmetic, tma: bool
) -> Tile:
    (channels,) = sources
    narrow, exact, name = how.narrow, how.exact, how.architecture
    three, wgrad, dgrad = kind.startswith("conv3x3"), kind.endswith("wgrad"), kind.endswith("dgrad")
    # 128 accumulators a thread leave registers for the epilogue on Hopper only.
    large = tma and name == "sm_90"
    pixels, warps = 128 if narrow else 32, 8
    if narrow and not tma and (wgrad or kind == "conv3x3_up" or (dgrad and "1x1" not in kind)):
        # Two accumulators and the epilogues of gradients take registers, and so do addresses of single elements.
        pixels, warps = (32, 4) if (outputs if dgrad else channels) % 16 else (64, 8)
    if kind == "conv3x3_down" and (exact or name.startswith("gfx")):
        pixels, warps = (16, 4) if exact else (min(pixels, 64), warps)  # masks take registers too
    # Loading and normalising cost a warp the same for few outputs as for many: half as many warps do it half as often.
    # Beside the 2×2 transposed convolution and its gradient a second program of 4 warps hides loads and epilogue: 0.6
    # to 0.85 of the time on an H200.
    few = large and narrow and (outputs <= 64 or kind in ("conv2x2_up", "conv2x2_down_dgrad"))
    if large and narrow and kind == "conv2x2_up":
        pixels = 64
    if few and kind == "conv3x3_up":
        pixels, few = 256, False  # or the registers do not suffice with Triton 3.6
    columns = block(width, pixels)
    images = min(pixels // columns, block(batch, pixels, 1))
    columns = pixels // images
    if exact:
        return Tile(images, 1, columns, block(outputs, 32), block(channels, 16), warps, 2)
    if not narrow:
        reduction = 16 if name == "sm_100" and not wgrad else 32
        return Tile(images, 1, columns, block(outputs, 32), block(channels, reduction), 4, 2, tma)
    if not tma:
        if wgrad:
            return Tile(images, 1, columns, block(outputs, 64), block(channels, 64), 4, 2)
        return Tile(images, 1, columns, block(outputs, 128 if "1x1" in kind else 64), block(channels, 32), warps, 2)
    if wgrad:
        reduction = block(channels, 128, 64)
        return Tile(images, 1, columns, block(outputs, 64 if three else 128), reduction, reduction // 16, 2, True)
    reduction = block(channels, 64)
    if "up" in kind:
        outputs = block(outputs, 64 if three and not large else 128)
    elif dgrad:
        outputs = block(outputs, 64 if few else 128)
    else:
        outputs = block(outputs, 256 if large else 128)  # all share the prologue
        reduction = block(channels, 32) if three and outputs == 256 else reduction
    return Tile(images, 1, columns, outputs, reduction, 4 if few else 8, 2, True)


def movable(x: Tensor, wide: int = 1) -> bool:
    """Whether the tensor memory accelerator can move every ``wide``-th column of an NHWC tensor."""
    return _movable(x, x.shape[1]) and x.shape[3] % wide == 0


def movable_rows(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can move a tensor that is dense in the order of its dimensions."""
    return _movable(x, x.shape[-1])


def _movable(x: Tensor, row: int) -> bool:
    """Rows must have a multiple of 16 bytes.

    sm_120 has the accelerator, but the shared memory and the matrix instructions of the chips without: the tiles for
    those suit it.
    """
    size = x.element_size()
    return size != 4 and row * size % 16 == 0 and _moves(architecture(x.device)) and x.data_ptr() % 16 == 0


@functools.cache
def _moves(name: str) -> bool:
    return name.startswith("sm_") and 90 <= int(name[3:]) < 120


def slabs_of(tiles: int, blocks: int) -> int:
    """Into how many sums the gradient of a weight is split, each over some of ``tiles``, of ``blocks`` programs each.

    Enough programs to fill a large GPU a few times, of a few tiles each; the same on every GPU, for the same bits.
    """
    return max(1, min(cdiv(tiles, 4), cdiv(264, blocks)))
