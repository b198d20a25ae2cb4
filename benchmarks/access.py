"""Which bytes an operation has to move: those of the tensors that it reads and of those that it writes.

An ATen operation's are read from its schema, and from the tables below where the schema does not tell; a kernel
launch's from the kernel (:mod:`benchmarks.pointers`).

This is the traffic of an ideal cache within a pass and of none between two: what a kernel loads again while the L2
cache holds it (a convolution tile's border, the taps of a weight gradient) is not counted again, and what the next pass
might still find there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.trace import Call, tensors_of


@dataclass(frozen=True)
class Access:
    """One pass: the tensors it reads and writes, whether it has a matrix product, the fraction of the GPU's matrix rate
    that this attains, the name of the kernel or operation, and bytes of its tensors that it need not move."""

    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    multiplies: bool = False
    rate: float = 1.0
    name: str = ""
    spared: int = 0

    @property
    def bytes(self) -> int:
        return sum(map(extent, self.read + self.written)) - self.spared


def extent(x: Tensor) -> int:
    """Bytes of the elements of ``x``, those along an expanded dimension once."""
    count = 1 if x.numel() else 0
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride != 0 else 1
    return count * x.element_size()


def storage(x: Tensor) -> int:
    """What tells the memory of two tensors apart while both are alive, also on the meta device."""
    return int(x.untyped_storage()._cdata)


def distinct(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """``tensors`` without the empty ones and without those that are the same elements once more."""
    return tuple({(storage(x), x.storage_offset(), extent(x)): x for x in tensors if x.numel()}.values())


# ---- ATen --------------------------------------------------------------------------------------------------------

_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}

# Operations whose "self" only gives a shape, or is overwritten unread.
_SELF_UNREAD = {
    "copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
    "max_pool2d_with_indices_backward", "nll_loss_backward", "nll_loss2d_backward",
}  # fmt: skip


def of_aten(call: Call) -> list[Access]:
    """The passes of an ATen operation: none for a view or an empty tensor, else one.

    The backward of a convolution has a pass for each gradient that is wanted, of input, weight and bias, as cuDNN
    computes it. A batch normalisation that takes its statistics from the batch reads the batch twice, for no cache
    holds one between the statistics and their use. Its backward reads the incoming gradient for the sums and for the
    result, and the batch for the sums and, if they enter the result, again.
    """
    name = call.func.overloadpacket.__name__
    given = call.named
    schema = call.func._schema.arguments
    changed = tensors_of([given.get(x.name) for x in schema if x.alias_info is not None and x.alias_info.is_write])
    known = {storage(x) for x in call.tensors}
    written = distinct([x for x in call.results if storage(x) not in known] + changed)
    if name in _EMPTY or not written:
        return []
    if name == "convolution_backward":
        return _convolution_backward(given, call.results)
    read = distinct(tensors_of([x for key, x in given.items() if key != "self" or name not in _SELF_UNREAD]))
    if name == "native_batch_norm" and given["training"]:
        read += (given["input"],)
    elif name == "native_batch_norm_backward" and given["output_mask"][0]:
        read += (given["grad_out"], given["input"]) if given["train"] else (given["grad_out"],)
    return [Access(read, written, name == "convolution")]


def _convolution_backward(given: dict[str, Any], results: list[Tensor]) -> list[Access]:
    dy, x, weight = given["grad_output"], given["input"], given["weight"]
    reads: list[tuple[Tensor, ...]] = [(dy, weight), (dy, x), (dy,)]
    wanted = [read for read, needed in zip(reads, given["output_mask"], strict=True) if needed]
    return [Access(read, (result,), len(read) == 2) for read, result in zip(wanted, results, strict=True)]
