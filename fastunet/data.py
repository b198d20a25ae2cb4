"""Pictures and their masks: find the pairs, check every file, say which values are classes, cut training crops.

:func:`open_dataset` reads a user's folders and gives a :class:`Dataset` of :class:`Sample`, as decoded, with a table of
what was found; :func:`open_folders` gives the same as :class:`Pictures`, standardised; :func:`generated` draws a
microscopy-like set from a seed. All load on demand. What a user got wrong is a :class:`DataError`, one sentence that
names the file and the fix, raised before anything is trained.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from fastunet.checks import check_integer
from fastunet.coding import IGNORE_INDEX, MAX_CLASSES, Coding, Found, code_cells, code_masks, found_in
from fastunet.decode import MAX_PIXELS, DataError, Decoded, check_numbers, decode
from fastunet.generated import draw_cells
from fastunet.layouts import (
    MASK_ENDINGS,
    MSRC,
    SUFFIXES,
    VOC,
    Colour,
    Pairs,
    Row,
    chosen,
    find_pairs,
    is_voc,
    listed,
    read_table,
    subfolders,
    voc_pairs,
)

__all__ = [
    "IGNORE_INDEX",
    "LAYOUTS",
    "MASK_ENDINGS",
    "MAX_CLASSES",
    "MAX_CROP",
    "MAX_PIXELS",
    "MIN_CROP",
    "MIN_SIZE",
    "SUFFIXES",
    "ClassName",
    "Colour",
    "DataError",
    "Dataset",
    "Pair",
    "Pictures",
    "Sample",
    "find_pairs",
    "generated",
    "open_dataset",
    "open_folders",
    "random_crops",
    "read_image",
    "unseen",
]

MIN_SIZE = 16  # the U-Net halves four times
MAX_CROP = math.isqrt(MAX_PIXELS)
MIN_CROP = 2 * MIN_SIZE  # at 16 the deepest level is one pixel, which has no variance to normalise by
LAYOUTS = ("folders", "voc", "msrc", "cells")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ClassName:
    """What a class index stands for in the masks: a name, and the colour it has there if the masks are in colour."""

    name: str
    colour: Colour | None = None


@dataclass(frozen=True)
class Pair:
    """An image (C, H, W), float32 with mean 0 and deviation 1 over the whole picture, and its labels (H, W), uint8.

    The label 255 means that the pixel does not count.
    """

    name: str
    image: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pictures(Sequence[Pair]):
    """Pairs that load on demand, with what they have in common: ``channels`` and the classes, in order.

    ``occurring`` are the classes in each, where that is known.
    """

    names: tuple[str, ...]
    channels: int
    classes: tuple[ClassName, ...]
    load: Callable[[int], Pair]
    occurring: tuple[frozenset[int], ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        positions = _positions(len(self), index)
        return self.load(positions) if isinstance(positions, int) else [self.load(i) for i in positions]

    def select(self, indices: Sequence[int]) -> Pictures:
        """The pairs at ``indices``, in that order."""
        chosen = tuple(indices)
        names = tuple(self.names[i] for i in chosen)
        occurring = None if self.occurring is None else tuple(self.occurring[i] for i in chosen)
        return Pictures(names, self.channels, self.classes, lambda i: self.load(chosen[i]), occurring)

    def present(self) -> tuple[frozenset[int], ...]:
        """The classes in each; where that is not known, they are loaded."""
        if self.occurring is not None:
            return self.occurring
        return tuple(frozenset(pair.labels.unique().tolist()) - {IGNORE_INDEX} for pair in self)

    def split(self, holdout: float, rng: np.random.Generator) -> tuple[Pictures, Pictures]:
        """(training, held out): a random share ``holdout`` of the pairs is held out, at least one and never all.

        A single picture is cut across its longer side instead, so that what is held out was still never trained on.
        """
        if len(self) == 1:
            return self._cut(holdout)
        learnt, held_out = _parted(len(self), holdout, rng)
        return self.select(learnt), self.select(held_out)

    def _cut(self, holdout: float) -> tuple[Pictures, Pictures]:
        pair = self[0]
        axis = 0 if pair.labels.shape[0] > pair.labels.shape[1] else 1
        length = pair.labels.shape[axis]
        if length < 2 * MIN_SIZE:
            raise DataError(f"{pair.name} is the only picture and too small to hold a part of it out: add a second one")
        at = min(max(round((1 - holdout) * length), MIN_SIZE), length - MIN_SIZE)
        parts = []
        for start, size in ((0, at), (at, length - at)):
            piece = Pair(pair.name, pair.image.narrow(axis + 1, start, size), pair.labels.narrow(axis, start, size))
            parts.append(Pictures(self.names, self.channels, self.classes, lambda _, piece=piece: piece))  # type: ignore[misc]
        return parts[0], parts[1]


@dataclass(frozen=True)
class Sample:
    """One picture and its mask at their own size, as decoded.

    Attributes:
        name: the image's file name.
        image: (C, H, W) with the numbers of the file: uint8, int32 of wider integers, float32.
        labels: (H, W), uint8: class indices, and 255 where the mask does not say (:attr:`Dataset.ignore_index`).
        cells: (H, W), int64: the number of the cell a pixel belongs to, 0 for none; None unless the masks number cells.
    """

    name: str
    image: Tensor
    labels: Tensor
    cells: Tensor | None = None


@dataclass(frozen=True)
class _Facts:
    """What the check of one pair found."""

    size: tuple[int, int]
    channels: int
    dtype: str
    low: float
    high: float
    digest: bytes
    what: str
    turned: bool  # the mask, as its image is, or the other way round
    found: Found
    counts: tuple[int, ...] = ()  # pixels of each class
    uncounted: int = 0


@dataclass(frozen=True)
class Dataset(Sequence[Sample]):
    """Pairs of pictures and masks, decoded when they are asked for, and what the check of all of them found.

    A map-style data set of PyTorch: a DataLoader takes it, also with workers. Items are as the files have them;
    :meth:`standardised` gives what networks like better.

    Attributes:
        names: the images' file names.
        channels: of every image; a grey one among images in colour is repeated.
        classes: the classes, in the order of their labels, with their colours where the masks have some.
        mask_values: what stands for each class in a mask: a number, or [red, green, blue].
        cells: whether the masks number cells; the classes are then background and cell.
        ignore_index: 255, the label of pixels that do not count.
        odd: one sentence for each thing that is worth a look.
    """

    pairs: tuple[tuple[Path, Path], ...]
    channels: int
    classes: tuple[ClassName, ...]
    mask_values: list[Any]
    cells: bool
    coding: Coding
    facts: tuple[_Facts, ...]
    oddities: tuple[str, ...] = ()
    ignore_index: int = IGNORE_INDEX

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(image.name for image, _ in self.pairs)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(len, K): how many pixels of each class each mask has."""
        return np.array([each.counts for each in self.facts], np.int64).reshape(len(self), len(self.classes))

    @property
    def value_range(self) -> tuple[float, float]:
        """The lowest and the highest number in the images."""
        return min(each.low for each in self.facts), max(each.high for each in self.facts)

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        positions = _positions(len(self), index)
        return self._load(positions) if isinstance(positions, int) else [self._load(i) for i in positions]

    def _load(self, index: int) -> Sample:
        image_path, mask_path = self.pairs[index]
        image, mask, _ = _upright(image_path, decode(image_path), mask_path, decode(mask_path))
        pixels = _channels(image_path, image)
        if pixels.shape[0] not in (1, self.channels):
            raise DataError(f"{image_path} has changed since it was checked: start again, and leave it alone")
        pixels = np.broadcast_to(pixels, (self.channels, *pixels.shape[1:]))
        numbers = self.coding.read(mask_path, mask) if self.cells else None
        labels = (numbers != 0).astype(np.uint8) if numbers is not None else self.coding.label(mask_path, mask)
        return Sample(
            image_path.name,
            torch.from_numpy(np.array(pixels, _stored_as(pixels.dtype), order="C")),
            torch.from_numpy(np.ascontiguousarray(labels)),
            None if numbers is None else torch.from_numpy(np.ascontiguousarray(numbers)),
        )

    def select(self, indices: Sequence[int]) -> Dataset:
        """The pairs at ``indices``, in that order."""
        chosen = list(indices)
        return replace(self, pairs=tuple(self.pairs[i] for i in chosen), facts=tuple(self.facts[i] for i in chosen))

    def split(self, holdout: float, rng: np.random.Generator) -> tuple[Dataset, Dataset]:
        """(training, held out): a random share ``holdout`` of the pairs is held out, at least one and never all.

        Raises:
            DataError: there is one pair only.
        """
        if len(self) == 1:
            raise DataError(f"{self.names[0]} is the only picture, and none is left to hold out: add a second one")
        learnt, held_out = _parted(len(self), holdout, rng)
        return self.select(learnt), self.select(held_out)

    def present(self) -> tuple[frozenset[int], ...]:
        """The classes in each mask."""
        return tuple(frozenset(np.flatnonzero(row).tolist()) for row in self.counts)

    def standardised(self) -> Pictures:
        """The same, every image with mean 0 and deviation 1 over the whole picture; what fits into 1 GiB is kept."""

        def load(index: int) -> Pair:
            sample = self[index]
            return Pair(sample.name, _standardised(sample.image.numpy()), sample.labels)

        return Pictures(self.names, self.channels, self.classes, _remembered(load), self.present())

    @property
    def odd(self) -> tuple[str, ...]:
        return (*self.oddities, *_oddities(self))

    def report(self) -> str:
        """A table for people: how many pictures, of which sizes and formats, the share of each class, what is odd."""
        return "\n".join(_report(self))


