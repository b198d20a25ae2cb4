"""3×3 convolutions of stride 1: implicit GEMMs that load a row of pixels once for up to three rows of outputs.

    y[n,p,q,k] = bias[k] + Σ_{r,s,c} z[n, p + r − 1, q + s − 1, c] · W[k,c,r,s],    z = act(scale·(x − centre) + shift)

The gradient with respect to z is the same sum over dY with W mirrored in r and s and transposed in k and c; the
epilogue of the dgrad kernel turns it into dx and daffine. One main loop serves both.

A program computes ROWS rows of IMAGES·COLUMNS pixels, for BLOCK_K outputs, in an accumulator per row. For each block of
channels and each column s of the filter it loads ROWS + 2 rows of the source, normalises each once, in registers, and
multiplies it with up to three rows r of the filter: 3·(ROWS + 2) tiles, not 9·ROWS, come from the L2 cache and through
the prologue. z is zero outside its source: padding comes after normalisation. TMA (Hopper and later) fills zeros in by
itself; act(shift) is masked only in tiles that touch the border.

Layout: activations NHWC, weights (K,3,3,C). Bytes: forward reads each source and W and writes y; dgrad reads dY, W and
the sources and writes dx. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastunet.kernels.affine import affine_act, source_backward, store_affine_gradient
from fastunet.kernels.common import (
    OPTIONS,
    PROPAGATE_ALL,
    Source,
    accumulator,
    add_product,
    block,
    cdiv,
    describe,
    element,
    empty_nhwc,
    halves,
    held,
    hold,
    launch,
    load_affine,
    load_channels,
    load_tap,
    nhwc,
    normalise,
    normalise_real,
    precision,
    real_word,
    release,
    sum_slabs,
    tile_place,
)
from fastunet.kernels.conv_aten import split_gradient
from fastunet.kernels.conv_down import conv_down
from fastunet.kernels.statistics import add_shares, merge_stats, store_stats
from fastunet.kernels.tiles import Tile, choose
from fastunet.layout import stats_dtype

SIZES = ["N", "H", "W", "top", "left", "H1", "W1", "top1", "left1", "P", "Q", "tiles_h", "tiles_w"]


# ---- the main loop -----------------------------------------------------------------------------------------------


@triton.jit
def replace(items, i: tl.constexpr, item):
    """The tuple with another item i."""
    return items[:i] + (item,) + items[i + 1 :]  # noqa: RUF005 - Triton knows no unpacking


@triton.jit
def load_row(
    x, real_ptr, scale, shift, centre, n, h, w, c, N, H, W, C, h_low, h_high, w_low, w_high,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
    AXIS: tl.constexpr = 1,
):  # fmt: skip
    """Row h of IMAGES pictures: COLUMNS pixels from w on, BLOCK_C channels from c on; normalised, 0 out of bounds,
    with channels along ``AXIS``."""
    pixel = tl.arange(0, IMAGES * COLUMNS)
    image = n + pixel // COLUMNS
    column = w + pixel % COLUMNS
    width = tl.where((h >= h_low) & (h < h_high), tl.maximum(w_high - w_low, 0), 0)
    real = tl.where(image < N, column - w_low, -1).to(tl.uint32) < width.to(tl.uint32)
    if TMA:
        z = x.load([n, h, w, c]).reshape(IMAGES * COLUMNS, BLOCK_C)
        if AXIS == 0:
            z = z.T
    else:
        z = load_channels(x, image, h, column, c, H, W, C, real, MASKED, BLOCK_C, AXIS)
    if HAS_AFFINE or RELU:
        z = normalise_real(z, real, real_ptr, scale, shift, centre, HAS_AFFINE, RELU, MASKED, ACC, AXIS)
    return z


@triton.jit
def _accumulate(
    accs, start, stop, x, affine_ptr, real_ptr, w, n, h, q, N, H, W, h_low, h_high, w_low, w_high,
    C, c_first, C_LAST, k, K,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MASKED: tl.constexpr, MIRRORED: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add steps start … stop of one source's share to ROWS rows, whose first pixel lies over its pixel (h, q).

    The source's channel c is the weights' channel c_first + c, of C_LAST. Beyond [h_low, h_high) × [w_low, w_high) the
    source is zero.
    """
    # The mirrored filter has its taps in reverse, and its inputs and outputs swapped.
    first: tl.constexpr = 8 if MIRRORED else 0
    turn: tl.constexpr = -1 if MIRRORED else 1
    for step in tl.range(start, stop):
        s = step % 3
        c = step // 3 * BLOCK_C
        scale, shift, centre = load_affine(affine_ptr, c + tl.arange(0, BLOCK_C), C, HAS_AFFINE, ACC)
        # Channels beyond C read another source's weights, or zeros: the source is zero there.
        taps = (
            load_tap(w, k, c_first + c, first + turn * (s), K, C_LAST, 9, not MIRRORED, TMA, BLOCK_C, BLOCK_K),
            load_tap(w, k, c_first + c, first + turn * (3 + s), K, C_LAST, 9, not MIRRORED, TMA, BLOCK_C, BLOCK_K),
            load_tap(w, k, c_first + c, first + turn * (6 + s), K, C_LAST, 9, not MIRRORED, TMA, BLOCK_C, BLOCK_K),
        )
        for i in tl.static_range(ROWS + 2):
            z = load_row(
                x, real_ptr, scale, shift, centre, n, h + (i - 1), q + s - 1, c, N, H, W, C,
                h_low, h_high, w_low, w_high, HAS_AFFINE, RELU, MASKED, TMA, IMAGES, COLUMNS, BLOCK_C, ACC,
            )  # fmt: skip
            for r in tl.static_range(3):
                if i - r >= 0 and i - r < ROWS:
                    accs = replace(accs, i - r, add_product(accs[i - r], z, taps[r], HELD, ACC, PRECISION))
    return accs


