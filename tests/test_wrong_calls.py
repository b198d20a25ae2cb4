"""What is called wrongly, over the whole public surface: each call raises the error of its kind, in one sentence that
says what was expected, what came and what to do.

A row of the table is (what is wrong, the call, the kind of error, its sentence). A call may take a folder with two good
pairs of pictures, which it spoils; its name stands in the sentence as <folder>.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import fastunet
from fastunet import blocks, cli, data, functional, losses, metrics, reference, training
from fastunet.backend import triton_unavailable
from fastunet.checkpoint import CheckpointError
from fastunet.errors import UserError
from fastunet.losses import CrossEntropyLoss, DiceCELoss, DiceLoss, GeneralizedDiceLoss, GlobalLoss, TverskyLoss
from fastunet.metrics import ConfusionMatrix, dice_coeff, multiclass_dice_coeff

Row = tuple[str, Callable[..., object], type[BaseException], str]

LOGITS, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
ONE = LOGITS[:, :1]  # a single channel
X, W = torch.zeros(2, 3, 6, 8), torch.zeros(4, 3, 3, 3)
PICTURE, MASK = torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.int64)
conv_bn_relu, upsample_pad_concat, head_loss = (
    functional.conv_bn_relu, functional.upsample_pad_concat, functional.head_loss,
)  # fmt: skip


def unet(**settings: Any) -> Any:
    return fastunet.UNet(3, 2, base_c=2, **settings)


def with_part(name: str, part: object) -> Any:
    """A U-Net in eval mode, of which one module or parameter is another."""
    model = unet().eval()
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
    return model


def with_hook(model: nn.Module) -> Any:
    model.register_forward_hook(lambda *_: None)
    return model


def command(*arguments: object) -> None:
    """``fastunet *arguments``; raises what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = int(error.code or 0)
    assert status == 2
    last = said.getvalue().splitlines()[-1]
    assert last.startswith("fastunet")
    raise UserError(last.partition("error: ")[2])


def demo(*arguments: object) -> None:
    command("demo", "--steps", 1, "--base-c", 1, "--crop", 32, *arguments)


def head(weight: Any, bias: Any = None, labels: Any = None, criterion: Any = None) -> Tensor:
    labels = torch.zeros(2, 6, 8).long() if labels is None else labels
    return head_loss(X, weight, bias, labels, DiceLoss() if criterion is None else criterion)


# ---- pictures to spoil -------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (20, 24), np.uint8)


