"""fastunet against eager PyTorch on a CPU: ``python -m benchmarks.cpu`` prints the ratio of their times.

Networks of two sizes, in both memory formats and with both kinds of upsampling: a training step (forward,
cross-entropy, backward) and an inference. Runs of a few steps alternate, so that caches are those of one network in
use, and medians are compared. Each row has a process of its own: how readily the C library hands memory back to the
system depends on what was freed before, and plain PyTorch's time on that by a third. Other processes disturb all this,
so the machine should be quiet. The goal is at most 1.02 in training and 0.95 in inference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import fastunet
from benchmarks.isolation import Message, messages
from benchmarks.measure import interleaved
from fastunet import reference
from fastunet.backend import resolve_backend

SIZES = ((16, 128), (32, 256))  # (base, pixels along a side)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {"training": 1.02, "inference": 0.95}
RUN = 5  # steps at a time
PATIENCE = 300  # seconds of a row beside its measuring


class Row(NamedTuple):
    """What is measured, and for how many seconds."""

    base: int
    size: int
    batch: int
    bilinear: bool
    layout: str
    mode: str
    seconds: float
    threads: int

    @property
    def name(self) -> str:
        upsampling = "bilinear" if self.bilinear else "transposed"
        return f"base {self.base}, {self.batch}×{self.size}×{self.size}, {upsampling}"


def steps(base: int, size: int, batch: int, bilinear: bool, layout: str, mode: str) -> dict[str, Callable[[], Any]]:
    """The same step of plain PyTorch ("eager") and of fastunet, with the same weights."""
    torch.manual_seed(0)
    plain = reference.UNet(3, 2, bilinear, base)
    ours = fastunet.UNet(3, 2, bilinear, base)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(0, 2, (batch, size, size))

    def step(model: nn.Module) -> Callable[[], Any]:
        model.to(memory_format=LAYOUTS[layout]).train(mode == "training")  # type: ignore[call-overload]
        parameters = list(model.parameters())

        def train() -> Any:
            return torch.autograd.grad(F.cross_entropy(model(x), labels), parameters)

        @torch.inference_mode()
        def infer() -> Any:
            return model(x)

        return train if mode == "training" else infer

    return {"eager": step(plain), "fastunet": step(ours)}


def rows(batch: int, seconds: float, threads: int, only: str = "") -> Iterator[Row]:
    """Those whose name, layout and mode have ``only``."""
    for base, size in SIZES:
        for bilinear in (False, True):
            for layout in LAYOUTS:
                for mode in GOALS:
                    row = Row(base, size, batch, bilinear, layout, mode, seconds, threads)
                    if only in f"{row.name}, {layout}, {mode}":
                        yield row


def measured(row: Row) -> Iterator[Message]:
    """(provider, its milliseconds) of both, in this process."""
    torch.set_num_threads(row.threads)
    calls = steps(row.base, row.size, row.batch, row.bilinear, row.layout, row.mode)

    def repeated(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(RUN):
                call()  # whose result is freed at once

        return run

    runs = {name: repeated(call) for name, call in calls.items()}
    for run in runs.values():
        run()
    for name, times in interleaved(runs, torch.device("cpu"), row.seconds, head_start=False).items():
        yield name, times.p50 / RUN


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=6, help="for each pair; 6: three minutes or more in all")
    parser.add_argument("--batch", type=int, default=2, help="pictures at a time; 2")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='only rows with it: "base 16", "bilinear, contiguous"'
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch; its own choice")
    options = parser.parse_args(arguments)
    if resolve_backend("auto", torch.device("cpu"), torch.float32) != "torch":
        parser.error("expected fastunet's own choice of backend on a CPU: unset TRITON_INTERPRET and FASTUNET_BACKEND")
    head = ("network", "layout", "mode", "eager ms", "fastunet ms", "ratio", "goal")
    print(f"PyTorch {torch.__version__}, {options.threads} threads, float32")
    layout = "{:<32} {:<13} {:<9} {:>9} {:>11} {:>6} {:>7}"
    print(layout.format(*head))
    for row in rows(options.batch, options.seconds, options.threads, options.only):
        times = dict(messages(measured, row, lambda: (PATIENCE + 3 * options.seconds, "its step")))
        eager, ours = times["eager"], times["fastunet"]
        told = f"{eager:.1f}", f"{ours:.1f}", f"{ours / eager:.2f}", f"≤ {GOALS[row.mode]:.2f}"
        print(layout.format(row.name, row.layout, row.mode, *told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
