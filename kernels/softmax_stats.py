"""Softmax (or sigmoid) statistics: everything that Dice, soft IoU and cross-entropy need, in one pass over the logits.

For every sample and class k, over the pixels whose label is not ignore_index, with y = [label = k]:

    TP = Σ p·y    P = Σ p    Y = Σ y    P2 = Σ p²    CE = Σ w·y·(−log p)    W = Σ w·y    S = Σ w·(−log p)

In sigmoid mode each channel has labels of its own; y = [label = 1], CE = Σ w·(−y·log p − (1−y)·log(1−p)), W = Σ w,
S = Σ w·(−log p − log(1−p)). P2, CE and W, and S are computed if they are wanted.
Backward, with the probabilities computed again: q = p·(dTP·y + dP + 2p·dP2) − w·(y·dCE + dS), dx = q − p·Σ_classes q;
in sigmoid mode dx = p·(1−p)·(dTP·y + dP + 2p·dP2) + w·(dCE·(p − y) + dS·(2p − 1)).

Layout: logits in NHWC or NCHW memory, or any other in which one stride walks the pixels and one the classes; a tile is
pixels × all classes. The number of classes and the pixel's stride are compiled in: they say how wide an access may be.
Bytes moved: forward reads logits and labels; backward reads them again and writes the gradient.
Sums are float32 (float64 for float64 logits), in a fixed order: a program keeps one sum per element of its tile while
it walks the tiles of one sample, adds those up over the tile's pixels, and sum_slabs adds up the programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import memory_format, stats_dtype

from .common import PROPAGATE_ALL, cdiv, dense, power_of_2, sum_slabs
from .launching import accumulator, launch

_PROGRAMS = 1024  # of the forward pass; a constant, so that the order of summation is the same on every GPU


class Labels(NamedTuple):
    """Labels in a kernel, and the pixels' weights if there are any."""

    labels: Any
    weight: Any
    pixels: Any
    ignore_index: Any
    stride_n: Any
    stride_c: Any
    stride_p: Any


class Truth(NamedTuple):
    """What labels say of a tile, pixels × classes: y, whether a pixel is valid (not ignored) and whether its class is
    known (in sigmoid mode: whether it is valid); and the pixels' weights (pixels × 1)."""

    y: Any
    valid: Any
    known: Any
    weight: Any


@triton.jit
def load_labels(labels, n, pixel, c, C: tl.constexpr, SOFTMAX: tl.constexpr, ACC: tl.constexpr):
    """The :class:`Truth` of ``pixel`` (int64), pixels of sample n."""
    row = pixel < labels.pixels
    inside = row[:, None] & (c < C)[None, :]
    if SOFTMAX:
        label_ptr = labels.labels + n * labels.stride_n + pixel * labels.stride_p
        label = tl.load(label_ptr, mask=row, other=0).to(tl.int64)
        valid = inside & (label != labels.ignore_index)[:, None]
        label = tl.where((label >= 0) & (label < C), label, -1).to(tl.int32)
        known = valid & (label >= 0)[:, None]
        y = valid & (label[:, None] == c[None, :])
    else:
        y_ptr = labels.labels + n * labels.stride_n + (pixel * labels.stride_p)[:, None]
        y_ptr += (c.to(tl.int64) * labels.stride_c)[None, :]
        label = tl.load(y_ptr, mask=inside, other=0).to(tl.int64)
        valid = inside & (label != labels.ignore_index)
        known = valid
        y = valid & (label == 1)
    if labels.weight is not None:
        w = tl.load(labels.weight + n * labels.pixels + pixel, mask=row, other=0.0).to(ACC)[:, None]
    else:
        w = tl.full([1, 1], 1.0, ACC)
    return Truth(y, valid, known, w)


