"""What registers hold: bits, as numpy arrays of unsigned integers, and the numbers that they stand for.

A register is one bit pattern for every thread, or a numpy scalar where all threads have the same. :data:`FORMATS` says
for each PTX type how bits become numbers to compute with (16-bit floats become float32, a packed pair becomes two
columns) and how numbers become bits. Sums, products and fused multiply-adds are rounded once, as the ISA says
(9.7.3 and 9.7.4); what it calls ``.approx`` or ``.full`` is as wrong as it may be: see :func:`approximate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any  # of numpy, one element for each thread; or a numpy scalar, the same for all
Function = Callable[..., Any]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f4, f8 = np.float32, np.float64

UNSIGNED: dict[int, Any] = {0: np.bool_, 1: u1, 2: u2, 4: u4, 8: u8}
SIGNED: dict[int, Any] = {1: i1, 2: i2, 4: i4, 8: i8}

# ---- numbers as bits ---------------------------------------------------------------------------------------------


def from_bf16(bits: Array) -> Array:
    """float32 of bfloat16."""
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(x: Array) -> Array:
    """bfloat16 of float32, to nearest even; any NaN becomes 0x7FFF, as ``cvt`` says."""
    bits = x.astype(f4).view(u4)
    rounded = ((bits + (u4(0x7FFF) + ((bits >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    nan = (bits & u4(0x7FFFFFFF)) > u4(0x7F800000)
    return np.where(nan, u2(0x7FFF), rounded) if nan.any() else rounded


def from_f16(bits: Array) -> Array:
    """float32 of float16."""
    return bits.view(np.float16).astype(f4)


def to_f16(x: Array) -> Array:
    """float16 of float32, to nearest even."""
    return x.astype(np.float16).view(u2)


def to_tf32(bits: Array) -> Array:
    """float32 rounded to 10 bits of mantissa, ties away from zero (``.rna``)."""
    nan = (bits & u4(0x7FFFFFFF)) > u4(0x7F800000)
    return np.where(nan, u4(0x7FFFFFFF), (bits + u4(0x1000)) & u4(0xFFFFE000))


def from_tf32(bits: Array) -> Array:
    """float32 of what a tensor core reads as TF32: the low 13 bits are cut off."""
    return (bits & u4(0xFFFFE000)).view(f4)


def _halves(bits: Array, kind: Any) -> Array:
    """The low and the high half of 32 bits, as columns."""
    return np.ascontiguousarray(bits).reshape(-1, 1).view(kind)


def _joined(x: Array) -> Array:
    return np.ascontiguousarray(x).view(u4).reshape(-1)


class Format(NamedTuple):
    """A type: the bytes it has, its numbers from bits, and bits from its numbers."""

    size: int
    decode: Function
    encode: Function


def _same(x: Any) -> Any:
    return x


def _viewed(size: int, kind: Any) -> Format:
    return Format(size, lambda x: x.view(kind), lambda x: x.view(UNSIGNED[size]))


FORMATS: dict[str, Format] = {"pred": Format(0, _same, _same)}
for _size in (1, 2, 4, 8):
    _bits = 8 * _size
    FORMATS |= {f"u{_bits}": Format(_size, _same, _same), f"b{_bits}": Format(_size, _same, _same)}
    FORMATS[f"s{_bits}"] = _viewed(_size, SIGNED[_size])
FORMATS["f32"] = _viewed(4, f4)
FORMATS |= {"f16": Format(2, from_f16, to_f16), "bf16": Format(2, from_bf16, to_bf16)}
FORMATS["f16x2"] = Format(4, lambda x: from_f16(_halves(x, u2)), lambda x: _joined(to_f16(x)))
FORMATS["bf16x2"] = Format(4, lambda x: from_bf16(_halves(x, u2)), lambda x: _joined(to_bf16(x)))
FORMATS["u16x2"] = Format(4, lambda x: _halves(x, u2), _joined)
FORMATS["s16x2"] = Format(4, lambda x: _halves(x, i2), _joined)


def is_float(kind: str) -> bool:
    """Whether a type's numbers are floats."""
    return "f" in kind


# ---- fused multiply-add ------------------------------------------------------------------------------------------


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in float32, rounded once.

    The product is exact in float64 (48 bits), the sum rounded there and then again. Twice is once, except where the
    first rounding ends half-way between two float32, or where they lie closer together: there the sum is rounded to odd
    first (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008), which loses no tie.
    """
    product, addend = a.astype(f8) * b.astype(f8), c.astype(f8)
    total = np.asarray(product + addend)
    doubtful = (total.view(u8) & u8(0x1FFFFFFF)) == u8(0x10000000)
    doubtful |= np.abs(total) < 2.0**-125
    if doubtful.any():
        total = _odd_sum(product, addend)
    return total.astype(f4)


def fma_16(a: Array, b: Array, c: Array) -> Array:
    """a·b + c of 16-bit floats, as a float32 that rounds to them as the exact sum does."""
    total = _odd_sum(a.astype(f8) * b.astype(f8), c.astype(f8))
    short = np.asarray(total.astype(f4))
    bits, wide = short.view(u4), short.astype(f8)
    wrong = (wide != total) & ((bits & u4(1)) == 0) & np.isfinite(wide)
    nudged = np.where((np.abs(total) > np.abs(wide)), bits + u4(1), bits - u4(1))
    return np.where(wrong, nudged, bits).view(f4)


def _odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd: exact, or that one of its two neighbours whose last bit is 1."""
    total = np.asarray(a + b)
    part = total - a
    error = (a - (total - part)) + (b - part)  # what the sum lost, exactly (Knuth)
    bits = total.view(u8)
    inexact = (error != 0) & ((bits & u8(1)) == 0) & np.isfinite(total)
    return np.where(inexact, np.where((error > 0) == (total > 0), bits + u8(1), bits - u8(1)), bits).view(f8)


