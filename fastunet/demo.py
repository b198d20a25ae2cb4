"""``fastunet demo``: train a small U-Net, score it on pictures it never saw, draw one of them."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import fastunet
from fastunet import pictures
from fastunet.backend import interpreting, resolve_backend
from fastunet.data import IGNORE_INDEX, MAX_CROP, MIN_CROP, Pictures, generated, open_dataset, random_crops, unseen
from fastunet.errors import UserError
from fastunet.losses import DiceCELoss
from fastunet.metrics import ConfusionMatrix
from fastunet.models import UNet
from fastunet.options import MAX_CHANNELS, at_least, chosen_device, enough_memory, share
from fastunet.training import Batch, History, evaluate, fit, predict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    data = parser.add_argument_group("pictures", "without --images and --masks, a generated set of cells")
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of pictures to learn from")
    data.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="folder of their masks: same name, or with _mask, _GT or _segmentation after it",
    )
    data.add_argument(
        "--holdout", type=share, default=0.2, metavar="SHARE", help="share of the pictures to score on (%(default)s)"
    )
    data.add_argument(
        "--output", type=Path, default=Path("fastunet_demo.png"), metavar="FILE", help="picture to write (%(default)s)"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=at_least(1), default=200, metavar="N", help="optimiser steps (%(default)s)")
    training.add_argument(
        "--batch-size", type=at_least(1), default=4, metavar="N", help="crops in a step (%(default)s)"
    )
    training.add_argument(
        "--crop",
        type=at_least(MIN_CROP, MAX_CROP),
        default=128,
        metavar="N",
        help="side of a crop in pixels (%(default)s)",
    )
    training.add_argument(
        "--lr", type=share, default=2e-3, metavar="RATE", help="peak learning rate of Adam (%(default)s)"
    )
    training.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of weights, split and crops (%(default)s)"
    )
    training.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 …; auto, the default, is cuda if there is one"
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--base-c",
        type=at_least(1, MAX_CHANNELS),
        default=16,
        metavar="N",
        help="channels of the first level (%(default)s)",
    )
    network.add_argument("--bilinear", action="store_true", help="upsample bilinearly, not by transposed convolutions")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train, score, draw; everything the user can get wrong is checked before the first step."""
    if (args.images is None) != (args.masks is None):
        raise UserError("--images and --masks belong together: give both, or neither for the generated set")
    given = [folder for folder in (args.images, args.masks) if folder is not None]
    pictures.check_writable(args.output, given if all(map(Path.is_dir, given)) else [])
    device = chosen_device(args.device)
    if args.images is None:
        data, found = generated(), None
    else:
        opened = open_dataset(args.images, args.masks, options=("--images", "--masks"))
        data, found = opened.standardised(), opened.report()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    train, held_out = data.split(args.holdout, rng)
    advice = "lower --batch-size, --crop or --base-c"
    with enough_memory(str(device), advice):
        model = UNet(data.channels, len(data.classes), args.bilinear, args.base_c).to(device)
    if not args.json:
        _introduce(args, device, train, held_out, sum(p.numel() for p in model.parameters()), found)

    start = time.perf_counter()
    with enough_memory(str(device), advice):
        history = _train(args, model, random_crops(train, args.crop, args.batch_size, rng))
        matrix = evaluate(model, tqdm(held_out, desc="scoring", unit="picture"), len(data.classes))
        shown = held_out[0]
        prediction = predict(model, shown.image)
    seconds = time.perf_counter() - start

    scores = _scores(data, matrix, history)
    sheet = pictures.figure(
        shown.image,
        shown.labels,
        prediction,
        data.classes,
        title=f"{shown.name}, held out from training",
        subtitle=f"{_count(len(held_out), 'picture')} held out: mean IoU {scores['miou']:.3f}, "
        f"mean Dice {scores['dice']:.3f} · {_count(args.steps, 'step')} of "
        f"{1e3 * history.seconds_per_step:.0f} ms on {device.type}",
        legend=[f"{c['name']}: {'IoU ' * (c['iou'] is not None)}{_score(c['iou'])}" for c in scores["classes"]],
    )
    pictures.save(sheet, args.output)
    if args.json:
        print(json.dumps({**scores, "seconds": seconds, "held_out": held_out.names, "output": str(args.output)}))
    else:
        _conclude(args, scores, seconds)
    return 0


