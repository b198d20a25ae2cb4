"""How pixels become a network's input, and its output pixels again: one description for training and prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
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

    def in_parts(self, pixels: Pixels) -> Pixels:
        """The same but for rounding, of which only the part is resized that is asked for; not of a square."""
        assert self.square is None
        return _Resized(self, pixels) if self.resizes else pixels

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
        return _shrunk(pixels, self.size(height, width), method)

    def restored(self, parts: Iterable[Tensor], height: int, width: int) -> Iterator[Tensor]:
        """Bands (K, rows, w) of the network from top to bottom, as bands (K, rows, width) of the picture.

        They are interpolated bilinearly, some rows at a time; those of a square all at once.
        """
        if not self.resizes:
            yield from parts
            return
        if self.square is not None:
            side, whole = max(height, width), torch.cat(list(parts), 1)
            yield F.interpolate(whole[None], (side, side), mode="bilinear")[0, :, :height, :width]
            return
        small, _ = self.size(height, width)
        places = ((torch.arange(height, dtype=torch.float64) + 0.5) * (small / height) - 0.5).clamp(0, small - 1)
        above, first, done = places.floor().long(), 0, 0  # first: the row of the network's that kept begins with
        below = (above + 1).clamp(max=small - 1)
        kept: Tensor | None = None
        for part in parts:
            kept = part if kept is None else torch.cat([kept, part], 1)
            ready = int((below < first + kept.shape[1]).sum())
            for rows in (slice(row, min(row + _ROWS, ready)) for row in range(done, ready, _ROWS)):
                share = (places[rows] - above[rows]).to(kept.dtype)[:, None]
                band = torch.lerp(kept[:, above[rows] - first], kept[:, below[rows] - first], share)
                yield F.interpolate(band[None], (band.shape[1], width), mode="bilinear")[0]
            done = ready
            if done < height:
                kept, first = kept[:, int(above[done]) - first :].clone(), int(above[done])


_ROWS = 256


class _Resized:
    """A picture as the network sees it."""

    def __init__(self, preparation: Preparation, pixels: Pixels) -> None:
        self._pixels = pixels
        channels, *self._size = pixels.shape
        self.shape: tuple[int, ...] = (channels, *preparation.size(*self._size))
        self.dtype = pixels.dtype

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        _, *places = key
        indices = [np.arange(n)[index].ravel() for n, index in zip(self.shape[1:], places, strict=True)]
        wanted, read, box = [], [], []  # along each axis: of the network's pixels, of the picture's, where in those
        for index, length, small in zip(indices, self._size, self.shape[1:], strict=True):
            start, stop, factor = int(index.min()), int(index.max()) + 1, length / small
            reach = math.ceil(2 * factor) + 1  # of Pillow's bicubic filter
            first = max(int(start * factor) - reach, 0)
            wanted.append(stop - start)
            read.append(slice(first, min(math.ceil(stop * factor) + reach, length)))
            box.append((start * factor - first, min(stop * factor, length) - first))
        (top, bottom), (left, right) = box
        window = _shrunk(
            self._pixels[:, read[0], read[1]], tuple(wanted), Image.Resampling.BICUBIC, (left, top, right, bottom)
        )
        rows, columns = (index - index.min() for index in indices)
        part: Array = window[:, rows[:, None], columns]
        return part


def _shrunk(
    pixels: Array,
    size: tuple[int, ...],
    method: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Array:
    """(C, H, W), or what is in the box (left, top, right, bottom), → channels of that size, in the pixels' type."""
    height, width = size
    if pixels.dtype == np.uint8 and len(pixels) == 3:
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        colours: Array = np.asarray(image.resize((width, height), method, box)).transpose(2, 0, 1)
        return colours
    planes: list[Array] = [np.ascontiguousarray(p if p.dtype == np.uint8 else p.astype(np.float32)) for p in pixels]
    done: Array = np.stack([np.asarray(Image.fromarray(p).resize((width, height), method, box)) for p in planes])
    if pixels.dtype.kind in "iu":
        limits = np.iinfo(pixels.dtype)
        done = np.clip(done.round(), limits.min, limits.max).astype(pixels.dtype)
    return done
