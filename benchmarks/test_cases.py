"""`pytest benchmarks`: every operation, loss and network with every provider, which must give the right numbers before
it is timed. On a CPU it is a small subset.

pytest-benchmark's own times are the host's, each call ending in a synchronisation. On a GPU ``extra_info`` has the
suite's: between CUDA events, with a cold L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks import cases, nets, peers
from benchmarks.measure import Step, interleaved, machine, precision
from benchmarks.peers import PROVIDERS, AnyCase, Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_GPU = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="needs a CUDA GPU; the small cases run on this machine's CPU"
)
SMALL: list[AnyCase] = [*cases.SMALL_CASES, *cases.SMALL_LOSS_CASES, *nets.SMALL_CASES]
LARGE: list[AnyCase] = [*cases.CASES, *cases.LOSS_CASES, *nets.HEADLINE]


def pairs() -> Iterator[Any]:
    """(case, provider): all on a GPU, on a CPU the small cases without compilers."""
    for case in SMALL + LARGE:
        for provider in peers.serving(case):
            if DEVICE.type == "cuda" or not provider.compiled:
                marks = () if case in SMALL else NEEDS_GPU
                yield pytest.param(case, provider.name, id=f"{case.name}-{provider.name}", marks=marks)


@functools.lru_cache(maxsize=1)
def problem(case: AnyCase) -> Problem:
    """The case's numbers, shared by its providers."""
    return peers.pose(case, DEVICE)


@pytest.mark.parametrize(("case", "name"), pairs())
def test_case(case: AnyCase, name: str, benchmark: Any) -> None:
    provider = PROVIDERS[name]
    reason = peers.unavailable(provider, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    torch.compiler.reset()  # every case starts with nothing compiled
    with precision(case.dtype if isinstance(case, nets.NetCase) else ""):
        posed = problem(case)
        step, errors = peers.checked(provider, case, posed)
        for _ in range(2):
            step()
        benchmark.group = case.name
        benchmark.extra_info.update(provider=name, bytes=case.bytes, flops=case.flops, error=errors, **machine(DEVICE))
        if DEVICE.type == "cuda":
            times = interleaved({name: step}, DEVICE, 0.3, head_start=case.kind != "net")[name]
            benchmark.extra_info.update({f"cuda_ms_{key}": value for key, value in asdict(times).items()})
        benchmark.pedantic(_finished, (step,), rounds=10 if DEVICE.type == "cuda" else 5)


def _finished(step: Step) -> None:
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
