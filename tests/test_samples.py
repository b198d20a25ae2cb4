"""Normalisation per sample: InstanceNorm2d and GroupNorm in every state, beside PyTorch's modules, in float64."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import python
from sources import check_compiled, skip_if_unsupported, truth, widest
from torch import Tensor, nn

from fastunet import ops
from fastunet.activation import Activation, Config, Next, Placed
from fastunet.blocks import ConvSequence, Down, Up
from fastunet.layout import SAMPLES
from fastunet.reference import functional as plain

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": nn.InstanceNorm2d,
    "affine": lambda c: nn.InstanceNorm2d(c, affine=True, eps=1e-3),
    "tracking": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "group": lambda c: nn.GroupNorm(2, c),
    "layer": lambda c: nn.GroupNorm(1, c, affine=False),
    "batch": nn.BatchNorm2d,
}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64: the same sums in another order
GRADIENTS = {"rtol": 1e-9, "atol": 1e-9}
FLOAT32 = {"rtol": 2e-4, "atol": 2e-4}  # ten times what was seen of blocks


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.normal_()  # negative scales too
    return module


@pytest.mark.parametrize(
    ("name", "batch", "mode", "policy", "kind"),
    [
        *itertools.product(NORMS, [1, 3], ["training", "eval", "inference"], ["speed", "memory"], ["torch"]),
        *itertools.product(["batch", "instance", "tracking"], [3], ["training", "inference"], ["speed"], ["auto"]),
        *itertools.product(["group"], [3], ["training", "inference"], ["speed"], ["triton"]),
    ],
)
def test_blocks_are_the_modules_that_they_hold(
    name: str, batch: int, mode: str, policy: str, kind: str, device: str
) -> None:
    """Convolved, pooled, a skip connection, transposed and concatenated: values, gradients, running statistics."""
    norm, leaky = NORMS[name], lambda: nn.LeakyReLU(0.1)
    first = ConvSequence(nn.Conv2d(3, 4, 3, padding=1), norm(4), leaky(), nn.Conv2d(4, 4, 3, 2, 1), norm(4), leaky())
    down, up = Down(4, 8), Up(8, 4, bilinear=False)
    for block in (down.maxpool_conv[1], up.conv):
        for i, channels in ((1, block.double_conv[0].out_channels), (4, block.double_conv[3].out_channels)):
            block.double_conv[i], block.double_conv[i + 1] = norm(channels), leaky()
    dtype = widest(kind, device)
    ours = randomised(nn.ModuleList([first, down, up])).to(device, dtype).train(mode == "training")
    theirs = copy.deepcopy(ours)
    x = torch.randn(batch, 3, 13, 10, dtype=torch.float64).to(device, dtype)
    with torch.inference_mode(mode == "inference"):
        context = Config(kind, policy).context(x, ours)
        act = first.lazy(Placed.of(Activation(x)), context, Next(pool=True))
        below, skip = down.lazy(act, context)
        z = up.lazy(below, skip, context).tensor(context)
        plainly = nn.Sequential(*theirs[0])(x)
        deep = nn.Sequential(*theirs[1].maxpool_conv[1].double_conv)(F.max_pool2d(plainly, 2))
        raised = theirs[2].up(deep)
        rows, columns = (plainly.shape[i] - raised.shape[i] for i in (2, 3))
        raised = F.pad(raised, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        expected = nn.Sequential(*theirs[2].conv.double_conv)(torch.cat([plainly, raised], 1))
    close, near = (CLOSE, GRADIENTS) if dtype == torch.float64 else (FLOAT32, FLOAT32)
    torch.testing.assert_close(z, expected, **close)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, **close)
    if mode != "inference":
        weights = torch.randn_like(z)
        grads = [
            torch.autograd.grad((y * weights).sum(), [*m.parameters()]) for y, m in ((z, ours), (expected, theirs))
        ]
        torch.testing.assert_close(*grads, **near)


def test_large_pictures(device: str) -> None:
    """512 squared, in float32, by the torch backend: no digits are lost in the sums, values far from zero included."""
    block = ConvSequence(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.01)).to(
        device
    )
    theirs = nn.Sequential(*copy.deepcopy(list(block))).double()
    x = 10 + torch.randn(2, 1, 512, 512, device=device)
    block.config = Config("torch", "memory")
    z, expected = block(x), theirs(x.double())
    torch.testing.assert_close(z.double(), expected, rtol=1e-4, atol=1e-4)
    grads = [
        torch.autograd.grad(y.square().mean(), [*m.parameters()])[0].double()
        for y, m in ((z, block), (expected, theirs))
    ]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def operands(device: str) -> dict[str, Any]:
    torch.manual_seed(1)
    x, skip = (torch.randn(shape, dtype=torch.float64, device=device) for shape in ((3, 2, 3, 4), (3, 4, 7, 8)))
    affine, skip_affine = (torch.randn(3, 3, c, dtype=torch.float64, device=device) for c in (2, 4))
    for rows in (affine, skip_affine):
        rows[:, 0] = rows[:, 0].sign() * (rows[:, 0].abs() + 0.3)
    leaves = {"x": x, "affine": affine, "skip": skip, "skip_affine": skip_affine}
    return {name: t.requires_grad_() for name, t in leaves.items()}


def calls(device: str) -> dict[str, tuple[Any, Any]]:
    """By operator: (arguments, what it should give)."""
    t = operands(device)
    x, affine, skip, skip_affine = t.values()
    source, other = (x, affine, 0.1), (skip, skip_affine, 0.0)
    w = {
        k: torch.randn(k, dtype=torch.float64, device=device, requires_grad=True)
        for k in ((5, 2, 3, 3), (2, 5, 2, 2), (5, 6, 3, 3), (3, 2, 1, 1))
    }
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.randint(0, 3, (3, 3, 4), device=device)
    half = (*source, None, None, 1.0)
    two = (*other, *source)
    down = ((3, 4), (0, 0, 0, 0), (False, False), 2)
    beside = ((7, 8), (0, 0, 2, 2), (False, False), 2)
    doubled = ((8, 8), (0, 0, 1, 0), (False, True), 2)
    return {
        "affine_act": (source, lambda: plain.affine_act(*source)),
        "conv2d": (
            (*half, w[5, 2, 3, 3], bias, 1, *down, False, False, None),
            lambda: plain.conv2d(*half, w[5, 2, 3, 3], bias, 1, *down),
        ),
        "conv2d_two": (
            (*two, w[5, 6, 3, 3], None, 2, *beside, False, False, None),
            lambda: plain.conv2d(*two, w[5, 6, 3, 3], None, 2, *beside),
        ),
        "conv2d_doubled": (
            (*two, w[5, 6, 3, 3], None, 1, *doubled, False, False, None),
            lambda: plain.conv2d(*two, w[5, 6, 3, 3], None, 1, *doubled),
        ),
        "conv_transpose2d": (
            (*source, w[2, 5, 2, 2], bias, 2),
            lambda: plain.conv_transpose2d(*source, w[2, 5, 2, 2], bias, 2),
        ),
        "upsample_concat": ((*source, *other, True, True), lambda: plain.upsample_concat(*source, *other, True, True)),
        "head_stats": (
            (*source, w[3, 2, 1, 1], None, labels, None, "softmax", -1, [True] * 3),
            lambda: plain.head_stats(*source, w[3, 2, 1, 1], None, labels, None, "softmax", -1, [True] * 3),
        ),
        "max_pool2x2": ((x, affine), lambda: None),
    }  # fmt: skip


def wide_calls(device: str) -> dict[str, tuple[Any, Any]]:
    """The same, of pictures so wide that each tile is of one sample."""
    torch.manual_seed(1)
    leaf = functools.partial(torch.randn, dtype=torch.float64, device=device, requires_grad=True)
    x, affine, picture, bias = leaf(2, 2, 3, 40), leaf(2, 3, 2), leaf(2, 3, 4, 8), leaf(5)
    source, none = (x, affine, 0.1), (None, None, 1.0)
    made = {}
    for kernel, stride, filters in ((3, 1, 5), (3, 2, 5), (1, 1, 5), (1, 1, 3)):
        arguments = (
            *source,
            *none,
            leaf(filters, 2, kernel, kernel),
            None,
            stride,
            (3, 40),
            (0,) * 4,
            (False,) * 2,
            SAMPLES,
        )
        made[f"conv2d_{kernel}_{stride}_{filters}"] = arguments, functools.partial(plain.conv2d, *arguments)
    arguments = (picture, *none[1:], *none, leaf(5, 3, 3, 3), bias, 1, (4, 8), (0,) * 4, (False,) * 2, SAMPLES)
    made["conv2d_picture"] = arguments, functools.partial(plain.conv2d, *arguments)
    both = leaf(2, 2, 1, 40), affine, 0.1, leaf(2, 4, 1, 40), leaf(2, 3, 4), 0.0
    arguments = (*both, leaf(5, 6, 3, 3), None, 1, (1, 40), (0,) * 4, (False,) * 2, SAMPLES)
    made["conv2d_two_wide"] = arguments, functools.partial(plain.conv2d, *arguments)
    # So many channels in so small pictures that programs share a sum, forward and backward.
    deep = leaf(2, 40, 1, 3), leaf(2, 3, 40), 0.1, leaf(2, 33, 1, 3), leaf(2, 3, 33), 0.0
    arguments = (*deep, leaf(97, 73, 3, 3), leaf(97), 1, (1, 3), (0,) * 4, (False,) * 2, SAMPLES)
    made["conv2d_shared"] = arguments, functools.partial(plain.conv2d, *arguments)
    found = {name: ((*arguments, False, False, None), truth) for name, (arguments, truth) in made.items()}
    for side in (2, 3):
        arguments = (*source, leaf(2, 5, side, side), bias, SAMPLES)
        found[f"conv_transpose2d_{side}"] = arguments, functools.partial(plain.conv_transpose2d, *arguments)
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("affine_act", "conv2d", "conv2d_two", "conv2d_doubled", "conv_transpose2d", "upsample_concat", "head_stats"),
        *("conv2d_3_1_5", "conv2d_3_2_5", "conv2d_1_1_5", "conv2d_1_1_3", "conv2d_picture"),
        *("conv2d_two_wide", "conv2d_shared"),
        *("conv_transpose2d_2", "conv_transpose2d_3"),
    ],
)
def test_values_and_gradients(name: str, backend: str, device: str) -> None:
    compare(name, backend, device)


def test_products_by_aten(device: str) -> None:
    """The pass that masks their gradient writes the values anew for the weights', each sample's by its own affine."""
    table = pytest.importorskip("fastunet.kernels.table", reason="needs Triton", exc_type=ImportError)
    with table.forced(dict.fromkeys(("conv3x3_fwd", "conv3x3_dgrad", "conv3x3_wgrad"), "cudnn")):
        compare("conv2d_two_wide", "triton", device)


def compare(name: str, backend: str, device: str) -> None:
    """A call beside what it should give: results, and the gradients of a random sum of them."""
    skip_if_unsupported(backend, torch.float64, device)
    arguments, expected = (calls(device) | wide_calls(device))[name]
    operator = next(
        op for op in ("affine_act", "conv2d", "conv_transpose2d", "upsample_concat", "head_stats") if op in name
    )
    found = getattr(ops, operator)(*arguments, backend)
    truly = expected()
    results, true = ([r] if isinstance(r, Tensor) else list(r)[:3] for r in (found, truly))
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    torch.testing.assert_close(results, true, **CLOSE)
    weights = [torch.randn_like(y) for y in true]
    grads = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), leaves, allow_unused=True)
        for ys in (results, true)
    ]
    torch.testing.assert_close(*grads, **GRADIENTS)


ONE_AND_SEVERAL = """
from dataclasses import replace

