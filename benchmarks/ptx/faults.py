"""Faults planted in the PTX, one at a time, in places that run: does the interpreter notice?

A fault is noticed if something new is found, if the kernel cannot go on, or if an error becomes too large. One that
goes unnoticed is *harmless* if no bit of any result changes, and, of one that takes an ordering away, if none does in
other orders either: with each warp as far as it comes, from the first on and from the last. (What is asynchronous
arrives as late as it may in any case, and the asynchronous proxy sees nothing that no fence shows it.) All others
count. Many of Triton's barriers stand where another one has just been passed.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.ptx.machine import FIRST_WARP, LAST_WARP
from benchmarks.ptx.trials import Prepared, Trial, quick

Match = re.Match[str]


@dataclass(frozen=True)
class FaultKind:
    """A kind of fault: what it changes, and into what."""

    name: str
    pattern: str
    change: Callable[[Match], str]
    orders: bool = False  # whether it takes an ordering away


def _more(by: int) -> Callable[[Match], str]:
    """The match, with the number that is its second group so much larger (0 if there is none)."""
    return lambda match: f"{match[1]}{int(match[2] or 0) + by}{match[3]}"


def _to(template: str) -> Callable[[Match], str]:
    """The match by a template."""
    return lambda match: match.expand(template)


FAULT_KINDS = [
    FaultKind("bar.sync removed", r"bar\.sync \t0;", _to("//"), True),
    FaultKind("cp.async.wait_group one later", r"(cp\.async\.wait_group\s+)(\d+)(;)", _more(1), True),
    # It may be harmless: two groups that are waited for together may be one.
    FaultKind("cp.async.commit_group removed", r"cp\.async\.commit_group;", _to("//")),
    FaultKind("wgmma.wait_group one later", r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+)(;)", _more(1), True),
    FaultKind("wgmma.commit_group removed", r"wgmma\.commit_group\S*;", _to("//")),
    FaultKind("wgmma.fence removed", r"wgmma\.fence\S*;", _to("//"), True),
    FaultKind("mbarrier wait skipped", r"mbarrier\.try_wait\S* (\w+), .*?;", _to(r"setp.eq.s32 \1, 0, 0;"), True),
    FaultKind("mbarrier wait for the other phase", r"(mbarrier\.try_wait.*?, )%r\d+(;)", _to(r"\g<1>1\2"), True),
    FaultKind("expect_tx of 16 bytes more", r"(arrive\.expect_tx\S* _, \[.*?\], )(\d+)(;)", _more(16), True),
    FaultKind("fence.proxy.async removed", r"fence\.proxy\.async\S*;", _to("//"), True),
    FaultKind("cp.async.bulk.wait_group removed", r"cp\.async\.bulk\.wait_group\S*\s+\d+;", _to("//"), True),
    FaultKind("bulk copy one pixel on", r"(cp\.async\.bulk\.tensor.*?\{%r\d+, )(%r\d+)", _to(r"\1 0")),
    FaultKind("< becomes <=", r"setp\.lt\.([su]\d+)", _to(r"setp.le.\1")),
    FaultKind("> becomes >=", r"setp\.gt\.([su]\d+)", _to(r"setp.ge.\1")),
    FaultKind("store without its mask", r"@%p\d+ (st\.global)", _to(r"\1")),
    FaultKind("load without its mask", r"@%p\d+ (ld\.global)", _to(r"\1")),
    FaultKind("xor of an address becomes or", r"xor\.b32( \t%r\d+, %r\d+, (?:16|32|64|96|112);)", _to(r"or.b32\1")),
    FaultKind("swizzle of a matrix changed", r"\b4611686\d{12}\b", lambda match: str(int(match[0]) ^ 3 << 62)),
    FaultKind("shared load 16 bytes on", r"(ld\.shared\S* \t.*?\[%r\d+\+?)(\d+)?(\])", _more(16)),
    FaultKind("shuffle with another lane", r"(shfl\.sync\.bfly\.b32 \t%r\d+, %r\d+, )(\d+)(,)", _more(1)),
    FaultKind("registers of a product swapped", r"(mma\.sync.*?\}, \{.*?\}, \{ ?)(%r\d+), (%r\d+)", _to(r"\1\3, \2")),
    FaultKind("matrix not transposed", r"(ldmatrix\S*)\.trans", _to(r"\1")),
    FaultKind("matrix transposed", r"(stmatrix\S*x\d)\.shared", _to(r"\1.trans.shared")),
]


@dataclass(frozen=True)
class Fault:
    """One change of one kernel's text."""

    chip: str
    case: int  # of :func:`quick`
    kernel: str
    kind: FaultKind
    text: str
    start: int
    stop: int
    replacement: str

    def plant(self, text: str) -> str:
        """The text with the fault, if it is this kernel's."""
        return text[: self.start] + self.replacement + text[self.stop :] if text == self.text else text

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.start) + 1


