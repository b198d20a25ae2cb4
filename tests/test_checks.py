"""What the suite does before it times: compile ahead, and check every operation; neither ends it, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch
from processes import python

from benchmarks import ahead, cases, checks, isolation, peers
from benchmarks.cases import Case, Operands
from benchmarks.checks import Check, CheckOrder, Verdict
from fastunet import aten, verify

CPU = torch.device("cpu")
TINY_POOL = replace(cases.SMALL_CASES[3], shape=(1, 4, 8, 8))


@pytest.fixture
def in_this_process(monkeypatch):
    """So that what a test plants is there."""
    monkeypatch.setattr(isolation, "messages", lambda work, order, patience: work(order))


def plant(monkeypatch, module, name: str) -> None:
    """Make ``module.name`` err by one percent."""
    sound = getattr(module, name)

    def wrong(*args):
        results = sound(*args)
        return results * 1.01 if isinstance(results, torch.Tensor) else tuple(y * 1.01 for y in results)

    monkeypatch.setattr(module, name, wrong)


def order(*chosen: Case, networks: bool = False) -> CheckOrder:
    return CheckOrder("cpu", checks.checks(chosen, CPU), networks)


def found(order: CheckOrder) -> list[Verdict]:
    return list(checks.verdicts(order, time.time() + 300))


def wrong(*chosen: Case, networks: bool = False) -> list[Verdict]:
    return [verdict for verdict in found(order(*chosen, networks=networks)) if verdict.problem is not None]


# ---- wrong numbers -----------------------------------------------------------------------------------------------


def test_sound_kernels_pass(in_this_process):
    assert wrong(TINY_POOL) == []
    (first, *_) = found(order(TINY_POOL))
    assert re.fullmatch(r"ok    fastunet-\w+: max_pool2x2-\S+: forward \S+, gradient \S+", str(first))


@pytest.mark.parametrize("op", [case.op for case in cases.SMALL_CASES if case.mode == "inference"])
def test_operations_without_a_backward_are_checked(op, in_this_process, monkeypatch):
    monkeypatch.setattr(peers, "triton_unavailable", lambda *args: "checked by tests of its own")
    small = [replace(case, shape=(2, min(case.shape[1], 4), 8, 8)) for case in cases.CASES if case.op == op]
    assert small
    assert len(found(order(*small))) == len(dict.fromkeys(map(checks.small_picture, small)))
    assert wrong(*small) == []


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_numbers_only_in_backward_are_red(backend, monkeypatch, in_this_process):
    module = aten if backend == "torch" else pytest.importorskip("fastunet.kernels")
    plant(monkeypatch, module, "max_pool2x2_backward")
    (verdict,) = wrong(TINY_POOL)
    assert (verdict.provider, verdict.name) == (f"fastunet-{backend}", TINY_POOL.name)
    assert verdict.problem is not None
    assert "gradient: relative error 1.0e-02" in verdict.problem


@pytest.mark.parametrize(("wrong_at", "which"), [(3, "second"), (4, "third, replayed")])
def test_a_race_is_red(wrong_at, which, monkeypatch, in_this_process):
    kernels = pytest.importorskip("fastunet.kernels")
    sound, calls = kernels.max_pool2x2, []

    def racing(*args):
        calls.append(None)
        return sound(*args) + 1e-6 * (len(calls) == wrong_at)  # no more than is allowed

    monkeypatch.setattr(kernels, "max_pool2x2", racing)
    (verdict,) = wrong(TINY_POOL)
    assert verdict.problem == f"a {which} run gave other numbers"


def test_networks_of_verify_are_checked_last_and_never_end_it(monkeypatch, in_this_process):
    def networks(*args, **settings):
        yield verify.Row("UNet", "2×3", "float64", "backward", float("nan"), 1e-6)
        raise RuntimeError("no luck")

    monkeypatch.setattr(verify, "networks", networks)
    *_, first, second = found(order(TINY_POOL, networks=True))
    assert str(first).startswith("WRONG verify: UNet 2×3 float64 backward: relative error nan")
    assert second == Verdict("the networks", checks.VERIFY, "RuntimeError: no luck")


def test_every_operation_is_checked_with_what_matters_first():
    chosen = checks.checks([*cases.unet_layers(), *cases.CASES], CPU)
    triton = [check.case for check in chosen if check.provider == "fastunet-triton"]
    assert {case.op for case in triton} == {case.op for case in cases.CASES}
    assert triton[0].op == "conv2d"
    late = [case.dtype != torch.bfloat16 for case in triton]
    assert late == sorted(late)
    names = {case.name for case in [*cases.unet_layers(), *cases.CASES]}
    assert {check.name for check in chosen} <= names, "--only finds what is named"


# ---- a process of its own ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrashingCase(Case):
    """It ends the process, as a sticky CUDA error does."""

    def operands(self, device: str | torch.device) -> Operands:
        os._exit(7)


@dataclass(frozen=True)
class HangingCase(Case):
    """It never comes to an end, as a kernel in a dead lock."""

    def operands(self, device: str | torch.device) -> Operands:
        time.sleep(1e6)
        raise AssertionError


def test_a_crash_and_a_hang_cost_one_case_each(monkeypatch):
    crashing, hanging = (build(**vars(TINY_POOL)) for build in (CrashingCase, HangingCase))
    chosen = {"crash": crashing, "sound": TINY_POOL, "hang": hanging, "last": TINY_POOL}
    todo = CheckOrder(
        "cpu", tuple(Check(name, case, "fastunet-torch") for name, case in chosen.items()), networks=False
    )
    problems = {}
    for verdict in checks.verdicts(todo, time.time() + 300):
        problems[verdict.name] = verdict.problem
        if verdict.name == "sound":  # patience with the one that hangs alone
            monkeypatch.setattr(checks, "PATIENCE", 1)
        else:
            monkeypatch.undo()
    assert problems == {
        "crash": "the process ended with status 7",
        "sound": None,
        "hang": "did not answer for 1 s",
        "last": None,
    }


def test_checks_end_at_the_deadline():
    todo = CheckOrder("cpu", (Check("hang", HangingCase(**vars(TINY_POOL)), "fastunet-torch"),), networks=False)
    begun = time.time()
    assert list(checks.verdicts(todo, begun + 1)) == [], "who was just late is not wrong"
    assert time.time() < begun + 60


def test_a_process_that_cannot_begin_is_not_begun_again():
    (verdict,) = checks.verdicts(replace(order(TINY_POOL), device="no device"), time.time() + 300)
    assert verdict.problem is not None
    assert verdict.problem.startswith("not begun: the process ended with status 1")


def forever(order: object):
    while True:
        yield "pid", os.getpid()
        time.sleep(0.01)


def test_who_closes_a_stream_ends_its_process():
    stream = isolation.messages(forever, None, lambda: (60.0, "for 60 s"))
    _, pid = next(stream)
    stream.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    isolation.messages(forever, None, lambda: (60.0, "for 60 s")).close()  # before it has said anything


# ---- compiling ahead ---------------------------------------------------------------------------------------------


def test_kernels_are_compiled_ahead(tmp_path):
    pytest.importorskip("triton")
    code = (
        "import time\n"
        "from benchmarks import ahead, cases\n"
        "chosen = tuple(case for case in cases.CASES if case.op == 'max_pool2x2')[2:]\n"
        "((what, (good, all_)),) = ahead.kernels(ahead.CompileOrder(chosen, time.time() + 300, 'sm_90'))\n"
        "print(good if good == all_ else None)"
    )
    done = python("-c", code, TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.cubin"))) == int(done.stdout) > 0


AUTOCAST = """
import fastunet
from benchmarks import ahead, nets, traffic
case = nets.NetCase("unet-bilinear", 4, 32, 2, "bf16")
nets.HEADLINE[:] = [case]
norms = set()
for backend in ("auto", "triton"):
    for call in traffic.run(case, fastunet, "sm_90", backend=backend).calls:
        norms |= {x.dtype for x in call.tensors if call.name.startswith("fastunet.bn") and x is not None}
