"""fastunet verify: it compares what it says, passes where the code is right, and fails where it is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from processes import python
from torch import Tensor

from fastunet import verify
from fastunet.cli import main

CASES = {case.name: case for case in verify.CASES}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations and one network: the whole takes a minute."""
    monkeypatch.setattr(verify, "CASES", [case for case in verify.CASES if case.name in ("bn_affine", "max_pool2x2")])
    monkeypatch.setattr(verify, "NETWORKS", {"PlainUNet": verify.NETWORKS["PlainUNet"]})


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    case = next(case for case in verify.CASES if case.name == "bn_affine")
    monkeypatch.setattr(verify, "CASES", [dataclasses.replace(case, ours=wrong(case.ours))])


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is off by a thousandth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 1.001


@pytest.mark.usefixtures("small")
def test_passes_and_prints_a_line_for_every_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", "torch"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.endswith("ok")]
    # Two operations in float32, float16 and bfloat16, forward and backward; one network in float64 (it has no buffers).
    assert len(lines) == 2 * 3 * 2 + 2
    assert "all passed" in printed
    assert any(line.split()[:5][0] == "PlainUNet" and "float64" in line and "backward" in line for line in lines)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("part", ["forward", "backward", "nan"])
def test_a_planted_fault_fails(part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(ours: Any) -> Any:
        def call(inputs: Any, backend: str) -> Tensor:
            y: Tensor = ours(inputs, backend)
            return {
                "forward": lambda: y * 1.001,
                "backward": lambda: WrongGradient.apply(y),
                "nan": lambda: y * torch.nan,
            }[part]()

        return call

    plant(monkeypatch, wrong)
    assert main(["verify", "--backend", "torch"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert failed
    assert all(line.startswith("bn_affine") for line in failed)
    if part == "backward":
        assert all("backward" in line for line in failed)


def test_the_command_compares_every_case() -> None:
    """As a user runs it, with nothing left out."""
    done = python("-m", "fastunet", "verify", "--backend", "torch", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for case in verify.CASES:
        if case.quick:
            printed = [line for line in lines if line.startswith(f"{case.name:<18}{case.shape:<34}")]
            assert len(printed) == 3 * (1 + case.backward), case  # float32, float16 and bfloat16
    for name in verify.NETWORKS:
        assert any(line.startswith(name) and "float64" in line for line in lines)


@pytest.mark.parametrize("case", verify.CASES, ids=lambda case: f"{case.name}, {case.shape}")
def test_the_kernels_pass_every_case(case: verify.Case, device: str) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, part of pip install 'fastunet[test]' on Linux")
    found = list(verify._compare(case, torch.float32, torch.device(device), "triton"))
    assert len(found) == 1 + case.backward
    for row in found:
        assert row.passed, row


def test_what_raises_is_told_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(ours: Any) -> Any:
        def call(inputs: Any, backend: str) -> Tensor:
            raise RuntimeError("no such kernel")

        return call

    plant(monkeypatch, wrong)
    monkeypatch.setattr(verify, "CASES", [*verify.CASES, CASES["max_pool2x2"]])
    monkeypatch.setattr(verify, "NETWORKS", {"PlainUNet": (*verify.NETWORKS["PlainUNet"][:2], {"no": 1}, (1, 3, 8, 8))})
    assert main(["verify", "--backend", "torch"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED RuntimeError: no such kernel") == 3  # dtypes
    assert "FAILED TypeError" in printed
    assert "max_pool2x2" in printed
    assert "4 failed" in printed


@pytest.mark.parametrize("name", verify.NETWORKS)
def test_one_wrong_layer_of_a_network_fails(name: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """In float32, where gradients vary most: no parameter's may be off by a fiftieth, whatever the others do."""
    seen: dict[str, tuple[Any, ...]] = {}

    def judge(found: Any, truth: Any, own: Any, dtype: torch.dtype) -> tuple[float, float, str]:
        seen["backward" if len(found) == parameters else "other"] = found, truth, own, dtype
        return original(found, truth, own, dtype)

    original = verify._judge
    _, theirs, settings, _ = verify.NETWORKS[name]
    parameters = len(list(theirs(**settings).parameters()))
    monkeypatch.setattr(verify, "_judge", judge)
    rows = list(verify._network(name, torch.device(device), "torch", torch.float32))
    assert all(row.passed for row in rows), rows
    found, truth, own, dtype = seen["backward"]
    for wrong in found:
        if truth[wrong].abs().max() > 1e-6:  # else it is zero in truth, and so is its fiftieth
            changed = found | {wrong: found[wrong] * 1.02}
            error, allowed, of = original(changed, truth, own, dtype)
            assert error > allowed, wrong
            assert of == wrong
    missing = found | {wrong: torch.full_like(found[wrong], torch.nan)}
    assert not verify.Row(name, "", "", "backward", *original(missing, truth, own, dtype)).passed


def test_every_operator_is_compared() -> None:
    """An operator without a case would be unverified."""
    called = {
        name.split("::")[1].split("(")[0] for name in map(str, torch._C._jit_get_all_schemas()) if "fastunet::" in name
    }
    forwards = {name for name in called if not name.endswith("_backward")} - {
        "pool_fork", "affine_act",  # max_pool2x2's case is pool_fork and ends in affine_act
        "bn_affine_running",  # bn_affine's launch
        # whole numbers, which have no error: the tests compare them
        "confusion_matrix", "confusion_matrix_of_masks", "head_predict",
    }  # fmt: skip
    assert forwards <= {case.name.split()[0] for case in verify.CASES}
