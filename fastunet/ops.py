"""The operators ``torch.ops.fastunet.*``: each is told once, as its schema, fake, checks and derivative.

Its implementations are the functions of its name in :mod:`fastunet.aten` and :mod:`fastunet.kernels`, which take the
same arguments but for the last, ``backend``: "torch", "triton" or "auto" (see :mod:`fastunet.backend`). Fakes and
checks take the arguments that they name; derivatives are exact, once differentiable, and follow from names (see
:mod:`fastunet.dispatch`).

A *source* ``(x, affine, slope)`` stands for ``act(scale·(x − centre) + shift)``: see :mod:`fastunet.aten`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunet import aten
from fastunet.backend import resolve_backend
from fastunet.dispatch import apply, refuse_second_derivative, register, register_backward, register_composite, run
from fastunet.layout import NOTHING, SAMPLES, activation, stats_dtype

# ---- checks ------------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_source(x: Tensor, affine: Tensor | None, like: Tensor) -> None:
    """One source, beside operand ``like``: rank, batch, dtype, and an affine that fits it."""
    if x.dim() != 4:
        raise ValueError(f"expected a source of shape (N, C, H, W), got {_shape(x)}")
    if x.shape[0] != like.shape[0]:
        raise ValueError(f"expected sources of one batch size, got {like.shape[0]} and {x.shape[0]}")
    _check_kind("source", x, like)
    if affine is not None:
        rows = affine.dim() == 2 or (affine.dim() == 3 and affine.shape[0] == x.shape[0])
        if not rows or affine.shape[-2] != 3 or affine.shape[-1] != x.shape[1]:
            raise ValueError(
                f"expected an affine of shape (3, {x.shape[1]}) or ({x.shape[0]}, 3, {x.shape[1]}) for a source of "
                f"shape {_shape(x)}, got {_shape(affine)}"
            )
        if affine.dtype != stats_dtype(x.dtype):
            raise TypeError(f"expected an affine of {stats_dtype(x.dtype)} for a {x.dtype} source, got {affine.dtype}")


def _check_kind(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype:
        raise TypeError(f"expected a {name} of the source's dtype {like.dtype}, got {x.dtype}")


def _check_filters(
    weight: Tensor, bias: Tensor | None, x: Tensor, axis: int, channels: int, sides: Sequence[int]
) -> None:
    """Weights whose dimension ``axis`` reads ``channels`` channels, square with a side in ``sides``; and their bias:
    in the source's dtype or in that of its statistics."""
    if weight.dtype != stats_dtype(x.dtype):
        _check_kind("weight", weight, x)
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] in sides
    if not square or weight.shape[axis] != channels:
        pair = f"({channels}, K" if axis == 0 else f"(K, {channels}"
        shapes = " or ".join(f"{pair}, {side}, {side})" for side in sides)
        raise ValueError(
            f"expected a weight of shape {shapes} for sources of {channels} channels, got {_shape(weight)}; change one "
            "of them"
        )
    if bias is not None:
        if bias.dtype != stats_dtype(x.dtype):
            _check_kind("bias", bias, x)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[1 - axis]:
            raise ValueError(
                f"expected a bias of shape ({weight.shape[1 - axis]},), got {_shape(bias)}; pass one value per filter"
            )


def _filters(weight: Tensor) -> Tensor:
    """The gradient of the bias beside ``weight``."""
    return weight.new_empty(weight.shape[0])


# ---- affine_act --------------------------------------------------------------------------------------------------


affine_act_backward = register_backward(
    "affine_act_backward(Tensor dz, Tensor x, Tensor? affine, float slope, str backend) -> (Tensor, Tensor)", "x affine"
)
affine_act = register(
    "affine_act(Tensor x, Tensor? affine, float slope, str backend) -> Tensor",
    lambda x: activation(x, x.shape),
    lambda x, affine: _check_source(x, affine, x),
    affine_act_backward,
    {"z": True},
)


# ---- affine_prelu ------------------------------------------------------------------------------------------------


