"""The blocks U-Nets are made of: ordinary nn.Modules that can also be run lazily.

Each block has the submodules, and so the state_dict keys, that people know, and two ways to run: ``forward`` takes and
returns tensors; ``lazy`` takes and returns :class:`~fastunet.activation.Activation` and is what the networks call.
Submodules that fastunet does not know exactly (replaced, hooked, pruned, wrapped, compiled) are called as the modules
they are, on stored tensors, and everything around them stays lazy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from fastunet import eager
from fastunet.activation import (
    UNKNOWN,
    Activation,
    Config,
    Context,
    Next,
    Norm,
    Placed,
    add,
    average,
    conv2d,
    conv2d_act,
    conv_transpose2d,
    needed_stats,
    normalised,
    pool_fork,
    prelu,
    replicated,
    upsample,
)
from fastunet.checks import check_flags, check_integer, check_number, check_tensor, said
from fastunet.distributed import SyncBatchNorm

# PyTorch's own methods, noted before anybody patches the classes.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward
    for kind in (
        nn.AvgPool2d,
        nn.BatchNorm2d,
        nn.GroupNorm,
        nn.InstanceNorm2d,
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.Identity,
        nn.LeakyReLU,
        nn.MaxPool2d,
        nn.PReLU,
        nn.ReLU,
        nn.Sequential,
        nn.Sigmoid,
        nn.Upsample,
    )
}
_CONV_FORWARD = nn.Conv2d._conv_forward


def untouched(module: nn.Module, kind: type[nn.Module], compiled: bool = False) -> bool:
    """Whether ``module`` is exactly a ``kind`` with no hook, nothing replaced that its call runs and, unless it may be
    ``compiled``, no compiled call.

    Only then may its computation be done without calling it.
    """
    if type(module) is not kind:
        return False
    own = module.__dict__
    return _FORWARDS.get(kind, kind.forward) is kind.forward and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_call_impl" in own
        or "_conv_forward" in own  # patched for seamless tiles
        or "_output_padding" in own
        or "_check_input_dim" in own
        or not (compiled or module._compiled_call_impl is None)
        or _torch_module._has_any_global_hook()
    )


def _is_conv(module: nn.Module) -> bool:
    if not untouched(module, nn.Conv2d) or nn.Conv2d._conv_forward is not _CONV_FORWARD:
        return False
    assert isinstance(module, nn.Conv2d)
    known = (((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (1, 1), (0, 0)))
    return (
        (module.kernel_size, module.stride, module.padding) in known
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def _is_conv_transpose(module: nn.Module) -> bool:
    if not untouched(module, nn.ConvTranspose2d):
        return False
    assert isinstance(module, nn.ConvTranspose2d)
    shape = (module.kernel_size, module.stride, module.padding, module.output_padding)
    known = (((2, 2), (2, 2), (0, 0), (0, 0)), ((3, 3), (2, 2), (1, 1), (1, 1)))
    return shape in known and module.dilation == (1, 1) and module.groups == 1


def is_pool(module: nn.Module) -> bool:
    if not untouched(module, nn.MaxPool2d):
        return False
    assert isinstance(module, nn.MaxPool2d)
    settings = map(pair, (module.kernel_size, module.stride, module.padding, module.dilation))
    return [*settings] == [(2, 2), (2, 2), (0, 0), (1, 1)] and not (module.ceil_mode or module.return_indices)


def pair(value: Any) -> tuple[Any, ...]:
    """A pool's setting for height and width, which may be told as one number, a tuple or a list."""
    if isinstance(value, (list, tuple)):
        return tuple(value) * 2 if len(value) == 1 else tuple(value)
    return (value, value)


def _is_average(module: nn.Module) -> bool:
    if not untouched(module, nn.AvgPool2d):
        return False
    assert isinstance(module, nn.AvgPool2d)
    settings = map(pair, (module.kernel_size, module.stride, module.padding))
    return [*settings] == [(2, 2), (2, 2), (0, 0)] and not module.ceil_mode and module.divisor_override is None


def _is_upsample(module: nn.Module) -> bool:
    if not untouched(module, nn.Upsample):
        return False
    assert isinstance(module, nn.Upsample)
    return (
        module.mode in ("bilinear", "nearest") and module.size is None and module.scale_factor in (2, 2.0, (2.0, 2.0))
    )