@triton.jit
def _add_source(
    accs, x, affine_ptr, real_ptr, w, n, p, q, N, H, W, top, left, P, Q, C, c_first, C_LAST, k, K,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, MIRRORED: tl.constexpr, TMA: tl.constexpr, SHARED: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of a source (H, W) placed at (top, left) in the frame (P, Q) to the tile whose first pixel is
    (p, q), or this program's part of it if it is SHARED; pixels are masked only where the tile or its halo leaves
    the source."""
    h_low, h_high = tl.maximum(0, -top), tl.minimum(H, P - top)
    w_low, w_high = tl.maximum(0, -left), tl.minimum(W, Q - left)
    h = p - top
    first = q - left
    begin = 0
    steps = tl.cdiv(C, BLOCK_C) * 3
    if SHARED:
        begin = steps * tl.program_id(1) // tl.num_programs(1)
        steps = steps * (tl.program_id(1) + 1) // tl.num_programs(1)
    # TMA fills zeros in; without a shift they need no mask. Two loops, of which one is empty, rather than two
    # branches: their shared memory is then the same.
    MAY_MASK: tl.constexpr = HAS_AFFINE or not TMA
    free = steps
    if MAY_MASK:
        interior = (h > h_low) & (h + ROWS < h_high) & (first > w_low) & (first + COLUMNS < w_high) & (n + IMAGES <= N)
        free = tl.where(interior, steps, begin)
    accs = _accumulate(
        accs, begin, free, x, affine_ptr, real_ptr, w, n, h, first, N, H, W, h_low, h_high, w_low, w_high,
        C, c_first, C_LAST, k, K,
        HAS_AFFINE, RELU, False, MIRRORED, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
    )  # fmt: skip
    if MAY_MASK:
        accs = _accumulate(
            accs, free, steps, x, affine_ptr, real_ptr, w, n, h, first, N, H, W, h_low, h_high, w_low, w_high,
            C, c_first, C_LAST, k, K,
            HAS_AFFINE, RELU, True, MIRRORED, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
        )  # fmt: skip
    return accs


@triton.jit
def _zeros(
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    HELD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of ROWS rows."""
    return (hold(tl.zeros([IMAGES * COLUMNS, BLOCK_K], ACC), HELD),) * ROWS


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=PROPAGATE_ALL)


