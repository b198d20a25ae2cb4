"""The CPU's way to run a network, which ``backend="auto"`` takes there: the claims of
test_models and test_surgery, and its own.

Elsewhere the tests ask for a backend, or the interpreter is the choice.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import platform
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from sources import as_users_run
from torch import Tensor, nn
from torch.func import functional_call, grad

import fastunet
from fastunet import aten, eager, folding, plan, reference
from fastunet.activation import Activation, Config
from fastunet.layout import channels_last
from tests import test_models
from tests import test_surgery as surgery
from tests.test_models import *  # noqa: F403 - collected here once more
from tests.test_surgery import *  # noqa: F403 - and these

CL = torch.channels_last
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])


def followed_thrice(network: nn.Module, x: Tensor, about: Hashable, function: Callable[[], Activation]) -> Activation:
    """What comes of the list of operations that an inference makes at its second time, in the tests' first."""
    if not plan._State(network).known(network):
        return plan.followed(network, x, about, function)
    first, *others = (plan.followed(network, x, about, function) for _ in range(3))
    for y in others:
        torch.testing.assert_close(y, first, rtol=0, atol=0, equal_nan=True)
    return others[-1]


@pytest.fixture(autouse=True)
def no_backend_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a GPU where nobody set anything."""
    for module in (test_models, surgery):
        monkeypatch.setattr(module, "BACKEND", "auto")
    monkeypatch.setattr(fastunet.models, "followed", followed_thrice)
    with as_users_run():
        yield


# What is not so here: kernels, a graph of fastunet's operators, and derivatives and transforms that only those refuse.
# And processes of their own, to which nobody says that no backend was chosen.
for _name in (
    "test_whole_network_through_the_kernels",
    "test_sibling_networks_forward_through_the_kernels",
    "test_export",
    "test_a_program_exported_without_gradients_is_called_with_them",
    "test_second_derivatives_are_refused_not_wrong",
    "test_default_sizes_are_the_published_ones",
    "test_same_state_dict",
    "test_tracers_and_transforms_are_refused_in_a_sentence",
    "test_predict_and_loss_of_a_sharded_network",
):
    del globals()[_name]


def models(bilinear: bool = False, base: int = 4, **options: str) -> tuple[fastunet.UNet, reference.UNet]:
    """(fastunet's, the reference), with the same weights."""
    plain = test_models.scramble(reference.UNet(3, 2, bilinear, base))
    ours = fastunet.UNet(3, 2, bilinear, base, **options)
    ours.load_state_dict(plain.state_dict())
    return ours, plain  # type: ignore[return-value]


def operators(model: nn.Module, x: Tensor) -> set[str]:
    """Names of fastunet's operators in the exported program."""
    graph = torch.export.export(model, (x,)).graph
    return {str(node.target) for node in graph.nodes if "fastunet" in str(node.target)}


@pytest.mark.parametrize(
    ("options", "lazy"),
    [({}, False), ({"backend": "torch"}, True), ({"policy": "memory"}, True)],
    ids=["auto", "torch", "memory"],
)
def test_modules_run_where_nothing_was_chosen(options: dict[str, str], lazy: bool) -> None:
    model = models(**options)[0].eval()
    assert bool(operators(model, torch.randn(1, 3, 32, 32))) == lazy


def test_the_environment_chooses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    assert operators(models()[0].eval(), torch.randn(1, 3, 32, 32))


def worst(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of a tensor, relative to the largest entry there."""
    pairs = zip(found, truth, strict=True)
    return max(float((f.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)) for f, t in pairs)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(kept)


# ATen's batch norm of channels_last memory leaves 1.6e-3 of a variance here; of contiguous memory, 4e-8.
MANY = (2, 3, 1024, 1024)


@layouts
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_layer_over_many_pixels_is_as_exact_as_pytorchs(backend: str, layout: torch.memory_format) -> None:
    """Values, statistics and gradients of convolution, batch norm and ReLU; plain PyTorch's on contiguous memory."""
    x = torch.randn(2, 3, 512, 512) + 1
    direction = torch.rand(2, 8, 512, 512)  # of one sign, so that sums grow
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ours = fastunet.blocks.ConvSequence(*copy.deepcopy(plain))
    ours.config = fastunet.activation.Config(backend)
    results = []
    for model, kind, form in (
        (copy.deepcopy(plain), torch.float64, torch.contiguous_format),
        (plain, torch.float32, torch.contiguous_format),
        (ours, torch.float32, layout),
    ):
        leaf = x.to(kind, memory_format=form, copy=True).requires_grad_()
        model.to(kind)
        y = model(leaf)
        gradients = torch.autograd.grad(y, [leaf, model[0].weight, *model[1].parameters()], direction.to(kind))
        results.append([[y.detach()], [model[1].running_mean, model[1].running_var], [gradients[0]], [*gradients[1:]]])
    truth, expected, found = results
    for t, e, f in zip(truth, expected, found, strict=True):
        assert worst(f, t) <= 2 * worst(e, t) + 2e-7  # two units of float32's last place


def test_a_group_norm_over_many_pixels_is_as_exact_as_pytorchs() -> None:
    """Values and gradients: ATen's adds up what lies in channels_last memory one by one."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
    ours, exact = fastunet.blocks.ConvSequence(*copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x, direction = channels_last(torch.randn(1, 3, 512, 512) + 1), torch.rand(1, 4, 512, 512)
    results = []
    for model, leaf in ((exact, x.double()), (plain, x.contiguous()), (ours, x)):
        y = model(leaf.requires_grad_())
        gradients = torch.autograd.grad(y, [leaf, model[0].weight], direction.to(y))
        with torch.no_grad():
            torch.testing.assert_close(model(leaf), y, rtol=1e-5, atol=1e-5)
        results.append([y.detach(), *gradients])
    for t, e, f in zip(*results, strict=True):
        assert worst([f], [t]) <= 2 * worst([e], [t]) + 2e-7  # two units of float32's last place


@pytest.mark.parametrize("what", ["cumulative", "uncounted", "cumulative-uncounted", "counted-alone"])
def test_unusual_batch_norms_over_many_pixels(what: str) -> None:
    """Running statistics as exact as elsewhere, also those that torch.optim.swa_utils.update_bn makes."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None if "cum" in what else 0.1))
    if "uncounted" in what:
        plain[1].num_batches_tracked = None
    if what == "counted-alone":
        plain[1].running_mean = plain[1].running_var = None
    ours, truth = fastunet.blocks.ConvSequence(*copy.deepcopy(plain)), copy.deepcopy(plain).double()
    with torch.no_grad():
        for _ in range(2):
            x = channels_last(torch.randn(2, 3, 512, 512) + 1)
            torch.testing.assert_close(ours(x).double(), truth(x.double()), rtol=1e-5, atol=1e-5)
    assert dict(ours[1].named_buffers()).keys() == dict(truth[1].named_buffers()).keys()
    for found, expected in zip(ours[1].buffers(), truth[1].buffers(), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("threads")
@layouts
def test_statistics_over_many_pixels(layout: torch.memory_format) -> None:
    """Of any number of pixels, also a prime one."""
    for shape in (MANY, (2, 16, 512, 512), (1, 5, 641, 643), (1, 3, 1, 99991), (1, 1200, 40, 41), (3, 1, 300, 300)):
        y = (2 * torch.randn(shape) + 3).contiguous(memory_format=layout)
        mean, var = aten._stats(channels_last(y), 1)
        truth = y.double()
        torch.testing.assert_close(mean.double(), truth.mean((0, 2, 3)), rtol=3e-7, atol=0)
        torch.testing.assert_close(var.double(), truth.var((0, 2, 3), correction=0), rtol=3e-7, atol=0)


@layouts
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_sums_of_losses_over_many_pixels(mode: str, layout: torch.memory_format) -> None:
    logits = torch.randn(2, 3, 1024, 1024).contiguous(memory_format=layout)
    labels = torch.randint(0, 2, (2, 3, 1024, 1024) if mode == "sigmoid" else (2, 1024, 1024))
    stats = fastunet.losses.softmax_stats(logits, labels, mode=mode)
    truth = fastunet.losses.softmax_stats(logits.double(), labels, mode=mode)
    torch.testing.assert_close(stats.double(), truth, rtol=5e-7, atol=1e-3)


@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folded_weights(conv_bias: bool, affine: bool) -> None:
    """Without gradients a normalisation goes into the weights before it: not one of them is changed by that."""
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=conv_bias)
    up = nn.ConvTranspose2d(8, 4, 2, stride=2, bias=conv_bias)
    plain = nn.Sequential(
        conv, nn.BatchNorm2d(8, affine=affine), nn.ReLU(), up, nn.BatchNorm2d(4, affine=affine), nn.Conv2d(4, 2, 1)
    )
    plain = test_models.scramble(plain).eval() if affine else plain.eval()
    for norm in (plain[1], plain[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
    ours = fastunet.blocks.ConvSequence(*plain)
    before = copy.deepcopy(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(x.double())
        torch.testing.assert_close(ours(x).double(), truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.double()(x.double()), truth, rtol=1e-12, atol=1e-12)
    ours.float()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name]), name


def with_onednns_operators(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As this PyTorch has them, or as one without."""
    if not known:
        monkeypatch.setattr(folding, "_ONEDNN", None)
    elif folding._ONEDNN is None:
        pytest.skip("this PyTorch has no operators of oneDNN")
    monkeypatch.setattr(folding, "_kept", {})


@layouts
@pytest.mark.parametrize("known", [True, False], ids=["onednn", "aten"])
@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (49, 70)])
def test_inference_by_kept_weights(
    bilinear: bool, size: tuple[int, int], known: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By oneDNN's operators and without them it errs as plain PyTorch does, a large concatenation convolved in its
    parts or not; and a NaN stays one."""
    with_onednns_operators(known, monkeypatch)
    ours, plain = (model.eval().to(memory_format=layout) for model in models(bilinear, base=8))
    x = torch.randn(2, 3, *size).contiguous(memory_format=layout)
    truth = copy.deepcopy(plain).double()(x.double())
    added: list[tuple[int, ...]] = []
    run = folding._run
    monkeypatch.setattr(folding, "_run", lambda parts, kept: added.append(kept.widths) or run(parts, kept))
    with torch.no_grad():
        allowed = 2 * (plain(x) - truth).norm()
        for large in (4 * 2 * 16 * size[0] * size[1], 4 << 20):  # the uppermost level's concatenation, or none
            monkeypatch.setattr(folding, "_LARGE", large)
            folding._kept.clear()
            plan._entries.clear()
            for _ in range(2):  # to make what is kept, and by it
                y = ours(x)
                assert (y - truth).norm() <= allowed
                assert y.stride() == plain(x).stride()
            assert bool(added) == known
            assert ((8, 8) in added) == (known and large < 4 << 20), "the uppermost level's"
            added.clear()
        x[0, 0, 5, 5] = torch.nan
        assert ours(x)[0].isnan().any()


@pytest.mark.parametrize("known", [True, False], ids=["onednn", "aten"])
def test_weights_that_change_are_noticed(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are written: most ways tell nobody."""
    with_onednns_operators(known, monkeypatch)
    pair = [model.eval() for model in models()]
    x = torch.randn(2, 3, 64, 48)

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(pair[0](x), pair[1](x), rtol=1e-4, atol=1e-4)

    same()
    assert bool(folding._kept) == known
    names = [f"inc.double_conv.{n}" for n in (3, 4)]
    writes: list[Callable[[nn.Module, nn.Module], object]] = [
        lambda conv, norm: conv.weight.data.mul_(1.5),
        lambda conv, norm: setattr(conv.weight, "data", conv.weight.data * 0.5),
        lambda conv, norm: conv.weight.detach().numpy().__imul__(1.25),
        lambda conv, norm: conv.weight.data[1, 2, 0, 1].add_(1),
        lambda conv, norm: norm.running_mean.data.add_(0.5),
        lambda conv, norm: norm.running_var.mul_(2),
        lambda conv, norm: norm.weight.data.neg_(),
        lambda conv, norm: norm.bias.data.add_(1),
        lambda conv, norm: setattr(norm, "eps", 0.5),
        lambda conv, norm: setattr(conv, "bias", nn.Parameter(torch.arange(4.0))),
        lambda conv, norm: conv.bias.data.neg_(),
        lambda conv, norm: setattr(conv, "weight", nn.Parameter(conv.weight.detach().flip(0))),
        lambda conv, norm: setattr(norm, "weight", None),
        lambda conv, norm: conv.__delattr__("weight") or setattr(conv, "weight", torch.ones(4, 4, 3, 3)),
        lambda conv, norm: setattr(conv, "weight", nn.Parameter(torch.ones(4, 4, 3, 3))),
    ]  # fmt: skip
    for write in writes:
        for model in pair:
            write(*map(model.get_submodule, names))
        same()
        same()
    changes: list[Callable[[nn.Module], nn.Module]] = [nn.Module.double, nn.Module.float, copy.deepcopy]
    for change in changes:
        pair[:] = map(change, pair)
        x = x.to(next(pair[1].parameters()).dtype)
        same()
    for model in pair:
        model.inc.double_conv[4] = nn.BatchNorm2d(4, affine=False).eval()
        model.up1.conv.double_conv[1] = nn.Identity()
    same()
    for model in pair:
        model.inc.double_conv[4] = nn.Identity()
        model.inc.double_conv[3].bias = nn.Parameter(torch.zeros(4))
    for stride in (2, 3):  # of the bias, for which oneDNN takes 1
        for model in pair:
            model.inc.double_conv[3].bias.data = torch.arange(4.0).repeat_interleave(stride)[::stride]
        same()
    del model, write
    pair.clear()
    gc.collect()
    assert not folding._kept, "nothing is kept of what is gone"


def test_what_onednn_would_not_refuse_is_refused() -> None:
    """What was kept of a layer serves no input and no parameters that do not fit it."""
    block = fastunet.blocks.ConvSequence(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=CL)
    with torch.no_grad():
        block(x)
        assert (id(block[0]) in folding._kept) == (folding._ONEDNN is not None)
        for wrong in (x[:, :2], torch.cat([x, x], 1)):
            with pytest.raises(ValueError, match="expected 3 channels"):
                block(wrong)
        assert block(x[:0]).shape == (0, 4, 32, 32)
        up = fastunet.blocks.Up(8, 4, bilinear=True).eval()
        up(torch.randn(2, 4, 16, 16), torch.randn(2, 4, 32, 32))
        for name, part in (
            ("0.bias", torch.zeros(1)),
            ("0.bias", torch.zeros(4).double()),
            ("0.bias", block[0].bias.double()),  # the same numbers
            ("1.weight", torch.ones(1)),
        ):
            owner, _, attribute = name.partition(".")
            kept = getattr(block[int(owner)], attribute)
            setattr(block[int(owner)], attribute, nn.Parameter(part))
            with pytest.raises(RuntimeError):
                block(x)
            setattr(block[int(owner)], attribute, kept)
            block(x)


def test_tangents_go_through_a_large_concatenation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients too, where oneDNN's operators would drop those of a part."""
    ours, plain = (model.eval().to(memory_format=CL) for model in models())
    monkeypatch.setattr(folding, "_LARGE", 0)
    x = torch.randn(1, 3, 32, 32)
    found = []
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        for model in (ours, plain):
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            found.append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_frozen_network_is_folded_too() -> None:
    """With gradients enabled, where nothing needs one."""
    ours, plain = (model.eval().requires_grad_(False) for model in models())
    x = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    leaf = x.clone().requires_grad_()
    mine, theirs = (torch.autograd.grad(model(leaf).square().sum(), leaf)[0] for model in (ours, plain))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_transforms_of_functions_see_plain_modules() -> None:
    ours, plain = (model.double().eval() for model in models())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mine, theirs = (
        grad(lambda p, model=model: functional_call(model, p, (x,)).square().sum())(dict(model.named_parameters()))
        for model in (ours, plain)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_large_picture_compiles_in_one_graph() -> None:
    ours, plain = models(base=1)
    x = torch.randn(2, 3, 256, 256)
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, plain.double()(x.double()).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_large_picture_trains_as_the_reference(checkpointing: bool) -> None:
    """Where the batch norms are fastunet's own, at every level; gradients of one network are ill-conditioned."""
    ours, plain = models(bilinear=True)
    plain.double()
    if checkpointing:
        ours.use_checkpointing()
    x = torch.randn(2, 3, 256, 256)
    for _ in range(2):
        y, expected = ours(x), plain(x.double())
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
        for model, out in ((ours, y), (plain, expected)):
            model.zero_grad()
            out.square().mean().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.1
    for (name, mine_), theirs_ in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine_.double(), theirs_.double(), rtol=1e-3, atol=1e-3, msg=name)


def test_pooling_without_gradients_is_pytorchs() -> None:
    x = torch.randn(2, 3, 7, 9)
    x[0, 0, 0, 0] = torch.nan
    expected = torch.nn.functional.max_pool2d(x, 2)
    torch.testing.assert_close(eager.max_pool2x2(x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("train", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_what_does_not_fit_is_refused_by_the_modules_name(train: bool, grad: bool) -> None:
    """Here ATen refuses, or nobody: of a part on the meta device it makes numbers that nobody computed."""
    x, norm = torch.randn(2, 3, 32, 32), "up4.conv.double_conv.1"
    for name, part in (
        ("inc.double_conv.0", "weight"), ("up1.up", "bias"), ("outc.conv", "bias"),
        (norm, "weight"), (norm, "bias"), (norm, "running_mean"), (norm, "running_var"),
    ):  # fmt: skip
        model = models()[0].train(train)
        module = model.get_submodule(name)
        there = getattr(module, part).detach().to("meta")
        setattr(module, part, there if part.startswith("running") else nn.Parameter(there))
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"where its input is.* \({name}\)"):
            model(x)
    for missing in ("running_mean", "running_var"):
        model = models()[0].train(train)
        setattr(model.get_submodule(norm), missing, None)
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"got no {missing}; .* \({norm}\)"):
            model(x)
    for features in (1, 5):  # one value could be broadcast
        model = models()[0].train(train)
        model.up4.conv.double_conv[1] = nn.BatchNorm2d(features)
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"of 4 features, got.* \({norm}\)"):
            model(x)
    for part in ("weight", "bias"):
        model = models()[0].train(train)
        setattr(model.up4.conv.double_conv[1], part, nn.Parameter(torch.ones(1)))
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError, match=rf"{part} should contain 4 elements not 1"),
        ):
            model(x)
    many = torch.randn(1, 3, 384, 384)
    for part in ("weight", "bias", "running_mean", "running_var") if train else ():
        model = models()[0]
        first = model.inc.double_conv[1]
        wrong = torch.ones(3)  # behind which ATen's parts would read whatever is there
        setattr(first, part, wrong if part.startswith("running") else nn.Parameter(wrong))
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError, match=rf"{part} should contain 4 elements not 3"),
        ):
            model(many)
    block = fastunet.blocks.ConvSequence(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(1)).train(train)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="batch norm of 4 features, got one of 1"):
        block(x)
    model = models()[0].train(train)
    model.up3.conv.double_conv[0].bias = nn.Parameter(torch.zeros(8).double())
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"\(up3\.conv\.double_conv\.0\)"):
        model(x)


