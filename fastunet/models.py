"""The networks: drop-in U-Nets with the well-known constructors, attributes, state_dict keys and outputs.

Each forward is the composition of lazily normalised operations of :mod:`fastunet.activation`; the same networks in
plain PyTorch are in :mod:`fastunet.reference`. Inputs are (N, C, H, W) floating-point tensors; outputs have the dtype
and the memory format that the plain network would give.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import eager
from fastunet.activation import Activation, Config, Placed, head_predict
from fastunet.aten import predict
from fastunet.blocks import (
    ConvSequence,
    DoubleConv,
    Down,
    LazyBlock,
    LazyModule,
    OutConv,
    StridedDown,
    StridedUp,
    Up,
    ascend,
    checkpointed,
    conv_bn_relu,
    descend,
    enlarge,
    head_conv,
    is_pool,
    lazily,
    pool,
    run,
    strided_ascend,
    strided_descend,
)
from fastunet.losses import StatsLoss


class _Network(nn.Module):
    """What the networks share: the configuration, the checks at the door, checkpointing, the output's layout."""

    def __init__(self, channels: int, backend: str, policy: str):
        super().__init__()
        self.config = Config.checked(backend, policy)
        self.checkpointing = False
        self._channels = channels

    def _configure(self) -> None:
        """Hand the configuration to every block: called at the end of a constructor."""
        for module in self.modules():
            if isinstance(module, LazyModule):
                module.config = self.config

    def use_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each stage's intermediate tensors in the backward instead of keeping them.

        Less memory for more time; gradients are the same and running statistics are updated once.
        """
        self.checkpointing = enabled

    def _stage(self, config: Config, function: Callable[..., Any], block: nn.Module, *args: Any) -> Any:
        """function(block, *args, config), checkpointed if that is on."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return function(block, *args, config)
        return checkpointed(lambda *acts: function(block, *acts, config), block, *args)

    def _enter(self, x: Tensor) -> tuple[Activation, Config]:
        """The checked input, and the configuration of this forward."""
        if x.dim() != 4:
            raise ValueError(f"expected an input of shape (N, C, H, W), got {tuple(x.shape)}; add a batch dimension?")
        if x.shape[1] != self._channels:
            raise ValueError(
                f"expected {self._channels} input channels, got {x.shape[1]} in an input of shape {tuple(x.shape)}; "
                "build the model with that number of channels or convert the pictures"
            )
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input, got {x.dtype}; scale it, for example x.float() / 255")
        height, width = x.shape[-2:]
        if height < 16 or width < 16:
            raise ValueError(
                f"expected height and width of at least 16, got {height}×{width}; pad or enlarge the input"
            )
        config = self.config.like(x, self)
        return Activation(eager.enter(x) if config.tuned else x), config


