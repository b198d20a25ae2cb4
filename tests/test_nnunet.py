"""``fastunet.nnunet``: nnU-Net's own training and prediction, on its own networks, to the same numbers."""

from __future__ import annotations

import importlib
import inspect
import json
import pydoc
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastunet import data
from fastunet.accelerate import Accelerated

DOOR = "fastunet.nnunet.PlainConvUNet"

# What a user puts into the folder nnUNet_extTrainer: the line of the README, and two trainers so short that they can be
# compared, on the same batches and in float64.
TRAINERS = """
import numpy, torch
from fastunet.nnunet import nnUNetTrainerFastunet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class Short:
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1
        torch.manual_seed(0)
        super().initialize()
        self.network.double()
        self.losses = []

    def on_train_start(self):
        super().on_train_start()
        torch.manual_seed(0)
        numpy.random.seed(0)

    def noted(self, step, batch):
        step = step({**batch, "data": batch["data"].double()})
        self.losses.append(float(step["loss"]))
        return step

    def train_step(self, batch):
        return self.noted(super().train_step, batch)

    def validation_step(self, batch):
        return self.noted(super().validation_step, batch)

class ShortTrainer(Short, nnUNetTrainer):
    pass

class ShortTrainerFastunet(Short, nnUNetTrainerFastunet):
    pass
"""


def draw(folder: Path) -> None:
    """Six pictures with masks, as nnU-Net's dataset 1 has them."""
    raw = folder / "raw" / "Dataset001_Cells"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for n in range(6):
        image, labels = data.draw_cells(np.random.default_rng(n), 40)
        Image.fromarray(image.astype(np.uint8)).save(raw / "imagesTr" / f"case{n}_0000.png")
        Image.fromarray((labels > 0).astype(np.uint8)).save(raw / "labelsTr" / f"case{n}.png")
    told = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "cell": 1}, "numTraining": 6}
    (raw / "dataset.json").write_text(json.dumps({**told, "file_ending": ".png"}))


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders, with a dataset that is planned and preprocessed; the plans' network is a small one."""
    pytest.importorskip("nnunetv2", reason="needs nnU-Net, of pip install 'fastunet[nnunet]'")
    draw(tmp_path)
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "short.py").write_text(TRAINERS)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    # As nnU-Net plans by default, though without a process of its own for it.
    with monkeypatch.context() as here:
        here.setenv("nnUNet_n_proc_DA", "1")
        api.extract_fingerprints([1], num_processes=1)
        api.plan_experiments([1])
        file = tmp_path / "preprocessed" / "Dataset001_Cells" / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        small = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
        small["features_per_stage"] = [4] * small["n_stages"]
        file.write_text(json.dumps(plans))
        api.preprocess([1], configurations=["2d"], num_processes=[1])
    return tmp_path


def trained(name: str) -> Any:
    """nnU-Net's trainer of that name, when it has trained."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args("1", "2d", 0, name, device=torch.device("cpu"))
    trainer.run_training()
    return trainer


def predicted(folder: str) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """The network of a folder that nnU-Net trained into, and a new picture's masks and probabilities."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(folder, (0,))
    image = data.draw_cells(np.random.default_rng(9), 56)[0][None, None].astype(np.float32)
    masks, probabilities = predictor.predict_single_npy_array(image, {"spacing": [999, 1, 1]}, None, None, True)
    return predictor.network, masks, probabilities


def fused(network: nn.Module) -> bool:
    """Whether its last call was served by fastunet's operators, all of it that multiplies."""
    forward = network.__dict__.get("forward")
    return isinstance(forward, Accelerated) and all(forward._programs.values()) and bool(forward._programs)


