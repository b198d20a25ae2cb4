"""The training loops and the evaluation, for any module that maps images (N, C, H, W) to logits (N, K, H, W).

:func:`fit` is the shortest: one step per batch. :func:`train` goes through epochs, validates, and can be stopped after
any step and resumed to the same bits: all that changes is in a :class:`Run`, and the batches of an epoch are a function
of its number.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastunet import distributed
from fastunet.blocks import untouched
from fastunet.checks import check_criterion, check_integer
from fastunet.data import IGNORE_INDEX, Pair
from fastunet.errors import UserError
from fastunet.graphs import CapturedStep, key_of
from fastunet.metrics import ConfusionMatrix
from fastunet.models import PlainUNet, UNet

Batch = tuple[Tensor, Tensor]
Weighted = tuple[Tensor, ...]  # a batch, and perhaps the weights of its pixels (N, H, W)
AUTOCAST = {"fp64": None, "fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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


# ---- epochs, validation and resuming -----------------------------------------------------------------------------


class Objective(nn.Module):
    """The loss of a network as a module of its own, so that one wrapper (DDP) sees forward and loss."""

    def __init__(self, model: nn.Module, criterion: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, images: Tensor, labels: Tensor, *weight: Tensor) -> Tensor:
        if isinstance(self.model, (UNet, PlainUNet)):
            return self.model.loss(images, labels, self.criterion, *weight)  # stores no logits
        return self.criterion(self.model(images), labels, *weight)


class Run:
    """Everything that changes while a network is trained: what has to be saved to go on with the same bits.

    Args:
        objective: an :class:`Objective`, DDP around one, or one that FSDP2 shards.
        optimizer: of the network's parameters.
        scheduler: stepped at the end of each epoch; a ReduceLROnPlateau at each validation instead.
        precision: "fp64", "fp32", "tf32", "bf16" or "fp16", a key of :data:`AUTOCAST`.
        clip: largest norm of the gradient, or None.
        ema: decay of a running average of the weights, which is then what is validated; None for none.
        graph: compute the gradients in a CUDA graph, captured for batches like the first; others run without it, and
            so do those of a step that accumulates. What a loss or a network decides in Python, it decides once.

    Raises:
        ValueError: a graph is asked for on a CPU, around DDP or in one of several processes.
        GraphError: by :meth:`update`, if the step cannot be captured.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        precision: str = "fp32",
        clip: float | None = None,
        ema: float | None = None,
        graph: bool = False,
    ) -> None:
        self.objective = objective
        inner = objective.module if isinstance(objective, DistributedDataParallel) else objective
        assert isinstance(inner, Objective)
        self.model = inner.model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.autocast = AUTOCAST[precision]
        self.device = _device(self.model)
        several = inner is not objective or distributed.processes() > 1
        if graph and (self.device.type != "cuda" or several):
            where = "several devices" if several else self.device
            raise ValueError(f"expected a network on one CUDA GPU for graph=True, got one on {where}; leave it out")
        self.dtype = next(self.model.parameters()).dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.clip = clip
        self.ema = ema
        self.graph = graph
        self._captured: CapturedStep | None = None
        self.average = None if ema is None else copy.deepcopy(self.model)
        self.epoch = 0  # epochs that are done
        self.step = 0  # steps done of the next one
        self.steps = 0  # steps done in all
        self.best = -math.inf  # the best score so far
        self.stale = 0  # epochs since then

    @property
    def evaluated(self) -> nn.Module:
        """The network to validate and to keep: the average, if there is one; whole, for which each process asks."""
        return distributed.whole_module(self.model if self.average is None else self.average)

    def update(self, batches: Sequence[Weighted]) -> Tensor:
        """One step of the optimiser by the mean loss of ``batches``, which is returned; they move to the device."""
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            images, *others = (self._moved(x) for x in batch)
            given = (images.contiguous(memory_format=torch.channels_last), *others)
            # Gradients of several processes are averaged once, with the last batch.
            waits = number < len(batches) and isinstance(self.objective, DistributedDataParallel)
            with self.objective.no_sync() if waits else nullcontext():  # type: ignore[operator]
                total = total + self._gradients(given, len(batches))
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            _average(self.average, self.model, self.ema or 0.0)
        self.step += 1
        self.steps += 1
        return total

    def _gradients(self, batch: Weighted, of: int) -> Tensor:
        """The loss of ``batch``, one ``of`` several of the step, whose gradients are added to the parameters'."""

        def backward(images: Tensor, labels: Tensor, *weight: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss: Tensor = self.objective(images, labels, *weight) / of
            self.scaler.scale(loss).backward()
            return loss.detach()

        if not self.graph or of > 1:  # a replay writes gradients, and adds none
            return backward(*batch)
        key = key_of(batch)
        if self._captured is None or (self._captured.key == key and not self._captured.holds):
            self._captured = None  # whose memory the next one can have
            self._captured = CapturedStep(backward, self.objective, batch)
        return self._captured(*batch) if self._captured.key == key else backward(*batch)

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype if x.is_floating_point() else None, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """All of it but the model's weights, to be saved with them; each process has to ask, if they are in shards."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }
        whole: dict[str, Any] = distributed.whole(state)
        return whole

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = {i: distributed.shared_out(of, parameters[i]) for i, of in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict({**state["optimizer"], "state": kept})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            own = self.average.state_dict()
            self.average.load_state_dict({k: distributed.shared_out(v, own[k]) for k, v in state["average"].items()})
        for name in _COUNTERS:
            setattr(self, name, state[name])


_COUNTERS = ("epoch", "step", "steps", "best", "stale")


def train(
    run: Run,
    epochs: int,
    batches: Callable[[int, int], Iterable[Sequence[Weighted]]],
    validate: Callable[[nn.Module], float],
    *,
    validate_every: int | None = None,
    after_step: Callable[[Tensor], None] = lambda loss: None,
    after_epoch: Callable[[float], None] = lambda score: None,
) -> None:
    """Train until ``epochs`` are done, from wherever ``run`` is.

    Args:
        batches: ``batches(epoch, step)`` are those of the epoch's steps from ``step`` on, several of them for a step
            that accumulates gradients; the same ones whenever it is asked.
        validate: gives the score of a network, the larger the better.
        validate_every: steps between the validations that a ReduceLROnPlateau sees; None: each epoch; 0: none.
        after_step, after_epoch: called with the step's loss and with the epoch's score; whatever they raise ends the
            training, and ``run`` is in order then.
    """
    plateau = run.scheduler if isinstance(run.scheduler, ReduceLROnPlateau) else None
    while run.epoch < epochs:
        for several in batches(run.epoch, run.step):
            loss = run.update(several)
            if plateau is not None and validate_every and run.steps % validate_every == 0:
                plateau.step(validate(run.evaluated))
            after_step(loss)
        score = validate(run.evaluated)
        if plateau is None and run.scheduler is not None:
            run.scheduler.step()
        elif plateau is not None and validate_every is None:
            plateau.step(score)
        run.epoch, run.step = run.epoch + 1, 0
        run.stale = 0 if score > run.best else run.stale + 1
        run.best = max(score, run.best)
        after_epoch(score)


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move weights and statistics of ``average`` towards the model's by 1 − decay."""
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


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
