"""What runs in the interpreter, and how it is judged: each operation beside ATen in the same dtype, and float64."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate, recorder
from benchmarks.cases import Case
from benchmarks.measure import DTYPES, precision
from benchmarks.ptx.findings import Finding
from benchmarks.ptx.launches import Change, Compiled, emulated
from benchmarks.ptx.machine import IN_STEP
from fastunet import aten
from fastunet.architecture import as_if_on

FACTOR = 2  # how many times PyTorch's own error is allowed
ROUNDINGS = 4  # of a result's dtype granted beyond that: PyTorch may happen to be exact on a small case

# Findings that are to be mended in the kernels, (kernel, beginning of what is found): each is named in the table and
# fails nothing. One that is found no more is to be struck off, says the command.
KNOWN = {
    # tl.sum(a · b) becomes shfl and fma: lanes of a warp hold different roundings of one sum, and all store it.
    ("_conv3x3_fwd_kernel", "lanes of one warp store"),
    ("_conv_down_dgrad_kernel", "lanes of one warp store"),
    ("_conv_up_dgrad_kernel", "lanes of one warp store"),
    ("_winograd_gradient_kernel", "lanes of one warp store"),
}


def quick(dtype: str) -> list[Case]:
    """A dozen cases, small: what the tests run."""
    x = DTYPES[dtype]
    return [
        Case("conv2d", (1, 64, 3, 20), x, filters=32),
        Case("conv2d", (2, 5, 5, 7), x, filters=7, bias=True),
        Case("conv2d", (1, 16, 4, 10), x, filters=16, skip=16, pool=True),
        Case("conv2d", (1, 3, 6, 20), x, filters=16, affine=False, image=True),
        Case("conv2d", (1, 16, 6, 7), x, filters=16, stats=False, algorithm="winograd"),
        Case("conv2d", (1, 32, 5, 6), x, filters=24, stride=2),
        Case("conv_transpose2d", (1, 32, 3, 5), x, filters=16, kernel=2, stats=False, bias=True),
        Case("max_pool2x2", (2, 5, 7, 9), x),
        Case("upsample_concat", (1, 16, 5, 6), x, skip=8),
        Case("softmax_stats", (2, 22, 7, 9), x, weighted=True, wanted=(True, True, True)),
        Case("head_stats", (1, 32, 5, 7), x, filters=22, kernel=1),
        Case("confusion_matrix", (2, 22, 7, 9), x, mode="inference"),
    ]


def everything(dtype: str) -> list[Case]:
    """Every kernel, and what decides its code: affine or plain, one source or two, cropped, ragged, several pictures a
    tile, tiles of 128 outputs, sums shared among programs."""
    x = DTYPES[dtype]
    two = Case("conv2d", (1, 32, 10, 18), x, filters=32, skip=16)
    crop = (("size", (8, 17)), ("offset", (-1, 0, -1, -1)))
    placed = (("size", (11, 20)), ("offset", (0, 1, 1, 2)))
    act = Case("conv2d_act", (1, 32, 10, 18), x, filters=32, affine=False, stats=False, mode="inference")
    stats = Case("softmax_stats", (2, 22, 17, 23), x)
    head = Case("head_stats", (1, 64, 9, 13), x, filters=22, kernel=1)
    predict = replace(head, op="head_predict", mode="inference")
    return [
        *quick(dtype),
        Case("conv2d", (1, 64, 12, 36), x, filters=64, algorithm="triton"),
        Case("conv2d", (1, 64, 12, 36), x, filters=64, algorithm="stored", mode="inference"),
        Case("conv2d", (1, 32, 12, 70), x, filters=40),
        Case("conv2d", (1, 64, 3, 100), x, filters=128),  # 128 outputs a program
        Case("conv2d", (5, 64, 3, 4), x, filters=64),  # four pictures a tile
        Case("conv2d", (1, 512, 4, 6), x, filters=128),  # several programs share a sum
        replace(two, pool=True),
        replace(two, changes=(("slope0", 0.01), ("slope1", 0.01))),
        replace(two, changes=crop),
        replace(two, changes=placed),
        replace(two, changes=placed, algorithm="cudnn"),
        replace(two, algorithm="cudnn"),
        Case("conv2d", (2, 16, 7, 9), x, filters=3, kernel=1, stats=False, bias=True),  # few filters
        Case("conv2d", (2, 3, 7, 9), x, filters=2, affine=False, image=True, bias=True),
        Case("conv2d", (1, 32, 10, 12), x, filters=32, skip=16, algorithm="winograd"),
        Case("conv2d", (1, 48, 9, 11), x, filters=22, kernel=1, stats=False, bias=True),
        Case("conv2d", (1, 64, 9, 70), x, filters=150, kernel=1),
        Case("conv2d", (3, 32, 11, 14), x, filters=48, stride=2),
        Case("conv2d", (1, 32, 5, 6), x, filters=24, stride=2, changes=(("slope0", 0.01),)),
        replace(act, head=22),
        replace(act, pool=True),
        replace(act, shape=(1, 3, 10, 18)),
        Case("conv_transpose2d", (1, 32, 7, 9), x, filters=24, kernel=3),
        Case("conv_transpose2d", (3, 64, 3, 5), x, filters=130, kernel=2, stats=False),
        Case("max_pool2x2", (2, 16, 18, 22), x),
        Case("max_pool2x2", (2, 5, 17, 23), x, affine=False),
        Case("upsample_concat", (1, 16, 9, 11), x, skip=8, nearest=True),
        Case("affine_act", (2, 16, 17, 23), x),
        Case("affine_act", (2, 5, 17, 23), x),
        Case("affine_act", (2, 16, 17, 23), x, changes=(("slope", 0.01),)),
        Case("affine_act", (3, 16, 7, 5), x, samples=True),
        Case("max_pool2x2", (3, 16, 7, 9), x, samples=True),
        Case("conv2d", (3, 32, 5, 6), x, filters=24, pool=True, samples=True),
        Case("bn_affine", (2, 64, 4, 4), x),
        Case("bn_affine_running", (2, 64, 4, 4), x, mode="inference"),
        stats,
        replace(stats, layout="contiguous", weighted=True, wanted=(True, True, True)),
        replace(stats, shape=(1, 3, 17, 23), loss="sigmoid", labels=torch.uint8),
        replace(stats, shape=(1, 200, 7, 9), layout="contiguous", weighted=True),
        Case("confusion_matrix", (2, 1, 17, 23), x, loss="sigmoid", layout="contiguous", mode="inference"),
        Case("confusion_matrix", (1, 200, 17, 23), x, mode="inference"),
        Case("confusion_matrix_of_masks", (2, 22, 17, 23), x, labels=torch.uint8, mode="inference"),
        Case("confusion_matrix_of_masks", (1, 200, 17, 23), x, mode="inference"),
        replace(head, shape=(1, 40, 9, 13), filters=200, wanted=(True, True, True), weighted=True),
        replace(head, shape=(2, 5, 9, 13), filters=3, loss="sigmoid", weighted=True),
        *(replace(predict, output=output) for output in ("argmax", "softmax")),
        *(replace(predict, filters=4, output=output) for output in ("threshold", "sigmoid")),
    ]


# Weights that are rounded after the transform cost Winograd's algorithm digits in 16 bits: its errors are known too.
KNOWN_ALGORITHM = "winograd"


def launched(case: Case, chip: str, dtype: str) -> set[str]:
    """The kernels that a case launches on a chip."""
    from fastunet import kernels

    with precision(dtype), as_if_on(chip), recorder.record() as launches:
        case.launch(kernels)
    return {launch.kernel.__name__ for launch in launches}


def missed(chip: str, dtype: str) -> list[str]:
    """The kernels that no case of :func:`everything` launches."""
    from fastunet import kernels

    found: set[str] = set().union(*(launched(case, chip, dtype) for case in everything(dtype)))
    return sorted(recorder.find_kernels(gate.modules_of(kernels)).keys() - found)


@dataclass(frozen=True)
class Error:
    """Of one result, relative to the truth's size: the largest one and the root of the mean square; and PyTorch's."""

    result: str
    largest: float
    typical: float
    own_largest: float
    own_typical: float
    rounding: float

    @property
    def passed(self) -> bool:
        """Whether it is small enough; NaN, as of what nothing wrote, is not."""
        most = self.rounding * ROUNDINGS
        return self.largest <= FACTOR * self.own_largest + most and self.typical <= FACTOR * self.own_typical + most

    @property
    def times(self) -> float:
        """How many times PyTorch's."""
        return max(
            a / max(b, self.rounding) for a, b in ((self.largest, self.own_largest), (self.typical, self.own_typical))
        )


