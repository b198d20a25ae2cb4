"""3×3 convolutions of stride 1: implicit GEMMs that load a row of pixels once for up to three rows of outputs.

    y[n,p,q,k] = bias[k] + Σ_{r,s,c} z[n, p + r − 1, q + s − 1, c] · W[k,c,r,s],    z = act(scale·(x − centre) + shift)

The gradient with respect to z is the same sum over dY with W mirrored in r and s and transposed in k and c; the
epilogue of the dgrad kernel turns it into dx and daffine. One main loop serves both.

A program computes a tile: some rows of images·columns pixels, for some outputs, in an accumulator per row. For each
block of channels and each column s of the filter it loads rows + 2 rows of the source, normalises each once, in
registers, and multiplies it with up to three rows r of the filter: 3·(rows + 2) operands, not 9·rows, come from the L2
cache and through the prologue. z is zero outside its source: padding comes after normalisation. TMA (Hopper and later)
fills zeros in by itself; act(shift) is masked only in tiles that touch the border. Sources may be doubled: see
:mod:`fastunet.kernels.doubled`.

Layout: activations NHWC, weights (K,3,3,C). Bytes: forward reads each source and W and writes y; dgrad reads dY, W and
the sources and writes dx. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import NOTHING, SAMPLES, stats_dtype

from . import doubled
from .affine import affine_act, affine_gradient, affine_slabs, no_gradients, source_backward, store_affine_gradient
from .common import (
    PROPAGATE_ALL,
    Source,
    act,
    affine_of,
    block,
    cdiv,
    dense,
    empty_nhwc,
    load_affine,
    nhwc,
    normalise,
    replace,
    slab_of,
)
from .conv_aten import split_gradient
from .conv_down import conv_down
from .gemm import (
    Filters,
    Frame,
    Image,
    Pixel,
    add_product,
    first_pixel,
    halves,
    load_pixels,
    load_tap,
    operand,
    release,
    side,
    window,
    zeros,
)
from .launching import describe, launch, real_word
from .samples import by_tile, several, through, tile_stats, value
from .statistics import Partials, add_shares, of_nothing, stats_of, store_stats
from .tiles import Tile, choose

SIZES = ["N", "H", "W", "top", "left", "H1", "W1", "top1", "left1", "P", "Q", "tiles_h", "tiles_w"]


class Outputs(NamedTuple):
    """What a forward stores, as pointers or descriptors, each None if it is not wanted: y, and what it is normalised
    with; mean, M2 and count of each tile; y pooled, and the scale by whose signs."""

    y: Any
    affine: Any
    SLOPE: Any
    mean: Any
    m2: Any
    count: Any
    pooled: Any
    pool_scale: Any


class BySample(NamedTuple):
    """What is of each sample, not of the batch: the affines of the sources, and the statistics of y."""

    samples: bool
    samples1: bool
    samples_y: bool


class Head(NamedTuple):
    """A 1×1 convolution for ``classes`` outputs, padded to WIDTH; 0: there is none."""

    w: Any
    bias: Any
    classes: Any
    WIDTH: Any


# ---- the main loop -----------------------------------------------------------------------------------------------


@triton.jit
def _accumulate(
    accs, start, stop, source, inside, filters, at,
    MASKED: tl.constexpr, MIRRORED: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """Add steps start … stop of one source's share to TILE.rows rows, whose first pixel lies over its pixel ``at``."""
    # The mirrored filter has its taps in reverse, and its inputs and outputs swapped.
    first: tl.constexpr = 8 if MIRRORED else 0
    turn: tl.constexpr = -1 if MIRRORED else 1
    for step in tl.range(start, stop):
        s = step % 3
        c = step // 3 * TILE.reduction
        affine = load_affine(source.affine, c + tl.arange(0, TILE.reduction), source.C)
        # Channels beyond C read another source's weights, or zeros: the source is zero there.
        taps = (
            load_tap(filters, c, first + turn * (s), TILE),
            load_tap(filters, c, first + turn * (3 + s), TILE),
            load_tap(filters, c, first + turn * (6 + s), TILE),
        )
        for i in tl.static_range(TILE.rows + 2):
            pixel = Pixel(at.n, at.h + (i - 1), at.w + s - 1)
            z = load_pixels(source, affine, pixel, 0, c, inside, TILE.reduction, MASKED, TILE, NUM.acc)
            for r in tl.static_range(3):
                if i - r >= 0 and i - r < TILE.rows:
                    accs = replace(accs, i - r, add_product(accs[i - r], z, taps[r], NUM))
    return accs


