"""Each instruction that is understood, as a function of the threads: a table's line for what maps numbers to numbers,
a function for what does more.

What stands in no table is unknown, with any rounding or modifier that is not written there: when a kernel is read, it
is named. Sections are those of the PTX ISA 9.0; within one an instruction is found under its own name.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ptx import values as v
from benchmarks.ptx.program import SIZES, Program, Statement, UnknownError, split
from benchmarks.ptx.values import FORMATS, SIGNED, UNSIGNED, Array, Function, i4, is_float, u1, u2, u4

if TYPE_CHECKING:
    from benchmarks.ptx.machine import Effect, Mask, Threads

    Reader = Callable[[Threads], Any]

# ---- tables: an opcode with the words that matter and without its type, for integers and for floats ---------------

INTEGER: dict[str, Function] = {
    # 9.7.1 Integer Arithmetic
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "mul.hi": v.high_product,
    "mad.lo": lambda a, b, c: a * b + c,
    "div": v.divide,
    "rem": v.remainder,
    "abs": np.abs,
    "neg": operator.neg,
    "min": np.minimum,
    "max": np.maximum,
    "bfe": v.extract,
    "popc": lambda x: np.bitwise_count(x).astype(u4),
    # 9.7.8 Logic and Shift
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "shl": v.shift_left,
    "shr": v.shift_right,
    # 9.7.9 Data Movement and Conversion
    "prmt": v.permute,
}
FLOAT: dict[str, Function] = {
    # 9.7.3 Floating Point, 9.7.4 Half Precision Floating Point; rounded to nearest even, with or without .rn
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "fma": v.fma_16,
    "neg": operator.neg,
    "abs": np.abs,
    "min": np.fmin,  # of a number and NaN the number
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}
FLOAT32: dict[str, Function] = FLOAT | {"fma": v.fma, "div.full": functools.partial(v.approximate, "div")}
FLOAT32 |= {f"{name}.approx": functools.partial(v.approximate, name) for name in v.ERRORS}
FLOAT32 |= {f"{name}.rn": functools.partial(v.exact, name) for name in ("rcp", "sqrt", "div")}

# 9.7.6 Comparison and Selection, 9.7.7 Half Precision Comparison: setp. With "u" at its end also true of NaN.
COMPARISONS: dict[str, Function] = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMPARISONS |= {"num": lambda a, b: np.True_, "nan": lambda a, b: np.False_}  # but of NaN False, and True

# Operations of atom, red (9.7.13) and redux (9.7.13).
COMBINATIONS: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}
COMBINATIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}

# 10 Special Registers
SPECIAL: dict[str, Reader] = {
    "%tid.x": lambda t: t.thread,
    "%ntid.x": lambda t: u4(t.size),
    "%ctaid.x": lambda t: t.program_id % u4(t.grid.size[0]),
    "%ctaid.y": lambda t: t.program_id // u4(t.grid.size[0]) % u4(t.grid.size[1]),
    "%ctaid.z": lambda t: t.program_id // u4(t.grid.size[0]) // u4(t.grid.size[1]),
    "%nctaid.x": lambda t: u4(t.grid.size[0]),
    "%nctaid.y": lambda t: u4(t.grid.size[1]),
    "%nctaid.z": lambda t: u4(t.grid.size[2]),
}


def effect(program: Program, statement: Statement) -> Effect:
    """What an instruction does; raises :class:`UnknownError`, which names it, if that is not known."""
    try:
        return _maker(statement.opcode)(_Operands(program, statement))
    except (KeyError, IndexError, ValueError) as error:
        raise UnknownError(
            f"{statement.opcode} is not understood: {program.lines[statement.line - 1].strip()}"
        ) from error


@functools.cache
def _maker(opcode: str) -> Callable[[_Operands], Effect]:
    return next((make for form, make in FORMS.items() if re.fullmatch(form, opcode)), _elementwise)


class _Operands:
    """An instruction's operands, for the functions that tell what it does."""

    def __init__(self, program: Program, statement: Statement) -> None:
        self.program, self.statement = program, statement
        self.words, self.line = statement.words, statement.line
        self.kind = self.words[-1]

    def __len__(self) -> int:
        return len(self.statement.operands)

    def __getitem__(self, i: int) -> str:
        return self.statement.operands[i]

    def register(self, name: str) -> int | None:
        """The number of the register to write; None for ``_``."""
        if name == "_":
            return None
        number = self.program.register(name)
        if number is None:
            raise ValueError(name)
        return number

    def registers(self, i: int) -> list[int]:
        """The numbers of operand i's registers."""
        return [self.register(name) for name in self.names(i)]  # type: ignore[misc]

    def names(self, i: int) -> list[str]:
        """A vector operand's parts, or the operand."""
        text = self[i]
        return split(text[1:-1]) if text.startswith("{") else [text]

    def reader(self, text: str, kind: str) -> Reader:
        """What reads an operand as a type: a register, a special one, a symbol, or a number."""
        size, decode, _ = FORMATS[kind]
        number = self.program.register(text)
        if number is not None:
            held = self.program.sizes[number]
            if held == size:
                if (kind[0] in "ub" and kind[1:].isdigit()) or kind == "pred":
                    return lambda t: t.registers[number]
                return lambda t: decode(t.registers[number])
            narrow = UNSIGNED[size]
            return lambda t: decode(t.registers[number].astype(narrow))
        if text.startswith("!"):
            inner = self.reader(text[1:], kind)
            return lambda t: ~inner(t)
        if text[0] == "%":
            return SPECIAL[text]
        constant = decode(self._constant(text, size))
        return lambda t: constant

    def _constant(self, text: str, size: int) -> Any:
        if size == 0:
            return np.bool_(int(text))
        if text in self.program.symbols:
            return UNSIGNED[size](self.program.symbols[text])
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return UNSIGNED[size](int(text[2:], 16))
        return UNSIGNED[size](int(text.rstrip("U"), 0) & (1 << 8 * size) - 1)

    def read(self, i: int, kind: str = "") -> Reader:
        """What reads operand i."""
        return self.reader(self[i], kind or self.kind)

    def every(self, i: int, kind: str) -> Callable[[Threads], Array]:
        """What reads operand i of every thread."""
        read = self.read(i, kind)
        return lambda t: t.full(read(t))

    def writer(self, name: str, kind: str = "") -> Callable[[Threads, Any, Mask], None]:
        """What writes numbers of a type into a register, which may be wider: a signed number then keeps its value."""
        kind = kind or self.kind
        register = self.register(name)
        size, _, encode = FORMATS[kind]
        if register is None or self.program.sizes[register] == size:
            return lambda t, value, mask: t.put(register, encode(np.asarray(value)), mask)
        held = self.program.sizes[register]
        if kind[0] == "s":
            signed = SIGNED[held]
            return lambda t, value, mask: t.put(register, np.asarray(value).astype(signed).view(UNSIGNED[held]), mask)
        wide = UNSIGNED[held]
        return lambda t, value, mask: t.put(register, encode(np.asarray(value)).astype(wide), mask)

    def address(self, text: str, kind: str) -> Callable[[Threads], Array]:
        """What computes ``[base + offset]`` of every thread."""
        found = re.fullmatch(r"\[\s*([%\w.@$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise ValueError(text)
        base = self.reader(found[1], kind)
        offset = UNSIGNED[SIZES[kind]](int(found[2] or "0", 0) & (1 << 8 * SIZES[kind]) - 1)
        return lambda t: t.full(base(t) + offset)


# ---- what maps numbers to numbers --------------------------------------------------------------------------------


def _elementwise(o: _Operands) -> Effect:
    name, kind = ".".join(word for word in o.words[:-1] if word != "ftz"), o.kind
    kinds = [kind] * (len(o) - 1)
    if is_float(kind):
        table = FLOAT32 if kind == "f32" else FLOAT
        function = table.get(name) or table[name.removesuffix(".rn")]
        if "ftz" not in o.words:
            return _apply(o, function, kinds)
        if kind != "f32":
            raise ValueError(kind)
        return _apply(o, lambda *x: _flushed(function(*map(_flushed, x))), kinds)
    if name in ("shl", "shr"):
        kinds[1] = "u32"
    elif name == "bfe":
        kinds[1:] = ["u32", "u32"]
    return _apply(o, INTEGER[".".join(o.words[:-1])], kinds)


def _flushed(x: Array) -> Array:
    """``.ftz``: subnormal numbers become zero."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(v.f4(0), x), x)


def _apply(o: _Operands, function: Function, kinds: list[str], result: str = "") -> Effect:
    reads = [o.read(i + 1, kind) for i, kind in enumerate(kinds)]
    write = o.writer(o[0], result)
    if len(reads) == 1:
        (a,) = reads
        return lambda t, mask: write(t, function(a(t)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda t, mask: write(t, function(a(t), b(t)), mask)
    return lambda t, mask: write(t, function(*(read(t) for read in reads)), mask)


def _wide(o: _Operands) -> Effect:
    """mul.wide, mad.wide (9.7.1): a product of twice the width."""
    kind = f"{o.kind[0]}{2 * int(o.kind[1:])}"
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[SIZES[kind]]
    if o.words[0] == "mul":
        return _apply(o, lambda a, b: a.astype(wide) * b.astype(wide), [o.kind] * 2, kind)
    return _apply(o, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, [o.kind, o.kind, kind], kind)


def _move(o: _Operands) -> Effect:
    """mov, cvta (9.7.9): also several registers into a wide one, and back."""
    size = SIZES[o.kind]
    if o[0].startswith("{"):
        parts = o.names(0)
        narrow = size // len(parts)
        every, writes = o.every(1, o.kind), [o.writer(name, f"b{8 * narrow}") for name in parts]

        def unpack(t: Threads, mask: Mask) -> None:
            columns = np.ascontiguousarray(every(t)).reshape(-1, 1).view(UNSIGNED[narrow])
            for i, write in enumerate(writes):
                write(t, columns[:, i].copy(), mask)

        return unpack
    write = o.writer(o[0])
    if o[1].startswith("{"):
        parts = o.names(1)
        reads = [o.reader(name, f"b{8 * size // len(parts)}") for name in parts]

        def pack(t: Threads, mask: Mask) -> None:
            columns = np.stack([t.full(read(t)) for read in reads], 1)
            write(t, columns.view(UNSIGNED[size]).reshape(-1), mask)

        return pack
    read, to, source = o.read(1), o.register(o[0]), o.program.register(o[1])

    def move(t: Threads, mask: Mask) -> None:
        write(t, read(t), mask)
        t.asynchronous.moved(to, source)

    return move


def _select(o: _Operands) -> Effect:
    """selp (9.7.6)."""
    kind = f"b{8 * SIZES[o.kind]}"
    yes, no, which, write = o.read(1, kind), o.read(2, kind), o.read(3, "pred"), o.writer(o[0], kind)
    return lambda t, mask: write(t, np.where(which(t), yes(t), no(t)), mask)


def _compare(o: _Operands) -> Effect:
    """setp (9.7.6, 9.7.7): of a packed pair into two predicates; else with ``and``, ``or``, ``xor`` of a third."""
    name, *combination = o.words[1:-1]
    floats = is_float(o.kind)
    unordered = floats and (name == "nan" or (len(name) == 3 and name.endswith("u")))
    function = COMPARISONS[name[:-1] if unordered and name != "nan" else name]

    def compare(a: Any, b: Any) -> Any:
        result = function(a, b)
        if not floats:
            return result
        nan = np.isnan(a) | np.isnan(b)
        return result | nan if unordered else result & ~nan

    a, b = o.read(1), o.read(2)
    targets = [o.writer(name, "pred") for name in o[0].split("|")]
    if o.kind.endswith("x2"):

        def pair(t: Threads, mask: Mask) -> None:
            columns = compare(a(t), b(t))
            for i, write in enumerate(targets):
                write(t, columns[:, i], mask)

        return pair
    (write,) = targets
    if not combination:
        return lambda t, mask: write(t, compare(a(t), b(t)), mask)
    combine, third = INTEGER[combination[0]], o.read(3, "pred")
    return lambda t, mask: write(t, combine(compare(a(t), b(t)), third(t)), mask)


def _convert(o: _Operands) -> Effect:
    """cvt (9.7.9): of integers, of an integer to float32 and back, from and to 16-bit floats, to TF32."""
    *rounding, to, of = o.words[1:]
    how = ".".join(rounding)
    numbers = (SIGNED if to[0] == "s" else UNSIGNED)[SIZES[to]]
    if not is_float(to) and is_float(of):
        whole = v.WHOLE[how]
        return _apply(o, lambda x: v.to_integer(x, numbers, whole), [of], to)
    if not is_float(to) and how == "":
        extended = (SIGNED if of[0] == "s" else UNSIGNED)[SIZES[to]]  # by the source's sign
        return _apply(o, lambda x: x.astype(extended).view(numbers), [of], to)
    if to == "f32" and how == ("" if is_float(of) else "rn"):
        return _apply(o, lambda x: x.astype(v.f4), [of], to)
    if (to, of, how) == ("tf32", "f32", "rna"):
        return _apply(o, v.to_tf32, ["b32"], "b32")
    if of == "f32" and how == "rn" and to in ("bf16", "f16"):
        return _apply(o, lambda x: x, [of], to)
    if of == "f32" and how == "rn" and to in ("bf16x2", "f16x2"):
        half = FORMATS[to[:-2]].encode
        return _apply(o, lambda high, low: half(high).astype(u4) << u4(16) | half(low).astype(u4), [of, of], "b32")
    raise ValueError(how)


# ---- memory: 9.7.9 ld, st; 9.7.13 atom, red ----------------------------------------------------------------------


def _space(o: _Operands) -> tuple[str, str]:
    """The state space of an access, and the type of its addresses."""
    return ("shared", "u32") if "shared" in o.words else ("global", "u64")


def _parameter(o: _Operands) -> Effect:
    """ld.param: of the launch's arguments."""
    size, names = SIZES[o.kind], o.names(0)
    name, _, offset = o[1][1:-1].partition("+")
    name, start = name.strip(), int(offset or "0")
    if name not in o.program.parameters:
        raise ValueError(name)
    writes = [o.writer(register, f"b{8 * size}") for register in names]

    def parameter(t: Threads, mask: Mask) -> None:
        raw = t.grid.parameters[name][start:]
        for write, value in zip(writes, np.frombuffer(raw[: size * len(names)], UNSIGNED[size]), strict=True):
            write(t, value, mask)

    return parameter


def _load(o: _Operands) -> Effect:
    size, names = SIZES[o.kind], o.names(0)
    space, kind = _space(o)
    address, total, line = o.address(o[1], kind), size * len(names), o.line
    bits = o.kind if o.kind[0] == "s" else f"b{8 * size}"
    writes = [o.writer(name, bits) for name in names]
    number = SIGNED[size] if o.kind[0] == "s" else UNSIGNED[size]

    def load(t: Threads, mask: Mask) -> None:
        lanes = t.active(mask)
        if space == "shared":
            data = t.shared.load(address(t)[lanes], total, lanes, line)
        else:
            data = t.memory.load(t, address(t)[lanes], total, lanes, line)
        columns = data.view(number)
        if mask is not None:
            columns = np.zeros((t.lanes, len(names)), number)
            columns[lanes] = data.view(number)
        for i, write in enumerate(writes):
            write(t, columns[:, i].copy(), mask)

    return load


def _store(o: _Operands) -> Effect:
    size, line = SIZES[o.kind], o.line
    space, kind = _space(o)
    address, reads = o.address(o[0], kind), [o.reader(name, f"b{8 * size}") for name in o.names(1)]

    def store(t: Threads, mask: Mask) -> None:
        lanes = t.active(mask)
        columns = np.stack([t.full(read(t))[lanes] for read in reads], 1)
        data = columns.view(u1).reshape(len(lanes), -1)
        if space == "shared":
            t.shared.store(address(t)[lanes], data, lanes, line)
        else:
            t.memory.store(t, address(t)[lanes], data, lanes, line)

    return store


def _atomic(o: _Operands) -> Effect:
    """atom, red: of integers, whose sums depend on no order."""
    space, kind = _space(o)
    returns, line = o.words[0] == "atom", o.line
    if returns and space == "global":
        raise ValueError(o.kind)
    function = COMBINATIONS[o.words[-2]]
    address, every = o.address(o[1 if returns else 0], kind), o.every(2 if returns else 1, o.kind)
    write = o.writer(o[0]) if returns else None

    def atomic(t: Threads, mask: Mask) -> None:
        lanes, operand = t.active(mask), every(t)
        if space == "global":
            t.memory.update(t, address(t)[lanes], function, operand[lanes], lanes, line)
            return
        old = np.array(operand)
        old[lanes] = t.shared.update(address(t)[lanes], function, operand[lanes], lanes, line)
        if write is not None:
            write(t, old, mask)

    return atomic


# ---- within a warp: 9.7.9 shfl; 9.7.13 vote, redux, elect --------------------------------------------------------


def _shuffle(o: _Operands) -> Effect:
    """shfl.sync: another lane's value, or one's own where that lies outside the segment; and whether it does not."""
    target, _, inside = o[0].partition("|")
    mode, line = o.words[2], o.line
    value, by, clamp = o.every(1, "b32"), o.every(2, "s32"), o.every(3, "s32")
    write, tell = o.writer(target, "b32"), o.writer(inside or "_", "pred")

    def shuffle(t: Threads, mask: Mask) -> None:
        t.whole_warps(mask, line)
        lane, b, c = t.lane.astype(i4), by(t) & 31, clamp(t)
        segment, bound = c >> 8 & 31, c & 31
        last = (lane & segment) | (bound & ~segment)
        first = lane & segment
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        valid = other >= last if mode == "up" else other <= last
        write(t, value(t)[t.all - lane + np.where(valid, other, lane)], mask)
        tell(t, valid, mask)

    return shuffle


def _reduce(o: _Operands) -> Effect:
    """redux.sync: an integer operation over the warp."""
    reduce, every, write, line = COMBINATIONS[o.words[2]].reduce, o.every(1, o.kind), o.writer(o[0]), o.line

    def redux(t: Threads, mask: Mask) -> None:
        t.whole_warps(mask, line)
        x = every(t)
        write(t, np.repeat(reduce(x.reshape(-1, 32), axis=1).astype(x.dtype), 32), mask)

    return redux


def _vote(o: _Operands) -> Effect:
    """vote.sync.ballot: a bit for each lane."""
    every, write, line = o.every(1, "pred"), o.writer(o[0]), o.line

    def vote(t: Threads, mask: Mask) -> None:
        t.whole_warps(mask, line)
        bits = every(t).reshape(-1, 32).astype(u4) << np.arange(32, dtype=u4)
        write(t, np.repeat(bits.sum(1).astype(u4), 32), mask)

    return vote


def _elect(o: _Operands) -> Effect:
    """elect.sync: one lane of a warp, the first."""
    number, _, chosen = o[0].partition("|")
    write, tell, line = o.writer(number, "b32"), o.writer(chosen, "pred"), o.line

    def elect(t: Threads, mask: Mask) -> None:
        t.whole_warps(mask, line)
        write(t, u4(0), mask)
        tell(t, t.lane == 0, mask)

    return elect


# ---- matrices of a warp: 9.7.14 Warp Level Matrix Multiply-Accumulate --------------------------------------------


def _rows(first: Array, matrices: int) -> Array:
    """Lanes that hold addresses of 16-byte rows of 8 × 8 matrices: of matrix j's row i it is lane 8·j + i of a warp."""
    return (first[:, None] + np.arange(8 * matrices)).ravel()


def _load_matrices(o: _Operands) -> Effect:
    """ldmatrix: lane i gets elements 2·(i mod 4), + 1 of row i / 4 of each matrix, or of its transpose."""
    registers, address, transposed, line = o.registers(0), o.address(o[1], "u32"), "trans" in o.words, o.line

    def ldmatrix(t: Threads, mask: Mask) -> None:
        first = t.whole_warps(mask, line)
        lanes = _rows(first, len(registers))
        rows = t.shared.load(address(t)[lanes], 16, lanes, line).view(u2).reshape(len(first), len(registers), 8, 8)
        words = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows).view(u4)
        for j, register in enumerate(registers):
            t.put_rows(register, words[:, j].reshape(-1), t.active(mask), mask)

    return ldmatrix


