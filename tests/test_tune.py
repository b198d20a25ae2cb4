"""The tuner and its table: candidates are sound and measured fairly, and what is written is what kernels take."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import python

pytest.importorskip("triton")

from benchmarks import isolation, peers, tune
from benchmarks.cases import Case
from benchmarks.measure import Times, machine
from fastunet.architecture import as_if_on
from fastunet.kernels import table
from fastunet.kernels.conv import FUNCTIONS
from fastunet.kernels.tiles import Tile, choose, choose_strided

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = Case("conv2d", (1, 16, 2, 16), torch.float16, "inference", filters=16, stats=False)
RULE = Tile(1, 4, 64, 64, 64, 4, 2, True)


@pytest.fixture
def tiles(tmp_path, monkeypatch):
    """An empty table in place of the one that is shipped."""
    path = tmp_path / "tiles.json"
    path.write_text("[]")
    monkeypatch.setattr(table, "PATH", path)
    table.forget()
    yield path
    table.forget()


def entry(
    tile: Tile = RULE,
    rule: Tile = RULE,
    width: int = 16,
    algorithm: str = "triton",
    source: str = "a row",
    batch: int = 1,
) -> dict:
    key = ("conv3x3_fwd", "sm_90", "16-bit", "ieee", "16", 16, width, batch)
    return {"key": list(key), "tile": list(tile), "rule": list(rule), "algorithm": algorithm, "source": source}


def chosen(width: int = 16, batch: int = 1, pointers: bool = False) -> Tile:
    x = torch.empty((batch, 16, 16, width), dtype=torch.float16, device="meta")
    return choose("conv3x3_fwd", batch, [16], 16, 16, width, [x], pointers)


def test_shipped_table_is_read():
    assert isinstance(table.entries(), dict)


def test_a_measured_tile_is_taken_for_its_shape(tiles):
    rule = chosen()
    better = rule._replace(stages=3)
    tune.write(tiles, [entry(better)])
    table.forget()
    assert chosen() == better
    assert chosen(width=13) == better, "up to the next power of two"
    assert chosen(width=32).stages == rule.stages
    assert not chosen(pointers=True).tma, "an entry for TMA says nothing about pointers"


def test_an_entry_holds_for_the_batches_that_are_nearest(tiles):
    rule = chosen()
    tune.write(tiles, [entry(rule._replace(stages=3)), entry(rule._replace(stages=4), batch=16)])
    table.forget()
    assert [chosen(batch=batch).stages for batch in (1, 2, 3, 7, 8, 16, 17, 64)] == [3, 3, 3, 4, 4, 4, 4, 4]


def test_where_one_batch_is_special_the_others_are_said_too(tiles):
    tune.write(tiles, [entry(algorithm="cudnn", batch=8), entry(), entry(width=64)])
    assert [(line["key"][6:], line.get("algorithm")) for line in json.loads(tiles.read_text())] == [
        ([16, 1], None),
        ([16, 8], "cudnn"),
    ]


def test_programs_share_a_tile_only_where_there_are_few(tiles):
    def shares(batch: int, channels: int, side: int, chip: str = "sm_90") -> int:
        x = torch.empty((batch, channels, side, side), dtype=torch.bfloat16, device="meta")
        with as_if_on(chip):
            return choose("conv3x3_fwd", batch, [channels], channels, side, side, [x]).shares

    assert shares(1, 512, 16) > 1
    assert shares(1, 256, 16, "sm_80") > 1
    assert shares(8, 512, 64) == 1
    assert shares(1, 64, 16) == 1, "a share of half a block of channels is too small"


def test_a_tile_of_more_pictures_than_there_are_is_not_taken(tiles):
    tune.write(tiles, [entry(chosen()._replace(images=4, stages=3))])
    table.forget()
    assert chosen(batch=2).stages != 3
    assert chosen(batch=4).stages == 3


def test_a_measured_tile_of_a_strided_convolution_is_taken(tiles):
    def chosen_strided(kind: str) -> Tile:
        x = torch.empty((2, 16, 8, 16), dtype=torch.float16, device="meta")
        return choose_strided(kind, 2, 16, 32, 8, 16, x, False)

    rule = chosen_strided("conv3x3_down")
    key = table.key("conv3x3_down", [16], 32, 16, 2, table.arithmetic(torch.empty(0, dtype=torch.float16)))
    better = rule._replace(stages=rule.stages + 1)
    tune.write(tiles, [entry(better, rule) | {"key": list(key)}])
    table.forget()
    assert chosen_strided("conv3x3_down") == better
    assert chosen_strided("conv3x3_up") != better


@pytest.mark.parametrize("case", tune.strided_layers(torch.float16, 16, 16, 1)[:15], ids=lambda case: case.name)
def test_every_strided_convolution_has_a_kind_of_its_own_and_candidates(case):
    key, rule = tune.ruled(case, peers.pose(case, CPU))
    ends = {"inference": ("_down", "_up"), "dgrad": ("_dgrad",), "wgrad": ("_down_wgrad", "_up_wgrad")}
    assert key[0].endswith(ends[case.mode])
    found = tune.neighbours(rule, case, key[0])
    assert found
    assert {(tile.rows, tile.shares) for tile in found} == {(1, 1)}


def test_table_keeps_other_entries_and_forgets_tiles_that_no_longer_win(tiles):
    tune.write(tiles, [entry(RULE._replace(stages=3)), entry(RULE._replace(warps=8), width=64)])
    tune.write(tiles, [entry(RULE)])
    assert json.loads(tiles.read_text()) == [
        {"key": entry(width=64)["key"], "tile": list(RULE._replace(warps=8)), "source": "a row"}
    ]
    assert tiles.read_text().count("\n") == 3, "one entry a line"


def test_shipped_entries_say_where_they_come_from_and_name_what_there_is():
    for (kind, *_), batches in table.entries().items():
        for one in batches.values():
            assert one.algorithm == "triton" or (kind, one.algorithm) in FUNCTIONS
            assert one.source.startswith("tune-"), "what was measured, and nothing else"
            assert one.tile is None or len(one.tile) == len(Tile._fields)


@pytest.mark.parametrize("case", tune.layers(torch.bfloat16)[::7], ids=lambda case: case.name)
def test_candidates_differ_in_one_parameter_or_two_and_fit(case):
    kind = tune.KINDS[case.mode]
    found = tune.neighbours(RULE, case, kind)
    assert found
    for tile in found:
        assert sum(a != b for a, b in zip(tile, RULE, strict=True)) in (1, 2)
        assert tune._accumulators(tile, kind) <= tune.REGISTERS
        assert kind == "conv3x3_wgrad" or tile.images * tile.columns >= 64, "a wgmma has 64 rows"
        assert tile.columns <= case.shape[3] * 2


def test_more_warps_come_with_more_pixels():
    case = next(case for case in tune.layers(torch.bfloat16) if case.mode == "inference")
    assert RULE._replace(columns=128, warps=8) in tune.neighbours(RULE, case, "conv3x3_fwd")


def times(**milliseconds: float) -> Times:
    return Times(milliseconds["ms"] * 0.99, milliseconds["ms"], milliseconds["ms"] * 1.01, 10)


@pytest.fixture
def measured_as(monkeypatch):
    """Candidates change the stages alone, and take as long as a function of their stages says."""

    def plan(milliseconds, **others: float) -> None:
        def changed(tile, case, kind):
            return [tile._replace(stages=tile.stages + 1)]

        def fake(steps, device, seconds, head_start):
            for step in steps.values():
                step()
            return {choice: times(ms=taking(choice)) for choice in steps}

        def taking(choice) -> float:
            name = choice if isinstance(choice, str) else choice.algorithm
            return milliseconds(choice.tile.stages) if name == "triton" else others.get(name, 9.0)

        monkeypatch.setattr(tune, "neighbours", changed)
        monkeypatch.setattr(tune, "interleaved", fake)

    return plan


def test_the_fastest_tile_is_found_step_by_step(measured_as, tiles):
    measured_as(lambda stages: 3.0 / stages, torch=1.0)
    found = tune.tune(TINY, CPU, 0.0)
    assert found["tile"][6] == found["rule"][6] + tune.ROUNDS
    assert found["torch_ms"] == 1.0
    assert found["algorithm"] == "triton"
    assert found["ms"] < found["rule_ms"]


@pytest.mark.parametrize(("cudnn", "algorithm"), [(2.9, "triton"), (2.0, "cudnn")])
def test_another_algorithm_is_taken_if_it_beats_the_tiles_by_more_than_the_noise(cudnn, algorithm, measured_as, tiles):
    measured_as(lambda stages: 2.95, cudnn=cudnn)
    found = tune.tune(TINY, CPU, 0.0)
    assert found["algorithm"] == algorithm
    assert found["cudnn_ms"] == cudnn


def test_a_gain_within_the_noise_changes_nothing(measured_as, tiles):
    measured_as(lambda stages: 3.0 - 0.01 * stages)
    found = tune.tune(TINY, CPU, 0.0)
    assert found["tile"] == found["rule"]


def test_a_candidate_with_wrong_numbers_is_none(measured_as, tiles, monkeypatch):
    measured_as(lambda stages: 3.0 / stages)
    check = peers.Problem.check
    rule = chosen()

    def suspicious(problem, found, compared):
        if table._forced.get("conv3x3_fwd", table.Choice("triton", rule)) != table.Choice("triton", rule):
            raise peers.WrongNumbersError("planted")
        return check(problem, found, compared)

    monkeypatch.setattr(peers.Problem, "check", suspicious)
    found = tune.tune(TINY, CPU, 0.0)
    assert found["tile"] == found["rule"]
    assert found["candidates"] == 1


def test_a_lost_process_costs_one_layer_and_what_was_found_is_kept(tiles, tmp_path, monkeypatch, capsys):
    layers = [replace(TINY, filters=16 << number) for number in range(3)]
    begun = []

    def messages(work, left, patience):
        begun.append([case.filters for case in left])
        yield "machine", machine(CPU)
        for case in left:
            yield "layer", case
            if case.filters == 32:
                raise tune.LostError("did not answer for 60 s")
            better = entry(RULE._replace(stages=3), width=case.filters)
            yield "found", better | {"case": case.name, "ms": 1.0, "rule_ms": 2.0}

    monkeypatch.setattr(isolation, "messages", messages)
    assert tune.measure(layers, time.time() + 60, tmp_path / "results", tiles) == 0
    assert begun == [[16, 32, 64], [64]]
    _, *found = json.loads((tmp_path / "results" / "tune-cpu.json").read_text())
    assert [one["case"] for one in found] == [layers[0].name, layers[2].name]
    assert [line["key"][6] for line in json.loads(tiles.read_text())] == [16, 64]
    assert f"failed: {layers[1].name}: did not answer for 60 s" in capsys.readouterr().out


def test_dry_run_checks_candidates_in_the_interpreter():
    done = python("-m", "benchmarks.tune", "--dry-run", "--only", "512x512", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "small candidates checked, 0 wrong" in done.stdout


AHEAD = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import torch
from benchmarks import ahead
from benchmarks.cases import Case
from fastunet.kernels.tiles import Tile

case = Case("conv2d", (1, 16, 2, 16), torch.float16, "inference", filters=16, stats=False)
tile = Tile(1, 1, 16, 16, 16, 4, 2)
cache = Path({path!r})
with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    for choices in ([tile, tile._replace(warps=8), tile._replace(warps=3)], [tile]):
        ahead.choices(case, "conv3x3_fwd", choices, "sm_90", pool)
        print(len(list(cache.rglob("_conv3x3_fwd_kernel.cubin"))))
"""


