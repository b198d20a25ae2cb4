"""fastunet against eager PyTorch on a CPU: ``python -m benchmarks.cpu`` prints the ratio of their times.

Networks of two sizes, in both memory formats and with both kinds of upsampling: a training step (forward,
cross-entropy, backward) and an inference. The calls alternate, and medians are compared; other processes disturb them,
so the machine should be quiet. The goal is at most 1.02 in training and 0.95 in inference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastunet
from benchmarks.measure import interleaved
from fastunet import reference
from fastunet.backend import resolve_backend

SIZES = ((16, 128), (32, 256))  # (base, pixels along a side)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {"training": 1.02, "inference": 0.95}


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


def rows(batch: int, seconds: float, only: str = "") -> Iterator[tuple[str, ...]]:
    """(network, layout, mode, ms of eager, of fastunet, their ratio, goal) as text, of rows whose name has ``only``."""
    for base, size in SIZES:
        for bilinear in (False, True):
            for layout in LAYOUTS:
                for mode, goal in GOALS.items():
                    name = f"base {base}, {batch}×{size}×{size}, {'bilinear' if bilinear else 'transposed'}"
                    if only not in f"{name}, {layout}, {mode}":
                        continue
                    calls = steps(base, size, batch, bilinear, layout, mode)
                    for call in calls.values():
                        call()
                    times = interleaved(calls, torch.device("cpu"), seconds, head_start=False)
                    eager, ours = times["eager"].p50, times["fastunet"].p50
                    yield name, layout, mode, f"{eager:.1f}", f"{ours:.1f}", f"{ours / eager:.2f}", f"≤ {goal:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=6, help="for each pair; 6: two minutes or more in all")
    parser.add_argument("--batch", type=int, default=2, help="pictures at a time; 2")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='only rows with it: "base 16", "bilinear, contiguous"'
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch; its own choice")
    options = parser.parse_args(arguments)
    if resolve_backend("auto", torch.device("cpu"), torch.float32) != "torch":
        parser.error("expected fastunet's own choice of backend on a CPU: unset TRITON_INTERPRET and FASTUNET_BACKEND")
    torch.set_num_threads(options.threads)
    head = ("network", "layout", "mode", "eager ms", "fastunet ms", "ratio", "goal")
    print(f"PyTorch {torch.__version__}, {options.threads} threads, float32")
    layout = "{:<32} {:<13} {:<9} {:>9} {:>11} {:>6} {:>7}"
    print(layout.format(*head))
    for row in rows(options.batch, options.seconds, options.only):
        print(layout.format(*row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
