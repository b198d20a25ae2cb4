"""Tensors of more than 2³¹ elements: the last programs of a launch, on memory that exists where it is touched.

The picture is so high that its last rows lie beyond what 32 bits count. Only those hold numbers, only the programs that
write there run, and what they write is compared with the same operation on those rows alone.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import DTYPES, precision
from benchmarks.ptx.launches import emulated
from benchmarks.ptx.memory import sparse
from benchmarks.ptx.trials import Trial, compare, results_of, wide
from fastunet import aten

ROWS, HALO = 16, 2  # of the picture that hold numbers; of those that need what lies above them
PROGRAMS = 16  # of a launch, the last ones


def cases(dtype: str) -> list[Case]:
    """Each has an operand or a result of more than 2³¹ elements; in TF32 none: addresses are float32's."""
    x = DTYPES[dtype]
    rows = (1 << 31) // (64 * 64) + 2 * ROWS
    high = (1, 64, rows, 64)
    cases = [
        Case("affine_act", high, x, mode="inference"),
        Case("max_pool2x2", high, x, mode="inference"),
        Case("conv2d", high, x, filters=64, stats=False, mode="inference", algorithm="triton"),
        Case("conv_transpose2d", (1, 64, rows // 4, 64), x, filters=64, kernel=2, stats=False, mode="inference"),
        Case("upsample_concat", (1, 64, rows // 4, 64), x, mode="inference", nearest=True),
    ]
    return [] if dtype == "tf32" else cases


def run(case: Case, chip: str, dtype: str) -> Trial:
    """Run the last programs of a case's launches, and compare."""
    from fastunet import kernels

    trial = Trial(case, chip, dtype)
    start = time.perf_counter()
    batch, channels, height, width = case.shape
    torch.manual_seed(0)
    small = Case(**{**vars(case), "shape": (batch, channels, ROWS, width)})
    low = small.operands("cpu")
    x = _tall(low[0], height)
    operands = tuple(x if given is low[0] else [height, width] if given == [ROWS, width] else given for given in low)
    with (
        precision(dtype),
        case.choosing(),
        emulated(chip, programs=lambda count: range(max(0, count - PROGRAMS), count)) as report,
    ):
        try:
            y = results_of(getattr(kernels, case.op)(*operands))[0]
            own = results_of(getattr(aten, case.op)(*low))[0]
            truth = results_of(getattr(aten, case.op)(*map(wide, low)))[0]
            assert max(x.numel(), y.numel()) > 1 << 31, "expected more elements"
            skipped = HALO * own.shape[2] // ROWS
            last = y[:, :, y.shape[2] - own.shape[2] + skipped :]
            written = last != 0  # elsewhere is what no page was made for
            assert written[:, :, -1].any(), "expected the last programs to write the last rows"
            parts = ((z[:, :, skipped:][written],) for z in (own, truth))
            trial.errors += compare(case.op, (last[written],), *parts)
        except Exception as error:
            trial.stopped = f"{type(error).__name__}: {error}"
    trial.launches, trial.findings, trial.kernels = report.launches, list(report.findings), report.kernels
    trial.seconds = time.perf_counter() - start
    return trial


def _tall(x: Tensor, height: int) -> Tensor:
    """A picture of so many rows in channels_last memory, of which the last are x's, and the others 0."""
    batch, channels, rows, width = x.shape
    words = sparse(batch * height * width * channels, "u2" if x.element_size() == 2 else "u4")
    tall = torch.from_numpy(words).view(x.dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)
    tall[:, :, height - rows :] = x
    return tall
