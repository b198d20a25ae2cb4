"""The operator softmax_stats: both backends, forward and backward, against float64 sums over one-hot labels."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from sources import skip_if_unsupported
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import aten, ops
from fastunet.layout import stats_dtype

IGNORE = -100
ALL = [True, True, True]
# The interpreter is numpy, which warns of values that the kernels compute and then mask.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    mode: str = "softmax"
    weighted: bool = False


CASES = {
    "one-class": Case((2, 1, 3, 5)),
    "two-classes": Case((1, 2, 7, 5)),
    "three-tiles": Case((2, 5, 17, 19), weighted=True),
    "22-classes": Case((3, 22, 5, 9)),
    "64-classes": Case((1, 64, 4, 5), weighted=True),
    "256-classes": Case((1, 256, 3, 7)),
    "binary": Case((2, 1, 13, 11), mode="sigmoid", weighted=True),
    "multilabel": Case((2, 3, 6, 7), mode="sigmoid"),
    "multilabel-weighted": Case((1, 6, 5, 5), mode="sigmoid", weighted=True),
    "one-pixel": Case((2, 4, 1, 1)),
}
case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make(case: Case, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random logits, labels of which a tenth are ignored, and pixel weights."""
    batch, classes, height, width = case.shape
    logits = (3 * torch.randn(case.shape)).to(device, dtype)
    if case.mode == "softmax":
        labels = torch.randint(0, classes, (batch, height, width))
    else:
        labels = torch.randint(0, 2, case.shape)
    labels[torch.rand(labels.shape) < 0.1] = IGNORE
    weight = torch.rand(batch, height, width).to(device) if case.weighted else None
    return logits, labels.to(device), weight


def truth(logits: Tensor, labels: Tensor, weight: Tensor | None, mode: str) -> Tensor:
    """The definition, in float64, with a tensor for everything."""
    x = logits.double()
    classes = x.shape[1]
    w = torch.ones_like(x[:, :1]) if weight is None else weight.double().unsqueeze(1)
    if mode == "softmax":
        y = labels.unsqueeze(1) == torch.arange(classes, device=x.device).view(1, -1, 1, 1)
        valid = (labels != IGNORE).unsqueeze(1).expand_as(x)
        log_p = x.log_softmax(1)
        entropy, counted = -log_p * y, y & valid
        spread, known = -log_p, counted.any(1, keepdim=True)
    else:
        labels = labels.view_as(x)
        y, valid = labels == 1, labels != IGNORE
        log_p = torch.nn.functional.logsigmoid(x)
        entropy = -torch.where(y, log_p, torch.nn.functional.logsigmoid(-x))
        spread = -log_p - torch.nn.functional.logsigmoid(-x)
        counted = known = valid
    p = log_p.exp() * valid
    columns = [p * y, p, (y & valid).double(), p * p, torch.where(counted, w * entropy, 0), counted * w]
    columns.append(torch.where(known, w * spread, 0))
    return torch.stack([t.sum((2, 3)) for t in columns], -1)


def truth_gradient(dstats: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None, mode: str) -> Tensor:
    x = logits.detach().double().requires_grad_()
    return torch.autograd.grad(truth(x, labels, weight, mode), x, dstats.double())[0]


# float32 sums of at most a few hundred terms of order 1, each with an error of a few units in the last place.
SUM = {"rtol": 1e-5, "atol": 1e-5}
# One rounding to the logits' dtype; absolute for entries that cancel to near zero. Gradients here are of order 1.
GRADIENT = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float16: {"rtol": 1e-3, "atol": 2e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 2e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}


def check(logits: Tensor, labels: Tensor, weight: Tensor | None, mode: str, backend: str) -> None:
    """Forward and backward against the truth."""
    x = logits.detach().requires_grad_()
    stats = ops.softmax_stats(x, labels, weight, mode, IGNORE, ALL, backend)
    assert stats.dtype == stats_dtype(logits.dtype)
    torch.testing.assert_close(stats.double(), truth(logits, labels, weight, mode).detach(), **SUM)
    dstats = torch.randn_like(stats)
    (dx,) = torch.autograd.grad(stats, x, dstats)
    expected = truth_gradient(dstats, logits, labels, weight, mode)
    assert dx.dtype == logits.dtype
    torch.testing.assert_close(dx.double(), expected, **GRADIENT[logits.dtype])


