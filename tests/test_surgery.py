"""Networks that somebody changed: the modules that are there decide, and whatever of a call is another's is called."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastunet
from fastunet import distributed, losses

FIRST = {"UNet": "inc.double_conv.0", "StridedUNet": "d1.Conv_BN_ReLU_2.0", "PlainUNet": "encoder1.0",
         "BrainUNet": "encoder1.enc1conv1"}  # fmt: skip
LAST = {"UNet": "outc.conv", "StridedUNet": "o.6", "PlainUNet": "output", "BrainUNet": "conv"}
ROUNDED = {"rtol": 1e-4, "atol": 1e-5}  # float32 through a network of random weights

BACKEND = "torch"  # of what is tested; tests/test_eager.py repeats it with "auto"


def made(network: str, **settings: Any) -> nn.Module:
    sizes = {"UNet": (3, 2, False, 4), "StridedUNet": (3, 2, 4), "PlainUNet": (3, 2, 4), "BrainUNet": (3, 1, 4)}
    model: nn.Module = getattr(fastunet, network)(*sizes[network], backend=BACKEND, **settings)
    return model


def replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return module


# ---- the modules that are there decide ---------------------------------------------------------------------------


@pytest.mark.parametrize("network", FIRST)
def test_a_replaced_first_convolution(network: str) -> None:
    model = made(network)
    grey, colour = torch.randn(2, 1, 16, 32), torch.randn(2, 3, 16, 32)
    replaced(model, FIRST[network], nn.Conv2d(1, 4, 3, padding=1))
    assert model.n_channels == 1
    assert model(grey).shape[2:] == (16, 32)
    with pytest.raises(ValueError, match=r"expected 1 input channels, got 3 in an input of shape \(2, 3, 16, 32\)"):
        model(colour)


@pytest.mark.parametrize("network", FIRST)
def test_an_adapter_in_front(network: str) -> None:
    torch.manual_seed(1)
    model, grey = made(network).eval(), torch.randn(2, 1, 16, 32)
    adapter = nn.Conv2d(1, 3, 1)
    expected = model(adapter(grey))
    block = FIRST[network].partition(".")[0]
    if network == "StridedUNet":  # whose blocks return two tensors
        block = "d1.Conv_BN_ReLU_2"
    replaced(model, block, nn.Sequential(adapter, model.get_submodule(block)))
    assert model.n_channels == 1
    torch.testing.assert_close(model(grey), expected, **ROUNDED)


@pytest.mark.parametrize("network", FIRST)
@pytest.mark.parametrize("where", ["network", "block", "convolution"])
def test_a_hook_that_repeats_grey(network: str, where: str) -> None:
    model, grey = made(network).eval(), torch.randn(2, 1, 16, 32)
    expected = model(grey.repeat(1, 3, 1, 1))
    name = {"network": "", "block": FIRST[network].rpartition(".")[0], "convolution": FIRST[network]}[where]
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: args[0].repeat(1, 3, 1, 1))
    torch.testing.assert_close(model(grey), expected, **ROUNDED)
    with pytest.raises((ValueError, RuntimeError)):  # 6 channels for 3
        model(torch.randn(2, 2, 16, 32))


class Kept(nn.Module):
    """An upward block of the removed level."""

    def __init__(self, channels: int, doubled: bool):
        super().__init__()
        self.channels, self.doubled = channels, doubled

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([x[:, : self.channels]] * (2 if self.doubled else 1), 1)


class Through(nn.Module):
    """A downward block of the removed level: for the skip connection, for the next block."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.cat([x, x], 1)


@pytest.mark.parametrize("network", ["UNet", "StridedUNet", "BrainUNet"])
def test_a_removed_level(network: str) -> None:
    model, x = made(network).eval(), torch.randn(2, 3, 8, 12)
    with pytest.raises(ValueError, match="expected height and width of at least 16, got 8×12"):
        model(x)
    if network == "UNet":
        model.down4, model.up1 = nn.Identity(), Kept(32, False)
    elif network == "StridedUNet":
        model.d4, model.u1 = Through(), Kept(32, True)
    else:
        replaced(model, "pool4", nn.Identity())
        replaced(model, "upconv4", nn.Conv2d(64, 32, 1))
    assert model(x).shape[2:] == (8, 12)
    with pytest.raises(ValueError, match="expected height and width of at least 8, got 7×12"):
        model(x[:, :, :7])


def test_a_removed_pooling_of_all_levels() -> None:
    model = made("PlainUNet").eval()
    model.pool = nn.Identity()
    for level, width in enumerate((4, 8, 16, 32), 1):
        replaced(model, f"upconv{level}", nn.Conv2d(2 * width, width, 1))
    assert model(torch.randn(2, 3, 3, 5)).shape == (2, 2, 3, 5)


