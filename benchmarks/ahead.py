"""What can be compiled before anything is timed: Triton's kernels and launchers, and networks by torch.compile.

Each is the work of a process of its own (:mod:`benchmarks.isolation`), which leaves what it compiled in Triton's and
inductor's caches.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

import fastunet
from benchmarks import nets, peers, traffic
from benchmarks.cases import Case
from benchmarks.checks import small_picture
from benchmarks.chips import target_of
from benchmarks.isolation import Message, describe, on_all_cores
from benchmarks.measure import nvidia_smi, precision
from benchmarks.nets import NetCase
from benchmarks.peers import PROVIDERS, AnyCase


@dataclass(frozen=True)
class CompileOrder:
    """What a compiling process is to do."""

    cases: tuple[AnyCase, ...]
    deadline: float  # seconds since the epoch
    architecture: str | None = None  # of the GPU, as "sm_90"; the one that is here
    device: str = "cuda"


# ---- kernels -----------------------------------------------------------------------------------------------------


def kernels(order: CompileOrder) -> Iterator[Message]:
    """Compile what the cases launch into Triton's cache, on all cores, without touching the GPU.

    Tells every failure, as (name of a case that launches it, what went wrong), and at the end how many were "compiled"
    of how many. What is late is given up: it is compiled where it is used.
    """
    architecture = order.architecture or _architecture()
    if architecture is None:
        yield "compiled", (0, 0)
        return
    found = specialisations(order.cases, architecture)
    tasks = [functools.partial(_compile, one) for one in found.values()]
    good = 0
    for number, _, failure in on_all_cores(tasks, order.deadline):
        good += failure is None
        if failure is not None:
            yield "failed", (list(found)[number][1], failure)
    yield "compiled", (good, len(tasks))


def _architecture() -> str | None:
    found = nvidia_smi("compute_cap")
    return f"sm_{found[0].replace('.', '')}" if found else None


def specialisations(chosen: Sequence[AnyCase], architecture: str) -> dict[tuple[str, str], Any]:
    """What is to be compiled, by what it is and the name of the first case that launches it; networks first."""
    ops = [(case.name, case) for case in chosen if isinstance(case, Case)]
    small = [(name, small_picture(case)) for name, case in ops]
    of_ops = [(name, launch) for name, case in small + ops for launch in _launches(case, architecture)]
    return _specialised([*_of_networks(chosen, architecture), *of_ops], architecture)


def choices(case: Case, kind: str, chosen: Iterable[Any], architecture: str, pool: Executor) -> None:
    """Compile into Triton's cache what the algorithms and tiles ``chosen`` for a ``kind`` of kernel launch, on all of
    ``pool``; what fails fails where it is used."""
    with suppress(BrokenProcessPool):  # a compiler crashed
        wait([pool.submit(_compile_choice, case, kind, choice, architecture) for choice in chosen])


def _compile_choice(case: Case, kind: str, choice: Any, architecture: str) -> None:
    from fastunet.kernels import table

    with table.forced({kind: choice}):
        launches = [(case.name, launch) for launch in _launches(case, architecture)]
    for one in _specialised(launches, architecture).values():
        one.compile()


def _specialised(named: Iterable[tuple[str, Any]], architecture: str) -> dict[tuple[str, str], Any]:
    from benchmarks.recorder import specialise

    launches: dict[Any, tuple[str, Any]] = {}
    for name, launch in named:
        launches.setdefault(launch.key, (name, launch))
    found: dict[str, tuple[str, Any]] = {}
    for name, launch in launches.values():
        one = specialise(launch, target_of(architecture))
        found.setdefault(str((one.name, one.signature, one.constants, one.attributes, one.options)), (name, one))
    return {(key, name): one for key, (name, one) in found.items()}


def _launches(case: Case, architecture: str) -> list[Any]:
    from benchmarks.recorder import record
    from fastunet import kernels
    from fastunet.architecture import as_if_on

    with as_if_on(architecture), record() as launches:
        case.launch(kernels)
    return launches


def _of_networks(chosen: Sequence[AnyCase], architecture: str) -> Iterator[tuple[str, Any]]:
    networks = [case for case in nets.HEADLINE if case in chosen]
    for net, backend in itertools.product(networks, ("auto", "triton")):
        for call in traffic.run(net, fastunet, architecture, backend=backend).calls:
            yield from ((net.name, launch) for launch in call.launches)


def _compile(one: Any) -> None:
    compiled = one.compile()
    with suppress(Exception):  # newer Tritons have one launcher for all; else it is compiled where it is used
        from triton.backends.nvidia import driver

        source = driver.make_launcher({}, one.signature, getattr(compiled.metadata, "tensordesc_meta", None))
        driver.compile_module_from_src(
            src=source, name="__triton_launcher", library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs, libraries=driver.libraries,
        )  # fmt: skip


# ---- torch.compile -----------------------------------------------------------------------------------------------


def networks(order: CompileOrder) -> Iterator[Message]:
    """Run torch.compile's form of the cases, all of them networks, once: inductor's cache then has it."""
    torch.backends.cudnn.benchmark = True
    for case in order.cases:
        assert isinstance(case, NetCase)
        begun = time.time()
        torch.compiler.reset()
        try:
            with precision(case.dtype):
                peers.once(PROVIDERS["compile"], case, torch.device(order.device))
        except Exception as error:
            yield "failed", (case.name, describe(error))
        else:
            yield "ready", (case.name, time.time() - begun)
