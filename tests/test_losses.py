"""The losses against their published formulas on one-hot labels, PyTorch's cross-entropy, and MONAI where installed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sources import widest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import losses
from fastunet.losses import (
    CrossEntropyLoss,
    DiceCELoss,
    DiceLoss,
    GeneralizedDiceLoss,
    TverskyLoss,
    check_labels,
    dice_loss,
    softmax_stats,
)
from fastunet.metrics import multiclass_dice_coeff

# The interpreter is numpy, which warns of values that the kernels compute and then mask.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# The truths below are float64. A loss is a ratio of float32 sums of a few hundred terms, so a few units of 1e-7.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
# float64 against float64: the order of summation is all that differs.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def batch(
    classes: int = 4, size: tuple[int, int] = (9, 7), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random logits and labels in which the last class does not occur."""
    logits = 2 * torch.randn(3, classes, *size, dtype=dtype)
    return logits, torch.randint(0, max(1, classes - 1), (3, *size))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return (labels.unsqueeze(1) == torch.arange(classes).view(1, -1, 1, 1)).double()


def seed002(logits: Tensor, labels: Tensor, beta: float = 1.0, smooth: float = 1e-5) -> Tensor:
    """Per-class F-score of soft counts over the batch, one minus the mean."""
    p, y = logits.double().softmax(1), one_hot(labels, logits.shape[1])
    hit, miss, false = (p * y).sum((0, 2, 3)), ((1 - p) * y).sum((0, 2, 3)), (p * (1 - y)).sum((0, 2, 3))
    b = beta * beta
    return 1 - (((1 + b) * hit + smooth) / ((1 + b) * hit + b * miss + false + smooth)).mean()


def gradients(f: Any, g: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    a, b = logits.clone().requires_grad_(), logits.double().requires_grad_()
    return torch.autograd.grad(f(a), a)[0].double(), torch.autograd.grad(g(b), b)[0]


@pytest.mark.parametrize("classes", [2, 4, 22])
def test_default_is_seed002(classes: int, backend: str, device: str) -> None:
    logits, labels = batch(classes, dtype=torch.float32)
    loss = DiceLoss(backend=backend)
    value = loss(logits.to(device), labels.to(device)).cpu().double()
    torch.testing.assert_close(value, seed002(logits, labels), **CLOSE)
    mine, expected = gradients(lambda x: loss(x.to(device), labels.to(device)), lambda x: seed002(x, labels), logits)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-8)  # float32; gradients are of order 1e-3


def test_default_is_seed002_to_float64() -> None:
    logits, labels = batch()
    torch.testing.assert_close(DiceLoss()(logits, labels), seed002(logits, labels), **EXACT)
    torch.testing.assert_close(dice_loss(logits, labels), seed002(logits, labels), **EXACT)
    torch.testing.assert_close(DiceLoss.preset("seed002")(logits, labels), seed002(logits, labels), **EXACT)


def test_milesial_preset_is_micro_over_batch_and_classes() -> None:
    logits, labels = batch()
    p, y = logits.softmax(1), one_hot(labels, 4)
    expected = 1 - (2 * (p * y).sum() + 1e-6) / (p.sum() + y.sum() + 1e-6)
    torch.testing.assert_close(DiceLoss.preset("milesial")(logits, labels), expected, **EXACT)


def test_milesials_earlier_versions_average_over_classes() -> None:
    logits, labels = batch(3)
    p, y = logits.softmax(1), one_hot(labels, 3)
    per_class = [(2 * (p[:, k] * y[:, k]).sum() + 1e-6) / (p[:, k].sum() + y[:, k].sum() + 1e-6) for k in range(3)]
    expected = 1 - torch.stack(per_class).mean()
    torch.testing.assert_close(DiceLoss.preset("milesial-v3")(logits, labels), expected, **EXACT)
    torch.testing.assert_close(1 - multiclass_dice_coeff(p, y, True, version=3), expected, **EXACT)
    assert abs(float(expected - DiceLoss.preset("milesial")(logits, labels))) > 1e-3


def test_milesial_preset_takes_a_sigmoid_of_one_channel() -> None:
    logits = torch.randn(3, 1, 5, 4, dtype=torch.float64)
    mask = torch.randint(0, 2, (3, 5, 4))
    p = logits[:, 0].sigmoid()
    expected = 1 - (2 * (p * mask).sum() + 1e-6) / (p.sum() + mask.sum() + 1e-6)
    torch.testing.assert_close(DiceLoss.preset("milesial")(logits, mask), expected, **EXACT)
    torch.testing.assert_close(DiceLoss.preset("milesial")(logits, mask.bool()), expected, **EXACT)


