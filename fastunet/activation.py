"""The lazily normalised tensor that flows between blocks, and the operations that read and produce it.

An :class:`Activation` ``(x, affine, relu)`` stands for ``z = act(scale·(x − centre) + shift)``, where ``x`` is the raw
output of a convolution and ``affine`` the batch normalisation that follows it. Consumers apply it while they load, so
z need never be stored. One set of operations serves networks with and without batch normalisation: without an affine
and a ReLU an Activation is an ordinary tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastunet import ops
from fastunet.aten import MANY_PIXELS, update_running_stats
from fastunet.layout import frame, memory_format, stats_dtype

POLICIES = ("speed", "memory")


class Config(NamedTuple):
    """How a network computes: ``backend`` (see :func:`fastunet.ops.resolve_backend`), ``policy``, layout.

    Policy "speed" lets the torch backend store what it normalised, for several readers and for the backward; "memory"
    normalises again. ``channels_last`` is the layout of what leaves fastunet, in one forward, and ``pool`` and ``head``
    say what follows a block in it.
    """

    backend: str = "auto"
    policy: str = "speed"
    channels_last: bool = False  # not a torch.memory_format, which torch.save cannot pickle
    pool: bool = False  # what a block returns will be 2×2-pooled
    head: nn.Conv2d | None = None  # what a block returns is read by this 1×1 convolution alone
    eager: bool = False  # blocks run as the modules they are, on stored tensors
    tuned: bool = False  # or better, since nobody but autograd watches
    precise: bool = False  # and the picture has so many pixels that ATen's batch norm would lose digits

    @classmethod
    def checked(cls, backend: str, policy: str) -> Config:
        ops.check_backend(backend)
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        return cls(backend, policy)

    def like(self, x: Tensor, module: nn.Module) -> Config:
        """For one forward of ``module`` on ``x``: what leaves is channels_last if x or its weights are.

        On a CPU, where nobody chose a backend, nothing is gained by normalising when reading: blocks run as modules.
        """
        # A weight with one input channel or one tap has strides that fit either format, and so says nothing.
        weights = (p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[3] > 1)
        eager = x.device.type == "cpu" and ops.wished(self.backend) == "auto" and self.stores(x)
        tuned = eager and ops.unwatched()
        return self._replace(
            channels_last=memory_format(x, next(weights, None)) == torch.channels_last,
            eager=eager,
            tuned=tuned,
            precise=tuned and x.numel() >= MANY_PIXELS * x.shape[1],
        )

    def stores(self, x: Tensor) -> bool:
        """Whether the value of an activation like ``x`` is stored rather than normalised by each reader."""
        return self.policy == "speed" and ops.resolve_backend(self.backend, x.device, x.dtype) == "torch"


class Activation(NamedTuple):
    """``act(scale·(x − centre) + shift)``: x (N, C, H, W); affine (3, C) or None; relu says whether act is ReLU.

    ``pooled`` is x 2×2-pooled for this affine, where the convolution that wrote x did that too; ``headed`` says that x
    is what the head makes of the activation, which was not stored.
    """

    x: Tensor
    affine: Tensor | None = None
    relu: bool = False
    pooled: Tensor | None = None
    headed: bool = False

    @property
    def source(self) -> tuple[Tensor, Tensor | None, bool]:
        """(x, affine, relu), as operators take it."""
        return self.x, self.affine, self.relu

    @property
    def plain(self) -> bool:
        """Whether the value is ``x`` itself."""
        return self.affine is None and not self.relu

    def tensor(self, config: Config) -> Tensor:
        """The value z (N, C, H, W), stored in the layout that ``config`` says: for code outside fastunet."""
        z = self.stored(config).x
        if config.channels_last:
            return z.contiguous(memory_format=torch.channels_last)
        z = z.contiguous()
        return z.view(z.shape) if z.shape[1] == 1 else z  # strides that eager has

    def stored(self, config: Config) -> Activation:
        """The same activation with its value stored."""
        return (
            self if self.plain else Activation(ops.call(ops.affine_act, self.x, self.affine, self.relu, config.backend))
        )


class Placed(NamedTuple):
    """One or two activations, concatenated along the channels in a frame of ``size`` (H, W) that is zero elsewhere.

    ``offset`` is (top, left) of the first, then of the second; negative offsets crop.
    """

    first: Activation
    second: Activation | None
    size: tuple[int, int]
    offset: tuple[int, int, int, int]

    @classmethod
    def alone(cls, act: Activation) -> Placed:
        return cls(act, None, (act.x.shape[-2], act.x.shape[-1]), (0, 0, 0, 0))

    @classmethod
    def with_skip(cls, up: Activation, skip: Activation, skip_first: bool) -> Placed:
        """``up`` centred in ``skip``'s size by F.pad(diff // 2, diff − diff // 2), beside it."""
        height, width = skip.x.shape[-2], skip.x.shape[-1]
        top, left = (height - up.x.shape[-2]) // 2, (width - up.x.shape[-1]) // 2
        if skip_first:
            return cls(skip, up, (height, width), (0, 0, top, left))
        return cls(up, skip, (height, width), (top, left, 0, 0))

    def tensor(self, config: Config) -> Tensor:
        """The concatenated values (N, C0 + C1, H, W), stored."""
        z = frame(self.first.tensor(config), self.size, *self.offset[:2])
        if self.second is None:
            return z
        return torch.cat([z, frame(self.second.tensor(config), self.size, *self.offset[2:])], 1)

    def plain(self) -> Tensor:
        """The same of two plain activations, in the layout in which they are."""
        parts = self.parts()
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def parts(self) -> list[Tensor]:
        """What :meth:`plain` concatenates."""
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


