"""Gradients of the convolutions of :mod:`fastunet.kernels.conv`, each exact.

With M = N·H·W of the output, z the normalised sources and g the gradient with respect to z:

    dY = dy + dmean/M + (2/M)·dvar·(y − mean)                       one pass, also Σ dY for the bias
    dW[k,r,s,c] = Σ dY·z                                            slabs of pixels, summed in a fixed order
    g = the other convolution of dY with W;  m = not (z ≤ 0)
    dx = g·m·scale;  dscale = Σ g·m·(x − centre);  dshift = Σ g·m;  dcentre = −scale·dshift      in dgrad's epilogue

The gradient of a convolution is a transposed one and the reverse, so dgrad runs the forward's main loop.

Layout: activations NHWC, weights as in the forward. Bytes: reads dy and y, writes dY, reads it twice, reads each source
twice, writes each dx; dW's slabs are written and read once. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.aten import memory_format, stats_dtype
from fastunet.kernels.algorithms import computing
from fastunet.kernels.common import (
    OPTIONS,
    Source,
    accumulator,
    block,
    empty_nhwc,
    load_affine,
    nhwc,
    normalise,
    precision,
    sum_slabs,
)
from fastunet.kernels.conv import SIZES, accumulate, tile_pixels, tile_shape
from fastunet.kernels.conv_image import conv_image_wgrad, serves
from fastunet.kernels.pool import pool_backward

# ---- kernels ----------------------------------------------------------------------------------------------------


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
    n, p, q, r_first, s_first = tile_pixels(tile, tiles_h, tiles_w, top, left, TRANSPOSED, STRIDE, PAD, TILE_H, TILE_W)
    exists = (p < P) & (q < Q)
    # What was cropped away got no gradient.
    framed = exists & (p + top >= 0) & (p + top < PF) & (q + left >= 0) & (q + left < QF)
    g = accumulate(
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
        n, p, q, _, _ = tile_pixels(tile, tiles_h, tiles_w, 0, 0, False, STRIDE, PAD, TILE_H, TILE_W)
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
        BLOCK_M=block_m, BLOCK_K=block_k, ACC=accumulator(like.dtype), **OPTIONS, num_warps=4,
    )  # fmt: skip
    return out, sum_slabs(sums) if need_sum else sums


def _dgrad(
    dy: Tensor, weight: Tensor, source: Source, frame: Sequence[int], first_channel: int, stride: int, pad: int,
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
    tile_h, tile_w = tile_shape(rows, columns, 128 if narrow else 64)
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
        ACC=accumulator(x.dtype), PRECISION=precision(x.dtype),
        **OPTIONS, num_warps=8 if narrow else 4, num_stages=3,
    )  # fmt: skip
    return dx, sum_slabs(partials) if source.affine is not None else partials


def _wgrad(
    pairs: Sequence[tuple[Source, Source]], frame: Sequence[int], weight: Tensor, stride: int, pad: int
) -> Tensor:
    """dW, with weight's dtype and strides, from (fixed, moved) operands that fill it along its second dimension."""
    rows, columns, ksize = weight.shape[0], weight.shape[1], weight.shape[-1]
    fixed = pairs[0][0]
    batch = fixed.x.shape[0]
    if fixed.x.numel() == 0 or weight.numel() == 0:
        return torch.zeros_like(weight)
    narrow = weight.dtype != torch.float32
    tile_h, tile_w = tile_shape(fixed.height, fixed.width, 128 if narrow else 32)
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
            ACC=accumulator(weight.dtype), PRECISION=precision(weight.dtype), **OPTIONS, num_warps=4, num_stages=2,
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
    dp: Tensor | None,
    y: Tensor,
    mean: Tensor,
    pool_scale: Tensor | None,
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
    mixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv2d_backward`, and for ``mixed`` :func:`fastunet.kernels.conv.conv2d`."""
    pad = weight.shape[-1] // 2
    sources = [Source(x0, affine0, relu0, offset[0], offset[1])]
    if x1 is not None:
        sources.append(Source(x1, affine1, relu1, offset[2], offset[3]))
    if dp is not None:
        stats = None if dmean is None or dvar is None else (dmean, dvar, mean)
        dy = pool_backward(y, pool_scale, dp, dy, stats)
        if stats is not None:
            dmean, dvar = None, None
    dy, dbias = _form_dy(dy, dmean, dvar, y, mean, mask[3])
    grads: list[Tensor] = []
    rows = weight.shape[-1] == 3 and stride == 1
    if rows and (mask[0] or mask[1]):
        asked = [source for source, wanted in zip(sources, mask, strict=False) if wanted]
        compute = computing("conv3x3_dgrad", asked, weight.shape[0], size[1], mixed)
        for pair in compute(dy, weight, sources, mask):
            grads += pair
    else:
        first = 0
        for source, wanted in zip(sources, mask, strict=False):
            grads += _dgrad(dy, weight, source, size, first, stride, pad, True) if wanted else _nothing(x0)
            first += source.channels
    if x1 is None:
        grads += _nothing(x0)
    dweight = weight.new_empty(0)
    if mask[2] and rows and dy.numel() and weight.numel():
        picture = len(sources) == 1 and serves(sources[0], size, weight)
        compute = computing("conv3x3_wgrad", sources, weight.shape[0], size[1], mixed)
        dweight = conv_image_wgrad(dy, sources[0]) if picture else compute(dy, weight, sources)
        dweight = dweight.to(weight.dtype).contiguous(memory_format=memory_format(weight))
    elif mask[2]:
        fixed = Source(dy, None, False)
        dweight = _wgrad([(fixed, source) for source in sources], size, weight, stride, pad)
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
    source = Source(x, affine, relu)
    dy, dbias = _form_dy(dy, dmean, dvar, y, mean, mask[2])
    dx, daffine = _dgrad(dy, weight, source, x.shape[-2:], 0, 2, pad, False) if mask[0] else _nothing(x)
    moved = Source(dy, None, False)
    dweight = _wgrad([(source, moved)], dy.shape[-2:], weight, 2, pad) if mask[1] else weight.new_empty(0)
    return dx, daffine, dweight, dbias.to(weight.dtype)
