"""Softmax and sigmoid statistics on the torch backend, and their gradient: a run of pixels at a time.

A CPU does not wait for its memory where a run fits its caches, and memory beyond the logits is needed for one run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.layout import memory_format, stats_dtype

aten = torch.ops.aten

_LOG2_E = 1 / math.log(2)
_LINEAR = 50  # above, log(1 + eˣ) is x, in float64 too
_RUN = 1 << 20  # logits that a CPU computes at a time: they fit its caches, and calls cost little beside them


def _class_axis(logits: Tensor) -> int:
    """The axis of the classes in a run of pixels: 1, (pixels, C), where they are adjacent in memory; else 0."""
    return 1 if logits.stride(1) == 1 and logits.shape[1] > 1 else 0


def _pixel_rows(t: Tensor, axis: int) -> Tensor:
    """(N, C, H, W) as (N, C, H·W), or as (N, H·W, C) for a class axis of 1; (N, H, W) as (N, H·W)."""
    t = t.flatten(-2)
    return t.transpose(1, 2) if t.dim() == 3 and axis == 1 else t


def _pixel_runs(
    logits: Tensor, labels: Tensor, pixel_weight: Tensor | None, mode: str, axis: int
) -> Iterator[tuple[int, tuple[slice, ...], Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]]:
    """Runs of one sample's pixels that fit a CPU's cache.

    (sample, index of the run, logits, labels, weights, scratch memory in the logits' shape, three times for a sigmoid:
    fresh memory of this size would cost as much as the arithmetic.)
    """
    dtype = stats_dtype(logits.dtype)
    if labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    if mode == "sigmoid" and labels.dim() == 3:
        labels = labels.unsqueeze(1)
    x, label = _pixel_rows(logits, axis), _pixel_rows(labels, axis)
    weight = None if pixel_weight is None else _pixel_rows(pixel_weight, axis)
    step = (_RUN if logits.device.type == "cpu" else 1 << 24) // logits.shape[1] // 16 * 16
    step = max(1, min(step, x.shape[2 - axis]))
    scratch = logits.new_empty((3 if mode == "sigmoid" else 1, step * logits.shape[1]), dtype=dtype)
    for n in range(logits.shape[0]):
        for start in range(0, x.shape[2 - axis], step):
            pixels = slice(start, start + step)
            run = (pixels,) if axis == 1 else (slice(None), pixels)
            part = x[n][run].to(dtype)
            yield (
                n,
                run,
                part,
                label[n][run if label.dim() == 3 else pixels],
                None if weight is None else weight[n, pixels].to(dtype),
                tuple(each[: part.numel()].view(part.shape) for each in scratch),
            )


def _all_within(label: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether a CPU finds nothing but labels from 0 to classes − 1, none ignored: the common case, and cheap to see."""
    if label.device.type != "cpu":
        return False
    low, high = (int(t) for t in label.aminmax())
    return low >= 0 and high < classes and not low <= ignore_index <= high


