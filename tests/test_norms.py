"""Batch norms in every state that nn.BatchNorm2d knows, beside it; and what is no derivative of this library's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from sources import widest
from torch import Tensor, nn

import fastunet
from fastunet import functional, losses, ops
from fastunet.activation import Activation, Config, Next, Placed
from fastunet.blocks import ConvSequence, Down


def block() -> ConvSequence:
    return ConvSequence(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def set_to_none(*names: str) -> Callable[[nn.BatchNorm2d], None]:
    def change(norm: nn.BatchNorm2d) -> None:
        for name in names:
            setattr(norm, name, None)

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_to_none("num_batches_tracked"),
        set_to_none("num_batches_tracked", "momentum"),
        set_to_none("momentum"),
        set_to_none("running_mean", "running_var"),
        set_to_none("running_mean", "running_var", "num_batches_tracked"),
        lambda norm: setattr(norm, "track_running_stats", False),
    ],
    ids=["no-count", "no-count-cumulative", "cumulative", "no-statistics", "nothing", "not-tracking"],
)
@pytest.mark.parametrize("train", [True, False], ids=["training", "eval"])
def test_states_of_a_batch_norm(
    change: Callable[[nn.BatchNorm2d], None], train: bool, backend: str, device: str
) -> None:
    ours = block().to(device).train(train)
    ours.config = ours.config._replace(backend=backend)
    change(ours[1])
    theirs = nn.Sequential(*copy.deepcopy(list(ours)))
    x = torch.randn(2, 3, 6, 8, device=device)
    for scale in (1, 3):
        torch.testing.assert_close(ours(scale * x), theirs(scale * x), rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


FLOAT32 = {"rtol": 2e-4, "atol": 2e-4}  # ten times what was seen
ACTS = {
    "leaky": lambda: nn.LeakyReLU(0.1), "leaky-in-place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "falling": lambda: nn.LeakyReLU(-0.5), "none": nn.Identity, "prelu": lambda: nn.PReLU(4, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize("kind", ["torch", "triton", "auto"])
@pytest.mark.parametrize("mode", ["training", "eval", "inference"])
def test_activation_functions_by_their_slope(act: Callable[[], nn.Module], mode: str, kind: str, device: str) -> None:
    """Read by a convolution and pooled, with and without a batch norm: as the modules they are."""
    dtype = widest(kind, device)
    ours = ConvSequence(
        nn.Conv2d(3, 4, 3, padding=1), nn.Identity(), nn.BatchNorm2d(4), act(), nn.Conv2d(4, 4, 3, padding=1), act(),
    ).to(device, dtype).train(mode == "training")  # fmt: skip
    below = Down(4, 2).to(device, dtype).train(mode == "training")
    below.maxpool_conv[1].double_conv[2] = nn.LeakyReLU(0.1)
    theirs = copy.deepcopy(
        nn.ModuleList([nn.Sequential(*ours), nn.MaxPool2d(2), nn.Sequential(*below.maxpool_conv[1].double_conv)])
    )
    context = Config(kind).context
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(device, dtype)
    with torch.inference_mode(mode == "inference"):
        here = context(x, ours)
        last, skip = below.lazy(ours.lazy(Placed.of(Activation(x)), here, Next(pool=True)), here)
        z = theirs[0](x)
        found, expected = (last.tensor(here), skip.tensor(here)), (theirs[2](theirs[1](z)), z)
    exact = dtype == torch.float64
    torch.testing.assert_close(found, expected, **({"rtol": 1e-10, "atol": 1e-10} if exact else FLOAT32))
    if mode != "inference":
        mine, other = [*ours.parameters(), *below.parameters()], [*theirs.parameters()]
        grads = (
            torch.autograd.grad(sum(y.square().sum() for y in ys), ps) for ys, ps in ((found, mine), (expected, other))
        )
        torch.testing.assert_close(*grads, **({"rtol": 1e-9, "atol": 1e-9} if exact else FLOAT32))


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_one_statistic_without_the_other_is_refused(missing: str, train: bool, grad: bool) -> None:
    ours = block().train(train)
    setattr(ours[1], missing, None)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=f"expected a batch norm with running_mean and running_var.*got no {missing}"),
    ):
        ours(torch.randn(2, 3, 6, 8))
    model = fastunet.UNet(3, 2, base_c=4, backend="torch").train(train)
    setattr(model.up3.conv.double_conv[1], missing, None)
    with pytest.raises(ValueError, match=rf"got no {missing}.*\(up3\.conv\.double_conv\.1\)"):
        model(torch.randn(2, 3, 16, 16))


def test_an_empty_batch_is_counted() -> None:
    ours = block()
    theirs = nn.Sequential(*copy.deepcopy(list(ours)))
    for module in (ours, theirs):
        module(torch.zeros(0, 3, 6, 8))
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert ours[1].num_batches_tracked == 1


def test_a_cumulative_norm_compiles_into_one_graph() -> None:
    model = fastunet.UNet(3, 2, base_c=4, backend="torch")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    compiled = copy.deepcopy(model)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 3, 16, 16)
        model(x)
        step(x)
    for mine, other in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


# ---- functional.conv_bn_relu -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_operators_refuse_parameters_of_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    mean, var, one = torch.zeros(4), torch.ones(4), torch.ones(4, dtype=dtype)
    for weight, bias in ((one, None), (None, one)):
        with pytest.raises(TypeError, match=r"expected a (weight|bias) of torch\.float32"):
            ops.bn_affine(mean, var, weight, bias, 1e-5, backend)


# ---- forward-mode derivatives ------------------------------------------------------------------------------------


def answers(x: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    """Calls of everything that is differentiable, on a tensor that has a tangent."""
    model = fastunet.UNet(3, 2, base_c=4, backend="torch").to(x.device)
    weight = torch.randn(4, 3, 1, 1, device=x.device)
    return {
        "network": lambda: model(x),
        "eval": lambda: copy.deepcopy(model).eval()(x),
        "predict": lambda: model.predict(x),
        "predict_proba": lambda: model.predict_proba(x),
        "network's loss": lambda: model.loss(x, labels, losses.CrossEntropyLoss()),
        "loss": lambda: losses.CrossEntropyLoss()(x, labels),
        "miou": lambda: functional.miou(x, labels),
        "head_loss": lambda: functional.head_loss(x, weight, None, labels, losses.CrossEntropyLoss()),
        "conv_bn_relu": lambda: functional.conv_bn_relu(x, weight, training=True),
        "upsample": lambda: functional.upsample_pad_concat(x, x),
        "pool": lambda: torch.ops.fastunet.pool_fork(x, None, "torch"),
        "block": lambda: block().to(x.device)(x),
    }


@pytest.mark.parametrize("name", answers(torch.zeros(0), torch.zeros(0)))
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_forward_mode_derivatives_are_refused(name: str, grad: bool, device: str) -> None:
    labels = torch.randint(0, 2, (2, 16, 16), device=device)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        x = forward_ad.make_dual(*(torch.randn(2, 3, 16, 16, device=device) for _ in range(2)))
        with pytest.raises(RuntimeError, match="expected no forward-mode derivative, got a tensor with a tangent"):
            answers(x, labels)[name]()


def test_no_tangent_no_refusal() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = fastunet.UNet(3, 2, base_c=4, backend="torch").eval()
    expected = model(x)
    with forward_ad.dual_level():
        torch.testing.assert_close(model(x), expected)


def test_losses_refuse_transforms_in_a_sentence() -> None:
    labels = torch.randint(0, 2, (2, 16, 16))
    with pytest.raises(RuntimeError, match=r"expected no transform of torch\.func, got a call inside one"):
        torch.func.grad(lambda x: losses.DiceLoss()(x, labels))(torch.randn(2, 3, 16, 16))


def test_tracing_is_refused_in_a_sentence(device: str) -> None:
    x, weight = torch.randn(2, 3, 16, 16, device=device), torch.randn(4, 3, 3, 3, device=device)
    labels = torch.zeros(2, 16, 16, dtype=torch.int64, device=device)
    for traced in (
        lambda x: losses.DiceLoss(backend="torch")(x, labels),
        lambda x: functional.conv_bn_relu(x, weight, training=True, backend="torch"),
        block().to(device),
    ):
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(RuntimeError, match=r"expected a call outside torch\.jit\.trace"),
            ):
                torch.jit.trace(traced, (x,))
