"""What can be compiled before anything is timed: Triton's kernels and launchers, and networks by torch.compile.

Each is the work of a process of its own (:mod:`benchmarks.isolation`), which leaves what it compiled in Triton's and
inductor's caches.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

import fastunet
from benchmarks import nets, peers, traffic
from benchmarks.cases import Case
from benchmarks.checks import describe, small_picture
from benchmarks.chips import target_of
from benchmarks.isolation import Message
from benchmarks.measure import nvidia_smi, precision
from benchmarks.nets import NetCase
from benchmarks.peers import PROVIDERS, AnyCase


@dataclass(frozen=True)
class Wanted:
    """What to compile for whom, and until when."""

    cases: tuple[AnyCase, ...]
    deadline: float  # seconds since the epoch
    architecture: str | None = None  # of the GPU, as "sm_90"; the one that is here
    device: str = "cuda"


# ---- kernels -----------------------------------------------------------------------------------------------------


def kernels(wanted: Wanted) -> Iterator[Message]:
    """Compile what the cases launch into Triton's cache, on all cores, without touching the GPU.

    Tells every failure, as (name of a case that launches it, what went wrong), and at the end how many were "compiled"
    of how many. What is late is given up: it is compiled where it is used.
    """
    architecture = wanted.architecture or _architecture()
    if architecture is None:
        yield "compiled", (0, 0)
        return
    found = specialisations(wanted.cases, architecture)
    tasks = [functools.partial(_compile, one) for one in found.values()]
    good = 0
    for number, failure in on_all_cores(tasks, wanted.deadline):
        good += failure is None
        if failure is not None:
            yield "failed", (list(found)[number][1], failure)
    yield "compiled", (good, len(tasks))


def _architecture() -> str | None:
    found = nvidia_smi("compute_cap")
    return f"sm_{found[0].replace('.', '')}" if found else None


def specialisations(chosen: Sequence[AnyCase], architecture: str) -> dict[tuple[str, str], Any]:
    """What is to be compiled, by what it is and the name of the first case that launches it; networks first."""
    from benchmarks.recorder import specialise

    launches: dict[Any, tuple[str, Any]] = {}
    for name, launch in _launches(chosen, architecture):
        launches.setdefault(launch.key, (name, launch))
    found: dict[str, tuple[str, Any]] = {}
    for name, launch in launches.values():
        one = specialise(launch, target_of(architecture))
        found.setdefault(str((one.name, one.signature, one.constants, one.attributes, one.options)), (name, one))
    return {(key, name): one for key, (name, one) in found.items()}


def _launches(chosen: Sequence[AnyCase], architecture: str) -> Iterator[tuple[str, Any]]:
    from benchmarks.recorder import record
    from fastunet import kernels
    from fastunet.architecture import as_if_on

    networks = [case for case in nets.HEADLINE if case in chosen]
    for net, backend in itertools.product(networks, ("auto", "triton")):
        for call in traffic.run(net, fastunet, architecture, backend=backend).calls:
            yield from ((net.name, launch) for launch in call.launches)
    ops = [case for case in chosen if isinstance(case, Case)]
    for name, case in [*((case.name, small_picture(case)) for case in ops), *((case.name, case) for case in ops)]:
        with as_if_on(architecture), record() as launches:
            case.launch(kernels)
        yield from ((name, launch) for launch in launches)


def _compile(one: Any) -> None:
    compiled = one.compile()
    with suppress(Exception):  # newer Tritons have one launcher for all; else it is compiled where it is used
        from triton.backends.nvidia import driver

        source = driver.make_launcher({}, one.signature, getattr(compiled.metadata, "tensordesc_meta", None))
        driver.compile_module_from_src(
            src=source, name="__triton_launcher", library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs, libraries=driver.libraries,
        )  # fmt: skip


def on_all_cores(tasks: Sequence[Callable[[], Any]], deadline: float) -> Iterator[tuple[int, str | None]]:
    """Run ``tasks`` in forked processes: the number of each that is done, and how it failed if it did.

    A process that dies costs its task alone; those still at work at the deadline are killed. Nothing needs to be
    pickled.
    """
    forked = multiprocessing.get_context("fork")
    left = iter(range(len(tasks)))
    workers: dict[Any, tuple[Any, int]] = {}  # by the end of the pipe that is here: the process, and what it does

    def begin(connection: Any = None, process: Any = None) -> None:
        """Give a worker, or a new one, the next task; without any, it ends."""
        number = next(left, None)
        if number is None and connection is None:
            return
        if connection is None:
            connection, other = forked.Pipe()
            process = forked.Process(target=_serve, args=(tasks, other), daemon=True)
            process.start()
            other.close()
        connection.send(number)
        if number is None:
            process.join()
        else:
            workers[connection] = process, number

    try:
        for _ in range(os.cpu_count() or 1):
            begin()
        while workers and time.time() < deadline:
            ready: list[Any] = multiprocessing.connection.wait(list(workers), max(0.0, deadline - time.time()))
            for connection in ready:
                process, number = workers.pop(connection)
                try:
                    failure = connection.recv()
                    begin(connection, process)
                except (EOFError, ConnectionError):
                    process.join()
                    failure = f"the process ended with status {process.exitcode}"
                    begin()
                yield number, failure
    finally:
        for process, _ in workers.values():
            process.kill()


def _serve(tasks: Sequence[Callable[[], Any]], connection: Any) -> None:
    for number in iter(connection.recv, None):
        try:
            tasks[number]()
        except Exception as error:
            connection.send(describe(error))
        else:
            connection.send(None)


# ---- torch.compile -----------------------------------------------------------------------------------------------


def networks(wanted: Wanted) -> Iterator[Message]:
    """Run torch.compile's form of the cases, all of them networks, once: inductor's cache then has it."""
    torch.backends.cudnn.benchmark = True
    for case in wanted.cases:
        assert isinstance(case, NetCase)
        begun = time.time()
        torch.compiler.reset()
        try:
            with precision(case.dtype):
                peers.once(PROVIDERS["compile"], case, torch.device(wanted.device))
        except Exception as error:
            yield "failed", (case.name, describe(error))
        else:
            yield "ready", (case.name, time.time() - begun)
