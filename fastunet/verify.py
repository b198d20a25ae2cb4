"""``fastunet verify``: every operation and the whole networks against float64 truth, on this machine.

Truth is :mod:`fastunet.reference` in float64. An operation may err at most twice as much as the same reference computed
in the operation's dtype (plain PyTorch, the worse of contiguous and channels_last), plus a few roundings of that dtype.
Errors are the largest absolute difference over the largest absolute value, of outputs ("forward") or of gradients.
Of a whole network each tensor is judged alone, every parameter's gradient: see :func:`networks`.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import models, ops, reference
from fastunet.backend import resolve_backend, triton_unavailable
from fastunet.errors import UserError
from fastunet.reference import functional as plain

Tensors = dict[str, Tensor | None]
Function = Callable[[Tensors], Any]
Results = dict[str, dict[str, Tensor]]  # of a step of a network, by part and name

# Roundings of the dtype granted beyond twice PyTorch's own error: PyTorch may happen to be exact on a small case.
ROUNDINGS = 2

# How often a network is run in plain PyTorch, on pictures a rounding apart, to learn how much its gradients vary; and
# how many times the largest variation of a tensor is granted. Over 12 seeds of each network 2 would have been enough.
NEIGHBOURS = 4
VARIATIONS = 3


@dataclass(frozen=True)
class Case:
    """One operation on one set of shapes. ``ours`` also takes the backend; both return a tensor or several."""

    name: str
    shape: str
    inputs: dict[str, tuple[int, ...]]
    ours: Callable[[Tensors, str], Any]
    truth: Function
    labels: tuple[int, tuple[int, ...]] | None = None  # (number of classes, shape)
    quick: bool = True
    backward: bool = True  # False: without a derivative


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    shape: str
    dtype: str
    part: str
    error: float
    allowed: float
    of: str = ""  # which of several tensors, or what was raised

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN fails


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--quick", action="store_true", help="fewer shapes and dtypes: under a minute on two cores")
    parser.add_argument(
        "--backend", choices=("triton", "torch"), help="what to verify; default: the Triton kernels where they run"
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per comparison; the exit status is 1 if any failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and args.backend != "torch":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        triton_unavailable.cache_clear()
    reason = triton_unavailable(device.type)
    backend = args.backend or ("torch" if reason else "triton")
    try:
        resolve_backend(backend, device, torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
    where = "the interpreter" if backend == "triton" and device.type == "cpu" else str(device)
    print(f"fastunet verify: backend {backend} on {where}, against float64 truth")
    if reason and backend == "torch":
        print(f"the Triton kernels are not verified: {reason}")
    print(f"{'operation':<18}{'shape':<34}{'dtype':<10}{'part':<10}{'error':>10}{'allowed':>10}  verdict")
    failed = 0
    with _exact_float32():
        for row in rows(device, backend, args.quick):
            failed += not row.passed
            verdict = "ok" if row.passed else f"FAILED {row.of}".rstrip()
            print(
                f"{row.name:<18}{row.shape:<34}{row.dtype:<10}{row.part:<10}{row.error:>10.1e}{row.allowed:>10.1e}  "
                f"{verdict}",
                flush=True,
            )
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


@contextmanager
def _exact_float32() -> Iterator[None]:
    """float32 means float32: convolutions, PyTorch's and fastunet's, use TF32 by default."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def rows(device: torch.device, backend: str, quick: bool) -> Iterator[Row]:
    """All comparisons, one after the other."""
    interpreted = backend == "triton" and device.type == "cpu"
    dtypes = [torch.float32, torch.float16] + ([] if interpreted else [torch.bfloat16])
    for case in CASES:
        if case.quick or not quick:
            for dtype in dtypes:
                with _told() as raised:
                    yield from _compare(case, dtype, device, backend)
                yield from (Row(case.name, case.shape, _short(dtype), "error", math.inf, 0.0, said) for said in raised)
    yield from networks(device, backend, quick)


@contextmanager
def _told() -> Iterator[list[str]]:
    """What is raised inside, told in a list: one operation that fails keeps nobody from comparing the others."""
    raised: list[str] = []
    try:
        yield raised
    except Exception as error:
        raised.append(f"{type(error).__name__}: {error}")


# ---- operations --------------------------------------------------------------------------------------------------


def _source(inputs: Tensors, suffix: str = "") -> tuple[Any, Any]:
    return inputs["x" + suffix], inputs.get("affine" + suffix)


