"""What registers hold: bits, as numpy arrays of unsigned integers, and the numbers that they stand for.

A register is one bit pattern for every thread, or a numpy scalar where all threads have the same. :data:`KINDS` says
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


def to_tf32(bits: Array, away: bool) -> Array:
    """float32 rounded to 10 bits of mantissa: ties away from zero (``.rna``) or to even (``.rn``)."""
    add = u4(0x1000) if away else u4(0x0FFF) + ((bits >> u4(13)) & u4(1))
    return (bits + add) & u4(0xFFFFE000)


def _halves(bits: Array, kind: Any) -> Array:
    """The low and the high half of 32 bits, as columns."""
    return np.ascontiguousarray(bits).reshape(-1, 1).view(kind)


def _joined(x: Array) -> Array:
    return np.ascontiguousarray(x).view(u4).reshape(-1)


class Kind(NamedTuple):
    """A type: the bytes it has, its numbers from bits, and bits from its numbers."""

    size: int
    decode: Function
    encode: Function


def _same(x: Any) -> Any:
    return x


def _viewed(size: int, kind: Any) -> Kind:
    return Kind(size, lambda x: x.view(kind), lambda x: x.view(UNSIGNED[size]))


KINDS: dict[str, Kind] = {"pred": Kind(0, _same, _same)}
for _size in (1, 2, 4, 8):
    _bits = 8 * _size
    KINDS |= {f"u{_bits}": Kind(_size, _same, _same), f"b{_bits}": Kind(_size, _same, _same)}
    KINDS[f"s{_bits}"] = _viewed(_size, SIGNED[_size])
KINDS |= {"f32": _viewed(4, f4), "tf32": _viewed(4, f4), "f64": _viewed(8, f8)}
KINDS |= {"f16": Kind(2, from_f16, to_f16), "bf16": Kind(2, from_bf16, to_bf16)}
KINDS["f16x2"] = Kind(4, lambda x: from_f16(_halves(x, u2)), lambda x: _joined(to_f16(x)))
KINDS["bf16x2"] = Kind(4, lambda x: from_bf16(_halves(x, u2)), lambda x: _joined(to_bf16(x)))
KINDS["u16x2"] = Kind(4, lambda x: _halves(x, u2), _joined)
KINDS["s16x2"] = Kind(4, lambda x: _halves(x, i2), _joined)


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

# The largest relative error that the ISA grants (9.7.3), of lg2, sin and cos the largest absolute one near zero.
ERRORS = {"rcp": 2.0**-23, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9, "ex2": 2.0**-22, "lg2": 2.0**-22}
ERRORS |= {"tanh": 2.0**-11, "sin": 2.0**-20.5, "cos": 2.0**-20.5, "div": 2.0**-22}  # div: 2 ulp

EXACT: dict[str, Function] = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
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
    error = (ERRORS[name] - 2.0**-24) * chance
    absolute = name in ("sin", "cos", "lg2")
    result: Array = (
        np.where(np.abs(true) < 1, true + error, true * (1 + error)) if absolute else true * (1 + error)
    ).astype(f4)
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


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: b with a field of bits replaced by the lowest ones of a."""
    position, length = (np.asarray(n).astype(u8) & u8(255) for n in (position, length))
    mask = ((u8(1) << length) - u8(1)) << position
    return ((b.astype(u8) & ~mask) | ((a.astype(u8) << position) & mask)).astype(b.dtype)


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


def look_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: bit by bit, what the table of 8 bits says at 4·a + 2·b + c."""
    result = u4(0)
    for i in range(8):
        if int(table) >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return np.asarray(result)


def leading_zeros(a: Array) -> Array:
    """clz."""
    bits = _bits_of(a)
    length = np.where(a == 0, 0, np.frexp(a.astype(np.longdouble))[1])
    return (bits - length).astype(u4)


def to_integer(x: Array, kind: Any, rounding: str) -> Array:
    """cvt: a float rounded to an integer and held within its range; NaN becomes 0."""
    whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(f8))
    limits = np.iinfo(kind)
    over, under = whole >= float(limits.max), whole <= float(limits.min)
    inside = np.where(over | under | np.isnan(whole), 0, whole).astype(kind)
    return np.where(over, kind(limits.max), np.where(under, kind(limits.min), inside))
