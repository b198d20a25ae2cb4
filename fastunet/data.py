"""Pictures and their masks: find the pairs, check every file, say which values are classes, cut training crops.

:func:`open_folders` reads a user's folders, :func:`generated` draws a microscopy-like set from a seed. Both give
:class:`Pictures`, a sequence of :class:`Pair` that loads on demand. What a user got wrong is a :class:`DataError`, one
sentence that names the file and the fix, raised before anything is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from fastunet.checks import check_integer
from fastunet.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm", ".ppm")
MASK_ENDINGS = ("_mask", "_gt")  # what a mask's name may add to the stem of its image, in any case
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "GIF", "WEBP", "PPM")  # what these suffixes stand for
MAX_PIXELS = 1 << 26  # of a picture: decoded 200 MB in colour, 800 MB in float32
MAX_CLASSES = 64
MIN_SIZE = 16  # the U-Net halves four times

Array = npt.NDArray[Any]
Colour = tuple[int, int, int]


class DataError(UserError):
    """The pictures cannot be used as they are; the message is one sentence with the file and the fix."""


@dataclass(frozen=True)
class ClassName:
    """What a class index stands for in the masks: a name, and the colour it has there if the masks are in colour."""

    name: str
    colour: Colour | None = None


@dataclass(frozen=True)
class Pair:
    """An image (C, H, W), float32 with mean 0 and deviation 1 over the whole picture, and its labels (H, W), uint8."""

    name: str
    image: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pictures(Sequence[Pair]):
    """Pairs that load on demand, with what they have in common: ``channels`` (1 or 3) and the classes, in order."""

    names: tuple[str, ...]
    channels: int
    classes: tuple[ClassName, ...]
    load: Callable[[int], Pair]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        try:
            positions = range(len(self))[index]
        except IndexError:
            last = len(self) - 1
            raise IndexError(f"expected an index up to {last}, got {index}; there are {last + 1} pictures") from None
        return self.load(positions) if isinstance(positions, int) else [self.load(i) for i in positions]

    def select(self, indices: Sequence[int]) -> Pictures:
        """The pairs at ``indices``, in that order."""
        chosen = tuple(indices)
        names = tuple(self.names[i] for i in chosen)
        return Pictures(names, self.channels, self.classes, lambda i: self.load(chosen[i]))

    def split(self, holdout: float, rng: np.random.Generator) -> tuple[Pictures, Pictures]:
        """(training, held out): a random share ``holdout`` of the pairs is held out, at least one and never all.

        A single picture is cut across its longer side instead, so that what is held out was still never trained on.
        """
        if len(self) == 1:
            return self._cut(holdout)
        order = rng.permutation(len(self)).tolist()
        count = min(max(round(holdout * len(self)), 1), len(self) - 1)
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

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


def open_folders(images: str | Path, masks: str | Path) -> Pictures:
    """Pair the pictures of two folders (they may be the same one) and check every file.

    The mask of ``a.png`` is called ``a``, ``a_mask`` or ``a_GT`` with any picture suffix. Images may be grey or in
    colour, 8 or 16 bit. Masks hold one value per class: grey values, palette indices or RGB colours, which are mapped
    to 0 … K−1 in sorted order over the whole set.

    Raises:
        DataError: a folder is missing or empty, a file has no or several partners, cannot be read, differs in size
            from its partner, is smaller than 16×16 or larger than 8192×8192, or the masks hold one value only or more
            than 64.
    """
    images, masks = Path(images), Path(masks)
    pairs = find_pairs(images, masks)
    in_colour = any_colour = False
    palettes: set[bytes | None] = set()
    for image_path, mask_path in tqdm(pairs, desc="checking", unit="pair", delay=1.0, leave=False):
        image, mask = _read_image(image_path), _open(mask_path)
        _check_size(image_path, (image.shape[2], image.shape[1]), mask_path, mask.size)
        any_colour |= image.shape[0] == 3
        palettes.add(bytes(mask.getpalette() or ()) if mask.mode == "P" else None)
        in_colour |= mask.mode == "RGB" and _has_colour(np.asarray(mask))
    # Palette indices mean the same class in two files only if their palettes agree.
    in_colour |= len(palettes) > 1
    values = _class_values([mask for _, mask in pairs], in_colour)
    channels = 3 if any_colour else 1

    def load(index: int) -> Pair:
        image_path, mask_path = pairs[index]
        image = _read_image(image_path)
        codes = _read_mask(mask_path, in_colour)
        labels = torch.from_numpy(np.searchsorted(values, codes).astype(np.uint8))
        return Pair(image_path.name, _standardised(np.broadcast_to(image, (channels, *codes.shape))), labels)

    names = tuple(image.name for image, _ in pairs)
    return Pictures(names, channels, tuple(_class_name(int(v), in_colour) for v in values), _remembered(load))


def find_pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """(image, mask) paths in the order of the images' names; see :func:`open_folders` for the rule and the errors."""
    image_files, mask_files = _pictures_in(images, "--images"), _pictures_in(masks, "--masks")
    if images.resolve() == masks.resolve():
        mask_files = [path for path in mask_files if _without_ending(path.stem) is not None]
        image_files = [path for path in image_files if path not in mask_files]
        if not image_files or not mask_files:
            raise DataError(
                f"{images} holds images or masks but not both: call the mask of a.png a_mask.png or a_GT.png"
            )
    by_stem: dict[str, Path] = {}
    for image in image_files:
        if image.stem in by_stem:
            raise DataError(f"{by_stem[image.stem]} and {image.name} would share a mask by their name: rename one")
        by_stem[image.stem] = image
    candidates: dict[str, list[Path]] = {}
    for mask in mask_files:
        # a_mask.png is the mask of a.png, or of a_mask.png if there is such an image
        shorter = _without_ending(mask.stem)
        stem = mask.stem if mask.stem in by_stem or shorter is None else shorter
        candidates.setdefault(stem, []).append(mask)
    pairs = []
    for image in image_files:
        found = candidates.pop(image.stem, [])
        if not found:
            raise DataError(
                f"{image} has no mask in {masks}: expected {image.stem}, {image.stem}_mask or {image.stem}_GT with a "
                "picture suffix; add it or take the image away"
            )
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise DataError(f"{image} has several masks in {masks}, {names}: keep one of them")
        pairs.append((image, found[0]))
    for mask, *_ in candidates.values():
        raise DataError(f"mask {mask} has no image in {images}: add the image or take the mask away")
    return pairs


