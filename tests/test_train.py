"""``fastunet train``: recipes as their sources have them, runs that are resumed to the same bits, several processes."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import ROOT
from sources import as_users_run
from torch import Tensor, nn

import fastunet
from fastunet import cli, recipes, reference, train
from fastunet.checkpoint import read_checkpoint
from fastunet.data import open_dataset
from fastunet.files import alone_in
from fastunet.losses import DiceCELoss, GlobalLoss, unet_weight_map
from fastunet.training import Objective, Run

CPU = ["--device", "cpu", "--base-c", "2"]


@pytest.fixture(autouse=True, scope="module")
def compiled() -> Iterator[None]:
    """As users run it, with no interpreter of kernels."""
    with as_users_run():
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve coloured pictures 72×64 of three classes, as arguments."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(12):
        labels = rng.integers(0, 3, (9, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        image = np.clip(labels[..., None] * 60 + rng.normal(60, 20, (72, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{index:02}.png")
        Image.fromarray(labels * 100).save(folder / "masks" / f"{index:02}_mask.png")
    return [str(folder / "images"), str(folder / "masks")]


def run(pictures: list[str], output: Path, *options: str) -> list[float]:
    """The losses of ``fastunet train``."""
    assert cli.main(["train", *pictures, "-o", str(output), *CPU, *options]) == 0
    return losses(output)


def losses(output: Path) -> list[float]:
    with open(output / "steps.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def rows(output: Path) -> list[dict[str, str]]:
    with open(output / "epochs.csv", newline="") as file:
        return list(csv.DictReader(file))


def parts(count: int, percent: float) -> tuple[list[int], list[int]]:
    """Which pictures are learnt and which are held out, for seed 0."""
    order = np.random.default_rng(0).permutation(count).tolist()
    held_out = max(round(percent / 100 * count), 1)
    return sorted(order[held_out:]), sorted(order[:held_out])


def files(pictures: list[str]) -> list[tuple[Image.Image, Image.Image]]:
    return [
        (Image.open(image), Image.open(mask))
        for image, mask in zip(*(sorted(Path(folder).iterdir()) for folder in pictures), strict=True)
    ]


# ---- the recipes, as their sources train -------------------------------------------------------------------------

EPOCHS = 3


def dice_coeff(p: Tensor, y: Tensor, axes: tuple[int, ...]) -> Tensor:
    both, size = 2 * (p * y).sum(axes), p.sum(axes) + y.sum(axes)
    return ((both + 1e-6) / (torch.where(size == 0, both, size) + 1e-6)).mean()


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, 3).permute(0, 3, 1, 2).double()


def by_pytorch_unet(pictures: list[str]) -> tuple[list[float], list[float]]:
    """Pytorch-UNet's training, version 4: (losses, learning rates after each epoch)."""
    data = []
    for image, mask in files(pictures):
        size = image.width // 2, image.height // 2
        x = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float64).transpose(2, 0, 1) / 255
        y = np.asarray(mask.resize(size, Image.Resampling.NEAREST)) // 100
        data.append((torch.from_numpy(x).float().double()[None], torch.from_numpy(y).long()[None]))
    learnt, held_out = parts(12, 10)
    torch.manual_seed(0)
    model = reference.UNet(3, 3, base_c=2).double()
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3, weight_decay=1e-8, momentum=0.999)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=5)
    found: list[float] = []
    rates = []
    for epoch in range(EPOCHS):
        for index in np.random.default_rng([0, epoch]).permutation(len(learnt)).tolist():
            x, y = data[learnt[index]]
            logits = model.train()(x)
            loss = F.cross_entropy(logits, y) + 1 - dice_coeff(logits.softmax(1)[0], one_hot(y)[0], (0, 1, 2))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(float(loss.detach()))
            if len(found) % (len(learnt) // 5) == 0:
                with torch.no_grad():
                    guesses = [one_hot(model.eval()(data[i][0]).argmax(1)) for i in held_out]
                truths = [one_hot(data[i][1]) for i in held_out]
                scores = [dice_coeff(p[0, 1:], y[0, 1:], (1, 2)) for p, y in zip(guesses, truths, strict=True)]
                scheduler.step(float(torch.stack(scores).mean()))
        rates.append(optimizer.param_groups[0]["lr"])
    return found, rates


def by_seed_002(pictures: list[str]) -> tuple[list[float], list[float]]:
    """Seed 002's: crops of 32 pixels, Dice + cross-entropy, Adam and StepLR."""
    data = [
        (
            torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255,
            torch.from_numpy(np.asarray(mask) // 100),
        )
        for image, mask in files(pictures)
    ]
    learnt, _ = parts(12, 10)
    torch.manual_seed(0)
    model = reference.UNet(3, 3, base_c=2).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.1)
    found, rates = [], []
    for epoch in range(EPOCHS):
        order = np.random.default_rng([0, epoch]).permutation(len(learnt)).tolist()
        for start in range(0, len(order), 4):
            crops = []
            for index in order[start : start + 4]:
                rng = np.random.default_rng([0, epoch, index])
                top, left = int(rng.integers(72 - 32 + 1)), int(rng.integers(64 - 32 + 1))
                crops.append([x[..., top : top + 32, left : left + 32] for x in data[learnt[index]]])
            x, y = (torch.stack(several) for several in zip(*crops, strict=True))
            p, truth = model(x.double()), one_hot(y.long())
            entropy, p = F.cross_entropy(p, y.long()), p.softmax(1)
            hits = (p * truth).sum((0, 2, 3))
            score = (2 * hits + 1e-5) / (p.sum((0, 2, 3)) + truth.sum((0, 2, 3)) + 1e-5)
            loss = 1 - score.mean() + entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return found, rates


def by_seed_000(pictures: list[str]) -> tuple[list[float], list[float]]:
    """Seed 000's: masks are pictures, padded to a square and resized to 256 pixels, and the last batch is left out."""
    colours = np.array(fastunet.pictures._COLOURS, np.uint8)
    data = []
    for image, mask in files(pictures):
        pair = []
        for picture in (image, Image.fromarray(colours[np.asarray(mask) // 100])):
            square = Image.new("RGB", (72, 72))
            square.paste(picture, (0, 0))
            pixels = np.asarray(square.resize((256, 256), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            pair.append(torch.from_numpy(pixels.copy()).float().div(255).double())
        data.append(pair)
    learnt, _ = parts(12, 10)
    torch.manual_seed(0)
    model = reference.StridedUNet(3, 3, 2).double()
    optimizer = torch.optim.Adam(model.parameters())
    found: list[float] = []
    for epoch in range(1):
        order = np.random.default_rng([0, epoch]).permutation(len(learnt)).tolist()
        for start in range(0, len(order) - 3, 4):
            x, y = (torch.stack([data[learnt[i]][k] for i in order[start : start + 4]]) for k in (0, 1))
            loss = F.binary_cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found, [1e-3]


SOURCES = {
    "milesial": (by_pytorch_unet, ["-l", "1e-3", "-e", "3"]),
    "seed002": (by_seed_002, ["--crop", "32", "-b", "4", "--loss", "dice+ce", "-e", "3"]),
    "seed000": (by_seed_000, ["-b", "4", "-e", "1"]),
}


@pytest.mark.parametrize("recipe", SOURCES)
def test_a_recipe_trains_as_its_source(recipe: str, pictures: list[str], tmp_path: Path) -> None:
    source, options = SOURCES[recipe]
    found = run(pictures, tmp_path / "run", "--recipe", recipe, "--precision", "fp64", *options)
    expected, rates = source(pictures)
    assert len(found) >= 2
    # float64, another order of sums, a few steps of an optimiser that divides by small gradients
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-10)
    assert [float(row["learning_rate"]) for row in rows(tmp_path / "run")] == pytest.approx(rates)


def test_the_papers_weights_balance_classes_and_mark_borders(tmp_path: Path) -> None:
    labels = np.zeros((72, 64), np.uint8)
    labels[10:60, 8:30], labels[10:60, 33:56] = 1, 2  # two cells, and three pixels between them
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(labels * 50).save(tmp_path / name / "a.png")
    recipe = recipes.Recipe(**{**vars(recipes.RECIPES["paper"]), "crop": None, "augment": "none"})
    samples = train.Samples(open_dataset(tmp_path / "images", tmp_path / "masks"), recipe, 0)
    _, found, weights = samples[0, 0]
    assert torch.equal(found, torch.from_numpy(labels))
    border = weights - unet_weight_map(found > 0, class_weight=(0, 0))
    sums = torch.stack([border[found == k].sum() for k in range(3)])
    torch.testing.assert_close(sums, torch.full((3,), 72 * 64 / 3), rtol=1e-4, atol=0)
    assert weights[35, 31] > 5 > weights[35, 2]


# ---- a run and its files -----------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    run(
        pictures,
        output,
        "--recipe",
        "seed002",
        "--crop",
        "32",
        "-e",
        "2",
        "--ema",
        "0.5",
        "--accumulate",
        "2",
        "-b",
        "3",
    )
    assert sorted(os.listdir(output)) == [
        "best.pth", "epoch-0001.png", "epoch-0002.png", "epochs.csv", "last.pth", "steps.csv",
    ]  # fmt: skip
    printed = capsys.readouterr()
    for text in ("value 200", "11 to learn from, 1 held out", "best epoch"):
        assert text in printed.out
    assert all(text in printed.err for text in ("epoch 2/2", "loss=", "images/s", "GB"))
    assert len(losses(output)) == 4  # 11 pictures are 4 batches, which are 2 steps
    assert [row["steps"] for row in rows(output)] == ["2", "4"]
    last, best = (read_checkpoint(output / name) for name in ("last.pth", "best.pth"))
    assert best.mask_values == [0, 100, 200]
    assert last.rest["run"]["steps"] == 4
    average = last.rest["run"]["average"]
    assert not torch.equal(average["outc.conv.weight"], last.state["outc.conv.weight"])
    assert not torch.equal(best.state["outc.conv.weight"], last.state["outc.conv.weight"])


def test_tensorboard_is_an_extra(pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert Path(folder).parent == tmp_path / "run"

        def add_scalar(self, *scalar: Any) -> None:
            written.append(scalar)

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    command = ["train", *pictures, "-o", str(tmp_path / "run"), *CPU, "-e", "1", "--tensorboard"]
    assert cli.main(command) == 2  # it cannot be imported
    assert not (tmp_path / "run").exists()
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    assert cli.main(command) == 0
    assert [row[1] for row in written if row[0] == "step/loss"] == losses(tmp_path / "run")
    assert {"epoch/miou", "epoch/learning_rate", "closed"} <= {row[0] for row in written}


def test_the_papers_augmentation_moves_all_alike_and_repeats(pictures: list[str]) -> None:
    pytest.importorskip("kornia", reason="part of pip install 'fastunet[augment]'")
    samples = train.Samples(
        open_dataset(*pictures), recipes.Recipe(**{**vars(recipes.RECIPES["paper"]), "crop": 48}), 0
    )
    image, labels, weights = samples[0, 3]
    assert image.shape[1:] == labels.shape == weights.shape == (48, 48)
    assert all(torch.equal(one, other) for one, other in zip(samples[0, 3], (image, labels, weights), strict=True))
    assert not torch.equal(samples[1, 3][1], labels)
    assert set(labels.unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_precisions_train_alike(precision: str, pictures: list[str], tmp_path: Path) -> None:
    truth = run(pictures, tmp_path / "truth", "--precision", "fp64", "-e", "1")
    found = run(pictures, tmp_path / precision, "--precision", precision, "-e", "1", "--checkpointing")
    # The first loss has the precision's rounding; the learning rate is so small that the last still has.
    atol = {"bf16": 5e-2, "fp16": 1e-2}.get(precision, 1e-3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(truth), rtol=0, atol=atol)
    assert truth != found


def test_training_stops_when_it_gets_no_better(pictures: list[str], tmp_path: Path) -> None:
    run(pictures, tmp_path / "run", "-e", "50", "-l", "1e-9", "--patience", "2")
    assert 3 <= len(rows(tmp_path / "run")) < 50


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same bits; the clock may differ."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_what_is_killed_goes_on_to_the_same_bits(pictures: list[str], tmp_path: Path) -> None:
    """Killed at some step, then told to stop at another: the checkpoint can be read, and the last bits are the same."""
    options = ["--recipe", "milesial", "-e", "3", "-l", "1e-3", "--ema", "0.9", "--accumulate", "2", "--seed", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(pictures, whole, *options)
    command = [sys.executable, "-m", "fastunet", "train", *pictures, "-o", str(cut), *CPU]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        more = ["--resume"] if (cut / "last.pth").exists() else options
        before = (cut / "last.pth").stat().st_mtime_ns if more == ["--resume"] else 0
        # Saving after every step takes longer than the step, so that the signal rarely comes after the last one.
        process = subprocess.Popen([*command, *more, "--save-every", "1e-9"], env=environment, stderr=subprocess.PIPE)
        while process.poll() is None:
            if (cut / "last.pth").exists() and (cut / "last.pth").stat().st_mtime_ns != before:
                process.send_signal(number)
                break
            time.sleep(0.001)
        _, said = process.communicate(timeout=120)
        assert process.returncode in (status, 0), said.decode()
        assert read_checkpoint(cut / "last.pth").rest["run"]["steps"] > 0
    assert cli.main(["train", *pictures, "-o", str(cut), *CPU, "--resume"]) == 0
    ends = [torch.load(folder / "last.pth", weights_only=True) for folder in (whole, cut)]
    assert same(*ends)
    assert sorted(os.listdir(cut)) == sorted(os.listdir(whole))
    assert losses(whole) == losses(cut)
    assert rows(whole)[0].keys() == rows(cut)[0].keys()


def test_ctrl_c_ends_after_the_step(pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update, output = Run.update, tmp_path / "run"

    def interrupted(self: Run, batches: Any) -> Tensor:
        loss = update(self, batches)
        if self.steps == 5:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(Run, "update", interrupted)
    assert cli.main(["train", *pictures, "-o", str(output), *CPU]) == 130
    assert read_checkpoint(output / "last.pth").rest["run"]["steps"] == 5
    assert len(losses(output)) == 5


def test_a_full_disk_is_told_and_leaves_what_was_there(
    pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, rows: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "_write_rows", full)
    (tmp_path / "run").mkdir()
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run" / "steps.csv").symlink_to(elsewhere)
    assert cli.main(["train", *pictures, "-o", str(tmp_path / "run"), *CPU, "--crop", "32", "-e", "1"]) == 2
    assert "run cannot be written (No space left on device): make room" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["steps.csv"]
    assert not elsewhere.exists()


def test_a_folder_is_trained_into_by_one_process(
    pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, command = tmp_path / "run", ["train", *pictures, *CPU, "--crop", "32", "-e", "1"]
    assert cli.main([*command, "-o", str(output)]) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    again = [*command[:-1], "2", "-o", str(output), "--resume"]
    with alone_in(output) as alone:
        assert alone
        assert cli.main(again) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            worker = os.fork()
        if worker == 0:  # as one that reads pictures: the lock is not its
            time.sleep(60)
            os._exit(0)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastunet: error: another process is training into {output}: let it end, or give another --output"
    )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert cli.main(again) == 0
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


def test_a_run_that_is_damaged_is_not_resumed(
    pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, command = tmp_path / "run", ["train", *pictures, *CPU, "--crop", "32"]
    assert cli.main([*command, "-o", str(output), "-e", "1"]) == 0
    saved = torch.load(output / "last.pth", weights_only=True)
    optimizer = saved["run"]["optimizer"]
    for damaged in (
        {**saved, "rows": 7}, {**saved, "run": {}}, {**saved, "fastunet": None},
        {**saved, "run": {**saved["run"], "optimizer": {**optimizer, "state": {999: {}}}}},
    ):  # fmt: skip
        torch.save(damaged, output / "last.pth")
        assert cli.main([*command, "-o", str(output), "-e", "2", "--resume"]) == 2
        assert "last.pth holds no run that can be resumed: begin one from" in capsys.readouterr().err


def test_what_goes_wrong_where_pictures_are_read_is_a_sentence(
    pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(Path(pictures[0]).parent, tmp_path, dirs_exist_ok=True)
    folders, training = [str(tmp_path / "images"), str(tmp_path / "masks")], train._training
    command = ["train", *folders, "-o", str(tmp_path / "run"), *CPU, "--workers", "2"]
    assert cli.main([*command, "-e", "1"]) == 0
    assert losses(tmp_path / "run") == run(folders, tmp_path / "plain", "-e", "1")

    def late(*arguments: Any) -> Run:  # after the check, before the first step
        shutil.rmtree(tmp_path / "images")
        return training(*arguments)

    monkeypatch.setattr(train, "_training", late)
    capfd.readouterr()
    assert cli.main([*command, "-e", "2", "--resume"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("\r", "epoch 2/2")) and line]
    assert len(said) == 1
    assert said[0].startswith(f"fastunet: error: cannot read {tmp_path / 'images'}")


def test_crops_hold_something_that_counts(tmp_path: Path) -> None:
    labels = np.full((72, 64), 255, np.uint8)
    labels[3, 60], labels[50, 7] = 0, 1
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(labels).save(tmp_path / name / "a.png")
        Image.fromarray(np.full_like(labels, 255)).save(tmp_path / name / "b.png")  # nothing to learn from
    recipe = recipes.Recipe(**{**vars(recipes.RECIPES["seed002"]), "crop": 32})
    samples = train.Samples(open_dataset(tmp_path / "images", tmp_path / "masks", ignore=[255]), recipe, 0)
    assert samples.pictures.names == ("a.png",)
    crops = [samples[epoch, 0][1] for epoch in range(40)]
    assert all((crop != 255).sum() == 1 for crop in crops)
    assert {int(crop.min()) for crop in crops} == {0, 1}
    assert len({int((crop != 255).flatten().int().argmax()) for crop in crops}) > 20


# ---- several processes -------------------------------------------------------------------------------------------

# What one of two processes does: blocks that are eager and lazy, with statistics of both, under DDP.
WORKER = """
import json, os, sys, torch, torch.distributed as dist, fastunet
from torch.nn.parallel import DistributedDataParallel as DDP
from fastunet import cli, distributed, train
from fastunet.losses import DiceCELoss, GlobalLoss, unet_weight_map
from fastunet.training import Objective

torch.manual_seed(0)
images, labels = torch.randn(4, 1, 32, 48).double(), torch.randint(0, 2, (4, 32, 48))
with distributed.joined():
    mine = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    for backend in ("auto", "torch"):
        torch.manual_seed(1)
        model = distributed.synchronise(fastunet.UNet(1, 2, base_c=2, backend=backend).double())
        model.score = fastunet.metrics.ConfusionMatrix(2)
        objective = DDP(Objective(model, GlobalLoss(DiceCELoss(batch=False))))
        for _ in range(2):
            objective(images[mine], labels[mine]).backward()
            model.score.update(model(images[mine]), labels[mine])
        model.score = model.score.all_reduce()
        state = {**model.state_dict(), **{f"d {n}": p.grad for n, p in model.named_parameters()}}
        if distributed.rank() == 0:
            torch.save(state, sys.argv[1] + backend)
    runs, training = [], train._training
    train._training = lambda *how: runs.append(training(*how)) or runs[-1]
    for command in json.loads(sys.argv[2]):
        assert cli.main(command) == 0
        shares = [p.to_local().numel() / p.numel() for p in runs[-1].model.parameters() if hasattr(p, "to_local")]
        assert (0 < sum(shares) < 0.6 * len(list(runs[-1].model.parameters()))) == ("--fsdp" in command), shares
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)  # this module and meshes hold groups, whose threads may abort a process that is ending
"""


ONE_OR_TWO = {
    "run": [
        "--recipe",
        "paper",
        "--augment",
        "symmetries",
        "--crop",
        "32",
        "-e",
        "2",
        "--accumulate",
        "2",
        "--ema",
        "0.9",
    ],
    "colours": ["--recipe", "seed000", "-e", "1"],  # whose loss knows its process's pictures only
}
EXACT = ["-v", "30", "--precision", "fp64", *CPU]


@pytest.fixture(scope="module")
def two_processes(pictures: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave that torchrun starts: those of WORKER, which then are ``fastunet train``."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    runs = [*ONE_OR_TWO.items(), ("sharded", [*ONE_OR_TWO["run"], "--fsdp"])]
    runs += [("again", [*ONE_OR_TWO["run"], "-e", "1"]), ("again", ["--fsdp", "--resume", "-e", "2"])]
    commands = [["train", *pictures, "-o", str(folder / name), *options, *EXACT, "-b", "1"] for name, options in runs]
    done = subprocess.run(
        [sys.executable, *start, str(folder / "worker.py"), str(folder / "state"), json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_statistics_losses_and_counts_are_those_of_all_processes(two_processes: Path) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 32, 48).double(), torch.randint(0, 2, (4, 32, 48))
    torch.manual_seed(1)
    model = fastunet.UNet(1, 2, base_c=2).double()
    score = fastunet.metrics.ConfusionMatrix(2)
    for _ in range(2):
        Objective(model, DiceCELoss(batch=False))(images, labels).backward()
        score.update(model(images), labels)
    expected = {**model.state_dict(), **{f"d {n}": p.grad for n, p in model.named_parameters()}}
    for backend in ("auto", "torch"):
        found = torch.load(two_processes / f"state{backend}", weights_only=True)
        assert torch.equal(found.pop("score.matrix"), score.matrix)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ONE_OR_TWO)
def test_two_processes_are_one_with_twice_the_batch(
    name: str, two_processes: Path, pictures: list[str], tmp_path: Path
) -> None:
    run(pictures, tmp_path, *ONE_OR_TWO[name], *EXACT, "-b", "2")
    one, two = (torch.load(folder / "last.pth", weights_only=True) for folder in (tmp_path, two_processes / name))
    # The gradient of a bias in front of a batch norm is 0 but for rounding, by which Adam divides.
    names = [key for key in one["state_dict"] if name == "run" or key.endswith("weight")]
    for found, expected in (
        ([each["state_dict"][key] for key in names] for each in (two, one)),
        (two["run"]["average"] or {}, one["run"]["average"] or {}),
        (losses(two_processes / name), losses(tmp_path)),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert [row["miou"] for row in rows(two_processes / name)] == [row["miou"] for row in rows(tmp_path)]


@pytest.mark.parametrize("name", ["sharded", "again"])
def test_weights_in_shards_train_as_whole_ones(name: str, two_processes: Path) -> None:
    """By FSDP2, from the first step or after an epoch of DDP; what is saved is ordinary."""
    found, expected = (torch.load(two_processes / each / "last.pth", weights_only=True) for each in (name, "run"))
    for part in ("average", "optimizer"):
        torch.testing.assert_close(found["run"][part], expected["run"][part], rtol=0, atol=1e-10)
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=1e-10)
    torch.testing.assert_close(losses(two_processes / name), losses(two_processes / "run"), rtol=0, atol=1e-10)
    assert same(found["settings"], expected["settings"])
    best = [fastunet.load_checkpoint(two_processes / each / "best.pth").state_dict() for each in (name, "run")]
    torch.testing.assert_close(*best, rtol=0, atol=1e-6)  # they load as float32


def test_a_run_goes_on_with_as_many_processes(
    two_processes: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *pictures, "-o", str(two_processes / "run"), *CPU, "--resume"]) == 2
    refusal = "--resume found the batches of 2 processes, and 1 were started: start 2"
    assert capsys.readouterr().err == f"fastunet: error: {refusal}\n"


def test_a_global_loss_of_one_process_is_the_loss() -> None:
    model, images, labels = fastunet.UNet(1, 2, base_c=2), torch.randn(2, 1, 32, 32), torch.randint(0, 2, (2, 32, 32))
    loss = DiceCELoss()
    assert torch.equal(GlobalLoss(loss)(model(images), labels), loss(model(images), labels))
    twin = copy.deepcopy(model)
    assert torch.equal(model.loss(images, labels, GlobalLoss(loss)), twin.loss(images, labels, loss))
