"""What a step of a network really does: every operation, and the kernels fastunet launches for it, with no GPU.

The step runs on the meta device, so its size costs nothing. Operators of fastunet run their launchers, whose launches
are noted instead of made; ATen operations are noted as they come, also those inside an operator of fastunet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunet.architecture import as_if_on
from fastunet.backend import serving
from fastunet.dispatch import composition
from fastunet.layout import memory_format, stats_dtype

if TYPE_CHECKING:
    from benchmarks.recorder import Launch

aten = torch.ops.aten


@dataclass
class Call:
    """One operation."""

    name: str  # "fastunet.conv2d", "aten.add.Tensor"
    func: Any  # what torch dispatches to
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor] = field(default_factory=list)
    backend: str = ""  # which backend served an operator of fastunet
    launches: list[Launch] = field(default_factory=list)  # made by the operator itself
    inner: list[Call] = field(default_factory=list)  # ATen operations inside an operator of fastunet
    architecture: str = "sm_90"  # of the GPU it was traced for

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors it was given."""
        return tensors_of((self.args, self.kwargs))

    @property
    def named(self) -> dict[str, Any]:
        """The arguments it was given, by their names in the schema."""
        names = [argument.name for argument in self.func._schema.arguments]
        return dict(zip(names, self.args, strict=False)) | self.kwargs


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _batch_norm_update_stats(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    mean, var = x.new_empty((2, x.shape[1]), dtype=stats_dtype(x.dtype)).unbind(0)
    return mean, var


def _convolution(x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    y: Tensor = aten.convolution.default(x, weight, *settings)
    return y.contiguous(memory_format=memory_format(x, weight))


# Where the meta device has no result, or not in the layout that a GPU gives it.
_AS_ON_A_GPU = {
    aten.batch_norm_update_stats.default: _batch_norm_update_stats,
    aten.convolution.default: _convolution,
}


@contextmanager
def _launches(call: Call) -> Iterator[None]:
    """Note the launches made inside the block; the torch backend makes none, and must not need Triton."""
    if call.backend == "triton":
        from benchmarks.recorder import record

        with record() as call.launches:
            yield
    else:
        yield


class _Tracer(TorchDispatchMode):
    def __init__(self, architecture: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.architecture = architecture
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "fastunet":
            if (parts := composition(func)) is not None:
                with self:  # inside an operator it comes in one piece: take it apart
                    return parts(*args, **kwargs)
            call = Call(f"{namespace}.{name}.{func._overloadname}", func, args, kwargs)
            results = _AS_ON_A_GPU.get(func, func)(*args, **kwargs)
        else:
            call = Call(f"fastunet.{name}", func, args, kwargs)
            call.backend, function = serving(name, args)
            outer, self.calls = self.calls, call.inner
            try:
                with _launches(call), self:
                    results = function(*args[:-1])
            finally:
                self.calls = outer
        call.architecture = self.architecture
        call.results = tensors_of(results)
        self.calls.append(call)
        return results


@contextmanager
def trace(architecture: str = "sm_90") -> Iterator[list[Call]]:
    """Collect the operations made inside the block, in order; meta tensors count as lying on such a GPU.

    The notes keep every tensor alive. Take gradients by ``torch.autograd.grad``: ``backward`` would copy them into
    ``.grad``, seeing that somebody else holds them.
    """
    tracer = _Tracer(architecture)
    with as_if_on(architecture), tracer:
        yield tracer.calls
