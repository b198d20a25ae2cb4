"""What README and CONTRIBUTING say: commands and examples are run as a reader runs them, each promise has its test."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import ROOT

from fastunet import cli

DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.DOTALL | re.MULTILINE)


def commands() -> set[str]:
    """Every command of the documents, of the Makefile, and every module that is one."""
    found = set()
    for name in DOCUMENTS:
        for block in blocks(name, "console"):
            found |= {re.sub(r"\s{2,}#.*", "", line).strip() for line in block.splitlines()}
        prose = re.sub(r"^```.*?^```", "", text(name), flags=re.DOTALL | re.MULTILINE)
        found |= set(re.findall(r"`((?:python -m|make|pytest) [^`]*)`", prose))
    found |= {f"make {target}" for target in re.search(r"^\.PHONY: (.*)", text("Makefile"), re.MULTILINE)[1].split()}
    found |= {f"python -m fastunet {command}" for command in cli.COMMANDS}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        if path.name == "__main__.py" or 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
            found.add(f"python -m {module}")
    return found - {""}


# ---- how each is run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Run here: ``command`` in place of what is written, with the smallest arguments where its defaults are slow."""

    command: str
    prints: str  # what it prints, as a pattern
    why: str = ""  # these arguments, and no others


@dataclass(frozen=True)
class By:
    """Run by another test, as a process of its own."""

    test: str
    why: str = ""


@dataclass(frozen=True)
class Not:
    """Not run by any test, and why."""

    why: str


SMALL = "--steps 2 --batch-size 2 --crop 32 --base-c 2 --device cpu"
GPU = "needs a GPU"
CI = Not(".ci/run is this command, in a clean clone")
GATE = By("tests/test_gate.py::test_kernels_pass")
SUITE = "tests/test_suite.py::test_dry_run_checks_every_provider_and_prints_the_plan"
PLANTED = By("tests/test_gate.py::test_green", "of one kernel: all take minutes")