def _positions(length: int, index: int | slice) -> int | range:
    try:
        return range(length)[index]
    except IndexError:
        last = length - 1
        raise IndexError(f"expected an index up to {last}, got {index}; there are {length} pictures") from None


def _parted(length: int, holdout: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(the places that are learnt, those that are held out), each in order."""
    order = rng.permutation(length).tolist()
    count = min(max(round(holdout * length), 1), length - 1)
    return sorted(order[count:]), sorted(order[:count])


def unseen(learnt: Dataset | Pictures, held_out: Dataset | Pictures) -> list[str]:
    """The names of the classes that occur in pictures held out and in none that is learnt."""
    there, here = (set().union(*each.present()) for each in (held_out, learnt))
    return [learnt.classes[index].name for index in sorted(there - here)]


def random_crops(
    pictures: Pictures, size: int, batch: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches for training: images (batch, C, size, size) float32 and labels (batch, size, size) int64.

    Every picture is visited once before any is visited again. A crop is turned and mirrored at random (the eight
    symmetries of the square); pictures smaller than ``size`` are continued by reflection.
    """
    check_integer("size", size)
    check_integer("batch", batch)
    queue: list[int] = []
    while True:
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for _ in range(batch):
            queue = queue or rng.permutation(len(pictures)).tolist()
            pair = pictures[queue.pop()]
            rows, columns = (_window(length, size, rng) for length in pair.labels.shape)
            turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
            for source, crops in ((pair.image, images), (pair.labels, labels)):
                crop = source[..., rows[:, None], columns].rot90(turns, (-2, -1))
                crops.append(crop.flip(-1) if mirror else crop)
        yield torch.stack(images), torch.stack(labels).long()


def _window(length: int, size: int, rng: np.random.Generator) -> Tensor:
    """Indices of ``size`` neighbours on an axis, at a random place, reflected where they leave it."""
    slack = length - size
    start = int(rng.integers(abs(slack) + 1)) * (1 if slack >= 0 else -1)
    period = max(2 * (length - 1), 1)
    positions = torch.arange(start, start + size) % period
    return torch.where(positions < length, positions, period - positions)


def _remembered(load: Callable[[int], Pair], room: int = 1 << 30) -> Callable[[int], Pair]:
    """``load`` that keeps up to ``room`` bytes: a small set is read once, a large one does not fill the memory."""
    kept: dict[int, Pair] = {}

    def remembered(index: int) -> Pair:
        nonlocal room
        if index in kept:
            return kept[index]
        pair = load(index)
        size = pair.image.nbytes + pair.labels.nbytes
        if size <= room:
            room -= size
            kept[index] = pair
        return pair

    return remembered


def _standardised(image: Array) -> Tensor:
    """(C, H, W) numbers of any range as float32 with mean 0 and deviation 1; a constant picture becomes 0."""
    image = image.astype(np.float32)
    return torch.from_numpy((image - image.mean(dtype=np.float64)) / (image.std(dtype=np.float64) or 1.0)).float()


# ---- a user's folders --------------------------------------------------------------------------------------------


def open_dataset(
    images: str | Path,
    masks: str | Path | None = None,
    *,
    layout: str | None = None,
    table: str | Path | None = None,
    split: str | Path | None = None,
    ignore: Sequence[int | Colour] = (),
    options: tuple[str, str] = ("", ""),
) -> Dataset:
    """Find the pairs, decode and check every file, and say which values of the masks are classes.

    Images may be grey, in colour or of many bands, of 8, 16 or 32 bits or floating-point. Masks hold one value a class:
    grey values, palette indices or colours, which become 0 … K−1 in sorted order over the whole set, or by ``table``.
    Transparent pixels of a mask are 0, or black, or the lowest of a palette's transparent indices. Where a viewer would
    turn an image (EXIF), its mask is turned along if its size says that it is not yet.

    Args:
        images: the folder of the images; or, without ``masks``, one that holds VOC2012's folders, or a folder of images
            beside one of masks, or both kinds of files.
        masks: the folder of the masks; see :func:`find_pairs` for their names.
        layout: "folders"; "voc", VOC2012's folders, with its classes and 255 for what does not count; "msrc", MSRC-v2's
            colours: 21 classes and void, 0; "cells": a mask numbers its cells, and the classes are background and cell.
            None: "voc" where VOC2012's folders are, else "folders".
        table: a text file of the classes, see :func:`fastunet.layouts.read_table`.
        split: a text file that lists the pictures to take, in this order; or the name of a list of the layout, "train",
            "val", or a .txt file beside the images.
        ignore: values or colours of the masks that do not count, besides those of the layout and the table; where masks
            have a palette or a table, by any of their names.
        options: what ``images`` and ``masks`` are called in messages, for example ("--images", "--masks").

    Raises:
        DataError: a folder is missing or empty; a file has no or several partners, cannot be read whole, differs in
            size from its partner, is smaller than 16×16 or too large; images differ in their channels; the masks hold
            one value only, more than 64, blurred ones, or others than the table's.
    """
    images = Path(images)
    if layout is not None and layout not in LAYOUTS:
        raise DataError(f"layout {layout!r} is unknown: take one of {', '.join(LAYOUTS)}")
    voc = layout == "voc" or (layout is None and masks is None and is_voc(images))
    pairs: Pairs
    if voc:
        if masks is not None or not is_voc(images):
            raise DataError(
                f"{images} holds no JPEGImages and SegmentationClass: give VOC2012's folder that does, alone"
            )
        pairs = voc_pairs(images, split)
    else:
        found = (images, Path(masks)) if masks is not None else subfolders(images) or (images, images)
        pairs = find_pairs(*found, options)
        if split is not None:
            path = _list_of(split, found[0])
            pairs = chosen(pairs, listed(path), path)
    rows = read_table(Path(table)) if table is not None else VOC if voc else MSRC if layout == "msrc" else None
    source = str(table) if table is not None else "VOC2012's table" if voc else "MSRC-v2's table"
    return _checked(pairs, rows, source, tuple(ignore), layout == "cells")


def open_folders(images: str | Path, masks: str | Path) -> Pictures:
    """:func:`open_dataset` of two folders (they may be the same one), as :class:`Pictures`.

    Raises:
        DataError: as there.
    """
    return open_dataset(images, masks, options=("--images", "--masks")).standardised()


def _list_of(split: str | Path, images: Path) -> Path:
    """The text file that ``split`` names: a path, or a list beside the images."""
    inside = [folder / f"{split}.txt" for folder in (images, images.parent)]
    return next((path for path in inside if path.is_file()), Path(split))


def _checked(
    pairs: Pairs, rows: Sequence[Row] | None, source: str, ignore: tuple[int | Colour, ...], cells: bool
) -> Dataset:
    if cells and (rows is not None or ignore):
        raise DataError("cells are told by their numbers: leave out the table and what is to be ignored")
    shown = tqdm(pairs, desc="checking", unit="pair", delay=1.0, leave=False)
    facts = [_looked_at(image, mask, cells) for image, mask in shown]
    channels = _common_channels(pairs, facts)
    masks, found = [mask for _, mask in pairs], [each.found for each in facts]
    coded = code_cells(masks, found) if cells else code_masks(masks, found, rows, ignore, source)
    amounts = [coded.coding.count(each) for each in found]
    counted = tuple(
        replace(
            each,
            counts=tuple(amount.get(label, 0) for label in range(len(coded.names))),
            uncounted=amount.get(IGNORE_INDEX, 0),
        )
        for each, amount in zip(facts, amounts, strict=True)
    )
    return Dataset(
        tuple(pairs),
        channels,
        tuple(map(ClassName, coded.names, map(_drawn, coded.colours))),
        [list(value) if isinstance(value, tuple) else value for value in coded.mask_values],
        cells,
        coded.coding,
        counted,
        coded.odd,
    )


def _drawn(colour: Colour | None) -> Colour | None:
    """A colour of up to 16 bits in the 8 of pictures."""
    if colour is None or max(colour) < 256:
        return colour
    return colour[0] >> 8, colour[1] >> 8, colour[2] >> 8


def _looked_at(image_path: Path, mask_path: Path, cells: bool) -> _Facts:
    """Decode and check one pair."""
    image, mask, turned = _upright(image_path, decode(image_path), mask_path, decode(mask_path))
    pixels = _channels(image_path, image)
    found = found_in(mask_path, mask, cells)
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
    low, high = float(pixels.min()), float(pixels.max())
    return _Facts(image.size, len(pixels), str(pixels.dtype), low, high, digest, image.what, turned, found)


def _upright(image_path: Path, image: Decoded, mask_path: Path, mask: Decoded) -> tuple[Decoded, Decoded, bool]:
    """Both as viewers show them, and whether one had to be turned along with the other; their sizes are checked."""
    along = False
    if image.orientation == mask.orientation:
        image, mask = image.turned(image.orientation), mask.turned(mask.orientation)
    elif 1 in (image.orientation, mask.orientation):
        (path, tagged), (other_path, other) = (image_path, image), (mask_path, mask)
        if image.orientation == 1:
            (path, tagged), (other_path, other) = (other_path, other), (path, tagged)
        shown = tagged.turned(tagged.orientation)
        if other.size in (shown.size, tagged.size) and shown.size == tagged.size:
            raise DataError(
                f"{path} is turned or mirrored where it is shown, EXIF orientation {tagged.orientation}, and whether "
                f"{other_path} already is cannot be seen: save both as they are shown"
            )
        along = other.size == tagged.size
        other = other.turned(tagged.orientation) if along else other
        image, mask = (other, shown) if image.orientation == 1 else (shown, other)
    else:
        raise DataError(
            f"{image_path} and its mask {mask_path} are turned in two ways, EXIF orientations {image.orientation} and "
            f"{mask.orientation}: save both as they are shown"
        )
    if image.size != mask.size:
        sizes = [f"{width}×{height}" for width, height in (image.size, mask.size)]
        raise DataError(f"{image_path} is {sizes[0]} but its mask {mask_path} is {sizes[1]}: bring both to one size")
    if min(image.size) < MIN_SIZE:
        width, height = image.size
        raise DataError(f"{image_path} is {width}×{height}, smaller than {MIN_SIZE}×{MIN_SIZE}: take it away")
    return image, mask, along


def _channels(path: Path, image: Decoded) -> Array:
    """(C, H, W): one channel if the picture is grey, whatever its mode; a palette's colours."""
    pixels = image.pixels
    check_numbers(path, pixels)
    if image.palette is not None:
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(image.palette)] = image.palette[:256]
        pixels = palette[pixels]
    if pixels.ndim == 2:
        return pixels[None]
    if image.colours != "bands" and not (pixels != pixels[..., :1]).any():
        pixels = pixels[..., :1]
    channels: Array = pixels.transpose(2, 0, 1)
    return channels


