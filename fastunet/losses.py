"""Losses for segmentation with integer labels, as a few lines over one pass of statistics.

:func:`softmax_stats` reads logits and labels once and returns seven sums per sample and class; its backward is one more
pass. There is no one-hot tensor, and nothing of the logits' size is kept but the logits. Every loss here takes
**logits**: a network that ends in a sigmoid or softmax has to give its last activation up.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import ops
from fastunet.activation import Activation, head_stats
from fastunet.backend import check_backend
from fastunet.blocks import untouched
from fastunet.checks import (
    LABEL_DTYPES,
    NEVER,
    check_flags,
    check_in_graph,
    check_labels,
    check_number,
    check_tensor,
    checked_ignore_index,
    said,
)
from fastunet.dispatch import call, has_values, unwatched
from fastunet.distributed import gathered
from fastunet.layout import stats_dtype
from fastunet.weight_map import unet_weight_map

__all__ = [
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceLoss",
    "GeneralizedDiceLoss",
    "GlobalLoss",
    "TverskyLoss",
    "check_labels",
    "dice_loss",
    "softmax_stats",
    "unet_weight_map",
]

MODES = ("softmax", "sigmoid")
MAX_CLASSES = 256


def _check(
    shape: Sequence[int],
    device: torch.device,
    labels: Tensor,
    mode: str,
    ignore_index: int | None,
    pixel_weight: Tensor | None,
) -> None:
    """What statistics of logits of ``shape`` (N, C, H, W) are to be made with."""
    check_tensor("labels", labels)
    if mode not in MODES:
        raise ValueError(f"expected mode 'softmax' or 'sigmoid', got {mode!r}; several labels per pixel are 'sigmoid'")
    shape = tuple(shape)
    batch, classes, height, width = shape
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"expected logits with 1 to {MAX_CLASSES} classes, got {classes}; change the last convolution")
    if classes == 1 and mode == "softmax":
        raise ValueError(
            f"expected 2 channels or more for a softmax, which of one is always 1, got logits of shape {shape}; "
            "a mask of one channel needs a sigmoid (sigmoid=True, mode='sigmoid')"
        )
    if labels.dtype not in LABEL_DTYPES and not (mode == "sigmoid" and labels.dtype == torch.bool):
        raise TypeError(f"expected integer labels (uint8 to int64), got {labels.dtype}; convert them with .long()")
    plane = (batch, height, width)
    given = tuple(labels.shape)
    if not (mode == "sigmoid" and given == shape) and (given != plane or (mode == "sigmoid" and classes > 1)):
        expected = shape if mode == "sigmoid" else plane
        if given == (batch, 1, height, width):
            hint = "drop the channel with labels.squeeze(1)"
        elif given == shape:
            hint = "turn one-hot labels into indices with labels.argmax(1)"
        else:
            hint = "pass those of the same pictures"
        raise ValueError(
            f"expected labels of shape {expected} for logits of shape {shape} in {mode} mode, got {given}; {hint}"
        )
    if pixel_weight is not None:
        check_tensor("pixel_weight", pixel_weight)
        if pixel_weight.shape != plane or not pixel_weight.is_floating_point():
            raise ValueError(
                f"expected a floating-point pixel_weight of shape {plane}, got {pixel_weight.dtype} of shape "
                f"{tuple(pixel_weight.shape)}; pass one factor per pixel"
            )
        if pixel_weight.requires_grad:
            raise ValueError(
                "expected a pixel_weight without requires_grad, since none is computed, got one with it; detach() it"
            )
    for name, t in (("labels", labels), ("pixel_weight", pixel_weight)):
        if t is not None and t.device != device:
            raise ValueError(f"expected {name} on {device}, where the logits are, got {t.device}; move them")
    if labels.device.type == "cpu":
        outcomes = classes if mode == "softmax" else 2
        if torch.compiler.is_compiling():
            check_in_graph(labels, outcomes, ignore_index)
        elif has_values(labels):
            check_labels(labels, outcomes, ignore_index)


def softmax_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    mode: str = "softmax",
    ignore_index: int | None = -100,
    pixel_weight: Tensor | None = None,
    squares: bool = True,
    entropy: bool = True,
    smoothing: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The sums that Dice, soft IoU and cross-entropy are made of, in one pass over the logits; differentiable.

    Over the pixels whose label is not ``ignore_index``, for every sample and class k, with p = softmax(logits)[k],
    y = 1 where the label is k, and w = ``pixel_weight`` or 1:

    ====== === === ==== ================ ====== ==============
    0      1   2   3    4                5      6
    Σ p·y  Σ p Σ y Σ p² Σ w·y·(−log p)   Σ w·y  Σ w·(−log p)
    ====== === === ==== ================ ====== ==============

    In mode "sigmoid" every channel is a question of its own: p = sigmoid(logits)[k], y = 1 where the channel's label
    is 1, column 4 is the binary cross-entropy Σ w·(−y·log p − (1−y)·log(1−p)), column 5 Σ w and column 6
    Σ w·(−log p − log(1−p)). A pixel's label may be ignored in one channel and count in another.

    Args:
        logits: (N, C, H, W), floating point, 1 to 256 classes, any memory format.
        labels: (N, H, W), uint8 to int64. In mode "sigmoid" 0, 1 or ignore_index, bool too: (N, C, H, W), or
            (N, H, W) for one channel.
        mode: "softmax" (each pixel has one class) or "sigmoid" (binary, or several labels per pixel).
        ignore_index: pixels with this label do not count; their gradient is 0 whatever their logits are. None: every
            pixel counts.
        pixel_weight: (N, H, W) floating point, weights of columns 4 to 6 only; receives no gradient.
        squares, entropy, smoothing: False leaves column 3, columns 4 and 5, or column 6 at 0 and saves their cost.
        backend: see :func:`fastunet.backend.resolve_backend`.

    Returns:
        (N, C, 7) in float32 (float64 for float64 logits), the same bits on every run.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or mode; on the CPU also a label out of range, which
            elsewhere counts as no class (see :func:`check_labels`).
    """
    check_backend(backend)
    ignore_index = checked_ignore_index(ignore_index)
    check_flags(squares=squares, entropy=entropy, smoothing=smoothing)
    _check_logits(logits)
    _check(logits.shape, logits.device, labels, mode, ignore_index, pixel_weight)
    return _stats(logits, labels, pixel_weight, mode, ignore_index, [squares, entropy, smoothing], backend)