def _conv(inputs: Tensors, function: Callable[..., Any], size: tuple[int, int], **settings: Any) -> Any:
    x1, affine1 = inputs.get("x1"), inputs.get("affine1")
    offset, doubled = [0, 0, 0, 0], settings.get("doubled", False)
    if x1 is not None:
        offset[2:] = [(n - (2 * m if doubled else m)) // 2 for n, m in zip(size, x1.shape[2:], strict=True)]
    stats = settings.get("stats", True)
    result = function(
        *_source(inputs), 0.0 if "affine" in inputs else 1.0, x1, affine1, 1.0 if affine1 is None else 0.0,
        inputs["weight"], inputs.get("bias"),
        settings.get("stride", 1), size, offset, (doubled and x1 is None, doubled and x1 is not None), stats,
    )  # fmt: skip
    return result[:3] if stats else result[:1]


def _conv_case(
    name: str, x: tuple[int, ...], weight: tuple[int, ...], x1: tuple[int, ...] | None = None, lazy: bool = True,
    bias: bool = False, quick: bool = True, **settings: Any,
) -> Case:  # fmt: skip
    inputs = {"x": x, "weight": weight}
    if lazy:
        inputs["affine"] = (3, x[1])
    if x1 is not None:
        inputs |= {"x1": x1, "affine1": (3, x1[1])}
    if bias:
        inputs["bias"] = (weight[0],)
    times = 2 if settings.get("doubled") and x1 is None else 1
    size = (times * x[2], times * x[3])

    def ours(tensors: Tensors, backend: str) -> Any:
        return _conv(tensors, lambda *args: ops.conv2d(*args, False, False, None, backend), size, **settings)

    shape = f"{_by(x)}{'+' + _by(x1[1:]) if x1 else ''}, {_by(weight)}"
    return Case(name, shape, inputs, ours, lambda t: _conv(t, plain.conv2d, size, **settings), quick=quick)


def _act_case(x: tuple[int, ...], weight: tuple[int, ...], classes: int) -> Case:
    """A convolution, the normalisation and ReLU behind it, and a 1×1 convolution if there are ``classes``."""

    def ours(inputs: Tensors, backend: str) -> Any:
        z, _ = ops.conv2d_act(
            inputs["x"], None, 1.0, None, None, 1.0, inputs["weight"], None, x[2:], (0, 0, 0, 0), (False, False),
            inputs["affine"], 0.0, False, inputs.get("head"), None, backend,
        )  # fmt: skip
        return z

    def truth(inputs: Tensors) -> Any:
        source, filters = inputs["x"], inputs["weight"]
        assert source is not None
        assert filters is not None
        y, *_ = plain.conv2d(
            source, None, 1.0, None, None, 1.0, filters, None, 1, x[2:], (0, 0, 0, 0), (False, False), False
        )
        z = plain.affine_act(y, inputs["affine"], 0.0)
        head = inputs.get("head")
        return z if head is None else torch.nn.functional.conv2d(z, head)

    inputs = {"x": x, "weight": weight, "affine": (3, weight[0])}
    if classes:
        inputs["head"] = (classes, weight[0], 1, 1)
    shape = f"{_by(x)}, {_by(weight)}{f', head {classes}' if classes else ''}"
    return Case("conv2d_act", shape, inputs, ours, truth, backward=False)


def _transpose_case(x: tuple[int, ...], weight: tuple[int, ...], stats: bool, quick: bool = True) -> Case:
    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        result = function(*_source(inputs), 0.0, inputs["weight"], inputs["bias"], stats, *rest)
        return result if stats else result[0]

    return Case(
        "conv_transpose2d",
        f"{_by(x)}, {_by(weight)}",
        {"x": x, "affine": (3, x[1]), "weight": weight, "bias": (weight[1],)},
        lambda t, backend: call(ops.conv_transpose2d, t, backend),
        lambda t: call(plain.conv_transpose2d, t),
        quick=quick,
    )


def _pool_case(x: tuple[int, ...]) -> Case:
    def ours(inputs: Tensors, backend: str) -> Any:
        pooled, skip = ops.pool_fork(*_source(inputs), backend)
        affine = inputs["affine"]
        return ops.affine_act(pooled, affine, 0.0, backend), ops.affine_act(skip, affine, 0.0, backend)

    def truth(inputs: Tensors) -> Any:
        return plain.max_pool2x2(*_source(inputs), 0.0), plain.affine_act(*_source(inputs), 0.0)

    return Case("max_pool2x2", _by(x), {"x": x, "affine": (3, x[1])}, ours, truth)


def _upsample_case(x: tuple[int, ...], skip: tuple[int, ...], align_corners: bool | None, quick: bool = True) -> Case:
    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        return function(*_source(inputs), 0.0, inputs["skip"], inputs["affine1"], 0.0, align_corners, True, *rest)

    return Case(
        "upsample_concat",
        f"{_by(x)}, {_by(skip)}{', nearest' if align_corners is None else ', aligned' if align_corners else ''}",
        {"x": x, "affine": (3, x[1]), "skip": skip, "affine1": (3, skip[1])},
        lambda t, backend: call(ops.upsample_concat, t, backend),
        lambda t: call(plain.upsample_concat, t),
        quick=quick,
    )


def _add_case(x: tuple[int, ...], plain_skip: bool) -> Case:
    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        return function(*_source(inputs), 1.0, inputs["skip"], inputs.get("affine1"), 0.1, 0.0, *rest)

    inputs = {"x": x, "affine": (3, x[1]), "skip": x, **({} if plain_skip else {"affine1": (3, x[1])})}
    return Case(
        "add_act",
        f"{_by(x)}, {'plain' if plain_skip else 'normalised'} skip",
        inputs,
        lambda t, backend: call(ops.add_act, t, backend),
        lambda t: call(plain.add_act, t),
    )


def _one_case(op: str, x: tuple[int, ...], *settings: Any) -> Case:
    """An operator of one source and ``settings``."""

    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        return function(*_source(inputs), 0.1, *settings, *rest)

    function, truth = getattr(ops, op), getattr(plain, op)
    return Case(
        op, _by(x), {"x": x, "affine": (3, x[1])}, lambda t, backend: call(function, t, backend),
        lambda t: call(truth, t),
    )  # fmt: skip


def _prelu_case(x: tuple[int, ...], slopes: int) -> Case:
    return Case(
        "affine_prelu",
        f"{_by(x)}, {slopes} slopes",
        {"x": x, "affine": (3, x[1]), "slopes": (slopes,)},
        lambda t, backend: ops.affine_prelu(*_source(t), t["slopes"], backend),
        lambda t: plain.affine_prelu(*_source(t), t["slopes"]),  # type: ignore[arg-type]
    )


def _bn_case(channels: int) -> Case:
    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        var = inputs["var"]
        assert var is not None
        return function(inputs["mean"], var * var + 0.1, inputs["weight"], inputs["bias"], *rest)

    return Case(
        "bn_affine",
        str(channels),
        {name: (channels,) for name in ("mean", "var", "weight", "bias")},
        lambda t, backend: call(ops.bn_affine, t, 1e-5, backend),
        lambda t: call(plain.bn_affine, t, 1e-5),
    )


def _group_case(batch: int, channels: int, groups: int) -> Case:
    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        var = inputs["var"]
        assert var is not None
        return function(inputs["mean"], var * var + 0.1, inputs["weight"], inputs["bias"], groups, *rest)

    shapes = {"mean": (batch, channels), "var": (batch, channels), "weight": (channels,), "bias": (channels,)}
    return Case(
        "group_affine",
        f"{batch}×{channels}, {groups} groups",
        dict(shapes),
        lambda t, backend: call(ops.group_affine, t, 1e-5, backend),
        lambda t: call(plain.group_affine, t, 1e-5),
    )


def _running_case(channels: int) -> Case:
    """The same with running statistics, which move by a tenth."""
    count, momentum, names = 7, 0.1, ("mean", "var", "running_mean", "running_var")

    def ours(inputs: Tensors, backend: str) -> Any:
        mean, var, *running = (t for t in map(inputs.get, names) if t is not None)
        moved = [t.clone() for t in running]
        affine = ops.bn_affine_running(mean, var * var + 0.1, None, None, *moved, count, momentum, 1e-5, backend)
        return affine, *moved

    def truth(inputs: Tensors) -> Any:
        mean, var, *running = (t for t in map(inputs.get, names) if t is not None)
        var = var * var + 0.1
        batch = mean, var * count / (count - 1)
        moved = [t.lerp(of_batch, momentum) for t, of_batch in zip(running, batch, strict=True)]
        return plain.bn_affine(mean, var, None, None, 1e-5), *moved

    inputs: dict[str, tuple[int, ...]] = {name: (channels,) for name in names}
    return Case("bn_affine_running", str(channels), inputs, ours, truth, backward=False)


def _stats_case(logits: tuple[int, ...], mode: str) -> Case:
    batch, classes, height, width = logits
    sigmoid = mode == "sigmoid"

    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        weight = inputs["pixel_weight"]
        assert weight is not None
        return function(inputs["logits"], inputs["labels"], weight.detach().abs(), mode, 1, [True] * 3, *rest)

    return Case(
        "softmax_stats",
        f"{_by(logits)}, {mode}",
        {"logits": logits, "pixel_weight": (batch, height, width)},
        lambda t, backend: call(ops.softmax_stats, t, backend),
        lambda t: call(plain.softmax_stats, t),
        labels=(2 if sigmoid else classes, logits if sigmoid else (batch, height, width)),
    )


def _head_case(x: tuple[int, ...], classes: int, mode: str) -> Case:
    batch, channels, height, width = x
    sigmoid = mode == "sigmoid"

    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        filters = inputs["weight"], inputs["bias"]
        return function(*_source(inputs), 0.0, *filters, inputs["labels"], None, mode, 1, [True] * 3, *rest)

    return Case(
        "head_stats",
        f"{_by(x)}, {classes} classes, {mode}",
        {"x": x, "affine": (3, channels), "weight": (classes, channels, 1, 1), "bias": (classes,)},
        lambda t, backend: call(ops.head_stats, t, backend),
        lambda t: call(plain.head_stats, t),
        labels=(2, (batch, classes, height, width)) if sigmoid else (classes, (batch, height, width)),
    )


def _predict_case(x: tuple[int, ...], classes: int, output: str) -> Case:
    """Probabilities; of masks a rounding decides where two classes are nearly equal."""
    _, channels, *_ = x

    def call(function: Callable[..., Any], inputs: Tensors, *rest: Any) -> Any:
        source = inputs["x"]
        assert source is not None
        wide = torch.promote_types(source.dtype, torch.float32)
        return function(*_source(inputs), True, inputs["weight"], inputs["bias"], output, 0.5, wide, *rest)

    return Case(
        "head_predict",
        f"{_by(x)}, {classes} classes, {output}",
        {"x": x, "affine": (3, channels), "weight": (classes, channels, 1, 1), "bias": (classes,)},
        lambda t, backend: call(ops.head_predict, t, backend),
        lambda t: call(plain.head_predict, t),
        backward=False,
    )


def _confusion_case(logits: tuple[int, ...]) -> Case:
    """Counts, of logits and of the mask of their largest classes: exact in every dtype."""
    batch, classes, height, width = logits

    def call(functions: tuple[Callable[..., Any], Callable[..., Any]], inputs: Tensors, *rest: Any) -> Any:
        scores, labels = inputs["logits"], inputs["labels"]
        assert scores is not None
        counts = functions[0](scores, labels, 1, 0.0, *rest)
        return counts.double(), functions[1](scores.argmax(1), labels, classes, 1, *rest).double()

    return Case(
        "confusion_matrix",
        _by(logits),
        {"logits": logits},
        lambda t, backend: call((ops.confusion_matrix, ops.confusion_matrix_of_masks), t, backend),
        lambda t: call((plain.confusion_matrix, plain.confusion_matrix_of_masks), t),
        labels=(classes, (batch, height, width)),
        backward=False,
    )


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)


