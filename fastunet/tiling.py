"""Prediction of pictures of any size in overlapping tiles, as a stream of bands from top to bottom.

The picture is continued beyond its borders by reflection, as in the U-Net paper. Of the ``overlap`` of two tiles only
a strip in the middle is blended, an eighth of it wide, with Gaussian weights that add up to 1; what lies nearer to the
edge of a tile is thrown away. With 256 pixels of overlap each pixel then has all the context that a U-Net of four
levels sees, and tiles change nothing but rounding, where upsampling is by transposed convolution: a bilinear one with
align_corners depends on the picture's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastunet.checks import check_integer
from fastunet.data import MIN_SIZE

ALIGNMENT = 16  # what the network halves four times
TILE, OVERLAP = 1024, 256

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Span:
    """A tile along one axis: what the network sees, ``start`` to ``stop``, and the pixels of it that count."""

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor  # (last − first,)


def bands(
    network: Callable[[Tensor], Tensor],
    read: Callable[[Indices, Indices], Tensor],
    height: int,
    width: int,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> Iterator[Tensor]:
    """What ``network`` gives for a picture, in bands (K, rows, width) from top to bottom, float32 on the CPU.

    A picture with no side longer than ``tile`` is given to the network as it is. Memory does not grow with the height.

    Args:
        network: (1, C, h, w) → (1, K, h, w), such as probabilities; h and w are multiples of 16 in a picture of several
            tiles.
        read: the pixels (C, rows, columns) at these indices.
        tile: side of a tile in pixels, a multiple of 16.
        overlap: pixels that neighbouring tiles share, a multiple of 32 and at most half a tile.

    Raises:
        ValueError: a tile or an overlap that is none.
    """
    check_tiles(tile, overlap)
    if max(height, width) <= tile:
        rows, across = (mirrored(0, max(length, MIN_SIZE), length) for length in (height, width))
        yield _seen(network, read, rows, across)[:, :height, :width]
        return
    columns, all_rows = _spans(width, tile, overlap), _spans(height, tile, overlap)
    kept: Tensor | None = None  # rows that the next tiles are blended with
    for row, following in zip(all_rows, [*all_rows[1:], None], strict=True):
        band: Tensor | None = None
        for column in columns:
            rows, across = (
                mirrored(span.start, span.stop, length) for span, length in ((row, height), (column, width))
            )
            seen = _seen(network, read, rows, across)
            part = seen[:, row.first - row.start : row.last - row.start, column.first - column.start :]
            part = part[..., : column.last - column.first] * column.weights
            if band is None:
                band = torch.zeros(part.shape[0], part.shape[1], width)
            band[..., column.first : column.last] += part
        assert band is not None
        band *= row.weights[:, None]
        if kept is not None:
            band[:, : kept.shape[1]] += kept
        done = band.shape[1] if following is None else following.first - row.first
        yield band[:, :done]
        kept = band[:, done:].clone()


def check_tiles(tile: int, overlap: int) -> None:
    """Raise ValueError for a tile or an overlap that is none."""
    check_integer("tile", tile, 4 * ALIGNMENT)
    check_integer("overlap", overlap, 2 * ALIGNMENT)
    if tile % ALIGNMENT or overlap % (2 * ALIGNMENT) or overlap > tile // 2:
        raise ValueError(
            f"expected a tile that is a multiple of {ALIGNMENT}, and an overlap that is one of {2 * ALIGNMENT} and at "
            f"most half a tile, got {tile} and {overlap}; {TILE} and {OVERLAP} are usual"
        )


def symmetric(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``network`` averaged over the eight symmetries of the square: test-time augmentation."""

    def averaged(x: Tensor) -> Tensor:
        total: Tensor | None = None
        for turns in range(4):
            for mirror in (False, True):
                y = x.rot90(turns, (-2, -1))
                y = network(y.flip(-1) if mirror else y)
                y = (y.flip(-1) if mirror else y).rot90(-turns, (-2, -1))
                total = y if total is None else total + y
        assert total is not None
        return total / 8

    return averaged


def _seen(network: Callable[[Tensor], Tensor], read: Callable[..., Tensor], rows: Indices, columns: Indices) -> Tensor:
    return network(read(rows, columns)[None])[0].float().cpu()


def mirrored(start: int, stop: int, length: int) -> Indices:
    """Indices of the pixels at positions ``start`` to ``stop``, reflected at the borders as often as need be."""
    period = max(2 * (length - 1), 1)
    positions = np.arange(start, stop) % period
    return np.minimum(positions, period - positions) if length > 1 else np.zeros(stop - start, np.int64)


def _spans(length: int, tile: int, overlap: int) -> list[_Span]:
    """Tiles along an axis. Tile i is responsible for pixels from i·step on, blended with its neighbours' there."""
    step, margin, half = tile - overlap, overlap // 2, overlap // 16
    away = torch.arange(-half, half) + 0.5
    near, far = (torch.exp(-0.5 * ((away + shift) / (half / 2)) ** 2) for shift in (-half, half))
    rising = near / (near + far)
    count = -(-length // step)
    spans = []
    for i in range(count):
        start = i * step - margin
        needed = -(-(length + margin - start) // ALIGNMENT) * ALIGNMENT
        first, last = max(i * step - half, 0), min((i + 1) * step + half, length)
        if i == count - 1:
            last = length
        weights = torch.ones(last - first)
        if i > 0:
            weights[: 2 * half] = rising[: last - first]
        if i < count - 1:
            falling = 1 - rising[: last - ((i + 1) * step - half)]
            weights[len(weights) - len(falling) :] = falling
        spans.append(_Span(start, start + min(tile, needed), first, last, weights))
    return spans
