"""The operators confusion_matrix, of logits and of masks: both backends against a count of each cell by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sources import skip_if_unsupported
from torch import Tensor

from fastunet import ops
from fastunet.reference import functional as reference

IGNORE = 255
# The interpreter is numpy, which warns of values that the kernels compute and then mask.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


def make(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random logits; labels of which some are ignored and some are no class."""
    labels = torch.randint(-1, max(shape[1], 2) + 1, (shape[0], *shape[2:]))
    labels[torch.rand(labels.shape) < 0.1] = IGNORE
    return torch.randn(shape).to(device, dtype), labels.to(device)


def check(logits: Tensor, labels: Tensor, backend: str, threshold: float = 0.0) -> None:
    counts = ops.confusion_matrix(logits, labels, IGNORE, threshold, backend)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.cpu(), reference.confusion_matrix(logits.cpu(), labels.cpu(), IGNORE, threshold))


SHAPES = {
    "one-channel": (2, 1, 7, 9),
    "two-classes": (1, 2, 13, 5),
    "many-tiles": (2, 22, 31, 17),
    "largest-histogram": (1, 62, 5, 7),
    "atomic": (1, 70, 9, 5),
    "256-classes": (1, 256, 3, 5),
    "one-pixel": (1, 3, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_counts(shape: tuple[int, int, int, int], backend: str, device: str) -> None:
    check(*make(shape, device), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    skip_if_unsupported(backend, dtype, device)
    check(*make((2, 5, 6, 7), device, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool], ids=str)
def test_label_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    logits, labels = make((2, 2, 6, 7), device)
    check(logits, labels.clamp(0, 1).to(dtype), backend)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice-of-channels-last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]],
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor], backend: str, device: str) -> None:
    logits, labels = make((2, 3, 6, 5), device)
    check(layout(logits), layout(labels.unsqueeze(1))[:, 0], backend)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_single_channel_is_compared_with_the_threshold(threshold: float, backend: str, device: str) -> None:
    logits = torch.tensor([-1.0, 0.0, 0.25, 0.5, 0.75, float("nan")], device=device).view(1, 1, 1, -1)
    labels = torch.ones(1, 1, 6, dtype=torch.int64, device=device)
    hits = int((logits > threshold).sum())
    counts = ops.confusion_matrix(logits, labels, IGNORE, threshold, backend)
    assert counts.tolist() == [[0, 0], [6 - hits, hits], [0, 0]]


def test_ties_and_specials_go_where_argmax_puts_them(backend: str, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[1, 1, 0], [0, 2, 2], [nan, 1, 2], [inf, 1, nan], [nan, nan, 0], [-inf, -inf, -inf], [0, inf, inf]]
    logits = torch.tensor(rows, device=device).t().reshape(1, 3, 1, -1)
    check(logits, torch.arange(7, device=device).remainder(3).view(1, 1, 7), backend)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=["no-samples", "no-rows"])
def test_empty(shape: tuple[int, int, int, int], backend: str, device: str) -> None:
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=device)
    counts = ops.confusion_matrix(torch.randn(shape, device=device), labels, IGNORE, 0.0, backend)
    assert counts.tolist() == [[0] * 3] * 4


def test_opcheck(backend: str, device: str) -> None:
    arguments = (*make((2, 3, 4, 5), device), IGNORE, 0.0, backend)
    torch.library.opcheck(torch.ops.fastunet.confusion_matrix.default, arguments)


def test_compiles_to_one_graph(backend: str, device: str) -> None:
    logits, labels = make((2, 3, 4, 5), device)

    def f(x: Tensor) -> Tensor:
        return ops.confusion_matrix(2 * x, labels, IGNORE, 0.0, backend).diagonal()

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(logits), f(logits))


def test_shapes_must_fit(backend: str, device: str) -> None:
    logits, labels = make((2, 3, 4, 5), device)
    with pytest.raises(ValueError, match=r"expected labels of shape \(2, 4, 5\)"):
        ops.confusion_matrix(logits, labels[:, 1:], IGNORE, 0.0, backend)
    with pytest.raises(ValueError, match="1 to 256 classes"):
        ops.confusion_matrix(logits[0], labels, IGNORE, 0.0, backend)


# ---- masks -------------------------------------------------------------------------------------------------------


def check_masks(mask: Tensor, labels: Tensor, classes: int, ignore_index: int, backend: str) -> None:
    counts = ops.confusion_matrix_of_masks(mask, labels, classes, ignore_index, backend)
    assert counts.dtype == torch.int64
    assert torch.equal(
        counts.cpu(), reference.confusion_matrix_of_masks(mask.cpu(), labels.cpu(), classes, ignore_index)
    )


@pytest.mark.parametrize("ignore_index", [IGNORE, 1, -1])
@pytest.mark.parametrize("classes", [2, 5, 62, 70])
def test_masks(classes: int, ignore_index: int, backend: str, device: str) -> None:
    """Both with values that are no class; several tiles, the last of them ragged."""
    mask, labels = (torch.randint(-2, classes + 2, (3, 29, 31), device=device) for _ in range(2))
    check_masks(mask, labels, classes, ignore_index, backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool], ids=str)
def test_mask_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    mask, labels = (torch.randint(0, 2, (2, 6, 7), device=device) for _ in range(2))
    check_masks(mask.to(dtype), labels.to(torch.uint8), 2, IGNORE, backend)
    check_masks(mask.to(torch.int32), labels.to(dtype), 2, IGNORE, backend)


def test_masks_of_any_layout(backend: str, device: str) -> None:
    mask, labels = torch.randint(0, 4, (6, 2, 9), device=device), torch.randint(0, 4, (3, 18, 5), device=device)
    check_masks(mask.transpose(0, 1)[..., ::2][:, :3], labels[:2, ::6], 4, IGNORE, backend)


def test_no_mask(backend: str, device: str) -> None:
    empty = torch.zeros(0, 4, 5, dtype=torch.int64, device=device)
    assert ops.confusion_matrix_of_masks(empty, empty, 2, IGNORE, backend).tolist() == [[0, 0]] * 3


def test_masks_opcheck(backend: str, device: str) -> None:
    mask, labels = (torch.randint(0, 3, (2, 4, 5), device=device) for _ in range(2))
    arguments = (mask, labels, 3, IGNORE, backend)
    torch.library.opcheck(torch.ops.fastunet.confusion_matrix_of_masks.default, arguments)


def test_masks_must_fit() -> None:
    mask = torch.zeros(2, 4, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a mask of the labels' shape"):
        ops.confusion_matrix_of_masks(mask, mask[:1], 3, IGNORE, "torch")
    with pytest.raises(TypeError, match="expected integer masks"):
        ops.confusion_matrix_of_masks(mask.float(), mask, 3, IGNORE, "torch")
    with pytest.raises(ValueError, match="2 to 256 classes, got 300"):
        ops.confusion_matrix_of_masks(mask, mask, 300, IGNORE, "torch")