def _is_norm(module: nn.Module) -> bool:
    kind = type(module)
    return kind in (nn.BatchNorm2d, SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm) and untouched(module, kind)


def _slope(module: nn.Module) -> float | None:
    """The slope below zero of an activation function that is applied lazily; None if ``module`` is none."""
    kind = type(module)
    if kind not in (nn.ReLU, nn.LeakyReLU, nn.Identity) or not untouched(module, kind):
        return None
    if isinstance(module, nn.LeakyReLU):
        return module.negative_slope if isinstance(module.negative_slope, float | int) else None
    return 0.0 if isinstance(module, nn.ReLU) else 1.0


def _is_prelu(module: nn.Module) -> bool:
    return type(module) is nn.PReLU and untouched(module, nn.PReLU)


def role(module: nn.Module) -> str | None:
    """As what ``module`` is run without being called: "conv", "conv_transpose", "norm", "act", "prelu", "pool",
    "average" or "upsample"; None if it is called as the module it is."""
    return next((name for name, fits in _ROLES.items() if fits(module)), None)


_ROLES: dict[str, Callable[[nn.Module], bool]] = {
    "conv": _is_conv,
    "conv_transpose": _is_conv_transpose,
    "norm": _is_norm,
    "act": lambda module: _slope(module) is not None,
    "prelu": _is_prelu,
    "pool": is_pool,
    "average": _is_average,
    "upsample": _is_upsample,
}


def _transparent(module: nn.Module) -> bool:
    """Whether ``module`` is known to run its children in turn and nothing else."""
    return untouched(module, nn.Sequential) or (isinstance(module, LazyModule) and module.is_lazy())


def known(module: nn.Module) -> bool:
    """Whether ``module`` is run without being called, or only runs its children, or is a sigmoid: what it computes
    depends on nothing but its input, its attributes and its tensors."""
    return role(module) is not None or _transparent(module) or untouched(module, nn.Sigmoid)


def first_conv(module: nn.Module) -> nn.Conv2d | None:
    """The convolution that reads a module's input, if nothing unknown comes before it."""
    if _is_conv(module):
        return module  # type: ignore[return-value]
    children = [*module.children()] if _transparent(module) else []
    return first_conv(children[0]) if children else None


def halving(module: nn.Module) -> int | None:
    """By what a module divides height and width; None if something unknown is in it."""
    if is_pool(module) or _is_average(module):
        return 2
    if _is_conv(module):
        return module.stride[0]  # type: ignore[return-value,index]
    if _is_norm(module) or _slope(module) is not None or _is_prelu(module):
        return 1
    if not _transparent(module):
        return None
    if isinstance(module, ResidualBlock):  # whose skip connection runs beside
        return halving(module.conv)
    parts = [halving(child) for child in module.children()]
    return None if None in parts else math.prod(parts)  # type: ignore[arg-type]


class Layer(NamedTuple):
    """A convolution and what directly follows it; a PReLU stands behind a slope of 1."""

    conv: nn.Conv2d | nn.ConvTranspose2d
    norm: Norm | None
    slope: float
    prelu: nn.PReLU | None = None


def _split(modules: list[nn.Module]) -> tuple[list[Layer | nn.AvgPool2d], list[nn.Module]]:
    """The longest prefix that reads conv [norm] [act] conv …, average pools between them, and can be run lazily, and
    the rest; no identities."""
    modules = [m for m in modules if type(m) is not nn.Identity or not untouched(m, nn.Identity)]
    layers: list[Layer | nn.AvgPool2d] = []
    i = 0
    while i < len(modules):
        conv = modules[i]
        if _is_average(conv):
            layers.append(conv)  # type: ignore[arg-type]
            i += 1
            continue
        if not (_is_conv(conv) or _is_conv_transpose(conv)):
            break
        i += 1
        norm = modules[i] if i < len(modules) and _is_norm(modules[i]) else None
        i += norm is not None
        slope = _slope(modules[i]) if i < len(modules) else None
        i += slope is not None
        behind = modules[i] if slope is None and i < len(modules) and _is_prelu(modules[i]) else None
        i += behind is not None
        layers.append(Layer(conv, norm, 1.0 if slope is None else slope, behind))  # type: ignore[arg-type]
    return layers, modules[i:]