def test_brain_preset_is_flattened_with_smooth_one() -> None:
    logits, mask = torch.randn(3, 1, 5, 4, dtype=torch.float64), torch.randint(0, 2, (3, 1, 5, 4))
    p, y = logits.sigmoid().flatten(), mask.flatten()
    expected = 1 - (2 * (p @ y.double()) + 1) / (p.sum() + y.sum() + 1)
    torch.testing.assert_close(DiceLoss.preset("brain")(logits, mask), expected, **EXACT)


def test_nnunet_preset_leaves_the_background_out() -> None:
    logits, labels = batch()
    p, y = logits.softmax(1)[:, 1:], one_hot(labels, 4)[:, 1:]
    overlap, total = (p * y).sum((0, 2, 3)), p.sum((0, 2, 3)) + y.sum((0, 2, 3))
    dc = (2 * overlap + 1e-5) / (total + 1e-5).clip(1e-8)
    torch.testing.assert_close(DiceLoss.preset("nnunet")(logits, labels), 1 - dc.mean(), **EXACT)


def test_presets_take_overrides_and_keep_their_class() -> None:
    loss = DiceCELoss.preset("nnunet", lambda_ce=0.5, ignore_index=7)
    assert isinstance(loss, DiceCELoss)
    assert (loss.include_background, loss.lambda_ce, loss.ignore_index) == (False, 0.5, 7)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no-background": {"include_background": False},
    "squared": {"squared_pred": True},
    "per-sample": {"batch": False},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "batch": False},
    "smooth": {"smooth_nr": 0.5, "smooth_dr": 2.0},
    "weight": {"weight": [0.1, 1.0, 2.0, 0.7]},
    "sigmoid": {"sigmoid": True},
    "jaccard": {"jaccard": True},
    "everything": {"sigmoid": True, "squared_pred": True, "batch": False, "include_background": False},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def target(options: dict[str, Any], labels: Tensor) -> Tensor:
    return one_hot(labels, 4).long() if options.get("sigmoid") else labels


@options
def test_options_follow_their_definition(options: dict[str, Any]) -> None:
    logits, labels = batch()
    p, y = (logits.sigmoid() if options.get("sigmoid") else logits.softmax(1)), one_hot(labels, 4)
    if not options.get("include_background", True):
        p, y = p[:, 1:], y[:, 1:]
    axes = (0, 2, 3) if options.get("batch", True) else (2, 3)
    size = (p * p if options.get("squared_pred") else p).sum(axes) + y.sum(axes)
    if options.get("jaccard"):
        size = 2 * (size - (p * y).sum(axes))
    score = (2 * (p * y).sum(axes) + options.get("smooth_nr", 1e-5)) / (size + options.get("smooth_dr", 1e-5))
    expected = (1 - score) * torch.tensor(options.get("weight", 1.0), dtype=torch.float64)
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda t: t}[options.get("reduction", "mean")]
    # The class weights are kept in float32, as the parameters of a network would be.
    close = CLOSE if "weight" in options else EXACT
    torch.testing.assert_close(DiceLoss(**options)(logits, target(options, labels)), reduce(expected), **close)


@options
def test_options_agree_with_monai(options: dict[str, Any]) -> None:
    monai = pytest.importorskip("monai.losses", reason="MONAI is an optional oracle: pip install monai")
    logits, labels = batch()
    activation = {"sigmoid": True} if options.get("sigmoid") else {"softmax": True}
    rest = {k: v for k, v in options.items() if k != "sigmoid"}
    theirs = monai.DiceLoss(to_onehot_y=True, **{"batch": True, **rest}, **activation)
    expected = theirs(logits, labels.unsqueeze(1))
    value = DiceLoss(**options)(logits, target(options, labels))
    # MONAI's one-hot is float32, and so are the norm that squared_pred takes of it and the class weights.
    close = CLOSE if {"weight", "squared_pred"} & options.keys() else EXACT
    torch.testing.assert_close(value.flatten(), expected.flatten(), **close)


