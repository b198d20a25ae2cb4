"""Which kernels a launcher launches, and with what: without a GPU, without data, without running anything.

Launchers are called with tensors on the meta device. Inside :func:`record` every ``kernel[grid](...)`` is noted
instead of run; :func:`specialise` then asks Triton's own binder what it would compile for a chip. So the gate compiles
what a GPU would compile, and the notes hold the grid and every argument for whoever wants to count bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Launch:
    """One ``kernel[grid](*args, **kwargs)``."""

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two launches on the meta device that compile to the same."""
        said = tuple(map(_type, self.args))
        return self.kernel, said, tuple(self.kwargs.items())


def flat(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Constants by name, those in structs by the names of their fields."""
    return {
        name: value
        for outer, constant in constants.items()
        for name, value in (constant._asdict() if hasattr(constant, "_asdict") else {outer: constant}).items()
    }


def _type(argument: Any) -> Any:
    """What of an argument decides what is compiled."""
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return argument.dtype if isinstance(argument, torch.Tensor) else argument


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block; none of them runs."""
    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, grid, args, kwargs))

    original = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = original


def find_kernels(modules: list[ModuleType]) -> dict[str, Any]:
    """Every kernel defined in ``modules``, by name: @triton.jit functions called ``_…_kernel``.

    Other jit functions are helpers, compiled as part of the kernels that call them.
    """
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
        if name.startswith("_") and name.endswith("_kernel")
    }


@dataclass(frozen=True)
class Specialisation:
    """One kernel as Triton would compile it for one chip: argument types, alignments, constants and options."""

    kernel: Any
    target: GPUTarget
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    asked: dict[str, Any]  # the options that the launcher named

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def sizes_aligned(self) -> bool:
        """Whether every integer argument that Triton specialises on, and a constant C, is a multiple of 16."""
        names = [parameter.name for parameter in self.kernel.params]
        if "C" in names and self.constants.get((names.index("C"),), 0) % 16:
            return False
        aligned = {path[0] for path, about in self.attributes.items() if about}
        return not any(
            self.constants.get((i,)) == 1 or (kind in ("i32", "i64") and i not in aligned)
            for i, (parameter, kind) in enumerate(zip(self.kernel.params, self.signature.values(), strict=True))
            if not parameter.is_constexpr and not parameter.do_not_specialize
        )

    def compile(self) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options)


@functools.cache
def _binder(kernel: Any, target: GPUTarget) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target))


def specialise(launch: Launch, target: GPUTarget) -> Specialisation:
    """What Triton would compile for ``launch`` on ``target``."""
    kernel = launch.kernel
    bound, types, options = _binder(kernel, target)(*launch.args, **launch.kwargs)
    parsed, signature, constants, attributes = kernel._pack_args(
        make_backend(target), dict(launch.kwargs), bound, types, options
    )
    asked = {name: value for name, value in launch.kwargs.items() if name not in signature}
    return Specialisation(kernel, target, signature, constants, attributes, parsed.__dict__, asked)
