"""Every operation of fastunet in a few lines of plain PyTorch, differentiated by autograd, in any floating dtype.

The functions take the arguments of the operators of the same name in :mod:`fastunet.ops`, less those that say how to
compute (``save``, ``backend``). A *source* ``(x, affine, slope)`` is x (N, C, H, W) with affine None, (3, C) or,
by sample, (N, 3, C), rows scale, shift, centre: it stands for ``act(scale·(x − centre) + shift)``, slope being
act's below zero: 1 the identity, 0 ReLU, between them a leaky ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- sources -----------------------------------------------------------------------------------------------------


def affine_act(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """The value of a source, in x's dtype."""
    z = x
    if affine is not None:
        scale, shift, centre = (row.view(-1, x.shape[1], 1, 1) for row in affine.unbind(-2))
        z = (scale * (x - centre) + shift).to(x.dtype)
    return F.relu(z) if slope == 0 else F.leaky_relu(z, slope)


def affine_prelu(x: Tensor, affine: Tensor | None, slopes: Tensor) -> Tensor:
    """nn.PReLU of a source without an act of its own; slopes (C,), or (1,) for all channels."""
    return F.prelu(affine_act(x, affine, 1.0), slopes.to(x.dtype))


def add_act(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor,
    skip_affine: Tensor | None,
    skip_slope: float,
    sum_slope: float,
) -> Tensor:
    """act of the sum of two sources of one shape, as at the end of a residual block; ``sum_slope`` is act's below
    zero."""
    z = affine_act(x, affine, slope) + affine_act(skip, skip_affine, skip_slope)
    return affine_act(z, None, sum_slope)