@triton.jit
def _add_source(
    accs, source, frame, filters, at,
    MIRRORED: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """Add a source's share to the tile whose first pixel is ``at``, or this program's part of it if it is SHARED;
    pixels are masked only where the tile or its halo leaves the source."""
    inside = window(source, frame)
    over = Pixel(at.n, at.h - frame.top, at.w - frame.left)
    begin = 0
    steps = tl.cdiv(source.C, TILE.reduction) * 3
    if SHARED:
        begin = steps * tl.program_id(1) // tl.num_programs(1)
        steps = steps * (tl.program_id(1) + 1) // tl.num_programs(1)
    # TMA fills zeros in; without a shift they need no mask. Two loops, of which one is empty, rather than two
    # branches: their shared memory is then the same.
    MAY_MASK: tl.constexpr = source.affine is not None or not isinstance(source.x, tl.core.tensor_descriptor_base)
    free = steps
    if MAY_MASK:
        interior = (over.h > inside.h_low) & (over.h + TILE.rows < inside.h_high)
        interior = interior & (over.w > inside.w_low) & (over.w + TILE.columns < inside.w_high)
        free = tl.where(interior & (at.n + TILE.images <= source.N), steps, begin)
    accs = _accumulate(accs, begin, free, source, inside, filters, over, False, MIRRORED, TILE, NUM)
    if MAY_MASK:
        accs = _accumulate(accs, free, steps, source, inside, filters, over, True, MIRRORED, TILE, NUM)
    return accs


# ---- what a forward stores ---------------------------------------------------------------------------------------


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=PROPAGATE_ALL)