CASES = [
    _conv_case("conv2d", (2, 3, 7, 9), (5, 3, 3, 3), lazy=False),
    _conv_case("conv2d", (1, 17, 9, 11), (20, 25, 3, 3), (1, 8, 8, 10)),
    _conv_case("conv2d", (1, 6, 8, 7), (9, 11, 3, 3), (1, 5, 10, 10), quick=False),
    _conv_case("conv2d doubled", (1, 17, 4, 3), (5, 17, 3, 3), doubled=True, quick=False),
    _conv_case("conv2d doubled", (2, 9, 8, 7), (9, 14, 3, 3), (2, 5, 4, 3), doubled=True),
    _conv_case("conv2d stride 2", (2, 8, 9, 6), (7, 8, 3, 3), stride=2),
    _conv_case("conv2d 1×1", (2, 16, 5, 7), (3, 16, 1, 1), bias=True, stats=False),
    _conv_case("conv2d", (3, 70, 1, 1), (33, 70, 3, 3), quick=False),
    _act_case((2, 3, 7, 9), (5, 3, 3, 3), classes=0),
    _act_case((1, 17, 9, 11), (20, 17, 3, 3), classes=3),
    _transpose_case((2, 8, 5, 4), (8, 5, 2, 2), stats=False),
    _transpose_case((1, 17, 4, 5), (17, 6, 3, 3), stats=True),
    _pool_case((2, 5, 7, 9)),
    _upsample_case((2, 3, 4, 5), (2, 6, 9, 11), align_corners=True),
    _upsample_case((1, 20, 5, 3), (1, 4, 9, 6), align_corners=False, quick=False),
    _upsample_case((2, 8, 5, 3), (2, 4, 11, 6), align_corners=None),
    _add_case((2, 5, 7, 9), plain_skip=True),
    _add_case((1, 20, 5, 6), plain_skip=False),
    _one_case("avg_pool2x2", (2, 5, 7, 9)),
    _one_case("pad_replicate", (2, 5, 7, 9), 1, 1),
    _prelu_case((2, 5, 7, 9), 5),
    _prelu_case((2, 5, 7, 9), 1),
    _bn_case(37),
    _running_case(37),
    _group_case(2, 12, 3),
    _group_case(3, 5, 5),
    _stats_case((2, 22, 9, 7), "softmax"),
    _stats_case((2, 3, 8, 5), "sigmoid"),
    _head_case((2, 16, 9, 7), 22, "softmax"),
    _head_case((2, 8, 8, 5), 3, "sigmoid"),
    _predict_case((2, 16, 9, 7), 22, "softmax"),
    _predict_case((2, 8, 8, 5), 3, "sigmoid"),
    _confusion_case((2, 22, 9, 7)),
]