def _check_affine_prelu(x: Tensor, affine: Tensor | None, slopes: Tensor) -> None:
    _check_source(x, affine, x)
    channels = x.shape[1]
    if slopes.dim() != 1 or slopes.shape[0] not in (1, channels):
        raise ValueError(
            f"expected slopes of shape ({channels},) or (1,) for a source of {channels} channels, got {_shape(slopes)}"
        )
    if slopes.dtype not in _NO_WIDER[stats_dtype(x.dtype)]:
        raise TypeError(f"expected slopes of {stats_dtype(x.dtype)} or narrower, got {slopes.dtype}; convert them")


affine_prelu_backward = register_backward(
    "affine_prelu_backward(Tensor dz, Tensor x, Tensor? affine, Tensor slopes, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "x affine, slopes",
)
affine_prelu = register(
    "affine_prelu(Tensor x, Tensor? affine, Tensor slopes, str backend) -> Tensor",
    lambda x: activation(x, x.shape),
    _check_affine_prelu,
    affine_prelu_backward,
    {"z": True},
)


# ---- add_act -----------------------------------------------------------------------------------------------------


def _check_add_act(x: Tensor, affine: Tensor | None, skip: Tensor, skip_affine: Tensor | None) -> None:
    _check_source(x, affine, x)
    _check_source(skip, skip_affine, x)
    if skip.shape != x.shape:
        raise ValueError(f"expected a skip of the source's shape {_shape(x)}, got {_shape(skip)}; change one of them")


add_act_backward = register_backward(
    "add_act_backward(Tensor dz, Tensor x, Tensor? affine, float slope, Tensor skip, Tensor? skip_affine,"
    " float skip_slope, float sum_slope, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "x affine, skip skip_affine",
)
add_act = register(
    "add_act(Tensor x, Tensor? affine, float slope, Tensor skip, Tensor? skip_affine, float skip_slope,"
    " float sum_slope, str backend) -> Tensor",
    lambda x: activation(x, x.shape),
    _check_add_act,
    add_act_backward,
    {"z": True},
)


# ---- bn_affine ---------------------------------------------------------------------------------------------------


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_WIDER = {torch.float32: (torch.float32, torch.bfloat16, torch.float16), torch.float64: _FLOATING}


def _bn_affine_fake(mean: Tensor) -> Tensor:
    return mean.new_empty((3, mean.shape[0]))


