"""The tuner: which tile each 3×3 convolution of a U-Net takes on the GPU that is here, by measuring.

``python -m benchmarks.tune`` walks over the layers of the U-Net (forward, dgrad and wgrad apart). From the rule's tile
it changes one parameter at a time, checks each candidate's numbers against float64, times all of them and the torch
backend in turn, and goes on from the fastest. A tile that beats the rule's by more than the noise becomes an entry of
``kernels/tiles.json``, which is data, reviewed in a diff; entries for other GPUs are kept. What was measured for every
layer, the torch backend included, goes to ``benchmarks/results/tune-<gpu>.json``.

``--dry-run`` needs no GPU: it prints the layers and candidates, and checks some in the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from tqdm import tqdm

from benchmarks import cases, peers, report
from benchmarks.cases import Case
from benchmarks.measure import ROOT, Times, interleaved, machine
from benchmarks.peers import PROVIDERS, Step

KINDS = {"inference": "conv3x3_fwd", "dgrad": "conv3x3_dgrad", "wgrad": "conv3x3_wgrad"}
GAIN = 1.02  # a tile must be this much faster than the rule's, and outside its spread
ROUNDS = 2  # changes of one parameter, one after the other
REGISTERS = 128  # 32-bit accumulators a thread at most: more spill

TRITON, TORCH = PROVIDERS["fastunet-triton"], PROVIDERS["fastunet-torch"]


def layers(dtype: torch.dtype) -> list[Case]:
    """The 3×3 convolutions of the U-Net in every direction, the largest pictures first."""
    return [case for case in cases.unet_layers(dtype=dtype) if case.op == "conv2d" and case.kernel == 3]


def neighbours(tile: Any, case: Case, kind: str) -> list[Any]:
    """The tiles that differ from ``tile`` in one parameter, as far as they fit the layer and the registers."""
    most = {"rows": 4, "columns": 128, "outputs": 128, "reduction": 128, "warps": 8, "stages": 4}
    least = {"rows": 1, "columns": 16, "outputs": 16, "reduction": 16, "warps": 4, "stages": 1}
    found = []
    for name in most:
        value = getattr(tile, name)
        for changed in (value + 1, value - 1) if name == "stages" else (value * 2, value // 2):
            if least[name] <= changed <= most[name]:
                found.append(tile._replace(**{name: changed}))
    width = 1 << max(4, (case.shape[3] - 1).bit_length())
    fitting = [t for t in found if t.columns <= width and t.images * t.columns <= 128]
    return [t for t in fitting if _accumulators(t, kind) <= REGISTERS]


def _accumulators(tile: Any, kind: str) -> float:
    """32-bit accumulators a thread: the rows of a tile, or in wgrad the three rows of the filter."""
    area = 3 * tile.reduction if kind == "conv3x3_wgrad" else tile.rows * tile.images * tile.columns
    return float(area * tile.outputs / (32 * tile.warps))


def tune(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Measure one layer: the key of its entry, the rule's tile and the best one, and milliseconds of both and torch."""
    from fastunet.kernels import table

    kind = KINDS[case.mode]
    problem = peers.pose(case, device)
    key, rule = ruled(case, problem)
    steps: dict[Any, Step] = {"torch": _checked(TORCH, case, problem)}
    best, times = rule, {}
    for _ in range(ROUNDS):
        for tile in [best, *neighbours(best, case, kind)]:
            if tile in steps:
                continue
            try:
                with table.forced(kind, tile):
                    steps[tile] = _forcing(kind, tile, _checked(TRITON, case, problem))
            except Exception as error:  # out of shared memory or registers, or numbers that are wrong: not a candidate
                if tile == rule:
                    raise
                tqdm.write(f"  {case.name}: {tuple(tile)}: {type(error).__name__}: {str(error)[:120]}")
        times = interleaved(steps, device, seconds, head_start=True)
        fastest = min((tile for tile in steps if tile != "torch"), key=lambda tile: times[tile].p50)
        if fastest == best:
            break
        best = fastest
    if not _faster(times[best], times[rule]):
        best = rule
    tiles = {"rule": list(rule), "tile": list(best)}
    milliseconds = {"rule_ms": times[rule].p50, "ms": times[best].p50, "torch_ms": times["torch"].p50}
    return {"case": case.name, "key": list(key), **tiles, **milliseconds, "candidates": len(steps) - 1}


