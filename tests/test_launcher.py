"""Training steps through Triton's own launcher, down to a driver that checks what it is told and runs nothing.

What neither the interpreter nor the gate sees: grids, shared memory, TMA descriptors, and that a step which goes the
shorter way of fastunet.kernels.launching.launch tells the driver the same as one that goes through Triton.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, python

triton = pytest.importorskip("triton", reason="launching needs Triton, part of pip install 'fastunet[test]' on Linux")

# How Triton loads a driver and calls it is its own affair: these versions are known to do it in a way that works here.
KNOWN = ("3.6", "3.8", "3.9")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each four steps: (what the driver was told, which kernels went through Triton's binding of arguments).

    The second is recorded, the third and the fourth are by that record.
    """
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in KNOWN:
        pytest.skip(
            f"the launcher of Triton {version} was not tried with this driver, those of {', '.join(KNOWN)} were"
        )
    compiler, header = shutil.which("gcc"), Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None or not header.is_file():
        pytest.skip("Triton's launcher is compiled by gcc, with Python.h: install gcc and Python's development files")
    folder = tmp_path_factory.mktemp("driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = ROOT / "tests" / "checking_cuda.c", folder / "libcuda.so.1"
    build = [compiler, "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(build, check=True)
    done = python(
        "tests/checked_steps.py",
        TRITON_CACHE_DIR=str(folder / "cache"),  # of its own: what is compiled here is nothing that runs
        TRITON_LIBCUDA_PATH=str(folder),
        LD_LIBRARY_PATH=str(folder),
        CHECKED=str(folder / "told"),
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("of", "launches", "descriptors"), [("UNet", 150, 150), ("strided", 8, 12)])
def test_launches_and_descriptors_are_valid(of: str, launches: int, descriptors: int, steps: dict[str, Any]) -> None:
    told, through_triton = steps[of][0]
    assert [line for line in told if "!" in line] == []
    assert len([line for line in told if line.startswith("launch")]) >= launches
    assert len([line for line in told if line.startswith("descriptor")]) >= descriptors
    assert through_triton


@pytest.mark.parametrize("of", ["UNet", "strided"])
def test_the_shorter_way_tells_the_driver_the_same(of: str, steps: dict[str, Any]) -> None:
    (first, _), *later = steps[of]
    launches = [line for line in first if line.startswith("launch")]
    descriptors = set(first) - set(launches)
    assert len(later) == 3
    for again, through_triton in later:
        assert through_triton == []
        assert [line for line in again if line.startswith("launch")] == launches
        assert {line for line in again if not line.startswith("launch")} <= descriptors
    # The second is recorded too, and the third makes its descriptors, which the fourth finds made.
    assert descriptors == set(later[0][0]) - set(launches) == set(later[1][0]) - set(launches)
    assert max(len(told) for told, _ in later[1:]) <= len(first)
    assert steps["replayed"] > 50
    assert steps["unfit"] == 0
    assert not steps["dynamo"]  # which takes seconds to import


def test_the_shorter_way_is_taken_unless_somebody_hooks_launches(steps: dict[str, Any]) -> None:
    assert steps["short"]
    hooked, launched = steps["hooked"]
    assert hooked == launched
    assert len(hooked) >= 8


def test_what_is_wrong_is_refused(steps: dict[str, Any]) -> None:
    assert "refused by checking_cuda.c" in steps["refused"]