def _normalises_at_once(conv: nn.Conv2d, norm: Norm | None) -> bool:
    """Whether a 3×3 convolution can normalise what it stores: statistics do not depend on the batch, and no backward
    needs the values before the normalisation."""
    return _is_usual(conv) and not torch.is_grad_enabled() and not needed_stats(norm)


def _is_usual(conv: nn.Conv2d) -> bool:
    """Whether it is 3×3 of stride 1."""
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1)


def _apply(layer: Layer, placed: Placed, context: Context, after: Next) -> Activation:
    """One layer on what is placed."""
    conv, norm, slope, behind = layer
    if context.eager:
        z = eager.layer(placed, conv, norm, slope, context)
        return Activation(z if behind is None else behind(z))
    if behind is not None:
        act = _apply(layer._replace(prelu=None), placed, context, UNKNOWN)
        return prelu(act, behind.weight, context.backend)
    if isinstance(conv, nn.Conv2d):
        if any(placed.doubled) and not _is_usual(conv):
            placed = Placed.of(placed.whole(context))
        # The convolution pools what it writes, unless the value is stored first and pooled from there.
        fits = min(placed.size) >= 2 * conv.stride[0] and slope >= 0
        pool = after.pool and fits and not context.stores(placed.first.x)
        if _normalises_at_once(conv, norm):
            return conv2d_act(placed, conv, norm, slope, Next(pool, after.head), context.backend)
        raw = conv2d(placed, conv, norm, pool, context)
    else:
        raw = conv_transpose2d(placed.whole(context), conv, norm, context.backend)
    return Activation(raw.y, None, slope, raw.pooled) if norm is None else normalised(raw, norm, slope, context.backend)


class Misfit(NamedTuple):
    """A module that does not fit its input. Errors carry it as ``misfit``, and the network adds the module's name."""

    module: nn.Module
    device: torch.device | None  # the input's, if the module is on another one


def _features(norm: Norm) -> int:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


def _of_modules(error: Exception, layer: Layer, placed: Placed) -> Exception:
    """An operator's error about its operands, as an error about the modules whose tensors they are."""
    conv, norm, *_ = layer
    kind = "batch norm" if isinstance(norm, nn.BatchNorm2d) else "norm"
    x = placed.first.x
    given = x.shape[1] + (0 if placed.second is None else placed.second.x.shape[1])
    wanted = conv.weight.shape[1 if isinstance(conv, nn.Conv2d) else 0]
    filters = conv.weight.shape[0 if isinstance(conv, nn.Conv2d) else 1]
    told, device = error, None
    at: nn.Module = conv
    parts = [(m, t) for m in (conv, norm) if m is not None for t in (*m.parameters(), *m.buffers())]
    elsewhere = [(m, t) for m, t in parts if t.dim() and t.device != x.device]
    if elsewhere:
        at, device = elsewhere[0][0], x.device
        told = ValueError(
            f"expected a {type(at).__name__} on {device}, where its input is, got one on {elsewhere[0][1].device}; "
            "move one of them"
        )
    elif wanted != given:
        told = ValueError(f"expected {wanted} channels, got {given}; change the layer or what comes before it")
    elif norm is not None and (features := _features(norm)) != filters:
        at = norm
        told = ValueError(
            f"expected a {kind} of {filters} features, got one of {features}; change it or the layer before it"
        )
    elif isinstance(norm, _NormBase) and (norm.running_mean is None) != (norm.running_var is None):
        at = norm
    elif norm is not None and torch.float64 in {p.dtype for p in norm.parameters()} - {conv.weight.dtype}:
        at = norm
        told = TypeError(f"expected a {kind} in float32 for an input in {x.dtype}, got one in float64; convert it")
    elif isinstance(error, ValueError) and "more than 1 value per channel" in str(error):  # PyTorch's own words
        told = ValueError(
            f"expected more than 1 value per channel in training, got one from an input of shape {tuple(x.shape)}; "
            "pass a larger batch or picture, or call model.eval()"
        )
    told.misfit = Misfit(at, device)  # type: ignore[attr-defined]
    return told


def lazily(modules: list[nn.Module], placed: Placed, context: Context, after: Next = UNKNOWN) -> Activation:
    """``modules`` in turn on what is placed: lazily as far as they read conv [BN] [act] …, then as modules."""
    layers, rest = _split(modules)
    for number, layer in enumerate(layers, 1):
        if isinstance(layer, nn.AvgPool2d):
            placed = Placed.of(average(placed.whole(context), context))
            continue
        try:
            act = _apply(layer, placed, context, after if number == len(layers) and not rest else UNKNOWN)
        except (TypeError, ValueError, RuntimeError) as error:
            ours = context.eager or not isinstance(error, RuntimeError)  # only ATen raises RuntimeError for operands
            if torch.compiler.is_compiling() or not ours:
                raise
            told = _of_modules(error, layer, placed)
            if told is error:
                raise
            raise told from error
        placed = Placed.of(act)
    if not rest:
        return placed.whole(context)
    z = placed.tensor(context)
    for module in rest:
        z = module(z)
    return Activation(z)


def _check_channels(in_channels: int, out_channels: int) -> None:
    check_integer("in_channels", in_channels)
    check_integer("out_channels", out_channels)


class LazyModule(nn.Module):
    """A block with a lazy way to run, and the :class:`~fastunet.activation.Config` of calls to it as a module."""

    config: Config = Config()

    def is_lazy(self) -> bool:
        """Whether a network may run this block lazily: its class is fastunet's own and nobody listens to its calls."""
        return type(self).__module__ == __name__ and untouched(self, type(self))

    def _called(self, x: Tensor, **others: Tensor) -> Context:
        """The context of a call as a module, of checked inputs."""
        for name, t in {"x": x, **others}.items():
            check_tensor(name, t)
            if t.dim() != 4:
                raise ValueError(f"expected {name} of shape (N, C, H, W), got {tuple(t.shape)}; reshape it")
            if t.shape[0] != x.shape[0]:
                raise ValueError(
                    f"expected x and {name} of one batch size, got {x.shape[0]} and {t.shape[0]}; pass as many"
                )
        return self.config.context(x, self)


class LazyBlock(LazyModule):
    """A block with one input."""

    def lazy(self, placed: Placed, context: Context, after: Next = UNKNOWN) -> Activation:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        context = self._called(x)
        return self.lazy(Placed.of(Activation(x)), context).tensor(context)


def run(block: nn.Module, placed: Placed, context: Context, after: Next = UNKNOWN) -> Activation:
    """``block`` applied to what is placed: lazily if it may be, else as a module on a stored tensor."""
    if isinstance(block, LazyBlock) and block.is_lazy():
        return block.lazy(placed, context, after)
    return Activation(block(placed.tensor(context)))


def _through(module: nn.Module, placed: Placed, context: Context) -> Activation:
    """A block, a layer or an identity applied to what is placed."""
    return run(module, placed, context) if isinstance(module, LazyBlock) else lazily([module], placed, context)


class ConvSequence(LazyBlock, nn.Sequential):
    """An nn.Sequential of convolutions, norms (batch, instance or group), acts (ReLU, LeakyReLU, PReLU) and 2×2 average
    pools."""

    def lazy(self, placed: Placed, context: Context, after: Next = UNKNOWN) -> Activation:
        return lazily(list(self), placed, context, after)


NORMS = ("batch", "instance", "group", None)
UPSAMPLINGS = ("transposed", "bilinear", "nearest")


def check_norm(norm: Any, negative_slope: Any) -> None:
    """Raise ValueError or TypeError for what is no norm, or no slope, of the blocks."""
    if not (norm is None or isinstance(norm, str)) or norm not in NORMS:
        raise ValueError(
            f"expected norm to be batch, instance, group or None, got {said(norm)}; leave it out for batch"
        )
    check_number("negative_slope", negative_slope)


def chosen_upsampling(upsample: Any, bilinear: bool) -> str:
    """The upsampling of two arguments that may both name one; ValueError for none, or for two."""
    if upsample is None:
        return "bilinear" if bilinear else "transposed"
    if not isinstance(upsample, str) or upsample not in UPSAMPLINGS:
        raise ValueError(
            f"expected upsample to be {', '.join(UPSAMPLINGS)} or None, got {said(upsample)}; leave it out for "
            "transposed convolutions"
        )
    if bilinear and upsample != "bilinear":
        raise ValueError(f"expected one upsampling, got bilinear=True and upsample={upsample!r}; leave out one of them")
    return upsample


def new_norm(norm: str | None, channels: int) -> nn.Module:
    """The normalisation of that name for ``channels``: as PyTorch makes it, with scales and shifts; groups are eight,
    or as many as divide the channels. Without one an identity, so that the layers keep their numbers."""
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.Identity() if norm is None else nn.BatchNorm2d(channels)