def test_what_grows_before_it_is_pooled() -> None:
    model = made("UNet").eval()
    model.inc = nn.Sequential(nn.Upsample(scale_factor=2), model.inc)
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 2, 16, 16)
    with pytest.raises(ValueError, match="expected at least 2×2 pixels to pool, got 1×1; pad or enlarge the input"):
        model(torch.randn(1, 3, 7, 7))


@pytest.mark.parametrize("network", FIRST)
def test_channels_follow_the_modules(network: str) -> None:
    model = made(network)
    assert (model.n_channels, model.n_classes) == (3, 1 if network == "BrainUNet" else 2)
    replaced(model, LAST[network], nn.Conv2d(model.get_submodule(LAST[network]).in_channels, 5, 1))
    assert model.n_classes == 5
    assert model(torch.randn(2, 3, 16, 16)).shape[1] == 5


def test_a_mismatch_names_its_module() -> None:
    x = torch.randn(2, 3, 16, 32)
    model = made("UNet")
    replaced(model, "down3.maxpool_conv.1.double_conv.0", nn.Conv2d(7, 32, 3, padding=1))
    with pytest.raises(ValueError, match=r"expected 7 channels, got 16.*down3\.maxpool_conv\.1\.double_conv\.0"):
        model(x)
    model = made("UNet")
    replaced(model, "up2.conv.double_conv.1", nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match=r"batch norm of 16 features, got one of 5.*up2\.conv\.double_conv\.1"):
        model(x)
    for train in (True, False):
        model = made("UNet").train(train)
        model.up1.conv.double_conv[4].double()
        with pytest.raises(TypeError, match=r"expected a batch norm in float32.*up1\.conv\.double_conv\.4"):
            model(x)
    with pytest.raises(TypeError, match="expected input and weights of one dtype"):
        made("UNet").double()(x)


# ---- whatever of a call is another's is called -------------------------------------------------------------------


def twice(model: type[nn.Module]) -> type[nn.Module]:
    class Twice(model):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2 * super().forward(x)
            return y - 1 if model is not fastunet.BrainUNet else y / 2 + 0.1

    return Twice


LOGITS = ["UNet", "PlainUNet"]


def overrides(network: str) -> dict[str, nn.Module]:
    kind = getattr(fastunet, network)
    subclass = made(network)
    subclass.__class__ = twice(kind)
    hooked, prehooked, patched, replaced_call = (made(network) for _ in range(4))
    hooked.register_forward_hook(lambda module, args, y: y * 3 - 1)
    prehooked.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    own = patched.forward
    patched.forward = lambda x: own(x).flip(1) + 1
    call = replaced_call._call_impl
    replaced_call._call_impl = lambda *args: call(*args).flip(1) + 1
    return {"subclass": subclass, "hook": hooked, "pre-hook": prehooked, "forward": patched, "call": replaced_call}


@pytest.mark.parametrize("network", LOGITS)
@pytest.mark.parametrize("how", ["subclass", "hook", "pre-hook", "forward", "call"])
def test_predict_and_loss_call_what_is_called(network: str, how: str) -> None:
    model, x = overrides(network)[how], torch.randn(2, 3, 16, 32)
    labels = torch.randint(0, 2, (2, 16, 32))
    criterion = losses.DiceCELoss(backend="torch")
    torch.testing.assert_close(model.loss(x, labels, criterion), criterion(model(x), labels), **ROUNDED)
    weights = torch.rand(2, 16, 32)
    torch.testing.assert_close(
        model.loss(x, labels, criterion, weights), criterion(model(x), labels, weights), **ROUNDED
    )
    found = model.predict(x), model.predict_proba(x)
    assert model.training
    logits = model.eval()(x)
    assert torch.equal(found[0], logits.argmax(1).to(torch.uint8))
    torch.testing.assert_close(found[1], logits.softmax(1), **ROUNDED)


@pytest.mark.parametrize("how", ["subclass", "hook", "pre-hook", "forward", "call"])
def test_probabilities_that_are_called(how: str) -> None:
    model, x = overrides("BrainUNet")[how], torch.randn(2, 3, 16, 32)
    with pytest.raises(TypeError, match=r"expected a .* with its own forward and no hooks.*BCELoss"):
        model.loss(x, torch.zeros(2, 16, 32, dtype=torch.int64), losses.DiceLoss(sigmoid=True))
    found = model.predict(x), model.predict_proba(x)
    p = model.eval()(x).clamp(0, 1)
    torch.testing.assert_close(found[1], p, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], (found[1] > 0.5).to(torch.uint8))


def test_a_call_that_returns_no_logits() -> None:
    model = made("UNet")
    model.register_forward_hook(lambda module, args, y: {"out": y})
    with pytest.raises(TypeError, match=r"expected a call of the model to return a tensor \(N, K, H, W\).*got dict"):
        model.predict(torch.randn(1, 3, 16, 16))