def overlaps(logits: Tensor, labels: Tensor, axes: tuple[int, ...] = (0, 2, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """TP, false positives and false negatives per class."""
    p, y = logits.double().softmax(1), one_hot(labels, logits.shape[1])
    return (p * y).sum(axes), (p * (1 - y)).sum(axes), ((1 - p) * y).sum(axes)


def test_log_dice_is_minus_the_logarithm_of_the_score() -> None:
    logits, labels = batch()
    tp, fp, fn = overlaps(logits, labels)
    expected = -((2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5)).log()
    torch.testing.assert_close(DiceLoss(log=True)(logits, labels), expected.mean(), **EXACT)


def test_log_dice_of_a_missed_class_is_finite_without_smoothing() -> None:
    logits = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).expand(1, 2, 3, 3).contiguous().requires_grad_()
    value = DiceLoss(log=True, smooth_nr=0.0)(logits, torch.ones(1, 3, 3, dtype=torch.int64))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "per-sample"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_absent_classes_can_be_left_out(reduction: str, batched: bool) -> None:
    logits, labels = batch()  # class 3 does not occur
    labels[0].clamp_(max=1)  # nor class 2 in the first sample
    tp, fp, fn = overlaps(logits, labels, (0, 2, 3) if batched else (2, 3))
    loss = 1 - (2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5)
    present = tp + fn > 0
    expected = {"mean": loss[present].mean(), "sum": loss[present].sum(), "none": torch.where(present, loss, 0)}
    value = DiceLoss(ignore_absent=True, reduction=reduction, batch=batched)(logits, labels)
    torch.testing.assert_close(value, expected[reduction], **EXACT)


def test_no_class_present_is_a_loss_of_zero() -> None:
    logits, labels = torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 255)
    assert DiceLoss(ignore_absent=True, ignore_index=255)(logits, labels) == 0


TVERSKY: dict[str, dict[str, Any]] = {
    "default": {},
    "recall": {"alpha": 0.3, "beta": 0.7},
    "jaccard": {"alpha": 1.0, "beta": 1.0, "batch": False},
    "sum": {"alpha": 0.2, "reduction": "sum", "include_background": False},
    "none": {"reduction": "none", "batch": False, "smooth_nr": 0.5, "smooth_dr": 2.0},
}


@pytest.mark.parametrize("options", TVERSKY.values(), ids=TVERSKY.keys())
def test_tversky_follows_its_definition(options: dict[str, Any]) -> None:
    logits, labels = batch()
    tp, fp, fn = overlaps(logits, labels, (0, 2, 3) if options.get("batch", True) else (2, 3))
    score = (tp + options.get("smooth_nr", 1e-5)) / (
        tp + options.get("alpha", 0.5) * fp + options.get("beta", 0.5) * fn + options.get("smooth_dr", 1e-5)
    )
    loss = (1 - score)[..., 0 if options.get("include_background", True) else 1 :]
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda t: t}[options.get("reduction", "mean")]
    torch.testing.assert_close(TverskyLoss(**options)(logits, labels), reduce(loss), **EXACT)


@pytest.mark.parametrize("options", TVERSKY.values(), ids=TVERSKY.keys())
def test_tversky_agrees_with_monai(options: dict[str, Any]) -> None:
    logits, labels = batch()
    monai = pytest.importorskip("monai.losses", reason="MONAI is an optional oracle: pip install monai")
    theirs = monai.TverskyLoss(softmax=True, to_onehot_y=True, **{"batch": True, **options})
    torch.testing.assert_close(TverskyLoss(**options)(logits, labels), theirs(logits, labels.unsqueeze(1)), **EXACT)


def test_tversky_is_seed002_with_any_beta() -> None:
    logits, labels = batch()
    b = 2.0**2
    loss = TverskyLoss(alpha=1 / (1 + b), beta=b / (1 + b), smooth_nr=0.5 / (1 + b), smooth_dr=0.5 / (1 + b))
    torch.testing.assert_close(loss(logits, labels), seed002(logits, labels, beta=2.0, smooth=0.5), **EXACT)


def test_focal_tversky_is_a_power_of_each_class() -> None:
    logits, labels = batch()
    each = TverskyLoss(alpha=0.3, beta=0.7, reduction="none")(logits, labels)
    value = TverskyLoss(alpha=0.3, beta=0.7, gamma=0.75)(logits, labels)
    torch.testing.assert_close(value, (each**0.75).mean(), **EXACT)


def test_focal_tversky_of_a_perfect_prediction_has_a_finite_gradient() -> None:
    labels = torch.zeros(1, 3, 3, dtype=torch.int64)  # class 1 is absent and not predicted: a loss of exactly 0
    logits = (1e4 * (one_hot(labels, 2) - 0.5)).float().requires_grad_()
    TverskyLoss(gamma=0.75)(logits, labels).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


GENERALIZED: dict[str, dict[str, Any]] = {
    "default": {},
    "simple": {"w_type": "simple"},
    "uniform": {"w_type": "uniform"},
    "per-sample": {"batch": False, "reduction": "sum"},
    "no-background": {"include_background": False, "smooth_nr": 0.5, "smooth_dr": 2.0},
    "none": {"batch": False, "reduction": "none"},
}


