"""Weight gradient of 3×3 convolutions of stride 1.

    dW[k,r,s,c] = Σ_{n,h,w} z[n,h,w,c] · dY[n, h − r + 1, w − s + 1, k],    z = act(scale·(x − centre) + shift)

Summed over the pixels of the source, not of dY: then the operand that is normalised needs no padding, and what lies
outside dY is zero by itself. A program sums one column s of the filter, its three rows r in an accumulator each, for a
block of channels and one of outputs over a slab of tiles: of a tile's rows of images·columns pixels it loads and
normalises each row of z once, in registers, and multiplies it with three of the rows + 2 rows of dY. The slabs are
summed in a fixed order.

Layout: activations NHWC, dW (K,3,3,C). Bytes: reads dY and each source, writes and reads the slabs of dW.
Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import stats_dtype

from .common import Source, affine_of, cdiv, load_affine, replace, sum_slabs
from .gemm import (
    Frame,
    Image,
    Pixel,
    Walk,
    Window,
    add_product,
    first_pixel,
    load_pixels,
    operand,
    release,
    side,
    window,
    zeros,
)
from .launching import launch, real_word
from .samples import by_tile
from .tiles import choose, slabs_of

SIZES = ["N", "H", "W", "top", "left", "H1", "W1", "top1", "left1", "P", "Q", "tiles", "tiles_h", "tiles_w",
         "tiles1", "tiles1_h", "tiles1_w", "slabs"]  # fmt: skip


@triton.jit
def _accumulate(
    accs, walk, source, frame, dy, s, c, k,
    SAMPLES: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """Add some tiles of a source in dY's frame."""
    inside = window(source, frame)
    channel = c + tl.arange(0, TILE.reduction)
    common = load_affine(source.affine, channel, source.C)
    everything = Window(0, frame.P, 0, frame.Q)
    for number in tl.range(walk.start, walk.stop):
        at = first_pixel(number, walk.tiles_h, walk.tiles_w, TILE)
        affine = common
        if SAMPLES:
            affine = load_affine(affine_of(source.affine, at.n, source.C), channel, source.C)
        rows = ()
        for i in tl.static_range(TILE.rows + 2):
            pixel = Pixel(at.n, at.h + frame.top + (i - 1), at.w + frame.left + 1 - s)
            row = load_pixels(dy, (), pixel, 0, k, everything, TILE.outputs, True, TILE, NUM.acc)
            rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking
        for i in tl.static_range(len(rows) - 2):
            pixel = Pixel(at.n, at.h + i, at.w)
            z = load_pixels(source, affine, pixel, 0, c, inside, TILE.reduction, MASKED, TILE, NUM.acc, 1, 0)
            for r in tl.static_range(3):  # dY's row h + i − r + 1 is number i − r + 2
                accs = replace(accs, r, add_product(accs[r], z, rows[i - r + 2], NUM))
    return accs


