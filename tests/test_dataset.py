"""Data sets as people have them: every number of a file is kept, or it is refused by name; one class is one class."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import torch
from PIL import Image

from fastunet import cli, pictures
from fastunet.data import DataError, Dataset, open_dataset, unseen
from fastunet.decode import decode
from fastunet.layouts import read_table, voc_colour
from fastunet.training import evaluate

SHAPE = (20, 24)
NOISE = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (*SHAPE, 3), np.uint8)
TWELVE = np.random.default_rng(2).integers(0, 4096, (*SHAPE, 3), np.uint16)  # a 12-bit camera's, in 16 bits


def stripes(*values: Any, dtype: Any = np.uint8, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """A mask of vertical stripes, one per value or colour."""
    row = np.array(values, dtype)[np.arange(shape[1]) * len(values) // shape[1]]
    return np.broadcast_to(row, (shape[0], *row.shape)).copy()


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, in colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return fuzzing.png(pixels.shape[1], pixels.shape[0], 16, 2, zlib.compress(rows))


def tiff(*pages: np.ndarray, reduced: tuple[int, ...] = (), extra: tuple[int, ...] = (), **more: int) -> bytes:
    """A TIFF of (H, W) or (H, W, C) pages without compression; those ``reduced`` are marked as overviews."""
    content = b"II*\0" + bytes(4)
    link = 4
    for number, pixels in enumerate(pages):
        height, width, channels = (*pixels.shape, 1)[:3]
        kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
        offset = len(content)
        content += np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
        tags: list[tuple[int, tuple[int, ...]]] = [
            (254, (int(number in reduced),)), (256, (width,)), (257, (height,)),
            (258, (8 * pixels.dtype.itemsize,) * channels), (259, (1,)),
            (262, (more.get("photometric", 2 if channels >= 3 else 1),)), (273, (offset,)),
            (274, (more.get("orientation", 1),)), (277, (channels,)), (278, (height,)),
            (279, (pixels.nbytes,)), (338, extra), (339, (kind,) * channels),
        ]  # fmt: skip
        entries = b""
        for tag, values in tags:
            if not values:
                continue
            packed = struct.pack(f"<{len(values)}I", *values)
            if len(packed) > 4:
                content, packed = content + packed, struct.pack("<I", len(content))
            entries += struct.pack("<HHI", tag, 4, len(values)) + packed
        content = content[:link] + struct.pack("<I", len(content)) + content[link + 4 :]
        link = len(content) + 2 + len(entries)
        content += struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    return content


def pnm(pixels: np.ndarray, most: int, text: bool = False) -> bytes:
    colour = pixels.ndim == 3
    name = f"P{(3 if colour else 2) if text else (6 if colour else 5)}"
    head = f"{name}\n# made by hand\n{pixels.shape[1]} {pixels.shape[0]}\n{most}\n".encode()
    if text:
        return head + " ".join(map(str, pixels.ravel())).encode()
    return head + pixels.astype(np.uint8 if most < 256 else ">u2").tobytes()


File = bytes | np.ndarray | Image.Image


def write(path: Path, content: File, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    picture = content if isinstance(content, Image.Image) else Image.fromarray(content)
    picture.save(path, options.pop("format", None), **options)


def opened(
    folder: Path, *, images: dict[str, File] | None = None, masks: dict[str, File] | None = None, **how: Any
) -> Dataset:
    """The data set of these files; of a kind that is not given, good ones."""
    names = [name.partition(".")[0] for name in (images or masks or {})]
    for kind, files in (("images", images), ("masks", masks)):
        good = NOISE if kind == "images" else stripes(0, 1)
        for name, content in (files or {f"{name}.png": good for name in names}).items():
            write(folder / kind / name, content)
    return open_dataset(folder / "images", folder / "masks", **how)


def classes(data: Dataset) -> list[str]:
    return [each.name for each in data.classes]


def row(data: Dataset, index: int = 0) -> list[int]:
    """The labels along the first row of a mask, each once."""
    return [int(x) for x in torch.unique_consecutive(data[index].labels[0])]


def palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette([channel for colour in colours for channel in colour])
    return picture


# ---- every number is kept ----------------------------------------------------------------------------------------

BANDS = np.random.default_rng(3).integers(0, 256, (*SHAPE, 8), np.uint8)
WIDE = {
    "png-rgb16": ("png", png16(TWELVE), TWELVE.transpose(2, 0, 1)),
    "tiff-rgb16": ("tif", tiff(TWELVE), TWELVE.transpose(2, 0, 1)),
    "tiff-8-bands": ("tif", tiff(BANDS, extra=(0,) * 5), BANDS.transpose(2, 0, 1)),
    "tiff-infrared": ("tif", tiff(BANDS[..., :4], extra=(0,)), BANDS[..., :4].transpose(2, 0, 1)),
    "tiff-uint32": ("tif", tiff(NOISE.astype(np.uint32) * 16_843_009), NOISE[None].astype(np.int64) * 16_843_009),
    "tiff-float64": ("tif", tiff(NOISE / 3), NOISE[None] / 3),
    "tiff-int8": ("tif", tiff(NOISE.view(np.int8)), NOISE.view(np.int8)[None]),
    "tiff-turned": ("tif", tiff(TWELVE[::-1, ::-1], orientation=3), TWELVE.transpose(2, 0, 1)),
}


@pytest.mark.parametrize(("suffix", "content", "truth"), WIDE.values(), ids=WIDE)
def test_what_pillow_narrows_is_read_whole(tmp_path: Path, suffix: str, content: bytes, truth: np.ndarray) -> None:
    for package in ("tifffile", "imagecodecs"):
        pytest.importorskip(package, reason="part of pip install 'fastunet[pictures]'")
    data = opened(tmp_path, images={f"a.{suffix}": content})
    assert data.channels == len(truth)
    assert torch.equal(data[0].image.double(), torch.from_numpy(truth.astype(np.float64)))
    assert data.value_range == (truth.min(), truth.max())
    assert data.standardised()[0].image.std(correction=0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "i4", "f4"])
def test_packed_numbers_are_what_they_were(tmp_path: Path, kind: str, order: str) -> None:
    tifffile = pytest.importorskip("tifffile", reason="part of pip install 'fastunet[pictures]'")
    pixels = (NOISE / 3).astype(kind)
    for compression in ("zlib", "lzw", "packbits"):
        for predictor in (False, True):
            tifffile.imwrite(tmp_path / "a.tif", pixels, compression=compression, predictor=predictor, byteorder=order)
            assert np.array_equal(decode(tmp_path / "a.tif").pixels, pixels), (compression, predictor)


@pytest.mark.parametrize(("suffix", "content"), [row[:2] for row in WIDE.values()], ids=WIDE)
def test_without_the_extra_it_is_refused_by_name(
    tmp_path: Path, suffix: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        DataError, match=r"a\.\w+ has .*(channels? of|bits a channel).*: pip install 'fastunet\[pictures"
    ):
        opened(tmp_path, images={f"a.{suffix}": content})


def test_colours_of_16_bits_stay_apart_in_masks(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs", reason="part of pip install 'fastunet[pictures]'")
    data = opened(tmp_path, masks={"a.png": png16(stripes((512, 0, 0), (513, 0, 0), dtype=np.uint16))})
    assert classes(data) == ["colour 512,0,0", "colour 513,0,0"]
    assert data.classes[0].colour == (2, 0, 0)
    assert row(data) == [0, 1]


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
@pytest.mark.parametrize("most", [1, 3, 200, 4095, 65535])
def test_pnm_is_not_stretched(tmp_path: Path, most: int, text: bool) -> None:
    grey, colour = (np.random.default_rng(most).integers(0, most + 1, shape) for shape in (SHAPE, (*SHAPE, 3)))
    images = {"a.ppm": pnm(colour, most, text), "b.pgm": pnm(grey, most, text)}
    data = opened(
        tmp_path, images=images, masks={"a.pgm": pnm(stripes(0, 1), 1, text), "b.pgm": pnm(stripes(1, 0), most)}
    )
    assert torch.equal(data[0].image.long(), torch.from_numpy(colour.transpose(2, 0, 1)))
    assert torch.equal(data[1].image[0].long(), torch.from_numpy(grey))
    assert data.mask_values == [0, 1]


PLAIN = {
    "grey16": ("png", Image.fromarray(TWELVE[..., 0]), TWELVE[..., 0][None], torch.int32),
    "tiff16": ("tif", tiff(TWELVE[..., 0]), TWELVE[..., 0][None], torch.int32),
    "rgb": ("bmp", Image.fromarray(RGB), RGB.transpose(2, 0, 1), torch.uint8),
    "0-is-white": ("tif", tiff(TWELVE[..., 0], photometric=0), 65535 - TWELVE[..., 0][None], torch.int32),
    "float": ("tif", tiff(NOISE.astype(np.float32)), NOISE[None], torch.float32),
    "signed": ("tif", tiff(NOISE.astype(np.int16) - 99), NOISE[None].astype(np.int16) - 99, torch.int32),
    "alpha": ("png", Image.fromarray(RGB).convert("RGBA"), RGB.transpose(2, 0, 1), torch.uint8),
}


@pytest.mark.parametrize(("suffix", "content", "truth", "dtype"), PLAIN.values(), ids=PLAIN)
def test_a_sample_has_the_numbers_of_its_file(
    tmp_path: Path, suffix: str, content: File, truth: np.ndarray, dtype: torch.dtype
) -> None:
    data = opened(tmp_path, images={f"a.{suffix}": content})
    for sample in (data[0], pickle.loads(pickle.dumps(data))[0]):  # as a worker gets it
        assert sample.image.dtype == dtype
        assert torch.equal(sample.image.double(), torch.from_numpy(truth.astype(np.float64)))
        assert (sample.labels.dtype, sample.cells, sample.name) == (torch.uint8, None, f"a.{suffix}")
    assert [len(batch[0]) for batch in torch.utils.data.DataLoader(data, batch_size=None, collate_fn=lambda s: s.image)]


# ---- previews, limits, damage ------------------------------------------------------------------------------------


def test_previews_are_no_pictures(tmp_path: Path) -> None:
    small = Image.fromarray(RGB[::2, ::2])
    write(tmp_path / "phone.jpg", Image.fromarray(RGB), format="MPO", save_all=True, append_images=[small])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    shrunk = RGB[::2, ::2]
    images: dict[str, File] = {
        "a.tif": tiff(RGB, shrunk, reduced=(1,)), "b.tif": tiff(shrunk, RGB, reduced=(0,)),
        "c.jpg": (tmp_path / "phone.jpg").read_bytes(),
    }  # fmt: skip
    data = opened(tmp_path, images=images)
    for index in (0, 1):
        assert torch.equal(data[index].image, torch.from_numpy(RGB.transpose(2, 0, 1).copy()))
    assert data[2].image.shape == (3, *SHAPE)
    with pytest.raises(DataError, match=r"a\.tif holds 2 pictures: save each one as a file of its own"):
        opened(tmp_path / "pages", images={"a.tif": tiff(RGB, RGB)})


def test_limits_are_named(tmp_path: Path) -> None:
    large = fuzzing.png(14_000, 14_000, 8, 2, zlib.compress(b"\0"))  # Pillow would call 196 megapixels a bomb
    with pytest.raises(DataError, match=r"a\.png has 196,000,000 pixels by its header, of at most 67,108,864: cut it"):
        opened(tmp_path, images={"a.png": large})
    with pytest.raises(DataError, match=r"a\.png has 9000×8000 pixels by its header, of at most"):
        opened(tmp_path, images={"a.png": fuzzing.png(9000, 8000, 8, 0, zlib.compress(b"\0"))})
    hollow = bytearray(tiff(np.zeros((8, 8, 9), np.uint16)))
    for tag in (256, 257):  # 8192² pixels of nine channels
        at = hollow.index(struct.pack("<HHI", tag, 4, 1)) + 8
        hollow[at : at + 4] = struct.pack("<I", 8192)
    with pytest.raises(DataError, match=r"has 1,207,959,552 bytes by its header, 9 channels of 16 bits, of at most"):
        opened(tmp_path / "deep", images={"a.tif": bytes(hollow)})


def test_what_is_no_picture_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    others = {
        r"\(a pointer of Git LFS, whose picture was not fetched\)": b"version https://git-lfs.github.com/spec/v1\n",
        r"\(a web page, not a picture\)": b"<!DOCTYPE html><title>404</title>",
        r"\(HEIC or AVIF, which is not read here\)": b"\0\0\0\x18ftypheic",
        r"\(empty\)": b"",
        "has 12 bits a channel, which Pillow does not read: pip": b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x14\0\x18\1\1\x11\0",
    }
    for refusal, content in others.items():
        with pytest.raises(DataError, match=refusal):
            opened(tmp_path, images={"a.png": content})


# ---- what masks mean ---------------------------------------------------------------------------------------------

_RED, _BLUE, _BLACK, _WHITE = (200, 0, 0), (0, 0, 200), (0, 0, 0), (255, 255, 255)


def hidden(colours: np.ndarray, opaque: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate([colours, 255 * opaque[..., None].astype(np.uint8)], -1))


_LEFT = stripes(0, 1).astype(bool)
CODED: dict[str, tuple[list[File], list[str], list[list[int]]]] = {
    "palette-beside-index": (
        [palette(stripes(0, 1), _BLACK, _RED), stripes(1, 0)], ["value 0", "value 1"], [[0, 1], [1, 0]]),
    "one-palette-cut-short": (
        [palette(stripes(0, 1), _BLACK, _RED), palette(stripes(0, 2), _BLACK, _RED, _BLUE)],
        ["value 0", "value 1", "value 2"], [[0, 1], [0, 2]]),
    "a-colour-at-two-indices": (
        [palette(stripes(0, 1), _BLACK, _RED), palette(stripes(0, 2), _BLACK, _BLUE, _RED)],
        ["colour 0,0,0", "colour 200,0,0"], [[0, 1], [0, 1]]),
    "grey-palette-beside-grey": (
        [palette(stripes(0, 1), _WHITE, _BLACK), stripes(255, 0)], ["value 0", "value 255"], [[1, 0], [1, 0]]),
    "palette-of-one-colour": (
        [palette(stripes(0, 1), _BLACK, _BLACK)] * 2, ["value 0", "value 1"], [[0, 1], [0, 1]]),
    "0-1-beside-0-255": ([stripes(0, 1), stripes(0, 255)], ["value 0", "value 255"], [[0, 1], [0, 1]]),
    "0-1-beside-bilevel": ([stripes(0, 1), Image.fromarray(_LEFT)], ["value 0", "value 255"], [[0, 1], [0, 1]]),
    "0-1-and-255-in-one": (
        [stripes(0, 1, 255), stripes(0, 255)], ["value 0", "value 1", "value 255"], [[0, 1, 2], [0, 2]]),
    "hidden-colours": (
        [hidden(stripes(_RED, _BLUE), _LEFT), hidden(stripes(_BLUE, _BLACK), np.ones_like(_LEFT))],
        ["colour 0,0,0", "colour 0,0,200"], [[0, 1], [1, 0]]),
    "hidden-greys": ([hidden(stripes((7,) * 3, (9,) * 3), _LEFT).convert("LA"), stripes(0, 9)],
        ["value 0", "value 9"], [[0, 1], [0, 1]]),
    "index-masks-near-each-other": ([stripes(*range(21)), stripes(0, 255)],
        [f"value {i}" for i in (*range(21), 255)], [list(range(21)), [0, 21]]),
    "three-kinds-of-cells": ([stripes(0, 100, 101, 102)] * 2,
        ["value 0", "value 100", "value 101", "value 102"], [[0, 1, 2, 3]] * 2),
}  # fmt: skip


@pytest.mark.parametrize(("masks", "names", "rows"), CODED.values(), ids=CODED)
def test_one_class_is_one_class(tmp_path: Path, masks: list[File], names: list[str], rows: list[list[int]]) -> None:
    data = opened(tmp_path, masks=dict(zip(("a.png", "b.png"), masks, strict=True)))
    assert classes(data) == names
    assert [row(data, index) for index in range(2)] == rows
    assert data.counts.sum() == 2 * NOISE.size


def test_what_was_decided_is_told(tmp_path: Path) -> None:
    data = opened(tmp_path, masks={"a.png": stripes(0, 1), "b.png": stripes(0, 255)})
    assert "1 of 2 masks hold 1 where others hold 255: taken for the same class" in data.odd
    data = opened(tmp_path / "hidden", masks={"a.png": hidden(stripes(_RED, _BLUE), _LEFT)})
    assert "a.png: the mask has transparent pixels, taken for black" in data.odd
    clear = palette(stripes(1, 5, 7), *[(9 * i, 0, 0) for i in range(8)])
    clear.info["transparency"] = bytes([255] * 5 + [0, 255, 0])  # of the indices 5 and 7
    masks: dict[str, File] = {
        "a.png": clear,
        "b.png": stripes(1, 5),
        "c.png": hidden(stripes((5,) * 3, (1,) * 3), _LEFT),
    }
    data = opened(tmp_path / "clear", masks=masks)
    assert [row(data, index) for index in range(3)] == [[1, 2], [1, 2], [0, 1]]
    for name, taken in (("a.png", "index 5"), ("c.png", "value 0")):
        assert f"{name}: the mask has transparent pixels, taken for {taken}" in data.odd
    data = opened(tmp_path / "void", masks={"a.png": stripes(0, 1, 2, 255)})
    assert any(odd.startswith("value 255 beside 0 to 2 is taken for a class") for odd in data.odd)
    data = opened(tmp_path / "void", masks={"a.png": stripes(0, 1, 2, 255)}, ignore=[255])
    assert classes(data) == ["value 0", "value 1", "value 2"]
    assert row(data) == [0, 1, 2, 255]


_VOID = (224, 224, 192)
_INDICES = palette(stripes(0, 2, 1), _BLACK, _VOID, _RED)
IGNORED: dict[str, tuple[list[File], list[Any], list[int]]] = {
    "a-palettes-colour": ([_INDICES], [_VOID], [0, 1, 255]),
    "a-palettes-index": ([_INDICES], [1], [0, 1, 255]),
    "an-index-read-by-its-colour": ([_INDICES, palette(stripes(0, 1), _BLACK, _RED)], [2], [0, 255, 1]),
    "a-colour-of-grey-masks": ([stripes(0, 7, 9)], [(9, 9, 9)], [0, 1, 255]),
    "a-colour-of-a-grey-palette": ([palette(stripes(0, 1, 2), _BLACK, (7,) * 3, _WHITE)], [_WHITE], [0, 1, 255]),
    "a-value-of-masks-in-colour": ([stripes(_BLACK, _RED, _WHITE)], [255], [0, 1, 255]),
}  # fmt: skip


@pytest.mark.parametrize(("masks", "ignore", "labels"), IGNORED.values(), ids=IGNORED)
def test_what_is_ignored_goes_by_any_of_its_names(
    tmp_path: Path, masks: list[File], ignore: list[Any], labels: list[int]
) -> None:
    data = opened(tmp_path, masks=dict(zip(("a.png", "b.png"), masks, strict=False)), ignore=[*ignore, (3, 4, 5)])
    assert row(data) == labels
    assert "3,4,5, to be ignored: in no mask" in data.odd
    assert not any("to be ignored" in odd and "3,4,5" not in odd for odd in data.odd)


LOSSY = {
    "jpeg-named-png": ("a.png", {"format": "JPEG"}, "mask .*a.png is a JPEG, which blurs"),
    "lossy-webp": ("a.webp", {"format": "WEBP", "quality": 30}, "mask .*a.webp is a lossy WEBP, which blurs"),
    "jpeg-in-a-tiff": ("a.tif", {"format": "TIFF", "compression": "jpeg"}, "mask .*a.tif is a TIFF, which blurs"),
}
_DISC = (255 * (np.hypot(*np.mgrid[-32:32, -32:32]) < 20)).astype(np.uint8)


@pytest.mark.parametrize(("name", "options", "refusal"), LOSSY.values(), ids=LOSSY)
def test_lossy_masks_are_judged_by_their_content(
    tmp_path: Path, name: str, options: dict[str, Any], refusal: str
) -> None:
    write(tmp_path / name, _DISC, **options)
    image = {"a.png": np.resize(NOISE, _DISC.shape)}
    with pytest.raises(DataError, match=refusal):
        opened(tmp_path, images=image, masks={name: (tmp_path / name).read_bytes()})
    blurred = np.asarray(Image.open(tmp_path / name).convert("L"))
    assert len(np.unique(blurred)) > 2
    with pytest.raises(DataError, match=r"few pixels and nearly equal to others|more than 64 different values"):
        opened(tmp_path / "again", images=image, masks={"a.png": blurred})
    tinted = np.where(blurred[..., None] > 99, np.uint8(_RED), np.uint8(_BLUE)) + (blurred[..., None] % 99 // 8)
    with pytest.raises(DataError, match=r"few pixels and nearly equal to others|more than 64 different values"):
        opened(tmp_path / "tinted", images=image, masks={"a.png": tinted.astype(np.uint8)})


def test_lossless_webp_is_a_mask(tmp_path: Path) -> None:
    write(tmp_path / "a.webp", stripes(_BLACK, _RED, _BLUE), lossless=True)
    assert len(opened(tmp_path, masks={"a.webp": (tmp_path / "a.webp").read_bytes()}).classes) == 3


# ---- pictures that are turned ------------------------------------------------------------------------------------


def turned(pixels: np.ndarray, orientation: int) -> Image.Image:
    """A picture that shows ``pixels`` once turned."""
    back = {6: 8, 8: 6}.get(orientation, orientation)
    picture = Image.fromarray(pixels)
    methods = Image.Transpose
    method = {2: methods.FLIP_LEFT_RIGHT, 3: methods.ROTATE_180, 4: methods.FLIP_TOP_BOTTOM, 5: methods.TRANSPOSE,
        6: methods.ROTATE_270, 7: methods.TRANSVERSE, 8: methods.ROTATE_90}  # fmt: skip
    picture = picture.transpose(method[back])
    picture.getexif()[0x0112] = orientation
    return picture


def saved(picture: Image.Image) -> dict[str, Any]:
    return {"exif": picture.getexif()}


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_and_its_mask_fit(tmp_path: Path, orientation: int) -> None:
    labels = np.arange(NOISE.size, dtype=np.uint8).reshape(SHAPE) % 7
    image, mask = turned(labels * 30, orientation), turned(labels, orientation)
    as_stored = Image.fromarray(np.asarray(mask))
    for folder, picture in (("both", mask), ("upright", Image.fromarray(labels)), ("stored", as_stored)):
        write(tmp_path / folder / "images" / "a.png", image, **saved(image))
        write(tmp_path / folder / "masks" / "a.png", picture, **(saved(mask) if picture is mask else {}))
        opening = (tmp_path / folder / "images", tmp_path / folder / "masks")
        if orientation < 5 and folder != "both":
            with pytest.raises(DataError, match=f"EXIF orientation {orientation}, and whether .* already is cannot be"):
                open_dataset(*opening)
            continue
        data = open_dataset(*opening)
        assert torch.equal(data[0].labels, torch.from_numpy(labels))
        assert torch.equal(data[0].image[0], data[0].labels * 30)
        assert any("turned along" in odd for odd in data.odd) == (folder == "stored")
    if orientation >= 5:  # only the mask says so
        write(tmp_path / "mask" / "images" / "a.png", Image.fromarray(np.asarray(image)))
        write(tmp_path / "mask" / "masks" / "a.png", mask, **saved(mask))
        assert torch.equal(open_dataset(tmp_path / "mask")[0].labels, torch.from_numpy(labels))
        assert torch.equal(open_dataset(tmp_path / "mask")[0].image[0], torch.from_numpy(labels * 30))


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_of_pairs(tmp_path: Path) -> None:
    names = {
        "a.jpg": "a.jpg.png", "case_0000.png": "case.png", "ISIC_01.png": "ISIC_01_segmentation.png",
        unicodedata.normalize("NFD", "é.png"): unicodedata.normalize("NFC", "é_mask.png"),
        unicodedata.normalize("NFC", "ü.png"): unicodedata.normalize("NFD", "ü.png"),
        "x_0000.png": "x_0000_GT.gif",
    }  # fmt: skip
    data = opened(
        tmp_path, images={name: NOISE for name in names}, masks={name: stripes(0, 1) for name in names.values()}
    )
    assert {image.name: mask.name for image, mask in data.pairs} == names


# ---- layouts -----------------------------------------------------------------------------------------------------


def voc(root: Path) -> Path:
    """VOC2012's folders: three masks in its palette, four images, two lists."""
    colours = [voc_colour(index) for index in range(256)]
    for number, name in enumerate("abcd"):
        write(root / "JPEGImages" / f"{name}.jpg", RGB)
        if name != "d":
            write(root / "SegmentationClass" / f"{name}.png", palette(stripes(0, 15, 255, number), *colours))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\na\n")
    return root


