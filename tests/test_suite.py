"""The GPU suite, on a CPU with small cases: it refuses wrong numbers, records every row, and always comes to an end."""

from __future__ import annotations

import gc
import json
import os
import re
import time
import weakref
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from processes import ROOT, python
from test_checks import plant
from torch import nn

from benchmarks import ahead, cases, engines, isolation, nets, peers, report, suite, traffic
from benchmarks.measure import Times, interleaved, machine
from benchmarks.nets import NetCase
from benchmarks.suite import Job, TimingOrder
from fastunet import aten, reference, verify

CPU = torch.device("cpu")
TINY_NET = NetCase(base=4, size=32, batch=2, dtype="fp32")
TINY_LOSS = replace(cases.SMALL_LOSS_CASES[0], shape=(2, 4, 8, 8))
TINY_POOL = replace(cases.SMALL_CASES[3], shape=(1, 4, 8, 8))
NO_COST = {(kind, name): 0.0 for kind in suite.EXPECTED for name in peers.PROVIDERS}


def order(*jobs: Job, seconds: float = 300) -> TimingOrder:
    return TimingOrder("cpu", jobs, time.time() + seconds, NO_COST)


def rows_of(*jobs: Job, seconds: float = 300) -> dict[str, dict]:
    return {value["provider"]: value for what, value in suite.work(order(*jobs, seconds=seconds)) if what == "row"}


@pytest.fixture
def in_this_process(monkeypatch):
    """So that what a test plants is there; `fastunet verify` has tests of its own."""
    for module in (suite, isolation):
        monkeypatch.setattr(module, "messages", lambda work, order, patience: work(order))
    monkeypatch.setattr(verify, "networks", lambda *args, **settings: iter(()))


# ---- wrong numbers -----------------------------------------------------------------------------------------------


def test_a_wrong_operation_stops_nothing_and_is_named_in_rows(monkeypatch, in_this_process, tmp_path, capsys):
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    plant(monkeypatch, aten, "max_pool2x2_backward")
    jobs = [Job(TINY_NET, ("eager",)), Job(TINY_POOL, ("eager", "fastunet-torch"))]
    monkeypatch.setattr(suite, "plan", lambda device: jobs)
    assert suite.main(["--device", "cpu", "--results", str(tmp_path)]) == 1
    network, ours, eager = report.read(tmp_path)
    assert network["red"] == [TINY_POOL.name]
    assert network["ms"]["p50"] > 0
    assert eager["ms"]["p50"] > 0
    assert ours["failure"].startswith("WrongNumbersError: gradient: relative error 1.0e-02")
    *_, failed, command = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED fastunet-torch: WrongNumbersError: gradient: relative error 1.0e-02")
    assert command.strip() == f"python -m benchmarks.suite --only {TINY_POOL.name}"


def test_what_crashes_or_is_late_stops_nothing(monkeypatch, in_this_process, tmp_path, capsys):
    jobs = [Job(TINY_LOSS, ("seed002",)), Job(TINY_NET, ("eager", "compile"))]
    monkeypatch.setattr(suite, "plan", lambda device: jobs)
    monkeypatch.setattr(suite.nets, "SMALL_CASES", [TINY_NET])

    def lost(work, order, patience):
        if work in (ahead.kernels, ahead.networks):
            raise suite.LostError("planted")
            yield
        yield from work(replace(order, jobs=order.jobs[:1]) if work is suite.work else order)

    for module in (suite, isolation):
        monkeypatch.setattr(module, "messages", lost)
    assert suite.main(["--device", "cpu", "--results", str(tmp_path)]) == 0
    assert [row["provider"] for row in report.read(tmp_path)] == ["seed002"]
    printed = capsys.readouterr().out
    assert "compiling ahead: planted" in printed
    assert "torch.compile ahead: planted" in printed


def test_a_provider_with_wrong_numbers_is_not_timed(monkeypatch):
    plant(monkeypatch, aten, "softmax_stats_backward")
    found = rows_of(Job(TINY_LOSS, ("seed002", "fastunet-torch")))
    assert found["fastunet-torch"]["failure"].startswith("WrongNumbersError: gradient")
    assert found["fastunet-torch"]["ms"] is None
    assert found["seed002"]["ms"]["p50"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["unet", "unet-bilinear"])