def _check_bn_affine(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    narrow = _NO_WIDER.get(mean.dtype, ())
    for name, vector in (("var", var), ("weight", weight), ("bias", bias)):
        _check_vector(name, vector, mean, narrow)


def _check_bn_affine_running(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor
) -> None:
    _check_bn_affine(mean, var, weight, bias)
    _check_vector("running_mean", running_mean, mean, _FLOATING)  # running statistics may have any dtype
    _check_vector("running_var", running_var, mean, _FLOATING)


def _check_vector(name: str, vector: Tensor | None, mean: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if vector is None:
        return
    if vector.shape != mean.shape:
        raise ValueError(f"expected a {name} of the statistics' shape {_shape(mean)}, got {_shape(vector)}")
    if vector.dtype not in dtypes:
        raise TypeError(f"expected a {name} of {mean.dtype}, as the statistics, or narrower, got {vector.dtype}")


bn_affine_backward = register_backward(
    "bn_affine_backward(Tensor daffine, Tensor var, Tensor? weight, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "mean, var, weight, bias",
    lambda daffine: tuple(daffine.new_empty(daffine.shape[1]) for _ in range(4)),
)
bn_affine = register(
    "bn_affine(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str backend) -> Tensor",
    _bn_affine_fake,
    _check_bn_affine,
    bn_affine_backward,
    {"affine": True},
)
# The same, and the running statistics move in that launch. An operator of its own: if statistics were optional,
# compilers would assume that they are written even where there are none.
bn_affine_running = register(
    "bn_affine_running(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!) running_mean,"
    " Tensor(b!) running_var, SymInt count, float momentum, float eps, str backend) -> Tensor",
    _bn_affine_fake,
    _check_bn_affine_running,
    bn_affine_backward,
    {"affine": True},
)


# ---- group_affine ------------------------------------------------------------------------------------------------


def _check_group_affine(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> None:
    if mean.dim() != 2 or groups < 1 or mean.shape[1] % groups:
        raise ValueError(f"expected statistics of shape (N, C), C a multiple of {groups} groups, got {_shape(mean)}")
    _check_vector("var", var, mean, (mean.dtype,))
    for name, vector in (("weight", weight), ("bias", bias)):
        _check_vector(name, vector, mean[0] if mean.shape[0] else mean.sum(0), _NO_WIDER.get(mean.dtype, ()))


group_affine_backward = register_backward(
    "group_affine_backward(Tensor daffine, Tensor mean, Tensor var, Tensor? weight, int groups, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "mean, var, weight, bias",
    lambda daffine, mean: (torch.empty_like(mean), torch.empty_like(mean), *daffine.new_empty((2, mean.shape[1]))),
)
group_affine = register(
    "group_affine(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, int groups, float eps, str backend) -> Tensor",
    lambda mean: mean.new_empty((mean.shape[0], 3, mean.shape[1])),
    _check_group_affine,
    group_affine_backward,
    {"affine": True},
)


# Not an operator: only fastunet/eager.py uses it, on a CPU, where no compiler, tracer or mode has to see it.
class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, var = aten.batch_norm_act(x, weight, bias, eps, slope)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, None if slope == 1 else z, weight, mean, var)
        ctx.config = eps, slope
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> Any:
        refuse_second_derivative()
        if dz is None:
            return (None,) * 5
        gradients = aten.batch_norm_act_backward(dz, *ctx.saved_tensors, *ctx.config)
        wanted = ctx.needs_input_grad
        return *(g if need else None for g, need in zip(gradients, wanted, strict=False)), None, None


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastunet.aten.batch_norm_act` with its derivative; the statistics have none."""
    return apply(_BatchNormAct, x, weight, bias, eps, slope)  # type: ignore[no-any-return]


# ---- conv2d ------------------------------------------------------------------------------------------------------


def _stats_fake(x: Tensor, filters: int, stats: int) -> tuple[Tensor, Tensor]:
    shape = 0 if stats == NOTHING else (x.shape[0], filters) if stats == SAMPLES else filters
    mean, var = (x.new_empty(shape, dtype=stats_dtype(x.dtype)) for _ in range(2))
    return mean, var


def _conv2d_fake(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    weight: Tensor,
    stride: int,
    size: Sequence[int],
    doubled: Sequence[bool],
    stats: int,
    save: bool,
    pool: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    batch, filters = x0.shape[0], weight.shape[0]
    height, width = ((n - 1) // stride + 1 for n in size)
    itself = affine0 is None and slope0 == 1 and x1 is None and not doubled[0]
    plain = itself and list(size) == list(x0.shape[-2:])
    kept = save and not plain and resolve_backend(backend, x0.device, x0.dtype) == "torch"
    return (
        activation(x0, (batch, filters, height, width)),
        *_stats_fake(x0, filters, stats),
        activation(x0, (batch, weight.shape[1], *size)) if kept else x0.new_empty(0),
        activation(x0, (batch, filters, height // 2, width // 2)) if pool else x0.new_empty(0),
    )


def _check_placed(
    x0: Tensor,
    affine0: Tensor | None,
    x1: Tensor | None,
    affine1: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
) -> None:
    """What a convolution of one or two sources in a frame reads."""
    _check_source(x0, affine0, x0)
    if x1 is not None:
        _check_source(x1, affine1, x0)
    _check_filters(weight, bias, x0, 1, x0.shape[1] + (0 if x1 is None else x1.shape[1]), (3, 1))
    if len(size) != 2 or len(offset) != 4:
        raise ValueError(f"expected a size of 2 and an offset of 4 numbers, got {len(size)} and {len(offset)}")
    if len(doubled) != 2:
        raise ValueError(f"expected doubled to be 2 booleans, one for each source, got {len(doubled)}")


def _check_conv2d(
    x0: Tensor,
    affine0: Tensor | None,
    x1: Tensor | None,
    affine1: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    pool_scale: Tensor | None,
) -> None:
    _check_placed(x0, affine0, x1, affine1, weight, bias, size, offset, doubled)
    if stride not in (1, 2) or (stride == 2 and weight.shape[2] == 1):
        raise ValueError(f"expected stride 1, or 2 for a 3×3 weight, got {stride}")
    if any(doubled) and (stride == 2 or weight.shape[2] == 1):
        raise ValueError(
            f"expected doubled sources under a 3×3 weight with stride 1, got one of shape {_shape(weight)} and stride "
            f"{stride}; store what upsample_concat makes of them"
        )
    if pool_scale is not None and tuple(pool_scale.shape) != (weight.shape[0],):
        raise ValueError(f"expected a pool_scale of shape ({weight.shape[0]},), got {_shape(pool_scale)}")


conv2d_backward = register_backward(
    "conv2d_backward(Tensor? dy, Tensor? dmean, Tensor? dvar, Tensor? dp, Tensor y, Tensor mean, Tensor? pool_scale,"
    " Tensor x0, Tensor? affine0, float slope0, Tensor? x1, Tensor? affine1, float slope1, Tensor weight, Tensor z,"
    " int stride, SymInt[] size, SymInt[] offset, bool[] doubled, bool[] mask, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "x0 affine0, x1 affine1, weight, bias",
    bias=_filters,
)
conv2d = register(
    "conv2d(Tensor x0, Tensor? affine0, float slope0, Tensor? x1, Tensor? affine1, float slope1, Tensor weight,"
    " Tensor? bias, int stride, SymInt[] size, SymInt[] offset, bool[] doubled, int stats, bool save, bool pool,"
    " Tensor? pool_scale, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv2d_fake,
    _check_conv2d,
    conv2d_backward,
    {"y": True, "mean": "stats", "var": "stats", "z": False, "p": "pool"},
)


# ---- conv2d_act --------------------------------------------------------------------------------------------------


def _conv2d_act_fake(
    x0: Tensor, weight: Tensor, size: Sequence[int], pool: bool, head_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, filters = x0.shape[0], weight.shape[0]
    pooled = activation(x0, (batch, filters, size[0] // 2, size[1] // 2)) if pool else x0.new_empty(0)
    return activation(x0, (batch, filters if head_weight is None else head_weight.shape[0], *size)), pooled


def _check_conv2d_act(
    x0: Tensor,
    affine0: Tensor | None,
    x1: Tensor | None,
    affine1: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    affine: Tensor | None,
    pool: bool,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
) -> None:
    _check_placed(x0, affine0, x1, affine1, weight, bias, size, offset, doubled)
    if weight.shape[2] != 3:
        raise ValueError(f"expected a 3×3 weight, got one of shape {_shape(weight)}")
    if affine is not None and tuple(affine.shape) != (3, weight.shape[0]):
        raise ValueError(f"expected an affine of shape (3, {weight.shape[0]}) for the result, got {_shape(affine)}")
    if head_weight is not None:
        if pool:
            raise ValueError("expected no pooling under a head, in whose stead nothing else is stored")
        _check_filters(head_weight, head_bias, x0, 1, weight.shape[0], (1,))


# Has no derivative: training uses conv2d, which keeps y, and a backward can compute the rest from y again.
conv2d_act = register(
    "conv2d_act(Tensor x0, Tensor? affine0, float slope0, Tensor? x1, Tensor? affine1, float slope1, Tensor weight,"
    " Tensor? bias, SymInt[] size, SymInt[] offset, bool[] doubled, Tensor? affine, float slope, bool pool,"
    " Tensor? head_weight, Tensor? head_bias, str backend) -> (Tensor, Tensor)",
    _conv2d_act_fake,
    _check_conv2d_act,
)


# ---- conv_transpose2d --------------------------------------------------------------------------------------------


def _conv_transpose2d_fake(x: Tensor, weight: Tensor, stats: int) -> tuple[Tensor, ...]:
    batch, _, height, width = x.shape
    filters = weight.shape[1]
    return activation(x, (batch, filters, 2 * height, 2 * width)), *_stats_fake(x, filters, stats)


def _check_conv_transpose2d(x: Tensor, affine: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    _check_source(x, affine, x)
    _check_filters(weight, bias, x, 0, x.shape[1], (2, 3))


conv_transpose2d_backward = register_backward(
    "conv_transpose2d_backward(Tensor? dy, Tensor? dmean, Tensor? dvar, Tensor y, Tensor mean, Tensor x,"
    " Tensor? affine, float slope, Tensor weight, bool[] mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "x affine, weight, bias",
    bias=lambda weight: weight.new_empty(weight.shape[1]),
)
conv_transpose2d = register(
    "conv_transpose2d(Tensor x, Tensor? affine, float slope, Tensor weight, Tensor? bias, int stats, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _conv_transpose2d_fake,
    _check_conv_transpose2d,
    conv_transpose2d_backward,
    {"y": True, "mean": "stats", "var": "stats"},
)


# ---- max_pool2x2 -------------------------------------------------------------------------------------------------


def _max_pool_fake(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return activation(x, (batch, channels, height // 2, width // 2))


max_pool2x2_backward = register_backward(
    "max_pool2x2_backward(Tensor x, Tensor? affine, Tensor? dp, Tensor? dskip, str backend) -> Tensor",
    "x",
    lambda x: activation(x, x.shape),
)
max_pool2x2 = register(
    "max_pool2x2(Tensor x, Tensor? affine, str backend) -> Tensor",
    _max_pool_fake,
    lambda x, affine: _check_source(x, affine, x),
    max_pool2x2_backward,
    {"p": True},
)


class _PoolFork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, affine)
        ctx.backend = backend
        return run(max_pool2x2, x, affine, backend), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None, dskip: Tensor | None) -> Any:
        refuse_second_derivative()
        if dp is None:
            return dskip, None, None
        return run(max_pool2x2_backward, *ctx.saved_tensors, dp, dskip, ctx.backend), None, None


# A pooled activation is also a skip connection: pool_fork returns (pooled, x), and its backward adds the two gradients
# in the pass that scatters the first. x comes back as a view, which only a composite operator may return.
pool_fork = register_composite("pool_fork(Tensor(a) x, Tensor? affine, str backend) -> (Tensor, Tensor(a))", _PoolFork)


# ---- avg_pool2x2, pad_replicate ----------------------------------------------------------------------------------


avg_pool2x2_backward = register_backward(
    "avg_pool2x2_backward(Tensor dy, Tensor x, Tensor? affine, float slope, str backend) -> (Tensor, Tensor)",
    "x affine",
)
avg_pool2x2 = register(
    "avg_pool2x2(Tensor x, Tensor? affine, float slope, str backend) -> Tensor",
    _max_pool_fake,
    lambda x, affine: _check_source(x, affine, x),
    avg_pool2x2_backward,
    {"y": True},
)


def _pad_replicate_fake(x: Tensor, rows: int, columns: int) -> Tensor:
    batch, channels, height, width = x.shape
    return activation(x, (batch, channels, height + rows, width + columns))


def _check_pad_replicate(x: Tensor, affine: Tensor | None, rows: int, columns: int) -> None:
    _check_source(x, affine, x)
    if rows not in (0, 1) or columns not in (0, 1):
        raise ValueError(f"expected 0 or 1 row and column to repeat, got {rows} and {columns}")
    if 0 in x.shape[2:]:
        raise ValueError(f"expected a source with pixels to repeat, got shape {_shape(x)}")


pad_replicate_backward = register_backward(
    "pad_replicate_backward(Tensor dy, Tensor x, Tensor? affine, float slope, str backend) -> (Tensor, Tensor)",
    "x affine",
)
pad_replicate = register(
    "pad_replicate(Tensor x, Tensor? affine, float slope, SymInt rows, SymInt columns, str backend) -> Tensor",
    _pad_replicate_fake,
    _check_pad_replicate,
    pad_replicate_backward,
    {"y": True},
)


# ---- upsample_concat ---------------------------------------------------------------------------------------------


def _upsample_concat_fake(x: Tensor, skip: Tensor | None) -> Tensor:
    batch, channels, height, width = x.shape
    if skip is None:
        return activation(x, (batch, channels, 2 * height, 2 * width))
    return activation(x, (batch, channels + skip.shape[1], skip.shape[2], skip.shape[3]))


def _check_upsample_concat(x: Tensor, affine: Tensor | None, skip: Tensor | None, skip_affine: Tensor | None) -> None:
    _check_source(x, affine, x)
    if skip is not None:
        _check_source(skip, skip_affine, x)


upsample_concat_backward = register_backward(
    "upsample_concat_backward(Tensor dy, Tensor x, Tensor? affine, float slope, Tensor? skip, Tensor? skip_affine,"
    " float skip_slope, bool? align_corners, bool skip_first, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "x affine, skip skip_affine",
)
upsample_concat = register(
    "upsample_concat(Tensor x, Tensor? affine, float slope, Tensor? skip, Tensor? skip_affine, float skip_slope,"
    " bool? align_corners, bool skip_first, str backend) -> Tensor",
    _upsample_concat_fake,
    _check_upsample_concat,
    upsample_concat_backward,
    {"y": True},
)


# ---- softmax_stats -----------------------------------------------------------------------------------------------


def _check_softmax_stats(
    logits: Tensor, labels: Tensor, pixel_weight: Tensor | None, mode: str, wanted: Sequence[bool]
) -> None:
    if logits.dim() != 4 or logits.shape[1] > 256:
        raise ValueError(f"expected logits of shape (N, C, H, W) with at most 256 classes, got {_shape(logits)}")
    _check_statistics(logits.shape, labels, pixel_weight, mode, wanted)


def _check_statistics(
    shape: Sequence[int], labels: Tensor, pixel_weight: Tensor | None, mode: str, wanted: Sequence[bool]
) -> None:
    """What statistics of logits of ``shape`` are made with."""
    if len(wanted) != 3:
        raise ValueError(f"expected wanted to be 3 booleans, got {len(wanted)}")
    batch, classes, height, width = shape
    plane = (batch, height, width)
    fits = tuple(labels.shape) == plane if mode == "softmax" or classes == 1 else False
    if not fits and not (mode == "sigmoid" and tuple(labels.shape) == tuple(shape)):
        raise ValueError(f"expected labels of shape {plane} for logits of shape {tuple(shape)}, got {_shape(labels)}")
    if pixel_weight is not None and tuple(pixel_weight.shape) != plane:
        raise ValueError(f"expected pixel_weight of shape {plane}, got {_shape(pixel_weight)}")


softmax_stats_backward = register_backward(
    "softmax_stats_backward(Tensor dstats, Tensor logits, Tensor labels, Tensor? pixel_weight, str mode,"
    " int ignore_index, bool[] wanted, str backend) -> Tensor",
    "logits",
)
softmax_stats = register(
    "softmax_stats(Tensor logits, Tensor labels, Tensor? pixel_weight, str mode, int ignore_index, bool[] wanted,"
    " str backend) -> Tensor",
    lambda logits: logits.new_empty((*logits.shape[:2], 7), dtype=stats_dtype(logits.dtype)),
    _check_softmax_stats,
    softmax_stats_backward,
    {"stats": True},
)


# ---- head_stats --------------------------------------------------------------------------------------------------


def _check_head(x: Tensor, affine: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    _check_source(x, affine, x)
    _check_filters(weight, bias, x, 1, x.shape[1], (1,))
    if weight.shape[0] > 256:
        raise ValueError(f"expected a weight of at most 256 classes, got {weight.shape[0]}")


def _check_head_stats(
    x: Tensor,
    affine: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    wanted: Sequence[bool],
) -> None:
    _check_head(x, affine, weight, bias)
    _check_statistics((x.shape[0], weight.shape[0], *x.shape[2:]), labels, pixel_weight, mode, wanted)


head_stats_backward = register_backward(
    "head_stats_backward(Tensor dstats, Tensor x, Tensor? affine, float slope, Tensor weight, Tensor? bias,"
    " Tensor labels, Tensor? pixel_weight, str mode, int ignore_index, bool[] wanted, bool[] mask, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "x affine, weight, bias",
    bias=_filters,
)
head_stats = register(
    "head_stats(Tensor x, Tensor? affine, float slope, Tensor weight, Tensor? bias, Tensor labels,"
    " Tensor? pixel_weight, str mode, int ignore_index, bool[] wanted, str backend) -> Tensor",
    lambda x, weight: x.new_empty((x.shape[0], weight.shape[0], 7), dtype=stats_dtype(x.dtype)),
    _check_head_stats,
    head_stats_backward,
    {"stats": True},
)


# ---- head_predict ------------------------------------------------------------------------------------------------


OUTPUTS = ("argmax", "threshold", "softmax", "sigmoid")


def _head_predict_fake(x: Tensor, weight: Tensor, output: str, dtype: torch.dtype) -> Tensor:
    batch, _, height, width = x.shape
    if output == "argmax":
        return x.new_empty((batch, height, width), dtype=torch.uint8)
    return activation(x, (batch, weight.shape[0], height, width)).to(torch.uint8 if output == "threshold" else dtype)


def _check_head_predict(
    x: Tensor, affine: Tensor | None, weight: Tensor, bias: Tensor | None, output: str, dtype: torch.dtype
) -> None:
    _check_head(x, affine, weight, bias)
    if output not in OUTPUTS:
        raise ValueError(f"expected output {', '.join(map(repr, OUTPUTS[:-1]))} or {OUTPUTS[-1]!r}, got {output!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"expected a floating-point dtype for probabilities, got {dtype}; take torch.float32")


head_predict = register(
    "head_predict(Tensor x, Tensor? affine, float slope, Tensor weight, Tensor? bias, str output, float threshold,"
    " ScalarType dtype, str backend) -> Tensor",
    _head_predict_fake,
    _check_head_predict,
)


# ---- confusion_matrix --------------------------------------------------------------------------------------------


def _confusion_matrix_fake(logits: Tensor) -> Tensor:
    classes = max(logits.shape[1], 2)
    return logits.new_empty((classes + 1, classes), dtype=torch.int64)


def _check_confusion_matrix(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 4 or not 1 <= logits.shape[1] <= 256:
        raise ValueError(f"expected logits of shape (N, C, H, W) with 1 to 256 classes, got {_shape(logits)}")
    plane = (logits.shape[0], *logits.shape[2:])
    if tuple(labels.shape) != plane:
        raise ValueError(f"expected labels of shape {plane} for logits of shape {_shape(logits)}, got {_shape(labels)}")


confusion_matrix = register(
    "confusion_matrix(Tensor logits, Tensor labels, int ignore_index, float threshold, str backend) -> Tensor",
    _confusion_matrix_fake,
    _check_confusion_matrix,
)


def _check_confusion_matrix_of_masks(mask: Tensor, labels: Tensor, classes: int) -> None:
    if mask.is_floating_point() or labels.is_floating_point():
        raise TypeError(f"expected integer masks, got {mask.dtype} and labels of {labels.dtype}")
    if mask.shape != labels.shape:
        raise ValueError(f"expected a mask of the labels' shape {_shape(labels)}, got {_shape(mask)}")
    if not 2 <= classes <= 256:
        raise ValueError(f"expected 2 to 256 classes, got {classes}")


confusion_matrix_of_masks = register(
    "confusion_matrix_of_masks(Tensor mask, Tensor labels, int classes, int ignore_index, str backend) -> Tensor",
    lambda mask, classes: mask.new_empty((classes + 1, classes), dtype=torch.int64),
    _check_confusion_matrix_of_masks,
)