def _store_matrices(o: _Operands) -> Effect:
    """stmatrix: the other way."""
    registers, address, transposed, line = o.registers(1), o.address(o[0], "u32"), "trans" in o.words, o.line

    def stmatrix(t: Threads, mask: Mask) -> None:
        first, active = t.whole_warps(mask, line), t.active(mask)
        words = np.stack([t.full(t.registers[r])[active].reshape(-1, 32) for r in registers], 1)
        rows = words.view(u2).reshape(len(first), len(registers), 8, 8)
        lanes = _rows(first, len(registers))
        data = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows).view(u1).reshape(-1, 16)
        t.shared.store(address(t)[lanes], data, lanes, line)

    return stmatrix


_PRODUCTS: dict[str, Function] = {
    "bf16": v.from_bf16,
    "f16": v.from_f16,
    "tf32": v.from_tf32,
}


def _fragment(t: Threads, registers: list[int], kind: str, left: bool) -> Array:
    """The float32 matrices of all warps of which lanes hold fragments: (warps, 16, k) or (warps, k, 8).

    Register r of lane 4·g + i holds, of the left one, row g + 8·(r mod 2), and of the right one, column g; along the
    reduction the elements that fit into 32 bits, from i of them on, 4 lanes and then the next register's (of the left
    one r / 2).
    """
    bits = np.stack([t.full(t.registers[r]) for r in registers])
    each = 1 if kind == "tf32" else 2  # elements in a register
    x = _PRODUCTS[kind](bits if each == 1 else bits.view(u2)).reshape(len(registers), -1, 8, 4, each)
    if left:
        x = x.reshape(-1, 2, *x.shape[1:])  # register, half of the rows, warp, g, i, element
        return np.ascontiguousarray(x.transpose(2, 1, 3, 0, 4, 5)).reshape(x.shape[2], 16, -1)
    return np.ascontiguousarray(x.transpose(1, 0, 3, 4, 2)).reshape(x.shape[1], -1, 8)


