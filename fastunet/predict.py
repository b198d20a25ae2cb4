"""``fastunet predict``: masks of pictures, of any size, by a checkpoint."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastunet import pictures, tiling, trained
from fastunet.data import SUFFIXES
from fastunet.errors import UserError
from fastunet.files import written_whole
from fastunet.layouts import files_of, originals
from fastunet.options import at_least, chosen_device, enough_memory, factor, share
from fastunet.png import PngWriter
from fastunet.preparation import Array, Pixels, Preparation
from fastunet.trained import Trained

KINDS = ("index", "colour", "probability")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which network predicts, and how."""
    parser.add_argument("-m", "--model", type=Path, default=Path("checkpoints/best.pth"), metavar="FILE",
                        help="checkpoint (%(default)s)")  # fmt: skip
    parser.add_argument("-s", "--scale", type=factor, metavar="FACTOR", help="of the pictures' sides (as trained)")
    parser.add_argument("-t", "--mask-threshold", type=share, default=0.5, metavar="P",
                        help="probability above which a single channel is class 1 (%(default)s)")  # fmt: skip
    parser.add_argument("--bilinear", action="store_true", help="expect a bilinear network")
    parser.add_argument("-c", "--classes", type=at_least(1), metavar="N", help="expect this number of outputs")
    parser.add_argument("--tta", action="store_true", help="average over the eight symmetries of the square")
    parser.add_argument("--tile", type=at_least(64), default=tiling.TILE, metavar="N",
                        help="side of the tiles of larger pictures (%(default)s)")  # fmt: skip
    parser.add_argument("--overlap", type=at_least(32), default=tiling.OVERLAP, metavar="N",
                        help="pixels that tiles share (%(default)s)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto, the default: cuda if there")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add_model_arguments(parser)
    parser.add_argument("-i", "--input", nargs="+", required=True, metavar="PATH",
                        help="pictures, folders of them, patterns ('scans/*.tif'), .npy arrays (C, H, W)")  # fmt: skip
    parser.add_argument("-o", "--output", nargs="+", type=Path, metavar="PATH",
                        help="a folder, or a file for each picture; default: NAME_OUT.png beside it")  # fmt: skip
    parser.add_argument("--kind", choices=KINDS, default="index",
                        help="index: class numbers, shown in colours; probability: .npy (%(default)s)")  # fmt: skip
    parser.add_argument("-v", "--viz", "--overlay", action="store_true", help="write NAME_OVERLAY.png too")
    parser.add_argument("-n", "--no-save", action="store_true", help="write no masks")


def run(args: argparse.Namespace) -> int:
    """Predict every input; what is wrong with the names is said before the first."""
    network = opened(args)
    inputs = _inputs(args.input)
    outputs = _outputs(args, inputs)
    device = next(network.model.parameters()).device
    for path, output in tqdm(list(zip(inputs, outputs, strict=True)), desc="predicting", unit="picture", delay=2.0):
        with enough_memory(f"{device}, at {path},", "lower --tile or --scale"):
            predict(network, path, output, args)
        if not args.no_save:
            print(f"{path} → {output}")
    return 0


def opened(args: argparse.Namespace) -> Trained:
    """The network of ``args.model``, on the device, prepared as the other options say."""
    try:
        tiling.check_tiles(args.tile, args.overlap)
    except ValueError as error:
        raise UserError(
            f"a tile of {args.tile} pixels with an overlap of {args.overlap} cannot be laid: give a --tile that is a "
            f"multiple of {tiling.ALIGNMENT}, and an --overlap that is one of {2 * tiling.ALIGNMENT} and at most half "
            "a tile"
        ) from error
    device = chosen_device(args.device)
    network = trained.load(args.model)
    outputs = int(network.model.n_classes)  # type: ignore[arg-type]
    if args.classes is not None and args.classes != outputs:
        raise UserError(f"--classes {args.classes} is not what {args.model} has, {outputs}: leave it out")
    if args.bilinear and not getattr(network.model, "bilinear", False):
        raise UserError(f"--bilinear is not what {args.model} is, whose upsampling is learnt: leave it out")
    network.model.to(device)
    return network if args.scale is None else network.scaled(args.scale)


