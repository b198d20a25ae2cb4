"""The logit-free head: a 1×1 convolution and statistics, classes or probabilities of logits that are never stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastunet import ops
from fastunet.layout import stats_dtype
from fastunet.reference import functional as reference
from tests.sources import LAYOUTS, laid_out, random_affine, skip_if_unsupported, widest

IGNORE = -100
ALL = [True, True, True]
# The interpreter is numpy, which warns of values that the kernels compute and then mask.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # of the last activation
    classes: int
    mode: str = "softmax"
    affine: bool = True
    slope: float = 0.0
    bias: bool = True
    weighted: bool = False


CASES = {
    "two-classes": Case((2, 8, 5, 7), 2),
    "three-tiles": Case((2, 16, 13, 23), 22, weighted=True),
    "plain": Case((1, 3, 5, 4), 4, affine=False, slope=1.0),
    "leaky": Case((1, 5, 6, 3), 3, slope=0.1),
    "relu-alone": Case((1, 16, 5, 4), 3, affine=False, bias=False),
    "affine-alone": Case((1, 5, 6, 3), 3, slope=1.0),
    "70-channels": Case((1, 70, 5, 7), 5),
    "256-classes": Case((1, 4, 3, 7), 256),
    "one-class": Case((1, 4, 3, 3), 1),
    "binary": Case((2, 8, 7, 5), 1, mode="sigmoid", weighted=True),
    "multilabel": Case((2, 8, 6, 7), 3, mode="sigmoid"),
    "one-pixel": Case((2, 4, 1, 1), 4),
}
case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make(case: Case, device: str, dtype: torch.dtype = torch.float64, layout: str = "channels_last") -> list[Any]:
    """Operands of the operator without ``wanted`` and ``backend``; a tenth of the labels is ignored."""
    batch, channels, height, width = case.shape
    x = laid_out(case.shape, layout, dtype, device)
    stats = stats_dtype(dtype)
    affine = random_affine(channels, device, stats) if case.affine else None
    weight = torch.randn(case.classes, channels, 1, 1, device=device).to(dtype)
    bias = torch.randn(case.classes, device=device).to(dtype) if case.bias else None
    multilabel = case.mode == "sigmoid"
    shape = (batch, case.classes, height, width) if multilabel else (batch, height, width)
    labels = torch.randint(0, 2 if multilabel else case.classes, shape, device=device)
    labels[torch.rand(labels.shape, device=device) < 0.1] = IGNORE
    pixel_weight = torch.rand(batch, height, width, device=device) if case.weighted else None
    return [x, affine, case.slope, weight, bias, labels, pixel_weight, case.mode, IGNORE]


FLOATS = (0, 1, 3, 4)  # those that receive a gradient


def differentiated(function, operands: list[Any], wanted: list[bool], dstats: Tensor, *backend: str) -> list[Any]:
    """The statistics and the gradients of x, affine, weight and bias."""
    operands = list(operands)
    for i in FLOATS:
        if operands[i] is not None:
            operands[i] = operands[i].detach().requires_grad_()
    stats = function(*operands, wanted, *backend)
    leaves = [operands[i] for i in FLOATS if operands[i] is not None]
    return [stats, *torch.autograd.grad(stats, leaves, dstats.to(stats.dtype))]


def widened(operands: list[Any]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in operands]


def check(operands: list[Any], backend: str, rtol: float, atol: float, wanted: list[bool] = ALL) -> None:
    """Values and gradients against the float64 reference; ``atol`` is in units of each tensor's largest element."""
    dstats = torch.randn(operands[0].shape[0], operands[3].shape[0], 7, device=operands[0].device)
    expected = differentiated(reference.head_stats, widened(operands), wanted, dstats)
    actual = differentiated(ops.head_stats, operands, wanted, dstats, backend)
    for found, truth in zip(actual, expected, strict=True):
        size = float(truth.detach().abs().max()) + 1e-3
        torch.testing.assert_close(found.double(), truth, rtol=rtol, atol=atol * size)


@case
def test_equals_the_reference_in_float64(case: Case, backend: str, device: str) -> None:
    dtype = widest(backend, device)
    operands = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in make(case, device)]
    # Sums over channels and pixels.
    check(operands, backend, *((1e-11, 1e-12) if dtype == torch.float64 else (1e-4, 1e-5)))


