"""The GPU suite: one command that turns what is modelled into rows of measurements, on a GPU never seen before.

``python -m benchmarks.suite`` goes through stages, each in a process of its own, until ``--budget`` seconds are over:

1. the machine, and its own roofs;
2. Triton's kernels and torch.compile's networks, compiled ahead on all cores;
3. every operation, small, forward and backward, against float64, and twice: a line each;
4. times of every case against every peer (interleaved, L2 cold, CUDA events; peak memory too), the most important
   first. It appends one row per case and provider to ``benchmarks/results/<gpu>.jsonl`` as it goes.

Nothing that is wrong, crashes or hangs stops the others: it costs an operation its check or a provider its row. No
provider of an operation or a loss is timed before its own results and gradients agree with the truth. A network is
timed all the same: its row says what of it is "wrong", and which operations are "red". What failed is printed last,
with a command that repeats it, and the exit status is then 1. ``--row ID`` repeats one row; ``--dry-run`` builds and
checks everything small, with no GPU, and prints the plan.

GB/s are of the bytes an operation moves at least; of a network, of the bytes that the ledger counts for the provider
(``benchmarks/traffic.py``; training and inference of the first networks, eager and fastunet).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import statistics
import sys
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor
from tqdm import tqdm

import fastunet
from benchmarks import ahead, cases, checks, nets, peers, report, traffic
from benchmarks.cases import Case, LossCase
from benchmarks.isolation import LostError, Message, describe, give_up_if_poisoned, messages, outliving
from benchmarks.measure import Memory, Step, interleaved, machine, precision, roofs
from benchmarks.nets import NetCase
from benchmarks.peers import PROVIDERS, AnyCase, Provider
from benchmarks.report import RESULTS
from fastunet import reference

GRACE = 15  # seconds after the deadline until a process that does not answer is ended
PATIENCE = 45  # seconds a process may be silent; and while it prepares a provider, 4 × as expected
IN_TIME = f"{GRACE} s after the deadline"
LATE = f"did not answer {IN_TIME}"  # it may only have been slow: this failure alone does not make a run fail

# A stage's share of the budget, and its seconds at most, from its beginning on; of networks and extras, from the run's.
SHARES = {"roofs": (0.2, 60), "kernels": (0.2, 60), "checks": (0.3, 90), "networks": (0.5, 240), "extras": (0.36, 180)}

# Seconds to prepare and check a step, until rows of the same GPU say better: an H200's, inductor's cache being warm.
EXPECTED = {
    "op": {"compile": 8.0, "cudnn-graph": 2.0, "": 0.2},
    "loss": {"compile": 10.0, "": 0.5},
    "net": {"compile": 6.0, "compile-graph": 6.0, "fastunet-compile": 8.0, "compile-max-autotune": 150.0}
    | {"accelerated": 8.0, "accelerated-graph": 8.0, "fastunet-triton": 3.0, "onnxruntime": 20.0, "tensorrt": 60.0}
    | {"": 2.0},
}
TIMED = {"op": 0.3, "loss": 0.5, "net": 1.5}  # seconds to time the providers of a case
DEAR = ("compile", "compile-graph", "fastunet-compile", "onnxruntime", "tensorrt", "compile-max-autotune")


# ---- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One case and those who are timed on it side by side."""

    case: AnyCase
    providers: tuple[str, ...]


