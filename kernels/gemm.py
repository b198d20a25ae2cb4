"""What the convolutions by matrix products share: structs, pixels and weights as operands, sums, and tiles' gradients.

A kernel is launched with pointers (or TMA descriptors) and sizes one by one, and packs them here once: in arguments
that are tuples Triton would compile each size of a picture anew, and its 3.6 finds no descriptors there. An operand
that a launch has not is None; one that TMA moves is a descriptor. A struct that holds constants is packed in the call
that takes it: Triton makes values of those in a variable.

Kernels see a picture of width W as WIDE pictures of width W / WIDE: pixel (h, WIDE·w + b) is pixel (h, w) of part b.
Where WIDE is 2, TMA sees a tensor (N, H, W / WIDE, WIDE, C), whose strides fall.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .affine import source_backward, store_affine_gradient
from .common import Source, activate, load_affine, normalise, sum_products
from .launching import describe
from .tiles import Tile


class Image(NamedTuple):
    """An NHWC tensor: its memory x and the sizes of its value, the affine and activation that make that, the word that
    :func:`normalise_real` reads, and its ZOOM: 2 where each pixel in memory, of H/2 rows and W/2 columns, is 2×2 of the
    value's, else None."""

    x: Any
    N: Any
    H: Any
    W: Any
    C: Any
    affine: Any
    SLOPE: Any
    real: Any
    ZOOM: Any = None


class Pixel(NamedTuple):
    """Picture, row and column of a pixel."""

    n: Any
    h: Any
    w: Any


class Frame(NamedTuple):
    """The rows P and columns Q of the outputs, and where over them a source's first row and column lie."""

    P: Any
    Q: Any
    top: Any
    left: Any


class Window(NamedTuple):
    """Between which of its own rows and columns a source is not zero."""

    h_low: Any
    h_high: Any
    w_low: Any
    w_high: Any


class Walk(NamedTuple):
    """Some tiles, by their numbers: start … stop, where a picture has tiles_h by tiles_w."""

    start: Any
    stop: Any
    tiles_h: Any
    tiles_w: Any


class Filters(NamedTuple):
    """Weights, in memory (K,TAPS,C) if K_FIRST, else (C,TAPS,K). A program computes outputs from k on; channel 0 of the
    source is the weights' channel ``first``."""

    w: Any
    first: Any
    C: Any
    k: Any
    K: Any
    TAPS: Any
    K_FIRST: Any


# ---- pixels and weights ------------------------------------------------------------------------------------------


@triton.jit
def first_pixel(number, tiles_h, tiles_w, TILE: tl.constexpr):
    """The first :class:`Pixel` of a tile, by its number."""
    return Pixel(
        number // tiles_w // tiles_h * TILE.images,
        number // tiles_w % tiles_h * TILE.rows,
        number % tiles_w * TILE.columns,
    )


@triton.jit
def window(source, frame):
    """The :class:`Window` of a source in the frame."""
    return Window(
        tl.maximum(0, -frame.top), tl.minimum(source.H, frame.P - frame.top),
        tl.maximum(0, -frame.left), tl.minimum(source.W, frame.Q - frame.left),
    )  # fmt: skip


@triton.jit
def _bits(x):
    """x as integers."""
    return x.to(tl.core.get_int_dtype(x.dtype.primitive_bitwidth, signed=True), bitcast=True)


@triton.jit
def normalise_real(
    x, real, real_ptr, affine, SLOPE: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, AXIS: tl.constexpr
):
    """:func:`normalise` in x's dtype; where ``MASKED``, 0 for pixels that are not ``real``, of which x is 0.

    Triton normalises a dot's operand in the registers that multiply it only if all that goes into it was loaded, so the
    mask is loaded too: for each pixel a word (:func:`fastunet.kernels.launching.real_word`) of ones, or zero where it
    is not real. The value's bits and that word's are combined by "and": ones keep the value, zeros make it 0.
    """
    if MASKED and len(affine) > 0:
        z = normalise(x, affine, None, ACC, AXIS)
        kept = tl.load(real_ptr + tl.zeros(real.shape, tl.int32), mask=real, other=0)
        bits = _bits(z)
        z = (bits & tl.expand_dims(kept, AXIS).to(bits.dtype)).to(ACC, bitcast=True)
        z = activate(z, SLOPE)
    else:
        z = normalise(x, affine, SLOPE, ACC, AXIS)
    return z.to(x.dtype)