def _compare(case: Case, dtype: torch.dtype, device: torch.device, backend: str) -> Iterator[Row]:
    torch.manual_seed(0)
    exact: Tensors = {}
    for name, shape in case.inputs.items():
        scale = 1 / max(1, shape[1] * shape[2] * shape[3]) ** 0.5 if name == "weight" and len(shape) == 4 else 1.0
        value = torch.randn(shape, dtype=torch.float64).to(device) * scale  # the same numbers on every device
        # Affines and statistics are float32 beside 16-bit activations; truth starts from the same rounded values.
        exact[name] = value.to(_input_dtype(name, shape, dtype)).double().requires_grad_(name != "pixel_weight")
    if case.labels is not None:
        exact["labels"] = torch.randint(case.labels[0], case.labels[1]).to(device)
    parts = ("forward", "backward") if case.backward else ("forward",)
    truth = _outputs_and_gradients(case.truth, exact, case.backward)
    ours = _outputs_and_gradients(lambda t: case.ours(t, backend), _rounded(exact, dtype, None), case.backward)
    own = [
        _outputs_and_gradients(case.truth, _rounded(exact, dtype, form), case.backward)
        for form in (torch.contiguous_format, torch.channels_last)
    ]
    for part in parts:
        allowed = 2 * max(_error(result[part], truth[part]) for result in own) + ROUNDINGS * torch.finfo(dtype).eps
        yield Row(case.name, case.shape, _short(dtype), part, _error(ours[part], truth[part]), allowed)


