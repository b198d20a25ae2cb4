"""The GPU suite: one command that turns what is modelled into rows of measurements.

``python -m benchmarks.suite`` prints the machine, checks every case's kernels forward and backward against float64 and
stops if one is wrong, measures the machine's own roofs, then times every case against every peer (interleaved, L2 cold,
CUDA events; peak memory too), the most important first, until ``--budget`` seconds are over. It appends one row per
case and provider to ``benchmarks/results/<gpu>.jsonl`` as it goes, and ends with a table and a list of what it did not
reach. ``--row ID`` repeats one row; ``--dry-run`` builds and checks everything small, with no GPU, and prints the plan.

GB/s are of the bytes an operation moves at least; of a network, of the bytes that the ledger counts for the provider
(``benchmarks/traffic.py``; training and inference of the first networks, eager and fastunet).

Measuring is done in a process of its own: one that crashes or hangs costs its provider a row with the error in it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor
from tqdm import tqdm

import fastunet
from benchmarks import cases, loss_cases, nets, peers, report, traffic
from benchmarks.cases import Case
from benchmarks.loss_cases import LossCase
from benchmarks.measure import (
    DTYPES,
    ROOT,
    Memory,
    interleaved,
    layout_conversions,
    machine,
    nvidia_smi,
    precision,
    roofs,
)
from benchmarks.nets import NetCase
from benchmarks.peers import PROVIDERS, AnyCase, Provider, Step
from fastunet import reference, verify

RESULTS = ROOT / "benchmarks" / "results"
GRACE = 20  # seconds after the deadline until a process that does not answer is ended
PATIENCE = 120  # seconds a process may be silent before the deadline; and while it prepares a provider, 4 × as expected
POISONED = 3  # exit status of a process whose CUDA context an error made useless

# Seconds to prepare and check a step, until rows of the same GPU say better.
EXPECTED = {
    "op": {"compile": 8.0, "cudnn-graph": 2.0, "": 0.7},
    "loss": {"compile": 10.0, "": 1.0},
    "net": {"compile": 45.0, "compile-max-autotune": 150.0, "fastunet-triton": 6.0, "": 3.0}
    | {"onnxruntime": 20.0, "tensorrt": 60.0},
}
TIMED = {"op": 0.3, "loss": 0.5, "net": 1.5}  # seconds to time the providers of a case
DEAR = ("compile", "onnxruntime", "tensorrt", "compile-max-autotune")


# ---- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One case and those who are timed on it side by side."""

    case: AnyCase
    providers: tuple[str, ...]


def plan(device: torch.device) -> list[Job]:
    """Every job, most important first. Compilers come in jobs of their own, beside eager PyTorch and fastunet."""
    if device.type != "cuda":
        small: list[AnyCase] = [*nets.SMALL_CASES, *loss_cases.SMALL_CASES, *cases.SMALL_CASES]
        jobs = [*map(_quick, small), _dear(small[0], "compile"), *(_dear(case, "onnxruntime") for case in small)]
        return [job for job in jobs if job.providers]
    headline, others = nets.HEADLINE, [case for case in nets.CASES if case not in nets.HEADLINE]
    steps, inferences = headline[:2], headline[2:]
    layers = [case for case in cases.unet_layers() if case not in cases.CASES]
    jobs = [
        *map(_quick, headline),
        *(_dear(case, "compile") for case in steps),
        *(_dear(case, "tensorrt") for case in inferences),
        _dear(steps[0], "compile-max-autotune"),
        *map(_quick, loss_cases.CASES),
        *map(_quick, cases.CASES),
        *(_dear(case, "compile") for case in inferences),
        *map(_quick, layers),
        *(_dear(case, "compile-max-autotune") for case in headline[1:]),
        *(_dear(case, "compile") for case in loss_cases.CASES),
        *map(_quick, others),
        *(_dear(case, "compile") for case in cases.CASES + layers),
        *(_dear(case, name) for name in DEAR for case in others),
    ]
    return [job for job in jobs if job.providers]


def _quick(case: AnyCase) -> Job:
    return Job(case, tuple(provider.name for provider in peers.serving(case) if provider.name not in DEAR))


def _dear(case: AnyCase, name: str) -> Job:
    names = [provider.name for provider in peers.serving(case)]
    if name not in names:
        return Job(case, ())
    ours = "fastunet" if "fastunet" in names else "fastunet-triton"
    return Job(case, (names[0], ours, name))