def plan(device: torch.device) -> list[Job]:
    """Every job, most important first. Compilers come in jobs of their own, beside eager PyTorch and fastunet."""
    if device.type != "cuda":
        small: list[AnyCase] = [*_unfrozen(nets.SMALL_CASES), *cases.SMALL_LOSS_CASES, *cases.SMALL_CASES]
        jobs = [*map(_quick, small), _dear(small[0], "compile"), *(_dear(case, "onnxruntime") for case in small)]
        return [job for job in jobs if job.providers]
    headline = _unfrozen(nets.HEADLINE)
    others = [case for case in _unfrozen(nets.CASES) if case not in headline]
    frozen = [case for case in headline if case.mode == "frozen"]
    first = [case for case in headline if case.net == headline[0].net and case not in frozen]
    second = [case for case in headline if case.net != headline[0].net and case not in frozen]
    ops = list(dict.fromkeys([*cases.unet_layers(), *sorted(cases.CASES, key=lambda case: case.flops > 0)]))
    jobs = [
        *(_dear(case, "compile") for case in first),
        *map(_quick, first),
        *(_dear(case, "compile") for case in second),
        *(_dear(case, name) for name in ("compile-graph", "fastunet-compile") for case in first + second),
        *map(_quick, frozen),
        *map(_quick, [case for case in ops if case.op.startswith("conv")]),
        *map(_quick, cases.LOSS_CASES),
        *map(_quick, [case for case in ops if not case.op.startswith("conv")]),
        *map(_quick, second),
        *(_dear(case, name) for name in DEAR for case in frozen),
        *(_dear(case, "compile-max-autotune") for case in first + second),
        *(_dear(case, "compile") for case in cases.LOSS_CASES),
        *map(_quick, others),
        *(_dear(case, "compile") for case in ops),
        *(_dear(case, name) for name in DEAR for case in others),
    ]
    return [job for job in jobs if job.providers]


def _unfrozen(networks: Sequence[NetCase]) -> list[NetCase]:
    """Without ``fastunet.freeze`` a frozen network is nothing but inference."""
    return [case for case in networks if case.mode != "frozen" or hasattr(fastunet, "freeze")]


def _quick(case: AnyCase) -> Job:
    return Job(case, tuple(provider.name for provider in peers.serving(case) if provider.name not in DEAR))


def _dear(case: AnyCase, name: str) -> Job:
    names = [provider.name for provider in peers.serving(case)]
    if name not in names:
        return Job(case, ())
    ours = "fastunet" if "fastunet" in names else "fastunet-triton"
    graph = ("fastunet-graph",) if PROVIDERS[name].compiled == "reduce-overhead" else ()
    return Job(case, (names[0], ours, *graph, name))


def available(jobs: Sequence[Job], device: torch.device) -> tuple[list[Job], dict[str, str]]:
    """The jobs with the providers that can run here, and why the others cannot."""
    reasons = {name: peers.unavailable(provider, device) for name, provider in PROVIDERS.items()}
    if device.type == "cpu":
        reasons["fastunet-triton"] = "the interpreter is checked and not timed"
    kept = [
        Job(job.case, tuple(name for name in job.providers if reasons[name] is None))
        for job in jobs
        if not any(reasons[name] for name in job.providers if name in DEAR)  # the others have a job of their own
    ]
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


# ---- measuring, in a process of its own --------------------------------------------------------------------------


def look(order: tuple[str, bool]) -> Iterator[Message]:
    """The machine, and its roofs if they are wanted."""
    device = torch.device(order[0])
    yield "machine", machine(device)
    if order[1]:
        yield "roofs", roofs(device)


@dataclass(frozen=True)
class TimingOrder:
    """What a measuring process is to do."""

    device: str
    jobs: tuple[Job, ...]
    deadline: float  # seconds since the epoch
    expected: dict[tuple[str, str], float] = field(default_factory=dict)

    def seconds(self, job: Job, name: str) -> float:
        """What preparing provider ``name`` is expected to take."""
        return self.expected[job.case.kind, name]


def work(order: TimingOrder) -> Iterator[Message]:
    """Do it, telling how it goes: (what, value), as :class:`Run` reads them."""
    device = torch.device(order.device)
    torch.backends.cudnn.benchmark = True  # the peers' convolutions take the fastest algorithm
    for number, job in enumerate(order.jobs):
        yield "job", number
        yield from _measure(order, job, device)


