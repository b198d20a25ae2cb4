"""The commands, end to end: what they print and write, and how they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

import fastunet
from fastunet import cli, demo, info, pictures
from fastunet.data import ClassName
from fastunet.errors import UserError
from fastunet.options import enough_memory

QUICK = ["--steps", "2", "--batch-size", "2", "--crop", "32", "--base-c", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would take minutes where the torch backend takes seconds."""
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three pictures of bright squares on noise, as arguments."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(3):
        mask = np.zeros((48, 40), np.uint8)
        top, left = rng.integers(4, 20, 2)
        mask[top : top + 18, left : left + 16] = 255
        image = (mask // 2 + rng.integers(0, 80, mask.shape)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}_mask.png")
    return ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]


# ---- demo --------------------------------------------------------------------------------------------------------


def test_demo_on_generated_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.png"
    assert cli.main(["demo", *QUICK, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    for text in ("10 to learn from, 2 held out", "0 (membrane)", "2 (nucleus)", "mean", "IoU", "Dice", "ms per step"):
        assert text in printed.out
    assert "100%" in printed.err  # the progress bar
    with Image.open(output) as picture:
        picture.load()
        assert picture.width > 2 * picture.height > 0
    assert os.listdir(tmp_path) == ["out.png"]


def test_demo_learns_the_users_pictures(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "40", "--batch-size", "4", "--crop", "32", "--base-c", "4", "--lr", "0.01", "--device", "cpu"]
    assert cli.main(["demo", *folders, *small, "--json", "--output", str(tmp_path / "out.png")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in scores["classes"]] == ["0 (value 0)", "1 (value 255)"]
    assert scores["miou"] == pytest.approx(sum(c["iou"] for c in scores["classes"]) / 2)
    assert scores["miou"] > 0.7
    assert scores["dice"] > scores["miou"]
    assert scores["seconds_per_step"] > 0
    assert len(scores["held_out"]) == 1


@pytest.mark.parametrize("up", [[], ["--bilinear"]], ids=["transposed", "bilinear"])
def test_demo_repeats_itself_for_a_seed(
    folders: list[str], up: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(seed: int) -> dict[str, object]:
        arguments = ["demo", *folders, *QUICK, *up, "--json", "--seed", str(seed), "--output", str(tmp_path / "o.png")]
        assert cli.main(arguments) == 0
        scores: dict[str, object] = json.loads(capsys.readouterr().out)
        return {name: scores[name] for name in ("loss", "classes", "held_out")}

    assert run(0) == run(0)
    assert run(0)["loss"] != run(1)["loss"]


REFUSALS = {
    "images-alone": (["--images", "."], "--images and --masks belong together"),
    "missing-images": (["--images", "nowhere", "--masks", "."], "--images nowhere does not exist"),
    "missing-output-folder": (["--output", "no/where.png"], "no is not a folder, create it first"),
    "output-not-a-picture": (["--output", "out.xyz"], "out.xyz is not the name of a picture"),
    "output-is-a-folder": (["--output", "."], "is not the name of a picture"),
    "unknown-device": (["--device", "toaster"], "--device toaster is not available here"),
    "absent-device": (["--device", "cuda:99"], "--device cuda:99 is not available here"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_demo_refuses_in_one_sentence_before_training(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "fit", lambda *args, **options: pytest.fail("trained first"))
    assert cli.main(["demo", *QUICK, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fastunet: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_demo_refuses_a_folder_it_may_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert cli.main(["demo", *QUICK, "--output", str(tmp_path / "out.png")]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["nonsense", "triton"])
def test_demo_refuses_a_backend_that_cannot_run(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTUNET_BACKEND", setting)
    monkeypatch.setattr("fastunet.backend.triton_unavailable", lambda *device: "there is no GPU")
    assert cli.main(["demo", *QUICK]) == 2
    assert capsys.readouterr().err.startswith("fastunet: error: expected ")


def test_demo_stops_when_training_diverges(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "DiceCELoss", lambda **options: lambda logits, labels: logits.sum() * torch.nan)
    assert cli.main(["demo", *folders, *QUICK, "--output", str(tmp_path / "out.png")]) == 2
    assert "fastunet: error: the loss became nan by step 2: lower the learning rate" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["images", "masks"]


def test_interruption_is_polite(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fit", interrupted)
    assert cli.main(["demo", *folders, *QUICK, "--output", str(tmp_path / "out.png")]) == 130
    assert "fastunet: interrupted" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["images", "masks"]


def test_a_bug_is_not_dressed_up_as_a_mistake(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fit", lambda *args, **options: [][0])
    with pytest.raises(IndexError):
        cli.main(["demo", *folders, *QUICK])


# ---- the picture -------------------------------------------------------------------------------------------------


def _figure(classes: list[ClassName], shape: tuple[int, int] = (30, 40), channels: int = 1) -> Image.Image:
    truth = torch.arange(shape[0] * shape[1]).view(shape) % len(classes)
    return pictures.figure(
        torch.rand(channels, *shape),
        truth,
        truth.flip(0),
        classes,
        title="t",
        subtitle="s",
        legend=[c.name for c in classes],
    )


@pytest.mark.parametrize("shape", [(16, 900), (900, 16), (30, 40), (1024, 1024)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_figure_has_room_for_any_shape(shape: tuple[int, int], channels: int) -> None:
    sheet = _figure([ClassName("a"), ClassName("b")], shape, channels)
    assert 900 < sheet.width < 2000
    assert 150 < sheet.height < 800


def test_figure_draws_classes_in_the_colours_of_the_masks() -> None:
    sheet = _figure([ClassName("a", (1, 2, 3)), ClassName("b", (250, 7, 9))])
    drawn = {colour for _, colour in sheet.getcolors(1 << 24) or []}
    assert {(1, 2, 3), (250, 7, 9)} <= drawn


def test_class_colours_are_distinct() -> None:
    colours = pictures.class_colours([ClassName(str(index)) for index in range(64)])
    assert len(set(colours)) == 64


def test_legend_of_many_classes_stays_on_the_sheet() -> None:
    few, many = (_figure([ClassName(f"a class with number {i}") for i in range(count)]) for count in (3, 64))
    assert many.width == few.width
    assert many.height > few.height


def test_save_leaves_the_old_file_and_nothing_else_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.png"
    pictures.save(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()

    def half(self: Image.Image, target: BinaryIO, kind: str) -> None:
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(UserError, match="disk full"):
        pictures.save(Image.new("RGB", (4, 4), "blue"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.png"]


# ---- info and help -----------------------------------------------------------------------------------------------


def test_info_says_what_runs_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FASTUNET_BACKEND")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    info.triton_unavailable.cache_clear()
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("fastunet", "python", "torch", "triton", "numpy", "cpu", *info.OPERATIONS):
        assert name in printed
    row = next(line for line in printed.splitlines() if line.split()[:1] == ["conv2d"])
    assert row.split() == ["conv2d", "torch", "torch", "torch", "torch"]
    assert "Triton" in printed.splitlines()[-1]  # why
    info.triton_unavailable.cache_clear()


def test_info_explains_each_dtype(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
        if backend == "triton" and dtype == torch.bfloat16:
            raise ValueError("backend='triton' cannot be used here: bfloat16 is special")
        return "torch" if dtype in (torch.bfloat16, torch.float64) else "triton"

    monkeypatch.delenv("FASTUNET_BACKEND")
    monkeypatch.setattr(info, "resolve_backend", resolve)
    monkeypatch.setattr(info, "triton_unavailable", lambda *device: None)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "float32, float16: the Triton kernels run here" in printed
    assert "bfloat16: bfloat16 is special" in printed
    assert "float64: float64 is served by torch on a GPU" in printed


@pytest.mark.parametrize(("setting", "status"), [("torch", 0), ("triton", 0), ("nonsense", 2)])
def test_info_follows_the_setting(
    setting: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTUNET_BACKEND", setting)
    assert cli.main(["info"]) == status
    printed = capsys.readouterr()
    assert f"FASTUNET_BACKEND={setting}" in printed.out or "FASTUNET_BACKEND is 'nonsense'" in printed.err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "info", "verify"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastunet {fastunet.__version__}\n"


def test_python_dash_m_runs_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastunet", "demo", "--images", "nowhere", "--masks", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastunet: error: --images nowhere does not exist")
    assert "Traceback" not in done.stderr


# ---- what is around a command ------------------------------------------------------------------------------------


def test_it_runs_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["info"]) == 0
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


@pytest.mark.parametrize("buffering", [1, -1], ids=["line", "block"])
def test_nobody_listens(buffering: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["info"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_what_is_printed_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["info"]) == 2
    said = "what is printed cannot be written (No space left on device): send it elsewhere"
    assert capsys.readouterr().err == f"fastunet: error: {said}\n"


def test_a_folder_that_may_not_be_searched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def shut(_: object) -> int:
        raise PermissionError(13, "Permission denied", "shut/last.pth")

    monkeypatch.setattr(info, "run", shut)
    assert cli.main(["info"]) == 2
    said = "shut/last.pth cannot be reached (Permission denied): check its name and permissions"
    assert capsys.readouterr().err == f"fastunet: error: {said}\n"


def test_memory_that_is_not_there_is_a_sentence() -> None:
    def asked(call: Callable[[], object]) -> None:
        with enough_memory("cpu", "take less"):
            call()

    for empty in (lambda: torch.empty(1 << 55, dtype=torch.uint8), lambda: np.empty(1 << 55, np.uint8)):
        with pytest.raises(UserError, match=r"^cpu ran out of memory: take less$"):
            asked(empty)
    with pytest.raises(RuntimeError, match=r"size mismatch|inconsistent"):  # a bug is not dressed up
        asked(lambda: torch.zeros(2) @ torch.zeros(3))