def _input_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if len(shape) < 4 and name != "bias" else dtype


def _rounded(exact: Tensors, dtype: torch.dtype, form: torch.memory_format | None) -> Tensors:
    """The inputs in the dtypes the operation takes, as leaves; 4-D ones in memory format ``form`` if given."""
    result: Tensors = {}
    for name, value in exact.items():
        assert value is not None
        if value.is_floating_point():
            leaf = value.detach().to(_input_dtype(name, tuple(value.shape), dtype))
            if form is not None and leaf.dim() == 4:
                leaf = leaf.contiguous(memory_format=form)
            value = leaf.requires_grad_(value.requires_grad)
        result[name] = value
    return result


def _outputs_and_gradients(function: Function, inputs: Tensors, backward: bool = True) -> dict[str, list[Tensor]]:
    with torch.set_grad_enabled(backward):
        outputs = function(inputs)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    outputs = [y for y in outputs if y.numel()]
    if not backward:
        return {"forward": [y.detach() for y in outputs]}
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, seeds)
    return {"forward": [y.detach() for y in outputs], "backward": list(gradients)}


def _error(results: list[Tensor], truths: list[Tensor]) -> float:
    """The largest of the tensors' errors, each relative to the tensor's largest value."""
    errors = [
        # A gradient that is zero in truth (a bias before a BatchNorm) is measured against 1.
        ((result.double() - truth).abs().max() / (truth.abs().max() if truth.abs().max() > 1e-6 else 1)).item()
        for result, truth in zip(results, truths, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- networks ----------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "UNet": (models.UNet, reference.UNet, {"n_channels": 3, "n_classes": 4, "base_c": 4}, (2, 3, 16, 19)),
    "UNet bilinear": (
        models.UNet,
        reference.UNet,
        {"n_channels": 3, "n_classes": 4, "base_c": 4, "bilinear": True},
        (2, 3, 16, 19),
    ),
    "UNet instance": (
        models.UNet,
        reference.UNet,
        {
            "n_channels": 3,
            "n_classes": 4,
            "base_c": 4,
            "norm": "instance",
            "negative_slope": 0.01,
            "upsample": "nearest",
        },
        (2, 3, 32, 19),
    ),
    "StridedUNet": (models.StridedUNet, reference.StridedUNet, {"base_c": 4}, (2, 3, 16, 32)),
    "PlainUNet": (
        models.PlainUNet,
        reference.PlainUNet,
        {"in_channels": 3, "out_channels": 2, "init_features": 4},
        (1, 3, 16, 32),
    ),
    "BrainUNet": (models.BrainUNet, reference.BrainUNet, {"init_features": 4}, (2, 3, 16, 32)),
}


def networks(device: torch.device, backend: str, quick: bool) -> Iterator[Row]:
    """Every network in float64 through the lazy path in ATen; then through the kernels.

    Kernels take float64 in the interpreter only. On a GPU they run in float32, where the gradients of a whole network
    are ill-conditioned in PyTorch itself: where a rounding moves a value across the corner of a ReLU, a gradient jumps.
    Each tensor may err VARIATIONS times as much as it does in PyTorch, in the worst of both layouts on pictures that
    are a rounding apart; one number for all of them would let a wrong layer pass.
    """
    asked = [(name, "torch", torch.float64) for name in NETWORKS]
    if backend == "triton":
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        asked += [(name, backend, dtype) for name in (["UNet"] if quick else NETWORKS)]
    for name, through, dtype in asked:
        with _told() as raised:
            yield from _network(name, device, through, dtype)
        yield from (Row(name, through, _short(dtype), "error", math.inf, 0.0, said) for said in raised)


def _network(name: str, device: torch.device, backend: str, dtype: torch.dtype) -> Iterator[Row]:
    ours, theirs, settings, shape = NETWORKS[name]
    torch.manual_seed(0)
    # Weights and input that the dtype holds exactly: truth and the others start from the same numbers, on any device.
    truth_model = theirs(**settings).to(device, dtype).double()
    weights = copy.deepcopy(truth_model.state_dict())
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype)

    def step(build: Callable[..., nn.Module], form: torch.memory_format, x: Tensor = x, **more: Any) -> Results:
        model = build(**settings, **more).to(device, dtype)
        model.load_state_dict(weights)
        model = model.to(memory_format=form)  # type: ignore[call-overload]
        return _step(model, x.contiguous(memory_format=form))

    truth = _step(truth_model, x.double())
    found = step(ours, torch.contiguous_format, backend=backend)
    own: list[Results] = []
    if dtype != torch.float64:
        noise = [torch.randn(shape, dtype=dtype).to(device) for _ in range(NEIGHBOURS)]
        moved = [x * (1 + torch.finfo(dtype).eps / 2 * each) for each in noise]
        forms = torch.contiguous_format, torch.channels_last
        own = [step(theirs, form, each) for each in (x, *moved) for form in forms]
    for part, tensors in truth.items():
        if tensors:
            judged = _judge(found[part], tensors, [each[part] for each in own], dtype)
            yield Row(name, f"{_by(shape)}, {backend}", _short(dtype), part, *judged)


def _judge(
    found: dict[str, Tensor], truth: dict[str, Tensor], own: list[dict[str, Tensor]], dtype: torch.dtype
) -> tuple[float, float, str]:
    """(error, what is allowed, name) of the tensor that errs most, for what it is allowed."""
    assert found.keys() == truth.keys()
    judged = []
    for name in truth:
        errors = [_error([each[name]], [truth[name]]) for each in (found, *own)]
        allowed = 1e-10 if not own else VARIATIONS * max(errors[1:]) + ROUNDINGS * torch.finfo(dtype).eps
        judged.append((errors[0], allowed, name))
    return max(judged, key=lambda row: row[0] / row[1] if row[0] == row[0] else float("inf"))


def _step(model: nn.Module, x: Tensor) -> Results:
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    (y * weight.to(y.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.dim()}
    return {"forward": {"": y.detach()}, "backward": gradients, "buffers": buffers}
