"""A training step in a CUDA graph is the step without it. On a CPU a stand-in for the graph does its Python again, into
the same memory: what is around the graph is tested everywhere, the capture where there is a GPU."""

from __future__ import annotations

import contextlib
import copy
import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from PIL import Image
from torch import Tensor, nn

import fastunet
from fastunet import cli, graphs, reference
from fastunet.losses import DiceCELoss
from fastunet.training import Objective, Run

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: it captures graphs")


class Stream:
    """Work in order, as all is on a CPU."""

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    """Does again what was done while it captured."""

    step: graphs.CapturedStep
    backward: Any

    def replay(self) -> None:
        step = self.step
        step._forget()
        step._loss.copy_(self.backward(*step._batch))
        for parameter, gradient in zip(step._parameters, step._gradients, strict=True):
            gradient.copy_(parameter.grad)


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's graphs, or the stand-in; on a CPU the torch backend, since the interpreter takes minutes."""
    if DEVICE == "cuda":
        return
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    for name, what in {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, what)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    capture = graphs.CapturedStep.__init__

    def watched(self: Any, backward: Any, *rest: Any) -> None:
        capture(self, backward, *rest)
        self._graph.step, self._graph.backward = self, backward

    monkeypatch.setattr(graphs.CapturedStep, "__init__", watched)