def test_one_wrong_layer_of_a_network_is_seen(name, dtype):
    case = NetCase(name, base=8, size=48, batch=2, dtype=dtype)
    problem = peers.pose(case, CPU)
    sound = peers.prepare(peers.PROVIDERS["fastunet-torch"], case, problem)()
    problem.check(sound, None)
    for number, parameter in enumerate(problem.names, 1):
        for factor in (1.3, 0.0) if problem.truth[number].dim() == 4 else (0.0,):
            wrong = [y * factor if i == number else y for i, y in enumerate(sound)]
            with pytest.raises(peers.WrongNumbersError, match=f"gradient(: | of {parameter})"):
                problem.check(wrong, None)


def test_a_bias_in_front_of_a_batch_norm_is_judged_by_its_layers_weight():
    case = NetCase("strided", base=8, size=48, batch=2, dtype="bf16")
    problem = peers.pose(case, CPU)
    sound = peers.prepare(peers.PROVIDERS["fastunet-torch"], case, problem)()
    problem.check(sound, None)
    number = 1 + problem.names.index("d1.Conv_BN_ReLU_2.3.bias")
    weight = problem.truth[problem.names.index("d1.Conv_BN_ReLU_2.3.weight") + 1]
    assert problem.truth[number].norm() < 1e-3 * weight.norm(), "zero but for rounding"
    wrong = [y + weight.square().mean().sqrt() if i == number else y for i, y in enumerate(sound)]
    with pytest.raises(peers.WrongNumbersError, match="of d1"):
        problem.check(wrong, None)


def test_a_graph_keeps_what_it_reads_alive(monkeypatch):
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    weights = torch.ones(2)

    def step():
        return [weights]

    alive = weakref.ref(step)
    replay = peers._graphed(step)
    del step
    gc.collect()
    assert alive() is not None
    assert replay()[0].tolist() == [1, 1]


@pytest.mark.parametrize("name", sorted(nets.NETWORKS))
def test_every_network_agrees_with_plain_pytorch_in_every_mode(name):
    for mode in ("training", "inference", "frozen"):
        case = replace(TINY_NET, net=name, mode=mode)
        problem = peers.pose(case, CPU)
        for provider in ("eager", "eager-nchw", "fastunet-torch"):
            problem.check(peers.prepare(peers.PROVIDERS[provider], case, problem)(), None)


@pytest.mark.parametrize("mode", ["inference", "training", "dgrad", "wgrad"])
def test_every_mode_of_an_operation_agrees_with_float64(mode):
    case = replace(cases.SMALL_CASES[1], shape=(2, 4, 6, 8), filters=5, skip=3, mode=mode)
    problem = peers.pose(case, CPU)
    for provider in peers.serving(case):
        if provider.name in ("eager", "eager-bare", "fastunet-torch"):
            found = peers.prepare(provider, case, problem)()
            problem.check(found, peers.compared(provider, case))
    assert len(problem.truth) == {"inference": 3, "training": 8, "dgrad": 4, "wgrad": 1}[mode]


@pytest.mark.parametrize("case", [c for c in cases.SMALL_CASES if c.op in ("head_stats", "softmax_stats")])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("wanted", [(False, True, False), (True, True, True)], ids=str)
def test_plain_statistics_are_those_of_the_operation(case, loss, wanted):
    case = replace(case, shape=(2, 3, 6, 8), filters=4, loss=loss, wanted=wanted, weighted=all(wanted))
    problem = peers.pose(case, CPU)
    eager = peers.PROVIDERS["eager"]
    errors = problem.check(peers.prepare(eager, case, problem)(), peers.compared(eager, case))
    assert errors["forward"] < 1e-6


def test_every_operation_has_a_peer_in_plain_pytorch():
    for case in {case.op: case for case in cases.CASES}.values():
        assert peers.serving(case)[0].name == "eager"


@pytest.mark.parametrize("name", sorted(engines.PACKAGES))
def test_an_engine_that_is_not_installed_says_so(name, monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda package: None)
    reason = peers.unavailable(peers.PROVIDERS[name], torch.device("cuda"))
    assert reason == f"{' and '.join(engines.PACKAGES[name])} cannot be imported"


