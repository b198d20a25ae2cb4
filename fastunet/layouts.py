"""Which files of a data set belong together, and what its masks' values mean: folders, VOC2012, MSRC-v2, tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from fastunet.decode import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm", ".ppm")
MASK_ENDINGS = ("_mask", "_gt", "_segmentation")  # what a mask's name may add to its image's, in any case
IMAGE_ENDING = "_0000"  # nnU-Net's, of an image whose mask is named without it

Colour = tuple[int, int, int]
Pairs = list[tuple[Path, Path]]


@dataclass(frozen=True)
class Row:
    """What a value, or a colour, of the masks stands for; ``label`` is None where such pixels do not count."""

    name: str
    label: int | None
    value: int | None = None
    colour: Colour | None = None


# ---- pairs -------------------------------------------------------------------------------------------------------

_FOLDERS = (  # in which images and masks lie, where one folder is given that holds both
    ("images", "masks"), ("imgs", "masks"), ("image", "label"), ("images", "labels"), ("imagesTr", "labelsTr"),
    ("train", "train_masks"), ("Images", "GroundTruth"),
)  # fmt: skip


def subfolders(folder: Path) -> tuple[Path, Path] | None:
    """The two folders inside ``folder`` that are called as images and masks are."""
    for names in _FOLDERS:
        images, masks = (folder / name for name in names)
        if images.is_dir() and masks.is_dir():
            return images, masks
    return None


def find_pairs(images: Path, masks: Path, options: tuple[str, str] = ("--images", "--masks")) -> Pairs:
    """(image, mask) paths in the order of the images' names.

    The mask of ``a.png`` is called ``a``, ``a_mask``, ``a_GT``, ``a_segmentation`` or ``a.png``, with any picture
    suffix after it; that of ``a_0000.png`` may also be called ``a``. Unicode is compared composed. The two folders may
    be one.

    Raises:
        DataError: a folder is missing or empty, or a file has no partner or several; ``options`` are what the folders
            are called in such a message.
    """
    image_files, mask_files = originals(pictures_in(images, options[0])), pictures_in(masks, options[1])
    if images.resolve() == masks.resolve():
        mask_files = [path for path in mask_files if _without_ending(_stem(path)) is not None]
        image_files = [path for path in image_files if path not in mask_files]
        if not image_files or not mask_files:
            raise DataError(
                f"{images} holds images or masks but not both: call the mask of a.png a_mask.png or a_GT.png"
            )
    named: dict[str, list[Path]] = {}  # what a mask may be called, and whose it then is
    for image in image_files:
        named.setdefault(_stem(image), []).append(image)
        named.setdefault(_composed(image.name), []).append(image)
    for image in image_files:
        shorter = _stem(image).removesuffix(IMAGE_ENDING)
        if shorter and shorter not in named:
            named[shorter] = [image]
    partners: dict[Path, list[Path]] = {}
    for mask in mask_files:
        # a_mask.png is the mask of a.png, or of a_mask.png if there is such an image
        stem = _stem(mask)
        owners = named.get(stem) or named.get(_without_ending(stem) or stem)
        if owners is None:
            raise DataError(f"mask {mask} has no image in {images}: add the image or take the mask away")
        if len(owners) > 1:
            raise DataError(f"{owners[0]} and {owners[1].name} would share a mask by their name: rename one")
        partners.setdefault(owners[0], []).append(mask)
    pairs = []
    for image in image_files:
        found = partners.get(image, [])
        if not found:
            raise DataError(
                f"{image} has no mask in {masks}: expected {image.stem}, {image.stem}_mask or {image.stem}_GT with a "
                "picture suffix; add it or take the image away"
            )
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise DataError(f"{image} has several masks in {masks}, {names}: keep one of them")
        pairs.append((image, found[0]))
    return pairs


OUTPUT_ENDINGS = ("_OUT", "_OVERLAY")


def originals(paths: Sequence[Path]) -> list[Path]:
    """Without what ``predict`` leaves beside its pictures: a_OUT.png, where there is an a.png."""
    stems = {_stem(path) for path in paths}
    return [
        path
        for path in paths
        if not any(_stem(path).endswith(end) and _stem(path).removesuffix(end) in stems for end in OUTPUT_ENDINGS)
    ]


def _composed(name: str) -> str:
    """The name in one spelling: macOS stores é as two characters."""
    return unicodedata.normalize("NFC", name)


def _stem(path: Path) -> str:
    return _composed(path.stem)


def _without_ending(stem: str) -> str | None:
    """The stem without what masks' names add; None if it has nothing of that."""
    return next(
        (stem[: -len(end)] for end in MASK_ENDINGS if stem.lower().endswith(end) and len(stem) > len(end)), None
    )


