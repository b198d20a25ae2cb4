"""The training loop and the evaluation, for any module that maps images (N, C, H, W) to logits (N, K, H, W)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastunet.blocks import untouched
from fastunet.checks import check_criterion, check_integer
from fastunet.data import IGNORE_INDEX, Pair
from fastunet.errors import UserError
from fastunet.metrics import ConfusionMatrix
from fastunet.models import PlainUNet, UNet

Batch = tuple[Tensor, Tensor]


class TrainingError(UserError):
    """Training cannot go on; the message is one sentence."""


@dataclass(frozen=True)
class History:
    """Loss and duration of every step; a step is forward, loss, backward and update, without making the batch."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def seconds_per_step(self) -> float:
        """Median duration of a step, without the warm-up: the first tenth, at least one, of several steps."""
        return statistics.median(self.seconds[math.ceil(len(self.seconds) / 10) :] or self.seconds)


class _Clock:
    """Durations of steps on ``device``: by CUDA events there, which cost no synchronisation, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def tick(self) -> None:
        """Mark the start or the end of a step, in turn."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """The duration of each step so far."""
        if self._cuda:
            torch.cuda.synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            return tuple(start.elapsed_time(end) / 1e3 for start, end in pairs)
        return tuple(end - start for start, end in zip(self._times[::2], self._times[1::2], strict=True))


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    report: Callable[[int, float], None] | None = None,
    report_every: int = 10,
) -> History:
    """Train ``model`` by one step per batch of (images, labels); batches move to the model's device.

    The loss is ``loss(model(images), labels)``; of a :class:`UNet` or :class:`PlainUNet` by its ``loss`` method, which
    stores no logits for a loss of :mod:`fastunet.losses`.
    ``report(steps, loss)`` is called every ``report_every`` steps and after the last one.

    Raises:
        TrainingError: the loss is NaN or infinite at a report, or there was no batch.
    """
    check_criterion(loss)
    check_integer("report_every", report_every)
    model.train()
    device = _device(model)
    clock = _Clock(device)
    losses: list[Tensor] = []
    reported = 0
    # A subclass, a hook or a compiled call may make something else of the logits.
    without_logits = type(model) in (UNet, PlainUNet) and untouched(model, type(model))

    def check() -> None:
        nonlocal reported
        reported, value = len(losses), float(losses[-1])
        if not math.isfinite(value):
            raise TrainingError(f"the loss became {value} by step {reported}: lower the learning rate")
        if report is not None:
            report(reported, value)

    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        clock.tick()
        optimizer.zero_grad(set_to_none=True)
        value = model.loss(images, labels, loss) if without_logits else loss(model(images), labels)  # type: ignore[operator]
        value.backward()
        optimizer.step()
        clock.tick()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.detach())
        if len(losses) % report_every == 0:
            check()
    if not losses:
        raise TrainingError("there is no batch to train on: give at least one")
    if reported < len(losses):
        check()
    return History(tuple(torch.stack(losses).tolist()), clock.seconds())


@torch.no_grad()
def predict(model: nn.Module, image: Tensor) -> Tensor:
    """The class of each pixel of one image (C, H, W), as (H, W) int64 on the CPU, in eval mode.

    The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(image[None].to(_device(model)))
        return logits.argmax(1)[0].cpu()
    finally:
        model.train(training)


def evaluate(model: nn.Module, pairs: Iterable[Pair], num_classes: int) -> ConfusionMatrix:
    """Count true against predicted classes over whole pictures, one at a time; pixels of label 255 do not count."""
    matrix = ConfusionMatrix(num_classes, ignore_index=IGNORE_INDEX)
    for pair in pairs:
        matrix.update(predict(model, pair.image)[None], pair.labels[None].long())
    return matrix


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