def _check_logits(logits: Tensor) -> None:
    check_tensor("logits", logits)
    if logits.dim() != 4:
        raise ValueError(f"expected logits of shape (N, C, H, W), got {tuple(logits.shape)}; reshape them")
    if not logits.is_floating_point():
        raise TypeError(f"expected floating-point logits, got {logits.dtype}; pass the network's output, not a mask")


def _stats(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int | None,
    wanted: list[bool],
    backend: str,
) -> Tensor:
    """:func:`softmax_stats` of operands that were checked."""
    if mode == "softmax":
        _warn_of_probabilities(logits)
    ignored = NEVER if ignore_index is None else ignore_index
    stats: Tensor = call(ops.softmax_stats, logits, labels, pixel_weight, mode, ignored, wanted, backend)
    return stats


def _warn_of_probabilities(logits: Tensor) -> None:
    """Warn, once, of a softmax's output in place of logits; where that is certain, and can be seen without waiting."""
    if logits.device.type != "cpu" or type(logits) is not Tensor or not unwatched() or logits.numel() == 0:
        return
    for part in (logits.detach()[:1, :, :4, :4], logits.detach()):  # a few pixels tell logits, and rarely need the rest
        low, high = part.aminmax()
        if low < 0 or high > 1 or bool((part.sum(1, dtype=torch.float32) - 1).abs().max() > 1e-2):
            return
    _warn_once(
        "expected logits, got values from 0 to 1 that add up to 1 over the channels: a softmax of a softmax learns "
        "badly; give the loss what comes before the network's softmax"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    sigmoid: bool = False,
    smooth: float = 1e-5,
    ignore_index: int | None = -100,
    backend: str = "auto",
) -> Tensor:
    """1 − the mean over classes of (2·Σp·y + smooth) / (Σp + Σy + smooth), sums over the batch: ``DiceLoss()``.

    Arguments and errors as in :func:`softmax_stats`, with mode "sigmoid" if ``sigmoid``.
    """
    loss = DiceLoss(sigmoid=sigmoid, smooth_nr=smooth, smooth_dr=smooth, ignore_index=ignore_index, backend=backend)
    value: Tensor = loss(logits, labels)
    return value