def test_candidates_are_compiled_ahead_and_once(tmp_path):
    done = python("-c", AHEAD.format(path=str(tmp_path)), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["2", "2"], "what does not compile is left out"


@pytest.mark.parametrize(
    ("kind", "sources", "filters", "chosen"),
    [
        ("conv3x3_fwd", (64,), 64, "stored"),
        ("conv3x3_fwd", (64,), 128, "cudnn"),
        ("conv3x3_fwd", (32,), 128, "stored"),
        ("conv3x3_fwd", (128, 128), 128, "cudnn"),
        ("conv3x3_act", (256,), 256, "cudnn"),
        ("conv3x3_act", (128, 128), 128, "triton"),
        ("conv3x3_act", (256, 256), 256, "cudnn"),
        ("conv3x3_dgrad", (64,), 64, "triton"),
        ("conv3x3_dgrad", (64,), 128, "cudnn"),
        ("conv3x3_wgrad", (64, 64), 64, "triton"),
        ("conv3x3_wgrad", (256,), 512, "cudnn"),
    ],
    ids=str,
)
def test_what_nobody_measured_goes_by_what_an_h200_showed(tiles, kind, sources, filters, chosen):
    hopper = table.Arithmetic("sm_90", "16-bit", "ieee")
    assert table.algorithm(kind, sources, filters, 256, 8, hopper) == chosen
    for other in (hopper._replace(architecture="sm_80"), hopper._replace(dtype="float32")):
        assert table.algorithm(kind, sources, filters, 256, 8, other) == "triton"
    assert (kind, chosen) in FUNCTIONS