@pytest.mark.parametrize("options", GENERALIZED.values(), ids=GENERALIZED.keys())
def test_generalized_dice_agrees_with_monai(options: dict[str, Any]) -> None:
    monai = pytest.importorskip("monai.losses", reason="MONAI is an optional oracle: pip install monai")
    logits, labels = batch()  # the absent class gets the largest weight
    theirs = monai.GeneralizedDiceLoss(softmax=True, to_onehot_y=True, **{"batch": True, **options})
    expected = theirs(logits, labels.unsqueeze(1)).flatten()
    # MONAI computes the weights of classes in float32.
    torch.testing.assert_close(GeneralizedDiceLoss(**options)(logits, labels).flatten(), expected, **CLOSE)


def test_generalized_dice_follows_its_definition() -> None:
    logits, labels = batch()
    tp, fp, fn = (t[:3] for t in overlaps(logits, labels))  # class 3 is absent
    w = 1 / (tp + fn) ** 2
    expected = 1 - (2 * (w * tp).sum() + 1e-5) / ((w * (2 * tp + fp + fn)).sum() + 1e-5)
    torch.testing.assert_close(GeneralizedDiceLoss(ignore_absent=True)(logits, labels), expected, **EXACT)


def test_generalized_dice_of_nothing_but_ignored_pixels_is_zero() -> None:
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.full((2, 4, 5), 255)
    value = GeneralizedDiceLoss(ignore_index=255)(logits, labels)
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_nothing_is_ignored_if_ignore_index_is_none(backend: str, device: str) -> None:
    logits, labels = batch(dtype=torch.float32)
    value = DiceLoss(ignore_index=None, backend=backend)(logits.to(device), labels.to(device))
    torch.testing.assert_close(value.cpu().double(), seed002(logits, labels), **CLOSE)
    with pytest.raises(ValueError, match="got -100"):
        DiceLoss(ignore_index=None)(logits, torch.full_like(labels, -100))


@pytest.mark.parametrize("kind", [DiceLoss, TverskyLoss, GeneralizedDiceLoss, CrossEntropyLoss, DiceCELoss])
def test_a_loss_of_given_statistics_is_the_loss(kind: Any) -> None:
    logits, labels = batch()
    loss = kind()
    torch.testing.assert_close(loss.from_stats(softmax_stats(logits, labels)), loss(logits, labels), **EXACT)


@pytest.mark.parametrize("ignored", [0, 2])
def test_ignore_index_agrees_with_monai(ignored: int) -> None:
    monai = pytest.importorskip("monai.losses", reason="MONAI is an optional oracle: pip install monai")
    logits, labels = batch()
    theirs = monai.DiceLoss(softmax=True, to_onehot_y=True, batch=True, ignore_index=ignored)
    expected = theirs(logits, labels.unsqueeze(1))
    torch.testing.assert_close(DiceLoss(ignore_index=ignored)(logits, labels), expected, **EXACT)


@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 0.25]], ids=["unweighted", "weighted"])
def test_dice_ce_agrees_with_monai(weight: list[float] | None) -> None:
    monai = pytest.importorskip("monai.losses", reason="MONAI is an optional oracle: pip install monai")
    logits, labels = batch()
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    theirs = monai.DiceCELoss(softmax=True, to_onehot_y=True, batch=True, weight=w, lambda_dice=0.3, lambda_ce=2.0)
    value = DiceCELoss(weight=weight, lambda_dice=0.3, lambda_ce=2.0)(logits, labels)
    torch.testing.assert_close(value, theirs(logits, labels.unsqueeze(1)), **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 0.25]], ids=["unweighted", "weighted"])
def test_cross_entropy_is_pytorchs(weight: list[float] | None, reduction: str, backend: str, device: str) -> None:
    logits, labels = batch(dtype=torch.float32)
    labels[torch.rand(labels.shape) < 0.2] = 3
    loss = DiceCELoss(lambda_dice=0, weight=weight, ignore_index=3, reduction=reduction, backend=backend).to(device)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    value = loss(logits.to(device), labels.to(device)).cpu().double()
    expected = F.cross_entropy(logits.double(), labels, weight=w, ignore_index=3, reduction=reduction)
    torch.testing.assert_close(value, expected, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 0.25]], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_pytorchs(
    smoothing: float, weight: list[float] | None, reduction: str, backend: str, device: str
) -> None:
    logits, labels = batch(dtype=torch.float32)
    labels[torch.rand(labels.shape) < 0.2] = 255
    options: dict[str, Any] = {"ignore_index": 255, "reduction": reduction, "label_smoothing": smoothing}
    loss = CrossEntropyLoss(weight=weight, backend=backend, **options).to(device)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    value = loss(logits.to(device), labels.to(device)).cpu().double()
    torch.testing.assert_close(value, F.cross_entropy(logits.double(), labels, weight=w, **options), **CLOSE)
    mine, expected = gradients(
        lambda x: loss(x.to(device), labels.to(device)),
        lambda x: F.cross_entropy(x, labels, weight=w, **options),
        logits,
    )
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)  # float32; with "sum" gradients are of order 1