def _without_ending(stem: str) -> str | None:
    """The stem without ``_mask`` or ``_GT``; None if it has neither."""
    return next(
        (stem[: -len(end)] for end in MASK_ENDINGS if stem.lower().endswith(end) and len(stem) > len(end)), None
    )


def _pictures_in(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{option} {folder} {problem}: give the folder that holds the pictures")
    try:
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())
    except OSError as error:
        raise DataError(f"{option} {folder} cannot be listed ({error.strerror}): check its permissions") from error
    if not found:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise DataError(f"{option} {folder} holds no pictures: expected files of type {kinds} in the folder itself")
    return found


def _check_size(image: Path, image_size: tuple[int, int], mask: Path, mask_size: tuple[int, int]) -> None:
    if image_size != mask_size:
        sizes = [f"{width}×{height}" for width, height in (image_size, mask_size)]
        raise DataError(f"{image} is {sizes[0]} but its mask {mask} is {sizes[1]}: bring both to one size")
    if min(image_size) < MIN_SIZE:
        raise DataError(f"{image} is {image_size[0]}×{image_size[1]}, smaller than {MIN_SIZE}×{MIN_SIZE}: take it away")


_NUMBER_MODES = ("I", "F", "I;16", "I;16L", "I;16B")
_GREY_MODES = ("1", "L", "LA", *_NUMBER_MODES)