@triton.jit
def _load_logits(
    logits_ptr, n, pixel, c, pixels, stride_xn, stride_xc,
    stride_xp: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    sample_ptr = logits_ptr + tl.multiple_of(n * stride_xn, ALIGN)
    x_ptr = sample_ptr + (pixel * stride_xp)[:, None] + (c.to(tl.int64) * stride_xc)[None, :]
    return tl.load(x_ptr, mask=(pixel < pixels)[:, None] & (c < C)[None, :], other=0.0).to(ACC)


@triton.jit
def softmax(x, c, C):
    """Probabilities along the classes, and minus their logarithms."""
    x = tl.where((c < C)[None, :], x, float("-inf"))
    x = x - tl.max(x, axis=1)[:, None]
    e = tl.exp(x)
    total = tl.sum(e, axis=1)[:, None]
    return e / total, tl.log(total) - x


@triton.jit
def sigmoid(x):
    """p and 1 − p, neither by cancellation, and exp(−|x|)."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e), tl.where(x >= 0, e, 1.0) / (1.0 + e), e


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 ≤ e ≤ 1, accurate for small e: the rounding of 1 + e is divided out."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def terms(x, truth, c, C, SOFTMAX: tl.constexpr):
    """What a tile of logits adds to the sums P, CE, W and S: p, and the terms of the other three, pixels × classes."""
    if SOFTMAX:
        p, ce = softmax(x, c, C)
        spread = ce
        counted = truth.y
    else:
        p, _, e = sigmoid(x)
        tail = _log1p(e)
        ce = tl.maximum(tl.where(truth.y, -x, x), 0.0, propagate_nan=PROPAGATE_ALL) + tail
        spread = tl.abs(x) + 2.0 * tail
        counted = truth.valid
    p = tl.where(truth.valid, p, 0.0)
    ce = tl.where(counted, ce * truth.weight, 0.0)
    return p, ce, tl.where(counted, truth.weight, 0.0), tl.where(truth.known, spread * truth.weight, 0.0)


@triton.jit
def gradient(
    dstats_ptr, n, x, truth, c, C,
    SQUARES: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits of sample n."""
    row = dstats_ptr + (n * C + c) * 7
    dtp = tl.load(row, mask=c < C, other=0.0)[None, :]
    dp = tl.load(row + 1, mask=c < C, other=0.0)[None, :]
    dp2 = tl.load(row + 3, mask=c < C, other=0.0)[None, :]
    dce = tl.load(row + 4, mask=c < C, other=0.0)[None, :]
    dspread = tl.load(row + 6, mask=c < C, other=0.0)[None, :]
    if SOFTMAX:
        p, _ = softmax(x, c, C)
    else:
        p, p_not, _ = sigmoid(x)
    slope = dp
    if SQUARES:
        slope += 2.0 * p * dp2
    if SOFTMAX:
        at_label = p * dtp
        if ENTROPY:
            at_label -= truth.weight * dce
        q = p * slope + tl.where(truth.y, at_label, 0.0)
        if SMOOTHING:
            q -= tl.where(truth.known, truth.weight * dspread, 0.0)
        dx = q - p * tl.sum(q, axis=1)[:, None]
    else:
        dx = p * p_not * (slope + tl.where(truth.y, dtp, 0.0))
        if ENTROPY:
            dx += truth.weight * dce * tl.where(truth.y, -p_not, p)
        if SMOOTHING:
            dx += truth.weight * dspread * (p - p_not)
    return tl.where(truth.valid, dx, 0.0)


@triton.jit
def store_stats(
    partial_ptr, slab, c, C, tp, p_sum, y_sum, p2_sum, ce_sum, w_sum, spread_sum,
):  # fmt: skip
    """Write the seven sums, added up over the tile's pixels, into row ``slab`` (int64) of partial (…, C, 7)."""
    row = partial_ptr + (slab * C + c) * 7
    inside = c < C
    tl.store(row, tl.sum(tp, axis=0), mask=inside)
    tl.store(row + 1, tl.sum(p_sum, axis=0), mask=inside)
    tl.store(row + 2, tl.sum(y_sum, axis=0), mask=inside)
    tl.store(row + 3, tl.sum(p2_sum, axis=0), mask=inside)
    tl.store(row + 4, tl.sum(ce_sum, axis=0), mask=inside)
    tl.store(row + 5, tl.sum(w_sum, axis=0), mask=inside)
    tl.store(row + 6, tl.sum(spread_sum, axis=0), mask=inside)


@triton.jit(do_not_specialize=["batch", "programs", "ignore_index"])
def _softmax_stats_kernel(
    logits_ptr, labels_ptr, weight_ptr, partial_ptr, batch, pixels, programs, ignore_index,
    stride_xn, stride_xc, stride_yn, stride_yc, stride_yp,
    stride_xp: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
    SQUARES: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr,
    SOFTMAX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[program, n, :, :] = the seven sums over tiles program, program + programs, … of sample n."""
    program = tl.program_id(0) % programs
    n = (tl.program_id(0) // programs).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    labels = Labels(labels_ptr, weight_ptr, pixels, ignore_index, stride_yn, stride_yc, stride_yp)
    tp = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    p_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    y_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    p2_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    ce_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    w_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    spread_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for tile in range(program, (pixels - 1) // BLOCK_P + 1, programs):  # cdiv would overflow just below 2³¹
        pixel = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        x = _load_logits(logits_ptr, n, pixel, c, pixels, stride_xn, stride_xc, stride_xp, C, ALIGN, ACC)
        truth = load_labels(labels, n, pixel, c, C, SOFTMAX, ACC)
        p, ce, share, spread = terms(x, truth, c, C, SOFTMAX)
        tp += tl.where(truth.y, p, 0.0)
        p_sum += p
        y_sum += tl.where(truth.y, 1.0, 0.0)
        if SQUARES:
            p2_sum += p * p
        if ENTROPY:
            ce_sum += ce
            if weight_ptr is not None or not SOFTMAX:
                w_sum += share
        if SMOOTHING:
            spread_sum += spread
    if ENTROPY and SOFTMAX and weight_ptr is None:
        w_sum = y_sum
    store_stats(
        partial_ptr, program.to(tl.int64) * batch + n, c, C, tp, p_sum, y_sum, p2_sum, ce_sum, w_sum, spread_sum
    )


@triton.jit(do_not_specialize=["tiles", "ignore_index"])
def _softmax_stats_backward_kernel(
    dstats_ptr, logits_ptr, labels_ptr, weight_ptr, dx_ptr, pixels, tiles, ignore_index,
    stride_xn, stride_xc, stride_yn, stride_yc, stride_yp, stride_dn, stride_dc,
    stride_xp: tl.constexpr, stride_dp: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, ALIGN_D: tl.constexpr,
    SQUARES: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr,
    SOFTMAX: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of one tile of one sample."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    x = _load_logits(logits_ptr, n, pixel, c, pixels, stride_xn, stride_xc, stride_xp, C, ALIGN, ACC)
    labels = Labels(labels_ptr, weight_ptr, pixels, ignore_index, stride_yn, stride_yc, stride_yp)
    truth = load_labels(labels, n, pixel, c, C, SOFTMAX, ACC)
    dx = gradient(dstats_ptr, n, x, truth, c, C, SQUARES, ENTROPY, SMOOTHING, SOFTMAX)
    sample_ptr = dx_ptr + tl.multiple_of(n * stride_dn, ALIGN_D)
    dx_ptrs = sample_ptr + (pixel * stride_dp)[:, None] + (c.to(tl.int64) * stride_dc)[None, :]
    inside = (pixel < pixels)[:, None] & (c < C)[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def by_pixel(t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(N, C, H, W) and its strides along samples, classes and pixels; a copy if no single stride walks the pixels."""
    n, c, h, w = t.stride()
    if t.shape[3] == 1:
        return t, (n, c, h)
    if t.shape[2] == 1 or h == t.shape[3] * w:
        return t, (n, c, w)
    return by_pixel(t.contiguous())


def _operands(
    logits: Tensor, labels: Tensor, pixel_weight: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[int, ...], dict[str, int]]:
    """Logits, labels and weights as the kernels read them, strides, and compiled strides."""
    if labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    logits, (stride_xn, stride_xc, stride_xp) = by_pixel(logits)
    labels, y_strides = by_pixel(labels if labels.dim() == 4 else labels.unsqueeze(1))
    compiled = {"stride_xp": stride_xp, "ALIGN": alignment(stride_xn, logits.shape[1])}
    return (logits, labels, dense(pixel_weight)), (stride_xn, stride_xc, *y_strides), compiled


def alignment(stride: int, classes: int) -> int:
    """A power of two that divides the stride of samples.

    16 if it can be, which Triton compiles apart anyway; else what the classes grant whatever the picture's size.
    """
    return 16 if stride % 16 == 0 else math.gcd(stride, classes, 16)


def _tile(classes: int, itemsize: int) -> tuple[int, int, int]:
    """Pixels, classes and warps of a tile: a thread has 16 bytes of logits, and up to seven sums of each.

    4 warps, up to 8 if a tile is to have 32 bytes of each class; more warps leave a thread too few registers.
    """
    block_c = power_of_2(classes)
    work = max(2, 16 // itemsize)
    block_p = min(max(32 // itemsize, 128 * work // block_c), 256 * work // block_c)
    return block_p, block_c, block_p * block_c // (32 * work)


def _choices(logits: Tensor, mode: str, wanted: Sequence[bool]) -> dict[str, Any]:
    """What is compiled into a kernel."""
    classes = logits.shape[1]
    block_p, block_c, warps = _tile(classes, logits.element_size())
    return {
        "C": classes,
        **dict(zip(("SQUARES", "ENTROPY", "SMOOTHING"), map(bool, wanted), strict=True)),
        "SOFTMAX": mode == "softmax",
        "ACC": accumulator(logits.dtype),
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "num_warps": warps,
    }


def softmax_stats(
    logits: Tensor, labels: Tensor, pixel_weight: Tensor | None, mode: str, ignore_index: int, wanted: Sequence[bool]
) -> Tensor:
    """See :func:`fastunet.aten.softmax_stats`."""
    batch, classes = logits.shape[:2]
    dtype = stats_dtype(logits.dtype)
    pixels = logits.shape[2] * logits.shape[3]
    if batch * pixels == 0:
        return logits.new_zeros((batch, classes, 7), dtype=dtype)
    operands, strides, compiled = _operands(logits, labels, pixel_weight)
    choices = _choices(logits, mode, wanted)
    programs = min(cdiv(pixels, choices["BLOCK_P"]), max(1, _PROGRAMS // batch))
    partial = logits.new_empty((programs, batch, classes, 7), dtype=dtype)
    launch(
        _softmax_stats_kernel, (programs * batch,),
        *operands, partial, batch, pixels, programs, ignore_index, *strides, **compiled, **choices,
    )  # fmt: skip
    return sum_slabs(partial)


def softmax_stats_backward(
    dstats: Tensor,
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
) -> Tensor:
    """See :func:`fastunet.aten.softmax_stats_backward`."""
    batch, classes = logits.shape[:2]
    dlogits = torch.empty_like(logits, memory_format=memory_format(logits))
    pixels = logits.shape[2] * logits.shape[3]
    if batch * pixels == 0:
        return dlogits
    operands, strides, compiled = _operands(logits, labels, pixel_weight)
    choices = _choices(logits, mode, wanted)
    tiles = cdiv(pixels, choices["BLOCK_P"])
    _, (stride_dn, stride_dc, stride_dp) = by_pixel(dlogits)
    launch(
        _softmax_stats_backward_kernel, (tiles * batch,),
        dstats.contiguous(), *operands, dlogits, pixels, tiles, ignore_index, *strides, stride_dn, stride_dc,
        stride_dp=stride_dp, ALIGN_D=alignment(stride_dn, classes), **compiled, **choices,
    )  # fmt: skip
    return dlogits