@pytest.mark.parametrize("wanted", [[w == k for w in range(3)] for k in range(4)], ids=["p2", "ce", "smooth", "none"])
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_only_what_is_wanted(wanted: list[bool], mode: str, backend: str, device: str) -> None:
    operands = make(Case((1, 4, 5, 6), 3, mode=mode, weighted=True), device, torch.float32)
    check(operands, backend, 1e-4, 1e-5, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: str, device: str) -> None:
    operands = make(Case((2, 6, 5, 7), 3), device, torch.float32, layout)
    check(operands, backend, rtol=1e-4, atol=1e-5)  # float32 sums of some 70 terms of order 1
    dx, *_ = ops.head_stats_backward(torch.ones(2, 3, 7, device=device), *operands, ALL, [True, True, True], backend)
    assert dx.is_contiguous(memory_format=torch.channels_last)


# 16 bits: z and the gradient of the logits are rounded to them before they are multiplied, one rounding each, and
# entries that nearly cancel keep the error of the largest.
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=["float16", "bfloat16"]
)
def test_half_precision(dtype: torch.dtype, eps: float, backend: str, device: str) -> None:
    skip_if_unsupported(backend, dtype, device)
    operands = make(Case((2, 16, 9, 11), 5), device, dtype)
    check(operands, backend, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool], ids=str)
def test_label_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    operands = make(Case((1, 4, 5, 6), 2, mode="sigmoid"), device, torch.float32)
    operands[5] = operands[5].clamp(0, 1).to(dtype)
    check(operands, backend, 1e-4, 1e-5)


def test_labels_out_of_range_have_no_class(backend: str, device: str) -> None:
    operands = make(Case((1, 4, 5, 6), 3), device, torch.float32)
    operands[5][0, 0] = 7
    operands[5][0, 1] = -1
    check(operands, backend, 1e-4, 1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5)], ids=["no-samples", "no-pixels"])
def test_empty(shape: tuple[int, int, int, int], backend: str, device: str) -> None:
    operands = make(Case(shape, 3), device, torch.float32)
    dstats = torch.ones(shape[0], 3, 7, device=device)
    stats, dx, daffine, dweight, dbias = differentiated(ops.head_stats, operands, ALL, dstats, backend)
    assert stats.shape == (shape[0], 3, 7)
    assert dx.shape == shape
    assert not any(t.any() for t in (stats, daffine, dweight, dbias))


@pytest.mark.parametrize("frozen", [(0, 1), (3, 4), (4,)], ids=["backbone", "filters", "bias"])
def test_only_the_gradients_that_are_wanted(frozen: tuple[int, ...], backend: str, device: str) -> None:
    operands = make(Case((1, 4, 5, 6), 3), device, torch.float32)
    dstats = torch.randn(1, 3, 7, device=device)
    mask = [0 not in frozen, 3 not in frozen, 4 not in frozen]
    some = ops.head_stats_backward(dstats, *operands, ALL, mask, backend)
    every = ops.head_stats_backward(dstats, *operands, ALL, [True, True, True], backend)
    for found, full, wanted in zip(some, every, [mask[0], *mask], strict=True):
        if wanted:
            torch.testing.assert_close(found, full)
        else:
            assert found.numel() == 0


