"""Checkpoints: recognised by keys and shapes, never executed, saved whole or not at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fuzzing import evil
from torch import nn

import fastunet
from fastunet import reference
from fastunet.checkpoint import CheckpointError, read_checkpoint
from fastunet.errors import UserError

# The call that constructs each, which is what is recognised.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet(3, 2, base_c=2)": lambda: fastunet.UNet(3, 2, base_c=2),  # milesial's versions 3 and 4
    "UNet(1, 5, base_c=4, bilinear=True)": lambda: fastunet.UNet(1, 5, True, 4),
    "UNet(3, 2, base_c=2, bilinear=True, conv_bias=True)": lambda: fastunet.UNet(3, 2, True, 2, conv_bias=True),  # 1, 2
    "UNet(3, 1, base_c=2, conv_bias=True)": lambda: fastunet.UNet(3, 1, base_c=2, conv_bias=True),
    "UNet(3, 2, base_c=2, norm=None)": lambda: fastunet.UNet(3, 2, base_c=2, norm=None),
    "StridedUNet(3, 3, base_c=2)": lambda: fastunet.StridedUNet(base_c=2),
    "PlainUNet(2, 4, init_features=3)": lambda: fastunet.PlainUNet(2, 4, 3),
    "BrainUNet(3, 1, init_features=2)": lambda: fastunet.BrainUNet(init_features=2),
}


@pytest.fixture(autouse=True)
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would take minutes."""
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")


Content = dict[str, Any]
FORMS: dict[str, Callable[[Content], Content]] = {
    "plain": lambda state: state,
    "mask-values": lambda state: {**state, "mask_values": [0, 255]},
    "ddp-of-compiled": lambda state: {f"module._orig_mod.{name}": x for name, x in state.items()},
    "compiled-parts": lambda state: {name.replace(".", "._orig_mod.", 1): x for name, x in state.items()},
    "half": lambda state: {name: x.half() if x.is_floating_point() else x for name, x in state.items()},
    "bfloat16": lambda state: {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()},
    "an-entry": lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}, "param_groups": []}},
    "averaged": lambda state: {"n_averaged": torch.tensor(7), **{f"module.{name}": x for name, x in state.items()}},
    "lightning": lambda state: {"state_dict": {f"net.{name}": x for name, x in state.items()}, "loops": {"a": 1}},
}


def filled(model: nn.Module) -> nn.Module:
    """In eval mode, with running statistics, and only numbers that 16 bits hold."""
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.rand(x.shape) if name.endswith("var") else torch.randn(x.shape) / 4)
            x.copy_(x.bfloat16().half())
    return model.eval()


@pytest.mark.parametrize("call", NETWORKS)
def test_the_network_is_read_off_the_file(call: str, tmp_path: Path) -> None:
    model, path = filled(NETWORKS[call]()), tmp_path / "checkpoint.pth"
    x = torch.randn(1, model.n_channels, 16, 16)
    for form, changed in FORMS.items():
        torch.save(changed(dict(model.state_dict())), path, _use_new_zipfile_serialization=form != "plain")
        assert str(read_checkpoint(path).architecture) == call, form
        state = torch.random.get_rng_state()
        loaded = fastunet.load_checkpoint(path)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not loaded.training
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert read_checkpoint(path).rest == {"loops": {"a": 1}}


