"""Which tile a kernel takes for a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastunet.architecture import architecture
from fastunet.kernels.common import block, precision
from fastunet.kernels.table import overruled


class Tile(NamedTuple):
    """IMAGES × ROWS × COLUMNS pixels and ``outputs`` channels a program, ``reduction`` channels a step."""

    images: int
    rows: int
    columns: int
    outputs: int
    reduction: int
    warps: int
    stages: int
    tma: bool = False


@overruled
def choose(
    kind: str, batch: int, sources: Sequence[int], filters: int, height: int, width: int, operands: Sequence[Tensor],
    pointers: bool = False,
) -> Tile:  # fmt: skip
    """The tile of a 3×3 convolution of sources of so many channels each, for so many filters."""
    channels, outputs = max(sources), filters
    if kind == "conv3x3_dgrad":
        channels, outputs = outputs, channels
    like = operands[0]
    tma = not pointers and _tma(operands)
    narrow = like.element_size() == 2
    exact = like.element_size() == 4 and precision(like.dtype) == "ieee"
    columns = block(width, 64)
    images = min(64 // columns, block(batch, 64, 1))
    columns = 64 // images  # wgmma multiplies 64 rows; what lies outside the picture is left out
    wgrad = kind == "conv3x3_wgrad"
    if exact:
        return Tile(1, 1, block(width, 32), block(outputs, 32), block(channels, 32 if wgrad else 16), 8, 2)
    if not narrow:
        if wgrad:
            return Tile(1, 1, block(width, 32), block(outputs, 32), block(channels, 32), 4, 2, tma)
        return Tile(images, 1, columns, block(outputs, 32), block(channels, 32), 8, 2, tma)
    if not tma:
        if wgrad:
            return Tile(1, 4, block(width, 32), block(outputs, 64), block(channels, 32), 4, 2)
        return Tile(images, 2, columns, block(outputs, 64), block(channels, 32), 8, 3)
    if wgrad:
        reduction = block(channels, 128, 64)
        return Tile(images, 4, columns, block(outputs, 64), reduction, reduction // 16, 2, True)
    if outputs > 64:
        images = min(128 // block(width, 128), block(batch, 128, 1))
        return Tile(images, 2, 128 // images, 128, block(channels, 64), 8, 2, True)
    return Tile(images, 4, columns, block(outputs, 64), block(channels, 64), 4, 2, True)


def _tma(operands: Sequence[Tensor]) -> bool:
    """Whether the tensor memory accelerator can move all of them: Hopper or later, and 16-byte rows."""
    if not architecture(operands[0].device).startswith("sm_") or int(architecture(operands[0].device)[3:]) < 90:
        return False
    return all(
        x.element_size() != 4 and x.shape[1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in operands
    )