def test_voc(tmp_path: Path) -> None:
    assert voc_colour(1) == (128, 0, 0)
    assert voc_colour(255) == (224, 224, 192)
    data = open_dataset(voc(tmp_path))
    assert (len(data), len(data.classes), data.classes[15].name) == (3, 21, "person")
    assert row(data, 1) == [0, 15, 255, 1]
    assert data.mask_values == list(range(21))
    assert open_dataset(tmp_path, split="train", layout="voc").names == ("b.jpg", "a.jpg")
    assert row(open_dataset(tmp_path, ignore=[voc_colour(15)]), 1) == [0, 255, 1]
    as_colours = Image.open(tmp_path / "SegmentationClass" / "b.png").convert("RGB")
    write(tmp_path / "SegmentationClass" / "b.png", as_colours)
    assert row(open_dataset(tmp_path), 1) == [0, 15, 255, 1]
    assert row(open_dataset(tmp_path, ignore=[15]), 1) == [0, 255, 1]
    with pytest.raises(DataError, match="no pixel of the masks counts, by VOC2012's table and what is ignored"):
        open_dataset(tmp_path, ignore=range(21))
    with pytest.raises(DataError, match="holds no JPEGImages and SegmentationClass"):
        open_dataset(tmp_path / "JPEGImages", layout="voc")