def ruled(case: Case, problem: peers.Problem) -> tuple[Any, Any]:
    """The key under which ``case``'s kernel looks for a tile, and the tile that the rule gives it."""
    from fastunet.kernels import table

    with table.observed() as asked:
        peers.prepare(TRITON, case, problem)()
    return asked[KINDS[case.mode]]


def _checked(provider: peers.Provider, case: Case, problem: peers.Problem) -> Step:
    step = peers.prepare(provider, case, problem)
    problem.check(step(), None)
    return step


def _forcing(kind: str, tile: Any, step: Step) -> Step:
    from fastunet.kernels import table

    def run() -> Any:
        with table.forced(kind, tile):
            return step()

    return run


def _faster(new: Times, old: Times) -> bool:
    return new.p50 * GAIN < old.p50 and new.p80 < old.p20


def write(path: Path, found: Iterable[dict[str, Any]]) -> None:
    """Put the entries of ``found`` into the table at ``path``, one a line; layers whose rule is best lose theirs."""
    table = {tuple(entry["key"]): entry["tile"] for entry in json.loads(path.read_text())}
    for one in found:
        table.pop(tuple(one["key"]), None)
        if one["tile"] != one["rule"]:
            table[tuple(one["key"])] = one["tile"]
    lines = [json.dumps({"key": list(key), "tile": table[key]}) for key in sorted(table)]
    _write(path, "[" + ",".join(f"\n{line}" for line in lines) + ("\n]" if lines else "]") + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def dry_run(chosen: Sequence[Case]) -> int:
    """Print the layers; check the rule's tile and its neighbours on one tiny layer a direction, in the interpreter."""
    from fastunet.kernels import table

    for case in chosen:
        print(case.name)
    wrong = checked = 0
    for mode, kind in KINDS.items():
        case = Case("conv2d", (1, 16, 4, 16), torch.float16, mode, filters=16)  # type: ignore[arg-type]
        problem = peers.pose(case, torch.device("cpu"))
        _, rule = ruled(case, problem)
        for tile in [rule, *neighbours(rule, case, kind)][:4]:
            checked += 1
            try:
                with table.forced(kind, tile):
                    _checked(TRITON, case, problem)
            except Exception as error:
                wrong += 1
                print(f"WRONG {kind} {tuple(tile)}: {type(error).__name__}: {error}")
    print(f"{len(chosen)} layers; {checked} small candidates checked, {wrong} wrong")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="no layer is begun after it; 480")
    parser.add_argument("--only", default="", metavar="TEXT", help="only layers whose name contains TEXT")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: print the layers, check some candidates")
    options = parser.parse_args(arguments)
    chosen = [case for case in layers(getattr(torch, options.dtype)) if options.only in case.name]
    if not chosen:
        parser.error(f"no layer's name contains '{options.only}'; --dry-run prints all names")
    if options.dry_run:
        return dry_run(chosen)
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU; --dry-run checks the tuner without one")
    from fastunet.kernels import table

    device = torch.device("cuda")
    about = machine(device)
    print(report.machine_text(about))
    torch.backends.cudnn.benchmark = True
    begun, found = time.time(), []
    for case in tqdm(chosen, desc="layers", disable=None):
        if time.time() - begun > options.budget:
            tqdm.write(f"not measured: {case.name}")
            continue
        try:
            found.append(tune(case, device, 0.5))
        except Exception as error:
            tqdm.write(f"failed: {case.name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        one = found[-1]
        tqdm.write(
            f"{case.name}: {one['rule_ms']:.3f} → {one['ms']:.3f} ms with {one['tile']}, torch {one['torch_ms']:.3f}"
        )
        write(table.PATH, found)
        _write(
            ROOT / f"benchmarks/results/tune-{report.slug(about['gpu'])}.json", json.dumps([about, *found], indent=1)
        )
    print(
        f"{len(found)} layers measured, {sum(one['tile'] != one['rule'] for one in found)} tiles better than the rule's"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