def _classify(label: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(class or 0, mask of the pixels with no class, mask of the ignored ones); no masks where a CPU finds none."""
    index = label.to(torch.int64)
    if _all_within(label, classes, ignore_index):
        return index, None, None
    ignored = index == ignore_index
    missing = ignored | (index < 0) | (index >= classes)
    return index.masked_fill(missing, 0), missing, ignored


def _answer(label: Tensor, ignore_index: int, out: Tensor) -> Tensor | None:
    """1 where the label is 1 and counts, else 0, in ``out``; the mask of the ignored, None where a CPU finds none."""
    if _all_within(label, 2, ignore_index):
        out.copy_(label)
        return None
    label = label.to(torch.int64)  # uint8 would wrap a negative ignore_index around
    ignored = label == ignore_index
    out.copy_((label == 1) & ~ignored)
    return ignored


def _over_classes(t: Tensor, axis: int) -> Tensor:
    """The sum of a run over its classes, which is kept as an axis; on a CPU sums of a few adjacent values are slow."""
    if axis == 1 and t.device.type == "cpu":
        return torch.mv(t, t.new_ones(t.shape[1])).unsqueeze(1)
    return t.sum(axis, keepdim=True)


def _softmax(x: Tensor, axis: int, out: Tensor) -> Tensor:
    """Softmax in ``out``. Logits below 16 need no shift by their maximum, and on a CPU maxima and exp are slow."""
    if x.device.type == "cpu":
        low, high = torch.mul(x, _LOG2_E, out=out).aminmax()
        if low > -24 and high < 24:
            return out.exp2_().mul_(_over_classes(out, axis).reciprocal_())
    return torch.softmax(x, axis, out=out)


def _entropy(x: Tensor, p_y: Tensor, row: Tensor, axis: int) -> Tensor:
    """−log p_y, with logits x to fall back on where p_y underflows."""
    if x.device.type == "cpu" and not (p_y < 1e-30).any():
        return p_y.log().neg_()
    return -x.log_softmax(axis).gather(axis, row).squeeze(axis)


def _sum_by_class(index: Tensor, missing: Tensor | None, values: Tensor | None, classes: int) -> Tensor:
    """For each class k, the sum of ``values`` (1 if None) where ``index`` is k and not missing, in a fixed order."""
    if missing is not None:
        index = index.masked_fill(missing, classes)
    if index.device.type == "cpu":
        return torch.bincount(index, None if values is None else values.to(torch.float64), classes + 1)[:classes]
    member = index == torch.arange(classes, device=index.device).unsqueeze(1)
    return (member if values is None else torch.where(member, values, 0)).sum(1)


def _shares(w: Tensor | None, ignored: Tensor | None, x: Tensor, axis: int) -> Tensor | None:
    """Weights of a run's entries, 0 for the ignored; None if all are 1."""
    if ignored is None:
        return None if w is None else w.unsqueeze(axis).expand_as(x)
    return (torch.ones_like(x) if w is None else w.unsqueeze(axis).expand_as(x)).masked_fill(ignored, 0)


def _weigh(cost: Tensor, ignored: Tensor | None, share: Tensor | None) -> Tensor:
    """cost·share in place, and 0 for the ignored whatever their logits."""
    if ignored is not None:
        cost.masked_fill_(ignored, 0)
    return cost if share is None else cost.mul_(share)


def softmax_stats(
    logits: Tensor, labels: Tensor, pixel_weight: Tensor | None, mode: str, ignore_index: int, wanted: Sequence[bool]
) -> Tensor:
    """Per sample and class TP, Σp, Σy, Σp², Σw·CE, Σw, Σw·S: (N, C, 7); see :func:`fastunet.losses.softmax_stats`.

    ``wanted`` says whether the squares, the two of the cross-entropy, and the last are computed: else they are 0.
    """
    batch, classes = logits.shape[:2]
    stats = logits.new_zeros((batch, classes, 7), dtype=stats_dtype(logits.dtype))
    axis = _class_axis(logits)
    squares, entropy, smoothing = wanted
    for n, _, x, label, w, scratch in _pixel_runs(logits, labels, pixel_weight, mode, axis):
        tp, p_sum, y, p2, ce, weight, spread = stats[n].unbind(1)
        if mode == "softmax":
            index, missing, ignored = _classify(label, classes, ignore_index)
            row = index.unsqueeze(axis)
            p = _softmax(x, axis, scratch[0])
            p_y = p.gather(axis, row).squeeze(axis)
            tp += _sum_by_class(index, missing, p_y, classes)
            y += _sum_by_class(index, missing, None, classes)
            if entropy:
                cost = _entropy(x, p_y, row, axis)
                ce += _sum_by_class(index, missing, cost if w is None else cost * w, classes)
                weight += _sum_by_class(index, missing, w, classes)
            if smoothing:
                cost = x.log_softmax(axis).neg_()
                if missing is not None:
                    cost.masked_fill_(missing.unsqueeze(axis), 0)
                spread += (cost if w is None else cost.mul_(_zero_missing(w, missing).unsqueeze(axis))).sum(1 - axis)
            if ignored is not None:
                p.masked_fill_(ignored.unsqueeze(axis), 0)
        else:
            p, y_is_1, product = scratch
            ignored = _answer(label, ignore_index, y_is_1)
            torch.sigmoid(x, out=p)
            if ignored is not None:
                p.masked_fill_(ignored, 0)
            tp += torch.mul(p, y_is_1, out=product).sum(1 - axis)
            y += y_is_1.sum(1 - axis)
            if entropy or smoothing:
                against = y_is_1.mul_(-2).add_(1).mul_(x)  # the logit, positive where it is wrong
                share = _shares(w, ignored, x, axis)
            if entropy:
                ce += _weigh(aten.softplus.out(against, 1, _LINEAR, out=product), ignored, share).sum(1 - axis)
                weight += x.shape[1 - axis] if share is None else share.sum(1 - axis)
            if smoothing:
                cost = F.softplus(against, 1, _LINEAR).add_(F.softplus(-against, 1, _LINEAR))
                spread += _weigh(cost, ignored, share).sum(1 - axis)
        p_sum += p.sum(1 - axis)
        if squares:
            p2 += p.square_().sum(1 - axis)
    return stats


def softmax_stats_backward(
    dstats: Tensor,
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
) -> Tensor:
    """The gradient of the logits, in their dtype and memory format; the probabilities are computed again."""
    classes = logits.shape[1]
    dlogits = torch.empty_like(logits, memory_format=memory_format(logits))
    axis = _class_axis(logits)
    dx = _pixel_rows(dlogits, axis)
    squares, entropy, smoothing = wanted
    for n, run, x, label, w, scratch in _pixel_runs(logits, labels, pixel_weight, mode, axis):
        dtp, dp, _, dp2, dce, _, dspread = dstats[n].t().contiguous()
        along = dp.unsqueeze(1 - axis)
        if mode == "softmax":
            # dx = q − p·Σq with q = p·(dP + 2p·dP2) − w·dS, and at the label + p·dTP − w·dCE.
            index, missing, ignored = _classify(label, classes, ignore_index)
            row = index.unsqueeze(axis)
            p = _softmax(x, axis, scratch[0])
            at_label = p.gather(axis, row).squeeze(axis).mul_(dtp.index_select(0, index))
            if entropy:
                cost = dce.index_select(0, index)
                at_label -= cost if w is None else cost.mul_(w)
            at_label = _zero_missing(at_label, missing)
            q = dx[n][run] if logits.dtype == x.dtype else torch.empty_like(x)
            torch.mul(p, torch.addcmul(along, p, dp2.unsqueeze(1 - axis), value=2) if squares else along, out=q)
            if smoothing:
                share = _zero_missing(torch.ones_like(at_label) if w is None else w, missing)
                q.addcmul_(share.unsqueeze(axis), dspread.unsqueeze(1 - axis), value=-1)
            q.scatter_add_(axis, row, at_label.unsqueeze(axis))
            q.addcmul_(p, _over_classes(q, axis), value=-1)
            if ignored is not None:
                q.masked_fill_(ignored.unsqueeze(axis), 0)
            if logits.dtype != x.dtype:
                dx[n][run].copy_(q)
        else:
            p, y_is_1, slope = scratch
            ignored = _answer(label, ignore_index, y_is_1)
            torch.sigmoid(x, out=p)
            torch.mul(y_is_1, dtp.unsqueeze(1 - axis), out=slope).add_(along)
            if squares:
                slope.addcmul_(p, dp2.unsqueeze(1 - axis), value=2)
            q = aten.sigmoid_backward.grad_input(slope, p, grad_input=slope)
            if entropy:
                cost = torch.sub(p, y_is_1, out=y_is_1).mul_(dce.unsqueeze(1 - axis))
                q += cost if w is None else cost.mul_(w.unsqueeze(axis))
            if smoothing:
                cost = p.mul_(2).sub_(1).mul_(dspread.unsqueeze(1 - axis))
                q += cost if w is None else cost.mul_(w.unsqueeze(axis))
            if ignored is not None:
                q.masked_fill_(ignored, 0)
            dx[n][run].copy_(q)
    return dlogits


def _zero_missing(t: Tensor, missing: Tensor | None) -> Tensor:
    return t if missing is None else t.masked_fill(missing, 0)
