"""A network together with what its training knew: how pictures are prepared for it, and what its outputs stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import tiling
from fastunet.checkpoint import Checkpoint, CheckpointError, load_checkpoint, read_checkpoint
from fastunet.data import ClassName
from fastunet.models import BrainUNet, PlainUNet, UNet
from fastunet.preparation import Array, Preparation

ENTRY = "fastunet"  # of a checkpoint


@dataclass(frozen=True)
class Trained:
    """A network and what is needed to use it.

    Attributes:
        classes: in the order of the labels.
        colours: whether its outputs are the colours of the classes, and not a probability of each.
    """

    model: nn.Module
    preparation: Preparation
    classes: tuple[ClassName, ...]
    colours: bool = False

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return int(self.model.n_channels)  # type: ignore[arg-type]

    def facts(self) -> dict[str, Any]:
        """All but the network, as numbers and strings for its checkpoint."""
        return {
            "preparation": dataclasses.asdict(self.preparation),
            "classes": [dataclasses.asdict(c) for c in self.classes],
            "colours": self.colours,
        }

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        """(N, C, H, W) prepared pixels → float32 (N, K, H, W): probabilities, or colours from 0 to 1; in eval mode."""
        if isinstance(self.model, (UNet, PlainUNet, BrainUNet)):
            return self.model.predict_proba(x)
        training = self.model.training
        try:
            y: Tensor = self.model.eval()(x)
            return y.float()
        finally:
            self.model.train(training)

    def labels(self, outputs: Tensor, threshold: float = 0.5) -> Tensor:
        """(K, H, W) outputs → (H, W) uint8 classes; a single channel is class 1 above ``threshold``."""
        if self.colours:
            table = torch.tensor([c.colour for c in self.classes], dtype=torch.float32) / 255
            distances = [((outputs - colour.view(3, 1, 1)) ** 2).sum(0) for colour in table]
            return torch.stack(distances).argmin(0).to(torch.uint8)
        return (outputs[0] > threshold if outputs.shape[0] == 1 else outputs.argmax(0)).to(torch.uint8)

    def bands(
        self,
        pixels: Array,
        *,
        tile: int = tiling.TILE,
        overlap: int = tiling.OVERLAP,
        symmetries: bool = False,
    ) -> Iterator[Tensor]:
        """Outputs (K, rows, W) for a picture (C, H, W) of any size, in bands from top to bottom.

        Memory does not grow with the height, unless the preparation resizes; ``pixels`` may be a memory map. Arguments
        as in :func:`fastunet.tiling.bands`; ``symmetries`` averages over those of the square.
        """
        parts = self._seen(self.preparation.resized(pixels), tile, overlap, symmetries)
        if not self.preparation.resizes:
            yield from parts
        else:
            yield self.preparation.restored(torch.cat(list(parts), 1), *pixels.shape[1:])

    def seen(self, pixels: Array) -> Tensor:
        """Outputs (K, h, w) for a picture (C, H, W), of the size that the network sees."""
        return torch.cat(list(self._seen(self.preparation.resized(pixels), tiling.TILE, tiling.OVERLAP, False)), 1)

    def _seen(self, pixels: Array, tile: int, overlap: int, symmetries: bool) -> Iterator[Tensor]:
        levels = self.preparation.levels(pixels)
        parameter = next(self.model.parameters())

        def read(rows: Array, columns: Array) -> Tensor:
            window = self.preparation.normalised(pixels[:, rows[:, None], columns], *levels)
            return window.to(parameter.device, parameter.dtype)

        network = tiling.symmetric(self.outputs) if symmetries else self.outputs
        return tiling.bands(network, read, *pixels.shape[1:], tile, overlap)


def load(path: str | Path) -> Trained:
    """The network in ``path``, in eval mode on the CPU, with what its training knew.

    What ``fastunet train`` did not write is taken to be prepared as Pytorch-UNet prepares: at half its size, and divided
    by 255.

    Raises:
        CheckpointError: as :func:`fastunet.checkpoint.load_checkpoint`.
    """
    model = load_checkpoint(path)
    checkpoint = read_checkpoint(path)
    facts = checkpoint.rest.get(ENTRY)
    if facts is None:
        return Trained(model, Preparation("unit", scale=0.5), _named(checkpoint))
    try:
        classes = tuple(ClassName(c["name"], c["colour"] and tuple(c["colour"])) for c in facts["classes"])
        return Trained(model, Preparation(**facts["preparation"]), classes, bool(facts["colours"]))
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} was written by another version of fastunet: save its state_dict alone") from error


def _named(checkpoint: Checkpoint) -> tuple[ClassName, ...]:
    values: Sequence[Any] = checkpoint.mask_values or range(max(checkpoint.architecture.classes, 2))
    colours = [tuple(int(x) for x in value) if isinstance(value, (list, tuple)) else None for value in values]
    return tuple(
        ClassName(f"value {value}" if colour is None else "colour {},{},{}".format(*colour), colour)  # type: ignore[arg-type]
        for value, colour in zip(values, colours, strict=True)
    )
