"""The tuner: which algorithm and tile each convolution of a U-Net takes on the GPU that is here, by measuring.

``python -m benchmarks.tune`` walks over the layers of the U-Net (forward, dgrad and wgrad apart), those with the most
work first. Of 3×3 convolutions of stride 1 it times every algorithm (see ``kernels/conv.py``) and the torch
backend. Where Triton's kernels are not far behind, it changes one parameter of the rule's tile, or two that go
together, compiles the candidates on all cores, checks the numbers of each against float64, times all of them in turn,
and goes on from the fastest. What beats the rule by more than the noise becomes an entry of ``kernels/tiles.json``,
which is data, reviewed in a diff; entries for other GPUs are kept. What was measured for every layer goes to
``tune-<gpu>.json`` in ``--results``. Both files are written after every layer; a layer that crashes or hangs costs its
own entry.

``--dry-run`` needs no GPU: it prints the layers, and checks some candidates in the interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from tqdm import tqdm

from benchmarks import ahead, cases, peers, report
from benchmarks.cases import Case
from benchmarks.isolation import LostError, Message, describe, give_up_if_poisoned, outliving
from benchmarks.measure import Step, Times, interleaved, machine, rewrite
from benchmarks.peers import PROVIDERS
from benchmarks.report import RESULTS

KINDS = {"inference": "conv3x3_fwd", "dgrad": "conv3x3_dgrad", "wgrad": "conv3x3_wgrad"}
ACT = "conv3x3_act"  # inference normalises its results: the algorithm is chosen apart, the tile is the forward's
GAIN = 1.02  # a tile must be this much faster than the rule's, and outside its spread
ROUNDS = 2  # changes of one parameter, one after the other
REACH = 1.25  # no tile is tried where Triton takes so many times as long as another algorithm
PATIENCE = 60  # seconds a layer may be silent
REGISTERS = 128  # 32-bit accumulators a thread at most: more spill

TRITON, TORCH = PROVIDERS["fastunet-triton"], PROVIDERS["fastunet-torch"]


def layers(dtype: torch.dtype, base: int = 64, size: int = 512, batch: int = 8) -> list[Case]:
    """The 3×3 convolutions of the U-Net in every direction, the largest pictures first; the image's has one tile."""
    found = cases.unet_layers(base, size, batch, dtype=dtype)
    return [case for case in found if case.op == "conv2d" and case.kernel == 3 and not case.image]


def normalising_layers(dtype: torch.dtype) -> list[Case]:
    """The same as inference asks for them: plain sources, and a result that is normalised before it is stored."""
    forward = [case for case in layers(dtype) if case.mode == "inference"]
    return [replace(case, op="conv2d_act", affine=False, stats=False, pool=not case.skip) for case in forward]