@triton.jit
def load_pixels(
    image, affine, at, b, c, window, CHANNELS: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr = 1, AXIS: tl.constexpr = 1,
):  # fmt: skip
    """Pixels (h, WIDE·(w + i) + b), i < TILE.columns, of TILE.images pictures, CHANNELS channels from c on: normalised,
    0 outside the image or the window, with channels along ``AXIS``. −WIDE ≤ b."""
    pixel = tl.arange(0, TILE.images * TILE.columns)
    n = at.n + pixel // TILE.columns
    w = WIDE * (at.w + pixel % TILE.columns) + b
    if window is None:
        width = tl.where((at.h >= 0) & (at.h < image.H), image.W, 0)
        real = tl.where(n < image.N, w, -1).to(tl.uint32) < width.to(tl.uint32)
    else:
        inside = (at.h >= window.h_low) & (at.h < window.h_high)
        width = tl.where(inside, tl.maximum(window.w_high - window.w_low, 0), 0)
        real = tl.where(n < image.N, w - window.w_low, -1).to(tl.uint32) < width.to(tl.uint32)
    if isinstance(image.x, tl.core.tensor_descriptor_base):
        if WIDE == 1:
            z = image.x.load([at.n, at.h, at.w + b, c])
        else:
            column = b + WIDE  # not negative
            z = image.x.load([at.n, at.h, at.w + column // WIDE - 1, column % WIDE, c])
        z = z.reshape(TILE.images * TILE.columns, CHANNELS)
        if AXIS == 0:
            z = z.T
    else:
        channel = c + tl.arange(0, CHANNELS)
        mask = tl.expand_dims(channel < image.C, 1 - AXIS)
        if MASKED:
            mask = mask & tl.expand_dims(real, AXIS)
        x = image.x
        if image.ZOOM is None:
            row = ((n.to(tl.int64) * image.H + at.h) * image.W + w) * image.C
        else:
            # Registers are scarce: by pixel only its place in the row, or in the tile if that begins at a pixel of x.
            first = (at.n.to(tl.int64) * (image.H >> 1) + (at.h >> 1)) * (image.W >> 1)
            if AXIS == 0:  # of a weight gradient
                first += at.w >> 1
                w = pixel % TILE.columns
            x += first * image.C
            row = (w >> 1) * image.C
            if TILE.images > 1:
                row += (pixel // TILE.columns) * ((image.H >> 1).to(tl.int64) * (image.W >> 1) * image.C)
        index = tl.expand_dims(row, AXIS) + tl.expand_dims(channel, 1 - AXIS)
        z = tl.load(x + index, mask=mask, other=0.0)
    if len(affine) > 0 or image.SLOPE is not None:
        z = normalise_real(z, real, image.real, affine, image.SLOPE, MASKED, ACC, AXIS)
    return z


@triton.jit
def store_pixels(
    y, value, at, b, k, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr = 1
):  # fmt: skip
    """Store value [images·columns, CHANNELS] in image y, at pixels (h, WIDE·(w + i) + b), as far as they exist."""
    if isinstance(y.x, tl.core.tensor_descriptor_base):
        if WIDE == 1:
            y.x.store([at.n, at.h, at.w, k], value.reshape(TILE.images, 1, TILE.columns, CHANNELS))
        else:
            y.x.store([at.n, at.h, at.w, b, k], value.reshape(TILE.images, 1, TILE.columns, 1, CHANNELS))
    else:
        pixel = tl.arange(0, TILE.images * TILE.columns)
        n = at.n + pixel // TILE.columns
        w = WIDE * (at.w + pixel % TILE.columns) + b
        channel = k + tl.arange(0, CHANNELS)
        mask = ((n < y.N) & (w < tl.where(at.h < y.H, y.W, 0)))[:, None] & (channel < y.C)[None, :]
        tl.store(y.x + ((n.to(tl.int64) * y.H + at.h) * y.W + w)[:, None] * y.C + channel[None, :], value, mask=mask)


@triton.jit
def load_tap(filters, c, tap, TILE: tl.constexpr):
    """The weights [TILE.reduction, TILE.outputs] at ``tap``, from the source's channel c on."""
    c = filters.first + c
    if isinstance(filters.w, tl.core.tensor_descriptor_base):
        if filters.K_FIRST:
            weights = filters.w.load([filters.k, tap, c]).reshape(TILE.outputs, TILE.reduction).T
        else:
            weights = filters.w.load([c, tap, filters.k]).reshape(TILE.reduction, TILE.outputs)
    else:
        channel = (c + tl.arange(0, TILE.reduction)).to(tl.int64)[:, None]
        outputs = (filters.k + tl.arange(0, TILE.outputs)).to(tl.int64)[None, :]
        if filters.K_FIRST:
            index = (outputs * filters.TAPS + tap) * filters.C + channel
        else:
            index = (channel * filters.TAPS + tap) * filters.K + outputs
        weights = tl.load(filters.w + index, mask=(channel < filters.C) & (outputs < filters.K), other=0.0)
    return weights


# ---- sums --------------------------------------------------------------------------------------------------------

# Sums of products over a loop, on Hopper. A product takes its first operand from registers: read from shared memory
# once for several products, it leaves room there for a second program. But Triton lets the last products of a turn run
# on into the next one, which rewrites those registers, and then ptxas makes each wgmma wait for the one before it (its
# message C7513). So sums are held as integers: Triton waits for a sum before it is cast. No cast costs an instruction.


@triton.jit
def hold(acc, NUM: tl.constexpr):
    """A sum as a loop carries it."""
    if NUM.held:
        acc = _bits(acc)
    return acc


@triton.jit
def release(acc, NUM: tl.constexpr):
    """The sum that a loop carried."""
    if NUM.held:
        acc = acc.to(NUM.acc, bitcast=True)
    return acc


@triton.jit
def zeros(rows, columns, COUNT: tl.constexpr, NUM: tl.constexpr):
    """COUNT sums [rows, columns] as a loop carries them."""
    return (hold(tl.full([rows, columns], 0.0, NUM.acc), NUM),) * COUNT


@triton.jit
def add_product(acc, a, b, NUM: tl.constexpr):
    """The sum plus a·b."""
    if NUM.held:  # what was loaded and cast is not taken from shared memory
        a = _bits(a).to(a.dtype, bitcast=True)
    return hold(tl.dot(a, b, release(acc, NUM), input_precision=NUM.precision, out_dtype=NUM.acc), NUM)


# ---- gradients ---------------------------------------------------------------------------------------------------


@triton.jit
def halves(items, COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The left and the right halves of COUNT tiles [M, N], as two tuples."""
    low = ()
    high = ()
    for i in tl.static_range(COUNT):
        first, second = items[i].reshape(M, 2, N // 2).permute(0, 2, 1).split()
        low = low + (first,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking
        high = high + (second,)  # type: ignore[assignment]  # noqa: RUF005
    return low, high


@triton.jit
def source_gradient(
    gs, source, dx, partial_ptr, slab, at, c, WIDE: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr
):  # fmt: skip
    """Store dx, and the tile's share of daffine in its slab, from the gradients gs of the WIDE parts of z's row at.h:
    by halves where the registers do not suffice otherwise."""
    if TILE.outputs >= 64:
        low, high = halves(gs, WIDE, TILE.images * TILE.columns, TILE.outputs)
        half: tl.constexpr = TILE.outputs // 2
        _narrow_gradient(low, source, dx, partial_ptr, slab, at, c, half, WIDE, TILE, NUM)
        _narrow_gradient(high, source, dx, partial_ptr, slab, at, c + half, half, WIDE, TILE, NUM)
    else:
        _narrow_gradient(gs, source, dx, partial_ptr, slab, at, c, TILE.outputs, WIDE, TILE, NUM)


@triton.jit
def _narrow_gradient(
    gs, source, dx, partial_ptr, slab, at, c,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """The same for few channels."""
    channel = c + tl.arange(0, CHANNELS)
    affine = load_affine(source.affine, channel, source.C)
    sum_gx = tl.zeros([CHANNELS], NUM.acc)
    sum_g = tl.zeros([CHANNELS], NUM.acc)
    pixel = tl.arange(0, TILE.images * TILE.columns)
    w_stop = tl.where(at.h < source.H, source.W, 0)
    raw = Image(source.x, source.N, source.H, source.W, source.C, None, None, None)
    out = Image(dx, source.N, source.H, source.W, source.C, None, None, None)
    for b in tl.static_range(WIDE):
        g = gs[b]
        if source.affine is not None or source.SLOPE is not None:
            value = load_pixels(raw, (), at, b, c, None, CHANNELS, True, TILE, NUM.acc, WIDE)
            real = (at.n + pixel // TILE.columns < source.N) & (WIDE * (at.w + pixel % TILE.columns) + b < w_stop)
            g = tl.where(real[:, None], g, 0.0)
            g, gx, masked = source_backward(g, value, affine, source.SLOPE, NUM.acc)
            if source.affine is not None:
                sum_gx += sum_products(gx)
                sum_g += tl.sum(masked, 0)
        store_pixels(out, g.to(NUM.dtype), at, b, c, CHANNELS, TILE, WIDE)
    if source.affine is not None:
        store_affine_gradient(partial_ptr, slab, channel, source.C, affine.scale, sum_gx, sum_g)


# ---- for the launchers -------------------------------------------------------------------------------------------


def side(source: Source | None, tile: Tile, channels: int) -> tuple[Any, Tensor | None]:
    """A source's memory and affine as the kernels take them; of no source None."""
    if source is None:
        return None, None
    return operand(source.x, tile, channels, tile.tma and source.zoom is None), source.affine


def operand(x: Tensor, tile: Tile, channels: int, tma: bool, wide: int = 1, pooled: int = 1) -> Any:
    """An NHWC activation as the kernels read and write it, ``channels`` at a time; 2×2-``pooled`` if that is 2."""
    batch, depth, height, width = x.shape
    columns = tile.columns // pooled
    if wide == 1:
        return describe(x, (batch, height, width, depth), (tile.images, 1, columns, channels), tma)
    return describe(x, (batch, height, width // wide, wide, depth), (tile.images, 1, columns, 1, channels), tma)
