"""nnU-Net's plain 2-D network, in PyTorch's modules and out of this library's blocks, with the same state_dict keys.

Stages of two (3×3 convolution with bias → InstanceNorm with scale and shift → LeakyReLU 0.01); the first convolution of
each stage but the first has stride 2; channels double from stage to stage, up to 512. On the way up a 2×2 transposed
convolution with bias, the concatenation (upsampled, skip), and a stage; a 1×1 convolution to logits, of the last stage
only. Stages go down to 8 pixels, at most seven: 512² has all.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
2021; as its plans make it for pictures of that size.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from fastunet.activation import UNKNOWN, Activation, Context, Next, Placed
from fastunet.blocks import ConvSequence, enlarge, run
from fastunet.models import _LogitNetwork

MOST_CHANNELS, MOST_STAGES, LEAST_SIDE = 512, 7, 8


def channels_of(base: int, size: int) -> list[int]:
    """Of each stage, for pictures of ``size`` × ``size``."""
    stages = max(2, min(MOST_STAGES, size.bit_length() - LEAST_SIDE.bit_length() + 1))
    return [min(base << stage, MOST_CHANNELS) for stage in range(stages)]


def _stage(kind: type[nn.Sequential], in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for given, step in ((in_channels, stride), (out_channels, 1)):
        layers += [
            nn.Conv2d(given, out_channels, 3, step, 1),
            nn.InstanceNorm2d(out_channels, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        ]
    return kind(*layers)


def _fill(model: nn.Module, kind: type[nn.Sequential], n_channels: int, n_classes: int, channels: list[int]) -> None:
    """Give ``model`` its modules, whose stages are of a ``kind``."""
    given = [n_channels, *channels]
    model.encoder = nn.ModuleList(_stage(kind, given[i], filters, 2 if i else 1) for i, filters in enumerate(channels))
    ways = [(below, above) for above, below in itertools.pairwise(channels)][::-1]
    model.ups = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, 2) for below, above in ways)
    model.decoder = nn.ModuleList(_stage(kind, 2 * above, above) for _, above in ways)
    model.head = nn.Conv2d(channels[0], n_classes, 1)


class PlainNnUNet(nn.Module):
    """The network in PyTorch's modules: (N, n_channels, H, W), H and W multiples of all strides → logits."""

    encoder: nn.ModuleList
    ups: nn.ModuleList
    decoder: nn.ModuleList
    head: nn.Conv2d

    def __init__(self, n_channels: int, n_classes: int, channels: list[int]):
        super().__init__()
        _fill(self, nn.Sequential, n_channels, n_classes, channels)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, stage in zip(self.ups, self.decoder, strict=True):
            x = stage(torch.cat([up(x), skips.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


class FastNnUNet(_LogitNetwork):
    """The same, run lazily."""

    encoder: nn.ModuleList
    ups: nn.ModuleList
    decoder: nn.ModuleList
    head: nn.Conv2d

    def __init__(
        self, n_channels: int, n_classes: int, channels: list[int], *, backend: str = "auto", policy: str = "speed"
    ):
        super().__init__(backend, policy, n_channels=n_channels, n_classes=n_classes)
        _fill(self, ConvSequence, n_channels, n_classes, channels)
        self._configure()

    _way_down = ("encoder",)
    _way_out = "head"

    def _body(self, act: Activation, context: Context, head: nn.Conv2d | None) -> Activation:
        skips = []
        for stage in self.encoder:
            act = self._stage(run, stage, Placed.of(act), context=context)
            skips.append(act)
        skips.pop()
        for number, (up, stage) in enumerate(zip(self.ups, self.decoder, strict=True), 1):
            placed = Placed.with_skip(enlarge(up, act, context), skips.pop(), skip_first=False)
            after = Next(head=head) if number == len(self.decoder) else UNKNOWN
            act = run(stage, placed, context, after)
        return act

    @property
    def _head(self) -> nn.Module:
        return self.head
