"""From what masks hold (grey values, palette indices, colours) to class labels, over a whole set of masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastunet.decode import DataError, Decoded
from fastunet.layouts import Colour, Row

MAX_CLASSES = 64  # that are taken without a table
IGNORE_INDEX = 255  # the label of pixels that do not count

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.int64]

_BITS = 16  # of red, green and blue in the code of a colour


@dataclass(frozen=True)
class Found:
    """The different pixels of one mask: ``{code: how many}``.

    ``mode`` is "grey", "palette" (codes are indices, ``colours`` what the palette shows for them) or "rgb" (codes are
    colours); ``hidden`` is the code that transparent pixels are taken for, None where there are none.
    """

    mode: str
    counts: Mapping[int, int]
    colours: Mapping[int, int]
    wide: bool
    hidden: int | None
    what: str


@dataclass(frozen=True)
class Coding:
    """What a set's masks are read as, and the label of each code that occurs.

    ``kind`` is "values" (grey values; of a palette the indices), "greys" (of a palette the grey values that it shows)
    or "colours". Where codes are ``numbered`` objects, all but 0 are class 1.
    """

    kind: str
    codes: Codes
    labels: npt.NDArray[np.uint8]
    numbered: bool = False

    def label(self, path: Path, mask: Decoded) -> npt.NDArray[np.uint8]:
        """(H, W) labels of a decoded mask."""
        reader = _Reader(path, mask)
        labels = np.empty(mask.pixels.shape[:2], np.uint8)
        for rows in _blocks(mask):
            codes = self._coded(reader, rows)
            if self.numbered:
                labels[rows] = codes != 0
                continue
            places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
            if not (self.codes[places] == codes).all():
                raise DataError(
                    f"mask {path} has other values than when it was checked: start again, and leave it alone"
                )
            labels[rows] = self.labels[places]
        return labels

    def count(self, found: Found) -> dict[int, int]:
        """How many pixels of a mask have each label."""
        counted: dict[int, int] = {}
        for code, amount in _counted(found, self.kind).items():
            label = int(code != 0) if self.numbered else int(self.labels[np.searchsorted(self.codes, code)])
            counted[label] = counted.get(label, 0) + amount
        return counted

    def read(self, path: Path, mask: Decoded) -> Codes:
        """(H, W) codes of a decoded mask."""
        return self._coded(_Reader(path, mask), slice(None))

    def _coded(self, reader: _Reader, rows: slice) -> Codes:
        codes, mode = reader.codes(rows), reader.mode
        if mode == "palette" and self.kind != "values":
            codes = reader.colours[codes]
            mode = "rgb"
        if mode == "rgb" and self.kind != "colours":
            return codes & ((1 << _BITS) - 1)
        return codes * _GREY if mode == "grey" and self.kind == "colours" else codes


_GREY = 1 | 1 << _BITS | 1 << 2 * _BITS  # times a grey value: its colour


def code_of(colour: Colour) -> int:
    return colour[0] << 2 * _BITS | colour[1] << _BITS | colour[2]


def colour_of(code: int) -> Colour:
    most = (1 << _BITS) - 1
    return code >> 2 * _BITS & most, code >> _BITS & most, code & most


class _Reader:
    """The codes of a mask's pixels; mode and colours as in :class:`Found`, but of all 256 indices."""

    def __init__(self, path: Path, mask: Decoded):
        self.path, self.mask = path, mask
        pixels = mask.pixels
        self.mode = mask.colours
        self.hidden = 0  # the code of transparent pixels
        self.colours = np.zeros(256, np.int64)
        if mask.palette is not None:
            red, green, blue = mask.palette[:256].astype(np.int64).T
            self.colours[: len(red)] = red << 2 * _BITS | green << _BITS | blue
            if mask.opaque is not None:
                self.hidden = int(pixels[~mask.opaque].min())
                self.colours[self.hidden] = 0
        wide = pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2
        if pixels.ndim == 3 and (mask.colours != "rgb" or wide):
            raise DataError(
                f"mask {path} holds {pixels.shape[2]} channels of {pixels.dtype}: expected one value, or one colour, a "
                "pixel"
            )

    def codes(self, rows: slice) -> Codes:
        pixels = self.mask.pixels[rows]
        if pixels.dtype.kind == "f":
            if not np.isfinite(pixels).all():
                raise DataError(f"{self.path} holds NaN or infinite pixels: replace them")
            if not (pixels == np.trunc(pixels)).all():
                raise DataError(f"mask {self.path} holds fractions: expected one whole number per class")
        if pixels.ndim == 2:
            codes = pixels.astype(np.int64)
        else:
            red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
            codes = red << 2 * _BITS | green << _BITS | blue
        if self.mask.opaque is not None:
            codes[~self.mask.opaque[rows]] = self.hidden
        return codes