class _LogitNetwork(_Network):
    """A network that ends in a 1×1 convolution to logits, which its loss and its predictions do without."""

    def _decode(self, x: Tensor, head: nn.Conv2d | None = None) -> tuple[Activation, Config]:
        """What the head reads, and the configuration of this forward; where a ``head`` is given, perhaps its result."""
        raise NotImplementedError

    @property
    def _head(self) -> nn.Module:
        """An :class:`OutConv`, a 1×1 convolution, or what somebody put in its place."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._logits(*self._decode(x, head_conv(self._head)))

    def _logits(self, act: Activation, config: Config) -> Tensor:
        if act.headed:
            return act.tensor(config)
        head = self._head
        if isinstance(head, LazyBlock):
            return run(head, Placed.alone(act), config).tensor(config)
        return lazily([head], Placed.alone(act), config).tensor(config)

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
        logits are stored as usual. The network itself is not called, so its own hooks do not run; under DDP wrap a
        module whose forward calls this.

        Args:
            x: (N, C, H, W), as in a call.
            labels, pixel_weight: as ``criterion`` takes them; :func:`fastunet.losses.softmax_stats`.

        Raises:
            ValueError, TypeError: as a call, or as the loss.
        """
        act, config = self._decode(x)
        conv = head_conv(self._head)
        if conv is not None and isinstance(criterion, StatsLoss) and criterion.plain():
            stats = criterion.head_stats(act, conv.weight, conv.bias, labels, pixel_weight, config)
            return criterion.from_stats(stats)
        weights = () if pixel_weight is None else (pixel_weight,)
        return criterion(self._logits(act, config), labels, *weights)

    def predict(self, x: Tensor, *, sigmoid: bool | None = None, threshold: float = 0.5) -> Tensor:
        """Masks of x, in eval mode and without gradients; the model is left in the mode it was in.

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
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            act, config = self._decode(x)
            conv = head_conv(self._head)
            logits = None if conv is not None else self._logits(act, config)
        finally:
            for module in training:
                module.training = True
        classes = conv.out_channels if logits is None else logits.shape[1]  # type: ignore[union-attr]
        output = independent if (classes == 1 if sigmoid is None else sigmoid) else exclusive
        if logits is None:
            return head_predict(act, conv, output, threshold, dtype, config)  # type: ignore[arg-type]
        return predict(logits, output, threshold, dtype)


class UNet(_LogitNetwork):
    """The U-Net of milesial/Pytorch-UNet: its attributes, state_dict keys and outputs.

    Args:
        n_channels: channels of the input.
        n_classes: channels of the output.
        bilinear: upsample by bilinear interpolation (align_corners=True) instead of 2×2 transposed convolution.
        base_c: channels of the first block; 64 in the paper.
        conv_bias: biases in the 3×3 convolutions, as in upstream checkpoints before version 3.
        backend: "auto", "torch" or "triton"; see :func:`fastunet.ops.resolve_backend`.
        policy: "speed", or "memory": keep nothing normalised for the backward.

    Shape: (N, n_channels, H, W) with H, W ≥ 16 → logits (N, n_classes, H, W).

    Raises:
        ValueError: wrong rank, channels or size of the input; batch statistics of one value (a single 16×16 picture in
            training), as PyTorch.
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
        backend: str = "auto",
        policy: str = "speed",
    ):
        super().__init__(n_channels, backend, policy)
        self.n_channels = n_channels
        self.n_classes = n_classes
        self.bilinear = bilinear
        factor = 2 if bilinear else 1
        self.inc = DoubleConv(n_channels, base_c, bias=conv_bias)
        self.down1 = Down(base_c, base_c * 2, bias=conv_bias)
        self.down2 = Down(base_c * 2, base_c * 4, bias=conv_bias)
        self.down3 = Down(base_c * 4, base_c * 8, bias=conv_bias)
        self.down4 = Down(base_c * 8, base_c * 16 // factor, bias=conv_bias)
        self.up1 = Up(base_c * 16, base_c * 8 // factor, bilinear, bias=conv_bias)
        self.up2 = Up(base_c * 8, base_c * 4 // factor, bilinear, bias=conv_bias)
        self.up3 = Up(base_c * 4, base_c * 2 // factor, bilinear, bias=conv_bias)
        self.up4 = Up(base_c * 2, base_c, bilinear, bias=conv_bias)
        self.outc = OutConv(base_c, n_classes)
        self._configure()

    def _decode(self, x: Tensor, head: nn.Conv2d | None = None) -> tuple[Activation, Config]:
        act, config = self._enter(x)
        downs = (self.down1, self.down2, self.down3, self.down4)
        # What each block returns is pooled by the next.
        pooled = [config._replace(pool=isinstance(down, Down) and down.pools()) for down in downs]
        act = self._stage(pooled[0], run, self.inc, Placed.alone(act))
        skips = []
        for down, after in zip(downs, [*pooled[1:], config], strict=True):
            act, skip = self._stage(after, descend, down, act)
            skips.append(skip)
        for up in (self.up1, self.up2, self.up3):
            act = self._stage(config, ascend, up, act, skips.pop())
        return self._stage(config._replace(head=head), ascend, self.up4, act, skips.pop()), config

    @property
    def _head(self) -> nn.Module:
        return self.outc

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Upstream checkpoints carry the mask's values among the weights: kept as an attribute.
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
        super().__init__(n_channels, backend, policy)
        self.n_channels = n_channels
        self.n_classes = n_classes
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

    def forward(self, x: Tensor) -> Tensor:
        act, config = self._enter(x)
        placed = Placed.alone(act)
        skips = []
        for down in (self.d1, self.d2, self.d3, self.d4):
            skip, below = self._stage(config, strided_descend, down, placed)
            placed = Placed.alone(below)
            skips.append(skip)
        for up in (self.u1, self.u2, self.u3, self.u4):
            placed = self._stage(config, strided_ascend, up, placed, skips.pop())
        return run(self.o, placed, config).tensor(config)

    def loss(self, *operands: Any) -> Tensor:
        """Not here: this network ends in a 3×3 convolution and a sigmoid, not in a 1×1 convolution to logits."""
        raise TypeError(
            "expected a network that ends in a 1×1 convolution, got StridedUNet; use nn.BCELoss of its output"
        )


class _HubNetwork(_LogitNetwork):
    """Four encoders with max-pooling, a bottleneck, four decoders behind 2×2 transposed convolutions.

    Concatenation is (up, skip). Subclasses name the modules.
    """

    def __init__(self, in_channels: int, out_channels: int, init_features: int, backend: str, policy: str):
        super().__init__(in_channels, backend, policy)
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

    def _decode(self, x: Tensor, head: nn.Conv2d | None = None) -> tuple[Activation, Config]:
        act, config = self._enter(x)
        skips = []
        for level in (1, 2, 3, 4):
            pooled = config._replace(pool=is_pool(self._pool(level)))
            act = self._stage(pooled, run, self.get_submodule(f"encoder{level}"), Placed.alone(act))
            act, skip = pool(self._pool(level), act, config)
            skips.append(skip)
        act = self._stage(config, run, self.bottleneck, Placed.alone(act))
        for level in (4, 3, 2, 1):
            up = enlarge(self.get_submodule(f"upconv{level}"), act, config)
            placed = Placed.with_skip(up, skips.pop(), skip_first=False)
            last = config._replace(head=head if level == 1 else None)
            act = self._stage(last, run, self.get_submodule(f"decoder{level}"), placed)
        return act, config


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