def trained(model: nn.Module, precision: str, graph: bool) -> tuple[list[Tensor], Run]:
    """The losses of six steps, of which one has a smaller batch and one accumulates two."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = Run(
        Objective(model, DiceCELoss()), optimizer, precision=precision, clip=1.0, graph=graph and DEVICE == "cuda"
    )
    run.graph = graph
    batches = []
    for size in (2, 2, 1, 2, 2, 2):
        batches.append((torch.randn(size, 3, 32, 48), torch.randint(0, 3, (size, 32, 48))))
    return [run.update([batch] * (2 if number == 4 else 1)) for number, batch in enumerate(batches)], run


MODELS = {
    "unet": partial(fastunet.UNet, 3, 3, base_c=4),
    "instance norm": partial(fastunet.UNet, 3, 3, base_c=4, norm="instance", negative_slope=0.01, upsample="nearest"),
    "accelerated": partial(reference.UNet, 3, 3, base_c=4),
    "somebody's": partial(nn.Conv2d, 3, 3, 3, padding=1),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_a_graph_is_the_run_without(name: str, precision: str) -> None:
    if DEVICE == "cpu" and precision != "fp32":
        pytest.skip("what autocast and the scaler do in a graph, a GPU tells")
    model = MODELS[name]()
    if name == "accelerated":
        fastunet.accelerate(model)
    (plain, without), (captured, run) = (trained(model, precision, graph) for graph in (False, True))
    assert run._captured is not None
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4) if DEVICE == "cuda" else assert_equal
    close(captured, plain)
    for (key, ours), theirs in zip(run.model.state_dict().items(), without.model.state_dict().values(), strict=True):
        close(ours, theirs, msg=lambda text, key=key: f"{key}: {text}")


def assert_equal(found: Any, expected: Any, **options: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, **options)


def test_gradients_are_there_for_whoever_reads_them() -> None:
    """What clips, logs or averages them finds those of the last step, and no graph is captured twice."""
    _, run = trained(MODELS["unet"](), "fp32", graph=True)
    captured = run._captured
    before = [p.grad.clone() for p in run.model.parameters()]
    batch = torch.randn(2, 3, 32, 48), torch.randint(0, 3, (2, 32, 48))
    run.update([batch])
    assert run._captured is captured
    assert any(not torch.equal(p.grad, old) for p, old in zip(run.model.parameters(), before, strict=True))


def test_a_parameter_that_is_frozen_or_moved_is_captured_anew() -> None:
    model = MODELS["unet"]()
    runs = without, run = [trained(model, "fp32", graph)[1] for graph in (False, True)]
    captured = run._captured
    images, labels = torch.randn(2, 3, 32, 48), torch.randint(0, 3, (2, 32, 48))
    for change in (
        lambda model: model.outc.requires_grad_(False),
        lambda model: model.outc.requires_grad_(True),
        lambda model: setattr(model.outc.conv.bias, "data", model.outc.conv.bias.data.clone()),
    ):
        for each in runs:
            change(each.model)
            each.update([(images, labels)])
        assert run._captured is not captured
        captured = run._captured
        for ours, theirs in zip(run.model.parameters(), without.model.parameters(), strict=True):
            if DEVICE == "cpu":
                assert_equal(ours, theirs)
            assert (ours.grad is None) == (theirs.grad is None)
    run._captured = None
    run.update([(images, labels[:1, :1, :1].expand_as(labels))])  # one number in all places: none to write to


def test_what_goes_wrong_in_any_step_is_said_as_without_a_graph() -> None:
    with pytest.raises(RuntimeError, match="to have 4 channels") as caught:
        trained(nn.Conv2d(4, 3, 1), "fp32", graph=True)
    assert not isinstance(caught.value, graphs.GraphError)


@on_gpu
def test_what_waits_for_the_gpu_is_refused() -> None:
    class Waiting(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if bool(x.sum() > 0) else 1)

    with pytest.raises(graphs.GraphError, match=r"expected a step that a CUDA graph can hold, got one that it cannot"):
        trained(Waiting(3, 3, 1), "fp32", graph=True)
    torch.cuda.synchronize()


@on_gpu
@pytest.mark.parametrize("name", ["unet", "instance norm", "accelerated"])
def test_pytorchs_own_graphs_take_the_networks(name: str) -> None:
    """``make_graphed_callables`` and ``torch.compile(mode="reduce-overhead")``, as the README has them."""
    model = MODELS[name]().to(DEVICE)
    if name == "accelerated":
        fastunet.accelerate(model)
    x = torch.randn(2, 3, 32, 48, device=DEVICE)
    twin = copy.deepcopy(model)
    compiled = None if name == "accelerated" else torch.compile(copy.deepcopy(model), mode="reduce-overhead")
    graphed = torch.cuda.make_graphed_callables(model, (torch.zeros_like(x),))
    twin.load_state_dict(model.state_dict())
    for forward in (graphed, compiled):
        if forward is None:
            continue
        forward.load_state_dict(twin.state_dict())
        for _ in range(3):
            for net in (twin, forward):
                net.zero_grad(set_to_none=True)
                net(x).square().mean().backward()
        for ours, theirs in zip(forward.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_a_graph_is_refused_where_there_is_none() -> None:
    model = MODELS["unet"]()
    with pytest.raises(
        ValueError, match=r"expected a network on one CUDA GPU for graph=True, got one on cpu; leave it"
    ):
        Run(Objective(model, DiceCELoss()), torch.optim.SGD(model.parameters(), 0.1), graph=True)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Five pictures 40×48 of two classes, as arguments."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(5):
        labels = rng.integers(0, 2, (5, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        Image.fromarray(labels * 100 + rng.integers(0, 90, labels.shape, np.uint8)).save(
            tmp_path / f"images/{index}.png"
        )
        Image.fromarray(labels * 255).save(tmp_path / f"masks/{index}.png")
    return [str(tmp_path / "images"), str(tmp_path / "masks")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu"], "does not go with device cpu, and CUDA graphs need a GPU: leave it out"),
        (
            ["--device", "cuda", "--accumulate", "2"],
            "does not go with --accumulate 2, whose gradients a graph does not",
        ),
    ],
)
def test_the_command_refuses_what_a_graph_cannot_do(
    options: list[str], said: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("fastunet.train._device", torch.device)
    assert cli.main(["train", *pictures, "-o", str(tmp_path / "run"), "--graph", *options]) == 2
    assert f"--graph {said}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@on_gpu
def test_the_command_trains_by_a_graph(pictures: list[str], tmp_path: Path) -> None:
    """Batches of two and a last one of one; resumed, it is captured anew."""
    usual = ["-b", "2", "-s", "1", "--base-c", "4", "-v", "0", "--precision", "bf16", "-l", "1e-3"]
    losses = {}
    for name, more in (("plain", []), ("graph", ["--graph"])):
        command = ["train", *pictures, "-o", str(tmp_path / name), *usual]
        assert cli.main([*command, "-e", "2", *more]) == 0
        assert cli.main(["train", *pictures, "-o", str(tmp_path / name), "-e", "3", "--resume"]) == 0
        with open(tmp_path / name / "steps.csv", newline="") as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(losses["graph"], losses["plain"], rtol=2e-2)