def read_image(path: Path) -> Array:
    """The pixels (C, H, W) of one picture, upright, with the numbers of the file.

    Raises:
        DataError: as :func:`fastunet.decode.decode`; NaN or infinite pixels.
    """
    image = decode(path)
    return _channels(path, image.turned(image.orientation))


def _stored_as(dtype: np.dtype[Any]) -> npt.DTypeLike:
    """The dtype of PyTorch's that holds such pixels and that everything there computes with."""
    if dtype.kind == "f":
        return np.float64 if dtype.itemsize > 4 else np.float32
    if dtype.itemsize == 1:
        return np.int16 if dtype.kind == "i" else np.uint8
    return np.int64 if dtype.itemsize > 4 or dtype == np.uint32 else np.int32


def _common_channels(pairs: Pairs, facts: Sequence[_Facts]) -> int:
    """The channels of all images: grey ones are repeated, anything else has to agree."""
    several = [(image, each.channels) for (image, _), each in zip(pairs, facts, strict=True) if each.channels > 1]
    for image, channels in several:
        if channels != several[0][1]:
            raise DataError(
                f"{image} has {channels} channels but {several[0][0]} has {several[0][1]}: bring all to one number"
            )
    return several[0][1] if several else 1


# ---- what was found ----------------------------------------------------------------------------------------------


