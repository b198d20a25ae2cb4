"""The compile gate: the kernels pass it, and each planted fault turns it red.

It runs in processes of its own, because here Triton may already be in interpreter mode.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("triton", reason="compiling needs Triton, which is part of pip install 'fastunet[test]' on Linux")


def gate(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_a_gpu(arch):
    done = gate("-m", "benchmarks.gate", "--arch", arch, "--json", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    entries = json.loads(done.stdout)
    assert all(entry["resources"]["spilled_bytes"] == 0 for entry in entries)
    convolutions = [entry for entry in entries if "conv" in entry["kernel"] and entry["resources"]["dots"]]
    assert convolutions
    assert all(entry["resources"]["tensor"] for entry in convolutions)


SOUND = "tl.store(y_ptr + i, tl.load(x_ptr + i))"

FAULTS = {
    # two tiles of 256 values a thread are alive at once, and a thread has 255 registers
    "spill": (
        """
        rows = tl.arange(0, 128)[:, None]
        columns = tl.arange(0, 64)[None, :]
        tile = tl.load(x_ptr + rows * 64 + columns).to(tl.float32)
        for _ in range(n):
            tile = tile * tl.sum(tile, 1)[:, None] + tl.sum(tile, 0)[None, :]
        tl.store(y_ptr + rows * 64 + columns, tile)
        """,
        "spills",
    ),
    "float64": (
        """
        value = tl.load(x_ptr + i).to(tl.float64) * 0.1
        tl.store(y_ptr + i, value.to(tl.bfloat16))
        """,
        "computes in float64",
    ),
    "scattered": ("tl.store(y_ptr + i, tl.load(x_ptr + 2 * i))", "loads 2B:8 where"),
    # both operands of the dot stay in shared memory: 2 · 64 · 1024 · 2 bytes
    "shared": (
        """
        long = tl.arange(0, 1024)
        short = tl.arange(0, 64)
        a = tl.load(x_ptr + short[:, None] * 1024 + long[None, :])
        b = tl.load(x_ptr + long[:, None] * 64 + short[None, :])
        tl.store(y_ptr + short[:, None] * 64 + short[None, :], tl.dot(a, b))
        """,
        "wants",
    ),
    "broken": ("tl.store(y_ptr + i, tl.no_such_function(i))", "does not compile"),
}

PLANTED = """
import sys

import torch
import triton
import triton.language as tl

from benchmarks import gate
from benchmarks.cases import Case

__all__ = ["affine_act"]


@triton.jit
def _planted_kernel(x_ptr, y_ptr, n):
    i = tl.arange(0, 256)
{body}


def affine_act(x, affine, relu):
    _planted_kernel[(1,)](x, x, 3, num_warps=4 if {wide} else 1)
    return x

{extra}
if __name__ == "__main__":
    case = Case("affine_act", (1, 64, 8, 8), mode="inference")
    sys.exit(gate.main(["--arch", "sm_90", "--jobs", "1"], [case], sys.modules[__name__]))
"""


def plant(path: Path, body: str, extra: str = "") -> subprocess.CompletedProcess[str]:
    script = path / "planted.py"
    script.write_text(PLANTED.format(body=indent(dedent(body).strip(), "    "), extra=extra, wide="tl.dot" in body))
    return gate(str(script))


def test_gate_is_green_on_a_sound_kernel(tmp_path):
    done = plant(tmp_path, SOUND)
    assert done.returncode == 0, done.stderr
    assert "_planted_kernel" in done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_gate_catches(fault, tmp_path):
    body, message = FAULTS[fault]
    done = plant(tmp_path, body)
    assert done.returncode == 1, done.stdout
    assert f"FAILED _planted_kernel for sm_90 (affine_act-1x64x8x8-bfloat16-inference) {message}" in done.stderr


def test_gate_catches_a_kernel_without_a_case(tmp_path):
    extra = "\n@triton.jit\ndef _forgotten_kernel(x_ptr):\n    tl.store(x_ptr, 0.0)\n"
    done = plant(tmp_path, SOUND, extra)
    assert done.returncode == 1, done.stdout
    assert "FAILED _forgotten_kernel is reached by no case" in done.stderr