def _measure(order: TimingOrder, job: Job, device: torch.device) -> Iterator[Message]:
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
                yield "row", _row(job.case, name, failure=f"no truth: {describe(error)}")
            give_up_if_poisoned(device)
            return
        for name in names:
            if time.time() + order.seconds(job, name) >= order.deadline:
                continue
            yield "provider", name
            try:
                steps[name], rows[name] = _prepared(PROVIDERS[name], job.case, problem, device)
            except Exception as error:
                yield "row", _row(job.case, name, failure=describe(error))
                give_up_if_poisoned(device)
        yield "provider", None
        try:
            times = interleaved(steps, device, TIMED[job.case.kind], head_start=job.case.kind != "net") if steps else {}
        except Exception as error:
            for name in rows:
                yield "row", _row(job.case, name, failure=f"timing: {describe(error)}")
            give_up_if_poisoned(device)
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
    wrong = None
    try:
        errors = problem.check(results, peers.compared(provider, case))
    except peers.WrongNumbersError as error:
        if case.kind != "net":
            raise
        errors, wrong = problem.errors(results), str(error)  # a step is timed all the same, and its row says so
    layouts = _layouts(results)
    shift = problem.shift(results) if case.kind == "op" and peers.compared(provider, case) != 0 else None
    del results
    for _ in range(2):
        step()
    found: dict[str, Any] = {
        "error": errors,
        "shift": shift,
        "idle": case.kind == "net",  # the GPU is, when a step begins
        "wrong": wrong,
        "layouts": layouts,
        "peak_bytes": memory.peak(step, provider.memory),
    }
    return step, _row(case, provider.name, seconds=time.perf_counter() - begun, **found)


def _row(case: AnyCase, provider: str, failure: str | None = None, **found: Any) -> dict[str, Any]:
    given = {f.name: getattr(case, f.name) for f in fields(case)}
    spec = {name: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for name, x in given.items()}
    about = {"case": case.name, "kind": case.kind, "provider": provider, "spec": spec}
    return {**about, "group": None, "ms": None, "flops": case.flops, "bytes": case.bytes, "failure": failure, **found}


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


# ---- the parent --------------------------------------------------------------------------------------------------


@dataclass
class _Watch:
    """How far a measuring process has come, and for how long it may be silent now."""

    order: TimingOrder
    number: int | None = None  # of the job
    provider: str | None = None  # who is being prepared
    done: set[str] = field(default_factory=set)  # who has a row of the job

    def see(self, what: str, value: Any) -> None:
        if what == "job":
            self.number, self.provider, self.done = value, None, set()
        elif what == "provider":
            self.provider = value
        elif what == "row":
            self.done.add(value["provider"])

    def patience(self) -> tuple[float, str]:
        seconds = float(PATIENCE)
        if self.number is not None and self.provider is not None:
            seconds += 4 * self.order.seconds(self.order.jobs[self.number], self.provider)
        left = self.order.deadline + GRACE - time.time()
        return min(left, seconds), IN_TIME if left <= seconds else f"for {seconds:.0f} s"

    def rest(self, error: LostError) -> Generator[Message, None, TimingOrder | None]:
        """The rows that a lost process costs, and then what is left to do, without the culprit."""
        if self.number is None:  # it will not begin next time either
            yield "lost", str(error)
            return None
        job, later = self.order.jobs[self.number], self.order.jobs[self.number + 1 :]
        failed, again = _after(job, self.done, self.provider)
        for name in failed:
            yield "row", _row(job.case, name, failure=str(error))
        self.order, self.number = replace(self.order, jobs=(Job(job.case, again), *later)), None
        return _worth_it(self.order)


def isolated(order: TimingOrder) -> Iterator[Message]:
    """:func:`work` in a process of its own, begun anew without the culprit when it dies, and ended when it hangs."""
    watch = _Watch(order)
    with contextlib.closing(outliving(work, _worth_it(order), watch.patience, watch.rest)) as stream:
        for what, value in stream:
            watch.see(what, value)
            yield what, value


def _worth_it(order: TimingOrder) -> TimingOrder | None:
    """The order, if anything of it can be done."""
    return order if any(job.providers for job in order.jobs) and time.time() <= order.deadline else None


