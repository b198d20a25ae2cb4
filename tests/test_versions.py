"""What the oldest PyTorch and Triton refuse is in no source; make test-oldest runs the tests on those themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastunet import verify

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