@case
def test_equals_float64_truth(case: Case, backend: str, device: str) -> None:
    check(*make(case, device), case.mode, backend)


COLUMNS = [[3], [4, 5], [6]]


@pytest.mark.parametrize("wanted", [[w == k for w in range(3)] for k in range(4)], ids=["p2", "ce", "smooth", "none"])
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_columns_not_wanted_are_zero_and_get_no_gradient(
    wanted: list[bool], mode: str, backend: str, device: str
) -> None:
    logits, labels, weight = make(Case((2, 3, 5, 4), mode, weighted=True), device)
    x = logits.requires_grad_()
    stats = ops.softmax_stats(x, labels, weight, mode, IGNORE, wanted, backend)
    expected = truth(logits, labels, weight, mode).detach()
    dropped = [c for asked, columns in zip(wanted, COLUMNS, strict=True) if not asked for c in columns]
    expected[..., dropped] = 0
    torch.testing.assert_close(stats.double(), expected, **SUM)
    dstats = torch.randn_like(stats)
    (dx,) = torch.autograd.grad(stats, x, dstats)
    dstats[..., dropped] = 0
    torch.testing.assert_close(
        dx.double(), truth_gradient(dstats, logits, labels, weight, mode), **GRADIENT[torch.float32]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_dtypes(dtype: torch.dtype, mode: str, backend: str, device: str) -> None:
    skip_if_unsupported(backend, dtype, device)
    check(*make(Case((2, 5, 4, 7), mode, weighted=True), device, dtype), mode, backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_label_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    logits = torch.randn(2, 5, 3, 4, device=device)
    labels = torch.randint(0, 5, (2, 3, 4), device=device)
    labels[0, 0, 0] = 100
    expected = ops.softmax_stats(logits, labels, None, "softmax", 100, ALL, "torch")
    stats = ops.softmax_stats(logits, labels.to(dtype), None, "softmax", 100, ALL, backend)
    torch.testing.assert_close(stats, expected, **SUM)


def test_bool_labels_in_sigmoid_mode(backend: str, device: str) -> None:
    logits, labels = torch.randn(2, 1, 3, 4, device=device), torch.rand(2, 3, 4, device=device) < 0.5
    stats = ops.softmax_stats(logits, labels, None, "sigmoid", IGNORE, ALL, backend)
    torch.testing.assert_close(stats.double(), truth(logits, labels.long(), None, "sigmoid"), **SUM)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice-of-channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "slice-of-channels-last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    "transposed-image": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every-second-row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "single-column": lambda x: x[..., :1],
    "single-row-of-channels-last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:2],
}


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor], mode: str, backend: str, device: str) -> None:
    logits = layout(torch.randn(2, 3, 6, 5, device=device))
    labels = torch.randint(0, 2, (2, 3, 6, 5), device=device)
    labels = layout(labels) if mode == "sigmoid" else layout(labels)[:, 0]
    check(logits, labels, None, mode, backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_keeps_the_memory_format(layout: str, backend: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, device=device)).requires_grad_()
    labels = torch.zeros(2, 4, 5, dtype=torch.int64, device=device)
    (dx,) = torch.autograd.grad(ops.softmax_stats(x, labels, None, "softmax", IGNORE, ALL, backend).sum(), x)
    assert dx.stride() == x.stride()


def test_an_incoming_gradient_of_any_strides(backend: str, device: str) -> None:
    logits, labels, _ = make(Case((2, 3, 4, 5)), device)
    dstats = torch.randn(7, 3, 2, device=device).permute(2, 1, 0)
    arguments = (logits, labels, None, "softmax", IGNORE, ALL, backend)
    expected = ops.softmax_stats_backward(dstats.contiguous(), *arguments)
    torch.testing.assert_close(ops.softmax_stats_backward(dstats, *arguments), expected, rtol=0, atol=0)


