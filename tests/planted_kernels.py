"""Kernels with planted faults, and what the compile gate says of each, as one JSON object: run by tests/test_gate.py.

A process of its own, because Triton's interpreter compiles nothing. The argument is an empty directory.
"""

import contextlib
import functools
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import triton
import triton.language as tl

from benchmarks import gate, gate_file
from benchmarks.cases import Case

CASE = Case("affine_act", (1, 64, 8, 8), mode="inference")


@triton.jit
def _sound_kernel(x_ptr, y_ptr, n):
    i = tl.arange(0, 256)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _forgotten_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, n):
    # two tiles of 256 values a thread are alive at once, and a thread has 255 registers
    rows = tl.arange(0, 128)[:, None]
    columns = tl.arange(0, 64)[None, :]
    tile = tl.load(x_ptr + rows * 64 + columns).to(tl.float32)
    for _ in range(n):
        tile = tile * tl.sum(tile, 1)[:, None] + tl.sum(tile, 0)[None, :]
    tl.store(y_ptr + rows * 64 + columns, tile)


@triton.jit
def _float64_kernel(x_ptr, y_ptr, n):
    i = tl.arange(0, 256)
    value = tl.load(x_ptr + i).to(tl.float64) * 0.1
    tl.store(y_ptr + i, value.to(tl.bfloat16))


@triton.jit
def _scattered_kernel(x_ptr, y_ptr, n):
    i = tl.arange(0, 256)
    tl.store(y_ptr + i, tl.load(x_ptr + 2 * i))


@triton.jit
def _greedy_kernel(x_ptr, y_ptr, n):
    # both operands of the dot stay in shared memory: 2 · 64 · 1024 · 2 bytes
    long = tl.arange(0, 1024)
    short = tl.arange(0, 64)
    a = tl.load(x_ptr + short[:, None] * 1024 + long[None, :])
    b = tl.load(x_ptr + long[:, None] * 64 + short[None, :])
    tl.store(y_ptr + short[:, None] * 64 + short[None, :], tl.dot(a, b))


@triton.jit
def _broken_kernel(x_ptr, y_ptr, n):
    tl.store(y_ptr, tl.no_such_function(n))


@triton.jit
def _round_trip_kernel(x_ptr, y_ptr, n):
    # the second operand must lie in shared memory, and is computed: it goes there from registers on every turn
    i = tl.arange(0, 64)
    total = tl.zeros([64, 64], tl.float32)
    for step in range(n):
        a = tl.load(x_ptr + step * 4096 + i[:, None] * 64 + i[None, :])
        total = tl.dot(a, tl.maximum(a, 0.0).to(a.dtype), total)
    tl.store(y_ptr + i[:, None] * 64 + i[None, :], total)


@triton.jit
def _two_dots(x_ptr, y_ptr, n, RELU: tl.constexpr):
    """n turns of two products onto one sum."""
    i = tl.arange(0, 64)
    place = i[:, None] * 64 + i[None, :]
    total = tl.zeros([64, 64], tl.float32)
    for step in range(n):
        b = tl.load(x_ptr + step * 4096 + place)
        for part in tl.static_range(1, 3):
            a = tl.load(x_ptr + (step + part) * 4096 + place)
            if RELU:
                a = tl.maximum(a, 0.0).to(a.dtype)
            total = tl.dot(a, b, total)
    tl.store(y_ptr + place, total)


@triton.jit
def _serialised_kernel(x_ptr, y_ptr, n):
    # the first operands are computed, in registers, while a product is under way that reads others
    _two_dots(x_ptr, y_ptr, n, True)


@triton.jit
def _pipelined_kernel(x_ptr, y_ptr, n):
    _two_dots(x_ptr, y_ptr, n, False)


def backend(kernel, *others):
    """A backend of one operator that launches ``kernel``, and that has ``others`` besides."""

    def affine_act(x, affine, slope):
        kernel[(1,)](x, x, 16, num_warps=4 if kernel in WITH_DOTS else 1)
        return x

    module = ModuleType(__name__)
    vars(module).update({x.__name__: x for x in (affine_act, kernel, *others)})
    return module


def judged(module, file, *arguments):
    """(exit status, what it printed, what it complained about)."""
    said, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
        status = gate.main(["--arch", "sm_90", "--jobs", "1", *arguments], [CASE], (), module, file)
    return status, said.getvalue(), complaints.getvalue()


def doctored(file, entry=None, **changes):
    """``file`` with other numbers in its only entry, under the name ``entry`` if given."""
    content = json.loads(file.read_text())
    [(name, numbers)] = content["entries"].items()
    content["entries"] = {entry or name: numbers | {key: numbers[key] + by for key, by in changes.items()}}
    other = file.with_name(f"doctored-{len(list(file.parent.iterdir()))}.json")
    other.write_text(json.dumps(content))
    return other


def main(directory):
    file = directory / "gate.json"
    check = functools.partial(judged, file=directory / "none.json")
    found = {kernel.__name__: check(backend(kernel)) for kernel in FAULTY}
    found["sound"] = check(backend(_sound_kernel))
    found["pipelined"] = check(backend(_pipelined_kernel))
    found["forgotten"] = check(backend(_sound_kernel, _forgotten_kernel))

    loop = backend(_round_trip_kernel)
    found["update"] = judged(loop, file, "--update")
    found["recorded"] = judged(loop, file)
    found["fewer blocks"] = judged(loop, doctored(file, blocks=1))
    found["more slots"] = judged(loop, doctored(file, **{"issue slots": -0.01}))
    found["more waits"] = judged(loop, doctored(file, **{"loop waits": -1}))
    found["more registers"] = judged(loop, doctored(file, registers=-1))
    found["unknown entry"] = judged(loop, doctored(file, "_gone_kernel bf16 warps=4 stages=3 sm_90"))
    other = doctored(file, blocks=1)
    other.write_text(other.read_text().replace(triton.__version__, "0.0"))
    found["other Triton"] = judged(loop, other)
    found["other Triton spills"] = judged(backend(_spilling_kernel), other)
    found["other Triton breaks"] = judged(backend(_broken_kernel), other)
    gate_file.LIMITS = (gate_file.Limit("^_round_trip_kernel .* sm_90$", 0.1, 0.1, 0),)
    found["limits"] = judged(loop, file)
    json.dump(found, sys.stdout)


FAULTY = [_spilling_kernel, _float64_kernel, _scattered_kernel, _greedy_kernel, _broken_kernel, _serialised_kernel]
WITH_DOTS = [_greedy_kernel, _round_trip_kernel, _serialised_kernel, _pipelined_kernel]  # of a warpgroup

if __name__ == "__main__":
    main(Path(sys.argv[1]))
