"""The networks: drop-in U-Nets with the well-known constructors, attributes, state_dict keys and outputs.

Each forward is the composition of lazily normalised operations of :mod:`fastunet.activation`; the same networks in
plain PyTorch are in :mod:`fastunet.reference`. Inputs are (N, C, H, W) floating-point tensors; outputs have the dtype
and the memory format that the plain network would give.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import eager
from fastunet.activation import Activation, Config, Context, Next, Placed, compute_dtype, head_predict
from fastunet.aten import predict
from fastunet.blocks import (
    ConvSequence,
    DoubleConv,
    Down,
    LazyBlock,
    LazyModule,
    Misfit,
    OutConv,
    StridedDown,
    StridedUp,
    Up,
    ascend,
    checkpointed,
    chosen_upsampling,
    conv_bn_relu,
    descend,
    enlarge,
    first_conv,
    halving,
    head_conv,
    is_pool,
    lazily,
    pool,
    run,
    strided_ascend,
    strided_descend,
    untouched,
)
from fastunet.checks import check_criterion, check_flags, check_integer, check_number, misfit, said
from fastunet.dispatch import refuse_scripting, refuse_tracing, refuse_transforms
from fastunet.layout import stats_dtype
from fastunet.losses import StatsLoss
from fastunet.plan import followed


class _Network(nn.Module):
    """What the networks share: the configuration, the checks at the door, checkpointing, the output's layout."""

    _way_down: tuple[str, ...]  # names of the modules on it, in the order in which they run
    _way_out: str  # and of the last module

    def __init__(self, backend: str, policy: str, **sizes: int):
        super().__init__()
        for name, size in sizes.items():
            check_integer(name, size)
        self.config = Config.checked(backend, policy)
        self.checkpointing = False
        self._channels, self._classes = list(sizes.values())[:2]

    def _going_down(self) -> Iterator[nn.Module]:
        """The modules that are on the way down: surgery may have left others there than the constructor made."""
        return (module for name in self._way_down if (module := self._modules.get(name)) is not None)

    def _configure(self) -> None:
        """Hand the configuration to every block: called at the end of a constructor."""
        for module in self.modules():
            if isinstance(module, LazyModule):
                module.config = self.config

    def use_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each stage's intermediate tensors in the backward instead of keeping them.

        Less memory for more time; gradients are the same and running statistics are updated once.
        """
        check_flags(enabled=enabled)
        self.checkpointing = enabled

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch; what does not fit is one sentence.

        Raises:
            TypeError: no mapping of names to tensors.
            RuntimeError: keys or shapes of another network; of one that is known, the call that constructs it.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except (TypeError, RuntimeError) as error:
            from fastunet.checkpoint import other_mode  # which imports this module

            told = other_mode(self, state_dict) or misfit(self, state_dict, strict)
            if told is None:
                raise
            raise type(error)(told) from error

    def __prepare_scriptable__(self) -> None:
        refuse_scripting()

    def _stage(self, function: Callable[..., Any], block: nn.Module, *acts: Any, **facts: Any) -> Any:
        """function(block, *acts, **facts), checkpointed if that is on."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return function(block, *acts, **facts)
        return checkpointed(lambda *acts: function(block, *acts, **facts), block, *acts)

    def _enter(self, x: Tensor) -> tuple[Activation, Context]:
        """The checked input, and the context of this forward."""
        if not isinstance(x, Tensor):
            hint = "use torch.export" if isinstance(x, torch.fx.Proxy) else "convert it with torch.as_tensor"
            raise TypeError(f"expected an input that is a torch.Tensor, got {type(x).__name__}; {hint}")
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            refuse_tracing()
        if x.layout is not torch.strided:
            raise TypeError(f"expected a dense input, got {x.layout}; convert it with x.to_dense()")
        if x.dim() != 4:
            hint = "add a batch dimension with x[None]" if x.dim() < 4 else "reshape it"
            raise ValueError(f"expected an input of shape (N, C, H, W), got {tuple(x.shape)}; {hint}")
        if x.shape[1] != self._channels:  # the constructor's number: the modules may be others now
            self._check_channels(x)
        if not x.is_floating_point():
            hint = (
                "pass x.abs(), or both parts as channels" if x.is_complex() else "scale it, for example x.float() / 255"
            )
            raise TypeError(f"expected a floating-point input, got {x.dtype}; {hint}")
        height, width = x.shape[-2:]
        if height < 16 or width < 16:  # every network, as constructed, takes 16
            self._check_size(x)
        context = self.config.context(x, self)
        return Activation(eager.enter(x) if context.tuned else x), context

    def _decode(self, x: Tensor, head: nn.Conv2d | None = None) -> tuple[Activation, Context]:
        """What the head reads, and the context of this forward; where a ``head`` is given, perhaps its result."""
        act, context = self._enter(x)
        if context.eager:
            head = None
        if not context.listed or self.training:
            return self._body(act, context, head), context
        about = context, compute_dtype(act.x), head is None
        return followed(self, act.x, about, lambda: self._body(act, context, head)), context

    def _body(self, act: Activation, context: Context, head: nn.Conv2d | None) -> Activation:
        """All but the head, of the checked input; on a CPU where nobody chose a backend its result is stored."""
        raise NotImplementedError

    def _check_channels(self, x: Tensor) -> None:
        """The channels of x, where a convolution that is known reads it."""
        conv = first_conv(next(self._going_down(), self))
        if conv is not None and conv.weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"expected {conv.weight.shape[1]} input channels, got {x.shape[1]} in an input of shape "
                f"{tuple(x.shape)}; build the model with that number of channels or convert the pictures"
            )

    def _check_size(self, x: Tensor) -> None:
        """Height and width of x, as far down as the modules are known."""
        least = 1
        for module in self._going_down():
            by = halving(module)
            if by is None:
                break
            least *= by
        height, width = x.shape[-2:]
        if min(height, width) < least:
            raise ValueError(
                f"expected height and width of at least {least}, got {height}×{width}; pad or enlarge the input"
            )

    def _telling(self, function: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
        """function(x, *rest), whose errors say which of this network's modules does not fit what it is given."""
        try:
            return function(x, *rest)
        except (TypeError, ValueError, RuntimeError) as error:
            if torch.compiler.is_compiling():
                raise
            if isinstance(error, RuntimeError):
                refuse_transforms()
            if not hasattr(error, "misfit"):
                raise
            raise self._named(error, error.misfit, x) from error

    def _named(self, error: Exception, misfit: Misfit, x: Tensor) -> Exception:
        if misfit.device is None:
            self._check_channels(x)
        devices = {p.device for p in self.parameters()}
        if misfit.device == x.device and len(devices) == 1 and x.device not in devices:
            where = devices.pop()
            return ValueError(
                f"expected an input on {where}, where the model is, got one on {x.device}; move it with x.to('{where}')"
            )
        name = next((name for name, module in self.named_modules() if module is misfit.module), "a layer")
        return type(error)(f"{error} ({name})")

    @property
    def n_channels(self) -> int:
        """Channels of the input: of the first convolution that is there."""
        first = next(self._going_down(), self)
        conv = next((m for m in first.modules() if isinstance(m, nn.Conv2d)), None)
        return self._channels if conv is None else conv.in_channels

    @n_channels.setter
    def n_channels(self, channels: int) -> None:
        self._channels = channels

    @property
    def n_classes(self) -> int:
        """Channels of the output: of the last convolution that is there."""
        last = self._modules.get(self._way_out)
        convs = [] if last is None else [m for m in last.modules() if isinstance(m, nn.Conv2d)]
        return convs[-1].out_channels if convs else self._classes

    @n_classes.setter
    def n_classes(self, classes: int) -> None:
        self._classes = classes


_modes = threading.Lock()
_evaluated: dict[nn.Module, int] = {}  # to return to training mode, once so many predictions are done


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode; its modules return to training mode when the last thread has left."""
    with _modes:
        changed = [module for module in model.modules() if module.training or module in _evaluated]
        for module in changed:
            _evaluated[module] = _evaluated.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _modes:
            for module in changed:
                _evaluated[module] -= 1
                if _evaluated[module] == 0:
                    del _evaluated[module]
                    module.training = True


class _LogitNetwork(_Network):
    """A network that ends in a 1×1 convolution to logits, which its loss and its predictions do without."""

    @property
    def _head(self) -> nn.Module:
        """An :class:`OutConv`, a 1×1 convolution, or what somebody put in its place."""
        raise NotImplementedError

    # Whether a call returns the logits themselves.
    _calls_for_logits = True

    def forward(self, x: Tensor) -> Tensor:
        return self._telling(self._forward, x)  # type: ignore[no-any-return]

    def _forward(self, x: Tensor) -> Tensor:
        return self._logits(*self._decode(x, head_conv(self._head)))

    def _called_as_is(self) -> bool:
        """Whether a call is this class's forward and nothing else: no subclass's, no hook, no patch."""
        kind = type(self)
        return (
            kind.forward in _FORWARDS and kind.__call__ is nn.Module.__call__ and untouched(self, kind, compiled=True)
        )

    def _logits(self, act: Activation, context: Context) -> Tensor:
        if act.headed:
            return act.tensor(context)
        head = self._head
        if isinstance(head, LazyBlock):
            return run(head, Placed.of(act), context).tensor(context)
        return lazily([head], Placed.of(act), context).tensor(context)

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        criterion: Callable[..., Tensor],
        pixel_weight: Tensor | None = None,
    ) -> Tensor:
        """``criterion`` of this network's logits and ``labels``, without a tensor of the logits' size.

        The value and the gradients of ``criterion(logits, labels)``, or ``criterion(logits, labels, pixel_weight)``,
        where logits are what the last convolution gives (:class:`BrainUNet` puts a sigmoid behind it). A loss of
        :mod:`fastunet.losses` is computed in one pass over the last activation, forward and backward; of 16-bit
        networks its logits are not rounded. For any other criterion, or a head that has hooks or was replaced, the
        logits are stored as usual; and where a call would run more than this class's forward (a subclass's, hooks on
        the whole network, FSDP2's), the network is called for them. Under DDP wrap a module whose forward calls this.

        Args:
            x: (N, C, H, W), as in a call.
            labels, pixel_weight: as ``criterion`` takes them; :func:`fastunet.losses.softmax_stats`.

        Raises:
            ValueError, TypeError: as a call, or as the loss; a :class:`BrainUNet` whose call is not its own, since it
                returns probabilities.
        """
        check_criterion(criterion)
        weights = () if pixel_weight is None else (pixel_weight,)
        if not self._called_as_is():
            if not self._calls_for_logits:
                raise TypeError(
                    f"expected a {type(self).__name__} with its own forward and no hooks, for the loss of its logits, "
                    "got one to be called, which returns probabilities; use nn.BCELoss of those"
                )
            return criterion(self(x), labels, *weights)
        act, context = self._telling(self._decode, x)
        conv = head_conv(self._head)
        if conv is not None and isinstance(criterion, StatsLoss) and criterion.plain():
            stats = criterion.head_stats(act, conv.weight, conv.bias, labels, pixel_weight, context.backend)
            return criterion.from_stats(stats)
        return criterion(self._logits(act, context), labels, *weights)

    def predict(self, x: Tensor, *, sigmoid: bool | None = None, threshold: float = 0.5) -> Tensor:
        """Masks of x, in eval mode and without gradients; the model is left in the mode it was in.

        Several threads may predict at once. While they do, the model is in eval mode for every thread: do not train it,
        or call train(), at the same time. Where a call would run more than this class's forward, it is called.

        Args:
            x: (N, C, H, W), as in a call.
            sigmoid: whether every channel is a question of its own; None: if there is one channel.
            threshold: of a channel's probability, with ``sigmoid``.

        Returns:
            uint8: (N, H, W), the class of the largest logit, the first of equals; with ``sigmoid`` (N, K, H, W), 1
            where the probability exceeds ``threshold``, else 0.

        Raises:
            ValueError, TypeError: as a call; more than 256 classes.
        """
        return self._predict(x, "argmax", "threshold", sigmoid, threshold, torch.float32)

    def predict_proba(self, x: Tensor, *, sigmoid: bool | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Probabilities (N, K, H, W) of x in ``dtype``, channels_last; otherwise as :meth:`predict`."""
        return self._predict(x, "softmax", "sigmoid", sigmoid, 0.5, dtype)

    @torch.no_grad()
    def _predict(
        self, x: Tensor, exclusive: str, independent: str, sigmoid: bool | None, threshold: float, dtype: torch.dtype
    ) -> Tensor:
        check_flags(optional=True, sigmoid=sigmoid)
        check_number("threshold", threshold)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"expected a floating-point dtype for probabilities, got {said(dtype)}; take torch.float32")
        conv: nn.Conv2d | None = None
        logits: Tensor | None = None
        with _evaluating(self):
            if self._called_as_is():
                act, context = self._telling(self._decode, x)
                conv = head_conv(self._head)
                logits = None if conv is not None else self._logits(act, context)
            else:
                logits = self._logits_called(x)
        classes = conv.out_channels if logits is None else logits.shape[1]  # type: ignore[union-attr]
        output = independent if (classes == 1 if sigmoid is None else sigmoid) else exclusive
        if logits is None:
            return head_predict(act, conv, output, threshold, dtype, context.backend)  # type: ignore[arg-type]
        return predict(logits, output, threshold, dtype)

    def _logits_called(self, x: Tensor) -> Tensor:
        """The logits of a call."""
        y = self(x)
        if not isinstance(y, Tensor) or y.dim() != 4:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(
                f"expected a call of the model to return a tensor (N, K, H, W) to predict from, got {found}; make its "
                "forward return the logits"
            )
        if self._calls_for_logits:
            return y
        dtype = stats_dtype(y.dtype)
        return y.to(dtype).logit(torch.finfo(dtype).eps)


