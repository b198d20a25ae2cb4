"""The loop trains, the evaluation counts, both leave the model as they should."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet.data import Pair
from fastunet.losses import DiceCELoss
from fastunet.models import UNet
from fastunet.training import History, TrainingError, evaluate, fit, predict


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Classes that are the sign of the pixel: learnt by a 1×1 convolution."""
    images = torch.randn(count, 2, 1, 16, 16)
    return [(image, (image[:, 0] > 0).long()) for image in images]


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.0))


def test_fit_learns_and_records_every_step() -> None:
    model = _model()
    reports: list[tuple[int, float]] = []
    history = fit(
        model,
        _batches(25),
        nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters(), 0.1),
        report=lambda done, loss: reports.append((done, loss)),
    )
    assert len(history.losses) == len(history.seconds) == 25
    assert history.losses[-1] < history.losses[0] / 2
    assert reports == [(done, history.losses[done - 1]) for done in (10, 20, 25)]
    assert all(seconds > 0 for seconds in history.seconds)


def test_fit_steps_the_scheduler_once_per_batch() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fit(model, _batches(3), nn.CrossEntropyLoss(), optimizer, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_fit_stops_at_a_loss_that_is_not_finite() -> None:
    model = _model()
    endless = itertools.repeat((torch.full((1, 1, 16, 16), torch.nan), torch.zeros(1, 16, 16, dtype=torch.long)))
    with pytest.raises(TrainingError, match="the loss became nan by step 10: lower the learning rate"):
        fit(model, endless, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))


def test_fit_needs_a_batch() -> None:
    model = _model()
    with pytest.raises(TrainingError, match="no batch"):
        fit(model, [], nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize(
    ("seconds", "median"), [((5.0,), 5.0), ((9.0, 1.0), 1.0), ((50.0, 40.0, *[2.0] * 9, *[3.0] * 9), 2.5)]
)
def test_time_per_step_leaves_the_warm_up_out(seconds: tuple[float, ...], median: float) -> None:
    assert History((0.0,) * len(seconds), seconds).seconds_per_step == median


class _Operators(TorchDispatchMode):
    """Names of fastunet's operators as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastunet":
            self.names.add(func.name().removeprefix("fastunet::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hooked", [False, True])
def test_fit_stores_no_logits_unless_somebody_looks(hooked: bool) -> None:
    model = UNet(1, 2, base_c=2, backend="torch")
    seen = []
    if hooked:
        model.register_forward_hook(lambda _m, _args, out: seen.append(out))
    twin, batches = copy.deepcopy(model), _batches(3)
    loss = DiceCELoss(backend="torch")
    with _Operators() as called:
        history = fit(model, batches, loss, torch.optim.SGD(model.parameters(), 0.1))
    assert ({"head_stats", "head_stats_backward"} <= called.names) == (not hooked)
    assert ("softmax_stats" in called.names) == hooked == bool(seen)
    expected = fit(nn.Sequential(twin), batches, loss, torch.optim.SGD(twin.parameters(), 0.1))
    # Three steps of float32, in another order of sums.
    torch.testing.assert_close(torch.tensor(history.losses), torch.tensor(expected.losses), rtol=1e-4, atol=0)


class _Threshold(nn.Module):
    """Predicts class 1 where the first channel is positive, in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([-x[:, 0], x[:, 0]], 1) + self.zero
        return -logits if self.training else logits


@pytest.mark.parametrize("training", [True, False])
def test_predict_works_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    model = _Threshold().train(training)
    image = torch.randn(1, 7, 5)
    assert torch.equal(predict(model, image), (image[0] > 0).long())
    assert model.training is training


def test_evaluate_counts_over_pictures_of_any_size() -> None:
    pairs = []
    for shape in ((7, 5), (16, 20)):
        image, labels = torch.randn(1, *shape), torch.randint(2, shape, dtype=torch.uint8)
        pairs.append(Pair("picture", image, labels))
    matrix = evaluate(_Threshold(), pairs, 2)
    predicted = torch.cat([(pair.image[0] > 0).flatten() for pair in pairs])
    truth = torch.cat([pair.labels.flatten() == 1 for pair in pairs])
    iou = [float((p & t).sum()) / float((p | t).sum()) for p, t in ((~predicted, ~truth), (predicted, truth))]
    # counts are exact; at most one float32 rounding of the quotient
    torch.testing.assert_close(torch.as_tensor(matrix.iou).double(), torch.tensor(iou).double(), atol=1e-6, rtol=0)
