"""Counts of true against predicted classes, in one pass over logits or over masks.

For every pixel whose label is not ignore_index: counts[label, prediction] += 1, where the prediction is the class of
the largest logit (the first of equals; NaN wins, as in torch.argmax) or, of a single channel, 1 above the threshold and
else 0. Labels that are no class are counted in a last row, and so are predictions in a mask that are none.

Layout: as softmax_stats; a mask and its labels are dense. Bytes moved: both operands are read once. Counts are
integers, so every order of summation gives the same result: a program counts its tiles in a histogram of its own; where
that would not fit in registers the programs add to the counts in memory, atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, power_of_2
from .launching import accumulator, launch
from .softmax_stats import alignment, by_pixel

_PROGRAMS = 1024
_CELLS = 1 << 20  # of all programs' histograms together
_LARGEST_HISTOGRAM = 4096  # 32 registers a thread
_MASK_PIXELS = 2048  # of a tile: 16 bytes of uint8 a thread


@triton.jit
def first_largest(x, c, C: tl.constexpr):
    """The class of each pixel's largest logit: the first of equals, and NaN is larger than any number."""
    number = tl.where((c < C)[None, :] & (x == x), x, float("-inf"))
    largest = number == tl.max(number, axis=1)[:, None]
    rank = tl.where((c < C)[None, :], tl.where(x != x, 2, tl.where(largest, 1, 0)), 0)
    return tl.argmax(rank, axis=1)


@triton.jit
def _count(histogram, counts_ptr, cell, counted, CELLS: tl.constexpr, HISTOGRAM: tl.constexpr, BLOCK_P: tl.constexpr):
    """Count the cells of a tile: in the histogram that is returned, or in memory."""
    if HISTOGRAM:  # what does not count goes to its last cell
        histogram += tl.histogram(tl.where(counted, cell, CELLS - 1), CELLS)
    else:
        tl.atomic_add(counts_ptr + cell, tl.full([BLOCK_P], 1, tl.int64), mask=counted, sem="relaxed")
    return histogram