def _open(path: Path) -> Image.Image:
    """The decoded picture, upright as viewers show it, in a grey mode, with a palette ("P") or as "RGB"."""
    try:
        # Pillow goes by the content, whatever the name says: without the list it starts Ghostscript for an EPS file.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the header is judged below
            file = Image.open(path, formats=_FORMATS)
        with file:
            too_large = file.width * file.height > MAX_PIXELS
            if not too_large:
                pages = getattr(file, "n_frames", 1)
                file.load()
                picture = ImageOps.exif_transpose(file)
                if picture.mode not in ("P", *_GREY_MODES):
                    picture = picture.convert("RGB")
    except Image.DecompressionBombError:
        too_large = True
    except Exception as error:  # decoders of damaged files raise whatever they stumble on
        reason = (error.strerror if isinstance(error, OSError) else None) or "damaged, or not a picture"
        raise DataError(f"cannot read {path} ({reason}): replace it, or take it and its partner away") from error
    if too_large:
        raise DataError(f"{path} has more than {MAX_PIXELS:,} pixels by its header: cut it into smaller pictures")
    if pages > 1:
        raise DataError(f"{path} holds {pages} pictures: save each one as a file of its own")
    return picture


def _has_colour(pixels: Array) -> bool:
    """Whether red, green and blue of (H, W, 3) pixels differ anywhere."""
    return bool((pixels != pixels[..., :1]).any())


def _numbers(picture: Image.Image, path: Path) -> Array:
    """The pixels (H, W) of a picture in a grey mode; 0 and 255 in a black and white one."""
    pixels = np.asarray(picture.convert("L") if picture.mode in ("1", "LA") else picture)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise DataError(f"{path} holds NaN or infinite pixels: replace them")
    return pixels


def _read_image(path: Path) -> Array:
    """(1, H, W) if the picture is grey, whatever its mode, else (3, H, W)."""
    picture = _open(path)
    if picture.mode in _GREY_MODES:
        return _numbers(picture, path)[None]
    pixels = np.asarray(picture.convert("RGB"))
    channels: Array = (pixels if _has_colour(pixels) else pixels[..., :1]).transpose(2, 0, 1)
    return channels


def _read_mask(path: Path, in_colour: bool) -> npt.NDArray[np.int64]:
    """(H, W) class codes: RGB colours as 0xRRGGBB if ``in_colour``, else grey values or palette indices."""
    picture = _open(path)
    if in_colour:
        if picture.mode in _NUMBER_MODES:
            raise DataError(f"mask {path} holds wide numbers while other masks hold colours: save all in one way")
        red, green, blue = np.asarray(picture.convert("RGB")).astype(np.int64).transpose(2, 0, 1)
        colours: npt.NDArray[np.int64] = red << 16 | green << 8 | blue
        return colours
    if picture.mode == "RGB":
        picture = picture.getchannel(0)
    pixels = np.asarray(picture) if picture.mode == "P" else _numbers(picture, path)
    codes = pixels.astype(np.int64)
    if not (codes == pixels).all():
        raise DataError(f"mask {path} holds fractions: expected one whole number per class")
    return codes


def _class_values(masks: Sequence[Path], in_colour: bool) -> npt.NDArray[np.int64]:
    """The sorted class codes of all masks."""
    values = np.empty(0, np.int64)
    for path in tqdm(masks, desc="reading masks", unit="mask", delay=1.0, leave=False):
        found = np.unique(_read_mask(path, in_colour))
        if len(found) > 2 and path.suffix.lower() in (".jpg", ".jpeg"):
            raise DataError(
                f"mask {path} is a JPEG, which blurs the {len(found)} class values in it: save masks as PNG"
            )
        values = np.union1d(values, found)
        if len(values) > MAX_CLASSES:
            raise DataError(
                f"the masks hold more than {MAX_CLASSES} different values (counted up to {path}): expected one value "
                "per class, not numbered objects or soft edges"
            )
    if len(values) == 1:
        name = _class_name(int(values[0]), in_colour).name
        raise DataError(f"all masks hold only {name}: segmentation needs at least two classes, check --masks")
    return values