def test_msrc(tmp_path: Path) -> None:
    cow, horse = (0, 0, 128), (128, 0, 128)
    for name in ("1_1_s", "1_2_s"):
        write(tmp_path / "Images" / f"{name}.bmp", RGB)
        write(tmp_path / "GroundTruth" / f"{name}_GT.bmp", stripes(_BLACK, cow, horse, (192, 64, 0)))
    (tmp_path / "Train.txt").write_text("1_2_s.bmp\n")
    data = open_dataset(tmp_path, layout="msrc", split="Train")
    assert data.names == ("1_2_s.bmp",)
    assert (len(data.classes), data.classes[21].name, data.classes[4].name) == (22, "boat", "cow")
    assert row(data) == [0, 4, 0, 21]
    assert row(open_dataset(tmp_path, layout="msrc", ignore=[_BLACK])) == [255, 4, 0, 21]
    write(tmp_path / "GroundTruth" / "1_1_s_GT.bmp", stripes(_BLACK, (1, 2, 3)))
    with pytest.raises(DataError, match=r"mask .*1_1_s_GT.bmp holds colour 1,2,3, which is not in MSRC-v2's table"):
        open_dataset(tmp_path, layout="msrc")
    (tmp_path / "Train.txt").write_text("9_9_s.bmp\n")
    with pytest.raises(DataError, match=r"lists 9_9_s\.bmp, which has no image and mask here"):
        open_dataset(tmp_path, split="Train")


