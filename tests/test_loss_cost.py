"""What the losses cost on a CPU, beside the formula on one-hot labels: time and memory of forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastunet.losses import DiceCELoss, DiceLoss
from fastunet.metrics import soft_miou

CLASSES = 22
SHAPE = (4, CLASSES, 256, 256)
SMOOTH = 1e-5
Loss = Callable[[Tensor, Tensor], Tensor]


def formula_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Seed 002's true positives, false positives and false negatives, of (N, pixels, C) and one-hot labels."""
    hot = F.one_hot(labels, CLASSES).float().flatten(1, 2)
    p = logits.permute(0, 2, 3, 1).contiguous().flatten(1, 2).softmax(-1)
    tp = (hot * p).sum((0, 1))
    return tp, p.sum((0, 1)) - tp, hot.sum((0, 1)) - tp


def formula_dice(logits: Tensor, labels: Tensor) -> Tensor:
    tp, fp, fn = formula_sums(logits, labels)
    return 1 - ((2 * tp + SMOOTH) / (2 * tp + fn + fp + SMOOTH)).mean()


def formula_dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    return formula_dice(logits, labels) + F.cross_entropy(logits, labels)


def formula_miou(logits: Tensor, labels: Tensor) -> Tensor:
    tp, fp, fn = formula_sums(logits, labels)
    return ((tp + SMOOTH) / (tp + fn + fp + SMOOTH)).mean()


PAIRS: dict[str, tuple[Loss, Loss]] = {
    "dice": (DiceLoss(backend="torch"), formula_dice),
    "dice-ce": (DiceCELoss(backend="torch"), formula_dice_ce),
    "miou": (lambda x, y: soft_miou(x, y, backend="torch"), formula_miou),
}
pairs = pytest.mark.parametrize(("ours", "formula"), PAIRS.values(), ids=PAIRS.keys())
layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def operands(layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    logits = torch.randn(SHAPE).contiguous(memory_format=layout)
    return logits, torch.randint(0, CLASSES, (SHAPE[0], *SHAPE[2:]))


def step(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    x = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(x, labels), x)[0]


def seconds(loss: Loss, *operands: Tensor) -> float:
    start = time.perf_counter()
    step(loss, *operands)
    return time.perf_counter() - start


# Measured with one thread, least of ten each, alone and beside other work: 2.9 to 7.4 contiguous, 2.0 to 6.3 in
# channels_last, where the formula's permutation is free. A loss that made its one-hot would come to 1.
LEAST = 1.5


@layouts
@pairs
def test_time(ours: Loss, formula: Loss, layout: torch.memory_format) -> None:
    logits, labels = operands(layout)
    best, best_formula = float("inf"), float("inf")
    for turn in range(30):  # until it is clear: other processes can only make either look slower
        best_formula = min(best_formula, seconds(formula, logits, labels))
        best = min(best, seconds(ours, logits, labels))
        if turn >= 4 and best_formula >= LEAST * best:
            break
    assert best_formula >= LEAST * best, f"{1e3 * best:.1f} ms against {1e3 * best_formula:.1f} ms of the formula"


def peak_bytes(loss: Loss, *operands: Tensor) -> int:
    """The most bytes that forward and backward hold at a time, beyond the operands."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(loss, *operands)
    held = peak = 0
    events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@layouts
@pairs
def test_memory(ours: Loss, formula: Loss, layout: torch.memory_format) -> None:
    logits, labels = operands(layout)
    gradient = logits.numel() * logits.element_size()
    beyond, beyond_formula = (peak_bytes(loss, logits, labels) - gradient for loss in (ours, formula))
    assert 0 < beyond <= beyond_formula / 3
    assert beyond <= gradient / 3  # the formula alone would allow its whole one-hot


@pairs
def test_the_formula_is_the_same_loss(ours: Loss, formula: Loss) -> None:
    logits, labels = (t[:1, ..., :32, :32] for t in operands())
    torch.testing.assert_close(ours(logits, labels), formula(logits, labels), rtol=1e-5, atol=1e-6)  # float32 sums
