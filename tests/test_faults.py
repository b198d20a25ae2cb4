"""The faults of tests/faults.py can be planted: their texts are in the files, and their tests exist."""

from __future__ import annotations

import re
import shlex

import pytest
from faults import FAULTS, ROOT, Fault, rotten, verdict


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_a_fault_is_where_it_is_planted(fault: Fault) -> None:
    assert rotten(fault) is None
    assert fault.new != fault.old
    for argument in shlex.split(fault.tests):
        if argument.startswith("tests/"):
            file, *names = argument.split("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            for name in names:
                assert re.search(rf"^def {re.escape(name.partition('[')[0])}\(", text, re.MULTILINE), argument


def test_names_are_told_apart() -> None:
    assert len({(fault.file, fault.name) for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


def test_what_tests_do_not_see_is_said() -> None:
    """A comment is no fault; a text that is gone is told; tests that do not run have noticed nothing."""
    harmless = Fault("a comment", "fastunet/weight_map.py", "First along columns", "Along columns first", "")
    quick = "tests/test_weight_map.py::test_no_pixels"
    assert verdict(Fault(**{**vars(harmless), "tests": quick})) == "NOT NOTICED"
    assert "holds 0 times" in verdict(Fault(**{**vars(harmless), "old": "no such text"}))
    assert verdict(Fault(**{**vars(harmless), "tests": "tests/test_weight_map.py::test_no_such"})).startswith("NOT RUN")
