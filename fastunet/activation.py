"""The lazily normalised tensor that flows between blocks, and the operations that read and produce it.

An :class:`Activation` ``(x, affine, slope)`` stands for ``z = act(scale·(x − centre) + shift)``, where ``x`` is the raw
output of a convolution and ``affine`` the batch normalisation that follows it. Consumers apply it while they load, so
z need never be stored. One set of operations serves networks with and without batch normalisation: without an affine
and an activation function it is an ordinary tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import folding, ops
from fastunet.aten import MANY_PIXELS, activate, update_running_stats
from fastunet.backend import check_backend, requested, resolve_backend
from fastunet.dispatch import call, free, unwatched
from fastunet.distributed import SyncBatchNorm, merged
from fastunet.layout import BATCH, NOTHING, SAMPLES, frame, memory_format, stats_dtype

# The normalisations that are applied lazily: by statistics of the batch, or of each sample.
Norm = nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm
POLICIES = ("speed", "memory")


class Config(NamedTuple):
    """What a user chose for a network: ``backend`` (see :func:`fastunet.backend.resolve_backend`) and ``policy``.

    Policy "speed" lets the torch backend store what it normalised, for several readers and for the backward; "memory"
    normalises again.
    """

    backend: str = "auto"
    policy: str = "speed"

    @classmethod
    def checked(cls, backend: str, policy: str) -> Config:
        check_backend(backend)
        if policy not in POLICIES:
            raise ValueError(
                f"expected policy to be one of {', '.join(POLICIES)}, got {policy!r}; leave it out for speed"
            )
        return cls(backend, policy)

    def context(self, x: Tensor, module: nn.Module) -> Context:
        """Of one forward of ``module`` on ``x``: what leaves is channels_last if x or the module's weights are.

        On a CPU, where nobody chose a backend, nothing is gained by normalising when reading: blocks run as modules.
        """
        context = Context(*self, memory_format(x, _telling_weight(module)) == torch.channels_last)
        tuned = unwatched()
        if not (x.device.type == "cpu" and requested(self.backend) == "auto" and context.stores(x)):
            return context._replace(listed=tuned and free())
        precise, kept = tuned and x.numel() >= MANY_PIXELS * x.shape[1], tuned and folding.allowed()
        return context._replace(eager=True, tuned=tuned, precise=precise, kept=kept, listed=kept)


def _telling_weight(module: nn.Module) -> Tensor | None:
    """The first parameter that tells in which memory format the weights are: the strides of one with one input channel
    or one tap fit both. (module.parameters() would find it too, in ten times the time.)"""
    for p in module._parameters.values():
        if p is not None and p.dim() == 4 and p.shape[1] > 1 and p.shape[3] > 1:
            return p
    for child in module._modules.values():
        found = None if child is None else _telling_weight(child)
        if found is not None:
            return found
    return None


class Context(NamedTuple):
    """What holds for all of one forward: the network's :class:`Config`, and what follows from its input."""

    backend: str = "auto"
    policy: str = "speed"
    channels_last: bool = False  # the layout of what leaves fastunet
    eager: bool = False  # blocks run as the modules they are, on stored tensors
    tuned: bool = False  # eager, and free to call something faster: no compiler, tracer or mode watches
    precise: bool = False  # tuned, and of so many pixels that ATen's batch norm loses digits
    kept: bool = False  # tuned, and free to convolve by weights that were kept (fastunet.folding)
    listed: bool = False  # free to call again what an earlier inference called (fastunet.plan)

    def stores(self, x: Tensor) -> bool:
        """Whether the value of an activation like ``x`` is stored rather than normalised by each reader."""
        return self.policy == "speed" and resolve_backend(self.backend, x.device, x.dtype) == "torch"


class Next(NamedTuple):
    """What reads a block's result, as far as its last convolution can do the work while it writes: the value that only
    that block is given."""

    pool: bool = False  # a 2×2 pooling, and perhaps a skip connection
    head: nn.Conv2d | None = None  # this 1×1 convolution, and nothing else


UNKNOWN = Next()


