"""``UNet.loss`` and ``UNet.predict``: what the stored logits would give, without a tensor of their size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sources import skip_if_unsupported
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastunet
from fastunet import losses
from fastunet.blocks import OutConv

# The interpreter is numpy, which warns of values that the kernels compute and then mask.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

CLASSES = 5
NETWORKS: dict[str, Callable[..., Any]] = {
    "unet": lambda **config: fastunet.UNet(2, CLASSES, base_c=3, **config),
    "unet-bilinear": lambda **config: fastunet.UNet(2, CLASSES, bilinear=True, base_c=4, **config),
    "plain": lambda **config: fastunet.PlainUNet(2, CLASSES, 3, **config),
    "brain": lambda **config: fastunet.BrainUNet(2, CLASSES, 3, **config),
}
CRITERIA: dict[str, Callable[[], losses.StatsLoss]] = {
    "dice": lambda: losses.DiceLoss(backend="torch"),
    "dice-ce": lambda: losses.DiceCELoss(
        weight=torch.rand(CLASSES), label_smoothing=0.1, include_background=False, backend="torch"
    ),
    "cross-entropy": lambda: losses.CrossEntropyLoss(ignore_index=1, backend="torch"),
    "tversky": lambda: losses.TverskyLoss(alpha=0.3, beta=0.7, backend="torch"),
    "generalized": lambda: losses.GeneralizedDiceLoss(backend="torch"),
    "multilabel": lambda: losses.DiceCELoss(sigmoid=True, squared_pred=True, batch=False, backend="torch"),
}


def data(criterion: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    shape = (2, CLASSES, 17, 18) if getattr(criterion, "sigmoid", False) else (2, 17, 18)
    return torch.randn(2, 2, 17, 18, dtype=dtype), torch.randint(0, 2 if len(shape) == 4 else CLASSES, shape)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """What the last convolution gives: seen by a hook, which also makes the model store it."""
    seen = []
    head = model.outc if isinstance(model, fastunet.UNet) else model._head
    handle = head.register_forward_hook(lambda _m, _args, out: seen.append(out))
    model(x)
    handle.remove()
    return seen[0]


def both(model: Any, x: Tensor, labels: Tensor, criterion: Any, *weights: Tensor) -> list[list[Tensor]]:
    """(loss, gradients…) by ``model.loss`` and by the stored logits; each from the same state of the model."""
    results = []
    for without in (True, False):
        net = copy.deepcopy(model)
        value = net.loss(x, labels, criterion, *weights) if without else criterion(logits_of(net, x), labels, *weights)
        results.append([value, *torch.autograd.grad(value, list(net.parameters()))])
    return results


def assert_same(results: list[list[Tensor]], **tolerance: float) -> None:
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that ATen calls and operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        return result


# float64 truth to the accumulated rounding of a whole network's backward.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_equals_the_loss_of_the_logits(network: Callable[..., Any]) -> None:
    criterion = losses.DiceCELoss(backend="torch")
    x, labels = data(criterion)
    assert_same(both(network(backend="torch").double(), x, labels, criterion), **EXACT)


def test_the_kernel_in_the_networks_place(device: str) -> None:
    """The head alone by its kernel, in the interpreter: the rest by ATen, which is a thousand times as fast there."""
    pytest.importorskip("triton")
    skip_if_unsupported("triton", torch.float64, device)
    criterion = losses.DiceCELoss(backend="torch")
    x, labels = data(criterion)
    model = NETWORKS["unet"](backend="torch").double()
    _, expected = both(model, x, labels, criterion)
    decode = model._decode

    def with_kernel(x: Tensor) -> Any:
        act, config = decode(x)
        return act, config._replace(backend="triton")

    model._decode = with_kernel
    value = model.loss(x, labels, criterion)
    assert_same([[value, *torch.autograd.grad(value, list(model.parameters()))], expected], **EXACT)


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_every_loss(criterion: Callable[[], losses.StatsLoss]) -> None:
    loss = criterion()
    x, labels = data(loss)
    assert_same(both(NETWORKS["unet"](backend="torch").double(), x, labels, loss), **EXACT)


def test_pixel_weights() -> None:
    criterion = losses.DiceCELoss(backend="torch")
    x, labels = data(criterion)
    weight = torch.rand(2, 17, 18, dtype=torch.float64)
    assert_same(both(NETWORKS["unet"](backend="torch").double(), x, labels, criterion, weight), **EXACT)


def _hooked(model: nn.Module) -> None:
    model.outc.conv.register_forward_hook(lambda _m, _args, out: 2 * out)


def _replaced(model: nn.Module) -> None:
    model.outc = nn.Sequential(OutConv(3, 4), nn.ReLU(), nn.Conv2d(4, CLASSES, 3, padding=1)).double()


def _wide(model: nn.Module) -> None:
    model.outc.conv = nn.Conv2d(3, CLASSES, 3, padding=1).double()


@pytest.mark.parametrize("change", [_hooked, _replaced, _wide], ids=["hooked", "replaced", "3x3"])
def test_another_head_falls_back_to_its_logits(change: Callable[[nn.Module], None]) -> None:
    model = NETWORKS["unet"](backend="torch").double()
    change(model)
    criterion = losses.DiceCELoss(backend="torch")
    x, labels = data(criterion)
    results = []
    for without in (True, False):
        net = copy.deepcopy(model)
        value = net.loss(x, labels, criterion) if without else criterion(net(x), labels)
        results.append([value, *torch.autograd.grad(value, list(net.parameters()))])
    assert_same(results, **EXACT)


class _Doubled(losses.DiceLoss):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 2 * super().forward(logits, labels)


def _listened() -> losses.DiceLoss:
    loss = losses.DiceLoss()
    loss.register_forward_hook(lambda _m, _args, out: 3 * out)
    return loss


FOREIGN: dict[str, Callable[[], Any]] = {"torch": nn.CrossEntropyLoss, "subclass": _Doubled, "hooked": _listened}


@pytest.mark.parametrize("criterion", FOREIGN.values(), ids=FOREIGN.keys())
def test_any_other_criterion_gets_the_logits(criterion: Callable[[], Any]) -> None:
    loss = criterion()
    x, labels = data(loss)
    assert_same(both(NETWORKS["unet"](backend="torch").double(), x, labels, loss), **EXACT)


def test_no_tensor_of_the_logits_size() -> None:
    """Neither theirs, nor any other with more than a third of their elements: those are all of the activations."""
    classes, size = 40, 160
    model = fastunet.UNet(1, classes, base_c=2, backend="torch")
    x, labels = torch.randn(1, 1, size, size), torch.randint(0, classes, (1, size, size))
    with Shapes() as made:
        model.loss(x, labels, losses.DiceCELoss(label_smoothing=0.1, backend="torch")).backward()
    largest = max(torch.Size(shape).numel() for shape in made.shapes)
    assert largest < classes * size * size // 3
    with Shapes() as made:  # the same count does find logits
        losses.DiceCELoss(backend="torch")(model(x), labels).backward()
    assert (1, classes, size, size) in made.shapes


def test_checkpointing() -> None:
    criterion = losses.DiceCELoss(backend="torch")
    x, labels = data(criterion)
    model = NETWORKS["unet"](backend="torch").double()
    model.use_checkpointing()
    assert_same(both(model, x, labels, criterion), **EXACT)


def test_autocast() -> None:
    """16-bit convolutions, statistics in float32; the logits differ by the one rounding that storing them costs."""
    criterion = losses.DiceCELoss(backend="torch")
    x, labels = data(criterion, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, expected = (results[0] for results in both(NETWORKS["unet"](backend="torch"), x, labels, criterion))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=4e-3, atol=0)  # 2^-8, the rounding of a logit of size 1


def test_compiled_in_one_graph() -> None:
    criterion = losses.DiceCELoss(backend="torch")
    x, labels = data(criterion)
    model = NETWORKS["plain"](backend="torch").double()
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        step = torch.compile(model.loss, fullgraph=True, backend="aot_eager") if compiled else model.loss
        value = step(x, labels, criterion)
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    assert_same(results, **EXACT)


# ---- the head alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_head_of_another_network(bias: bool, backend: str, device: str) -> None:
    """A 1×1 convolution of one's own and its loss, on either backend."""
    conv = nn.Conv2d(6, CLASSES, 1, bias=bias).to(device)
    x = torch.randn(2, 6, 7, 9, device=device, requires_grad=True)
    labels = torch.randint(0, CLASSES, (2, 7, 9), device=device)
    weight = torch.rand(2, 7, 9, device=device)
    criterion = losses.DiceCELoss(ignore_index=2, backend="torch")
    value = fastunet.functional.head_loss(x, conv.weight, conv.bias, labels, criterion, weight, backend=backend)
    expected = criterion(conv(x), labels, weight)
    leaves = [x, *conv.parameters()]
    found, truth = (torch.autograd.grad(v, leaves) for v in (value, expected))
    torch.testing.assert_close([value, *found], [expected, *truth], rtol=1e-4, atol=1e-6)  # float32