def test_label_smoothing_in_dice_ce_agrees_with_monai() -> None:
    monai = pytest.importorskip("monai.losses", reason="MONAI is an optional oracle: pip install monai")
    logits, labels = batch()
    theirs = monai.DiceCELoss(softmax=True, to_onehot_y=True, batch=True, label_smoothing=0.2)
    value = DiceCELoss(label_smoothing=0.2)(logits, labels)
    torch.testing.assert_close(value, theirs(logits, labels.unsqueeze(1)), **EXACT)


def test_smoothed_binary_labels_lie_between_zero_and_one() -> None:
    logits, labels = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randint(0, 2, (2, 3, 5, 4))
    value = CrossEntropyLoss(sigmoid=True, label_smoothing=0.3)(logits, labels)
    expected = F.binary_cross_entropy_with_logits(logits, 0.7 * labels.double() + 0.15)
    torch.testing.assert_close(value, expected, **EXACT)


def test_dice_ce_is_dice_plus_cross_entropy() -> None:
    logits, labels = batch()
    expected = seed002(logits, labels) + F.cross_entropy(logits, labels)
    torch.testing.assert_close(DiceCELoss()(logits, labels), expected, **EXACT)
    mine, theirs = gradients(
        lambda x: DiceCELoss()(x, labels), lambda x: seed002(x, labels) + F.cross_entropy(x, labels), logits
    )
    torch.testing.assert_close(mine, theirs, **EXACT)


def test_pixel_weight_weighs_the_cross_entropy_only() -> None:
    logits, labels = batch()
    w = torch.rand(labels.shape, dtype=torch.float64)
    entropy = F.cross_entropy(logits, labels, reduction="none")
    expected = seed002(logits, labels) + (w * entropy).sum() / w.sum()
    torch.testing.assert_close(DiceCELoss()(logits, labels, pixel_weight=w), expected, **EXACT)


@pytest.mark.parametrize("classes", [1, 3])
def test_sigmoid_cross_entropy_is_bce_with_logits(classes: int) -> None:
    logits = torch.randn(2, classes, 5, 4, dtype=torch.float64)
    labels = torch.randint(0, 2, logits.shape)
    value = DiceCELoss(sigmoid=True, lambda_dice=0)(logits, labels)
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(logits, labels.double()), **EXACT)


def test_all_ignored_means_what_pytorch_means() -> None:
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.full((2, 4, 5), 255, dtype=torch.uint8)
    assert DiceLoss(ignore_index=255)(logits, labels) == 0
    loss = DiceCELoss(ignore_index=255)(logits, labels)
    assert loss.isnan()
    assert F.cross_entropy(logits, labels.long(), ignore_index=255).isnan()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("labels", [0, 1], ids=["zeros", "ones"])
@pytest.mark.parametrize("build", [DiceLoss, DiceCELoss, CrossEntropyLoss, TverskyLoss, GeneralizedDiceLoss])
def test_a_softmax_of_one_channel_is_refused(build: type[DiceLoss], labels: int) -> None:
    """It is 1 whatever the logits are: nothing would be learned. By shape, so also where labels are not looked at."""
    logits, mask = torch.randn(2, 1, 4, 5), torch.full((2, 4, 5), labels)
    with pytest.raises(ValueError, match=r"2 channels or more for a softmax.*sigmoid=True"):
        build()(logits, mask)
    with torch.device("meta"), pytest.raises(ValueError, match="2 channels or more"):
        build()(torch.empty(2, 1, 4, 5), torch.empty(2, 4, 5, dtype=torch.int64))
    assert build(sigmoid=True)(logits, mask).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "pixel-weight"])