def _train(args: argparse.Namespace, model: UNet, batches: Iterable[Batch]) -> History:
    """Adam with a rising and then falling learning rate, over the first ``args.steps`` batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    warm_up = max(args.steps // 10, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / args.steps, 1.0))),
    )
    with tqdm(itertools.islice(batches, args.steps), total=args.steps, desc="training", unit="step") as bar:
        return fit(
            model,
            bar,
            DiceCELoss(ignore_index=IGNORE_INDEX),
            optimizer,
            scheduler=scheduler,
            report=lambda _, loss: bar.set_postfix(loss=f"{loss:.3f}"),
        )


def _scores(data: Pictures, matrix: ConfusionMatrix, history: History) -> dict[str, Any]:
    """The scores as plain data; None for a class that is neither in the truth nor in the prediction."""
    iou, dice = matrix.iou.tolist(), matrix.dice.tolist()
    return {
        "classes": [
            {"name": f"{index} ({label.name})", "iou": _known(iou[index]), "dice": _known(dice[index])}
            for index, label in enumerate(data.classes)
        ],
        "miou": _mean(iou),
        "dice": _mean(dice),
        "seconds_per_step": history.seconds_per_step,
        "loss": history.losses[-1],
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: list[float]) -> float:
    return float(np.nanmean(values))


def _score(value: float | None) -> str:
    return "absent" if value is None else f"{value:.3f}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _introduce(
    args: argparse.Namespace,
    device: torch.device,
    train: Pictures,
    held_out: Pictures,
    parameters: int,
    found: str | None,
) -> None:
    """Say what was found and what will be done."""
    backend = resolve_backend("auto", device, torch.float32)
    where = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    kind = {1: "grey", 3: "colour"}.get(train.channels, f"{train.channels} channels")
    source = "generated cells" if args.images is None else f"{args.images}"
    classes = ", ".join(f"{index} ({label.name})" for index, label in enumerate(train.classes))
    up = "bilinear" if args.bilinear else "transposed"
    print(f"fastunet {fastunet.__version__}, torch {torch.__version__}, {where}, {backend} backend")
    if interpreting() and backend == "triton":
        print("TRITON_INTERPRET is set: the kernels run in Triton's interpreter, thousands of times slower")
    print(f"pictures   {source}, {kind}: {len(train)} to learn from, {len(held_out)} held out")
    if train.names == held_out.names:
        print("           one picture only: learnt from one part, scored on the rest")
    print(f"classes    {classes}")
    for name in unseen(train, held_out):
        print(f"           {name} occurs only in what is held out: it cannot be learnt")
    print(f"network    UNet, {args.base_c} channels, {up}, {parameters:,} parameters; DiceCELoss, Adam")
    if found is not None:
        print(f"\n{found}\n")
    print(f"training   {args.steps} steps of {args.batch_size} crops {args.crop}×{args.crop}", flush=True)


def _conclude(args: argparse.Namespace, scores: dict[str, Any], seconds: float) -> None:
    """Print the table of scores."""
    rows = [(c["name"], c["iou"], c["dice"]) for c in scores["classes"]]
    rows.append(("mean", scores["miou"], scores["dice"]))
    width = max(len(name) for name, _, _ in rows)
    print(f"\n{'class':{width}}     IoU    Dice")
    for name, iou, dice in rows:
        print(f"{name:{width}}  {_score(iou):>6}  {_score(dice):>6}")
    print(f"\n{1e3 * scores['seconds_per_step']:.1f} ms per step (median), {seconds:.1f} s in all")
    print(f"wrote {args.output}: image | truth | prediction | error")
