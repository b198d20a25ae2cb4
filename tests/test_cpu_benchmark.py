"""``python -m benchmarks.cpu``: both sides do the same step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import cpu
from fastunet.backend import triton_unavailable


@pytest.fixture(autouse=True)
def no_backend_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("FASTUNET_BACKEND", raising=False)
    triton_unavailable.cache_clear()
    yield
    triton_unavailable.cache_clear()


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


def test_the_command_prints_a_row_for_every_pair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "SIZES", ((2, 16),))
    threads = torch.get_num_threads()
    assert cpu.main(["--seconds", "0", "--threads", str(threads)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("2×16×16" in line for line in lines) == 2 * len(cpu.LAYOUTS) * len(cpu.GOALS)


def test_a_chosen_backend_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton_unavailable.cache_clear()
    with pytest.raises(SystemExit):
        cpu.main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
