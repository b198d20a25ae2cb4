"""The logit-free head: 1×1 convolution and softmax (or sigmoid) statistics in one pass over the last activation.

    z = act(scale·(x − centre) + shift)    logits = z·Wᵀ + bias    stats = the seven sums of ``softmax_stats.py``

Backward, with z and the logits computed again and g = the gradient of the logits as there:

    dz = g·W    dW = gᵀ·z    dbias = Σ g    dx and daffine from dz as in ``affine.py``

Inference: the class of the largest logit, a mask of σ(logit) > threshold, or probabilities, straight from the tile.

Layout: x in NHWC memory, W a matrix (K, C); a tile is pixels × all K classes, for which a program walks the channels.
Logits stay in registers, in float32: unlike those that pass through memory they are not rounded to x's dtype.
Bytes moved: forward reads x and labels; backward reads both again and writes dx, and reads x once more for each
further 64 channels (32 with more than 64 classes). Accumulation: float32 (float64 for float64). Sums in a fixed order:
a program keeps one per element of its tile while it walks the tiles of one sample, adds those up over the tile's pixels
into its slab, and sum_slabs adds up the programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.architecture import architecture
from fastunet.layout import lowered, memory_format, stats_dtype

from .affine import affine_gradient, affine_slabs, source_backward, store_affine_gradient
from .common import Source, affine_of, block, cdiv, dense, load_affine, normalise, sum_products, sum_slabs
from .confusion import first_largest
from .launching import accumulator, launch, precision
from .softmax_stats import Labels, by_pixel, gradient, load_labels, sigmoid, softmax, store_stats, terms

_PROGRAMS = 1024  # a constant, so that the order of summation is the same on every GPU
_TILES = 4  # a program walks at least as many, if there are: what it adds to a slab of sums costs little beside them


class Layer(NamedTuple):
    """The head in a kernel: its source, and its weights and bias for K classes."""

    x: Any
    affine: Any
    SLOPE: Any
    C: Any
    w: Any
    bias: Any
    K: Any


@triton.jit
def _load_z(x_ptr, affine_ptr, pixel, c, inside, C: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr):
    """x of pixels (int64, counted over the batch) × channels, and z in x's dtype; 0 in channels beyond C."""
    mask = inside[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + pixel[:, None] * C + c[None, :], mask=mask, other=0.0)
    return x, normalise(x, load_affine(affine_ptr, c, C), SLOPE, ACC).to(x.dtype)


