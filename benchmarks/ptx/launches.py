"""The project's launches, sent to the interpreter: inside :func:`emulated` they run on CPU tensors.

A launch is taken as Triton's own binder sees it, whatever the parameters are called: what Triton makes a constant is
compiled in, tuples are flattened, a tensor descriptor becomes a tensor map with its sizes and strides. Kernels are
compiled as for a GPU, by the stages before the assembler, and kept for the next launch that compiles to the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks import recorder
from benchmarks.chips import CHIPS
from benchmarks.ptx import machine
from benchmarks.ptx.asynchronous import TensorMap
from benchmarks.ptx.findings import Findings
from benchmarks.ptx.memory import GlobalMemory
from benchmarks.ptx.program import PARAMETER, PARAMETERS
from benchmarks.ptx.values import Array, u1
from fastunet.architecture import as_if_on

_PACKED = {"i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}
_PACKED |= {"fp32": "f", "fp64": "d"}


@dataclass(eq=False)
class Compiled:
    """A kernel for a chip: its text, and the machine that runs it."""

    text: str
    shared: int
    maps: list[Any]  # what Triton says of each descriptor: block, swizzle, element size
    machine: machine.Machine


@dataclass
class Report:
    """What ran inside :func:`emulated`."""

    findings: Findings = field(default_factory=Findings)
    launches: Counter[str] = field(default_factory=Counter)  # by kernel
    kernels: list[Compiled] = field(default_factory=list)  # that were launched


_compiled: dict[str, Compiled] = {}

# A program's text before it is run: where faults are planted.
Change = Callable[[str], str]
Selection = Callable[[int], Sequence[int]]  # of so many programs of a grid, those that run, in their order


@contextmanager
def emulated(
    chip: str, change: Change | None = None, programs: Selection | None = None, order: int = machine.IN_STEP
) -> Iterator[Report]:
    """Inside, launches run on CPU tensors as on that chip; the report says what was found.

    ``programs`` chooses which programs of a grid run, and in what order; ``order`` is that of the warps.
    """
    report = Report()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = recorder.Launch(kernel, grid, args, kwargs)
        report.launches[kernel.__name__] += 1
        kernel, todo = _ready(launch, chip, change)
        if kernel not in report.kernels:
            report.kernels.append(kernel)
        todo.findings, count = report.findings, math.prod(todo.size)
        if count:
            kernel.machine.run(todo, programs(count) if programs else None, order)

    original, JITFunction.run = JITFunction.run, run
    try:
        with as_if_on(chip):
            yield report
    finally:
        JITFunction.run = original


def compiled(
    launch: recorder.Launch, chip: str, change: Change | None = None
) -> tuple[recorder.Specialisation, Compiled]:
    """The kernel of a launch."""
    wanted = recorder.specialise(launch, CHIPS[chip].target)
    key = hashlib.sha256(
        repr((chip, wanted.name, wanted.signature, wanted.constants, wanted.attributes, wanted.asked)).encode()
    ).hexdigest()
    found = _compiled.get(key)
    if found is None:
        with _no_assembler():
            done = wanted.compile()
        text, about = done.asm["ptx"], done.metadata
        maps = list(getattr(about, "tensordesc_meta", None) or [])
        found = _compiled[key] = Compiled(text, about.shared, maps, machine.Machine(text))
    if change is not None:
        text = change(found.text)
        if text != found.text:
            found = Compiled(text, found.shared, found.maps, machine.Machine(text))
    return wanted, found


@contextmanager
def _no_assembler() -> Iterator[None]:
    """Compile to PTX only, apart in Triton's cache from what is compiled whole."""

    def shorter(
        backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
    ) -> Any:
        if stages is None:
            return "ptx only", "ptx only"  # of the key in the cache
        stages["cubin"] = lambda source, metadata: b"none"
        return None

    kept = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = shorter
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = kept


def _ready(launch: recorder.Launch, chip: str, change: Change | None) -> tuple[Compiled, machine.Grid]:
    """The kernel of a launch, and the launch as the machine takes it."""
    wanted, kernel = compiled(launch, chip, change)
    program = kernel.machine.program
    bound = launch.kernel.signature.bind(
        *launch.args, **{name: x for name, x in launch.kwargs.items() if name in launch.kernel.signature.parameters}
    )
    bound.apply_defaults()
    grid = launch.grid(dict(bound.arguments)) if callable(launch.grid) else launch.grid
    grid = (*grid, 1, 1)[:3]
    memory = GlobalMemory(program.granules["global"])
    arguments = _Arguments(memory, kernel.maps)
    for name, kind in wanted.signature.items():
        arguments.add(name, kind, bound.arguments[name])
    # Behind them come pointers to scratch memory that no kernel here asks for.
    words = dict(zip(program.parameters, [*arguments.words, *[bytes(8)] * 4], strict=False))
    for name, size in program.parameters.items():
        assert len(words[name]) == size, f"{name} has {size} bytes, its argument {len(words[name])}"
    tensors = {PARAMETERS + PARAMETER * number: tensor for number, tensor in arguments.tensors.items()}
    return kernel, machine.Grid(memory, words, tensors, grid, kernel.shared, Findings())


class _Arguments:
    """A launch's arguments as the kernel's parameters."""

    def __init__(self, memory: GlobalMemory, maps: list[Any]) -> None:
        self.memory, self.maps = memory, iter(maps)
        self.words: list[bytes] = []
        self.tensors: dict[int, TensorMap] = {}  # by the number of the parameter
        self._bases: dict[int, int] = {}  # addresses of storages

    def add(self, name: str, kind: Any, value: Any) -> None:
        """One argument, of the type that Triton's signature says."""
        if isinstance(kind, tuple | list):
            for i, (one, part) in enumerate(zip(kind, value, strict=True)):
                self.add(f"{name}[{i}]", one, part)
        elif kind == "constexpr":
            pass
        elif kind.startswith("tensordesc"):
            self._describe(name, value)
        elif isinstance(value, torch.Tensor):
            self.words.append(struct.pack("Q", self._address(name, value)))
        else:
            self.words.append(struct.pack(_PACKED[kind], value))

    def _address(self, name: str, x: torch.Tensor) -> int:
        start = x.untyped_storage().data_ptr()
        if start in self._bases and start:
            self.memory.rename(self._bases[start], name)
        else:
            self._bases[start] = self.memory.add(_bytes(x), name)
        assert x.data_ptr() % 16 == int(x.storage_offset()) * x.element_size() % 16, "a storage that is not aligned"
        return self._bases[start] + int(x.storage_offset()) * x.element_size()

    def _describe(self, name: str, descriptor: Any) -> None:
        x, about = descriptor.base, next(self.maps)
        block = tuple(about["block_size"])
        fill = bytes(x.element_size())
        if descriptor.padding == "nan":
            fill = torch.tensor([float("nan")], dtype=x.dtype).view(torch.uint8).numpy().tobytes()
        self.tensors[len(self.words)] = TensorMap(
            self._address(name, x), x.element_size(), tuple(descriptor.shape), tuple(descriptor.strides), block,
            int(about["swizzle"]), fill,
        )  # fmt: skip
        self.words.append(bytes(128))
        self.words += [struct.pack("i", size) for size in descriptor.shape]
        self.words += [struct.pack("q", stride) for stride in descriptor.strides]


def _bytes(x: torch.Tensor) -> Array:
    """A storage's own memory."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return np.zeros(0, u1)
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))
