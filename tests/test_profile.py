"""The profile: ranges named by layer and operator around a step that stays fused, and tables from a trace's events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import profile
from benchmarks.nets import NetCase
from benchmarks.profile import Line, Ranges, labels, prepare, table, tabulate, traced
from benchmarks.traffic import MODES, Pass, Roofs

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def run(arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTUNET_BACKEND")}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.profile", *arguments.split()],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


# ---- ranges ------------------------------------------------------------------------------------------------------

SMALL = [
    NetCase(base=4, size=32, batch=1, dtype="fp32"),
    NetCase("unet-bilinear", base=4, size=40, batch=1, dtype="fp32"),
    NetCase("strided", base=4, size=32, batch=1, dtype="fp32", classes=2),
    NetCase("plain", base=4, size=32, batch=1, dtype="fp32"),
    NetCase("brain", base=4, size=32, batch=1, dtype="fp32"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", SMALL, ids=lambda net: net.net)
def test_a_step_in_ranges_calls_what_the_ledger_saw(net, mode, monkeypatch):
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    step = replace(net, mode=mode)
    ranges = Ranges(labels(traced(step, CPU)))
    with ranges:  # raises on another operator
        prepare(step, CPU)()
    assert next(ranges.names, "") == ""  # and none is missing


def test_ranges_refuse_another_step(monkeypatch):
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    with (
        pytest.raises(RuntimeError, match="next inc conv_transpose2d, got bn_affine"),
        Ranges(["inc conv_transpose2d"]),
    ):
        prepare(replace(SMALL[0], mode="inference"), CPU)()


def test_ranges_are_named_by_layer_and_operator():
    found = labels(traced(SMALL[0], CPU))
    assert found[0] == "inc.double_conv.0 conv2d"
    assert "down1.maxpool_conv.1.double_conv.0 max_pool2x2" in found
    assert "loss softmax_stats_backward" in found
    assert found[-1] == "inc.double_conv.0 conv2d_backward"


# ---- tables ------------------------------------------------------------------------------------------------------

PASSES = [
    Pass("a", "forward", "fastunet.conv2d", "_conv_kernel", 1_000_000, 8_000_000),
    Pass("a", "forward", "fastunet.conv2d", "_sum_kernel", 200_000, 0),
    Pass("b", "forward", "fastunet.conv2d", "_conv_kernel", 3_000_000, 4_000_000),
    Pass("b", "forward", "aten.mul.Tensor", "aten.mul.Tensor", 7, 0),
]


def event(category, name, start, duration):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


GPU_EVENTS = [
    event("gpu_user_annotation", "step", 1000, 500),
    event("gpu_user_annotation", "a conv2d", 1000, 110),
    event("gpu_user_annotation", "b conv2d", 1200, 100),
    event("user_annotation", "a conv2d", 10, 1),  # when it was launched
    event("kernel", "_conv_kernel", 1200, 100),
    event("kernel", "_conv_kernel", 1000, 90),
    event("kernel", "_sum_kernel", 1095, 15),
    event("kernel", "elementwise", 1150, 45),  # between the ranges
    {"ph": "M", "name": "process_name"},
]


def test_kernels_are_counted_by_name_and_in_the_range_that_holds_them():
    tables = tabulate(GPU_EVENTS, PASSES)
    assert tables.kernels == {
        "_conv_kernel": Line(2, pytest.approx(190e-6), 4_000_000, 12_000_000),
        "_sum_kernel": Line(1, pytest.approx(15e-6), 200_000, 0),
        "elementwise": Line(1, pytest.approx(45e-6)),
    }
    assert tables.ranges == {
        "a conv2d": Line(1, pytest.approx(105e-6), 1_200_000, 8_000_000),
        "b conv2d": Line(1, pytest.approx(100e-6), 3_000_000, 4_000_000),
    }
    assert tables.seconds == pytest.approx(250e-6)


def test_without_kernels_ranges_have_the_time_of_the_cpu():
    events = [event("user_annotation", "step", 0, 400), event("user_annotation", "a conv2d", 10, 100)]
    tables = tabulate([*events, event("user_annotation", "a conv2d", 200, 50)], PASSES)
    assert tables.ranges == {"a conv2d": Line(2, pytest.approx(150e-6), 1_200_000, 8_000_000)}
    assert tables.kernels == {}
    assert tables.seconds == pytest.approx(400e-6)


def test_a_table_compares_with_the_roofs():
    lines = {"slow": Line(3, 2e-3, 2_000_000_000, 1_000_000_000_000), "other": Line(1, 1e-3)}
    head, slow, other = (line.split() for line in table("kernel", lines, 4e-3, Roofs(4000, 1000)).splitlines())
    assert " ".join(head) == "kernel calls ms of time GB/s of roof TFLOP/s of roof"
    assert slow == ["slow", "3", "2.000", "50.0%", "1000", "25%", "500", "50%"]
    assert other == ["other", "1", "1.000", "25.0%", "-", "-", "-", "-"]


# ---- the command -------------------------------------------------------------------------------------------------


def test_a_cpu_profiles_a_small_network_and_says_what_it_cannot_show(tmp_path):
    arguments = f"--bilinear --base 4 --size 32 --trace {tmp_path / 'trace.json'} --bandwidth 100 --tflops 1"
    done = run(arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "inc.double_conv.0 conv2d" in done.stdout
    assert "roofs: 100 GB/s, 1 TFLOP/s" in done.stdout
    assert profile.CPU_ONLY in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]  # and nothing temporary
    names = {e.get("name") for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"forward", "loss", "backward", "outc.conv conv2d_backward"} <= names


def test_the_roofs_of_this_machine_are_measured():
    roofs = profile.measured_roofs(CPU, torch.float32)
    assert 0.1 < roofs.bandwidth < 10_000
    assert 0.0005 < roofs.tflops < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nvtx", "expected a CUDA GPU for --nvtx, got a machine without one"),
        ("--tflops 0", "expected --tflops above 0, got 0"),
        ("--batch 0", "expected --batch of at least 1, got 0"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        profile.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_shows_kernels():
    done = run("--base 16 --size 128 --batch 2 --dtype bf16")
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.partition("\nkernel ")[2]
    (line,) = (line.split() for line in kernels.splitlines() if line.startswith("_conv3x3_fwd_kernel"))
    assert 0 < int(line[1]) <= 17  # the 3×3 convolutions, but for that of the picture and what cuDNN does better
    assert line[4] != "-"  # GB/s
    assert "inc.double_conv.3 conv2d_backward" in done.stdout