def test_a_program_walks_many_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("fastunet.kernels.softmax_stats")
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)
    check(*make(Case((2, 5, 31, 29), weighted=True), device), "softmax", "triton")  # 15 tiles, 2 programs a sample


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_ignored_pixels_leave_no_trace(mode: str, backend: str, device: str) -> None:
    logits, labels, weight = make(Case((2, 3, 5, 4), mode, weighted=True), device)
    assert weight is not None
    ignored = labels == IGNORE
    if mode == "softmax":
        logits.masked_fill_(ignored.unsqueeze(1), float("nan"))
        weight.masked_fill_(ignored, float("nan"))
    else:
        logits.masked_fill_(ignored, float("nan"))
    x = logits.requires_grad_()
    stats = ops.softmax_stats(x, labels, weight, mode, IGNORE, ALL, backend)
    clean = logits.detach().nan_to_num()
    torch.testing.assert_close(stats.double(), truth(clean, labels, weight.nan_to_num(), mode), **SUM)
    (dx,) = torch.autograd.grad(stats, x, torch.randn_like(stats))
    assert dx.isfinite().all()
    everywhere = ignored.unsqueeze(1).expand_as(dx) if mode == "softmax" else ignored
    assert (dx[everywhere] == 0).all()


def test_all_ignored_is_zero(backend: str, device: str) -> None:
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    labels = torch.full((2, 4, 5), IGNORE, device=device)
    stats = ops.softmax_stats(x, labels, None, "softmax", IGNORE, ALL, backend)
    (dx,) = torch.autograd.grad(stats.sum(), x)
    assert (stats == 0).all()
    assert (dx == 0).all()


@pytest.mark.parametrize("wrong", [3, -1, 127, -(2**40), 2**32 + 1])
def test_a_label_out_of_range_is_no_class(wrong: int, backend: str, device: str) -> None:
    logits, labels, _ = make(Case((2, 3, 5, 4)), device)
    labels[:, 1:3] = wrong
    check(logits, labels, torch.rand(2, 5, 4, device=device), "softmax", backend)


def test_a_negative_ignore_index_does_not_wrap_around_in_uint8(backend: str, device: str) -> None:
    logits = torch.randn(1, 200, 3, 3, device=device)
    labels = torch.full((1, 3, 3), 156, dtype=torch.uint8, device=device)  # −100 in 8 bits
    stats = ops.softmax_stats(logits, labels, None, "softmax", -100, ALL, backend)
    assert stats[0, 156, 2] == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_large_logits(dtype: torch.dtype, mode: str, backend: str, device: str) -> None:
    logits, labels, _ = make(Case((2, 3, 5, 4), mode), device)
    logits = torch.where(logits > 0, 1e4, -1e4).to(dtype)  # p is exactly 0, 1, ½ or ⅓
    check(logits, labels, None, mode, backend)


def test_small_entropies_keep_their_digits(backend: str, device: str) -> None:
    logits = torch.full((1, 1, 4, 4), 15.0, device=device)
    labels = torch.ones(1, 1, 4, 4, dtype=torch.int64, device=device)
    stats = ops.softmax_stats(logits, labels, None, "sigmoid", IGNORE, ALL, backend)
    entropy = truth(logits, labels, None, "sigmoid")[0, 0, 4]  # 16·log(1 + e⁻¹⁵) = 4.9e-6
    torch.testing.assert_close(stats[0, 0, 4].double(), entropy, rtol=1e-5, atol=0)


def test_infinite_logits_as_in_cross_entropy(backend: str, device: str) -> None:
    logits = torch.tensor([0.0, 1.0, -float("inf")], device=device).view(1, 3, 1, 1)
    labels = torch.tensor([[[0]]], device=device)
    stats = ops.softmax_stats(logits, labels, None, "softmax", IGNORE, ALL, backend)
    entropy = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(stats[0, :, 4].sum(), entropy, **SUM)
    never = ops.softmax_stats(logits, torch.full_like(labels, 2), None, "softmax", IGNORE, ALL, backend)
    assert never[0, 2, 4] == float("inf")
    assert never[0, :2].isfinite().all()


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_nan_shows_in_its_sample_only(mode: str, backend: str, device: str) -> None:
    logits, labels, _ = make(Case((2, 3, 5, 4), mode), device)
    labels.clamp_(min=0)
    logits[1, 2, 3, 1] = float("nan")
    stats = ops.softmax_stats(logits, labels, None, mode, IGNORE, ALL, backend)
    assert stats[0].isfinite().all()
    assert stats[1, 2, [1, 3]].isnan().all()
    if mode == "sigmoid":
        assert stats[1, 2, 4].isnan()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=["no-samples", "no-rows"])