def pictures_in(folder: Path, option: str) -> list[Path]:
    """The files in ``folder`` that are named as pictures are, in order; ``option`` is what a message calls it.

    Raises:
        DataError: there are none, or the folder cannot be listed.
    """
    called = f"{option} {folder}".strip()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{called} {problem}: give the folder that holds the pictures")
    try:
        found = files_of(folder, SUFFIXES)
    except OSError as error:
        raise DataError(f"{called} cannot be listed ({error.strerror}): check its permissions") from error
    if not found:
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        raise DataError(f"{called} holds no pictures: expected files of type {kinds} in the folder itself")
    return found


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """What in ``folder`` has one of the ``suffixes`` and is not hidden, in order; also links to files that are gone.

    Raises:
        OSError: of the system.
    """
    named = (p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.name[0] != ".")
    return sorted(p for p in named if p.is_file() or (p.is_symlink() and not p.exists()))


# ---- lists of names ----------------------------------------------------------------------------------------------


def listed(path: Path) -> list[str]:
    """The first word of every line of a text file: names of pictures, with their suffix or without."""
    names = [line.split()[0] for line in read_text(path).splitlines() if line.split()]
    if not names:
        raise DataError(f"{path} lists no pictures: expected one name a line")
    return names


def chosen(pairs: Pairs, names: Sequence[str], path: Path) -> Pairs:
    """The pairs that ``names``, from the file ``path``, list, in that order."""
    by_name = {_composed(name): pair for pair in pairs for name in (pair[0].stem, pair[0].name)}
    missing = [name for name in names if _composed(Path(name).name) not in by_name]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{path} lists {missing[0]}{more}, which has no image and mask here: add or unlist it")
    found = [by_name[_composed(Path(name).name)] for name in names]
    check_once([image.name for image, _ in found], path)
    return found


def check_once(names: Sequence[str], path: Path) -> None:
    """Refuse a list in which a picture stands twice: one of the two could be learnt and the other held out."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{path} lists {name} twice: list each picture once")
        seen.add(name)


def read_text(path: Path) -> str:
    """A small text file, in UTF-8."""
    try:
        with open(path, "rb") as file:
            content = file.read((1 << 24) + 1)
        if len(content) > 1 << 24:
            raise DataError(f"{path} is larger than 16 MB: expected a text file, one name or class a line")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path} (no UTF-8): save the list as plain text") from error


# ---- VOC2012 -----------------------------------------------------------------------------------------------------

_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_VOID = 255


def voc_colour(index: int) -> Colour:
    """VOC's colour of an index: its bits, three at a time, are the highest bits of red, green and blue."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]


VOC = (
    *(Row(name, label, label, voc_colour(label)) for label, name in enumerate(_VOC)),
    Row("void", None, VOC_VOID, voc_colour(VOC_VOID)),
)