def alike(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Whether two predictions are one: nnU-Net sums logits in float16, which may round either way."""
    rounding = float(np.finfo(np.float16).eps)
    np.testing.assert_allclose(found[1], wanted[1], atol=rounding)
    clear = abs(wanted[1][0] - wanted[1][1]) > 2 * rounding
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[0][clear], wanted[0][clear])


def test_it_trains_and_predicts_as_nnunet_does(nnunet: Path) -> None:
    stock, ours = trained("ShortTrainer"), trained("ShortTrainerFastunet")
    assert len(stock.losses) == 8
    assert fused(ours.network)
    assert not fused(stock.network)
    # As in test_accelerate: algebra in float64.
    np.testing.assert_allclose(ours.losses, stock.losses, rtol=1e-10)
    folders = [trainer.output_folder_base for trainer in (stock, ours)]
    theirs, mine = (
        torch.load(f"{folder}/fold_0/checkpoint_final.pth", weights_only=False)["network_weights"] for folder in folders
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)  # as large as a step's gradients allow
    (plain, *wanted), (network, *found) = map(predicted, folders)
    assert type(network) is type(plain)
    assert fused(network)
    alike(found, wanted)

    # What nnU-Net trained by itself, through the other door.
    plans = Path(folders[0]) / "plans.json"
    text = plans.read_text()
    plans.write_text(text.replace("dynamic_network_architectures.architectures.unet.PlainConvUNet", DOOR))
    assert plans.read_text() != text
    network, *found = predicted(folders[0])
    assert type(network) is type(plain)
    assert fused(network)
    alike(found, wanted)


def small(input_channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(input_channels, num_classes, 3, padding=1), nn.ReLU())


class Trainer:
    """In place of nnU-Net's: what is asked of one, as nnU-Net 2.8 has it."""

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        assert (plans_manager, configuration_manager, enable_deep_supervision) == ("plans", "2d", False)
        return small(num_input_channels, num_output_channels)

    def _do_i_compile(self) -> bool:
        return True


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``beside({name: content, ...})``: fastunet.nnunet as it is imported beside modules of these names."""
    monkeypatch.delitem(sys.modules, "fastunet.nnunet", raising=False)

    def imported(modules: dict[str, dict[str, Any] | None]) -> Any:
        for name, content in modules.items():
            module = ModuleType(name)
            module.__dict__.update(content or {})
            monkeypatch.setitem(sys.modules, name, None if content is None else module)
        return importlib.import_module("fastunet.nnunet")

    yield imported
    sys.modules.pop("fastunet.nnunet", None)


UNETS = "dynamic_network_architectures.architectures.unet"
TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"


def packages(name: str) -> list[str]:
    return [name.rsplit(".", n)[0] for n in range(name.count("."), 0, -1)]


def test_what_is_accelerated_is_the_network_and_nothing_else(beside: Any) -> None:
    parents: dict[str, Any] = {name: {"__path__": []} for full in (UNETS, TRAINER) for name in packages(full)}
    architectures = ModuleType(UNETS)
    architectures.PlainConvUNet = architectures.ResidualEncoderUNet = small  # type: ignore[attr-defined]
    parents[UNETS.rpartition(".")[0]]["unet"] = architectures
    module = beside({**parents, TRAINER: {"nnUNetTrainer": Trainer}})

    own = {name for name in vars(module.Accelerated) if not name.startswith("__")}
    assert own == {"build_network_architecture", "_do_i_compile"}
    mixed = type("Mixed", (module.Accelerated, type("Other", (Trainer,), {"lr": 1})), {})
    for trainer in (module.nnUNetTrainerFastunet, mixed):
        assert issubclass(trainer, Trainer)
        assert "plans_manager" in inspect.signature(trainer.build_network_architecture).parameters  # nnU-Net asks
        network = trainer.build_network_architecture("plans", "2d", 3, 2, enable_deep_supervision=False)
        assert type(network) is nn.Sequential
        assert isinstance(network.forward, Accelerated)
        assert not trainer()._do_i_compile()
    for name in (DOOR, "fastunet.nnunet.ResidualEncoderUNet"):
        network = pydoc.locate(name)(input_channels=3, num_classes=2)  # type: ignore[operator]
        assert isinstance(network.forward, Accelerated)


def test_without_nnunet_it_says_so(beside: Any) -> None:
    with pytest.raises(ImportError) as caught:
        beside(dict.fromkeys((TRAINER, UNETS)))
    told = str(caught.value)
    assert told.startswith("expected nnU-Net's packages beside fastunet.nnunet, got none that can be imported (")
    assert told.endswith("); pip install 'fastunet[nnunet]'")