def test_empty(shape: tuple[int, int, int, int], backend: str, device: str) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=device)
    stats = ops.softmax_stats(x, labels, None, "softmax", IGNORE, ALL, backend)
    assert stats.shape == (shape[0], 3, 7)
    assert (stats == 0).all()
    assert torch.autograd.grad(stats.sum(), x)[0].shape == shape


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_gradcheck(mode: str, backend: str, device: str) -> None:
    skip_if_unsupported(backend, torch.float64, device)
    x, labels, weight = make(Case((1, 3, 2, 2), mode, weighted=True), device, torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.softmax_stats(x, labels, weight, mode, IGNORE, ALL, backend), (x,))


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_opcheck(mode: str, backend: str, device: str) -> None:
    x, labels, weight = make(Case((2, 3, 4, 5), mode, weighted=True), device)
    for logits in (x, x.contiguous(memory_format=torch.channels_last)):
        arguments = (logits.clone().requires_grad_(), labels, weight, mode, IGNORE, ALL, backend)
        torch.library.opcheck(torch.ops.fastunet.softmax_stats.default, arguments)
        dstats = torch.randn(2, 3, 7, device=device)
        backward = (dstats, logits, labels, weight, mode, IGNORE, ALL, backend)
        torch.library.opcheck(torch.ops.fastunet.softmax_stats_backward.default, backward)


def test_compiles_to_one_graph(backend: str, device: str) -> None:
    x, labels, weight = make(Case((2, 3, 4, 5), weighted=True), device)

    def f(x: Tensor) -> Tensor:
        return ops.softmax_stats(x, labels, weight, "softmax", IGNORE, ALL, backend).square().sum()

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(eager).backward()
    torch.compile(f, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert eager.grad is not None
    assert torch.equal(eager.grad, compiled.grad)


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_the_same_bits_on_every_run(mode: str, backend: str, device: str) -> None:
    x, labels, weight = make(Case((2, 5, 37, 41), mode, weighted=True), device)
    runs = []
    with deterministic():
        for _ in range(3):
            stats = ops.softmax_stats(x, labels, weight, mode, IGNORE, ALL, backend)
            dx = ops.softmax_stats_backward(torch.ones_like(stats), x, labels, weight, mode, IGNORE, ALL, backend)
            runs.append((stats, dx))
    for stats, dx in runs[1:]:
        assert torch.equal(stats, runs[0][0])
        assert torch.equal(dx, runs[0][1])


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Raises where PyTorch has no deterministic kernel, and fills uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Largest(TorchDispatchMode):
    """The most elements any ATen call returned in new memory."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_torch_backend_makes_no_tensor_of_the_size_of_the_logits(layout: str) -> None:
    logits = LAYOUTS[layout](torch.randn(4, 22, 256, 256))
    labels = torch.randint(0, 22, (4, 256, 256))
    with Largest(logits, labels) as forward:
        stats = aten.softmax_stats(logits, labels, None, "softmax", IGNORE, ALL)
    assert forward.elements <= logits.numel() // 4
    with Largest(logits, labels) as backward:
        gradient = aten.softmax_stats_backward(stats, logits, labels, None, "softmax", IGNORE, ALL)
    backward.known.add(gradient.untyped_storage().data_ptr())
    assert backward.elements == gradient.numel()


def test_gpu_memory_is_the_gradient_and_little_else(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU: measures its allocator")
    x = torch.randn(4, 22, 256, 256, device=device, requires_grad=True)
    labels = torch.zeros(4, 256, 256, dtype=torch.int64, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.softmax_stats(x, labels, None, "softmax", IGNORE, ALL, "triton").sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - x.numel() * x.element_size()
    assert extra <= x.numel() * x.element_size() // 10


def test_more_than_two_to_the_31_elements(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU with 12 GB: the interpreter would take hours")
    logits = torch.zeros(1, 2, 2**15 + 1, 2**15, dtype=torch.float16, device=device).requires_grad_()
    logits.data[0, 1, -1, -1] = 10
    labels = torch.zeros(1, 2**15 + 1, 2**15, dtype=torch.uint8, device=device)
    labels[0, -1, -1] = 1
    stats = ops.softmax_stats(logits, labels, None, "softmax", IGNORE, ALL, "triton")
    (dx,) = torch.autograd.grad(stats[0, 1, 0], logits)
    p = torch.tensor([0.0, 10.0]).softmax(0)
    torch.testing.assert_close(stats[0, 1, 0].cpu(), p[1], **SUM)
    torch.testing.assert_close(dx[0, 1, -1, -1].cpu().float(), p[0] * p[1], **GRADIENT[torch.float16])
    assert dx.count_nonzero() == 2
