"""``torch.compile(model, backend="fastunet")``: the same numbers, by fastunet's operators, and by the graph without."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_accelerate import NETS, agree, scramble
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastunet import dynamo
from fastunet.accelerate import Accelerated


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Accelerated]]:
    """What the backend makes of the graphs that it is given, on the torch backend."""
    found: list[Accelerated] = []

    class Noted(Accelerated):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    monkeypatch.setattr(dynamo, "Accelerated", Noted)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def compiled(plain: nn.Module) -> nn.Module:
    """A copy of it, compiled."""
    ours = copy.deepcopy(plain)
    ours.compile(backend=dynamo.backend)
    return ours


def shares(graph: Accelerated) -> tuple[float, float]:
    """Of what a graph multiplies, and of what it moves, the part that is fused."""
    (program,) = graph._programs.values()
    assert program is not None
    whole, fused = program.steps, [step for step in program.steps if step.why is None]
    flops, size = (sum(getattr(s, of) for s in fused) / sum(getattr(s, of) for s in whole) for of in ("flops", "bytes"))
    return flops, size


@pytest.mark.parametrize("name", ["milesial", "mixed"])
def test_it_trains_and_evaluates_as_the_model_does(name: str, graphs: list[Accelerated]) -> None:
    """Of two sizes, of which the second is traced with all sizes open, and with other parameters in their places."""
    net = NETS[name]
    plain = scramble(net.make()).double()
    ours = compiled(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastunet.accelerate")  # said where torch.export cannot serve a size
        for size in (net.size, (48, 66), (35, 61)):
            agree(ours, plain, torch.randn(2, 3, *size, dtype=torch.float64))
        state = scramble(net.make()).double().state_dict()
        for model in (ours, plain):
            model.load_state_dict(copy.deepcopy(state), assign=True)
        agree(ours, plain, torch.randn(2, 3, 35, 61, dtype=torch.float64))
    assert len(graphs) >= 2  # in training and in evaluation at least
    for graph in graphs:
        flops, size = shares(graph)  # of one program: no size is traced again
        assert flops >= net.flops
        assert size >= net.bytes


class Doubled(torch.autograd.Function):
    """Its gradient is not its derivative: whoever differentiates it otherwise is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 5 * gradient


class Odd(nn.Module):
    """Weights and paddings that are computed, norms that no module of pictures is, parameters of its own, a Doubled."""

    def __init__(self, doubled: bool) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.second = nn.Conv2d(4, 4, 3, padding="same")
        self.norms = nn.ModuleList([nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4, affine=False)])
        self.act = nn.PReLU()
        self.scale = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.last = nn.BatchNorm1d(4)
        self.doubled = doubled

    def forward(self, x: Tensor) -> Tensor:
        z = self.second(self.second(self.first(x)))
        z = torch.conv2d(z, self.second.weight, padding=(x.shape[2] // 5, 1))
        z = Doubled.apply(z) if self.doubled else 2 * z
        z = nn.functional.batch_norm(z, None, None, self.scale.flatten(), None, training=True)
        for norm in self.norms:
            z = self.act(norm(z)) * self.scale
        return self.last(z.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("doubled", [False, True])
def test_what_it_cannot_serve_runs_as_the_graph_has_it(doubled: bool, graphs: list[Accelerated]) -> None:
    plain = Odd(doubled).double()
    ours = compiled(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in ((12, 10), (18, 13)):
            agree(ours, plain, torch.randn(2, 3, *size, dtype=torch.float64))
    said = [str(w.message) for w in caught if "fastunet.accelerate" in str(w.message)]
    assert all("Function.apply" in sentence for sentence in said)
    assert bool(said) == doubled
    # Without gradients Dynamo looks into a Function, as into any other.
    assert [bool(graph._programs) for graph in graphs] == 2 * [not doubled, True]


class Again(nn.Module):
    """One block twice, as recurrent networks have it, and a convolution by a buffer."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.PReLU())
        self.register_buffer("kernel", torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(nn.functional.conv2d(x, self.kernel)))  # type: ignore[no-any-return]


def test_modules_that_serve_twice_are_one_and_no_parameter_is_kept(graphs: list[Accelerated]) -> None:
    """As two, one of which is fused, they would change the statistics that the other's gradient reads."""
    models = [Again().double() for _ in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastunet.accelerate")
        for plain in models:
            agree(compiled(plain), plain, torch.randn(2, 3, 12, 10, dtype=torch.float64))
    assert len(graphs) == 2  # for both models, in training and in evaluation
    assert all(shares(graph)[0] > 0.5 for graph in graphs)
    ours = compiled(models[0])
    ours(torch.randn(2, 3, 12, 10, dtype=torch.float64)).sum().backward()
    gone = [weakref.ref(tensor) for tensor in (*ours.parameters(), *ours.buffers())]
    del ours
    gc.collect()
    assert len(graphs) == 2
    assert not any(there() is not None for there in gone)


def test_numbers_of_norms_are_known_where_all_is_open(graphs: list[Accelerated]) -> None:
    """``dynamic=True`` makes inputs of momenta and epsilons, and traces again for other ones."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.5), nn.ReLU()).double()
    ours = copy.deepcopy(plain)
    ours.forward = torch.compile(ours.forward, backend=dynamo.backend, dynamic=True)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastunet.accelerate")
        for momentum in (0.5, 0.25, 0.5):
            for model in (plain, ours):
                model[1].momentum = momentum
            agree(ours, plain, torch.randn(2, 3, 12, 10, dtype=torch.float64))
    assert len(graphs) == 4  # for each of two momenta one in training and one in evaluation
    assert all(shares(graph)[0] == 1 for graph in graphs)


def test_modes_and_options_are_refused() -> None:
    torch._dynamo.reset()
    ours = Again()
    ours.compile(backend=dynamo.backend, mode="reduce-overhead")
    with pytest.raises(
        Exception, match=r"expected no mode for torch.compile.s backend fastunet, which has none; leave"
    ):
        ours(torch.randn(2, 3, 12, 10))


class Called(nn.Sequential):
    """With a forward that is not PyTorch's own, which Dynamo would not look into."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[no-any-return]


def test_a_graph_without_2d_convolutions_is_left(graphs: list[Accelerated], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    backend = dynamo.backend
    monkeypatch.setattr(dynamo, "backend", lambda graph, inputs: (given.append(graph), backend(graph, inputs))[1])
    flat = Called(nn.Linear(3, 4), nn.ReLU()).double()
    agree(compiled(flat), flat, torch.randn(2, 3, dtype=torch.float64))
    solid = Called(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)).double()
    agree(compiled(solid), solid, torch.randn(2, 1, 4, 5, 6, dtype=torch.float64))
    assert given
    assert graphs == []
