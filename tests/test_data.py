"""Pictures: what is paired with what, how files become tensors and classes, and one sentence for every mistake."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastunet.data import DataError, find_pairs, generated, open_folders, random_crops

SIZE = (24, 20)  # width, height


def _noise(seed: int = 0, shape: tuple[int, ...] = SIZE[::-1]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _halves(*values: int | tuple[int, ...], size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask of vertical stripes, one per value."""
    stripes = np.array(values, np.uint8)[np.arange(size[0]) * len(values) // size[0]]
    return np.broadcast_to(stripes, (size[1], *stripes.shape)).copy()


def _write(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> None:
    path.parent.mkdir(exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two good pairs, a and b: grey images, masks of 0 and 255."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for seed, name in enumerate("ab"):
        _write(images / f"{name}.png", _noise(seed))
        _write(masks / f"{name}.png", _halves(0, 255))
    return images, masks


# ---- pairing -----------------------------------------------------------------------------------------------------

PAIRINGS = {
    "same-name": (["a.png", "b.png"], ["a.png", "b.png"]),
    "other-suffix": (["a.jpg", "b.TIF"], ["a.gif", "b.png"]),
    "mask": (["a.png", "b.png"], ["a_mask.png", "b_mask.gif"]),
    "GT": (["1_9_s.bmp"], ["1_9_s_GT.bmp"]),
    "case": (["a.png", "b.png"], ["a_gt.png", "b_MASK.png"]),
    "mixed": (["a.png", "b.png"], ["a.png", "b_mask.png"]),
    "image-called-mask": (["a.png", "a_mask.png"], ["a_GT.png", "a_mask.png"]),
}


@pytest.mark.parametrize(("images", "masks"), PAIRINGS.values(), ids=PAIRINGS)
def test_pairs_by_stem_and_ending(tmp_path: Path, images: list[str], masks: list[str]) -> None:
    for folder, names in (("images", images), ("masks", masks)):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    (tmp_path / "images" / "notes.txt").touch()
    (tmp_path / "masks" / ".hidden.png").touch()
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert [(image.name, mask.name) for image, mask in pairs] == list(zip(images, masks, strict=True))


def test_images_and_masks_may_share_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "a_mask.png", "b.png", "b_GT.png"):
        (tmp_path / name).touch()
    pairs = find_pairs(tmp_path, tmp_path)
    assert [(i.name, m.name) for i, m in pairs] == [("a.png", "a_mask.png"), ("b.png", "b_GT.png")]


# ---- images ------------------------------------------------------------------------------------------------------

_GREY, _RGB = _noise(), _noise(1, (*SIZE[::-1], 3))
_WIDE = _GREY.astype(np.uint16) * 16  # a 12-bit camera in a 16-bit file
IMAGES: dict[str, tuple[Image.Image, str, np.ndarray]] = {
    "grey": (Image.fromarray(_GREY), "png", _GREY[None]),
    "grey-alpha": (Image.fromarray(_GREY).convert("LA"), "png", _GREY[None]),
    "grey-as-rgb": (Image.fromarray(_GREY).convert("RGB"), "png", _GREY[None]),
    "16-bit-png": (Image.fromarray(_WIDE), "png", _WIDE[None]),
    "16-bit-tiff": (Image.fromarray(_WIDE), "tif", _WIDE[None]),
    "float-tiff": (Image.fromarray(_GREY.astype(np.float32) / 7), "tif", _GREY[None]),
    "bilevel": (Image.fromarray(_GREY > 99), "png", _GREY[None] > 99),
    "rgb": (Image.fromarray(_RGB), "png", _RGB.transpose(2, 0, 1)),
    "rgba": (Image.fromarray(_RGB).convert("RGBA"), "png", _RGB.transpose(2, 0, 1)),
    "pnm": (Image.fromarray(_RGB), "ppm", _RGB.transpose(2, 0, 1)),
    "webp": (Image.fromarray(_RGB), "webp", _RGB.transpose(2, 0, 1)),
}


@pytest.mark.parametrize(("picture", "suffix", "truth"), IMAGES.values(), ids=IMAGES)
def test_image_of_any_mode_is_standardised(
    tmp_path: Path, picture: Image.Image, suffix: str, truth: np.ndarray
) -> None:
    _write(tmp_path / "images" / f"a.{suffix}", picture, **({"lossless": True} if suffix == "webp" else {}))
    _write(tmp_path / "masks" / "a.png", _halves(0, 1))
    data = open_folders(tmp_path / "images", tmp_path / "masks")
    expected = torch.from_numpy((truth - truth.mean()) / truth.std())
    assert data.channels == len(truth)
    # one float32 rounding of values up to about 4
    torch.testing.assert_close(data[0].image.double(), expected, atol=1e-6, rtol=0)


def test_palette_image_is_read_in_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(_RGB).quantize(8)
    _write(tmp_path / "images" / "a.gif", picture)
    _write(tmp_path / "masks" / "a.png", _halves(0, 1))
    truth = np.asarray(picture.convert("RGB"), np.float64).transpose(2, 0, 1)
    image = open_folders(tmp_path / "images", tmp_path / "masks")[0].image
    torch.testing.assert_close(
        image.double(), torch.from_numpy((truth - truth.mean()) / truth.std()), atol=1e-6, rtol=0
    )


def test_one_colour_image_makes_the_set_colour(folders: tuple[Path, Path]) -> None:
    _write(folders[0] / "b.png", _RGB)
    data = open_folders(*folders)
    assert [tuple(pair.image.shape) for pair in data] == [(3, 20, 24)] * 2
    assert torch.equal(data[0].image[0], data[0].image[2])


def test_constant_image_is_zero(folders: tuple[Path, Path]) -> None:
    _write(folders[0] / "a.png", np.full(SIZE[::-1], 77, np.uint8))
    assert not open_folders(*folders)[0].image.any()


def test_turned_photo_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    _write(tmp_path / "images" / "a.png", _GREY, exif=exif)
    _write(tmp_path / "masks" / "a.png", _halves(0, 1, size=SIZE[::-1]))
    assert open_folders(tmp_path / "images", tmp_path / "masks")[0].image.shape == (1, 24, 20)


# ---- masks -------------------------------------------------------------------------------------------------------


def _palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette(list(itertools.chain(*colours)))
    return picture


_RED, _BLUE, _BLACK = (200, 0, 0), (0, 0, 200), (0, 0, 0)
_BINARY = Image.fromarray(_halves(0, 255) > 0)
# masks of a and b; names of the classes; classes of the left and right half of a, then of b
MASKS: dict[str, tuple[list[object], list[str], list[int]]] = {
    "0-255": ([_halves(0, 255), _halves(255, 0)], ["value 0", "value 255"], [0, 1, 1, 0]),
    "gaps": ([_halves(3, 200), _halves(7, 3)], ["value 3", "value 7", "value 200"], [0, 2, 1, 0]),
    "16-bit": (
        [_halves(0, 1).astype(np.uint16) * 1000, _halves(0, 2).astype(np.uint16) * 1000],
        ["value 0", "value 1000", "value 2000"],
        [0, 1, 0, 2],
    ),
    "bilevel-and-grey": ([_BINARY, _halves(255, 0)], ["value 0", "value 255"], [0, 1, 1, 0]),
    "grey-as-rgb": ([_halves((0,) * 3, (9,) * 3), _halves(9, 0)], ["value 0", "value 9"], [0, 1, 1, 0]),
    "palette-indices": (
        [_palette(_halves(0, 1), _BLACK, _RED, _BLUE), _palette(_halves(0, 2), _BLACK, _RED, _BLUE)],
        ["value 0", "value 1", "value 2"],
        [0, 1, 0, 2],
    ),
    "palettes-that-differ": (
        [_palette(_halves(0, 1), _BLACK, _RED), _palette(_halves(0, 1), _RED, _BLACK)],
        ["colour 0,0,0", "colour 200,0,0"],
        [0, 1, 1, 0],
    ),
    "colours": (
        [_halves(_BLACK, _RED), _halves(_BLUE, _RED)],
        ["colour 0,0,0", "colour 0,0,200", "colour 200,0,0"],
        [0, 2, 1, 2],
    ),
    "colours-and-grey": ([_halves(_BLACK, _RED), _halves(0, 0)], ["colour 0,0,0", "colour 200,0,0"], [0, 1, 0, 0]),
    "rgba": (
        [Image.fromarray(_halves(_BLACK, _RED)).convert("RGBA")] * 2,
        ["colour 0,0,0", "colour 200,0,0"],
        [0, 1] * 2,
    ),
}


@pytest.mark.parametrize(("masks", "names", "classes"), MASKS.values(), ids=MASKS)
def test_mask_values_become_classes(
    folders: tuple[Path, Path], masks: list[np.ndarray], names: list[str], classes: list[int]
) -> None:
    for name, mask in zip("ab", masks, strict=True):
        _write(folders[1] / f"{name}.png", mask)
    data = open_folders(*folders)
    assert [c.name for c in data.classes] == names
    corners = [int(pair.labels[0, column]) for pair in data for column in (0, -1)]
    assert corners == classes
    assert data[0].labels.shape == (20, 24)


def test_colour_masks_keep_their_colours(folders: tuple[Path, Path]) -> None:
    for name in "ab":
        _write(folders[1] / f"{name}.png", _halves(_RED, _BLUE))
    assert [c.colour for c in open_folders(*folders).classes] == [_BLUE, _RED]
    for name, other in (("a", 1), ("b", 2)):
        _write(folders[1] / f"{name}.png", _palette(_halves(0, other), _BLACK, _RED, _BLUE))
    assert [c.colour for c in open_folders(*folders).classes] == [_BLACK, _RED, _BLUE]
    _write(folders[1] / "b.png", _palette(_halves(1, 2), _BLACK, _RED, _RED))  # does not tell 1 from 2
    assert [c.colour for c in open_folders(*folders).classes] == [None] * 3


# ---- mistakes ----------------------------------------------------------------------------------------------------


# what is done to the good folders; what the message must say


def test_folder_of_images_alone_cannot_be_both(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="images or masks but not both"):
        open_folders(folders[0], folders[0])


# ---- splitting and cropping --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.2, 2), (2, 0.01, 1), (2, 0.99, 1), (5, 0.5, 2)])
def test_split_is_a_partition(count: int, share: float, expected: int) -> None:
    data = generated(count, 32)
    train, held_out = data.split(share, np.random.default_rng(3))
    assert len(held_out) == expected
    assert sorted(train.names + held_out.names) == sorted(data.names)
    assert held_out[0].name == held_out.names[0]


def test_a_single_picture_is_cut_in_two(tmp_path: Path) -> None:
    _write(tmp_path / "images" / "a.png", _noise(shape=(20, 50)))
    _write(tmp_path / "masks" / "a.png", _halves(0, 255, size=(50, 20)))
    data = open_folders(tmp_path / "images", tmp_path / "masks")
    train, held_out = data.split(0.4, np.random.default_rng(0))
    assert torch.equal(torch.cat([train[0].image, held_out[0].image], -1), data[0].image)
    assert torch.equal(torch.cat([train[0].labels, held_out[0].labels], -1), data[0].labels)
    assert held_out[0].labels.shape == (20, 20)


def test_a_single_small_picture_cannot_be_split(tmp_path: Path) -> None:
    _write(tmp_path / "images" / "a.png", _GREY)
    _write(tmp_path / "masks" / "a.png", _halves(0, 1))
    with pytest.raises(DataError, match="only picture and too small"):
        open_folders(tmp_path / "images", tmp_path / "masks").split(0.2, np.random.default_rng(0))


@pytest.mark.parametrize("size", [16, 20, 32, 100], ids=["inside", "one-axis-full", "larger", "reflected-often"])
def test_crops_keep_image_and_labels_aligned(tmp_path: Path, size: int) -> None:
    mask = np.random.default_rng(0).permutation(np.arange(480) % 8).reshape(20, 24).astype(np.uint8)
    _write(tmp_path / "images" / "a.png", mask * 30)
    _write(tmp_path / "masks" / "a.png", mask)
    data = open_folders(tmp_path / "images", tmp_path / "masks")
    images, labels = next(random_crops(data, size, 8, np.random.default_rng(0)))
    assert images.shape == (8, 1, size, size)
    assert images.dtype == torch.float32
    assert labels.shape == (8, size, size)
    assert labels.dtype == torch.int64
    # the image is an affine function of its labels: two float32 roundings of values below 2
    expected = (labels * 30 - 30.0 * mask.mean()) / (30.0 * mask.std())
    torch.testing.assert_close(images[:, 0].double(), expected.double(), atol=1e-6, rtol=0)
    assert len({tuple(crop.flatten().tolist()) for crop in labels}) > 4  # turned, mirrored, moved


def test_small_pictures_are_continued_by_reflection(tmp_path: Path) -> None:
    mask = np.arange(16, dtype=np.uint8)[None].repeat(16, 0)
    _write(tmp_path / "images" / "a.png", mask)
    _write(tmp_path / "masks" / "a.png", mask)
    data = open_folders(tmp_path / "images", tmp_path / "masks")
    _, labels = next(random_crops(data, 40, 16, np.random.default_rng(0)))
    steps = torch.stack([labels.diff(dim=1).abs().amax((1, 2)), labels.diff(dim=2).abs().amax((1, 2))])
    assert torch.equal(steps.amax(0), torch.ones(16, dtype=torch.int64))  # no jump: neither wrapped nor padded
    assert torch.equal(labels.amax((1, 2)), torch.full((16,), 15))


def test_every_picture_is_visited_before_one_is_visited_again(tmp_path: Path) -> None:
    for index in range(5):
        _write(tmp_path / "images" / f"{index}.png", _noise(index))
        _write(tmp_path / "masks" / f"{index}.png", _halves(index))
    data = open_folders(tmp_path / "images", tmp_path / "masks")
    batches = random_crops(data, 16, 5, np.random.default_rng(0))
    for _, labels in itertools.islice(batches, 3):
        assert sorted(labels[:, 0, 0].tolist()) == [0, 1, 2, 3, 4]


def test_crops_follow_the_seed() -> None:
    data = generated(3, 48)
    first, again, other = (next(random_crops(data, 32, 4, np.random.default_rng(seed)))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- the generated set -------------------------------------------------------------------------------------------


def test_generated_set_is_deterministic() -> None:
    one, two, other = generated(2, 96), generated(2, 96), generated(2, 96, seed=1)
    for pair, same in zip(one, two, strict=True):
        assert torch.equal(pair.image, same.image)
        assert torch.equal(pair.labels, same.labels)
    assert not torch.equal(one[0].labels, other[0].labels)
    assert not torch.equal(one[0].labels, one[1].labels)


def test_generated_set_has_three_classes_that_a_threshold_does_not_find() -> None:
    data = generated()
    assert [c.name for c in data.classes] == ["membrane", "cytoplasm", "nucleus"]
    share = torch.bincount(data[0].labels.flatten(), minlength=3) / data[0].labels.numel()
    assert share.min() > 0.05
    membrane = data[0].labels == 0
    overlaps = [
        float((found & membrane).sum() / (found | membrane).sum())
        for found in (data[0].image[0] < level for level in np.linspace(-2, 1, 31))
    ]
    assert max(overlaps) < 0.8
