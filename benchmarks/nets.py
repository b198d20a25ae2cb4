"""The networks that are timed: one step of training, inference, or inference with everything folded that can be.

A training step is forward, loss, backward and SGD. The learning rate is 0, which changes the work by nothing and keeps
the weights: every step of every provider computes the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import DTYPES
from benchmarks.nnunet import FastNnUNet, PlainNnUNet, channels_of
from fastunet import reference
from fastunet.losses import DiceCELoss

Loss = Callable[[Tensor, Tensor], Tensor]

CHANNELS = 3


@dataclass(frozen=True)
class Network:
    """A network of :mod:`fastunet` and of :mod:`fastunet.reference`."""

    name: str  # of its class
    base: str  # what its class calls the channels of the first block
    classes: int  # that it usually has
    logits: bool = True  # that it returns; else probabilities
    bilinear: bool = False


NETWORKS = {
    "unet": Network("UNet", "base_c", 2),
    "unet-bilinear": Network("UNet", "base_c", 2, bilinear=True),
    "strided": Network("StridedUNet", "base_c", 3, logits=False),
    "plain": Network("PlainUNet", "init_features", 2),
    "brain": Network("BrainUNet", "init_features", 1, logits=False),
    "nnunet": Network("nnU-Net", "", 2),  # of benchmarks/nnunet.py
}


@dataclass(frozen=True)
class NetCase:
    """One network, batch, dtype and mode. "tf32" and "fp32" are float32 with and without TF32."""

    kind: ClassVar[str] = "net"
    net: str = "unet"
    base: int = 64
    size: int = 512
    batch: int = 8
    dtype: Literal["bf16", "fp16", "tf32", "fp32"] = "bf16"
    mode: Literal["training", "inference", "frozen"] = "training"
    classes: int = 0  # channels of the result; 0: the network's usual number

    @property
    def name(self) -> str:
        """A readable identifier."""
        classes = f"-{self.classes}classes" if self.classes else ""
        return f"{self.net}-base{self.base}-{self.batch}x{self.size}x{self.size}-{self.dtype}-{self.mode}{classes}"

    @property
    def outputs(self) -> int:
        """Channels of the result."""
        return self.classes or NETWORKS[self.net].classes

    @property
    def logits(self) -> bool:
        """Whether the network returns logits; else probabilities."""
        return NETWORKS[self.net].logits

    @property
    def flops(self) -> int:
        """Floating-point operations of the step's matrix products, as PyTorch counts them."""
        return _flops(self)

    @property
    def bytes(self) -> int | None:
        """A network has no one number: what is moved depends on who does it."""
        return None

    def data(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Pictures, and labels: classes for a network that returns logits, else zeros and ones per channel."""
        x = torch.randn((self.batch, CHANNELS, self.size, self.size), device=device)
        if self.logits:
            return x, torch.randint(0, self.outputs, (self.batch, self.size, self.size), device=device)
        return x, torch.randint(0, 2, (self.batch, self.outputs, self.size, self.size), device=device)

    def model(self, package: ModuleType, **settings: str) -> nn.Module:
        """The network of ``package``, which is :mod:`fastunet` or :mod:`fastunet.reference`."""
        network = NETWORKS[self.net]
        if self.net == "nnunet":
            kind: Any = PlainNnUNet if package is reference else FastNnUNet
            return kind(CHANNELS, self.outputs, channels_of(self.base, self.size), **settings)  # type: ignore[no-any-return]
        about = {network.base: self.base, **({"bilinear": True} if network.bilinear else {})}
        model: nn.Module = getattr(package, network.name)(CHANNELS, self.outputs, **about, **settings)
        return model


@functools.cache
def _flops(case: NetCase) -> int:
    with torch.device("meta"):
        model = case.model(reference)
        x, _ = case.data("meta")
        training = case.mode == "training"
        with FlopCounterMode(display=False) as counter, contextlib.nullcontext() if training else torch.no_grad():
            y = model(x)
            if training:
                y.sum().backward()
    return int(counter.get_total_flops())


# ---- losses ------------------------------------------------------------------------------------------------------


def plain_loss(case: NetCase) -> Loss:
    """Dice and cross-entropy by seed 002's formulas; only Dice for a network that returns probabilities."""
    return _scaled(case, plain_dice_ce if case.logits else probability_dice)


def our_loss(case: NetCase, backend: str) -> Loss:
    """The same from one pass over the logits."""
    return _scaled(case, DiceCELoss(backend=backend) if case.logits else probability_dice)


def plain_dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Seed 002's Dice loss, with its one-hot labels, plus cross-entropy, from logits (N, C, H, W) and labels (N, H, W),
    in float32 as under autocast."""
    logits = single(logits)
    return F.cross_entropy(logits, labels) + reference.functional.dice_loss(logits, labels)


def single(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def probability_dice(p: Tensor, y: Tensor) -> Tensor:
    """1 − (2·Σp·y + 1) / (Σp + Σy + 1) of the flattened batch."""
    p = p.float()
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def _scaled(case: NetCase, loss: Loss) -> Loss:
    # float16 gradients of a mean over millions of pixels vanish; this is the factor GradScaler starts with.
    return (lambda y, labels: loss(y, labels) * 65536) if case.dtype == "fp16" else loss


# ---- steps -------------------------------------------------------------------------------------------------------


def training_step(model: nn.Module, forward_loss: Loss, x: Tensor, labels: Tensor) -> Callable[[], list[Tensor]]:
    """One step of ``forward_loss``, which runs ``model``: the loss and the weights' gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        value = forward_loss(x, labels)
        value.backward()
        optimizer.step()
        return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return step


def autocast(case: NetCase, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """AMP in the case's dtype; nothing for float32."""
    lower = DTYPES[case.dtype] != torch.float32
    return torch.autocast(device.type, DTYPES[case.dtype]) if lower else contextlib.nullcontext()


def parts(
    case: NetCase,
    package: ModuleType,
    device: torch.device | str,
    layout: torch.memory_format = torch.channels_last,
    **settings: str,
) -> tuple[nn.Module, Loss, Tensor, Tensor]:
    """(network, loss, pictures, labels) of a step of ``case`` by ``package``, in ``layout``. Convolutions are in the
    case's dtype and norms in float32, as under autocast, which does nothing on the meta device."""
    dtype = DTYPES[case.dtype]
    with torch.device(device):
        model = case.model(package, **settings).train(case.mode == "training")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.to(dtype)
    x, labels = case.data(device)
    loss = plain_loss(case) if package is reference else our_loss(case, settings.get("backend", "auto"))
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    return model, loss, x.to(dtype, memory_format=layout), labels


def folded(model: nn.Module) -> nn.Module:
    """``model`` in eval mode, in place, with every batch norm folded into the convolution before it."""
    model.eval()
    for sequence in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        names = list(sequence._modules)
        for first, second in itertools.pairwise(names):
            layer, norm = sequence._modules[first], sequence._modules[second]
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
                transposed = isinstance(layer, nn.ConvTranspose2d)
                sequence._modules[first] = fuse_conv_bn_eval(layer, norm, transposed)
                sequence._modules[second] = nn.Identity()
    return model


# ---- the cases ---------------------------------------------------------------------------------------------------

_UNETS = ("unet", "unet-bilinear")

# Most important first; from the headline one thing is varied at a time.
HEADLINE = [NetCase(net, mode=mode) for mode in ("training", "inference", "frozen") for net in _UNETS]
HEADLINE += [NetCase("nnunet", base=32, mode=mode) for mode in ("training", "inference")]
CASES = list(
    dict.fromkeys(
        HEADLINE
        + [NetCase(net, batch=1, mode=mode) for mode in ("frozen", "training") for net in _UNETS]
        + [NetCase(net, mode=mode) for net in ("strided", "plain", "brain") for mode in ("training", "frozen")]
        + [NetCase(net, base=32, mode=mode) for mode in ("training", "frozen") for net in _UNETS]
        + [
            NetCase(net, dtype=dtype, mode=mode)
            for dtype in ("fp16", "tf32", "fp32")
            for mode in ("training", "frozen")
            for net in _UNETS
        ]
        + [
            NetCase(net, base=base, size=size, batch=batch, mode=mode)
            for mode in ("training", "frozen", "inference")
            for base in (64, 32)
            for size in (256, 1024, 512)
            for batch in (8, 1, 32)
            for net in _UNETS
        ]
    )
)

# What a CPU times in a few seconds.
SMALL_CASES = [
    NetCase(net, base=8, size=64, batch=1, dtype="fp32", mode=mode)
    for net in _UNETS
    for mode in ("training", "inference", "frozen")
]
