"""Losses for segmentation with integer labels, as a few lines over one pass of statistics.

:func:`softmax_stats` reads logits and labels once and returns six sums per sample and class; its backward is one more
pass. There is no one-hot tensor, and nothing of the logits' size is kept but the logits. Every loss here takes
**logits**: a network that ends in a sigmoid or softmax has to give its last activation up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import ops

__all__ = ["DiceCELoss", "DiceLoss", "check_labels", "dice_loss", "softmax_stats"]

MODES = ("softmax", "sigmoid")
MAX_CLASSES = 256
_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_labels(labels: Tensor, n_classes: int, ignore_index: int = -100) -> None:
    """Raise ValueError if a label is neither in 0 … n_classes − 1 nor ``ignore_index``; waits for a GPU.

    The losses call this for labels on the CPU. On a GPU it would stall every step, so there a label out of range
    counts as a pixel that belongs to no class: check a data set once, when it is loaded.
    """
    if labels.numel() == 0 or labels.dtype == torch.bool:
        return
    low, high = (int(t) for t in labels.aminmax())
    if low >= 0 and high < n_classes:
        return
    wide = labels.to(torch.int64)  # uint8 would wrap a negative ignore_index around
    wrong = wide[(wide != ignore_index) & ((wide < 0) | (wide >= n_classes))]
    if wrong.numel() > 0:
        hint = "; a single channel needs sigmoid" if n_classes == 1 else "; map the mask's values to class indices"
        raise ValueError(
            f"expected labels from 0 to {n_classes - 1} or ignore_index={ignore_index}, got {int(wrong[0])}{hint}"
        )


def _check(logits: Tensor, labels: Tensor, mode: str, ignore_index: int, pixel_weight: Tensor | None) -> None:
    if mode not in MODES:
        raise ValueError(f"expected mode 'softmax' or 'sigmoid', got {mode!r}")
    if logits.dim() != 4:
        raise ValueError(f"expected logits of shape (N, C, H, W), got {tuple(logits.shape)}; reshape them")
    if not logits.is_floating_point():
        raise TypeError(f"expected floating-point logits, got {logits.dtype}; pass the network's output, not a mask")
    batch, classes, height, width = logits.shape
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"expected logits with 1 to {MAX_CLASSES} classes, got {classes}")
    if labels.dtype not in _LABEL_DTYPES and not (mode == "sigmoid" and labels.dtype == torch.bool):
        raise TypeError(f"expected integer labels (uint8 to int64), got {labels.dtype}; convert them with .long()")
    plane = (batch, height, width)
    if not (mode == "sigmoid" and labels.shape == logits.shape) and (
        labels.shape != plane or (mode == "sigmoid" and classes > 1)
    ):
        expected = logits.shape if mode == "sigmoid" else plane
        raise ValueError(
            f"expected labels of shape {tuple(expected)} for logits of shape {tuple(logits.shape)} in {mode} mode, "
            f"got {tuple(labels.shape)}"
        )
    if pixel_weight is not None:
        if pixel_weight.shape != plane or not pixel_weight.is_floating_point():
            raise ValueError(
                f"expected a floating-point pixel_weight of shape {plane}, got {pixel_weight.dtype} of shape "
                f"{tuple(pixel_weight.shape)}"
            )
        if pixel_weight.requires_grad:
            raise ValueError("expected a pixel_weight without requires_grad, since none is computed; detach() it")
    for name, t in (("labels", labels), ("pixel_weight", pixel_weight)):
        if t is not None and t.device != logits.device:
            raise ValueError(f"expected {name} on {logits.device}, where the logits are, got {t.device}; move them")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, classes if mode == "softmax" else 2, ignore_index)


def softmax_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    mode: str = "softmax",
    ignore_index: int = -100,
    pixel_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sums that Dice, soft IoU and cross-entropy are made of, in one pass over the logits; differentiable.

    Over the pixels whose label is not ``ignore_index``, for every sample and class k, with p = softmax(logits)[k],
    y = 1 where the label is k, and w = ``pixel_weight`` or 1:

    ====== === === ==== ==================== ======
    0      1   2   3    4                    5
    Σ p·y  Σ p Σ y Σ p² Σ w·y·(−log p)       Σ w·y
    ====== === === ==== ==================== ======

    In mode "sigmoid" every channel is a question of its own: p = sigmoid(logits)[k], y = 1 where the channel's label
    is 1, column 4 is the binary cross-entropy Σ w·(−y·log p − (1−y)·log(1−p)) and column 5 Σ w. A pixel's label may
    be ignored in one channel and count in another.

    Args:
        logits: (N, C, H, W), floating point, 1 to 256 classes, any memory format.
        labels: (N, H, W), uint8 to int64. In mode "sigmoid" 0, 1 or ignore_index, bool too: (N, C, H, W), or
            (N, H, W) for one channel.
        mode: "softmax" (each pixel has one class) or "sigmoid" (binary, or several labels per pixel).
        ignore_index: pixels with this label do not count; their gradient is 0 whatever their logits are.
        pixel_weight: (N, H, W) floating point, weights of the cross-entropy only; receives no gradient.
        backend: see :func:`fastunet.ops.resolve_backend`.

    Returns:
        (N, C, 6) in float32 (float64 for float64 logits), the same bits on every run.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or mode; on the CPU also a label out of range, which
            elsewhere counts as no class (see :func:`check_labels`).
    """
    _check(logits, labels, mode, ignore_index, pixel_weight)
    stats: Tensor = ops.call(ops.softmax_stats, logits, labels, pixel_weight, mode, ignore_index, backend)
    return stats


def dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    sigmoid: bool = False,
    smooth: float = 1e-5,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """1 − the mean over classes of (2·Σp·y + smooth) / (Σp + Σy + smooth), sums over the batch: ``DiceLoss()``.

    Arguments and errors as in :func:`softmax_stats`, with mode "sigmoid" if ``sigmoid``.
    """
    mode = "sigmoid" if sigmoid else "softmax"
    stats = softmax_stats(logits, labels, mode=mode, ignore_index=ignore_index, backend=backend)
    tp, p, y = stats[..., :3].sum(0).unbind(-1)
    return 1 - ((2 * tp + smooth) / (p + y + smooth)).mean()


_PRESETS: dict[str, dict[str, Any]] = {
    "seed002": {},
    "milesial": {"sigmoid": None, "micro": True, "smooth_nr": 1e-6, "smooth_dr": 1e-6},
    "brain": {"sigmoid": True, "micro": True, "smooth_nr": 1.0, "smooth_dr": 1.0},
    "nnunet": {"include_background": False},
}


class DiceLoss(nn.Module):
    """Soft Dice loss 1 − (2·TP + smooth_nr) / (Σp + Σy + smooth_dr) from logits and integer labels.

    TP = Σ p·y, over the pixels whose label is not ``ignore_index``. Argument names follow MONAI's; the default is
    ``monai.losses.DiceLoss(softmax=True, to_onehot_y=True, batch=True)``, which is also seed 002's formula
    ((1+β²)·tp + s) / ((1+β²)·tp + β²·fn + fp + s) with β = 1 and s = 1e-5. A class that is absent from truth and
    prediction scores smooth_nr / smooth_dr, that is 1; so does a batch in which every pixel is ignored.

    Args:
        include_background: False leaves class 0 out (never the only class).
        sigmoid: independent channels instead of a softmax; None: a sigmoid if there is one channel, else a softmax.
        squared_pred: Σp² in place of Σp (Σy² is Σy).
        reduction: "mean" or "sum" over classes (and samples), or "none".
        smooth_nr, smooth_dr: added to numerator and denominator.
        batch: sum over the batch before dividing; False scores every sample by itself.
        micro: sum over classes before dividing.
        weight: C factors ≥ 0 for the classes' losses, not normalised; with ``micro`` there is nothing to weight.
        ignore_index: label of pixels that do not count.
        backend: see :func:`fastunet.ops.resolve_backend`.

    Raises:
        ValueError: an unknown reduction, a negative weight, or ``weight`` together with ``micro``.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        include_background: bool = True,
        sigmoid: bool | None = False,
        squared_pred: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = True,
        micro: bool = False,
        weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float32)
            if weight.dim() != 1 or bool((weight < 0).any()):
                raise ValueError(f"expected weight to be one factor ≥ 0 per class, got {weight.tolist()}")
            if micro:
                raise ValueError("expected no weight with micro=True, which adds the classes up before it divides")
        self.include_background = include_background
        self.sigmoid = sigmoid
        self.squared_pred = squared_pred
        self.reduction = reduction
        self.smooth_nr = smooth_nr
        self.smooth_dr = smooth_dr
        self.batch = batch
        self.micro = micro
        self.ignore_index = ignore_index
        self.backend = backend
        self.register_buffer("weight", weight)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DiceLoss:
        """The loss with another definition of Dice in use; ``overrides`` are arguments of the constructor.

        - "seed002": per class over the batch, mean over classes: the default.
        - "milesial" (Pytorch-UNet): 1 − (2·TP + ε) / (Σp + Σy + ε), ε = 1e-6, with every sum over batch and classes;
          softmax for several channels, sigmoid for one.
        - "brain" (mateuszbuda's brain-segmentation-pytorch): 1 − (2·TP + 1) / (Σp + Σy + 1) after a sigmoid, over the
          flattened batch. That project's network ends in a sigmoid: pass what comes before it.
        - "nnunet" (nnU-Net, 2-D): per class over the batch without background,
          dc = (2·TP + 1e-5) / max(Σp + Σy + 1e-5, 1e-8); this is 1 − mean dc, where nnU-Net minimises −mean dc.

        Raises:
            ValueError: an unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"expected a preset among {', '.join(sorted(_PRESETS))}, got {name!r}")
        return cls(**{**_PRESETS[name], **overrides})

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of logits (N, C, H, W) and labels as in :func:`softmax_stats`, which see for errors.

        A scalar in float32 (float64 for float64 logits); with reduction "none" (C,), (N, C) if not ``batch``, and
        without the C if ``micro``; C is one less without background.
        """
        return self._dice(self._stats(logits, labels, None))

    def _stats(self, logits: Tensor, labels: Tensor, pixel_weight: Tensor | None) -> Tensor:
        if self.weight is not None and logits.dim() == 4 and self.weight.shape[0] != logits.shape[1]:
            raise ValueError(
                f"expected one weight for each of the {logits.shape[1]} classes, got {self.weight.shape[0]}"
            )
        sigmoid = self.sigmoid if self.sigmoid is not None else logits.dim() == 4 and logits.shape[1] == 1
        return softmax_stats(
            logits,
            labels,
            mode="sigmoid" if sigmoid else "softmax",
            ignore_index=self.ignore_index,
            pixel_weight=pixel_weight,
            backend=self.backend,
        )

    def _dice(self, stats: Tensor) -> Tensor:
        first = 0 if self.include_background or stats.shape[1] == 1 else 1
        stats = stats[:, first:]
        if self.batch:
            stats = stats.sum(0)
        if self.micro:
            stats = stats.sum(-2)
        tp, p, y, p2, _, _ = stats.unbind(-1)
        loss = 1 - (2 * tp + self.smooth_nr) / ((p2 if self.squared_pred else p) + y + self.smooth_dr)
        if self.weight is not None:
            loss = loss * self.weight[first:].to(loss.dtype)
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()


class DiceCELoss(DiceLoss):
    """lambda_dice · Dice + lambda_ce · cross-entropy, from one pass over the logits.

    The Dice term is :class:`DiceLoss` with the same arguments. The cross-entropy is ``torch.nn.CrossEntropyLoss``'s
    with ``weight`` and ``ignore_index``: Σ u·(−log p) / Σ u over the pixels, where u is the weight of the pixel's class
    (times ``pixel_weight``); with reduction "sum" the numerator alone. Where every pixel is ignored it is NaN, as in
    PyTorch. With ``sigmoid`` it is the mean binary cross-entropy over pixels and channels, and ``weight`` weighs
    channels.

    Args:
        lambda_dice, lambda_ce: factors of the two terms.
        **dice: arguments of :class:`DiceLoss`; reduction is "mean" or "sum".

    Raises:
        ValueError: reduction "none", or what :class:`DiceLoss` raises.
    """

    def __init__(self, *, lambda_dice: float = 1.0, lambda_ce: float = 1.0, **dice: Any) -> None:
        super().__init__(**dice)
        if self.reduction == "none":
            raise ValueError("expected reduction 'mean' or 'sum', got 'none', which would add losses of unlike shapes")
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce

    def forward(self, logits: Tensor, labels: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """A scalar; ``pixel_weight`` (N, H, W) weighs the cross-entropy, as in the U-Net paper's border map.

        Shapes, dtypes and errors as in :func:`softmax_stats`.
        """
        stats = self._stats(logits, labels, pixel_weight)
        ce, total = stats[..., 4:].sum(0).unbind(-1)
        if self.weight is not None:
            weight = self.weight.to(stats.dtype)
            ce, total = ce * weight, total * weight
        entropy = ce.sum() / total.sum() if self.reduction == "mean" else ce.sum()
        return self.lambda_dice * self._dice(stats) + self.lambda_ce * entropy
