"""Every operation, small, against float64, before anything is timed: each forward and backward, and three times.

The work of a process of its own; one that crashes or hangs costs the operation that it was checking, and the next
process goes on behind it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.isolation import LostError, Message, describe, give_up_if_poisoned, outliving
from benchmarks.measure import precision
from benchmarks.peers import PROVIDERS, AnyCase
from fastunet import verify

PATIENCE = 45  # seconds an operation may take, compiling too
VERIFY = "verify"  # the networks of ``fastunet verify``


@dataclass(frozen=True)
class Check:
    """One operation by one provider: a small picture, and the name of the case that it stands for."""

    name: str
    case: Case
    provider: str


@dataclass(frozen=True)
class Verdict:
    """What was found; ``problem`` is None where all is well."""

    name: str  # of the case, for ``--only``
    provider: str
    problem: str | None
    errors: dict[str, float] | None = None

    def __str__(self) -> str:
        errors = ", ".join(f"{part} {error:.1e}" for part, error in (self.errors or {}).items())
        return f"{'WRONG' if self.problem else 'ok   '} {self.provider}: {self.name}: {self.problem or errors}"


@dataclass(frozen=True)
class CheckOrder:
    """What a checking process is to do."""

    device: str
    checks: tuple[Check, ...]
    networks: bool = True  # those of ``fastunet verify`` at the end


def small_picture(case: Case) -> Case:
    """The same kernels in every direction; 24 × 40 has whole tiles and parts of tiles."""
    mode: Literal["inference", "training"] = "training"
    if not case.differentiable or (case.mode == "inference" and not case.stats):
        mode = "inference"
    height, width = (min(size, most) for size, most in zip(case.shape[2:], (24, 40), strict=True))
    return replace(case, shape=(min(case.shape[0], 2), case.shape[1], height, width), mode=mode)


def checks(chosen: Sequence[AnyCase], device: torch.device) -> tuple[Check, ...]:
    """What is checked of ``chosen``: Triton's kernels before ATen's, bfloat16 and convolutions first."""
    named: dict[Case, str] = {}
    for case in chosen:
        if isinstance(case, Case):
            named.setdefault(small_picture(case), case.name)
    ordered = sorted(named, key=lambda case: (case.dtype != torch.bfloat16, not case.op.startswith("conv")))
    providers = [PROVIDERS[name] for name in ("fastunet-triton", "fastunet-torch")]
    here = [provider.name for provider in providers if peers.unavailable(provider, device) is None]
    return tuple(Check(named[case], case, provider) for provider in here for case in ordered)


def work(order: CheckOrder) -> Iterator[Message]:
    """Check, telling before each its number, and after each its verdict."""
    device = torch.device(order.device)
    for number, check in enumerate(order.checks):
        yield "checking", number
        errors, problem = _checked(check, device)
        yield "verdict", Verdict(check.name, check.provider, problem, errors)
        if problem:
            give_up_if_poisoned(device)
    if order.networks:
        yield "checking", len(order.checks)
        yield from (("verdict", verdict) for verdict in _verified(device))


def _checked(check: Check, device: torch.device) -> tuple[dict[str, float] | None, str | None]:
    try:
        problem = peers.pose(check.case, device)
        step = peers.prepare(PROVIDERS[check.provider], check.case, problem)
        first = [result.clone() for result in step()]
        errors = problem.check(first, None)
        later = {"second": [result.clone() for result in step()], "third, replayed": step()}
    except Exception as error:
        return None, describe(error)
    # Kernels add up in a fixed order: a difference is a race. cuDNN's need not.
    ordered = check.provider == "fastunet-triton" and check.case.algorithm != "cudnn"
    for which, again in later.items() if ordered else ():
        if not all(map(torch.equal, first, again)):
            return errors, f"a {which} run gave other numbers"
    return errors, None


def _verified(device: torch.device) -> Iterator[Verdict]:
    try:
        with precision("fp32"):
            for row in verify.networks(device, "torch", quick=True):
                problem = None if row.passed else f"relative error {row.error:.1e}, allowed {row.allowed:.1e}"
                yield Verdict(f"{row.name} {row.shape} {row.dtype} {row.part}", VERIFY, problem, {"": row.error})
    except Exception as error:
        yield Verdict("the networks", VERIFY, describe(error))


def verdicts(order: CheckOrder, deadline: float) -> Iterator[Verdict]:
    """Carry out ``order`` in processes that may die. What is not done at the deadline has no verdict."""
    number: int | None = None  # of what is being checked
    judged = True  # whether it has its verdict

    def patience() -> tuple[float, str]:
        return min(PATIENCE, deadline - time.time()), f"for {PATIENCE} s"

    def rest(error: LostError) -> Generator[Message, None, CheckOrder | None]:
        nonlocal order, number
        if time.time() >= deadline:
            return None
        if number is None:  # it will not begin next time either
            yield "verdict", Verdict("every operation", "", f"not begun: {error}")
            return None
        if number == len(order.checks):
            yield "verdict", Verdict("the networks", VERIFY, str(error))
            return None
        check = order.checks[number]
        if not judged:
            yield "verdict", Verdict(check.name, check.provider, str(error))
        order, number = replace(order, checks=order.checks[number + 1 :]), None
        return order

    with contextlib.closing(outliving(work, order, patience, rest)) as stream:
        for what, value in stream:
            judged = what == "verdict"
            if judged:
                yield value
            else:
                number = value
            if time.time() > deadline:
                return