@dataclass
class Trial:
    """One case on one chip, and what came of it."""

    case: Case
    chip: str
    dtype: str
    errors: list[Error] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    kernels: list[Compiled] = field(default_factory=list)
    results: str = ""  # a digest of all bits
    stopped: str = ""
    seconds: float = 0.0

    @property
    def unknown(self) -> list[Finding]:
        """The findings that are not :data:`KNOWN`."""
        return [finding for finding in self.findings if known(finding) is None]

    @property
    def errs(self) -> list[Error]:
        """The errors that are too large."""
        return [error for error in self.errors if not error.passed]

    @property
    def known_to_err(self) -> bool:
        """Whether its errors may be too large, until that is mended."""
        return self.case.algorithm == KNOWN_ALGORITHM and self.dtype != "fp32"

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong but what is known."""
        return not self.stopped and not self.unknown and (self.known_to_err or not self.errs)

    @property
    def worst(self) -> Error | None:
        """The error that is the most times PyTorch's."""
        return max(
            self.errors, key=lambda error: error.times if error.times == error.times else float("inf"), default=None
        )


def known(finding: Finding) -> tuple[str, str] | None:
    """The entry of :data:`KNOWN` that a finding is."""
    return next((k for k in KNOWN if k[0] == finding.kernel and finding.what.startswith(k[1])), None)


