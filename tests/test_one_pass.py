"""Operators that read one source or two and write once: sums, average pools, pads, PReLU; on both backends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sources import LAYOUTS, SLOPES, check_compiled, laid_out, skip_if_unsupported
from torch import Tensor

from fastunet import ops
from fastunet.reference import functional as plain

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64: the same sums in another order
# One pixel; odd sizes of several samples; more channels than a tile holds; rows of several programs.
SHAPES = [(1, 1, 1, 1), (3, 5, 3, 7), (1, 70, 2, 3), (2, 3, 3, 300)]
AFFINES = {"plain": None, "batch": (), "samples": (1,)}
OPERATORS = ["add_act", "avg_pool2x2", "pad_replicate", "affine_prelu"]


def affine(kind: str, x: Tensor) -> Tensor | None:
    """Rows that are not dense, with scales of both signs."""
    if kind == "plain":
        return None
    samples = (x.shape[0],) if kind == "samples" else ()
    return torch.randn(*samples, 3, 2 * x.shape[1], dtype=x.dtype, device=x.device)[..., ::2].detach().requires_grad_()


def arguments(
    operator: str, x: Tensor, kind: str, other: str = "batch", slope: float = 0.0, variant: int = 0
) -> tuple[Any, ...]:
    """A call with ``x``; its affine and that of a second source are of two kinds."""
    source = (x, affine(kind, x), slope)
    if operator == "add_act":
        skip = laid_out(tuple(x.shape), LAYOUTS[variant % len(LAYOUTS)], x.dtype, str(x.device)).requires_grad_()
        return *source, skip, affine(other, x), (1.0, 0.3)[variant % 2], [*SLOPES.values()][variant % len(SLOPES)]
    if operator == "pad_replicate":
        return *source, *divmod(variant % 4, 2)
    if operator == "affine_prelu":
        slopes = torch.randn((x.shape[1], 1)[variant % 2], dtype=x.dtype, device=x.device, requires_grad=True)
        return *source[:2], slopes
    return source


@pytest.fixture
def float64(backend: str, device: str) -> str:
    """Each backend that takes float64."""
    skip_if_unsupported(backend, torch.float64, device)
    return backend


@pytest.mark.parametrize("operator", OPERATORS)
def test_values_and_gradients(operator: str, float64: str, device: str) -> None:
    """Affines of every pair of kinds, slopes, sizes and layouts."""
    cases = itertools.product(SHAPES, AFFINES, AFFINES if operator == "add_act" else ["batch"])
    for variant, (shape, kind, other) in enumerate(cases):
        if operator == "avg_pool2x2" and min(shape[2:]) < 2:
            continue
        x = laid_out(shape, LAYOUTS[variant % len(LAYOUTS)], torch.float64, device).requires_grad_()
        args = arguments(operator, x, kind, other, [*SLOPES.values()][variant % len(SLOPES)], variant)
        leaves = [t for t in args if isinstance(t, Tensor)]
        found, expected = getattr(ops, operator)(*args, float64), getattr(plain, operator)(*args)
        dy = laid_out(tuple(expected.shape), LAYOUTS[variant % 2], torch.float64, device)
        gradients = [torch.autograd.grad(y, leaves, dy) for y in (found, expected)]
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck_opcheck_and_the_same_bits(operator: str, backend: str, device: str) -> None:
    for kind, variant in (("batch", 3), ("samples", 2), ("plain", 0)):
        x = torch.randn(2, 3, 3, 2, device=device)
        args = arguments(operator, x.requires_grad_(), kind, kind, 0.1, variant)
        function, wide = getattr(ops, operator), [t.detach().double() if isinstance(t, Tensor) else t for t in args]
        torch.library.opcheck(function, (*args, backend))
        y = function(*args, backend)
        given = [t.detach() if isinstance(t, Tensor) else t for t in args]
        settings = given[:3] if operator in ("pad_replicate", "avg_pool2x2") else given
        backward = getattr(ops, f"{operator}_backward")
        torch.library.opcheck(backward, (torch.randn_like(y), *settings, backend))
        dy = torch.randn_like(y)
        once, again = (backward(dy, *settings, backend) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        if backend == "torch" or (device == "cpu" and kind == "samples"):  # the interpreter's, and it is slow
            leaves = [t.requires_grad_() for t in wide if isinstance(t, Tensor)]

            def call(*tensors: Tensor, args: Any = tuple(wide), function: Any = function) -> Any:
                rest = iter(tensors)
                return function(*(next(rest) if isinstance(t, Tensor) else t for t in args), backend)

            assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled(operator: str, device: str) -> None:
    x = torch.randn(2, 3, 5, 4, device=device)
    rest = [t.detach() if isinstance(t, Tensor) else t for t in arguments(operator, x, "samples", "batch", 0.1, 3)[1:]]
    check_compiled(lambda x: getattr(ops, operator)(2 * x, *rest, "torch").square().sum(), x)


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty(operator: str, backend: str, device: str) -> None:
    x = torch.empty(0, 3, 4, 5, device=device, requires_grad=True)
    args = arguments(operator, x, "batch")
    y = getattr(ops, operator)(*args, backend)
    assert y.shape == (0, 3, *{"avg_pool2x2": (2, 2)}.get(operator, (4, 5)))
    leaves = [t for t in args if isinstance(t, Tensor)]
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), leaves))


def test_nan_and_infinity(backend: str, device: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0], device=device).expand(1, 1, 2, 5).contiguous()
    one, slopes = torch.ones_like(x), torch.tensor([0.5], device=device)
    for name, args in {"add_act": (x, None, 1.0, one, None, 0.0, 0.1), "affine_prelu": (x, None, slopes)}.items():
        x.requires_grad_()
        found, expected = getattr(ops, name)(*args, backend), getattr(plain, name)(*args)
        torch.testing.assert_close(found, expected, equal_nan=True)
        gradients = [torch.autograd.grad(y, x, one) for y in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_misfits_are_refused(device: str) -> None:
    x, other = torch.randn(2, 3, 4, 4, device=device), torch.randn(2, 3, 4, 5, device=device)
    for message, call in {
        r"skip of the source's shape \(2, 3, 4, 4\)": lambda: ops.add_act(x, None, 1.0, other, None, 1.0, 0.0, "torch"),
        r"slopes of shape \(3,\) or \(1,\)": lambda: ops.affine_prelu(x, None, x[0, 0, 0], "torch"),
        "0 or 1 row and column": lambda: ops.pad_replicate(x, None, 1.0, 2, 0, "torch"),
        "with pixels to repeat": lambda: ops.pad_replicate(x[..., :0], None, 1.0, 1, 0, "torch"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"slopes of torch\.float32 or narrower"):
        ops.affine_prelu(x, None, torch.ones(3, dtype=torch.float64, device=device), "torch")