@triton.jit
def _logits(
    layer, pixel, k, inside, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits of pixels × classes, in ACC."""
    acc = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    for first in tl.static_range(0, layer.C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        _, z = _load_z(layer.x, layer.affine, pixel, c, inside, layer.C, layer.SLOPE, ACC)
        mask = (c < layer.C)[:, None] & (k < layer.K)[None, :]
        w = tl.load(layer.w + k[None, :] * layer.C + c[:, None], mask=mask, other=0.0)
        acc = tl.dot(z, w, acc, input_precision=PRECISION, out_dtype=ACC)
    if layer.bias is not None:
        acc += tl.load(layer.bias + k, mask=k < layer.K, other=0.0).to(ACC)[None, :]
    return acc


@triton.jit(do_not_specialize=["batch", "pixels", "programs", "ignore_index"])
def _head_stats_kernel(
    x_ptr, affine_ptr, w_ptr, bias_ptr, labels_ptr, weight_ptr, partial_ptr, batch, pixels, programs, ignore_index,
    stride_yn, stride_yc, stride_yp,
    C: tl.constexpr, K: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    SQUARES: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr, SOFTMAX: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[program, n, :, :] = the seven sums over tiles program, program + programs, … of sample n."""
    program = tl.program_id(0) % programs
    n = (tl.program_id(0) // programs).to(tl.int64)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    k = tl.arange(0, BLOCK_K)
    labels = Labels(labels_ptr, weight_ptr, pixels, ignore_index, stride_yn, stride_yc, stride_yp)
    tp = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    p_sum = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    y_sum = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    p2_sum = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    ce_sum = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    w_sum = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    spread_sum = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    for tile in range(program, tl.cdiv(pixels.to(tl.int64), BLOCK_P).to(tl.int32), programs):
        pixel = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        x = _logits(
            Layer(x_ptr, affine_ptr, SLOPE, C, w_ptr, bias_ptr, K), n * pixels + pixel, k, pixel < pixels,
            ACC, PRECISION, BLOCK_P, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        truth = load_labels(labels, n, pixel, k, K, SOFTMAX, ACC)
        p, ce, share, spread = terms(x, truth, k, K, SOFTMAX)
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
    slab = program.to(tl.int64) * batch + n
    store_stats(partial_ptr, slab, k, K, tp, p_sum, y_sum, p2_sum, ce_sum, w_sum, spread_sum)


@triton.jit(do_not_specialize=["batch", "pixels", "programs", "ignore_index"])
def _head_stats_backward_kernel(
    dstats_ptr, x_ptr, affine_ptr, w_ptr, bias_ptr, labels_ptr, weight_ptr, dx_ptr, daffine_ptr, dw_ptr, dbias_ptr,
    batch, pixels, programs, ignore_index, stride_yn, stride_yc, stride_yp,
    C: tl.constexpr, K: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    SQUARES: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr, SOFTMAX: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of the tiles program, program + programs, … of sample n, and their shares of daffine, dW and dbias.

    Of the BLOCK_C channels from program_id(1) on; each as far as it is wanted.
    """
    program = tl.program_id(0) % programs
    n = (tl.program_id(0) // programs).to(tl.int64)
    if SAMPLES:
        affine_ptr = affine_of(affine_ptr, n, C)
    k = tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    labels = Labels(labels_ptr, weight_ptr, pixels, ignore_index, stride_yn, stride_yc, stride_yp)
    affine = load_affine(affine_ptr, c, C)
    sum_gx = tl.zeros([BLOCK_C], ACC)
    sum_g = tl.zeros([BLOCK_C], ACC)
    dw = tl.zeros([BLOCK_C, BLOCK_K], ACC)
    dbias = tl.zeros([BLOCK_P, BLOCK_K], ACC)
    for tile in range(program, tl.cdiv(pixels.to(tl.int64), BLOCK_P).to(tl.int32), programs):
        pixel = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = pixel < pixels
        row = n * pixels + pixel
        logits = _logits(
            Layer(x_ptr, affine_ptr, SLOPE, C, w_ptr, bias_ptr, K), row, k, inside,
            ACC, PRECISION, BLOCK_P, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        truth = load_labels(labels, n, pixel, k, K, SOFTMAX, ACC)
        g = gradient(dstats_ptr, n, logits, truth, k, K, SQUARES, ENTROPY, SMOOTHING, SOFTMAX)
        x, z = _load_z(x_ptr, affine_ptr, row, c, inside, C, SLOPE, ACC)
        narrow = g.to(x.dtype)
        if dw_ptr is not None:
            dbias += g
            dw = tl.dot(tl.trans(z), narrow, dw, input_precision=PRECISION, out_dtype=ACC)
        if dx_ptr is not None:
            filters = tl.load(w_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)
            dz = tl.dot(narrow, filters, input_precision=PRECISION, out_dtype=ACC)
            dx, gx, g_source = source_backward(dz, x, affine, SLOPE, ACC)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row[:, None] * C + c[None, :], dx, mask=inside[:, None] & (c < C)[None, :])
            if daffine_ptr is not None:
                sum_gx += sum_products(gx)
                sum_g += tl.sum(g_source, 0)
    slab = program.to(tl.int64) * batch + n
    if dw_ptr is not None:
        mask = (c < C)[:, None] & (k < K)[None, :]
        tl.store(dw_ptr + (slab * K + k)[None, :] * C + c[:, None], dw, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(dbias_ptr + slab * K + k, tl.sum(dbias, 0), mask=k < K)
    if daffine_ptr is not None:
        store_affine_gradient(daffine_ptr, slab, c, C, affine.scale, sum_gx, sum_g)


@triton.jit(do_not_specialize=["pixels"])
def _head_predict_kernel(
    x_ptr, affine_ptr, w_ptr, bias_ptr, out_ptr, pixels,
    C: tl.constexpr, K: tl.constexpr, SLOPE: tl.constexpr, SAMPLES: tl.constexpr,
    OUTPUT: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What OUTPUT names, of a tile of the pixels: the batch's, or each sample's."""
    if SAMPLES:
        n = tl.program_id(1).to(tl.int64)
        x_ptr += n * pixels * C
        out_ptr += n * pixels * (1 if OUTPUT == "argmax" else K)
        affine_ptr = affine_of(affine_ptr, n, C)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    k = tl.arange(0, BLOCK_K)
    x = _logits(
        Layer(x_ptr, affine_ptr, SLOPE, C, w_ptr, bias_ptr, K), pixel, k, inside,
        ACC, PRECISION, BLOCK_P, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    if OUTPUT == "argmax":
        tl.store(out_ptr + pixel, first_largest(x, k, K).to(tl.uint8), mask=inside)
    else:
        if OUTPUT == "softmax":
            p, _ = softmax(x, k, K)
        else:
            p, _, _ = sigmoid(x)
        if OUTPUT == "threshold":
            p = p > THRESHOLD
        mask = inside[:, None] & (k < K)[None, :]
        tl.store(out_ptr + pixel[:, None] * K + k[None, :], p.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------------------


def _choices(source: Source, classes: int, logits: int, values: int, most_channels: int = 64) -> dict[str, Any]:
    """What is compiled into every kernel here; of its tile, a thread has at most so many logits and values of x."""
    block_c, block_k = block(source.channels, most_channels), block(classes, 256)
    name = architecture(source.x.device)
    amd = name.startswith("gfx")
    # AMD prefetches into registers, of which there are none left; others into shared memory, of which some have less,
    # and with a register for each address: most of them where values are narrow, and fewest left with 64 classes.
    less = name in ("sm_86", "sm_89", "sm_120")
    narrow = source.x.element_size() == 2
    stages = 1 if amd else 2 if (less and (narrow or block_k > 64)) or (narrow and block_k == 64) else 3
    warps = 4 if block_k <= 64 or amd else 8
    share = warps * (64 if amd else 32) * min(2, 4 // source.x.element_size()) // 2
    return {
        "C": source.channels,
        "K": classes,
        "SLOPE": source.act,
        "SAMPLES": source.samples,
        "ACC": accumulator(source.x.dtype),
        "PRECISION": precision(source.x.dtype),
        "BLOCK_P": max(16, min(64, share * logits // block_k, share * values // block_c)),
        "BLOCK_C": block_c,
        "BLOCK_K": block_k,
        "num_warps": warps,
        "num_stages": stages,
    }


def _statistics(
    labels: Tensor, mode: str, wanted: Sequence[bool]
) -> tuple[Tensor, tuple[int, int, int], dict[str, bool]]:
    """Labels as the kernels read them, their strides, and compiled choices."""
    if labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    labels, strides = by_pixel(labels if labels.dim() == 4 else labels.unsqueeze(1))
    choices = dict(zip(("SQUARES", "ENTROPY", "SMOOTHING"), map(bool, wanted), strict=True))
    return labels, strides, choices | {"SOFTMAX": mode == "softmax"}


def _operands(source: Source, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    w, b = lowered(source.x, weight), lowered(source.x, bias)
    return source.x, source.affine, w.reshape(w.shape[:2]).contiguous(), dense(b)


def head_stats(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
) -> Tensor:
    """See :func:`fastunet.aten.head_stats`."""
    source = Source(x, affine, slope)
    batch, classes, pixels = x.shape[0], weight.shape[0], source.height * source.width
    if batch * pixels * classes == 0:
        return x.new_zeros((batch, classes, 7), dtype=stats_dtype(x.dtype))
    labels, strides, about = _statistics(labels, mode, wanted)
    choices = _choices(source, classes, 8 if all(wanted) else 16, 32)
    programs = min(cdiv(pixels, choices["BLOCK_P"] * _TILES), max(1, _PROGRAMS // batch))
    partial = x.new_empty((programs, batch, classes, 7), dtype=stats_dtype(x.dtype))
    launch(
        _head_stats_kernel, (programs * batch,),
        *_operands(source, weight, bias), labels, dense(pixel_weight), partial, batch, pixels, programs,
        ignore_index, *strides, **about, **choices,
    )  # fmt: skip
    return sum_slabs(partial)


def head_stats_backward(
    dstats: Tensor,
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.head_stats_backward`."""
    source = Source(x, affine, slope)
    batch, classes, pixels = x.shape[0], weight.shape[0], source.height * source.width
    dtype = stats_dtype(x.dtype)
    choices = _choices(source, classes, 8, 16, 64 if classes <= 64 else 32)
    if source.channels % 8:  # with an address for each element the gradients leave no registers to prefetch further
        choices["num_stages"] = min(choices["num_stages"], 2)
    programs = min(cdiv(pixels, choices["BLOCK_P"] * _TILES), max(1, _PROGRAMS // max(batch, 1)))
    need_source, need_filters = mask[0], mask[1] or mask[2]
    slabs = programs * batch if classes > 0 else 0
    dx = torch.empty_like(source.x) if need_source else None
    daffine = affine_slabs(x, affine, slabs) if need_source else None
    dweight = x.new_empty((slabs, classes, source.channels), dtype=dtype) if need_filters else None
    dbias = x.new_empty((slabs, classes), dtype=dtype) if need_filters else None
    if slabs * source.channels > 0:
        labels, strides, about = _statistics(labels, mode, wanted)
        launch(
            _head_stats_backward_kernel, (slabs, cdiv(source.channels, choices["BLOCK_C"])),
            dstats.contiguous(), *_operands(source, weight, bias), labels, dense(pixel_weight),
            dx, daffine, dweight, dbias, batch, pixels, programs, ignore_index, *strides, **about, **choices,
        )  # fmt: skip
    elif dx is not None:
        dx.zero_()
    return (
        x.new_empty(0) if dx is None else dx,
        affine_gradient(x, daffine),
        _like(weight, sum_slabs(dweight)) if mask[1] and dweight is not None else weight.new_empty(0),
        sum_slabs(dbias).to(weight.dtype) if mask[2] and dbias is not None else weight.new_empty(0),
    )


def _like(weight: Tensor, dweight: Tensor) -> Tensor:
    """dW (K, C) in the weight's shape, dtype and layout."""
    return torch.empty_like(weight, memory_format=memory_format(weight)).copy_(dweight.view(weight.shape))


def head_predict(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    weight: Tensor,
    bias: Tensor | None,
    output: str,
    threshold: float,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`fastunet.aten.head_predict`."""
    source = Source(x, affine, slope)
    batch, classes = x.shape[0], weight.shape[0]
    apart = batch if source.samples else 1
    if output == "argmax":
        out = torch.empty((batch, source.height, source.width), dtype=torch.uint8, device=x.device)
    else:
        out = torch.empty(
            (batch, classes, source.height, source.width), dtype=torch.uint8 if output == "threshold" else dtype,
            device=x.device, memory_format=torch.channels_last,
        )  # fmt: skip
    if out.numel() > 0:
        choices = _choices(source, classes, 16, 32)
        pixels = batch // apart * source.height * source.width
        launch(
            _head_predict_kernel, (cdiv(pixels, choices["BLOCK_P"]), apart),
            *_operands(source, weight, bias), out, pixels, OUTPUT=output, THRESHOLD=threshold, **choices,
        )  # fmt: skip
    return out
