"""``fastunet predict | evaluate | export``, and the tiles, the preparation and the PNG writer beneath them."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import python
from sources import as_users_run
from torch import Tensor

import fastunet
from fastunet import cli, large_tiff, tiling
from fastunet.data import read_image
from fastunet.metrics import ConfusionMatrix
from fastunet.png import PngWriter
from fastunet.preparation import Preparation, white

CPU = ["--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def compiled() -> Iterator[None]:
    """As users run it, with no interpreter of kernels."""
    with as_users_run():
        yield


def lively(channels: int, classes: int) -> fastunet.UNet:
    """A small network in eval mode whose predictions are not all one class."""
    torch.manual_seed(0)
    model = fastunet.UNet(channels, classes, base_c=4)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.kaiming_normal_(p)
    with torch.no_grad():
        for _ in range(20):
            logits = model(torch.rand(4, channels, 48, 48))
        model.outc.conv.bias -= logits.mean((0, 2, 3))
    return model.eval()


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fastunet.UNet]:
    """A folder with a checkpoint of three classes as Pytorch-UNet saves it, two pictures, and their masks."""
    folder = tmp_path_factory.mktemp("colours")
    model, rng = lively(3, 3), np.random.default_rng(0)
    fastunet.save_checkpoint(folder / "model.pth", model, mask_values=[0, 100, 200])
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index, size in enumerate(((50, 70), (33, 41))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / "images" / f"{index}.png")
        Image.fromarray(rng.integers(0, 3, size, np.uint8) * 100).save(folder / "masks" / f"{index}.png")
    return folder, model


def probabilities(model: fastunet.UNet, path: Path, scale: float) -> Tensor:
    """(K, H, W) as Pytorch-UNet's predict.py makes them."""
    picture = Image.open(path)
    size = int(picture.width * scale), int(picture.height * scale)
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels).float()[None])
    small = logits.softmax(1)
    return torch.nn.functional.interpolate(small, (picture.height, picture.width), mode="bilinear")[0]


# ---- predict -----------------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_network(colours: tuple[Path, fastunet.UNet], tmp_path: Path) -> None:
    folder, model = colours
    output = tmp_path / "out"
    asked = ["predict", "-m", str(folder / "model.pth"), "-i", str(folder / "images"), "-o", str(output), *CPU]
    assert cli.main([*asked, "-v"]) == 0
    assert cli.main([*asked, "--kind", "probability", "-s", "1"]) == 0
    assert sorted(os.listdir(output)) == [f"{i}_{x}" for i in "01" for x in ("OUT.npy", "OUT.png", "OVERLAY.png")]
    for index in "01":
        path = folder / "images" / f"{index}.png"
        found = np.load(output / f"{index}_OUT.npy")
        # float32 rounding of another order of sums
        torch.testing.assert_close(torch.from_numpy(found), probabilities(model, path, 1.0), rtol=0, atol=1e-5)
        truth = probabilities(model, path, 0.5)
        mask = Image.open(output / f"{index}_OUT.png")
        sure = truth.topk(2, 0).values.diff(dim=0)[0].abs() > 1e-5
        assert sure.float().mean() > 0.99
        assert np.array_equal(np.asarray(mask)[sure], truth.argmax(0).numpy()[sure])
        assert len(np.unique(mask)) > 1
        shown = np.asarray(mask.convert("RGB"))
        overlay = (np.asarray(Image.open(path)).astype(int) + shown) // 2
        assert np.array_equal(np.asarray(Image.open(output / f"{index}_OVERLAY.png")), overlay)