def strided_layers(dtype: torch.dtype, base: int = 64, size: int = 512, batch: int = 8) -> list[Case]:
    """The other convolutions of the networks in every direction: 2×2 transposed; of the strided U-Net, 3×3 of stride 2
    and transposed; and the 1×1 head."""
    shape = (batch, base, size, size)
    found = [Case("conv2d", shape, dtype, filters=22, kernel=1, stats=False, bias=True)]
    for level in range(4):
        channels, side = base << level, size >> level
        above, below = (batch, channels, side, side), (batch, 2 * channels, side // 2, side // 2)
        found.append(Case("conv2d", above, dtype, filters=2 * channels, stride=2))
        for kernel in (2, 3):
            plain = kernel == 2
            up = Case("conv_transpose2d", below, dtype, filters=channels, kernel=kernel, stats=not plain, bias=plain)
            found.append(up)
    return [replace(case, mode=mode) for case in found for mode in KINDS]  # type: ignore[arg-type]


def neighbours(tile: Any, case: Case, kind: str) -> list[Any]:
    """The tiles that differ from ``tile`` in one parameter, or in two that go together, as far as they fit the layer
    and the registers."""
    most = {"rows": 4, "columns": 128, "outputs": 128, "reduction": 128, "warps": 8, "stages": 4, "shares": 8}
    least = {"rows": 1, "columns": 16, "outputs": 16, "reduction": 16, "warps": 4, "stages": 1, "shares": 1}
    pixels = 64 if tile.tma else 16  # rows of a wgmma
    if kind.endswith("wgrad"):
        least["reduction"], pixels = pixels, 16
    if kind == "conv3x3_wgrad":  # it divides pixels into slabs instead of shares, and rows cost it no accumulators
        del most["shares"]
        most["rows"] = 8
    if kind not in KINDS.values():  # their tiles have only columns of pixels, and no shares
        del most["rows"], most["shares"]
        most |= {"columns": 256, "outputs": 256}
    read, written = max(case.shape[1], case.skip), case.filters
    if kind.endswith("dgrad"):
        read, written = written, read
    most |= {"reduction": min(most["reduction"], _power(read)), "outputs": min(most["outputs"], _power(written))}
    moves = [{name: up} for name in most for up in (True, False)]
    # Two at once: a larger tile with more warps, so that a thread has as many accumulators; rows traded for columns.
    moves += [{name: up, "warps": up} for name in ("rows", "columns", "outputs") for up in (True, False)]
    moves += [{"rows": up, "columns": not up} for up in (True, False)]
    made = [(_moved(tile, move), move) for move in moves if most.keys() >= move.keys()]
    found = [t for t, move in made if all(least[name] <= getattr(t, name) <= most[name] for name in move)]
    if kind in KINDS.values():
        width = 1 << max(4, (case.shape[3] - 1).bit_length())
        found = [t for t in found if t.columns <= width]
    pixels = min(pixels, tile.images * tile.columns)
    fitting = [t for t in found if pixels <= t.images * t.columns <= most["columns"]]
    return [t for t in fitting if _accumulators(t, kind) <= REGISTERS]


def _moved(tile: Any, move: dict[str, bool]) -> Any:
    """``tile`` with parameters doubled (True) or halved; with a stage more or fewer."""
    changes = {}
    for name, up in move.items():
        value = getattr(tile, name)
        changes[name] = (value + 1 if up else value - 1) if name == "stages" else value * 2 if up else value // 2
    return tile._replace(**changes)


def _power(size: int) -> int:
    """The power of two that covers ``size``, at least 16."""
    return 1 << max(4, (size - 1).bit_length())


def _accumulators(tile: Any, kind: str) -> float:
    """32-bit accumulators a thread: the rows of a tile, or in wgrad the rows of the filter."""
    ksize = int(kind[4])
    area = ksize * tile.reduction if kind.endswith("wgrad") else tile.rows * tile.images * tile.columns
    return float(area * tile.outputs / (32 * tile.warps))


def tune(case: Case, device: torch.device, seconds: float, pool: Executor | None = None) -> dict[str, Any]:
    """Measure one layer: the key of its entry, the rule's tile, the best one, the best algorithm, and milliseconds."""
    from fastunet.architecture import architecture
    from fastunet.kernels.table import Choice

    problem = peers.pose(case, device)
    key, rule = ruled(case, problem)
    kind = key[0]
    if case.op == "conv2d_act":
        kind, key = ACT, (ACT, *key[1:])
    steps: dict[Any, Step] = {}

    def add(choices: Iterable[Any]) -> None:
        for choice in choices:
            try:
                steps[choice] = _forcing(kind, choice, case, problem)
            except Exception as error:  # out of memory or registers, or wrong numbers: not a candidate
                if choice == Choice("triton", rule):
                    raise
                said = choice if isinstance(choice, str) else tuple(choice)
                tqdm.write(f"  {case.name}: {said}: {describe(error)[:160]}")

    triton = [name for name in ("triton", "stored") if name == "triton" or name in algorithms(kind)]
    others = [name for name in algorithms(kind) if name not in triton]
    add(["torch", *(Choice(name, rule) for name in triton), *others])
    times = interleaved(steps, device, seconds, head_start=True)
    base = min((Choice(name, rule) for name in triton if Choice(name, rule) in times), key=lambda one: times[one].p50)
    best = base
    other = min((name for name in others if name in times), key=lambda name: times[name].p50, default=None)
    if kind != ACT and (other is None or times[base].p50 <= REACH * times[other].p50):
        for _ in range(ROUNDS):
            choices = [Choice(base.algorithm, tile) for tile in neighbours(best.tile, case, kind)]
            choices = [choice for choice in choices if choice not in steps]
            if pool is not None:
                ahead.choices(case, kind, choices, architecture(device), pool)
            add(choices)
            times = interleaved(steps, device, seconds, head_start=True)
            tiles = [choice for choice in steps if isinstance(choice, Choice) and choice.algorithm == base.algorithm]
            fastest = min(tiles, key=lambda choice: times[choice].p50)
            if fastest == best:
                break
            best = fastest
    if not _faster(times[best], times[base]):
        best = base
    algorithm = best.algorithm
    if algorithm != "triton" and not _faster(times[best], times[Choice("triton", rule)]):
        algorithm = "triton"
    if other is not None and _faster(times[other], times[Choice(algorithm, best.tile)]):
        algorithm = other
    measured = {name: times[name].p50 for name in ("torch", *others) if name in times}
    measured |= {name: times[Choice(name, rule)].p50 for name in triton if Choice(name, rule) in times}
    return {
        "case": case.name, "key": list(key), "rule": list(rule), "tile": list(best.tile), "algorithm": algorithm,
        "rule_ms": times[base].p50, "ms": times[best].p50, **{f"{name}_ms": ms for name, ms in measured.items()},
        "candidates": sum(choice != "torch" for choice in steps),
    }  # fmt: skip


def algorithms(kind: str) -> list[str]:
    """The algorithms beside Triton's implicit GEMM for kernels of this kind."""
    from fastunet.kernels.conv import FUNCTIONS

    return [name for each, name in FUNCTIONS if each == kind and name != "triton"]


def ruled(case: Case, problem: peers.Problem) -> tuple[Any, Any]:
    """The key under which ``case``'s kernel looks for a tile, and the tile that the rule gives it."""
    from fastunet.kernels import table

    with table.observed() as asked:
        peers.prepare(TRITON, case, problem)()
    return list(asked.values())[-1]  # the last one: before a backward the forward asks too


def _forcing(kind: str, choice: Any, case: Case, problem: peers.Problem) -> Step:
    """The step that takes ``choice``, checked; "torch" is the backend."""
    from fastunet.kernels import table

    if choice == "torch":
        return peers.checked(TORCH, case, problem)[0]
    with table.forced({kind: choice}):
        step, _ = peers.checked(TRITON, case, problem)

    def run() -> Any:
        with table.forced({kind: choice}):
            return step()

    return run


def _faster(new: Times, old: Times) -> bool:
    return new.p50 * GAIN < old.p50 and new.p80 < old.p20


def write(path: Path, found: Iterable[dict[str, Any]]) -> None:
    """Put ``found`` into the table at ``path``, an entry a line; layers of which there is nothing to say for any batch
    have none."""
    table = {tuple(entry["key"]): entry for entry in json.loads(path.read_text())}
    for one in found:
        key = tuple(one["key"])
        table[key] = {"key": list(key)}
        if one["algorithm"] != "triton":
            table[key]["algorithm"] = one["algorithm"]
        if one["tile"] != one["rule"]:
            table[key]["tile"] = one["tile"]
        table[key]["source"] = one["source"]
    special = {key[:-1] for key, entry in table.items() if "algorithm" in entry or "tile" in entry}
    lines = [json.dumps(table[key]) for key in sorted(table) if key[:-1] in special]
    rewrite(path, "[" + ",".join(f"\n{line}" for line in lines) + ("\n]" if lines else "]") + "\n")


# ---- commands ----------------------------------------------------------------------------------------------------


def dry_run(chosen: Sequence[Case]) -> int:
    """Print the layers; check the rule's tile and its neighbours on tiny layers of each kind, in the interpreter."""
    from fastunet.kernels import table

    for case in chosen:
        print(case.name)
    wrong = checked = 0
    tiny = [Case("conv2d", (1, 16, 4, 16), torch.float16, mode, filters=16) for mode in KINDS]  # type: ignore[arg-type]
    for case in [*tiny, *strided_layers(torch.float16, 16, 16, 1)[: 4 * len(KINDS)]]:
        problem = peers.pose(case, torch.device("cpu"))
        (kind, *_), rule = ruled(case, problem)
        for choice in [*algorithms(kind), rule, *neighbours(rule, case, kind)[: 3 if case in tiny else 1]]:
            checked += 1
            try:
                with table.forced({kind: choice}):
                    peers.checked(TRITON, case, problem)
            except Exception as error:
                wrong += 1
                print(f"WRONG {kind} {choice}: {describe(error)}")
    print(f"{len(chosen)} layers; {checked} small candidates checked, {wrong} wrong")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    from fastunet.kernels import table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="no layer is begun after it; 480")
    parser.add_argument("--only", default="", metavar="TEXT", help="only layers whose name contains TEXT")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="for tune-<gpu>.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="which to complete; kernels/tiles.json")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: print the layers, check some candidates")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    everything = layers(dtype) + normalising_layers(dtype) + strided_layers(dtype)
    chosen = [case for case in everything if options.only in case.name]
    if not chosen:
        parser.error(f"no layer's name contains '{options.only}'; --dry-run prints all names")
    if options.dry_run:
        return dry_run(chosen)
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU; --dry-run does not")
    chosen.sort(key=lambda case: -case.flops)
    return measure(chosen, time.time() + options.budget, options.results, options.table or table.PATH)


