"""Bytes of single operations by the ledger, beside eager PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.nets import plain_dice_ce
from benchmarks.trace import tensors_of, trace
from benchmarks.traffic import made
from fastunet import dispatch, ops
from fastunet.losses import DiceCELoss


def op_bytes(case: Case, architecture: str = "sm_90") -> tuple[tuple[int, int], tuple[int, int]]:
    """(fastunet's, eager PyTorch's) bytes, each (forward, backward), of an operation of ``_PAIRS`` with its neighbours.

    softmax_stats: the whole loss, Dice and cross-entropy, against seed 002's formula with its one-hot.
    head_stats: that loss from the last raw convolution output, eager's with the logits.
    upsample_concat: from raw convolution outputs, so that eager normalises, rectifies, upsamples, pads, concatenates.
    """
    ours, plain = _PAIRS[case.op]
    with torch.device("meta"):
        operands = case.operands("meta")
        leaves = [x.requires_grad_() for x in tensors_of(operands) if x.is_floating_point()]
        return _cost(ours, operands, leaves, architecture), _cost(plain, operands, leaves, architecture)


def _cost(
    function: Callable[..., Tensor], operands: tuple[Any, ...], leaves: list[Tensor], architecture: str
) -> tuple[int, int]:
    incoming = torch.empty_like(function(*operands))
    with trace(architecture) as calls:
        result = function(*operands)
        forward = len(calls)
        torch.autograd.grad(result, leaves, incoming)
    moved = [sum(access.bytes for access in made(call)) for call in calls]
    return sum(moved[:forward]), sum(moved[forward:])


def _plain_head(
    x: Tensor, affine: Tensor, slope: float, weight: Tensor, bias: Tensor, labels: Tensor, *settings: Any
) -> Tensor:
    return plain_dice_ce(F.conv2d(_normalised(x, affine), weight, bias), labels)


def _plain_upsample(
    x: Tensor, affine: Tensor, slope: float,
    skip: Tensor, skip_affine: Tensor, skip_slope: float, align: bool, first: bool,
) -> Tensor:  # fmt: skip
    up = F.interpolate(_normalised(x, affine), scale_factor=2, mode="bilinear", align_corners=align)
    rows, columns = (skip.shape[i] - up.shape[i] for i in (2, 3))
    up = F.pad(up, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
    return torch.cat([_normalised(skip, skip_affine), up], 1)


def _normalised(x: Tensor, affine: Tensor) -> Tensor:
    scale, shift, centre = affine.unbind(0)
    return F.batch_norm(x, centre.detach(), torch.ones_like(centre), scale, shift).relu_()


# By operator: fastunet's function of its operands, and plain PyTorch's.
_PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "head_stats": (lambda *all: DiceCELoss().from_stats(dispatch.call(ops.head_stats, *all, "triton")), _plain_head),
    "softmax_stats": (
        lambda logits, labels, *settings: DiceCELoss()(logits, labels),
        lambda logits, labels, *settings: plain_dice_ce(logits, labels),
    ),
    "upsample_concat": (lambda *all: dispatch.call(ops.upsample_concat, *all, "triton"), _plain_upsample),
}