@dataclass(frozen=True)
class Outcome:
    """What came of a fault."""

    kind: str
    chip: str
    kernel: str
    line: int
    verdict: str  # one of VERDICTS
    said: str

    def __str__(self) -> str:
        return f"{self.verdict:<10}{self.chip:<7}{self.kernel:<30}{self.kind}, line {self.line}: {self.said}"


ORDERS = (FIRST_WARP, LAST_WARP)
VERDICTS = ("noticed", "UNNOTICED", "harmless")


def run(count: int, chips: Sequence[str], only: str, as_json: bool) -> int:
    """Plant ``count`` faults and print what came of them; the exit status is 1 if fewer than nine of ten that change
    a result or break an ordering were noticed."""
    cases = [(i, case) for i, case in enumerate(quick("bf16")) if only in case.name]
    prepared = {i: Prepared(case, "bf16") for i, case in cases}
    sound = {(chip, i): one.run(chip) for chip in chips for i, one in prepared.items()}
    if unsound := [trial.case.name for trial in sound.values() if not trial.passed]:
        raise RuntimeError(f"expected cases that pass before faults are planted, got {', '.join(unsound)}")
    outcomes = []
    for fault in _choose(list(_faults(sound)), count):
        trial = prepared[fault.case].run(fault.chip, fault.plant)
        again: list[Callable[[], Trial]] = [
            functools.partial(prepared[fault.case].run, fault.chip, fault.plant, order)
            for order in ORDERS
            if fault.kind.orders
        ]
        outcomes.append(_judge(fault, trial, sound[fault.chip, fault.case], again))
        if not as_json:
            print(outcomes[-1], flush=True)
    noticed = sum(outcome.verdict == "noticed" for outcome in outcomes)
    matter = sum(outcome.verdict != "harmless" for outcome in outcomes)
    if as_json:
        json.dump([asdict(outcome) for outcome in outcomes], sys.stdout)
    else:
        print(f"\n{'fault':<40}{'noticed':>8}{'unnoticed':>10}{'harmless':>9}")
        counts = Counter((outcome.kind, outcome.verdict) for outcome in outcomes)
        for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
            print(f"{kind:<40}" + "{:>8}{:>10}{:>9}".format(*(counts[kind, verdict] for verdict in VERDICTS)))
        print(f"\n{noticed} noticed of {matter} that change a result or break an ordering; {len(outcomes)} planted")
    return 0 if matter and noticed >= 0.9 * matter else 1


def _faults(sound: dict[tuple[str, int], Trial]) -> Iterator[Fault]:
    """Every fault that can be planted where something ran; each kernel in the first case that launches it."""
    seen: set[tuple[str, str]] = set()
    for (chip, case), trial in sound.items():
        for compiled in trial.kernels:
            program = compiled.machine.program
            if (chip, program.name) in seen:
                continue
            seen.add((chip, program.name))
            ran = compiled.machine.ran
            for kind in FAULT_KINDS:
                for match in re.finditer(kind.pattern, compiled.text):
                    fault = Fault(
                        chip, case, program.name, kind, compiled.text, match.start(), match.end(), kind.change(match)
                    )
                    if fault.line in ran:
                        yield fault


def _choose(faults: list[Fault], count: int) -> list[Fault]:
    """So many of them: of each kind about as many, and of a kind as many kernels and lines as there are."""
    groups: dict[str, dict[tuple[str, str], list[Fault]]] = defaultdict(lambda: defaultdict(list))
    for fault in faults:
        groups[fault.kind.name][fault.chip, fault.kernel].append(fault)
    queues = [_spread(list(kernels.values())) for kernels in groups.values()]
    chosen: list[Fault] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return sorted(chosen, key=lambda fault: [kind.name for kind in FAULT_KINDS].index(fault.kind.name))


def _spread(groups: list[list[Fault]]) -> list[Fault]:
    """One of each group in turn; of a group first the middle, then the quarters, and so on."""
    orders = [sorted(group, key=lambda f: _bisected(group.index(f), len(group))) for group in groups]
    return [order[i] for i in range(max(map(len, orders))) for order in orders if i < len(order)]


def _bisected(index: int, length: int) -> tuple[int, int]:
    low, high, depth = 0, length, 0
    while True:
        middle = (low + high) // 2
        if index == middle:
            return depth, index
        low, high = (low, middle) if index < middle else (middle + 1, high)
        depth += 1


def _judge(fault: Fault, trial: Trial, sound: Trial, again: list[Callable[[], Trial]]) -> Outcome:
    """``again`` are runs in other orders, of a fault that changes nothing in this one."""
    said = [finding.what for finding in trial.findings[:1]]
    if trial.stopped and not said:
        said.append(trial.stopped)
    said += [f"{error.result} errs {error.times:.1f} times as much as PyTorch" for error in trial.errs[:1]]
    verdict = "noticed"
    if not said:
        changed = any(results != sound.results for results in [trial.results, *(run().results for run in again)])
        verdict = "UNNOTICED" if changed else "harmless"
        said.append("results change" if changed else f"no bit changes{' in any order of warps' if again else ''}")
    return Outcome(fault.kind.name, fault.chip, fault.kernel, fault.line, verdict, "; ".join(said))
