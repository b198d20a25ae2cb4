"""Scores: hard ones from a confusion matrix, soft ones from the statistics that the losses use.

Report the confusion matrix's :attr:`ConfusionMatrix.miou`. :func:`soft_miou` and the Dice coefficients below are other
projects' numbers, kept so that results can be compared with theirs.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunet.aten import stats_dtype
from fastunet.losses import softmax_stats

__all__ = ["ConfusionMatrix", "dice_coeff", "miou", "multiclass_dice_coeff", "soft_miou"]


def soft_miou(
    logits: Tensor, labels: Tensor, smooth: float = 1e-5, *, ignore_index: int = -100, backend: str = "auto"
) -> Tensor:
    """Seed 002's mIoU: the mean over classes of (Σp·y + smooth) / (Σp + Σy − Σp·y + smooth), sums over the batch.

    p is the softmax of the logits, so this is not the IoU of the predicted mask. It misleads where a class is absent
    from the labels: any probability left on that class takes its score, and a share of the mean, to about 0.
    Arguments, dtypes and errors as in :func:`fastunet.losses.softmax_stats`; a differentiable scalar.
    """
    stats = softmax_stats(logits, labels, ignore_index=ignore_index, backend=backend)
    tp, p, y = stats[..., :3].sum(0).unbind(-1)
    return ((tp + smooth) / (p + y - tp + smooth)).mean()


miou = soft_miou


def dice_coeff(input: Tensor, target: Tensor, reduce_batch_first: bool = False, epsilon: float = 1e-6) -> Tensor:
    """Pytorch-UNet's Dice coefficient (2·Σ input·target + ε) / (Σ input + Σ target + ε).

    The sums run over each (H, W) plane and the planes are averaged, or over everything if ``reduce_batch_first``.
    Two empty planes score 1.

    Args:
        input: probabilities or a 0/1 mask, (H, W) or (N, H, W), floating point.
        target: a mask of the same shape.

    Raises:
        ValueError: other shapes, or ``reduce_batch_first`` without a batch.
    """
    if input.shape != target.shape or input.dim() not in (2, 3):
        raise ValueError(
            f"expected input and target of one shape, (H, W) or (N, H, W), got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    if reduce_batch_first and input.dim() == 2:
        raise ValueError(f"expected (N, H, W) with reduce_batch_first=True, got {tuple(input.shape)}")
    axes = (0, 1, 2) if reduce_batch_first else (-2, -1)
    dtype = stats_dtype(input.dtype)  # float16 sums would overflow at 65504 pixels
    overlap, total = (
        (input * target).sum(axes, dtype=dtype),
        input.sum(axes, dtype=dtype) + target.sum(axes, dtype=dtype),
    )
    return ((2 * overlap + epsilon) / (total + epsilon)).mean()


def multiclass_dice_coeff(
    input: Tensor, target: Tensor, reduce_batch_first: bool = False, epsilon: float = 1e-6
) -> Tensor:
    """:func:`dice_coeff` with every class of every sample as one plane: (N, C, H, W) probabilities and one-hot masks.

    An absent class that is not predicted counts as 1, so the mean flatters pictures with few classes.

    Raises:
        ValueError: tensors that differ in shape or are not 4-D.
    """
    if input.shape != target.shape or input.dim() != 4:
        raise ValueError(
            f"expected input and target of one shape (N, C, H, W), got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    return dice_coeff(input.flatten(0, 1), target.flatten(0, 1), reduce_batch_first, epsilon)


class ConfusionMatrix(nn.Module):
    """Counts of true against predicted classes over a stream of batches, and the scores that follow from them.

    Scores are float64; a per-class score is NaN where it is 0/0 (no such pixel), and means leave NaN out.

    Args:
        num_classes: number of classes; 2 also for a network with one sigmoid channel.
        ignore_index: label of pixels that do not count, or None.

    Attributes:
        matrix: (C, C) int64, rows are true classes and columns predicted ones.
    """

    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"expected at least 2 classes, got {num_classes}; a foreground mask has 2")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.register_buffer("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add a batch; waits for a GPU.

        Args:
            prediction: logits or probabilities (N, C, H, W), whose largest class counts; logits (N, 1, H, W) of a
                network with one sigmoid channel, positive where the class is 1; or an integer mask like ``labels``.
            labels: (N, H, W), integer or bool.

        Raises:
            ValueError: shapes that do not fit, or a class out of range in labels or mask; nothing is added.
            TypeError: floating-point labels.
        """
        if labels.is_floating_point():
            raise TypeError(f"expected integer labels, got {labels.dtype}; convert them with .long()")
        if prediction.is_floating_point():
            channels = prediction.shape[1] if prediction.dim() > 1 else 0
            binary = self.num_classes == 2 and channels == 1
            if prediction.shape[:1] + prediction.shape[2:] != labels.shape or not (
                binary or channels == self.num_classes
            ):
                raise ValueError(
                    f"expected logits of shape (N, {self.num_classes}, H, W) and labels (N, H, W), got "
                    f"{tuple(prediction.shape)} and {tuple(labels.shape)}"
                )
            prediction = prediction[:, 0] > 0 if binary else prediction.argmax(1)
        if prediction.shape != labels.shape:
            raise ValueError(
                f"expected a mask of the labels' shape {tuple(labels.shape)}, got {tuple(prediction.shape)}"
            )
        truth, predicted = labels.flatten().to(torch.int64), prediction.flatten().to(torch.int64)
        if self.ignore_index is not None:
            valid = truth != self.ignore_index
            truth, predicted = truth[valid], predicted[valid]
        for name, classes in (("labels", truth), ("the mask", predicted)):
            wrong = classes[(classes < 0) | (classes >= self.num_classes)]
            if wrong.numel() > 0:
                raise ValueError(
                    f"expected classes from 0 to {self.num_classes - 1} in {name}, got {int(wrong[0])}; map the values "
                    "to class indices or set ignore_index"
                )
        counts = torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        self.matrix += counts.view_as(self.matrix).to(self.matrix.device)

    def reset(self) -> None:
        """Forget every batch."""
        self.matrix.zero_()

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

    @property
    def iou(self) -> Tensor:
        """(C,) TP / (TP + FP + FN); NaN for a class absent from truth and prediction."""
        hits, true, predicted = self._counts()
        return hits / (true + predicted - hits)

    @property
    def dice(self) -> Tensor:
        """(C,) 2·TP / (2·TP + FP + FN); NaN for a class absent from truth and prediction."""
        hits, true, predicted = self._counts()
        return 2 * hits / (true + predicted)

    @property
    def precision(self) -> Tensor:
        """(C,) TP / (TP + FP); NaN for a class that was never predicted."""
        hits, _, predicted = self._counts()
        return hits / predicted

    @property
    def recall(self) -> Tensor:
        """(C,) TP / (TP + FN); NaN for a class absent from the truth."""
        hits, true, _ = self._counts()
        return hits / true

    @property
    def miou(self) -> Tensor:
        """Mean of :attr:`iou` over the classes that occur."""
        return self.iou.nanmean()

    @property
    def accuracy(self) -> Tensor:
        """Share of pixels whose class is right; NaN before the first pixel."""
        hits, true, _ = self._counts()
        return hits.sum() / true.sum()
