"""Where the time of one training step or inference goes, layer by layer and kernel by kernel.

``python -m benchmarks.profile --net unet --bilinear`` runs a step under torch.profiler. Every operator of fastunet is a
range named by its layer and its name; bytes and FLOPs are those that the ledger (:mod:`benchmarks.traffic`) counts for
the same step, so that each line has its GB/s and TFLOP/s, and their share of what the machine does at most: the rates
of a copy and of a matrix product, measured first or given.

``--trace FILE`` keeps the Chrome trace, for https://ui.perfetto.dev. ``--nvtx`` runs the step for a profiler outside,
inside NVTX ranges and between cudaProfilerStart and cudaProfilerStop. Nsight Compute, of one kernel:

    ncu --profile-from-start off --set full --import-source yes --kernel-name KERNEL --launch-count 4 --export KERNEL \\
        python -m benchmarks.profile --nvtx

Ranges come from a TorchDispatchMode and not from hooks, which would make blocks run as ordinary modules. A step inside
one takes longer on the CPU; a kernel does not. The first line has the time of a step outside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

import fastunet
from benchmarks.measure import DTYPES, roofs
from benchmarks.nets import NetCase, parts
from benchmarks.traffic import Pass, Roofs, Traced, account, add_net_arguments, aligned, case_of, made, run
from fastunet.architecture import architecture

TOP = 20  # lines of a table
CPU_ONLY = (
    "This machine has no CUDA GPU: these are CPU times of the torch backend, and there are no kernels, tensor cores or "
    "GPU memory to show."
)


@dataclass
class Line:
    """One line of a table: calls and seconds as measured, bytes and FLOPs as counted."""

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0


@dataclass
class Tables:
    """Lines by range, "layer operator", and by kernel; and the seconds that all of it took."""

    ranges: dict[str, Line] = field(default_factory=dict)
    kernels: dict[str, Line] = field(default_factory=dict)
    seconds: float = 0.0


# ---- the step and its ranges -------------------------------------------------------------------------------------


def traced(case: NetCase, device: torch.device) -> Traced:
    """The step as the ledger knows it, with the kernels that ``device`` gets."""
    if device.type == "cpu":
        return run(case, fastunet, backend="torch")
    return run(case, fastunet, architecture(device))


def labels(step: Traced) -> list[str]:
    """The range of each operator of fastunet in a step, in order: "layer operator"."""
    return [_label(layer, call.name) for call, _, layer in step if call.name.startswith("fastunet.")]


def _label(layer: str, op: str) -> str:
    return f"{layer} {op.removeprefix('fastunet.')}"


class Ranges(TorchDispatchMode):
    """Inside, the operators of fastunet are ranges with these names, one after the other."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = iter(names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastunet":
            return func(*args, **(kwargs or {}))
        op, name = func._schema.name.removeprefix("fastunet::"), next(self.names, "nothing")
        if name.rpartition(" ")[2] != op:
            raise RuntimeError(f"expected the operators that the ledger saw, next {name}, got {op}")
        with record_function(name):
            return func(*args, **(kwargs or {}))


def prepare(case: NetCase, device: torch.device) -> Callable[[], None]:
    """A function that does one step of ``case`` on random data, as the ledger counts it."""
    training = case.mode == "training"
    # On a CPU networks run as plain modules unless somebody asks for operators, and only those have ranges.
    chosen: dict[str, Any] = {"backend": "torch"} if device.type == "cpu" else {}
    model, loss, x, labels = parts(case, fastunet, device, **chosen)
    parameters = list(model.parameters())

    def step() -> None:
        with torch.set_grad_enabled(training):
            with record_function("forward"):
                y = model(x)
            if training:
                with record_function("loss"):
                    value = loss(y, labels)
                with record_function("backward"):
                    torch.autograd.grad(value, parameters)

    return step