def test_carvana(tmp_path: Path) -> None:
    write(tmp_path / "train" / "car_01.jpg", RGB)
    write(tmp_path / "train_masks" / "car_01_mask.gif", palette(stripes(0, 1), _BLACK, _WHITE))
    data = open_dataset(tmp_path)
    assert (classes(data), row(data)) == (["value 0", "value 255"], [0, 1])


def test_numbered_cells(tmp_path: Path) -> None:
    cells = (np.arange(NOISE.size).reshape(SHAPE) // 4).astype(np.uint16)  # 120 of them
    with pytest.raises(DataError, match="not numbered objects"):
        opened(tmp_path, masks={"a.png": cells})
    data = open_dataset(tmp_path / "images", tmp_path / "masks", layout="cells")
    assert (classes(data), data.cells, data.mask_values) == (["background", "cell"], True, [0, 1])
    sample = data[0]
    assert sample.cells is not None
    assert torch.equal(sample.cells, torch.from_numpy(cells.astype(np.int64)))
    assert torch.equal(sample.labels, (sample.cells > 0).byte())
    assert data.counts.tolist() == [[4, NOISE.size - 4]]
    assert data.odd == ("cells in a mask: 119 to 119",)


TABLES = {
    "csv-with-heading": "name,r,g,b\nroad,200,0,0\nsky,0,0,200\nvoid,0,0,0\n",
    "colours-first": "200 0 0\troad\n0 0 200\tsky\n0 0 0\tvoid\n",
    "spaces": "# colours\n200 0 0 road\n0 0 200 sky\n0 0 0 void\n",
    "labelmap": "# label:color_rgb:parts:actions\nroad:200,0,0::\nsky:0,0,200::\nvoid:0,0,0::\n",
    "hex": "#c80000 road\n#0000C8;sky\nvoid #000000\n",
    "spaces-before-names": "200,0,0 road\n0,0,200 sky\n0,0 0 void\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_colours_by_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.txt").write_text(text)
    data = opened(tmp_path, masks={"a.png": stripes(_BLUE, _RED)}, table=tmp_path / "table.txt")
    assert classes(data) == ["road", "sky", "void"]
    assert row(data) == [1, 0]
    assert data.mask_values == [[200, 0, 0], [0, 0, 200], [0, 0, 0]]
    assert "class void: in no mask" in data.odd


def test_values_by_a_table(tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("9, cell\n0, ground\n255, ignore\n")
    data = opened(tmp_path, masks={"a.png": stripes(0, 9, 255)}, table=tmp_path / "table.txt")
    assert (classes(data), row(data), data.mask_values) == (["cell", "ground"], [1, 0, 255], [9, 0])
    assert any("do not count" in line for line in data.report().splitlines())
    (tmp_path / "table.txt").write_text("9, 2 cells\n0 ground\n")
    assert [each.name for each in read_table(tmp_path / "table.txt")] == ["2 cells", "ground"]


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ("road\n1, sky\nlake\n", "line 3, is 'lake': expected a value or a colour, and a name"),
        ("1, sky\n1, lake\n", "line 2, has the value or colour of line 1"),
        ("1, sky\n1,2,3, lake\n", "mixes values and colours"),
        ("1, sky\n", "has 1 classes: expected 2 to 255"),
        ("\x80", "no UTF-8"),
        ("9" * 5000, "expected a value or a colour"),
        ("0,0,0,255 sky\n", "line 1, is '0,0,0,255 sky': expected a value or a colour"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: str, refusal: str) -> None:
    (tmp_path / "table.txt").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=refusal):
        read_table(tmp_path / "table.txt")


# ---- what is told before training --------------------------------------------------------------------------------


def test_the_table_of_what_was_found(tmp_path: Path) -> None:
    images = {"a.png": NOISE, "b.png": NOISE, "c.tif": TWELVE[..., 0], "d.png": np.full((30, 40), 7, np.uint8)}
    masks = {
        "a.png": stripes(0, 5),
        "b.png": stripes(0, 5),
        "c.png": stripes(0, 9),
        "d.png": stripes(0, shape=(30, 40)),
    }
    report = opened(tmp_path, images=images, masks=masks).report()
    for line in (
        "images   4 grey, 8-bit PNG, 16-bit TIFF; numbers 0 to 4094",
        "sizes    2 different, 24×20 to 40×30",
        "1 (value 5)         5         2     480  18.18%",
        "odd      images of different depths: 3 of uint8, 1 of uint16",
        "odd      b.png: the same picture as a.png",
        "odd      d.png: every pixel is the same",
        "odd      class value 9: in one mask only, c.tif",
    ):
        assert line in report.splitlines()


def test_channels_have_to_agree(tmp_path: Path) -> None:
    pytest.importorskip("tifffile", reason="part of pip install 'fastunet[pictures]'")
    with pytest.raises(DataError, match=r"b.tif has 8 channels but .*a.png has 3: bring all to one number"):
        opened(tmp_path, images={"a.png": RGB, "b.tif": tiff(BANDS)})


def test_a_class_that_nothing_can_learn_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    masks = {f"{index}.png": stripes(0, 9 if index == 3 else 1) for index in range(4)}
    data = opened(tmp_path, masks=masks)
    assert unseen(data.select([0, 1, 2]), data.select([3])) == ["value 9"]
    assert unseen(data.select([3, 1]), data.select([0])) == []
    for seed in range(9):
        if 3 in (learnt := np.random.default_rng(seed).permutation(4)[:1]):
            break
    assert learnt == [3]
    small = [
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--crop",
        "32",
        "--base-c",
        "1",
        "--device",
        "cpu",
        "--seed",
        str(seed),
    ]
    folders = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert cli.main(["demo", *folders, *small, "--output", str(tmp_path / "out.png")]) == 0
    told = capsys.readouterr().out
    assert "value 9 occurs only in what is held out: it cannot be learnt" in told
    assert "odd      class value 9: in one mask only, 3.png" in told
    assert cli.main(["demo", *folders, *small, "--output", str(tmp_path / "images" / "out.png")]) == 2
    assert "would lie among the pictures that are read: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1251"])
