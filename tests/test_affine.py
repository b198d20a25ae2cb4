"""affine_act and bn_affine, on both backends, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sources import (
    DTYPES,
    LAYOUTS,
    SLOPES,
    check_compiled,
    laid_out,
    large_gpu,
    random_affine,
    skip_if_unsupported,
    truth,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import aten, ops

# One picture, odd sizes, more channels than a tile holds, and C = 1, whose strides are ambiguous.
SHAPES = {"1x1x1x1": (1, 1, 1, 1), "3x3x5x7": (3, 3, 5, 7), "2x17x3x4": (2, 17, 3, 4), "1x70x2x9": (1, 70, 2, 9)}

# A value of order 10 is rounded once to the dtype; float32 has a handful of roundings before that. The sums for daffine
# are in float32 throughout, whatever the dtype.
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SUMS = {"rtol": 1e-5, "atol": 1e-4}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("with_affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(
    shape: tuple[int, ...], with_affine: bool, slope: float, dtype: torch.dtype, backend: str, device: str
) -> None:
    skip_if_unsupported(backend, dtype, device)
    x = laid_out(shape, "contiguous", dtype, device).requires_grad_()
    affine = random_affine(shape[1], device).requires_grad_() if with_affine else None
    dz = torch.randn(shape, device=device).to(dtype)
    exact_x = x.detach().double().requires_grad_()
    exact_affine = affine.detach().double().requires_grad_() if affine is not None else None

    z = ops.affine_act(x, affine, slope, backend)
    z.backward(dz)
    exact = truth(exact_x, exact_affine, slope)
    exact.backward(dz.double())

    assert z.dtype == dtype
    close(z, exact, dtype)
    close(x.grad, exact_x.grad, dtype)
    if affine is not None:
        # ATen rounds what a leaky ReLU scales before it is added up.
        leaky = backend == "torch" and slope not in (0, 1)
        tolerance = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]} if leaky else SUMS
        torch.testing.assert_close(affine.grad.double(), exact_affine.grad, **tolerance)


@pytest.mark.parametrize(("batch", "slope"), [(1, 1.0), (2, 0.0)])
@pytest.mark.parametrize("dz_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, dz_layout: str, batch: int, slope: float, backend: str, device: str) -> None:
    shape = (batch, 3, 4, 5)
    x, dz = (laid_out(shape, each, torch.float32, device) for each in (layout, dz_layout))
    affine = random_affine(6, device)[:, ::2]  # three rows that are not dense
    dense = [x.contiguous(), affine.contiguous(), slope, backend]
    # ATen's order of sums, and its use of fused multiply-adds, depend on the layout: hence a few roundings.
    torch.testing.assert_close(ops.affine_act(x, affine, slope, backend), ops.affine_act(*dense), rtol=1e-6, atol=1e-6)
    for actual, expected in zip(
        ops.affine_act_backward(dz, x, affine, slope, backend),
        ops.affine_act_backward(dz.contiguous(), *dense),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_many_slabs_of_sums(backend: str, device: str) -> None:
    """More pixels than one program takes, so that daffine is added up over programs, the last of them ragged."""
    x, dz = (torch.randn(2, 3, 37, 31, device=device) for _ in range(2))
    affine = random_affine(3, device)
    exact_affine = affine.double().requires_grad_()
    truth(x.double(), exact_affine, 0.0).backward(dz.double())
    _, daffine = ops.affine_act_backward(dz, x, affine, 0.0, backend)
    # 2294 terms of order 1 in float32.
    torch.testing.assert_close(daffine.double(), exact_affine.grad, rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize("slabs", [1, 3, 130])
def test_a_sum_reads_its_own_rows_only(slabs: int, device: str) -> None:
    common = pytest.importorskip("fastunet.kernels.common")
    memory = torch.full((slabs + 9, 5), torch.nan, device=device)
    rows = memory[:slabs].normal_()
    torch.testing.assert_close(common.sum_slabs(rows), rows.sum(0), rtol=1e-5, atol=1e-5)  # another order


def test_large_mean_costs_no_digits(device: str) -> None:
    """x near 1000 with deviation 1: the kernel subtracts the centre first, so only x's own rounding is left: none."""
    x = 1000 + torch.randn(2, 4, 5, 3, device=device)
    affine = torch.stack([torch.ones(4), torch.zeros(4), torch.full((4,), 1000.0)]).to(device)
    z = ops.affine_act(x, affine, 1.0, "triton")
    torch.testing.assert_close(z.double(), x.double() - 1000, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
def test_nan_and_infinity_propagate(slope: float, backend: str, device: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0], device=device).expand(1, 3, 1, 5).contiguous()
    affine = torch.tensor([[1.0, -1.0, 2.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]], device=device)
    exact_x = x.double().requires_grad_()
    exact = truth(exact_x, affine.double(), slope)
    exact.backward(torch.ones_like(exact))
    dx, _ = ops.affine_act_backward(torch.ones_like(x), x, affine, slope, backend)
    z = ops.affine_act(x, affine, slope, backend)
    torch.testing.assert_close(z.double(), exact.detach(), rtol=1e-7, atol=0, equal_nan=True)  # slopes are rounded
    torch.testing.assert_close(dx.double(), exact_x.grad, rtol=1e-7, atol=0)


