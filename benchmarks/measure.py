"""How everything here is measured: the machine, its own roofs, interleaved times with a cold cache, peak memory.

On a GPU, time is read from CUDA events, and the L2 cache is emptied before every call; on a CPU, from the host's clock.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)
Step = Callable[[], list[Tensor]]  # does a case's work once, and returns its results and gradients

ROOT = Path(__file__).parent.parent
FLUSH_BYTES = 256 << 20  # and at least twice the L2 cache
ROUNDS = (5, 50)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
HEAD_START = 2_000_000  # clock cycles the GPU waits while the host issues an operation: about a millisecond


# ---- the machine -------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: GPU, driver, clocks in MHz, versions, and the state of the code."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        **_gpu_state(),
        "versions": _versions(),
        **_code(),
    }


def _gpu_state() -> dict[str, Any]:
    fields = {"driver": "driver_version", "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm"}
    fields["memory_mhz"] = "clocks.mem"
    values = nvidia_smi(*fields.values())
    return dict(zip(fields, values, strict=True)) if values else dict.fromkeys(fields)


def nvidia_smi(*fields: str) -> list[str] | None:
    """What nvidia-smi says about the first GPU; None without it. It needs no CUDA in this process."""
    found = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    return [value.strip() for value in found.splitlines()[0].split(",")] if found else None


@functools.cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__
    versions["cudnn"] = str(torch.backends.cudnn.version())
    versions["ptxas"] = _ptxas()
    return versions


def _ptxas() -> str | None:
    """The version of the assembler Triton uses: TRITON_PTXAS_PATH's, else the one it brings."""
    path = os.environ.get("TRITON_PTXAS_PATH")
    if path is None:
        try:
            import triton
        except ImportError:
            return None
        path = str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    found = re.search(r"V([\d.]+)", _output(path, "--version") or "")
    return found[1] if found else None


@functools.cache
def _code() -> dict[str, Any]:
    """The commit and whether files differ from it, None without git; and a digest of the sources, which needs none."""
    folders = ("fastunet", "kernels", "benchmarks")
    paths = (*folders, ":!benchmarks/results")  # written by measuring
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", *paths)
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return {
        "commit": (_output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "").strip() or None,
        "dirty": None if status is None else bool(status.strip()),
        "sources": digest.hexdigest()[:12],
    }


def rewrite(path: Path, text: str) -> None:
    """Put ``text`` into a file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# ---- time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: 20th percentile, median, 80th percentile."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Times(fifths[0], statistics.median(samples), fifths[3], len(samples))


def interleaved(
    calls: Mapping[Name, Callable[[], Any]], device: torch.device, seconds: float, *, head_start: bool
) -> dict[Name, Times]:
    """The time of each of ``calls``, which are warm: all of them in turn, over and over, for about ``seconds``.

    With ``head_start`` the GPU is kept busy while the host issues a call, so that only the GPU's time counts, as for
    one operation of many. Without it the GPU is idle when a call begins, so that all waiting for the host counts, as
    for a whole step: behind the step of another provider, a slow one, the host could issue it ahead of time.
    """
    clock = _GpuClock(device, head_start) if device.type == "cuda" else _HostClock()
    gc.collect()
    gc.freeze()  # a compiler's million objects are not the steps', and whoever collects garbage walks over them
    try:
        return _interleaved(calls, clock, seconds)
    finally:
        gc.unfreeze()


def _interleaved(
    calls: Mapping[Name, Callable[[], Any]], clock: _GpuClock | _HostClock, seconds: float
) -> dict[Name, Times]:
    begun = time.perf_counter()
    for call in calls.values():
        clock.time(call)
        clock.samples()
    once = max(time.perf_counter() - begun, 1e-6)
    rounds = int(min(max(seconds / once, ROUNDS[0]), ROUNDS[1]))
    for done in range(rounds):
        if done >= ROUNDS[0] and time.perf_counter() - begun > 2 * seconds:
            break  # the machine has become slower since its first round
        for call in calls.values():
            clock.time(call)
    samples = clock.samples()
    return {name: Times.of(samples[i :: len(calls)]) for i, name in enumerate(calls)}


class _HostClock:
    def __init__(self) -> None:
        self._found: list[float] = []

    def time(self, call: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        call()
        self._found.append((time.perf_counter() - begun) * 1e3)

    def samples(self) -> list[float]:
        """The milliseconds of the calls timed since this was last asked."""
        found, self._found = self._found, []
        return found


class _GpuClock:
    def __init__(self, device: torch.device, head_start: bool) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(FLUSH_BYTES, 2 * cache), dtype=torch.uint8, device=device)
        self._head_start = head_start
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Callable[[], Any]) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        if self._head_start:
            torch.cuda._sleep(HEAD_START)
        else:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        self._events.append((start, end))

    def samples(self) -> list[float]:
        """The milliseconds of the calls timed since this was last asked."""
        torch.cuda.synchronize()
        found = [start.elapsed_time(end) for start, end in self._events]
        self._events.clear()
        return found


# ---- memory ------------------------------------------------------------------------------------------------------


class Memory:
    """Device memory above what was there at the start; None on a CPU.

    Where it is seen: "allocated" by PyTorch; "reserved" by it, for a CUDA graph, which allocates nothing when it is
    replayed and holds a pool; or missing on the "device", for what allocates by itself: the libraries that it loads
    count too.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        if self._gpu:
            torch.cuda.empty_cache()
            self._allocated, self._reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            self._free = torch.cuda.mem_get_info()[0]

    def peak(self, call: Callable[[], Any], where: Literal["allocated", "reserved", "device"]) -> int | None:
        """The most bytes that were allocated while ``call``, which is warm, ran; elsewhere, those held after it."""
        if not self._gpu:
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        if where == "allocated":
            return torch.cuda.max_memory_allocated() - self._allocated
        torch.cuda.empty_cache()
        if where == "reserved":
            return torch.cuda.memory_reserved() - self._reserved
        return self._free - torch.cuda.mem_get_info()[0]


# ---- precision and roofs ---------------------------------------------------------------------------------------------


def roofs(device: torch.device, dtypes: Sequence[str] | None = None) -> dict[str, float]:
    """What this machine reaches on random numbers: copying, in GB/s read and written; matrix products, in TFLOP/s.

    ``dtypes`` are names of :data:`DTYPES`: on a GPU all of them, on a CPU "fp32", if left out.
    """
    gpu = device.type == "cuda"
    source = torch.randint(0, 256, ((2 << 30) if gpu else (32 << 20),), dtype=torch.uint8, device=device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    found = {"copy_gbs": 2 * source.numel() / _milliseconds(copy, device) / 1e6}
    side = 8192 if gpu else 512
    for name in dtypes or (DTYPES if gpu else ("fp32",)):
        a, b = (torch.randn((side, side), device=device).to(DTYPES[name]) for _ in range(2))
        with precision(name):
            found[f"{name}_tflops"] = 2 * side**3 / _milliseconds(functools.partial(torch.mm, a, b), device) / 1e9
    return found


def _milliseconds(call: Callable[[], Tensor], device: torch.device) -> float:
    for _ in range(3):
        call()
    return interleaved({"": call}, device, 0.3, head_start=False)[""].p50


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Inside, float32 matrix units are used as "tf32" or not at all ("fp32"); other dtypes leave PyTorch's defaults."""
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    if dtype in ("tf32", "fp32"):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept
