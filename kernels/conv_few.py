"""1×1 convolutions for a few filters, most often the classes of a segmentation, and their gradients.

    y[m,k] = bias[k] + Σ_c z[m,c]·W[k,c],    z = act(scale·(x − centre) + shift),    m a pixel of the batch
    g[m,c] = Σ_k dY[m,k]·W[k,c]    dW[k,c] = Σ_m dY[m,k]·z[m,c]    dbias[k] = Σ_m dY[m,k]
    dx and daffine from g as in affine.py

A matrix product would have to pad the filters to 16. Multiply-adds on the values just loaded take less time than
memory does, so one pass over x gives all gradients.

Layout: activations NHWC, W a matrix (K, C). Bytes: forward reads x and writes y; backward reads dY and x and writes dx.
Accumulation: float32 (float64 for float64); a program keeps a sum per element of its tile while it walks its pixels,
and sum_slabs adds up the programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import stats_dtype

from .affine import affine_slabs, flat_tile, pictures, source_backward, store_affine_gradient
from .common import Source, affine_of, cdiv, dense, empty_nhwc, load_affine, normalise, replace, sum_slabs
from .launching import accumulator, launch

FEW = 4  # filters: of each the backward keeps a sum and a weight per channel in registers
_ROUNDS = 2  # tiles whose loads are under way at a time
_PROGRAMS = 2048  # a constant, so that the order of summation is the same on every GPU


@triton.jit(do_not_specialize=["pixels"])
def _conv_few_fwd_kernel(
    x_ptr, affine_ptr, w_ptr, bias_ptr, y_ptr, pixels, C,
    K: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of a tile of the pixels: the batch's, or each sample's."""
    if SAMPLES:
        n = tl.program_id(1).to(tl.int64)
        x_ptr += n * pixels * C
        y_ptr += n * pixels * K
        affine_ptr = affine_of(affine_ptr, n, C)
    m = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ys = (tl.zeros([BLOCK_P], ACC),) * K
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=(m < pixels)[:, None] & (c < C)[None, :], other=0.0)
        z = normalise(x, load_affine(affine_ptr, c, C), SLOPE, ACC)
        for k in tl.static_range(K):
            w = tl.load(w_ptr + k * C + c, mask=c < C, other=0.0).to(ACC)
            ys = replace(ys, k, ys[k] + tl.sum(z * w[None, :], 1))
    for k in tl.static_range(K):
        y = ys[k]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + k).to(ACC)
        tl.store(y_ptr + m * K + k, y, mask=m < pixels)


@triton.jit(do_not_specialize=["pixels", "each"])
def _conv_few_bwd_kernel(
    dy_ptr, x_ptr, affine_ptr, w_ptr, dx_ptr, daffine_ptr, dw_ptr, dbias_ptr, pixels, each, C,
    K: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    ROUNDS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of ``each`` pixels × BLOCK_C channels dx and the shares of daffine, dW and dbias, as far as they are wanted."""
    slab = tl.program_id(0)
    share = slab
    if SAMPLES:
        n = tl.program_id(2).to(tl.int64)
        share = slab * tl.num_programs(2) + n
        dy_ptr += n * pixels * K
        x_ptr += n * pixels * C
        if dx_ptr is not None:
            dx_ptr += n * pixels * C
        affine_ptr = affine_of(affine_ptr, n, C)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    affine = load_affine(affine_ptr, c, C)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    ws = ()
    for k in tl.static_range(K):
        w = tl.load(w_ptr + k * C + c, mask=c < C, other=0.0).to(ACC)
        ws = ws + (w,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking
    dws = (tl.zeros([BLOCK_P, BLOCK_C], ACC),) * K
    dbs = (tl.zeros([BLOCK_P], ACC),) * K
    for start in tl.range(0, each, ROUNDS * BLOCK_P):
        first = slab.to(tl.int64) * each + start + tl.arange(0, BLOCK_P)
        xs = ()
        dys = ()
        for i in tl.static_range(ROUNDS):
            m = first + i * BLOCK_P
            x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=(m < pixels)[:, None] & (c < C)[None, :], other=0.0)
            xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
            for k in tl.static_range(K):
                dy = tl.load(dy_ptr + m * K + k, mask=m < pixels, other=0.0)
                dys = dys + (dy,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(ROUNDS):
            m = first + i * BLOCK_P
            x = xs[i]
            g = tl.zeros([BLOCK_P, BLOCK_C], ACC)
            for k in tl.static_range(K):
                dy = dys[i * K + k].to(ACC)
                g += dy[:, None] * ws[k][None, :]
                if dw_ptr is not None:
                    z = normalise(x, affine, SLOPE, ACC)
                    dws = replace(dws, k, dws[k] + dy[:, None] * z)
                if dbias_ptr is not None:
                    dbs = replace(dbs, k, dbs[k] + dy)
            if dx_ptr is not None:
                dx, gx, g = source_backward(g, x, affine, SLOPE, ACC)
                mask = (m < pixels)[:, None] & (c < C)[None, :]
                tl.store(dx_ptr + m[:, None] * C + c[None, :], dx, mask=mask)
                if daffine_ptr is not None:
                    sum_gx += gx
                    sum_g += g
    if daffine_ptr is not None:
        store_affine_gradient(daffine_ptr, share, c, C, affine.scale, tl.sum(sum_gx, 0), tl.sum(sum_g, 0))
    for k in tl.static_range(K):
        if dw_ptr is not None:
            tl.store(dw_ptr + (share.to(tl.int64) * K + k) * C + c, tl.sum(dws[k], 0), mask=c < C)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + share * K + k, tl.sum(dbs[k], 0), mask=tl.program_id(1) == 0)


# ---- launchers ---------------------------------------------------------------------------------------------------


def serves(weight: Tensor) -> bool:
    """Whether a convolution is one of a few 1×1 filters."""
    return weight.shape[-1] == 1 and weight.shape[0] <= FEW


def conv_few(source: Source, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (N, K, H, W) of a convolution with W (K, C, 1, 1)."""
    x, filters, channels = source.x, weight.shape[0], source.channels
    y = empty_nhwc(x, x.shape[0], filters, source.height, source.width)
    if y.numel():
        apart = x.shape[0] if source.samples else 1
        pixels = y.numel() // (filters * apart)
        block_p, block_c = flat_tile(channels, x.element_size(), 4)
        launch(
            _conv_few_fwd_kernel, (cdiv(pixels, block_p), apart),
            x, source.affine, weight.contiguous(), dense(bias), y, pixels, channels,
            K=filters, SLOPE=source.act, SAMPLES=source.samples,
            BLOCK_P=block_p, BLOCK_C=block_c, ACC=accumulator(x.dtype), num_warps=4,
        )  # fmt: skip
    return y


def conv_few_backward(
    dy: Tensor, weight: Tensor, source: Source, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, daffine, dW, dbias) from dY (N, K, H, W) in NHWC memory, the last three in stats_dtype.

    ``mask`` says which are wanted of dx with daffine, dW and dbias. What is not is empty, as is daffine without affine.
    """
    x, filters, channels = source.x, weight.shape[0], source.channels
    apart, pixels = pictures(x, source.affine)
    block_p, block_c = flat_tile(channels, x.element_size(), 1)
    step = block_p * _ROUNDS
    each = step * cdiv(cdiv(pixels, step), max(_PROGRAMS // max(apart, 1), 1))
    slabs = cdiv(pixels, max(each, 1)) * apart
    dtype = stats_dtype(x.dtype)
    dx = empty_nhwc(x, *x.shape) if mask[0] else None
    daffine = affine_slabs(x, source.affine, slabs) if mask[0] else None
    dweight = x.new_empty((slabs, *weight.shape), dtype=dtype) if mask[1] else None
    dbias = x.new_empty((slabs, filters), dtype=dtype) if mask[2] else None
    if slabs:
        launch(
            _conv_few_bwd_kernel, (slabs // apart, cdiv(channels, block_c), apart),
            dy, x, source.affine, weight.contiguous(), dx, daffine, dweight, dbias, pixels, each, channels,
            K=filters, SLOPE=source.act, SAMPLES=source.samples,
            ROUNDS=_ROUNDS, BLOCK_P=block_p, BLOCK_C=block_c, ACC=accumulator(x.dtype), num_warps=4,
        )  # fmt: skip
    slabbed = daffine, dweight, dbias
    daffine, dweight, dbias = (x.new_empty(0, dtype=dtype) if t is None else sum_slabs(t) for t in slabbed)
    return x.new_empty(0) if dx is None else dx, daffine, dweight, dbias
