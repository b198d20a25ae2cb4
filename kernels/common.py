"""What the kernels share: layout at the door, the source read, and sums in a fixed order.

Layout. Kernels read and write NHWC memory (channels_last) and compute addresses from sizes alone, as
``((n·H + h)·W + w)·C + c`` in 64 bits: strides of size-1 dimensions are ambiguous and never looked at.
Accumulation is float32, or float64 for float64 tensors (interpreter only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import PropagateNan

from .launching import launch

PROPAGATE_ALL = tl.constexpr(PropagateNan.ALL)


def nhwc(x: Tensor) -> Tensor:
    """``x`` in dense channels_last memory: itself if it already is, else one copy."""
    return x.contiguous(memory_format=torch.channels_last)


def dense(vector: Tensor | None) -> Tensor | None:
    """An affine or a parameter as the kernels address it: dense in memory, or None."""
    return None if vector is None else vector.contiguous()


def empty_nhwc(like: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised channels_last tensor of ``like``'s dtype and device."""
    # Half as long as torch.empty takes with a memory format, a dtype and a device.
    row = width * channels
    return like.new_empty_strided((batch, channels, height, width), (height * row, 1, row, channels))


# Triton's own of both take ten times as long, and a step asks a thousand times.
def cdiv(size: int, part: int) -> int:
    """How many parts cover ``size``."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The least power of two that is no less than ``size``, which is positive."""
    return 1 << (size - 1).bit_length()


def block(size: int, most: int, least: int = 16) -> int:
    """The power of two that covers ``size``, within [least, most]."""
    return max(least, min(most, power_of_2(size)))


def by_sample(affine: Tensor | None) -> bool:
    """Whether each sample has an affine of its own, (N, 3, C)."""
    return affine is not None and affine.dim() == 3


class Source:
    """One operand: memory, affine (dense, or None), activation, and where it lies in the frame of the outputs.

    ``doubled``: its value has each pixel of x twice in both directions, which is nowhere stored.
    """

    def __init__(
        self, x: Tensor, affine: Tensor | None, slope: float, top: int = 0, left: int = 0, doubled: bool = False
    ):
        self.x, self.affine, self.slope, self.top, self.left = nhwc(x), dense(affine), slope, top, left
        self.act = act(slope)
        self.plain = affine is None and slope == 1  # the pixels are those of x
        self.samples = by_sample(affine)
        self.channels, self.height, self.width = x.shape[1:]
        self.doubled, self.zoom = doubled, 2 if doubled else None  # the latter as the kernels' constant
        if doubled:
            self.height, self.width = 2 * self.height, 2 * self.width
        self.extent = self.height, self.width, top, left  # in the frame

    def fills(self, size: Sequence[int]) -> bool:
        """Whether its memory is as large as a frame of ``size`` and lies in it."""
        return not self.doubled and [self.top, self.left, self.height, self.width] == [0, 0, *size]

    def sticks_out(self, size: Sequence[int]) -> bool:
        """Whether part of it lies outside a frame of ``size``."""
        beyond = self.top + self.height > size[0] or self.left + self.width > size[1]
        return beyond or min(self.top, self.left) < 0

    def misread(self, size: Sequence[int]) -> bool:
        """Whether TMA would read of it what must count as zero; a doubled one it does not read."""
        return not self.doubled and self.sticks_out(size)


class Affine(NamedTuple):
    """Rows of an affine (3, C) at some channels, as vectors."""

    scale: Any
    shift: Any
    centre: Any


@triton.jit
def load_affine(affine_ptr, c, C):
    """The :class:`Affine` at channels ``c``, 0 beyond C; an empty tuple without one."""
    if affine_ptr is None:
        affine = ()
    else:
        scale = tl.load(affine_ptr + c, mask=c < C, other=0.0)
        shift = tl.load(affine_ptr + C + c, mask=c < C, other=0.0)
        centre = tl.load(affine_ptr + 2 * C + c, mask=c < C, other=0.0)
        affine = Affine(scale, shift, centre)
    return affine


@triton.jit
def affine_of(affine_ptr, n, C):
    """Where the affine of sample ``n`` lies among those of all, (N, 3, C). Called only where samples have one each:
    Triton 3.6 takes no None from a function."""
    return affine_ptr + n.to(tl.int64) * (3 * C)


class Slab(NamedTuple):
    """Where a tile leaves its sums: in which row those over its pixels, and in which the number of these."""

    row: Any
    count: Any


@triton.jit
def slab_of(number, n, N, tiles, SAMPLES: tl.constexpr):
    """The :class:`Slab` of tile ``number``, one of the so many ``tiles`` of sample ``n``. If sums are of SAMPLES, those
    of one tile of each lie side by side: what adds up tiles then adds up each sample's."""
    if SAMPLES:
        slab = Slab((number % tiles).to(tl.int64) * N + n, number % tiles)
    else:
        slab = Slab(number, number)
    return slab


