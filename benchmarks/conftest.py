"""`pytest benchmarks`: the suite's cases and providers through pytest-benchmark; on a CPU, a small subset."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_GPU = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="needs a CUDA GPU; the small cases run on this machine's CPU"
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Every case starts with nothing compiled."""
    torch.compiler.reset()
