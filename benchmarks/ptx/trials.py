"""What runs in the interpreter, and how it is judged: each operation beside ATen in the same dtype, and float64.

An error may be twice PyTorch's own and some roundings of float32, in any dtype: four of the largest error, one of the
root of the mean square. In TF32 PyTorch's own is what it errs on a CPU if its products are made as tensor cores make
them, of operands cut off to TF32: a CPU has no TF32, and errs less.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gate, recorder
from benchmarks.cases import Case
from benchmarks.measure import DTYPES, precision
from benchmarks.ptx.findings import Finding
from benchmarks.ptx.launches import Change, Compiled, emulated
from benchmarks.ptx.machine import IN_STEP
from fastunet import aten
from fastunet.architecture import as_if_on

aten_ops = torch.ops.aten

FACTOR = 2  # how many times PyTorch's own error is allowed
ROUNDING = torch.finfo(torch.float32).eps
# Roundings of float32 granted beyond that, in any dtype, to the largest error and to the typical one: sums of hundreds
# of products in another order than PyTorch's. All cases in float32 need 3.4 and 0.9, those in bfloat16 0.8 and 0.8.
LARGEST, TYPICAL = 4, 1
MULTIPLY = ("conv2d", "conv2d_act", "conv_transpose2d", "head_stats", "head_predict")  # operations with products


def quick(dtype: str) -> list[Case]:
    """A dozen cases, small: what the tests run."""
    x = DTYPES[dtype]
    cases = [
        Case("conv2d", (1, 64, 3, 20), x, filters=32),
        Case("conv2d", (2, 5, 5, 7), x, filters=7, bias=True),
        Case("conv2d", (1, 16, 6, 10), x, filters=16, skip=16, pool=True),
        Case("conv2d", (1, 16, 7, 16), x, filters=16, skip=16, doubled=True),  # a skip of one row more
        Case("conv2d", (1, 3, 6, 20), x, filters=16, affine=False, image=True),
        Case("conv2d", (1, 32, 5, 6), x, filters=24, stride=2),
        # LeakyReLU, and products by ATen
        Case("conv2d", (1, 16, 4, 6), x, filters=8, algorithm="cudnn", changes=(("slope0", 0.01),)),
        Case("conv_transpose2d", (1, 32, 3, 5), x, filters=16, kernel=2, stats=False, bias=True),
        Case("max_pool2x2", (2, 5, 7, 9), x),
        Case("upsample_concat", (1, 16, 5, 6), x, skip=8),
        Case("softmax_stats", (2, 22, 7, 9), x, weighted=True, wanted=(True, True, True)),
        Case("head_stats", (1, 32, 5, 7), x, filters=22, kernel=1),
        Case("confusion_matrix", (2, 22, 7, 9), x, mode="inference"),
    ]
    return of_dtype(cases, dtype)


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
    cases = [
        *quick(dtype),
        Case("conv2d", (1, 64, 12, 36), x, filters=64, algorithm="triton"),
        Case("conv2d", (1, 64, 12, 36), x, filters=64, algorithm="stored", mode="inference"),
        Case("conv2d", (1, 32, 12, 70), x, filters=40),
        Case("conv2d", (1, 64, 3, 100), x, filters=128, algorithm="triton"),  # 128 outputs a program on sm_90
        Case("conv2d", (5, 64, 3, 4), x, filters=64),  # four pictures a tile
        Case("conv2d", (1, 512, 4, 6), x, filters=128),  # several programs share a sum
        replace(two, pool=True),
        replace(two, changes=(("slope0", 0.01), ("slope1", 0.01))),
        replace(two, changes=crop),
        # Doubled: each of two, in tiles inside a picture, of several, and at odd places
        replace(two, doubled=True, algorithm="triton"),
        replace(two, doubled=True, algorithm="cudnn"),
        Case("conv2d", (1, 64, 4, 132), x, filters=64, doubled=True),
        Case("conv2d", (5, 64, 4, 6), x, filters=64, skip=32, doubled=True, samples=True),
        Case("conv2d", (1, 512, 4, 6), x, filters=128, doubled=True),
        replace(two, doubled=True, changes=placed),
        replace(act, doubled=True, affine=True),
        replace(two, changes=placed),
        replace(two, changes=placed, algorithm="cudnn"),
        replace(two, algorithm="cudnn"),
        Case("conv2d", (2, 16, 7, 9), x, filters=3, kernel=1, stats=False, bias=True),  # few filters
        Case("conv2d", (2, 3, 7, 9), x, filters=2, affine=False, image=True, bias=True),
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
        # Affines and statistics of each sample, in tiles of several and of one
        Case("conv2d", (3, 32, 5, 6), x, filters=24, pool=True, samples=True),
        Case("conv2d", (2, 512, 4, 6), x, filters=128, samples=True),
        Case("conv2d", (2, 32, 4, 40), x, filters=32, skip=16, samples=True, algorithm="triton"),
        Case("conv2d", (2, 16, 3, 132), x, filters=16, stride=2, samples=True),
        Case("conv2d", (2, 16, 5, 31), x, filters=48, kernel=1, samples=True),
        Case("conv2d", (2, 16, 7, 9), x, filters=3, kernel=1, stats=False, bias=True, samples=True),
        Case("conv2d", (2, 3, 8, 16), x, filters=16, affine=False, image=True, samples=True),
        Case("conv_transpose2d", (2, 16, 2, 70), x, filters=16, kernel=2, samples=True),
        Case("upsample_concat", (2, 16, 5, 6), x, skip=8, samples=True),
        Case("head_stats", (2, 32, 5, 7), x, filters=22, kernel=1, samples=True),
        replace(predict, shape=(2, 64, 9, 13), output="argmax", samples=True),
        Case("add_act", (2, 16, 17, 23), x),
        Case("add_act", (2, 5, 17, 23), x, affine=False, changes=(("sum_slope", 0.01),)),
        Case("add_act", (3, 16, 7, 5), x, samples=True, changes=(("skip_affine", None),)),
        Case("affine_prelu", (2, 16, 17, 23), x),
        Case("affine_prelu", (3, 5, 7, 5), x, affine=False),
        Case("avg_pool2x2", (2, 16, 9, 22), x),
        Case("avg_pool2x2", (3, 5, 7, 9), x, samples=True),
        Case("pad_replicate", (2, 16, 7, 22), x),
        Case("pad_replicate", (3, 5, 7, 9), x, samples=True, changes=(("rows", 0),)),
        Case("bn_affine", (2, 64, 4, 4), x),
        Case("group_affine", (3, 66, 4, 4), x),
        Case("group_affine", (3, 65, 4, 4), x),
        Case("group_affine", (3, 66, 4, 4), x, changes=(("groups", 66),)),
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
    return of_dtype(cases, dtype)


def of_dtype(cases: list[Case], dtype: str) -> list[Case]:
    """Those that run in a dtype: in TF32 what multiplies, as all other code is float32's."""
    return [case for case in cases if dtype != "tf32" or case.op in MULTIPLY]