def _operands(
    act: Activation, weight: Tensor, bias: Tensor | None, config: Config
) -> tuple[Activation, Tensor, Tensor | None]:
    check_weight(act.x, weight)
    dtype = compute_dtype(act.x)
    x = act.x.to(dtype)
    if ops.resolve_backend(config.backend, x.device, dtype) == "triton":
        weight = weight.to(dtype, memory_format=torch.channels_last)  # one copy serves forward and backward
    return act._replace(x=x), weight.to(dtype), None if bias is None else bias.to(dtype)


def _convolved(placed: Placed, conv: nn.Conv2d, config: Config) -> tuple[Tensor, tuple[Any, ...]]:
    """The first source's tensor; and both sources, the weight and the bias, as operators take them."""
    first, weight, bias = _operands(placed.first, conv.weight, conv.bias, config)
    second: tuple[Any, ...] = (None, None, False)
    if placed.second is not None:
        second = placed.second._replace(x=placed.second.x.to(first.x.dtype)).source
    return first.x, (*first.source, *second, weight, bias)


class Raw(NamedTuple):
    """A convolution's output and, where asked for, its batch statistics over (N, H, W) and its values 2×2-pooled."""

    y: Tensor
    mean: Tensor
    var: Tensor
    pooled: Tensor | None = None


def conv2d(placed: Placed, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, pool: bool, config: Config) -> Raw:
    """A 3×3 (padding 1, stride 1 or 2) or 1×1 convolution of what is placed, with its bias.

    With the statistics that ``norm`` needs; if ``pool``, also pooled for a normalisation by it.
    """
    x, operands = _convolved(placed, conv, config)
    stats = norm is not None and uses_batch_stats(norm)
    y, mean, var, _, pooled = ops.call(
        ops.conv2d, *operands, conv.stride[0], placed.size, placed.offset, stats, config.stores(x),
        pool, norm.weight if pool and norm is not None else None, config.backend,
    )  # fmt: skip
    return Raw(y, mean, var, pooled if pool else None)


def conv2d_act(
    placed: Placed,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    relu: bool,
    pool: bool,
    head: nn.Conv2d | None,
    config: Config,
) -> Activation:
    """A 3×3 convolution of stride 1, and behind it a normalisation by running statistics and a ReLU: without gradients,
    the value itself, so that whoever reads it multiplies what is stored; or what a ``head`` makes of it."""
    x, operands = _convolved(placed, conv, config)
    affine = None if norm is None else _affine(norm, x, config)
    head_weight, head_bias = None, None
    if head is not None:
        _, head_weight, head_bias = _operands(Activation(x), head.weight, head.bias, config)
    z, pooled = ops.call(
        ops.conv2d_act, *operands, placed.size, placed.offset, affine, relu, pool, head_weight, head_bias,
        config.backend,
    )  # fmt: skip
    return Activation(z, pooled=pooled if pool else None, headed=head is not None)


def conv_transpose2d(act: Activation, conv: nn.ConvTranspose2d, norm: nn.BatchNorm2d | None, config: Config) -> Raw:
    """A stride-2 transposed convolution to twice the size, with its bias and the statistics that ``norm`` needs."""
    act, weight, bias = _operands(act, conv.weight, conv.bias, config)
    stats = norm is not None and uses_batch_stats(norm)
    return Raw(*ops.call(ops.conv_transpose2d, *act.source, weight, bias, stats, config.backend))


