"""Every architecture fastunet serves, as ordinary ``nn.Module``s: the truth its fast twins are compared with.

All take (N, C, H, W) with H, W ≥ 16 and return (N, classes, H, W). The first block has ``base_c`` (or
``init_features``) channels, and each of the four levels below has twice those of the level above it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


def _conv_bn_relu(
    in_channels: int, out_channels: int, bias: bool = False, norm: str | None = "batch", negative_slope: float = 0.0
) -> list[nn.Module]:
    norms = {
        "batch": nn.BatchNorm2d(out_channels),
        "instance": nn.InstanceNorm2d(out_channels, affine=True),
        "group": nn.GroupNorm(math.gcd(8, out_channels), out_channels),
        None: nn.Identity(),
    }
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias or norm is None),
        norms[norm],
        nn.LeakyReLU(negative_slope, inplace=True) if negative_slope else nn.ReLU(inplace=True),
    ]


# ---- the U-Net of milesial/Pytorch-UNet, and of seeds 001, 002 and 003 -------------------------------------------


class DoubleConv(nn.Module):
    """(3×3 convolution → norm → ReLU) twice; the first has ``mid_channels`` filters (default out_channels).

    ``settings``: bias, norm and negative_slope, as of :class:`UNet`.
    """

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int | None = None, **settings: Any):
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.double_conv = nn.Sequential(
            *_conv_bn_relu(in_channels, mid_channels, **settings),
            *_conv_bn_relu(mid_channels, out_channels, **settings),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.double_conv(x)
        return out


class Down(nn.Module):
    """2×2 max-pool, then :class:`DoubleConv`."""

    def __init__(self, in_channels: int, out_channels: int, **settings: Any):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels, **settings))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.maxpool_conv(x)
        return out


def _centre(x: Tensor, skip: Tensor) -> Tensor:
    """x in the middle of skip's size, padded with zeros or cropped; an odd difference leaves more below and right."""
    rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
    return F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


