"""One picture file: its pixels as they are stored, no number narrowed, or one sentence about why not.

Pillow decodes what it keeps whole. What it would narrow or refuses (16 bits a colour, several bands, wide integers) is
read by tifffile and imagecodecs, ``pip install 'fastunet[pictures]'``, and PNM files of other depths than 8 bits here.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from fastunet.errors import UserError

MAX_PIXELS = 1 << 26  # of a picture: decoded 200 MB in colour, 800 MB in float32
MAX_BYTES = 1 << 30  # of a decoded picture of many bands or wide numbers
MAX_NUMBER = 1e30  # of a pixel: its square is still a number of float64, and it a number of float32
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "GIF", "WEBP", "PPM")  # what the suffixes of pictures stand for

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such files begin

Array = npt.NDArray[Any]


class DataError(UserError):
    """The pictures cannot be used as they are; the message is one sentence with the file and the fix."""


@dataclass(frozen=True)
class Decoded:
    """A picture as its file holds it.

    Attributes:
        pixels: (H, W) grey values or palette indices, or (H, W, C) of C ≥ 2 channels; of a dtype that holds every
            number of the file.
        colours: how the channels are to be read: "grey", "palette", "rgb", or "bands" of no known meaning.
        palette: (K, 3), uint8, of "palette".
        opaque: (H, W), bool: False where a pixel is transparent, so that its colour is hidden; None if none is.
        orientation: how viewers turn and mirror it, in EXIF's numbers; 1 as it is.
        lossy: whether its compression changes pixels.
        what: the format and depth, for tables: "8-bit PNG".
    """

    pixels: Array
    colours: str
    palette: Array | None
    opaque: Array | None
    orientation: int
    lossy: bool
    what: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def turned(self, orientation: int) -> Decoded:
        """The picture as a viewer shows one of that orientation; what is shown then has none."""
        opaque = None if self.opaque is None else _turned(self.opaque, orientation)
        return replace(self, pixels=_turned(self.pixels, orientation), opaque=opaque, orientation=1)


def _turned(pixels: Array, orientation: int) -> Array:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return pixels[::rows, ::columns]


def decode(path: Path) -> Decoded:
    """The picture in ``path``.

    Raises:
        DataError: the file cannot be read, is damaged, or holds several pictures; is larger than 2²⁶ pixels or, of many
            bands or wide numbers, 1 GiB; or a package is needed to read it whole.
    """
    with explained(path):
        with open(path, "rb") as file:
            start = file.read(4)
            if re.match(rb"P[2356]\s", start):
                return _pnm(path, file)
        if start in TIFF:
            return _tiff(path)
        if start[:3] == b"\xff\xd8\xff" and (frame := _jpeg_frame(path)) is not None and frame[0] != 8:
            return _wide_jpeg(path, *frame)
        return _by_pillow(path)


def check_numbers(path: Path, pixels: Array) -> None:
    """Refuse floating-point pixels with which nothing can be computed.

    Raises:
        DataError: NaN or infinite ones, or what formats put where nothing was measured, such as -3.4e38.
    """
    if pixels.dtype.kind != "f":
        return
    if not np.isfinite(pixels).all():
        raise DataError(f"{path} holds NaN or infinite pixels: replace them")
    low, high = float(pixels.min()), float(pixels.max())
    if max(-low, high) > MAX_NUMBER:
        raise DataError(
            f"{path} holds pixels of {low if -low > high else high:.3g}, as if nothing was measured there: replace them"
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What decoders raise, as a sentence."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        counted = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_large(path, f"{int(counted[1]):,}" if counted else f"more than {MAX_PIXELS:,}") from error
    except MemoryError as error:
        raise DataError(f"{path} needs more memory than there is: cut it into smaller pictures") from error
    except Exception as error:  # decoders of damaged files raise whatever they stumble on
        system = isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError)
        reason = (error.strerror if system else None) or _other_content(path)  # type: ignore[attr-defined]
        raise DataError(f"cannot read {path} ({reason}): replace it, or take it and its partner away") from error


_OTHERS = {  # what files of the wrong name often are
    b"version https://git-lfs": "a pointer of Git LFS, whose picture was not fetched",
    b"<!DOCTYPE": "a web page, not a picture", b"<html": "a web page, not a picture",
    b"\0\0\0\x0cjP  ": "JPEG 2000, which is not read here", b"8BPS": "Photoshop's, which is not read here",
    b"%PDF": "PDF, not a picture", b"\x89HDF": "HDF5, not a picture",
}  # fmt: skip


def _other_content(path: Path) -> str:
    """What is in a file that is no picture which can be read."""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(32)
        if not start:
            return "empty"
        if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
            return "HEIC or AVIF, which is not read here"
        return next((what for magic, what in _OTHERS.items() if start.startswith(magic)), "damaged, or not a picture")
    return "damaged, or not a picture"


def _too_large(path: Path, pixels: str) -> DataError:
    return DataError(
        f"{path} has {pixels} pixels by its header, of at most {MAX_PIXELS:,}: cut it into smaller pictures"
    )


def _check_limits(path: Path, width: int, height: int, channels: int = 1, itemsize: int = 1) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}×{height}")
    size = width * height * channels * itemsize
    if size > MAX_BYTES:
        raise DataError(
            f"{path} has {size:,} bytes by its header, {channels} channels of {8 * itemsize} bits, of at most "
            f"{MAX_BYTES:,}: cut it into smaller pictures"
        )


def _check_single(path: Path, pages: int) -> None:
    if pages > 1:
        raise DataError(f"{path} holds {pages} pictures: save each one as a file of its own")


# ---- Pillow ------------------------------------------------------------------------------------------------------

_NUMBER_MODES = ("I", "F", "I;16", "I;16L", "I;16B")


def _by_pillow(path: Path, page: int = 0, compression: int = 1) -> Decoded:
    """What Pillow keeps whole; a ``page`` of a TIFF, which has its ``compression``."""
    # Pillow goes by the content, whatever the name says: without the list it starts Ghostscript for an EPS file.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the header is judged below
        file = Image.open(path, formats=_FORMATS)
    with file:
        _check_limits(path, file.width, file.height)
        kind = file.format or ""
        if kind == "TIFF":
            file.seek(page)
            lossy = compression in _LOSSY_TIFF
        else:
            # The pictures behind the first of a phone's MPO are its previews, or another view.
            _check_single(path, 1 if kind == "MPO" else getattr(file, "n_frames", 1))
            lossy = kind in ("JPEG", "MPO") or (kind == "WEBP" and _is_lossy_webp(path))
        if kind == "PNG" and (bits := _png_depth(path)) == 16 and file.mode not in (*_NUMBER_MODES, "1", "L"):
            return _wide_png(path, file)
        file.load()
        orientation = 1 if kind == "TIFF" else file.getexif().get(0x0112, 1)  # Pillow shows TIFFs as viewers do
        pixels, colours, palette, opaque = _pixels(file)
        bits = bits if kind == "PNG" else 8 * pixels.dtype.itemsize if file.mode != "1" else 1
    orientation = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    what = f"{bits}-bit {'JPEG' if kind == 'MPO' else kind}"
    return Decoded(pixels, colours, palette, opaque, orientation, lossy, what)


def _pixels(picture: Image.Image) -> tuple[Array, str, Array | None, Array | None]:
    """(pixels, what their channels are, palette, what is opaque)."""
    clear = picture.info.get("transparency")
    if picture.mode == "P":
        indices = np.asarray(picture)
        palette = np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        if clear is None:
            return indices, "palette", palette, None
        alphas = np.full(256, 255)
        if isinstance(clear, bytes):
            alphas[: len(clear)] = list(clear)
        else:
            alphas[clear] = 0
        return indices, "palette", palette, _opaque(alphas[indices])
    if picture.mode in ("1", "L", *_NUMBER_MODES):
        pixels = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
        hidden = isinstance(clear, int) and picture.mode == "L"
        return pixels, "grey", None, _opaque(np.where(pixels == clear, 0, 255)) if hidden else None
    if picture.mode in ("LA", "La", "PA"):
        both = np.asarray(picture.convert("LA" if picture.mode[0] == "L" else "RGBA"))
        pixels = both[..., 0] if both.shape[2] == 2 else both[..., :3]
        return pixels, "grey" if pixels.ndim == 2 else "rgb", None, _opaque(both[..., -1])
    if picture.mode in ("RGBA", "RGBa"):
        both = np.asarray(picture.convert("RGBA"))
        return both[..., :3], "rgb", None, _opaque(both[..., 3])
    pixels = np.asarray(picture.convert("RGB"))
    if isinstance(clear, tuple) and picture.mode == "RGB":
        return pixels, "rgb", None, _opaque(np.where((pixels == clear).all(-1), 0, 255))
    return pixels, "rgb", None, None


def _opaque(alpha: Array, most: int = 255) -> Array | None:
    opaque: Array = alpha > most / 2
    return None if opaque.all() else opaque


def _png_depth(path: Path) -> int:
    with open(path, "rb") as file:
        return file.read(25)[24]


def _is_lossy_webp(path: Path) -> bool:
    """Whether a chunk VP8, lossy, comes before one VP8L, lossless."""
    with open(path, "rb") as file:
        file.seek(12)
        for _ in range(64):
            name, size = file.read(4), int.from_bytes(file.read(4), "little")
            if name in (b"VP8 ", b"VP8L"):
                return name == b"VP8 "
            file.seek(size + size % 2, 1)
    return False


def _wide_png(path: Path, file: Image.Image) -> Decoded:
    """A PNG of 16 bits a channel, of which Pillow keeps 8."""
    codecs = _needed("imagecodecs", path, "16 bits a channel, of which Pillow keeps 8")
    _check_limits(path, file.width, file.height, 4, 2)
    orientation = file.getexif().get(0x0112, 1)
    pixels = codecs.png_decode(path.read_bytes())
    opaque = _opaque(pixels[..., -1], 65535) if pixels.shape[2] in (2, 4) else None
    channels = pixels.shape[2] - (pixels.shape[2] in (2, 4))
    return Decoded(
        pixels[..., 0] if channels == 1 else pixels[..., :3],
        "grey" if channels == 1 else "rgb",
        None,
        opaque,
        orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1,
        False,
        "16-bit PNG",
    )


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Without a package's log, which says of damaged files what an error says too."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _jpeg_frame(path: Path) -> tuple[int, int, int] | None:
    """(bits of a channel, width, height) of a JPEG; None if no header is found."""
    with open(path, "rb") as file:
        file.seek(2)
        for _ in range(1024):
            mark, kind, *size = file.read(4).ljust(4, b"\0")
            if mark != 0xFF:
                return None
            if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                bits, *sides = file.read(5).ljust(5, b"\0")
                return bits, sides[2] << 8 | sides[3], sides[0] << 8 | sides[1]
            file.seek((size[0] << 8 | size[1]) - 2, 1)
    return None


def _wide_jpeg(path: Path, bits: int, width: int, height: int) -> Decoded:
    """A JPEG of 12 bits, as scanners of radiology make them."""
    codecs = _needed("imagecodecs", path, f"{bits} bits a channel, which Pillow does not read")
    _check_limits(path, width, height, 3, 2)
    pixels = codecs.jpeg_decode(path.read_bytes())
    return Decoded(pixels, "grey" if pixels.ndim == 2 else "rgb", None, None, 1, True, f"{bits}-bit JPEG")


def _needed(package: str, path: Path, why: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise DataError(
            f"{path} has {why}: pip install 'fastunet[pictures]' to read it whole, or save it in another way"
        ) from error


# ---- TIFF --------------------------------------------------------------------------------------------------------

_LOSSY_TIFF = (6, 7, 33003, 33005, 34712, 34892, 34933, 34934, 50001)  # of JPEG, JPEG 2000, PNG's neighbours, WebP


_KNOWN_TIFF = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000)  # to Pillow: the rest is not in every build of it


def _directories(path: Path) -> list[ImageFileDirectory_v2]:
    """The tags of every picture in a TIFF."""
    found = []
    with open(path, "rb") as file:
        header = file.read(8)
        header += file.read(8) if 43 in header[2:4] else b""
        offset, seen = ImageFileDirectory_v2(header).next, set[int]()
        while offset and offset not in seen and len(seen) < 4096:
            seen.add(offset)
            file.seek(offset)
            directory = ImageFileDirectory_v2(header)
            directory.load(file)
            found.append(directory)
            offset = directory.next
    return found


def _tag(tags: ImageFileDirectory_v2, tag: int, usual: int | tuple[()]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.ravel(tags.get(tag, usual)))


def _page(path: Path) -> tuple[int, ImageFileDirectory_v2]:
    """Which page of a TIFF is its picture, and its tags."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it stumbles on
        directories = _directories(path)
    # Overviews, which viewers show while zooming, and transparency masks are no pictures of their own.
    full = [
        page for page, tags in enumerate(directories) if not _tag(tags, 254, 0)[0] & 5 and _tag(tags, 255, 1)[0] != 2
    ]
    full = full or list(range(len(directories)))
    _check_single(path, len(full))
    return full[0], directories[full[0]]