import torch

from benchmarks.cases import Case
from benchmarks.ptx.trials import launched

PASSES = {"_affine_act_fwd_kernel", "_affine_act_bwd_kernel", "_batch_stats_kernel"}
case = Case("conv2d", (2, 64, 64, 128), torch.bfloat16, filters=64, skip=64, samples=True, algorithm="triton")
one = [
    case,
    replace(case, skip=0, stride=2, shape=(2, 64, 64, 256)),
    replace(case, skip=0, kernel=1),
    replace(case, op="conv_transpose2d", skip=0, kernel=2, stats=False, shape=(2, 64, 64, 128)),
    replace(case, op="upsample_concat", mode="inference"),
    replace(case, op="head_stats", kernel=1, filters=4, skip=0),
    replace(case, op="conv2d_act", stats=False, mode="inference"),
]
for chip in ("sm_80", "sm_90"):
    for each in one:
        with each.choosing():
            print(sorted(PASSES & launched(each, chip, "bf16")))
    print(launched(replace(case, shape=(4, 64, 8, 8)), chip, "bf16") >= PASSES)
"""


def test_tiles_of_one_sample_need_no_passes() -> None:
    """Kernels normalise, and sum, for themselves; but where a tile has pixels of several samples."""
    pytest.importorskip("triton")
    done = python("-c", ONE_AND_SEVERAL)
    assert done.stdout.split("\n") == 2 * [*7 * ["[]"], "True"] + [""], done.stderr


def test_classes_by_each_sample(backend: str, device: str) -> None:
    t = operands(device)
    weight = torch.randn(3, 2, 1, 1, dtype=torch.float64, device=device)
    arguments = (t["x"].detach().float(), t["affine"].detach().float(), 0.1, weight.float(), None, "argmax", 0.5)
    found = ops.head_predict(*arguments, torch.float32, backend)
    assert torch.equal(found, plain.head_predict(*arguments, torch.float32))


def test_pooling_by_each_samples_signs(backend: str, device: str) -> None:
    t = operands(device)
    x, affine = t["skip"].detach().float(), t["skip_affine"].detach().float()
    pooled = plain.affine_act(ops.max_pool2x2(x, affine, backend), affine, 0.1)
    torch.testing.assert_close(pooled, F.max_pool2d(plain.affine_act(x, affine, 0.1), 2), rtol=0, atol=0)
    x.requires_grad_()
    z = plain.affine_act(ops.max_pool2x2(x, affine, backend), affine, 0.1)
    weights = torch.randn_like(z)
    grads = [
        torch.autograd.grad((y * weights).sum(), x)[0] for y in (z, F.max_pool2d(plain.affine_act(x, affine, 0.1), 2))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_affine(groups: int, backend: str, device: str) -> None:
    mean, weight = (
        torch.randn(3, 4, dtype=torch.float64, device=device),
        torch.randn(4, dtype=torch.float64, device=device),
    )
    leaves = [t.requires_grad_() for t in (mean, torch.rand_like(mean) + 0.1, weight, torch.randn_like(weight))]
    kind = "torch" if device == "cuda" else backend
    torch.testing.assert_close(ops.group_affine(*leaves, groups, 1e-5, kind), plain.group_affine(*leaves, groups, 1e-5))
    assert torch.autograd.gradcheck(lambda *a: ops.group_affine(*a, groups, 1e-3, kind), leaves)
    torch.library.opcheck(ops.group_affine, (*leaves, groups, 1e-5, kind))
    torch.library.opcheck(ops.group_affine, (*leaves[:2], None, None, groups, 1e-5, kind))


@pytest.mark.parametrize(
    "name", ["affine_act", "conv2d", "conv2d_two", "conv_transpose2d", "upsample_concat", "head_stats", "max_pool2x2"]
)
def test_opcheck(name: str, backend: str, device: str) -> None:
    arguments = [
        a.detach().float().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in calls(device)[name][0]
    ]
    torch.library.opcheck(getattr(ops, name.removesuffix("_two")), (*arguments, backend))


def test_compiled(device: str) -> None:
    block = ConvSequence(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 1)).to(
        device
    )
    block.config = Config("torch")
    check_compiled(lambda x: block(x).square().sum(), torch.randn(2, 3, 5, 6, device=device))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.GroupNorm(4, 4)], ids=["instance", "group"])
def test_one_value_is_refused(norm: nn.Module) -> None:
    block = ConvSequence(nn.Conv2d(3, 4, 3, padding=1), norm)
    block.config = Config("torch", "memory")
    with pytest.raises(ValueError, match="more than 1"):
        block(torch.randn(2, 3, 1, 1))


def test_misfits_are_refused(device: str) -> None:
    x = torch.randn(2, 3, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"affine of shape \(3, 3\) or \(2, 3, 3\)"):
        ops.affine_act(x, torch.randn(3, 3, 3, device=device), 1.0, "torch")
    with pytest.raises(ValueError, match="multiple of 3 groups"):
        ops.group_affine(
            torch.randn(2, 4, device=device), torch.rand(2, 4, device=device), None, None, 3, 1e-5, "torch"
        )
    assert truth(x, None, 1.0) is not None


def test_an_instance_norm_without_what_it_tracks_is_refused(device: str) -> None:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    norm.running_mean = norm.running_var = None
    block = ConvSequence(nn.Conv2d(3, 4, 3, padding=1), norm).to(device).eval()
    block.config = Config("torch")
    with pytest.raises(ValueError, match="expected an InstanceNorm2d with running_mean and running_var in evaluation"):
        block(torch.randn(2, 3, 5, 6, device=device))
