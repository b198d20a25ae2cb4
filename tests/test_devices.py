"""Tensors on two devices: every operator, network, loss and score refuses them, and says which is where."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from processes import python
from torch import Tensor, nn

import fastunet
from fastunet import dispatch, functional, losses, metrics


def elsewhere(device: str) -> str:
    return "cpu" if device == "cuda" else "meta"


def calls() -> Iterator[tuple[str, list[Any]]]:
    """Each operator with operands that fit, tensors wherever there may be one."""
    x, skip = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    affine, vector, weight = torch.randn(3, 2), torch.rand(2), torch.randn(2, 4, 3, 3)
    labels, wanted = torch.zeros(1, 4, 4, dtype=torch.int64), [True, True, True]
    one, plane, stats = torch.randn(2, 2, 1, 1), torch.rand(1, 4, 4), torch.randn(1, 2, 7)
    source, second = [x, affine, 0.0], [skip, affine.clone(), 0.0]
    place = [[4, 4], [0, 0, 0, 0], [False, False]]
    up, big = torch.randn(2, 2, 2, 2), torch.randn(1, 2, 8, 8)
    half = torch.randn(1, 2, 2, 2)
    yield "affine_act", source
    yield "affine_act_backward", [x.clone(), *source]
    yield "add_act", [*source, x.clone(), affine.clone(), 0.0, 0.1]
    yield "add_act_backward", [x.clone(), *source, x.clone(), affine.clone(), 0.0, 0.1]
    yield "affine_prelu", [x, affine, vector]
    yield "affine_prelu_backward", [x.clone(), x, affine, vector]
    yield "avg_pool2x2", source
    yield "avg_pool2x2_backward", [half, *source]
    yield "pad_replicate", [*source, 1, 1]
    yield "pad_replicate_backward", [torch.randn(1, 2, 5, 5), *source]
    yield "bn_affine", [vector, vector.clone(), vector.clone(), vector.clone(), 1e-5]
    yield "bn_affine_running", [vector, *(vector.clone() for _ in range(5)), 16, 0.1, 1e-5]
    rows = torch.rand(1, 2)
    yield "group_affine", [rows, rows.clone(), vector, vector.clone(), 2, 1e-5]
    yield "group_affine_backward", [torch.randn(1, 3, 2), rows, rows.clone(), vector, 2, 1e-5]
    yield "bn_affine_backward", [affine, vector, vector.clone(), 1e-5]
    yield "conv2d", [*source, *second, weight, vector, 1, *place, True, False, True, vector.clone()]
    yield (
        "conv2d_backward",
        [x.clone(), vector, vector.clone(), half, x.clone(), vector.clone(), vector.clone(), *source, *second, weight,
         x.new_empty(0), 1, *place, [True] * 4],
    )  # fmt: skip
    yield "conv2d_act", [*source, *second, weight, vector, *place, affine.clone(), 0.0, False, one, vector.clone()]
    yield "conv_transpose2d", [*source, up, vector, True]
    yield (
        "conv_transpose2d_backward",
        [big, vector, vector.clone(), big.clone(), vector.clone(), *source, up, [True] * 3],
    )
    yield "max_pool2x2", [x, affine]
    yield "max_pool2x2_backward", [x, affine, half, x.clone()]
    yield "pool_fork", [x, affine]
    yield "upsample_concat", [*source, big, affine.clone(), 0.0, True, True]
    yield "upsample_concat_backward", [torch.randn(1, 4, 8, 8), *source, big, affine.clone(), 0.0, True, True]
    yield "softmax_stats", [x, labels, plane, "softmax", -1, wanted]
    yield "softmax_stats_backward", [stats, x, labels, plane, "softmax", -1, wanted]
    yield "head_stats", [*source, one, vector, labels, plane, "softmax", -1, wanted]
    yield "head_stats_backward", [stats, *source, one, vector, labels, plane, "softmax", -1, wanted, [True] * 3]
    yield "head_predict", [*source, one, vector, "argmax", 0.5, torch.float32]
    yield "confusion_matrix", [x, labels, -1, 0.0]
    yield "confusion_matrix_of_masks", [labels, labels.clone(), 2, -1]


CALLS = dict(calls())


def test_every_operator_is_here() -> None:
    registered = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("fastunet::")}  # fmt: skip
    assert registered == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_operators_refuse_tensors_of_two_devices(name: str, grad: bool, backend: str, device: str) -> None:
    operator = getattr(torch.ops.fastunet, name).default
    args = [x.to(device) if isinstance(x, Tensor) else x for x in CALLS[name]]
    tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
    assert len(tensors) >= 2
    ways = [operator]
    if operator in dispatch._FUNCTIONS or (not grad and name != "pool_fork"):
        ways.append(lambda *args: dispatch.call(operator, *args))
    with torch.set_grad_enabled(grad):
        if grad:
            operator(*args, backend)  # they fit
        for way in ways:
            for i in tensors:
                mixed = [x.to(elsewhere(device)) if j == i else x for j, x in enumerate(args)]
                with pytest.raises(ValueError, match=r"expected \w+ on \w+(:\d)?, where \w+ is, got one on"):
                    way(*mixed, backend)


# In a process of its own, whose kernels are not the interpreter's: no tensor of another device is launched with others,
# not the first time and not where the last tensor's device is one that was seen before.
LAUNCHES = """
from unittest import mock
import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from fastunet.kernels import common, launching

class Elsewhere(torch.Tensor):
    def get_device(self):
        return 1

launched = []

