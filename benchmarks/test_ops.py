"""Each operation: plain PyTorch, torch.compile of it, and fastunet's backends.

Every provider returns the same tensors from the same operands, and must agree with plain PyTorch before it is timed.
"reference" spells an operation out in several passes; how much of the gain a whole network sees, test_nets.py measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import CASES, SMALL_CASES, Case, Operands
from benchmarks.conftest import CUDA, NEEDS_GPU
from fastunet import ops
from fastunet.reference import functional as reference

PROVIDERS = ["reference", "compile", "torch", "triton"] if CUDA else ["reference", "torch"]
ON_GPU_ONLY = [pytest.param(case, marks=NEEDS_GPU, id=case.name) for case in CASES]
ANYWHERE = [pytest.param(case, id=case.name) for case in SMALL_CASES]

# Relative error of a whole tensor in the Euclidean norm: a few roundings of the dtype, since sums are long and centred.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def plain(case: Case) -> Callable[..., Any]:
    """The operation in plain PyTorch, from the operator's operands."""
    if case.op == "conv2d":
        return lambda *operands: reference.conv2d(*operands[:-1])
    if case.op == "max_pool2x2":
        return lambda x, affine: reference.max_pool2x2(x, affine, case.affine)
    return getattr(reference, case.op)  # type: ignore[no-any-return]


def ours(case: Case, backend: str) -> Callable[..., Any]:
    """The operator of fastunet; pooled values are normalised, so that all providers return the same."""
    if case.op == "conv2d":
        return lambda *operands: ops.conv2d(*operands, backend)[:3]
    if case.op == "max_pool2x2":
        return lambda x, affine: ops.affine_act(ops.max_pool2x2(x, affine, backend), affine, case.affine, backend)
    operator = getattr(ops, case.op)
    return lambda *operands: operator(*operands, backend)


def step(case: Case, function: Callable[..., Any], operands: Operands) -> Callable[[], list[Tensor]]:
    """A function of no arguments that runs the case and returns its results, or its gradients in training."""
    leaves = [x for x in operands if isinstance(x, Tensor) and x.requires_grad]
    incoming: list[Tensor] = []

    def run() -> list[Tensor]:
        results = function(*operands)
        found = [y for y in ([results] if isinstance(results, Tensor) else results) if y.numel()]
        if case.mode == "inference":
            return found
        if not incoming:
            generator = torch.Generator(found[0].device).manual_seed(0)
            incoming.extend(torch.empty_like(y).normal_(generator=generator) for y in found)
        return list(torch.autograd.grad(found, leaves, incoming))

    return run


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", ANYWHERE + ON_GPU_ONLY)
def test_op(case: Case, provider: str, device: str, measure: Callable[..., None]) -> None:
    operands = case.operands(device)
    if case.mode == "training":
        trained = [x for x in operands[case.image :] if isinstance(x, Tensor) and x.is_floating_point()]
        for x in trained[:1] if case.op == "softmax_stats" else trained:
            x.requires_grad_()
    expected = step(case, plain(case), operands)
    if provider == "reference":
        run = expected
    elif provider == "compile":
        run = step(case, torch.compile(plain(case)), operands)
    else:
        run = step(case, ours(case, provider), operands)
    for found, truth in zip(run(), expected(), strict=True):
        error = relative_error(found, truth)
        assert error <= TOLERANCE[case.dtype], f"relative error {error:.1e}"
    measure(run, group=case.name, provider=provider, bytes=case.bytes, flops=case.flops)