TABLE: dict[str, Run | By | Not] = {
    "git clone <this repository> fastunet && cd fastunet": CI,
    "make test": CI,
    "make lint": CI,
    "make types": CI,
    "make unit": CI,
    ".venv/bin/pytest tests/test_pool.py -q": CI,
    "pytest tests/test_loss_cost.py": CI,
    "make demo": By("tests/test_documents.py::test_slow_defaults", "in --long: half a minute"),
    'make demo ARGS="--images photos --masks photos_masks"': Run(
        f'make demo ARGS="--images photos --masks photos_masks {SMALL}"', r"2 to learn from, 1 held out", "200 steps"
    ),
    'make demo TORCH="torch ..."': Not("pip installs what TORCH names; `make -n` is read below"),
    "pip install -e .": By("tests/test_packaging.py::test_an_editable_install_works_beside_a_folder_of_its_name"),
    "pip install -e '.[test]'": Not("make test installs by it: .ci/run"),
    "make test-oldest": Not("installs another PyTorch, some gigabytes: by hand; `make -n` is read below"),
    "make test-newest": Not("as make test-oldest"),
    "python tests/zoo.py": Not("other people's networks, of fastunet[zoo]: by hand; small ones in test_accelerate.py"),
    "make test-versions": Not("make test-oldest and make test-newest"),
    ".venv/bin/pytest --long 60": Not("by hand: an hour"),
    "make clean": Run("make clean", ""),
    "python -m fastunet info": Run("python -m fastunet info", r"conv2d +torch"),
    "FASTUNET_BACKEND=torch python ...": Run("FASTUNET_BACKEND=torch python -m fastunet info", "BACKEND=torch"),
    "python -m fastunet train photos photos_masks --epochs 20 --scale 0.5 --output run": Run(
        "python -m fastunet train photos photos_masks --epochs 1 --scale 0.5 --output run --base-c 2 --device cpu",
        "2 to learn from, 1 held out", "20 epochs of 64 channels",
    ),
    "python -m fastunet train photos photos_masks --epochs 40 --output run --resume": Run(
        "python -m fastunet train photos photos_masks --epochs 2 --output run --device cpu --resume",
        "after 1 epochs", "40 epochs",
    ),
    "python -m fastunet evaluate photos photos_masks --model run/best.pth --output confusion.png": Run(
        "python -m fastunet evaluate photos photos_masks --model run/best.pth --output confusion.png", r"mean +0\.\d+",
    ),
    "python -m fastunet predict --model run/best.pth --input photos --output masks --viz": Run(
        "python -m fastunet predict --model run/best.pth --input photos --output masks --viz", "masks/2_OUT.png"
    ),
    "python -m fastunet export --model run/best.pth --output unet.onnx": By(
        "tests/test_predict.py::test_programs_take_any_batch_and_size", "which refuses before PyTorch 2.13"
    ),
    "torchrun --nproc-per-node 2 -m fastunet train photos photos_masks --output run2": By(
        "tests/test_train.py::test_two_processes_are_one_with_twice_the_batch"
    ),
    **dict.fromkeys(
        (
            'mkdir trainers && echo "from fastunet.nnunet import nnUNetTrainerFastunet" > trainers/with_fastunet.py',
            'export nnUNet_extTrainer="$PWD/trainers"',
            "nnUNetv2_train 1 2d 0 -tr nnUNetTrainerFastunet",
            "nnUNetv2_predict -i pictures -o masks -d 1 -c 2d -f 0 -tr nnUNetTrainerFastunet",
        ),
        By("tests/test_nnunet.py::test_it_trains_and_predicts_as_nnunet_does", "what they call, where nnU-Net is"),
    ),
    **{
        f"python -m fastunet {name}": By("tests/test_documents.py::test_commands_run", "with the arguments above")
        for name in ("train", "predict", "evaluate")
    },
    "python -m fastunet export": By("tests/test_predict.py::test_programs_take_any_batch_and_size"),
    "python -m fastunet demo": By("tests/test_documents.py::test_commands_run", "by make demo"),
    "python -m fastunet verify": By("tests/test_documents.py::test_slow_defaults", "in --long: two minutes"),
    "python -m fastunet verify --quick": By(
        "tests/test_verify.py::test_the_command_compares_every_case", "on the torch backend; the kernels in --long"
    ),
    "make verify": By("tests/test_verify.py::test_the_command_compares_every_case", "it is python -m fastunet verify"),
    "make gate": GATE,
    "python -m benchmarks.gate": GATE,
    "python -m benchmarks.gate --all --arch sm_90": By("tests/test_documents.py::test_slow_defaults", "in --long"),
    "python -m benchmarks.gate --all --only wgrad --verbose": By(
        "tests/test_documents.py::test_slow_defaults", "in --long"
    ),
    "python -m benchmarks.gate --update": PLANTED,
    "python -m benchmarks.gate --variants --arch sm_90": Run(
        "python -m benchmarks.gate --variants --arch sm_90 --only bn_affine", "0 broken rules", "all take half an hour"
    ),
    "make faults": By("tests/test_faults.py::test_a_fault_is_where_it_is_planted", "all of them: half an hour"),
    'make faults ARGS="pool dY"': By("tests/test_faults.py::test_what_tests_do_not_see_is_said", "of one fault"),
    "make coverage": By("tests/test_lines.py::test_the_lines_of_one_test_are_told", "of all: half an hour"),
    "make ptx": By("tests/test_ptx.py::test_kernels", "with --quick"),
    "python -m benchmarks.ptx": By("tests/test_ptx.py::test_kernels", "with --quick"),
    'make ptx ARGS="--chip sm_90 --dtype bf16 --only conv"': By("tests/test_ptx.py::test_kernels", "with --quick"),
    'make ptx ARGS="--faults 100"': By("tests/test_ptx.py::test_planted_faults_are_noticed", "with 44"),
    "make bench": By("tests/test_documents.py::test_commands_run", "it is pytest benchmarks"),
    "pytest benchmarks": By("tests/test_benchmarks.py::test_benchmarks_run_on_a_cpu", "a few of them"),
    "pytest benchmarks --benchmark-json=before.json": Run(
        "pytest benchmarks -k affine_act --benchmark-max-time=0.01 --benchmark-min-rounds=1 "
        "--benchmark-json=before.json && cp before.json after.json",
        r"\d+ passed", "all of them take minutes",
    ),
    "pytest-benchmark compare before.json after.json --group-by=group": Run(
        "pytest-benchmark compare before.json after.json --group-by=group", "affine_act"
    ),
    "python -m benchmarks.suite": By(SUITE, f"{GPU}: --dry-run"),
    "python -m benchmarks.suite --row ID": By(
        "tests/test_suite.py::test_a_row_says_what_it_depends_on_and_can_be_measured_again", GPU
    ),
    "python -m benchmarks.suite --budget 330": By(SUITE, f"{GPU}: --dry-run"),
    "python -m benchmarks.suite --only max_pool": By(SUITE, f"{GPU}: --dry-run"),
    "python -m benchmarks.suite --dry-run": By(SUITE, "with --only: all take minutes"),
    "python -m benchmarks.report": Run("python -m benchmarks.report && git diff --exit-code --stat README.md", ""),
    "python -m benchmarks.cpu": By(
        "tests/test_cpu_benchmark.py::test_the_command_prints_the_rows_that_are_asked_for", "with --only: minutes"
    ),
    "python -m benchmarks.host": By("tests/test_host.py::test_the_host_time_of_steps_is_told", "with --seconds 0"),
    "python -m benchmarks.traffic": By("tests/test_traffic.py::test_the_command_prints_layers_and_takes_other_roofs"),
    "python -m benchmarks.profile": By(
        "tests/test_profile.py::test_a_cpu_profiles_a_small_network_and_says_what_it_cannot_show"
    ),
    "python -m benchmarks.tune": By("tests/test_tune.py::test_dry_run_checks_candidates_in_the_interpreter", GPU),
    ".venv/bin/ruff format .": Run("ruff format . && git diff --exit-code --stat -- '*.py'", "unchanged"),
    "TRITON_INTERPRET=1 FASTUNET_BACKEND=triton python my_script.py": Run(
        "TRITON_INTERPRET=1 FASTUNET_BACKEND=triton python my_script.py", "float32 triton"
    ),
}  # fmt: skip

