"""Files that somebody else made: damaged pictures, masks and checkpoints, bombs, absurd headers, links.

They are refused or read; nothing is executed, nothing but the output is written, and memory stays bounded. With
``pytest --long MINUTES`` ever new ones are opened; ``tests/fuzzing.py`` says how.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, python

import fastunet
from fastunet import cli, pictures
from fastunet.data import DataError, open_folders
from fastunet.errors import UserError

COUNTS = {"pictures": 150, "checkpoints": 60, "bombs": 24}  # at least


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as Linux does")
@pytest.mark.parametrize("what", COUNTS)
def test_damaged_files_are_refused_or_read(what: str, seconds: float, tmp_path: Path) -> None:
    seed = secrets.randbelow(1 << 30) if seconds else 0
    done = python(
        "tests/fuzzing.py", what, str(seed), str(COUNTS[what]), str(seconds), str(tmp_path),
        limit=seconds + 300,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: status {done.returncode}\n{done.stderr}"
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["found"] == [], f"seed {seed}"
    assert said["opened"] >= COUNTS[what]
    assert said["refused"] > said["opened"] // 4, "or the files were not damaged"


# ---- links -------------------------------------------------------------------------------------------------------


def pair(folder: Path) -> Path:
    """A folder of a good pair."""
    good = dict(fuzzing.pictures())["gif"]
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
        (folder / kind / "a.gif").write_bytes(good)
    return folder


LINKS: dict[str, Callable[[Path], object]] = {
    "to-itself": lambda path: path.symlink_to(path),
    "to-nothing": lambda path: path.symlink_to(path.parent / "nothing"),
    "to-a-folder": lambda path: path.symlink_to(path.parent),
    "to-a-device": lambda path: path.symlink_to("/dev/zero"),
    "a-pipe": lambda path: os.mkfifo(path),
    "to-text": lambda path: path.symlink_to(__file__),
}


@pytest.mark.skipif(os.name != "posix", reason="makes links and pipes as POSIX does")
@pytest.mark.parametrize("plant", LINKS.values(), ids=LINKS)
def test_links_among_the_pictures_are_no_pictures(plant: Callable[[Path], object], tmp_path: Path) -> None:
    (pair(tmp_path) / "masks" / "a.gif").unlink()
    plant(tmp_path / "masks" / "a.gif")
    with pytest.raises(DataError, match=r"has no mask|holds no pictures|cannot read"):
        open_folders(tmp_path / "images", tmp_path / "masks")


@pytest.mark.skipif(os.name != "posix", reason="makes links as POSIX does")
def test_what_a_link_points_to_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious, link = tmp_path / "precious.png", tmp_path / "out.png"
    precious.write_bytes(b"precious")
    link.symlink_to(precious)
    pictures.save(Image.new("RGB", (4, 4)), link)
    assert precious.read_bytes() == b"precious"
    assert not link.is_symlink()
    Image.open(link).verify()
    # Somebody guessed the name of the file that is written first.
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    guessed = tmp_path / ".out-guessed.png"
    guessed.symlink_to(precious)
    with pytest.raises(UserError, match="cannot be written"):
        pictures.save(Image.new("RGB", (4, 4)), link)
    assert guessed.is_symlink()
    assert precious.read_bytes() == b"precious"


@pytest.mark.skipif(os.name != "posix", reason="makes links as POSIX does")
def test_the_demo_writes_no_further_than_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    precious, link = tmp_path / "precious", tmp_path / "out.png"
    precious.write_bytes(b"precious")
    link.symlink_to(precious)
    small = ["--steps", "1", "--batch-size", "2", "--crop", "32", "--base-c", "1", "--device", "cpu"]
    assert cli.main(["demo", *small, "--output", str(link)]) == 0
    assert precious.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["out.png", "precious"]


# ---- checkpoints that want to be executed ------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, *called: Any) -> None:
        self.called = called

    def __reduce__(self) -> Any:
        return self.called


def evil(sentinel: Path) -> dict[str, Any]:
    code = f"open({str(sentinel)!r}, 'w')"
    return {
        "os.system": Evil(os.system, (f"touch {sentinel}",)),
        "eval": Evil(eval, (code,)),
        "exec": Evil(exec, (code,)),
        "open": Evil(io.open, (str(sentinel), "w")),
        "inside": {"outc.conv.bias": torch.zeros(2), "mask_values": [Evil(eval, (code,))]},
        "numpy": {"mask_values": np.array([Evil(eval, (code,))], dtype=object)},
        "a network": fastunet.UNet(1, 1, base_c=1),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_is_not_executed(zipped: bool, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "ran", tmp_path / "checkpoint.pth"
    for name, content in evil(sentinel).items():
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
        assert not sentinel.exists(), name


def test_a_tensor_that_says_it_is_huge_takes_no_memory(tmp_path: Path) -> None:
    model, path = fastunet.UNet(1, 2, base_c=1), tmp_path / "checkpoint.pth"
    torch.save({**model.state_dict(), "outc.conv.bias": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(RuntimeError, match=r"'outc.conv.bias' of shape \(1048576, 1048576\), here \(2,\)"):
        model.load_state_dict(torch.load(path, weights_only=True))


def loads(source: str) -> list[str]:
    """The calls in ``source`` that could execute what they read."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = ast.unparse(call.func)
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
        if (name == "torch.load" and not safe) or name in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"):
            found.append(ast.unparse(call))
    return found


def test_nothing_here_executes_what_it_reads() -> None:
    """No module and no example of the README unpickles, evaluates, or asks a shell."""
    assert loads("torch.load(p)\neval(x)\ntorch.load(p, weights_only=False)\ntorch.load(p, weights_only=True)") != []
    sources = [
        path.read_text(encoding="utf-8") for folder in ("fastunet", "kernels") for path in (ROOT / folder).rglob("*.py")
    ]
    sources += re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert [call for source in sources for call in loads(source)] == []
