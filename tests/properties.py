"""What an operator or function is called with, in the property tests: drawn shapes and numbers, and its truth.

A :class:`Problem` has operands by their names in the operator's schema, in dense memory; what is called, with a
backend; and the truth, in :mod:`fastunet.reference`, which is called with the same operands in float64, and in the
operands' own dtype to learn PyTorch's own error. Problems of operators are drawn as cases of :mod:`benchmarks.cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.cases import WORDS, Case
from fastunet import checks, functional, losses, ops
from fastunet.layout import SAMPLES, stats_dtype
from fastunet.reference import functional as plain

Operands = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SOURCES = (("x", "affine", "slope"), ("x0", "affine0", "slope0"), ("x1", "affine1", "slope1"),
           ("skip", "skip_affine", "skip_slope"))  # fmt: skip
PICTURES = ("x", "x0", "x1", "skip", "logits", "labels", "pixel_weight", "mask")  # (N, …, H, W)


@dataclass
class Problem:
    """One call. ``results`` names what it returns, and says of each whether its first axis is the batch's."""

    operator: str
    dtype: torch.dtype
    operands: Operands
    ours: Callable[[Operands, str], Sequence[Tensor]]
    truth: Callable[[Operands, Sequence[Tensor]], Sequence[Tensor]]  # which is also told what was found
    results: dict[str, bool]
    exact: bool = False  # whole numbers, without an error
    written: tuple[str, ...] = ()  # operands that the call writes to
    flips: bool = True  # the call of a mirrored picture gives the mirrored result, if the operands allow it
    corners: Callable[[Operands], Tensor] | None = None  # where the first result's gradient is not asked for
    noise: tuple[str, ...] = ()  # operands whose gradient is zero in truth, and in this dtype what rounding left

    @property
    def leaves(self) -> list[str]:
        """The operands that have a gradient."""
        return [
            name
            for name, x in self.operands.items()
            if isinstance(x, Tensor) and x.is_floating_point() and not self.exact
            if name not in _WITHOUT_GRADIENT and name not in self.noise
        ]

    @property
    def batch(self) -> int:
        """How many pictures there are; 0 where there is no batch."""
        return next((len(x) for name, x in self.operands.items() if name in PICTURES), 0)


_WITHOUT_GRADIENT = {"pixel_weight", "pool_scale", "running_mean", "running_var"}


@dataclass
class Size:
    """How large the drawn tensors are."""

    batch: int
    channels: int
    side: int
    least: int = 1  # of a side
    dtypes: tuple[torch.dtype, ...] = FLOATS


TINY = Size(3, 20, 7, dtypes=(torch.float32, torch.float16, torch.float64))  # the interpreter's, which has no bfloat16
SMALL = Size(4, 40, 24)
MANY = Size(2, 4, 700, 512, dtypes=(torch.float32,))  # pixels, so that sums show


# ---- cases -------------------------------------------------------------------------------------------------------


def _case(draw: Draw, size: Size, op: str, least: int = 1, **settings: Any) -> Case:
    least = max(least, size.least)
    shape = (
        draw(st.sampled_from([*range(1, size.batch + 1), 0] if size.least == 1 else [1, size.batch])),
        draw(st.integers(1, size.channels)),
        draw(st.integers(least, size.side)),
        draw(st.integers(least, size.side)),
    )
    affine = settings.pop("affine", None)
    if op in _BY_SAMPLE:
        settings["samples"] = draw(st.booleans())
    return Case(op, shape, draw(st.sampled_from(size.dtypes)), layout="contiguous",
                affine=draw(st.booleans()) if affine is None else affine, **settings)  # fmt: skip


# Whose affines, and statistics, may be of each sample.
_BY_SAMPLE = {"affine_act", "conv2d", "conv_transpose2d", "max_pool2x2", "upsample_concat", "head_stats"}


def _flag(draw: Draw, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, draw(st.booleans())) for name in names)


def _slope(draw: Draw, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, draw(st.sampled_from([0.0, 1.0, 0.01, 0.3, -0.5]))) for name in names)