def available(jobs: Sequence[Job], device: torch.device) -> tuple[list[Job], dict[str, str]]:
    """The jobs with the providers that can run here, and why the others cannot."""
    reasons = {name: peers.unavailable(provider, device) for name, provider in PROVIDERS.items()}
    if device.type == "cpu":
        reasons["fastunet-triton"] = "the interpreter is checked and not timed"
    kept = [Job(job.case, tuple(name for name in job.providers if reasons[name] is None)) for job in jobs]
    wanted = {name for job in jobs for name in job.providers}
    return [job for job in kept if job.providers], {n: why for n, why in reasons.items() if why and n in wanted}


def expected_seconds(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Seconds to prepare a step by (kind, provider): the median of ``rows``, else a guess."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["failure"] is None:
            found.setdefault((row["kind"], row["provider"]), []).append(row["seconds"])
    guessed = {(k, name): EXPECTED[k].get(name, EXPECTED[k][""]) for k in EXPECTED for name in PROVIDERS}
    return guessed | {key: statistics.median(seconds) for key, seconds in found.items()}


# ---- the correctness gate ----------------------------------------------------------------------------------------


def gate(device: torch.device, chosen: Sequence[AnyCase]) -> Iterator[tuple[str, str | None]]:
    """What is checked, each time with None before, and if it is wrong once more with a sentence that says how.

    Checked against float64 are ``fastunet verify`` on the torch backend, which has every network, and each operation
    among ``chosen`` with its own kernels, on a small picture.
    """
    with precision("fp32"):
        for row in verify.rows(device, "torch", quick=True):
            what = f"verify: {row.name} {row.shape} {row.dtype} {row.part}"
            yield what, None if row.passed else f"relative error {row.error:.1e}, allowed {row.allowed:.1e}"
    small = dict.fromkeys(_small_picture(case) for case in chosen if isinstance(case, Case))
    for case in tqdm(small, desc="gate", disable=None, leave=False):
        for name in ("fastunet-torch", "fastunet-triton"):
            if peers.unavailable(PROVIDERS[name], device) is None:
                what = f"{name}: {case.name}"
                yield what, None
                try:
                    problem = peers.pose(case, device)
                    problem.check(peers.prepare(PROVIDERS[name], case, problem)(), None)
                except Exception as error:
                    yield what, _describe(error)


def _small_picture(case: Case) -> Case:
    """The same kernels in every direction; 24 × 40 has whole tiles and parts of tiles."""
    mode: Literal["inference", "training"] = "training"
    if not case.differentiable or (case.mode == "inference" and not case.stats):
        mode = "inference"
    height, width = (min(size, most) for size, most in zip(case.shape[2:], (24, 40), strict=True))
    return replace(case, shape=(min(case.shape[0], 2), case.shape[1], height, width), mode=mode)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# ---- measuring, in a process of its own --------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What a measuring process is to do."""

    device: str
    jobs: tuple[Job, ...]
    deadline: float  # seconds since the epoch
    expected: dict[tuple[str, str], float] = field(default_factory=dict)
    check: bool = True
    roofs: bool = True

    def seconds(self, job: Job, name: str) -> float:
        """What preparing provider ``name`` is expected to take."""
        return self.expected[job.case.kind, name]


Message = tuple[str, Any]


def work(order: Order) -> Iterator[Message]:
    """Do it, telling how it goes: (what, value), as :func:`main` reads them."""
    device = torch.device(order.device)
    chosen = [job.case for job in order.jobs]
    if device.type == "cuda" and order.check:
        yield "doing", "compiling the kernels"
        try:
            precompile(chosen)
        except Exception as error:  # they are compiled where they are used
            yield "doing", f"compiling ahead failed: {_describe(error)}"
    yield "machine", machine(device)
    if order.check:
        yield "doing", "checking every operation and network, forward and backward, against float64"
        wrong = []
        for what, problem in gate(device, chosen):
            yield "checking", what
            if problem is not None:
                wrong.append(f"{what}: {problem}")
        yield "gate", wrong
    if order.roofs:
        yield "doing", "measuring the machine's roofs"
        yield "roofs", roofs(device)
    torch.backends.cudnn.benchmark = True  # the peers' convolutions take the fastest algorithm
    for number, job in enumerate(order.jobs):
        yield "job", number
        yield from _measure(order, job, device)
    yield "done", None


def _measure(order: Order, job: Job, device: torch.device) -> Iterator[Message]:
    """The rows of one job; providers that no longer fit in the time are left out."""
    names = [name for name in job.providers if time.time() + order.seconds(job, name) < order.deadline]
    if not names:
        return
    torch.compiler.reset()
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    group = uuid.uuid4().hex[:8]
    dtype = job.case.dtype if isinstance(job.case, NetCase) else ""
    with precision(dtype):
        yield "doing", f"{job.case.name}: truth"
        try:
            problem = peers.pose(job.case, device)
        except Exception as error:
            for name in names:
                yield "row", _row(job.case, name, failure=f"no truth: {_describe(error)}")
            _give_up_if_poisoned(device)
            return
        for name in names:
            if time.time() + order.seconds(job, name) >= order.deadline:
                continue
            yield "provider", name
            try:
                steps[name], rows[name] = _prepared(PROVIDERS[name], job.case, problem, device)
            except Exception as error:
                yield "row", _row(job.case, name, failure=_describe(error))
                _give_up_if_poisoned(device)
        yield "provider", None
        try:
            times = interleaved(steps, device, TIMED[job.case.kind], head_start=job.case.kind != "net") if steps else {}
        except Exception as error:
            for name in rows:
                yield "row", _row(job.case, name, failure=f"timing: {_describe(error)}")
            _give_up_if_poisoned(device)
            return
    for name, row in rows.items():
        yield "row", row | _rates(job.case, times[name].p50) | {"ms": asdict(times[name]), "group": group}


def _prepared(
    provider: Provider, case: AnyCase, problem: peers.Problem, device: torch.device
) -> tuple[Step, dict[str, Any]]:
    """A warm step that gives the right numbers, and what is known before it is timed."""
    memory = Memory(device)
    begun = time.perf_counter()
    step = peers.prepare(provider, case, problem)
    results = step()
    errors = problem.check(results, peers.compared(provider, case))
    layouts = _layouts(results)
    del results
    for _ in range(2):
        step()
    found: dict[str, Any] = {"error": errors, "layouts": layouts, "peak_bytes": memory.peak(step, provider.memory)}
    if provider.compiled and case.kind == "net":
        with contextlib.suppress(Exception):  # what the profiler cannot say must not cost the row
            found["layout_conversions"] = layout_conversions(step, device)
    return step, _row(case, provider.name, seconds=time.perf_counter() - begun, **found)


def _row(case: AnyCase, provider: str, failure: str | None = None, **found: Any) -> dict[str, Any]:
    spec = {f.name: _plain(getattr(case, f.name)) for f in fields(case)}
    about = {"case": case.name, "kind": case.kind, "provider": provider, "spec": spec}
    return {**about, "group": None, "ms": None, "flops": case.flops, "bytes": case.bytes, "failure": failure, **found}


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def rebuilt(row: dict[str, Any]) -> AnyCase:
    """The case of a recorded row."""
    build: Any = next(kind for kind in (Case, LossCase, NetCase) if kind.kind == row["kind"])
    spec = dict(row["spec"])
    if build is not NetCase:
        spec = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
        spec["dtype"] = getattr(torch, spec["dtype"])
    if "labels" in spec:
        spec["labels"] = getattr(torch, spec["labels"])
    case: AnyCase = build(**spec)
    return case


def _rates(case: AnyCase, milliseconds: float) -> dict[str, float | None]:
    moved, computed = case.bytes, case.flops
    return {
        "gbs": moved / milliseconds / 1e6 if moved else None,
        "tflops": computed / milliseconds / 1e9 if computed else None,
    }


def _layouts(found: Sequence[Tensor]) -> dict[str, int]:
    """How many of the results and gradients that have an unambiguous layout are channels_last, and how many not."""
    counts = {"channels_last": 0, "contiguous": 0}
    for tensor in found:
        if tensor.dim() == 4 and tensor.is_contiguous() != tensor.is_contiguous(memory_format=torch.channels_last):
            counts["contiguous" if tensor.is_contiguous() else "channels_last"] += 1
    return counts


def _give_up_if_poisoned(device: torch.device) -> None:
    """After an error that leaves CUDA unusable, let another process go on."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.empty(1, device=device).item()
        except Exception:
            sys.stdout.flush()
            os._exit(POISONED)


# ---- compiling ahead ---------------------------------------------------------------------------------------------


def precompile(chosen: Sequence[AnyCase], architecture: str | None = None) -> int:
    """Compile the kernels of ``chosen`` into Triton's cache, on all cores, before this process touches the GPU.

    Returns how many there were; 0 where it is not known what GPU it is (``architecture``, as "sm_90").
    """
    if architecture is None:
        found = nvidia_smi("compute_cap")
        architecture = f"sm_{found[0].replace('.', '')}" if found else None
    if architecture is None:
        return 0
    from triton.backends.compiler import GPUTarget

    from benchmarks.recorder import specialise

    global _wanted
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    launches = {launch.key: launch for launch in _launches(chosen, architecture)}
    wanted = [specialise(launch, target) for launch in launches.values()]
    _wanted = list({str((x.name, x.signature, x.constants, x.attributes, x.options)): x for x in wanted}.values())
    # A compiler that crashes breaks the pool: the rest is then compiled where it is used.
    forked = multiprocessing.get_context("fork")
    with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(os.cpu_count(), forked) as pool:
        for _ in tqdm(
            pool.map(_compile_number, range(len(_wanted))),
            total=len(_wanted), desc="compiling", disable=None, leave=False,
        ):  # fmt: skip
            pass
    return len(_wanted)


_wanted: list[Any] = []  # inherited by the forked workers: jit functions do not pickle


def _compile_number(number: int) -> None:
    with contextlib.suppress(Exception):  # what does not compile fails where it is used, and is a row
        _wanted[number].compile()


def _launches(chosen: Sequence[AnyCase], architecture: str) -> Iterator[Any]:
    from benchmarks.recorder import record
    from benchmarks.trace import traced
    from fastunet import kernels
    from fastunet.architecture import as_if_on

    ops = [case for case in chosen if isinstance(case, Case)]
    for case in dict.fromkeys([*map(_small_picture, ops), *ops]):
        with as_if_on(architecture), record() as launches:
            case.launch(kernels)
        yield from launches
    for net in [case for case in dict.fromkeys(chosen) if isinstance(case, NetCase)][: len(nets.HEADLINE)]:
        for call in traced(functools.partial(_meta_step, net), architecture):
            yield from call.launches


def _meta_step(case: NetCase) -> None:
    # On the meta device autocast does nothing: the weights take its part.
    model = case.ours("auto").to(DTYPES[case.dtype]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, labels = case.data("meta")
    x = x.to(DTYPES[case.dtype]).contiguous(memory_format=torch.channels_last)
    if case.mode == "training":
        nets.our_loss(case, "auto")(model(x), labels).backward()
    else:
        with torch.no_grad():
            model.eval()(x)


# ---- the parent --------------------------------------------------------------------------------------------------


def isolated(order: Order) -> Iterator[Message]:
    """:func:`work` in a process of its own, begun anew without the culprit when it dies, and ended when it hangs."""
    while True:
        receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_send_all, args=(order, sender), daemon=False)
        process.start()
        sender.close()
        number: int | None = None
        provider: str | None = None
        stage = "starting"
        patience = math.inf  # compiling everything takes its time
        done: set[str] = set()
        reason = ""
        try:
            while True:
                left_over = order.deadline + GRACE - time.time()
                if not receiver.poll(max(1.0, min(left_over, patience))):
                    late = left_over <= patience
                    reason = f"did not answer {f'{GRACE} s after the deadline' if late else f'for {patience:.0f} s'}"
                    break
                what, value = receiver.recv()
                if what == "machine":
                    patience = PATIENCE
                elif what == "job":
                    number, provider, done = value, None, set()
                elif what == "provider":
                    provider = value
                    patience = PATIENCE
                    if value is not None and number is not None:
                        patience += 4 * order.seconds(order.jobs[number], value)
                elif what == "row":
                    done.add(value["provider"])
                elif what == "gate":
                    order = replace(order, check=False)
                elif what == "roofs":
                    order = replace(order, roofs=False)
                stage = value if what in ("doing", "checking") else stage
                yield what, value
                if what == "done":
                    process.join(GRACE)
                    return
        except EOFError:
            process.join(GRACE)
            reason = f"the process ended with status {process.exitcode}"
        finally:
            _end(process)
            receiver.close()
        if order.check:
            yield "gate", [f"{stage}: {reason}"]
            return
        if number is None:  # it will not begin next time either
            yield "doing", f"giving up: {stage}: {reason}"
            yield "done", None
            return
        job = order.jobs[number]
        failed, again = _after(job, done, provider)
        for name in failed:
            yield "row", _row(job.case, name, failure=reason)
        order = replace(order, roofs=False, jobs=(Job(job.case, again), *order.jobs[number + 1 :]))
        if time.time() > order.deadline or not any(job.providers for job in order.jobs):
            yield "done", None
            return


def _after(job: Job, done: set[str], provider: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who failed when a process ended, and who is to be tried again, of those of ``job`` who have no row.

    The culprit is ``provider``, who was being prepared, whether or not its row came through; with None all of them.
    """
    left = tuple(name for name in job.providers if name not in done)
    failed = tuple(name for name in left if provider in (None, name))
    return failed, tuple(name for name in left if name not in failed)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """End ``process`` and the compilers that it has begun, which lead a group of their own."""
    assert process.pid
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _send_all(order: Order, sender: Connection) -> None:
    os.setsid()  # a group of its own: see _end
    for message in work(order):
        sender.send(message)


class Ledger:
    """The file of rows of one GPU: appended to, a row at a time, and on disk before the next is measured."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self.path = folder / f"{report.slug(gpu)}.jsonl"
        self.begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.added: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        """Complete ``row`` with an identifier and what the numbers depend on, and write it."""
        mark = f"{self.begun} {row['case']} {row['provider']} {len(self.added)} {about.get('sources')}"
        row = {"id": hashlib.sha256(mark.encode()).hexdigest()[:8], "time": self.begun, **row, **about}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.added.append(row)
        return row


def _traffic(row: dict[str, Any], capability: Sequence[int] | None) -> dict[str, Any]:
    """Bytes and GB/s of a network's row; nothing where the ledger has no account of it, or would take its time."""
    packages = {"eager": reference, "eager-graph": reference, "fastunet": fastunet, "fastunet-graph": fastunet}
    package = packages.get(row["provider"])
    if package is None or row["ms"] is None or capability is None or row["kind"] != "net":
        return {}
    case = rebuilt(row)
    if case not in nets.HEADLINE or not isinstance(case, NetCase) or case.mode == "frozen":
        return {}
    moved = _step_bytes(case, package, "sm_{}{}".format(*capability))
    return {"bytes": moved, "gbs": moved / row["ms"]["p50"] / 1e6}


@functools.cache
def _step_bytes(case: NetCase, package: ModuleType, architecture: str) -> int:
    name, _, bilinear = case.net.partition("-")
    shape = (case.base, case.size, case.batch, DTYPES[case.dtype], case.network.classes)
    net = traffic.Net(name, bool(bilinear), *shape)
    mode: traffic.Mode = "training" if case.mode == "training" else "inference"
    return traffic.account(traffic.run(net, mode, package, architecture), traffic.made).bytes


def measure(order: Order, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Carry out ``order``, printing how it goes; the exit status, and the rows added to the ledger in ``folder``."""
    ledger: Ledger | None = None
    about: dict[str, Any] = {"roofs": None}
    for what, value in isolated(order) if order.device == "cuda" else work(order):
        if what == "doing":
            print(f"  … {value}", flush=True)
        elif what == "machine" and ledger is None:
            print(report.machine_text(value), flush=True)
            ledger, about = Ledger(folder, value["gpu"]), {**value, **about}
        elif what == "gate":
            for problem in value:
                print(f"WRONG {problem}")
            print(f"gate: {len(value)} wrong; nothing is timed" if value else "gate: all right", flush=True)
            if value:
                return 1, []
        elif what == "roofs":
            print("roofs: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in value.items()), flush=True)
            about["roofs"] = value
        elif what == "row" and ledger is not None:
            with contextlib.suppress(Exception):  # what the ledger cannot say must not cost the row
                value |= _traffic(value, about["capability"])
            print(report.line(ledger.add(value, about)), flush=True)
    return 0, ledger.added if ledger else []


def dry_run(jobs: Sequence[Job], expected: dict[tuple[str, str], float]) -> int:
    """Print the plan, and check every provider's numbers on small shapes on the CPU; the exit status."""
    total = 0.0
    print(f"{'seconds':>8} {'at':>7}  case: providers")
    for job in jobs:
        kind = job.case.kind
        seconds = TIMED[kind] + sum(expected[kind, name] for name in job.providers)
        total += seconds
        print(f"{seconds:8.1f} {total:7.0f}  {job.case.name}: {', '.join(job.providers)}")
    device = torch.device("cpu")
    reasons = {name: peers.unavailable(provider, device) for name, provider in PROVIDERS.items()}
    checks = dict.fromkeys((_tiny(job.case), name) for job in jobs for name in job.providers if not reasons[name])
    # Networks through the interpreter take minutes: `fastunet verify` does that, and fastunet-torch is checked here.
    checks = {(c, n): None for c, n in checks if not (isinstance(c, NetCase) and n in ("fastunet", "fastunet-triton"))}
    wrong = 0
    posed: dict[AnyCase, peers.Problem] = {}
    for case, name in tqdm(checks, desc="checking", disable=None, leave=False):
        provider = PROVIDERS[name]
        if provider.compiled:
            provider = replace(provider, compiled="trace")
        try:
            if case not in posed:
                posed = {case: peers.pose(case, device)}
            posed[case].check(peers.prepare(provider, case, posed[case])(), peers.compared(provider, case))
        except Exception as error:
            wrong += 1
            print(f"WRONG {name}: {case.name}: {_describe(error)}")
    for name, why in reasons.items():
        if why:
            print(f"not checked here: {name}: {why}")
    print(f"{len(jobs)} jobs, {total:.0f} s expected; {len(checks)} small ones checked, {wrong} wrong")
    return 1 if wrong else 0


def _tiny(case: AnyCase) -> AnyCase:
    """The same case small enough for the interpreter, in float32, which it computes rightly."""
    if isinstance(case, NetCase):
        return replace(case, base=4, size=32, batch=2, dtype="fp32")
    batch, channels = case.shape[:2]
    if isinstance(case, LossCase):
        return replace(case, shape=(2, channels, 8, 12), dtype=torch.float32)
    shape = (min(batch, 2), min(channels, 4), 4, 6)
    return replace(case, shape=shape, filters=min(case.filters, 3), skip=min(case.skip, 2), dtype=torch.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="all of it, compiling too; 480")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="no compilers, and only the first of each kind of case")
    parser.add_argument("--row", metavar="ID", help="measure one recorded row again, and print both")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: check everything small, and print the plan")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: small cases, to try the suite itself")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where rows are; benchmarks/results"
    )
    options = parser.parse_args(arguments)
    begun = time.time()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() or options.dry_run else "cpu"))
    recorded = report.read(options.results)
    expected = expected_seconds([row for row in recorded if (row["gpu"] == "cpu") == (device.type == "cpu")])
    if options.row:
        return _again(options.row, recorded, device, expected, options)
    jobs = plan(device)
    if options.quick:
        jobs = [job for job in jobs if not set(job.providers) & set(DEAR)]
        jobs = [job for job in jobs if job.case in (*nets.HEADLINE, *loss_cases.CASES, *cases.CASES)] or jobs
    jobs = [job for job in jobs if options.only in job.case.name]
    if not jobs:
        parser.error(f"no case's name contains '{options.only}'; --dry-run prints all names")
    if options.dry_run:
        return dry_run(jobs, expected)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --dry-run checks the plan without one, --device cpu tries the suite")
    jobs, reasons = available(jobs, device)
    for name, why in reasons.items():
        print(f"not available: {name}: {why}")
    status, rows = measure(Order(device.type, tuple(jobs), begun + options.budget, expected), options.results)
    if status == 0:
        measured = {(row["case"], row["provider"]) for row in rows}
        missed: dict[str, dict[str, None]] = {}
        for job in jobs:
            for name in job.providers:
                if (job.case.name, name) not in measured:
                    missed.setdefault(job.case.name, {})[name] = None
        for case, names in missed.items():
            print(f"not measured: {case}: {', '.join(names)}")
        print(report.table(rows))
        _draw(options.results, rows)
        print(f"{len(rows)} rows in {time.time() - begun:.0f} s, {len(missed)} cases not complete")
    return status


def _draw(results: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The roofline of a GPU's rows, those of earlier runs too; a CPU has none."""
    gpu = rows[0]["gpu"] if rows else "cpu"
    if gpu != "cpu" and (path := report.draw(report.read(results), gpu, results)):
        print(f"roofline: {path}")


def _again(
    wanted: str, recorded: list[dict[str, Any]], device: torch.device, expected: Any, options: argparse.Namespace
) -> int:
    """Measure the row ``wanted`` once more, beside nobody, and print the old and the new."""
    old = next((row for row in recorded if row["id"] == wanted), None)
    if old is None:
        print(
            f"no row in {options.results} has the id '{wanted}'; the last column of a table has them", file=sys.stderr
        )
        return 2
    job = Job(rebuilt(old), (old["provider"],))
    order = Order(device.type, (job,), time.time() + max(options.budget, 600), expected, check=False, roofs=False)
    status, rows = measure(order, options.results)
    print(report.table([old, *rows], every=True))
    return status


if __name__ == "__main__":
    sys.exit(main())
