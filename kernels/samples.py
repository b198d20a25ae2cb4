"""Where samples differ: affines (N, 3, C), statistics (N, K) and their gradients, by tiles of one sample or of several.

A tile of one sample reads that one's affine and has sums for it alone, in a slab beside those of the other samples
(:func:`fastunet.kernels.common.slab_of`). A tile of several, as small pictures have, would need an affine for each of
its pixels: its sources are normalised and stored before, for the call, and what it would sum is left to passes of their
own. Bytes of these: a write and a read of each z, and of its gradient; a read of y.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastunet.layout import NOTHING, SAMPLES

from .affine import affine_act, affine_act_backward
from .common import Source
from .tiles import Tile


def several(tile: Tile, sources: Sequence[Source]) -> bool:
    """Whether a tile has pixels of several samples, whose affines differ."""
    return tile.images > 1 and any(source.samples for source in sources)


def stored(source: Source) -> Source:
    """The source, normalised: itself if it is plain."""
    if source.plain:
        return source
    z = affine_act(source.x, source.affine, source.slope)
    return Source(z, None, 1.0, source.top, source.left, source.doubled)


def by_tile(tile: Tile, sources: Sequence[Source]) -> Sequence[Source]:
    """The sources as the tile reads them: those whose affines differ within it are stored."""
    if not several(tile, sources):
        return sources
    return [stored(source) if source.samples else source for source in sources]


def tile_stats(tile: Tile, stats: int) -> int:
    """Which of the ``stats`` the tile sums: none of each sample if it has several."""
    return NOTHING if stats == SAMPLES and tile.images > 1 else stats


def value(source: Source) -> Source:
    """What stands for a source's value, for a gradient with respect to that: the source without affine and act."""
    return Source(source.x, None, 1.0, source.top, source.left, source.doubled)


def through(dz: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """(dx, daffine) of a source from the gradient of its value."""
    return affine_act_backward(dz, source.x, source.affine, source.slope)
