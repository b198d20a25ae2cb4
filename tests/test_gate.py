"""The compile gate: the kernels pass it, and each planted fault turns it red.

It runs in processes of its own, because here Triton may already be in interpreter mode.
"""

from __future__ import annotations

import json
import re

import pytest
from processes import ROOT, python

pytest.importorskip("triton", reason="compiling needs Triton, which is part of pip install 'fastunet[test]' on Linux")

from benchmarks.gate_file import LIMITS, regressions


def test_kernels_pass():
    done = python("-m", "benchmarks.gate", "--json")
    assert done.returncode == 0, done.stderr
    entries = json.loads(done.stdout)
    chips = {entry["chip"] for entry in entries}
    assert chips == {"sm_80", "sm_90", "gfx942"}
    for kernel in {entry["kernel"] for entry in entries}:
        assert {entry["chip"] for entry in entries if entry["kernel"] == kernel} == chips
    for chip in chips:
        [convolution] = [
            entry["numbers"]
            for entry in entries
            if entry["kernel"] == "_conv3x3_dgrad_kernel" and entry["chip"] == chip and "tensor" in entry["numbers"]
        ]
        assert convolution["loop tensor"]
        assert ("issue slots" in convolution) == chip.startswith("sm")


@pytest.mark.parametrize("pattern", [limit.pattern for limit in LIMITS])
def test_limits_are_about_something(pattern):
    entries = json.loads((ROOT / "benchmarks" / "gate.json").read_text())["entries"]
    assert any(re.search(pattern, name) for name in entries)


def test_nothing_recorded_spills():
    entries = json.loads((ROOT / "benchmarks" / "gate.json").read_text())["entries"]
    assert not [name for name, numbers in entries.items() if numbers.get("spilled")]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    done = python(str(ROOT / "tests" / "planted_kernels.py"), str(tmp_path_factory.mktemp("gate")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", ["sound", "pipelined", "update", "recorded"])
def test_green(scenario, planted):
    status, said, complaints = planted[scenario]
    assert status == 0, complaints
    assert "_kernel sm_90" in said
    assert "FAILED" not in complaints


RED = {
    "_spilling_kernel": "spills",
    "_float64_kernel": "computes in float64",
    "_scattered_kernel": "loads 2B:8 where",
    "_greedy_kernel": "wants",
    "_broken_kernel": "does not compile",
    "_serialised_kernel": "its wgmma are serialised",
    "forgotten": "_forgotten_kernel is launched by no case or network",
    "fewer blocks": "has blocks",
    "more slots": "has issue slots",
    "more waits": "has loop waits",
    "unknown entry": "is not in doctored",
    "limits": "to shared memory in its main loop",
}


@pytest.mark.parametrize("scenario", RED)
def test_red(scenario, planted):
    status, _, complaints = planted[scenario]
    assert status == 1
    kernel = scenario if scenario.startswith("_") else "_"
    failures = [line for line in complaints.splitlines() if line.startswith(f"FAILED {kernel}")]
    assert any(RED[scenario] in line for line in failures), complaints


def test_wgmma_that_are_not_serialised(planted):
    assert "HGMMA" in planted["pipelined"][1]


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ({"issue slots": 1.0, "least slots": 0.5}, {"issue slots": 1.0, "least slots": 0.4}, ["least"]),
        ({"issue slots": 1.0}, {"issue slots": 1.0, "least slots": 0.4}, ["least"]),
        ({"issue slots": 1.0, "least slots": 0.4}, {"issue slots": 1.0}, []),
        ({"issue slots": 1.0}, {"issue slots": 0.9}, ["issue"]),
    ],
)
def test_slots_of_the_cheapest_loop_are_those_of_the_only_one(now, before, expected):
    found = regressions({"loop": 9, **now}, {"loop": 9, **before})
    assert [text.split()[1] for text in found] == expected


def test_limit_on_issue_slots(planted):
    assert "slots a tensor clock in its main loop, over 0.1" in planted["limits"][2]
    assert "slots a tensor clock in the cheapest of its main loops, over 0.1" in planted["limits"][2]


def test_entry_that_is_launched_no_more_is_named(planted):
    assert "_gone_kernel bf16 warps=4 stages=3 sm_90 is launched no more" in planted["unknown entry"][2]


def test_other_registers_are_named_and_break_nothing(planted):
    status, _, complaints = planted["more registers"]
    assert status == 0
    assert ": registers " in complaints


def test_numbers_of_another_triton_are_not_compared(planted):
    status, _, complaints = planted["other Triton"]
    assert status == 0
    assert "only the rules count" in complaints


def test_what_spills_with_another_triton_is_named_and_breaks_nothing(planted):
    status, _, complaints = planted["other Triton spills"]
    assert status == 0
    assert "spills" in complaints
    status, _, complaints = planted["other Triton breaks"]
    assert status == 1
    assert "FAILED _broken_kernel" in complaints