def predict(network: Trained, path: Path, output: Path, args: argparse.Namespace) -> None:
    """Write what ``args`` ask for of the picture at ``path``."""
    pixels = trained.read(path, network.channels)
    _, height, width = pixels.shape
    if network.preparation.square and not isinstance(pixels, np.ndarray):
        raise UserError(f"{path} has {width}×{height} pixels, too many for a square of one picture: cut it")
    if odd := network.odd(pixels):
        print(f"odd      {path}: {odd}", file=sys.stderr)
    colours = pictures.class_colours(network.classes)
    table = np.array(colours, np.uint8)
    row = 0
    try:
        with ExitStack() as stack:
            mask = overlay = probabilities = None
            if not args.no_save:
                file = stack.enter_context(written_whole(output))
                if args.kind == "probability":
                    probabilities = file
                else:
                    mask = PngWriter(file, width, height, colours if args.kind == "index" else None)
            if args.viz:
                overlay = PngWriter(stack.enter_context(written_whole(_overlay(output))), width, height)
                levels = _contrast(pixels)
            for band in network.bands(pixels, tile=args.tile, overlap=args.overlap, symmetries=args.tta):
                labels = network.labels(band, args.mask_threshold).numpy()
                if mask is not None:
                    mask.write(labels if args.kind == "index" else table[labels])
                if overlay is not None:
                    overlay.write(_overlaid(pixels[:, row : row + len(labels)], table[labels], *levels))
                if probabilities is not None:
                    if row == 0:
                        shape = {"descr": "<f4", "fortran_order": False, "shape": (len(band), height, width)}
                        np.lib.format.write_array_header_1_0(probabilities, shape)
                        begin = probabilities.tell()
                    for number, plane in enumerate(band.numpy().astype("<f4")):
                        probabilities.seek(begin + 4 * width * (number * height + row))
                        probabilities.write(plane.tobytes())
                row += len(labels)
            for writer in (mask, overlay):
                if writer is not None:
                    writer.close()
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): choose another --output") from error


def _overlay(output: Path) -> Path:
    """Where the overlay of a picture lies whose mask is ``output``."""
    return output.with_name(f"{output.stem.removesuffix('_OUT')}_OVERLAY.png")


def _contrast(pixels: Pixels) -> tuple[float, float]:
    """What is drawn black, and the span up to white: of 8-bit pixels all, else two deviations around the mean."""
    if pixels.dtype == np.uint8:
        return 0.0, 255.0
    mean, deviation = Preparation("standard").levels(pixels)
    return mean - 2 * deviation, 4 * deviation


def _overlaid(pixels: Array, colours: Array, black: float, span: float) -> Array:
    """(n, W, 3): the picture with half of the classes' colours over it."""
    grey = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    shown = np.clip((grey.astype(np.float32) - black) * (255 / span), 0, 255).transpose(1, 2, 0)
    overlaid: Array = ((shown + colours) / 2).astype(np.uint8)
    return overlaid


def _inputs(given: Sequence[str]) -> list[Path]:
    """The files that are meant; a folder's without what this command wrote there."""
    suffixes = (*SUFFIXES, ".npy")
    files: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            try:
                found = originals(files_of(path, suffixes))
            except OSError as error:
                raise UserError(f"--input {name} cannot be listed ({error.strerror}): check its permissions") from error
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            raise UserError(f"--input {name} is no picture and holds none: give files, folders or patterns")
        files += [p for p in found if p not in files]
    return files


def _outputs(args: argparse.Namespace, inputs: Sequence[Path]) -> list[Path]:
    """A name for each input's result."""
    suffix = ".npy" if args.kind == "probability" else ".png"
    given: list[Path] | None = args.output
    if given is None:
        outputs = [path.with_name(f"{path.stem}_OUT{suffix}") for path in inputs]
    elif len(given) == 1 and (given[0].is_dir() or given[0].suffix.lower() not in (*SUFFIXES, ".npy")):
        if not given[0].is_dir():
            if not given[0].parent.is_dir():
                raise UserError(
                    f"--output {given[0]} cannot be made: {given[0].parent} is not a folder, create it first"
                )
            try:
                given[0].mkdir()
            except OSError as error:
                raise UserError(
                    f"--output {given[0]} cannot be made ({error.strerror}): name another folder"
                ) from error
        outputs = [given[0] / f"{path.stem}_OUT{suffix}" for path in inputs]
    else:
        outputs = given
        if len(outputs) != len(inputs):
            raise UserError(
                f"--output names {len(outputs)} files for {len(inputs)} pictures: name as many, or a folder"
            )
        wrong = next((path for path in outputs if path.suffix.lower() != suffix), None)
        if wrong is not None:
            raise UserError(f"--output {wrong} is not the name of a file of --kind {args.kind}: let it end in {suffix}")
    given_ones = {path.resolve() for path in inputs}
    written = [*outputs, *map(_overlay, outputs)] if args.viz else outputs
    for output in written:
        if not output.parent.is_dir():
            raise UserError(f"--output {output} cannot be written: {output.parent} is not a folder, create it first")
        if written.count(output) > 1:
            raise UserError(f"two pictures would be written to {output}: give --output a name for each")
        if output.resolve() in given_ones:
            raise UserError(f"--output {output} is one of the pictures: give another name")
    return outputs