def _oddities(data: Dataset) -> Iterator[str]:
    """What is worth a look in a data set, one sentence each."""
    names, counts = data.names, data.counts
    hidden: dict[str, list[str]] = {}
    for name, each in zip(names, data.facts, strict=True):
        if each.found.hidden is not None:
            taken = "black" if data.coding.kind == "colours" else "value 0"
            if each.found.mode == "palette" and data.coding.kind == "values":
                taken = f"index {each.found.hidden}"
            hidden.setdefault(taken, []).append(name)
    for taken, several in hidden.items():
        yield f"{_some(several)}: the mask has transparent pixels, taken for {taken}"
    turned = [name for name, each in zip(names, data.facts, strict=True) if each.turned]
    if turned:
        yield f"{_some(turned)}: of image and mask one is turned where it is shown (EXIF); the other was turned along"
    by_depth = Counter(each.dtype for each in data.facts)
    if len(by_depth) > 1:
        yield "images of different depths: " + ", ".join(f"{n} of {kind}" for kind, n in by_depth.most_common())
    grey = [name for name, each in zip(names, data.facts, strict=True) if each.channels < data.channels]
    if grey:
        yield f"{_some(grey)}: grey, among images of {data.channels} channels"
    flat = [name for name, each in zip(names, data.facts, strict=True) if each.low == each.high]
    if flat:
        yield f"{_some(flat)}: every pixel is the same"
    first: dict[bytes, str] = {}
    for name, each in zip(names, data.facts, strict=True):
        if each.digest in first and name not in flat:
            yield f"{name}: the same picture as {first[each.digest]}"
        first.setdefault(each.digest, name)
    for index, of_class in enumerate(data.classes):
        there = int((counts[:, index] > 0).sum())
        share = counts[:, index].sum() / max(counts.sum(), 1)
        if there == 0:
            yield f"class {of_class.name}: in no mask"
        elif there == 1 and len(data) > 1:
            yield f"class {of_class.name}: in one mask only, {names[int(counts[:, index].argmax())]}"
        elif share < 1e-3:
            yield f"class {of_class.name}: {share:.2%} of the pixels"
    empty = [name for name, row in zip(names, counts, strict=True) if (row > 0).sum() == 0]
    if empty:
        yield f"{_some(empty)}: no pixel of the mask counts"


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _report(data: Dataset) -> Iterator[str]:
    """The lines of :meth:`Dataset.report`."""
    kinds = {1: "grey", 3: "in colour"}
    low, high = data.value_range
    kind = kinds.get(data.channels, f"of {data.channels} channels")
    yield f"images   {len(data)} {kind}, {_tallied(each.what for each in data.facts)}; numbers {low:g} to {high:g}"
    sizes = Counter(each.size for each in data.facts)
    if len(sizes) == 1:
        yield "sizes    {}×{}".format(*next(iter(sizes)))
    else:
        areas = sorted(sizes, key=lambda size: (math.prod(size), size))
        yield "sizes    {} different, {}×{} to {}×{}".format(len(sizes), *areas[0], *areas[-1])
    yield f"masks    {_tallied(each.found.what for each in data.facts)}"
    counts = data.counts
    total = max(int(counts.sum()), 1)
    shown = ["{},{},{}".format(*v) if isinstance(v, list) else str(v) for v in data.mask_values]
    rows = [
        (
            f"{index} ({of_class.name})",
            shown[index],
            str(int((of > 0).sum())),
            f"{int(of.sum()):,}",
            f"{of.sum() / total:.2%}",
        )
        for index, (of_class, of) in enumerate(zip(data.classes, counts.T, strict=True))
    ]
    uncounted = [each.uncounted for each in data.facts]
    if any(uncounted):
        rows.append(("do not count", "", str(sum(n > 0 for n in uncounted)), f"{sum(uncounted):,}", ""))
    heading = ("class", "in masks", "pictures", "pixels", "share")
    widths = [max(len(row[i]) for row in (heading, *rows)) for i in range(5)]
    for row in (heading, *rows):
        cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join((row[0].ljust(widths[0]), *cells)).rstrip()
    for odd in data.odd:
        yield f"odd      {odd}"


def _tallied(kinds: Iterable[str]) -> str:
    return ", ".join(kind for kind, _ in Counter(kinds).most_common())


# ---- a generated set ---------------------------------------------------------------------------------------------


def generated(count: int = 12, size: int = 384, seed: int = 0) -> Pictures:
    """``count`` microscopy-like pictures of cells, size × size, the same for the same arguments.

    Three classes: membrane, cytoplasm, nucleus. Grey values alone do not tell them apart: nuclear envelopes and
    vesicles are as dark as membranes, light is uneven and the camera noisy.
    """
    check_integer("count", count)
    check_integer("size", size, MIN_SIZE)
    check_integer("seed", seed, 0)

    def load(index: int) -> Pair:
        image, labels = draw_cells(np.random.default_rng([seed, index]), size)
        return Pair(names[index], _standardised(image[None]), torch.from_numpy(labels))

    names = tuple(f"generated {index + 1}" for index in range(count))
    classes = tuple(map(ClassName, ("membrane", "cytoplasm", "nucleus")))
    return Pictures(names, 1, classes, _remembered(load))