class Compiled:
    def __getitem__(self, grid):
        return lambda *args: launched.append(args)

def run(kernel, *args, **options):
    launched.append(args)
    return Compiled()

x, y = torch.zeros(4096), torch.zeros(64)
far = torch.zeros(4096).as_subclass(Elsewhere)
with mock.patch.object(JITFunction, "run", run), mock.patch.object(launching, "_compiled", {}):
    def launch(x, y):
        launching.launch(common._sum_slabs_kernel, (1,), x, y, 64, 64, GROUP=64, BLOCK=64)
    launch(x, y), launch(x, y)
    assert len(launched) == 2
    for mixed in ((far, y), (x, far), (TensorDescriptor(far, [64, 64], [64, 1], [16, 16]), y)):
        try:
            launch(*mixed)
        except ValueError as error:
            assert "expected the tensors of a launch on one device" in str(error), error
        else:
            raise AssertionError(mixed)
    assert len(launched) == 2
print("ok")
"""


def test_no_launch_mixes_devices() -> None:
    pytest.importorskip("triton")
    done = python("-c", LAUNCHES, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"


# ---- networks ----------------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "UNet": lambda **how: fastunet.UNet(3, 2, base_c=4, **how),
    "StridedUNet": lambda **how: fastunet.StridedUNet(3, 2, 4, **how),
    "PlainUNet": lambda **how: fastunet.PlainUNet(3, 2, 4, **how),
    "BrainUNet": lambda **how: fastunet.BrainUNet(3, 1, 4, **how),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("train", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("settings", [{}, {"backend": "torch"}], ids=["auto", "torch"])
def test_networks_name_the_module_that_is_elsewhere(
    network: str, train: bool, settings: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # as where there is no Triton
        monkeypatch.setattr("fastunet.backend.triton_unavailable", lambda *place: "it is not here")
    model = NETWORKS[network](**settings).to(device).train(train)
    x = torch.randn(1, 3, 16, 32, device=device)
    leaves = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    for name in (leaves[0], leaves[1], leaves[6]):
        mixed = copy.deepcopy(model)
        mixed.get_submodule(name).to(elsewhere(device))
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"expected .* move one of them") as said:
                mixed(x)
            assert name in str(said.value)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_elsewhere(momentum: float | None, device: str) -> None:
    for train in (True, False):
        model = fastunet.UNet(3, 2, base_c=4, backend="torch").to(device).train(train)
        norm = model.down1.maxpool_conv[1].double_conv[4]
        assert isinstance(norm, nn.BatchNorm2d)
        norm.momentum = momentum
        norm.running_mean = norm.running_mean.to(elsewhere(device))
        with pytest.raises(ValueError, match=r"down1\.maxpool_conv\.1\.double_conv\.4"):
            model(torch.randn(1, 3, 16, 32, device=device))


@pytest.mark.parametrize("network", NETWORKS)
def test_an_input_elsewhere_than_the_model(network: str) -> None:
    model = NETWORKS[network](backend="torch")
    x = torch.randn(1, 3, 16, 32)
    with pytest.raises(ValueError, match=r"expected an input on cpu, where the model is, got one on meta; move it"):
        model(x.to("meta"))
    with pytest.raises(ValueError, match=r"expected an input on meta, where the model is, got one on cpu; move it"):
        model.to("meta")(x)


# ---- functions, losses, scores -----------------------------------------------------------------------------------


def test_functions_name_the_argument_that_is_elsewhere() -> None:
    x, weight, v = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.rand(4)
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    for name in names:
        vectors = {each: v.to("meta") if each == name else v.clone() for each in names}
        for training in (True, False):
            with pytest.raises(ValueError, match=f"expected {name} on cpu, where x is, got it on meta"):
                functional.conv_bn_relu(x, weight, **vectors, training=training)
    with pytest.raises(ValueError, match="expected weight on cpu, where x is, got it on meta"):
        functional.conv_bn_relu(x, weight.to("meta"), training=True)
    with pytest.raises(ValueError, match="expected skip on cpu, where x is, got it on meta"):
        functional.upsample_pad_concat(x, x.to("meta"))
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected bias on cpu, where x is, got it on meta"):
        functional.head_loss(x, weight[:, :, :1, :1], v.to("meta"), labels, losses.DiceLoss())


@pytest.mark.parametrize("loss", [losses.DiceLoss, losses.CrossEntropyLoss, losses.DiceCELoss, losses.TverskyLoss])
def test_losses_refuse_weights_and_labels_elsewhere(loss: type[losses.StatsLoss]) -> None:
    logits, labels = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"expected weight on cpu, where the logits are, got it on meta; move the loss"
    ):
        loss(weight=[1.0, 2.0]).to("meta")(logits, labels)
    with pytest.raises(ValueError, match="expected labels on cpu"):
        loss()(logits, labels.to("meta"))


def test_scores_refuse_tensors_of_two_devices() -> None:
    logits, labels = torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    score = metrics.ConfusionMatrix(2)
    for prediction in (logits, labels):
        with pytest.raises(ValueError, match="expected labels on cpu"):
            score.update(prediction, labels.to("meta"))
    with pytest.raises(ValueError, match="expected input and target on one device, got cpu and meta"):
        metrics.dice_coeff(logits, logits.to("meta"))
    with pytest.raises(ValueError, match="expected input and target on one device, got cpu and meta"):
        metrics.multiclass_dice_coeff(logits, logits.to("meta"))
    with pytest.raises(ValueError, match="expected labels on cpu"):
        metrics.soft_miou(logits, labels.to("meta"))
