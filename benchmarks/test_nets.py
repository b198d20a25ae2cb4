"""The whole U-Net: plain PyTorch, torch.compile of it, and fastunet, on the same weights and batch.

Plain PyTorch gets what makes it fast: channels_last and autocast on a GPU. A training step is forward, Dice and
cross-entropy, backward and SGD; inference is the forward in eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastunet
from benchmarks.conftest import CUDA, NEEDS_GPU
from benchmarks.traffic import MODES, Mode, Net, eager_cost
from fastunet import reference
from fastunet.losses import DiceCELoss


@dataclass(frozen=True)
class NetCase:
    """One network, batch and mode."""

    shape: tuple[int, int, int, int]
    base: int
    bilinear: bool
    mode: Mode
    dtype: torch.dtype  # of the convolutions' operands
    classes: int = 2

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        kind = "bilinear" if self.bilinear else "transposed"
        return f"unet{self.base}-{kind}-{size}-{str(self.dtype).removeprefix('torch.')}-{self.mode}"

    @property
    def arguments(self) -> tuple[int, int, bool, int]:
        return self.shape[1], self.classes, self.bilinear, self.base


CASES = [NetCase((8, 3, 512, 512), 64, bilinear, mode, torch.bfloat16) for bilinear in (False, True) for mode in MODES]
SMALL_CASES = [
    NetCase((1, 3, 256, 256), 16, bilinear, mode, torch.float32) for bilinear in (False, True) for mode in MODES
]
PROVIDERS = ["reference", "compile", "compile-max-autotune", "fastunet"] if CUDA else ["reference", "fastunet"]
LAYOUT = torch.channels_last if CUDA else torch.contiguous_format


def prepared(model: nn.Module, device: str) -> nn.Module:
    return model.to(device).to(memory_format=LAYOUT)  # type: ignore[call-overload, no-any-return]


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) + reference.functional.dice_loss(logits, labels)


def step(case: NetCase, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> Any:
    """A function of no arguments that does one training step or one inference."""
    lower = case.dtype != torch.float32 and x.device.type == "cuda"
    autocast = torch.autocast(x.device.type, case.dtype) if lower else contextlib.nullcontext()
    if case.mode == "inference":
        model.eval()

        def infer() -> Tensor:
            with torch.inference_mode(), autocast:
                return model(x)  # type: ignore[no-any-return]

        return infer
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def train() -> Tensor:
        optimizer.zero_grad()
        with autocast:
            value = loss(model(x), labels)
        value.backward()
        optimizer.step()
        return value.detach()

    return train


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in SMALL_CASES]
    + [pytest.param(case, id=case.name, marks=NEEDS_GPU) for case in CASES],
)
def test_net(case: NetCase, provider: str, device: str, measure: Callable[..., None]) -> None:
    expected = prepared(reference.UNet(*case.arguments), device)
    x = torch.randn(case.shape, device=device).contiguous(memory_format=LAYOUT)
    labels = torch.randint(0, case.classes, (case.shape[0], *case.shape[2:]), device=device)
    net = Net("unet", case.bilinear, case.base, case.shape[2], case.shape[0], case.dtype, case.classes)
    bytes_moved, flops = eager_cost(net, case.mode)
    loss: Callable[[Tensor, Tensor], Tensor] = plain_loss
    model: Any = expected
    if provider == "fastunet":
        model = prepared(fastunet.UNet(*case.arguments), device)
        model.load_state_dict(expected.state_dict())
        loss = DiceCELoss()
    elif provider != "reference":
        mode = "max-autotune" if provider == "compile-max-autotune" else None
        model = torch.compile(expected, mode=mode)
    check(case, model, expected, x)
    run = step(case, model, loss, x, labels)
    measure(run, group=case.name, provider=provider, eager_bytes=bytes_moved, flops=flops)


def check(case: NetCase, model: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """A wrong network is not timed: logits in eval mode agree in the Euclidean norm to some roundings of the dtype."""
    inference = replace(case, mode="inference")
    found, truth = (step(inference, net, plain_loss, x, x)().double() for net in (model, expected))
    error = float((found - truth).norm() / truth.norm())
    assert error <= (1e-4 if case.dtype == torch.float32 else 5e-2), f"relative error {error:.1e}"
    expected.train()
    model.train()
