"""``make coverage`` tells the lines that tests run from those that they do not."""

from __future__ import annotations

import re

import lines
import pytest
from processes import python

KERNEL = """
import triton

SIZE = 3

@triton.jit
def kernel(x,
           y):
    if x:
        y = f(
            x,
        )
    else:
        y = 1

def launch(x):
    return x
"""


def test_a_kernel_s_lines_are_told_from_python_s() -> None:
    assert lines.of_kernels(KERNEL) == {9: 9, 10: 10, 11: 10, 12: 10, 14: 14}


def test_what_is_too_little_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    full = lines.File("fastunet/full.py", set(range(100)), {7}, set(), set())
    half = lines.File("kernels/half.py", set(range(8)), {2, 3, 4, 6}, {10, 11}, {11})
    assert not lines.report([full, half])
    said = re.sub(r" +", " ", capsys.readouterr().out).splitlines()
    assert said[0] == "fastunet 100 lines 99.0 % run"
    assert said[1:3] == ["kernels 8 lines 50.0 % run", " kernels/half.py 8 50.0 % not 2-4, 6"]
    assert said[-2:] == ["bodies of @triton.jit functions 2 lines 1 never run", " kernels/half.py 11"]
    assert lines.report([full]), "and of a package without files nothing is missing"


def test_the_lines_of_one_test_are_told() -> None:
    """Those of a process that it starts too."""
    pytest.importorskip("coverage", reason="part of pip install 'fastunet[test]'")
    starts_one = "tests/test_cli.py::test_python_dash_m_runs_the_command_line"
    done = python("-m", "tests.lines", "-n", "0", "-q", "-p", "no:cacheprovider", starts_one)
    assert done.returncode == 0, done.stderr
    assert "1 passed" in done.stdout
    few = {line.split()[0] for line in done.stdout.splitlines() if " not " in line}
    assert "fastunet/demo.py" in few, "of which it ran a few"
    assert "fastunet/__main__.py" not in few, "all of whose lines ran, in that process only"