def test_tangents_go_through_plain_modules_only() -> None:
    """Over many pixels the batch norms are this library's, whose forward mode is refused as the operators' is."""
    with torch.autograd.forward_ad.dual_level():
        for size in (32, 512):
            x = torch.randn(1, 3, size, size)
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            model = models(base=1)[0]
            if size == 32:
                assert torch.autograd.forward_ad.unpack_dual(model(dual)).tangent is not None
                continue
            with pytest.raises(RuntimeError, match="expected no forward-mode derivative, got a tensor with a tangent"):
                model(dual)


def listed(model: nn.Module) -> list[int]:
    """How many operations there are of each of the model's lists."""
    entries = plan._entries.get(model, {}).values()
    return [len(entry.listed._steps) for entry in entries if entry.listed is not None]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": lambda: fastunet.UNet(3, 2, base_c=4),
    "bilinear": lambda: fastunet.UNet(3, 2, bilinear=True, base_c=4),
    "nearest-leaky-instance": lambda: fastunet.UNet(
        3, 2, base_c=4, norm="instance", negative_slope=0.01, upsample="nearest"
    ),
    "StridedUNet": lambda: fastunet.StridedUNet(3, 2, base_c=4),
    "PlainUNet": lambda: fastunet.PlainUNet(3, 2, init_features=4),
    "BrainUNet": lambda: fastunet.BrainUNet(3, 2, init_features=4),
}