@triton.jit(do_not_specialize=["programs", "ignore_index"])
def _confusion_matrix_kernel(
    logits_ptr, labels_ptr, counts_ptr, pixels, programs, ignore_index,
    stride_xn, stride_xc, stride_yn, stride_yp,
    stride_xp: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr, HISTOGRAM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tiles program, program + programs, … of sample n: row CLASSES of the counts is for labels that are no class."""
    CLASSES: tl.constexpr = max(C, 2)
    program = tl.program_id(0) % programs
    n = (tl.program_id(0) // programs).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    histogram = tl.zeros([CELLS], tl.int32)
    for tile in range(program, (pixels - 1) // BLOCK_P + 1, programs):  # cdiv would overflow just below 2³¹
        pixel = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        row = pixel < pixels
        inside = row[:, None] & (c < C)[None, :]
        sample_ptr = logits_ptr + tl.multiple_of(n * stride_xn, ALIGN)
        x_ptr = sample_ptr + (pixel * stride_xp)[:, None] + (c.to(tl.int64) * stride_xc)[None, :]
        x = tl.load(x_ptr, mask=inside, other=0.0).to(ACC)
        if C == 1:
            guess = (tl.max(x, axis=1) > THRESHOLD).to(tl.int32)
        else:
            guess = first_largest(x, c, C)
        label = tl.load(labels_ptr + n * stride_yn + pixel * stride_yp, mask=row, other=0).to(tl.int64)
        counted = row & (label != ignore_index)
        label = tl.where((label >= 0) & (label < CLASSES), label, CLASSES).to(tl.int32)
        histogram = _count(histogram, counts_ptr, label * CLASSES + guess, counted, CELLS, HISTOGRAM, BLOCK_P)
    if HISTOGRAM:
        cells = tl.arange(0, CELLS)
        tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * CELLS + cells, histogram)


@triton.jit(do_not_specialize=["programs", "ignore_index"])
def _confusion_matrix_of_masks_kernel(
    mask_ptr, labels_ptr, counts_ptr, pixels, programs, ignore_index,
    C: tl.constexpr, CELLS: tl.constexpr, HISTOGRAM: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Tiles program, program + programs, … of the batch: row C of the counts is for pixels with no class in either."""
    program = tl.program_id(0)
    histogram = tl.zeros([CELLS], tl.int32)
    for tile in range(program, (pixels - 1) // BLOCK_P + 1, programs):  # cdiv would overflow just below 2³¹
        pixel = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        row = pixel < pixels
        guess = tl.load(mask_ptr + pixel, mask=row, other=0).to(tl.int64)
        label = tl.load(labels_ptr + pixel, mask=row, other=0).to(tl.int64)
        counted = row & (label != ignore_index)
        known = (guess >= 0) & (guess < C)
        label = tl.where((label >= 0) & (label < C) & known, label, C).to(tl.int32)
        guess = tl.where(known, guess, 0).to(tl.int32)
        histogram = _count(histogram, counts_ptr, label * C + guess, counted, CELLS, HISTOGRAM, BLOCK_P)
    if HISTOGRAM:
        cells = tl.arange(0, CELLS)
        tl.store(counts_ptr + program.to(tl.int64) * CELLS + cells, histogram)


def _counters(classes: int, programs: int, device: torch.device) -> tuple[Tensor, dict[str, int]]:
    """Where ``programs`` count, a histogram each or zeros for all, and what is compiled of it."""
    used = (classes + 1) * classes
    cells = _cells(classes)
    if cells <= _LARGEST_HISTOGRAM:
        return torch.empty((programs, cells), dtype=torch.int32, device=device), {"CELLS": cells, "HISTOGRAM": True}
    return torch.zeros((1, used), dtype=torch.int64, device=device), {"CELLS": 1, "HISTOGRAM": False}


def _cells(classes: int) -> int:
    """The size of a histogram: C + 1 rows and a cell for what does not count."""
    return power_of_2((classes + 1) * classes + 1)


def _most_programs(classes: int) -> int:
    cells = _cells(classes)
    return min(_PROGRAMS, _CELLS // cells) if cells <= _LARGEST_HISTOGRAM else _PROGRAMS


def confusion_matrix(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float) -> Tensor:
    """See :func:`fastunet.aten.confusion_matrix`."""
    batch, channels = logits.shape[:2]
    classes = max(channels, 2)
    pixels = logits.shape[2] * logits.shape[3]
    if batch * pixels == 0:
        return torch.zeros((classes + 1, classes), dtype=torch.int64, device=logits.device)
    if labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    logits, (stride_xn, stride_xc, stride_xp) = by_pixel(logits)
    labels, (stride_yn, _, stride_yp) = by_pixel(labels.unsqueeze(1))
    block_c = power_of_2(channels)
    block_p = max(16, 2048 // block_c)
    programs = min(cdiv(pixels, block_p), max(1, _most_programs(classes) // batch))
    counts, choices = _counters(classes, programs * batch, logits.device)
    launch(
        _confusion_matrix_kernel, (programs * batch,),
        logits, labels, counts, pixels, programs, ignore_index, stride_xn, stride_xc, stride_yn, stride_yp,
        stride_xp=stride_xp, C=channels, ALIGN=alignment(stride_xn, channels), THRESHOLD=threshold,
        ACC=accumulator(logits.dtype), **choices, BLOCK_P=block_p, BLOCK_C=block_c,
        num_warps=4 if channels <= 128 else 8,
    )  # fmt: skip
    return counts.sum(0)[: (classes + 1) * classes].view(classes + 1, classes)


def confusion_matrix_of_masks(mask: Tensor, labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """See :func:`fastunet.aten.confusion_matrix_of_masks`."""
    pixels = mask.numel()
    if pixels == 0:
        return torch.zeros((classes + 1, classes), dtype=torch.int64, device=mask.device)
    mask, labels = (
        t.contiguous().view(torch.uint8) if t.dtype == torch.bool else t.contiguous() for t in (mask, labels)
    )
    programs = min(cdiv(pixels, _MASK_PIXELS), _most_programs(classes))
    counts, choices = _counters(classes, programs, mask.device)
    launch(
        _confusion_matrix_of_masks_kernel, (programs,),
        mask, labels, counts, pixels, programs, ignore_index,
        C=classes, **choices, BLOCK_P=_MASK_PIXELS, num_warps=4,
    )  # fmt: skip
    return counts.sum(0)[: (classes + 1) * classes].view(classes + 1, classes)
