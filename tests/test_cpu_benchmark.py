"""``python -m benchmarks.cpu``: both sides do the same step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from processes import python
from sources import as_users_run

from benchmarks import cpu
from fastunet.backend import triton_unavailable


@pytest.fixture(autouse=True)
def no_backend_chosen() -> Iterator[None]:
    with as_users_run():
        yield


@pytest.mark.parametrize("layout", cpu.LAYOUTS)
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
def test_both_give_the_same(bilinear: bool, layout: str) -> None:
    for mode in cpu.GOALS:
        calls = cpu.steps(4, 64, 2, bilinear, layout, mode)
        eager, ours = (call() for call in calls.values())
        if mode == "inference":
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
            assert ours.stride() == eager.stride()
        else:
            assert [g.shape for g in ours] == [g.shape for g in eager]


def test_there_is_a_row_for_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SIZES", ((2, 16),))
    rows = [*cpu.rows(2, 0, torch.get_num_threads())]
    assert sum("2×16×16" in row.name for row in rows) == len(rows) == 2 * len(cpu.LAYOUTS) * len(cpu.GOALS)
    assert all(ms > 0 for _, ms in cpu.measured(rows[0]))


def test_the_command_prints_the_rows_that_are_asked_for() -> None:
    chosen = ("--seconds", "0", "--batch", "1", "--only", "base 16, 1×128×128, bilinear, contiguous, inference")
    done = python("-m", "benchmarks.cpu", *chosen)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("base 16, 1×128×128, bilinear")


def test_a_chosen_backend_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton_unavailable.cache_clear()
    with pytest.raises(SystemExit):
        cpu.main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
