"""``fastunet evaluate``: the scores of a checkpoint on pictures whose masks are known."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastunet import pictures
from fastunet.data import Dataset
from fastunet.errors import UserError
from fastunet.metrics import ConfusionMatrix
from fastunet.options import add_data_arguments, enough_memory, opened_data
from fastunet.predict import add_model_arguments, opened
from fastunet.trained import Trained

SCORES = ("iou", "dice", "precision", "recall")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add_data_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="draw the confusion matrix here")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Count, print the table, draw the matrix."""
    if args.output is not None:
        pictures.check_writable(args.output, [f for f in (args.images, args.masks) if f is not None])
    network = opened(args)
    data = opened_data(args)
    with enough_memory(str(next(network.model.parameters()).device), "lower --tile or --scale"):
        matrix = counted(network, data, args)
    names = [f"{index} ({label.name})" for index, label in enumerate(network.classes)]
    if args.output is not None:
        title = f"{args.model}: {len(data)} pictures, mean IoU {float(matrix.miou):.3f}"
        pictures.save(pictures.confusion(matrix.matrix, names, title), args.output)
    if args.json:
        print(json.dumps(_plain(matrix, names)))
        return 0
    width = max(map(len, [*names, "mean"]))
    print(f"{'class':{width}}     IoU    Dice  precision  recall       pixels")
    rows = [getattr(matrix, score).tolist() for score in SCORES]
    for name, *scores, pixels in zip(names, *rows, matrix.matrix.sum(1).tolist(), strict=True):
        print(f"{name:{width}}  {_row(scores)}  {pixels:11,}")
    print(f"{'mean':{width}}  {_row([float(torch.tensor(row).nanmean()) for row in rows])}")
    print(f"\naccuracy {float(matrix.accuracy):.4f} over {len(data)} pictures")
    if args.output is not None:
        print(f"wrote {args.output}")
    return 0


def counted(network: Trained, data: Dataset, args: argparse.Namespace) -> ConfusionMatrix:
    """True against predicted classes over ``data``, at the pictures' own size."""
    table = network.labels_of(data.mask_values, data.ignore_index)
    if data.channels not in (1, network.channels):
        raise UserError(
            f"the pictures have {data.channels} channels and {args.model} takes {network.channels}: convert them"
        )
    matrix = ConfusionMatrix(len(network.classes), data.ignore_index)
    for sample in tqdm(data, desc="scoring", unit="picture", delay=2.0):
        pixels = np.broadcast_to(sample.image.numpy(), (network.channels, *sample.labels.shape))
        if odd := network.odd(pixels):
            print(f"odd      {sample.name}: {odd}", file=sys.stderr)
        truth, row = torch.from_numpy(table[sample.labels.numpy()]), 0
        for band in network.bands(pixels, tile=args.tile, overlap=args.overlap, symmetries=args.tta):
            labels = network.labels(band, args.mask_threshold)
            matrix.update(labels[None], truth[None, row : row + len(labels)])
            row += len(labels)
    return matrix


def _row(scores: list[float]) -> str:
    return "  ".join(
        f"{'absent' if math.isnan(x) else f'{x:.4f}':>{w}}" for x, w in zip(scores, (6, 6, 9, 6), strict=True)
    )


def _plain(matrix: ConfusionMatrix, names: list[str]) -> dict[str, Any]:
    rows = {score: [None if math.isnan(x) else x for x in getattr(matrix, score).tolist()] for score in SCORES}
    classes = [{"name": name, **{score: rows[score][index] for score in SCORES}} for index, name in enumerate(names)]
    return {
        "classes": classes,
        "miou": float(matrix.miou),
        "accuracy": float(matrix.accuracy),
        "matrix": matrix.matrix.tolist(),
    }
