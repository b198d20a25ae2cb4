"""TIFFs of more pixels than are decoded at once: arrays of which the strips or tiles are read that are asked for.

By tifffile and imagecodecs, ``pip install 'fastunet[pictures]'``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastunet.decode import MAX_BYTES, TIFF, Array, DataError, check_numbers, explained, large_page, silent

_ROWS = 64  # of a strip, where any number of them can be read


class LargeTiff:
    """The pixels (C, H, W) of a picture; ``large[:, rows]`` and ``large[:, rows, columns]`` read some, as of an array.

    What was decoded is kept while the rows that are asked for overlap it: memory is that of these rows, not the
    picture's. A palette becomes its colours, transparency is left out, and 0 is black, as in
    :func:`fastunet.data.read_image`; three channels stay three, also where they are alike.

    Args:
        path, page: the file, and which of its pages.
        channels: as many a single channel becomes, by repetition.

    Raises:
        DataError: the file is damaged, holds NaN, or is of a kind that is not read in parts; also while it is read.
    """

    def __init__(self, path: Path, page: int, channels: int = 1) -> None:
        import tifffile

        self._path = path
        with explained(path), silent("tifffile"), tifffile.TiffFile(path) as file:
            self._lay_out(file.pages[page], file.byteorder)
        self.shape: tuple[int, ...] = (self._channels if self._channels > 1 else channels, *self._size)
        self._kept: dict[tuple[int, int, int], Array] = {}

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        _, *places = (*key, slice(None))[:3]
        rows, columns = (
            np.arange(*index.indices(n)) if isinstance(index, slice) else index.ravel()
            for n, index in zip(self._size, places, strict=True)
        )
        (top, bottom), (left, right) = ((int(index.min()), int(index.max()) + 1) for index in (rows, columns))
        down = range(top // self._rows, -(-bottom // self._rows))
        across = range(left // self._columns, -(-right // self._columns))
        window = np.empty((self._channels, bottom - top, right - left), self.dtype)
        self._kept = {place: part for place, part in self._kept.items() if place[1] in down}
        with explained(self._path), open(self._path, "rb") as file:
            for place in ((plane, y, x) for plane in range(self._planes) for y in down for x in across):
                if place not in self._kept:
                    self._kept[place] = self._coloured(self._read(file, *place))
                plane, y, x = place[0], place[1] * self._rows - top, place[2] * self._columns - left  # in the window
                part = self._kept[place][:, max(-y, 0) : bottom - top - y, max(-x, 0) : right - left - x]
                _, height, width = part.shape
                window[plane : plane + len(part), max(y, 0) :, max(x, 0) :][:, :height, :width] = part
        window = window[:, (rows - top)[:, None], columns - left]
        return np.broadcast_to(window, (self.shape[0], *window.shape[1:]))

    def _lay_out(self, tags: Any, byteorder: str) -> None:
        """What is where in the file, by the ``tags`` of its page."""
        self._check(tags)
        height, width, samples = tags.imagelength, tags.imagewidth, tags.samplesperpixel
        self._size = height, width
        self._decode, self._tables = tags.decode, tags.jpegtables
        self._offsets, self._counts, self._missing = tags.dataoffsets, tags.databytecounts, tags.nodata
        self._stored: np.dtype[Any] = np.dtype(byteorder + tags.dtype.char)
        self._inverted = tags.photometric == 0 and self._stored.kind == "u"
        self._palette = (np.asarray(tags.colormap).T >> 8).astype(np.uint8) if tags.photometric == 3 else None
        self.dtype: np.dtype[Any] = np.dtype(tags.dtype.char if self._palette is None else np.uint8)
        of_colour = 3 if tags.photometric in (2, 6) else 1
        unnamed = samples == 4 and tags.bitspersample == 8 and not tags.extrasamples
        clear = samples == of_colour + 1 and (unnamed or (*tags.extrasamples, 0)[0] == 2)  # or it is another channel
        self._channels = int(of_colour if clear else samples)
        if self._palette is not None and (self._palette != self._palette[:, :1]).any():
            self._channels = 3
        separate = samples > 1 and tags.planarconfig == 2
        self._planes: int = self._channels if separate else 1  # of strips or tiles that hold one channel each
        self._samples: int = 1 if separate else samples
        self._free = bool(tags.is_final)  # row after row, not packed: may be cut where one likes
        self._rows: int = _ROWS if self._free else tags.tilelength if tags.is_tiled else tags.rowsperstrip
        self._columns: int = tags.tilewidth if tags.is_tiled and not self._free else width
        size = self._rows * max(width, self._columns) * samples * self._stored.itemsize
        if size > MAX_BYTES:
            raise self._refused(f"its strips have {size:,} bytes, of at most {MAX_BYTES:,}")

    def _check(self, tags: Any) -> None:
        """Refuse what would be read wrongly."""
        if tags.photometric not in (0, 1, 2, 3) and not (tags.photometric == 6 and tags.compression in (6, 7)):
            raise self._refused(f"its colours are of kind {int(tags.photometric)}")
        bits = tags.bitspersample
        if tags.dtype is None or tags.dtype.kind not in "uif" or bits != 8 * tags.dtype.itemsize:
            raise self._refused(f"its numbers are of {bits} bits and type {tags.dtype}")
        if tags.axes not in ("YX", "YXS", "SYX"):
            raise self._refused(f"it has the axes {tags.axes}")
        if 1 in tags.extrasamples:
            raise self._refused("its colours are multiplied by their opacity")
        if (turned := tags.tags.valueof(274) or 1) != 1:
            raise self._refused(f"it is turned where it is shown, orientation {turned}")

    def _refused(self, why: str) -> DataError:
        return DataError(
            f"{self._path} has more pixels than are read at once, and in parts it cannot be, {why}: save it as it is "
            "shown, in RGB or grey, in tiles"
        )

    def _read(self, file: BinaryIO, plane: int, y: int, x: int) -> Array:
        """(rows, columns, samples) of a strip or tile, which may reach beyond the picture."""
        height, width = self._size
        part: Array | None
        if self._free:
            line, rows = width * self._samples, min(self._rows, height - y * self._rows)
            file.seek(self._offsets[0] + (plane * height + y * self._rows) * line * self._stored.itemsize)
            part = np.frombuffer(file.read(rows * line * self._stored.itemsize), self._stored)
            return part.reshape(rows, width, self._samples)
        down, across = -(-height // self._rows), -(-width // self._columns)
        number = (plane * down + y) * across + x
        file.seek(self._offsets[number])
        with silent("tifffile"):
            part, _, shape = self._decode(file.read(self._counts[number]) or None, number, jpegtables=self._tables)
        return np.full(shape[1:], self._missing, self._stored) if part is None else part[0]

    def _coloured(self, part: Array) -> Array:
        """(C, rows, columns) of the picture's channels."""
        check_numbers(self._path, part)
        if self._palette is not None:
            part = self._palette[part[..., 0]]
        coloured: Array = (~part if self._inverted else part).transpose(2, 0, 1)
        return coloured[: self._channels]


def opened(path: Path, channels: int) -> LargeTiff | None:
    """The picture in ``path``, if it is a TIFF that is larger than :func:`fastunet.decode.decode` takes.

    Arguments and errors as of :class:`LargeTiff`.

    Raises:
        DataError: it is one, and tifffile is not installed.
    """
    with explained(path), open(path, "rb") as file:
        page = large_page(path) if file.read(4) in TIFF else None
    if page is None:
        return None
    if importlib.util.find_spec("tifffile") is None:
        raise DataError(
            f"{path} has to be read in parts: pip install 'fastunet[pictures]', or cut it into smaller ones"
        )
    return LargeTiff(path, page, channels)