class Activation(NamedTuple):
    """``act(scale·(x − centre) + shift)``: x (N, C, H, W); affine (3, C), (N, 3, C) or None; slope is act's below
    zero: 1 the identity, 0 ReLU, between them a leaky ReLU.

    ``pooled`` is x 2×2-pooled for this affine, where the convolution that wrote x did that too; ``headed`` says that x
    is what the head makes of the activation, which was not stored.
    """

    x: Tensor
    affine: Tensor | None = None
    slope: float = 1.0
    pooled: Tensor | None = None
    headed: bool = False

    @property
    def source(self) -> tuple[Tensor, Tensor | None, float]:
        """(x, affine, slope), as operators take it."""
        return self.x, self.affine, self.slope

    @property
    def plain(self) -> bool:
        """Whether the value is ``x`` itself."""
        return self.affine is None and self.slope == 1

    def tensor(self, context: Context) -> Tensor:
        """The value z (N, C, H, W), stored in the layout that ``context`` says: for code outside fastunet."""
        z = self.stored(context).x
        if context.channels_last:
            return z.contiguous(memory_format=torch.channels_last)
        z = z.contiguous()
        return z.view(z.shape) if z.shape[1] == 1 else z  # the strides that plain PyTorch gives one channel

    def stored(self, context: Context) -> Activation:
        """The same activation with its value stored."""
        return self if self.plain else Activation(call(ops.affine_act, *self.source, context.backend))


def _extent(act: Activation, doubled: bool) -> tuple[int, int]:
    """Height and width of an activation, or of its nearest ×2."""
    height, width = act.x.shape[-2], act.x.shape[-1]
    return (2 * height, 2 * width) if doubled else (height, width)