def head_stats(
    act: Activation,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: list[bool],
    config: Config,
) -> Tensor:
    """The statistics (N, K, 7) of a 1×1 convolution's output, which is not stored; see :mod:`fastunet.losses`."""
    act, weight, bias = _operands(act, weight, bias, config)
    stats: Tensor = ops.call(
        ops.head_stats, *act.source, weight, bias, labels, pixel_weight, mode, ignore_index, wanted, config.backend
    )
    return stats


def head_predict(
    act: Activation, conv: nn.Conv2d, output: str, threshold: float, dtype: torch.dtype, config: Config
) -> Tensor:
    """Classes, masks or probabilities of a 1×1 convolution's output, which is not stored: :mod:`fastunet.aten`."""
    act, weight, bias = _operands(act, conv.weight, conv.bias, config)
    y: Tensor = ops.call(ops.head_predict, *act.source, weight, bias, output, threshold, dtype, config.backend)
    return y


def uses_batch_stats(bn: nn.BatchNorm2d) -> bool:
    """Whether ``bn`` normalises by the statistics of the batch, as nn.BatchNorm2d decides it."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def batch_norm(raw: Raw, bn: nn.BatchNorm2d, relu: bool, config: Config) -> Activation:
    """The activation BN(y), or ReLU(BN(y)); updates ``bn``'s running statistics as nn.BatchNorm2d does.

    Raises:
        ValueError: batch statistics of a single value per channel, or one running statistic without the other, as
            PyTorch; statistics on another device.
    """
    count = raw.y.shape[0] * raw.y.shape[2] * raw.y.shape[3]
    running: tuple[Any, ...] = ()
    if uses_batch_stats(bn):
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(raw.y.shape)}; "
                "use a larger batch or picture, or model.eval()"
            )
        mean, var = raw.mean, raw.var
        if bn.training and bn.track_running_stats:
            running = _advance(bn, raw, count)
        operator = ops.bn_affine_running if running else ops.bn_affine
        affine = ops.call(operator, mean, var, bn.weight, bn.bias, *running, bn.eps, config.backend)
    else:
        affine = _affine(bn, raw.y, config)
    return Activation(raw.y, affine, relu, raw.pooled)


def running_stats(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | None:
    """The running mean and variance, or None if there are neither."""
    mean, var = bn.running_mean, bn.running_var  # each costs a look-up that modules are slow at
    if mean is not None and var is not None:
        return mean, var
    if mean is not None or var is not None:
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"expected a batch norm with running_mean and running_var or with neither, got no {missing}")
    return None


def _advance(bn: nn.BatchNorm2d, raw: Raw, count: int) -> tuple[Any, ...]:
    """One more batch, of ``count`` values per channel, for ``bn``'s running statistics.

    What is left of it to the operator that makes the affine: its operands, or nothing.
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
    _check_place(stats[0], raw.y)
    # The mean of all batches: a momentum of its own in every step is nothing to compile into a kernel.
    momentum = batches.to(stats[0].dtype).reciprocal()
    update_running_stats(*stats, raw.mean.detach(), raw.var.detach(), count, momentum)
    return ()


def _check_place(running_mean: Tensor, x: Tensor) -> None:
    if running_mean.device != x.device:
        raise ValueError(
            f"expected the running statistics of a batch norm on {x.device}, where its input is, got them on "
            f"{running_mean.device}; move one of them"
        )


def _affine(bn: nn.BatchNorm2d, x: Tensor, config: Config) -> Tensor:
    """The affine of a normalisation of ``x`` by running statistics."""
    stats = running_stats(bn)
    assert stats is not None  # or it would use the batch's
    mean, var = stats
    _check_place(mean, x)
    dtype = stats_dtype(x.dtype)
    affine: Tensor = ops.call(ops.bn_affine, mean.to(dtype), var.to(dtype), bn.weight, bn.bias, bn.eps, config.backend)
    return affine


def pool_fork(act: Activation, config: Config) -> tuple[Activation, Activation]:
    """(2×2 max-pooled, the activation itself for its skip connection); one backward pass serves both."""
    if act.pooled is not None:
        return act._replace(x=act.pooled, pooled=None), act._replace(pooled=None)
    if config.stores(act.x):
        act = act.stored(config)
    pooled, x = ops.pool_fork(act.x, act.affine, config.backend)
    return act._replace(x=pooled), act._replace(x=x)


def upsample(act: Activation, align_corners: bool | None, config: Config) -> Activation:
    """×2 of the activation's value, bilinear, or nearest if ``align_corners`` is None; the result is plain."""
    x = ops.call(ops.upsample_concat, *act.source, None, None, False, align_corners, True, config.backend)
    return Activation(x)
