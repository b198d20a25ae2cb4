"""Scores: hard ones from a confusion matrix, soft ones from the statistics that the losses use.

Report the confusion matrix's :attr:`ConfusionMatrix.miou`. :func:`soft_miou` and the Dice coefficients below are other
projects' numbers, kept so that results can be compared with theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunet import ops
from fastunet.backend import check_backend
from fastunet.checks import (
    NEVER,
    check_flags,
    check_integer,
    check_labels,
    check_number,
    check_tensor,
    checked_ignore_index,
)
from fastunet.dispatch import has_values
from fastunet.layout import stats_dtype
from fastunet.losses import softmax_stats

__all__ = ["ConfusionMatrix", "dice_coeff", "miou", "multiclass_dice_coeff", "soft_miou"]


def soft_miou(
    logits: Tensor, labels: Tensor, smooth: float = 1e-5, *, ignore_index: int | None = -100, backend: str = "auto"
) -> Tensor:
    """Seed 002's mIoU: the mean over classes of (Σp·y + smooth) / (Σp + Σy − Σp·y + smooth), sums over the batch.

    p is the softmax of the logits, so this is not the IoU of the predicted mask. It misleads where a class is absent
    from the labels: any probability left on that class takes its score, and a share of the mean, to about 0.
    Arguments, dtypes and errors as in :func:`fastunet.losses.softmax_stats`; a differentiable scalar.
    """
    check_number("smooth", smooth)
    stats = softmax_stats(
        logits, labels, ignore_index=ignore_index, squares=False, entropy=False, smoothing=False, backend=backend
    )
    tp, p, y = stats[..., :3].sum(0).unbind(-1)
    return ((tp + smooth) / (p + y - tp + smooth)).mean()


miou = soft_miou


def dice_coeff(input: Tensor, target: Tensor, reduce_batch_first: bool = False, epsilon: float = 1e-6) -> Tensor:
    """Pytorch-UNet's Dice coefficient, of versions 2 to 4: (2·Σ input·target + ε) / (Σ input + Σ target + ε).

    The sums run over each (H, W) plane and the planes are averaged, or over everything if ``reduce_batch_first``.
    Two empty planes score 1.

    Args:
        input: probabilities or a 0/1 mask, (…, H, W), floating point; (N, H, W) with ``reduce_batch_first``.
        target: a mask of the same shape.

    Raises:
        ValueError: other shapes.
    """
    check_tensor("input", input)
    check_tensor("target", target)
    check_number("epsilon", epsilon)
    check_flags(reduce_batch_first=reduce_batch_first)
    if input.device != target.device:
        raise ValueError(f"expected input and target on one device, got {input.device} and {target.device}; move one")
    if input.shape != target.shape or input.dim() < 2:
        raise ValueError(
            f"expected input and target of one shape (…, H, W), got {tuple(input.shape)} and {tuple(target.shape)}; "
            "pass those of the same pictures"
        )
    if reduce_batch_first and input.dim() != 3:
        raise ValueError(
            f"expected (N, H, W) with reduce_batch_first=True, got {tuple(input.shape)}; drop the channel with "
            "squeeze(1)"
        )
    axes = (0, 1, 2) if reduce_batch_first else (-2, -1)
    dtype = stats_dtype(input.dtype)  # float16 sums would overflow at 65504 pixels
    overlap, total = (
        (input * target).sum(axes, dtype=dtype),
        input.sum(axes, dtype=dtype) + target.sum(axes, dtype=dtype),
    )
    return ((2 * overlap + epsilon) / (total + epsilon)).mean()


def multiclass_dice_coeff(
    input: Tensor, target: Tensor, reduce_batch_first: bool = False, epsilon: float = 1e-6, *, version: int = 4
) -> Tensor:
    """:func:`dice_coeff` with every class of every sample as one plane: (N, C, H, W) probabilities and one-hot masks.

    An absent class that is not predicted counts as 1, so the mean flatters pictures with few classes.

    Args:
        version: of Pytorch-UNet. They differ with ``reduce_batch_first``: 4 adds up samples and classes; 2 and 3 add up
            the samples of each class, and average over classes.

    Raises:
        ValueError: tensors that differ in shape or are not 4-D; another version.
    """
    check_tensor("input", input)
    check_tensor("target", target)
    if version not in (2, 3, 4):
        raise ValueError(f"expected version 2, 3 or 4 of Pytorch-UNet, got {version!r}; leave it out for 4")
    if input.shape != target.shape or input.dim() != 4:
        raise ValueError(
            f"expected input and target of one shape (N, C, H, W), got {tuple(input.shape)} and {tuple(target.shape)}; "
            "pass probabilities and one-hot masks"
        )
    if reduce_batch_first and version < 4:
        classes = zip(input.unbind(1), target.unbind(1), strict=True)
        return torch.stack([dice_coeff(p, y, True, epsilon) for p, y in classes]).mean()
    return dice_coeff(input.flatten(0, 1), target.flatten(0, 1), reduce_batch_first, epsilon)


class ConfusionMatrix(nn.Module):
    """Counts of true against predicted classes over a stream of batches, and the scores that follow from them.

    Scores are float64; a per-class score is NaN where it is 0/0 (no such pixel) and for an ignored class, and means
    leave NaN out.

    Args:
        num_classes: number of classes, up to 256; 2 also for a network with one sigmoid channel.
        ignore_index: label of pixels that do not count, or None. If it is a class, predictions of that class are errors
            in the classes that the pixels belong to.
        threshold: above it a single channel predicts class 1: 0 for logits; 0.5 for the probabilities that
            :class:`fastunet.BrainUNet` and :class:`fastunet.StridedUNet` return.
        backend: see :func:`fastunet.backend.resolve_backend`.

    Attributes:
        matrix: (C, C) int64, rows are true classes and columns predicted ones.
    """

    matrix: Tensor

    def __init__(
        self, num_classes: int, ignore_index: int | None = None, *, threshold: float = 0.0, backend: str = "auto"
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 2)
        check_number("threshold", threshold)
        if num_classes > 256:
            raise ValueError(f"expected 2 to 256 classes, got {num_classes}; merge some of them")
        check_backend(backend)
        self.num_classes = num_classes
        self.ignore_index = checked_ignore_index(ignore_index)
        self.threshold = float(threshold)
        self.backend = backend
        # Not a buffer: DDP would overwrite it in every forward with the counts of the first process.
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConfusionMatrix:
        """Where the module goes, its counts go."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.matrix = fn(self.matrix)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}matrix"] = self.matrix

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Older checkpoints have no counts: keep these.
        counts = state_dict.pop(f"{prefix}matrix", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if counts is not None:
            check_tensor("the counts", counts)
            if counts.shape != self.matrix.shape:
                raise ValueError(
                    f"expected counts of shape {tuple(self.matrix.shape)}, got {tuple(counts.shape)}; build the "
                    "confusion matrix with that number of classes"
                )
            self.matrix = counts.to(self.matrix, copy=True)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, ignore_index={self.ignore_index}, threshold={self.threshold}, "
            f"backend={self.backend!r}"
        )

    @torch.no_grad()
    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add a batch, in one pass; waits for a GPU.

        Args:
            prediction: logits or probabilities (N, C, H, W), whose largest class counts (the first of equals; NaN
                wins); (N, 1, H, W) of a network with one sigmoid channel, class 1 above ``threshold``; or an integer
                mask like ``labels``.
            labels: (N, H, W), integer or bool.

        Raises:
            ValueError: shapes that do not fit, or a class out of range in labels or mask; nothing is added.
            TypeError: floating-point labels.
        """
        check_tensor("prediction", prediction)
        check_tensor("labels", labels)
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"expected integer labels, got {labels.dtype}; convert them with .long()")
        if prediction.is_complex():
            raise TypeError(f"expected logits or a mask, got {prediction.dtype}; take its real part")
        count = self._count if prediction.is_floating_point() else self._count_mask
        counts = count(prediction, labels)
        wrong = counts[-1].any()
        if torch.compiler.is_compiling():
            torch._assert_async(~wrong, "expected classes in range in labels and mask, got others; map their values")
        elif has_values(wrong) and bool(wrong):
            check_labels(labels, self.num_classes, self.ignore_index)
            self._refuse(prediction, labels)
        self._writable()
        self.matrix += counts[:-1].to(self.matrix.device)  # in place: a CUDA graph may hold it

    def _count(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(C + 1, C) counts; the last row is for labels that are no class."""
        channels = logits.shape[1] if logits.dim() == 4 else 0
        fits = channels == self.num_classes or (channels == 1 and self.num_classes == 2)
        if not fits or logits.shape[:1] + logits.shape[2:] != labels.shape:
            extra = labels.dim() == 4 and labels.shape[1] == 1
            hint = "drop the channel with labels.squeeze(1)" if extra else "pass those of the same pictures and classes"
            raise ValueError(
                f"expected logits of shape (N, {self.num_classes}, H, W) and labels (N, H, W), got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}; {hint}"
            )
        counts: Tensor = ops.confusion_matrix(logits, labels, self._ignored, self.threshold, self.backend)
        return counts

    @property
    def _ignored(self) -> int:
        return NEVER if self.ignore_index is None else self.ignore_index

    def _count_mask(self, mask: Tensor, labels: Tensor) -> Tensor:
        if mask.shape != labels.shape:
            raise ValueError(
                f"expected a mask of the labels' shape {tuple(labels.shape)}, got {tuple(mask.shape)}; pass those of "
                "the same pictures"
            )
        counts: Tensor = ops.confusion_matrix_of_masks(mask, labels, self.num_classes, self._ignored, self.backend)
        return counts

    def _refuse(self, mask: Tensor, labels: Tensor) -> None:
        """Say which class in ``mask`` is none, of the pixels that count."""
        guess = mask.to(torch.int64)[labels.to(torch.int64) != self._ignored]
        wrong = int(guess[(guess < 0) | (guess >= self.num_classes)][0])
        raise ValueError(
            f"expected classes from 0 to {self.num_classes - 1} in the mask, got {wrong}; map its values to classes"
        )

    def reset(self) -> None:
        """Forget every batch."""
        self._writable()
        self.matrix.zero_()

    def _writable(self) -> None:
        """Nobody may write to what was made in inference mode outside it: then the counts are a copy."""
        if not torch.compiler.is_compiling() and self.matrix.is_inference() and not torch.is_inference_mode_enabled():
            self.matrix = self.matrix.clone()

    def all_reduce(self) -> ConfusionMatrix:
        """A new matrix with the counts of all processes of ``torch.distributed``; a copy where it is not initialised.

        Every process has to call it; with NCCL move the matrix to the GPU first (``.to(device)``).
        """
        total = copy.deepcopy(self)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total.matrix)
        return total

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hits, true pixels and predicted pixels of each class."""
        matrix = self.matrix.to(torch.float64)
        return matrix.diagonal(), matrix.sum(1), matrix.sum(0)

    def _ratio(self, part: Tensor, whole: Tensor) -> Tensor:
        """part / whole of each class; NaN for the ignored one, whose true pixels were not counted."""
        score = part / whole
        if self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes:
            score[self.ignore_index] = torch.nan
        return score

    @property
    def iou(self) -> Tensor:
        """(C,) TP / (TP + FP + FN); NaN for a class absent from truth and prediction."""
        hits, true, predicted = self._counts()
        return self._ratio(hits, true + predicted - hits)

    @property
    def dice(self) -> Tensor:
        """(C,) 2·TP / (2·TP + FP + FN); NaN for a class absent from truth and prediction."""
        hits, true, predicted = self._counts()
        return self._ratio(2 * hits, true + predicted)

    @property
    def precision(self) -> Tensor:
        """(C,) TP / (TP + FP); NaN for a class that was never predicted."""
        hits, _, predicted = self._counts()
        return self._ratio(hits, predicted)

    @property
    def recall(self) -> Tensor:
        """(C,) TP / (TP + FN); NaN for a class absent from the truth."""
        hits, true, _ = self._counts()
        return self._ratio(hits, true)

    @property
    def miou(self) -> Tensor:
        """Mean of :attr:`iou` over the classes that occur and are not ignored."""
        return self.iou.nanmean()

    @property
    def accuracy(self) -> Tensor:
        """Share of pixels whose class is right; NaN before the first pixel."""
        hits, true, _ = self._counts()
        return hits.sum() / true.sum()