@triton.jit
def _store_pooled(ys, to, frame, at, N, k, K, TILE: tl.constexpr, NUM: tl.constexpr):
    """2×2-pool the tile's rows by the sign of the scale to come; see :mod:`fastunet.kernels.pool`."""
    filters = k + tl.arange(0, TILE.outputs)
    scale = tl.full([TILE.outputs], 1.0, tl.float32)
    if to.pool_scale is not None:
        scale = tl.load(to.pool_scale + filters, mask=filters < K, other=1.0).to(tl.float32)
    negative = (scale < 0)[None, :]
    flat = (scale == 0)[None, :]
    odd = (tl.arange(0, TILE.images * TILE.columns) % 2 == 1)[:, None]
    cell = tl.arange(0, TILE.images * TILE.columns // 2)
    image = at.n + cell // (TILE.columns // 2)
    column = at.w // 2 + cell % (TILE.columns // 2)
    for i in tl.static_range(0, len(ys), 2):
        upper = ys[i].to(NUM.acc)
        lower = ys[i + 1].to(NUM.acc)
        upper = tl.where(negative, -upper, upper)
        lower = tl.where(negative, -lower, lower)
        # Where the scale is 0 the first pixel of the window wins over all but a NaN.
        upper = tl.where(flat & odd & (upper == upper), float("-inf"), upper)
        lower = tl.where(flat & (lower == lower), float("-inf"), lower)
        both = _larger(upper, lower).reshape(TILE.images * TILE.columns // 2, 2, TILE.outputs)
        best = tl.reduce(both, 1, _larger)
        best = tl.where(negative, -best, best).to(NUM.dtype)
        h = (at.h + i) // 2
        if isinstance(to.pooled, tl.core.tensor_descriptor_base):
            to.pooled.store([at.n, h, at.w // 2, k], best.reshape(TILE.images, 1, TILE.columns // 2, TILE.outputs))
        else:
            w_stop = tl.where(h < frame.P // 2, frame.Q // 2, 0)
            mask = ((image < N) & (column < w_stop))[:, None] & (filters < K)[None, :]
            row = (image.to(tl.int64) * (frame.P // 2) + h) * (frame.Q // 2) + column
            tl.store(to.pooled + (row[:, None] * K + filters[None, :]), best, mask=mask)


@triton.jit
def _store_outputs(accs, bias_ptr, head, to, frame, slab, at, N, k, K, TILE: tl.constexpr, NUM: tl.constexpr):
    """Store a tile of y, normalised if that is asked, what it is pooled to, and its statistics, from its sums. Under a
    head its outputs, of all channels of y, are stored in y's stead."""
    pixel = tl.arange(0, TILE.images * TILE.columns)
    image = at.n + pixel // TILE.columns
    column = at.w + pixel % TILE.columns
    filters = k + tl.arange(0, TILE.outputs)
    rows = tl.where((image < N) & (column < frame.Q), frame.P - at.h, 0)  # that exist, at each pixel
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + filters, mask=filters < K, other=0.0).to(NUM.acc)
    affine = load_affine(to.affine, filters, K)
    if head.WIDTH:
        j = tl.arange(0, head.WIDTH)
        mask = (j < head.classes)[None, :] & (filters < K)[:, None]
        head_w = tl.load(head.w + j[None, :] * K + filters[:, None], mask=mask, other=0.0)
        head_bias = tl.full([head.WIDTH], 0.0, NUM.acc)
        if head.bias is not None:
            head_bias += tl.load(head.bias + j, mask=j < head.classes, other=0.0).to(NUM.acc)
    for i in tl.static_range(len(accs)):
        acc = accs[i]
        if bias_ptr is not None:
            acc += bias[None, :]
        if to.affine is not None or to.SLOPE is not None:
            acc = normalise(acc, affine, to.SLOPE, NUM.acc)
        rounded = acc.to(NUM.dtype)
        accs = replace(accs, i, rounded)
        if head.WIDTH:
            logits = tl.dot(rounded, head_w, input_precision=NUM.precision, out_dtype=NUM.acc) + head_bias[None, :]
            mask = (rows > i)[:, None] & (j < head.classes)[None, :]
            row = (image.to(tl.int64) * frame.P + at.h + i) * frame.Q + column
            tl.store(to.y + (row[:, None] * head.classes + j[None, :]), logits.to(NUM.dtype), mask=mask)
        elif isinstance(to.y, tl.core.tensor_descriptor_base):  # which leaves out what lies outside
            to.y.store([at.n, at.h + i, at.w, k], rounded.reshape(TILE.images, 1, TILE.columns, TILE.outputs))
        else:
            mask = (rows > i)[:, None] & (filters < K)[None, :]
            row = (image.to(tl.int64) * frame.P + at.h + i) * frame.Q + column
            tl.store(to.y + (row[:, None] * K + filters[None, :]), rounded, mask=mask)
    if to.pooled is not None:
        _store_pooled(accs, to, frame, at, N, k, K, TILE, NUM)
    if to.mean is not None:
        store_stats(accs, rows, slab, filters, K, to.mean, to.m2, to.count, TILE.rows, TILE.outputs, NUM.acc)


@triton.jit
def _store_share(accs, sums_ptr, frame, at, N, k, K_STOP, K, TILE: tl.constexpr):
    """Store this program's sums (share, N, P, Q, K) of its tile, at channels ``k`` below K_STOP."""
    pixel = tl.arange(0, TILE.images * TILE.columns)
    image = at.n + pixel // TILE.columns
    column = at.w + pixel % TILE.columns
    for i in tl.static_range(len(accs)):
        exists = (image < N) & (column < tl.where(at.h + i < frame.P, frame.Q, 0))
        mask = exists[:, None] & (k < K_STOP)[None, :]
        row = ((tl.program_id(1).to(tl.int64) * N + image) * frame.P + at.h + i) * frame.Q + column
        tl.store(sums_ptr + (row[:, None] * K + k[None, :]), accs[i], mask=mask)


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _conv3x3_fwd_kernel(
    x, affine_ptr, x1, affine1_ptr, real_ptr, w, bias_ptr, affine_y_ptr, head_ptr, head_bias_ptr,
    y, mean_ptr, m2_ptr, count_ptr, pooled, pool_scale_ptr,
    N, H, W, top, left, H1, W1, top1, left1, P, Q, C, C1, K, tiles_h, tiles_w, classes,
    SLOPE: tl.constexpr, SLOPE1: tl.constexpr, SLOPE_Y: tl.constexpr, BY: tl.constexpr, HEAD: tl.constexpr,
    ZOOM: tl.constexpr, ZOOM1: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    SHARED: tl.constexpr = TILE.shares > 1
    blocks = tl.cdiv(K, TILE.outputs)
    number = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * TILE.outputs
    at = first_pixel(number, tiles_h, tiles_w, TILE)
    frame = Frame(P, Q, top, left)
    if BY.samples:
        affine_ptr = affine_of(affine_ptr, at.n, C)
    accs = zeros(TILE.images * TILE.columns, TILE.outputs, TILE.rows, NUM)
    accs = _add_source(
        accs, Image(x, N, H, W, C, affine_ptr, SLOPE, real_ptr, ZOOM), frame,
        Filters(w, 0, C + C1, k, K, 9, True), at, False, SHARED, TILE, NUM,
    )  # fmt: skip
    if x1 is not None:
        if BY.samples1:
            affine1_ptr = affine_of(affine1_ptr, at.n, C1)
        accs = _add_source(
            accs, Image(x1, N, H1, W1, C1, affine1_ptr, SLOPE1, real_ptr, ZOOM1), Frame(P, Q, top1, left1),
            Filters(w, C, C + C1, k, K, 9, True), at, False, SHARED, TILE, NUM,
        )  # fmt: skip
    for i in tl.static_range(len(accs)):
        accs = replace(accs, i, release(accs[i], NUM))
    if SHARED:
        _store_share(accs, y, frame, at, N, k + tl.arange(0, TILE.outputs), K, K, TILE)
    else:
        _store_outputs(
            accs, bias_ptr, Head(head_ptr, head_bias_ptr, classes, HEAD),
            Outputs(y, affine_y_ptr, SLOPE_Y, mean_ptr, m2_ptr, count_ptr, pooled, pool_scale_ptr),
            frame, slab_of(number, at.n, N, tiles_h * tiles_w, BY.samples_y), at, N, k, K, TILE, NUM,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _conv3x3_dgrad_kernel(
    dy, w, x, affine_ptr, dx, partial_ptr, x1, affine1_ptr, dx1, partial1_ptr,
    N, H, W, top, left, H1, W1, top1, left1, P, Q, C, C1, C_FIRST, C_TOTAL, K, tiles_h, tiles_w,
    SLOPE: tl.constexpr, SLOPE1: tl.constexpr, SAMPLES: tl.constexpr, SAMPLES1: tl.constexpr,
    ZOOM: tl.constexpr, ZOOM1: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """dx and daffine of one or two sources from dY (N,P,Q,K); tiles cover the frame, the first source's channels are
    the weights' from C_FIRST on. If they are SHARED, dx gets the programs' sums, for all sources together."""
    SHARED: tl.constexpr = TILE.shares > 1
    blocks0 = tl.cdiv(C, TILE.outputs)
    blocks = blocks0
    if x1 is not None:
        blocks += tl.cdiv(C1, TILE.outputs)
    block = tl.program_id(0) % blocks
    number = tl.program_id(0) // blocks
    at = first_pixel(number, tiles_h, tiles_w, TILE)
    c_first = C_FIRST + block * TILE.outputs
    if x1 is not None:
        c_first = tl.where(block < blocks0, c_first, C_FIRST + C + (block - blocks0) * TILE.outputs)
    frame = Frame(P, Q, 0, 0)
    accs = _add_source(
        zeros(TILE.images * TILE.columns, TILE.outputs, TILE.rows, NUM), Image(dy, N, P, Q, K, None, None, None),
        frame, Filters(w, 0, K, c_first, C_TOTAL, 9, False), at, True, SHARED, TILE, NUM,
    )  # fmt: skip
    for i in tl.static_range(len(accs)):
        accs = replace(accs, i, release(accs[i], NUM))
    if SHARED:
        stop = C_FIRST + C
        total = C
        if x1 is not None:
            total += C1
            stop = tl.where(block < blocks0, stop, stop + C1)
        channel = c_first + tl.arange(0, TILE.outputs)
        _store_share(accs, dx, frame, at, N, channel - C_FIRST, stop - C_FIRST, total, TILE)
    elif x1 is not None and block >= blocks0:
        if SAMPLES1:
            affine1_ptr = affine_of(affine1_ptr, at.n, C1)
        _source_gradient(
            accs, Image(x1, N, H1, W1, C1, affine1_ptr, SLOPE1, None, ZOOM1),
            dx1, partial1_ptr, slab_of(number, at.n, N, tiles_h * tiles_w, SAMPLES1).row,
            Frame(P, Q, top1, left1), at, (block - blocks0) * TILE.outputs, TILE, NUM,
        )  # fmt: skip
    else:
        if SAMPLES:
            affine_ptr = affine_of(affine_ptr, at.n, C)
        _source_gradient(
            accs, Image(x, N, H, W, C, affine_ptr, SLOPE, None, ZOOM),
            dx, partial_ptr, slab_of(number, at.n, N, tiles_h * tiles_w, SAMPLES).row,
            Frame(P, Q, top, left), at, block * TILE.outputs, TILE, NUM,
        )  # fmt: skip


@triton.jit
def _source_gradient(
    accs, source, dx, partial_ptr, slab, frame, at, c, TILE: tl.constexpr, NUM: tl.constexpr
):  # fmt: skip
    """Store dx of a source, and the tile's share of daffine in its slab."""
    if TILE.outputs >= 64:  # by halves, or the registers do not suffice
        half: tl.constexpr = TILE.outputs // 2
        low, high = halves(accs, TILE.rows, TILE.images * TILE.columns, TILE.outputs)
        _narrow_gradient(low, source, dx, partial_ptr, slab, frame, at, c, half, TILE, NUM)
        _narrow_gradient(high, source, dx, partial_ptr, slab, frame, at, c + half, half, TILE, NUM)
    else:
        _narrow_gradient(accs, source, dx, partial_ptr, slab, frame, at, c, TILE.outputs, TILE, NUM)


@triton.jit
def _inside(acc, source, frame, at, i, TILE: tl.constexpr):
    """The gradient of row ``i`` of a tile, 0 outside the source and the frame; and where it is inside."""
    pixel = tl.arange(0, TILE.images * TILE.columns)
    h = at.h + i - frame.top
    w = at.w + pixel % TILE.columns - frame.left
    exists = (at.h + i < frame.P) & (h >= 0) & (h < source.H)
    w_stop = tl.where(exists, tl.minimum(source.W, frame.Q - frame.left), 0)
    real = (at.n + pixel // TILE.columns < source.N) & (w >= 0) & (w < w_stop)
    return tl.where(real[:, None], acc, 0.0), real


@triton.jit
def _narrow_gradient(
    accs, source, dx, partial_ptr, slab, frame, at, c,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, NUM: tl.constexpr,
):  # fmt: skip
    """The same for few channels."""
    zoom: tl.constexpr = 1 if source.ZOOM is None else source.ZOOM
    columns: tl.constexpr = TILE.columns // zoom
    pixel = tl.arange(0, TILE.images * columns)
    image = at.n + pixel // columns
    w_first = at.w
    left = frame.left
    height = source.H
    width = source.W
    if source.ZOOM is not None:  # which divides all of them
        w_first = w_first // zoom
        left = left // zoom
        height = height // zoom
        width = width // zoom
    w = w_first + pixel % columns - left
    channel = c + tl.arange(0, CHANNELS)
    # Rows are added element by element, and over the warps once at the end: that goes through shared memory.
    sum_gx = tl.full([TILE.images * columns, CHANNELS], 0.0, NUM.acc)
    sum_g = tl.full([TILE.images * columns, CHANNELS], 0.0, NUM.acc)
    for i in tl.static_range(0, len(accs), zoom):
        h = at.h + i - frame.top
        g, real = _inside(accs[i], source, frame, at, i, TILE)
        if source.ZOOM is not None:  # the four outputs of a pixel lie in one tile
            below, _ = _inside(accs[i + 1], source, frame, at, i + 1, TILE)
            g = tl.sum((g + below).reshape(TILE.images * columns, zoom, CHANNELS), 1)
            h = h // zoom
            h_stop = tl.minimum(height, (frame.P - frame.top + 1) // zoom)
            w_stop = tl.minimum(width, (frame.Q - frame.left + 1) // zoom)
            real = (image < source.N) & (w >= 0) & (w < tl.where((h >= 0) & (h < h_stop), w_stop, 0))
        if not isinstance(dx, tl.core.tensor_descriptor_base):
            mask = real[:, None] & (channel < source.C)[None, :]
            index = ((image.to(tl.int64) * height + h) * width + w)[:, None] * source.C + channel[None, :]
        if source.affine is not None or source.SLOPE is not None:
            # Loaded for each row, because registers are scarce.
            affine = load_affine(source.affine, channel, source.C)
            if isinstance(source.x, tl.core.tensor_descriptor_base):
                value = source.x.load([at.n, h, w_first - left, c])
                value = value.reshape(TILE.images * columns, CHANNELS)
            else:
                value = tl.load(source.x + index, mask=mask, other=0.0)
            g, gx, masked = source_backward(g, value, affine, source.SLOPE, NUM.acc)
            if source.affine is not None:
                sum_gx += gx
                sum_g += masked
        if isinstance(dx, tl.core.tensor_descriptor_base):
            dx.store([at.n, h, w_first - left, c], g.to(NUM.dtype).reshape(TILE.images, 1, columns, CHANNELS))
        else:
            tl.store(dx + index, g.to(NUM.dtype), mask=mask)
    if source.affine is not None:
        affine = load_affine(source.affine, channel, source.C)
        store_affine_gradient(partial_ptr, slab, channel, source.C, affine.scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))


# ---- launchers ---------------------------------------------------------------------------------------------------


def _weights(weight: Tensor, tile: Tile, first: int, second: int) -> Any:
    """Weights (K,9,C) as the kernels read them: ``first`` filters and ``second`` channels at a time."""
    return describe(weight, (weight.shape[0], 9, weight.shape[1]), (first, 1, second), tile.tma)


def conv3x3(
    sources: Sequence[Source],
    size: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    stats: int,
    pool: bool,
    pool_scale: Tensor | None,
    affine: Tensor | None = None,
    slope: float = 1.0,
    head: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y (N, K, *size), normalised by ``affine`` and ``slope``; its mean and biased variance, (K,) or (N, K), empty
    without ``stats``; y pooled by the signs of ``pool_scale`` if ``pool`` and one program has pairs of rows of it, else
    None.

    With the weight and bias of a 1×1 convolution as ``head``, its result in y's stead: nothing else is stored where one
    program has all channels of y.
    """
    x, batch = sources[0].x, sources[0].x.shape[0]
    filters, channels = weight.shape[:2]
    height, width = size
    head_weight, head_bias = (None, None) if head is None else head
    classes = 0 if head_weight is None else head_weight.shape[0]
    dtype = stats_dtype(x.dtype)
    if batch * filters * height * width == 0:
        y = empty_nhwc(x, batch, classes or filters, height, width)
        return y, *of_nothing(x, filters, stats), None
    weight = nhwc(weight)
    tile = choose(
        "conv3x3_fwd", batch, [source.channels for source in sources], filters, height, width,
        [*(source.x for source in sources), weight],
        pointers=filters * x.element_size() % 16 != 0 or any(source.misread(size) for source in sources),
        prologue=not all(source.plain for source in sources),
    )  # fmt: skip
    sources, merged = by_tile(tile, sources), tile_stats(tile, stats)
    first, second = sources[0], sources[1] if len(sources) == 2 else None
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    shared = tile.shares > 1
    heads = not shared and 0 < classes <= 256 and filters <= tile.outputs
    y = empty_nhwc(x, batch, classes if heads else filters, height, width)
    pool = pool and not shared and tile.rows % 2 == 0 and min(height, width) > 1
    pooled = empty_nhwc(x, batch, filters, height // 2, width // 2) if pool else None
    if shared:
        stored: Any = x.new_empty((tile.shares, batch, height, width, filters), dtype=dtype)
    else:
        stored = y if heads else operand(y, tile, tile.outputs, tile.tma)
    partials = Partials(x, tiles, filters, NOTHING if shared else merged)
    launch(
        _conv3x3_fwd_kernel, (tiles * cdiv(filters, tile.outputs), tile.shares),
        *side(first, tile, tile.reduction), *side(second, tile, tile.reduction), real_word(x.device),
        _weights(weight, tile, tile.outputs, tile.reduction), None if shared else dense(bias),
        None if shared else dense(affine), dense(head_weight) if heads else None, dense(head_bias) if heads else None,
        stored, *partials.pointers, None if pooled is None else operand(pooled, tile, tile.outputs, tile.tma, pooled=2),
        dense(pool_scale) if pool else None,
        batch, *first.extent, *(second or first).extent, height, width,
        first.channels, channels - first.channels, filters, tiles_h, tiles_w, classes,
        SLOPE=first.act, SLOPE1=None if second is None else second.act, SLOPE_Y=None if shared else act(slope),
        BY=BySample(first.samples, second is not None and second.samples, not shared and merged == SAMPLES),
        HEAD=block(classes, 256) if heads else 0, ZOOM=first.zoom, ZOOM1=None if second is None else second.zoom,
        **tile.constants(x, hold=not heads or classes <= 16),  # else there are no registers to spare
    )  # fmt: skip
    if shared:
        y, mean, var = add_shares(stored, y, bias, stats)
        y = y if affine is None and slope == 1 else affine_act(y, affine, slope)
    else:
        mean, var = partials.merged() if merged == stats else stats_of(y, stats)
    if head is not None and not heads:
        y, _, _ = conv_down(Source(y, None, 1.0), *head, NOTHING, 1)
    return y, mean, var, pooled


def conv3x3_dgrad(
    dy: Tensor, weight: Tensor, sources: Sequence[Source], mask: Sequence[bool]
) -> list[tuple[Tensor, Tensor]]:
    """(dx, daffine) of each source that ``mask`` asks for, from dY (N, K, P, Q); empty tensors for the others."""
    batch, filters, *size = dy.shape
    height, width = size
    dtype = stats_dtype(dy.dtype)
    weight = nhwc(weight)
    wanted = [source for source, asked in zip(sources, mask, strict=False) if asked]
    first, second = wanted[0], wanted[1] if len(wanted) == 2 else None
    tile = choose(
        "conv3x3_dgrad", batch, [source.channels for source in wanted], filters, height, width,
        [dy, weight, *(source.x for source in wanted)],
    )  # fmt: skip
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    shared = tile.shares > 1
    if not shared and several(tile, wanted):
        pairs = conv3x3_dgrad(dy, weight, list(map(value, sources)), mask)
        return [
            through(dz, source) if asked else (dz, daffine)
            for (dz, daffine), source, asked in zip(pairs, sources, mask, strict=False)
        ]
    total = sum(source.channels for source in wanted)
    sums = dy.new_empty((tile.shares, batch, height, width, total) if shared else 0, dtype=dtype)
    # Of these the kernel gives the gradients of their values.
    apart = [shared or (source.doubled and not doubled.sums(tile, source)) for source in wanted]
    gradients: list[tuple[Tensor, Tensor | None]] = []
    for source, of_value in zip(wanted, apart, strict=True):
        if shared:
            dx = sums
        elif of_value:
            dx = empty_nhwc(source.x, batch, source.channels, source.height, source.width)
        else:
            dx = empty_nhwc(source.x, *source.x.shape)
        if source.sticks_out(size) and not shared:
            dx.zero_()  # what lies outside the frame
        gradients.append((dx, None if of_value else affine_slabs(source.x, source.affine, tiles)))
    blocks = sum(cdiv(source.channels, tile.outputs) for source in wanted)
    if tiles * blocks:
        pointers, acts, zooms, samples = [], [], [], []
        for source, of_value, (dx, partial) in zip(wanted, apart, gradients, strict=True):
            zoom = None if of_value else source.zoom
            moved = functools.partial(operand, tile=tile, channels=tile.part, tma=tile.tma, pooled=zoom or 1)
            out = sums if shared else moved(dx)
            # Where the gradient is the value's, x is not read: of a doubled one it has another size.
            x = out if of_value and source.doubled else moved(source.x)
            pointers.append((x, None if of_value else source.affine, out, partial))
            acts.append(None if of_value else source.act)
            zooms.append(zoom)
            samples.append(source.samples and not of_value)
        launch(
            _conv3x3_dgrad_kernel, (tiles * blocks, tile.shares),
            operand(dy, tile, tile.reduction, tile.tma), _weights(weight, tile, tile.reduction, tile.outputs),
            *pointers[0], *(pointers[1] if second is not None else [None] * 4),
            batch, *first.extent, *(second or first).extent, height, width, first.channels, (second or first).channels,
            0 if mask[0] else sources[0].channels, weight.shape[1], filters, tiles_h, tiles_w,
            SLOPE=acts[0], SLOPE1=acts[-1] if second is not None else None,
            SAMPLES=samples[0], SAMPLES1=second is not None and samples[-1],
            ZOOM=zooms[0], ZOOM1=zooms[-1] if second is not None else None, **tile.constants(dy),
        )  # fmt: skip
    if shared:
        g, _, _ = add_shares(sums, empty_nhwc(dy, batch, total, height, width), None, NOTHING)
        return split_gradient(g, sources, mask)
    found = [
        doubled.gradient(dx, source.channels, dx.shape[2:], source) if of_value else (dx, affine_gradient(dx, partial))
        for source, of_value, (dx, partial) in zip(wanted, apart, gradients, strict=True)
    ]
    return [found.pop(0) if asked else no_gradients(dy) for _, asked in zip(sources, mask, strict=False)]