def test_the_seeds_networks_are_recognised(tmp_path: Path) -> None:
    path, x = tmp_path / "checkpoint.pt", torch.randn(1, 3, 16, 16)
    theirs: dict[str, nn.Module] = {
        "UNet(3, 19, base_c=2)": reference.UNet001(19, base_c=2),
        "UNet(3, 19, base_c=2, bilinear=True)": reference.UNet001(19, True, base_c=2),
        "UNet(3, 22, base_c=2)": reference.UNet(3, 22, base_c=2),
        "StridedUNet(3, 3, base_c=2)": reference.StridedUNet(3, 3, 2),
        "PlainUNet(3, 1, init_features=2)": reference.PlainUNet(3, 1, 2),
        "BrainUNet(3, 1, init_features=2)": reference.BrainUNet(3, 1, 2),
    }
    for call, network in theirs.items():
        torch.save(filled(network.double()).state_dict(), path)
        assert str(read_checkpoint(path).architecture) == call
        torch.testing.assert_close(fastunet.load_checkpoint(path)(x.double()), network(x.double()))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_saved_and_loaded(suffix: str, tmp_path: Path) -> None:
    if suffix == "safetensors":
        pytest.importorskip("safetensors", reason="part of pip install 'fastunet[safetensors]'")
    model, path = filled(fastunet.UNet(1, 2, base_c=2)), tmp_path / f"checkpoint.{suffix}"
    path.write_text("what was there")
    fastunet.save_checkpoint(path, torch.nn.DataParallel(model), mask_values=[[0, 0, 0], [200, 0, 0]])
    assert os.listdir(tmp_path) == [path.name]
    loaded = fastunet.load_checkpoint(path, backend="torch", policy="memory")
    assert loaded.mask_values == [[0, 0, 0], [200, 0, 0]]
    assert loaded.config.policy == "memory"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    if suffix == "pth":  # as milesial's predict reads it
        assert torch.load(path, weights_only=True).pop("mask_values") == [[0, 0, 0], [200, 0, 0]]
        fastunet.save_checkpoint(path, model, mask_values=[0, 1], epoch=3, optimizer={"state": {}})
        checkpoint = read_checkpoint(path)
        assert (checkpoint.mask_values, checkpoint.rest) == ([0, 1], {"epoch": 3, "optimizer": {"state": {}}})
    else:
        with pytest.raises(UserError, match="can hold tensors only, not 'epoch'"):
            fastunet.save_checkpoint(path, model, epoch=3)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_shapes_do_not_tell_is_saved(suffix: str, tmp_path: Path) -> None:
    if suffix == "safetensors":
        pytest.importorskip("safetensors", reason="part of pip install 'fastunet[safetensors]'")
    path, x = tmp_path / f"checkpoint.{suffix}", torch.randn(2, 3, 32, 32)
    for options in ({"norm": "instance", "negative_slope": 0.01}, {"norm": "group"}, {"upsample": "nearest"}):
        model = filled(fastunet.UNet(3, 2, base_c=2, **options))
        fastunet.save_checkpoint(path, nn.DataParallel(model))
        written = "".join(f", {name}={value!r}" for name, value in options.items())
        assert str(read_checkpoint(path).architecture) == f"UNet(3, 2, base_c=2{written})"
        torch.testing.assert_close(fastunet.load_checkpoint(path)(x), model(x), rtol=0, atol=0)
    path = tmp_path / "checkpoint.pth"
    torch.save(fastunet.UNet(3, 2, base_c=2, norm="group").state_dict(), path)
    with pytest.raises(
        CheckpointError, match="is of a UNet with instance or with group norms, and does not tell which"
    ):
        fastunet.load_checkpoint(path)
    for wrong in ({"norm": "batchy"}, {"negative_slope": "x"}, {"negative_slope": float("nan")}, {"upsample": None}):
        torch.save({"model": small(), "architecture": wrong}, path)
        with pytest.raises(CheckpointError, match=r"tells of a network \{'\w+': .*\}, which is none: construct it"):
            fastunet.load_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"is transposed with no norms: UNet\(1, 2, base_c=1, norm=None\)"):
        fastunet.UNet(1, 2, base_c=1).load_state_dict(fastunet.UNet(1, 2, base_c=1, norm=None).state_dict())


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = fastunet.UNet(1, 2, base_c=1), tmp_path / "checkpoint.pth"
    fastunet.save_checkpoint(path, model)
    before = path.read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): choose another place"):
        fastunet.save_checkpoint(path, model, epoch=1)
    monkeypatch.setattr(torch, "save", lambda content, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        fastunet.save_checkpoint(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(UserError, match="cannot be written"):
        fastunet.save_checkpoint(tmp_path / "nowhere" / "a.pth", model)


def test_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    sentinel, path = tmp_path / "ran", tmp_path / "checkpoint.pth"
    for zipped in (True, False):
        for name, content in evil(sentinel).items():
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=r"wants to run code, or is damaged\): save model.state_dict\(\)"):
                fastunet.load_checkpoint(path)
            assert not sentinel.exists(), name


def bomb(path: Path) -> None:
    """A checkpoint of which each byte on the disk is a thousand in memory."""
    torch.save({**fastunet.UNet(1, 2, base_c=1).state_dict(), "more": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def small(**changes: Any) -> Content:
    return {**fastunet.UNet(1, 2, base_c=1).state_dict(), **changes}


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (None, r"cannot read .*checkpoint\.pth \(No such file or directory\): give a checkpoint"),
    "text": (lambda path: path.write_text("hello"), r"cannot read .* \(damaged.*: "),
    "half-a-file": (
        lambda path: (torch.save(small(), path), path.write_bytes(path.read_bytes()[:9000])),
        r"cannot read .* \(damaged, or not a checkpoint\): replace it"),
    "a-bomb": (bomb, r"unpacks to [\d,]+ bytes: save it again with torch\.save"),
    "a-list": ([1], r"holds \[1\], not a state_dict: save model\.state_dict\(\)"),
    "numbers": ({"a": 1}, r"holds no state_dict \('a'\): save model\.state_dict\(\)"),
    "two-networks": (
        {"generator": small(), "critic": small()}, r"holds several state_dicts \('generator', 'critic'\): save"),
    "a-word-among-weights": (small(**{"outc.conv.bias": "x"}), r"holds 'x' as outc\.conv\.bias, not a tensor: save"),
    "another-network": (
        nn.Sequential(nn.Linear(2, 3)).state_dict(), r"no U-Net that is known here, its keys begin with '0.weight', "),
    "a-view-of-one-number": (
        small(**{"outc.conv.weight": torch.zeros(1).expand(1 << 20, 1 << 20, 1, 1)}),
        r"holds outc\.conv\.weight as a tensor \(1048576, 1048576, 1, 1\) that is not stored whole: save"),
    "a-part-of-another-size": (
        small(**{"up2.conv.double_conv.0.weight": torch.zeros(3, 3, 3, 3)}),
        r"like UNet\(1, 2, base_c=1\), but with 'up2\.conv\.double_conv\.0\.weight' of shape \(3, 3, 3, 3\), here"),
    "one-more": (small(more=torch.zeros(2)), r"looks like UNet\(1, 2, base_c=1\), but with 'more' unknown: construct"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "refusal"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_checkpoint_is_refused_in_a_sentence(content: Any, refusal: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    if callable(content):
        content(path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=refusal) as caught:
        fastunet.load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1


def test_safetensors_without_the_extra_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(CheckpointError, match=r"pip install 'fastunet\[safetensors\]'"):
        fastunet.save_checkpoint(path, fastunet.UNet(1, 1, base_c=1))
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"pip install 'fastunet\[safetensors\]'"):
        fastunet.load_checkpoint(path)


def test_the_parts_as_milesials_users_import_them() -> None:
    from fastunet.unet_parts import DoubleConv, Down, OutConv, Up

    x = torch.randn(1, 3, 8, 10)
    assert DoubleConv(3, 4, mid_channels=2)(x).shape == (1, 4, 8, 10)
    assert Down(3, 4)(x).shape == (1, 4, 4, 5)
    assert Up(6, 4, bilinear=True)(torch.randn(1, 3, 4, 5), x).shape == (1, 4, 8, 10)
    assert OutConv(3, 2)(x).shape == (1, 2, 8, 10)
    assert fastunet.DoubleConv is DoubleConv
    sequence = fastunet.ConvSequence(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    torch.testing.assert_close(sequence(x), nn.Sequential(*sequence)(x))
