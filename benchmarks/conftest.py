"""How the benchmarks measure: `pytest benchmarks`, on a GPU or, a small subset, on a CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU; the small cases run on this machine's CPU")
FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU


@pytest.fixture
def device() -> str:
    """ "cuda" on a machine with a GPU, else "cpu"."""
    return "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Every case starts from the same random numbers and with nothing compiled."""
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """Time a function of no arguments beside the others of its group; ``about`` goes to the results' extra_info.

    On a GPU every call ends in a synchronisation, and extra_info has the time between CUDA events with a cold L2 cache:
    median, 20th and 80th percentile in milliseconds.
    """

    def run(function: Callable[[], Any], group: str, **about: Any) -> None:
        benchmark.group = group
        benchmark.extra_info.update(about, torch=torch.__version__, device=_device_name())
        if not CUDA:
            benchmark.pedantic(function, rounds=5, warmup_rounds=2)
            return
        benchmark.pedantic(_synchronised, (function,), rounds=20, warmup_rounds=5)
        fifths = statistics.quantiles(_event_times(function, 20), n=5, method="inclusive")
        median = (fifths[1] + fifths[2]) / 2
        benchmark.extra_info.update(cuda_ms_p20=fifths[0], cuda_ms_p50=median, cuda_ms_p80=fifths[3])

    return run


def _synchronised(function: Callable[[], Any]) -> None:
    function()
    torch.cuda.synchronize()


def _device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


def _event_times(function: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of each of ``rounds`` calls on the GPU's own clock, the L2 cache emptied before each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]