def test_any_terminal_can_print_what_is_told(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    opened(tmp_path, images={"a.png": NOISE, "é×.png": NOISE})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    small = ["--steps", "1", "--batch-size", "2", "--crop", "32", "--base-c", "1", "--device", "cpu"]
    folders = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert cli.main(["demo", *folders, *small, "--output", str(tmp_path / "out.png")]) == 0
    terminal.seek(0)
    told = terminal.read()
    assert "sizes    24x20" in told
    assert "crops 32x32" in told


def test_what_does_not_count_is_not_scored_or_drawn(tmp_path: Path) -> None:
    data = opened(tmp_path, masks={"a.png": stripes(0, 1, 255)}, ignore=[255]).standardised()

    class Zero(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.ones_like(x[:, 0]), torch.zeros_like(x[:, 0])], 1)

    assert int(evaluate(Zero(), data, 2).matrix.sum()) == NOISE.size * 2 // 3
    sheet = pictures.figure(
        data[0].image, data[0].labels, torch.zeros(SHAPE, dtype=torch.int64), data.classes,
        title="", subtitle="", legend=["", ""],
    )  # fmt: skip
    grey, shown = np.asarray(sheet), np.array(pictures._UNCOUNTED, np.uint8)
    assert ((grey == shown).all(-1)).sum() > 20_000  # a third of the panel of the truth


def test_decoding_leaves_nothing_open(tmp_path: Path) -> None:
    write(tmp_path / "a.png", NOISE)
    path = tmp_path / "a.png"
    assert decode(path).what == "8-bit PNG"
    path.unlink()  # Windows would refuse, were it open
    with pytest.raises(DataError, match="No such file"):
        decode(path)
    with pytest.raises(DataError, match="layout 'x' is unknown: take one of folders, voc, msrc, cells"):
        open_dataset(tmp_path, layout="x")
