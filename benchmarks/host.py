"""What a step costs the process that issues it, all but the GPU's part: it bounds small pictures and small batches.

``python -m benchmarks.host`` needs no GPU: it times steps of networks of few channels on tiny pictures on the CPU, with
launches that do nothing. What the driver adds to each launch is not in it; what ATen computes on the tiny tensors is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import fastunet
from benchmarks import nnunet, traffic
from fastunet.architecture import as_if_on
from fastunet.backend import interpreting
from fastunet.kernels import launching

BASE, SIZE, BATCH = 8, 128, 2


class _Nothing:
    """A kernel as if it was compiled, which counts how often it is launched."""

    launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any) -> None:
        _Nothing.launches += 1


@contextmanager
def launching_nothing(architecture: str = "sm_90") -> Iterator[None]:
    """Inside, tensors on the CPU count as lying on a GPU, and kernels are launched there that do nothing."""

    def run(kernel: Any, *args: Any, **options: Any) -> _Nothing:
        _Nothing.launches += 1
        return _Nothing()

    with (
        as_if_on(architecture),
        mock.patch.object(JITFunction, "run", run),
        mock.patch("fastunet.backend.triton_unavailable", lambda *_: None),  # noqa: PT008 - a Mock would be timed too
        mock.patch.object(launching, "_compiled", {}),
    ):
        yield


@contextmanager
def recording_nothing() -> Iterator[None]:
    """Inside, neither an operator's call nor an inference is made again by what an earlier one did."""
    with (
        mock.patch("fastunet.dispatch.repeating", lambda *_: None),  # noqa: PT008 - as above
        mock.patch("fastunet.models.followed", lambda network, x, about, function: function()),
    ):
        yield


def milliseconds(step: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """The least time of ``step()``, since other processes can only add to it; and its launches."""
    for _ in range(3):  # shapes become known
        step()
    before = _Nothing.launches
    step()
    launches = _Nothing.launches - before
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begun < seconds:
        start = time.thread_time()  # which stands still while another process has the core
        step()
        times.append(time.thread_time() - start)
    return 1e3 * min(times), launches


NETWORKS = "transposed", "bilinear", "nnunet"


def _network(name: str) -> torch.nn.Module:
    if name == "nnunet":  # seven stages
        return nnunet.FastNnUNet(3, 2, [BASE * factor for factor in (1, 2, 4, 8, 8, 8, 8)])
    return fastunet.UNet(3, 2, name == "bilinear", BASE)


def steps(name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A training step and an inference of a network, under autocast, by name."""
    model = _network(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        torch.autograd.grad(y, list(model.parameters()), torch.ones_like(y))

    def infer() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(x)

    yield "training", train
    model.eval()
    yield "inference", infer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3, help="for each step; 3")
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("expected compiled kernels, got TRITON_INTERPRET=1: unset it")
    torch.set_num_threads(1)
    lines = [("network", "step", "ms", "recorded", "launches")]
    with launching_nothing():
        for network in NETWORKS:
            for name, step in steps(network):
                with recording_nothing():
                    first, launches = milliseconds(step, options.seconds)
                again, same = milliseconds(step, options.seconds)
                assert same == launches
                lines.append((network, name, f"{first:.2f}", f"{again:.2f}", str(launches)))
    print(
        f"networks of {BASE} channels on {BATCH}×3×{SIZE}×{SIZE}, bf16 by autocast, on one CPU core, launches that do "
        "nothing; recorded: as from the third step of a shape on, which does again what an earlier one did"
    )
    print(traffic.aligned(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
