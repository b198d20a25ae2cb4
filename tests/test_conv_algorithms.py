"""3×3 convolutions by other algorithms than Triton's implicit GEMM, against plain PyTorch in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sources import assert_near, skip_if_unsupported
from test_conv import CASES, Conv, Inputs, draw, gradients, run

from fastunet.kernels import conv_aten, table
from fastunet.kernels.conv import FUNCTIONS
from fastunet.kernels.tiles import Tile

KINDS = ("conv3x3_fwd", "conv3x3_dgrad", "conv3x3_wgrad")
ALGORITHMS = {  # and the kinds of kernel for which there is one
    name: tuple(kind for kind, other in FUNCTIONS if other == name) for _, name in FUNCTIONS if name != "triton"
}
BY_NAME = pytest.mark.parametrize("algorithm", ALGORITHMS)

SERVED = {name: case for name, case in CASES.items() if case.kernel == 3 and case.stride == 1 and not case.transposed}
SERVED["one-pixel"] = Conv((2, 3, 1, 1), 2)
SERVED["both-cropped"] = Conv((1, 3, 5, 7), 2, x1=(1, 2, 6, 4), size=(4, 5), offset=(-1, 0, 0, -1), slope=(0.0, 0.0))
SERVED["plain"] = Conv((2, 17, 4, 3), 2, affine=(False, False), slope=(1.0, 1.0))


def outcome(case: Conv, inputs: Inputs, algorithm: str | None) -> list[torch.Tensor]:
    """Outputs and gradients, by the reference if ``algorithm`` is None."""
    with table.forced(dict.fromkeys(ALGORITHMS.get(algorithm or "", ()), algorithm)):
        outputs = run(case, inputs, None if algorithm is None else "triton")
        return [*outputs, *gradients(outputs, inputs.leaves)]


RUNS = [
    (algorithm, name, dtype)
    for algorithm in ALGORITHMS
    for name in SERVED
    for dtype in (torch.float64, torch.float32, torch.float16)
]


@pytest.mark.parametrize(("algorithm", "name", "dtype"), RUNS, ids=str)
def test_forward_and_backward(name: str, dtype: torch.dtype, algorithm: str, device: str) -> None:
    case = SERVED[name]
    skip_if_unsupported("triton", dtype, device)
    inputs = draw(case, device, torch.float32 if dtype == torch.float64 else dtype)
    exact, inputs, plainly = inputs.to(torch.float64), inputs.to(dtype), inputs.to(dtype)
    assert_near(outcome(case, inputs, algorithm), outcome(case, exact, None), outcome(case, plainly, None), dtype)


DOUBLED = {
    "alone": Conv((3, 4, 2, 9), 6, doubled=(True, False), pool="all"),
    "beside-odd-skip": Conv((3, 2, 3, 7), 4, x1=(3, 2, 1, 3), slope=(0.0, 0.1), doubled=(False, True)),
    "cropped": Conv((1, 2, 3, 5), 4, x1=(1, 2, 3, 9), size=(3, 8), offset=(-2, -2, 0, -1), doubled=(True, False)),
    "at-odd-places": Conv((1, 2, 1, 3), 2, x1=(1, 2, 3, 5), size=(4, 9), offset=(1, 1, -1, 0), doubled=(True, True)),
}


@pytest.mark.parametrize(("images", "tma"), [(1, True), (2, False)], ids=["tma", "two-pictures"])
@pytest.mark.parametrize("case", DOUBLED.values(), ids=DOUBLED)
def test_doubled_in_tiles_of_two_rows(case: Conv, images: int, tma: bool) -> None:
    """As in 16 bits, but in float64: a tile holds all four outputs of a pixel, or not, of one picture or of two."""
    skip_if_unsupported("triton", torch.float64, "cuda" if torch.cuda.is_available() else "cpu")
    tile = Tile(images, 2, 16, 16, 16, 4, 2, tma)
    inputs = draw(case, "cpu").to(torch.float64)
    exact = inputs.to(torch.float64)
    with table.forced({"conv3x3_fwd": tile, "conv3x3_dgrad": tile, "conv3x3_wgrad": tile}):
        found = outcome(case, inputs, "triton")
    expected = outcome(case, exact, None)
    for x, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-10, atol=1e-10)


@BY_NAME
def test_empty_batch(algorithm: str, device: str) -> None:
    case = Conv((0, 3, 4, 5), 2, x1=(0, 2, 4, 5))
    inputs = draw(case, device)
    y, *statistics = (found := outcome(case, inputs, algorithm))[:3]
    assert y.shape == (0, 2, 4, 5)
    for result, like in zip(found[1:], [*statistics, *inputs.leaves], strict=True):
        torch.testing.assert_close(result, torch.zeros_like(like))


@BY_NAME
def test_only_the_gradients_asked_for(algorithm: str, device: str) -> None:
    case = SERVED["both-cropped"]
    inputs = draw(case, device)
    whole = outcome(case, inputs, algorithm)[3:]
    leaves = inputs.leaves
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        inputs.leaves = [leaf]
        alone = outcome(case, inputs, algorithm)[-1]
        torch.testing.assert_close(alone, whole[i], rtol=1e-6, atol=1e-6)  # ATen may choose another algorithm


@BY_NAME
def test_statistics_are_centred(algorithm: str, device: str) -> None:
    """Mean 1000, deviation 1: a one-pass variance in float32 would be off by a tenth."""
    case = Conv((2, 1, 13, 17), 2, affine=(False, False), slope=(0.0, 1.0))
    inputs = draw(case, device)
    with torch.no_grad():
        inputs.x0 += 1000
        inputs.weight.zero_()[:, :, 1, 1] = 1
    with table.forced({"conv3x3_fwd": algorithm}):
        y, mean, var = run(case, inputs, "triton")
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)  # float32's rounding of 1000
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@BY_NAME
def test_a_nan_is_in_the_statistics_of_its_channels(algorithm: str, device: str) -> None:
    """As in PyTorch. A GPU's maximum drops a NaN unless it is told not to; the interpreter's never does."""
    case = Conv((2, 1, 13, 17), 2, affine=(False, False), slope=(1.0, 1.0))
    inputs = draw(case, device)
    with torch.no_grad():
        inputs.x0[1, 0, 6, 8] = torch.nan
    with table.forced({"conv3x3_fwd": algorithm}):
        _, mean, var = run(case, inputs, "triton")
    assert mean.isnan().all()
    assert var.isnan().all()


@BY_NAME
def test_the_same_bits_every_time(algorithm: str, device: str) -> None:
    case = SERVED["both-cropped"]
    inputs = draw(case, device)
    for a, b in zip(outcome(case, inputs, algorithm), outcome(case, inputs, algorithm), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "taken"), [("auto", True), ("triton", False), ("torch", False)])
def test_auto_takes_what_the_table_says_and_triton_is_triton(
    backend: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    case = Conv((1, 3, 4, 5), 2, x1=(1, 2, 4, 5))
    inputs = draw(case, device)
    monkeypatch.delenv("FASTUNET_BACKEND", raising=False)
    monkeypatch.setattr(table, "PATH", tmp_path / "tiles.json")
    keys = [table.key(kind, (3, 2), 2, 5, len(inputs.x0), table.arithmetic(inputs.x0)) for kind in KINDS]
    table.PATH.write_text(json.dumps([{"key": key, "algorithm": "cudnn", "source": "modelled"} for key in keys]))
    calls = []
    for name in ("values", "_backward"):
        function = getattr(conv_aten, name)
        monkeypatch.setattr(conv_aten, name, lambda *given, f=function, n=name: calls.append(n) or f(*given))
    table.forget()
    try:
        gradients(run(case, inputs, backend), inputs.leaves)
    finally:
        table.forget()
    # The backward's sources are normalised by the pass that masks their gradient.
    assert sorted(calls) == (["_backward", "_backward", "values"] if taken else [])
