"""What every test shares: the device, the backends, and a seed.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads TRITON_INTERPRET when a
kernel is defined, so it is set here, before any test imports one. Tests that compile for real start a process of
their own.
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        import interpreter

        import fastunet.kernels  # noqa: F401 - before a test turns the interpreter off for itself

        interpreter.quicken()

# One thread a process, the tests' own processes too: the tensors are tiny, and `pytest -n` already fills the cores.
# Threads without a core of their own wait for each other: a step of milliseconds then takes a second.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Convolutions use TF32 by default, PyTorch's and fastunet's; tolerances here are float32's.
torch.backends.cudnn.allow_tf32 = False

# The interpreter has no steady pace, and a red test must be red again when it is looked into.
settings.register_profile(
    "fastunet",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fastunet")


@pytest.fixture
def device() -> str:
    """ "cuda" on a machine with a GPU, else "cpu"."""
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; "triton" is the GPU where there is one, else the interpreter."""
    name: str = request.param
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; it is part of pip install 'fastunet[test]' on Linux")
    return name


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, and float32 from the same flags: PyTorch refuses a mix of old and
    new ones that another test left."""
    torch.backends.cudnn.allow_tf32 = False
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code may draw from the global state
    torch.manual_seed(0)
    return 0


# ---- drawing for longer ------------------------------------------------------------------------------------------

_SECONDS = pytest.StashKey[float]()  # that each test which draws goes on for
_ENDLESS = "seconds"  # the fixture that such a test has


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", type=float, default=0.0, metavar="MINUTES",
        help="run only the tests that draw what they try, and go on drawing, for so many minutes of one process in all",
    )  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --long, leave the tests that draw, and divide the time among them."""
    minutes = config.getoption("--long")
    if minutes:
        drawing = [item for item in items if _ENDLESS in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in drawing])
        items[:] = drawing
        config.stash[_SECONDS] = 60 * minutes / max(len(drawing), 1)


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """How long a test goes on drawing: 0 unless pytest is run with --long."""
    return request.config.stash.get(_SECONDS, 0.0)


@pytest.fixture
def explore(seconds: float) -> Callable[[Callable[[Any], None], int], None]:
    """``explore(holds, examples)``: call ``holds`` with hypothesis' data so many times, always the same; with --long
    with ever new ones, until its time is over."""

    def run(holds: Callable[[Any], None], examples: int) -> None:
        # To shrink what fails could take the interpreter an hour; what was drawn is printed as it is.
        drawn = settings(max_examples=examples, derandomize=not seconds, database=None, phases=[Phase.generate])
        stop = time.monotonic() + seconds
        while True:
            drawn(given(st.data())(holds))()
            if time.monotonic() >= stop:
                break

    return run