def act(slope: float) -> float | None:
    """An activation function by its slope below zero, as the kernels' constant: None for the identity."""
    return None if slope == 1 else slope


@triton.jit
def activate(z, SLOPE: tl.constexpr):
    """act(z), as PyTorch computes it: NaN stays."""
    if SLOPE is None:
        value = z
    elif SLOPE == 0:
        value = tl.maximum(z, 0.0, propagate_nan=PROPAGATE_ALL)
    elif SLOPE > 0 and SLOPE < 1:
        value = tl.maximum(z, z * SLOPE, propagate_nan=PROPAGATE_ALL)
    else:
        value = tl.where(z > 0, z, z * SLOPE)
    return value


@triton.jit
def normalise(x, affine, SLOPE: tl.constexpr, ACC: tl.constexpr, AXIS: tl.constexpr = 1):
    """act(scale·(x − centre) + shift) in the accumulator dtype, with channels along x's ``AXIS``.

    16-bit x: one multiply-add with the folded shift, whose rounding is far below x's own. Wider x: the difference
    first, so that a mean much larger than the deviation costs no digits.
    """
    z = x.to(ACC)
    if len(affine) > 0:
        shift = affine.shift
        if x.dtype.primitive_bitwidth == 16:
            shift -= affine.scale * affine.centre
        else:
            z -= tl.expand_dims(affine.centre, 1 - AXIS)
        z = z * tl.expand_dims(affine.scale, 1 - AXIS) + tl.expand_dims(shift, 1 - AXIS)
    return activate(z, SLOPE)


GOLDEN = tl.constexpr(2654435769)  # 2³² times the golden ratio's fraction: its multiples modulo 2³² fill evenly


@triton.jit
def dither(x, turn, DTYPE: tl.constexpr):
    """x in float32, moved by less than half of DTYPE's last digit, if that has 16 bits: to be rounded to it next.

    Where x is a number of DTYPE and something small, a gradient and its share of a statistic's, rounding alone gives
    that number again, and the small things add up over the pixels to nothing. Moved by ``turn``, each element's index
    times :data:`GOLDEN` in uint32, as many are rounded up as it takes.
    """
    if DTYPE.primitive_bitwidth == 16:
        least = (x.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)  # x's sign and power of two
        power = tl.abs(least)
        if DTYPE.is_bf16():
            digit = tl.minimum(power, 2.0**120) * 0.5**39  # infinity stays what it is
        else:
            digit = tl.minimum(tl.maximum(power, 0.5**14), 2.0**15) * 0.5**42
        moved = x + turn.to(tl.int32, bitcast=True).to(tl.float32) * digit
        x = tl.where(tl.abs(moved) < power, least, moved)  # below a power of two a digit is half as large
    return x


@triton.jit
def sum_products(x):
    """Σ of products x over their first axis, each rounded.

    Zero is added for that. Without it the multiplication is fused with the first addition across a warp: each lane adds
    its own product, not rounded, to another lane's, rounded, and two lanes come to different sums of the same numbers.
    """
    return tl.sum(x + 0.0, 0)


@triton.jit
def replace(items, i: tl.constexpr, item):
    """The tuple with another item i."""
    return items[:i] + (item,) + items[i + 1 :]  # noqa: RUF005 - Triton knows no unpacking


@triton.jit(do_not_specialize=["slabs"])
def _sum_slabs_kernel(x_ptr, y_ptr, slabs, length, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """y[g, l] = Σ_{i<GROUP} x[g·GROUP + i, l], in a fixed tree order."""
    blocks = tl.cdiv(length, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = group * GROUP + tl.arange(0, GROUP)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (row < slabs)[:, None] & (column < length)[None, :]
    x = tl.load(x_ptr + row[:, None] * length + column[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + group * length + column, tl.sum(x, 0), mask=column < length)


def sum_slabs(x: Tensor) -> Tensor:
    """Sum of ``x`` over its first dimension, in a fixed tree order: the same bits on every run."""
    slabs, length = x.shape[0], x[0].numel() if x.shape[0] else x.numel()
    if slabs == 0 or length == 0:
        return x.new_zeros(x.shape[1:])
    shape = x.shape[1:]
    while slabs > 1:
        group = block(slabs, 128, 2)  # slabs beyond the last, which are masked, take as long as others
        columns = block(length, min(4096 // group, 1024), 32)
        groups = cdiv(slabs, group)
        y = x.new_empty((groups, length))
        launch(
            _sum_slabs_kernel, (groups * cdiv(length, columns),), x, y, slabs, length,
            GROUP=group, BLOCK=columns, num_warps=4,
        )  # fmt: skip
        x, slabs = y, groups
    return x.reshape(shape)