def bn_affine(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The affine (3, C) of a batch norm: scale = weight/√(var + eps), shift = bias, centre = mean, all (C,)."""
    scale = 1 / torch.sqrt(var + eps)
    if weight is not None:
        scale = weight * scale
    return torch.stack([scale, torch.zeros_like(mean) if bias is None else bias, mean])


def group_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """The affine (N, 3, C) of a group norm from its channels' mean and biased variance (N, C)."""
    share = mean.shape[1] // groups
    centre = mean.unflatten(1, (groups, share)).mean(2).repeat_interleave(share, 1)
    spread = (var + (mean - centre).square()).unflatten(1, (groups, share)).mean(2).repeat_interleave(share, 1)
    scale = 1 / torch.sqrt(spread + eps)
    if weight is not None:
        scale = weight * scale
    return torch.stack([scale, torch.zeros_like(mean) if bias is None else bias.expand_as(mean), centre], 1)


def statistics(y: Tensor, stats: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over H, W and, if ``stats`` is 1, N: two (C,), or (N, C) if it is 2."""
    over = (0, 2, 3) if stats == 1 else (2, 3)
    return y.mean(over), y.var(over, correction=0)


# ---- convolutions, pooling, upsampling ---------------------------------------------------------------------------


def _frame(z: Tensor, size: Sequence[int], top: int, left: int) -> Tensor:
    """z at (top, left) of an image of zeros of ``size``; what sticks out is cut off."""
    height, width = z.shape[2:]
    return F.pad(z, [left, size[1] - width - left, top, size[0] - height - top])


def _nearest(z: Tensor, doubled: bool) -> Tensor:
    """z, or twice as large if it is to be ``doubled``: each pixel is then 2×2."""
    return F.interpolate(z, scale_factor=2, mode="nearest") if doubled else z


def _centre(z: Tensor, size: Sequence[int]) -> Tensor:
    """z in the middle of an image of zeros of ``size``; an odd difference leaves the larger part below and right."""
    return _frame(z, size, (size[0] - z.shape[2]) // 2, (size[1] - z.shape[3]) // 2)


def conv2d(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    stats: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, padded by half its odd kernel, of one source or of the concatenation of two.

    Each source, if ``doubled`` its nearest ×2, lies at its offset (top0, left0, top1, left1) in a frame of zeros of
    ``size`` (H, W). Returns (y, mean, var), the last two being :func:`statistics` of y, or empty without ``stats``.
    """
    z = _frame(_nearest(affine_act(x0, affine0, slope0), doubled[0]), size, offset[0], offset[1])
    if x1 is not None:
        second = _nearest(affine_act(x1, affine1, slope1), doubled[1])
        z = torch.cat([z, _frame(second, size, offset[2], offset[3])], 1)
    y = F.conv2d(z, weight, bias, stride, weight.shape[-1] // 2)
    return y, *(statistics(y, stats) if stats else (y.new_empty(0), y.new_empty(0)))


def conv_transpose2d(
    x: Tensor, affine: Tensor | None, slope: float, weight: Tensor, bias: Tensor | None, stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed convolution of stride 2 to (N, K, 2·H, 2·W) with weight (C, K, 2, 2) or (C, K, 3, 3).

    Returns (y, mean, var) as :func:`conv2d` does.
    """
    margin = 0 if weight.shape[-1] == 2 else 1
    y = F.conv_transpose2d(affine_act(x, affine, slope), weight, bias, 2, margin, margin)
    return y, *(statistics(y, stats) if stats else (y.new_empty(0), y.new_empty(0)))


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(conv2d(x))): running statistics are updated in place in training and used outside of it."""
    y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
    z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return F.relu(z) if relu else z


def max_pool2x2(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """2×2 max-pool of a source's value: (N, C, ⌊H/2⌋, ⌊W/2⌋). (The operator returns it before affine and ReLU.)"""
    return F.max_pool2d(affine_act(x, affine, slope), 2)


def avg_pool2x2(x: Tensor, affine: Tensor | None, slope: float) -> Tensor:
    """2×2 average-pool of a source's value: (N, C, ⌊H/2⌋, ⌊W/2⌋)."""
    return F.avg_pool2d(affine_act(x, affine, slope), 2)


def pad_replicate(x: Tensor, affine: Tensor | None, slope: float, rows: int, columns: int) -> Tensor:
    """A source's value with its last row and its last column repeated ``rows`` and ``columns`` times, 0 or 1."""
    return F.pad(affine_act(x, affine, slope), [0, columns, 0, rows], mode="replicate")


def upsample_concat(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    skip_slope: float,
    align_corners: bool | None,
    skip_first: bool,
) -> Tensor:
    """×2 of a source, bilinear, or nearest if ``align_corners`` is None; with a skip source: centred in its size (zero
    pad or crop) and concatenated with it."""
    mode = "nearest" if align_corners is None else "bilinear"
    up = F.interpolate(affine_act(x, affine, slope), scale_factor=2, mode=mode, align_corners=align_corners)
    if skip is None:
        return up
    parts = [affine_act(skip, skip_affine, skip_slope), _centre(up, skip.shape[2:])]
    return torch.cat(parts if skip_first else parts[::-1], 1)


def upsample_pad_concat(
    x: Tensor, skip: Tensor, *, align_corners: bool | None = True, skip_first: bool = True
) -> Tensor:
    """:func:`upsample_concat` of two plain tensors."""
    return upsample_concat(x, None, 1.0, skip, None, 1.0, align_corners, skip_first)


# ---- losses and scores -------------------------------------------------------------------------------------------


def one_hot(labels: Tensor, n_classes: int, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Labels (N, H, W) as (N, C, H, W) of zeros and ones; a pixel labelled ``ignore_index`` is zero in every class."""
    classes = torch.arange(n_classes, device=labels.device).view(1, -1, 1, 1)
    hot = (labels.unsqueeze(1) == classes) & (labels != ignore_index).unsqueeze(1)
    return hot.to(dtype)


def softmax_stats(
    logits: Tensor, labels: Tensor, pixel_weight: Tensor | None, mode: str, ignore_index: int, wanted: Sequence[bool]
) -> Tensor:
    """Sums over the pixels not labelled ``ignore_index``, per sample and class: (N, C, 7) of
    Σp·y, Σp, Σy, Σp², Σw·y·CE, Σw·y, Σw·S.

    ``mode`` "softmax": p = softmax of logits (N, C, H, W), labels (N, H, W) are classes, y their one-hot, CE = −log p,
    and S = −log p of pixels that have a class. "sigmoid": p = sigmoid, labels (N, C, H, W), or (N, H, W) for C = 1, are
    0 or 1, y = [label = 1], CE = −y·log p − (1 − y)·log(1 − p) over all pixels, S = −log p − log(1 − p), and the sums
    are Σw·CE and Σw. ``pixel_weight`` w is (N, H, W), or None for 1. The columns 3, 4 and 5, and 6 are 0 unless
    ``wanted``.
    """
    labels = labels.to(torch.int64)  # uint8 would wrap a negative ignore_index around
    if mode == "softmax":
        p, cost = logits.softmax(1), -logits.log_softmax(1)
        valid = (labels != ignore_index).unsqueeze(1)
        y = share = one_hot(labels, logits.shape[1], ignore_index, torch.bool)
        ce, spread = torch.where(y, cost, 0), torch.where(y.any(1, keepdim=True), cost, 0)
    else:
        p = logits.sigmoid()
        labels = labels.view_as(logits)
        valid = share = labels != ignore_index
        y = valid & (labels == 1)
        ce = torch.where(valid, -F.logsigmoid(torch.where(y, logits, -logits)), 0)
        spread = torch.where(valid, -F.logsigmoid(logits) - F.logsigmoid(-logits), 0)
    p = torch.where(valid, p, 0)
    w = torch.ones_like(logits[:, 0]) if pixel_weight is None else pixel_weight.to(logits.dtype)
    w = w.unsqueeze(1)
    columns = [p * y, p, y.to(p.dtype), p * p, w * ce, w * share, w * spread]
    computed = [True, True, True, wanted[0], wanted[1], wanted[1], wanted[2]]
    sums = [v.sum((2, 3)) if asked else p.new_zeros(p.shape[:2]) for v, asked in zip(columns, computed, strict=True)]
    return torch.stack(sums, 2)


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
    """:func:`softmax_stats` of the logits that a 1×1 convolution, weight (K, C, 1, 1), makes of a source."""
    logits = F.conv2d(affine_act(x, affine, slope), weight, bias)
    return softmax_stats(logits, labels, pixel_weight, mode, ignore_index, wanted)


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
    """What logits say, which a 1×1 convolution, weight (K, C, 1, 1), makes of a source.

    ``output`` "argmax": the class of the largest, uint8 (N, H, W); "threshold": σ(logit) > threshold, uint8
    (N, K, H, W); "softmax", "sigmoid": probabilities (N, K, H, W) in ``dtype``.
    """
    logits = F.conv2d(affine_act(x, affine, slope), weight, bias)
    if output == "argmax":
        return logits.argmax(1).to(torch.uint8)
    p = logits.softmax(1) if output == "softmax" else logits.sigmoid()
    return (p > threshold).to(torch.uint8) if output == "threshold" else p.to(dtype)


def _overlaps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per class, over the batch: true positives Σp·y, false positives Σp − Σp·y, false negatives Σy − Σp·y."""
    p = logits.softmax(1)
    y = one_hot(labels, logits.shape[1], -1, logits.dtype)
    overlap, total, truth = (v.sum((0, 2, 3)) for v in (p * y, p, y))
    return overlap, total - overlap, truth - overlap


def dice_loss(logits: Tensor, labels: Tensor, beta: float = 1.0, smooth: float = 1e-5) -> Tensor:
    """Seed 002's Dice loss of logits (N, C, H, W) and labels (N, H, W): 1 − mean over classes of
    ((1 + β²)·tp + s) / ((1 + β²)·tp + β²·fn + fp + s), all sums over the whole batch."""
    tp, fp, fn = _overlaps(logits, labels)
    weighted = (1 + beta**2) * tp
    return 1 - ((weighted + smooth) / (weighted + beta**2 * fn + fp + smooth)).mean()


def soft_miou(logits: Tensor, labels: Tensor, smooth: float = 1e-5) -> Tensor:
    """Seed 002's mIoU: mean over classes of (tp + s) / (tp + fn + fp + s), of probabilities. A class that neither
    occurs nor is predicted scores near 1, so the mean flatters where classes are absent."""
    tp, fp, fn = _overlaps(logits, labels)
    return ((tp + smooth) / (tp + fn + fp + smooth)).mean()


def confusion_matrix(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float) -> Tensor:
    """(C + 1, C) int64 counts of pixels by [label, class of the largest logit]; the last row: labels that are no class.

    Of a single channel class 1 is what exceeds ``threshold``, and C is 2; ``ignore_index`` does not count.
    """
    classes = max(logits.shape[1], 2)
    guess = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > threshold).to(torch.int64)
    return confusion_matrix_of_masks(guess, labels, classes, ignore_index)


def confusion_matrix_of_masks(mask: Tensor, labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """(C + 1, C) int64 counts of pixels by [label, mask]; the last row: labels or predictions that are no class."""
    mask, labels = mask.to(torch.int64), labels.to(torch.int64)
    known = (mask >= 0) & (mask < classes)
    kept = labels != ignore_index
    truth = torch.where((labels >= 0) & (labels < classes) & known, labels, classes)
    guess = torch.where(known, mask, 0)
    counts = torch.zeros(classes + 1, classes, dtype=torch.int64, device=labels.device)
    for row in range(classes + 1):
        for column in range(classes):
            counts[row, column] = (kept & (truth == row) & (guess == column)).sum()
    return counts