def _conv2d(draw: Draw, size: Size) -> Case:
    kernel, stride = draw(st.sampled_from([(3, 1), (3, 1), (3, 2), (1, 1)]))
    case = _case(draw, size, "conv2d", 3, kernel=kernel, stride=stride, bias=draw(st.booleans()),
                 filters=draw(st.integers(1, size.channels)), stats=size.least > 1 or draw(st.booleans()),
                 skip=draw(st.one_of(st.just(0), st.integers(1, size.channels))))  # fmt: skip
    changes = (*_slope(draw, "slope0", *(["slope1"] if case.skip else [])), *_flag(draw, "save"))
    if draw(st.booleans()):
        # A source is never wholly outside: F.pad refuses that.
        frame = tuple(n + draw(st.integers(-1, 2)) for n in case.shape[2:])
        changes += (("size", frame), ("offset", tuple(draw(st.integers(-1, 1)) for _ in range(4))))
    else:
        frame = case.shape[2:]
    if (kernel, stride) == (3, 1):
        changes += (("doubled", tuple(draw(st.booleans()) for _ in range(2))),)
    pooled = min((n - 1) // stride + 1 for n in frame) >= 2 and draw(st.booleans())
    return replace(case, pool=pooled, changes=changes)


def _conv2d_act(draw: Draw, size: Size) -> Case:
    case = _conv2d(draw, size)
    changes = tuple(change for change in case.changes if change[0] != "save")
    if draw(st.booleans()):
        changes += (("affine", None),)
    frame = dict(changes).get("size", case.shape[2:])
    what = draw(st.sampled_from(["", "pool", "head"]))
    return replace(
        case, op="conv2d_act", kernel=3, stride=1, stats=False, pool=what == "pool" and min(frame) >= 2,
        head=draw(st.integers(1, 20)) if what == "head" else 0, changes=(*changes, *_slope(draw, "slope")),
    )  # fmt: skip


def _conv_transpose2d(draw: Draw, size: Size) -> Case:
    kernel, filters = draw(st.sampled_from([2, 3])), draw(st.integers(1, size.channels))
    return _case(draw, size, "conv_transpose2d", kernel=kernel, filters=filters, bias=draw(st.booleans()),
                 stats=size.least > 1 or draw(st.booleans()), changes=_slope(draw, "slope"))  # fmt: skip


def _upsample_concat(draw: Draw, size: Size) -> Case:
    changes = (
        ("align_corners", draw(st.sampled_from([True, False, None]))),
        *_slope(draw, "slope"),
        *_flag(draw, "skip_first"),
    )
    skip = draw(st.one_of(st.just(0), st.integers(1, size.channels)))
    return _case(draw, size, "upsample_concat", skip=skip, changes=changes)


def _labelled(draw: Draw, size: Size, op: str, head: bool = False, **settings: Any) -> Case:
    mode = draw(st.sampled_from(WORDS["mode"]))
    classes = draw(st.integers(2 if mode == "softmax" else 1, size.channels))
    ignored = draw(st.sampled_from([-100, 0, 1, checks.NEVER]))
    case = _case(draw, size, op, loss=mode, labels=draw(st.sampled_from(checks.LABEL_DTYPES)), kernel=1,
                 filters=classes if head else 0, weighted=draw(st.booleans()),
                 wanted=tuple(draw(st.booleans()) for _ in range(3)),
                 changes=(("ignore_index", ignored), *settings.pop("changes", ())))  # fmt: skip
    return case if head else replace(case, shape=(case.shape[0], classes, *case.shape[2:]), affine=True)


def _head_stats(draw: Draw, size: Size) -> Case:
    return _labelled(draw, size, "head_stats", True, changes=_slope(draw, "slope"))


def _head_predict(draw: Draw, size: Size) -> Case:
    case = _head_stats(draw, size)
    changes = (*_slope(draw, "slope"), ("threshold", draw(st.floats(0.1, 0.9))))
    return replace(case, op="head_predict", output=draw(st.sampled_from(ops.OUTPUTS)), changes=changes)


def _confusion_matrix(draw: Draw, size: Size) -> Case:
    case = _labelled(draw, size, "confusion_matrix")
    changes = (*case.changes, ("threshold", draw(st.floats(-1, 1))))
    return replace(case, changes=changes, loss="sigmoid" if case.shape[1] == 1 else "softmax")


def _confusion_matrix_of_masks(draw: Draw, size: Size) -> Case:
    case = _labelled(draw, size, "confusion_matrix_of_masks")
    channels = max(2, case.shape[1])
    return replace(case, shape=(case.shape[0], channels, *case.shape[2:]), loss="softmax")


CASES: dict[str, Callable[[Draw, Size], Case]] = {
    "affine_act": lambda draw, size: _case(draw, size, "affine_act", changes=_slope(draw, "slope")),
    "add_act": lambda draw, size: _case(
        draw, size, "add_act", changes=_slope(draw, "slope", "skip_slope", "sum_slope")
    ),
    "affine_prelu": lambda draw, size: _case(draw, size, "affine_prelu"),
    "avg_pool2x2": lambda draw, size: _case(draw, size, "avg_pool2x2", 2, changes=_slope(draw, "slope")),
    "pad_replicate": lambda draw, size: _case(
        draw,
        size,
        "pad_replicate",
        changes=(*_slope(draw, "slope"), *((name, draw(st.integers(0, 1))) for name in ("rows", "columns"))),
    ),
    "bn_affine": lambda draw, size: _case(draw, size, "bn_affine"),
    "bn_affine_running": lambda draw, size: _case(draw, size, "bn_affine_running"),
    "group_affine": lambda draw, size: _case(draw, size, "group_affine"),
    "conv2d": _conv2d,
    "conv2d_act": _conv2d_act,
    "conv_transpose2d": _conv_transpose2d,
    "max_pool2x2": lambda draw, size: _case(draw, size, "max_pool2x2", 2),
    "pool_fork": lambda draw, size: _case(draw, size, "max_pool2x2", 2),
    "upsample_concat": _upsample_concat,
    "softmax_stats": lambda draw, size: _labelled(draw, size, "softmax_stats"),
    "head_stats": _head_stats,
    "head_predict": _head_predict,
    "confusion_matrix": _confusion_matrix,
    "confusion_matrix_of_masks": _confusion_matrix_of_masks,
}


# ---- truths ------------------------------------------------------------------------------------------------------


def _named(function: Callable[..., Any], *without: str) -> Callable[[Operands, Sequence[Tensor]], list[Tensor]]:
    """``function`` of operands by name, less those ``without`` which it says what is to be computed."""

    def call(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
        results = function(**{name: x for name, x in operands.items() if name not in without})
        return [results] if isinstance(results, Tensor) else [x for x in results if x.dim() != 1 or x.numel()]

    return call


def _winners(y: Tensor, scale: Tensor | None) -> Tensor:
    """Flat indices of the pixels that a 2×2 max-pool takes for a normalisation by ``scale``, (C,) or (N, C)."""
    sign = torch.ones(y.shape[1]) if scale is None else scale.sign()
    signed = y * sign.to(y)[..., None, None]
    return F.max_pool2d(signed, 2, return_indices=True)[1]  # where all are 0, the first


def _pooled(y: Tensor, like: Tensor, scale: Tensor | None) -> Tensor:
    """y at the pixels that win in ``like``: which of two values that round alike is larger, y's dtype decides."""
    winners = _winners(like.detach(), scale)
    return y.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)


def _conv2d_truth(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
    results = _named(plain.conv2d, "save", "pool", "pool_scale")(operands, found)
    if operands["pool"]:
        results.append(_pooled(results[0], found[0], operands["pool_scale"]))
    return results


def _conv2d_act_truth(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
    own = ("affine", "slope", "pool", "head_weight", "head_bias")
    y, *_ = plain.conv2d(**{k: v for k, v in operands.items() if k not in own}, stride=1, stats=False)
    z = plain.affine_act(y, operands["affine"], operands["slope"])
    if operands["head_weight"] is not None:
        return [F.conv2d(z, operands["head_weight"], operands["head_bias"])]
    return [z, F.max_pool2d(z, 2)] if operands["pool"] else [z]


def _running_truth(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
    mean, var, count, momentum = (operands[name] for name in ("mean", "var", "count", "momentum"))
    affine = plain.bn_affine(mean, var, operands["weight"], operands["bias"], operands["eps"])
    moved = []
    for name, batch in (("running_mean", mean), ("running_var", var * (count / max(count - 1, 1)))):
        running = operands[name]
        moved.append((running + momentum * (batch.detach() - running)).to(running.dtype))
    return [affine, *moved]


def _pool_truth(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
    affine = operands["affine"]
    return [_pooled(operands["x"], operands["x"], None if affine is None else affine[..., 0, :])]


def _predict_truth(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
    """Probabilities; or classes and masks, where what was found is as good as the right one."""
    given = {k: v for k, v in operands.items() if k not in ("output", "threshold", "dtype")}
    logits = F.conv2d(plain.affine_act(given["x"], given["affine"], given["slope"]), given["weight"], given["bias"])
    output, bound = operands["output"], 4 * torch.finfo(operands["dtype"]).eps * (1 + logits.detach().abs().amax())
    if output == "argmax":
        taken = logits.gather(1, found[0].long().unsqueeze(1)).squeeze(1)
        return [torch.where(taken >= logits.amax(1) - bound, found[0], 255)]
    p = logits.softmax(1) if output == "softmax" else logits.sigmoid()
    if output == "threshold":
        near = (p - operands["threshold"]).abs() <= bound
        return [torch.where(near, found[0], (p > operands["threshold"]).to(torch.uint8))]
    return [p]


def _as_statistics(function: Callable[..., Any]) -> Callable[[Operands, Sequence[Tensor]], list[Tensor]]:
    """Sums of 16-bit probabilities would prove nothing: PyTorch too is asked in float32, of the same logits."""

    def call(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
        logits = operands["logits"]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return _named(function)({**operands, "logits": wide}, found)

    return call


# ---- problems of operators ---------------------------------------------------------------------------------------


def _clear_of_corners(operands: Operands) -> None:
    """Move what a ReLU would see near 0 away: which side rounding puts it on is chance, and its gradient jumps."""
    for x, affine, slope in SOURCES:
        if operands.get(x) is None:
            continue
        rows = operands.get(affine)
        if rows is not None:
            scales, shifts = rows[..., 0, :], rows[..., 1, :]
            signs = torch.tensor([1.0, -1.0, 0.0])[torch.randint(0, 3, scales.shape)]
            scales.copy_(signs * (scales.abs() / 2 + 0.25))
            shifts += torch.where(shifts.abs() < 0.01, 0.5, 0.0)
        if operands.get(slope, 1) != 1:
            three = torch.tensor([[1.0], [0.0], [0.0]]) if rows is None else rows.double()
            scale, shift, centre = (row[..., None, None] for row in three.unbind(-2))
            for _ in range(8):
                near = (scale * (operands[x].double() - centre) + shift).abs() < 2e-3
                operands[x] = torch.where(near, operands[x] + 0.37, operands[x])


def _strange_labels(labels: Tensor, operands: Operands) -> Tensor:
    """A few that are ignored, and a few that are no class."""
    kind, ignored = labels.dtype, operands["ignore_index"]
    low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    for value in (ignored, -7, 201):
        if low <= value <= high:
            labels = torch.where(torch.rand(labels.shape) < 0.05, torch.tensor(value).to(kind), labels)
    return labels


def _operands(draw: Draw, case: Case) -> Operands:
    names = [argument.name for argument in getattr(ops, case.op)._schema.arguments[:-1]]
    operands = dict(zip(names, case.operands("cpu"), strict=True))
    if case.op == "upsample_concat" and operands["skip"] is not None:
        batch, channels, *sides = operands["skip"].shape
        size = [max(1, n + draw(st.integers(-2, 3))) for n in sides]
        operands["skip"] = case.random((batch, channels, *size), "cpu")
    if operands.get("pool_scale") is not None and draw(st.booleans()):
        operands["pool_scale"] = torch.randint(-1, 2, operands["pool_scale"].shape).to(operands["pool_scale"])
    for name in ("affine1", "skip_affine"):  # beside a source that differs by sample one that does not
        if case.samples and operands.get(name) is not None and case.shape[0] and draw(st.booleans()):
            operands[name] = operands[name][0].clone()
    for name in ("labels", "mask"):
        if name in operands:
            operands[name] = _strange_labels(operands[name], operands)
    for name in ("weight", "bias"):
        if case.op.startswith("bn_affine"):
            kept = draw(st.sampled_from([None, case.dtype, operands["mean"].dtype]))
            operands[name] = None if kept is None else operands[name].to(kept)
    _clear_of_corners(operands)
    return operands


def _call(operator: str, wanted: Callable[[Operands], Sequence[int]]) -> Callable[[Operands, str], list[Tensor]]:
    def call(operands: Operands, backend: str) -> list[Tensor]:
        found = getattr(torch.ops.fastunet, operator)(*operands.values(), backend)
        found = [found] if isinstance(found, Tensor) else found
        return [found[i] for i in wanted(operands)]

    return call


def _results(operator: str, operands: Operands) -> dict[str, int]:
    """The results that were asked for, by name: their numbers."""
    if operator in ("conv2d", "conv_transpose2d"):
        names = ["y", *(["mean", "var"] if operands["stats"] else [])]
        return {name: i for i, name in enumerate(names)} | ({"p": 4} if operands.get("pool") else {})
    if operator == "conv2d_act":
        return {"z": 0, "p": 1} if operands["pool"] else {"z": 0}
    return {"p": 0, "y": 1} if operator == "pool_fork" else {"y": 0}


_TRUTHS: dict[str, Callable[[Operands, Sequence[Tensor]], list[Tensor]]] = {
    "affine_act": _named(plain.affine_act),
    "add_act": _named(plain.add_act),
    "affine_prelu": _named(plain.affine_prelu),
    "avg_pool2x2": _named(plain.avg_pool2x2),
    "pad_replicate": _named(plain.pad_replicate),
    "bn_affine": _named(plain.bn_affine),
    "bn_affine_running": _running_truth,
    "group_affine": _named(plain.group_affine),
    "conv2d": _conv2d_truth,
    "conv2d_act": _conv2d_act_truth,
    "conv_transpose2d": _named(plain.conv_transpose2d),
    "max_pool2x2": _pool_truth,
    "pool_fork": lambda operands, found: [*_pool_truth(operands, found), operands["x"] * 1],
    "upsample_concat": _named(plain.upsample_concat),
    "softmax_stats": _as_statistics(plain.softmax_stats),
    "head_stats": _named(plain.head_stats),
    "head_predict": _predict_truth,
    "confusion_matrix": _named(plain.confusion_matrix),
    "confusion_matrix_of_masks": _named(plain.confusion_matrix_of_masks),
}
_OF_THE_BATCH = {"mean", "var", "affine", "running_mean", "running_var"}


def _of_operator(operator: str) -> Callable[[Draw, Size], Problem]:
    def problem(draw: Draw, size: Size) -> Problem:
        case = CASES[operator](draw, size)
        operands = _operands(draw, case)
        names = _results(operator, operands)
        ours = _call(operator, lambda operands: list(_results(operator, operands).values()))
        exact = operator.startswith("confusion") or operands.get("output") in ("argmax", "threshold")
        of_batch = set() if operands.get("stats") == SAMPLES else _OF_THE_BATCH
        made = Problem(operator, case.dtype, operands, ours, _TRUTHS[operator],
                       {name: name not in of_batch for name in names}, exact)  # fmt: skip
        if operator.startswith("confusion"):
            made.results = {"counts": False}
        if operator.endswith("_affine") or operator == "bn_affine_running":
            made.results, made.flips, made.dtype = {"affine": False}, False, operands["mean"].dtype
        if operator == "bn_affine_running":
            operands["count"] = draw(st.integers(1, 100))
            for name in ("running_mean", "running_var"):  # of any dtype, and not the batch's
                kind = draw(st.sampled_from(size.dtypes))
                operands[name] = torch.rand_like(operands[name], dtype=kind)
            made.results |= {"running_mean": False, "running_var": False}
            made.written = "running_mean", "running_var"
            made.ours = lambda operands, backend: [
                *ours(operands, backend), *(operands[name] for name in ("running_mean", "running_var"))
            ]  # fmt: skip
        if operator == "add_act" and operands["sum_slope"] != 1:
            made.corners = lambda operands: plain.add_act(**{**operands, "sum_slope": 1.0}).abs() < 0.02
        if operator == "affine_prelu":
            channels, wide = operands["x"].shape[1], operands["slopes"].dtype
            operands["slopes"] = torch.randn(draw(st.sampled_from([1, channels])), dtype=wide)
            made.corners = lambda operands: plain.affine_act(operands["x"], operands["affine"], 1.0).abs() < 0.02
        if operator == "pad_replicate":  # the last row is repeated, not the first
            made.flips = not (operands["rows"] or operands["columns"])
        if operator == "avg_pool2x2":
            made.flips = not any(side % 2 for side in operands["x"].shape[2:])
        if operator == "softmax_stats":
            made.dtype = stats_dtype(case.dtype)
        if operator in ("conv2d_act", "head_predict"):
            made = replace(made, ours=torch.no_grad()(made.ours))
        return made

    return problem


# ---- problems of functions ---------------------------------------------------------------------------------------


def _conv_bn_relu(draw: Draw, size: Size) -> Problem:
    kernel, stride = draw(st.sampled_from([(3, 1), (3, 2), (1, 1)]))
    case = _case(draw, size, "conv2d", 3, kernel=kernel, stride=stride, filters=draw(st.integers(1, size.channels)),
                 affine=False)  # fmt: skip
    case = replace(case, shape=(max(case.shape[0], 1), *case.shape[1:]))
    weight = case.random_weight((case.filters, case.shape[1], kernel, kernel), case.shape[1], "cpu")
    vectors = torch.rand(5, case.filters).add_(0.2).to(case.dtype).unbind(0)
    training = draw(st.booleans())
    operands = {
        "x": case.random(case.shape, "cpu"), "weight": weight, "bn_weight": vectors[0], "bn_bias": vectors[1],
        "running_mean": vectors[2], "running_var": vectors[3], "bias": draw(st.sampled_from([None, vectors[4]])),
        "training": training, "momentum": 0.3, "eps": 1e-3, "stride": stride, "relu": draw(st.booleans()),
    }  # fmt: skip

    def call(function: Callable[..., Any], operands: Operands, **more: Any) -> list[Tensor]:
        return [function(**operands, **more), operands["running_mean"], operands["running_var"]]

    return Problem(
        "conv_bn_relu", case.dtype, operands,
        lambda operands, backend: call(functional.conv_bn_relu, operands, backend=backend),
        lambda operands, found: call(plain.conv_bn_relu, _copied(operands)),
        {"z": True, "running_mean": False, "running_var": False}, written=("running_mean", "running_var"),
        corners=lambda operands: call(plain.conv_bn_relu, _copied({**operands, "relu": False}))[0].abs() < 0.05,
        noise=("bias",) if training and case.dtype != torch.float64 else (),
    )  # fmt: skip


def _copied(operands: Operands) -> Operands:
    """The operands, with running statistics that may be written to."""
    return {name: x.clone() if name.startswith("running") else x for name, x in operands.items()}


def _upsample_pad_concat(draw: Draw, size: Size) -> Problem:
    made = _of_operator("upsample_concat")(draw, replace(size))
    x = made.operands["x"]
    skip = made.operands["skip"]
    skip = torch.randn(x.shape[0], 2, 2 * x.shape[2], 2 * x.shape[3] + 1).to(x) if skip is None else skip
    kept = {name: made.operands[name] for name in ("align_corners", "skip_first")}
    return replace(
        made, operator="upsample_pad_concat", operands={"x": x, "skip": skip, **kept},
        ours=lambda operands, backend: [functional.upsample_pad_concat(**operands, backend=backend)],
        truth=_named(plain.upsample_pad_concat),
    )  # fmt: skip


def _labelled_problem(draw: Draw, size: Size, head: bool) -> Problem:
    """Logits and good labels of a softmax, as the losses take them on a CPU."""
    case = _case(draw, size, "head_stats", filters=draw(st.integers(2, 12)), kernel=1, affine=False)
    case = replace(case, shape=(max(case.shape[0], 1), max(case.shape[1], 2), *case.shape[2:]))
    classes = case.filters if head else case.shape[1]
    batch, channels, *plane = case.shape
    labels = torch.randint(0, classes, (batch, *plane))
    if not head:
        return Problem("", case.dtype, {"logits": case.random(case.shape, "cpu"), "labels": labels},
                       lambda operands, backend: [], lambda operands, found: [], {"loss": False})  # fmt: skip
    weight = case.random_weight((classes, channels, 1, 1), channels, "cpu")
    bias = draw(st.sampled_from([None, torch.randn(classes).to(case.dtype)]))
    operands = {"x": case.random(case.shape, "cpu"), "weight": weight, "bias": bias, "labels": labels}
    return Problem("", case.dtype, operands, lambda operands, backend: [], lambda operands, found: [], {"loss": False})


def _scored(draw: Draw, size: Size) -> Problem:
    made = _labelled_problem(draw, size, False)
    return replace(made, dtype=stats_dtype(made.dtype))


def _score(name: str, function: Callable[..., Tensor], truth: Callable[..., Tensor]) -> Callable[[Draw, Size], Problem]:
    return lambda draw, size: replace(
        _scored(draw, size), operator=name,
        ours=lambda operands, backend: [function(**operands, backend=backend)], truth=_as_statistics(truth),
    )  # fmt: skip


def _head_loss(draw: Draw, size: Size) -> Problem:
    def ours(operands: Operands, backend: str) -> list[Tensor]:
        return [functional.head_loss(**operands, criterion=losses.DiceLoss(), backend=backend)]

    def truth(operands: Operands, found: Sequence[Tensor]) -> list[Tensor]:
        wide = {k: v.float() if isinstance(v, Tensor) and v.dtype in FLOATS[1:3] else v for k, v in operands.items()}
        return [plain.dice_loss(F.conv2d(wide["x"], wide["weight"], wide["bias"]), wide["labels"])]

    return replace(_labelled_problem(draw, size, True), operator="head_loss", ours=ours, truth=truth)


def _stats_function(draw: Draw, size: Size) -> Problem:
    made = _of_operator("softmax_stats")(draw, size)
    mode, wanted = made.operands["mode"], made.operands["wanted"]
    classes = made.operands["logits"].shape[1] if mode == "softmax" else 2
    labels = made.operands["labels"].long()
    made.operands["labels"] = torch.where((labels < 0) | (labels >= classes), 0, labels)
    ignored = made.operands["ignore_index"]

    def ours(operands: Operands, backend: str) -> list[Tensor]:
        return [functional.softmax_stats(
            operands["logits"], operands["labels"], mode=mode, pixel_weight=operands["pixel_weight"],
            ignore_index=None if ignored == checks.NEVER else ignored, backend=backend,
            **dict(zip(("squares", "entropy", "smoothing"), wanted, strict=True)),
        )]  # fmt: skip

    return replace(made, operator="functional.softmax_stats", ours=ours)


OPERATORS: dict[str, Callable[[Draw, Size], Problem]] = {operator: _of_operator(operator) for operator in CASES}
FUNCTIONS: dict[str, Callable[[Draw, Size], Problem]] = {
    "conv_bn_relu": _conv_bn_relu,
    "upsample_pad_concat": _upsample_pad_concat,
    "softmax_stats": _stats_function,
    "head_loss": _head_loss,
    "dice_loss": _score("dice_loss", functional.dice_loss, plain.dice_loss),
    "miou": _score("miou", functional.miou, plain.soft_miou),
}


# ---- the same call, told otherwise -------------------------------------------------------------------------------


def permuted(problem: Problem, order: Tensor) -> Problem:
    """The pictures in another order, and what is of each."""
    return replace(
        problem,
        operands={
            k: v[order] if _is_picture(k, v) or ("affine" in k and v is not None and v.dim() == 3) else v
            for k, v in problem.operands.items()
        },
    )


def _is_picture(name: str, x: Any) -> bool:
    return isinstance(x, Tensor) and name in PICTURES


def mirrored(problem: Problem, axis: int) -> Problem | None:
    """The pictures mirrored along ``axis`` (−2 or −1), and all that goes with them; None if that is another problem."""
    given = dict(problem.operands)
    if not problem.flips or _uneven(given, axis):
        return None
    for name, x in problem.operands.items():
        if _is_picture(name, x) or (name == "weight" and x.dim() == 4):
            given[name] = x.flip(axis)
    if "offset" in given:
        corners = [*given["offset"]]
        for i, x in enumerate(given[name] for name in ("x0", "x1") if given.get(name) is not None):
            at = 2 * i + axis + 2
            corners[at] = given["size"][axis] - corners[at] - x.shape[axis] * (2 if given["doubled"][i] else 1)
        given["offset"] = corners
    return replace(problem, operands=given)


def _uneven(given: Operands, axis: int) -> bool:
    """Whether what is computed sees left and right differently."""
    x = next((given[name] for name in ("x", "x0") if name in given), None)
    if x is None:
        return False
    weight, stride = given.get("weight"), given.get("stride", 1)
    side = given.get("size", x.shape)[axis]
    if "stats" in given and "stride" not in given:  # a transposed convolution: 3×3 is padded at one end
        return bool(weight.shape[-1] == 3)
    if stride == 2:
        side, even = (side + 1) // 2, side % 2 == 0
        if even:
            return True
    if given.get("skip") is not None and "skip_first" in given and (given["skip"].shape[axis] - 2 * x.shape[axis]) % 2:
        return True
    pools = given.get("pool", weight is None and "align_corners" not in given and "slope" not in given)
    signs = given.get("pool_scale") if "pool" in given else (given.get("affine") if pools else None)
    first = signs is not None and bool(((signs[..., 0, :] if signs.dim() > 1 else signs) == 0).any())
    return bool(pools) and (side % 2 == 1 or first)