class Up(nn.Module):
    """Twice the size, centred in the skip connection's size, concatenated as (skip, upsampled), then DoubleConv.

    ``in_channels`` counts the concatenation. The upsampling is bilinear (aligned corners) or nearest, which keep the
    channels, or a transposed convolution that halves them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bilinear: bool = True,
        *,
        upsample: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        half = in_channels // 2
        upsample = upsample or ("bilinear" if bilinear else "transposed")
        self.up: nn.Module
        if upsample == "bilinear":
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels, out_channels, half, **settings)
        elif upsample == "nearest":
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
            self.conv = DoubleConv(in_channels, out_channels, half, **settings)
        else:
            self.up = nn.ConvTranspose2d(in_channels, half, 2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels, **settings)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([skip, _centre(self.up(x), skip)], 1))
        return out


class OutConv(nn.Module):
    """1×1 convolution to one logit per class."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class UNet(nn.Module):
    """The U-Net with the attributes, key names and shapes of milesial/Pytorch-UNet; returns logits.

    Also the network of seed 002, and of seed 003 with its two slips repaired: there the second batch norm of a
    DoubleConv counts the middle channels, and the last Up of the bilinear form gives half the channels its head
    takes; either stops the bilinear form from running, and neither touches the transposed one.

    Args:
        n_channels: channels of the picture.
        n_classes: channels of the logits.
        bilinear: upsample bilinearly instead of by transposed convolutions.
        base_c: channels of the first block.
        conv_bias: give the 3×3 convolutions a bias, as the first two published bilinear checkpoints have.
        norm: "batch", "instance" (affine) or "group" (of eight groups, or as many as divide the channels); None: none,
            and the convolutions have a bias.
        negative_slope: below zero, of a leaky ReLU.
        upsample: "transposed", "bilinear" or "nearest"; None: as ``bilinear`` says.
    """

    def __init__(
        self,
        n_channels: int,
        n_classes: int,
        bilinear: bool = False,
        base_c: int = 64,
        *,
        conv_bias: bool = False,
        norm: str | None = "batch",
        negative_slope: float = 0.0,
        upsample: str | None = None,
    ):
        super().__init__()
        self.n_channels = n_channels
        self.n_classes = n_classes
        upsample = upsample or ("bilinear" if bilinear else "transposed")
        self.bilinear = upsample == "bilinear"
        settings: dict[str, Any] = {"bias": conv_bias, "norm": norm, "negative_slope": negative_slope}
        c, factor = base_c, 1 if upsample == "transposed" else 2
        self.inc = DoubleConv(n_channels, c, **settings)
        self.down1 = Down(c, 2 * c, **settings)
        self.down2 = Down(2 * c, 4 * c, **settings)
        self.down3 = Down(4 * c, 8 * c, **settings)
        self.down4 = Down(8 * c, 16 * c // factor, **settings)
        self.up1 = Up(16 * c, 8 * c // factor, upsample=upsample, **settings)
        self.up2 = Up(8 * c, 4 * c // factor, upsample=upsample, **settings)
        self.up3 = Up(4 * c, 2 * c // factor, upsample=upsample, **settings)
        self.up4 = Up(2 * c, c, upsample=upsample, **settings)
        self.outc = OutConv(c, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(self.down4(x4), x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        logits: Tensor = self.outc(x)
        return logits


class _Down001(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.down = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(x)
        return out


class _OutConv001(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.co = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.co(x)
        return out


class UNet001(nn.Module):
    """Seed 001's U-Net: the function of :class:`UNet` under other key names (see :func:`rename_keys`)."""

    def __init__(self, num_classes: int, bilinear: bool = False, *, n_channels: int = 3, base_c: int = 64):
        super().__init__()
        c, factor = base_c, 2 if bilinear else 1
        self.conv1 = DoubleConv(n_channels, c)
        self.down1 = _Down001(c, 2 * c)
        self.down2 = _Down001(2 * c, 4 * c)
        self.down3 = _Down001(4 * c, 8 * c)
        self.down4 = _Down001(8 * c, 16 * c // factor)
        self.up1 = Up(16 * c, 8 * c // factor, bilinear)
        self.up2 = Up(8 * c, 4 * c // factor, bilinear)
        self.up3 = Up(4 * c, 2 * c // factor, bilinear)
        self.up4 = Up(2 * c, c, bilinear)
        self.outc = _OutConv001(c, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(self.down4(x4), x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        logits: Tensor = self.outc(x)
        return logits


KEY_LAYOUTS: dict[str, tuple[str, str, str]] = {
    "milesial": ("inc.", ".maxpool_conv.1.", "outc.conv."),
    "seed001": ("conv1.", ".down.1.", "outc.co.0."),
}
"""What three parts of a U-Net's keys are called in each layout: first block, DoubleConv of a Down, head."""


def rename_keys(state_dict: Mapping[str, T], layout: str) -> OrderedDict[str, T]:
    """The same entries, in the same order, under the key names of ``layout``, from whichever layout they came.

    Keys that are in no layout stay as they are.

    Raises:
        ValueError: ``layout`` is not in :data:`KEY_LAYOUTS`.
    """
    if layout not in KEY_LAYOUTS:
        raise ValueError(f"expected layout to be one of {', '.join(KEY_LAYOUTS)}, got {layout!r}; take one of those")
    renamed: OrderedDict[str, T] = OrderedDict()
    for key, value in state_dict.items():
        for other in KEY_LAYOUTS.values():
            (first, down, head), (new_first, new_down, new_head) = other, KEY_LAYOUTS[layout]
            if key.startswith(first):
                key = new_first + key.removeprefix(first)
            elif key.startswith(head):
                key = new_head + key.removeprefix(head)
            elif key.startswith("down"):
                key = key.replace(down, new_down)
        renamed[key] = value
    return renamed


# ---- seed 000: strided convolutions down, transposed convolutions up ---------------------------------------------


def _strided_layer(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.BatchNorm2d(out_channels), nn.ReLU()]


class StridedDown(nn.Module):
    """Two conv-BN-ReLU, whose result is the skip connection, then one of stride 2; returns (skip, halved)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.Conv_BN_ReLU_2 = nn.Sequential(
            *_strided_layer(in_channels, out_channels), *_strided_layer(out_channels, out_channels)
        )
        self.downsample = nn.Sequential(*_strided_layer(out_channels, out_channels, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.Conv_BN_ReLU_2(x)
        return skip, self.downsample(skip)


class StridedUp(nn.Module):
    """Two conv-BN-ReLU to 2·out_channels, a 3×3 transposed conv-BN-ReLU to out_channels and twice the size, then
    the concatenation (upsampled, skip)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        mid = 2 * out_channels
        self.Conv_BN_ReLU_2 = nn.Sequential(*_strided_layer(in_channels, mid), *_strided_layer(mid, mid))
        self.upsample = nn.Sequential(
            nn.ConvTranspose2d(mid, out_channels, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([_centre(self.upsample(self.Conv_BN_ReLU_2(x)), skip), skip], 1)


class StridedUNet(nn.Module):
    """Seed 000's network: learned down- and upsampling, biased convolutions, sigmoid head; returns probabilities.

    Where H or W is no multiple of 16 the upsampled half is centred in the skip connection's size, as in :class:`UNet`.
    """

    def __init__(self, n_channels: int = 3, n_classes: int = 3, base_c: int = 64):
        super().__init__()
        self.n_channels = n_channels
        self.n_classes = n_classes
        c = base_c
        self.d1 = StridedDown(n_channels, c)
        self.d2 = StridedDown(c, 2 * c)
        self.d3 = StridedDown(2 * c, 4 * c)
        self.d4 = StridedDown(4 * c, 8 * c)
        self.u1 = StridedUp(8 * c, 8 * c)
        self.u2 = StridedUp(16 * c, 4 * c)
        self.u3 = StridedUp(8 * c, 2 * c)
        self.u4 = StridedUp(4 * c, c)
        self.o = nn.Sequential(
            *_strided_layer(2 * c, c),
            *_strided_layer(c, c),
            nn.Conv2d(c, n_classes, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip1, x = self.d1(x)
        skip2, x = self.d2(x)
        skip3, x = self.d3(x)
        skip4, x = self.d4(x)
        x = self.u1(x, skip4)
        x = self.u2(x, skip3)
        x = self.u3(x, skip2)
        x = self.u4(x, skip1)
        probabilities: Tensor = self.o(x)
        return probabilities


# ---- seed 004: no batch norm -------------------------------------------------------------------------------------


class PlainUNet(nn.Module):
    """Seed 004's network: biased convolutions and ReLU only, concatenation (upsampled, skip); returns logits.

    Sizes that are no multiples of 16 as in :class:`StridedUNet`.
    """

    def __init__(self, in_channels: int, out_channels: int, init_features: int = 32):
        super().__init__()
        c = init_features
        self.pool = nn.MaxPool2d(2)
        self.encoder1 = self._block(in_channels, c)
        self.encoder2 = self._block(c, 2 * c)
        self.encoder3 = self._block(2 * c, 4 * c)
        self.encoder4 = self._block(4 * c, 8 * c)
        self.bottleneck = self._block(8 * c, 16 * c)
        self.upconv4 = nn.ConvTranspose2d(16 * c, 8 * c, 2, stride=2)
        self.decoder4 = self._block(16 * c, 8 * c)
        self.upconv3 = nn.ConvTranspose2d(8 * c, 4 * c, 2, stride=2)
        self.decoder3 = self._block(8 * c, 4 * c)
        self.upconv2 = nn.ConvTranspose2d(4 * c, 2 * c, 2, stride=2)
        self.decoder2 = self._block(4 * c, 2 * c)
        self.upconv1 = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.decoder1 = self._block(2 * c, c)
        self.output = nn.Conv2d(c, out_channels, 1)

    @staticmethod
    def _block(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.encoder1(x)
        skip2 = self.encoder2(self.pool(skip1))
        skip3 = self.encoder3(self.pool(skip2))
        skip4 = self.encoder4(self.pool(skip3))
        x = self.bottleneck(self.pool(skip4))
        x = self.decoder4(torch.cat([_centre(self.upconv4(x), skip4), skip4], 1))
        x = self.decoder3(torch.cat([_centre(self.upconv3(x), skip3), skip3], 1))
        x = self.decoder2(torch.cat([_centre(self.upconv2(x), skip2), skip2], 1))
        x = self.decoder1(torch.cat([_centre(self.upconv1(x), skip1), skip1], 1))
        logits: Tensor = self.output(x)
        return logits


# ---- mateuszbuda/brain-segmentation-pytorch ----------------------------------------------------------------------


class BrainUNet(nn.Module):
    """The brain-segmentation U-Net of torch.hub (mateuszbuda), with its key names; returns probabilities.

    Convolutions without bias, batch norm, concatenation (upsampled, skip), sigmoid.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 1, init_features: int = 32):
        super().__init__()
        c = init_features
        self.encoder1 = self._block(in_channels, c, "enc1")
        self.pool1 = nn.MaxPool2d(2)
        self.encoder2 = self._block(c, 2 * c, "enc2")
        self.pool2 = nn.MaxPool2d(2)
        self.encoder3 = self._block(2 * c, 4 * c, "enc3")
        self.pool3 = nn.MaxPool2d(2)
        self.encoder4 = self._block(4 * c, 8 * c, "enc4")
        self.pool4 = nn.MaxPool2d(2)
        self.bottleneck = self._block(8 * c, 16 * c, "bottleneck")
        self.upconv4 = nn.ConvTranspose2d(16 * c, 8 * c, 2, stride=2)
        self.decoder4 = self._block(16 * c, 8 * c, "dec4")
        self.upconv3 = nn.ConvTranspose2d(8 * c, 4 * c, 2, stride=2)
        self.decoder3 = self._block(8 * c, 4 * c, "dec3")
        self.upconv2 = nn.ConvTranspose2d(4 * c, 2 * c, 2, stride=2)
        self.decoder2 = self._block(4 * c, 2 * c, "dec2")
        self.upconv1 = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.decoder1 = self._block(2 * c, c, "dec1")
        self.conv = nn.Conv2d(c, out_channels, 1)

    @staticmethod
    def _block(in_channels: int, out_channels: int, name: str) -> nn.Sequential:
        layers = _conv_bn_relu(in_channels, out_channels) + _conv_bn_relu(out_channels, out_channels)
        kinds = [f"{kind}{i}" for i in (1, 2) for kind in ("conv", "norm", "relu")]
        return nn.Sequential(OrderedDict((name + kind, layer) for kind, layer in zip(kinds, layers, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.encoder1(x)
        skip2 = self.encoder2(self.pool1(skip1))
        skip3 = self.encoder3(self.pool2(skip2))
        skip4 = self.encoder4(self.pool3(skip3))
        x = self.bottleneck(self.pool4(skip4))
        x = self.decoder4(torch.cat([_centre(self.upconv4(x), skip4), skip4], 1))
        x = self.decoder3(torch.cat([_centre(self.upconv3(x), skip3), skip3], 1))
        x = self.decoder2(torch.cat([_centre(self.upconv2(x), skip2), skip2], 1))
        x = self.decoder1(torch.cat([_centre(self.upconv1(x), skip1), skip1], 1))
        return torch.sigmoid(self.conv(x))