def _after(job: Job, done: set[str], provider: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who failed when a process ended, and who is to be tried again, of those of ``job`` who have no row.

    The culprit is ``provider``, who was being prepared, whether or not its row came through; with None all of them.
    """
    left = tuple(name for name in job.providers if name not in done)
    failed = tuple(name for name in left if provider in (None, name))
    return failed, tuple(name for name in left if name not in failed)


class RowFile:
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
    return traffic.account(traffic.run(case, package, architecture), traffic.made).bytes


class Run:
    """One run of the suite, a method a stage: it prints how it goes, writes rows, and remembers what failed."""

    def __init__(self, device: torch.device, folder: Path, budget: float, begun: float) -> None:
        self.device, self.folder, self.budget, self.begun = device, folder, budget, begun
        self.deadline = begun + budget - GRACE  # nothing is begun after it
        self.about: dict[str, Any] = {"roofs": None}
        self.red: list[str] | None = None  # the operations that are wrong; None: not checked
        self.failed: dict[str, list[str]] = {}  # by the command that repeats it
        self.file: RowFile | None = None

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.begun:4.0f} s] {text}", flush=True)

    def fail(self, name: str, text: str, command: str = "python -m benchmarks.suite --only {}") -> None:
        """Remember that ``text`` went wrong with the case ``name``."""
        found = self.failed.setdefault(command.format(name), [])
        if text not in found:
            found.append(text)

    def until(self, stage: str, begun: float | None = None) -> float:
        """When a stage that begins now, or then, is over."""
        share, most = SHARES[stage]
        return min((begun or time.time()) + min(share * self.budget, most), self.deadline)

    def look(self, with_roofs: bool = True) -> bool:
        """The machine, and its roofs; False where there is none to measure on."""
        limit = self.until("roofs")
        try:
            with contextlib.closing(messages(look, (self.device.type, with_roofs), _before(limit))) as stream:
                for what, value in stream:
                    if what == "machine":
                        print(report.machine_text(value), flush=True)
                        self.file, self.about = RowFile(self.folder, value["gpu"]), {**value, **self.about}
                    else:
                        self.about["roofs"] = value
                        self.say("roofs: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in value.items()))
        except LostError as error:
            self.say(f"the machine: {error}")
            self.fail("", f"the machine and its roofs: {error}", "nvidia-smi")
        return self.file is not None

    @contextlib.contextmanager
    def compiling_networks(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Inside, torch.compile fills its cache; at the end of the block it is waited for."""
        compiled = tuple(dict.fromkeys(job.case for job in jobs if "compile" in job.providers))
        chosen = tuple(case for case in compiled if case in (*nets.HEADLINE, *nets.SMALL_CASES))
        limit = self.until("networks", self.begun)
        if not chosen:
            yield
            return
        stream = messages(ahead.networks, ahead.CompileOrder(chosen, limit, device=self.device.type), _before(limit))
        with contextlib.closing(stream):
            yield
            try:
                for what, (name, value) in stream:
                    self.say(f"torch.compile ahead: {name}: {f'{value:.0f} s' if what == 'ready' else value}")
            except LostError as error:  # it is compiled where it is timed
                self.say(f"torch.compile ahead: {error}")

    def compile_kernels(self, jobs: Sequence[Job]) -> None:
        """Triton's kernels and launchers into its cache."""
        limit = self.until("kernels")
        chosen = tuple(dict.fromkeys(job.case for job in jobs))
        try:
            order = ahead.CompileOrder(chosen, limit, device=self.device.type)
            with contextlib.closing(messages(ahead.kernels, order, _before(limit + GRACE))) as stream:
                for what, value in stream:
                    if what == "failed":
                        self.say(f"WRONG does not compile: {': '.join(value)}")
                        self.fail(value[0], f"does not compile: {value[1]}")
                    else:
                        self.say("compiled ahead: {} of {} kernels".format(*value))
        except LostError as error:  # they are compiled where they are used
            self.say(f"compiling ahead: {error}")

    def check(self, jobs: Sequence[Job]) -> None:
        """Every operation, small: Triton's kernels first, and for a while what is left; which of them are wrong."""
        wanted = checks.checks([job.case for job in jobs], self.device)
        first = tuple(check for check in wanted if check.provider == wanted[0].provider)
        orders = [(checks.CheckOrder(self.device.type, first, networks=False), self.until("checks"))]
        orders.append((checks.CheckOrder(self.device.type, wanted[len(first) :]), self.until("extras", self.begun)))
        self.red, done = [], 0
        for verdict in itertools.chain.from_iterable(itertools.starmap(checks.verdicts, orders)):
            print(verdict, flush=True)
            done += verdict.provider != checks.VERIFY
            if verdict.problem is None:
                continue
            text = f"{verdict.provider}: {verdict.problem}"
            if verdict.provider == checks.VERIFY:
                self.fail("", f"{verdict.name}: {text}", "python -m fastunet verify --backend torch")
            else:
                self.fail(verdict.name, text)
                self.red += [verdict.name] * (verdict.name not in self.red)
        self.say(f"checked {done} of {len(wanted)} operations, {len(self.red)} wrong")

    def measure(self, jobs: Sequence[Job], expected: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
        """Time the jobs; the rows, which are in the file."""
        assert self.file is not None
        order = TimingOrder(self.device.type, tuple(jobs), self.deadline, expected)
        for what, value in isolated(order):
            if what == "doing":
                self.say(value)
            elif what == "lost":
                self.say(f"nothing is timed: {value}")
                self.fail(order.jobs[0].case.name, f"nothing is timed: {value}")
            elif what == "row":
                with contextlib.suppress(Exception):  # what the ledger cannot say must not cost the row
                    value |= _traffic(value, self.about["capability"])
                value |= {"red": self.red} if value["kind"] == "net" else {}
                print(report.line(self.file.add(value, self.about)), flush=True)
                failure = value["failure"] or value.get("wrong")
                if failure not in (None, LATE):
                    self.fail(value["case"], f"{value['provider']}: {failure}")
        return self.file.added

    def conclude(self) -> int:
        """Print what failed and how to repeat it; the exit status."""
        for command, texts in self.failed.items():
            for text in texts:
                print(f"FAILED {text}")
            print(f"       {command}")
        return 1 if self.failed else 0


def _before(limit: float) -> Any:
    """The patience of who may be silent until then."""
    return lambda: (limit - time.time(), "in time")


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
    # Networks through the interpreter take minutes: `fastunet verify` does that, and fastunet-torch is checked here.
    # Of operations "fastunet" is fastunet-triton here.
    left_out = {"net": ("fastunet", "fastunet-triton"), "op": ("fastunet",), "loss": ()}
    pairs = [(_tiny(job.case), name) for job in jobs for name in job.providers if not reasons[name]]
    small = dict.fromkeys((case, name) for case, name in pairs if name not in left_out[case.kind])
    wrong = 0
    posed: dict[AnyCase, peers.Problem] = {}
    for case, name in tqdm(small, desc="checking", disable=None, leave=False):
        provider = PROVIDERS[name]
        if provider.compiled:
            provider = replace(provider, compiled="trace")
        try:
            if case not in posed:
                posed = {case: peers.pose(case, device)}
            peers.checked(provider, case, posed[case])
        except Exception as error:
            wrong += 1
            print(f"WRONG {name}: {case.name}: {describe(error)}")
    for name, why in reasons.items():
        if why:
            print(f"not checked here: {name}: {why}")
    print(f"{len(jobs)} jobs, {total:.0f} s expected; {len(small)} small ones checked, {wrong} wrong")
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
    run = Run(device, options.results, options.budget, begun)
    if not run.look():
        return run.conclude()
    with run.compiling_networks(jobs):
        run.compile_kernels(jobs)
        run.check(jobs)
    rows = run.measure(jobs, expected)
    measured = {(row["case"], row["provider"]) for row in rows}
    missed: dict[str, dict[str, None]] = {}
    for job in jobs:
        for name in job.providers:
            if (job.case.name, name) not in measured:
                missed.setdefault(job.case.name, {})[name] = None
    for case, names in missed.items():
        print(f"not measured: {case}: {', '.join(names)}")
    print(report.table(rows))
    print(f"{len(rows)} rows in {time.time() - begun:.0f} s, {len(missed)} cases not complete")
    return run.conclude()


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
    run = Run(device, options.results, max(options.budget, 600), time.time())
    rows = run.measure([Job(rebuilt(old), (old["provider"],))], expected) if run.look(with_roofs=False) else []
    print(report.table([old, *rows], every=True))
    return run.conclude()


if __name__ == "__main__":
    sys.exit(main())
