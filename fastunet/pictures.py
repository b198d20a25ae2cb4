"""The demo's picture (image | truth | prediction | error), and pictures that are written whole or not at all."""

from __future__ import annotations

import colorsys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastunet.data import IGNORE_INDEX, ClassName, Colour
from fastunet.errors import UserError
from fastunet.files import written_whole

Pixels = npt.NDArray[np.uint8]

_COLOURS: tuple[Colour, ...] = (
    (38, 41, 56), (240, 228, 205), (0, 142, 140), (232, 128, 60), (108, 129, 201),
    (226, 110, 160), (126, 178, 66), (245, 197, 66), (150, 110, 80), (140, 205, 230),
)  # fmt: skip
_WRONG: Colour = (226, 40, 56)
_UNCOUNTED: Colour = (205, 207, 212)
_PAPER, _INK, _QUIET = (255, 255, 255), (28, 30, 38), (110, 114, 126)
_SIDE = 400  # a panel's longer side
_MARGIN, _GAP = 28, 16


def class_colours(classes: Sequence[ClassName]) -> list[Colour]:
    """The colour each class is drawn in: its own in the masks if all have one, else one of a fixed series."""
    own = [c.colour for c in classes if c.colour is not None]
    if len(own) == len(classes):
        return own
    return [_COLOURS[i] if i < len(_COLOURS) else _hue(i) for i in range(len(classes))]


def _hue(index: int) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618 % 1.0, 0.45 + 0.2 * (index % 3), 0.9 - 0.15 * (index % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def figure(
    image: Tensor,
    truth: Tensor,
    prediction: Tensor,
    classes: Sequence[ClassName],
    *,
    title: str,
    subtitle: str,
    legend: Sequence[str],
) -> Image.Image:
    """Four titled panels side by side, the colours of the classes below.

    Args:
        image: (C, H, W) of any range; it is stretched to black … white.
        truth, prediction: (H, W) class indices; 255 in the truth does not count.
        legend: one text per class.
    """
    grey = _stretched(image)
    colours = class_colours(classes)
    table = np.full((256, 3), _UNCOUNTED, np.uint8)
    table[: len(colours)] = colours
    wrong = ((truth != prediction) & (truth != IGNORE_INDEX)).numpy()
    faded = (0.45 * grey.mean(-1, keepdims=True) + 0.55 * 255).astype(np.uint8)  # grey, so that red stands out
    panels = {
        "image": grey,
        "truth": table[truth.numpy()],
        "prediction": table[prediction.numpy()],
        f"error: {wrong.mean():.1%} of the pixels": np.where(wrong[..., None], np.array(_WRONG, np.uint8), faded),
    }
    height, width = wrong.shape
    scale = _SIDE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    step = max(size[0], 220) + _GAP  # captions need room even over a narrow picture

    total = 2 * _MARGIN + 4 * step - _GAP
    swatches = _rows(legend, total - 2 * _MARGIN)
    top = _MARGIN + 74
    sheet = Image.new("RGB", (total, top + 26 + size[1] + 20 + 26 * len(swatches) + _MARGIN - 8), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title, _INK, _font(24))
    draw.text((_MARGIN, _MARGIN + 30), subtitle, _QUIET, _font(16))
    for column, (caption, pixels) in enumerate(panels.items()):
        left = _MARGIN + column * step
        draw.text((left, top), caption, _INK, _font(17))
        enlarge = scale >= 1 or column in (1, 2)  # labels have no values in between
        method = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(pixels).resize(size, method), (left, top + 26))
        draw.rectangle((left - 1, top + 25, left + size[0], top + 26 + size[1]), outline=(205, 207, 212))
    for row, entries in enumerate(swatches):
        y = top + 26 + size[1] + 20 + 26 * row
        for index, x in entries:
            draw.rectangle((_MARGIN + x, y, _MARGIN + x + 16, y + 16), colours[index], outline=(150, 152, 160))
            draw.text((_MARGIN + x + 24, y - 2), legend[index], _INK, _font(16))
    return sheet


def _rows(texts: Sequence[str], width: int) -> list[list[tuple[int, int]]]:
    """Lay texts with their swatches out in rows of at most ``width`` pixels: (index, x) in each row."""
    rows: list[list[tuple[int, int]]] = [[]]
    x = 0
    for index, text in enumerate(texts):
        needed = round(_font(16).getlength(text)) + 56
        if rows[-1] and x + needed > width:
            rows.append([])
            x = 0
        rows[-1].append((index, x))
        x += needed
    return rows


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _stretched(image: Tensor) -> Pixels:
    """(H, W, 3) 8-bit pixels of the first channels; all but the darkest and brightest 0.5 % keep their contrast."""
    pixels = image[: 3 if len(image) >= 3 else 1].numpy().transpose(1, 2, 0)
    low, high = np.percentile(pixels, (0.5, 99.5))
    grey = np.clip((pixels - low) * (255 / ((high - low) or 1.0)), 0, 255).astype(np.uint8)
    return np.broadcast_to(grey, (*grey.shape[:2], 3))


def check_writable(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that a picture can be written to ``path``, by creating and removing a file beside it.

    Raises:
        UserError: the suffix is not one Pillow writes, the folder is missing or not writable, or it is one of the
            ``inputs``, where the next run would find a picture without a mask; one sentence.
    """
    Image.init()
    suffix = path.suffix.lower()
    if Image.EXTENSION.get(suffix) not in Image.SAVE or path.is_dir():
        raise UserError(f"--output {path} is not the name of a picture: give one that ends in .png")
    if path.parent.resolve() in [folder.resolve() for folder in inputs]:
        raise UserError(f"--output {path} would lie among the pictures that are read: name another folder")
    if not path.parent.is_dir():
        raise UserError(f"--output {path} cannot be written: {path.parent} is not a folder, create it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): choose another folder") from error


def save(picture: Image.Image, path: Path) -> None:
    """Write ``picture`` to ``path`` in one move: a reader, or a crash, never sees half a file.

    Raises:
        UserError: the file cannot be written, for instance because the disk is full; ``path`` is as it was.
    """
    try:
        with written_whole(path) as file:
            picture.save(file, Image.registered_extensions()[path.suffix.lower()])
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another --output") from error
