"""Doubled sources: their value is the nearest ×2 of what is in memory, and is nowhere stored.

    z[n, c, h, w] = act(scale·(x[n, c, ⌊h/2⌋, ⌊w/2⌋] − centre) + shift)
    dx[n, c, i, j] = Σ over the four pixels of z that are x[n, c, i, j], of their gradients through the affine and act

The 3×3 kernels of stride 1 load pixel (⌊h/2⌋, ⌊w/2⌋) where they want (h, w): by pointers, since TMA repeats no pixel;
what else the launch reads still comes by TMA. The products are those with a stored z. What is saved are its write, its
reads, and its memory until the backward: of V bytes, V written and 2·V read by the forward and the weight gradient,
against V/4 read by each. On no chip that is modelled does the loop then issue more than it multiplies, so that no shape
loses: a doubled source is always read as it is.

dgrad adds up the four gradients of a pixel in its epilogue, where they lie in one tile (:func:`sums`). Else it stores
the gradient of z, as it would of a stored one, and :func:`gradient` gathers that in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .common import Source
from .tiles import Tile
from .upsample import upsample_gradient


def sums(tile: Tile, source: Source) -> bool:
    """Whether a tile of gradients holds all four of each pixel of a doubled source that it holds one of."""
    return not any(size % 2 for size in (tile.rows, tile.columns, source.top, source.left))


def gradient(
    dz: Tensor, stride: int, size: Sequence[int], source: Source, top: int = 0, left: int = 0
) -> tuple[Tensor, Tensor]:
    """(dx, daffine) of a doubled source, at (top, left) in a frame of ``size``, from the gradient ``dz`` of what that
    holds of its value: some channels of an NHWC tensor whose pixels lie ``stride`` elements apart."""
    return upsample_gradient(dz, stride, size, top, left, source.x, source.affine, source.slope)
