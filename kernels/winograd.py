"""3×3 convolutions by Winograd's minimal filtering F(2×2, 3×3): 2.25 times fewer multiplications (Lavin & Gray 2015).

For every 2×2 outputs Y of a filter g (3×3) over a patch d (4×4) of z = act(scale·(x − centre) + shift), 0 beyond its
source:

    V = Bᵀ d B,  U = G g Gᵀ,  M = Σ_c V ⊙ U,  Y = Aᵀ M A

         1  0 −1  0          1   0   0
    Bᵀ = 0  1  1  0     G =  ½   ½   ½     Aᵀ = 1  1  1  0
         0 −1  1  0          ½  −½   ½          0  1 −1 −1
         0  1  0 −1          0   0   1

M is 16 matrix products [patches, C] × [C, K], which ATen computes in one batch. The gradient with respect to z is the
same over dY, with g mirrored and transposed. An odd last row or column of a picture is left out of its patch.

Numerics: V and U are rounded to the tensors' dtype and partly cancel in Y. At 256 and 512 channels the largest error
is 1.9 to 2.0 times that of the direct convolution in bfloat16 and 1.5 times in float16, in the Euclidean norm 2.3
times; M in 16 bits would make it 2.1 to 2.5, and so is float32. In float16, V is stored as a quarter, so that no sum of
four values overflows. An infinity in z reaches all of its patch, as NaN.

Layout: activations NHWC, weights (K,3,3,C), V (16, patches, C), U (16, K, C), M (16, patches, K). Bytes: reads each
source or dY about once; writes and reads V, four times as large, and M, of 16 float32 for 4 outputs; the epilogue reads
what the direct convolution's reads. Transforms in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import stats_dtype

from .affine import affine_gradient, affine_slabs, no_gradients, source_backward, store_affine_gradient
from .common import Source, block, cdiv, dense, empty_nhwc, load_affine, nhwc, normalise
from .gemm import Image, Window
from .launching import accumulator, launch
from .statistics import Partials, of_nothing, store_stats

_SIZES = ["patches", "H", "W", "top", "left", "P", "Q", "patches_h", "patches_w"]
_BLOCK_T, _BLOCK_C = 16, 64  # 16 bytes a thread and access for 4 warps


# ---- transforms --------------------------------------------------------------------------------------------------


# Row u of Bᵀ adds (u = 1) or subtracts the second of these two.
_FIRST = tl.constexpr((0, 1, 2, 1))
_SECOND = tl.constexpr((2, 2, 1, 3))


@triton.jit
def _combine(a, b, u: tl.constexpr):
    """The sum or the difference that row u of Bᵀ makes."""
    return a + b if u == 1 else a - b


@triton.jit
def _g(a, b, c, u: tl.constexpr):
    """Entry u of G·(a, b, c)."""
    if u == 0:
        entry = a
    elif u == 1:
        entry = (a + b + c) * 0.5
    elif u == 2:
        entry = (a - b + c) * 0.5
    else:
        entry = c
    return entry


class Patch(NamedTuple):
    """Patches of a source [BLOCK_T], at channels [BLOCK_C]: index, row and column of their first pixels, and where
    the source is not zero."""

    index: Any
    h: Any
    w: Any
    window: Any
    channels: Any


@triton.jit
def _load_patch(source, affine, patch, i: tl.constexpr, j: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr):
    """Normalised pixel (i, j) of each patch [BLOCK_T, BLOCK_C]."""
    real = (patch.h + i >= patch.window.h_low) & (patch.h + i < patch.window.h_high)
    real = real & (patch.w + j >= patch.window.w_low) & (patch.w + j < patch.window.w_high)
    mask = real[:, None] & patch.channels[None, :]
    pixel_ptr = source.x + (patch.index + i * source.W + j)[:, None] * source.C
    x = tl.load(pixel_ptr + tl.arange(0, patch.channels.shape[0])[None, :], mask=mask, other=0.0)
    return tl.where(mask, normalise(x, affine, SLOPE, ACC), 0.0)


@triton.jit
def _input_line(source, affine, patch, u: tl.constexpr, j: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr):
    """Entry (u, j) of Bᵀ d."""
    a = _load_patch(source, affine, patch, _FIRST[u], j, SLOPE, ACC)
    return _combine(a, _load_patch(source, affine, patch, _SECOND[u], j, SLOPE, ACC), u)


@triton.jit
def _weight_line(w_ptr, k, c, C, mask, u: tl.constexpr, s: tl.constexpr, MIRRORED: tl.constexpr, ACC: tl.constexpr):
    """Entry (u, s) of G g."""
    index = w_ptr + k[:, None] * 9 * C + c[None, :]
    step = -C if MIRRORED else C
    if MIRRORED:
        index += 8 * C
    a = tl.load(index + s * step, mask=mask, other=0.0).to(ACC)
    b = tl.load(index + (3 + s) * step, mask=mask, other=0.0).to(ACC)
    return _g(a, b, tl.load(index + (6 + s) * step, mask=mask, other=0.0).to(ACC), u)


@triton.jit
def _at(m_ptr, plane, index, mask, number: tl.constexpr, ACC: tl.constexpr):
    """Plane ``number`` of M at ``index``."""
    return tl.load(m_ptr + number * plane + index, mask=mask, other=0.0).to(ACC)


@triton.jit
def _outputs(m_ptr, plane, index, mask, FACTOR: tl.constexpr, ACC: tl.constexpr):
    """FACTOR·Aᵀ M A: Y[0, 0], Y[0, 1], Y[1, 0], Y[1, 1]."""
    y00 = tl.zeros(index.shape, ACC)
    y01, y10, y11 = y00, y00, y00
    for u in tl.static_range(4):
        m1 = _at(m_ptr, plane, index, mask, 4 * u + 1, ACC)
        m2 = _at(m_ptr, plane, index, mask, 4 * u + 2, ACC)
        left = (_at(m_ptr, plane, index, mask, 4 * u, ACC) + m1 + m2) * FACTOR
        right = (m1 - m2 - _at(m_ptr, plane, index, mask, 4 * u + 3, ACC)) * FACTOR
        if u < 3:
            y00 += left
            y01 += right
        if u == 1:
            y10 += left
            y11 += right
        elif u > 1:
            y10 -= left
            y11 -= right
    return y00, y01, y10, y11


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def _winograd_input_kernel(
    x_ptr, affine_ptr, v_ptr, patches, H, W, top, left, P, Q, patches_h, patches_w, C, C_FIRST, C_TOTAL,
    SLOPE: tl.constexpr, FACTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """FACTOR·V of a source (H, W) placed at (top, left) in the frame (P, Q), at channels C_FIRST … of C_TOTAL."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = t // patches_w % patches_h * 2 - 1 - top
    w = t % patches_w * 2 - 1 - left
    # Beyond the last patch nothing is real.
    window = Window(
        tl.maximum(0, -top), tl.where(t < patches, tl.minimum(H, P - top), 0),
        tl.maximum(0, -left), tl.minimum(W, Q - left),
    )  # fmt: skip
    affine = load_affine(affine_ptr, c, C)
    first = (t // patches_w // patches_h * H + h) * W + w
    mask = (t < patches)[:, None] & (c < C)[None, :]
    patch = Patch(first, h, w, window, c < C)
    index = t[:, None] * C_TOTAL + (C_FIRST + c)[None, :]
    plane = patches.to(tl.int64) * C_TOTAL
    source = Image(x_ptr + tl.program_id(1) * BLOCK_C, 0, H, W, C, None, None, None)
    for u in tl.static_range(4):
        line = (
            _input_line(source, affine, patch, u, 0, SLOPE, ACC),
            _input_line(source, affine, patch, u, 1, SLOPE, ACC),
            _input_line(source, affine, patch, u, 2, SLOPE, ACC),
            _input_line(source, affine, patch, u, 3, SLOPE, ACC),
        )
        for v in tl.static_range(4):
            value = _combine(line[_FIRST[v]], line[_SECOND[v]], v) * FACTOR
            tl.store(v_ptr + (4 * u + v) * plane + index, value.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _winograd_weight_kernel(
    w_ptr, u_ptr, C, K, MIRRORED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """U from weights (K, 9, C)."""
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (k < K)[:, None] & (c < C)[None, :]
    for u in tl.static_range(4):
        line = (
            _weight_line(w_ptr, k, c, C, mask, u, 0, MIRRORED, ACC),
            _weight_line(w_ptr, k, c, C, mask, u, 1, MIRRORED, ACC),
            _weight_line(w_ptr, k, c, C, mask, u, 2, MIRRORED, ACC),
        )
        for v in tl.static_range(4):
            value = _g(line[0], line[1], line[2], v)
            index = ((4 * u + v) * K + k)[:, None] * C + c[None, :]
            tl.store(u_ptr + index, value.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _winograd_output_kernel(
    m_ptr, bias_ptr, y_ptr, mean_ptr, m2_ptr, count_ptr, patches, P, Q, patches_h, patches_w, K,
    FACTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = FACTOR·Aᵀ M A + bias, and its statistics."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    p = t // patches_w % patches_h * 2
    q = t % patches_w * 2
    first = (t // patches_w // patches_h * P + p) * Q + q
    filters = k < K
    there = t < patches
    plane = patches.to(tl.int64) * K
    ys = _outputs(m_ptr, plane, t[:, None] * K + k[None, :], there[:, None] & filters[None, :], FACTOR, ACC)
    bias = tl.zeros([BLOCK_K], ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=filters, other=0.0).to(ACC)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    rounded = (
        (ys[0] + bias[None, :]).to(DTYPE),
        (ys[1] + bias[None, :]).to(DTYPE),
        (ys[2] + bias[None, :]).to(DTYPE),
        (ys[3] + bias[None, :]).to(DTYPE),
    )
    for i in tl.static_range(4):
        real = there & (p + i // 2 < P) & (q + i % 2 < Q)
        index = (first + i // 2 * Q + i % 2)[:, None] * K + k[None, :]
        tl.store(y_ptr + index, rounded[i], mask=real[:, None] & filters[None, :])
    if mean_ptr is not None:
        # Those that exist come first: without a second column that is the one below, not the one to the right.
        narrow = q + 1 == Q
        second = tl.where(narrow[:, None], rounded[2], rounded[1])
        third = tl.where(narrow[:, None], rounded[1], rounded[2])
        count = tl.where(there, tl.minimum(P - p, 2) * tl.minimum(Q - q, 2), 0).to(tl.int32)
        ordered = (rounded[0], second, third, rounded[3])
        store_stats(ordered, count, tl.program_id(0), k, K, mean_ptr, m2_ptr, count_ptr, 4, BLOCK_K, ACC)


@triton.jit(do_not_specialize=_SIZES)
def _winograd_gradient_kernel(
    m_ptr, x_ptr, affine_ptr, dx_ptr, partial_ptr, patches, H, W, top, left, P, Q, patches_h, patches_w,
    C, C_FIRST, C_TOTAL,
    SLOPE: tl.constexpr, FACTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx and a share of daffine of a source, from g = FACTOR·Aᵀ M A at channels C_FIRST … of C_TOTAL."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = t // patches_w % patches_h * 2
    q = t % patches_w * 2
    first = (t // patches_w // patches_h * H + p - top) * W + q - left
    there = t < patches
    plane = patches.to(tl.int64) * C_TOTAL
    read = there[:, None] & (c < C)[None, :]
    gs = _outputs(m_ptr, plane, t[:, None] * C_TOTAL + (C_FIRST + c)[None, :], read, FACTOR, ACC)
    affine = load_affine(affine_ptr, c, C)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_C], ACC)
    for i in tl.static_range(4):
        h = p + i // 2 - top
        w = q + i % 2 - left
        real = there & (h + top < P) & (w + left < Q) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        mask = real[:, None] & (c < C)[None, :]
        index = (first + i // 2 * W + i % 2)[:, None] * C + c[None, :]
        g = tl.where(mask, gs[i], 0.0)
        if affine_ptr is not None or SLOPE is not None:
            x = tl.load(x_ptr + index, mask=mask, other=0.0)
            g, gx, masked = source_backward(g, x, affine, SLOPE, ACC)
            if affine_ptr is not None:
                sum_gx += tl.sum(gx, 0)
                sum_g += tl.sum(masked, 0)
        tl.store(dx_ptr + index, g.to(dx_ptr.dtype.element_ty), mask=mask)
    if affine_ptr is not None:
        store_affine_gradient(partial_ptr, tl.program_id(0), c, C, affine.scale, sum_gx, sum_g)


# ---- launchers ---------------------------------------------------------------------------------------------------


def _factor(dtype: torch.dtype) -> float:
    """What V is multiplied by: four values of float16 must fit into one."""
    return 0.25 if dtype == torch.float16 else 1.0


def _patches(batch: int, size: Sequence[int]) -> tuple[int, int, int]:
    """Patches of 2×2 outputs in all, along the height, along the width."""
    rows, columns = cdiv(size[0], 2), cdiv(size[1], 2)
    return batch * rows * columns, rows, columns


def _grid(patches: int, channels: int) -> tuple[int, int, int]:
    """Programs along the patches and along the channels, and channels a program."""
    block_c = block(channels, _BLOCK_C)
    return cdiv(patches, _BLOCK_T), cdiv(channels, block_c), block_c


def _products(sources: Sequence[Source], size: Sequence[int], weight: Tensor, mirrored: bool, columns: slice) -> Tensor:
    """M (16, patches, K), over the sources in their frame; or, mirrored, over dY, for ``columns`` of the channels."""
    x, filters, channels = sources[0].x, weight.shape[0], weight.shape[1]
    patches, patches_h, patches_w = _patches(x.shape[0], size)
    total = sum(source.channels for source in sources)
    v = x.new_empty((16, patches, total))
    first = 0
    for source in sources:
        along, across, block_c = _grid(patches, source.channels)
        launch(
            _winograd_input_kernel, (along, across),
            source.x, source.affine, v, patches, source.height, source.width, source.top, source.left, *size,
            patches_h, patches_w, source.channels, first, total,
            SLOPE=source.act, FACTOR=_factor(x.dtype),
            BLOCK_T=_BLOCK_T, BLOCK_C=block_c, ACC=accumulator(x.dtype), num_warps=4,
        )  # fmt: skip
        first += source.channels
    u = weight.new_empty((16, filters, channels))
    block_k = 32 // weight.element_size()
    _, across, block_c = _grid(filters, channels)
    launch(
        _winograd_weight_kernel, (cdiv(filters, block_k), across),
        nhwc(weight), u, channels, filters, MIRRORED=mirrored,
        BLOCK_K=block_k, BLOCK_C=block_c, ACC=accumulator(x.dtype), num_warps=4,
    )  # fmt: skip
    return _bmm(v, u[:, :, columns] if mirrored else u.transpose(1, 2))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """The products of matrices, in the dtype in which they are accumulated."""
    dtype = stats_dtype(a.dtype)
    if a.device.type == "cpu":  # where the dtypes may not differ
        return torch.bmm(a.to(dtype), b.to(dtype))
    return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, out_dtype=dtype)


def conv3x3(
    sources: Sequence[Source], size: Sequence[int], weight: Tensor, bias: Tensor | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastunet.kernels.conv3x3.conv3x3`."""
    x, filters = sources[0].x, weight.shape[0]
    y = empty_nhwc(x, x.shape[0], filters, *size)
    if y.numel() == 0:
        return y, *of_nothing(x, filters, stats)
    m = _products(sources, size, weight, False, slice(None))
    patches, patches_h, patches_w = _patches(x.shape[0], size)
    along, across, block_k = _grid(patches, filters)
    partials = Partials(x, along, filters, stats)
    launch(
        _winograd_output_kernel, (along, across),
        m, dense(bias), y, *partials.pointers, patches, *size, patches_h, patches_w, filters,
        FACTOR=1 / _factor(x.dtype), BLOCK_T=_BLOCK_T, BLOCK_K=block_k, ACC=accumulator(x.dtype), num_warps=4,
    )  # fmt: skip
    return y, *partials.merged()


def conv3x3_dgrad(
    dy: Tensor, weight: Tensor, sources: Sequence[Source], mask: Sequence[bool]
) -> list[tuple[Tensor, Tensor]]:
    """See :func:`fastunet.kernels.conv3x3.conv3x3_dgrad`."""
    batch, _, *size = dy.shape
    channels = [source.channels if wanted else 0 for source, wanted in zip(sources, mask, strict=False)]
    start = 0 if mask[0] else sources[0].channels
    total = sum(channels)
    patches, patches_h, patches_w = _patches(batch, size)
    if dy.numel():
        m = _products([Source(dy, None, 1.0)], size, weight, True, slice(start, start + total))
    gradients = []
    first = 0
    for source, wanted in zip(sources, channels, strict=True):
        if not wanted:
            gradients.append(no_gradients(dy))
            continue
        dx = empty_nhwc(source.x, *source.x.shape)
        if source.sticks_out(size):
            dx.zero_()  # what lies outside the frame
        along, across, block_c = _grid(patches, wanted)
        partial = affine_slabs(source.x, source.affine, along)
        if dy.numel():
            launch(
                _winograd_gradient_kernel, (along, across),
                m, source.x, source.affine, dx, partial, patches, source.height, source.width, source.top,
                source.left, *size, patches_h, patches_w, wanted, first, total,
                SLOPE=source.act, FACTOR=1 / _factor(dy.dtype),
                BLOCK_T=_BLOCK_T, BLOCK_C=block_c, ACC=accumulator(dy.dtype), num_warps=4,
            )  # fmt: skip
        gradients.append((dx, affine_gradient(dy, partial)))
        first += wanted
    return gradients
