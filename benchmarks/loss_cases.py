"""The losses and scores that are timed: from logits and integer labels, the loss with its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossCase:
    """One loss or score of logits (N, C, H, W)."""

    kind: ClassVar[str] = "loss"
    function: Literal["dice_ce", "soft_miou", "confusion_matrix"]
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """A readable identifier."""
        return f"{self.function}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def flops(self) -> int:
        """0: bound by memory."""
        return 0

    @property
    def bytes(self) -> int:
        """Logits and labels once; a loss reads both again in its backward and writes a gradient."""
        batch, classes, height, width = self.shape
        pixels = batch * height * width
        logits, labels = pixels * classes * self.dtype.itemsize, pixels * 8
        return logits + labels if self.function == "confusion_matrix" else 3 * logits + 2 * labels

    def data(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Logits, as a network gives them in this dtype, and labels."""
        logits = torch.randn(self.shape, device=device).to(self.dtype)
        if self.dtype != torch.float32:
            logits = logits.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, self.shape[1], (self.shape[0], *self.shape[2:]), device=device)
        return logits.requires_grad_(self.function != "confusion_matrix"), labels


CASES = [
    LossCase("dice_ce", (8, 22, 512, 512)),
    LossCase("dice_ce", (8, 2, 512, 512)),
    LossCase("dice_ce", (8, 22, 512, 512), torch.float32),
    LossCase("soft_miou", (8, 22, 512, 512)),
    LossCase("confusion_matrix", (8, 22, 512, 512)),
]

SMALL_CASES = [
    LossCase("dice_ce", (2, 22, 64, 64), torch.float32),
    LossCase("soft_miou", (2, 22, 64, 64), torch.float32),
    LossCase("confusion_matrix", (2, 22, 64, 64), torch.float32),
]