TWENTY_CALLS = """
import resource, sys, torch, fastunet
model = fastunet.UNet(3, 2, base_c=8).eval()
x = torch.zeros(2, 3, 128, 128)
after = 0
for _ in range(20):
    with torch.no_grad():
        model(x)
    before, after = after, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before, "torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own way with memory")
def test_the_next_call_finds_its_memory() -> None:
    """It stays with the process: pages that come anew from the system are counted, a thousand a call without. Nor does
    an inference import Dynamo, which takes seconds."""
    done = python("-c", TWENTY_CALLS)
    assert done.returncode == 0, done.stderr
    pages, dynamo = done.stdout.split()
    assert int(pages) < 100
    assert dynamo == "False"


def by(backend: str, model: nn.Module) -> nn.Module:
    """The model, told which backend to run by."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = Config(backend)
    return model


@layouts
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_third_inference_is_a_list_of_operations(
    make: Callable[[], nn.Module], backend: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, of other pictures too, in the same layout; no block is run."""
    monkeypatch.setattr(fastunet.models, "followed", plan.followed)
    model = by(backend, test_models.scramble(make()).eval().to(memory_format=layout))
    first, second = (torch.randn(2, 3, 50, 67).contiguous(memory_format=layout) for _ in range(2))
    with torch.no_grad():
        expected = [model(first), model(second)]
        assert len(listed(model)) == 1
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_body", None)
            found = [model(first), model(first)]
            last = model(second)
        for y in (*found, *expected[:1]):
            assert torch.equal(y, expected[0])
            assert y.stride() == expected[0].stride()
        assert torch.equal(last, expected[1])
        with torch.autocast("cpu", torch.bfloat16):
            narrow = [model(first) for _ in range(3)]
        assert len(listed(model)) == (1 if backend == "auto" else 2)
        assert torch.equal(narrow[2], narrow[0])
        assert not torch.equal(narrow[0], expected[0])
        assert torch.equal(model(first), expected[0])
    with torch.inference_mode():
        assert torch.equal(model(second), expected[1])
        same = copy.deepcopy(model)
        assert all(torch.equal(same(second), expected[1]) for _ in range(3))  # listed here: other operations
    assert len(listed(same)) == 1
    assert model(first).requires_grad


def most_memory(call: Callable[[], object], file: Path) -> int:
    """The most bytes that tensors made by ``call`` have at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_list_takes_less_memory(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls a layer holds what it was given; a list does not: no more than a layer's input, its output and skip
    connections."""
    monkeypatch.setattr(fastunet.models, "followed", plan.followed)
    model = fastunet.UNet(3, 2, base_c=8, backend=backend).eval()
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        first, _, third = (most_memory(lambda: model(x), tmp_path / "trace.json") for _ in range(3))
    assert third < 0.95 * first


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_network_that_is_another_is_not_taken_for_what_it_was(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each change a network that has a list does what it does without, and then has one again, unless something
    unknown is in it."""
    monkeypatch.setattr(fastunet.models, "followed", plan.followed)
    monkeypatch.setattr(plan, "_LONGEST", 1)
    x = torch.randn(2, 3, 64, 48)
    seen: list[str] = []
    ran: list[nn.Module] = []
    body = fastunet.UNet._body
    monkeypatch.setattr(fastunet.UNet, "_body", lambda self, *rest: ran.append(self) or body(self, *rest))

    def hook(module: nn.Module, *_: object) -> None:
        seen.append(type(module).__name__)

    def swapped(block: nn.Module) -> dict[str, nn.Module]:
        """The first two ReLUs and norms of a block exchanged: a dict that is equal to what was."""
        conv, norm, relu, *rest = block.double_conv._modules.items()
        return dict([conv, relu, norm, *rest])

    def renamed(tensors: dict[str, Any]) -> None:
        """In the same order, a weight is called bias now and a bias weight."""
        weight, bias = tensors.values()
        tensors.clear()
        tensors.update(bias=weight, weight=bias)

    def without_hooks(model: nn.Module) -> None:
        for module in model.modules():
            module._forward_hooks.clear()

    conv, norm, relu, deep = "inc.double_conv.0", "inc.double_conv.1", "inc.double_conv.2", "down4.maxpool_conv.1"
    changes: dict[str, tuple[Callable[[nn.Module], object], bool]] = {
        "numbers of a kept weight": (lambda m: m.get_submodule(conv).weight.data.mul_(1.5), True),
        "of one that is not": (lambda m: m.get_submodule(deep).double_conv[0].weight.data.mul_(1.5), True),
        "every other number of a longer tensor": (
            lambda m: setattr(m.get_submodule(norm).weight, "data", torch.linspace(1, 2, 8)[::2]),
            True,
        ),
        "of a running mean": (lambda m: m.get_submodule(norm).running_mean.add_(0.1), True),
        "another parameter": (lambda m: setattr(m.get_submodule(norm), "bias", nn.Parameter(torch.ones(4))), True),
        "another tensor in it": (lambda m: setattr(m.inc.double_conv[3].weight, "data", torch.ones(4, 4, 3, 3)), True),
        "another layout": (lambda m: m.to(memory_format=CL), True),
        "a bias more": (lambda m: setattr(m.up1.conv.double_conv[0], "bias", nn.Parameter(torch.ones(32))), True),
        "a number": (lambda m: setattr(m.get_submodule(norm), "eps", 0.5), True),
        "a module": (lambda m: setattr(m.inc.double_conv, "2", nn.LeakyReLU(0.2)), True),
        "modules in another order": (lambda m: m.inc.double_conv.__dict__.update(_modules=swapped(m.inc)), True),
        "and back": (lambda m: m.inc.double_conv.__dict__.update(_modules=swapped(m.inc)), True),
        "tensors under each other's names": (lambda m: renamed(m.get_submodule(norm)._parameters), True),
        "a slope": (lambda m: setattr(m.get_submodule(relu), "negative_slope", 0.4), True),
        "a module less": (lambda m: m.down1.maxpool_conv[1].double_conv.__delitem__(5), True),
        "a class": (lambda m: setattr(m.get_submodule(relu), "__class__", nn.ReLU), True),
        "training in part": (lambda m: m.get_submodule(norm).train(), False),
        "and not": (lambda m: m.eval(), True),
        "a hook": (lambda m: m.get_submodule(relu).register_forward_hook(hook), False),
        "none": (without_hooks, True),
        "a patch": (lambda m: setattr(m.get_submodule(relu), "forward", lambda x: x * 0.5), False),
        "removed": (lambda m: m.get_submodule(relu).__delattr__("forward"), True),
        "one that writes to the picture": (
            lambda m: setattr(m, "inc", nn.Sequential(nn.LeakyReLU(0.5, inplace=True), m.inc)),
            backend == "torch",  # to a copy in the weights' layout
        ),
        "all that another holds": (
            lambda m: setattr(m, "__dict__", fastunet.UNet(3, 2, base_c=4).eval().__dict__),
            True,
        ),
        "something unknown": (lambda m: m.down2.maxpool_conv.append(nn.Tanh()), False),
    }
    model = fastunet.UNet(3, 2, base_c=4, backend=backend).eval()
    with torch.no_grad():
        for name, (change, has_list) in changes.items():
            for _ in range(4):
                model(x.clone())
            change(model)
            bodies = 0
            for _ in range(4):
                seen.clear()
                ran.clear()
                given, like = x.clone(), x.clone()
                found, calls = model(given), len(seen)
                bodies += len(ran)
                with monkeypatch.context() as patch:
                    patch.setattr(fastunet.models, "followed", lambda network, x, about, function: function())
                    expected = model(like)
                torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
                assert torch.equal(given, like), name
                assert len(seen) == 2 * calls, name
            assert (bodies < 4) == has_list, name


def test_who_listens_or_replaces_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks on all modules, a comparison that raises, a mode, wrong shapes in place and patched classes."""
    monkeypatch.setattr(fastunet.models, "followed", plan.followed)
    monkeypatch.setattr(plan, "_LONGEST", 1)
    x = torch.randn(2, 3, 64, 48)
    seen: list[nn.Module] = []
    model = fastunet.UNet(3, 2, base_c=4).eval()
    with torch.no_grad():
        for _ in range(3):
            model(x)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        model(x)
        handle.remove()
        assert len(seen) > 60
        model.note = None
        for _ in range(4):
            model(x)
        assert listed(model)
        model.note = nothing_equals = type("Odd", (), {"__eq__": lambda *_: [].missing})()
        for _ in range(4):
            model(x)
        assert model.note is nothing_equals
        del model.note
        for _ in range(4):
            expected = model(x)
        with Halving():
            assert not torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        bias = model.inc.double_conv[1].bias
        for wrong in (torch.ones(1), torch.ones(5)):
            for _ in range(3):
                bias.data = torch.ones(4)
                model(x)
            bias.data = wrong
            for _ in range(2):
                with pytest.raises(RuntimeError, match="bias should contain 4 elements"):
                    model(x)
        bias.data = torch.ones(4)
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: -x)
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)


class Halving(torch.overrides.TorchFunctionMode):
    """Convolutions give half of what they give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y / 2 if func is torch.nn.functional.conv2d else y


def test_lists_are_few_and_go_with_their_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """And several threads make and follow them."""
    monkeypatch.setattr(fastunet.models, "followed", plan.followed)
    model = models()[0].eval()
    pictures = [torch.randn(1, 3, 32, 32 + 8 * i) for i in range(12)]
    expected = [model.predict(x) for x in pictures]
    with ThreadPoolExecutor(4) as pool:
        for x, y in zip(pictures * 5, pool.map(model.predict, pictures * 5), strict=True):
            assert torch.equal(y, expected[x.shape[3] // 8 - 4])
    for _ in range(3):
        model.predict(pictures[0])
    assert 1 <= len(listed(model)) <= plan._MOST
    assert not torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals()
    for attribute in (None, "forward", "loss"):  # of which one keeps the network, and it has no list
        other = copy.deepcopy(model)
        if attribute is not None:
            other.kept = getattr(other, attribute)
        for _ in range(4):
            other.predict(pictures[0])
        assert bool(listed(other)) == (attribute is None)
        count = len(plan._entries)
        del other
        gc.collect()
        assert len(plan._entries) < count


def test_a_network_that_keeps_changing_is_seldom_noted() -> None:
    entry = plan._Entry()
    waits = []
    for _ in range(14):
        entry.forget()
        waits.append(entry.waiting)
    assert waits[:4] == [1, 2, 4, 8]
    assert max(waits) == plan._LONGEST
    model = fastunet.UNet(3, 2, base_c=4).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            model.inc.double_conv[0].weight.data.mul_(1.01)
            for _ in range(20):
                model(x)
            (entry,) = plan._entries[model].values()
            assert entry.pause == 1, "a list that is used earns its time back"
