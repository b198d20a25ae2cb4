"""What the oldest PyTorch and Triton refuse is in no source; make test-oldest runs the tests on those themselves."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, python
from torch.nn import functional

from fastunet import backend, verify, versions

KERNELS = sorted((Path(__file__).parent.parent / "kernels").glob("*.py"))


def jit_functions(path: Path) -> Iterator[ast.FunctionDef]:
    """The functions decorated with triton.jit, with arguments or without."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
            if any(isinstance(each, ast.Attribute) and each.attr == "jit" for each in decorators):
                yield node


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_compare_two_values_at_a_time(path: Path) -> None:
    """Before Triton 3.9, 0 < x < 3 does not compile."""
    for function in jit_functions(path):
        chained = [x for x in ast.walk(function) if isinstance(x, ast.Compare) and len(x.ops) > 1]
        lines = [f"{path.name}:{x.lineno}: {ast.unparse(x)}" for x in chained]
        assert lines == [], f"write each comparison in parentheses, with & between them: {lines}"


# ---- below the floor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package", "least", "below", "there"),
    [
        ("Python", "", versions.PYTHON, "3.9.19", "3.10.0"),
        ("PyTorch", "torch", versions.TORCH, "2.9.1+cu128", "2.10.0+cpu"),
        ("Triton", "triton", versions.TRITON, "3.5.1", "3.6.0"),
    ],
)
def test_below_the_floor_is_refused_in_a_sentence(
    name: str, package: str, least: tuple[int, ...], below: str, there: str
) -> None:
    said = versions.refusal(name, package, least, below)
    assert said is not None
    assert re.fullmatch(rf"expected {name} {least[0]}\.{least[1]} or newer, got {re.escape(below)}; [^;\n]+", said)
    for version in (there, f"{least[0]}.{least[1]}", f"{least[0]}.{least[1]}.0a0+git1", f"{least[0] + 1}.0"):
        assert versions.refusal(name, package, least, version) is None


def test_an_old_pytorch_is_told_before_it_fails(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1'")
    done = python("-c", "import fastunet", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 1
    expected = "ImportError: expected PyTorch 2.10 or newer, got 2.9.1; pip install 'torch>=2.10'"
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("triton", "numpy", "said"),
    [
        ("3.5.1", "2.3.0", "Triton 3.5.1 is too old (pip install 'triton>=3.6')"),
        ("3.6.0", "2.4.0", "the interpreter of Triton 3.6.0 needs an older NumPy than 2.4.0 (pip install 'numpy<2.4')"),
        ("3.6.0", "2.3.9", None),
        ("3.8.0", "2.5.0", None),
    ],
)
def test_triton_and_numpy_have_to_fit(
    triton: str, numpy: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: triton)
    monkeypatch.setattr(backend.np, "__version__", numpy)
    assert backend.triton_unavailable.__wrapped__("cpu") == said


def test_the_floors_are_told_alike() -> None:
    """In the package's metadata, the README, the Makefile and the code."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={versions.PYTHON[0]}.{versions.PYTHON[1]}"' in project
    assert f'"torch>={versions.TORCH[0]}.{versions.TORCH[1]}"' in project
    assert f'"triton>={versions.TRITON[0]}.{versions.TRITON[1]};' in project
    assert "PyTorch 2.10 and Triton 3.6 or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "PAIR ?= torch==2.10.0 triton==3.6.0" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert (versions.TORCH, versions.TRITON) == ((2, 10), (3, 6))


# ---- what old versions refuse ------------------------------------------------------------------------------------


def test_there_are_kernels() -> None:
    assert sum(1 for path in KERNELS for _ in jit_functions(path)) > 50


def test_no_batch_norm_has_an_epsilon_of_zero(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """PyTorch 2.11's functional.batch_norm refuses it."""
    original = functional.batch_norm

    def strict(*args: Any, **named: Any) -> Any:
        eps = named.get("eps", args[7] if len(args) > 7 else 1e-5)
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive, but got {eps}")
        return original(*args, **named)

    monkeypatch.setattr(functional, "batch_norm", strict)
    for case in verify.CASES:
        if case.quick:
            assert all(row.passed for row in verify._compare(case, torch.float32, torch.device(device), "torch"))