@pytest.mark.parametrize("form", ["plane", "channel", "bool"])
def test_pos_weight_is_pytorchs(form: str, weighted: bool, reduction: str, backend: str, device: str) -> None:
    dtype = widest(backend, device)
    logits, labels = torch.randn(3, 1, 5, 6, dtype=torch.float64).to(dtype), torch.randint(0, 2, (3, 5, 6))
    w = (torch.rand if weighted else torch.ones)(3, 5, 6, dtype=torch.float64).to(dtype)
    keep = torch.ones(3, 5, 6, dtype=torch.float64)
    if form != "bool":
        labels[:, 0] = 255
        keep[:, 0] = 0
    truth = (labels == 1).double()
    loss = CrossEntropyLoss(sigmoid=True, pos_weight=3.5, ignore_index=255, reduction=reduction, backend=backend)
    given = {"plane": labels, "channel": labels.unsqueeze(1), "bool": labels.bool()}[form].to(device)

    def expected(x: Tensor) -> Tensor:
        terms = F.binary_cross_entropy_with_logits(x[:, 0], truth, pos_weight=torch.tensor(3.5), reduction="none")
        total = (terms * w * keep).sum()
        return total / (w * keep).sum() if reduction == "mean" else total

    mine, theirs = gradients(
        lambda x: loss(x.to(device), given, w.to(device) if weighted else None).cpu(), expected, logits
    )
    value = loss(logits.to(device), given, w.to(device) if weighted else None)
    torch.testing.assert_close(value.cpu().double(), expected(logits.double()), **CLOSE)
    torch.testing.assert_close(mine, theirs, **CLOSE)


def test_a_large_pos_weight_costs_no_digits_of_the_mean() -> None:
    """In float32, of weights in float64 too; an ignored pixel's is of no account."""
    logits, labels = torch.randn(3, 1, 33, 41), torch.randint(0, 2, (3, 33, 41), dtype=torch.uint8)
    labels[:, 0], weight = 255, torch.rand(3, 33, 41, dtype=torch.float64)
    terms = F.binary_cross_entropy_with_logits(
        logits[:, 0, 1:].double(), labels[:, 1:].double(), pos_weight=torch.tensor(1e5), reduction="none"
    )
    weight[:, 0] = torch.inf
    loss = CrossEntropyLoss(sigmoid=True, pos_weight=1e5, ignore_index=255)
    for given, w in ((None, torch.ones_like(terms)), (weight, weight[:, 1:]), (weight.float(), weight.float()[:, 1:])):
        expected = (terms * w).sum() / w.sum()
        torch.testing.assert_close(loss(logits, labels, given), expected.float(), rtol=3e-6, atol=0)


def test_pos_weight_leaves_dice_alone() -> None:
    logits, labels = torch.randn(3, 1, 5, 6, dtype=torch.float64), torch.randint(0, 2, (3, 5, 6))
    both = DiceCELoss(sigmoid=True, pos_weight=3.5)(logits, labels)
    parts = DiceLoss(sigmoid=True)(logits, labels) + CrossEntropyLoss(sigmoid=True, pos_weight=3.5)(logits, labels)
    torch.testing.assert_close(both, parts, **EXACT)


@pytest.mark.parametrize("build", [DiceLoss, DiceCELoss, CrossEntropyLoss, TverskyLoss])
def test_class_weights_in_float64_stay_so(build: type[DiceLoss]) -> None:
    logits, labels = batch(4)
    weight = torch.tensor([0.1, 0.7, 1.3, 0.9], dtype=torch.float64)
    value, plain = build(weight=weight), build(reduction="sum")
    assert value.weight is not None
    assert torch.equal(value.weight, weight)
    if build in (DiceLoss, TverskyLoss):
        expected = (build(reduction="none")(logits, labels) * weight).mean()
        torch.testing.assert_close(value(logits, labels), expected, **EXACT)
    elif build is CrossEntropyLoss:
        torch.testing.assert_close(value(logits, labels), F.cross_entropy(logits, labels, weight), **EXACT)
    assert plain.weight is None
    assert build(weight=[1, 2, 3, 4]).weight.dtype == torch.float32  # type: ignore[union-attr]


def test_generalized_dice_of_a_large_picture_needs_less_smoothing() -> None:
    """1/(Σy)² of 8×512×512 pixels is small beside MONAI's 1e-5, as the docstring says."""
    y = torch.tensor([0.9, 0.1], dtype=torch.float64) * 8 * 512**2
    p, tp = y.flip(0), 0.2 * y
    stats = torch.stack([tp, p, y, *torch.zeros(4, 2, dtype=torch.float64)], -1)[None]
    w = y**-2
    expected = 1 - 2 * (w * tp).sum() / (w * (p + y)).sum()
    exact = GeneralizedDiceLoss(smooth_nr=0, smooth_dr=1e-12).from_stats(stats)
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=0)
    assert GeneralizedDiceLoss().from_stats(stats) < 0.9 * expected


@pytest.fixture
def not_warned_yet() -> None:
    losses._warn_once.cache_clear()


