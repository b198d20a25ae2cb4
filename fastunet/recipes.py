"""Recipes of training: network, preparation of pictures, loss, optimiser and schedule, as their sources have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from fastunet.losses import CrossEntropyLoss, DiceCELoss, DiceLoss
from fastunet.models import StridedUNet, UNet
from fastunet.preparation import Preparation

Parameters = Iterable[Tensor]


def _unet(channels: int, outputs: int, bilinear: bool, base_c: int) -> nn.Module:
    return UNet(channels, outputs, bilinear, base_c)


def _strided(channels: int, outputs: int, _: bool, base_c: int) -> nn.Module:
    return StridedUNet(channels, outputs, base_c)


@dataclass(frozen=True)
class Recipe:
    """What a command line leaves open. Losses take the label that does not count, or None."""

    epochs: int
    batch_size: int
    learning_rate: float
    preparation: Preparation
    loss: str  # a key of LOSSES
    optimizer: Callable[[Parameters, float], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    network: Callable[[int, int, bool, int], nn.Module] = _unet
    colours: bool = False  # learns the masks' colours, three probabilities, and not classes
    crop: int | None = None  # side of the squares that training sees; None: whole pictures
    drop_small: bool = False  # leave out pictures that are smaller than a crop, instead of mirroring them
    augment: str = "none"  # "symmetries" of the square, or "elastic": the paper's
    border_weights: bool = False  # the paper's weights of pixels
    clip: float | None = None
    drop_last: bool = False  # leave an epoch's last batch out if it is not full
    score: str = "miou"  # what the best network and the schedule go by; "dice" is Pytorch-UNet's
    validations: int | None = None  # in an epoch, for the schedule
    source: str = field(default="", compare=False)


class ColourLoss(nn.BCELoss):
    """Binary cross-entropy of colours from 0 to 1, also under autocast, in float32 then."""

    def forward(self, colours: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(colours.device.type, enabled=False):
            return super().forward(colours.to(targets.dtype), targets)


LOSSES: dict[str, Callable[[int | None], Any]] = {
    "ce": lambda ignored: CrossEntropyLoss(ignore_index=ignored, sigmoid=None),
    "dice": lambda ignored: DiceLoss(ignore_index=ignored, sigmoid=None),
    "dice+ce": lambda ignored: DiceCELoss(ignore_index=ignored, sigmoid=None),
    "milesial": lambda ignored: DiceCELoss.preset("milesial", ignore_index=ignored),
    "bce": lambda _: ColourLoss(),
}

RECIPES = {
    "milesial": Recipe(
        epochs=5,
        batch_size=1,
        learning_rate=1e-5,
        preparation=Preparation("unit", scale=0.5),
        loss="milesial",
        optimizer=partial(RMSprop, weight_decay=1e-8, momentum=0.999, foreach=True),
        schedule=partial(ReduceLROnPlateau, mode="max", patience=5),
        clip=1.0,
        score="dice",
        validations=5,
        source="Pytorch-UNet 4, train.py",
    ),
    "seed000": Recipe(
        epochs=1000,
        batch_size=4,
        learning_rate=1e-3,
        preparation=Preparation("unit", square=256),
        loss="bce",
        optimizer=Adam,
        network=_strided,
        colours=True,
        drop_last=True,
        source="seed 000",
    ),
    "seed002": Recipe(
        epochs=50,
        batch_size=8,
        learning_rate=1e-2,
        preparation=Preparation("unit"),
        loss="dice",
        optimizer=Adam,
        schedule=partial(StepLR, step_size=10, gamma=0.1),
        crop=192,
        drop_small=True,
        source="seed 002",
    ),
    "paper": Recipe(
        epochs=100,
        batch_size=1,
        learning_rate=1e-2,
        preparation=Preparation("standard"),
        loss="ce",
        optimizer=partial(SGD, momentum=0.99),
        crop=512,
        augment="elastic",
        border_weights=True,
        source="Ronneberger, Fischer, Brox 2015, section 3",
    ),
}
