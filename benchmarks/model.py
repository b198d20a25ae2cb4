"""What fraction of a GPU's matrix rate a convolution attains: a model, in one place, until it is measured.

A program of the 3×3 kernels is bounded by the slowest of four that overlap:

- the tensor cores, of whose rate by data sheet nothing sustains more than SUSTAINED;
- the L2 cache, from where a program loads, a step, ``rows`` + 2 rows of pixels of one operand and either three taps of
  the weights (fprop, dgrad) or ``rows`` rows of the other (wgrad), for 3·``rows`` products of a row;
- the shared memory, into which these are written, and from where each product reads its second operand; its first lies
  in registers, for three products;
- the issue slots, which grow with what is loaded and normalised beside each product.

The last wave of programs leaves processors idle: a processor holds what its shared memory holds and no more than 8
warps, since these kernels take all registers. What of a tile lies outside the picture or the channels multiplies zeros.
Memory's time is the ledger's (:mod:`benchmarks.traffic`). Programs at a border of the picture, which mask, count like
the others. cuDNN's fraction depends on nothing but the channels.

What was measured bounds all of that where it was: on an H200 a product of ours waits for the one before it, and what a
program does before and after its loop is hidden by one other program at most. The rest are assumptions, or read from
machine code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.chips import CHIPS, GPUS

if TYPE_CHECKING:
    from benchmarks.recorder import Launch
    from benchmarks.trace import Call


@dataclass(frozen=True)
class Pace:
    """What bounds a kernel on the chips of one architecture, for 16-bit operands accumulated in float32."""

    gpu: str  # whose data sheet counts
    l2: float  # GB/s from the L2 cache to all processors: an assumption
    rows: int  # of a product's first operand that one reading of the second from shared memory serves
    # Issue slots a tensor clock of the main loops as compiled: fixed, for each load and for each normalised row beside
    # a product of one output; and wgrad's.
    slots: tuple[float, float, float, float]


PACES = {
    "sm_80": Pace("a100", 4000.0, 32, (0.18, 11.0, 14.5, 0.74)),
    "sm_90": Pace("h200", 5500.0, 64, (0.06, 21.0, 24.0, 0.83)),
}
# What an H200 attained at most, by kernel and whether it normalises what it reads (64 to 256 channels, 512² to 128²,
# batch 8, bfloat16).
ATTAINED = {
    "sm_90": {
        ("fwd", False): 0.50,
        ("fwd", True): 0.32,
        ("dgrad", False): 0.35,
        ("wgrad", False): 0.44,
        ("wgrad", True): 0.41,
    }
}
SUSTAINED = 0.76  # an H200 multiplies matrices of 8192² at 0.80
UNKNOWN = 0.35  # of matrix products in Triton that are not modelled here
SHARED = 128 / 4096  # bytes a floating-point operation: of shared memory at the matrix rate of 16-bit operands
# By the fewer of input and output channels: an H200's, all three directions; of 16 and 32 an assumption.
CUDNN = {16: 0.12, 32: 0.24, 64: 0.50, 128: 0.70, 256: 0.74}


def aten_rate(call: Call) -> float:
    """The fraction of the matrix rate that an ATen operation attains."""
    if "convolution" in call.name:
        return cudnn_rate(min(call.named["weight"].shape[:2]))
    return 1.0


def cudnn_rate(channels: int) -> float:
    """The fraction of the matrix rate that cuDNN attains with so many channels on the narrower side."""
    below = max((c for c in CUDNN if c <= channels), default=16)
    above = min((c for c in CUDNN if c >= channels), default=256)
    if below >= above:  # beyond an end, or at a point
        return CUDNN[below]
    share = math.log(channels / below) / math.log(above / below)
    return float(CUDNN[below] ** (1 - share) * CUDNN[above] ** share)


def triton_rate(launch: Launch, architecture: str) -> float:
    """The fraction of the matrix rate that a launch of ours attains on a chip of ``architecture``."""
    from fastunet.kernels.tiles import PROCESSORS

    name = launch.kernel.__name__
    pace = PACES.get(architecture)
    if not name.startswith("_conv3x3_") or pace is None:
        return UNKNOWN
    given, tile = launch.kwargs, launch.kwargs["TILE"]
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    rows, pixels, reduction, outputs = tile.rows, tile.images * tile.columns, tile.reduction, tile.outputs
    fixed, per_load, per_row, wgrad = pace.slots
    normalised = (named["affine_ptr"] is not None or given["SLOPE"] is not None) and "dgrad" not in name
    if "wgrad" in name:
        first, second = rows * pixels * reduction, (rows + 2) * pixels * outputs
        reads = 3 * rows * pixels * outputs * reduction / pace.rows
        slots = wgrad
    else:
        first, second = (rows + 2) * pixels * reduction, 3 * reduction * outputs
        reads = 3 * rows * reduction * outputs * pixels / pace.rows
        slots = fixed + per_load / outputs + (per_row * (rows + 2) / (rows * outputs) if normalised else 0.0)
    reads += first
    loaded = first + second
    flops = 2 * 3 * rows * pixels * reduction * outputs
    # Operands of 32 bits: twice as many bytes, at half the rate.
    from_l2 = flops / (2 * loaded) * pace.l2 * 1e9 / (GPUS[pace.gpu].tflops * 1e12)
    from_shared = flops * SHARED / (2 * (loaded + reads))
    resident = max(1, min(8 // given["num_warps"], CHIPS[architecture].shared // (2 * loaded * given["num_stages"])))
    at_once = resident * PROCESSORS[architecture]
    programs = math.prod(launch.grid)
    busy = programs / (math.ceil(programs / at_once) * at_once)
    covered = math.ceil(named["N"] / tile.images) * tile.images * named["tiles_h"] * rows
    filled = named["N"] * named["P"] * named["Q"] / (covered * named["tiles_w"] * tile.columns)
    for size, part in zip(("K", "C") if "dgrad" in name else ("C", "K"), (reduction, outputs), strict=True):
        filled *= named[size] / (math.ceil(named[size] / part) * part)
    attained = ATTAINED.get(architecture, {}).get((name.split("_")[2], bool(normalised)), SUSTAINED)
    return float(min(attained, 1 / slots, from_l2, from_shared) * busy * filled)