def new_act(negative_slope: float) -> nn.Module:
    """ReLU, or a leaky one."""
    return nn.LeakyReLU(negative_slope, inplace=True) if negative_slope else nn.ReLU(inplace=True)


class DoubleConv(LazyBlock):
    """(3×3 convolution → norm → ReLU) twice: (N, in, H, W) → (N, out, H, W).

    The norm is "batch", "instance", "group" or None, with which the convolutions have a bias; ``negative_slope`` other
    than 0 makes a leaky ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int | None = None,
        *,
        bias: bool = False,
        norm: str | None = "batch",
        negative_slope: float = 0.0,
    ):
        super().__init__()
        _check_channels(in_channels, out_channels)
        check_norm(norm, negative_slope)
        mid_channels, bias = mid_channels or out_channels, bias or norm is None
        self.double_conv = ConvSequence(
            nn.Conv2d(in_channels, mid_channels, 3, padding=1, bias=bias),
            new_norm(norm, mid_channels),
            new_act(negative_slope),
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=bias),
            new_norm(norm, out_channels),
            new_act(negative_slope),
        )

    def lazy(self, placed: Placed, context: Context, after: Next = UNKNOWN) -> Activation:
        return run(self.double_conv, placed, context, after)


class OutConv(LazyBlock):
    """The 1×1 convolution to logits: (N, in, H, W) → (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        _check_channels(in_channels, out_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def lazy(self, placed: Placed, context: Context, after: Next = UNKNOWN) -> Activation:
        return lazily([self.conv], placed, context, after)


def head_conv(module: nn.Module) -> nn.Conv2d | None:
    """The 1×1 convolution that a head is, if that is all it is and nobody listens to its calls."""
    if isinstance(module, OutConv) and module.is_lazy():
        module = module.conv
    return module if _is_conv(module) and module.kernel_size == (1, 1) else None  # type: ignore[return-value]


class Down(LazyModule):
    """2×2 max-pool, then :class:`DoubleConv` with ``settings``: (N, in, H, W) → (N, out, H // 2, W // 2)."""

    def __init__(self, in_channels: int, out_channels: int, **settings: Any):
        super().__init__()
        _check_channels(in_channels, out_channels)
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels, **settings))

    def lazy(self, act: Activation, context: Context, after: Next = UNKNOWN) -> tuple[Activation, Activation]:
        """(the block's output, the input again for its skip connection)."""
        if not untouched(self.maxpool_conv, nn.Sequential):
            z = act.tensor(context)
            return Activation(self.maxpool_conv(z)), Activation(z)
        first, *rest = self.maxpool_conv
        below, skip = pool(first, act, context)
        for number, module in enumerate(rest, 1):
            below = run(module, Placed.of(below), context, after if number == len(rest) else UNKNOWN)
        return below, skip

    def pools(self) -> bool:
        """Whether the block begins by pooling its input lazily."""
        return self.is_lazy() and untouched(self.maxpool_conv, nn.Sequential) and is_pool(self.maxpool_conv[0])

    def forward(self, x: Tensor) -> Tensor:
        context = self._called(x)
        return self.lazy(Activation(x), context)[0].tensor(context)