def chrome_trace(step: Callable[[], None], names: Iterable[str], device: torch.device, path: Path) -> None:
    """Run ``step`` under torch.profiler, in ranges of these names, and write the Chrome trace to ``path``."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler, Ranges(names), record_function("step"):
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


# ---- from a trace to tables --------------------------------------------------------------------------------------


def tabulate(events: list[dict[str, Any]], passes: list[Pass]) -> Tables:
    """The tables of a Chrome trace's events: of its kernels where it has any, else of the CPU's ranges."""
    tables = Tables()
    wanted = {_label(p.layer, p.op) for p in passes if p.op.startswith("fastunet.")}
    launched = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=_start)
    kind = "gpu_user_annotation" if launched else "user_annotation"
    spans = sorted((e for e in events if e.get("cat") == kind and e["name"] in wanted), key=_start)
    for span in spans:
        line = tables.ranges.setdefault(span["name"], Line())
        line.calls += 1
        line.seconds += 0.0 if launched else span["dur"] / 1e6
    starts = [_start(span) for span in spans]
    for kernel in launched:
        seconds = kernel["dur"] / 1e6
        tables.seconds += seconds
        line = tables.kernels.setdefault(kernel["name"], Line())
        line.calls += 1
        line.seconds += seconds
        # On one stream ranges follow each other; the one that began last holds the kernel or none does.
        middle = _start(kernel) + kernel["dur"] / 2
        at = bisect_right(starts, middle) - 1
        if at >= 0 and middle <= starts[at] + spans[at]["dur"]:
            tables.ranges[spans[at]["name"]].seconds += seconds
    if not launched:
        tables.seconds = sum(e["dur"] for e in events if e.get("cat") == kind and e["name"] == "step") / 1e6
    for p in passes:
        for found, key in ((tables.ranges, _label(p.layer, p.op)), (tables.kernels, p.name)):
            if key in found:
                found[key].bytes += p.bytes
                found[key].flops += p.flops
    return tables


def _start(event: dict[str, Any]) -> float:
    return float(event["ts"])


def table(title: str, lines: dict[str, Line], total: float, roofs: Roofs) -> str:
    """The lines that took longest, as text; a dash where the ledger has no bytes or FLOPs to compare with."""
    rows = [(title, "calls", "ms", "of time", "GB/s", "of roof", "TFLOP/s", "of roof")]
    for name, line in sorted(lines.items(), key=lambda item: -item[1].seconds)[:TOP]:
        cells = [str(line.calls), f"{line.seconds * 1e3:.3f}", f"{line.seconds / total:.1%}"]
        for amount, unit, roof in ((line.bytes, 1e9, roofs.bandwidth), (line.flops, 1e12, roofs.tflops)):
            rate = amount / unit / line.seconds if line.seconds else 0.0
            cells += [f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}", f"{rate / roof:.0%}"] if rate else ["-", "-"]
        rows.append((name if len(name) <= 70 else f"{name[:67]}...", *cells))  # type: ignore[arg-type]
    return aligned(rows)


# ---- roofs -------------------------------------------------------------------------------------------------------


def measured_roofs(device: torch.device, dtype: torch.dtype) -> Roofs:
    """The rates of a large copy, reading and writing, and of a large square matrix product on ``device``."""
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32  # as the convolutions multiply
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32" if tf32 else "fp32"}[dtype]
    found = roofs(device, (name,))
    return Roofs(found["copy_gbs"], found[f"{name}_tflops"])


# ---- the command -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description="Profile one step of a network.")
    add_net_arguments(parser)
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="keep the Chrome trace")
    parser.add_argument("--nvtx", action="store_true", help="run the step once for nsys or ncu, and print nothing")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        parser.set_defaults(base=16, size=128, batch=1, dtype="fp32")
    options = parser.parse_args(arguments)
    case = case_of(parser, options)
    for name in ("bandwidth", "tflops"):
        if (given := getattr(options, name)) is not None and given <= 0:
            parser.error(f"expected --{name} above 0, got {given:g}; leave it out and it is measured")
    if options.nvtx and device.type == "cpu":
        parser.error("expected a CUDA GPU for --nvtx, got a machine without one; leave it out for CPU times")

    step = traced(case, device)
    passes = account(step, made).passes
    one = prepare(case, device)
    for _ in range(3):  # compiles the kernels, and lets the allocator settle
        one()
    if options.nvtx:
        # A profiler outside that waits for cudaProfilerStart sees this block, and its ranges are NVTX ranges.
        with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(), Ranges(labels(step)):
            one()
            torch.cuda.synchronize()
        return 0
    if options.bandwidth and options.tflops:
        limits = Roofs(options.bandwidth, options.tflops)
    else:
        found = measured_roofs(device, DTYPES[case.dtype])
        limits = Roofs(options.bandwidth or found.bandwidth, options.tflops or found.tflops)
    seconds = Timer("one()", globals={"one": one}).timeit(5).median
    with tempfile.TemporaryDirectory(dir=None if options.trace is None else options.trace.absolute().parent) as folder:
        path = Path(folder) / (options.trace.name if options.trace else "trace.json")
        chrome_trace(one, labels(step), device, path)
        events = json.loads(path.read_text())["traceEvents"]
        if options.trace:
            path.replace(options.trace)
    tables = tabulate(events, passes)
    size = f"{case.batch}×3×{case.size}×{case.size}"
    print(f"{case.mode} step of {case.net}, base {case.base}, {size}, {case.dtype}: {seconds * 1e3:.2f} ms")
    print(f"roofs: {limits.bandwidth:.0f} GB/s, {limits.tflops:.3g} TFLOP/s; bytes and FLOPs are the ledger's\n")
    print(table("layer and operator", tables.ranges, tables.seconds, limits))
    if tables.kernels:
        print(f"\n{table('kernel', tables.kernels, tables.seconds, limits)}")
        print(f"\nkernels ran for {tables.seconds * 1e3:.2f} ms")
    else:
        print(f"\n{CPU_ONLY}")
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # a profile of the interpreter would say nothing
    sys.exit(main())