class UNet(_LogitNetwork):
    """The U-Net of milesial/Pytorch-UNet: its attributes, state_dict keys and outputs.

    Args:
        n_channels: channels of the input.
        n_classes: channels of the output.
        bilinear: upsample by bilinear interpolation (align_corners=True) instead of 2×2 transposed convolution.
        base_c: channels of the first block; 64 in the paper.
        conv_bias: biases in the 3×3 convolutions, as in upstream checkpoints before version 3.
        norm: behind each 3×3 convolution: "batch"; "instance", with scales and shifts; "group", of eight groups or as
            many as divide the channels; or None, with which the convolutions have biases.
        negative_slope: below zero, of the act behind it: 0 is ReLU's, 0.01 that of a leaky one.
        upsample: "transposed", "bilinear" (as ``bilinear``) or "nearest", whose blocks have the channels of "bilinear";
            None: as ``bilinear`` says.
        backend: "auto", "torch" or "triton"; see :func:`fastunet.backend.resolve_backend`.
        policy: "speed", or "memory": keep nothing normalised for the backward.

    Shape: (N, n_channels, H, W) with H, W ≥ 16 → logits (N, n_classes, H, W).

    Raises:
        ValueError: wrong rank, channels or size of the input; statistics of one value (a single 16×16 picture in
            training, or one of 16×16 pixels with "instance"), as PyTorch; no such norm or upsampling, or one that
            contradicts ``bilinear``.
        TypeError: an integer input, or weights of another dtype outside autocast.

    Source: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015, with
    padding and batch normalisation.
    """

    def __init__(
        self,
        n_channels: int,
        n_classes: int,
        bilinear: bool = False,
        base_c: int = 64,
        *,
        conv_bias: bool = False,
        norm: str | None = "batch",
        negative_slope: float = 0.0,
        upsample: str | None = None,
        backend: str = "auto",
        policy: str = "speed",
    ):
        super().__init__(backend, policy, n_channels=n_channels, n_classes=n_classes, base_c=base_c)
        check_flags(bilinear=bilinear, conv_bias=conv_bias)
        upsample = chosen_upsampling(upsample, bilinear)
        settings: dict[str, Any] = {"bias": conv_bias, "norm": norm, "negative_slope": negative_slope}
        self.bilinear = upsample == "bilinear"
        factor = 1 if upsample == "transposed" else 2
        self.inc = DoubleConv(n_channels, base_c, **settings)
        self.down1 = Down(base_c, base_c * 2, **settings)
        self.down2 = Down(base_c * 2, base_c * 4, **settings)
        self.down3 = Down(base_c * 4, base_c * 8, **settings)
        self.down4 = Down(base_c * 8, base_c * 16 // factor, **settings)
        self.up1 = Up(base_c * 16, base_c * 8 // factor, upsample=upsample, **settings)
        self.up2 = Up(base_c * 8, base_c * 4 // factor, upsample=upsample, **settings)
        self.up3 = Up(base_c * 4, base_c * 2 // factor, upsample=upsample, **settings)
        self.up4 = Up(base_c * 2, base_c, upsample=upsample, **settings)
        self.outc = OutConv(base_c, n_classes)
        self._configure()

    _way_down = ("inc", "down1", "down2", "down3", "down4")
    _way_out = "outc"

    def _body(self, act: Activation, context: Context, head: nn.Conv2d | None) -> Activation:
        downs = (self.down1, self.down2, self.down3, self.down4)
        # Each block's result is pooled by the next block.
        after = [Next(pool=isinstance(down, Down) and down.pools()) for down in downs]
        act = self._stage(run, self.inc, Placed.of(act), context=context, after=after[0])
        skips = []
        for down, following in zip(downs, [*after[1:], Next()], strict=True):
            act, skip = self._stage(descend, down, act, context=context, after=following)
            skips.append(skip)
        for up in (self.up1, self.up2, self.up3):
            act = self._stage(ascend, up, act, skips.pop(), context=context)
        return self._stage(ascend, self.up4, act, skips.pop(), context=context, after=Next(head=head))  # type: ignore[no-any-return]

    @property
    def _head(self) -> nn.Module:
        return self.outc

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Upstream checkpoints hold the values of the masks among the weights: they become an attribute.
        if f"{prefix}mask_values" in state_dict:
            self.mask_values = state_dict.pop(f"{prefix}mask_values")
        super()._load_from_state_dict(state_dict, prefix, *args)


class StridedUNet(_Network):
    """The U-Net that learns its resampling: strided convolutions down, transposed convolutions up, a sigmoid head.

    Every convolution has a bias and is followed by BatchNorm and ReLU, except the last. Concatenation is (up, skip).

    Args:
        n_channels: channels of the input.
        n_classes: channels of the output.
        base_c: channels of the first block.
        backend, policy: as in :class:`UNet`.

    Shape: (N, n_channels, H, W) with H, W ≥ 16 → probabilities (N, n_classes, H, W), for nn.BCELoss.

    Raises:
        ValueError, TypeError: as :class:`UNet`.

    Source: seed 000.
    """

    def __init__(
        self, n_channels: int = 3, n_classes: int = 3, base_c: int = 64, *, backend: str = "auto", policy: str = "speed"
    ):
        super().__init__(backend, policy, n_channels=n_channels, n_classes=n_classes, base_c=base_c)
        self.d1 = StridedDown(n_channels, base_c)
        self.d2 = StridedDown(base_c, base_c * 2)
        self.d3 = StridedDown(base_c * 2, base_c * 4)
        self.d4 = StridedDown(base_c * 4, base_c * 8)
        self.u1 = StridedUp(base_c * 8, base_c * 8)
        self.u2 = StridedUp(base_c * 16, base_c * 4)
        self.u3 = StridedUp(base_c * 8, base_c * 2)
        self.u4 = StridedUp(base_c * 4, base_c)
        self.o = ConvSequence(
            *conv_bn_relu(base_c * 2, base_c),
            *conv_bn_relu(base_c, base_c),
            nn.Conv2d(base_c, n_classes, 3, 1, 1),
            nn.Sigmoid(),
        )
        self._configure()

    _way_down = ("d1", "d2", "d3", "d4")
    _way_out = "o"

    def forward(self, x: Tensor) -> Tensor:
        return self._telling(self._forward, x)  # type: ignore[no-any-return]

    def _forward(self, x: Tensor) -> Tensor:
        act, context = self._decode(x)
        return act.tensor(context)

    def _body(self, act: Activation, context: Context, head: nn.Conv2d | None) -> Activation:
        placed = Placed.of(act)
        skips = []
        for down in (self.d1, self.d2, self.d3, self.d4):
            skip, below = self._stage(strided_descend, down, placed, context=context)
            placed = Placed.of(below)
            skips.append(skip)
        for up in (self.u1, self.u2, self.u3, self.u4):
            placed = self._stage(strided_ascend, up, placed, skips.pop(), context=context)
        return run(self.o, placed, context)

    def loss(self, *operands: Any) -> Tensor:
        """Not here: this network ends in a 3×3 convolution and a sigmoid, not in a 1×1 convolution to logits."""
        raise TypeError(
            "expected a network that ends in a 1×1 convolution, got StridedUNet; use nn.BCELoss of its output"
        )

    def predict(self, *operands: Any, **settings: Any) -> Tensor:
        """Not here, as :meth:`loss`."""
        raise TypeError(
            "expected a network that ends in a 1×1 convolution to logits, got StridedUNet, whose call returns "
            "probabilities; compare those with a threshold, model.eval()(x) > 0.5"
        )

    predict_proba = predict


class _HubNetwork(_LogitNetwork):
    """Four encoders with max-pooling, a bottleneck, four decoders behind 2×2 transposed convolutions.

    Concatenation is (up, skip). Subclasses name the modules.
    """

    def __init__(self, in_channels: int, out_channels: int, init_features: int, backend: str, policy: str):
        super().__init__(
            backend, policy, in_channels=in_channels, out_channels=out_channels, init_features=init_features
        )
        features = [init_features * 2**level for level in range(5)]
        for level, width in enumerate(features[:4], 1):
            before = in_channels if level == 1 else features[level - 2]
            setattr(self, f"encoder{level}", self._block(before, width, f"enc{level}"))
            self._add_pool(level)
        self.bottleneck = self._block(features[3], features[4], "bottleneck")
        for level in (4, 3, 2, 1):
            width = features[level - 1]
            setattr(self, f"upconv{level}", nn.ConvTranspose2d(2 * width, width, 2, stride=2))
            setattr(self, f"decoder{level}", self._block(2 * width, width, f"dec{level}"))
        self._add_head(nn.Conv2d(init_features, out_channels, 1))
        self._configure()

    def _block(self, in_channels: int, out_channels: int, name: str) -> ConvSequence:
        raise NotImplementedError

    def _add_pool(self, level: int) -> None:
        raise NotImplementedError

    def _add_head(self, head: nn.Conv2d) -> None:
        raise NotImplementedError

    def _pool(self, level: int) -> nn.Module:
        raise NotImplementedError

    def _body(self, act: Activation, context: Context, head: nn.Conv2d | None) -> Activation:
        skips = []
        for level in (1, 2, 3, 4):
            after = Next(pool=is_pool(self._pool(level)))
            encoder = self.get_submodule(f"encoder{level}")
            act = self._stage(run, encoder, Placed.of(act), context=context, after=after)
            act, skip = pool(self._pool(level), act, context)
            skips.append(skip)
        act = self._stage(run, self.bottleneck, Placed.of(act), context=context)
        for level in (4, 3, 2, 1):
            up = enlarge(self.get_submodule(f"upconv{level}"), act, context)
            placed = Placed.with_skip(up, skips.pop(), skip_first=False)
            after = Next(head=head if level == 1 else None)
            act = self._stage(run, self.get_submodule(f"decoder{level}"), placed, context=context, after=after)
        return act


class PlainUNet(_HubNetwork):
    """The U-Net without batch normalisation: convolutions with bias and ReLU; logits out.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        init_features: channels of the first encoder.
        backend, policy: as in :class:`UNet`.

    Shape: (N, in_channels, H, W) with H, W ≥ 16 → logits (N, out_channels, H, W).

    Raises:
        ValueError, TypeError: as :class:`UNet`.

    Source: seed 004.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        init_features: int = 32,
        *,
        backend: str = "auto",
        policy: str = "speed",
    ):
        super().__init__(in_channels, out_channels, init_features, backend, policy)

    _way_down = ("encoder1", "pool", "encoder2", "pool", "encoder3", "pool", "encoder4", "pool", "bottleneck")
    _way_out = "output"

    def _block(self, in_channels: int, out_channels: int, name: str) -> ConvSequence:
        return ConvSequence(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def _add_pool(self, level: int) -> None:
        self.pool = nn.MaxPool2d(2)

    def _pool(self, level: int) -> nn.Module:
        return self.pool

    def _add_head(self, head: nn.Conv2d) -> None:
        self.output = head

    @property
    def _head(self) -> nn.Module:
        return self.output


class BrainUNet(_HubNetwork):
    """mateuszbuda's brain-segmentation U-Net as published on PyTorch Hub: its state_dict keys and outputs.

    Args:
        in_channels: channels of the input; the published weights expect each volume z-scored.
        out_channels: channels of the output.
        init_features: channels of the first encoder.
        backend, policy: as in :class:`UNet`.

    Shape: (N, in_channels, H, W) with H, W ≥ 16 → probabilities (N, out_channels, H, W).

    Raises:
        ValueError, TypeError: as :class:`UNet`.

    Source: Buda, Saha, Mazurowski, "Association of genomic subtypes of lower-grade gliomas with shape features
    automatically extracted by a deep learning algorithm", 2019.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        init_features: int = 32,
        *,
        backend: str = "auto",
        policy: str = "speed",
    ):
        super().__init__(in_channels, out_channels, init_features, backend, policy)

    _way_down = ("encoder1", "pool1", "encoder2", "pool2", "encoder3", "pool3", "encoder4", "pool4", "bottleneck")
    _way_out = "conv"
    _calls_for_logits = False

    def _block(self, in_channels: int, out_channels: int, name: str) -> ConvSequence:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, channels in ((1, in_channels), (2, out_channels)):
            layers[f"{name}conv{i}"] = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
            layers[f"{name}norm{i}"] = nn.BatchNorm2d(out_channels)
            layers[f"{name}relu{i}"] = nn.ReLU(inplace=True)
        return ConvSequence(layers)

    def _add_pool(self, level: int) -> None:
        setattr(self, f"pool{level}", nn.MaxPool2d(2, stride=2))

    def _pool(self, level: int) -> nn.Module:
        return self.get_submodule(f"pool{level}")

    def _add_head(self, head: nn.Conv2d) -> None:
        self.conv = head

    @property
    def _head(self) -> nn.Module:
        return self.conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


_FORWARDS = (
    _LogitNetwork.forward,
    BrainUNet.forward,
)  # those that loss and predict can skip: they add nothing to the decoder and the head
