"""How pixels become a network's input, and its output pixels again: one description for training and prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastunet.coding import IGNORE_INDEX

Array = npt.NDArray[Any]


class Pixels(Protocol):
    """A picture (C, H, W): an array, or what reads the part that is asked for, ``pixels[:, rows, columns]``."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, key: Any, /) -> Array: ...


def white(highest: float) -> float:
    """What stands for white in pictures whose highest number is this one: 1, 255 or 65535, or the number itself."""
    return next((float(full) for full in (1, 255, 65535) if highest <= full), highest)


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture before a network sees it. A checkpoint keeps it.

    Args:
        values: "unit" divides pixels by ``full``; "standard" makes mean 0 and deviation 1 of each picture.
        scale: factor of height and width, as Pytorch-UNet's --scale.
        square: side of the square that a picture is resized to, padded with black on the right or below; in place of
            ``scale``.
        full: white: 255 of 8-bit pixels.
    """

    values: str
    scale: float = 1.0
    square: int | None = None
    full: float = 255.0

    @property
    def resizes(self) -> bool:
        """Whether the network sees another size than the picture's."""
        return self.square is not None or self.scale != 1.0

    def image(self, pixels: Array) -> Tensor:
        """(C, H, W) pixels → float32 (C, h, w)."""
        return self.normalised(self.resized(pixels), *self.levels(pixels))

    def levels(self, pixels: Pixels) -> tuple[float, float]:
        """What :meth:`normalised` subtracts and divides by, of a whole picture (C, H, W); memory is for 64 rows."""
        if self.values == "unit":
            return 0.0, self.full

        def parts() -> Iterator[Array]:
            return (pixels[:, row : row + 64].astype(np.float64) for row in range(0, pixels.shape[1], 64))

        count = math.prod(pixels.shape)
        mean = sum(float(part.sum()) for part in parts()) / count
        variance = sum(float(((part - mean) ** 2).sum()) for part in parts()) / count
        return mean, variance**0.5 or 1.0

    @staticmethod
    def normalised(pixels: Array, level: float, scale: float) -> Tensor:
        """(pixels − level) / scale as float32."""
        values: Tensor = torch.from_numpy(pixels.astype(np.float32))
        return values.sub_(level).div_(scale)

    def resized(self, pixels: Array) -> Array:
        """(C, H, W) → (C, h, w), in the pixels' type."""
        return self._resized(pixels, Image.Resampling.BICUBIC if self.square is None else Image.Resampling.BILINEAR)

    def labels(self, labels: Array) -> Array:
        """(H, W) → (h, w); what is padded does not count."""
        if labels.dtype == np.uint8:
            plane: Array = self._resized(labels[None], Image.Resampling.NEAREST, IGNORE_INDEX)[0]
            return plane
        values, places = np.unique(labels, return_inverse=True)  # Pillow resizes float32, which merges large numbers
        plane = values[self._resized(places.reshape(1, *labels.shape), Image.Resampling.NEAREST)[0]]
        return plane

    def colours(self, labels: Array, table: Array) -> Tensor:
        """The colours of (H, W) labels, ``table`` (256, 3) uint8, as float32 (3, h, w) from 0 to 1."""
        return torch.from_numpy(self.resized(table[labels].transpose(2, 0, 1)).astype(np.float32)) / 255

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of what the network sees of a picture."""
        if self.square is not None:
            return self.square, self.square
        return max(int(self.scale * height), 1), max(int(self.scale * width), 1)

    def _resized(self, pixels: Array, method: Image.Resampling, outside: int = 0) -> Array:
        if not self.resizes:
            return pixels
        _, height, width = pixels.shape
        if self.square is not None:
            side = max(height, width)
            padded = np.full((pixels.shape[0], side, side), outside, pixels.dtype)
            padded[:, :height, :width] = pixels
            pixels = padded
        size = self.size(height, width)
        if pixels.dtype == np.uint8 and len(pixels) == 3:
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            colours: Array = np.asarray(image.resize(size[::-1], method)).transpose(2, 0, 1)
            return colours
        planes: list[Array] = [plane if pixels.dtype == np.uint8 else plane.astype(np.float32) for plane in pixels]
        done: Array = np.stack([np.asarray(Image.fromarray(plane).resize(size[::-1], method)) for plane in planes])
        if pixels.dtype.kind in "iu":
            limits = np.iinfo(pixels.dtype)
            done = np.clip(done.round(), limits.min, limits.max).astype(pixels.dtype)
        return done

    def restored(self, outputs: Tensor, height: int, width: int) -> Tensor:
        """(K, h, w) of the network, as (K, height, width) of the picture."""
        if not self.resizes:
            return outputs
        if self.square is None:
            return F.interpolate(outputs[None], (height, width), mode="bilinear")[0]
        side = max(height, width)
        return F.interpolate(outputs[None], (side, side), mode="bilinear")[0, :, :height, :width]