def _blocks(mask: Decoded) -> Iterator[slice]:
    """The rows of a mask, some millions of pixels at a time: 64-bit codes of a large one would fill the memory."""
    height, width = mask.pixels.shape[:2]
    step = max((1 << 22) // width, 1)
    return (slice(top, top + step) for top in range(0, height, step))


def found_in(path: Path, mask: Decoded, numbered: bool) -> Found:
    """What is in one mask; ``numbered`` objects may be many.

    Raises:
        DataError: no mask: fractions, several bands, blurred by its compression, or too many values.
    """
    reader = _Reader(path, mask)
    tally: dict[int, int] = {}
    for rows in _blocks(mask):
        values, amounts = np.unique(reader.codes(rows), return_counts=True)
        for value, amount in zip(values.tolist(), amounts.tolist(), strict=True):
            tally[value] = tally.get(value, 0) + amount
        if len(tally) > (1 << 20 if numbered else 1 << 16):
            raise _too_many(path)
    counts = dict(sorted(tally.items()))
    if mask.lossy and len(counts) > 2:
        kind = mask.what.split()[-1]
        raise DataError(
            f"mask {path} is a {'lossy ' * (kind == 'WEBP')}{kind}, which blurs the {len(counts)} class values in it: "
            "save masks as PNG"
        )
    colours = {value: int(reader.colours[value]) for value in counts} if reader.mode == "palette" else {}
    hidden = None if mask.opaque is None else reader.hidden
    return Found(reader.mode, counts, colours, mask.pixels.dtype.itemsize > 1, hidden, mask.what)


def _too_many(path: Path) -> DataError:
    return DataError(
        f"the masks hold more than {MAX_CLASSES} different values (counted up to {path}): expected one value "
        "per class, not numbered objects or soft edges"
    )


@dataclass(frozen=True)
class Coded:
    """The coding, what the classes are called and drawn in, what stands for each in a mask, and what is odd."""

    coding: Coding
    names: tuple[str, ...]
    colours: tuple[Colour | None, ...]
    mask_values: tuple[int | Colour, ...]
    odd: tuple[str, ...]


def code_masks(
    paths: Sequence[Path],
    found: Sequence[Found],
    rows: Sequence[Row] | None,
    ignore: Sequence[int | Colour],
    source: str,
) -> Coded:
    """How to read a set of masks.

    Args:
        paths, found: the masks, and what is in each.
        rows: a table of the classes; None: every value is one, in sorted order.
        ignore: values or colours that do not count.
        source: what the table is called in a message.

    Raises:
        DataError: the masks do not agree with each other or with the table.
    """
    kind = _kind(paths, found, rows)
    codes = [_counted(each, kind) for each in found]
    unscored: set[int] = set()
    odd = []
    for value in ignore:
        meant = _meant(value, kind, found, rows or ())
        unscored |= meant
        if not any(meant & each.keys() for each in codes):
            shown = "{},{},{}".format(*value) if isinstance(value, tuple) else value
            odd.append(f"{shown}, to be ignored: in no mask")
    if rows is not None:
        return _by_table(paths, codes, kind, rows, unscored, source, odd)
    seen: set[int] = set()
    for path, each in zip(paths, codes, strict=True):
        _check_blur(path, each, kind)
        seen |= each.keys()
        if len(seen) > MAX_CLASSES:
            raise _too_many(path)
    values = sorted(seen - unscored)
    twins = kind != "colours" and {1, 255} <= seen <= {0, 1, 255} and not unscored
    twins = twins and not any({1, 255} <= each.keys() for each in codes)
    if twins:
        ones = sum(1 in each for each in codes)
        odd.append(f"{ones} of {len(codes)} masks hold 1 where others hold 255: taken for the same class")
        values = [0, 255] if 0 in seen else [255]
    named = [_named(value, kind) for value in values]
    if len(values) < 2:
        only = named[0] if named else "values that do not count"
        raise DataError(f"all masks hold only {only}: segmentation needs at least two classes, check --masks")
    if kind != "colours" and 255 in values and values[:-1] == list(range(len(values) - 1)) and len(values) > 2:
        odd.append(f"value 255 beside 0 to {values[-2]} is taken for a class: if it means undecided, ignore it")
    label = {value: index for index, value in enumerate(values)}
    label |= dict.fromkeys(seen & unscored, IGNORE_INDEX) | ({1: label[255]} if twins else {})
    ordered = sorted(label)
    coding = Coding(kind, np.array(ordered, np.int64), np.array([label[code] for code in ordered], np.uint8))
    in_colour = kind == "colours"
    colours = tuple(colour_of(value) for value in values) if in_colour else _painted(values, kind, found)
    stands = tuple(colour_of(value) if in_colour else value for value in values)
    return Coded(coding, tuple(named), colours, stands, tuple(odd))


def code_cells(paths: Sequence[Path], found: Sequence[Found]) -> Coded:
    """How to read masks in which each object has a number of its own, and 0 is none."""
    none = np.empty(0, np.int64), np.empty(0, np.uint8)
    coding = Coding(_kind(paths, found, None), *none, numbered=True)
    seen = {int(code != 0) for each in found for code in _counted(each, coding.kind)}
    if len(seen) < 2:
        missing = "background, 0" if 1 in seen else "cell"
        raise DataError(f"all masks hold no {missing}: expected a number for each cell, and 0 where there is none")
    objects = [len(each.counts) - (0 in each.counts) for each in found]
    odd = (f"cells in a mask: {min(objects)} to {max(objects)}",)
    return Coded(coding, ("background", "cell"), (None, None), (0, 1), odd)


def _meant(value: int | Colour, kind: str, found: Sequence[Found], rows: Sequence[Row]) -> set[int]:
    """The codes of pixels that a user calls ``value``: a colour, or a grey value, or an index of a palette.

    Whichever of them the masks are read by, a table and the palettes tell what it is called otherwise.
    """
    palettes = [each.colours for each in found if each.mode == "palette"]
    if isinstance(value, tuple):
        colour = code_of(value)
        if kind == "colours":
            return {colour}
        meant = {row.value for row in rows if row.colour == value and row.value is not None}
        if kind == "values":
            meant |= {index for colours in palettes for index, shown in colours.items() if shown == colour}
        greys = len(set(value)) == 1 and (kind == "greys" or len(palettes) < len(found))
        return meant | {value[0]} if greys else meant
    if kind != "colours":
        return {value}
    meant = {code_of(row.colour) for row in rows if row.value == value and row.colour is not None}
    meant |= {colours[value] for colours in palettes if value in colours}
    return meant | {value * _GREY} if len(palettes) < len(found) else meant


def _painted(values: Sequence[int], kind: str, found: Sequence[Found]) -> tuple[Colour | None, ...]:
    """What the palettes show for each value, where they agree and tell the values apart; else None."""
    shown = [{each.colours[v] for each in found if kind == "values" and v in each.colours} for v in values]
    if any(len(colours) != 1 for colours in shown) or len(set.union(*shown)) < len(values):
        return (None,) * len(values)
    return tuple(colour_of(code) for colours in shown for code in colours)


def _named(code: int, kind: str) -> str:
    return "colour {},{},{}".format(*colour_of(code)) if kind == "colours" else f"value {code}"


def _kind(paths: Sequence[Path], found: Sequence[Found], rows: Sequence[Row] | None) -> str:
    """How the masks of a set are to be read, so that one class is one code in all of them."""
    coloured = any(each.mode == "rgb" and any(code % _GREY for code in each.counts) for each in found)
    palettes = [each for each in found if each.mode == "palette"]
    if rows is not None:
        by_value = any(row.value is not None for row in rows)
        by_colour = any(row.colour is not None for row in rows)
        if coloured or not by_value:
            return "colours" if by_colour or coloured else "values"
        return "values"
    kind = "colours" if coloured else "values"
    if palettes and not coloured:
        of_index: dict[int, set[int]] = {}
        of_colour: dict[int, set[int]] = {}
        for each in palettes:
            for index, colour in each.colours.items():
                of_index.setdefault(index, set()).add(colour)
                of_colour.setdefault(colour, set()).add(index)
        telling = all(len(set(each.colours.values())) == len(each.colours) for each in palettes)
        if telling and all(colour % _GREY == 0 for colour in of_colour):
            kind = "greys"  # a palette of greys shows what a grey mask holds
        elif telling and any(len(others) > 1 for others in (*of_index.values(), *of_colour.values())):
            kind = "colours"  # an index means the same class in two files only if their palettes agree
    if kind == "colours":
        _check_greys(paths, found)
    return kind


def _check_greys(paths: Sequence[Path], found: Sequence[Found]) -> None:
    """Refuse, beside masks in colour, grey ones whose values are no colours."""
    shown = {0, 255 * _GREY}
    for each in found:
        shown |= (
            set(each.colours.values()) if each.mode == "palette" else set(each.counts if each.mode == "rgb" else ())
        )
    for path, each in zip(paths, found, strict=True):
        if each.mode == "grey" and each.wide:
            raise DataError(f"mask {path} holds wide numbers while other masks hold colours: save all in one way")
        strange = [value for value in each.counts if value * _GREY not in shown] if each.mode == "grey" else []
        if strange:
            raise DataError(
                f"mask {path} holds the grey value {strange[0]} while other masks hold colours: save all in one way"
            )


def _counted(found: Found, kind: str) -> dict[int, int]:
    """The counts of one mask under the codes of that kind."""
    counted: dict[int, int] = {}
    low = (1 << _BITS) - 1
    for code, count in found.counts.items():
        if found.mode == "palette":
            colour = found.colours[code]
            code = {"values": code, "greys": colour & low, "colours": colour}[kind]
        elif found.mode == "rgb":
            code = code if kind == "colours" else code & low
        elif kind == "colours":
            code *= _GREY
        counted[code] = counted.get(code, 0) + count
    return counted


def _check_blur(path: Path, counts: Mapping[int, int], kind: str) -> None:
    """Refuse a mask whose values lie in clusters, each around one of many pixels: a lossy format left them."""
    if not 3 < len(counts) <= 1024:
        return
    codes = sorted(counts)
    if kind == "colours":
        channels = np.array([colour_of(code) for code in codes])
        amounts = np.array([counts[code] for code in codes])
        near = np.abs(channels[:, None] - channels[None]).max(-1) <= 16
        around = (near & (amounts[:, None] * 4 < amounts[None])).any(1)
        blurred = around.sum() >= 2
        first = codes[int(np.argmax(around))]
    else:
        groups = [[codes[0]]]
        for code in codes[1:]:
            if code - groups[-1][-1] >= 32:
                groups.append([])
            groups[-1].append(code)
        dominated = all(2 * max(counts[c] for c in group) > sum(counts[c] for c in group) for group in groups)
        upper = next((group for group in groups[1:] if len(group) > 1), None)
        blurred = upper is not None and dominated and len(codes) >= len(groups) + 2
        first = upper[0] if upper is not None else codes[0]
    if blurred:
        raise DataError(
            f"mask {path} holds {len(codes)} values, some of few pixels and nearly equal to others, as "
            f"{_named(first, kind)}: save the original again without a lossy format, or list its classes in a table"
        )


def _by_table(
    paths: Sequence[Path],
    codes: Sequence[Mapping[int, int]],
    kind: str,
    rows: Sequence[Row],
    unscored: Iterable[int],
    source: str,
    odd: Sequence[str],
) -> Coded:
    in_colour = kind == "colours"
    label: dict[int, int] = dict.fromkeys(unscored, IGNORE_INDEX)
    for row in rows:
        code = (None if row.colour is None else code_of(row.colour)) if in_colour else row.value
        if code is not None:
            label.setdefault(code, IGNORE_INDEX if row.label is None else row.label)
    for path, each in zip(paths, codes, strict=True):
        strange = [code for code in each if code not in label]
        if strange:
            raise DataError(
                f"mask {path} holds {_named(strange[0], kind)}, which is not in {source}: add it there, or as ignore "
                "if such pixels do not count"
            )
    if all(label[code] == IGNORE_INDEX for each in codes for code in each):
        raise DataError(f"no pixel of the masks counts, by {source} and what is ignored: check --masks")
    ordered = sorted(label)
    coding = Coding(kind, np.array(ordered, np.int64), np.array([label[code] for code in ordered], np.uint8))
    firsts: dict[int, Row] = {}
    for row in rows:
        if row.label is not None:
            firsts.setdefault(row.label, row)
    classes = [firsts[index] for index in sorted(firsts)]
    stands = tuple(row.colour if in_colour and row.colour else row.value or 0 for row in classes)
    return Coded(
        coding,
        tuple(row.name for row in classes),
        tuple(row.colour for row in classes),
        stands,
        tuple(odd),
    )
