"""All that goes around Triton: what launchers hand to kernels, and a launch that examines nothing twice."""

from __future__ import annotations

import copy
import functools
import math
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastunet.architecture import architecture
from fastunet.layout import stats_dtype

from . import replay

# Fused multiply-adds are counted on; Triton's default changes with its version.
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


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as PyTorch's own convolutions do, by torch.backends.cudnn.conv."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    lowered = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if lowered else "ieee"


class Numbers(NamedTuple):
    """What a kernel is told of numbers: in which dtype it sums, the dtype of its tensors, how it multiplies float32,
    and whether sums of products are held (see :func:`fastunet.kernels.gemm.hold`)."""

    acc: tl.dtype
    dtype: tl.dtype
    precision: str
    held: bool


_numbers = functools.cache(Numbers)


def numbers(x: Tensor, hold: bool = True) -> Numbers:
    """The numbers of kernels that multiply ``x``; sums may be held if ``hold``, and are on Hopper."""
    held = hold and architecture(x.device) == "sm_90"
    return _numbers(accumulator(x.dtype), _TL_DTYPES[x.dtype], precision(x.dtype), held)


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
    """``kernel[grid](*args, **OPTIONS, **options)``, with ``args`` before all constants.

    Triton examines every argument at every launch: of a convolution for 31 µs, 10 here. What was launched before with
    the same integers, options and types, and pointers as well aligned, is launched as it was compiled then, on the
    device of its tensors. That must be one: else a pointer to the host's memory would reach the GPU unexamined.
    """
    # The interpreter's kernels; and those of AMD, whose addresses have 32 bits where a tensor is small.
    if not isinstance(kernel, JITFunction) or torch.version.hip is not None:
        _by_triton(kernel, grid, args, options)
        return
    key: list[Any] = [kernel.fn, *options, *options.values()]
    address, device, last = 0, None, None
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
        if here != device:
            if device is not None:
                raise ValueError(f"expected the tensors of a launch on one device, got one on {last.device} among them")
            device = here
    known = (None if last is None else last.device, *key)
    remembered = None if address % 16 else _compiled.get(known)
    if remembered is None:
        compiled = _by_triton(kernel, grid, args, options)
        if compiled is not None and address % 16 == 0:
            if len(_compiled) >= MOST_REMEMBERED:
                _compiled.clear()
            _compiled[known] = _remember(compiled, tuple(options[name] for name in kernel.arg_names[len(args) :]))
        return
    compiled, constants, call, between, tupled = remembered
    three = (*grid, 1, 1)[:3]  # a grid of three dimensions
    said = (*args, *constants)
    recorder = replay.recorder()
    if recorder is not None:
        ending = None if call is None else _ending(call, tupled)
        if ending is None or device is None:
            recorder.launched(compiled[three], said)
        else:
            recorder.constant(compiled)  # which is kept
            recorder.told(ending, three, device, between, said)
    if call is None or replay.hooked():
        compiled[three](*said)
        return
    stream = driver.active.get_current_stream(device)
    if tupled:
        call(*three, stream, *between, said)
    else:
        call(*three, stream, *between, *said)


def _ending(call: Any, tupled: bool) -> replay.Ending | None:
    """What ``call`` ends in: itself, or where it has descriptors written out first, what it hands them to."""
    if not isinstance(call, types.FunctionType):
        return replay.Ending(call, None, tupled)
    cells = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True))
    if "launcher" not in cells:  # another Triton
        return None
    launcher, cells["launcher"] = cells["launcher"].cell_contents, types.CellType(lambda *said: said)
    expand = types.FunctionType(call.__code__, call.__globals__, closure=tuple(cells.values()))
    return replay.Ending(launcher, expand, tupled)


def _by_triton(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A launch in Triton's own way; the kernel as it was compiled."""
    fire = functools.partial(kernel[grid], **OPTIONS, **options)
    recorder = replay.recorder()
    if recorder is None:
        return fire(*args)
    recorder.launched(fire, args)
    with recorder.away():  # what Triton has PyTorch do is Triton's
        return fire(*args)


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


_real_words: dict[torch.device, Tensor] = {}


def real_word(device: torch.device) -> Tensor:
    """The word that :func:`normalise_real` reads, int32 (1,): all bits set."""
    if device not in _real_words:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.full((1,), -1, dtype=torch.int32, device=device)  # which each replay of the graph fills
        # In a thread of its own, where no mode, graph or memory pool of the caller's owns it.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_keep_real_word, device).result()
    recorder = replay.recorder()
    if recorder is not None:
        recorder.constant(_real_words[device])
    return _real_words[device]


def _keep_real_word(device: torch.device) -> None:
    word = torch.full((1,), -1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # any stream may read it from now on
    _real_words[device] = word
