"""What the kernels share: layout at the door, the source read, and sums in a fixed order.

Layout. Kernels read and write NHWC memory (channels_last) and compute addresses from sizes alone, as
``((n·H + h)·W + w)·C + c`` in 64 bits: strides of size-1 dimensions are ambiguous and never looked at.
Accumulation is float32, or float64 for float64 tensors (interpreter only).
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.core import PropagateNan
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastunet.architecture import architecture
from fastunet.layout import stats_dtype

PROPAGATE_ALL = tl.constexpr(PropagateNan.ALL)

# Of every launch. Fused multiply-adds are counted on; Triton's default changes with its version.
OPTIONS = {"enable_fp_fusion": True}

MOST_REMEMBERED = 4096  # shapes: a network has a hundred, each step the same

_TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype in which tensors of ``dtype`` are accumulated."""
    return _TL_DTYPES[stats_dtype(dtype)]


def element(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of ``dtype``."""
    return _TL_DTYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as PyTorch's own convolutions do, by torch.backends.cudnn.conv."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    lowered = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if lowered else "ieee"


def nhwc(x: Tensor) -> Tensor:
    """``x`` in dense channels_last memory: itself if it already is, else one copy."""
    return x.contiguous(memory_format=torch.channels_last)


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


_described: dict[tuple[Any, ...], dict[str, Any]] = {}


def describe(x: Tensor, shape: tuple[int, ...], block_shape: tuple[int, ...], tma: bool) -> Any:
    """x's memory, dense with this ``shape``, as a kernel gets it: a TMA descriptor of blocks, or x itself."""
    if not tma:
        return x
    key = x.dtype, shape, block_shape
    about = _described.get(key)
    if about is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        descriptor = TensorDescriptor(x, list(shape), strides, list(block_shape))
        if len(_described) >= MOST_REMEMBERED:
            _described.clear()
        _described[key] = {name: value for name, value in vars(descriptor).items() if name != "base"}
        return descriptor
    # What is known to be right is not examined again, which takes longer than all else here.
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(about, base=x)
    return descriptor


class _Remembered(NamedTuple):
    """A kernel as it was compiled, and what follows the arguments. ``call``, if there is one, is what Triton's launcher
    ends in, and ``between`` what it says there between the stream and the arguments, which are one tuple if ``tupled``.
    """

    compiled: Any
    constants: tuple[Any, ...]
    call: Any = None
    between: tuple[Any, ...] = ()
    tupled: bool = False


_compiled: dict[tuple[Any, ...], _Remembered] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, with ``args`` before all constants.

    Triton examines every argument at every launch: of a convolution for 31 µs, 10 here. What was launched before with
    the same integers, options and types, and pointers as well aligned, is launched as it was compiled then: on the
    device of its tensors, which is one, or a host's pointer would reach the GPU unexamined.
    """
    # The interpreter's kernels; and those of AMD, whose addresses have 32 bits where a tensor is small.
    if not isinstance(kernel, JITFunction) or torch.version.hip is not None:
        kernel[grid](*args, **options)
        return
    key: list[Any] = [kernel.fn, *options, *options.values()]
    address, place, last = 0, None, None
    for x in args:
        kind = type(x)
        if kind is int:
            key.append(x)
            continue
        if kind is TensorDescriptor:
            last = x.base
            key += x.block_shape
        elif isinstance(x, Tensor):
            last = x
            address |= x.data_ptr()
        else:
            key += kind, x
            continue
        key.append(last.dtype)
        here = last.get_device()  # of the CPU −1; sooner told than last.device
        if here != place:
            if place is not None:
                raise ValueError(f"expected the tensors of a launch on one device, got one on {last.device} among them")
            place = here
    known = (None if last is None else last.device, *key)
    remembered = None if address % 16 else _compiled.get(known)
    if remembered is None:
        compiled = kernel[grid](*args, **options)
        if compiled is not None and address % 16 == 0:
            if len(_compiled) >= MOST_REMEMBERED:
                _compiled.clear()
            _compiled[known] = _remember(compiled, tuple(options[name] for name in kernel.arg_names[len(args) :]))
        return
    compiled, constants, call, between, tupled = remembered
    three = (*grid, 1, 1)[:3]  # dimensions, or more
    if call is None or _hooked():
        compiled[three](*args, *constants)
        return
    stream = driver.active.get_current_stream(place)
    if tupled:
        call(*three, stream, *between, (*args, *constants))
    else:
        call(*three, stream, *between, *args, *constants)


def _hooked() -> bool:
    """Whether somebody has Triton call him at launches, as its profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _remember(compiled: Any, constants: tuple[Any, ...]) -> _Remembered:
    """``compiled``, and how its launcher calls the driver: what it says for grid and stream, arguments and all else."""
    marks, argument = [object() for _ in range(4)], object()
    told: list[Any] = []
    try:
        launcher = copy.copy(compiled.run)
        launcher.launch = lambda *said: told.extend(said)
        # With no hook. A kernel that asks for memory of its own asks how large the grid is: what a mark cannot answer.
        launcher(*marks, compiled.function, compiled.packed_metadata, None, None, None, argument)
        call = compiled.run.launch
    except (AttributeError, TypeError):  # another Triton, or none
        return _Remembered(compiled, constants)
    *between, last = told[4:]
    if told[:4] != marks or last not in (argument, (argument,)):
        return _Remembered(compiled, constants)
    return _Remembered(compiled, constants, call, tuple(between), last is not argument)


class Source:
    """One operand: memory, affine, activation, and its place in the frame."""

    def __init__(self, x: Tensor, affine: Tensor | None, relu: bool, top: int = 0, left: int = 0):
        self.x, self.affine, self.relu, self.top, self.left = nhwc(x), affine, relu, top, left
        self.channels, self.height, self.width = x.shape[1:]
        self.affine_or_x = self.x if affine is None else affine.contiguous()


_real_words: dict[torch.device, Tensor] = {}


def real_word(device: torch.device) -> Tensor:
    """The word that :func:`normalise_real` reads, int32 (1,): all bits set."""
    if device not in _real_words:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.full((1,), -1, dtype=torch.int32, device=device)  # which each replay of the graph fills
        # In a thread of its own, where no mode, graph or memory pool of the caller's owns it.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_keep_real_word, device).result()
    return _real_words[device]


def _keep_real_word(device: torch.device) -> None:
    word = torch.full((1,), -1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # any stream may read it from now on
    _real_words[device] = word


@triton.jit
def load_affine(affine_ptr, c, C, HAS_AFFINE: tl.constexpr, ACC: tl.constexpr):
    """Rows scale, shift, centre of an affine (3, C) at channels ``c``; identity without one, 0 beyond C."""
    if HAS_AFFINE:
        scale = tl.load(affine_ptr + c, mask=c < C, other=0.0)
        shift = tl.load(affine_ptr + C + c, mask=c < C, other=0.0)
        centre = tl.load(affine_ptr + 2 * C + c, mask=c < C, other=0.0)
    else:
        scale = tl.full(c.shape, 1.0, ACC)
        shift = tl.full(c.shape, 0.0, ACC)
        centre = tl.full(c.shape, 0.0, ACC)
    return scale, shift, centre


@triton.jit
def load_channels(
    x, n, h, w, c, H, W, C, real, MASKED: tl.constexpr, BLOCK_C: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """BLOCK_C channels from c on, along ``AXIS``, of pixels (n, h, w); 0 beyond C and, where ``MASKED``, of those that
    are not ``real``."""
    channel = c + tl.arange(0, BLOCK_C)
    mask = tl.expand_dims(channel < C, 1 - AXIS)
    if MASKED:
        mask = mask & tl.expand_dims(real, AXIS)
    row = ((n.to(tl.int64) * H + h) * W + w) * C
    return tl.load(x + (tl.expand_dims(row, AXIS) + tl.expand_dims(channel, 1 - AXIS)), mask=mask, other=0.0)


@triton.jit
def normalise(
    x, scale, shift, centre, HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, AXIS: tl.constexpr = 1
):  # fmt: skip
    """act(scale·(x − centre) + shift) in the accumulator dtype, of vectors along x's ``AXIS`` of channels.

    16-bit x: one multiply-add with the folded shift, whose rounding is far below x's own. Wider x: the difference
    first, so that a mean much larger than the deviation costs no digits.
    """
    z = x.to(ACC)
    if HAS_AFFINE:
        if x.dtype.primitive_bitwidth == 16:
            shift -= scale * centre
        else:
            z -= tl.expand_dims(centre, 1 - AXIS)
        z = z * tl.expand_dims(scale, 1 - AXIS) + tl.expand_dims(shift, 1 - AXIS)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=PROPAGATE_ALL)
    return z


@triton.jit
def _bits(x):
    """x as integers."""
    return x.to(tl.core.get_int_dtype(x.dtype.primitive_bitwidth, signed=True), bitcast=True)


@triton.jit
def normalise_real(
    x, real, real_ptr, scale, shift, centre,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """:func:`normalise` in x's dtype; where ``MASKED``, 0 for pixels that are not ``real``, of which x is 0.

    Triton normalises a dot's operand in the registers that multiply it only if all that goes into it was loaded: so is
    what of its bits is kept, all or none, from :func:`real_word`.
    """
    z = normalise(x, scale, shift, centre, HAS_AFFINE, RELU and not (MASKED and HAS_AFFINE), ACC, AXIS)
    if MASKED and HAS_AFFINE:
        kept = tl.load(real_ptr + tl.zeros(real.shape, tl.int32), mask=real, other=0)
        bits = _bits(z)
        z = (bits & tl.expand_dims(kept, AXIS).to(bits.dtype)).to(ACC, bitcast=True)
        if RELU:
            z = tl.maximum(z, 0.0, propagate_nan=PROPAGATE_ALL)
    return z.to(x.dtype)


# Sums of products over a loop, on Hopper. A product takes its first operand from registers: read from shared memory
# once for several products, it leaves room there for a second program. But Triton lets the last products of a turn run
# on into the next one, which rewrites those registers, and then ptxas makes each wgmma wait for the one before it (its
# message C7513). So sums are held as integers: Triton waits for a sum before it is cast. No cast costs an instruction.


def held(x: Tensor) -> bool:
    """Whether sums of products on ``x``'s device are held."""
    return architecture(x.device) == "sm_90"


@triton.jit
def hold(acc, HELD: tl.constexpr):
    """A sum as a loop carries it."""
    if HELD:
        acc = _bits(acc)
    return acc


@triton.jit
def release(acc, HELD: tl.constexpr, ACC: tl.constexpr):
    """The sum that a loop carried."""
    if HELD:
        acc = acc.to(ACC, bitcast=True)
    return acc


@triton.jit
def add_product(acc, a, b, HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The sum plus a·b."""
    if HELD:  # what was loaded and cast is not taken from shared memory
        a = _bits(a).to(a.dtype, bitcast=True)
    return hold(tl.dot(a, b, release(acc, HELD, ACC), input_precision=PRECISION, out_dtype=ACC), HELD)


@triton.jit
def tile_place(tile, tiles_h, tiles_w, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First picture, row and column of tile number ``tile``."""
    return (
        tile // tiles_w // tiles_h * IMAGES,
        tile // tiles_w % tiles_h * ROWS,
        tile % tiles_w * COLUMNS,
    )


@triton.jit
def load_tap(w, k, c, tap, K, C, TAPS: tl.constexpr, K_FIRST: tl.constexpr, TMA: tl.constexpr,
             BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The weights [BLOCK_C, BLOCK_K] at ``tap``, from memory (K,TAPS,C) if K_FIRST, else (C,TAPS,K)."""
    if TMA:
        if K_FIRST:
            weights = w.load([k, tap, c]).reshape(BLOCK_K, BLOCK_C).T
        else:
            weights = w.load([c, tap, k]).reshape(BLOCK_C, BLOCK_K)
    else:
        channel = (c + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        filters = (k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        if K_FIRST:
            address = (filters * TAPS + tap) * C + channel
        else:
            address = (channel * TAPS + tap) * K + filters
        weights = tl.load(w + address, mask=(channel < C) & (filters < K), other=0.0)
    return weights


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
        group = block(slabs, 128, 2)  # rows that are not there take as long as others
        columns = block(length, min(4096 // group, 1024), 32)
        groups = cdiv(slabs, group)
        y = x.new_empty((groups, length))
        launch(
            _sum_slabs_kernel, (groups * cdiv(length, columns),), x, y, slabs, length,
            GROUP=group, BLOCK=columns, **OPTIONS, num_warps=4,
        )  # fmt: skip
        x, slabs = y, groups
    return x.reshape(shape)
