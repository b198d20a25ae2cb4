"""The benchmarks: what they say about their cases is true, and they run where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CASES, SMALL_CASES, Case
from fastunet import aten

ROOT = Path(__file__).parent.parent


def test_cases_have_names_of_their_own():
    names = [case.name for case in CASES + SMALL_CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_run_on_the_torch_backend(case):
    channels = min(case.shape[1], 6)
    small = replace(case, shape=(1, channels, 6, 8), filters=min(case.filters, 5), skip=min(case.skip, 4))
    replace(small, dtype=torch.float32).launch(aten, "cpu")


# A case of one gradient alone launches the forward too, which it does not count.
CONVOLUTIONS = [
    case for case in CASES if case.flops and case.dtype != torch.float32 and case.mode in ("inference", "training")
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_flops_are_those_that_pytorch_counts(case):
    with FlopCounterMode(display=False) as counter:
        replace(case, stats=False).launch(aten, "meta")
    assert case.flops == counter.get_total_flops()


def test_bytes_of_a_normalisation():
    case = Case("affine_act", (2, 64, 8, 8), dtype=torch.bfloat16)
    tensor, affine = 2 * 64 * 8 * 8 * 2, 3 * 64 * 4
    assert replace(case, mode="inference").bytes == 2 * tensor + affine  # reads x and the affine, writes z
    assert case.bytes == 5 * tensor + 3 * affine  # and then reads dz, x and the affine, writes dx and daffine


def test_benchmarks_run_on_a_cpu():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "affine_act or (unet-bilinear and inference)"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout
    assert "needs a CUDA GPU" in done.stdout
