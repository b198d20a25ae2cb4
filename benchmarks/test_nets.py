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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastunet
from benchmarks.conftest import CUDA, NEEDS_GPU
from fastunet import reference
from fastunet.losses import DiceCELoss


@dataclass(frozen=True)
class NetCase:
    """One network, batch and mode."""

    shape: tuple[int, int, int, int]
    base: int
    bilinear: bool
    mode: str
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


MODES = ("training", "inference")
CASES = [NetCase((8, 3, 512, 512), 64, bilinear, mode, torch.bfloat16) for bilinear in (False, True) for mode in MODES]
SMALL_CASES = [
    NetCase((1, 3, 256, 256), 16, bilinear, mode, torch.float32) for bilinear in (False, True) for mode in MODES
]
PROVIDERS = ["reference", "compile", "compile-max-autotune", "fastunet"] if CUDA else ["reference", "fastunet"]
LAYOUT = torch.channels_last if CUDA else torch.contiguous_format


class EagerBytes(TorchDispatchMode):
    """Counts the bytes of eager PyTorch: each operation reads its operands once and writes its results once."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and func.overloadpacket is not torch.ops.aten.empty:
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, results)) if isinstance(x, Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return results


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


def eager_cost(case: NetCase) -> tuple[int, int]:
    """(bytes, FLOPs) of the step in eager PyTorch, counted without data or device."""
    with torch.device("meta"):
        model = reference.UNet(*case.arguments).to(case.dtype)
        x = torch.empty(case.shape, dtype=case.dtype)
        labels = torch.empty((case.shape[0], *case.shape[2:]), dtype=torch.int64)
        run = step(case, model, lambda logits, _: logits.float().sum(), x, labels)
        with EagerBytes() as moved, FlopCounterMode(display=False) as computed:  # type: ignore[no-untyped-call]
            run()
    return moved.total, computed.get_total_flops()


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
    bytes_moved, flops = eager_cost(case)
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