def test_patterns_names_and_colours(
    colours: tuple[Path, fastunet.UNet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = colours
    monkeypatch.chdir(tmp_path)
    for name in "01":
        (tmp_path / f"{name}.png").write_bytes((folder / "images" / f"{name}.png").read_bytes())
    model = ["predict", "-m", str(folder / "model.pth"), *CPU]
    assert cli.main([*model, "-i", "?.png"]) == 0  # beside the pictures
    assert cli.main([*model, "-i", ".", "-o", "a.png", "b.png", "--kind", "colour", "--tta"]) == 0  # without 0_OUT.png
    assert sorted(os.listdir()) == ["0.png", "0_OUT.png", "1.png", "1_OUT.png", "a.png", "b.png"]
    assert Image.open("0_OUT.png").mode == "P"
    plain, turned = (np.asarray(Image.open(name).convert("RGB")) for name in ("0_OUT.png", "a.png"))
    assert plain.shape == turned.shape
    assert 0 < (plain != turned).any(-1).mean() < 0.7
    assert cli.main([*model, "-i", "0.png", "-n", "-v"]) == 0
    assert "0_OVERLAY.png" in os.listdir()


def test_pictures_of_another_depth_and_names_as_ours(
    colours: tuple[Path, fastunet.UNet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = colours
    for name in ("a.png", "a_OUT.png", "check_OUT.png"):  # the second is what an earlier call would have left
        shutil.copy(folder / "images" / "0.png", tmp_path / name)
    np.save(tmp_path / "wide.npy", np.full((3, 32, 32), 60000, np.uint16))
    np.save(tmp_path / "unit.npy", np.full((3, 32, 32), 0.5, np.float32))
    model = ["-m", str(folder / "model.pth"), *CPU]
    output = tmp_path / "run-1.5"  # a folder, whatever its dot
    assert cli.main(["predict", *model, "-i", str(tmp_path), "-o", str(output)]) == 0
    assert sorted(os.listdir(output)) == ["a_OUT.png", "check_OUT_OUT.png", "unit_OUT.png", "wide_OUT.png"]
    told = "numbers up to {} for a network that was trained on numbers up to 255"
    assert capsys.readouterr().err.splitlines() == [
        f"odd      {tmp_path / 'unit.npy'}: float32 {told.format(0.5)}",
        f"odd      {tmp_path / 'wide.npy'}: uint16 {told.format(60000)}",
    ]


def test_a_single_channel_has_a_threshold(tmp_path: Path) -> None:
    model = lively(1, 1)
    fastunet.save_checkpoint(tmp_path / "model.pth", model)
    pixels = np.random.default_rng(0).integers(0, 4096, (48, 64)).astype(np.uint16)
    np.save(tmp_path / "wide.npy", pixels)
    for threshold in ("0.3", "0.7"):
        asked = [
            "-m",
            str(tmp_path / "model.pth"),
            "-i",
            str(tmp_path / "wide.npy"),
            "-t",
            threshold,
            "-s",
            "1",
            "-v",
            *CPU,
        ]
        assert cli.main(["predict", *asked]) == 0
        p = model.predict_proba(torch.from_numpy(pixels.astype(np.float32) / 255)[None, None])[0, 0]
        found = torch.from_numpy(np.asarray(Image.open(tmp_path / "wide_OUT.png")).copy())
        sure = (p - float(threshold)).abs() > 1e-5
        assert torch.equal(found[sure] == 1, (p > float(threshold))[sure])


# ---- tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (449, 17), (224, 224), (16, 480)], ids=str)
def test_tiles_change_nothing(size: tuple[int, int]) -> None:
    """Here for a blur of 27×27, which sees 13 pixels around; 14 are thrown away at the edges of tiles."""
    image = torch.randn(2, *size)
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return torch.nn.functional.avg_pool2d(x, 27, 1, 13)

    def read(rows: Any, columns: Any) -> Tensor:
        return image[:, rows[:, None], columns]

    parts = list(tiling.bands(network, read, *size, tile=96, overlap=32))
    assert all(part.shape[1] <= 96 for part in parts)
    assert all(max(shape) <= 96 and not (shape[0] % 16 or shape[1] % 16) for shape in seen)
    padded = np.pad(image.numpy(), [(0, 0), (13, 13), (13, 13)], "reflect")  # as the picture is continued
    whole = torch.nn.functional.avg_pool2d(torch.from_numpy(padded), 27, 1)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


def test_a_network_in_tiles_is_the_network() -> None:
    model = lively(1, 2)
    image = torch.randn(1, 600, 700)

    def read(rows: Any, columns: Any) -> Tensor:
        return image[:, rows[:, None], columns]

    tiles = torch.cat(list(tiling.bands(model.predict_proba, read, 600, 700, tile=512, overlap=256)), 1)
    whole = model.predict_proba(image[None])[0]
    inside = (slice(None), slice(128, -128), slice(128, -128))
    torch.testing.assert_close(tiles[inside], whole[inside], rtol=0, atol=1e-5)
    assert not torch.allclose(tiles, whole, atol=1e-3)  # zeros beyond the borders, or the mirror image
    small = image[:, :7, :30]
    (part,) = tiling.bands(model.predict_proba, lambda r, c: small[:, r[:, None], c], 7, 30)
    assert part.shape == (2, 7, 30)


def test_symmetries_are_undone() -> None:
    x = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(tiling.symmetric(lambda x: 2 * x)(x), 2 * x)
    shifted = tiling.symmetric(lambda x: x.roll(1, -1))(x)
    torch.testing.assert_close(shifted, (x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)) / 4)


def test_png_of_rows(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 7, (50, 33), np.uint8)
    for palette in (None, [(i, 2 * i, 255 - i) for i in range(7)]):
        rows = pixels if palette else np.stack([pixels, pixels + 1, pixels + 2], -1)
        file = io.BytesIO()
        writer = PngWriter(file, 33, 50, palette)
        writer.write(rows[:1])
        writer.write(rows[1:])
        writer.close()
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture), rows)
            assert picture.mode == ("P" if palette else "RGB")


def test_a_resized_picture_is_restored() -> None:
    pixels = (np.add.outer(np.arange(60), np.arange(40)) * 2).astype(np.uint8)[None]
    for preparation in (Preparation("unit", scale=0.5), Preparation("unit", square=64), Preparation("unit")):
        wide = preparation.image(pixels.astype(np.int32))  # whose resizing is another path
        torch.testing.assert_close(preparation.image(pixels), wide, rtol=0, atol=1.01 / 255)
        image = preparation.image(pixels)
        bands = list(preparation.restored([image[:, :3], image[:, 3:4], image[:, 4:20], image[:, 20:]], 60, 40))
        back = torch.cat(bands, 1)
        torch.testing.assert_close(back, torch.cat(list(preparation.restored([image], 60, 40)), 1))
        if preparation.square is None:
            assert len(bands) > 1 or not preparation.resizes
            torch.testing.assert_close(back, torch.nn.functional.interpolate(image[None], (60, 40), mode="bilinear")[0])
        torch.testing.assert_close(
            back[0, 4:-4, 4:-4], torch.from_numpy(pixels[0, 4:-4, 4:-4] / np.float32(255)), rtol=0, atol=0.02
        )
        assert preparation.labels(pixels[0]).shape == preparation.size(60, 40)
    standard = Preparation("standard").image(pixels)
    assert standard.mean().abs() < 1e-5
    assert standard.std(correction=0) == pytest.approx(1, abs=1e-5)
    assert [white(x) for x in (0.5, 200, 4095, 1e6)] == [1, 255, 65535, 1e6]


@pytest.mark.parametrize("scale", [0.5, 0.37, 0.9])
@pytest.mark.parametrize("channels", [1, 3])
def test_parts_are_resized_as_the_whole(scale: float, channels: int) -> None:
    rng = np.random.default_rng(0)
    for pixels in (rng.integers(0, 256, (channels, 211, 150), np.uint8), rng.random((channels, 90, 121), np.float32)):
        preparation = Preparation("unit", scale=scale)
        whole, parts = preparation.resized(pixels), preparation.in_parts(pixels)
        assert (parts.shape, parts.dtype) == (whole.shape, whole.dtype)
        rows, columns = (
            tiling.mirrored(start, start + 45, n) for start, n in zip((-7, 20), whole.shape[1:], strict=True)
        )
        found, expected = (each[:, rows[:, None], columns].astype(np.float64) for each in (parts, whole))
        # Pillow rounds its weights of 8-bit pixels, and where a box begins to float32.
        atol = 1e-3 if pixels.dtype == np.float32 else 0 if scale == 0.5 else 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
        assert (found != expected).mean() < 0.05 or pixels.dtype == np.float32


# ---- TIFFs that are read in parts --------------------------------------------------------------------------------

_TILES, _STRIPS = {"tile": (32, 48)}, {"rowsperstrip": 7}
_GREY = np.random.default_rng(0).integers(0, 256, (90, 130), np.uint8)
_COLOUR = np.random.default_rng(1).integers(0, 256, (90, 130, 4), np.uint8)
LARGE: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "one-strip": (_GREY, {}),
    "packed-tiles": (_COLOUR[..., :3], {**_TILES, "compression": "zlib", "predictor": True, "photometric": "rgb"}),
    "alpha": (_COLOUR, {**_STRIPS, "compression": "lzw", "photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "planes": (_COLOUR.transpose(2, 0, 1)[:3].copy(), {**_TILES, "photometric": "rgb", "planarconfig": "separate"}),
    "plane-after-plane": (_COLOUR.transpose(2, 0, 1)[:3].copy(), {"photometric": "rgb", "planarconfig": "separate"}),
    "float-of-another-order": (_GREY / np.float32(3), {**_TILES, "compression": 8, "predictor": 3, "byteorder": ">"}),
    "jpeg": (_COLOUR[..., :3], {"tile": (32, 48), "compression": "jpeg", "photometric": "rgb"}),
    "16-bit-of-another-order": (_GREY.astype(">u2") * 257, {**_TILES, "compression": "zstd", "byteorder": ">"}),
    "0-is-white": (_GREY, {**_STRIPS, "photometric": "miniswhite"}),
    "float": (_GREY / np.float32(3), {**_TILES, "compression": "deflate", "predictor": True}),
    "palette": (_GREY, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256) * 85}),
    "overview": (_GREY, {**_TILES, "bigtiff": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_what_is_read_in_parts_is_the_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile", reason="part of pip install 'fastunet[pictures]'")
    pixels, options = LARGE[name]
    path, order = tmp_path / "large.tif", {k: options[k] for k in ("bigtiff", "byteorder") if k in options}
    with tifffile.TiffWriter(path, **order) as writer:
        writer.write(pixels, **{k: v for k, v in options.items() if k not in order}, metadata=None)
        if name == "overview":
            writer.write(pixels[::2, ::2], subfiletype=1, metadata=None)
    assert large_tiff.opened(path, 1) is None
    whole = read_image(path)
    channels = max(len(whole), 3)
    monkeypatch.setattr("fastunet.decode.MAX_PIXELS", 1000)
    large = large_tiff.opened(path, channels)
    assert large is not None
    assert large.shape == (channels, *whole.shape[1:])
    assert large.dtype == whole.dtype
    levels = [Preparation("standard").levels(each) for each in (large, whole)]
    assert levels[0] == pytest.approx(levels[1])
    rows, columns = tiling.mirrored(-20, 60, 90), tiling.mirrored(70, 150, 130)
    for _ in range(2):  # forwards and back again
        for key in ((slice(None), slice(5, 40)), (slice(None), rows[:, None], columns), (slice(None), slice(60, 90))):
            assert np.array_equal(large[key], np.broadcast_to(whole, large.shape)[key])


def test_a_large_tiff_is_predicted_as_any_picture(
    colours: tuple[Path, fastunet.UNet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tifffile = pytest.importorskip("tifffile", reason="part of pip install 'fastunet[pictures]'")
    folder, model = colours
    path, damaged = tmp_path / "large.tif", tmp_path / "damaged.tif"
    tifffile.imwrite(path, _COLOUR[..., :3], tile=(32, 48), compression="zlib", photometric="rgb")
    damaged.write_bytes(path.read_bytes()[:-5000])
    asked = ["predict", "-m", str(folder / "model.pth"), "-v", "--tile", "64", "--overlap", "32", *CPU, "-i"]
    for kind, scale in (("index", "1"), ("probability", "0.5")):
        written = []
        for most in (1 << 26, 1000):
            monkeypatch.setattr("fastunet.decode.MAX_PIXELS", most)
            assert cli.main([*asked, str(path), "--kind", kind, "-s", scale]) == 0
            written.append({file.name: file.read_bytes() for file in tmp_path.glob("large_*")})
        assert written[0] == written[1]
    before = sorted(os.listdir(tmp_path))
    squares = fastunet.trained.Trained(model, Preparation("unit", square=64), (), (0, 100, 200)).facts()
    fastunet.save_checkpoint(tmp_path / "squares.pth", model, mask_values=[0, 100, 200], fastunet=squares)
    for file, other, refusal in (
        (damaged, "model.pth", f"cannot read {damaged} (damaged, or not a picture): replace it"),
        (
            path,
            str(tmp_path / "squares.pth"),
            "large.tif has 130×90 pixels, too many for a square of one picture: cut it",
        ),
    ):
        capsys.readouterr()
        assert cli.main([*asked, str(file), "-m", str(folder / other)]) == 2
        assert refusal in capsys.readouterr().err
    (tmp_path / "squares.pth").unlink()
    assert sorted(os.listdir(tmp_path)) == before
    turned = tmp_path / "turned.tif"
    for why, pixels, options in (
        ("it is turned where it is shown, orientation 6", _GREY, {"extratags": [(274, 3, 1, 6, True)]}),
        ("its colours are multiplied by their opacity", _COLOUR, {"extrasamples": ["assocalpha"]}),
        ("its colours are of kind 5", _COLOUR, {"photometric": "separated"}),
        ("its numbers are of 1 bits and type bool", _GREY > 99, {}),
    ):
        tifffile.imwrite(turned, pixels, **{"photometric": "rgb" if pixels.ndim == 3 else None, **options})
        with pytest.raises(fastunet.data.DataError, match=f"in parts it cannot be, {why}"):
            large_tiff.opened(turned, 1)
    for tag, value in ((322, 1 << 31), (257, 1 << 31)):  # of what a header says no memory is taken
        tifffile.imwrite(turned, _GREY, tile=(32, 48))
        with tifffile.TiffFile(turned, mode="r+b") as file:
            file.pages[0].tags[tag].overwrite(value)
        if tag == 322:
            with pytest.raises(fastunet.data.DataError, match=r"its strips have [\d,]+ bytes, of at most"):
                large_tiff.opened(turned, 1)
        else:
            assert np.array_equal(large_tiff.opened(turned, 1)[:, :40], _GREY[None, :40])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(fastunet.data.DataError, match=r"has to be read in parts: pip install 'fastunet\[pictures\]'"):
        large_tiff.opened(path, 3)


# A picture of 24000×6000 in colours, 432 MB, in tiles that are packed: what is added to the memory by reading it in
# windows, at half its size, and making rows of its own size again.
STREAMED = """
import resource, sys, numpy as np, tifffile, torch
from pathlib import Path
from fastunet import large_tiff, preparation, tiling

path, height, width = Path(sys.argv[1]), 24_000, 6000
tile = np.add.outer(np.arange(256), np.arange(256)).astype(np.uint8)[..., None] // np.array([1, 2, 3], np.uint8)
count = (height // 256 + 1) * (width // 256 + 1)
tifffile.imwrite(path, (tile for _ in range(count)), shape=(height, width, 3), dtype=np.uint8, tile=(256, 256),
    compression="zlib", photometric="rgb")
prepare = preparation.Preparation("unit", scale=0.5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = prepare.in_parts(large_tiff.opened(path, 3))
read = lambda rows, columns: prepare.normalised(large[:, rows[:, None], columns], 0, 255)
bands = prepare.restored(tiling.bands(lambda x: x[:, :1], read, height // 2, width // 2), height, width)
print(sum(band.shape[1] for band in bands), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_window(tmp_path: Path) -> None:
    for package in ("tifffile", "resource"):
        pytest.importorskip(package, reason="tifffile is part of pip install 'fastunet[pictures]', resource of Unix")
    done = python("-c", STREAMED, str(tmp_path / "large.tif"))
    assert done.returncode == 0, done.stderr
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == 24_000
    # Tiles of 2048 rows and more, 46 MB; a band of float32 with what it is blended with, and 256 rows of the result
    assert kilobytes * (1 if sys.platform == "darwin" else 1024) < 300e6, done.stdout


# ---- evaluate ----------------------------------------------------------------------------------------------------


def test_evaluate_counts_and_draws(
    colours: tuple[Path, fastunet.UNet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = colours
    data = [str(folder / "images"), str(folder / "masks"), "-m", str(folder / "model.pth"), *CPU]
    assert cli.main(["evaluate", *data, "-s", "1", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    matrix = ConfusionMatrix(3)
    for index in "01":
        labels = torch.from_numpy(np.asarray(Image.open(folder / "masks" / f"{index}.png")) // 100)
        matrix.update(probabilities(model, folder / "images" / f"{index}.png", 1.0)[None], labels[None])
    assert scores["miou"] == pytest.approx(float(matrix.miou), abs=1e-3)
    assert np.abs(np.array(scores["matrix"]) - matrix.matrix.numpy()).sum() <= 4  # pixels between two classes
    assert cli.main(["evaluate", *data, "-o", str(tmp_path / "matrix.png")]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("1 (value 100)", "mean", "precision", "accuracy", "over 2 pictures"))
    with Image.open(tmp_path / "matrix.png") as drawn:
        assert drawn.width > 3 * 56 < drawn.height


def test_classes_are_told_by_their_values(colours: tuple[Path, fastunet.UNet], tmp_path: Path) -> None:
    """Masks that lack a class are still scored right, and those with another value refused: see test_wrong_calls."""
    folder, _ = colours
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "0.png").write_bytes((folder / "images" / "0.png").read_bytes())
    labels = np.zeros((50, 70), np.uint8)
    labels[:, 30:] = 200
    Image.fromarray(labels).save(tmp_path / "masks" / "0.png")
    network = fastunet.trained.load(folder / "model.pth")
    assert network.labels_of([0, 200], 255)[:3].tolist() == [0, 2, 255]
    data = [str(tmp_path / "images"), str(tmp_path / "masks"), "-m", str(folder / "model.pth"), *CPU]
    assert cli.main(["evaluate", *data]) == 0


# ---- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_programs_take_any_batch_and_size(
    suffix: str, colours: tuple[Path, fastunet.UNet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    folder, model = colours
    output = tmp_path / f"model{suffix}"
    status = cli.main(["export", "-m", str(folder / "model.pth"), "-o", str(output)])
    printed = capsys.readouterr()
    if fastunet.versions.numbers(torch.__version__) < (2, 13):
        assert (status, os.listdir(tmp_path)) == (2, [])
        assert "cannot export a network for any height and width: take 2.13 or newer" in printed.err
        return
    assert status == 0
    assert "any N" in printed.out
    assert os.listdir(tmp_path) == [output.name]
    images = torch.randn(2, 3, 50, 39)
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    else:
        found = torch.export.load(output).module()(images)
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)


def test_a_program_that_differs_is_not_written(
    colours: tuple[Path, fastunet.UNet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, model = colours
    monkeypatch.setattr("fastunet.export.exported", lambda *_: (b"", lambda x: 1.1 * model(x)))
    assert cli.main(["export", "-m", str(folder / "model.pth"), "-o", str(tmp_path / "model.onnx")]) == 2
    assert "differs from the network by 1.0e-01" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