def test_plain_source_is_copied(backend: str, device: str) -> None:
    for layout in LAYOUTS:
        x = laid_out((2, 3, 4, 5), layout, torch.float32, device)
        z = ops.affine_act(x, None, 1.0, backend)
        dx, daffine = ops.affine_act_backward(x, x, None, 1.0, backend)
        assert z.data_ptr() != x.data_ptr()
        assert dx.data_ptr() != x.data_ptr()
        assert daffine.numel() == 0
        torch.testing.assert_close(z, x, rtol=0, atol=0)
        torch.testing.assert_close(dx, x, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=["no_batch", "no_rows"])
def test_empty(shape: tuple[int, ...], backend: str, device: str) -> None:
    x = torch.empty(shape, device=device)
    affine = random_affine(3, device)
    assert ops.affine_act(x, affine, 0.0, backend).shape == shape
    dx, daffine = ops.affine_act_backward(x, x, affine, 0.0, backend)
    assert dx.shape == shape
    torch.testing.assert_close(daffine, torch.zeros_like(affine), rtol=0, atol=0)


def test_same_bits_every_time(backend: str, device: str) -> None:
    x, dz = (torch.randn(2, 5, 20, 11, device=device) for _ in range(2))
    affine = random_affine(5, device)
    first, second = (ops.affine_act_backward(dz, x, affine, 0.0, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("slope", SLOPES.values(), ids=SLOPES)
def test_gradcheck(slope: float, backend: str, device: str) -> None:
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    affine = random_affine(3, device, torch.float64).requires_grad_()
    skip_if_unsupported(backend, torch.float64, device)
    assert torch.autograd.gradcheck(lambda *a: ops.affine_act(*a, slope, backend), (x, affine), fast_mode=True)


@pytest.mark.parametrize("with_affine", [False, True], ids=["plain", "affine"])
def test_opcheck(with_affine: bool, backend: str, device: str) -> None:
    x = laid_out((2, 3, 2, 3), "channels_last", torch.float32, device).requires_grad_()
    affine = random_affine(3, device).requires_grad_() if with_affine else None
    torch.library.opcheck(ops.affine_act, (x, affine, 0.0, backend))
    constants = (x.detach(), affine.detach() if affine is not None else None)
    torch.library.opcheck(ops.affine_act_backward, (torch.randn_like(x), *constants, 0.0, backend))


def test_compiled(backend: str, device: str) -> None:
    def function(x: Tensor, affine: Tensor) -> Tensor:
        return (ops.affine_act(2 * x, affine, 0.0, backend) ** 2).sum()

    check_compiled(function, torch.randn(2, 3, 2, 3, device=device), random_affine(3, device))


@large_gpu
def test_beyond_32_bit_offsets(device: str) -> None:
    x = torch.zeros(1, 64, 1025, 32768, dtype=torch.float16, device=device).contiguous(
        memory_format=torch.channels_last
    )
    assert x.numel() > 2**31
    x[0, -1, -1, -1] = 3
    affine = torch.tensor([[2.0], [0.0], [1.0]], device=device).expand(3, 64)
    assert ops.affine_act(x, affine, 0.0, "triton")[0, -1, -1, -1] == 4
    dx, daffine = ops.affine_act_backward(x, x, affine, 0.0, "triton")
    assert dx[0, -1, -1, -1] == 6
    assert daffine[:, -1].tolist() == [6, 3, -6]


# ---- bn_affine ---------------------------------------------------------------------------------------------------


def bn_truth(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    scale = 1 / (var + eps).sqrt()
    scale = scale if weight is None else scale * weight
    return torch.stack([scale, torch.zeros_like(mean) if bias is None else bias, mean])


@pytest.mark.parametrize("parameters", [torch.float32, torch.float16, None], ids=str)
@pytest.mark.parametrize("channels", [1, 17, 300])
def test_bn_affine(channels: int, parameters: torch.dtype | None, backend: str, device: str) -> None:
    mean, var = torch.randn(channels, device=device), torch.rand(channels, device=device)
    var[0] = 0  # a constant channel: eps alone keeps it finite
    inputs = [mean, var]
    if parameters is not None:
        inputs += [torch.randn(channels, device=device).to(parameters) for _ in range(2)]
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    missing = [None] * (4 - len(inputs))
    daffine = torch.randn(3, channels, device=device)

    affine = ops.bn_affine(*inputs, *missing, 1e-5, backend)
    affine.backward(daffine)
    exact = bn_truth(*exact_inputs, *missing, 1e-5)
    exact.backward(daffine.double())

    assert affine.dtype == torch.float32
    # rsqrt has an error of 2 units in the last place, its cube (in dvar) of 6.
    torch.testing.assert_close(affine.double(), exact, rtol=1e-6, atol=1e-6)
    for x, exact_x in zip(inputs, exact_inputs, strict=True):
        tolerance = 1e-3 if x.dtype == torch.float16 else 2e-6
        torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=tolerance, atol=tolerance)


def test_bn_affine_gradcheck(backend: str, device: str) -> None:
    skip_if_unsupported(backend, torch.float64, device)
    mean, weight, bias = (torch.randn(4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3))
    var = (torch.rand(4, dtype=torch.float64, device=device) + 0.5).requires_grad_()
    inputs = (mean, var, weight, bias)
    assert torch.autograd.gradcheck(lambda *a: ops.bn_affine(*a, 1e-3, backend), inputs, fast_mode=True)


@pytest.mark.parametrize(("with_weight", "with_bias"), [(False, False), (True, False), (True, True)])
def test_bn_affine_opcheck(with_weight: bool, with_bias: bool, backend: str, device: str) -> None:
    mean, var, weight, bias = (torch.rand(3, device=device, requires_grad=True) for _ in range(4))
    parameters = (weight if with_weight else None, bias if with_bias else None)
    running = (torch.zeros(3, device=device), torch.ones(3, device=device))
    torch.library.opcheck(ops.bn_affine, (mean, var, *parameters, 1e-5, backend))
    torch.library.opcheck(ops.bn_affine_running, (mean, var, *parameters, *running, 6, 0.1, 1e-5, backend))
    constant = weight.detach() if with_weight else None
    torch.library.opcheck(
        ops.bn_affine_backward, (torch.randn(3, 3, device=device), var.detach(), constant, 1e-5, backend)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 6])
def test_running_statistics_move(count: int, dtype: torch.dtype, backend: str, device: str) -> None:
    mean, var = torch.randn(5, device=device), torch.rand(5, device=device)
    running = [torch.randn(5, 2, device=device).to(dtype)[:, 0], torch.rand(5, device=device).to(dtype)]
    unbiased = var * count / max(count - 1, 1)
    moved = [r.double() + 0.3 * (b.double() - r.double()) for r, b in zip(running, (mean, unbiased), strict=True)]
    ops.bn_affine_running(mean, var, None, None, *running, count, 0.3, 1e-5, backend)
    for found, expected in zip(running, moved, strict=True):
        # One rounding of the buffer's dtype; float32 rounds the product and the sum.
        tolerance = 2e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_bn_affine_compiled(backend: str, device: str) -> None:
    def function(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (ops.bn_affine(mean, var, weight, bias, 1e-5, backend) ** 2).sum()

    check_compiled(function, *(torch.rand(3, device=device) for _ in range(4)))


def test_bn_affine_of_strided_vectors(backend: str, device: str) -> None:
    """A broadcast weight and a strided gradient, as autograd and expand() make them."""
    mean, var = torch.randn(8, device=device)[::2], torch.rand(8, device=device)[::2]
    weight = torch.tensor(2.0, device=device).expand(4)
    daffine = torch.randn(4, 3, device=device).t()
    affine = ops.bn_affine(mean, var, weight, weight, 1e-5, backend)
    torch.testing.assert_close(affine, bn_truth(mean, var, weight, weight, 1e-5))
    dense = (daffine.contiguous(), var.contiguous(), weight.contiguous(), 1e-5, backend)
    results = ops.bn_affine_backward(daffine, var, weight, 1e-5, backend), ops.bn_affine_backward(*dense)
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Backwards(TorchDispatchMode):
    """The arguments of ATen's batch norm backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


def test_the_torch_backward_gives_cuda_the_statistics_that_it_insists_on() -> None:
    """CUDA's batch norm in eval mode fails on absent saved statistics, which a CPU's does not look at."""
    x, affine = torch.randn(2, 3, 4, 5), torch.randn(3, 3)
    with Backwards() as calls:
        aten.affine_act_backward(torch.randn_like(x), x, affine, 0.0)
    assert calls.seen
    for _, _, _, mean, var, saved_mean, saved_scale, *_ in calls.seen:
        assert torch.equal(saved_mean, mean)
        assert torch.equal(saved_scale, var)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_torch_backward_gives_cuda_memory_that_it_adds_up_in_float32(layout: str) -> None:
    """Of contiguous 16-bit memory CUDA's batch norm adds up in 16 bits; the meta device is as much not a CPU."""
    x, dz = (laid_out((2, 3, 4, 5), each, torch.float16, "cpu").to("meta") for each in (layout, "contiguous"))
    with Backwards() as calls:
        aten.affine_act_backward(dz, x, torch.randn(3, 3, device="meta"), 0.0)
    ((g, operand, *_, wanted),) = calls.seen
    assert wanted == [True] * 3
    for t in (g, operand):
        assert t.is_contiguous(memory_format=torch.channels_last)
        assert t.stride(1) == 1