def is_voc(root: Path) -> bool:
    return (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir()


def voc_pairs(root: Path, split: str | Path | None) -> Pairs:
    """The pairs of VOC's folders that have a mask: all, or those of a list in ImageSets/Segmentation."""
    masks = {path.stem: path for path in pictures_in(root / "SegmentationClass", "")}
    images = {path.stem: path for path in pictures_in(root / "JPEGImages", "")}
    names: Iterable[str] = sorted(masks)
    where = root / "SegmentationClass"
    if split is not None:
        inside = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        where = inside if inside.is_file() else Path(split)
        names = [Path(name).stem for name in listed(where)]
        check_once(names, where)
    for name in names:
        if name not in masks or name not in images:
            kind = "image" if name in masks else "mask"
            raise DataError(f"{where} has {name}, which has no {kind} in {root}: add it or take it away")
    return [(images[name], masks[name]) for name in names]


# ---- MSRC-v2 -----------------------------------------------------------------------------------------------------

_MSRC: dict[str, Colour] = {
    "void": (0, 0, 0), "building": (128, 0, 0), "grass": (0, 128, 0), "tree": (128, 128, 0), "cow": (0, 0, 128),
    "sheep": (0, 128, 128), "sky": (128, 128, 128), "aeroplane": (192, 0, 0), "water": (64, 128, 0),
    "face": (192, 128, 0), "car": (64, 0, 128), "bicycle": (192, 0, 128), "flower": (64, 128, 128),
    "sign": (192, 128, 128), "bird": (0, 64, 0), "book": (128, 64, 0), "chair": (0, 192, 0), "road": (128, 64, 128),
    "cat": (0, 192, 128), "dog": (128, 192, 128), "body": (64, 64, 0), "boat": (192, 64, 0),
}  # fmt: skip
# Too few to learn: void, as in the split that everybody uses.
_MSRC_UNUSED: dict[str, Colour] = {"horse": (128, 0, 128), "mountain": (64, 0, 0)}

MSRC = (
    *(Row(name, label, None, colour) for label, (name, colour) in enumerate(_MSRC.items())),
    *(Row(name, 0, None, colour) for name, colour in _MSRC_UNUSED.items()),
)


# ---- tables ------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> tuple[Row, ...]:
    """Classes from a text file, one a line, in the order of their labels: a value or a colour, and a name.

    ``7, road`` and ``road, 7`` are a value; ``128,64,128 road``, ``road,128,64,128`` and ``#804080 road`` a colour;
    what stands between may be commas, semicolons, colons, tabs or spaces. A first line without numbers is a heading; #
    begins a comment, unless six digits follow. Pixels of a class that is called ignore do not count.

    Raises:
        DataError: the file cannot be read, a line holds no value and no colour, or one stands there twice.
    """
    rows: list[Row] = []
    seen: dict[int | Colour, int] = {}
    labels = 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = re.sub(r"#(?![0-9a-fA-F]{6}\b).*", "", line).strip()
        if not text:
            continue
        code, name = _entry(text)
        if code is None:
            if not rows and not re.search(r"\d", text):
                continue
            raise DataError(f"{path}, line {number}, is {text[:60]!r}: expected a value or a colour, and a name")
        if code in seen:
            raise DataError(f"{path}, line {number}, has the value or colour of line {seen[code]}: give each one line")
        seen[code] = number
        counts = name.lower() != "ignore"
        colour, value = (code, None) if isinstance(code, tuple) else (None, code)
        rows.append(Row(name or f"class {labels}", labels if counts else None, value, colour))
        labels += counts
    if len({row.colour is None for row in rows}) > 1:
        raise DataError(f"{path} mixes values and colours: give each class a value, or each a colour")
    if labels < 2 or labels > 255:
        raise DataError(f"{path} has {labels} classes: expected 2 to 255, one a line")
    return tuple(rows)


def _entry(text: str) -> tuple[int | Colour | None, str]:
    """(the value or colour in a line, its name)."""
    hexed = re.search(r"#([0-9a-fA-F]{6})\b", text)
    if hexed:
        red, green, blue = bytes.fromhex(hexed[1])
        return (red, green, blue), text.replace(hexed[0], "").strip(" ,;:\t")
    numbers: list[int] = []
    words: list[str] = []
    for part in filter(None, (part.strip() for part in re.split(r"[,;:\t]", text))):
        pieces = part.split()
        digits = [*takewhile(re.compile(r"[0-9]{1,10}").fullmatch, pieces)]
        # A name may stand behind a space; in "7, 3 cells" it has the number.
        if len(digits) == len(pieces) or not (words or len(numbers) == len(digits) == 1):
            numbers += map(int, digits)
            pieces = pieces[len(digits) :]
        words += [" ".join(pieces)] * bool(pieces)
    name = " ".join(words)
    if len(numbers) == 3 and max(numbers) < 256:
        return (numbers[0], numbers[1], numbers[2]), name
    return (numbers[0] if len(numbers) == 1 and numbers[0] < 1 << 32 else None), name
