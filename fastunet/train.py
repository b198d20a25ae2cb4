"""``fastunet train``: from two folders, of pictures and of their masks, to a trained network.

What is learnt, and how, is a :class:`fastunet.recipes.Recipe` with what the command line changes in it; the loop is
:func:`fastunet.training.train`. A run leaves in its folder ``last.pth``, from which it can be resumed, ``best.pth``,
``epochs.csv``, ``steps.csv`` and a picture of each epoch. Under torchrun it is one of several processes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import fastunet
from fastunet import distributed, pictures
from fastunet.checkpoint import read_checkpoint, save_checkpoint
from fastunet.data import Pictures
from fastunet.demo import MIN_CROP
from fastunet.errors import UserError
from fastunet.files import written_whole
from fastunet.losses import GlobalLoss, StatsLoss, unet_weight_map
from fastunet.metrics import ConfusionMatrix
from fastunet.options import at_least, chosen_device, factor, percent, positive, share
from fastunet.recipes import LOSSES, RECIPES, Recipe
from fastunet.trained import ENTRY, Trained
from fastunet.training import AUTOCAST, Objective, Run, TrainingError, Weighted, train

LAST, BEST = "last.pth", "best.pth"
AUGMENTS = ("none", "symmetries", "elastic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command; None is the recipe's own."""
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of pictures")
    parser.add_argument("masks", type=Path, metavar="MASKS", help="folder of their masks: the same names, or with _mask")
    parser.add_argument("--recipe", choices=RECIPES, help="what to learn and how (milesial)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("checkpoints"), metavar="DIR", help="folder to write (%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help=f"go on with the run in the output folder, from its {LAST}")
    usual = parser.add_argument_group("as in Pytorch-UNet", "defaults are the recipe's")
    usual.add_argument("-e", "--epochs", type=at_least(1), metavar="N", help="passes over the pictures")
    usual.add_argument("-b", "--batch-size", type=at_least(1), metavar="N", help="pictures in a batch, of one process")
    usual.add_argument("-l", "--learning-rate", "--lr", type=positive, metavar="RATE", help="of the optimiser")
    usual.add_argument("-f", "--load", type=Path, metavar="FILE", help="checkpoint to begin with")
    usual.add_argument("-s", "--scale", type=factor, metavar="FACTOR", help="of the pictures' sides")
    usual.add_argument("-v", "--validation", type=percent, metavar="PERCENT", help="of the pictures, held out (10)")
    usual.add_argument("--amp", action="store_true", help="--precision fp16, and bf16 on a CPU")
    usual.add_argument("--bilinear", action="store_true", default=None, help="upsample bilinearly")
    usual.add_argument("-c", "--classes", type=at_least(1), metavar="N", help="of the masks; 1 for a sigmoid")
    more = parser.add_argument_group("training")
    more.add_argument("--loss", choices=[name for name in LOSSES if name != "bce"], help="in place of the recipe's")
    more.add_argument("--crop", type=at_least(MIN_CROP), metavar="N", help="train on random squares of this side")
    more.add_argument("--augment", choices=AUGMENTS, help="symmetries of the square, or the paper's, by kornia")
    more.add_argument("--base-c", type=at_least(1), metavar="N", help="channels of the first level (64)")
    more.add_argument("--accumulate", type=at_least(1), metavar="N", help="batches in a step of the optimiser (1)")
    more.add_argument("--clip", type=positive, metavar="NORM", help="largest norm of the gradient")
    more.add_argument("--ema", type=share, metavar="DECAY", help="validate and keep a running average of the weights")
    more.add_argument("--patience", type=at_least(1), metavar="N", help="stop after so many epochs without a better score")
    more.add_argument("--precision", choices=AUTOCAST, help="of the arithmetic (tf32, PyTorch's default)")
    more.add_argument("--checkpointing", action="store_true", default=None, help="less memory for more time")
    more.add_argument("--seed", type=at_least(0), metavar="N", help="of weights, split, order and crops (0)")
    where = parser.add_argument_group("where and how")
    where.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto, the default, is cuda if there is one")
    where.add_argument("--workers", type=at_least(0), default=0, metavar="N", help="processes that read pictures (0)")
    where.add_argument(
        "--save-every", type=positive, default=10.0, metavar="MINUTES", help=f"between two {LAST} (%(default)g)"
    )
    where.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard too")


# ---- what is asked for -------------------------------------------------------------------------------------------

SETTINGS = (
    "recipe", "epochs", "batch_size", "learning_rate", "scale", "validation", "bilinear", "classes", "loss", "crop",
    "augment", "base_c", "accumulate", "clip", "ema", "patience", "precision", "checkpointing", "seed",
)  # fmt: skip
CHANGEABLE = ("epochs", "patience")  # when a run is resumed


def run(args: argparse.Namespace) -> int:
    """Train; everything the user can get wrong is checked before the first step."""
    with distributed.joined():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    device = _device(args.device)
    saved = _saved(args)
    settings = _settings(args, saved, device)
    recipe = _recipe(settings)
    data = open_folders(args.images, args.masks)
    learnt, held_out = data.split(settings["validation"] / 100, np.random.default_rng(settings["seed"]))
    samples = Samples(learnt, recipe, settings["seed"], data.classes)
    samples.check(settings["batch_size"])
    torch.manual_seed(settings["seed"])
    trained = _network(args, data, recipe, settings, device)
    run = _training(trained.model, recipe, settings, None)
    session = Session(args, settings, recipe, trained, run, samples, held_out)
    if saved is not None:
        session.resume(saved)
    return session.train()


def _device(name: str) -> torch.device:
    if name == "auto" and distributed.processes() > 1 and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return chosen_device(name)


def _saved(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the run to be resumed left; None for a new run."""
    last = args.output / LAST
    if args.resume:
        if not last.is_file():
            raise UserError(f"--resume found no {last}: give the --output of the run to go on with")
        rest = read_checkpoint(last).rest
        if "run" not in rest or "settings" not in rest:
            raise UserError(f"{last} holds no run that can be resumed: begin one from its weights with --load {last}")
        return rest
    if last.exists():
        raise UserError(f"{last} is there already: go on with --resume, or give another --output")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output} cannot be made: {args.output.parent} is not a folder, create it first")
    return None


def _settings(args: argparse.Namespace, saved: dict[str, Any] | None, device: torch.device) -> dict[str, Any]:
    """The value of each setting: given, or that of the run that is resumed, or the recipe's."""
    if args.amp and args.precision is None:
        args.precision = "bf16" if device.type == "cpu" else "fp16"
    given = {name: getattr(args, name) for name in SETTINGS}
    if saved is not None:
        before: dict[str, Any] = saved["settings"]
        for name, value in given.items():
            if value is not None and value != before[name] and name not in CHANGEABLE:
                raise UserError(
                    f"--{name.replace('_', '-')} was {before[name]} when the run began and cannot become {value}: leave "
                    "it out, or begin another run"
                )
        return {name: before[name] if value is None else value for name, value in given.items()}
    recipe = RECIPES[given["recipe"] or "milesial"]
    usual = {
        "recipe": "milesial", "scale": recipe.preparation.scale, "validation": 10.0, "bilinear": False, "base_c": 64,
        "accumulate": 1, "precision": "tf32", "checkpointing": False, "seed": 0,
        **{name: getattr(recipe, name) for name in ("epochs", "batch_size", "learning_rate", "loss", "crop", "clip")},
        "augment": recipe.augment,
    }  # fmt: skip
    return {name: usual.get(name) if value is None else value for name, value in given.items()}


def _recipe(settings: dict[str, Any]) -> Recipe:
    """The recipe, with what the settings change in it."""
    recipe = RECIPES[settings["recipe"]]
    for name in ("scale", "loss", "crop", "bilinear"):
        if recipe.colours and settings[name] not in (None, False, getattr(recipe, name, None), recipe.preparation.scale):
            raise UserError(
                f"--{name} does not go with --recipe {settings['recipe']}, which learns colours of whole pictures: leave "
                "it out"
            )
    changed = {name: settings[name] for name in ("loss", "crop", "clip", "augment")}
    preparation = dataclasses.replace(recipe.preparation, scale=settings["scale"])
    return dataclasses.replace(recipe, preparation=preparation, **changed)


def _network(
    args: argparse.Namespace, data: Pictures, recipe: Recipe, settings: dict[str, Any], device: torch.device
) -> Trained:
    """The network, with the weights of --load, on ``device``."""
    found, asked = len(data.classes), settings["classes"]
    if recipe.colours:
        asked = 3
    elif asked is None:
        asked = found
    elif asked < found and not (asked == 1 and found == 2):
        raise UserError(f"--classes {asked} is too few: the masks hold {found}; leave it out")
    model = recipe.network(data.channels, asked, settings["bilinear"], settings["base_c"])
    if args.load is not None:
        try:
            model.load_state_dict(read_checkpoint(args.load).state)
        except RuntimeError as error:
            raise UserError(f"--load {args.load} does not fit: {error}") from error
    if settings["checkpointing"]:
        model.use_checkpointing()  # type: ignore[operator]
    if distributed.processes() > 1:
        distributed.synchronise(model)
    dtype = torch.float64 if settings["precision"] == "fp64" else torch.float32
    model.to(device, dtype)
    return Trained(model, recipe.preparation, data.classes, recipe.colours)


def _training(model: nn.Module, recipe: Recipe, settings: dict[str, Any], ignored: int | None) -> Run:
    """Loss, optimiser and schedule around the network."""
    exact = "tf32" if settings["precision"] in ("tf32", "bf16", "fp16") else "ieee"
    torch.backends.cuda.matmul.fp32_precision = exact  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = exact  # type: ignore[attr-defined]
    criterion = LOSSES[recipe.loss](ignored)
    device = next(model.parameters()).device
    objective: nn.Module = Objective(model, criterion)
    if distributed.processes() > 1:
        if isinstance(criterion, StatsLoss):
            objective = Objective(model, GlobalLoss(criterion))
        objective = DistributedDataParallel(objective.to(device), [device] if device.type == "cuda" else None)
    optimizer = recipe.optimizer(model.parameters(), settings["learning_rate"])
    scheduler = None if recipe.schedule is None else recipe.schedule(optimizer)
    return Run(
        objective, optimizer, scheduler, precision=settings["precision"], clip=settings["clip"], ema=settings["ema"]
    )


# ---- batches -----------------------------------------------------------------------------------------------------


class Samples(Dataset[Weighted]):
    """What training sees of each picture in each epoch, whatever process loads it, and in whatever order.

    An item ``(epoch, index)`` is (image (C, h, w), labels (h, w) or colours (3, h, w), perhaps weights (h, w)).
    """

    def __init__(self, learnt: Pictures, recipe: Recipe, seed: int, classes: Sequence[ClassName]) -> None:
        self.pictures = learnt
        self.recipe = recipe
        self.seed = seed
        self._augment = _elastic() if recipe.augment == "elastic" else None

    def __len__(self) -> int:
        return len(self.pictures)

    def order(self, epoch: int) -> list[int]:
        """The pictures of an epoch, in another order in each."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()

    def __getitem__(self, key: tuple[int, int]) -> Weighted:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        pixels, labels = raw(self.pictures, index)
        ...