SCRIPT = """
import torch, fastunet
from fastunet.backend import resolve_backend

x = torch.randn(2, 3, 4, 6)
y = fastunet.functional.conv_bn_relu(x, torch.randn(4, 3, 3, 3), training=True)
print(str(y.dtype).removeprefix("torch."), resolve_backend("auto", x.device, x.dtype))
"""


# ---- a reader's checkout -----------------------------------------------------------------------------------------


def tracked() -> list[str]:
    """The files of a clone; all that are there where this is none."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose .venv has the packages of this environment, and three pictures with their masks."""
    if not (names := tracked()):
        pytest.skip("this is no checkout of git's")
    folder = tmp_path_factory.mktemp("clone")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for command in ("git init -q", "git add -A", "git -c user.name=a -c user.email=a commit -qm all"):
        subprocess.run(shlex.split(command), cwd=folder, check=True)
    (folder / "my_script.py").write_text(SCRIPT)
    make = "from fastunet import data; from PIL import Image; import sys; sys.path.insert(0, 'tests'); import fuzzing\n"
    make += "import numpy as np\nfor n in range(3):\n  p = data.draw_cells(np.random.default_rng(n), 64)\n"
    make += "  for f, x in zip(('photos', 'photos_masks'), p): Image.fromarray(x.astype(np.uint8)).save(f'{f}/{n}.png')"
    for name in ("photos", "photos_masks"):
        (folder / name).mkdir()
    done = shell(f"python -c {shlex.quote(make)}", folder)
    assert done.returncode == 0, done.stderr
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "pytest", "ruff", "mypy"):
        real = Path(sys.executable).parent / name
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(str(real))} "$@"\n')
        (programs / name).chmod(0o755)
    for name in (".made", ".torch", ".fastunet", ".fastunet-test"):  # newest last, as make writes them
        (folder / ".venv" / name).touch()
    return folder


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``command`` as a reader types it in ``folder``, with the environment active and no variable of the tests'."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTUNET_BACKEND")}
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "TORCH", "ARGS", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        kept.pop(name, None)
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    more = {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    more["PIP_DRY_RUN"] = "1"  # nothing of this is installed
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**kept, **more}, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=1200,
    )  # fmt: skip