class StatsLoss(nn.Module):
    """A loss of the statistics: the options that all have in common, and one pass over the logits."""

    weight: Tensor | None
    pos_weight: float | None = None  # of losses with a cross-entropy

    def __init__(
        self,
        sigmoid: bool | None,
        reduction: str,
        weight: Sequence[float] | Tensor | None,
        ignore_index: int | None,
        backend: str,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"expected reduction 'mean', 'sum' or 'none', got {reduction!r}; take one of those")
        check_backend(backend)
        check_flags(optional=True, sigmoid=sigmoid)
        if weight is not None:
            try:
                weight = torch.as_tensor(weight)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"expected weight as one factor per class, got {said(weight)}; pass a list of numbers or a tensor"
                ) from error
            if weight.is_complex() or weight.dtype == torch.bool:
                raise TypeError(f"expected weight to be real factors, got {weight.dtype}; convert it with .float()")
            weight = weight if weight.is_floating_point() else weight.to(torch.get_default_dtype())
            # Tensors on the meta device have no values to look at.
            if weight.dim() != 1 or not (weight.is_meta or bool(((weight >= 0) & weight.isfinite()).all())):
                raise ValueError(
                    f"expected weight to be one factor ≥ 0 per class, and finite, got {said(weight.tolist())}; pass a "
                    "list of numbers"
                )
        self.sigmoid = sigmoid
        self.reduction = reduction
        self.ignore_index = checked_ignore_index(ignore_index)
        self.backend = backend
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """Loss of logits (N, C, H, W) and labels as in :func:`softmax_stats`, which see for errors.

        In float32 (float64 for float64 logits); a scalar unless reduction is "none". ``pixel_weight`` (N, H, W) weighs
        the cross-entropy, for instance :func:`unet_weight_map`; a loss that has none refuses it.
        """
        return self.from_stats(self.stats(logits, labels, pixel_weight))

    def stats(self, logits: Tensor, labels: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """The statistics (N, C, 7) that :meth:`from_stats` needs."""
        _check_logits(logits)
        settings = self._settings(logits.shape[1], logits.device, pixel_weight)
        mode, ignore_index = settings.pop("mode"), settings.pop("ignore_index")
        _check(logits.shape, logits.device, labels, mode, ignore_index, pixel_weight)
        pixel_weight, total = self._emphasis(labels, pixel_weight, logits.dtype)
        wanted = list(settings.values())
        return _totalled(_stats(logits, labels, pixel_weight, mode, ignore_index, wanted, self.backend), total)

    def _emphasis(
        self, labels: Tensor, pixel_weight: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """``pixel_weight`` times ``pos_weight`` where the label is 1, and each sample's sum of weights without that."""
        if self.pos_weight is None:
            return pixel_weight, None
        plane = labels[:, 0] if labels.dim() == 4 else labels
        # In 64 bits: uint8 would wrap a negative ignore_index around.
        kept = plane.to(torch.int64) != (NEVER if self.ignore_index is None else self.ignore_index)
        weight = kept.to(stats_dtype(dtype))
        if pixel_weight is not None:
            weight = pixel_weight.to(weight.dtype).masked_fill(~kept, 0)
        return torch.where(plane == 1, weight * self.pos_weight, weight), weight.flatten(1).sum(1)

    def head_stats(
        self,
        act: Activation,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        pixel_weight: Tensor | None,
        backend: str,
    ) -> Tensor:
        """:meth:`stats` of the logits that a 1×1 convolution makes of an activation; the logits are never stored."""
        settings = self._settings(weight.shape[0], act.x.device, pixel_weight)
        mode, ignore_index = settings.pop("mode"), settings.pop("ignore_index")
        shape = (act.x.shape[0], weight.shape[0], act.x.shape[2], act.x.shape[3])
        _check(shape, act.x.device, labels, mode, ignore_index, pixel_weight)
        ignored = NEVER if ignore_index is None else ignore_index
        pixel_weight, total = self._emphasis(labels, pixel_weight, act.x.dtype)
        wanted = list(settings.values())
        return _totalled(head_stats(act, weight, bias, labels, pixel_weight, mode, ignored, wanted, backend), total)

    def _settings(self, classes: int, device: torch.device, pixel_weight: Tensor | None) -> dict[str, Any]:
        """The arguments of :func:`softmax_stats` for logits of so many classes on ``device``."""
        if pixel_weight is not None and not self._wanted()["entropy"]:
            raise ValueError(
                f"expected no pixel_weight with {type(self).__name__}, which has no cross-entropy to weigh, got one; "
                "leave it out or take DiceCELoss"
            )
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.device != device:
                raise ValueError(
                    f"expected {name} on {device}, where the logits are, got it on {buffer.device}; move the loss with "
                    f".to('{device}')"
                )
        if self.weight is not None and self.weight.shape[0] != classes:
            raise ValueError(
                f"expected one weight for each of the {classes} classes, got {self.weight.shape[0]}; construct the "
                f"loss with {classes} factors"
            )
        mode = "sigmoid" if self._takes_sigmoid(classes) else "softmax"
        if classes == 1 and self.weight is not None and self._wanted()["entropy"]:
            raise ValueError(
                "expected no weight for a single channel, where it would weigh both answers alike, got "
                f"{said(self.weight.tolist())}; pos_weight weighs the pixels labelled 1"
            )
        if self.pos_weight is not None and (classes > 1 or mode == "softmax"):
            raise ValueError(
                f"expected pos_weight with a sigmoid of a single channel, got {classes} channels in {mode} mode; "
                "weight weighs classes, pixel_weight pixels"
            )
        return {"mode": mode, "ignore_index": self.ignore_index, **self._wanted()}

    def from_stats(self, stats: Tensor) -> Tensor:
        """The loss of statistics (N, C, 7) as :func:`softmax_stats` returns them."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        options = {name: value for name, value in vars(self).items() if name[0] != "_" and name != "training"}
        options |= {name: value.tolist() for name, value in self.named_buffers()}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def plain(self) -> bool:
        """Whether a call is :meth:`from_stats` of :meth:`stats` and nothing else: no subclass of a user's, no hook."""
        return type(self).__module__ == __name__ and untouched(self, type(self))

    def _wanted(self) -> dict[str, bool]:
        """The columns of the statistics that not every loss needs."""
        return {"squares": False, "entropy": False, "smoothing": False}

    def _takes_sigmoid(self, classes: int) -> bool:
        return classes == 1 if self.sigmoid is None else self.sigmoid


def _totalled(stats: Tensor, total: Tensor | None) -> Tensor:
    """Statistics whose sums of weights are ``total`` (N,): a mean is over weights without pos_weight, and the digits of
    a sum with it do not hold theirs."""
    if total is None:
        return stats
    return torch.cat([stats[..., :5], total.view(-1, 1, 1), stats[..., 6:]], -1)


# Arguments of MONAI's losses that these do not have, and why.
_UNKNOWN = {
    "softmax": "leave it out, since a softmax is the default and sigmoid=True takes its place",
    "to_onehot_y": "leave it out, since labels are integers and nothing is converted",
}


class _OverlapLoss(StatsLoss):
    """A loss per class from TP, Σp, Σy; the sums over batch and classes before it, and the reduction after it."""

    def __init__(
        self,
        *,
        include_background: bool = True,
        sigmoid: bool | None = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = True,
        micro: bool = False,
        ignore_absent: bool = False,
        weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = -100,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        for name in unknown:
            kind = type(self).__name__
            advice = _UNKNOWN.get(name, f"help(fastunet.losses.{kind}) lists them")
            raise TypeError(f"expected an argument of {kind}, got {name}; {advice}")
        super().__init__(sigmoid, reduction, weight, ignore_index, backend)
        for name, value in (("smooth_nr", smooth_nr), ("smooth_dr", smooth_dr)):
            check_number(name, value)
        if micro and weight is not None:
            raise ValueError(
                f"expected no weight with micro=True, which adds the classes up before it divides, got {said(weight)}; "
                "leave one of them out"
            )
        check_flags(include_background=include_background, batch=batch, micro=micro, ignore_absent=ignore_absent)
        self.include_background = include_background
        self.smooth_nr = smooth_nr
        self.smooth_dr = smooth_dr
        self.batch = batch
        self.micro = micro
        self.ignore_absent = ignore_absent

    def from_stats(self, stats: Tensor) -> Tensor:
        """The loss of statistics (N, C, 7) as :func:`softmax_stats` returns them."""
        stats = self._summed(stats)
        loss = self._per_class(stats)
        if self.weight is not None:
            loss = loss * self.weight[-loss.shape[-1] :].to(loss.dtype)
        if self.ignore_absent:
            present = stats[..., 2] > 0
            loss = torch.where(present, loss, 0)
            if self.reduction == "mean":
                return loss.sum() / present.sum().clamp_min(1)
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def _summed(self, stats: Tensor) -> Tensor:
        """The statistics of the classes that count, over the batch and over them if so asked."""
        if not self.include_background and stats.shape[1] > 1:
            stats = stats[:, 1:]
        if self.batch:
            stats = stats.sum(0)
        return stats.sum(-2) if self.micro else stats

    def _per_class(self, stats: Tensor) -> Tensor:
        """The loss of each (…, 7), before weights and reduction."""
        raise NotImplementedError


_PRESETS: dict[str, dict[str, Any]] = {
    "seed002": {},
    "milesial": {"sigmoid": None, "micro": True, "smooth_nr": 1e-6, "smooth_dr": 1e-6},
    "milesial-v3": {"sigmoid": None, "smooth_nr": 1e-6, "smooth_dr": 1e-6},
    "brain": {"sigmoid": True, "micro": True, "smooth_nr": 1.0, "smooth_dr": 1.0},
    "nnunet": {"include_background": False},
}


class DiceLoss(_OverlapLoss):
    """Soft Dice loss 1 − (2·TP + smooth_nr) / (Σp + Σy + smooth_dr) from logits and integer labels.

    TP = Σ p·y, over the pixels whose label is not ``ignore_index``. Argument names follow MONAI's; the default is
    ``monai.losses.DiceLoss(softmax=True, to_onehot_y=True, batch=True)``, which is also seed 002's formula
    ((1+β²)·tp + s) / ((1+β²)·tp + β²·fn + fp + s) with β = 1 and s = 1e-5. A class that is absent from truth and
    prediction scores smooth_nr / smooth_dr, that is 1; so does a batch in which every pixel is ignored.

    Args:
        squared_pred: Σp² in place of Σp (Σy² is Σy).
        jaccard: soft Jaccard (IoU) loss: the denominator is 2·(Σp + Σy − TP) + smooth_dr, as in MONAI.
        log: −log of the score instead of 1 − it (log-Dice; Wong et al. 2018, arXiv:1809.00076, with γ = 1).
        include_background: False leaves class 0 out (never the only class).
        sigmoid: independent channels instead of a softmax; None: a sigmoid if there is one channel, else a softmax.
        reduction: "mean" or "sum" over classes (and samples), or "none": (C,), (N, C) if not ``batch``, and without
            the C if ``micro``; C is one less without background.
        smooth_nr, smooth_dr: added to numerator and denominator.
        batch: sum over the batch before dividing; False (MONAI's default) scores every sample by itself.
        micro: sum over classes before dividing.
        ignore_absent: a class with no pixel in the labels (of the batch, or of the sample if not ``batch``) has loss 0
            and is left out of the mean; by default it counts, and whatever is predicted of it is an error.
        weight: C factors ≥ 0 for the classes' losses, not normalised; with ``micro`` there is nothing to weight.
        ignore_index: label of pixels that do not count, or None.
        backend: see :func:`fastunet.backend.resolve_backend`.

    Raises:
        ValueError: an unknown reduction, a negative weight, or ``weight`` together with ``micro``.
    """

    def __init__(self, *, squared_pred: bool = False, jaccard: bool = False, log: bool = False, **options: Any) -> None:
        super().__init__(**options)
        check_flags(squared_pred=squared_pred, jaccard=jaccard, log=log)
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        self.log = log

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DiceLoss:
        """The loss with another definition of Dice in use; ``overrides`` are arguments of the constructor.

        - "seed002": per class over the batch, mean over classes: the default.
        - "milesial" (Pytorch-UNet 4): 1 − (2·TP + ε) / (Σp + Σy + ε), ε = 1e-6, with every sum over batch and classes;
          softmax for several channels, sigmoid for one.
        - "milesial-v3" (Pytorch-UNet 2 and 3): the same with sums over the batch, and the mean over classes.
        - "brain" (mateuszbuda's brain-segmentation-pytorch): 1 − (2·TP + 1) / (Σp + Σy + 1) after a sigmoid, over the
          flattened batch. That project's network ends in a sigmoid: pass what comes before it.
        - "nnunet" (nnU-Net, 2-D): per class over the batch without background,
          dc = (2·TP + 1e-5) / max(Σp + Σy + 1e-5, 1e-8); this is 1 − mean dc, where nnU-Net minimises −mean dc.

        Raises:
            ValueError: an unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(
                f"expected a preset among {', '.join(sorted(_PRESETS))}, got {name!r}; its arguments build any other"
            )
        return cls(**{**_PRESETS[name], **overrides})

    def _wanted(self) -> dict[str, bool]:
        return {**super()._wanted(), "squares": self.squared_pred}

    def _per_class(self, stats: Tensor) -> Tensor:
        tp, p, y, p2 = stats[..., :4].unbind(-1)
        size = (p2 if self.squared_pred else p) + y
        if self.jaccard:
            size = 2 * (size - tp)
        score = (2 * tp + self.smooth_nr) / (size + self.smooth_dr)
        return -score.clamp_min(torch.finfo(score.dtype).tiny).log() if self.log else 1 - score


class TverskyLoss(_OverlapLoss):
    """(1 − (TP + smooth_nr) / (TP + alpha·FP + beta·FN + smooth_dr))^gamma, FP = Σp − TP, FN = Σy − TP.

    Salehi et al. 2017 (arXiv:1706.05721); as MONAI's with softmax=True, to_onehot_y=True, batch=True. alpha = beta = ½
    is Dice, 1 is Jaccard; beta > alpha prefers a pixel too many to one missed. gamma ≠ 1 is the focal Tversky loss of
    Abraham and Khan 2018 (arXiv:1810.07842), whose exponent 1/γ with γ = 4/3 is gamma = 0.75 here. Seed 002's formula
    with another β is alpha = 1/(1+β²), beta = β²/(1+β²), and its smooth divided by 1+β².

    Args:
        alpha, beta: weights of false positives and false negatives.
        gamma: exponent of each class's loss, > 0.
        **options: those of :class:`DiceLoss` from ``include_background`` on.

    Raises:
        ValueError: gamma ≤ 0, or what :class:`DiceLoss` raises.
    """

    def __init__(self, *, alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            check_number(name, value)
        if gamma <= 0:
            raise ValueError(f"expected gamma > 0, got {gamma}; the paper's γ = 4/3 is gamma=0.75")
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def _per_class(self, stats: Tensor) -> Tensor:
        tp, p, y = stats[..., :3].unbind(-1)
        wrong = self.alpha * (p - tp) + self.beta * (y - tp)
        loss = 1 - (tp + self.smooth_nr) / (tp + wrong + self.smooth_dr)
        if self.gamma == 1:
            return loss
        # For gamma < 1 the slope at 0 is infinite; and rounding can make a loss of 0 slightly negative.
        return loss.clamp_min(torch.finfo(loss.dtype).eps) ** self.gamma


class GeneralizedDiceLoss(_OverlapLoss):
    """1 − (2·Σ_k w_k·TP_k + smooth_nr) / (Σ_k w_k·(Σp_k + Σy_k) + smooth_dr), with w_k from the size of class k.

    Sudre et al. 2017 (arXiv:1707.03237); as MONAI's with softmax=True, to_onehot_y=True, batch=True. An absent class
    has the largest weight of the others, or 0 with ``ignore_absent``.

    MONAI's smooth_nr and smooth_dr of 1e-5, the default, outweigh sums that are divided by (Σy)²: at 8×2×512×512 a loss
    of 0.58 becomes 0.20. On large pictures pass ``smooth_nr=0, smooth_dr=1e-12``, or take w_type "simple".

    Args:
        w_type: "square": w = 1/(Σy)², "simple": 1/Σy, "uniform": 1.
        **options: those of :class:`DiceLoss` from ``include_background`` on, but neither micro nor weight. With
            reduction "none" the loss is (1,), or (N,) if not ``batch``.

    Raises:
        ValueError: an unknown w_type, micro or weight, or what :class:`DiceLoss` raises.
    """

    def __init__(self, *, w_type: str = "square", **options: Any) -> None:
        super().__init__(**options)
        if w_type not in ("square", "simple", "uniform"):
            raise ValueError(f"expected w_type 'square', 'simple' or 'uniform', got {w_type!r}; take one of those")
        if self.micro or self.weight is not None:
            given = "micro" if self.micro else "weight"
            raise ValueError(
                f"expected neither micro nor weight, since w_type says how the classes are weighted, got {given}; "
                "leave it out"
            )
        self.w_type = w_type

    def from_stats(self, stats: Tensor) -> Tensor:
        """The loss of statistics (N, C, 7) as :func:`softmax_stats` returns them."""
        tp, p, y = self._summed(stats)[..., :3].unbind(-1)
        w = y.detach() ** {"square": -2, "simple": -1, "uniform": 0}[self.w_type]
        if self.ignore_absent:
            w = torch.where(y > 0, w, 0)
        else:
            w = torch.where(w.isinf(), torch.where(w.isinf(), 0, w).amax(-1, keepdim=True), w)
        loss = 1 - (2 * (w * tp).sum(-1) + self.smooth_nr) / ((w * (p + y)).sum(-1) + self.smooth_dr)
        if self.reduction == "none":
            return loss.reshape(-1)
        return loss.mean() if self.reduction == "mean" else loss.sum()


class CrossEntropyLoss(StatsLoss):
    """``torch.nn.CrossEntropyLoss`` of integer labels, with weights for pixels too.

    Σ [(1 − ε)·weight_y·w·(−log p_y) + ε/C·Σ_k weight_k·w·(−log p_k)] / Σ weight_y·w over the pixels, y being a pixel's
    label, w its ``pixel_weight`` or 1, and ε = ``label_smoothing``; with reduction "sum" the numerator alone. Where
    every pixel is ignored it is NaN, as in PyTorch. With ``sigmoid`` it is the binary cross-entropy with the labels
    (1 − ε)·y + ε/2 over pixels and channels, and ``weight`` weighs channels.

    Args:
        weight: C factors ≥ 0, one for each class; not for a single channel.
        pos_weight: factor > 0 of the pixels labelled 1 of a single channel, as in ``torch.nn.BCEWithLogitsLoss``; not
            with label_smoothing.
        label_smoothing: ε from 0 to 1.
        sigmoid: independent channels instead of a softmax; None: a sigmoid if there is one channel, else a softmax.
        reduction: "mean" or "sum".
        ignore_index: label of pixels that do not count, or None.
        backend: see :func:`fastunet.backend.resolve_backend`.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        *,
        weight: Sequence[float] | Tensor | None = None,
        pos_weight: float | None = None,
        label_smoothing: float = 0.0,
        sigmoid: bool | None = False,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__(sigmoid, reduction, weight, ignore_index, backend)
        _check_entropy(reduction, label_smoothing, pos_weight)
        self.label_smoothing = label_smoothing
        self.pos_weight = pos_weight

    def from_stats(self, stats: Tensor) -> Tensor:
        """The loss of statistics (N, C, 7) as :func:`softmax_stats` returns them."""
        return _cross_entropy(self, stats, self.label_smoothing)

    def _wanted(self) -> dict[str, bool]:
        return {"squares": False, "entropy": True, "smoothing": self.label_smoothing > 0}


def _check_entropy(reduction: str, label_smoothing: float, pos_weight: float | None) -> None:
    if reduction == "none":
        raise ValueError(
            "expected reduction 'mean' or 'sum', got 'none': the statistics know no single pixel; take a mean"
        )
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"expected label_smoothing from 0 to 1, got {label_smoothing}; 0.1 is usual")
    if pos_weight is None:
        return
    check_number("pos_weight", pos_weight)
    if pos_weight <= 0 or label_smoothing != 0:
        raise ValueError(
            f"expected pos_weight > 0 without label_smoothing, got {pos_weight} with {label_smoothing}; leave one of "
            "them out"
        )


def _cross_entropy(loss: StatsLoss, stats: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of statistics, with the options of ``loss``."""
    ce, total, spread = stats[..., 4:].sum(0).unbind(-1)
    if label_smoothing > 0:
        outcomes = 2 if loss._takes_sigmoid(stats.shape[1]) else stats.shape[1]
        ce = (1 - label_smoothing) * ce + label_smoothing / outcomes * spread
    if loss.weight is not None:
        weight = loss.weight.to(stats.dtype)
        ce, total = ce * weight, total * weight
    return ce.sum() / total.sum() if loss.reduction == "mean" else ce.sum()


class DiceCELoss(DiceLoss):
    """lambda_dice · :class:`DiceLoss` + lambda_ce · :class:`CrossEntropyLoss`, from one pass over the logits.

    ``weight`` weighs the classes of both terms.

    Args:
        lambda_dice, lambda_ce: factors of the two terms.
        label_smoothing, pos_weight: of the cross-entropy, as in :class:`CrossEntropyLoss`.
        **dice: arguments of :class:`DiceLoss`; reduction is "mean" or "sum".

    Raises:
        ValueError: reduction "none", or what the two losses raise.
    """

    def __init__(
        self,
        *,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        pos_weight: float | None = None,
        **dice: Any,
    ) -> None:
        super().__init__(**dice)
        for name, value in (("lambda_dice", lambda_dice), ("lambda_ce", lambda_ce)):
            check_number(name, value)
        _check_entropy(self.reduction, label_smoothing, pos_weight)
        self.pos_weight = pos_weight
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce
        self.label_smoothing = label_smoothing

    def from_stats(self, stats: Tensor) -> Tensor:
        """The loss of statistics (N, C, 7) as :func:`softmax_stats` returns them."""
        entropy = _cross_entropy(self, stats, self.label_smoothing)
        return self.lambda_dice * super().from_stats(stats) + self.lambda_ce * entropy

    def _wanted(self) -> dict[str, bool]:
        return {**super()._wanted(), "entropy": True, "smoothing": self.label_smoothing > 0}


class GlobalLoss(StatsLoss):
    """``loss`` of the batches of all processes of ``torch.distributed`` as one batch: a Dice is no mean of Dices.

    The statistics (N, C, 7), which have to be of one shape everywhere, are all that is communicated. Under DDP the
    gradients are those of one process with all the batches; where there is one process it is ``loss``.

    Args:
        loss: another loss of this module.

    Raises:
        TypeError: a loss that is not made of statistics.
    """

    def __init__(self, loss: StatsLoss) -> None:
        nn.Module.__init__(self)
        if not isinstance(loss, StatsLoss):
            raise TypeError(f"expected a loss of fastunet.losses, got {said(loss)}; construct one of those")
        self.local = loss

    def forward(self, logits: Tensor, labels: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        """The loss, the same in every process; arguments as ``loss`` takes them."""
        return self.from_stats(self.local.stats(logits, labels, pixel_weight))

    def from_stats(self, stats: Tensor) -> Tensor:
        """The loss of statistics (N, C, 7) here and those of the other processes."""
        return self.local.from_stats(gathered(stats).flatten(0, 1))

    def stats(self, *operands: Any) -> Tensor:
        """The statistics of this process."""
        return self.local.stats(*operands)

    def head_stats(self, *operands: Any) -> Tensor:
        """As the loss's own."""
        return self.local.head_stats(*operands)

    def plain(self) -> bool:
        """Whether the loss is computed as its class does, with no hook."""
        return super().plain() and self.local.plain()

    def extra_repr(self) -> str:
        return ""