class Placed(NamedTuple):
    """One or two activations, concatenated along the channels in a frame of ``size`` (H, W) that is zero elsewhere.

    ``offset`` is (top, left) of the first, then of the second; negative offsets crop. What is ``doubled`` lies there
    with each pixel twice in both directions, the nearest ×2, and is stored so for those who cannot read it as it is.
    """

    first: Activation
    second: Activation | None
    size: tuple[int, int]
    offset: tuple[int, int, int, int]
    doubled: tuple[bool, bool] = (False, False)

    @classmethod
    def of(cls, act: Activation, doubled: bool = False) -> Placed:
        """The activation, or its nearest ×2, in a frame of that size."""
        return cls(act, None, _extent(act, doubled), (0, 0, 0, 0), (doubled, False))

    @classmethod
    def with_skip(cls, up: Placed, skip: Activation, skip_first: bool) -> Placed:
        """``up``, one activation, centred in ``skip``'s size by F.pad(diff // 2, diff − diff // 2), beside it."""
        height, width = size = _extent(skip, False)
        top, left = (height - up.size[0]) // 2, (width - up.size[1]) // 2
        if skip_first:
            return cls(skip, up.first, size, (0, 0, top, left), (False, up.doubled[0]))
        return cls(up.first, skip, size, (top, left, 0, 0), (up.doubled[0], False))

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the first alone."""
        return _extent(self.first, self.doubled[0])

    def whole(self, context: Context) -> Activation:
        """All of it as one activation: stored, unless it is one that fills the frame and is not doubled."""
        if self.second is None and self.size == self.extent and self.offset[:2] == (0, 0):
            return upsample(self.first, None, context.backend) if self.doubled[0] else self.first
        return Activation(self.tensor(context))

    def tensor(self, context: Context) -> Tensor:
        """The concatenated values (N, C0 + C1, H, W), stored."""
        acts = [self.first] if self.second is None else [self.first, self.second]
        parts = []
        for act, doubled, *corner in zip(acts, self.doubled, self.offset[::2], self.offset[1::2], strict=False):
            stored = upsample(act, None, context.backend) if doubled else act
            parts.append(frame(stored.tensor(context), self.size, *corner))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def parts(self) -> list[Tensor]:
        """What is concatenated, of plain activations in the layout in which they are: one tensor or two."""
        if self.second is None:
            return [self.first.x]
        return [frame(self.first.x, self.size, *self.offset[:2]), frame(self.second.x, self.size, *self.offset[2:])]


def _autocasting(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which raises for meta tensors


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of convolution operands: autocast's where it is enabled for x's device, else x's."""
    if _autocasting(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_weight(x: Tensor, weight: Tensor) -> None:
    """Refuse a weight of another dtype than x's, outside autocast."""
    if weight.dtype != x.dtype and not _autocasting(x):
        raise TypeError(
            f"expected input and weights of one dtype, got {x.dtype} and {weight.dtype}; convert one of them "
            "(model.to(dtype) or x.to(dtype)) or run under torch.autocast"
        )


def _operands(act: Activation, weight: Tensor, bias: Tensor | None) -> tuple[Activation, Tensor, Tensor | None]:
    check_weight(act.x, weight)
    dtype = compute_dtype(act.x)
    return act._replace(x=act.x.to(dtype)), in_either(weight, dtype), None if bias is None else in_either(bias, dtype)


def in_either(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight or bias in a dtype that operators on sources of ``dtype`` take: the copy that they multiply needs no
    derivative then, and its gradient is not rounded."""
    return parameter if parameter.dtype == stats_dtype(dtype) else parameter.to(dtype)


def _convolved(placed: Placed, conv: nn.Conv2d) -> tuple[Tensor, tuple[Any, ...]]:
    """The first source's tensor; and both sources, the weight and the bias, as operators take them."""
    first, weight, bias = _operands(placed.first, conv.weight, conv.bias)
    second: tuple[Any, ...] = (None, None, 1.0)
    if placed.second is not None:
        second = placed.second._replace(x=placed.second.x.to(first.x.dtype)).source
    return first.x, (*first.source, *second, weight, bias)


class Raw(NamedTuple):
    """A convolution's output and, where asked for, its batch statistics over (N, H, W) and its values 2×2-pooled."""

    y: Tensor
    mean: Tensor
    var: Tensor
    pooled: Tensor | None = None


def conv2d(placed: Placed, conv: nn.Conv2d, norm: Norm | None, pool: bool, context: Context) -> Raw:
    """A 3×3 (padding 1, stride 1 or 2) or 1×1 convolution of what is placed, with its bias; of what is doubled, 3×3 of
    stride 1.

    With the statistics that ``norm`` needs; if ``pool``, also pooled for a normalisation by it.
    """
    x, operands = _convolved(placed, conv)
    stats = needed_stats(norm)
    y, mean, var, _, pooled = call(
        ops.conv2d, *operands, conv.stride[0], placed.size, placed.offset, placed.doubled, stats, context.stores(x),
        pool, norm.weight if pool and norm is not None else None, context.backend,
    )  # fmt: skip
    return Raw(y, mean, var, pooled if pool else None)


def conv2d_act(
    placed: Placed,
    conv: nn.Conv2d,
    norm: Norm | None,
    slope: float,
    after: Next,
    backend: str,
) -> Activation:
    """A 3×3 convolution of stride 1, and behind it a normalisation by running statistics and act: without gradients,
    the value itself, so that whoever reads it multiplies what is stored; or what the head after it makes of it."""
    x, operands = _convolved(placed, conv)
    affine = None if norm is None else _running_affine(norm, x, backend)
    pool, head = after
    head_weight, head_bias = None, None
    if head is not None:
        _, head_weight, head_bias = _operands(Activation(x), head.weight, head.bias)
    z, pooled = call(
        ops.conv2d_act, *operands, placed.size, placed.offset, placed.doubled, affine, slope, pool, head_weight,
        head_bias, backend,
    )  # fmt: skip
    return Activation(z, pooled=pooled if pool else None, headed=head is not None)


def conv_transpose2d(act: Activation, conv: nn.ConvTranspose2d, norm: Norm | None, backend: str) -> Raw:
    """A stride-2 transposed convolution to twice the size, with its bias and the statistics that ``norm`` needs."""
    act, weight, bias = _operands(act, conv.weight, conv.bias)
    stats = needed_stats(norm)
    return Raw(*call(ops.conv_transpose2d, *act.source, weight, bias, stats, backend))


def head_stats(
    act: Activation,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: list[bool],
    backend: str,
) -> Tensor:
    """The statistics (N, K, 7) of a 1×1 convolution's output, which is not stored; see :mod:`fastunet.losses`."""
    act, weight, bias = _operands(act, weight, bias)
    stats: Tensor = call(
        ops.head_stats, *act.source, weight, bias, labels, pixel_weight, mode, ignore_index, wanted, backend
    )
    return stats


def head_predict(
    act: Activation, conv: nn.Conv2d, output: str, threshold: float, dtype: torch.dtype, backend: str
) -> Tensor:
    """Classes, masks or probabilities of a 1×1 convolution's output, which is not stored: :mod:`fastunet.aten`."""
    act, weight, bias = _operands(act, conv.weight, conv.bias)
    y: Tensor = call(ops.head_predict, *act.source, weight, bias, output, threshold, dtype, backend)
    return y


def needed_stats(norm: Norm | None) -> int:
    """Of what ``norm`` takes statistics of its input, as PyTorch decides it."""
    if norm is None:
        return NOTHING
    if isinstance(norm, nn.GroupNorm):
        return SAMPLES
    if isinstance(norm, nn.InstanceNorm2d):
        return SAMPLES if norm.training or not norm.track_running_stats else NOTHING
    return BATCH if norm.training or (norm.running_mean is None and norm.running_var is None) else NOTHING


def normalised(raw: Raw, norm: Norm, slope: float, backend: str) -> Activation:
    """The activation act(norm(y)); updates ``norm``'s running statistics as the module does.

    Raises:
        ValueError: statistics of a single value, or one running statistic without the other, as PyTorch; statistics on
            another device.
    """
    if needed_stats(norm) == NOTHING:
        affine = _running_affine(norm, raw.y, backend)
    elif isinstance(norm, nn.BatchNorm2d):
        affine = _batch_affine(raw, norm, backend)
    else:
        affine = _sample_affine(raw, norm, backend)
    return Activation(raw.y, affine, slope, raw.pooled)


def _check_count(count: int, y: Tensor) -> None:
    if count == 1:
        raise ValueError(
            f"expected more than 1 value per channel in training, got an output of {tuple(y.shape)}; pass a larger "
            "batch or picture, or call model.eval()"
        )


def _sample_affine(raw: Raw, norm: nn.InstanceNorm2d | nn.GroupNorm, backend: str) -> Tensor:
    channels, height, width = raw.y.shape[1:]
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else channels
    _check_count(height * width * (channels // groups), raw.y)
    if isinstance(norm, nn.InstanceNorm2d) and norm.track_running_stats and raw.y.numel():
        stats = running_stats(norm)
        if stats is not None:
            _check_device(stats[0], raw.y)
            mean, var = (t.detach().mean(0) for t in (raw.mean, raw.var))
            update_running_stats(*stats, mean, var, height * width, norm.momentum or 0.0)
    affine: Tensor = call(ops.group_affine, raw.mean, raw.var, norm.weight, norm.bias, groups, norm.eps, backend)
    return affine


def _batch_affine(raw: Raw, bn: nn.BatchNorm2d, backend: str) -> Tensor:
    count = raw.y.shape[0] * raw.y.shape[2] * raw.y.shape[3]
    if type(bn) is SyncBatchNorm:
        mean, var, count = merged(raw.mean, raw.var, count)
        raw = raw._replace(mean=mean, var=var)
    _check_count(count, raw.y)
    running = _advance(bn, raw, count) if bn.training and bn.track_running_stats else ()
    operator = ops.bn_affine_running if running else ops.bn_affine
    affine: Tensor = call(operator, raw.mean, raw.var, bn.weight, bn.bias, *running, bn.eps, backend)
    return affine


def running_stats(bn: nn.BatchNorm2d | nn.InstanceNorm2d) -> tuple[Tensor, Tensor] | None:
    """The running mean and variance, or None if there are neither."""
    mean, var = bn.running_mean, bn.running_var  # read once: attributes of a module are slow
    if mean is not None and var is not None:
        return mean, var
    if mean is not None or var is not None:
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(
            f"expected a batch norm with running_mean and running_var or with neither, got no {missing}; give it both"
        )
    return None


def _advance(bn: nn.BatchNorm2d, raw: Raw, count: int) -> tuple[Any, ...]:
    """One more batch, of ``count`` values per channel, for ``bn``'s running statistics.

    Returns what bn_affine_running takes for it, or nothing if it is done or there are none.
    """
    stats, batches = running_stats(bn), bn.num_batches_tracked
    if batches is not None:
        batches.add_(1)
    if stats is None or count == 0:
        return ()
    if bn.momentum is not None:
        return *stats, count, bn.momentum
    if batches is None:  # nn.BatchNorm2d takes a momentum of 0
        return ()
    _check_device(stats[0], raw.y)
    # The mean of all batches has another momentum in every step, and kernels are compiled for one momentum.
    momentum = batches.to(stats[0].dtype).reciprocal()
    update_running_stats(*stats, raw.mean.detach(), raw.var.detach(), count, momentum)
    return ()


def _check_device(running_mean: Tensor, x: Tensor) -> None:
    if running_mean.device != x.device:
        raise ValueError(
            f"expected the running statistics of a batch norm on {x.device}, where its input is, got them on "
            f"{running_mean.device}; move one of them"
        )


def _running_affine(norm: Norm, x: Tensor, backend: str) -> Tensor:
    """The affine of a normalisation of ``x`` by running statistics."""
    assert not isinstance(norm, nn.GroupNorm)  # which has none
    stats = running_stats(norm)
    if stats is None:  # a batch norm without them uses the batch's; an instance norm says that it tracks some
        raise ValueError(
            f"expected an {type(norm).__name__} with running_mean and running_var in evaluation, got neither; give it "
            "both, or set track_running_stats=False"
        )
    mean, var = stats
    _check_device(mean, x)
    dtype = stats_dtype(x.dtype)
    affine: Tensor = call(ops.bn_affine, mean.to(dtype), var.to(dtype), norm.weight, norm.bias, norm.eps, backend)
    return affine


def pool_fork(act: Activation, context: Context) -> tuple[Activation, Activation]:
    """(2×2 max-pooled, the activation itself for its skip connection); one backward pass serves both."""
    if act.pooled is not None:
        return act._replace(x=act.pooled, pooled=None), act._replace(pooled=None)
    if context.stores(act.x) or act.slope < 0:  # what falls somewhere cannot be pooled before act
        act = act.stored(context)
    pooled, x = ops.pool_fork(act.x, act.affine, context.backend)
    return act._replace(x=pooled), act._replace(x=x)


def add(act: Activation, skip: Activation, slope: float, context: Context) -> Activation:
    """The sum of two activations' values and behind it an act of ``slope``, stored; the result is plain."""
    if context.eager:
        return Activation(activate(act.x + skip.x, slope, inplace=True))
    x = skip.x.to(act.x.dtype)
    return Activation(call(ops.add_act, *act.source, x, skip.affine, skip.slope, slope, context.backend))


def prelu(act: Activation, slopes: Tensor, backend: str) -> Activation:
    """A PReLU behind an activation of which only the affine is left to apply, stored; the result is plain."""
    return Activation(call(ops.affine_prelu, act.x, act.affine, slopes, backend))


def average(act: Activation, context: Context) -> Activation:
    """The activation's value 2×2-average-pooled; the result is plain."""
    if context.eager:
        return Activation(F.avg_pool2d(act.x, 2))
    return Activation(call(ops.avg_pool2x2, *act.source, context.backend))


def replicated(act: Activation, size: tuple[int, int], context: Context) -> Activation:
    """The activation with its last row, its last column or both repeated, so that it has ``size`` (H, W).

    Raises:
        ValueError: ``size`` is no such size.
    """
    rows, columns = size[0] - act.x.shape[-2], size[1] - act.x.shape[-1]
    if rows == 0 and columns == 0:
        return act
    if rows not in (0, 1) or columns not in (0, 1):
        raise ValueError(
            f"expected a skip connection of at most one row and column more than {tuple(act.x.shape[-2:])}, got "
            f"{size}; pad with zeros instead, or pass a skip connection of twice the size"
        )
    if context.eager:
        return Activation(F.pad(act.x, [0, columns, 0, rows], mode="replicate"))
    return Activation(call(ops.pad_replicate, *act.source, rows, columns, context.backend))


def upsample(act: Activation, align_corners: bool | None, backend: str) -> Activation:
    """×2 of the activation's value, bilinear, or nearest if ``align_corners`` is None; the result is plain."""
    x = call(ops.upsample_concat, *act.source, None, None, 1.0, align_corners, True, backend)
    return Activation(x)