@pytest.mark.parametrize("criterion", FOREIGN.values(), ids=FOREIGN.keys())
def test_the_head_alone_takes_losses_of_statistics(criterion: Callable[[], Any]) -> None:
    x, weight, labels = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1), torch.zeros(1, 4, 4).long()
    with pytest.raises(TypeError, match=r"expected a loss of fastunet\.losses, got \w+; give it the logits"):
        fastunet.functional.head_loss(x, weight, None, labels, criterion())


# ---- predictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_predictions_are_those_of_the_logits(network: Callable[..., Any]) -> None:
    model = network(backend="torch").double()
    x, _ = data(None)
    logits = logits_of(model.eval(), x)
    assert torch.equal(model.predict(x), logits.argmax(1).to(torch.uint8))
    assert torch.equal(model.predict(x, sigmoid=True, threshold=0.4), (logits.sigmoid() > 0.4).to(torch.uint8))
    for sigmoid in (False, True):
        p = logits.sigmoid() if sigmoid else logits.softmax(1)
        found = model.predict_proba(x, sigmoid=sigmoid, dtype=torch.float16)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), p.double(), rtol=2**-10, atol=2**-23)  # the rounding to float16


def test_one_channel_is_a_question_of_its_own() -> None:
    model = fastunet.BrainUNet(2, 1, 3, backend="torch").double()
    x, _ = data(None)
    probabilities = model.eval()(x)
    assert torch.equal(model.predict(x), (probabilities > 0.5).to(torch.uint8))
    torch.testing.assert_close(model.predict_proba(x, dtype=torch.float64), probabilities, rtol=1e-12, atol=0)


def test_predictions_of_another_head() -> None:
    model = NETWORKS["unet"](backend="torch").double()
    _hooked(model)
    x, _ = data(None)
    expected = model.eval()(x)
    assert torch.equal(model.predict(x), expected.argmax(1).to(torch.uint8))
    torch.testing.assert_close(model.predict_proba(x, dtype=torch.float64), expected.softmax(1))


def test_predicting_leaves_the_mode_and_the_statistics() -> None:
    model = NETWORKS["unet"](backend="torch").train()
    model.inc.eval()  # frozen, as in fine-tuning
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert not model.predict_proba(torch.randn(1, 2, 17, 18)).requires_grad
    assert [module.training for module in model.modules()] == modes
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
