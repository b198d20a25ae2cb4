"""A network together with what its training knew: how pictures are prepared for it, and what its outputs stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastunet import large_tiff, pictures, tiling
from fastunet.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
from fastunet.data import ClassName, read_image
from fastunet.decode import check_numbers
from fastunet.errors import UserError
from fastunet.models import BrainUNet, PlainUNet, UNet
from fastunet.preparation import Array, Pixels, Preparation

ENTRY = "fastunet"  # of a checkpoint


@dataclass(frozen=True)
class Trained:
    """A network and what is needed to use it.

    Attributes:
        classes: in the order of the labels.
        values: of the classes in the masks, numbers or colours [r, g, b].
        colours: whether its outputs are the colours of the classes, and not a probability of each.
    """

    model: nn.Module
    preparation: Preparation
    classes: tuple[ClassName, ...]
    values: tuple[Any, ...]
    colours: bool = False

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return int(self.model.n_channels)  # type: ignore[arg-type]

    def scaled(self, scale: float) -> Trained:
        """The same for pictures that are resized by another factor."""
        preparation = dataclasses.replace(self.preparation, scale=scale, square=None)
        return dataclasses.replace(self, preparation=preparation)

    def labels_of(self, values: Sequence[Any], ignored: int) -> Array:
        """(256,) uint8: the class here of each label of masks that hold ``values``; ``ignored`` stays what it is.

        Raises:
            UserError: a value that is no class here.
        """
        own = [tuple(v) if isinstance(v, (list, tuple)) else v for v in self.values]
        table = np.full(256, ignored, np.uint8)
        for label, value in enumerate(tuple(v) if isinstance(v, (list, tuple)) else v for v in values):
            if value not in own:
                raise UserError(
                    f"the masks hold {value}, which the network was not trained on: it knows "
                    f"{', '.join(map(str, own[:8]))}; take masks of the same kind"
                )
            table[label] = own.index(value)
        return table

    def odd(self, pixels: Pixels) -> str | None:
        """What says that the numbers of a picture (C, H, W) mean something else than in training; None if nothing does.

        Of a TIFF that is read in parts only the type is looked at.
        """
        full, dtype = self.preparation.full, pixels.dtype
        if self.preparation.values != "unit":  # which makes all alike
            return None
        known = isinstance(pixels, np.ndarray)
        highest = float(pixels[:].max()) if known else full
        if highest > 2 * full or (dtype == np.uint8 and full > 255) or (dtype.kind == "f" and highest <= 1 < full):
            found = f"{dtype} numbers up to {highest:g}" if known else f"{dtype} numbers"
            return f"{found} for a network that was trained on numbers up to {full:g}"
        return None

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
            table = torch.tensor(pictures.class_colours(self.classes), dtype=torch.float32) / 255
            distances = [((outputs - colour.view(3, 1, 1)) ** 2).sum(0) for colour in table]
            return torch.stack(distances).argmin(0).to(torch.uint8)
        return (outputs[0] > threshold if outputs.shape[0] == 1 else outputs.argmax(0)).to(torch.uint8)

    def bands(
        self,
        pixels: Pixels,
        *,
        tile: int = tiling.TILE,
        overlap: int = tiling.OVERLAP,
        symmetries: bool = False,
    ) -> Iterator[Tensor]:
        """Outputs (K, rows, W) for a picture (C, H, W) of any size, in bands from top to bottom.

        Memory does not grow with the height, unless the preparation makes squares; ``pixels`` may be a memory map, or a
        :class:`~fastunet.large_tiff.LargeTiff`. Arguments as in :func:`fastunet.tiling.bands`; ``symmetries`` averages
        over those of the square.
        """
        parts = self._seen(pixels, tile, overlap, symmetries)
        return self.preparation.restored(parts, *pixels.shape[1:])

    def seen(self, pixels: Pixels) -> Tensor:
        """Outputs (K, h, w) for a picture (C, H, W), of the size that the network sees."""
        return torch.cat(list(self._seen(pixels, tiling.TILE, tiling.OVERLAP, False)), 1)

    def _seen(self, pixels: Pixels, tile: int, overlap: int, symmetries: bool) -> Iterator[Tensor]:
        levels = self.preparation.levels(pixels)  # of the file's pixels, as in training
        if isinstance(pixels, np.ndarray) and (self.preparation.square or not isinstance(pixels, np.memmap)):
            pixels = self.preparation.resized(pixels)
        else:
            pixels = self.preparation.in_parts(pixels)
        parameter = next(self.model.parameters())

        def read(rows: Array, columns: Array) -> Tensor:
            window = self.preparation.normalised(pixels[:, rows[:, None], columns], *levels)
            return window.to(parameter.device, parameter.dtype)

        network = tiling.symmetric(self.outputs) if symmetries else self.outputs
        _, height, width = pixels.shape
        return tiling.bands(network, read, height, width, tile, overlap)


def load(path: str | Path) -> Trained:
    """The network in ``path``, in eval mode on the CPU, with what its training knew.

    What ``fastunet train`` did not write is taken to be prepared as Pytorch-UNet prepares: at half its size, and
    divided by 255.

    Raises:
        CheckpointError: as :func:`fastunet.checkpoint.load_checkpoint`.
    """
    model = load_checkpoint(path)
    if not all(bool(x.isfinite().all()) for x in model.state_dict().values()):
        raise CheckpointError(f"{path} holds weights that are NaN or infinite: take one from before training diverged")
    checkpoint = read_checkpoint(path)
    values = tuple(checkpoint.mask_values or range(max(checkpoint.architecture.classes, 2)))
    facts = checkpoint.rest.get(ENTRY)
    if facts is None:
        return Trained(model, Preparation("unit", scale=0.5), tuple(map(_named, values)), values)
    try:
        classes = tuple(ClassName(c["name"], c["colour"] and tuple(c["colour"])) for c in facts["classes"])
        return Trained(model, Preparation(**facts["preparation"]), classes, values, bool(facts["colours"]))
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is of another version of fastunet: save its state_dict alone") from error


def _named(value: Any) -> ClassName:
    if not isinstance(value, (list, tuple)):
        return ClassName(f"value {value}")
    red, green, blue = (int(x) for x in value)
    return ClassName(f"colour {red},{green},{blue}", (red, green, blue))


def read(path: Path, channels: int) -> Pixels:
    """The pixels (C, H, W) of a picture; an array in a .npy file, and a TIFF beyond a limit, are read in parts later.

    Raises:
        UserError: it cannot be read, or has other channels.
    """
    pixels: Pixels
    if path.suffix.lower() == ".npy":
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read {path} (damaged, or no array of numbers): replace it") from error
        if not isinstance(loaded, np.ndarray):
            raise UserError(f"{path} holds several arrays, or none: save one by np.save")
        pixels = array = loaded[None] if loaded.ndim == 2 else loaded
        if array.ndim != 3 or array.dtype.kind not in "iuf" or 0 in array.shape:
            raise UserError(f"{path} holds {array.dtype} {array.shape}: save numbers as (C, H, W)")
        for row in range(0, array.shape[1], 64):
            check_numbers(path, array[:, row : row + 64])
    else:
        pixels = large_tiff.opened(path, channels) or read_image(path)
    if isinstance(pixels, np.ndarray) and len(pixels) == 1 < channels:
        pixels = np.broadcast_to(pixels, (channels, *pixels.shape[1:]), subok=True)
    if pixels.shape[0] != channels:
        raise UserError(f"{path} has {pixels.shape[0]} channels and the network takes {channels}: convert it")
    return pixels
