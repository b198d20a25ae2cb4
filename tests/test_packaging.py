"""The package: what a wheel holds, what it must not, and that its promises (types, names, versions) are kept."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fastunet

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def run_uninstalled(code: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` where no fastunet is installed, though all that it needs is: neither this checkout nor its links."""
    path = [folder for folder in sys.path if folder and not Path(folder, "fastunet").exists()]
    # -S: no .pth of this environment's site-packages is read, which would install the checkout again
    code = f"import sys; sys.path += {path!r}\n{code}"
    return run(sys.executable, "-S", "-c", code, *arguments, cwd=cwd, **environment)


def copy_sources(source: Path) -> None:
    """What the package is built from."""
    for name in ("fastunet", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)


BUILD = "from setuptools import build_meta; import sys; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def built(kind: str, source: Path, target: Path) -> Path:
    """What setuptools builds from ``source``, without network: "sdist" or "wheel"."""
    done = run(sys.executable, "-c", BUILD, f"build_{kind}", str(target), cwd=source)
    assert done.returncode == 0, done.stderr
    (found,) = target.glob("fastunet-*.whl" if kind == "wheel" else "fastunet-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    copy_sources(source)
    return built("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from what the source distribution holds, as pip builds it, and with pip."""
    source, target = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = source.iterdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = run(*pip, str(target), str(unpacked), cwd=target)
    assert done.returncode == 0, done.stderr
    return next(target.glob("fastunet-*.whl"))


def test_an_editable_install_works_beside_a_folder_of_its_name(tmp_path):
    """README's clone command makes a folder fastunet; from where it lies, that must not be the package."""
    clone, site = tmp_path / "home" / "fastunet", tmp_path / "site"
    clone.mkdir(parents=True)
    copy_sources(clone)
    done = run(sys.executable, "-c", BUILD, "build_editable", str(tmp_path), cwd=clone)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(next(tmp_path.glob("fastunet-*.whl"))).extractall(site)
    (clone / "fastunet" / "new.py").write_text("came = 'since'")  # as a pull may bring them
    (clone / "kernels" / "newer.py").write_text("came = 'since'")
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]);"
        "import fastunet, fastunet.new, fastunet.kernels, fastunet.kernels.newer, importlib.util;"
        "print(fastunet.UNet(1, 1, base_c=1).n_channels, fastunet.new.__file__, fastunet.kernels.newer.__file__);"
        "assert importlib.util.find_spec('kernels') is None"
    )
    for folder in (clone.parent, tmp_path):
        done = run_uninstalled(code, str(site), cwd=folder, PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["1", str(clone / "fastunet" / "new.py"), str(clone / "kernels" / "newer.py")]


def test_wheel_holds_every_module_and_no_top_level_kernels(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in held} == {"fastunet"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastunet").rglob("*.py")}
    sources |= {f"fastunet/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in held if name.endswith(".py")} == sources
    assert held - sources == {"fastunet/py.typed", "fastunet/kernels/tiles.json"}


def test_source_distribution_holds_what_the_wheel_is_built_from(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder in ("fastunet", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    ]
    wanted = {*sources, "fastunet/py.typed", "kernels/tiles.json", "pyproject.toml", "README.md", "LICENSE"}
    assert wanted - held == set()
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", "build/"))]


SMOKE = """
import sys
import torch
import fastunet, fastunet.cli
from fastunet import kernels, ops

for module in (fastunet, kernels):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
x, a = torch.randn(1, 3, 4, 6), torch.randn(3, 3)
torch.testing.assert_close(*(ops.affine_act(x, a, True, backend) for backend in ("torch", "triton")))
model = fastunet.UNet(3, 2, base_c=2, backend="torch")
loss = model.loss(torch.randn(2, 3, 32, 32), torch.randint(0, 2, (2, 32, 32)), fastunet.losses.DiceCELoss())
loss.backward()
assert all(p.grad is not None for p in model.parameters())
torch.compile(model, backend="fastunet")  # found by its entry point, or refused
sys.exit(fastunet.cli.main(["info"]))
"""


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    """Neither the checkout nor what is installed of it: networks, kernels with their table, the command line."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = run_uninstalled(SMOKE, str(site), cwd=tmp_path, PYTHONPATH=str(site), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert f"fastunet  {fastunet.__version__}" in done.stdout
    assert "the Triton kernels run here" in done.stdout


# What `pip install -e` of the checkout argv[1] leaves behind: a finder, which is asked last.
INSTALLED = """
import sys
from importlib.util import spec_from_file_location

class Installed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = {"fastunet": "fastunet", "fastunet.kernels": "kernels"}.get(name)
        return folder and spec_from_file_location(name, f"{sys.argv[1]}/{folder}/__init__.py")

sys.meta_path.append(Installed)
import fastunet
from fastunet import kernels
print(fastunet.__file__, kernels.__file__)
"""


def test_a_checkout_that_is_not_the_installed_one_runs_its_own_kernels(tmp_path):
    for name in ("installed", "other"):
        for folder in ("fastunet", "kernels"):
            shutil.copytree(ROOT / folder, tmp_path / name / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, path in (("other", str(tmp_path / "other")), ("installed", "")):
        done = run_uninstalled(INSTALLED, str(tmp_path / "installed"), cwd=tmp_path, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{tmp_path}/{name}/{folder}/__init__.py" for folder in ("fastunet", "kernels")]


def test_kernels_refuse_to_be_a_top_level_package(tmp_path):
    done = run(sys.executable, "-c", "import kernels", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "must be imported as 'fastunet.kernels', not as 'kernels'" in done.stderr


@pytest.mark.skipif("CI" not in os.environ, reason="only CI has to have all that the test extra names")
@pytest.mark.parametrize(
    "oracle",
    [
        "imagecodecs",
        "kornia",
        "matplotlib",
        "monai",
        "onnxruntime",
        "onnxscript",
        "safetensors",
        "tifffile",
        "torchmetrics",
    ],
)
def test_ci_compares_with_every_oracle(oracle):
    """What skips without it is run there."""
    assert importlib.util.find_spec(oracle) is not None
    assert f'"{oracle}' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_version_is_the_installed_one():
    assert fastunet.__version__ == metadata.version("fastunet")


def test_console_script_is_installed():
    (script,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "fastunet")
    assert callable(script.load())


def test_import_of_fastunet_does_not_import_triton(tmp_path):
    done = run(sys.executable, "-c", "import fastunet, sys; sys.exit('triton' in sys.modules)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr or "fastunet imported triton, which CPU builds of torch do not bring"


def test_public_names_exist():
    for name in fastunet.__all__:
        assert hasattr(fastunet, name), name


def test_launchers_are_fully_annotated():
    """mypy lets untyped functions through in fastunet.kernels, for the jit functions' sake; launchers must be typed."""
    pytest.importorskip("triton", reason="the kernels import Triton, part of pip install 'fastunet[test]' on Linux")
    package = importlib.import_module("fastunet.kernels")
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                signature = inspect.signature(function)
                annotations = [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]
                assert inspect.Signature.empty not in annotations, f"{module.__name__}.{name} is not fully annotated"


def test_every_source_compiles_for_the_oldest_python():
    """The grammar of Python 3.10, whichever Python runs the tests."""
    for path in [*ROOT.glob("fastunet/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")]:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