# ---- what is only approximate ------------------------------------------------------------------------------------

# The largest relative error that the ISA grants (9.7.3); of div it is 2 units in the last place.
ERRORS = {"rcp": 2.0**-23, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9, "ex2": 2.0**-22, "div": 2.0**-22}

EXACT: dict[str, Function] = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "div": lambda x, y: x / y,
}


def exact(name: str, *operands: Array) -> Array:
    """A float32 function, rounded to nearest (``.rn``)."""
    return np.asarray(EXACT[name](*(x.astype(f8) for x in operands))).astype(f4)


def approximate(name: str, *operands: Array) -> Array:
    """A float32 function, with an error up to what the ISA grants, which depends on the operands alone.

    So equal operands have equal results, as on a GPU, and nothing can lean on a result that happens to be right.
    """
    true = np.asarray(EXACT[name](*(x.astype(f8) for x in operands)))
    mixed = u4(0x9E3779B9)
    for x in operands:  # a multiplicative hash of the bits
        mixed = (np.asarray(x).view(u4) ^ mixed) * u4(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> u4(13))) * u4(0xC2B2AE35)
    chance = (mixed ^ (mixed >> u4(16))).astype(f8) / 2.0**31 - 1  # in [−1, 1)
    result: Array = (true * (1 + (ERRORS[name] - 2.0**-24) * chance)).astype(f4)
    return result


# ---- integers ----------------------------------------------------------------------------------------------------


def _bits_of(x: Any) -> int:
    return 8 * int(x.dtype.itemsize)


def divide(a: Array, b: Array) -> Array:
    """Towards zero; by zero all ones."""
    if a.dtype.kind == "u":
        quotient = a // np.where(b == 0, a.dtype.type(1), b)
    else:
        magnitude = np.abs(a) // np.abs(np.where(b == 0, a.dtype.type(1), b))
        quotient = np.where((a < 0) != (b < 0), -magnitude, magnitude)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a: Array, b: Array) -> Array:
    """What :func:`divide` leaves."""
    return a - b * divide(a, b)


def shift_left(a: Array, n: Array) -> Array:
    """a · 2ⁿ; 0 from as many bits on as there are."""
    bits = _bits_of(a)
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, n: Array) -> Array:
    """a / 2ⁿ, downwards; of a signed number the sign is kept."""
    last = _bits_of(a) - 1
    shifted = a >> np.minimum(n, last).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n > last, a.dtype.type(0), shifted)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    half = u8(_bits_of(a))
    if half < 64:
        wide: Any = i8 if a.dtype.kind == "i" else u8
        high: Array = ((a.astype(wide) * b.astype(wide)) >> half.astype(wide)).astype(a.dtype)
        return high
    signed = a.dtype.kind == "i"
    return np.asarray(
        [_high(x, y, signed) for x, y in zip(*map(np.ravel, np.broadcast_arrays(a, b)), strict=True)], a.dtype
    )


def _high(x: Any, y: Any, signed: bool) -> int:
    high = int(x) * int(y) >> 64
    return high if signed or high < 1 << 64 else high - (1 << 64)


def extract(a: Array, position: Array, length: Array) -> Array:
    """bfe: a field of bits, of which a signed one's first is its sign."""
    bits, signed = _bits_of(a), a.dtype.kind == "i"
    position, length = (np.asarray(n).astype(i8) & 255 for n in (position, length))
    if signed:
        wide = a.astype(i8) >> np.minimum(position, bits - 1)
        up = 64 - np.clip(length, 1, bits)
        return np.where(length == 0, 0, (wide << up) >> up).astype(a.dtype)
    wide = np.where(position < bits, a.astype(u8) >> np.minimum(position, 63).astype(u8), u8(0))
    return (wide & ((u8(1) << np.minimum(length, 63).astype(u8)) - u8(1))).astype(a.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of the eight of b:a, each chosen by a nibble whose upper bit asks for copies of the sign."""
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    result = u4(0)
    for i in range(4):
        nibble = (selector >> u4(4 * i)) & u4(15)
        byte = (both >> ((nibble & u4(7)).astype(u8) * u8(8))) & u8(255)
        sign = np.where(byte & u8(128), u8(255), u8(0))
        result = result | (np.where(nibble & u4(8), sign, byte).astype(u4) << u4(8 * i))
    return np.asarray(result)


WHOLE: dict[str, Function] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, kind: Any, whole: Function) -> Array:
    """cvt: a float rounded by one of :data:`WHOLE` and held within an integer's range; NaN becomes 0."""
    x = whole(x.astype(f8))
    limits = np.iinfo(kind)
    over, under = x >= float(limits.max), x <= float(limits.min)
    inside = np.where(over | under | np.isnan(x), 0, x).astype(kind)
    return np.where(over, kind(limits.max), np.where(under, kind(limits.min), inside))
