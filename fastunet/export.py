"""``fastunet export``: a checkpoint as a program, of torch.export or ONNX, with batch and size left open."""

from __future__ import annotations

import argparse
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError as UnspecializedSize

from fastunet import trained
from fastunet.errors import UserError
from fastunet.files import written_whole

SUFFIXES = (".onnx", ".pt2")
SHAPES = ((2, 48, 80), (1, 67, 131), (3, 32, 32))  # batch, height, width: the first is exported, all are checked
TOLERANCE = 1e-4  # of the largest output: both compute in float32, in another order of sums


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("-m", "--model", type=Path, default=Path("checkpoints/best.pth"), metavar="FILE",
                        help="checkpoint (%(default)s)")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, default=Path("model.onnx"), metavar="FILE",
                        help="file to write, .onnx or .pt2 for torch.export (%(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Export, compare with the network, write."""
    if args.output.suffix not in SUFFIXES:
        raise UserError(f"--output {args.output} is no kind of program: let it end in .onnx or .pt2")
    if not args.output.parent.is_dir():
        raise UserError(
            f"--output {args.output} cannot be written: {args.output.parent} is not a folder, create it first"
        )
    network = trained.load(args.model)
    network.model.float()  # whatever it was trained in
    content, call = exported(network.model, network.channels, args.output.suffix)
    worst = _error(network.model, call, network.channels)
    if worst > TOLERANCE:
        raise UserError(f"{args.model} as {args.output.suffix} differs from the network by {worst:.1e}: report it")
    try:
        with written_whole(args.output) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{args.output} cannot be written ({error.strerror or error}): choose another name") from error
    print(f"wrote {args.output}: images (N, {network.channels}, H, W) of any N, and H and W from 32, float32")
    print(f"prepared   {network.preparation}")
    print(f"classes    {', '.join(f'{i} ({c.name})' for i, c in enumerate(network.classes))}")
    print(f"checked    {len(SHAPES)} shapes, largest difference {worst:.1e} of the largest output")
    return 0


def exported(model: nn.Module, channels: int, suffix: str) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """(the file's content, the program to call) of ``model`` in eval mode."""
    batch, height, width = SHAPES[0]
    example = torch.zeros(batch, channels, height, width)
    names = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=32), 3: torch.export.Dim("width", min=32)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model.eval(), (example,), dynamic_shapes=(names,))
        except UnspecializedSize as error:  # of odd heights and widths older versions make a case of its own
            raise UserError(
                f"PyTorch {torch.__version__} cannot export a network for any height and width: take 2.13 or newer"
            ) from error
        if suffix == ".pt2":
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            return buffer.getvalue(), program.module()
        return _onnx(program, example)


def _onnx(program: Any, example: Tensor) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - PyTorch's exporter needs it
    except ImportError as error:
        raise UserError("ONNX needs onnxscript and onnxruntime: pip install 'fastunet[onnx]', or take .pt2") from error
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        converted = torch.onnx.export(
            program, (example,), dynamo=True, verbose=False, input_names=["images"], output_names=["outputs"]
        )
    finally:
        logger.setLevel(level)
    assert converted is not None
    content: bytes = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Tensor:
        (outputs,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(outputs)

    return content, call


@torch.no_grad()
def _error(model: nn.Module, call: Callable[[Tensor], Tensor], channels: int) -> float:
    """The largest difference between the network and its program, over the largest output."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, height, width in SHAPES:
        images = torch.randn(batch, channels, height, width, generator=generator)
        truth = model(images)
        worst = max(worst, float((call(images) - truth).abs().max() / truth.abs().max().clamp_min(1e-30)))
    return worst
