"""Convolutions as implicit GEMMs whose inputs are normalised on load.

Forward, over the taps (r, s) and channels c of one or two sources z = act(scale·(x − centre) + shift):

    conv2d            y[n,p,q,k] = bias[k] + Σ z[n, p·stride + r − pad, q·stride + s − pad, c] · W[k,c,r,s]
    conv_transpose2d  y[n,p,q,k] = bias[k] + Σ z[n, (p + pad − r)/2, (q + pad − s)/2, c] · W[c,k,r,s]   (where exact)

z is zero outside its source: padding comes after normalisation. With statistics, each tile also yields the mean and the
centred sum of squares of its y as rounded to y's dtype; a fixed tree merges them into mean and biased variance.

Backward, with M = N·H·W and g the gradient with respect to z:

    dY = dy + dmean/M + (2/M)·dvar·(y − mean)                       one pass, also Σ dY for the bias
    dW[k,r,s,c] = Σ dY·z                                            slabs of pixels, summed in a fixed order
    g = the other convolution of dY with W;  m = not (z ≤ 0)
    dx = g·m·scale;  dscale = Σ g·m·(x − centre);  dshift = Σ g·m;  dcentre = −scale·dshift      in dgrad's epilogue

The gradient of a convolution is a transposed one and the reverse: both directions share one main loop, `_accumulate`.
A transposed stride-2 tile covers pixels of one parity, for which only every second tap exists: no work is wasted.

Layout: activations NHWC, weights as channels_last memory, (K,R,S,C) for conv2d and (C,R,S,K) for conv_transpose2d; one
copy of the weights serves forward and dgrad. Bytes: forward reads each source and W and writes y; backward reads
dy, y, writes dY, reads it twice, reads each source twice, writes each dx. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.aten import memory_format, stats_dtype
from fastunet.kernels.common import accumulator, block, empty_nhwc, load_affine, nhwc, normalise, sum_slabs

SIZES = ["N", "H", "W", "P", "Q", "PF", "QF", "top", "left", "tiles_h", "tiles_w"]


# ---- the shared main loop ----------------------------------------------------------------------------------------


@triton.jit
def _accumulate(
    acc, x_ptr, affine_ptr, w_ptr,
    n, p, q, inside,                 # image; frame coordinates [M] of the output pixels; which of them exist
    H, W, HF, WF, top, left,         # the source's size, the frame's, the source's place in the frame
    C, c_first, C_TOTAL, k, K_FIRST, K, K_TOTAL,
    r_first, s_first,                # transposed: the first tap of this tile's parity
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_AFFINE: tl.constexpr, RELU: tl.constexpr, REDUCE_FASTEST: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_K] += Σ over taps and channels of one source; W is read at channels c_first + c and K_FIRST + k."""
    # The part of the source inside the frame, in the source's coordinates: beyond it the value is 0, not act(shift).
    h_low, h_high = tl.maximum(0, -top), tl.minimum(H, HF - top)
    w_low, w_high = tl.maximum(0, -left), tl.minimum(W, WF - left)
    image = n.to(tl.int64) * H
    step: tl.constexpr = STRIDE if TRANSPOSED else 1
    taps_s = (KSIZE - s_first + step - 1) // step
    taps = (KSIZE - r_first + step - 1) // step * taps_s
    for c_start in range(0, C, BLOCK_C):
        c = c_start + tl.arange(0, BLOCK_C)
        scale, shift, centre = load_affine(affine_ptr, c, C, HAS_AFFINE, ACC)
        for tap in range(taps):
            r = r_first + tap // taps_s * step
            s = s_first + tap % taps_s * step
            if TRANSPOSED:
                h, w = (p + PAD - r) // STRIDE - top, (q + PAD - s) // STRIDE - left
            else:
                h, w = p * STRIDE + r - PAD - top, q * STRIDE + s - PAD - left
            real = inside & (h >= h_low) & (h < h_high) & (w >= w_low) & (w < w_high)
            mask = real[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + ((image + h) * W + w)[:, None] * C + c[None, :], mask=mask, other=0.0)
            if HAS_AFFINE or RELU:
                z = tl.where(mask, normalise(x, scale, shift, centre, HAS_AFFINE, RELU, ACC), 0.0).to(x.dtype)
            else:
                z = x
            tap_index = r * KSIZE + s
            if REDUCE_FASTEST:  # W[k][r][s][c]
                place = ((K_FIRST + k)[None, :] * (KSIZE * KSIZE) + tap_index) * C_TOTAL + (c_first + c)[:, None]
            else:  # W[c][r][s][k]
                place = ((c_first + c)[:, None] * (KSIZE * KSIZE) + tap_index) * K_TOTAL + (K_FIRST + k)[None, :]
            weights = tl.load(w_ptr + place, mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(z, weights, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _tile(index, tiles_h, tiles_w, top, left, TRANSPOSED: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
          TILE_H: tl.constexpr, TILE_W: tl.constexpr):  # fmt: skip
    """Image n, pixels (p, q) [TILE_H·TILE_W] of tile ``index``, and the first taps of its parity (else 0)."""
    column = index % tiles_w
    row = index // tiles_w % tiles_h
    rest = index // tiles_w // tiles_h
    pixel = tl.arange(0, TILE_H * TILE_W)
    p = row * TILE_H + pixel // TILE_W
    q = column * TILE_W + pixel % TILE_W
    r_first = 0
    s_first = 0
    if TRANSPOSED and STRIDE == 2:
        odd_p = rest % 4 // 2
        odd_q = rest % 2
        rest = rest // 4
        p = p * 2 + odd_p
        q = q * 2 + odd_q
        r_first = (odd_p + top + PAD) & 1
        s_first = (odd_q + left + PAD) & 1
    return rest, p, q, r_first, s_first


# ---- forward -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, "H1", "W1", "top1", "left1"])
def _conv_fwd_kernel(
    x_ptr, affine_ptr, x1_ptr, affine1_ptr, w_ptr, bias_ptr, y_ptr, mean_ptr, m2_ptr, count_ptr,
    H, W, top, left, H1, W1, top1, left1, PF, QF, P, Q, C, C1, K, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    AFFINE: tl.constexpr, RELU: tl.constexpr, TWO: tl.constexpr, AFFINE1: tl.constexpr, RELU1: tl.constexpr,
    BIAS: tl.constexpr, STATS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks_k
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n, p, q, r_first, s_first = _tile(tile, tiles_h, tiles_w, 0, 0, TRANSPOSED, STRIDE, PAD, TILE_H, TILE_W)
    inside = (p < P) & (q < Q)
    acc = tl.zeros([TILE_H * TILE_W, BLOCK_K], ACC)
    acc = _accumulate(
        acc, x_ptr, affine_ptr, w_ptr, n, p, q, inside, H, W, PF, QF, top, left, C, 0, C + C1, k, 0, K, K,
        r_first, s_first, KSIZE, STRIDE, PAD, TRANSPOSED, AFFINE, RELU, not TRANSPOSED, BLOCK_C, ACC, PRECISION,
    )  # fmt: skip
    if TWO:
        acc = _accumulate(
            acc, x1_ptr, affine1_ptr, w_ptr, n, p, q, inside, H1, W1, PF, QF, top1, left1, C1, C, C + C1, k, 0, K, K,
            r_first, s_first, KSIZE, STRIDE, PAD, TRANSPOSED, AFFINE1, RELU1, not TRANSPOSED, BLOCK_C, ACC, PRECISION,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    mask = inside[:, None] & (k < K)[None, :]
    tl.store(y_ptr + ((n.to(tl.int64) * P + p) * Q + q)[:, None] * K + k[None, :], y, mask=mask)
    if STATS:
        # Of y as stored. A tile of a parity that has no pixels counts 0 and must not divide by it.
        count = tl.sum(inside.to(tl.int32), 0).to(ACC)
        rounded = tl.where(mask, y.to(ACC), 0.0)
        mean = tl.sum(rounded, 0) / tl.maximum(count, 1.0)
        deviation = tl.where(mask, rounded - mean[None, :], 0.0)
        place = tile.to(tl.int64) * K + k
        tl.store(mean_ptr + place, mean, mask=k < K)
        tl.store(m2_ptr + place, tl.sum(deviation * deviation, 0), mask=k < K)
        tl.store(count_ptr + tile, count)


@triton.jit(do_not_specialize=["tiles"])
def _merge_stats_kernel(
    mean_ptr, m2_ptr, count_ptr, out_mean_ptr, out_m2_ptr, out_count_ptr, tiles, K,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Merge GROUP tiles' (mean, M2, count) into one (Chan, Golub, LeVeque 1979); the last merge stores the variance."""
    group = tl.program_id(0)
    t = group * GROUP + tl.arange(0, GROUP)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (t < tiles)[:, None] & (k < K)[None, :]
    place = t.to(tl.int64)[:, None] * K + k[None, :]
    n = tl.load(count_ptr + t, mask=t < tiles, other=0.0)
    mean = tl.load(mean_ptr + place, mask=mask, other=0.0)
    m2 = tl.load(m2_ptr + place, mask=mask, other=0.0)
    total = tl.sum(n, 0)
    merged = tl.sum(mean * n[:, None], 0) / tl.maximum(total, 1.0)
    apart = mean - merged[None, :]
    spread = tl.sum(m2 + apart * apart * n[:, None], 0)
    if LAST:
        spread = spread / tl.maximum(total, 1.0)
    out = group.to(tl.int64) * K + k
    tl.store(out_mean_ptr + out, merged, mask=k < K)
    tl.store(out_m2_ptr + out, spread, mask=k < K)
    if tl.program_id(1) == 0:
        tl.store(out_count_ptr + group, total)


# ---- backward ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pixels", "chunk"])
def _form_dy_kernel(
    dy_ptr, dmean_ptr, dvar_ptr, y_ptr, mean_ptr, out_ptr, sum_ptr, pixels, chunk, K,
    HAS_DY: tl.constexpr, HAS_DMEAN: tl.constexpr, HAS_DVAR: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dY for ``chunk`` rows of K values, and their sum per k for the bias; stored only if it differs from dy."""
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    level = tl.zeros([BLOCK_K], ACC)
    slope = tl.zeros([BLOCK_K], ACC)
    mean = tl.zeros([BLOCK_K], ACC)
    count = pixels.to(ACC)
    if HAS_DMEAN:
        level = tl.load(dmean_ptr + k, mask=k < K, other=0.0) / count
    if HAS_DVAR:
        slope = tl.load(dvar_ptr + k, mask=k < K, other=0.0) * (2.0 / count)
        mean = tl.load(mean_ptr + k, mask=k < K, other=0.0)
    total = tl.zeros([BLOCK_K], ACC)
    first = tl.program_id(0).to(tl.int64) * chunk
    for start in range(0, chunk, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = ((m < chunk) & (first + m < pixels))[:, None] & (k < K)[None, :]
        place = (first + m)[:, None] * K + k[None, :]
        d = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        if HAS_DY:
            d += tl.load(dy_ptr + place, mask=mask, other=0.0).to(ACC)
        if HAS_DVAR:
            d += slope[None, :] * (tl.load(y_ptr + place, mask=mask, other=0.0).to(ACC) - mean[None, :])
        d += level[None, :]
        if HAS_DMEAN or HAS_DVAR:
            tl.store(out_ptr + place, d.to(out_ptr.dtype.element_ty), mask=mask)
        if SUM:
            total += tl.sum(tl.where(mask, d, 0.0), 0)
    if SUM:
        tl.store(sum_ptr + tl.program_id(0).to(tl.int64) * K + k, total, mask=k < K)


@triton.jit(do_not_specialize=SIZES)
def _conv_dgrad_kernel(
    dy_ptr, w_ptr, x_ptr, affine_ptr, dx_ptr, partial_ptr,
    H, W, P, Q, PF, QF, top, left, K, C, C_FIRST, C_TOTAL, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    AFFINE: tl.constexpr, RELU: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one source (P, Q, C) placed at (top, left) in the frame (PF, QF), from dY (H, W, K)."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // blocks_c
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n, p, q, r_first, s_first = _tile(tile, tiles_h, tiles_w, top, left, TRANSPOSED, STRIDE, PAD, TILE_H, TILE_W)
    exists = (p < P) & (q < Q)
    # What was cropped away got no gradient.
    framed = exists & (p + top >= 0) & (p + top < PF) & (q + left >= 0) & (q + left < QF)
    g = _accumulate(
        tl.zeros([TILE_H * TILE_W, BLOCK_C], ACC), dy_ptr, dy_ptr, w_ptr, n, p + top, q + left, framed,
        H, W, H, W, 0, 0, K, 0, K, c, C_FIRST, C, C_TOTAL, r_first, s_first,
        KSIZE, STRIDE, PAD, TRANSPOSED, False, False, not TRANSPOSED, BLOCK_K, ACC, PRECISION,
    )  # fmt: skip
    mask = exists[:, None] & (c < C)[None, :]
    place = ((n.to(tl.int64) * P + p) * Q + q)[:, None] * C + c[None, :]
    if AFFINE or RELU:
        x = tl.load(x_ptr + place, mask=mask, other=0.0)
        scale, shift, centre = load_affine(affine_ptr, c, C, AFFINE, ACC)
        if RELU:
            g = tl.where(normalise(x, scale, shift, centre, AFFINE, RELU, ACC) <= 0.0, 0.0, g)
        if AFFINE:
            g = tl.where(mask, g, 0.0)
            partial = tile.to(tl.int64) * 3 * C + c
            dshift = tl.sum(g, 0)
            tl.store(partial_ptr + partial, tl.sum(g * (x.to(ACC) - centre[None, :]), 0), mask=c < C)
            tl.store(partial_ptr + partial + C, dshift, mask=c < C)
            tl.store(partial_ptr + partial + 2 * C, -scale * dshift, mask=c < C)
            g = g * scale[None, :]
    tl.store(dx_ptr + place, g.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "tiles", "tiles_per_slab"])
def _conv_wgrad_kernel(
    fixed_ptr, fixed_affine_ptr, moved_ptr, moved_affine_ptr, partial_ptr,
    P, Q, H, W, PF, QF, top, left, A, B, B_FIRST, B_TOTAL, tiles, tiles_per_slab, tiles_h, tiles_w,
    KSIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    FIXED_AFFINE: tl.constexpr, FIXED_RELU: tl.constexpr, MOVED_AFFINE: tl.constexpr, MOVED_RELU: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[slab, a, tap, b] = Σ over the slab's pixels (p, q) of fixed[p, q, a] · moved[p·stride + r − pad, …, b].

    conv2d: fixed is dY, moved a source. conv_transpose2d: fixed is the source, moved dY.
    """
    blocks_a = tl.cdiv(A, BLOCK_A)
    blocks_b = tl.cdiv(B, BLOCK_B)
    program = tl.program_id(0)
    b = program % blocks_b * BLOCK_B + tl.arange(0, BLOCK_B)
    tap = program // blocks_b % (KSIZE * KSIZE)
    a = program // blocks_b // (KSIZE * KSIZE) % blocks_a * BLOCK_A + tl.arange(0, BLOCK_A)
    slab = program // blocks_b // (KSIZE * KSIZE) // blocks_a
    r, s = tap // KSIZE, tap % KSIZE
    h_low, h_high = tl.maximum(0, -top), tl.minimum(H, PF - top)
    w_low, w_high = tl.maximum(0, -left), tl.minimum(W, QF - left)
    a_scale, a_shift, a_centre = load_affine(fixed_affine_ptr, a, A, FIXED_AFFINE, ACC)
    b_scale, b_shift, b_centre = load_affine(moved_affine_ptr, b, B, MOVED_AFFINE, ACC)
    acc = tl.zeros([BLOCK_A, BLOCK_B], ACC)
    first = slab * tiles_per_slab
    for tile in range(first, tl.minimum(first + tiles_per_slab, tiles)):
        n, p, q, _, _ = _tile(tile, tiles_h, tiles_w, 0, 0, False, STRIDE, PAD, TILE_H, TILE_W)
        inside = (p < P) & (q < Q)
        a_mask = inside[:, None] & (a < A)[None, :]
        image = n.to(tl.int64)
        fixed = tl.load(fixed_ptr + ((image * P + p) * Q + q)[:, None] * A + a[None, :], mask=a_mask, other=0.0)
        if FIXED_AFFINE or FIXED_RELU:
            z = normalise(fixed, a_scale, a_shift, a_centre, FIXED_AFFINE, FIXED_RELU, ACC)
            fixed = tl.where(a_mask, z, 0.0).to(fixed.dtype)
        h, w = p * STRIDE + r - PAD - top, q * STRIDE + s - PAD - left
        real = inside & (h >= h_low) & (h < h_high) & (w >= w_low) & (w < w_high)
        b_mask = real[:, None] & (b < B)[None, :]
        moved = tl.load(moved_ptr + ((image * H + h) * W + w)[:, None] * B + b[None, :], mask=b_mask, other=0.0)
        if MOVED_AFFINE or MOVED_RELU:
            z = normalise(moved, b_scale, b_shift, b_centre, MOVED_AFFINE, MOVED_RELU, ACC)
            moved = tl.where(b_mask, z, 0.0).to(moved.dtype)
        acc = tl.dot(tl.trans(fixed), moved, acc, input_precision=PRECISION, out_dtype=ACC)
    place = ((slab.to(tl.int64) * A + a)[:, None] * (KSIZE * KSIZE) + tap) * B_TOTAL + (B_FIRST + b)[None, :]
    tl.store(partial_ptr + place, acc, mask=(a < A)[:, None] & (b < B)[None, :])


# ---- launchers ---------------------------------------------------------------------------------------------------


def _precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as PyTorch's own convolutions do, by torch.backends.cudnn.conv."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    lowered = dtype == torch.float32 and convolutions.fp32_precision == "tf32"
    return "tf32" if lowered and torch.version.hip is None else "ieee"


def _tile_shape(height: int, width: int, pixels: int) -> tuple[int, int]:
    """(TILE_H, TILE_W) of at most ``pixels`` and at least 16, at most 16 wide, not much larger than the picture."""
    columns = block(width, 16, 4)
    return block(height, pixels // columns, 16 // columns), columns


class _Source:
    """One operand: memory, affine, activation, and its place in the frame."""

    def __init__(self, x: Tensor, affine: Tensor | None, relu: bool, top: int = 0, left: int = 0):
        self.x, self.affine, self.relu, self.top, self.left = nhwc(x), affine, relu, top, left
        self.channels, self.height, self.width = x.shape[1:]
        self.affine_or_x = self.x if affine is None else affine.contiguous()


def _forward(
    sources: Sequence[_Source],
    frame: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    stats: bool,
    stride: int,
    pad: int,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var of either convolution over the sources in their frame."""
    first, second = sources[0], sources[-1]
    x, batch = first.x, first.x.shape[0]
    ksize = weight.shape[-1]
    filters = weight.shape[1] if transposed else weight.shape[0]
    if transposed:
        height, width = 2 * first.height, 2 * first.width
        parities, tile_height, tile_width = 4, first.height, first.width
    else:
        height, width = ((n + 2 * pad - ksize) // stride + 1 for n in frame)
        parities, tile_height, tile_width = 1, height, width
    y = empty_nhwc(x, batch, filters, height, width)
    dtype = stats_dtype(x.dtype)
    if y.numel() == 0:
        mean = x.new_zeros(filters if stats else 0, dtype=dtype)
        return y, mean, mean.clone()
    narrow = x.dtype != torch.float32
    tile_h, tile_w = _tile_shape(tile_height, tile_width, 128 if narrow else 64)
    tiles_h, tiles_w = triton.cdiv(tile_height, tile_h), triton.cdiv(tile_width, tile_w)
    tiles = batch * parities * tiles_h * tiles_w
    partials = [x.new_empty((tiles, filters) if stats else 0, dtype=dtype) for _ in range(2)]
    counts = x.new_empty(tiles if stats else 0, dtype=dtype)
    block_k = block(filters, 64 if narrow else 32)
    block_c = block(max(s.channels for s in sources), 32 if narrow else 16)
    _conv_fwd_kernel[(tiles * triton.cdiv(filters, block_k),)](
        x, first.affine_or_x, second.x, second.affine_or_x, nhwc(weight), x if bias is None else bias.contiguous(), y,
        *partials, counts,
        first.height, first.width, first.top, first.left, second.height, second.width, second.top, second.left,
        frame[0], frame[1], height, width, first.channels, second.channels if len(sources) == 2 else 0, filters,
        tiles_h, tiles_w,
        KSIZE=ksize, STRIDE=stride, PAD=pad, TRANSPOSED=transposed,
        AFFINE=first.affine is not None, RELU=first.relu, TWO=len(sources) == 2,
        AFFINE1=second.affine is not None, RELU1=second.relu, BIAS=bias is not None, STATS=stats,
        TILE_H=tile_h, TILE_W=tile_w, BLOCK_C=block_c, BLOCK_K=block_k,
        ACC=accumulator(x.dtype), PRECISION=_precision(x.dtype),
        num_warps=8 if narrow else 4, num_stages=3 if narrow and not transposed and len(sources) == 1 else 2,
    )  # fmt: skip
    if not stats:
        return y, partials[0], partials[1]
    return y, *_merge_stats(partials[0], partials[1], counts)


def _merge_stats(mean: Tensor, m2: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K,) from the tiles' (tiles, K) means and M2 and (tiles,) counts."""
    group = 64
    tiles, filters = mean.shape
    block_k = block(filters, 32)
    while True:
        groups = triton.cdiv(tiles, group)
        merged = mean.new_empty((groups, filters)), mean.new_empty((groups, filters)), mean.new_empty(groups)
        _merge_stats_kernel[(groups, triton.cdiv(filters, block_k))](
            mean, m2, count, *merged, tiles, filters, GROUP=group, BLOCK_K=block_k, LAST=groups == 1, num_warps=4
        )
        mean, m2, count = merged
        tiles = groups
        if groups == 1:
            return mean[0], m2[0]


def conv2d(
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    stats: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv2d`; nothing normalised is stored, so there is nothing to ``save``."""
    sources = [_Source(x0, affine0, relu0, offset[0], offset[1])]
    if x1 is not None:
        sources.append(_Source(x1, affine1, relu1, offset[2], offset[3]))
    y, mean, var = _forward(sources, size, weight, bias, stats, stride, weight.shape[-1] // 2, False)
    return y, mean, var, x0.new_empty(0)


def conv_transpose2d(
    x: Tensor, affine: Tensor | None, relu: bool, weight: Tensor, bias: Tensor | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv_transpose2d`."""
    pad = 1 if weight.shape[-1] == 3 else 0
    return _forward([_Source(x, affine, relu)], x.shape[-2:], weight, bias, stats, 2, pad, True)


def _form_dy(
    dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, y: Tensor, mean: Tensor, need_sum: bool
) -> tuple[Tensor, Tensor]:
    """dY in NHWC memory, and its sum per channel if asked for (else empty)."""
    like = y if dy is None else dy
    batch, filters, height, width = like.shape
    dy = None if dy is None else nhwc(dy)
    forms = dmean is not None or dvar is not None
    pixels = batch * height * width
    if not (forms or need_sum):
        assert dy is not None
        return dy, like.new_empty(0)
    out = empty_nhwc(like, *like.shape) if forms or dy is None else dy
    if like.numel() == 0:
        return out, like.new_zeros(filters if need_sum else 0)
    block_k = block(filters, 64)
    block_m = 4096 // block_k
    chunk = block_m * max(1, triton.cdiv(pixels, block_m * 2048))
    programs = triton.cdiv(pixels, chunk)
    sums = like.new_empty((programs, filters) if need_sum else 0, dtype=stats_dtype(like.dtype))
    _form_dy_kernel[(programs, triton.cdiv(filters, block_k))](
        out if dy is None else dy, sums if dmean is None else dmean.contiguous(),
        sums if dvar is None else dvar.contiguous(), nhwc(y) if dvar is not None else out, mean.contiguous(), out, sums,
        pixels, chunk, filters,
        HAS_DY=dy is not None, HAS_DMEAN=dmean is not None, HAS_DVAR=dvar is not None, SUM=need_sum,
        BLOCK_M=block_m, BLOCK_K=block_k, ACC=accumulator(like.dtype), num_warps=4,
    )  # fmt: skip
    return out, sum_slabs(sums) if need_sum else sums


def _dgrad(
    dy: Tensor, weight: Tensor, source: _Source, frame: Sequence[int], first_channel: int, stride: int, pad: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, daffine) of one source, from the gradient dY; ``transposed`` says how dY is gathered."""
    x, channels = source.x, source.channels
    batch, filters, height, width = dy.shape
    dx = empty_nhwc(x, *x.shape)
    if dx.numel() == 0:
        return dx, x.new_zeros((3, channels) if source.affine is not None else 0, dtype=stats_dtype(x.dtype))
    parities = stride * stride if transposed else 1
    step = stride if transposed else 1
    rows, columns = triton.cdiv(source.height, step), triton.cdiv(source.width, step)
    narrow = x.dtype != torch.float32
    tile_h, tile_w = _tile_shape(rows, columns, 128 if narrow else 64)
    tiles_h, tiles_w = triton.cdiv(rows, tile_h), triton.cdiv(columns, tile_w)
    tiles = batch * parities * tiles_h * tiles_w
    partials = x.new_empty((tiles, 3, channels) if source.affine is not None else 0, dtype=stats_dtype(x.dtype))
    block_c = block(channels, 64 if narrow else 32)
    _conv_dgrad_kernel[(tiles * triton.cdiv(channels, block_c),)](
        dy, nhwc(weight), x, source.affine_or_x, dx, partials,
        height, width, source.height, source.width, frame[0], frame[1], source.top, source.left,
        filters, channels, first_channel, weight.shape[1] if transposed else weight.shape[0], tiles_h, tiles_w,
        KSIZE=weight.shape[-1], STRIDE=stride, PAD=pad, TRANSPOSED=transposed,
        AFFINE=source.affine is not None, RELU=source.relu,
        TILE_H=tile_h, TILE_W=tile_w, BLOCK_K=block(filters, 32 if narrow else 16), BLOCK_C=block_c,
        ACC=accumulator(x.dtype), PRECISION=_precision(x.dtype),
        num_warps=8 if narrow else 4, num_stages=3,
    )  # fmt: skip
    return dx, sum_slabs(partials) if source.affine is not None else partials


def _wgrad(
    pairs: Sequence[tuple[_Source, _Source]], frame: Sequence[int], weight: Tensor, stride: int, pad: int
) -> Tensor:
    """dW, with weight's dtype and strides, from (fixed, moved) operands that fill it along its second dimension."""
    rows, columns, ksize = weight.shape[0], weight.shape[1], weight.shape[-1]
    fixed = pairs[0][0]
    batch = fixed.x.shape[0]
    if fixed.x.numel() == 0 or weight.numel() == 0:
        return torch.zeros_like(weight)
    narrow = weight.dtype != torch.float32
    tile_h, tile_w = _tile_shape(fixed.height, fixed.width, 128 if narrow else 32)
    tiles_h, tiles_w = triton.cdiv(fixed.height, tile_h), triton.cdiv(fixed.width, tile_w)
    tiles = batch * tiles_h * tiles_w
    widest = 64 if narrow else 32
    block_a, block_b = block(rows, widest), block(max(moved.channels for _, moved in pairs), widest)
    # Enough programs to fill a large GPU a few times over, of a few tiles each; the same on every device, for the same
    # bits.
    per_slab = triton.cdiv(rows, block_a) * triton.cdiv(columns, block_b) * ksize * ksize
    tiles_per_slab = max(4, triton.cdiv(tiles, triton.cdiv(1024, per_slab)))
    slabs = triton.cdiv(tiles, tiles_per_slab)
    partials = weight.new_empty((slabs, rows, ksize, ksize, columns), dtype=stats_dtype(weight.dtype))
    first = 0
    for fixed, moved in pairs:
        programs = slabs * triton.cdiv(rows, block_a) * triton.cdiv(moved.channels, block_b) * ksize * ksize
        _conv_wgrad_kernel[(programs,)](
            fixed.x, fixed.affine_or_x, moved.x, moved.affine_or_x, partials,
            fixed.height, fixed.width, moved.height, moved.width, frame[0], frame[1], moved.top, moved.left,
            rows, moved.channels, first, columns, tiles, tiles_per_slab, tiles_h, tiles_w,
            KSIZE=ksize, STRIDE=stride, PAD=pad,
            FIXED_AFFINE=fixed.affine is not None, FIXED_RELU=fixed.relu,
            MOVED_AFFINE=moved.affine is not None, MOVED_RELU=moved.relu,
            TILE_H=tile_h, TILE_W=tile_w, BLOCK_A=block_a, BLOCK_B=block_b,
            ACC=accumulator(weight.dtype), PRECISION=_precision(weight.dtype), num_warps=4, num_stages=2,
        )  # fmt: skip
        first += moved.channels
    dweight = sum_slabs(partials).permute(0, 3, 1, 2).to(weight.dtype)
    return dweight.contiguous(memory_format=memory_format(weight))


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for the gradients of a source that were not asked for."""
    return x.new_empty(0), x.new_empty(0, dtype=stats_dtype(x.dtype))


def conv2d_backward(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    y: Tensor,
    mean: Tensor,
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    z: Tensor,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv2d_backward`."""
    pad = weight.shape[-1] // 2
    sources = [_Source(x0, affine0, relu0, offset[0], offset[1])]
    if x1 is not None:
        sources.append(_Source(x1, affine1, relu1, offset[2], offset[3]))
    dy, dbias = _form_dy(dy, dmean, dvar, y, mean, mask[3])
    grads: list[Tensor] = []
    first = 0
    for source, wanted in zip(sources, mask, strict=False):
        grads += _dgrad(dy, weight, source, size, first, stride, pad, True) if wanted else _nothing(x0)
        first += source.channels
    if x1 is None:
        grads += _nothing(x0)
    fixed = _Source(dy, None, False)
    dweight = (
        _wgrad([(fixed, source) for source in sources], size, weight, stride, pad) if mask[2] else weight.new_empty(0)
    )
    return grads[0], grads[1], grads[2], grads[3], dweight, dbias.to(weight.dtype)


def conv_transpose2d_backward(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    y: Tensor,
    mean: Tensor,
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv_transpose2d_backward`."""
    pad = 1 if weight.shape[-1] == 3 else 0
    source = _Source(x, affine, relu)
    dy, dbias = _form_dy(dy, dmean, dvar, y, mean, mask[2])
    dx, daffine = _dgrad(dy, weight, source, x.shape[-2:], 0, 2, pad, False) if mask[0] else _nothing(x)
    moved = _Source(dy, None, False)
    dweight = _wgrad([(source, moved)], dy.shape[-2:], weight, 2, pad) if mask[1] else weight.new_empty(0)
    return dx, daffine, dweight, dbias.to(weight.dtype)
