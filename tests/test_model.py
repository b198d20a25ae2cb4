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
    normalised: bool = True,
    **changes: int,
) -> float:
    shape = {"images": 1, "rows": 2, "columns": 128, "outputs": 128, "reduction": 64} | changes
    tile = SimpleNamespace(**shape)
    kernel = SimpleNamespace(__name__=name, arg_names=["affine_ptr", "N", "P", "Q", "tiles_h", "tiles_w", "C", "K"])
    args = (1 if normalised else None, 1, height, 8192, 8 // tile.rows, 8192 // tile.columns, channels, 128)
    constants = {"TILE": tile, "SLOPE": 0.0 if normalised else None, "num_warps": 8, "num_stages": 2}
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
    assert launch(outputs=64) < launch(outputs=128)
    assert launch(rows=1) < launch(rows=2)


def test_a_prologue_costs_where_outputs_are_few(monkeypatch, unbounded):
    monkeypatch.setitem(PACES, "sm_90", replace(PACES["sm_90"], l2=1e9))
    narrow = {"rows": 4, "columns": 4096, "outputs": 32}  # where the weights' bytes count for nothing
    plain = launch(**narrow, normalised=False)
    assert launch(**narrow) < plain
    assert launch("_conv3x3_dgrad_kernel", **narrow) == plain


def test_what_a_tile_multiplies_outside_the_picture_or_the_channels_is_lost():
    assert launch(height=5) == pytest.approx(launch() * 5 / 8)
    assert launch(channels=96) == pytest.approx(launch() * 3 / 4)


@pytest.mark.parametrize("architecture", PACES)
@pytest.mark.parametrize("kernel", ["fwd", "dgrad", "wgrad"])
def test_nothing_attains_more_than_is_sustained(kernel, architecture):
    assert 0 < launch(f"_conv3x3_{kernel}_kernel", architecture=architecture) <= SUSTAINED


def test_nothing_attains_more_than_was_measured():
    assert launch(normalised=False) == pytest.approx(model.ATTAINED["sm_90"]["fwd", False])
    assert launch() == pytest.approx(model.ATTAINED["sm_90"]["fwd", True])


def test_what_is_not_modelled_is_said_to_be_unknown():
    assert launch("_conv_fwd_kernel") == UNKNOWN
    assert launch(architecture="sm_120") == UNKNOWN