def recorded(case: Case, chip: str, dtype: str) -> list[recorder.Launch]:
    """What a case launches on a chip."""
    from fastunet import kernels

    with precision(dtype), as_if_on(chip), recorder.record() as launches:
        case.launch(kernels)
    return launches


def launched(case: Case, chip: str, dtype: str) -> set[str]:
    """The kernels that a case launches on a chip."""
    return {launch.kernel.__name__ for launch in recorded(case, chip, dtype)}


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

    @property
    def passed(self) -> bool:
        """Whether it is small enough; NaN, as of what nothing wrote, is not."""
        return (
            self.largest <= FACTOR * self.own_largest + LARGEST * ROUNDING
            and self.typical <= FACTOR * self.own_typical + TYPICAL * ROUNDING
        )

    @property
    def worst(self) -> tuple[float, float]:
        """Of the largest and the typical error the one that is the more times PyTorch's, and PyTorch's."""
        return max((self.largest, self.own_largest), (self.typical, self.own_typical), key=_times)

    @property
    def times(self) -> float:
        """How many times PyTorch's the worst is."""
        return _times(self.worst)


def _times(pair: tuple[float, float]) -> float:
    error, own = pair
    return error / max(own, ROUNDING) if error == error else float("inf")


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
    def lines(self) -> set[str]:
        """The lines of source, as file:line, of which some thread executed an instruction."""
        ran = (kernel.machine.program.sources[line] for kernel in self.kernels for line in kernel.machine.ran)
        return {place for places in ran for place in places.split(" in ") if place}

    @property
    def errs(self) -> list[Error]:
        """The errors that are too large."""
        return [error for error in self.errors if not error.passed]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.stopped and not self.findings and not self.errs

    @property
    def worst(self) -> Error | None:
        """The error that is the most times PyTorch's."""
        return max(self.errors, key=lambda error: error.times, default=None)


_FACTORS = {aten_ops.convolution.default: 2, aten_ops.convolution_backward.default: 3, aten_ops.mm.default: 2}


class Truncated(TorchDispatchMode):
    """Inside, factors of products are cut off to TF32: the low 13 bits of float32 become 0."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = _FACTORS.get(func, 0)
        cut = ((x.view(torch.int32) & -8192).view(torch.float32) for x in args[:factors])
        return func(*cut, *args[factors:], **(kwargs or {}))


class Prepared:
    """A case with its operands, and what its results should be."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.dtype = case, dtype
        torch.manual_seed(0)
        self.calls = [(case.op, case.operands("cpu"))]
        with precision(dtype):
            same = results_of(getattr(aten, case.op)(*self.calls[0][1]))
            if case.mode != "inference":
                self.calls.append((f"{case.op}_backward", case.backward_operands(self.calls[0][1], same)))
            with Truncated() if dtype == "tf32" else nullcontext():
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
        if not x.is_floating_point():  # the part of the elements that differ: those between two classes may
            wrong, own_wrong = ((y != true).double().mean().item() for y in (x, plain))
            yield Error(name, wrong, wrong, own_wrong, own_wrong)
            continue
        # A gradient that is zero in truth (a bias before a BatchNorm) is measured against 1.
        largest = true.abs().max().item()
        size = largest if largest > 1e-6 else 1.0
        typical = true.square().mean().sqrt().item() if largest > 1e-6 else 1.0
        errors = [(y.double() - true).abs() for y in (x, plain)]
        worst, own_worst = (error.max().item() / size for error in errors)
        mean, own_mean = (error.square().mean().sqrt().item() / typical for error in errors)
        yield Error(name, worst, mean, own_worst, own_mean)