@triton.jit
def _store_pooled(
    ys, pooled, scale_ptr, n, p, q, N, P, Q, k, K,
    HAS_SCALE: tl.constexpr, TMA: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """2×2-pool the tile's ROWS rows by the sign of the scale to come; see :mod:`fastunet.kernels.pool`."""
    filters = k + tl.arange(0, BLOCK_K)
    scale = tl.full([BLOCK_K], 1.0, tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + filters, mask=filters < K, other=1.0).to(tl.float32)
    negative = (scale < 0)[None, :]
    flat = (scale == 0)[None, :]
    odd = (tl.arange(0, IMAGES * COLUMNS) % 2 == 1)[:, None]
    window = tl.arange(0, IMAGES * COLUMNS // 2)
    image = n + window // (COLUMNS // 2)
    column = q // 2 + window % (COLUMNS // 2)
    for i in tl.static_range(0, ROWS, 2):
        upper = ys[i].to(ACC)
        lower = ys[i + 1].to(ACC)
        upper = tl.where(negative, -upper, upper)
        lower = tl.where(negative, -lower, lower)
        # Where the scale is 0 the first pixel of the window wins over all but a NaN.
        upper = tl.where(flat & odd & (upper == upper), float("-inf"), upper)
        lower = tl.where(flat & (lower == lower), float("-inf"), lower)
        both = _larger(upper, lower).reshape(IMAGES * COLUMNS // 2, 2, BLOCK_K)
        best = tl.reduce(both, 1, _larger)
        best = tl.where(negative, -best, best).to(DTYPE)
        h = (p + i) // 2
        if TMA:
            pooled.store([n, h, q // 2, k], best.reshape(IMAGES, 1, COLUMNS // 2, BLOCK_K))
        else:
            w_stop = tl.where(h < P // 2, Q // 2, 0)
            mask = ((image < N) & (column < w_stop))[:, None] & (filters < K)[None, :]
            place = ((image.to(tl.int64) * (P // 2) + h) * (Q // 2) + column)[:, None] * K + filters[None, :]
            tl.store(pooled + place, best, mask=mask)


@triton.jit
def _store_outputs(
    accs, bias_ptr, affine_ptr, head_ptr, head_bias_ptr, y, mean_ptr, m2_ptr, count_ptr, pooled, pool_scale_ptr,
    tile, n, p, q, N, P, Q, k, K, LOGITS,
    BIAS: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr, STATS: tl.constexpr,
    POOL: tl.constexpr, POOL_SCALE: tl.constexpr, HEAD: tl.constexpr, HEAD_BIAS: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a tile of y, what it is pooled to, and its statistics, from its sums; y is normalised if an affine says.
    Under a head, a block of HEAD ≥ LOGITS outputs of y's 1×1 convolution is stored in y's stead."""
    pixel = tl.arange(0, IMAGES * COLUMNS)
    image = n + pixel // COLUMNS
    column = q + pixel % COLUMNS
    filters = k + tl.arange(0, BLOCK_K)
    rows = tl.where((image < N) & (column < Q), P - p, 0)  # that exist, at each pixel
    if BIAS:
        bias = tl.load(bias_ptr + filters, mask=filters < K, other=0.0).to(ACC)
    scale, shift, centre = load_affine(affine_ptr, filters, K, AFFINE, ACC)
    if HEAD:
        j = tl.arange(0, HEAD)
        head = tl.load(
            head_ptr + j[None, :] * K + filters[:, None], mask=(j < LOGITS)[None, :] & (filters < K)[:, None], other=0.0
        )
        head_bias = tl.zeros([HEAD], ACC)
        if HEAD_BIAS:
            head_bias += tl.load(head_bias_ptr + j, mask=j < LOGITS, other=0.0).to(ACC)
    for i in tl.static_range(ROWS):
        acc = accs[i]
        if BIAS:
            acc += bias[None, :]
        if AFFINE or RELU:
            acc = normalise(acc, scale, shift, centre, AFFINE, RELU, ACC)
        rounded = acc.to(DTYPE)
        accs = replace(accs, i, rounded)
        if HEAD:
            logits = tl.dot(rounded, head, input_precision=PRECISION, out_dtype=ACC) + head_bias[None, :]
            mask = (rows > i)[:, None] & (j < LOGITS)[None, :]
            place = ((image.to(tl.int64) * P + p + i) * Q + column)[:, None] * LOGITS + j[None, :]
            tl.store(y + place, logits.to(DTYPE), mask=mask)
        elif TMA:  # which leaves out what lies outside
            y.store([n, p + i, q, k], rounded.reshape(IMAGES, 1, COLUMNS, BLOCK_K))
        else:
            mask = (rows > i)[:, None] & (filters < K)[None, :]
            place = ((image.to(tl.int64) * P + p + i) * Q + column)[:, None] * K + filters[None, :]
            tl.store(y + place, rounded, mask=mask)
    if POOL:
        _store_pooled(
            accs, pooled, pool_scale_ptr, n, p, q, N, P, Q, k, K,
            POOL_SCALE, TMA, IMAGES, ROWS, COLUMNS, BLOCK_K, ACC, DTYPE,
        )  # fmt: skip
    if STATS:
        store_stats(accs, rows, tile, filters, K, mean_ptr, m2_ptr, count_ptr, ROWS, BLOCK_K, ACC)


@triton.jit
def _store_share(
    accs, sums_ptr, n, p, q, N, P, Q, k, K_STOP, K,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store this program's sums (share, N, P, Q, K) of its tile, at channels ``k`` below K_STOP."""
    pixel = tl.arange(0, IMAGES * COLUMNS)
    image = n + pixel // COLUMNS
    column = q + pixel % COLUMNS
    for i in tl.static_range(ROWS):
        mask = ((image < N) & (column < tl.where(p + i < P, Q, 0)))[:, None] & (k < K_STOP)[None, :]
        place = (((tl.program_id(1).to(tl.int64) * N + image) * P + p + i) * Q + column)[:, None] * K + k[None, :]
        tl.store(sums_ptr + place, accs[i], mask=mask)


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _conv3x3_fwd_kernel(
    x, affine_ptr, x1, affine1_ptr, real_ptr, w, bias_ptr, affine_y_ptr, head_ptr, head_bias_ptr,
    y, mean_ptr, m2_ptr, count_ptr, pooled, pool_scale_ptr,
    N, H, W, top, left, H1, W1, top1, left1, P, Q, C, C1, K, tiles_h, tiles_w, LOGITS,
    AFFINE: tl.constexpr, RELU: tl.constexpr, TWO: tl.constexpr, AFFINE1: tl.constexpr, RELU1: tl.constexpr,
    BIAS: tl.constexpr, AFFINE_Y: tl.constexpr, RELU_Y: tl.constexpr, STATS: tl.constexpr,
    POOL: tl.constexpr, POOL_SCALE: tl.constexpr, HEAD: tl.constexpr, HEAD_BIAS: tl.constexpr, TMA: tl.constexpr,
    SHARED: tl.constexpr, HELD: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * BLOCK_K
    n, p, q = tile_place(tile, tiles_h, tiles_w, IMAGES, ROWS, COLUMNS)
    accs = _add_source(
        _zeros(IMAGES, ROWS, COLUMNS, BLOCK_K, HELD, ACC), x, affine_ptr, real_ptr, w, n, p, q,
        N, H, W, top, left, P, Q, C, 0, C + C1, k, K,
        AFFINE, RELU, False, TMA, SHARED, IMAGES, ROWS, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
    )  # fmt: skip
    if TWO:
        accs = _add_source(
            accs, x1, affine1_ptr, real_ptr, w, n, p, q, N, H1, W1, top1, left1, P, Q, C1, C, C + C1, k, K,
            AFFINE1, RELU1, False, TMA, SHARED, IMAGES, ROWS, COLUMNS, BLOCK_C, BLOCK_K, HELD, ACC, PRECISION,
        )  # fmt: skip
    for i in tl.static_range(ROWS):
        accs = replace(accs, i, release(accs[i], HELD, ACC))
    filters = k + tl.arange(0, BLOCK_K)
    if SHARED:
        _store_share(accs, y, n, p, q, N, P, Q, filters, K, K, IMAGES, ROWS, COLUMNS)
    else:
        _store_outputs(
            accs, bias_ptr, affine_y_ptr, head_ptr, head_bias_ptr, y, mean_ptr, m2_ptr, count_ptr, pooled,
            pool_scale_ptr, tile, n, p, q, N, P, Q, k, K, LOGITS,
            BIAS, AFFINE_Y, RELU_Y, STATS, POOL, POOL_SCALE, HEAD, HEAD_BIAS, TMA,
            IMAGES, ROWS, COLUMNS, BLOCK_K, ACC, DTYPE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _conv3x3_dgrad_kernel(
    dy, w, x, affine_ptr, dx, partial_ptr, x1, affine1_ptr, dx1, partial1_ptr,
    N, H, W, top, left, H1, W1, top1, left1, P, Q, C, C1, C_FIRST, C_TOTAL, K, tiles_h, tiles_w,
    AFFINE: tl.constexpr, RELU: tl.constexpr, TWO: tl.constexpr, AFFINE1: tl.constexpr, RELU1: tl.constexpr,
    TMA: tl.constexpr, SHARED: tl.constexpr, HELD: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and daffine of one or two sources from dY (N,P,Q,K); tiles cover the frame, the first source's channels are
    the weights' from C_FIRST on. If they are SHARED, dx gets the programs' sums, for all sources together."""
    blocks0 = tl.cdiv(C, BLOCK_C)
    blocks = blocks0
    if TWO:
        blocks += tl.cdiv(C1, BLOCK_C)
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks
    n, p, q = tile_place(tile, tiles_h, tiles_w, IMAGES, ROWS, COLUMNS)
    c_first = C_FIRST + block * BLOCK_C
    if TWO:
        c_first = tl.where(block < blocks0, c_first, C_FIRST + C + (block - blocks0) * BLOCK_C)
    accs = _add_source(
        _zeros(IMAGES, ROWS, COLUMNS, BLOCK_C, HELD, ACC), dy, dy, dy, w, n, p, q, N, P, Q, 0, 0, P, Q,
        K, 0, K, c_first, C_TOTAL,
        False, False, True, TMA, SHARED, IMAGES, ROWS, COLUMNS, BLOCK_K, BLOCK_C, HELD, ACC, PRECISION,
    )  # fmt: skip
    for i in tl.static_range(ROWS):
        accs = replace(accs, i, release(accs[i], HELD, ACC))
    if SHARED:
        stop = C_FIRST + C
        total = C
        if TWO:
            total += C1
            stop = tl.where(block < blocks0, stop, stop + C1)
        channel = c_first + tl.arange(0, BLOCK_C)
        _store_share(accs, dx, n, p, q, N, P, Q, channel - C_FIRST, stop - C_FIRST, total, IMAGES, ROWS, COLUMNS)
    elif TWO and block >= blocks0:
        _source_gradient(
            accs, x1, affine1_ptr, dx1, partial1_ptr, tile, n, p, q, N, H1, W1, top1, left1, P, Q,
            (block - blocks0) * BLOCK_C, C1, AFFINE1, RELU1, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C, ACC, DTYPE,
        )  # fmt: skip
    else:
        _source_gradient(
            accs, x, affine_ptr, dx, partial_ptr, tile, n, p, q, N, H, W, top, left, P, Q,
            block * BLOCK_C, C, AFFINE, RELU, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C, ACC, DTYPE,
        )  # fmt: skip


@triton.jit
def _source_gradient(
    accs, x, affine_ptr, dx, partial_ptr, tile, n, p, q, N, H, W, top, left, P, Q, c_first, C,
    AFFINE: tl.constexpr, RELU: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store dx of a source placed at (top, left) in the frame (P, Q), and this tile's share of daffine."""
    if BLOCK_C >= 64:  # by halves, or the registers do not suffice
        low, high = halves(accs, ROWS, IMAGES * COLUMNS, BLOCK_C)
        _narrow_gradient(
            low, x, affine_ptr, dx, partial_ptr, tile, n, p, q, N, H, W, top, left, P, Q, c_first, C,
            AFFINE, RELU, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C // 2, ACC, DTYPE,
        )  # fmt: skip
        _narrow_gradient(
            high, x, affine_ptr, dx, partial_ptr, tile, n, p, q, N, H, W, top, left, P, Q, c_first + BLOCK_C // 2, C,
            AFFINE, RELU, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C // 2, ACC, DTYPE,
        )  # fmt: skip
    else:
        _narrow_gradient(
            accs, x, affine_ptr, dx, partial_ptr, tile, n, p, q, N, H, W, top, left, P, Q, c_first, C,
            AFFINE, RELU, TMA, IMAGES, ROWS, COLUMNS, BLOCK_C, ACC, DTYPE,
        )  # fmt: skip


@triton.jit
def _narrow_gradient(
    accs, x, affine_ptr, dx, partial_ptr, tile, n, p, q, N, H, W, top, left, P, Q, c_first, C,
    AFFINE: tl.constexpr, RELU: tl.constexpr, TMA: tl.constexpr,
    IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same for few channels."""
    pixel = tl.arange(0, IMAGES * COLUMNS)
    image = n + pixel // COLUMNS
    w = q + pixel % COLUMNS - left
    c = c_first + tl.arange(0, BLOCK_C)
    # Rows are added where they lie: each sum over warps goes through shared memory.
    sum_gx = tl.zeros([IMAGES * COLUMNS, BLOCK_C], ACC)
    sum_g = tl.zeros([IMAGES * COLUMNS, BLOCK_C], ACC)
    for i in tl.static_range(ROWS):
        h = p + i - top
        w_stop = tl.where((p + i < P) & (h >= 0) & (h < H), tl.minimum(W, Q - left), 0)
        real = (image < N) & (w >= 0) & (w < w_stop)
        g = tl.where(real[:, None], accs[i], 0.0)
        if not TMA:
            mask = real[:, None] & (c < C)[None, :]
            place = ((image.to(tl.int64) * H + h) * W + w)[:, None] * C + c[None, :]
        if AFFINE or RELU:
            # Loaded for each row, because registers are scarce.
            scale, shift, centre = load_affine(affine_ptr, c, C, AFFINE, ACC)
            if TMA:
                value = x.load([n, h, q - left, c_first]).reshape(IMAGES * COLUMNS, BLOCK_C)
            else:
                value = tl.load(x + place, mask=mask, other=0.0)
            g, gx, masked = source_backward(g, value, scale, shift, centre, AFFINE, RELU, ACC)
            if AFFINE:
                sum_gx += gx
                sum_g += masked
        if TMA:
            dx.store([n, h, q - left, c_first], g.to(DTYPE).reshape(IMAGES, 1, COLUMNS, BLOCK_C))
        else:
            tl.store(dx + place, g.to(DTYPE), mask=mask)
    if AFFINE:
        scale, _, _ = load_affine(affine_ptr, c, C, AFFINE, ACC)
        store_affine_gradient(partial_ptr, tile, c, C, scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))


# ---- launchers ---------------------------------------------------------------------------------------------------


def cropped(source: Source, frame: Sequence[int]) -> bool:
    """Whether part of the source lies outside the frame: TMA would read it, and it must count as zero."""
    return (
        min(source.top, source.left) < 0
        or source.top + source.height > frame[0]
        or source.left + source.width > frame[1]
    )


def operand(x: Tensor, tile: Tile, channels: int, pooled: int = 1) -> Any:
    """An NHWC activation as the kernels read and write it, ``channels`` at a time; 2×2-``pooled`` if that is 2."""
    batch, depth, height, width = x.shape
    blocks = tile.images, 1, tile.columns // pooled, channels
    return describe(x, (batch, height, width, depth), blocks, tile.tma)


def _weights(weight: Tensor, tile: Tile, first: int, second: int) -> Any:
    """Weights (K,9,C) as the kernels read them: ``first`` filters and ``second`` channels at a time."""
    return describe(weight, (weight.shape[0], 9, weight.shape[1]), (first, 1, second), tile.tma)


def conv3x3(
    sources: Sequence[Source],
    frame: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    stats: bool,
    pool: bool,
    pool_scale: Tensor | None,
    affine: Tensor | None = None,
    relu: bool = False,
    head: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y (N, K, *frame), normalised by ``affine`` and ``relu``; its mean and biased variance (K,) if ``stats``, else
    empty; y pooled by the signs of ``pool_scale`` if ``pool`` and one program has pairs of rows of it, else None.

    With the weight and bias of a 1×1 convolution as ``head``, its result in y's stead: stored alone where one program
    has all channels of y.
    """
    first, second = sources[0], sources[-1]
    x, batch = first.x, first.x.shape[0]
    filters, channels = weight.shape[:2]
    height, width = frame
    head_weight, head_bias = (None, None) if head is None else head
    classes = 0 if head_weight is None else head_weight.shape[0]
    dtype = stats_dtype(x.dtype)
    if batch * filters * height * width == 0:
        y = empty_nhwc(x, batch, classes or filters, height, width)
        mean = x.new_zeros(filters if stats else 0, dtype=dtype)
        return y, mean, mean.clone(), None
    weight = nhwc(weight)
    sticks_out = any(cropped(source, frame) for source in sources)
    tile = choose(
        "conv3x3_fwd", batch, [source.channels for source in sources], filters, height, width,
        [*(source.x for source in sources), weight], pointers=sticks_out or filters * x.element_size() % 16 != 0,
        prologue=any(source.affine is not None or source.relu for source in sources),
    )  # fmt: skip
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    alone = tile.shares == 1
    heads = alone and 0 < classes <= 256 and filters <= tile.outputs
    y = empty_nhwc(x, batch, classes if heads else filters, height, width)
    sums = y if alone else x.new_empty((tile.shares, batch, height, width, filters), dtype=dtype)
    partials = [x.new_empty((tiles, filters) if stats and alone else 0, dtype=dtype) for _ in range(2)]
    counts = x.new_empty(tiles if stats and alone else 0, dtype=dtype)
    pool = pool and alone and tile.rows % 2 == 0 and min(height, width) > 1
    pooled = empty_nhwc(x, batch, filters, height // 2, width // 2) if pool else None
    scale = None if pool_scale is None else pool_scale.contiguous()
    launch(
        _conv3x3_fwd_kernel, (tiles * cdiv(filters, tile.outputs), tile.shares),
        operand(x, tile, tile.reduction), first.affine_or_x,
        operand(second.x, tile, tile.reduction), second.affine_or_x, real_word(x.device),
        _weights(weight, tile, tile.outputs, tile.reduction), x if bias is None else bias.contiguous(),
        x if affine is None else affine.contiguous(),
        x if head_weight is None else head_weight.contiguous(), x if head_bias is None else head_bias.contiguous(),
        operand(y, tile, tile.outputs) if alone and not heads else sums, *partials, counts,
        x if pooled is None else operand(pooled, tile, tile.outputs, 2),
        x if scale is None else scale,
        batch, first.height, first.width, first.top, first.left, second.height, second.width, second.top, second.left,
        height, width, first.channels, channels - first.channels, filters, tiles_h, tiles_w,
        classes,
        AFFINE=first.affine is not None, RELU=first.relu, TWO=len(sources) == 2,
        AFFINE1=second.affine is not None, RELU1=second.relu,
        BIAS=bias is not None and alone, AFFINE_Y=affine is not None and alone, RELU_Y=relu and alone,
        STATS=stats and alone, POOL=pool, POOL_SCALE=pool and scale is not None,
        HEAD=block(classes, 256) if heads else 0, HEAD_BIAS=heads and head_bias is not None,
        TMA=tile.tma, SHARED=not alone,
        HELD=held(x) and not (heads and classes > 16),  # which have no registers to spare
        IMAGES=tile.images, ROWS=tile.rows, COLUMNS=tile.columns, BLOCK_C=tile.reduction, BLOCK_K=tile.outputs,
        ACC=accumulator(x.dtype), DTYPE=element(x.dtype), PRECISION=precision(x.dtype),
        **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not alone:
        y, mean, var = add_shares(sums, y, bias, stats)
        y = y if affine is None and not relu else affine_act(y, affine, relu)
    else:
        mean, var = merge_stats(partials[0], partials[1], counts) if stats else partials
    if head is not None and not heads:
        y, _, _ = conv_down(Source(y, None, False), *head, False, 1)
    return y, mean, var, pooled


def conv3x3_dgrad(
    dy: Tensor, weight: Tensor, sources: Sequence[Source], mask: Sequence[bool]
) -> list[tuple[Tensor, Tensor]]:
    """(dx, daffine) of each source that ``mask`` asks for, from dY (N, K, P, Q); empty tensors for the others."""
    batch, filters, height, width = dy.shape
    weight = nhwc(weight)
    starts = [0, sources[0].channels]
    wanted = [i for i in range(len(sources)) if mask[i]]
    first, second = sources[wanted[0]], sources[wanted[-1]]
    tile = choose(
        "conv3x3_dgrad", batch, [sources[i].channels for i in wanted], filters, height, width,
        [dy, weight, *(sources[i].x for i in wanted)],
    )  # fmt: skip
    tiles, tiles_h, tiles_w = tile.grid(batch, height, width)
    alone = tile.shares == 1
    total = sum(sources[i].channels for i in wanted)
    sums = dy.new_empty(0 if alone else (tile.shares, batch, height, width, total), dtype=stats_dtype(dy.dtype))
    gradients: list[tuple[Tensor, Tensor]] = []
    for i, source in enumerate(sources):
        x = source.x
        if i not in wanted or not alone:
            gradients.append((x.new_empty(0), x.new_empty(0, dtype=stats_dtype(x.dtype))))
            continue
        dx = empty_nhwc(x, *x.shape)
        if cropped(source, (height, width)):
            dx.zero_()  # what lies outside the frame
        shape = (tiles, 3, source.channels) if source.affine is not None else 0
        gradients.append((dx, x.new_empty(shape, dtype=stats_dtype(x.dtype))))
    blocks = sum(cdiv(sources[i].channels, tile.outputs) for i in wanted)
    if tiles * blocks:
        part = tile.outputs // 2 if tile.outputs >= 64 else tile.outputs
        (dx, partial), (dx1, partial1) = gradients[wanted[0]], gradients[wanted[-1]]
        out, out1 = (operand(dx, tile, part), operand(dx1, tile, part)) if alone else (sums, sums)
        launch(
            _conv3x3_dgrad_kernel, (tiles * blocks, tile.shares),
            operand(dy, tile, tile.reduction), _weights(weight, tile, tile.reduction, tile.outputs),
            operand(first.x, tile, part), first.affine_or_x, out, partial,
            operand(second.x, tile, part), second.affine_or_x, out1, partial1,
            batch, first.height, first.width, first.top, first.left,
            second.height, second.width, second.top, second.left,
            height, width, first.channels, second.channels, starts[wanted[0]], weight.shape[1], filters,
            tiles_h, tiles_w,
            AFFINE=first.affine is not None and alone, RELU=first.relu and alone, TWO=len(wanted) == 2,
            AFFINE1=second.affine is not None and alone, RELU1=second.relu and alone,
            TMA=tile.tma, SHARED=not alone, HELD=held(dy),
            IMAGES=tile.images, ROWS=tile.rows, COLUMNS=tile.columns, BLOCK_C=tile.outputs, BLOCK_K=tile.reduction,
            ACC=accumulator(dy.dtype), DTYPE=element(dy.dtype), PRECISION=precision(dy.dtype),
            **OPTIONS, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if not alone:
        g, _, _ = add_shares(sums, empty_nhwc(dy, batch, total, height, width), None, False)
        return split_gradient(g, sources, mask)
    return [
        (dx, sum_slabs(partial) if i in wanted and sources[i].affine is not None else partial)
        for i, (dx, partial) in enumerate(gradients)
    ]