# ---- measuring, in a process of its own ----------------------------------------------------------------------------


def work(chosen: Sequence[Case]) -> Iterator[Message]:
    """Tune layers, telling how it goes: the machine; for every layer its case, and what was found or went wrong."""
    device = torch.device("cuda")
    yield "machine", machine(device)
    torch.backends.cudnn.benchmark = True
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    for case in chosen:
        yield "layer", case
        try:
            yield "found", tune(case, device, 0.2, pool)
        except Exception as error:
            yield "failed", describe(error)
            give_up_if_poisoned(device)


def measure(chosen: Sequence[Case], deadline: float, results: Path, path: Path) -> int:
    """Tune ``chosen`` until the deadline, and write what is found after every layer."""
    about: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    left = list(chosen)
    bar = tqdm(total=len(chosen), desc="layers", disable=None)
    patience = lambda: (min(PATIENCE, deadline - time.time()), f"for {PATIENCE} s, or in time")  # noqa: E731
    case = left[0]

    def rest(error: LostError) -> Generator[Message, None, list[Case] | None]:
        nonlocal case, left
        yield "failed", str(error)
        left = [each for each in left if each != case]
        case = left[0] if left else case
        return list(left) if left and time.time() < deadline else None

    begun = list(left) if time.time() < deadline else None
    with contextlib.closing(outliving(work, begun, patience, rest)) as stream:
        for what, value in stream:
            if what == "machine":
                if not about:
                    print(report.machine_text(value), flush=True)
                about = value
            elif what == "layer" and time.time() > deadline:
                break
            elif what == "layer":
                case = value
                left.remove(case)
                bar.update()
            elif what == "failed":
                tqdm.write(f"failed: {case.name}: {value}")
            else:
                file = results / f"tune-{report.slug(about['gpu'])}.json"
                found.append(value | {"source": f"{file.stem}: {case.name}"})
                tqdm.write(_line(value))
                write(path, found)
                _record(file, about, found[-1])
    for case in left:
        tqdm.write(f"not measured: {case.name}")
    better = sum(one["tile"] != one["rule"] for one in found)
    other = sum(one["algorithm"] != "triton" for one in found)
    print(f"{len(found)} layers measured, {better} tiles better than the rule's, {other} layers for another algorithm")
    return 0


def _record(file: Path, about: dict[str, Any], one: dict[str, Any]) -> None:
    """Put ``one`` into ``file``, a list that begins with the machine; of each case what was measured last is kept."""
    kept = json.loads(file.read_text())[1:] if file.exists() else []
    kept = [other for other in kept if other["case"] != one["case"]]
    rewrite(file, json.dumps([about, *kept, one], indent=1) + "\n")


def _line(one: dict[str, Any]) -> str:
    """What was found of one layer, in a line."""
    others = ", ".join(f"{name.removesuffix('_ms')} {one[name]:.3f}" for name in one if name.endswith("_ms"))
    return f"{one['case']}: {one['algorithm']}, {one['ms']:.3f} ms with {tuple(one['tile'])}; {others}"


if __name__ == "__main__":
    sys.exit(main())