def test_onnxruntime_agrees_with_plain_pytorch():
    provider = peers.PROVIDERS["onnxruntime"]
    if reason := peers.unavailable(provider, CPU):
        pytest.skip(reason)
    case = replace(TINY_NET, net="unet-bilinear", mode="frozen")
    problem = peers.pose(case, CPU)
    problem.check(peers.prepare(provider, case, problem)(), None)


@pytest.mark.parametrize("package", ["monai", "torchmetrics"])
def test_peers_agree_with_the_seed_formulas(package):
    pytest.importorskip(package, reason=f"compares with {package}, which the tests do not need")
    case = TINY_LOSS if package == "monai" else replace(TINY_LOSS, function="confusion_matrix")
    problem = peers.pose(case, CPU)
    problem.check(peers.prepare(peers.PROVIDERS[package], case, problem)(), None)


def test_a_row_tells_operands_that_are_cut_off_from_rounded_ones():
    x = torch.randn(64, 64)
    problem = peers.Problem(None, [x.double()], 1, (0, 0))
    assert abs(problem.shift([x.bfloat16()])) < 2e-4  # half a rounding is 2e-3
    cut = (x.view(torch.int32) & -65536).view(torch.float32)  # bfloat16, towards zero
    assert -4e-3 < problem.shift([cut]) < -2e-3
    assert peers.Problem(None, [x.long()], 1, (0, 0)).shift([x.long()]) is None


# ---- rows --------------------------------------------------------------------------------------------------------


def test_a_row_says_what_it_depends_on_and_can_be_measured_again(tmp_path, capsys, monkeypatch, in_this_process):
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")  # of "fastunet": here "auto" would be the interpreter
    arguments = ["--device", "cpu", "--results", str(tmp_path)]
    assert suite.main([*arguments, "--only", "soft_miou"]) == 0
    printed = capsys.readouterr().out
    first = report.read(tmp_path)
    assert {row["provider"] for row in first} >= {"seed002", "fastunet-torch"}
    for row in first:
        assert row["failure"] is None
        assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["gbs"] == pytest.approx(row["bytes"] / row["ms"]["p50"] / 1e6)
        assert row["error"].keys() == {"forward", "gradient"}
        assert row["roofs"]["copy_gbs"] > 0
        assert {"commit", "dirty", "sources", "driver", "sm_mhz", "gpu", "time", "peak_bytes"} <= row.keys()
        assert row["versions"]["torch"] == torch.__version__
        assert row["id"] in printed
    assert len({row["id"] for row in first}) == len(first)

    assert suite.main([*arguments, "--row", first[1]["id"]]) == 0
    again = report.read(tmp_path)
    assert len(again) == len(first) + 1
    assert (again[-1]["case"], again[-1]["provider"]) == (first[1]["case"], first[1]["provider"])
    printed = capsys.readouterr().out
    assert first[1]["id"] in printed
    assert again[-1]["id"] in printed
    assert suite.main([*arguments, "--row", "nonsense"]) == 2


@pytest.mark.parametrize("case", [cases.CASES[0], cases.SMALL_CASES[-1], cases.LOSS_CASES[0], nets.CASES[-1]])
def test_a_case_is_rebuilt_from_its_row(case):
    row = json.loads(json.dumps(suite._row(case, "eager")))
    assert suite.rebuilt(row) == case


TRAFFIC = """
import json
from dataclasses import replace
from benchmarks import nets, suite
case = nets.NetCase("unet-bilinear", 4, 32, 2, "fp32", "inference")
nets.HEADLINE[:] = [case]
row = {"ms": {"p50": 2.0}}
rows = {name: suite._row(case, name) | row for name in ("eager", "fastunet", "tensorrt")}
failed, frozen = rows["eager"] | {"ms": None}, suite._row(replace(case, mode="frozen"), "eager") | row
others = [suite._traffic(failed, [9, 0]), suite._traffic(frozen, [9, 0]), suite._traffic(rows["eager"], None)]
print(json.dumps([{name: suite._traffic(row, [9, 0]) for name, row in rows.items()}, others]))
"""


