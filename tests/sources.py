"""What the tests of operations share: inputs in any memory, the truth of a source, how near is near, and a check of
compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.backend import triton_unavailable

# Of activation functions below zero: identity, ReLU, leaky ReLU, and one that falls there.
SLOPES = {"linear": 1.0, "relu": 0.0, "leaky": 0.01, "falling": -0.5}
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def as_users_run() -> Iterator[None]:
    """Inside, it is as on a machine without a GPU where nobody set anything: no interpreter, no backend chosen."""
    with ExitStack() as stack:
        stack.callback(triton_unavailable.cache_clear)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("TRITON_INTERPRET", "0")
        patch.delenv("FASTUNET_BACKEND", raising=False)
        triton_unavailable.cache_clear()
        yield


large_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 24e9,
    reason="needs a GPU with 24 GB: tensors of more than 2^31 elements",
)


def skip_if_unsupported(backend: str, dtype: torch.dtype, device: str) -> None:
    """Skip where kernels do not take ``dtype``: bfloat16 in the interpreter, float64 on a GPU."""
    if backend == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly; this runs on a GPU")
    if backend == "triton" and dtype == torch.float64 and device == "cuda":
        pytest.skip("the kernels take float64 in the interpreter only; this runs without a GPU")


def widest(backend: str, device: str) -> torch.dtype:
    """The dtype in which ``backend`` is compared most closely: float64, but float32 for the kernels on a GPU."""
    return torch.float32 if backend == "triton" and device == "cuda" else torch.float64


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers in one of the memory layouts a caller may bring."""
    return relaid(torch.randn(shape, device=device).to(dtype), layout)


def poison(dtype: torch.dtype) -> float | int:
    """What nobody takes for a result."""
    if dtype.is_floating_point:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def relaid(t: Tensor, layout: str) -> Tensor:
    """A copy of ``t`` in one of :data:`LAYOUTS`: "sliced" begins at an offset, has gaps, and lies among poison."""
    if layout == "sliced" and t.dim():
        memory = torch.full([n + 2 for n in t.shape[:-1]] + [2 * t.shape[-1] + 1], poison(t.dtype), dtype=t.dtype)
        return memory.to(t.device)[(*[slice(1, -1)] * (t.dim() - 1), slice(1, None, 2))].copy_(t)
    if layout == "permuted":
        order = [2, 0, 3, 1] if t.dim() == 4 else [*range(t.dim())][::-1]
        moved = t.permute(order).clone(memory_format=torch.contiguous_format)
        return moved.permute([order.index(i) for i in range(t.dim())])
    if layout == "channels_last" and t.dim() == 4:
        return t.clone(memory_format=torch.channels_last)
    return t.clone(memory_format=torch.contiguous_format)


_BAND = 256  # bytes, so that what lies behind one is as aligned as it would be
_MAKERS = {
    torch: ("empty", "empty_like", "zeros", "zeros_like"),
    Tensor: ("new_empty", "new_empty_strided", "new_zeros"),
}


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, what Python code allocates lies between two bands, which nobody may write to, and is poison until it is
    written. What is written beyond an end fails the test; what is not written is NaN."""
    made: list[Tensor] = []

    def within_bands(make: Callable[..., Tensor], written: bool) -> Callable[..., Tensor]:
        def allocate(*args: Any, **options: Any) -> Tensor:
            t = make(*args, **options)
            if t.device.type != "cpu" or t.numel() == 0 or type(t) is not Tensor:
                return t
            size = t.untyped_storage().nbytes()
            memory = full((size + 2 * _BAND,), 0xFF, dtype=torch.uint8)  # NaN, or −1
            memory[_BAND : _BAND + size].view(t.dtype).fill_(0 if written else poison(t.dtype))
            made.append(memory)
            return empty(0, dtype=t.dtype).set_(
                memory.untyped_storage(), _BAND // t.element_size(), t.shape, t.stride()
            )

        return allocate

    full, empty = torch.full, torch.empty
    kept = [
        (home, name, home.__dict__.get(name), getattr(home, name)) for home, names in _MAKERS.items() for name in names
    ]
    for home, name, _, make in kept:
        setattr(home, name, within_bands(make, "zeros" in name))
    try:
        yield
    finally:
        for home, name, own, _ in kept:
            if own is None:
                delattr(home, name)  # inherited
            else:
                setattr(home, name, own)
    for memory in made:
        bands = torch.cat([memory[:_BAND], memory[-_BAND:]])
        assert bool((bands == 0xFF).all()), f"something was written outside a tensor of {len(memory) - 2 * _BAND} bytes"


def random_affine(channels: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random affine with negative scales and, from three channels on, one that is zero; a ReLU behind it passes some
    of most channels."""
    affine = torch.randn(3, channels, device=device, dtype=dtype)
    affine[1:] *= 0.3
    affine[0, 1::3] = -affine[0, 1::3].abs()
    affine[0, 2::3] = 0
    return affine


def truth(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """act(scale·(x − centre) + shift) as anyone would write it."""
    if affine is not None:
        scale, shift, centre = (row.view(1, -1, 1, 1) for row in affine)
        x = scale * (x - centre) + shift
    return x.relu() if slope == 0 else F.leaky_relu(x, slope)


def assert_near(
    results: Sequence[Tensor],
    truths: Sequence[Tensor],
    own: Sequence[Tensor],
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    times: float = 2,
    roundings: int = 3,
) -> None:
    """Within twice (``times``) PyTorch's own error in this dtype, and three roundings of the tensor's largest value.

    The roundings are there because PyTorch may happen to be exact, and because a value can round the other way. In
    float64 truth has rounding errors of its own: there only the formula is tested.
    """
    roundings = 1000 if dtype == torch.float64 else roundings
    for i, (result, truth, mine) in enumerate(zip(results, truths, own, strict=True)):
        truth, mine = truth.detach(), mine.detach()
        scale = max(float(truth.abs().max()), 1.0) if truth.numel() else 1.0
        own_error = float((mine.double() - truth).abs().max()) if truth.numel() else 0.0
        atol = times * own_error + roundings * scale * torch.finfo(dtype).eps
        name = f"result {i}" if names is None else names[i]
        torch.testing.assert_close(result.double(), truth, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def check_compiled(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The compiled function has the value and the gradients of the eager one."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(value, *torch.autograd.grad(value, inputs)) for value in (function(*inputs), compiled(*inputs))]
    for eager, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, eager)  # the same ops in the same order, up to fusion of the additions