@pytest.mark.usefixtures("not_warned_yet")
def test_probabilities_in_place_of_logits_are_warned_of_once() -> None:
    logits, labels = batch(3, dtype=torch.float32)
    p = logits.softmax(1).requires_grad_()
    with pytest.warns(UserWarning, match="softmax of a softmax"):
        DiceCELoss()(p, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Triton's interpreter may have one of its own
        DiceCELoss()(p, labels)


@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.filterwarnings("error::UserWarning")
def test_nothing_else_is_warned_of() -> None:
    logits, labels = batch(3, dtype=torch.float32)
    p = logits.softmax(1)
    doubtful = p.clone()
    doubtful[-1, :, -1, -1] = 1.5  # only here it shows
    for x in (logits, p * 0.9, p.log(), doubtful, p[:0]):
        DiceCELoss()(x, labels[: len(x)])
    DiceLoss(sigmoid=True)(p, one_hot(labels, 3).long())


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_certain_predictions(scale: float, dtype: torch.dtype, backend: str, device: str) -> None:
    _, labels = batch()
    logits = (scale * (one_hot(labels, 4) - 0.5)).to(dtype)
    loss = DiceCELoss(backend=backend)
    x = logits.to(device).requires_grad_()
    value = loss(x, labels.to(device))
    wide = logits.double()
    expected = seed002(wide, labels) + F.cross_entropy(wide, labels)
    torch.testing.assert_close(value.cpu().double(), expected, **CLOSE)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.isfinite().all()


ALL_LOSSES: dict[str, Any] = {
    "dice": DiceLoss(),
    "squared": DiceLoss(squared_pred=True, batch=False),
    "jaccard": DiceLoss(jaccard=True, include_background=False),
    "log-dice": DiceLoss(log=True),
    "tversky": TverskyLoss(alpha=0.3, beta=0.7),
    "focal-tversky": TverskyLoss(alpha=0.3, beta=0.7, gamma=0.75),
    "generalized": GeneralizedDiceLoss(),
    "ce": CrossEntropyLoss(label_smoothing=0.1, ignore_index=255),
    "dice-ce": DiceCELoss(weight=[1.0, 2.0, 0.5, 1.0], ignore_absent=True),
}
DEGENERATE: dict[str, tuple[Tensor, Tensor]] = {
    "absent-class": (torch.linspace(-3, 3, 4 * 36).view(1, 4, 6, 6), torch.arange(36).view(1, 6, 6) % 3),
    "one-class-only": (torch.linspace(3, -3, 4 * 36).view(1, 4, 6, 6), torch.ones(1, 6, 6, dtype=torch.int64)),
    "right-for-sure": (
        1e4 * F.one_hot(torch.arange(36).view(1, 6, 6) % 4, 4).movedim(3, 1).float(),
        torch.arange(36).view(1, 6, 6) % 4,
    ),
    "wrong-for-sure": (
        -1e4 * F.one_hot(torch.arange(36).view(1, 6, 6) % 4, 4).movedim(3, 1).float(),
        torch.arange(36).view(1, 6, 6) % 4,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("logits", "labels"), DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("loss", ALL_LOSSES.values(), ids=ALL_LOSSES.keys())
def test_degenerate_inputs_give_what_float64_gives(loss: Any, logits: Tensor, labels: Tensor, dtype: Any) -> None:
    x = logits.to(dtype).requires_grad_()
    value = loss(x, labels)
    # A focal loss near 0 raises its rounding errors, of 1e-7, to the power of 0.75.
    close = {"rtol": 2e-6, "atol": 1e-5} if getattr(loss, "gamma", 1) != 1 else CLOSE
    torch.testing.assert_close(value.double(), loss(x.detach().double(), labels), **close)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.isfinite().all()


def test_half_precision_logits_give_a_float32_loss(backend: str, device: str) -> None:
    logits, labels = batch(dtype=torch.float16)
    value = DiceCELoss(backend=backend)(logits.to(device), labels.to(device))
    assert value.dtype == torch.float32
    wide = logits.double()
    expected = seed002(wide, labels) + F.cross_entropy(wide, labels)
    torch.testing.assert_close(value.cpu().double(), expected, **CLOSE)


class Calls(TorchDispatchMode):
    """Names of fastunet's operators as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastunet":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_one_pass_forward_and_one_backward() -> None:
    logits, labels = batch()
    with Calls() as calls:
        DiceCELoss()(logits.requires_grad_(), labels).backward()
    assert calls.names == ["fastunet::softmax_stats", "fastunet::softmax_stats_backward"]


def test_compiles_to_one_graph() -> None:
    logits, labels = batch(dtype=torch.float32)
    loss = DiceCELoss(weight=[1.0, 2.0, 3.0, 4.0])
    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(eager, labels).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled, labels).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize(
    ("left_out", "columns"), [({"squares": False}, [3]), ({"entropy": False}, [4, 5]), ({"smoothing": False}, [6])]
)
def test_columns_that_are_left_out_are_zero(left_out: dict[str, bool], columns: list[int]) -> None:
    logits, labels = batch()
    expected = softmax_stats(logits, labels)
    assert (expected[..., columns] != 0).any()
    expected[..., columns] = 0
    torch.testing.assert_close(softmax_stats(logits, labels, **left_out), expected)


def test_weight_moves_and_is_saved_with_the_module() -> None:
    loss = copy.deepcopy(DiceLoss(weight=torch.tensor([1.0, 2.0])))
    assert loss.state_dict()["weight"].tolist() == [1.0, 2.0]


LOGITS, LABELS = torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)


def test_check_labels_accepts_ignored_labels_and_nothing_else() -> None:
    check_labels(torch.tensor([0, 2, 255], dtype=torch.uint8), 3, ignore_index=255)
    check_labels(torch.tensor([], dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="got 156"):  # −100 in 8 bits
        check_labels(torch.tensor([0, 156], dtype=torch.uint8), 3)


KINDS = [DiceLoss, DiceCELoss, CrossEntropyLoss, TverskyLoss, GeneralizedDiceLoss]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_not_looked_at_while_somebody_traces(kind: type[torch.nn.Module]) -> None:
    loss = kind(backend="torch")
    expected = loss(LOGITS, LABELS)
    with FakeTensorMode() as mode:
        fake = loss(mode.from_tensor(LOGITS), mode.from_tensor(LABELS))
        assert fake.shape == expected.shape
    for options in ({}, {"tracing_mode": "fake"}, {"pre_dispatch": True}):
        graph = make_fx(lambda x, y: loss(x, y), **options)(LOGITS, LABELS)
        torch.testing.assert_close(graph(LOGITS, LABELS), expected)
    with torch.no_grad():
        each = torch.vmap(lambda x, y: loss(x, y))(LOGITS.unsqueeze(1), LABELS.unsqueeze(1))
    torch.testing.assert_close(each[0], loss(LOGITS[:1], LABELS[:1]))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_losses_refuse_labels_out_of_range(kind: type[torch.nn.Module]) -> None:
    loss = kind(backend="torch", ignore_index=255)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    labels = LABELS.to(torch.uint8)
    labels[0, 0, 0] = 255
    torch.testing.assert_close(compiled(LOGITS, labels), loss(LOGITS, labels))
    wrong = torch.full_like(labels, 10)
    with pytest.raises(ValueError, match="expected labels from 0 to 2 or ignore_index=255, got 10"):
        loss(LOGITS, wrong)
    with pytest.raises(RuntimeError, match="expected labels from 0 to 2 or ignore_index=255, got others"):
        compiled(LOGITS, wrong)


def test_options_are_told() -> None:
    assert repr(DiceLoss(weight=[1.0, 3.0], ignore_index=255, jaccard=True)) == (
        "DiceLoss(sigmoid=False, reduction='mean', ignore_index=255, backend='auto', include_background=True, "
        "smooth_nr=1e-05, smooth_dr=1e-05, batch=True, micro=False, ignore_absent=False, squared_pred=False, "
        "jaccard=True, log=False, weight=[1.0, 3.0])"
    )
    for kind, option in (
        (CrossEntropyLoss, "label_smoothing=0.5"), (DiceCELoss, "lambda_ce=0.5"), (TverskyLoss, "beta=0.5"),
    ):  # fmt: skip
        name, _, value = option.partition("=")
        assert option in repr(kind(**{name: float(value)}))
    assert "w_type='simple'" in repr(GeneralizedDiceLoss(w_type="simple"))


def test_integers_of_numpy_are_an_ignore_index() -> None:
    loss = DiceLoss(ignore_index=np.int64(1))
    torch.testing.assert_close(loss(LOGITS, LABELS), DiceLoss(ignore_index=1)(LOGITS, LABELS))
    assert type(loss.ignore_index) is int


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels_are_checked(dtype: torch.dtype) -> None:
    check_labels(torch.tensor([0, 2]).to(dtype), 3)
    with pytest.raises(ValueError, match="got 7;"):
        check_labels(torch.tensor([0, 7]).to(dtype), 3)
    if dtype == torch.uint64:
        with pytest.raises(ValueError, match=f"got {2**64 - 100};"):
            check_labels(torch.tensor([-100]).to(dtype), 3, ignore_index=255)
