"""Calls made again: what was recorded gives, bit for bit, what the call itself gives."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastunet import dispatch, verify
from fastunet.architecture import as_if_on

pytest.importorskip("triton", reason="Triton is not installed; it is part of pip install 'fastunet[test]' on Linux")
from fastunet.kernels import replay


def drawn(case: verify.Case, turn: int, device: str) -> verify.Tensors:
    """Inputs of a case, other numbers each turn."""
    torch.manual_seed(turn)
    found: verify.Tensors = {}
    for name, shape in case.inputs.items():
        value = torch.randn(shape, dtype=verify._input_dtype(name, shape, torch.float32)).to(device)
        if len(shape) == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        found[name] = value.requires_grad_(name != "pixel_weight")
    if case.labels is not None:
        found["labels"] = torch.randint(case.labels[0], case.labels[1]).to(device)
    return found


@pytest.mark.parametrize("case", verify.CASES, ids=lambda case: f"{case.name} {case.shape}")
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_the_same_bits(case: verify.Case, chip: str, device: str) -> None:
    replay.forget()
    for turn in range(3):
        inputs = drawn(case, turn, device)
        with as_if_on(chip), mock.patch.object(dispatch, "repeating", lambda *_: replay.call):
            found = verify._outputs_and_gradients(lambda t: case.ours(t, "triton"), inputs, case.backward)
    with as_if_on(chip), mock.patch.object(dispatch, "repeating", lambda *_: None):
        expected = verify._outputs_and_gradients(lambda t: case.ours(t, "triton"), inputs, case.backward)
    for part, tensors in expected.items():
        for a, b in zip(tensors, found[part], strict=True):
            assert torch.equal(a, b), part
            assert a.stride() == b.stride()
    assert replay._known
    assert all(type(known) is replay.Recording for known in replay._known.values()), replay._known
