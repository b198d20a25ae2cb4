"""The model of what convolutions attain: its shape, not its numbers, which are assumptions until they are measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the kernels tell how many processors a chip has")

from benchmarks import model
from benchmarks.model import CUDNN, PACES, SUSTAINED, UNKNOWN, cudnn_rate, triton_rate


@pytest.fixture
def unbounded(monkeypatch):
    """The model alone, without what was measured."""
    monkeypatch.setattr(model, "ATTAINED", {})


def launch(
    name: str = "_conv3x3_fwd_kernel",
    programs: int = 132 * 8,
    architecture: str = "sm_90",
    height: int = 8,
    channels: int = 128,
    **changes: int | bool,
) -> float:
    constants = {
        "IMAGES": 1, "ROWS": 2, "COLUMNS": 128, "BLOCK_C": 64, "BLOCK_K": 128, "AFFINE": True, "RELU": True,
        "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    kernel = SimpleNamespace(__name__=name, arg_names=["N", "P", "Q", "tiles_h", "tiles_w", "C", "K"])
    constants |= changes
    tiles = 8 // constants["ROWS"], 8192 // constants["COLUMNS"]
    args = (1, height, 8192, *tiles, channels, 128)
    return triton_rate(SimpleNamespace(kernel=kernel, grid=(programs,), args=args, kwargs=constants), architecture)


def test_cudnn_attains_more_with_more_channels_and_at_most_what_is_sustained():
    rates = [cudnn_rate(channels) for channels in (1, 3, 16, 48, 64, 96, 128, 256, 1024)]
    assert rates == sorted(rates)
    assert rates[-1] <= SUSTAINED
    assert [cudnn_rate(channels) for channels in CUDNN] == list(CUDNN.values())
    assert rates[0] > 0


def test_a_last_wave_of_one_program_takes_as_long_as_a_full_one():
    assert launch(programs=133) == pytest.approx(launch(programs=132) * 133 / 264)
    assert launch(programs=66) == pytest.approx(launch(programs=132) / 2)


def test_more_bytes_from_the_l2_cache_attain_less(unbounded):
    assert launch(BLOCK_K=64) < launch(BLOCK_K=128)
    assert launch(ROWS=1) < launch(ROWS=2)


def test_a_prologue_costs_where_outputs_are_few(monkeypatch, unbounded):
    monkeypatch.setitem(PACES, "sm_90", replace(PACES["sm_90"], l2=1e9))
    narrow = {"ROWS": 4, "COLUMNS": 4096, "BLOCK_K": 32}  # where the weights' bytes count for nothing
    plain = launch(**narrow, AFFINE=False, RELU=False)
    assert launch(**narrow) < plain
    assert launch("_conv3x3_dgrad_kernel", **(narrow | {"BLOCK_C": 32, "BLOCK_K": 64})) == plain


def test_what_a_tile_multiplies_outside_the_picture_or_the_channels_is_lost():
    assert launch(height=5) == pytest.approx(launch() * 5 / 8)
    assert launch(channels=96) == pytest.approx(launch() * 3 / 4)


@pytest.mark.parametrize("architecture", PACES)
@pytest.mark.parametrize("kernel", ["fwd", "dgrad", "wgrad"])
def test_nothing_attains_more_than_is_sustained(kernel, architecture):
    assert 0 < launch(f"_conv3x3_{kernel}_kernel", architecture=architecture) <= SUSTAINED


def test_nothing_attains_more_than_was_measured():
    assert launch(AFFINE=False, RELU=False) == pytest.approx(model.ATTAINED["sm_90"]["fwd", False])
    assert launch() == pytest.approx(model.ATTAINED["sm_90"]["fwd", True])


def test_what_is_not_modelled_is_said_to_be_unknown():
    assert launch("_conv_fwd_kernel") == UNKNOWN
    assert launch(architecture="sm_120") == UNKNOWN
