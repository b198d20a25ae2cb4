"""The cases that the compile gate compiles and the benchmarks time: one operation or loss, one shape, one dtype.

A case makes its own operands, on any device (the meta device for the gate), in the order of the operator's signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastunet import checks, losses, ops
from fastunet.layout import BATCH, NOTHING, SAMPLES, stats_dtype

Operands = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One operation on one shape. What an operation has no use for is ignored."""

    kind: ClassVar[str] = "op"
    op: str  # a forward operator of fastunet.ops
    shape: tuple[int, int, int, int]  # N, C, H, W of the (first) source, or of the logits
    dtype: torch.dtype = torch.bfloat16
    # forward; forward and backward; of the backward only the inputs' or only the weights' gradients
    mode: Literal["inference", "training", "dgrad", "wgrad"] = "training"
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    filters: int = 0  # convolutions: channels of the result
    kernel: int = 3
    stride: int = 1
    skip: int = 0  # channels of a second source, concatenated with the first
    affine: bool = True  # sources are normalised and rectified when they are read
    stats: bool = True  # the result's batch statistics are wanted
    bias: bool = False
    pool: bool = False  # the result is wanted 2×2-pooled as well
    head: int = 0  # conv2d_act: classes of the 1×1 convolution of the result
    image: bool = False  # the source is the network's input and needs no gradient
    loss: str = "softmax"  # softmax_stats: its mode
    labels: torch.dtype = torch.int64
    weighted: bool = False  # softmax_stats: weights per pixel
    nearest: bool = False  # upsample_concat
    doubled: bool = False  # convolutions: the last source has half of this size, and its value is the nearest ×2 of it
    samples: bool = False  # affines and statistics are of each sample
    output: str = "argmax"  # head_predict
    algorithm: str = ""  # 3×3 convolutions: another one than the Triton backend's (see fastunet.kernels.table)
    wanted: tuple[bool, bool, bool] = (False, True, False)  # softmax_stats: squares, cross-entropy, label smoothing
    changes: tuple[tuple[str, Any], ...] = ()  # other values for arguments of the operator or its backward, by name

    @property
    def name(self) -> str:
        """A readable identifier, unique among the cases."""
        parts = [self.op, "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), self.mode]
        for key, text in _SUFFIXES.items():
            if (value := getattr(self, key)) != getattr(Case, key):
                parts.append(text.format(str(value).removeprefix("torch.")))
        parts += [f"{argument}={str(value).removeprefix('torch.')}" for argument, value in self.changes]
        return "-".join(parts)

    @property
    def differentiable(self) -> bool:
        """Whether the operation has a backward at all."""
        return self.op in _BACKWARD

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products; an operation without them is bound by memory and has 0."""
        batch, channels, height, width = self.shape
        if self.op in ("conv2d", "conv2d_act"):
            pixels = batch * -(-height // self.stride) * -(-width // self.stride)
            once = 2 * pixels * ((channels + self.skip) * self.kernel**2 + self.head) * self.filters
        elif self.op == "conv_transpose2d":
            once = 2 * batch * height * width * channels * self.filters * self.kernel**2
        elif self.op.startswith("head"):
            product = 2 * batch * height * width * channels * self.filters
            return product * (1 if self.mode == "inference" else 4)  # the backward makes the logits again
        else:
            return 0
        return once * (1 if self.mode != "training" else 2 if self.image else 3)

    @property
    def bytes(self) -> int:
        """Bytes moved if each call, forward and backward, reads each operand once and writes each result once."""
        operands = self.operands("meta")
        results = _results(getattr(torch.ops.fastunet, self.op)(*operands, "torch"))
        total = _size(operands) + _size(results) if self.mode in ("inference", "training") else 0
        if self.mode != "inference":
            backward = self.backward_operands(operands, results)
            gradients = getattr(torch.ops.fastunet, f"{self.op}_backward")(*backward, "torch")
            total += _size(backward) + _size(_results(gradients))
        return total

    def operands(self, device: str | torch.device) -> Operands:
        """The operator's arguments without ``backend``: random numbers on ``device``."""
        return self._changed(self.op, _OPERANDS[self.op](self, device))

    def backward_operands(self, operands: Operands, results: Operands) -> Operands:
        """The arguments of the ``…_backward`` operator, with random incoming gradients."""
        return self._changed(f"{self.op}_backward", _BACKWARD[self.op](self, operands, results))

    def _changed(self, operator: str, operands: Operands) -> Operands:
        if not self.changes:
            return operands
        changes = dict(self.changes)
        return tuple(changes.get(a.name, value) for a, value in zip(_arguments(operator), operands, strict=True))

    def launch(self, backend: ModuleType, device: str | torch.device = "meta") -> None:
        """Call the functions of ``backend`` (:mod:`fastunet.kernels` or :mod:`fastunet.aten`) as this case needs."""
        operands = self.operands(device)
        with self.choosing():
            results = _results(getattr(backend, self.op)(*operands))
            if self.mode != "inference":
                getattr(backend, f"{self.op}_backward")(*self.backward_operands(operands, results))

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Inside, the Triton backend uses this case's algorithm."""
        if not self.algorithm:
            yield
            return
        from fastunet.kernels import conv, table

        with table.forced({kind: self.algorithm for kind, name in conv.FUNCTIONS if name == self.algorithm}):
            yield

    def source(self, channels: int, device: str | torch.device) -> tuple[Tensor, Tensor | None, float]:
        """(x, affine, slope) with ``channels`` channels at this case's size."""
        batch, _, height, width = self.shape
        x = self.random((batch, channels, height, width), device)
        if not self.affine:
            return x, None, 1.0
        return x, self.random_affine(channels, device, (batch,) if self.samples else ()), 0.0

    def random(self, shape: tuple[int, ...], device: str | torch.device) -> Tensor:
        """Normal random numbers in this case's dtype and memory layout."""
        layout = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return torch.randn(shape, dtype=self.dtype, device=device).contiguous(memory_format=layout)

    def random_affine(self, channels: int, device: str | torch.device, of: tuple[int, ...] = ()) -> Tensor:
        """Rows scale, shift and centre as a normalisation in training gives them: scales above 0; as many as ``of``."""
        affine = torch.randn((*of, 3, channels), dtype=stats_dtype(self.dtype), device=device)
        affine[..., 0, :].abs_().add_(0.5)
        return affine

    def random_weight(self, shape: tuple[int, ...], channels: int, device: str | torch.device) -> Tensor:
        """Weights of a convolution that reads ``channels`` channels, scaled so that its result has the input's size."""
        return self.random(shape, device) / math.sqrt(channels * self.kernel**2)


# What of a case is in its name, where it is not the usual.
_SUFFIXES = {
    "filters": "k{}", "kernel": "f{}", "stride": "s{}", "skip": "skip{}", "affine": "plain", "stats": "nostats",
    "bias": "bias", "pool": "pooled", "head": "head{}", "image": "image", "loss": "{}", "labels": "{}",
    "weighted": "weighted", "nearest": "nearest", "doubled": "doubled", "samples": "samples", "output": "{}",
    "wanted": "wanted{}", "layout": "{}", "algorithm": "{}",
}  # fmt: skip


def _arguments(operator: str) -> list[Any]:
    """What the schema says of each argument, without ``backend``."""
    return list(getattr(ops, operator)._schema.arguments[:-1])


def _results(results: Any) -> Operands:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _size(operands: Operands) -> int:
    return sum(x.numel() * x.element_size() for x in operands if isinstance(x, Tensor))


# ---- operands, by operator ---------------------------------------------------------------------------------------


def _affine_act(case: Case, device: Any) -> Operands:
    return case.source(case.shape[1], device)


def _add_act(case: Case, device: Any) -> Operands:
    return *case.source(case.shape[1], device), *case.source(case.shape[1], device), 0.0


def _affine_prelu(case: Case, device: Any) -> Operands:
    x, affine, _ = case.source(case.shape[1], device)
    return x, affine, torch.rand(case.shape[1], dtype=stats_dtype(case.dtype), device=device)


def _avg_pool2x2(case: Case, device: Any) -> Operands:
    return case.source(case.shape[1], device)


def _pad_replicate(case: Case, device: Any) -> Operands:
    return *case.source(case.shape[1], device), 1, 1


def _pad_replicate_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    return torch.randn_like(results[0]), *operands[:3]


def _bn_affine(case: Case, device: Any) -> Operands:
    mean, var, weight, bias = torch.rand((4, case.shape[1]), dtype=stats_dtype(case.dtype), device=device).unbind(0)
    return mean, var, weight, bias, 1e-5


def _bn_affine_running(case: Case, device: Any) -> Operands:
    mean, var, weight, bias, eps = _bn_affine(case, device)
    batch, _, height, width = case.shape
    return mean, var, weight, bias, mean.clone(), var.clone(), batch * height * width, 0.1, eps


def _bn_affine_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    _, var, weight, *_, eps = operands
    return torch.randn_like(results[0]), var, weight, eps


def _group_affine(case: Case, device: Any) -> Operands:
    batch, channels = case.shape[:2]
    drawn = torch.rand((2, batch + 1, channels), dtype=stats_dtype(case.dtype), device=device)
    return *drawn[:, 1:].unbind(0), *drawn[:, 0].unbind(0), 1 if channels % 2 else 2, 1e-5


def _group_affine_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    mean, var, weight, _, *settings = operands
    return torch.randn_like(results[0]), mean, var, weight, *settings


def _stats(case: Case) -> int:
    return (SAMPLES if case.samples else BATCH) if case.stats else NOTHING


def _conv2d(case: Case, device: Any) -> Operands:
    channels = case.shape[1] + case.skip
    weight = case.random_weight((case.filters, channels, case.kernel, case.kernel), channels, device)
    bias = torch.randn(case.filters, dtype=case.dtype, device=device) if case.bias else None
    half = replace(case, shape=(*case.shape[:2], case.shape[2] // 2, case.shape[3] // 2)) if case.doubled else case
    first = (case if case.skip else half).source(case.shape[1], device)
    second = half.source(case.skip, device) if case.skip else (None, None, 1.0)
    size, doubled = list(case.shape[2:]), [case.doubled and not case.skip, case.doubled and case.skip > 0]
    settings = (_stats(case), False, case.pool, case.random_affine(case.filters, device)[0] if case.pool else None)
    return *first, *second, weight, bias, case.stride, size, [0] * 4, doubled, *settings


def _conv2d_act(case: Case, device: Any) -> Operands:
    *sources, weight, bias, _, size, offset, doubled, _, _, pool, _ = _conv2d(case, device)
    affine = case.random_affine(case.filters, device)
    head, head_bias = None, None
    if case.head:
        head = case.random_weight((case.head, case.filters, 1, 1), case.filters, device)
        head_bias = torch.randn(case.head, dtype=case.dtype, device=device) if case.bias else None
    return *sources, weight, bias, size, offset, doubled, affine, 0.0, pool, head, head_bias


def _gradients(y: Tensor, mean: Tensor, var: Tensor) -> list[Tensor | None]:
    return [*map(torch.randn_like, (y, mean, var))] if mean.numel() else [y, None, None]


def _conv2d_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    *sources, weight, bias, stride, size, offset, doubled, _, _, _, scale = operands
    y, mean, var, z, pooled = results
    gradients = _gradients(y, mean, var)
    gradients.append(torch.randn_like(pooled) if pooled.numel() else None)
    inputs, weights = case.mode != "wgrad", case.mode != "dgrad"
    mask = [inputs and not case.image, inputs and case.skip > 0, weights, weights and bias is not None]
    return *gradients, y, mean, scale, *sources, weight, z, stride, size, offset, doubled, mask


def _conv_transpose2d(case: Case, device: Any) -> Operands:
    channels = case.shape[1]
    weight = case.random_weight((channels, case.filters, case.kernel, case.kernel), channels, device)
    bias = torch.randn(case.filters, dtype=case.dtype, device=device) if case.bias else None
    return *case.source(channels, device), weight, bias, _stats(case)


def _conv_transpose2d_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    *source, weight, bias, _ = operands
    y, mean, var = results
    gradients = _gradients(y, mean, var)
    inputs, weights = case.mode != "wgrad", case.mode != "dgrad"
    return *gradients, y, mean, *source, weight, [inputs, weights, weights and bias is not None]


def _max_pool2x2(case: Case, device: Any) -> Operands:
    return case.source(case.shape[1], device)[:2]


def _max_pool2x2_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    return *operands, torch.randn_like(results[0]), torch.randn_like(operands[0])


def _upsample_concat(case: Case, device: Any) -> Operands:
    batch, _, height, width = case.shape
    above = replace(case, shape=(batch, case.skip, 2 * height, 2 * width))
    skip = above.source(case.skip, device) if case.skip else (None, None, 1.0)
    return *case.source(case.shape[1], device), *skip, None if case.nearest else True, True


def _softmax_stats(case: Case, device: Any) -> Operands:
    batch, classes, height, width = case.shape
    multilabel = case.loss == "sigmoid" and classes > 1
    shape = case.shape if multilabel else (batch, height, width)
    labels = torch.randint(0, 2 if case.loss == "sigmoid" else classes, shape, device=device).to(case.labels)
    weight = torch.rand((batch, height, width), dtype=torch.float32, device=device) if case.weighted else None
    return case.random(case.shape, device), labels, weight, case.loss, -100, list(case.wanted)


def _confusion_matrix(case: Case, device: Any) -> Operands:
    logits, labels, *_ = _softmax_stats(case, device)
    return logits, labels, -100, 0.0


def _confusion_matrix_of_masks(case: Case, device: Any) -> Operands:
    batch, classes, height, width = case.shape
    mask, labels = (torch.randint(0, classes, (batch, height, width), device=device).to(case.labels) for _ in range(2))
    return mask, labels, classes, -100


def _head_stats(case: Case, device: Any) -> Operands:
    channels = case.shape[1]
    weight = case.random_weight((case.filters, channels, 1, 1), channels, device)
    bias = torch.randn(case.filters, dtype=case.dtype, device=device)
    logits = replace(case, shape=(case.shape[0], case.filters, *case.shape[2:]))
    return *case.source(channels, device), weight, bias, *_softmax_stats(logits, device)[1:]


def _of_operands_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    return torch.randn_like(results[0]), *operands


def _head_stats_backward(case: Case, operands: Operands, results: Operands) -> Operands:
    return torch.randn_like(results[0]), *operands, [True, True, True]


def _head_predict(case: Case, device: Any) -> Operands:
    return *_head_stats(case, device)[:5], case.output, 0.5, case.dtype


_OPERANDS: dict[str, Callable[[Case, Any], Operands]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _affine_act, _affine_prelu, _add_act, _avg_pool2x2, _pad_replicate,
        _bn_affine, _bn_affine_running, _group_affine, _conv2d, _conv2d_act, _conv_transpose2d,
        _max_pool2x2, _upsample_concat, _softmax_stats, _confusion_matrix, _confusion_matrix_of_masks, _head_stats,
        _head_predict,
    )
}  # fmt: skip
_BACKWARD: dict[str, Callable[[Case, Operands, Operands], Operands]] = {
    **dict.fromkeys(
        ("affine_act", "affine_prelu", "add_act", "avg_pool2x2", "upsample_concat", "softmax_stats"),
        _of_operands_backward,
    ),
    "pad_replicate": _pad_replicate_backward,
    "bn_affine": _bn_affine_backward,
    "group_affine": _group_affine_backward,
    "conv2d": _conv2d_backward,
    "conv_transpose2d": _conv_transpose2d_backward,
    "max_pool2x2": _max_pool2x2_backward,
    "head_stats": _head_stats_backward,
}


# ---- the cases ---------------------------------------------------------------------------------------------------

FP16, FP32 = torch.float16, torch.float32

# What the milesial U-Net, base 64, asks for at batch 8 and 512², from top to bottom, and the siblings' variants.
CASES = [
    Case("conv2d", (8, 3, 512, 512), filters=64, affine=False, image=True),
    Case("conv2d", (8, 64, 512, 512), filters=64),
    Case("conv2d", (8, 64, 256, 256), filters=128),
    Case("conv2d", (8, 64, 512, 512), filters=64, pool=True),
    Case("conv2d", (8, 128, 256, 256), filters=128, pool=True),
    Case("conv2d", (8, 512, 32, 32), filters=1024),
    Case("conv2d", (8, 64, 512, 512), filters=64, skip=64),
    Case("conv2d", (8, 64, 512, 512), filters=64, skip=64, doubled=True),
    Case("conv2d", (8, 512, 64, 64), filters=512, skip=512, algorithm="cudnn"),
    Case("conv2d", (8, 64, 512, 512), filters=22, kernel=1, stats=False, bias=True),
    Case("conv2d", (8, 64, 512, 512), filters=64, mode="inference", stats=False, bias=True),
    Case("conv2d_act", (8, 3, 512, 512), filters=64, affine=False, stats=False, mode="inference"),
    Case("conv2d_act", (8, 64, 512, 512), filters=64, affine=False, stats=False, mode="inference", pool=True),
    Case("conv2d_act", (8, 64, 512, 512), filters=64, affine=False, stats=False, mode="inference", head=22),
    Case("conv2d_act", (8, 512, 64, 64), filters=512, affine=False, stats=False, mode="inference", skip=512),
    Case("conv2d_act", (8, 64, 512, 512), filters=64, affine=False, stats=False, mode="inference", dtype=FP32),
    Case("conv2d", (8, 64, 512, 512), filters=128, stride=2),
    Case("conv2d", (8, 64, 512, 512), filters=64, dtype=FP32),
    Case("conv2d", (8, 64, 512, 512), filters=64, skip=64, dtype=FP32),
    Case("conv2d", (8, 3, 512, 512), filters=64, affine=False, image=True, dtype=FP32),
    Case("conv2d", (8, 64, 512, 512), filters=22, kernel=1, stats=False, bias=True, dtype=FP32),
    Case("conv2d", (2, 5, 37, 53), filters=7, dtype=FP16),
    Case("conv_transpose2d", (8, 128, 256, 256), filters=64, kernel=2, stats=False, bias=True),
    Case("conv_transpose2d", (8, 128, 256, 256), filters=64, kernel=3),
    Case("conv_transpose2d", (8, 128, 256, 256), filters=64, kernel=2, stats=False, dtype=FP32),
    Case("max_pool2x2", (8, 64, 512, 512)),
    Case("max_pool2x2", (8, 64, 512, 512), dtype=FP32),
    Case("max_pool2x2", (2, 5, 37, 53), dtype=FP16, affine=False),
    Case("upsample_concat", (8, 64, 256, 256), skip=64),
    Case("upsample_concat", (8, 64, 256, 256)),
    Case("upsample_concat", (8, 64, 256, 256), skip=64, nearest=True),
    Case("upsample_concat", (8, 64, 256, 256), skip=64, dtype=FP32),
    Case("upsample_concat", (2, 5, 37, 53), skip=3, dtype=FP16),
    Case("affine_act", (8, 64, 512, 512)),
    Case("affine_act", (8, 64, 512, 512), dtype=FP32),
    Case("affine_act", (2, 5, 37, 53), dtype=FP16),
    Case("add_act", (8, 64, 512, 512)),
    Case("add_act", (8, 64, 512, 512), dtype=FP32),
    Case("add_act", (2, 5, 37, 53), dtype=FP16, affine=False),
    Case("affine_prelu", (8, 64, 512, 512)),
    Case("avg_pool2x2", (8, 64, 512, 512)),
    Case("avg_pool2x2", (2, 5, 37, 53), dtype=FP16),
    Case("pad_replicate", (8, 64, 254, 254)),
    Case("bn_affine", (8, 64, 512, 512)),
    Case("softmax_stats", (8, 2, 512, 512)),
    Case("softmax_stats", (8, 22, 512, 512)),
    Case("softmax_stats", (8, 22, 512, 512), layout="contiguous"),
    Case("softmax_stats", (8, 22, 512, 512), dtype=FP32, layout="contiguous", weighted=True),
    Case("softmax_stats", (8, 1, 512, 512), loss="sigmoid", dtype=FP32, layout="contiguous"),
    Case("softmax_stats", (8, 3, 512, 512), loss="sigmoid", labels=torch.uint8),
    Case("softmax_stats", (8, 22, 512, 512), dtype=FP32, wanted=(True, True, True), weighted=True),
    Case("softmax_stats", (8, 64, 512, 512), wanted=(True, True, True)),
    Case("softmax_stats", (8, 256, 128, 128), weighted=True, layout="contiguous"),
    Case("softmax_stats", (2, 8, 37, 53), wanted=(True, False, False)),
    Case("confusion_matrix", (8, 22, 512, 512), mode="inference"),
    Case("confusion_matrix", (8, 1, 512, 512), loss="sigmoid", dtype=FP32, layout="contiguous", mode="inference"),
    Case("confusion_matrix", (8, 256, 128, 128), mode="inference"),
    Case("confusion_matrix_of_masks", (8, 22, 512, 512), labels=torch.uint8, mode="inference"),
    Case("confusion_matrix_of_masks", (8, 256, 128, 128), mode="inference"),
    Case("head_stats", (8, 64, 512, 512), filters=22, kernel=1),
    Case("head_stats", (8, 64, 512, 512), filters=2, kernel=1),
    Case("head_stats", (8, 64, 512, 512), filters=1, kernel=1, loss="sigmoid"),
    Case("head_stats", (8, 64, 512, 512), filters=22, kernel=1, dtype=FP32),
    Case("head_stats", (8, 64, 512, 512), filters=22, kernel=1, wanted=(True, True, True), weighted=True),
    Case("head_stats", (8, 128, 256, 256), filters=64, kernel=1),
    Case("head_stats", (8, 40, 128, 128), filters=256, kernel=1, wanted=(True, True, True)),
    Case("head_predict", (8, 64, 512, 512), filters=22, kernel=1, mode="inference"),
    Case("head_predict", (8, 64, 512, 512), filters=4, kernel=1, mode="inference", output="threshold"),
    Case("head_predict", (8, 64, 512, 512), filters=22, kernel=1, mode="inference", output="softmax"),
    Case("head_predict", (8, 64, 512, 512), filters=4, kernel=1, mode="inference", output="sigmoid", dtype=FP32),
    Case("head_predict", (2, 5, 37, 53), filters=200, kernel=1, mode="inference", dtype=FP16),
    Case("head_stats", (2, 5, 37, 53), filters=3, kernel=1, loss="sigmoid", dtype=FP16, weighted=True),
]


def unet_layers(base: int = 64, size: int = 512, batch: int = 8, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Every layer of the milesial U-Net in both forms, from top to bottom; convolutions once for each direction."""
    found = []
    for level in range(5):
        channels, above, side = base << level, (base << level) // 2, size >> level
        shape = (batch, channels, side, side)
        if level == 0:
            found += _directions(Case("conv2d", (batch, 3, side, side), dtype, filters=base, affine=False, image=True))
        else:
            found += _directions(Case("conv2d", (batch, above, side, side), dtype, filters=channels))
            up = Case("conv_transpose2d", shape, dtype, filters=above, kernel=2, stats=False, bias=True)
            found += [*_directions(up), Case("upsample_concat", (batch, above, side, side), dtype)]
        found += _directions(Case("conv2d", shape, dtype, filters=channels))
        if level < 4:
            found += _directions(Case("conv2d", shape, dtype, filters=channels, skip=channels))
            found += [Case("max_pool2x2", shape, dtype)]
    return found


def _directions(case: Case) -> list[Case]:
    modes: list[Any] = ["inference", "wgrad"] if case.image else ["inference", "dgrad", "wgrad"]
    return [replace(case, mode=mode) for mode in modes]


def _everything(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Case]:
    """Every operator, with every argument that may be left out, and in every form that has kernels of its own."""
    height, width = shape[2:]
    conv = Case("conv2d", shape, dtype, filters=shape[1], bias=True)
    two = replace(conv, skip=shape[1])
    act = replace(two, op="conv2d_act", mode="inference", stats=False)
    yield from (replace(conv, pool=True), two, replace(act, pool=True), replace(act, head=3))
    yield replace(two, changes=(("size", (height - 2, width - 1)), ("offset", (-1, 0, -1, -1))))
    placed = replace(two, changes=(("size", (height + 1, width + 2)), ("offset", (0, 1, 1, 2))))
    yield from (placed, replace(placed, algorithm="cudnn"), replace(placed, algorithm="cudnn", samples=True))
    doubled = replace(two, doubled=True)
    yield from (replace(form, doubled=True) for form in (conv, two, act, replace(act, skip=0), placed))
    yield from (replace(doubled, samples=True), replace(doubled, algorithm="cudnn"))
    yield replace(doubled, algorithm="cudnn", samples=True)
    for form in (conv, two):
        yield from (replace(form, stride=2, pool=True), replace(form, kernel=1, pool=True))
    up = Case("conv_transpose2d", shape, dtype, filters=shape[1], bias=True)
    yield from (replace(up, kernel=2), replace(up, kernel=3))
    alone = ("affine_act", "affine_prelu", "add_act", "avg_pool2x2", "pad_replicate", "max_pool2x2")
    yield from (Case(op, shape, dtype) for op in (*alone, "bn_affine", "group_affine"))
    apart = replace(conv, pool=True, samples=True)
    yield from (
        apart,
        replace(two, samples=True),
        replace(conv, stride=2, samples=True),
        replace(conv, kernel=1, samples=True),
        replace(act, samples=True),
        *(replace(apart, op=op) for op in alone),
        replace(apart, op="add_act", changes=(("skip_affine", None),)),
        replace(apart, op="add_act", changes=(("affine", None),)),
        replace(up, kernel=2, samples=True),
        replace(up, kernel=3, samples=True),
        Case("upsample_concat", shape, dtype, skip=shape[1], samples=True),
        Case("head_stats", shape, dtype, filters=3, kernel=1, samples=True),
        Case("head_predict", shape, dtype, filters=3, kernel=1, mode="inference", samples=True),
    )
    yield Case("bn_affine_running", shape, dtype, mode="inference")
    yield Case("upsample_concat", shape, dtype, skip=shape[1])
    for mode in losses.MODES:
        stats = Case("softmax_stats", shape, dtype, loss=mode, weighted=True, wanted=(True, True, True))
        head = replace(stats, op="head_stats", filters=3, kernel=1)
        yield from (stats, replace(stats, layout="contiguous"), head)
        yield replace(head, changes=(("mask", (True, False, False)),))
    yield Case("head_predict", shape, dtype, filters=3, kernel=1, mode="inference")
    yield from (Case(f"confusion_matrix{what}", shape, dtype, mode="inference") for what in ("", "_of_masks"))


def variations(case: Case) -> Iterator[Case]:
    """The case; and for each argument of its operator, or of the backward, cases in which that is otherwise.

    A tensor that may be left out is, a switch is thrown, a word or dtype is another one, a gradient is not wanted. What
    the operator refuses is left out.
    """
    yield case
    operands = case.operands("meta")
    told = {argument.name: (argument, x) for argument, x in zip(_arguments(case.op), operands, strict=True)}
    if case.mode != "inference":
        results = _results(getattr(ops, case.op)(*operands, "torch"))
        given = case.backward_operands(operands, results)
        told |= {
            argument.name: (argument, x) for argument, x in zip(_arguments(f"{case.op}_backward"), given, strict=True)
        }
    for name, (argument, value) in told.items():
        for other in _others(argument, value):
            changed = replace(case, changes=(*case.changes, (name, other)))
            try:
                getattr(ops, case.op)(*changed.operands("meta"), "torch")
            except (ValueError, TypeError):
                continue
            yield changed


def _others(argument: Any, value: Any) -> Iterator[Any]:
    """Other values of an argument, of those that decide what is compiled."""
    kind = str(argument.type)
    if kind == "Optional[Tensor]" and value is not None:
        yield None
    elif kind in ("bool", "Optional[bool]"):
        yield from (x for x in (True, False, *([None] if kind != "bool" else [])) if x is not value)
    elif "slope" in argument.name and kind == "float":
        yield from (x for x in (1.0, 0.0, 0.01) if x != value)
    elif argument.name == "stats":
        yield from (x for x in (NOTHING, BATCH) if x != value)
    elif kind == "List[bool]":
        yield from (tuple(x and i != j for j, x in enumerate(value)) for i, wanted in enumerate(value) if wanted)
    elif kind == "str":
        yield from (x for x in WORDS[argument.name] if x != value)
    elif isinstance(value, torch.dtype):
        yield from (x for x in DTYPES if x != value)


# What arguments of the type str may say, and which dtypes the kernels take on a GPU.
WORDS = {"mode": losses.MODES, "output": ops.OUTPUTS}
DTYPES = (torch.bfloat16, FP16, FP32)


def _untimed() -> Iterator[Case]:
    wide, odd, deep = (2, 64, 64, 64), (2, 17, 37, 53), (1, 512, 16, 16)
    for shape, dtype in ((wide, torch.bfloat16), (odd, FP16)):
        for case in _everything(shape, dtype):
            yield from variations(case)
    for shape in (wide, odd):
        yield from _everything(shape, FP32)
    # pictures so small that several programs share a tile, and other algorithms
    for case in [
        case for case in _everything(deep, torch.bfloat16) if case.op.startswith("conv2d") and case.kernel == 3
    ]:
        yield from variations(case) if case.stride == 1 and not case.changes else (case,)
    for skip in (0, 64):
        yield from variations(Case("conv2d", wide, filters=64, skip=skip, bias=True, algorithm="cudnn"))
    for labels in checks.LABEL_DTYPES:
        for op, filters, modes in (("softmax_stats", 0, losses.MODES), ("head_stats", 3, losses.MODES)):
            yield from (Case(op, wide, filters=filters, kernel=1, labels=labels, loss=mode) for mode in modes)
        for what in ("", "_of_masks"):
            yield Case(f"confusion_matrix{what}", wide, labels=labels, mode="inference")
    for channels in (1, 3, 5):  # of pictures, and as few filters and classes
        picture = Case("conv2d", (2, channels, 37, 53), FP16, filters=channels, affine=False, bias=True, image=True)
        yield from variations(picture)
        yield replace(picture, image=False)
        yield replace(picture, shape=(2, channels, 32, 64), samples=True)
        yield from variations(replace(picture, op="conv2d_act", mode="inference", stats=False, pool=True))
        yield replace(picture, affine=True, skip=channels, image=False)
        for kernel in (2, 3):
            yield Case("conv_transpose2d", picture.shape, FP16, filters=channels, kernel=kernel)
        yield Case("head_stats", wide, filters=channels, kernel=1)
        yield Case("head_predict", wide, filters=channels, kernel=1, mode="inference")


# What else the public surface can launch: for the gate, and for the first day on a new GPU. Nobody times it.
UNTIMED = list(dict.fromkeys(_untimed()))

# What a CPU times in a few seconds: the same operations, small and in float32.
SMALL_CASES = [
    Case("conv2d", (2, 16, 64, 64), filters=16, dtype=FP32),
    Case("conv2d", (2, 16, 64, 64), filters=16, skip=16, dtype=FP32),
    Case("conv_transpose2d", (2, 32, 32, 32), filters=16, kernel=2, stats=False, bias=True, dtype=FP32),
    Case("max_pool2x2", (2, 16, 128, 128), dtype=FP32),
    Case("upsample_concat", (2, 16, 64, 64), skip=16, dtype=FP32),
    Case("affine_act", (2, 16, 128, 128), dtype=FP32),
    Case("softmax_stats", (2, 22, 128, 128), dtype=FP32),
    Case("confusion_matrix", (2, 22, 128, 128), dtype=FP32, mode="inference"),
    Case("head_stats", (2, 16, 128, 128), filters=22, kernel=1, dtype=FP32),
    Case("head_predict", (2, 16, 128, 128), filters=22, kernel=1, dtype=FP32, mode="inference"),
]


# ---- losses and scores: from logits and integer labels, the loss with its backward ---------------------------------


@dataclass(frozen=True)
class LossCase:
    """One loss or score of logits (N, C, H, W)."""

    kind: ClassVar[str] = "loss"
    function: Literal["dice_ce", "soft_miou", "confusion_matrix"]
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """A readable identifier."""
        return f"{self.function}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def flops(self) -> int:
        """0: bound by memory."""
        return 0

    @property
    def bytes(self) -> int:
        """Logits and labels once; a loss reads both again in its backward and writes a gradient."""
        batch, classes, height, width = self.shape
        pixels = batch * height * width
        logits, labels = pixels * classes * self.dtype.itemsize, pixels * 8
        return logits + labels if self.function == "confusion_matrix" else 3 * logits + 2 * labels

    def data(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Logits, as a network gives them in this dtype, and labels."""
        logits = torch.randn(self.shape, device=device).to(self.dtype)
        if self.dtype != torch.float32:
            logits = logits.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, self.shape[1], (self.shape[0], *self.shape[2:]), device=device)
        return logits.requires_grad_(self.function != "confusion_matrix"), labels


LOSS_CASES = [
    LossCase("dice_ce", (8, 22, 512, 512)),
    LossCase("dice_ce", (8, 2, 512, 512)),
    LossCase("dice_ce", (8, 22, 512, 512), torch.float32),
    LossCase("soft_miou", (8, 22, 512, 512)),
    LossCase("confusion_matrix", (8, 22, 512, 512)),
]

SMALL_LOSS_CASES = [
    LossCase("dice_ce", (2, 22, 64, 64), torch.float32),
    LossCase("soft_miou", (2, 22, 64, 64), torch.float32),
    LossCase("confusion_matrix", (2, 22, 64, 64), torch.float32),
]
