"""PNG files written row by row, for pictures that do not fit into memory."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt


class PngWriter:
    """An 8-bit PNG of ``width`` × ``height``: indices into a ``palette``, or colours if that is None.

    Source: the PNG specification, third edition, sections 5 and 11.2.
    """

    def __init__(
        self, file: BinaryIO, width: int, height: int, palette: Sequence[tuple[int, int, int]] | None = None
    ) -> None:
        self._file = file
        self._packer = zlib.compressobj(6)
        kind = 2 if palette is None else 3
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
        if palette is not None:
            self._chunk(b"PLTE", bytes(value for colour in palette for value in colour))

    def write(self, rows: npt.NDArray[np.uint8]) -> None:
        """The next rows: (n, width) indices, or (n, width, 3) colours."""
        flat = rows.reshape(len(rows), -1)
        # Each row begins with the number of its filter, 0: none.
        packed = self._packer.compress(np.pad(flat, ((0, 0), (1, 0))).tobytes())
        if packed:
            self._chunk(b"IDAT", packed)

    def close(self) -> None:
        """End the picture; the file stays open."""
        self._chunk(b"IDAT", self._packer.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, name: bytes, content: bytes) -> None:
        self._file.write(struct.pack(">I", len(content)) + name + content)
        self._file.write(struct.pack(">I", zlib.crc32(name + content)))