def test_a_network_moves_the_bytes_that_the_ledger_counts():
    pytest.importorskip("triton")
    done = python("-c", TRAFFIC, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    found, others = json.loads(done.stdout)
    case = NetCase("unet-bilinear", 4, 32, 2, "fp32", "inference")
    eager = traffic.account(traffic.run(case, reference), traffic.made).bytes
    assert found["eager"] == {"bytes": eager, "gbs": eager / 2e6}
    assert 0 < found["fastunet"]["bytes"] < eager
    assert found["tensorrt"] == {}
    assert others == [{}, {}, {}]


def test_a_provider_that_fails_is_a_row(monkeypatch):
    prepare = peers.prepare

    def broken(provider, case, problem):
        if provider.name == "eager":
            raise RuntimeError("no\nluck")
        return prepare(provider, case, problem)

    monkeypatch.setattr(peers, "prepare", broken)
    found = rows_of(Job(TINY_POOL, ("eager", "fastunet-torch")))
    assert found["eager"]["failure"] == "RuntimeError: no luck"
    assert found["fastunet-torch"]["failure"] is None


def test_what_does_not_fit_in_the_budget_is_listed(tmp_path, capsys, in_this_process):
    assert suite.main(["--device", "cpu", "--only", "dice_ce", "--budget", "0", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "not measured: dice_ce-2x22x64x64-float32: seed002, fastunet" in printed
    assert "0 rows" in printed


def test_expected_seconds_are_learned():
    rows = [{"kind": "net", "provider": "compile", "failure": None, "seconds": s} for s in (10, 20, 60)]
    rows.append({"kind": "net", "provider": "compile", "failure": "broken", "seconds": 1000})
    expected = suite.expected_seconds(rows)
    assert expected["net", "compile"] == 20
    assert expected["op", "compile"] == suite.EXPECTED["op"]["compile"]


def test_plan_begins_with_what_matters_and_misses_nothing():
    jobs = suite.plan(torch.device("cuda"))
    training, inference = (f"base64-8x512x512-bf16-{mode}" for mode in ("training", "inference"))
    first = ("eager", "fastunet", "compile")
    second = ("eager", "fastunet", "fastunet-graph", "eager-graph", "accelerated", "accelerated-graph")
    assert [(job.case.name, job.providers[: len(second)]) for job in jobs[:6]] == [
        (f"unet-{training}", first),
        (f"unet-{inference}", first),
        (f"unet-{training}", second),
        (f"unet-{inference}", second),
        (f"unet-bilinear-{training}", first),
        (f"unet-bilinear-{inference}", first),
    ]
    layers = [job for job in jobs if job.case in cases.unet_layers()][:20]
    begin = jobs.index(layers[0])
    assert jobs[begin : begin + 20] == layers
    assert {job.case for job in jobs[:begin]} == set(suite._unfrozen(nets.HEADLINE))
    assert all({"eager", "fastunet", "fastunet-triton", "fastunet-torch"} <= set(job.providers) for job in layers)
    planned = {(job.case.name, name) for job in jobs for name in job.providers}
    everything = [*suite._unfrozen(nets.CASES), *cases.LOSS_CASES, *cases.CASES, *cases.unet_layers()]
    assert planned >= {(case.name, provider.name) for case in everything for provider in peers.serving(case)}
    for job in jobs:
        if set(job.providers) & set(suite.DEAR):
            assert job.providers[0] in ("eager", "seed002"), "a compiled peer is timed beside what it is compared with"


def test_frozen_networks_are_timed_when_there_is_freeze(monkeypatch):
    def frozen() -> set[str]:
        jobs = suite.plan(torch.device("cuda"))
        return {job.case.name for job in jobs if isinstance(job.case, NetCase) and job.case.mode == "frozen"}

    monkeypatch.delattr(suite.fastunet, "freeze", raising=False)
    assert not frozen()
    monkeypatch.setattr(suite.fastunet, "freeze", None, raising=False)
    assert frozen() == {case.name for case in nets.CASES if case.mode == "frozen"}


def test_a_job_whose_dear_provider_is_absent_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "unavailable", lambda provider, device: "no" if provider.name == "compile" else None)
    jobs = [Job(TINY_NET, ("eager", "fastunet-torch", "eager-nchw")), Job(TINY_NET, ("eager", "fastunet", "compile"))]
    kept, reasons = suite.available(jobs, torch.device("cuda"))
    assert kept == jobs[:1], "its others have a job of their own"
    assert reasons == {"compile": "no"}


# ---- time --------------------------------------------------------------------------------------------------------


def test_providers_take_turns():
    called = []
    times = interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, CPU, 0.0, head_start=True)
    assert called == ["a", "b"] * (len(called) // 2)
    assert times["a"].rounds == len(called) // 2 - 1


def test_each_provider_gets_its_own_times():
    times = interleaved({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, CPU, 0.0, head_start=False)
    assert times["slow"].p50 > 9 > times["fast"].p50


def test_percentiles():
    assert Times.of([float(n) for n in range(101)]) == Times(20, 50, 80, 101)


def test_machine_is_told_by_its_sources_without_git():
    found = machine(CPU)
    assert re.fullmatch("[0-9a-f]{12}", found["sources"])
    assert found["gpu"] == "cpu"


# ---- a process of its own ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrashingNet(NetCase):
    """Its fastunet form ends the process, as a sticky CUDA error does."""

    def model(self, package: ModuleType, **settings: str) -> nn.Module:
        return os._exit(7) if settings else super().model(package)


@dataclass(frozen=True)
class HangingNet(NetCase):
    """Its fastunet form never comes to an end, as a kernel in a dead lock."""

    def model(self, package: ModuleType, **settings: str) -> nn.Module:
        if settings:
            time.sleep(1e6)
        return super().model(package)


def of_same_size(build: type[NetCase]) -> NetCase:
    return build(**vars(TINY_NET))


def test_a_crash_costs_its_provider_a_row_and_nobody_else():
    jobs = [
        Job(of_same_size(CrashingNet), ("eager", "fastunet-torch", "eager-nchw")),
        Job(TINY_LOSS, ("seed002",)),
    ]
    messages = list(suite.isolated(order(*jobs)))
    found = {value["provider"]: value["failure"] for what, value in messages if what == "row"}
    assert found.pop("fastunet-torch") == "the process ended with status 7"
    assert found == {"eager": None, "eager-nchw": None, "seed002": None}


def test_a_hang_ends_after_the_deadline(monkeypatch):
    job = Job(of_same_size(HangingNet), ("fastunet-torch",))
    rows = []
    for what, value in suite.isolated(order(job)):
        if (what, value) == ("provider", "fastunet-torch"):  # it hangs, and an hour goes by
            monkeypatch.setattr(time, "time", partial(float, time.time() + 3600))
        elif what == "row":
            rows.append(value["failure"])
    assert rows == [f"did not answer {suite.GRACE} s after the deadline"]


def test_a_hang_before_the_deadline_costs_its_provider_alone(monkeypatch):
    jobs = [Job(of_same_size(HangingNet), ("eager", "fastunet-torch")), Job(TINY_LOSS, ("seed002",))]
    found = {}
    for what, value in suite.isolated(order(*jobs)):
        if (what, value) == ("provider", "fastunet-torch"):  # patience with the one that hangs alone
            monkeypatch.setattr(suite, "PATIENCE", 1)
        elif what == "row":
            monkeypatch.undo()
            found[value["provider"]] = value["failure"]
    assert found == {"fastunet-torch": "did not answer for 1 s", "eager": None, "seed002": None}


@pytest.mark.parametrize(
    ("done", "provider", "failed", "again"),
    [
        ({"a"}, "b", ("b",), ("c",)),
        ({"a", "b"}, "b", (), ("c",)),  # its row came through before its process ended
        (set(), None, ("a", "b", "c"), ()),  # while they were timed
    ],
)
def test_only_the_culprit_is_not_tried_again(done, provider, failed, again):
    assert suite._after(Job(TINY_LOSS, ("a", "b", "c")), done, provider) == (failed, again)


def test_a_process_that_cannot_begin_is_not_begun_again():
    (message,) = suite.isolated(replace(order(Job(TINY_LOSS, ("seed002",))), device="no device"))
    assert message == ("lost", "the process ended with status 1")


# ---- commands ----------------------------------------------------------------------------------------------------


def test_dry_run_checks_every_provider_and_prints_the_plan():
    done = python("-m", "benchmarks.suite", "--dry-run", "--only", "conv2d-8x64x512x512", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    providers = "eager, fastunet, fastunet-triton, fastunet-torch, eager-bare"
    assert f"conv2d-8x64x512x512-bfloat16-dgrad-k64: {providers}" in done.stdout
    checked = re.search(r"(\d+) small ones checked, 0 wrong", done.stdout)
    assert checked, done.stdout
    assert int(checked[1]) > 20


def test_a_checkout_that_is_not_installed_has_its_kernels():
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import fastunet, fastunet.kernels, torch\n"
        "from fastunet import ops\n"
        f"assert fastunet.kernels.__file__ == {str(ROOT / 'kernels' / '__init__.py')!r}\n"
        "x, a = torch.randn(1, 3, 4, 6), torch.randn(3, 3)\n"
        "torch.testing.assert_close(*(ops.affine_act(x, a, True, backend) for backend in ('torch', 'triton')))"
    )
    pytest.importorskip("triton")
    done = python("-c", code, PYTHONPATH=str(ROOT), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr


# ---- the report --------------------------------------------------------------------------------------------------


def recorded(provider: str, ms: float, group: str = "g", **more: object) -> dict:
    row = suite._row(nets.HEADLINE[0], provider, peak_bytes=2 * 10**9, error={"forward": 1e-3}, gbs=None, tflops=10.0)
    times = {"p20": ms - 1, "p50": ms, "p80": ms + 1, "rounds": 10}
    about = {
        "gpu": "Some GPU",
        "time": "today",
        "id": f"{provider}{ms}",
        "driver": "1",
        "commit": "c" * 40,
        "dirty": False,
        "sources": "s",
    }
    versions = {"torch": "2", "triton": "3", "cuda": "13"}
    more.setdefault("idle", True)
    return {**row, "ms": times, "group": group, **about, "versions": versions, "roofs": None, **more}


def test_readme_states_what_is_recorded_and_nothing_else():
    assert report.main(["--check"]) == 0, "run python -m benchmarks.report"


def test_section_without_rows_says_so():
    text = report.section([recorded("eager", 10, gpu="cpu")])
    assert text.startswith("Nothing has been measured on a GPU yet")
    assert "|" not in text


def test_section_links_every_number_to_its_row():
    earlier = recorded("eager", 70.0, "before", time="yesterday")
    rows = [earlier, recorded("eager", 30.0), recorded("fastunet", 20.0), recorded("eager", 50.0, "other")]
    text = report.section([*rows, recorded("compile", 40.0, wrong="gradient of a.weight")])
    assert "| fastunet | 20.000 | 19.000–21.000 | 1.50 | 2.00 | `fastunet20.0` |" in text
    assert "`eager50.0`" in text, "twice in one run, beside others"
    assert "`eager70.0`" not in text, "the last run of a case counts"
    assert "objected: `compile40.0`: gradient of a.weight." in text
    assert "(benchmarks/results/some-gpu.jsonl)" in text


def test_steps_that_were_issued_ahead_are_left_out():
    rows = [recorded("eager", 30.0, idle=False), recorded("fastunet", 20.0, idle=False)]
    text = report.section([*rows, recorded("fastunet-graph", 10.0, idle=False)])
    assert "| fastunet-graph | 10.000 | 9.000–11.000 | 3.00 |" in text
    assert "fastunet20.0" not in text
    assert "eager30.0" not in text


def test_a_failure_is_reported_as_one():
    text = report.table([recorded("eager", 30.0), recorded("compile", 1.0) | {"ms": None, "failure": "broken"}])
    assert re.search(r"compile +failed: +broken", text)


def test_section_needs_its_markers():
    readme = f"before\n{report.START}\nold\n{report.END}\nafter\n"
    assert report.with_section(readme, "new") == readme.replace("old", "new")
    with pytest.raises(ValueError, match="expected the lines"):
        report.with_section("no markers", "new")


def test_roofline_is_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib", reason="draws the picture where matplotlib is")
    row = suite._row(cases.CASES[1], "eager", gbs=1.0, tflops=100.0)
    row |= {"ms": {"p50": 1.0}, "gpu": "Some GPU", "roofs": {"copy_gbs": 4000.0, "bf16_tflops": 800.0}}
    assert report.roofline([row], tmp_path / "a.svg")
    assert "Some GPU" in (tmp_path / "a.svg").read_text()
    assert not report.roofline([], tmp_path / "b.svg")