def _multiply(o: _Operands) -> Effect:
    """mma.sync: 16 × 8 sums of 32 bits a warp; lane 4·g + i holds columns 2·i, + 1 of rows g and g + 8."""
    kind = o.words[-2]
    to, a, b, c = map(o.registers, range(4))
    line, depth = o.line, int(o.words[3].partition("k")[2])
    if len(a) * (4 if kind == "tf32" else 8) != 2 * depth:
        raise ValueError(depth)

    def mma(t: Threads, mask: Mask) -> None:
        t.whole_warps(mask, line)
        product = np.matmul(_fragment(t, a, kind, True), _fragment(t, b, kind, False))
        spread = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, t.lanes)  # as registers
        for j, register in enumerate(to):
            t.put(register, (t.full(t.registers[c[j]]).view(v.f4) + spread[j]).view(u4), mask)

    return mma


# ---- what is asynchronous ----------------------------------------------------------------------------------------


def _product(o: _Operands) -> Effect:
    """wgmma.mma_async (9.7.15): 64 × n sums; a warp has 16 rows, spread over its lanes as those of mma."""
    n, k = map(int, o.words[4].removeprefix("m64n").split("k"))
    kind, line = o.words[6], o.line
    size = 4 if kind == "tf32" else 2
    sums = o.registers(0)
    left = o.registers(1) if o[1].startswith("{") else []
    a = None if left else o.every(1, "u64")
    b, kept = o.every(2, "u64"), o.every(3, "pred")
    numbers = [int(o[i]) for i in range(4, len(o))]
    sign = v.f4(numbers[0] * numbers[1])
    turned = [bool(x) for x in numbers[2:]]  # operands of 16 bits may be transposed: the left one only in memory
    shape_a = 64, k, size, len(turned) == 2 and turned[0]
    shape_b = n, k, size, bool(turned) and turned[-1]

    def wgmma(t: Threads, mask: Mask) -> None:
        first = t.whole_warps(mask, line, 128)
        descriptors = b(t)
        if (descriptors.reshape(-1, 128) != descriptors[::128, None]).any():
            t.found("a matrix descriptor differs within a warpgroup", line)

        left_at = a(t) if a is not None else None
        for q in map(int, first):
            if left_at is not None:
                t.asynchronous.begin_matrix(left_at[q], shape_a, q, line)
            t.asynchronous.begin_matrix(descriptors[q], shape_b, q, line)

        def compute(which: Array) -> Array:
            number, fetch = _PRODUCTS[kind], t.asynchronous.matrix
            if left_at is None:
                x = _fragment(t, left, kind, True).reshape(-1, 64, k)[which // 128]
            else:
                x = np.stack([number(fetch(left_at[q], shape_a, int(q))) for q in which])
            y = np.stack([number(fetch(descriptors[q], shape_b, int(q))) for q in which])
            result = np.matmul(x, y.swapaxes(1, 2)) * sign
            # (group, warp, half of the rows, g, 8 columns, i, column) as (8 columns, half, column; group, warp, g, i)
            spread = result.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
            return spread.reshape(n // 2, -1)

        t.asynchronous.add_product(sums, compute, kept(t), first, left, line)

    return wgmma


def _copy(o: _Operands) -> Effect:
    """cp.async (9.7.9): a copy of a thread."""
    to, source, size, line = o.address(o[0], "u32"), o.address(o[1], "u64"), int(o[2], 0), o.line
    wanted = o.every(3, "u32") if len(o) > 3 else lambda t: t.full(u4(size))

    def copy(t: Threads, mask: Mask) -> None:
        lanes = t.active(mask)
        t.asynchronous.copy(to(t)[lanes], source(t)[lanes], size, wanted(t)[lanes], lanes, line)

    return copy


def _bulk_copy(o: _Operands) -> Effect:
    """cp.async.bulk.tensor (9.7.9): a copy of a tensor map's block, to or from shared memory."""
    line, loads = o.line, o.words[5] != "global"
    tensor, where = split((o[1] if loads else o[0])[1:-1])
    shared = o.address(o[0] if loads else o[1], "u32")
    descriptor = o.reader(tensor, "u64")
    corner = [o.reader(text, "s32") for text in split(where[1:-1])]
    barrier = o.address(o[2], "u32") if loads else None

    def bulk(t: Threads, mask: Mask) -> None:
        at = [t.full(read(t)) for read in corner]
        lanes, tensors = t.active(mask), t.full(descriptor(t))
        if barrier is not None:
            t.asynchronous.load(shared(t), tensors, at, barrier(t), lanes, line)
        else:
            t.asynchronous.store(shared(t), tensors, at, lanes, line)

    return bulk


def _commit(what: str) -> Callable[[_Operands], Effect]:
    return lambda o: lambda t, mask: t.asynchronous.commit(what, mask)


def _wait(o: _Operands) -> Effect:
    """The wait_group of cp.async, of bulk copies, and of wgmma: until so many groups are under way."""
    most, line = int(o[0]), o.line
    if o.words[0] == "wgmma":
        return lambda t, mask: t.asynchronous.wait_products(most, mask, line)
    if "bulk" in o.words:
        return lambda t, mask: t.asynchronous.wait_bulk(most, mask)
    return lambda t, mask: t.asynchronous.wait_copies(most, mask)


def _mbarrier(o: _Operands) -> Effect:
    """mbarrier (9.7.13)."""
    what, line = o.words[1], o.line
    if what == "init":
        address, count = o.address(o[0], "u32"), int(o[1])
        return lambda t, mask: t.asynchronous.make(address(t), count, t.active(mask), line)
    if what == "inval":
        address = o.address(o[0], "u32")
        return lambda t, mask: t.asynchronous.unmake(address(t), t.active(mask), line)
    address = o.address(o[1], "u32")
    if what == "arrive":
        number = int(o[2]) if len(o) > 2 else 1
        count, expected = (1, number) if "expect_tx" in o.words else (number, 0)
        return lambda t, mask: t.asynchronous.arrive(address(t), count, expected, t.active(mask), line)
    parity, write = o.every(2, "u32"), o.writer(o[0], "pred")
    return lambda t, mask: write(t, t.asynchronous.wait(address(t), parity(t), t.active(mask), line), mask)


def _nothing(o: _Operands) -> Effect:
    return lambda t, mask: None


def _end(o: _Operands) -> Effect:
    """What ends a block, which :class:`.machine.Machine` does; a barrier is one of all threads of a CTA."""
    if "sync" in o.words and (o.statement.predicate is not None or o.statement.operands != ["0"]):
        raise ValueError("a barrier of some threads")
    if o.words[0] == "bra" and o[0] not in o.program.labels:
        raise ValueError(o[0])
    return _nothing(o)


_N = r"(b?f|[bus])\d+"  # a type
_SHARED = r"\.shared(::cta)?"

# What tables do not do: the whole opcode, as a regular expression.
FORMS: dict[str, Callable[[_Operands], Effect]] = {
    r"(mul|mad)\.wide\.[us](16|32)": _wide,
    rf"(mov|cvta\.param)\.(pred|{_N})": _move,
    rf"selp\.{_N}": _select,
    rf"setp\.\w+(\.(and|or|xor))?\.{_N}(x2)?": _compare,
    r"cvt\..*": _convert,
    rf"ld\.param(\.v[24])?\.{_N}": _parameter,
    rf"ld\.(global|shared)(\.v[24])?\.{_N}": _load,
    rf"st\.(global|shared)(\.v[24])?\.{_N}": _store,
    r"(atom|red)(\.(relaxed|cta|gpu|sys|shared|global))+\.(add|min|max|and|or|xor)\.[bsu](32|64)": _atomic,
    r"shfl\.sync\.(up|down|bfly|idx)\.b32": _shuffle,
    r"redux\.sync\.(add|min|max|and|or|xor)\.[bsu]32": _reduce,
    r"vote\.sync\.ballot\.b32": _vote,
    r"elect\.sync": _elect,
    r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": _load_matrices,
    r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16": _store_matrices,
    r"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(bf16|f16|tf32)\.\1\.f32": _multiply,
    # 9.7.15
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.(bf16|f16|tf32)\.\1": _product,
    r"wgmma\.fence\.sync\.aligned": lambda o: lambda t, mask: t.asynchronous.fence_registers(),
    r"wgmma\.commit_group\.sync\.aligned": _commit("products"),
    r"wgmma\.wait_group\.sync\.aligned": _wait,
    # 9.7.9. After .read a bulk copy has read shared memory and may not have written: what it writes no program reads.
    r"cp\.async\.c[ag]\.shared\.global": _copy,
    r"cp\.async\.commit_group": _commit("copies"),
    r"cp\.async\.wait_all": lambda o: lambda t, mask: t.asynchronous.wait_copies(None, mask),
    r"cp\.async\.bulk\.tensor\.[1-5]d\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes": _bulk_copy,
    r"cp\.async\.bulk\.tensor\.[1-5]d\.global\.shared::cta\.bulk_group": _bulk_copy,
    r"cp\.async\.bulk\.commit_group": _commit("bulk"),
    r"cp\.async(\.bulk)?\.wait_group|cp\.async\.bulk\.wait_group\.read": _wait,
    # 9.7.13. Barriers alone order what two warps do, so that an ordinary fence adds nothing; one between proxies lets
    # bulk copies and wgmma see ordinary stores. Lanes of a warp are in step.
    rf"mbarrier\.(init|inval|arrive(\.expect_tx)?|(try|test)_wait\.parity){_SHARED}\.b64": _mbarrier,
    r"fence\.proxy\.async(\.shared::cta)?": lambda o: lambda t, mask: t.shared.fence(t.active(mask)),
    r"membar\.(cta|gl|sys)|fence\.(acq_rel|sc)\.(cta|gpu|sys)|bar\.warp\.sync": _nothing,
    r"(bar|barrier)\.sync(\.aligned)?": _end,
    r"bra(\.uni)?|ret|exit": _end,  # 9.7.12 Control Flow
    r"trap": _end,  # 9.7.19 Miscellaneous
}