class Problem:
    """A case with its operands, and what its results should be."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.dtype = case, dtype
        torch.manual_seed(0)
        self.calls = [(case.op, case.operands("cpu"))]
        with precision(dtype):
            same = results_of(getattr(aten, case.op)(*self.calls[0][1]))
            if case.mode != "inference":
                self.calls.append((f"{case.op}_backward", case.backward_operands(self.calls[0][1], same)))
            self.own = [results_of(getattr(aten, op)(*operands)) for op, operands in self.calls]
            self.truth = [results_of(getattr(aten, op)(*map(wide, operands))) for op, operands in self.calls]

    def run(self, chip: str, change: Change | None = None, order: int = IN_STEP) -> Trial:
        """Run its kernels as on a chip, and compare."""
        from fastunet import kernels

        trial = Trial(self.case, chip, self.dtype)
        start, digest = time.perf_counter(), hashlib.sha256()
        with precision(self.dtype), _poisoned(), self.case.choosing(), emulated(chip, change, order=order) as report:
            try:
                for (op, operands), own, truth in zip(self.calls, self.own, self.truth, strict=True):
                    # A call may write to its operands: running statistics.
                    given = [x.clone() if isinstance(x, Tensor) else x for x in operands]
                    results = results_of(getattr(kernels, op)(*given))
                    digest.update(b"".join(_bits(x) for x in results if isinstance(x, Tensor)))
                    trial.errors += list(compare(op, results, own, truth))
            except Exception as error:
                trial.stopped = f"{type(error).__name__}: {error}"
        trial.launches, trial.findings, trial.kernels = report.launches, list(report.findings), report.kernels
        trial.results = digest.hexdigest()
        trial.seconds = time.perf_counter() - start
        return trial


@contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, what ``torch.empty`` returns is NaN, or the largest integer: nobody takes it for a result."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])


def _bits(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def wide(x: Any) -> Any:
    """An operand in float64, if it is floating-point."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x.clone()
    return torch.float64 if isinstance(x, torch.dtype) else x


def results_of(results: Any) -> tuple[Any, ...]:
    """A call's results, of which it may have one."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def compare(op: str, results: tuple[Any, ...], own: tuple[Any, ...], truth: tuple[Any, ...]) -> Iterator[Error]:
    """The error of each result, and PyTorch's ``own``."""
    for i, (x, plain, true) in enumerate(zip(results, own, truth, strict=True)):
        name = f"{op}[{i}]"
        if not isinstance(x, Tensor) or not x.numel():
            continue
        if x.shape != true.shape:
            raise AssertionError(f"{name} has the shape {tuple(x.shape)}, not {tuple(true.shape)}")
        if not x.is_floating_point():  # of so many elements so many differ: a tie between two classes may
            wrong, own_wrong = ((y != true).double().mean().item() for y in (x, plain))
            yield Error(name, wrong, wrong, own_wrong, own_wrong, 0.002)
            continue
        # A gradient that is zero in truth (a bias before a BatchNorm) is measured against 1.
        largest = true.abs().max().item()
        size = largest if largest > 1e-6 else 1.0
        typical = true.square().mean().sqrt().item() if largest > 1e-6 else 1.0
        errors = [(y.double() - true).abs() for y in (x, plain)]
        worst, own_worst = (error.max().item() / size for error in errors)
        mean, own_mean = (error.square().mean().sqrt().item() / typical for error in errors)
        yield Error(name, worst, mean, own_worst, own_mean, torch.finfo(x.dtype).eps)