needs_a_shell = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "make", "git"))), reason="runs commands by bash, make and git"
)
RUNS = {written: how for written, how in TABLE.items() if isinstance(how, Run)}


@needs_a_shell
def test_commands_run(checkout: Path) -> None:
    """In the order of the table, in one checkout: make clean comes last."""
    order = sorted(RUNS.values(), key=lambda how: how.command == "make clean")
    problems = []
    for how in order:
        done = shell(how.command, checkout)
        if done.returncode != 0 or not re.search(how.prints, done.stdout + done.stderr):
            problems.append(f"$ {how.command}: status {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    assert problems == []
    assert not (checkout / ".venv").exists(), "make clean"
    assert Path(sys.executable).exists(), "and not what a link points to"


@needs_a_shell
def test_slow_defaults(seconds: float, checkout: Path) -> None:
    """What takes minutes by its defaults: only in the long mode."""
    if not seconds:
        pytest.skip("takes minutes: pytest --long 10")
    for command, prints in {
        "make demo": "wrote fastunet_demo.png",
        "python -m fastunet verify --quick": "all passed",
        "python -m fastunet verify --backend torch": "all passed",
        "python -m benchmarks.gate --all --arch sm_90": "0 broken rules",
        "python -m benchmarks.gate --all --only wgrad --verbose": "0 broken rules",
        "python -m benchmarks.cpu --seconds 0": "bilinear +channels_last inference",
    }.items():
        done = shell(command, checkout)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(prints, done.stdout + done.stderr)


@needs_a_shell
@pytest.mark.parametrize("target", re.search(r"^\.PHONY: (.*)", text("Makefile"), re.MULTILINE)[1].split())
def test_targets_of_make_are_read(target: str) -> None:
    """What a target would do, from nothing: no variable is undefined, and what it installs is named."""
    places = " ".join(f"{name}=/tmp/nowhere" for name in ("VENV", "PAIR_VENV", "NEWEST_VENV"))
    done = shell(f"make -n {target} {places} --warn-undefined-variables", ROOT)
    assert done.returncode == 0, done.stderr
    assert "undefined" not in done.stderr
    assert "/tmp/nowhere" in done.stdout


# ---- examples ----------------------------------------------------------------------------------------------------


def test_examples_of_the_readme_run(tmp_path: Path) -> None:
    """One script of all of them, where nobody chose a backend."""
    found = [block for name in DOCUMENTS for block in blocks(name, "python")]
    assert len(found) >= 4
    (tmp_path / "examples.py").write_text("\n".join(found) + "\nassert features\nprint('done')\n")
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTUNET_BACKEND")}
    done = subprocess.run(
        [sys.executable, "examples.py"], cwd=tmp_path, env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
    assert "Warning" not in done.stderr


# ---- what has no test --------------------------------------------------------------------------------------------


def no_tests(ids: list[str]) -> list[str]:
    """The ids among them that name no test function."""
    missing = []
    for name in ids:
        path, _, function = name.partition("::")
        file = ROOT / path
        tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
        if not any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body):
            missing.append(name)
    return missing


def test_every_command_has_a_test() -> None:
    assert sorted(commands() - TABLE.keys()) == [], "no test runs these: say in TABLE how they are run"
    assert sorted(TABLE.keys() - commands()) == [], "these are in no document"
    assert no_tests([how.test for how in TABLE.values() if isinstance(how, By)]) == []
    assert "make test" in text(".ci/run")


def test_every_promise_has_its_test() -> None:
    section = text("README.md").partition("\n## Promises\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| `(tests/\w+\.py::\w+)` \|$", section, re.MULTILINE)
    assert len(rows) >= 20
    assert len(rows) == len([line for line in section.splitlines() if line.startswith("|")]) - 2
    assert no_tests([test for _, test in rows]) == []
    assert no_tests(["tests/test_documents.py::no_such_test", "tests/nowhere.py::test"]) != []


def test_what_documents_point_to_is_there() -> None:
    for name in (*DOCUMENTS, "SECURITY.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", text(name)):
            assert (ROOT / target).exists(), f"{name}: {target}"
        for path in re.findall(r"`((?:fastunet|kernels|benchmarks|tests)/[\w/]+\.(?:py|json))`", text(name)):
            assert (ROOT / path).exists(), f"{name}: {path}"