def tiled(conv: nn.Conv2d) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The seamless-tiling patch."""
    return lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


@pytest.mark.parametrize("network", FIRST)
def test_a_replaced_part_of_a_convolution(network: str) -> None:
    model, x = made(network).eval(), torch.randn(1, 3, 32, 32)
    conv = model.get_submodule(FIRST[network])
    conv._conv_forward = tiled(conv)
    found = model(x)
    del conv._conv_forward
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    torch.testing.assert_close(found, model(x), **ROUNDED)
    conv.padding_mode = "zeros"
    assert (found - model(x)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_patched_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("UNet").eval(), torch.randn(1, 3, 32, 32)
    before, own = model(x), getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda *args: own(*args) + 1)
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    monkeypatch.undo()
    assert torch.equal(model(x), before)


def test_other_replaced_parts() -> None:
    x = torch.randn(2, 3, 16, 32)
    called: list[str] = []
    model = made("UNet")
    up, norm, relu = model.up1.up, model.inc.double_conv[1], model.inc.double_conv[2]
    own = up._output_padding
    up._output_padding = lambda *args: called.append("padding") or own(*args)
    norm._check_input_dim = lambda x: called.append("dim")
    call = relu._call_impl
    relu._call_impl = lambda *args: called.append("call") or call(*args)
    model(x)
    assert sorted(set(called)) == ["call", "dim", "padding"]


def _sharded(rank: int, store: str, result: str) -> None:
    with distributed.group("gloo", init_method=f"file://{store}", rank=rank, world_size=1):
        torch.save(_same_as_sharded(), result)
    os._exit(0)  # the mesh holds the group, whose threads may abort a process that is ending


def _same_as_sharded() -> list[bool]:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    x, labels = torch.randn(2, 3, 16, 16), torch.randint(0, 2, (2, 16, 16))
    criterion = losses.DiceCELoss()
    same = []
    for blocks in ([], ["inc", "down1", "up4"]):
        plain = made("UNet")
        model = copy.deepcopy(plain)
        for name in blocks:
            fully_shard(model.get_submodule(name), mesh=mesh)
        fully_shard(model, mesh=mesh)
        same.append(torch.equal(model.predict(x), plain.predict(x)))
        values = [network.loss(x, labels, criterion) for network in (model, plain)]
        values[0].backward()
        same.append(torch.allclose(*values) and model.inc.double_conv[0].weight.grad is not None)
    return same


@pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_predict_and_loss_of_a_sharded_network(tmp_path: Path) -> None:
    """FSDP2 gathers parameters in hooks on the network."""
    result = tmp_path / "same.pt"
    torch.multiprocessing.spawn(_sharded, (str(tmp_path / "store"), str(result)), nprocs=1)
    assert torch.load(result) == [True] * 4


# ---- predict in threads ------------------------------------------------------------------------------------------


def test_predictions_in_threads_leave_a_training_model_alone() -> None:
    model = made("UNet")
    model.up4.eval()
    buffers = [b.clone() for b in model.buffers()]
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 3, 32, 32)
    expected = model.predict(x)
    wrong: list[int] = []

    def serve() -> None:
        for _ in range(8):
            wrong.append(int((model.predict(x) != expected).sum()))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 32
    assert [m.training for m in model.modules()] == modes
    for before, after in zip(buffers, model.buffers(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("begins", ["thread", "main"])
def test_a_prediction_that_outlasts_another(begins: str) -> None:
    """Two predictions that overlap: the first that leaves must not put the other into training mode."""
    model = made("UNet")
    entered, leave = threading.Event(), threading.Event()
    x = torch.randn(2, 3, 16, 16)
    thread = threading.Thread(target=model.predict, args=(x,))

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is thread:
            entered.set()
            assert leave.wait(30)
        elif begins == "main":
            thread.start()
            assert entered.wait(30)

    model.up1.register_forward_pre_hook(wait)
    before = [b.clone() for b in model.buffers()]
    if begins == "thread":
        thread.start()
        assert entered.wait(30)
    model.predict(x)
    leave.set()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert model.training
    assert model.up4.training


# ---- constructors and inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", FIRST)
def test_tracers_and_transforms_are_refused_in_a_sentence(network: str) -> None:
    model, x = made(network), torch.randn(2, 3, 16, 16)
    with pytest.raises(RuntimeError, match=r"expected a call outside torch\.jit\.trace"):
        torch.jit.trace(model, (x,))
    with pytest.raises(TypeError, match=r"got Proxy; use torch\.export"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(RuntimeError, match=r"expected no transform of torch\.func"):
        torch.func.grad(lambda x: model(x).sum())(x)
    with pytest.raises(RuntimeError, match=r"expected no transform of torch\.func"):
        torch.vmap(model.eval())(x[None])
