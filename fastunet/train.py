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
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import data as loading
from tqdm import tqdm

import fastunet
from fastunet import distributed, pictures, tiling
from fastunet.augment import Augmentation
from fastunet.checkpoint import read_checkpoint, save_checkpoint
from fastunet.data import IGNORE_INDEX, MAX_CROP, MIN_CROP, ClassName, Dataset, Sample, unseen
from fastunet.errors import UserError
from fastunet.files import alone_in, written_whole
from fastunet.layouts import voc_colour
from fastunet.losses import GlobalLoss, StatsLoss, unet_weight_map
from fastunet.metrics import ConfusionMatrix
from fastunet.options import (
    MAX_CHANNELS,
    add_data_arguments,
    at_least,
    chosen_device,
    enough_memory,
    factor,
    opened_data,
    percent,
    positive,
    share,
)
from fastunet.preparation import Array, white
from fastunet.recipes import LOSSES, RECIPES, Recipe
from fastunet.trained import ENTRY, Trained
from fastunet.training import AUTOCAST, Objective, Run, TrainingError, Weighted, train

LAST, BEST = "last.pth", "best.pth"
AUGMENTS = ("none", "symmetries", "elastic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command; None is the recipe's own."""
    add_data_arguments(parser)
    parser.add_argument("--recipe", choices=RECIPES, help="what to learn and how (milesial)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("checkpoints"), metavar="DIR", help="folder to write (%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
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
    more.add_argument(
        "--crop", type=at_least(MIN_CROP, MAX_CROP), metavar="N", help="train on random squares of this side"
    )
    more.add_argument("--augment", choices=AUGMENTS, help="symmetries of the square, or the paper's, by kornia")
    more.add_argument("--base-c", type=at_least(1, MAX_CHANNELS), metavar="N", help="channels of the first level (64)")
    more.add_argument("--accumulate", type=at_least(1), metavar="N", help="batches in a step of the optimiser (1)")
    more.add_argument("--clip", type=positive, metavar="NORM", help="largest norm of the gradient")
    more.add_argument("--ema", type=share, metavar="DECAY", help="validate and keep a running average of the weights")
    more.add_argument("--patience", type=at_least(1), metavar="N", help="stop after so many epochs that are no better")
    more.add_argument("--precision", choices=AUTOCAST, help="of the arithmetic (tf32, PyTorch's default)")
    more.add_argument("--checkpointing", action="store_true", default=None, help="less memory for more time")
    more.add_argument("--graph", action="store_true", default=None, help="the step in a CUDA graph: one launch")
    more.add_argument("--seed", type=at_least(0), metavar="N", help="of weights, split, order and crops (0)")
    where = parser.add_argument_group("where and how")
    where.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto, the default: cuda if there")
    where.add_argument("--fsdp", action="store_true", help="each process keeps its share of the weights")
    where.add_argument("--workers", type=at_least(0), default=0, metavar="N", help="processes that read pictures (0)")
    where.add_argument(
        "--save-every", type=positive, default=10.0, metavar="MINUTES", help=f"between two {LAST} (%(default)g)"
    )
    where.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard too")


# ---- what is asked for -------------------------------------------------------------------------------------------

SETTINGS = (
    "recipe", "epochs", "batch_size", "learning_rate", "scale", "validation", "bilinear", "classes", "loss", "crop",
    "augment", "base_c", "accumulate", "clip", "ema", "patience", "precision", "checkpointing", "graph",
    "seed",
)  # fmt: skip
CHANGEABLE = ("epochs", "patience")  # when a run is resumed


def run(args: argparse.Namespace) -> int:
    """Train; everything the user can get wrong is checked before the first step."""
    with distributed.joined(), enough_memory("the device", "lower --batch-size, --crop, --base-c or --scale"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    device = _device(args.device)
    saved = _saved(args)
    settings = _settings(args, saved, device)
    if args.fsdp and settings["precision"] == "fp16":
        raise UserError("--fsdp does not go with --precision fp16, whose scale is of all gradients: take bf16")
    if args.fsdp and distributed.processes() == 1:
        raise UserError("--fsdp shares the weights among processes, and there is one: start several by torchrun")
    recipe = _recipe(settings)
    _check_graph(settings, device)
    data = opened_data(args)
    learnt, held_out = data.split(settings["validation"] / 100, np.random.default_rng(settings["seed"]))
    full = white(data.value_range[1])
    recipe = dataclasses.replace(recipe, preparation=dataclasses.replace(recipe.preparation, full=full))
    _check_scored(held_out)
    samples = Samples(learnt, recipe, settings["seed"])
    samples.check(settings["batch_size"])
    torch.manual_seed(settings["seed"])
    trained = _network(args, data, recipe, settings, device)
    if saved is not None:
        _check_same(saved, learnt, held_out, trained)
        trained.model.load_state_dict(read_checkpoint(args.output / LAST).state)
    run = _training(trained.model, recipe, settings, data.ignore_index, args.fsdp)
    if distributed.rank() == 0:
        print(data.report())
        absent = unseen(learnt, held_out)
        if absent:
            print(f"odd      held out only, so never learnt: {', '.join(absent)}")
    session = Session(args, settings, recipe, trained, run, samples, held_out)
    if saved is not None:
        session.resume(saved)
    return session.train()


def _device(name: str) -> torch.device:
    if name == "auto" and distributed.processes() > 1 and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = chosen_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL looks
    return device


def _saved(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the run to be resumed left; None for a new run."""
    last = args.output / LAST
    if args.output.resolve() in [folder.resolve() for folder in (args.images, args.masks) if folder is not None]:
        raise UserError(f"--output {args.output} would lie among the pictures that are read: name another folder")
    if args.resume:
        if not last.is_file():
            raise UserError(f"--resume found no {last}: give the --output of the run to go on with")
        rest = read_checkpoint(last).rest
        if any(not isinstance(rest.get(name), kind) for name, kind in _SAVED.items()):
            raise _no_run(last)
        if rest["settings"].get("recipe") not in RECIPES:
            raise _no_run(last)
        return rest
    if last.exists():
        raise UserError(f"{last} is there already: go on with --resume, or give another --output")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output} cannot be made: {args.output.parent} is not a folder, create it first")
    return None


_SAVED = {"run": dict, "settings": dict, "rows": list, "loss": float, "pictures": list, ENTRY: dict}


def _no_run(last: Path) -> UserError:
    return UserError(f"{last} holds no run that can be resumed: begin one from its weights with --load {last}")


def _check_same(saved: dict[str, Any], learnt: Dataset, held_out: Dataset, trained: Trained) -> None:
    """Refuse to go on with other pictures, or with masks that are read otherwise, than the run began with."""
    if saved["pictures"] != _contents(learnt, held_out) or saved[ENTRY].get("classes") != trained.facts()["classes"]:
        raise UserError(
            "--resume found other pictures or classes than the run began with: give the same folders, --layout, "
            "--table, --split and --ignore"
        )


def _check_scored(held_out: Dataset) -> None:
    """Refuse pictures to be held out by which nothing can be scored."""
    if not held_out.counts.any():
        several = f"the masks of {len(held_out)} pictures" if len(held_out) > 1 else f"the mask of {held_out.names[0]},"
        raise UserError(f"no pixel counts in {several} held out: hold out more by --validation, or others by --seed")


def _contents(*data: Dataset) -> list[list[Any]]:
    """Name and pixels of each class, of every picture."""
    return [
        [name, *each.counts, each.uncounted] for part in data for name, each in zip(part.names, part.facts, strict=True)
    ]


def _settings(args: argparse.Namespace, saved: dict[str, Any] | None, device: torch.device) -> dict[str, Any]:
    """The value of each setting: given, or that of the run that is resumed, or the recipe's."""
    if args.amp and args.precision is None:
        args.precision = "bf16" if device.type == "cpu" else "fp16"
    given = {name: getattr(args, name) for name in SETTINGS}
    if saved is not None:
        before: dict[str, Any] = dict.fromkeys(SETTINGS) | saved["settings"]  # which an older fastunet may not have had
        began, started = before.get("processes", 1), distributed.processes()
        if began != started:
            raise UserError(
                f"--resume found the batches of {began} processes, and {started} were started: start {began}"
            )
        for name, value in given.items():
            if value is not None and value != before[name] and name not in CHANGEABLE:
                raise UserError(
                    f"--{name.replace('_', '-')} was {before[name]} when the run began and cannot become {value}: "
                    "leave it out, or begin another run"
                )
        return {**before, **{name: value for name, value in given.items() if value is not None}}
    recipe = RECIPES[given["recipe"] or "milesial"]
    usual = {
        "recipe": "milesial", "scale": recipe.preparation.scale, "validation": 10.0, "bilinear": False, "base_c": 64,
        "accumulate": 1, "precision": "tf32", "checkpointing": False, "graph": False, "seed": 0,
        **{name: getattr(recipe, name) for name in ("epochs", "batch_size", "learning_rate", "loss", "crop", "clip")},
        "augment": recipe.augment,
    }  # fmt: skip
    settings = {name: usual.get(name) if value is None else value for name, value in given.items()}
    return {**settings, "processes": distributed.processes()}


def _check_graph(settings: dict[str, Any], device: torch.device) -> None:
    """Refuse --graph where there is none to be had."""
    if not settings["graph"]:
        return
    hindered = {
        f"device {device}, and CUDA graphs need a GPU": device.type != "cuda",
        f"--accumulate {settings['accumulate']}, whose gradients a graph does not add up": settings["accumulate"] > 1,
        "several processes, whose gradients no graph exchanges": distributed.processes() > 1,
    }
    for what, there in hindered.items():
        if there:
            raise UserError(f"--graph does not go with {what}: leave it out")


def _recipe(settings: dict[str, Any]) -> Recipe:
    """The recipe, with what the settings change in it."""
    recipe = RECIPES[settings["recipe"]]
    usual = {"scale": 1.0, "loss": recipe.loss, "crop": None, "augment": "none", "bilinear": False, "classes": None}
    for name, value in usual.items():
        if recipe.colours and settings[name] != value:
            raise UserError(
                f"--{name} does not go with --recipe {settings['recipe']}, which learns the colours of whole pictures: "
                "leave it out"
            )
    changed = {name: settings[name] for name in ("loss", "crop", "clip", "augment")}
    preparation = dataclasses.replace(recipe.preparation, scale=settings["scale"])
    return dataclasses.replace(recipe, preparation=preparation, **changed)


def _network(
    args: argparse.Namespace, data: Dataset, recipe: Recipe, settings: dict[str, Any], device: torch.device
) -> Trained:
    """The network, with the weights of --load, on ``device``."""
    found, asked = len(data.classes), settings["classes"]
    if recipe.colours:
        asked = 3
    elif asked is None:
        asked = found
    elif asked != found and not (asked == 1 and found == 2):
        raise UserError(
            f"--classes {asked} is not what the masks hold, {found}: leave it out, or name classes by --table"
        )
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
    return Trained(model, recipe.preparation, data.classes, tuple(data.mask_values), recipe.colours)


def _training(model: nn.Module, recipe: Recipe, settings: dict[str, Any], ignored: int | None, fsdp: bool) -> Run:
    """Loss, optimiser and schedule around the network."""
    exact = "tf32" if settings["precision"] in ("tf32", "bf16", "fp16") else "ieee"
    torch.backends.cuda.matmul.fp32_precision = exact
    torch.backends.cudnn.conv.fp32_precision = exact  # type: ignore[attr-defined]
    criterion = LOSSES[recipe.loss](ignored)
    device = next(model.parameters()).device
    objective: nn.Module = Objective(model, criterion)
    if distributed.processes() > 1:
        if isinstance(criterion, StatsLoss):
            objective = Objective(model, GlobalLoss(criterion))
        objective.to(device)
        if fsdp:
            distributed.shard(objective, device)
        else:
            objective = DistributedDataParallel(objective, [device] if device.type == "cuda" else None)
    optimizer = recipe.optimizer(model.parameters(), settings["learning_rate"])
    scheduler = None if recipe.schedule is None else recipe.schedule(optimizer)
    chosen = {name: settings[name] for name in ("precision", "clip", "ema", "graph")}
    return Run(objective, optimizer, scheduler, **chosen)


class Stopped(Exception):
    """Training ends here, in good order."""


# ---- batches -----------------------------------------------------------------------------------------------------


class Samples(loading.Dataset[Weighted]):
    """What training sees of each picture in each epoch, whichever process loads it, and in whatever order.

    An item ``(epoch, index)`` is (image (C, h, w), labels (h, w) or colours (3, h, w), perhaps weights (h, w)).
    """

    def __init__(self, learnt: Dataset, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.learnt = learnt
        self.seed = seed
        self.pictures = self._useful(learnt)
        self._augment = Augmentation() if recipe.augment == "elastic" else None
        self._colours = _colours(learnt.classes) if recipe.colours else None
        self._balance = self._class_weights() if recipe.border_weights else None
        self._weights: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def order(self, epoch: int) -> list[int]:
        """The pictures of an epoch, in another order in each."""
        order: list[int] = np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()
        return order

    def __getitem__(self, key: tuple[int, int]) -> Weighted:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        sample = self.pictures[index]
        pixels, labels = sample.image.numpy(), sample.labels.numpy()
        prepare, crop = self.recipe.preparation, self.recipe.crop
        image = prepare.image(pixels)
        if self._colours is not None:
            return image, prepare.colours(labels, self._colours)
        planes = [image, torch.from_numpy(np.ascontiguousarray(prepare.labels(labels)))]
        if self._balance is not None:
            if index not in self._weights:
                self._weights[index] = self._border_weights(sample, self._balance)
            planes.append(self._weights[index])
        if crop is not None:
            rows, columns = _square(planes[1], crop, rng)
            planes = [x[..., rows[:, None], columns] for x in planes]
        if self.recipe.augment == "symmetries":
            turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
            planes = [x.rot90(turns, (-2, -1)) for x in planes]
            planes = [x.flip(-1) if mirror else x for x in planes]
        if self._augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(1 << 62)))
                planes = [x[0] for x in self._augment(*(x[None] for x in planes))]
        return tuple(planes)

    def check(self, batch_size: int) -> None:
        """Refuse pictures that are too small for the network, and those of several sizes that have to make a batch."""
        if self.recipe.crop is not None:
            return
        sizes = self._sizes(self.pictures)
        for name, size in zip(self.pictures.names, sizes, strict=True):
            if min(size) < MIN_CROP:
                raise UserError(
                    f"{name} is {size[1]}×{size[0]} for the network, smaller than {MIN_CROP}×{MIN_CROP}: give a larger "
                    "--scale, or --crop, which mirrors"
                )
            if size != sizes[0] and batch_size > 1:
                raise UserError(
                    f"{self.pictures.names[0]} is {sizes[0][1]}×{sizes[0][0]} and {name} is {size[1]}×{size[0]}, which "
                    "make no batch: give --batch-size 1, or --crop"
                )

    def _sizes(self, learnt: Dataset) -> list[tuple[int, int]]:
        """(h, w) that the network would see of each."""
        return [self.recipe.preparation.size(height, width) for width, height in (each.size for each in learnt.facts)]

    def _useful(self, learnt: Dataset) -> Dataset:
        """Those in which something counts, or the mean over nothing would be no number, and that are large enough."""
        counted = [index for index, row in enumerate(learnt.counts) if row.any() or self.recipe.colours]
        if not counted:
            raise UserError("no pixel counts in the masks that would be learnt: hold out less, or others by --seed")
        crop = self.recipe.crop if self.recipe.drop_small else None
        sizes = self._sizes(learnt)
        fitting = [index for index in counted if crop is None or min(sizes[index]) >= crop]
        if not fitting:
            raise UserError(f"no picture is as large as a crop of {crop}×{crop}: give a smaller --crop")
        return learnt.select(fitting)

    def _class_weights(self) -> Tensor:
        """(256,) of each label, as the paper balances them: one over the class's share; their mean over pixels is 1."""
        pixels = torch.as_tensor(self.pictures.counts).sum(0).double()
        there = pixels > 0
        weights = torch.zeros(256)
        weights[: len(pixels)] = torch.where(there, pixels.sum() / pixels.clamp_min(1) / there.sum(), 0.0).float()
        return weights

    def _border_weights(self, sample: Sample, balance: Tensor) -> Tensor:
        """The paper's weights of pixels: those of their classes, and more where two cells nearly touch."""
        labels = torch.from_numpy(np.ascontiguousarray(self.recipe.preparation.labels(sample.labels.numpy())))
        base = balance[labels.long()]
        cells = (labels > 0) & (base > 0)
        if sample.cells is not None:
            cells = torch.from_numpy(np.ascontiguousarray(self.recipe.preparation.labels(sample.cells.numpy())))
        return unet_weight_map(cells, class_weight=(0, 0)) + base


def _square(labels: Tensor, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(rows, columns) of a random square in which something counts, where there is anything."""
    rows, columns = (_window(length, size, rng) for length in labels.shape)
    if (labels[rows[:, None], columns] == IGNORE_INDEX).all():
        counted = (labels != IGNORE_INDEX).nonzero()
        if len(counted):
            place = counted[int(rng.integers(len(counted)))].tolist()
            rows, columns = (_window(length, size, rng, at) for length, at in zip(labels.shape, place, strict=True))
    return rows, columns


def _window(length: int, size: int, rng: np.random.Generator, at: int | None = None) -> Tensor:
    """``size`` neighbours on an axis, at a random place or around ``at``, reflected where the picture ends."""
    first, last = sorted((0, length - size))
    if at is not None and last > 0:
        first, last = max(at - size + 1, 0), min(at, last)
    start = first + int(rng.integers(last - first + 1))
    return torch.from_numpy(tiling.mirrored(start, start + size, length))


def _colours(classes: Sequence[ClassName]) -> Array:
    """The colour of each label (256, 3); pixels that do not count are learnt too, in VOC's colour of them."""
    table = np.full((256, 3), voc_colour(IGNORE_INDEX), np.uint8)
    table[: len(classes)] = pictures.class_colours(classes)
    return table


class _Told(loading.Dataset[Any]):
    """``samples``, of which what is wrong is an item: of an exception a worker would send its traceback as a text."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, key: tuple[int, int]) -> Weighted | UserError:
        try:
            return self.samples[key]
        except UserError as error:
            return error


def _collated(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, UserError)), None) or loading.default_collate(items)


def _deaf(_: int) -> None:
    """Let a worker go on after Ctrl-C, which reaches all processes: the training ends it after the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Batches:
    """The batches of each step of an epoch that are this process's share, a function of (epoch, first step)."""

    def __init__(self, samples: Samples, batch_size: int, accumulate: int, workers: int) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.workers = workers
        self.steps = len(self._keys(0))
        if self.steps == 0:
            raise UserError(f"{len(samples)} pictures are fewer than processes: start fewer of them")

    def _keys(self, epoch: int) -> list[list[list[tuple[int, int]]]]:
        world, rank = distributed.processes(), distributed.rank()
        order = [(epoch, index) for index in self.samples.order(epoch)]
        together = self.batch_size * world
        batches = [order[i : i + together] for i in range(0, len(order), together)]
        if self.samples.recipe.drop_last and len(batches[-1]) < together and len(batches) > 1:
            batches.pop()
        sizes = [len(batch) // world for batch in batches]  # every process has as many
        shares = [batch[rank * size :][:size] for batch, size in zip(batches, sizes, strict=True) if size]
        return [shares[i : i + self.accumulate] for i in range(0, len(shares), self.accumulate)]

    def __call__(self, epoch: int, step: int) -> Iterator[list[Weighted]]:
        steps = self._keys(epoch)[step:]
        loader = iter(
            loading.DataLoader(
                _Told(self.samples), batch_sampler=[*chain.from_iterable(steps)], num_workers=self.workers,
                collate_fn=_collated, worker_init_fn=_deaf,
            )
        )  # fmt: skip
        for several in steps:
            batches = [next(loader) for _ in several]
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
            yield [tuple(batch) for batch in batches]


# ---- a run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Of the pictures held out."""

    matrix: ConfusionMatrix
    dice: float

    def __getitem__(self, name: str) -> float:
        return self.dice if name == "dice" else float(self.matrix.miou)


def scored(trained: Trained, held_out: Dataset, ignored: int | None = None) -> Scores:
    """Scores at the size that the network sees; pictures are shared among the processes.

    ``dice`` is Pytorch-UNet's: the mean over pictures of the mean over classes but the first, 1 where there is nothing.
    """
    count = len(trained.classes)
    total = torch.zeros(count, count, dtype=torch.int64)
    dice = torch.zeros(2, dtype=torch.float64)
    for index in range(distributed.rank(), len(held_out), distributed.processes()):
        sample = held_out[index]
        pixels, labels = sample.image.numpy(), sample.labels.numpy()
        truth = torch.from_numpy(np.ascontiguousarray(trained.preparation.labels(labels)))
        matrix = ConfusionMatrix(count, ignored)
        matrix.update(trained.labels(trained.seen(pixels))[None], truth[None])
        counts = matrix.matrix
        total += counts
        hits, sizes = counts.diagonal().double(), (counts.sum(0) + counts.sum(1)).double()
        dice += torch.stack([((2 * hits + 1e-6) / (sizes + 1e-6))[1:].mean(), torch.ones(()).double()])
    if distributed.processes() > 1:
        dist.all_reduce(total)
        dist.all_reduce(dice)
    matrix = ConfusionMatrix(count, ignored)
    matrix.matrix = total
    return Scores(matrix, float(dice[0] / dice[1]))


class Session:
    """A run with its folder: what is written, printed and kept while it goes on."""

    def __init__(
        self,
        args: argparse.Namespace,
        settings: dict[str, Any],
        recipe: Recipe,
        trained: Trained,
        run: Run,
        samples: Samples,
        held_out: Dataset,
    ) -> None:
        self.output: Path = args.output
        self.settings, self.recipe, self.trained, self.run = settings, recipe, trained, run
        self.samples, self.held_out = samples, held_out
        self.ignored = held_out.ignore_index
        self.batches = Batches(samples, settings["batch_size"], settings["accumulate"], args.workers)
        self.first = distributed.rank() == 0  # which alone writes and prints
        self.rows: list[dict[str, Any]] = []  # of epochs.csv
        self.losses: list[tuple[int, Tensor]] = []  # of steps that are not in steps.csv yet
        self.loss = 0.0  # sum over the steps of this epoch
        self.signal = 0
        self.save_every = 60 * args.save_every
        self.evaluated = trained  # what the scores are of
        self.scores: Scores | None = None
        self.writer_class = _summary_writer() if args.tensorboard and self.first else None

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on where ``saved`` was written."""
        try:
            self.run.load_state_dict(saved["run"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _no_run(self.output / LAST) from error
        self.rows, self.loss = saved["rows"], saved["loss"]

    def train(self) -> int:
        """Train, and return the exit status."""
        with ExitStack() as stack:
            if self.first:
                self._take(stack)
                self._introduce()
            return self._train()

    def _take(self, stack: ExitStack) -> None:
        """Have the folder for this run alone, as it was when ``self.run`` was saved, until the ``stack`` is unwound."""
        try:
            self.output.mkdir(exist_ok=True)
            if not stack.enter_context(alone_in(self.output)):
                raise UserError(f"another process is training into {self.output}: let it end, or give another --output")
            _cut(self.output / "steps.csv", self.run.steps)
            for name in (LAST, BEST):  # what a killed run was writing
                for unfinished in self.output.glob(f".{Path(name).stem}-*.pth"):
                    unfinished.unlink()
        except OSError as error:
            raise UserError(
                f"--output {self.output} cannot be written ({error.strerror or error}): choose another folder"
            ) from error

    def _train(self) -> int:
        self.writer = None
        if self.writer_class is not None:
            self.writer = self.writer_class(str(self.output / "tensorboard"), purge_step=self.run.steps)
        self.began = self.saved = time.monotonic()
        self.bar = self._new_bar()
        kept = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        every = None
        if self.recipe.validations is not None:
            together = self.settings["batch_size"] * distributed.processes()
            every = len(self.samples) // (self.recipe.validations * together)
        try:
            train(
                self.run, self.settings["epochs"], self.batches, self.validate,
                validate_every=every, after_step=self.after_step, after_epoch=self.after_epoch,
            )  # fmt: skip
        except Stopped:
            self.save()
        except OSError as error:
            raise UserError(
                f"{self.output} cannot be written ({error.strerror or error}): make room, then go on with --resume"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or str(error).startswith("Caught "):  # an exception of its own
                raise
            why = str(error).partition(". ")[0].rstrip(".")
            raise UserError(f"a process that reads pictures ended ({why}): give fewer --workers") from error
        finally:
            self.bar.close()
            for number, handler in kept.items():
                signal.signal(number, handler)
            if self.writer is not None:
                self.writer.close()
        if self.first:
            self._conclude()
        return 128 + self.signal if self.signal else 0

    def validate(self, model: nn.Module) -> float:
        """The score of ``model`` on the pictures that are held out."""
        self.evaluated = dataclasses.replace(self.trained, model=model)
        self.scores = scored(self.evaluated, self.held_out, self.ignored)
        return self.scores[self.recipe.score]

    def after_step(self, loss: Tensor) -> None:
        """Note the loss; save now and then, and where somebody wants the training to end."""
        self.losses.append((self.run.steps, loss))
        if len(self.losses) == 10:
            self._write_losses()
        self.bar.update()
        # All processes do the same: their clocks differ.
        self.signal, due = distributed.largest(self.signal, int(time.monotonic() - self.saved > self.save_every))
        if self.signal:
            raise Stopped
        if due:
            self.save()

    def after_epoch(self, score: float) -> None:
        """Write what the epoch gave."""
        self._write_losses()
        assert self.scores is not None
        self.rows.append(
            {
                "epoch": self.run.epoch,
                "steps": self.run.steps,
                "loss": self.loss / self.batches.steps,
                "dice": self.scores["dice"],
                "miou": self.scores["miou"],
                "learning_rate": self.run.optimizer.param_groups[0]["lr"],
                "seconds": time.monotonic() - self.began,
            }
        )
        self.loss = 0.0
        if self.first:
            _write_rows(self.output / "epochs.csv", self.rows)
            self._draw()
            if self.run.stale == 0:
                self._checkpoint(BEST, self.evaluated.model)
            if self.writer is not None:
                for name in ("loss", "dice", "miou", "learning_rate"):
                    self.writer.add_scalar(f"epoch/{name}", self.rows[-1][name], self.run.epoch)
        self.save()
        self.bar.close()
        if self.run.epoch < self.settings["epochs"]:
            self.bar = self._new_bar()
        patience = self.settings["patience"]
        (self.signal,) = distributed.largest(self.signal)
        if self.signal or (patience is not None and self.run.stale >= patience):
            raise Stopped

    def save(self) -> None:
        """Write the checkpoint from which the run can go on."""
        self._write_losses()
        self.saved = time.monotonic()
        model, state = distributed.whole_module(self.run.model), self.run.state_dict()
        if self.first:
            self._checkpoint(
                LAST, model, run=state, settings=self.settings, rows=self.rows, loss=self.loss,
                pictures=_contents(self.samples.learnt, self.held_out),
            )  # fmt: skip

    def _checkpoint(self, name: str, model: nn.Module, **rest: Any) -> None:
        save_checkpoint(
            self.output / name, model, mask_values=list(self.trained.values), **{ENTRY: self.trained.facts()}, **rest
        )

    def _write_losses(self) -> None:
        """Bring steps.csv up to date with the mean over the processes, and look whether the losses are numbers."""
        steps, losses = [step for step, _ in self.losses], [loss for _, loss in self.losses]
        rows = [*zip(steps, distributed.mean(torch.stack(losses)).tolist(), strict=True)] if losses else []
        self.losses = []
        self.loss += sum(loss for _, loss in rows)
        wrong = next((row for row in rows if not math.isfinite(row[1])), None)
        if wrong is not None:
            raise TrainingError(f"the loss became {wrong[1]} at step {wrong[0]}: lower --learning-rate")
        if not rows:
            return
        if self.first:
            path = self.output / "steps.csv"
            with open(path, "a", newline="") as file:
                csv.writer(file).writerows([("step", "loss"), *rows] if rows[0][0] == 1 else rows)
        if self.writer is not None:
            for step, loss in rows:
                self.writer.add_scalar("step/loss", loss, step)
        said = {"loss": f"{rows[-1][1]:.4f}"}
        if self.rows:
            said["IoU"] = f"{self.rows[-1]['miou']:.3f}"
        about = self.bar.format_dict  # of None, where it is not shown
        done, seconds = (about["n"] or 0) - (about["initial"] or 0), about["elapsed"] or 0.0
        if done and seconds:
            rate = done / seconds
            pictures = self.settings["batch_size"] * self.settings["accumulate"] * distributed.processes()
            said["images/s"] = f"{rate * pictures:.1f}"
        self.bar.set_postfix({**said, "GB": f"{_memory(self.run.device) / 1e9:.1f}"}, refresh=False)

    def _new_bar(self) -> Any:
        return tqdm(
            total=self.batches.steps, initial=self.run.step, unit="step", disable=not self.first,
            desc=f"epoch {self.run.epoch + 1}/{self.settings['epochs']}",
        )  # fmt: skip

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first signal ends the training after the step; a second one at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def _draw(self) -> None:
        """The picture of the epoch: the first that is held out."""
        assert self.scores is not None
        trained = self.evaluated
        sample = self.held_out[0]
        pixels, labels = sample.image.numpy(), sample.labels.numpy()
        prediction = trained.labels(trained.seen(pixels))
        truth = torch.from_numpy(np.ascontiguousarray(trained.preparation.labels(labels)))
        scores = ["absent" if math.isnan(x) else f"IoU {x:.3f}" for x in self.scores.matrix.iou.tolist()]
        sheet = pictures.figure(
            trained.preparation.image(pixels),
            truth,
            prediction,
            trained.classes,
            title=f"{self.held_out.names[0]}, held out from training",
            subtitle=f"epoch {self.run.epoch}: mean IoU {self.scores['miou']:.3f}, Dice {self.scores['dice']:.3f}",
            legend=[f"{c.name}: {score}" for c, score in zip(trained.classes, scores, strict=True)],
        )
        pictures.save(sheet, self.output / f"epoch-{self.run.epoch:04d}.png")

    def _introduce(self) -> None:
        settings = {name: value for name, value in self.settings.items() if value is not None}
        parameters = sum(p.numel() for p in self.run.model.parameters())
        print(f"fastunet {fastunet.__version__}, torch {torch.__version__}, {self.run.device}")
        print(f"pictures   {len(self.samples)} to learn from, {len(self.held_out)} held out")
        print(f"network    {type(self.run.model).__name__}, {parameters:,} parameters")
        print(f"settings   {', '.join(f'{name}={value}' for name, value in settings.items())}")
        if self.run.steps:
            print(f"resumed    after {self.run.epoch} epochs and {self.run.step} steps")
        sys.stdout.flush()

    def _conclude(self) -> None:
        if self.signal:
            print(f"stopped after step {self.run.steps}: --resume goes on", flush=True)
            return
        best = max(self.rows, key=lambda row: float(row[self.recipe.score]))
        print(
            f"best epoch {best['epoch']}: mean IoU {best['miou']:.3f}, Dice {best['dice']:.3f}; wrote "
            f"{self.output / BEST}"
        )


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    with written_whole(path) as file:
        file.write(text.getvalue().encode())


def _cut(path: Path, steps: int) -> None:
    """Leave the first ``steps`` steps in steps.csv: others may have been done since the checkpoint was saved."""
    if path.is_symlink():
        path.unlink()  # nothing is written through it
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[: steps + 1 if steps else 0]
        with written_whole(path) as file:
            file.write("".join(lines).encode())


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs TensorBoard: pip install 'fastunet[tensorboard]'") from error
    return SummaryWriter


def _memory(device: torch.device) -> float:
    """The most bytes that this process has used, of the GPU or else of main memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