@triton.jit(do_not_specialize=SIZES)
def _conv3x3_wgrad_kernel(
    x, affine_ptr, x1, affine1_ptr, real_ptr, dy, partial_ptr,
    N, H, W, top, left, H1, W1, top1, left1, P, Q, C, C1, K, tiles, tiles_h, tiles_w, tiles1, tiles1_h, tiles1_w, slabs,
    SLOPE: tl.constexpr, SLOPE1: tl.constexpr, SAMPLES: tl.constexpr, SAMPLES1: tl.constexpr, MASKED: tl.constexpr,
    ZOOM: tl.constexpr, ZOOM1: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """partial[slab, k, r, s, c] over the slab's tiles, for the channels of one source and then of the other."""
    blocks_k = tl.cdiv(K, TILE.outputs)
    blocks0 = tl.cdiv(C, TILE.reduction)
    blocks = blocks0
    if x1 is not None:
        blocks += tl.cdiv(C1, TILE.reduction)
    program = tl.program_id(0)
    s = program % 3
    block = program // 3 % blocks
    k = program // 3 // blocks % blocks_k * TILE.outputs
    slab = program // 3 // blocks // blocks_k
    accs = zeros(TILE.reduction, TILE.outputs, 3, NUM)
    c = block * TILE.reduction
    c_stop = C
    per_slab = tl.cdiv(tiles, slabs)
    start = slab * per_slab
    stop = tl.minimum(start + per_slab, tiles)
    if x1 is not None:
        stop = tl.where(block < blocks0, stop, start)  # two loops, of which one is empty
    dy = Image(dy, N, P, Q, K, None, None, None)
    accs = _accumulate(
        accs, Walk(start, stop, tiles_h, tiles_w), Image(x, N, H, W, C, affine_ptr, SLOPE, real_ptr, ZOOM),
        Frame(P, Q, top, left), dy, s, c, k, SAMPLES, MASKED, TILE, NUM,
    )  # fmt: skip
    if x1 is not None:
        per_slab = tl.cdiv(tiles1, slabs)
        start = slab * per_slab
        stop = tl.where(block < blocks0, start, tl.minimum(start + per_slab, tiles1))
        accs = _accumulate(
            accs, Walk(start, stop, tiles1_h, tiles1_w),
            Image(x1, N, H1, W1, C1, affine1_ptr, SLOPE1, real_ptr, ZOOM1),
            Frame(P, Q, top1, left1), dy, s, tl.maximum(c - blocks0 * TILE.reduction, 0), k, SAMPLES1, MASKED,
            TILE, NUM,
        )  # fmt: skip
        c_stop = tl.where(block < blocks0, C, C + C1)
        c = tl.where(block < blocks0, c, c - blocks0 * TILE.reduction + C)
    channel = c + tl.arange(0, TILE.reduction)
    filters = k + tl.arange(0, TILE.outputs)
    mask = (channel < c_stop)[:, None] & (filters < K)[None, :]
    row = ((slab.to(tl.int64) * K + filters) * 9 + s)[None, :]
    for r in tl.static_range(3):
        tl.store(partial_ptr + (row + 3 * r) * (C + C1) + channel[:, None], release(accs[r], NUM), mask=mask)


def conv3x3_wgrad(dy: Tensor, weight: Tensor, sources: Sequence[Source]) -> Tensor:
    """dW (K, C, 3, 3), channels_last memory in stats_dtype, from dY (N, K, P, Q) and the sources."""
    batch, filters, *size = dy.shape
    channels = weight.shape[1]
    sticks_out = any(source.sticks_out(size) for source in sources)
    tile = choose(
        "conv3x3_wgrad", batch, [source.channels for source in sources], filters, size[0], size[1],
        [dy, *(source.x for source in sources)],
        pointers=any(source.misread(size) for source in sources),
    )  # fmt: skip
    sources = by_tile(tile, sources)
    first, second = sources[0], sources[1] if len(sources) == 2 else None
    grid, grid1 = (tile.grid(batch, source.height, source.width) for source in (first, second or first))
    exact = [tile.images, tile.rows, tile.columns]
    masked = sticks_out or any(
        length % part
        for source in sources
        for length, part in zip((batch, source.height, source.width), exact, strict=True)
    )
    blocks = sum(cdiv(source.channels, tile.reduction) for source in sources) * cdiv(filters, tile.outputs)
    slabs = slabs_of(grid[0], 3 * blocks)
    partial = dy.new_empty((slabs, filters, 3, 3, channels), dtype=stats_dtype(dy.dtype))
    launch(
        _conv3x3_wgrad_kernel, (slabs * blocks * 3,),
        *side(first, tile, tile.reduction), *side(second, tile, tile.reduction), real_word(dy.device),
        operand(dy, tile, tile.outputs, tile.tma), partial,
        batch, *first.extent, *(second or first).extent, *size,
        first.channels, channels - first.channels, filters, *grid, *grid1, slabs,
        SLOPE=first.act, SLOPE1=None if second is None else second.act,
        SAMPLES=first.samples, SAMPLES1=second is not None and second.samples, MASKED=masked,
        ZOOM=first.zoom, ZOOM1=None if second is None else second.zoom, **tile.constants(dy),
    )  # fmt: skip
    return sum_slabs(partial).permute(0, 3, 1, 2)