def stripes(*values: int | tuple[int, ...], size: tuple[int, int] = (24, 20)) -> np.ndarray:
    """A mask of vertical stripes, one per value."""
    row = np.array(values, np.uint8)[np.arange(size[0]) * len(values) // size[0]]
    return np.broadcast_to(row, (size[1], *row.shape)).copy()


def write(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def other(folder: Path, name: str, pixels: np.ndarray) -> None:
    """The picture under another name, in place of the one with that stem."""
    folder.joinpath(name).with_suffix(".png").unlink()
    write(folder / name, pixels)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def good(folder: Path) -> Path:
    """``folder`` with two good pairs, a and b: grey images, masks of 0 and 255."""
    for kind, pixels in (("images", NOISE), ("masks", stripes(0, 255))):
        (folder / kind).mkdir()
        for name in "ab":
            write(folder / kind / f"{name}.png", pixels)
    return folder


def opened(folder: Path, *_: object) -> data.Pictures:
    return data.open_folders(folder / "images", folder / "masks")


# ---- networks: run as operators, and as the modules they are ---------------------------------------------------------

# fmt: off
NETWORKS: list[Row] = [
    ("an array", lambda: unet()(PICTURE.numpy()),
     TypeError, "expected an input that is a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
    ("lists", lambda: unet()(PICTURE.tolist()),
     TypeError, "expected an input that is a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("nothing", lambda: fastunet.BrainUNet(3, 1, 2)(None),
     TypeError, "expected an input that is a torch.Tensor, got NoneType; convert it with torch.as_tensor"),
    ("no batch", lambda: unet()(PICTURE[0]),
     ValueError, "expected an input of shape (N, C, H, W), got (3, 16, 16); add a batch dimension with x[None]"),
    ("a volume", lambda: unet()(PICTURE[None]),
     ValueError, "expected an input of shape (N, C, H, W), got (1, 1, 3, 16, 16); reshape it"),
    ("grey for colour", lambda: unet()(PICTURE[:, :1]),
     ValueError, "expected 3 input channels, got 1 in an input of shape (1, 1, 16, 16); build the model with that number of channels or convert the pictures"),
    ("bytes", lambda: unet()(PICTURE.byte()),
     TypeError, "expected a floating-point input, got torch.uint8; scale it, for example x.float() / 255"),
    ("complex numbers", lambda: unet()(PICTURE.to(torch.complex64)),
     TypeError, "expected a floating-point input, got torch.complex64; pass x.abs(), or both parts as channels"),
    ("a sparse picture", lambda: unet()(PICTURE.to_sparse()),
     TypeError, "expected a dense input, got torch.sparse_coo; convert it with x.to_dense()"),
    ("a low picture", lambda: unet()(torch.zeros(1, 3, 15, 32)),
     ValueError, "expected height and width of at least 16, got 15×32; pad or enlarge the input"),
    ("a narrow picture", lambda: fastunet.StridedUNet(base_c=2)(torch.zeros(1, 3, 32, 8)),
     ValueError, "expected height and width of at least 16, got 32×8; pad or enlarge the input"),
    ("float64 for float32", lambda: unet()(PICTURE.double()),
     TypeError, "expected input and weights of one dtype, got torch.float64 and torch.float32; convert one of them (model.to(dtype) or x.to(dtype)) or run under torch.autocast (inc.double_conv.0)"),
    ("half precision", lambda: fastunet.PlainUNet(3, 2, 2)(PICTURE.half()),
     TypeError, "expected input and weights of one dtype, got torch.float16 and torch.float32; convert one of them (model.to(dtype) or x.to(dtype)) or run under torch.autocast (encoder1.0)"),
    ("a picture elsewhere", lambda: unet()(PICTURE.to("meta")),
     ValueError, "expected an input on cpu, where the model is, got one on meta; move it with x.to('cpu')"),
    ("a network elsewhere", lambda: unet().to("meta")(PICTURE),
     ValueError, "expected an input on meta, where the model is, got one on cpu; move it with x.to('meta')"),
    ("one value to normalise by", lambda: unet()(PICTURE),
     ValueError, "expected more than 1 value per channel in training, got one from an input of shape (1, 16, 1, 1); pass a larger batch or picture, or call model.eval() (down4.maxpool_conv.1.double_conv.0)"),
    ("a head in float64", lambda: with_part("outc.conv", nn.Conv2d(2, 2, 1).double())(PICTURE),
     TypeError, "expected input and weights of one dtype, got torch.float32 and torch.float64; convert one of them (model.to(dtype) or x.to(dtype)) or run under torch.autocast (outc.conv)"),
    ("a layer of other channels", lambda: with_part("down3.maxpool_conv.1.double_conv.0", nn.Conv2d(7, 16, 3, padding=1))(PICTURE),
     ValueError, "expected 7 channels, got 8; change the layer or what comes before it (down3.maxpool_conv.1.double_conv.0)"),
    ("a norm of other features", lambda: with_part("up2.conv.double_conv.1", nn.BatchNorm2d(5))(PICTURE),
     ValueError, "expected a batch norm of 8 features, got one of 5; change it or the layer before it (up2.conv.double_conv.1)"),
    ("a norm with half its statistics", lambda: with_part("up3.conv.double_conv.1.running_mean", None)(PICTURE),
     ValueError, "expected a batch norm with running_mean and running_var or with neither, got no running_mean; give it both (up3.conv.double_conv.1)"),
    ("torch.jit.script", lambda: torch.jit.script(unet()),
     RuntimeError, "expected no torch.jit.script, which does not know fastunet's operators, got a network to compile; use torch.export, or script the same network of fastunet.reference"),
    ("torch.fx", lambda: torch.fx.symbolic_trace(unet()),
     TypeError, "expected an input that is a torch.Tensor, got Proxy; use torch.export"),
    ("StridedUNet.loss", lambda: fastunet.StridedUNet(base_c=2).loss(PICTURE, MASK, DiceLoss()),
     TypeError, "expected a network that ends in a 1×1 convolution, got StridedUNet; use nn.BCELoss of its output"),
    ("StridedUNet.predict", lambda: fastunet.StridedUNet(base_c=2).predict(PICTURE),
     TypeError, "expected a network that ends in a 1×1 convolution to logits, got StridedUNet, whose call returns probabilities; compare those with a threshold, model.eval()(x) > 0.5"),
    ("StridedUNet.predict_proba", lambda: fastunet.StridedUNet(base_c=2).predict_proba(PICTURE),
     TypeError, "expected a network that ends in a 1×1 convolution to logits, got StridedUNet, whose call returns probabilities; compare those with a threshold, model.eval()(x) > 0.5"),
    ("probabilities in integers", lambda: unet().predict_proba(PICTURE, dtype=torch.uint8),
     TypeError, "expected a floating-point dtype for probabilities, got torch.uint8; take torch.float32"),
    ("a dtype's name", lambda: unet().predict_proba(PICTURE, dtype="half"),
     TypeError, "expected a floating-point dtype for probabilities, got 'half'; take torch.float32"),
    ("no threshold", lambda: unet().predict(PICTURE, sigmoid=True, threshold=None),
     TypeError, "expected threshold as a number, got None; pass an int or a float"),
    ("a threshold of nan", lambda: unet().predict(PICTURE, sigmoid=True, threshold=math.nan),
     ValueError, "expected threshold to be finite, got nan; pass a finite number"),
    ("sigmoid as a word", lambda: unet().predict(PICTURE, sigmoid="yes"),
     TypeError, "expected sigmoid to be True, False or None, got 'yes'; pass one of those"),
    ("predict without a batch", lambda: unet().predict(PICTURE[0]),
     ValueError, "expected an input of shape (N, C, H, W), got (3, 16, 16); add a batch dimension with x[None]"),
    ("no criterion", lambda: unet().loss(PICTURE, MASK, None),
     TypeError, "expected a loss to call, got None; pass one of fastunet.losses"),
    ("a class for a criterion", lambda: unet().loss(PICTURE, MASK, DiceLoss),
     TypeError, "expected a loss to call, got the class DiceLoss; construct it with DiceLoss()"),
    ("a mask of another size", lambda: unet().eval().loss(PICTURE, MASK[:, 1:], DiceLoss()),
     ValueError, "expected labels of shape (1, 16, 16) for logits of shape (1, 2, 16, 16) in softmax mode, got (1, 15, 16); pass those of the same pictures"),
    ("a mask with a value too large", lambda: fastunet.PlainUNet(3, 2, 2).loss(PICTURE, MASK + 2, DiceLoss()),
     ValueError, "expected labels from 0 to 1 or ignore_index=-100, got 2; map the mask's values to class indices"),
    ("a mask in floating point", lambda: fastunet.PlainUNet(3, 2, 2).loss(PICTURE, MASK.float(), DiceLoss()),
     TypeError, "expected integer labels (uint8 to int64), got torch.float32; convert them with .long()"),
    ("pixel weights for Dice", lambda: fastunet.PlainUNet(3, 2, 2).loss(PICTURE, MASK, DiceLoss(), torch.ones(1, 16, 16)),
     ValueError, "expected no pixel_weight with DiceLoss, which has no cross-entropy to weigh, got one; leave it out or take DiceCELoss"),
    ("the loss of a BrainUNet with a hook", lambda: with_hook(fastunet.BrainUNet(3, 1, 2)).loss(PICTURE, MASK, DiceLoss(sigmoid=True)),
     TypeError, "expected a BrainUNet with its own forward and no hooks, for the loss of its logits, got one to be called, which returns probabilities; use nn.BCELoss of those"),
    ("a forward that returns a dict", lambda: with_part("forward", lambda x: {"out": x}).predict(PICTURE),
     TypeError, "expected a call of the model to return a tensor (N, K, H, W) to predict from, got dict; make its forward return the logits"),
]
# fmt: on

# ---- blocks ------------------------------------------------------------------------------------------------------------

# fmt: off
BLOCKS: list[Row] = [
    ("a block of 'a' channels", lambda: blocks.DoubleConv("a", 2),
     TypeError, "expected in_channels as an integer, got 'a'; pass a whole number"),
    ("a block of no channels", lambda: blocks.Down(0, 2),
     ValueError, "expected in_channels of at least 1, got 0; pass 1 or more"),
    ("a head of no classes", lambda: blocks.OutConv(2, 0),
     ValueError, "expected out_channels of at least 1, got 0; pass 1 or more"),
    ("a block of half channels", lambda: blocks.Up(4.0, 2),
     TypeError, "expected in_channels as an integer, got 4.0; pass a whole number"),
    ("a strided block of True channels", lambda: blocks.StridedDown(3, True),
     TypeError, "expected out_channels as an integer, got True; pass a whole number"),
    ("a sequence on a list", lambda: fastunet.ConvSequence(nn.Conv2d(3, 4, 3, padding=1))([1]),
     TypeError, "expected x as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("a block on a list", lambda: blocks.DoubleConv(3, 4)([1]),
     TypeError, "expected x as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("a block on no batch", lambda: blocks.DoubleConv(3, 4)(X[0]),
     ValueError, "expected x of shape (N, C, H, W), got (3, 6, 8); reshape it"),
    ("a block on other channels", lambda: blocks.DoubleConv(3, 4)(X[:, :2]),
     ValueError, "expected 3 channels, got 2; change the layer or what comes before it"),
    ("a block on float64", lambda: blocks.DoubleConv(3, 4)(X.double()),
     TypeError, "expected input and weights of one dtype, got torch.float64 and torch.float32; convert one of them (model.to(dtype) or x.to(dtype)) or run under torch.autocast"),
    ("a block elsewhere", lambda: blocks.OutConv(3, 4).to("meta")(X),
     ValueError, "expected a Conv2d on cpu, where its input is, got one on meta; move one of them"),
    ("a block on nothing", lambda: blocks.Down(3, 4)(None),
     TypeError, "expected x as a torch.Tensor, got NoneType; convert it with torch.as_tensor"),
    ("a block on one pixel", lambda: blocks.Down(3, 4)(X[..., :1, :1]),
     ValueError, "expected at least 2×2 pixels to pool, got 1×1; pad or enlarge the input"),
    ("a block without its skip connection", lambda: blocks.Up(6, 3)(torch.zeros(2, 6, 3, 4), None),
     TypeError, "expected skip as a torch.Tensor, got NoneType; convert it with torch.as_tensor"),
    ("a skip connection of another batch", lambda: blocks.Up(6, 3)(torch.zeros(2, 6, 3, 4), X[:1]),
     ValueError, "expected x and skip of one batch size, got 2 and 1; pass as many"),
    ("a residual block of stride 3", lambda: blocks.ResidualBlock(3, 4, 3),
     ValueError, "expected stride 1 or 2, got 3; pass one of those"),
    ("a residual block of stride 2 on odd sizes", lambda: blocks.ResidualBlock(3, 4, 2)(torch.zeros(2, 3, 7, 8)),
     ValueError, "expected two sides of one shape to add, got (2, 4, 4, 4) and (2, 4, 3, 4) from an input of shape (2, 3, 7, 8); with stride 2 pass even sizes"),
    ("more than a row to repeat", lambda: blocks.Up(6, 3, replicate=True)(torch.zeros(2, 3, 2, 4), X),
     ValueError, "expected a skip connection of at most one row and column more than (4, 8), got (6, 8); pad with zeros instead, or pass a skip connection of twice the size"),
    ("replicate as a word", lambda: blocks.Up(6, 3, replicate="yes"),
     TypeError, "expected replicate to be True or False, got 'yes'; pass one of those"),
    ("a strided block without a batch", lambda: blocks.StridedUp(4, 2)(X[0], X),
     ValueError, "expected x of shape (N, C, H, W), got (3, 6, 8); reshape it"),
]
# fmt: on

# ---- constructors and state_dicts ------------------------------------------------------------------------------------

# fmt: off
CONSTRUCTORS: list[Row] = [
    ("channels as a letter", lambda: fastunet.UNet("a", 2),
     TypeError, "expected n_channels as an integer, got 'a'; pass a whole number"),
    ("channels as a float", lambda: fastunet.UNet(3.0, 2),
     TypeError, "expected n_channels as an integer, got 3.0; pass a whole number"),
    ("no classes", lambda: fastunet.UNet(3, 0),
     ValueError, "expected n_classes of at least 1, got 0; pass 1 or more"),
    ("a negative width", lambda: fastunet.UNet(3, 2, base_c=-1),
     ValueError, "expected base_c of at least 1, got -1; pass 1 or more"),
    ("True classes", lambda: fastunet.StridedUNet(3, True),
     TypeError, "expected n_classes as an integer, got True; pass a whole number"),
    ("no channels", lambda: fastunet.PlainUNet(0, 2),
     ValueError, "expected in_channels of at least 1, got 0; pass 1 or more"),
    ("a fractional width", lambda: fastunet.BrainUNet(3, 1, 2.0),
     TypeError, "expected init_features as an integer, got 2.0; pass a whole number"),
    ("a width in bilinear's place", lambda: fastunet.UNet(3, 2, 64),
     TypeError, "expected bilinear to be True or False, got 64; pass one of those"),
    ("conv_bias as a word", lambda: unet(conv_bias="yes"),
     TypeError, "expected conv_bias to be True or False, got 'yes'; pass one of those"),
    ("an unknown norm", lambda: unet(norm="layer"),
     ValueError, "expected norm to be batch, instance, group or None, got 'layer'; leave it out for batch"),
    ("a norm's class", lambda: blocks.DoubleConv(3, 4, norm=nn.BatchNorm2d),
     ValueError, "expected norm to be batch, instance, group or None, got <class 'torch.nn.modules.batchnorm.BatchNorm2d'>; leave it out for batch"),
    ("a slope as a word", lambda: unet(negative_slope="leaky"),
     TypeError, "expected negative_slope as a number, got 'leaky'; pass an int or a float"),
    ("a slope of nan", lambda: blocks.ResidualBlock(3, 4, negative_slope=math.nan),
     ValueError, "expected negative_slope to be finite, got nan; pass a finite number"),
    ("an unknown upsampling", lambda: unet(upsample="bicubic"),
     ValueError, "expected upsample to be transposed, bilinear, nearest or None, got 'bicubic'; leave it out for transposed convolutions"),
    ("two upsamplings", lambda: unet(bilinear=True, upsample="nearest"),
     ValueError, "expected one upsampling, got bilinear=True and upsample='nearest'; leave out one of them"),
    ("an unknown backend", lambda: unet(backend="cuda"),
     ValueError, "expected backend to be one of auto, torch, triton, got 'cuda'; check FASTUNET_BACKEND too"),
    ("no backend", lambda: unet(backend=None),
     ValueError, "expected backend to be one of auto, torch, triton, got None; check FASTUNET_BACKEND too"),
    ("an unknown policy", lambda: fastunet.PlainUNet(3, 2, policy="fast"),
     ValueError, "expected policy to be one of speed, memory, got 'fast'; leave it out for speed"),
    ("checkpointing as a number", lambda: unet().use_checkpointing(4),
     TypeError, "expected enabled to be True or False, got 4; pass one of those"),
    ("a list for a state_dict", lambda: unet().load_state_dict([1]),
     TypeError, "expected a state_dict, got [1]; pass what model.state_dict() returned"),
    ("the network for its state_dict", lambda: unet().load_state_dict(torch.zeros(2)),
     TypeError, "expected a state_dict, got Tensor of shape (2,); pass what model.state_dict() returned"),
    ("a state_dict of another kind", lambda: unet().load_state_dict(fastunet.UNet(3, 2, True, 2).state_dict()),
     RuntimeError, "expected the state_dict of UNet(3, 2, base_c=2), got that of another network; this checkpoint is bilinear: UNet(3, 2, base_c=2, bilinear=True)"),
    ("a state_dict of another network", lambda: fastunet.UNet(3, 2).load_state_dict(fastunet.BrainUNet(3, 2).state_dict()),
     RuntimeError, "expected the state_dict of UNet(3, 2), got that of another network; this checkpoint is a BrainUNet: BrainUNet(3, 2)"),
    ("a state_dict of version 1", lambda: fastunet.UNet(3, 2).load_state_dict(fastunet.UNet(3, 2, bilinear=True, conv_bias=True).state_dict()),
     RuntimeError, "expected the state_dict of UNet(3, 2), got that of another network; this checkpoint is bilinear with conv biases: UNet(3, 2, bilinear=True, conv_bias=True)"),
    ("a state_dict of other classes", lambda: unet().load_state_dict(fastunet.UNet(3, 5, base_c=2).state_dict()),
     RuntimeError, "expected the state_dict of UNet(3, 2, base_c=2), got that of another network; this checkpoint is transposed: UNet(3, 5, base_c=2)"),
    ("a state_dict of DDP", lambda: unet().load_state_dict({f"module.{name}": x for name, x in unet().state_dict().items()}),
     RuntimeError, "expected the state_dict of a UNet, got one whose keys begin with 'module.'; take that off the keys"),
    ("a whole checkpoint", lambda: unet().load_state_dict({"epoch": 3, "model": unet().state_dict()}),
     RuntimeError, "expected the state_dict of a UNet, got a dict with one in its entry 'model'; pass that entry"),
    ("a state_dict of words", lambda: unet().load_state_dict(dict.fromkeys(unet().state_dict(), "x")),
     RuntimeError, "expected inc.double_conv.0.weight as a torch.Tensor, got 'x'; pass what model.state_dict() returned"),
    ("a state_dict with more", lambda: unet().load_state_dict({**unet().state_dict(), "ema": LABELS}),
     RuntimeError, "expected the state_dict of a UNet with the same arguments, got one with 'ema' unknown; construct the network as the one that was saved"),
    ("a state_dict with other shapes, not strict", lambda: unet().load_state_dict({"outc.conv.bias": torch.zeros(7)}, strict=False),
     RuntimeError, "expected the state_dict of a UNet with the same arguments, got one with 'outc.conv.bias' of shape (7,), here (2,); construct the network as the one that was saved"),
    ("keys of an unknown layout", lambda: reference.rename_keys({}, "x"),
     ValueError, "expected layout to be one of milesial, seed001, got 'x'; take one of those"),
]
# fmt: on

# ---- functional ------------------------------------------------------------------------------------------------------

# fmt: off
FUNCTIONAL: list[Row] = [
    ("x as a list", lambda: conv_bn_relu([1], W),
     TypeError, "expected x as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("x without a batch", lambda: conv_bn_relu(X[0], W),
     ValueError, "expected x of shape (N, C, H, W), got (3, 6, 8); reshape it"),
    ("x in integers", lambda: conv_bn_relu(X.long(), W),
     TypeError, "expected a floating-point x, got torch.int64; convert it with .float()"),
    ("weight as an array", lambda: conv_bn_relu(X, W.numpy(), training=True),
     TypeError, "expected weight as a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
    ("weight for other channels", lambda: conv_bn_relu(X, torch.zeros(4, 5, 3, 3), training=True),
     ValueError, "expected weight of shape (K, 3, 3, 3) or (K, 3, 1, 1) for an x of shape (2, 3, 6, 8), got (4, 5, 3, 3); change one of them"),
    ("a weight of 5×5", lambda: conv_bn_relu(X, torch.zeros(4, 3, 5, 5), training=True),
     ValueError, "expected weight of shape (K, 3, 3, 3) or (K, 3, 1, 1) for an x of shape (2, 3, 6, 8), got (4, 3, 5, 5); change one of them"),
    ("weight in float64", lambda: conv_bn_relu(X, W.double(), training=True),
     TypeError, "expected x and weight of one dtype, got torch.float32 and torch.float64; convert one of them"),
    ("weight elsewhere", lambda: conv_bn_relu(X, W.to("meta"), training=True),
     ValueError, "expected weight on cpu, where x is, got it on meta; move one of them"),
    ("no pixels to convolve", lambda: conv_bn_relu(X[:, :, :0], W, training=True),
     ValueError, "expected an x with channels and pixels and a weight with filters, got (2, 3, 0, 8) and (4, 3, 3, 3); pass larger ones"),
    ("no channels to convolve", lambda: conv_bn_relu(X[:, :0], W[:, :0], training=True),
     ValueError, "expected an x with channels and pixels and a weight with filters, got (2, 0, 6, 8) and (4, 0, 3, 3); pass larger ones"),
    ("a weight without filters", lambda: conv_bn_relu(X, W[:0], training=True),
     ValueError, "expected an x with channels and pixels and a weight with filters, got (2, 3, 6, 8) and (0, 3, 3, 3); pass larger ones"),
    ("a stride of 3", lambda: conv_bn_relu(X, W, training=True, stride=3),
     ValueError, "expected stride 1, or 2 for a 3×3 weight, got stride 3 and a 3×3 one; pass stride=1 and take a part of the result"),
    ("a 1×1 weight of stride 2", lambda: conv_bn_relu(X, W[..., :1, :1], training=True, stride=2),
     ValueError, "expected stride 1, or 2 for a 3×3 weight, got stride 2 and a 1×1 one; pass stride=1 and take a part of the result"),
    ("a fractional stride", lambda: conv_bn_relu(X, W, training=True, stride=2.0),
     TypeError, "expected stride as an integer, got 2.0; pass a whole number"),
    ("a stride of True", lambda: conv_bn_relu(X, W, training=True, stride=True),
     TypeError, "expected stride as an integer, got True; pass a whole number"),
    ("no momentum", lambda: conv_bn_relu(X, W, training=True, momentum=None),
     TypeError, "expected momentum as a number, got None; pass an int or a float"),
    ("an eps of nan", lambda: conv_bn_relu(X, W, training=True, eps=math.nan),
     ValueError, "expected eps to be finite, got nan; pass a finite number"),
    ("a negative eps", lambda: conv_bn_relu(X, W, training=True, eps=-1.0),
     ValueError, "expected eps of at least 0, got -1.0; pass 1e-5, as PyTorch"),
    ("one running statistic", lambda: conv_bn_relu(X, W, running_mean=torch.zeros(4), training=True),
     ValueError, "expected running_mean and running_var or neither, got running_mean alone; pass both"),
    ("no running statistics", lambda: conv_bn_relu(X, W),
     ValueError, "expected running_mean and running_var when training=False, got neither; pass both, or training=True"),
    ("a bias of another length", lambda: conv_bn_relu(X, W, bias=torch.zeros(3), training=True),
     ValueError, "expected bias of shape (4,), one value per filter, got (3,); change one of them"),
    ("a bias as a list", lambda: conv_bn_relu(X, W, bias=[0.0] * 4, training=True),
     TypeError, "expected bias as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("a boolean scale", lambda: conv_bn_relu(X, W, torch.ones(4, dtype=torch.bool), training=True),
     TypeError, "expected bn_weight in floating point, got torch.bool; convert it with .float()"),
    ("a shift wider than x", lambda: conv_bn_relu(X, W, bn_bias=torch.ones(4).double(), training=True),
     TypeError, "expected bn_bias no wider than x, which is torch.float32, got torch.float64; convert one of them"),
    ("one value in training", lambda: conv_bn_relu(X[:1, :, :1, :1], W, training=True),
     ValueError, "expected more than 1 value per channel in training, got an output of (1, 4, 1, 1); pass a larger batch or picture, or training=False"),
    ("training as a word", lambda: conv_bn_relu(X, W, training="yes"),
     TypeError, "expected training to be True or False, got 'yes'; pass one of those"),
    ("an unknown backend of a function", lambda: conv_bn_relu(X, W, training=True, backend="gpu"),
     ValueError, "expected backend to be one of auto, torch, triton, got 'gpu'; check FASTUNET_BACKEND too"),
    ("no x to upsample", lambda: upsample_pad_concat(None, X),
     TypeError, "expected x as a torch.Tensor, got NoneType; convert it with torch.as_tensor"),
    ("skip as a list", lambda: upsample_pad_concat(X, [X]),
     TypeError, "expected skip as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("skip in integers", lambda: upsample_pad_concat(X, X.int()),
     TypeError, "expected a floating-point skip, got torch.int32; convert it with .float()"),
    ("skip without a batch", lambda: upsample_pad_concat(X, X[0]),
     ValueError, "expected skip of shape (N, C, H, W), got (3, 6, 8); reshape it"),
    ("skip of another batch", lambda: upsample_pad_concat(X[:1], X),
     ValueError, "expected x and skip of one batch size, got 1 and 2; pass as many"),
    ("skip of another dtype", lambda: upsample_pad_concat(X, X.double()),
     TypeError, "expected x and skip of one dtype, got torch.float32 and torch.float64; convert one of them"),
    ("skip elsewhere", lambda: upsample_pad_concat(X, X.to("meta")),
     ValueError, "expected skip on cpu, where x is, got it on meta; move one of them"),
    ("no pixels to upsample", lambda: upsample_pad_concat(X[:, :, :0], X),
     ValueError, "expected an x with channels and pixels to upsample, got shape (2, 3, 0, 8); pass a larger one"),
    ("no channels to upsample", lambda: upsample_pad_concat(X[:, :0], X),
     ValueError, "expected an x with channels and pixels to upsample, got shape (2, 0, 6, 8); pass a larger one"),
    ("align_corners as a word", lambda: upsample_pad_concat(X, X, align_corners="yes"),
     TypeError, "expected align_corners to be True, False or None, got 'yes'; pass one of those"),
    ("skip_first as a number", lambda: upsample_pad_concat(X, X, skip_first=2),
     TypeError, "expected skip_first to be True or False, got 2; pass one of those"),
    ("another criterion under a head", lambda: head(W[:2, :, :1, :1], criterion=nn.CrossEntropyLoss()),
     TypeError, "expected a loss of fastunet.losses, got CrossEntropyLoss; give it the logits"),
    ("a class under a head", lambda: head(W[:2, :, :1, :1], criterion=DiceCELoss),
     TypeError, "expected a loss to call, got the class DiceCELoss; construct it with DiceCELoss()"),
    ("a head of 3×3", lambda: head(W[:2]),
     ValueError, "expected a weight of shape (K, 3, 1, 1) for sources of 3 channels, got (2, 3, 3, 3); change one of them"),
    ("a head of two dimensions", lambda: head(torch.zeros(2, 3)),
     ValueError, "expected weight of shape (N, C, H, W), got (2, 3); reshape it"),
    ("no head", lambda: head(None),
     TypeError, "expected weight as a torch.Tensor, got NoneType; convert it with torch.as_tensor"),
    ("a 1×1 convolution in float64", lambda: head(W[:2, :, :1, :1].double()),
     TypeError, "expected input and weights of one dtype, got torch.float32 and torch.float64; convert one of them (model.to(dtype) or x.to(dtype)) or run under torch.autocast"),
    ("a head's bias of another length", lambda: head(W[:2, :, :1, :1], torch.zeros(3)),
     ValueError, "expected a bias of shape (2,), got (3,); pass one value per filter"),
    ("a head of 300 classes", lambda: head(torch.zeros(300, 3, 1, 1)),
     ValueError, "expected logits with 1 to 256 classes, got 300; change the last convolution"),
    ("labels of a head as a list", lambda: head(W[:2, :, :1, :1], labels=[0]),
     TypeError, "expected labels as a torch.Tensor, got list; convert it with torch.as_tensor"),
]
# fmt: on

# ---- losses ----------------------------------------------------------------------------------------------------------

# fmt: off
LOSSES: list[Row] = [
    ("logits as an array", lambda: losses.softmax_stats(LOGITS.numpy(), LABELS),
     TypeError, "expected logits as a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
    ("logits without a batch", lambda: losses.softmax_stats(LOGITS[0], LABELS),
     ValueError, "expected logits of shape (N, C, H, W), got (3, 4, 5); reshape them"),
    ("a mask for logits", lambda: losses.softmax_stats(LOGITS.long(), LABELS),
     TypeError, "expected floating-point logits, got torch.int64; pass the network's output, not a mask"),
    ("logits of no class", lambda: losses.softmax_stats(LOGITS[:, :0], LABELS),
     ValueError, "expected logits with 1 to 256 classes, got 0; change the last convolution"),
    ("logits of 300 classes", lambda: losses.softmax_stats(torch.zeros(2, 300, 4, 5), LABELS),
     ValueError, "expected logits with 1 to 256 classes, got 300; change the last convolution"),
    ("a softmax of one channel", lambda: losses.softmax_stats(ONE, LABELS),
     ValueError, "expected 2 channels or more for a softmax, which of one is always 1, got logits of shape (2, 1, 4, 5); a mask of one channel needs a sigmoid (sigmoid=True, mode='sigmoid')"),
    ("labels as a list", lambda: losses.softmax_stats(LOGITS, LABELS.tolist()),
     TypeError, "expected labels as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("labels in floating point", lambda: losses.softmax_stats(LOGITS, LABELS.float()),
     TypeError, "expected integer labels (uint8 to int64), got torch.float32; convert them with .long()"),
    ("boolean labels of a softmax", lambda: losses.softmax_stats(LOGITS, LABELS.bool()),
     TypeError, "expected integer labels (uint8 to int64), got torch.bool; convert them with .long()"),
    ("one-hot labels", lambda: losses.softmax_stats(LOGITS, LOGITS.long()),
     ValueError, "expected labels of shape (2, 4, 5) for logits of shape (2, 3, 4, 5) in softmax mode, got (2, 3, 4, 5); turn one-hot labels into indices with labels.argmax(1)"),
    ("labels of other pictures", lambda: losses.softmax_stats(LOGITS, LABELS[:, 1:]),
     ValueError, "expected labels of shape (2, 4, 5) for logits of shape (2, 3, 4, 5) in softmax mode, got (2, 3, 5); pass those of the same pictures"),
    ("labels with a channel", lambda: losses.softmax_stats(LOGITS, LABELS[:, None]),
     ValueError, "expected labels of shape (2, 4, 5) for logits of shape (2, 3, 4, 5) in softmax mode, got (2, 1, 4, 5); drop the channel with labels.squeeze(1)"),
    ("one label for several questions", lambda: losses.softmax_stats(LOGITS, LABELS, mode="sigmoid"),
     ValueError, "expected labels of shape (2, 3, 4, 5) for logits of shape (2, 3, 4, 5) in sigmoid mode, got (2, 4, 5); pass those of the same pictures"),
    ("a label too large", lambda: losses.softmax_stats(LOGITS, LABELS + 3),
     ValueError, "expected labels from 0 to 2 or ignore_index=-100, got 3; map the mask's values to class indices"),
    ("a label below zero", lambda: losses.softmax_stats(LOGITS, LABELS - 1),
     ValueError, "expected labels from 0 to 2 or ignore_index=-100, got -1; map the mask's values to class indices"),
    ("white as a label", lambda: losses.softmax_stats(LOGITS, (LABELS + 255).byte()),
     ValueError, "expected labels from 0 to 2 or ignore_index=-100, got 255; map the mask's values to class indices"),
    ("a sigmoid's label of 2", lambda: losses.softmax_stats(ONE, LABELS + 2, mode="sigmoid"),
     ValueError, "expected labels from 0 to 1 or ignore_index=-100, got 2; map the mask's values to class indices"),
    ("labels elsewhere", lambda: losses.softmax_stats(LOGITS, LABELS.to("meta")),
     ValueError, "expected labels on cpu, where the logits are, got meta; move them"),
    ("an unknown mode", lambda: losses.softmax_stats(LOGITS, LABELS, mode="multi"),
     ValueError, "expected mode 'softmax' or 'sigmoid', got 'multi'; several labels per pixel are 'sigmoid'"),
    ("half a label to ignore", lambda: losses.softmax_stats(LOGITS, LABELS, ignore_index=0.5),
     TypeError, "expected ignore_index as an integer or None, got 0.5; pass the label of pixels that do not count"),
    ("squares as a word", lambda: losses.softmax_stats(LOGITS, LABELS, squares="no"),
     TypeError, "expected squares to be True or False, got 'no'; pass one of those"),
    ("pixel weights as a list", lambda: losses.softmax_stats(LOGITS, LABELS, pixel_weight=[1.0]),
     TypeError, "expected pixel_weight as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("pixel weights with a channel", lambda: losses.softmax_stats(LOGITS, LABELS, pixel_weight=torch.ones(2, 1, 4, 5)),
     ValueError, "expected a floating-point pixel_weight of shape (2, 4, 5), got torch.float32 of shape (2, 1, 4, 5); pass one factor per pixel"),
    ("integer pixel weights", lambda: losses.softmax_stats(LOGITS, LABELS, pixel_weight=LABELS),
     ValueError, "expected a floating-point pixel_weight of shape (2, 4, 5), got torch.int64 of shape (2, 4, 5); pass one factor per pixel"),
    ("pixel weights to learn", lambda: losses.softmax_stats(LOGITS, LABELS, pixel_weight=torch.ones(2, 4, 5, requires_grad=True)),
     ValueError, "expected a pixel_weight without requires_grad, since none is computed, got one with it; detach() it"),
    ("smooth as a letter", lambda: losses.dice_loss(LOGITS, LABELS, smooth="a"),
     TypeError, "expected smooth_nr as a number, got 'a'; pass an int or a float"),
    ("sigmoid as a letter", lambda: losses.dice_loss(LOGITS, LABELS, sigmoid="a"),
     TypeError, "expected sigmoid to be True, False or None, got 'a'; pass one of those"),
    ("an unknown reduction", lambda: DiceLoss(reduction="avg"),
     ValueError, "expected reduction 'mean', 'sum' or 'none', got 'avg'; take one of those"),
    ("a negative class weight", lambda: DiceLoss(weight=[1.0, -1.0]),
     ValueError, "expected weight to be one factor ≥ 0 per class, and finite, got [1.0, -1.0]; pass a list of numbers"),
    ("a class weight of nan", lambda: DiceLoss(weight=[1.0, math.nan]),
     ValueError, "expected weight to be one factor ≥ 0 per class, and finite, got [1.0, nan]; pass a list of numbers"),
    ("an infinite class weight", lambda: CrossEntropyLoss(weight=[1.0, math.inf]),
     ValueError, "expected weight to be one factor ≥ 0 per class, and finite, got [1.0, inf]; pass a list of numbers"),
    ("class weights in a matrix", lambda: DiceLoss(weight=torch.ones(2, 2)),
     ValueError, "expected weight to be one factor ≥ 0 per class, and finite, got [[1.0, 1.0], [1.0, 1.0]]; pass a list of numbers"),
    ("one number for class weights", lambda: DiceLoss(weight=2.0),
     ValueError, "expected weight to be one factor ≥ 0 per class, and finite, got 2.0; pass a list of numbers"),
    ("boolean class weights", lambda: TverskyLoss(weight=[True, False]),
     TypeError, "expected weight to be real factors, got torch.bool; convert it with .float()"),
    ("complex class weights", lambda: DiceCELoss(weight=torch.ones(2, dtype=torch.complex64)),
     TypeError, "expected weight to be real factors, got torch.complex64; convert it with .float()"),
    ("a word for class weights", lambda: DiceLoss(weight="balanced"),
     TypeError, "expected weight as one factor per class, got 'balanced'; pass a list of numbers or a tensor"),
    ("ragged class weights", lambda: DiceLoss(weight=[[1.0], [1.0, 2.0]]),
     TypeError, "expected weight as one factor per class, got [[1.0], [1.0, 2.0]]; pass a list of numbers or a tensor"),
    ("class weights for other classes", lambda: DiceLoss(weight=[1.0, 2.0])(LOGITS, LABELS),
     ValueError, "expected one weight for each of the 3 classes, got 2; construct the loss with 3 factors"),
    ("class weights elsewhere", lambda: DiceLoss(weight=[1.0, 2.0, 3.0])(LOGITS.to("meta"), LABELS.to("meta")),
     ValueError, "expected weight on meta, where the logits are, got it on cpu; move the loss with .to('meta')"),
    ("class weights of a sum over classes", lambda: DiceLoss(micro=True, weight=[1.0]),
     ValueError, "expected no weight with micro=True, which adds the classes up before it divides, got [1.0]; leave one of them out"),
    ("no smooth_nr", lambda: DiceLoss(smooth_nr=None),
     TypeError, "expected smooth_nr as a number, got None; pass an int or a float"),
    ("an infinite smooth_dr", lambda: DiceLoss(smooth_dr=math.inf),
     ValueError, "expected smooth_dr to be finite, got inf; pass a finite number"),
    ("batch as a word", lambda: DiceLoss(batch="no"),
     TypeError, "expected batch to be True or False, got 'no'; pass one of those"),
    ("log as a number", lambda: DiceLoss(log=10),
     TypeError, "expected log to be True or False, got 10; pass one of those"),
    ("a word to ignore", lambda: DiceLoss(ignore_index="void"),
     TypeError, "expected ignore_index as an integer or None, got 'void'; pass the label of pixels that do not count"),
    ("True to ignore", lambda: DiceLoss(ignore_index=True),
     TypeError, "expected ignore_index as an integer or None, got True; pass the label of pixels that do not count"),
    ("a device for a backend", lambda: DiceLoss(backend="cpu"),
     ValueError, "expected backend to be one of auto, torch, triton, got 'cpu'; check FASTUNET_BACKEND too"),
    ("softmax=True", lambda: DiceLoss(softmax=True),
     TypeError, "expected an argument of DiceLoss, got softmax; leave it out, since a softmax is the default and sigmoid=True takes its place"),
    ("to_onehot_y=True", lambda: DiceCELoss(to_onehot_y=True),
     TypeError, "expected an argument of DiceCELoss, got to_onehot_y; leave it out, since labels are integers and nothing is converted"),
    ("a misspelt argument", lambda: TverskyLoss(wieght=[1.0]),
     TypeError, "expected an argument of TverskyLoss, got wieght; help(fastunet.losses.TverskyLoss) lists them"),
    ("pixel weights in a call of Dice", lambda: DiceLoss()(LOGITS, LABELS, torch.ones(2, 4, 5)),
     ValueError, "expected no pixel_weight with DiceLoss, which has no cross-entropy to weigh, got one; leave it out or take DiceCELoss"),
    ("pixel weights for a global Tversky", lambda: GlobalLoss(TverskyLoss())(LOGITS, LABELS, torch.ones(2, 4, 5)),
     ValueError, "expected no pixel_weight with TverskyLoss, which has no cross-entropy to weigh, got one; leave it out or take DiceCELoss"),
    ("sparse logits", lambda: DiceLoss()(LOGITS.to_sparse(), LABELS),
     TypeError, "expected logits as a dense tensor, got torch.sparse_coo; convert it with .to_dense()"),
    ("sparse labels to score", lambda: ConfusionMatrix(3).update(LOGITS, LABELS.to_sparse()),
     TypeError, "expected labels as a dense tensor, got torch.sparse_coo; convert it with .to_dense()"),
    ("an unknown preset", lambda: DiceLoss.preset("smp"),
     ValueError, "expected a preset among brain, milesial, milesial-v3, nnunet, seed002, got 'smp'; its arguments build any other"),
    ("a loss of a softmax of one channel", lambda: GeneralizedDiceLoss()(ONE, LABELS),
     ValueError, "expected 2 channels or more for a softmax, which of one is always 1, got logits of shape (2, 1, 4, 5); a mask of one channel needs a sigmoid (sigmoid=True, mode='sigmoid')"),
    ("gamma of zero", lambda: TverskyLoss(gamma=0),
     ValueError, "expected gamma > 0, got 0; the paper's γ = 4/3 is gamma=0.75"),
    ("gamma of infinity", lambda: TverskyLoss(gamma=math.inf),
     ValueError, "expected gamma to be finite, got inf; pass a finite number"),
    ("alpha as a letter", lambda: TverskyLoss(alpha="a"),
     TypeError, "expected alpha as a number, got 'a'; pass an int or a float"),
    ("an unknown w_type", lambda: GeneralizedDiceLoss(w_type="cubic"),
     ValueError, "expected w_type 'square', 'simple' or 'uniform', got 'cubic'; take one of those"),
    ("class weights beside w_type", lambda: GeneralizedDiceLoss(weight=[1.0]),
     ValueError, "expected neither micro nor weight, since w_type says how the classes are weighted, got weight; leave it out"),
    ("micro beside w_type", lambda: GeneralizedDiceLoss(micro=True),
     ValueError, "expected neither micro nor weight, since w_type says how the classes are weighted, got micro; leave it out"),
    ("a cross-entropy per pixel", lambda: CrossEntropyLoss(reduction="none"),
     ValueError, "expected reduction 'mean' or 'sum', got 'none': the statistics know no single pixel; take a mean"),
    ("Dice + CE per pixel", lambda: DiceCELoss(reduction="none"),
     ValueError, "expected reduction 'mean' or 'sum', got 'none': the statistics know no single pixel; take a mean"),
    ("too much smoothing", lambda: CrossEntropyLoss(label_smoothing=1.5),
     ValueError, "expected label_smoothing from 0 to 1, got 1.5; 0.1 is usual"),
    ("negative smoothing", lambda: DiceCELoss(label_smoothing=-0.1),
     ValueError, "expected label_smoothing from 0 to 1, got -0.1; 0.1 is usual"),
    ("smoothing as True", lambda: CrossEntropyLoss(label_smoothing=True),
     TypeError, "expected label_smoothing as a number, got True; pass an int or a float"),
    ("pos_weight of zero", lambda: CrossEntropyLoss(pos_weight=0.0),
     ValueError, "expected pos_weight > 0 without label_smoothing, got 0.0 with 0.0; leave one of them out"),
    ("pos_weight of infinity", lambda: DiceCELoss(pos_weight=math.inf),
     ValueError, "expected pos_weight to be finite, got inf; pass a finite number"),
    ("pos_weight as a tensor", lambda: CrossEntropyLoss(pos_weight=torch.tensor(2.0)),
     TypeError, "expected pos_weight as a number, got Tensor of shape (); pass an int or a float"),
    ("pos_weight with smoothing", lambda: CrossEntropyLoss(pos_weight=2.0, label_smoothing=0.1),
     ValueError, "expected pos_weight > 0 without label_smoothing, got 2.0 with 0.1; leave one of them out"),
    ("pos_weight of several channels", lambda: CrossEntropyLoss(pos_weight=2.0, sigmoid=True)(LOGITS, LOGITS.long()),
     ValueError, "expected pos_weight with a sigmoid of a single channel, got 3 channels in sigmoid mode; weight weighs classes, pixel_weight pixels"),
    ("pos_weight of a softmax", lambda: DiceCELoss(pos_weight=2.0)(LOGITS, LABELS),
     ValueError, "expected pos_weight with a sigmoid of a single channel, got 3 channels in softmax mode; weight weighs classes, pixel_weight pixels"),
    ("class weights of one channel", lambda: CrossEntropyLoss(weight=[2.0], sigmoid=True)(ONE, LABELS),
     ValueError, "expected no weight for a single channel, where it would weigh both answers alike, got [2.0]; pos_weight weighs the pixels labelled 1"),
    ("pos_weight and labels as an array", lambda: CrossEntropyLoss(sigmoid=True, pos_weight=2.0)(ONE, LABELS.numpy()),
     TypeError, "expected labels as a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
    ("pixel weights of a loss as a list", lambda: CrossEntropyLoss()(LOGITS, LABELS, [1.0]),
     TypeError, "expected pixel_weight as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("a factor of nan", lambda: DiceCELoss(lambda_ce=math.nan),
     ValueError, "expected lambda_ce to be finite, got nan; pass a finite number"),
    ("labels to check, too large", lambda: losses.check_labels(LABELS + 9, 3),
     ValueError, "expected labels from 0 to 2 or ignore_index=-100, got 9; map the mask's values to class indices"),
    ("a global loss of no statistics", lambda: GlobalLoss(nn.BCELoss()),
     TypeError, "expected a loss of fastunet.losses, got BCELoss(); construct one of those"),
    ("labels to check, as a list", lambda: losses.check_labels([1], 3),
     TypeError, "expected labels as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("labels to check, in floating point", lambda: losses.check_labels(LABELS.float(), 3),
     TypeError, "expected integer labels, got torch.float32; convert them with .long()"),
    ("labels to check, in 8 bits", lambda: losses.check_labels((LABELS + 156).byte(), 3),
     ValueError, "expected labels from 0 to 2 or ignore_index=-100, got 156; map the mask's values to class indices"),
    ("labels to check, unsigned", lambda: losses.check_labels((LABELS - 100).to(torch.uint64), 3, ignore_index=255),
     ValueError, "expected labels from 0 to 2 or ignore_index=255, got 18446744073709551516; map the mask's values to class indices"),
    ("a number of classes as a word", lambda: losses.check_labels(LABELS, "3"),
     TypeError, "expected n_classes as an integer, got '3'; pass a whole number"),
    ("a row for a weight map", lambda: losses.unet_weight_map(torch.zeros(4)),
     ValueError, "expected labels of shape (H, W) or (N, H, W), got (4,); reshape them"),
    ("a weight map of an array", lambda: losses.unet_weight_map(np.zeros((4, 4))),
     TypeError, "expected labels as a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
    ("a weight map of floats", lambda: losses.unet_weight_map(torch.zeros(4, 4)),
     TypeError, "expected integer labels, or a bool mask, got torch.float32; convert them with .long()"),
    ("sigma of zero", lambda: losses.unet_weight_map(LABELS, sigma=0),
     ValueError, "expected sigma > 0, got 0; the paper's is 5 pixels"),
    ("sigma of nan", lambda: losses.unet_weight_map(LABELS, sigma=math.nan),
     ValueError, "expected sigma to be finite, got nan; pass a finite number"),
    ("w0 as a letter", lambda: losses.unet_weight_map(LABELS, w0="a"),
     TypeError, "expected w0 as a number, got 'a'; pass an int or a float"),
    ("one weight for two classes", lambda: losses.unet_weight_map(LABELS, class_weight=1.0),
     TypeError, "expected class_weight as two numbers, of background and of cells, got 1.0; pass a pair"),
    ("three weights for two classes", lambda: losses.unet_weight_map(LABELS, class_weight=(1.0, 2.0, 3.0)),
     TypeError, "expected class_weight as two numbers, of background and of cells, got (1.0, 2.0, 3.0); pass a pair"),
]
# fmt: on

# ---- metrics ---------------------------------------------------------------------------------------------------------

# fmt: off
METRICS: list[Row] = [
    ("a matrix of one class", lambda: ConfusionMatrix(1),
     ValueError, "expected num_classes of at least 2, got 1; pass 2 or more"),
    ("a matrix of 300 classes", lambda: ConfusionMatrix(300),
     ValueError, "expected 2 to 256 classes, got 300; merge some of them"),
    ("a matrix of 3.0 classes", lambda: ConfusionMatrix(3.0),
     TypeError, "expected num_classes as an integer, got 3.0; pass a whole number"),
    ("a matrix of True classes", lambda: ConfusionMatrix(True),
     TypeError, "expected num_classes as an integer, got True; pass a whole number"),
    ("a fractional label to ignore", lambda: ConfusionMatrix(3, 1.5),
     TypeError, "expected ignore_index as an integer or None, got 1.5; pass the label of pixels that do not count"),
    ("a threshold as a word", lambda: ConfusionMatrix(3, threshold="0.5"),
     TypeError, "expected threshold as a number, got '0.5'; pass an int or a float"),
    ("a matrix of no backend", lambda: ConfusionMatrix(3, backend=None),
     ValueError, "expected backend to be one of auto, torch, triton, got None; check FASTUNET_BACKEND too"),
    ("a prediction as an array", lambda: ConfusionMatrix(3).update(LOGITS.numpy(), LABELS),
     TypeError, "expected prediction as a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
    ("a complex prediction", lambda: ConfusionMatrix(3).update(LOGITS.to(torch.complex64), LABELS),
     TypeError, "expected logits or a mask, got torch.complex64; take its real part"),
    ("true labels as a list", lambda: ConfusionMatrix(3).update(LOGITS, LABELS.tolist()),
     TypeError, "expected labels as a torch.Tensor, got list; convert it with torch.as_tensor"),
    ("true labels in floating point", lambda: ConfusionMatrix(3).update(LOGITS, LABELS.float()),
     TypeError, "expected integer labels, got torch.float32; convert them with .long()"),
    ("logits of other classes", lambda: ConfusionMatrix(4).update(LOGITS, LABELS),
     ValueError, "expected logits of shape (N, 4, H, W) and labels (N, H, W), got (2, 3, 4, 5) and (2, 4, 5); pass those of the same pictures and classes"),
    ("true labels with a channel", lambda: ConfusionMatrix(3).update(LOGITS, LABELS[:, None]),
     ValueError, "expected logits of shape (N, 3, H, W) and labels (N, H, W), got (2, 3, 4, 5) and (2, 1, 4, 5); drop the channel with labels.squeeze(1)"),
    ("a mask of fewer pictures", lambda: ConfusionMatrix(3).update(LABELS[:1], LABELS),
     ValueError, "expected a mask of the labels' shape (2, 4, 5), got (1, 4, 5); pass those of the same pictures"),
    ("a true label too large", lambda: ConfusionMatrix(3).update(LOGITS, LABELS + 3),
     ValueError, "expected labels from 0 to 2 or ignore_index=None, got 3; map the mask's values to class indices"),
    ("a true label too large, unsigned", lambda: ConfusionMatrix(2).update(LABELS, (LABELS + 7).to(torch.uint16)),
     ValueError, "expected labels from 0 to 1 or ignore_index=None, got 7; map the mask's values to class indices"),
    ("a predicted label below zero", lambda: ConfusionMatrix(3).update(LABELS - 1, LABELS),
     ValueError, "expected classes from 0 to 2 in the mask, got -1; map its values to classes"),
    ("true labels elsewhere", lambda: ConfusionMatrix(3).update(LOGITS, LABELS.to("meta")),
     ValueError, "expected labels on cpu, where logits is, got one on meta; move one of them"),
    ("counts of other classes", lambda: ConfusionMatrix(3).load_state_dict(ConfusionMatrix(2).state_dict()),
     ValueError, "expected counts of shape (3, 3), got (2, 2); build the confusion matrix with that number of classes"),
    ("counts as a word", lambda: ConfusionMatrix(3).load_state_dict({"matrix": "x"}),
     TypeError, "expected the counts as a torch.Tensor, got str; convert it with torch.as_tensor"),
    ("labels out of range for soft IoU", lambda: metrics.soft_miou(LOGITS, LABELS + 7),
     ValueError, "expected labels from 0 to 2 or ignore_index=-100, got 7; map the mask's values to class indices"),
    ("no smoothing of soft IoU", lambda: metrics.soft_miou(LOGITS, LABELS, None),
     TypeError, "expected smooth as a number, got None; pass an int or a float"),
    ("Dice of an array", lambda: dice_coeff(LOGITS.numpy(), LOGITS),
     TypeError, "expected input as a torch.Tensor, got ndarray; convert it with torch.as_tensor"),
    ("Dice of other pictures", lambda: dice_coeff(LOGITS, LOGITS[:1]),
     ValueError, "expected input and target of one shape (…, H, W), got (2, 3, 4, 5) and (1, 3, 4, 5); pass those of the same pictures"),
    ("Dice of a batch with channels", lambda: dice_coeff(LOGITS, LOGITS, True),
     ValueError, "expected (N, H, W) with reduce_batch_first=True, got (2, 3, 4, 5); drop the channel with squeeze(1)"),
    ("Dice of a mask elsewhere", lambda: dice_coeff(LOGITS, LOGITS.to("meta")),
     ValueError, "expected input and target on one device, got cpu and meta; move one"),
    ("epsilon as a letter", lambda: dice_coeff(LOGITS, LOGITS, epsilon="a"),
     TypeError, "expected epsilon as a number, got 'a'; pass an int or a float"),
    ("Dice of an unknown version", lambda: multiclass_dice_coeff(LOGITS, LOGITS, version=1),
     ValueError, "expected version 2, 3 or 4 of Pytorch-UNet, got 1; leave it out for 4"),
    ("Dice of masks without channels", lambda: multiclass_dice_coeff(LABELS, LABELS),
     ValueError, "expected input and target of one shape (N, C, H, W), got (2, 4, 5) and (2, 4, 5); pass probabilities and one-hot masks"),
]
# fmt: on

# ---- data, training and the command line -----------------------------------------------------------------------------

# fmt: off
DATA: list[Row] = [
    ("nothing to train on", lambda: training.fit(unet(), [], DiceLoss(), torch.optim.SGD(unet().parameters(), 0.1)),
     training.TrainingError, "there is no batch to train on: give at least one"),
    ("a loss that is none", lambda: training.fit(unet(), [], "dice", torch.optim.SGD(unet().parameters(), 0.1)),
     TypeError, "expected a loss to call, got 'dice'; pass one of fastunet.losses"),
    ("a report every 0 steps", lambda: training.fit(unet(), [], DiceLoss(), torch.optim.SGD(unet().parameters(), 0.1), report_every=0),
     ValueError, "expected report_every of at least 1, got 0; pass 1 or more"),
    ("no generated pictures", lambda: data.generated(0),
     ValueError, "expected count of at least 1, got 0; pass 1 or more"),
    ("tiny generated pictures", lambda: data.generated(1, 8),
     ValueError, "expected size of at least 16, got 8; pass 16 or more"),
    ("a picture that is not there", lambda: data.generated(2, 32)[5],
     IndexError, "expected an index up to 1, got 5; there are 2 pictures"),
    ("crops of no size", lambda: next(data.random_crops(data.generated(1, 32), 0, 1, np.random.default_rng(0))),
     ValueError, "expected size of at least 1, got 0; pass 1 or more"),
    ("a folder that is not there", lambda: data.open_folders("nowhere", "."),
     data.DataError, "--images nowhere does not exist: give the folder that holds the pictures"),
    ("images without masks", lambda: demo("--images", "photos"),
     UserError, "--images and --masks belong together: give both, or neither for the generated set"),
    ("an option's folder that is not there", lambda: demo("--images", "nowhere", "--masks", "."),
     UserError, "--images nowhere does not exist: give the folder that holds the pictures"),
    ("no steps", lambda: command("demo", "--steps", 0),
     UserError, "argument --steps: expected a whole number of at least 1, got 0"),
    ("many steps", lambda: command("demo", "--steps", "many"),
     UserError, "argument --steps: expected a whole number of at least 1, got many"),
    ("a small crop", lambda: command("demo", "--crop", 16),
     UserError, "argument --crop: expected a whole number of at least 32, got 16"),
    ("half a batch", lambda: command("demo", "--batch-size", 1.5),
     UserError, "argument --batch-size: expected a whole number of at least 1, got 1.5"),
    ("all held out", lambda: command("demo", "--holdout", 1),
     UserError, "argument --holdout: expected a number between 0 and 1, got 1"),
    ("nan held out", lambda: command("demo", "--holdout", "nan"),
     UserError, "argument --holdout: expected a number between 0 and 1, got nan"),
    ("a negative rate", lambda: command("demo", "--lr", -1),
     UserError, "argument --lr: expected a number between 0 and 1, got -1"),
    ("an infinite rate", lambda: command("demo", "--lr", "inf"),
     UserError, "argument --lr: expected a number between 0 and 1, got inf"),
    ("a negative seed", lambda: command("demo", "--seed", -1),
     UserError, "argument --seed: expected a whole number of at least 0, got -1"),
    ("an unknown device", lambda: demo("--device", "toaster"),
     UserError, "--device toaster is not available here: take cpu or a device that 'fastunet info' lists"),
    ("a device that is not here", lambda: demo("--device", "cuda:99"),
     UserError, "--device cuda:99 is not available here: take cpu or a device that 'fastunet info' lists"),
    ("an output in no folder", lambda: demo("--output", "no/where.png"),
     UserError, "--output no/where.png cannot be written: no is not a folder, create it first"),
    ("an output among the pictures", lambda: (Path("photos").mkdir(), demo("--images", "photos", "--masks", "photos", "--output", "photos/out.png")),
     UserError, "--output photos/out.png would lie among the pictures that are read: name another folder"),
    ("an output that is no picture", lambda: demo("--output", "out.xyz"),
     UserError, "--output out.xyz is not the name of a picture: give one that ends in .png"),
    ("an output that is a folder", lambda: demo("--output", "."),
     UserError, "--output . is not the name of a picture: give one that ends in .png"),
]
# fmt: on

# ---- pictures --------------------------------------------------------------------------------------------------------

# fmt: off
PICTURES: list[Row] = [
    ("the images' folder is gone", lambda folder: opened(folder, (folder / "images").rename(folder / "moved")),
     data.DataError, "--images <folder>/images does not exist: give the folder that holds the pictures"),
    ("a file in a folder's place", lambda folder: opened(folder, shutil.rmtree(folder / "masks"), (folder / "masks").touch()),
     data.DataError, "--masks <folder>/masks is a file: give the folder that holds the pictures"),
    ("an empty folder", lambda folder: opened(folder, [path.unlink() for path in (folder / "images").iterdir()]),
     data.DataError, "--images <folder>/images holds no pictures: expected files of type png, jpg, jpeg, bmp, tif, tiff, gif, webp, pgm, ppm in the folder itself"),
    ("an image without a mask", lambda folder: opened(folder, (folder / "masks" / "b.png").unlink()),
     data.DataError, "<folder>/images/b.png has no mask in <folder>/masks: expected b, b_mask or b_GT with a picture suffix; add it or take the image away"),
    ("a mask without an image", lambda folder: opened(folder, (folder / "images" / "b.png").unlink()),
     data.DataError, "mask <folder>/masks/b.png has no image in <folder>/images: add the image or take the mask away"),
    ("two masks of an image", lambda folder: opened(folder, write(folder / "masks" / "a_GT.png", stripes(0, 255))),
     data.DataError, "<folder>/images/a.png has several masks in <folder>/masks, a.png and a_GT.png: keep one of them"),
    ("two images of a mask", lambda folder: opened(folder, write(folder / "images" / "a.gif", NOISE)),
     data.DataError, "<folder>/images/a.gif and a.png would share a mask by their name: rename one"),
    ("half a file", lambda folder: opened(folder, truncate(folder / "images" / "a.png")),
     data.DataError, "cannot read <folder>/images/a.png (damaged, or not a picture): replace it, or take it and its partner away"),
    ("text as a picture", lambda folder: opened(folder, (folder / "masks" / "a.png").write_text("no picture")),
     data.DataError, "cannot read <folder>/masks/a.png (damaged, or not a picture): replace it, or take it and its partner away"),
    ("several pages", lambda folder: opened(folder, Image.fromarray(NOISE).save(folder / "images" / "a.png", save_all=True, append_images=[Image.fromarray(NOISE + 1)])),
     data.DataError, "<folder>/images/a.png holds 2 pictures: save each one as a file of its own"),
    ("nan in a picture", lambda folder: opened(folder, other(folder / "images", "a.tif", np.full(NOISE.shape, np.nan, np.float32))),
     data.DataError, "<folder>/images/a.tif holds NaN or infinite pixels: replace them"),
    ("a mask of another size, in a file", lambda folder: opened(folder, write(folder / "masks" / "a.png", stripes(0, 1, size=(24, 22)))),
     data.DataError, "<folder>/images/a.png is 24×20 but its mask <folder>/masks/a.png is 24×22: bring both to one size"),
    ("a tiny picture", lambda folder: opened(folder, [write(folder / kind / "a.png", stripes(0, 1, size=(24, 15))) for kind in ("images", "masks")]),
     data.DataError, "<folder>/images/a.png is 24×15, smaller than 16×16: take it away"),
    ("masks of one class", lambda folder: opened(folder, [write(folder / "masks" / f"{name}.png", stripes(255)) for name in "ab"]),
     data.DataError, "all masks hold only value 255: segmentation needs at least two classes, check --masks"),
    ("a mask of many values", lambda folder: opened(folder, write(folder / "masks" / "b.png", NOISE)),
     data.DataError, "the masks hold more than 64 different values (counted up to <folder>/masks/b.png): expected one value per class, not numbered objects or soft edges"),
    ("a mask as a JPEG", lambda folder: opened(folder, other(folder / "masks", "a.jpg", stripes(0, 99, 255))),
     data.DataError, "mask <folder>/masks/a.jpg is a JPEG, which blurs the 3 class values in it: save masks as PNG"),
    ("a mask blurred and saved again", lambda folder: opened(folder, write(folder / "masks" / "a.png", stripes(*[0] * 12, 1, 2, 254, *[255] * 9))),
     data.DataError, "mask <folder>/masks/a.png holds 5 values, some of few pixels and nearly equal to others, as value 254: save the original again without a lossy format, or list its classes in a table"),
    ("grey numbers beside colours", lambda folder: opened(folder, write(folder / "masks" / "a.png", stripes(0, 1)), write(folder / "masks" / "b.png", stripes((200, 0, 0), (0, 0, 200)))),
     data.DataError, "mask <folder>/masks/a.png holds the grey value 1 while other masks hold colours: save all in one way"),
    ("a colour that no table has", lambda folder: data.open_dataset(folder / "images", folder / "masks", layout="msrc"),
     data.DataError, "mask <folder>/masks/a.png holds colour 255,255,255, which is not in MSRC-v2's table: add it there, or as ignore if such pixels do not count"),
    ("a picture turned half round", lambda folder: opened(folder, Image.fromarray(NOISE).save(folder / "images" / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03" + bytes(6))),
     data.DataError, "<folder>/images/a.png is turned or mirrored where it is shown, EXIF orientation 3, and whether <folder>/masks/a.png already is cannot be seen: save both as they are shown"),
    ("a picture of 2³⁰ pixels", lambda folder: opened(folder, (folder / "images" / "a.png").unlink(), (folder / "images" / "a.pgm").write_bytes(b"P5 32768 32768 255 ")),
     data.DataError, "<folder>/images/a.pgm has 32768×32768 pixels by its header, of at most 67,108,864: cut it into smaller pictures"),
    ("a layout of another", lambda folder: data.open_dataset(folder, layout="coco"),
     data.DataError, "layout 'coco' is unknown: take one of folders, voc, msrc, cells"),
    ("one picture to split", lambda folder: data.open_dataset(folder / "images", folder / "masks").select([0]).split(0.2, np.random.default_rng(0)),
     data.DataError, "a.png is the only picture, and none is left to hold out: add a second one"),
    ("a table of one line", lambda folder: (write_text(folder / "t.txt", "1, sky"), data.open_dataset(folder / "images", folder / "masks", table=folder / "t.txt")),
     data.DataError, "<folder>/t.txt has 1 classes: expected 2 to 255, one a line"),
    ("a picture as a checkpoint", lambda folder: fastunet.load_checkpoint(folder / "images" / "a.png"),
     CheckpointError, "cannot read <folder>/images/a.png (damaged, or not a checkpoint): replace it"),
    ("a checkpoint of lines", lambda folder: (torch.save(nn.Linear(2, 3).state_dict(), folder / "line.pth"), fastunet.load_checkpoint(folder / "line.pth")),
     CheckpointError, "<folder>/line.pth holds no U-Net that is known here, its keys begin with 'weight', 'bias': construct the network yourself and call its load_state_dict"),
    ("a checkpoint in no folder", lambda folder: fastunet.save_checkpoint(folder / "no" / "a.pth", unet()),
     UserError, "<folder>/no/a.pth cannot be written (No such file or directory): choose another place for the checkpoint"),
    ("wide masks beside colours", lambda folder: opened(folder, write(folder / "masks" / "a.png", NOISE.astype(np.uint16) * 16), write(folder / "masks" / "b.png", stripes((200, 0, 0), (0, 0, 200)))),
     data.DataError, "mask <folder>/masks/a.png holds wide numbers while other masks hold colours: save all in one way"),
    ("fractions in a mask", lambda folder: opened(folder, other(folder / "masks", "a.tif", stripes(0, 1) / np.float32(2))),
     data.DataError, "mask <folder>/masks/a.tif holds fractions: expected one whole number per class"),
]
# fmt: on

# ---- commands that train and use a network ---------------------------------------------------------------------------


def train(folder: Path, *arguments: object) -> None:
    command("train", folder / "images", folder / "masks", "-o", folder / "run", "--base-c", 1, *arguments)


def diverged() -> nn.Module:
    """A network with a weight that is NaN."""
    model = fastunet.UNet(1, 2, base_c=1)
    nn.init.constant_(model.outc.conv.bias, math.nan)
    return model


def used(name: str, folder: Path, *arguments: object) -> None:
    """A command with a checkpoint of a grey U-Net of two classes, 0 and 255."""
    fastunet.save_checkpoint(folder / "m.pth", fastunet.UNet(1, 2, base_c=1), mask_values=[0, 255])
    command(name, *arguments, "-m", folder / "m.pth")


def predict(folder: Path, *arguments: object) -> None:
    used("predict", folder, "-i", folder / "images", *arguments)


def evaluate(folder: Path, *arguments: object) -> None:
    used("evaluate", folder, folder / "images", folder / "masks", *arguments)


# fmt: off
COMMANDS: list[Row] = [
    ("pictures that are too small to train on", lambda folder: train(folder),
     UserError, "b.png is 12×10 for the network, smaller than 32×32: give a larger --scale, or --crop, which mirrors"),
    ("a crop of what is too small", lambda folder: train(folder, "--recipe", "seed002"),
     UserError, "no picture is as large as a crop of 192×192: give a smaller --crop"),
    ("one class of two", lambda folder: train(folder, "--crop", 32, "-c", [write(folder / "masks" / "a.png", stripes(0, 9, 255)), 1][1]),
     UserError, "--classes 1 is not what the masks hold, 3: leave it out, or name classes by --table"),
    ("crops of colours", lambda folder: train(folder, "--recipe", "seed000", "--crop", 32),
     UserError, "--crop does not go with --recipe seed000, which learns the colours of whole pictures: leave it out"),
    ("nothing to learn from", lambda folder: train(folder, "--crop", 32, "--ignore", [write(folder / "masks" / "b.png", stripes(9)), 9][1]),
     UserError, "no pixel counts in the masks that would be learnt: hold out less, or others by --seed"),
    ("nothing to score by", lambda folder: train(folder, "--crop", 32, "--ignore", [write(folder / "masks" / "a.png", stripes(9)), 9][1]),
     UserError, "no pixel counts in the mask of a.png, held out: hold out more by --validation, or others by --seed"),
    ("shares with a scale", lambda folder: train(folder, "--fsdp", "--precision", "fp16"),
     UserError, "--fsdp does not go with --precision fp16, whose scale is of all gradients: take bf16"),
    ("shares of one process", lambda folder: train(folder, "--fsdp"),
     UserError, "--fsdp shares the weights among processes, and there is one: start several by torchrun"),
    ("no run to resume", lambda folder: train(folder, "--resume"),
     UserError, "--resume found no <folder>/run/last.pth: give the --output of the run to go on with"),
    ("weights in place of a run", lambda folder: train(folder, [(folder / "run").mkdir(), fastunet.save_checkpoint(folder / "run" / "last.pth", unet()), "--resume"][2]),
     UserError, "<folder>/run/last.pth holds no run that can be resumed: begin one from its weights with --load <folder>/run/last.pth"),
    ("a run that is there already", lambda folder: train(folder, [(folder / "run").mkdir(), (folder / "run" / "last.pth").touch(), "-e"][2], 1),
     UserError, "<folder>/run/last.pth is there already: go on with --resume, or give another --output"),
    ("a run in a file", lambda folder: train(folder, "--crop", 32, "-o", folder / "images" / "a.png"),
     UserError, "--output <folder>/images/a.png cannot be written (File exists): choose another folder"),
    ("a run in no folder", lambda folder: train(folder, "-o", folder / "no" / "run"),
     UserError, "--output <folder>/no/run cannot be made: <folder>/no is not a folder, create it first"),
    ("weights of another network", lambda folder: train(folder, "--crop", 32, "-f", [fastunet.save_checkpoint(folder / "m.pth", fastunet.UNet(1, 2, base_c=2)), folder / "m.pth"][1]),
     UserError, "--load <folder>/m.pth does not fit: expected the state_dict of UNet(1, 2, base_c=1), got that of another network; this checkpoint is transposed: UNet(1, 2, base_c=2)"),
    ("a percentage of all", lambda folder: train(folder, "-v", 100),
     UserError, "argument -v/--validation: expected a number between 0 and 100, got 100"),
    ("a scale of nothing", lambda folder: train(folder, "-s", 0),
     UserError, "argument -s/--scale: expected a number above 0 and up to 1, got 0"),
    ("a picture that is listed twice", lambda folder: train(folder, "--split", [(folder / "list.txt").write_text("a\nb\na.png\n"), folder / "list.txt"][1]),
     UserError, "<folder>/list.txt lists a.png twice: list each picture once"),
    ("a rate of nan", lambda folder: train(folder, "-l", "nan"),
     UserError, "argument -l/--learning-rate/--lr: expected a number above 0 and below 3.4e38, got nan"),
    ("a rate that float32 does not hold", lambda folder: train(folder, "-l", "1e39"),
     UserError, "argument -l/--learning-rate/--lr: expected a number above 0 and below 3.4e38, got 1e39"),
    ("a seed of more than 64 bits", lambda folder: train(folder, "--seed", 1 << 64),
     UserError, f"argument --seed: expected a whole number of at most {(1 << 63) - 1}, got {1 << 64}"),
    ("crops beyond all pictures", lambda folder: train(folder, "--crop", 8193),
     UserError, "argument --crop: expected a whole number of at most 8192, got 8193"),
    ("a device without memory", lambda folder: train(folder, "--device", "meta"),
     UserError, "--device meta is not available here: take cpu or a device that 'fastunet info' lists"),
    ("a run of nothing", lambda folder: train(folder, [(folder / "run").mkdir(), fastunet.save_checkpoint(folder / "run" / "last.pth", unet(), run={}, settings={}), "--resume"][2]),
     UserError, "<folder>/run/last.pth holds no run that can be resumed: begin one from its weights with --load <folder>/run/last.pth"),
    ("a value of a mask to ignore", lambda folder: train(folder, "--ignore", "1,2"),
     UserError, "argument --ignore: expected a number or a colour r,g,b, got 1,2"),
    ("no checkpoint", lambda folder: command("predict", "-i", folder / "images", "-m", folder / "m.pth"),
     UserError, "cannot read <folder>/m.pth (No such file or directory): give a checkpoint"),
    ("pictures of no name", lambda folder: predict(folder, "-i", folder / "*.jpg"),
     UserError, "--input <folder>/*.jpg is no picture and holds none: give files, folders or patterns"),
    ("fewer outputs than pictures", lambda folder: predict(folder, "-o", folder / "x.png"),
     UserError, "--output names 1 files for 2 pictures: name as many, or a folder"),
    ("probabilities in a picture", lambda folder: predict(folder, "--kind", "probability", "-o", folder / "x.png", folder / "y.png"),
     UserError, "--output <folder>/x.png is not the name of a file of --kind probability: let it end in .npy"),
    ("one output for two pictures", lambda folder: predict(folder, "-o", folder / "x.png", folder / "x.png"),
     UserError, "two pictures would be written to <folder>/x.png: give --output a name for each"),
    ("a picture as an output", lambda folder: predict(folder, "-o", folder / "images" / "a.png", folder / "x.png"),
     UserError, "--output <folder>/images/a.png is one of the pictures: give another name"),
    ("an output in no folder, of two", lambda folder: predict(folder, "-o", folder / "no" / "a.png", folder / "x.png"),
     UserError, "--output <folder>/no/a.png cannot be written: <folder>/no is not a folder, create it first"),
    ("a picture as an overlay", lambda folder: predict(folder, "-v", "-i", folder / "images" / "a.png", [write(folder / "images" / "a_OVERLAY.png", stripes(0)), folder / "images" / "a_OVERLAY.png"][1]),
     UserError, "--output <folder>/images/a_OVERLAY.png is one of the pictures: give another name"),
    ("a link to a picture that is gone", lambda folder: predict(folder, [(folder / "images" / "c.png").symlink_to("gone.png"), "-v"][1]),
     UserError, "cannot read <folder>/images/c.png (No such file or directory): replace it, or take it and its partner away"),
    ("weights of a training that diverged", lambda folder: command("predict", "-i", folder / "images", "-m", [fastunet.save_checkpoint(folder / "m.pth", diverged()), folder / "m.pth"][1]),
     UserError, "<folder>/m.pth holds weights that are NaN or infinite: take one from before training diverged"),
    ("another number of classes than the checkpoint's", lambda folder: predict(folder, "-c", 3),
     UserError, "--classes 3 is not what <folder>/m.pth has, 2: leave it out"),
    ("a checkpoint that is not bilinear", lambda folder: predict(folder, "--bilinear"),
     UserError, "--bilinear is not what <folder>/m.pth is, whose upsampling is learnt: leave it out"),
    ("tiles of 100 pixels", lambda folder: predict(folder, "--tile", 100),
     UserError, "a tile of 100 pixels with an overlap of 256 cannot be laid: give a --tile that is a multiple of 16, and an --overlap that is one of 32 and at most half a tile"),
    ("a picture in colour", lambda folder: predict(folder, "-i", [write(folder / "c.png", np.random.default_rng(0).integers(0, 9, (20, 24, 3), np.uint8)), folder / "c.png"][1]),
     UserError, "<folder>/c.png has 3 channels and the network takes 1: convert it"),
    ("words as an array", lambda folder: predict(folder, "-i", [np.save(folder / "w.npy", np.array(["a"])), folder / "w.npy"][1]),
     UserError, "<folder>/w.npy holds <U1 (1,): save numbers as (C, H, W)"),
    ("an array with NaN", lambda folder: predict(folder, "-i", [np.save(folder / "w.npy", np.full((20, 24), np.nan)), folder / "w.npy"][1]),
     UserError, "<folder>/w.npy holds NaN or infinite pixels: replace them"),
    ("an array in which nothing was measured", lambda folder: predict(folder, "-i", [np.save(folder / "w.npy", np.full((20, 24), -3.4028235e38, np.float32)), folder / "w.npy"][1]),
     UserError, "<folder>/w.npy holds pixels of -3.4e+38, as if nothing was measured there: replace them"),
    ("an unknown value of masks", lambda folder: evaluate(folder, [write(folder / "masks" / "a.png", stripes(0, 77)), "--tta"][1]),
     UserError, "the masks hold 77, which the network was not trained on: it knows 0, 255; take masks of the same kind"),
    ("an unknown kind of program", lambda folder: used("export", folder, "-o", folder / "m.xyz"),
     UserError, "--output <folder>/m.xyz is no kind of program: let it end in .onnx or .pt2"),
    ("a program in no folder", lambda folder: used("export", folder, "-o", folder / "no" / "m.onnx"),
     UserError, "--output <folder>/no/m.onnx cannot be written: <folder>/no is not a folder, create it first"),
]
# fmt: on

# ---- accelerate --------------------------------------------------------------------------------------------------------


def conv(*others: nn.Module) -> nn.Module:
    """Somebody's network of one convolution, and others."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *others)


class Asking(nn.Module):
    """A network that asks a tensor for its value, which no graph has."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.jit.script(conv())


def wrapped() -> Any:
    return nn.DataParallel(conv())


def patched() -> Any:
    model = conv()
    model.forward = lambda x: x
    return model


def sharded() -> Any:
    """FSDP2 gives a module's class a mixin of this module's."""
    model = conv()
    model.__class__ = type("FSDPSequential", (FSDPModule, nn.Sequential), {})
    return model


accelerate = fastunet.accelerate
# fmt: off
ACCELERATE: list[Row] = [
    ("a function to accelerate", lambda: accelerate("UNet"),
     TypeError, "expected model as an nn.Module, got 'UNet'; pass the network itself"),
    ("nothing to fuse", lambda: accelerate(nn.Sequential(nn.Flatten(), nn.Linear(4, 4))),
     ValueError, "expected a model with 2-D convolutions, got Sequential with nothing to fuse; leave it as it is"),
    ("no convolution of a kind that is served", lambda: accelerate(nn.Sequential(nn.Conv2d(3, 4, 7, padding=3))),
     ValueError, "expected a model with convolutions that fastunet can run, got Sequential: nothing to fuse; leave it as it is"),
    ("a network of volumes", lambda: accelerate(conv(nn.Conv3d(3, 4, 3))),
     ValueError, "expected a network of pictures, got Sequential with a Conv3d (1); leave it: fastunet has no operators for volumes"),
    ("two devices", lambda: accelerate(conv(nn.BatchNorm2d(4).to("meta"))),
     ValueError, "expected a model on one device, got Sequential on cpu and meta; move it with .to()"),
    ("a scripted model", lambda: accelerate(scripted()),
     TypeError, "expected a model in Python, got RecursiveScriptModule, which is scripted; accelerate the one it was made of"),
    ("a quantised model", lambda: accelerate(conv(torch.ao.nn.quantized.ReLU6())),
     TypeError, "expected a model in floating point, got Sequential with quantised modules; pass the original"),
    ("a compiled model", lambda: accelerate(torch.compile(conv())),
     TypeError, "expected a model that is not compiled, got OptimizedModule; pass model._orig_mod"),
    ("a sharded model", lambda: accelerate(sharded()),
     TypeError, "expected a model with whole parameters, got FSDPSequential sharded by FSDP; accelerate it before DDP"),
    ("a wrapped model", lambda: accelerate(wrapped()),
     TypeError, "expected the model itself, got DataParallel around it; pass model.module"),
    ("a patched model", lambda: accelerate(patched()),
     TypeError, "expected a model whose forward is its class's, got Sequential with one of its own; remove it"),
    ("a network of fastunet's", lambda: accelerate(unet()),
     TypeError, "expected somebody else's network, got UNet, which runs by fastunet's operators already; leave it as it is"),
    ("an example that is no tensor", lambda: accelerate(conv(), [1, 2]),
     TypeError, "expected example_input as a tensor or a tuple of the model's inputs, got [1, 2]; convert it"),
    ("what cannot be traced", lambda: accelerate(conv(Asking()), torch.zeros(2, 3, 8, 8)),
     ValueError, "expected a model that torch.export can trace, got Sequential, of which it says: <why>; pass an example_input of a size that it takes, or leave the model as it is"),
    ("a backend to accelerate with", lambda: accelerate(conv(), backend="cuda"),
     ValueError, "expected backend to be one of auto, torch, triton, got 'cuda'; check FASTUNET_BACKEND too"),
    ("restore of another model", lambda: fastunet.restore(conv()),
     ValueError, "expected a model that fastunet.accelerate returned, got Sequential; pass that one"),
]
# fmt: on


# ---- the rule ----------------------------------------------------------------------------------------------------

TABLE = [
    *NETWORKS, *BLOCKS, *CONSTRUCTORS, *ACCELERATE, *FUNCTIONAL, *LOSSES, *METRICS, *DATA, *PICTURES, *COMMANDS,
]  # fmt: skip

# What was expected, what came, what to do. A user's files and options are named first: what came, what to do.
LIBRARY = re.compile(r"expected (?P<expected>.+?), got (?P<came>.+); (?P<advice>.+)")
FILES = re.compile(r"(?P<came>.+?): (?P<advice>.+)")
INNER = (
    "Traceback",
    'File "',
    "object at 0x",
    "::",
    "Declaration",
    "INTERNAL",
    "invalid combination",
    "torch.Size",
    "\\n",
)


def problem(sentence: str, kind: type[BaseException]) -> str | None:
    """Why ``sentence`` is not one that says what was expected, what came and what to do; None if it is."""
    if sentence != sentence.strip() or len(sentence.splitlines()) != 1:
        return "more than a line"
    if re.search(r"[.!?]\s+[A-Z]", sentence) or sentence.endswith((".", "!", "?")):
        return "more than a sentence"
    if leftover := next((text for text in INNER if text in sentence), None):
        return f"{leftover} is of an inner error"
    rule = FILES if issubclass(kind, UserError) else LIBRARY
    found = rule.fullmatch(sentence)
    if found is None:
        return "not: what was expected, what came, what to do"
    if re.match(r"(None|others?|something|it)?$", found["came"]) and "None" not in sentence:
        return "does not name what came"
    return None


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and operators of ATen: the interpreter would take minutes."""
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def as_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a GPU where nobody chose a backend."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("FASTUNET_BACKEND")
    triton_unavailable.cache_clear()
    yield
    triton_unavailable.cache_clear()


def refuse(row: Row, tmp_path: Path) -> None:
    what, call, kind, sentence = row
    needs_folder = bool(inspect.signature(call).parameters)
    with pytest.raises(kind) as caught:
        call(good(tmp_path)) if needs_folder else call()
    assert type(caught.value) is kind, what
    said = str(caught.value).replace(str(tmp_path), "<folder>")
    said = re.sub(r"of which it says: [^;]*;", "of which it says: <why>;", said)  # in PyTorch's words
    assert said == sentence
    assert problem(said, kind) is None


def named(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row[0] for row in rows])


@named(TABLE)
def test_a_wrong_call_is_refused_in_a_sentence(row: Row, tmp_path: Path) -> None:
    refuse(row, tmp_path)


@named(NETWORKS)
def test_networks_run_as_modules_refuse_alike(row: Row, tmp_path: Path, as_modules: None) -> None:
    refuse(row, tmp_path)


@pytest.mark.parametrize(
    "network",
    [
        lambda: fastunet.StridedUNet(3, 2, base_c=2),
        lambda: fastunet.PlainUNet(3, 2, init_features=2),
        lambda: fastunet.BrainUNet(3, 2, init_features=2),
    ],
    ids=["StridedUNet", "PlainUNet", "BrainUNet"],
)
def test_every_network_refuses_at_its_door(network: Callable[[], nn.Module]) -> None:
    """What it is given, in the words of the U-Net's."""
    wrong = [
        None, PICTURE.numpy(), PICTURE[0], PICTURE[None], PICTURE[:, :1], PICTURE.byte(), PICTURE.to(torch.complex64),
        PICTURE[..., :15, :], PICTURE[..., :8], PICTURE.to("meta"), PICTURE.to_sparse(),
    ]  # fmt: skip
    for x in wrong:
        told = []
        for model in (network(), unet()):
            with pytest.raises((TypeError, ValueError)) as caught:
                model(x)
            told.append((type(caught.value), str(caught.value)))
        assert told[0] == told[1]


def test_the_table_covers_the_surface() -> None:
    """Every public class and function is called wrongly somewhere, and no two rows are one call."""
    assert len(TABLE) >= 100
    assert len({row[0] for row in TABLE}) == len(TABLE)
    text = Path(__file__).read_text(encoding="utf-8")
    public = [name for name in fastunet.__all__ if isinstance(getattr(fastunet, name), type)]
    public += [*functional.__all__, *losses.__all__, *metrics.__all__, *cli.COMMANDS]
    aliases = {"miou"}  # soft_miou
    without = {"info", "verify"}  # take no value that could be wrong but --backend's, which argparse refuses
    missing = [name for name in public if not re.search(rf"\b{name}\b\(|\"{name}\"", text)]
    assert set(missing) <= aliases | without


def test_nothing_is_counted_of_a_refused_batch() -> None:
    matrix = ConfusionMatrix(3)
    for prediction, labels in ((LOGITS, LABELS + 3), (LABELS - 1, LABELS), (LABELS, LABELS + 3)):
        with pytest.raises(ValueError, match="expected"):
            matrix.update(prediction, labels)
    assert matrix.matrix.sum() == 0


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("expected a, got b", ValueError),
        ("expected a, got b; do c. Do d", ValueError),
        ("expected a, got b; do c.", ValueError),
        ("expected a, got b;\ndo c", ValueError),
        ("expected a, got <object at 0x7f>; do c", ValueError),
        ("expected a, got something; do c", ValueError),
        ("wrong", UserError),
    ],
)
def test_the_rule_bites(sentence: str, kind: type[Exception]) -> None:
    assert problem(sentence, kind) is not None