names = {one.name for one in ahead.specialisations([case], "sm_90").values()}
print(norms, "_conv3x3_fwd_kernel" in names)
"""


def test_what_is_compiled_ahead_runs_under_autocast():
    pytest.importorskip("triton")
    done = python("-c", AUTOCAST, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{torch.float32} True", "batch norms stay in float32"


def test_a_compiler_that_dies_costs_its_own_kernel(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def refused() -> None:
        raise ValueError("no such\ntile")

    tasks = [bool, killed, refused, bool, killed, bool]
    done = {number: failure for number, _, failure in isolation.on_all_cores(tasks, time.time() + 60)}
    dead = "the process ended with status -9"
    assert done == {0: None, 1: dead, 2: "ValueError: no such tile", 3: None, 4: dead, 5: None}


def test_a_compiler_that_is_late_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def late() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(1e6)

    begun = time.time()
    done = isolation.on_all_cores([late, bool, lambda: 7], begun + 2)
    assert sorted(done) == [(1, False, None), (2, 7, None)]
    assert time.time() < begun + 30
    pid = int((tmp_path / "pid").read_text())
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_networks_are_compiled_ahead_and_a_failure_is_told(monkeypatch):
    case = replace(ahead.nets.SMALL_CASES[0], base=4, size=32)
    compiled = []
    monkeypatch.setattr(peers, "once", lambda provider, case, device: compiled.append((provider.name, case)))
    wanted = ahead.CompileOrder((case,), time.time(), device="cpu")
    ((what, (name, _)),) = ahead.networks(wanted)
    assert (what, name, compiled) == ("ready", case.name, [("compile", case)])
    monkeypatch.setattr(peers, "once", lambda *args: {}["no luck"])
    assert list(ahead.networks(wanted)) == [("failed", (case.name, "KeyError: 'no luck'"))]
