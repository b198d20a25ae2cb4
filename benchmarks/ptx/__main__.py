"""``make ptx``: every kernel's PTX, executed on this CPU.

    python -m benchmarks.ptx                                   # bfloat16 and TF32 on sm_80 and sm_90, float32 on sm_80
    python -m benchmarks.ptx --chip sm_90 --dtype bf16 --only conv
    python -m benchmarks.ptx --quick                           # the dozen cases that the tests run
    python -m benchmarks.ptx --faults 100                      # plant faults, and count those that are noticed

The exit status is 1 if an error is more than twice PyTorch's and four roundings of float32, or anything was found. TF32
runs what multiplies, and is compared with PyTorch's float32 on operands cut off to TF32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from benchmarks.cases import Case
from benchmarks.ptx import faults, large
from benchmarks.ptx.trials import Prepared, Trial, everything, launched, missed, quick

CHIPS = ("sm_80", "sm_90")
DTYPES = ("bf16", "fp16", "tf32", "fp32")
DEFAULT = [("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_80", "fp32"), ("sm_80", "tf32"), ("sm_90", "tf32")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.ptx", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--chip", action="append", choices=CHIPS, help="default: both, float32 on sm_80 only")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: bf16, tf32 and fp32")
    parser.add_argument("--only", default="", help="cases whose name, or one of whose kernels' names, contains this")
    parser.add_argument("--quick", action="store_true", help="the cases that the tests run")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="plant N faults in the PTX instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = [
        (chip, dtype)
        for chip in chosen.chip or CHIPS
        for dtype in chosen.dtype or ("bf16", "fp32", "tf32")
        if chosen.chip or chosen.dtype or (chip, dtype) in DEFAULT
    ]
    if chosen.faults and (chosen.dtype or chosen.quick):
        parser.error("--faults are planted in the --quick cases in bf16: leave --dtype and --quick out")
    if chosen.faults:
        return faults.run(chosen.faults, chosen.chip or CHIPS, chosen.only, chosen.json)
    trials = []
    for chip, dtype in pairs:
        for trial in _trials(chip, dtype, chosen.only, chosen.quick):
            trials.append(trial)
            if not chosen.json:
                print(_line(trial), flush=True)
    if not trials:
        print(f"no case is called as --only {chosen.only!r} says, and none launches such a kernel", file=sys.stderr)
        return 1
    if chosen.json:
        json.dump([_plain(trial) for trial in trials], sys.stdout)
    else:
        _table(trials)
    whole = [] if chosen.quick or chosen.only else [pair for pair in pairs if pair[1] != "tf32"]
    without = {name for pair in whole for name in missed(*pair)}
    for name in sorted(without):
        print(f"FAILED {name} is launched by no case: add one to benchmarks/ptx/trials.py", file=sys.stderr)
    return 0 if not without and all(trial.passed for trial in trials) else 1


def _trials(chip: str, dtype: str, only: str, short: bool) -> Iterator[Trial]:
    """Run the cases that are wanted."""

    def wanted(case: Case) -> bool:
        return only in case.name or any(only in name for name in launched(case, chip, dtype))

    for case in filter(wanted, quick(dtype) if short else everything(dtype)):
        yield Prepared(case, dtype).run(chip)
    for case in filter(wanted, [] if short else large.cases(dtype)):
        yield large.run(case, chip, dtype)


def _line(trial: Trial) -> str:
    verdict = "ok    " if trial.passed else "FAILED"
    lines = [
        f"{verdict} {trial.chip} {trial.case.name}, {sum(trial.launches.values())} launches, {trial.seconds:.1f} s"
    ]
    lines += [f"       {trial.stopped}"] if trial.stopped else []
    lines += [
        f"       {error.result}: largest error {error.largest:.1e}, PyTorch's {error.own_largest:.1e}; "
        f"typical {error.typical:.1e}, PyTorch's {error.own_typical:.1e}"
        for error in trial.errs
    ]
    lines += [f"       {finding}" for finding in trial.findings]
    return "\n".join(lines)


def _table(trials: list[Trial]) -> None:
    """A line for each kernel: of the results of its cases the error that is the most times PyTorch's."""
    print(f"\n{'kernel':<34}{'chip':<7}{'dtype':<7}{'launches':>8}{'error':>10}{'PyTorch':>10}  findings")
    rows = sorted({(name, trial.chip, trial.dtype) for trial in trials for name in trial.launches})
    for name, chip, dtype in rows:
        mine = [t for t in trials if (t.chip, t.dtype) == (chip, dtype) and name in t.launches]
        worst = max((t.worst for t in mine if t.worst), key=lambda error: error.times, default=None)
        error, own = worst.worst if worst else (float("nan"), float("nan"))
        found: Counter[str] = Counter()
        for trial in mine:
            for finding in trial.findings:
                if finding.kernel == name:
                    found[finding.what] += 1
        told = "; ".join(f"{what} (at {times} instructions)" for what, times in found.items()) or "none"
        launches = sum(t.launches[name] for t in mine)
        print(f"{name:<34}{chip:<7}{dtype:<7}{launches:>8}{error:>10.1e}{own:>10.1e}  {told}")
    failed = sum(not trial.passed for trial in trials)
    kernels = len({row[0] for row in rows})
    print(f"\n{len(trials)} cases, {kernels} kernels: {f'{failed} failed' if failed else 'all passed'}")


def _plain(trial: Trial) -> dict[str, object]:
    return {
        "case": trial.case.name,
        "chip": trial.chip,
        "dtype": trial.dtype,
        "passed": trial.passed,
        "launches": dict(trial.launches),
        "lines": sorted(trial.lines),
        "said": _line(trial),
    }


if __name__ == "__main__":
    sys.exit(main())