def large_page(path: Path) -> int | None:
    """Which page of a TIFF is its picture, if that is larger than :func:`decode` takes."""
    page, tags = _page(path)
    width, height, channels = (_tag(tags, tag, 1)[0] for tag in (256, 257, 277))
    pixels = width * height
    return page if pixels > MAX_PIXELS or pixels * channels * -(-max(_tag(tags, 258, 1)) // 8) > MAX_BYTES else None


def _tiff(path: Path) -> Decoded:
    page, tags = _page(path)
    (width, *_), (height, *_), (channels, *_), bits, kinds = (_tag(tags, tag, 1) for tag in (256, 257, 277, 258, 339))
    compression, photometric, turned = (_tag(tags, tag, 1)[0] for tag in (259, 262, 274))
    _check_limits(path, width, height, channels, -(-max(bits) // 8))
    whole = _pillow_keeps(channels, bits, kinds, photometric, _tag(tags, 338, ()))
    if compression != 1 and kinds[0] != 1 and tags.prefix == b"MM":
        whole = False  # libtiff turns the bytes of unpacked numbers, and Pillow turns them again, but unsigned ones
    if compression == 32773 and _tag(tags, 317, 1)[0] != 1:
        whole = False  # libtiff does not add up the differences in what is packed so
    inverted = photometric == 0  # 0 is white: Pillow sees to that up to 8 bits
    if whole and compression in _KNOWN_TIFF:
        try:
            decoded = _by_pillow(path, page, compression)
        except UnidentifiedImageError:  # damaged; or one of the few combinations that it does not know
            if importlib.util.find_spec("tifffile") is None:
                raise
        else:
            wide = decoded.pixels.dtype == np.uint16
            return replace(decoded, pixels=~decoded.pixels) if inverted and wide else decoded
    named = {1: "uint", 2: "int", 3: "float"}.get(kinds[0], "complex ")
    why = f"{channels} channel{'s' * (channels != 1)} of {named}{max(bits)}"
    tifffile = _needed("tifffile", path, f"compression {compression}, which Pillow may not know" if whole else why)
    with silent("tifffile"), tifffile.TiffFile(path) as file:
        series = file.pages[page]
        pixels = series.asarray()
        axes, extra = series.axes, tuple(map(int, series.extrasamples))
    if not axes:
        raise ValueError("no pixels")
    pixels = ~pixels if inverted and pixels.dtype.kind == "u" else pixels
    if pixels.dtype.kind not in "buif" or set(axes) - set("YXS") or "Y" not in axes or "X" not in axes:
        raise DataError(f"{path} holds {pixels.dtype} numbers along the axes {axes}: save it as one flat picture")
    if axes.startswith("S"):
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    pixels = _turned(pixels, turned)
    what = f"{max(bits)}-bit TIFF"
    lossy = compression in _LOSSY_TIFF
    if pixels.ndim == 2:
        return Decoded(pixels, "grey", None, None, 1, lossy, what)
    of_colour = {2: 3, 0: 1, 1: 1}.get(photometric, 0)
    if of_colour and pixels.shape[2] == of_colour + 1 and extra and extra[0] in (1, 2):
        opaque = _opaque(
            pixels[..., -1].astype(np.float64), np.iinfo(pixels.dtype).max if pixels.dtype.kind != "f" else 1
        )
        pixels = pixels[..., 0] if of_colour == 1 else pixels[..., :3]
        return Decoded(pixels, "grey" if of_colour == 1 else "rgb", None, opaque, 1, lossy, what)
    return Decoded(pixels, "rgb" if of_colour == pixels.shape[2] == 3 else "bands", None, None, 1, lossy, what)


def _pillow_keeps(
    channels: int, bits: tuple[int, ...], kinds: tuple[int, ...], photometric: int, extra: tuple[int, ...]
) -> bool:
    """Whether Pillow reads a TIFF of such tags, and loses none of its channels and digits."""
    kind = set(kinds)
    if channels == 1:
        known = {1: (1, 2, 4, 8, 12, 16), 2: (16, 32), 3: (32,)}
        return len(kind) == 1 and bits[0] in known.get(kinds[0], ())
    if set(bits) != {8} or kind != {1}:
        return False
    if photometric in (5, 6):  # CMYK and YCbCr
        return True
    alpha = channels - (3 if photometric == 2 else 1)
    return alpha == 0 or (alpha == 1 and (not extra or extra[0] in (1, 2)))


# ---- PNM ---------------------------------------------------------------------------------------------------------


def _pnm(path: Path, file: BinaryIO) -> Decoded:
    """PGM and PPM, binary or text, whose numbers Pillow would stretch to 255 or narrow."""
    file.seek(0)
    header = re.match(rb"(P[2356])(?:(?:\s|#[^\n]*\n)+\d{1,9}){3}\s", start := file.read(4096))
    if header is None:
        raise ValueError("no PNM header")
    words = re.sub(rb"#[^\n]*", b"", header[0][2:]).split()
    width, height, most = (int(word) for word in words)
    channels = 3 if header[1] in (b"P3", b"P6") else 1
    if not 0 < most < 65536 or not width or not height:
        raise ValueError("no PNM header")
    itemsize = 1 if most < 256 else 2
    _check_limits(path, width, height, channels, itemsize)
    count = math.prod((width, height, channels))
    file.seek(header.end())
    if header[1] in (b"P5", b"P6"):
        values = np.frombuffer(file.read(count * itemsize), np.uint8 if itemsize == 1 else ">u2", count)
    else:
        text = re.sub(rb"#[^\n]*", b"", file.read(8 * count + len(start))).split()
        values = np.array(text[:count], dtype=np.int64)
        if len(values) < count:
            raise ValueError("numbers are missing")
    if values.size and int(values.max()) > most:
        raise ValueError("a number is larger than the header says")
    pixels = values.astype(np.uint8 if itemsize == 1 else np.uint16).reshape(height, width, channels)
    what = f"{most.bit_length()}-bit PNM"
    if channels == 1:
        return Decoded(pixels[..., 0], "grey", None, None, 1, False, what)
    return Decoded(pixels, "rgb", None, None, 1, False, what)