class Up(LazyModule):
    """Double the size, centre in the skip connection's size, concatenate (skip first), :class:`DoubleConv`.

    (N, in, h, w) and (N, in / 2, H, W) → (N, out, H, W). ``upsample`` is "bilinear" (aligned corners) or "nearest",
    which keep the channels, or "transposed", a 2×2 transposed convolution that halves them; None: as ``bilinear`` says.
    With ``replicate``, a skip connection of one row or column more repeats the last one instead, as MONAI's BasicUNet
    does. ``settings`` are DoubleConv's.
    """

    replicate = False  # also of those that were pickled before there was a choice

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bilinear: bool = True,
        *,
        upsample: str | None = None,
        replicate: bool = False,
        **settings: Any,
    ):
        super().__init__()
        _check_channels(in_channels, out_channels)
        check_flags(bilinear=bilinear, replicate=replicate)
        self.replicate = replicate
        self.up: nn.Module
        upsample = chosen_upsampling(upsample, bilinear and upsample is None)
        if upsample == "transposed":
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels, **settings)
        else:
            aligned = True if upsample == "bilinear" else None
            self.up = nn.Upsample(scale_factor=2, mode=upsample, align_corners=aligned)
            self.conv = DoubleConv(in_channels, out_channels, in_channels // 2, **settings)

    def lazy(self, act: Activation, skip: Activation, context: Context, after: Next = UNKNOWN) -> Activation:
        up = enlarge(self.up, act, context)
        size = (skip.x.shape[-2], skip.x.shape[-1])
        if self.replicate and up.size != size:
            up = Placed.of(replicated(up.whole(context), size, context))
        return run(self.conv, Placed.with_skip(up, skip, skip_first=True), context, after)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        context = self._called(x, skip=skip)
        return self.lazy(Activation(x), Activation(skip), context).tensor(context)


class ResidualBlock(LazyBlock):
    """act(norm(conv(act(norm(conv(x))))) + skip(x)): (N, in, H, W) → (N, out, ⌈H / stride⌉, ⌈W / stride⌉).

    3×3 convolutions, the first with the stride; skip is the identity, or where channels or size change a 2×2 average
    pool, a 1×1 convolution without bias and a norm, as in nnU-Net's residual encoder (ResNet-D). The sum and the act
    behind it are one pass that reads both sides before their norms; with stride 2 sizes must be even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        bias: bool = False,
        norm: str | None = "batch",
        negative_slope: float = 0.0,
    ):
        super().__init__()
        _check_channels(in_channels, out_channels)
        check_norm(norm, negative_slope)
        if stride not in (1, 2):
            raise ValueError(f"expected stride 1 or 2, got {said(stride)}; pass one of those")
        bias = bias or norm is None
        self.conv = ConvSequence(
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias),
            new_norm(norm, out_channels),
            new_act(negative_slope),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=bias),
            new_norm(norm, out_channels),
        )
        self.skip: nn.Module = nn.Identity()
        if stride == 2 or in_channels != out_channels:
            pools = [nn.AvgPool2d(2)] if stride == 2 else []
            project = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.skip = ConvSequence(*pools, project, new_norm(norm, out_channels))
        self.act = new_act(negative_slope)

    def lazy(self, placed: Placed, context: Context, after: Next = UNKNOWN) -> Activation:
        source = placed.whole(context)
        act = run(self.conv, Placed.of(source), context)
        skip = _through(self.skip, Placed.of(source), context)
        if act.x.shape != skip.x.shape:
            raise ValueError(
                f"expected two sides of one shape to add, got {tuple(act.x.shape)} and {tuple(skip.x.shape)} from an "
                f"input of shape {tuple(source.x.shape)}; with stride 2 pass even sizes"
            )
        slope = _slope(self.act)
        if slope is not None:
            return add(act, skip, slope, context)
        return Activation(self.act(add(act, skip, 1.0, context).tensor(context)))


def conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    """A 3×3 convolution with bias, BatchNorm and ReLU."""
    return [nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.BatchNorm2d(out_channels), nn.ReLU()]


class StridedDown(LazyModule):
    """Two convolutions, then a strided one: (N, in, H, W) → its input (N, out, H, W) and output (N, out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        _check_channels(in_channels, out_channels)
        self.Conv_BN_ReLU_2 = ConvSequence(
            *conv_bn_relu(in_channels, out_channels), *conv_bn_relu(out_channels, out_channels)
        )
        self.downsample = ConvSequence(*conv_bn_relu(out_channels, out_channels, 2))

    def lazy(self, placed: Placed, context: Context) -> tuple[Activation, Activation]:
        """(for the skip connection, for the next block)."""
        skip = run(self.Conv_BN_ReLU_2, placed, context)
        return skip, run(self.downsample, Placed.of(skip), context)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        context = self._called(x)
        skip, below = self.lazy(Placed.of(Activation(x)), context)
        return skip.tensor(context), below.tensor(context)


class StridedUp(LazyModule):
    """Two convolutions, a 3×3 transposed one, concatenation with the skip connection.

    (N, in, h, w) and (N, out, 2h, 2w) → (N, 2·out, 2h, 2w), the upsampled half first.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        _check_channels(in_channels, out_channels)
        doubled = 2 * out_channels
        self.Conv_BN_ReLU_2 = ConvSequence(*conv_bn_relu(in_channels, doubled), *conv_bn_relu(doubled, doubled))
        self.upsample = ConvSequence(
            nn.ConvTranspose2d(doubled, out_channels, 3, 2, 1, output_padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def lazy(self, placed: Placed, skip: Activation, context: Context) -> Placed:
        act = run(self.Conv_BN_ReLU_2, placed, context)
        up = run(self.upsample, Placed.of(act), context)
        return Placed.with_skip(Placed.of(up), skip, skip_first=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        context = self._called(x, skip=skip)
        return self.lazy(Placed.of(Activation(x)), Activation(skip), context).tensor(context)


def strided_descend(block: nn.Module, placed: Placed, context: Context) -> tuple[Activation, Activation]:
    """A :class:`StridedDown`, or what replaced it: (its skip connection, its output)."""
    if isinstance(block, StridedDown) and block.is_lazy():
        return block.lazy(placed, context)
    skip, below = block(placed.tensor(context))
    return Activation(skip), Activation(below)


def strided_ascend(block: nn.Module, placed: Placed, skip: Activation, context: Context) -> Placed:
    """A :class:`StridedUp`, or what replaced it, and the skip connection: what the next block reads."""
    if isinstance(block, StridedUp) and block.is_lazy():
        return block.lazy(placed, skip, context)
    return Placed.of(Activation(block(placed.tensor(context), skip.tensor(context))))


def pool(module: nn.Module, act: Activation, context: Context) -> tuple[Activation, Activation]:
    """(``module`` applied to the activation, the activation again for its skip connection)."""
    if is_pool(module):
        if min(act.x.shape[-2:]) < 2:
            size = "×".join(map(str, act.x.shape[-2:]))
            raise ValueError(f"expected at least 2×2 pixels to pool, got {size}; pad or enlarge the input")
        if not context.eager:
            return pool_fork(act, context)
        quickly = context.tuned and not torch.is_grad_enabled()
        return Activation(eager.max_pool2x2(act.x) if quickly else module(act.x)), act
    z = act.tensor(context)
    return Activation(module(z)), Activation(z)


def enlarge(module: nn.Module, act: Activation, context: Context) -> Placed:
    """An upsampling ``module`` (nn.Upsample, nn.ConvTranspose2d, ConvSequence, …) applied to the activation."""
    if not _is_upsample(module):
        return Placed.of(_through(module, Placed.of(act), context))
    assert isinstance(module, nn.Upsample)
    if context.eager:
        z = module(act.x)
        return Placed.of(Activation(eager.dense(z) if context.tuned else z))
    if module.mode == "nearest":
        return Placed.of(act, doubled=True)
    return Placed.of(upsample(act, bool(module.align_corners), context.backend))


def descend(
    block: nn.Module, act: Activation, context: Context, after: Next = UNKNOWN
) -> tuple[Activation, Activation]:
    """A downward ``block`` on an activation: (its output, the activation again for its skip connection)."""
    if isinstance(block, Down) and block.is_lazy():
        return block.lazy(act, context, after)
    z = act.tensor(context)
    return Activation(block(z)), Activation(z)


def ascend(block: nn.Module, act: Activation, skip: Activation, context: Context, after: Next = UNKNOWN) -> Activation:
    """An upward ``block`` on an activation and its skip connection."""
    if isinstance(block, Up) and block.is_lazy():
        return block.lazy(act, skip, context, after)
    return Activation(block(act.tensor(context), skip.tensor(context)))


@contextmanager
def _frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of every normalisation below ``module`` as they are, whoever runs it."""
    norms = [m for m in module.modules() if isinstance(m, _NormBase)]
    kept = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if batches is not None:
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked.copy_(batches)


def checkpointed(function: Callable[..., Any], module: nn.Module, *acts: Activation) -> Any:
    """``function(*acts)``, whose intermediate tensors are recomputed in the backward instead of kept.

    The recomputation leaves the running statistics of ``module`` alone: they were updated in the forward.
    """
    if torch.compiler.is_compiling():  # the compiler recomputes without repeating side effects
        return checkpoint(function, *acts, use_reentrant=False)
    recomputing = False

    def forward_then_recompute(*acts: Activation) -> Any:
        nonlocal recomputing
        if recomputing:
            with _frozen_running_stats(module):
                return function(*acts)
        recomputing = True
        return function(*acts)

    return checkpoint(forward_then_recompute, *acts, use_reentrant=False)