def test_ignored_pixels_do_not_count_whatever_they_hold(backend: str, device: str) -> None:
    operands = make(Case((1, 4, 4, 6), 3), device, torch.float32)
    operands[5][0, :2] = IGNORE
    dstats = torch.randn(1, 3, 7, device=device)
    expected = differentiated(ops.head_stats, operands, ALL, dstats, backend)
    operands[0] = operands[0].clone()
    operands[0][:, :, :2] = 3e4
    actual = differentiated(ops.head_stats, operands, ALL, dstats, backend)
    for found, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_the_same_bits_twice(backend: str, device: str) -> None:
    operands = make(Case((2, 8, 17, 19), 5, weighted=True), device, torch.float32)
    dstats = torch.randn(2, 5, 7, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [differentiated(ops.head_stats, operands, ALL, dstats, backend) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_opcheck(mode: str, backend: str, device: str) -> None:
    operands = make(Case((1, 4, 3, 5), 3, mode=mode, weighted=True), device, torch.float32)
    for i in FLOATS:
        operands[i].requires_grad_()
    torch.library.opcheck(torch.ops.fastunet.head_stats, (*operands, ALL, backend))
    dstats = torch.randn(1, 3, 7, device=device)
    given = [t.detach() if isinstance(t, Tensor) else t for t in operands]
    for mask in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.fastunet.head_stats_backward, (dstats, *given, ALL, mask, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(3, 4, 3, 3)}, r"expected a weight of shape \(K, 4, 1, 1\)"),
        ({3: torch.zeros(300, 4, 1, 1), 4: None}, "at most 256 classes"),
        ({5: torch.zeros(1, 5, 7, dtype=torch.int64)}, r"expected labels of shape \(1, 5, 6\)"),
        ({6: torch.zeros(1, 5, 7)}, r"expected pixel_weight of shape \(1, 5, 6\)"),
        ({1: torch.zeros(3, 5)}, r"expected an affine of shape \(3, 4\)"),
    ],
    ids=["3x3", "classes", "labels", "pixel_weight", "affine"],
)
def test_refuses_what_does_not_fit(change: dict[int, Any], message: str) -> None:
    operands = make(Case((1, 4, 5, 6), 3), "cpu", torch.float32)
    for i, value in change.items():
        operands[i] = value
    with pytest.raises(ValueError, match=message):
        ops.head_stats(*operands, ALL, "torch")


# ---- head_predict ------------------------------------------------------------------------------------------------

OUTPUTS = ("argmax", "threshold", "softmax", "sigmoid")


def predicted(case: Case, output: str, backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    operands = make(case, device, dtype)[:5]
    expected = reference.head_predict(*widened(operands), output, 0.3, torch.float64)
    return ops.head_predict(*operands, output, 0.3, torch.float16, backend), expected


@pytest.mark.parametrize("output", OUTPUTS)
@case
def test_predict(case: Case, output: str, backend: str, device: str) -> None:
    found, expected = predicted(case, output, backend, device, torch.float32)
    assert found.shape == expected.shape
    if output in ("argmax", "threshold"):
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected)
    else:
        assert found.dtype == torch.float16
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=2**-23)  # the rounding to float16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predict_layouts(layout: str, backend: str, device: str) -> None:
    operands = make(Case((2, 6, 5, 7), 3), device, torch.float32, layout)[:5]
    found = ops.head_predict(*operands, "argmax", 0.5, torch.float32, backend)
    assert torch.equal(found, reference.head_predict(*operands, "argmax", 0.5, torch.float32))


def test_argmax_takes_the_first_of_equals_and_nan(backend: str, device: str) -> None:
    x = torch.zeros(1, 1, 1, 4, device=device)
    weight = torch.ones(5, 1, 1, 1, device=device)
    bias = torch.tensor([-1.0, 2.0, float("nan"), 2.0, float("nan")], device=device)
    found = ops.head_predict(x, None, 1.0, weight, bias, "argmax", 0.5, torch.float32, backend)
    assert found.unique().tolist() == [2]
    found = ops.head_predict(x, None, 1.0, weight[:2], bias[[1, 1]], "argmax", 0.5, torch.float32, backend)
    assert found.unique().tolist() == [0]


@pytest.mark.parametrize("output", OUTPUTS)
def test_predict_opcheck(output: str, backend: str, device: str) -> None:
    operands = make(Case((1, 4, 3, 5), 3), device, torch.float32)[:5]
    torch.library.opcheck(torch.ops.fastunet.head_predict, (*operands, output, 0.5, torch.float16, backend))


def test_predict_refuses_another_output() -> None:
    operands = make(Case((1, 4, 3, 5), 3), "cpu", torch.float32)[:5]
    with pytest.raises(ValueError, match="expected output 'argmax'"):
        ops.head_predict(*operands, "mask", 0.5, torch.float32, "torch")
    with pytest.raises(TypeError, match="floating-point dtype"):
        ops.head_predict(*operands, "softmax", 0.5, torch.uint8, "torch")