def _class_name(code: int, in_colour: bool) -> ClassName:
    if not in_colour:
        return ClassName(f"value {code}")
    colour = (code >> 16, code >> 8 & 255, code & 255)
    return ClassName("colour {},{},{}".format(*colour), colour)


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
        image, labels = _draw_cells(np.random.default_rng([seed, index]), size)
        return Pair(names[index], _standardised(image[None]), torch.from_numpy(labels))

    names = tuple(f"generated {index + 1}" for index in range(count))
    classes = tuple(map(ClassName, ("membrane", "cytoplasm", "nucleus")))
    return Pictures(names, 1, classes, _remembered(load))


def _blur(image: Array, radius: float) -> Array:
    """Gaussian blur with deviation ``radius`` pixels, periodic."""
    rows, columns = np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])
    transfer = np.exp(-2 * (np.pi * radius) ** 2 * (rows**2 + columns**2))
    return np.fft.irfft2(np.fft.rfft2(image) * transfer, image.shape)


def _noise(rng: np.random.Generator, size: int, radius: float) -> Array:
    """A smooth random field (size, size) with mean 0, deviation 1 and details of ``radius`` pixels."""
    field = _blur(rng.standard_normal((size, size)), radius)
    unit: Array = (field - field.mean()) / field.std()
    return unit


def _draw_cells(rng: np.random.Generator, size: int) -> tuple[Array, npt.NDArray[np.uint8]]:
    """One picture: grey values 0 … 255 and labels, both (size, size)."""
    pitch = 46.0
    lattice = np.arange(-pitch, size + 2 * pitch, pitch)
    centres = np.stack(np.meshgrid(lattice, lattice, indexing="ij"), -1).reshape(-1, 2)
    centres = centres + rng.uniform(-0.42, 0.42, centres.shape) * pitch
    centres = centres[rng.random(len(centres)) > 0.15]
    weight = rng.uniform(0, 9, len(centres))

    # Cells are the regions nearest to a centre, in space bent by smooth fields; membranes run where two are as near.
    rows, columns = np.mgrid[:size, :size] + np.stack([7 * _noise(rng, size, 14), 7 * _noise(rng, size, 14)])
    nearest, second = np.full((2, size, size), np.inf)
    owner = np.zeros((size, size), np.intp)
    for index, (row, column) in enumerate(centres):
        distance = np.hypot(rows - row, columns - column) - weight[index]
        owner = np.where(distance < nearest, index, owner)
        second = np.minimum(second, np.maximum(distance, nearest))
        nearest = np.minimum(nearest, distance)
    gap = second - nearest
    membrane = gap < 4.2 + 1.1 * _noise(rng, size, 20)

    # A nucleus sits near the centre of most cells.
    radius = np.where(rng.random(len(centres)) < 0.75, rng.uniform(8, 13, len(centres)), 0.0)
    middle = centres + rng.uniform(-5, 5, centres.shape)
    stretch = rng.uniform(0.8, 1.25, len(centres))
    from_middle = np.hypot((rows - middle[owner, 0]) * stretch[owner], (columns - middle[owner, 1]) / stretch[owner])
    depth = np.where(radius[owner] > 0, radius[owner] - from_middle, -99.0)
    depth = np.minimum(depth, (gap - 13) / 2)  # the envelope keeps clear of the membrane
    nucleus = (depth > 0) & ~membrane

    grey = 0.70 + 0.06 * rng.standard_normal(len(centres))[owner] + 0.05 * _noise(rng, size, 1.6)
    vesicle = _noise(rng, size, 2.2) > 2.15
    grey = np.where(vesicle, 0.34, grey)
    grey = np.where(nucleus, 0.60 + 0.09 * _noise(rng, size, 2.5), grey)
    grey = np.where(np.abs(depth) < 1.1, 0.36, grey)
    grey = np.where(membrane, 0.30 + 0.06 * _noise(rng, size, 3.0), grey)
    light = 1.0 + 0.13 * _noise(rng, size, size / 6)
    grey = _blur(grey, 0.9) * light + 0.065 * rng.standard_normal((size, size))
    labels = np.where(membrane, 0, np.where(nucleus, 2, 1)).astype(np.uint8)
    return np.clip(255 * grey, 0, 255).round(), labels
