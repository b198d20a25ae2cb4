"""What the tests of operations on sources share: inputs, the truth of a source, and a check of compiled functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

# Of activation functions below zero: identity, ReLU, leaky ReLU, and one that falls there.
SLOPES = {"linear": 1.0, "relu": 0.0, "leaky": 0.01, "falling": -0.5}
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

large_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 24e9,
    reason="needs a GPU with 24 GB: tensors of more than 2^31 elements",
)


def skip_if_unsupported(backend: str, dtype: torch.dtype, device: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly; this runs on a GPU")


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers in one of the memory layouts a caller may bring."""
    n, c, h, w = shape
    if layout == "permuted":
        return torch.randn(h, n, w, c, device=device).to(dtype).permute(1, 3, 0, 2)
    if layout == "sliced":
        return torch.randn(n, c + 2, 2 * h, w + 1, device=device).to(dtype)[:, 1:-1, ::2, 1:]
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def random_affine(channels: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random affine with negative scales and, from three channels on, one that is zero."""
    affine = torch.randn(3, channels, device=device, dtype=dtype)
    affine[0, 1::3] = -affine[0, 1::3].abs()
    affine[0, 2::3] = 0
    return affine


def truth(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """act(scale·(x − centre) + shift) as anyone would write it."""
    if affine is not None:
        scale, shift, centre = (row.view(1, -1, 1, 1) for row in affine)
        x = scale * (x - centre) + shift
    return x.relu() if slope == 0 else F.leaky_relu(x, slope)


def check_compiled(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The compiled function has the value and the gradients of the eager one."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(value, *torch.autograd.grad(value, inputs)) for value in (function(*inputs), compiled(*inputs))]
    for eager, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, eager)  # the same ops in the same order, up to fusion of the additions
