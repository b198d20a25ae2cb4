"""U-Nets of other norms, acts and upsamplings, and blocks that add, average, repeat or learn their slopes: beside plain
PyTorch in float64."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sources import as_users_run, skip_if_unsupported
from test_models import EXACT, assert_same_step
from torch import Tensor, nn

import fastunet
from benchmarks.nnunet import FastNnUNet
from benchmarks.trace import trace
from fastunet import reference
from fastunet.activation import Activation, Config, Placed
from fastunet.blocks import ConvSequence, ResidualBlock, Up, halving
from fastunet.losses import DiceCELoss

# Every norm, act and upsampling, and every pair of a norm with an upsampling that shares its channels.
STYLES: list[dict[str, Any]] = [
    {"norm": "batch", "negative_slope": 0.01, "upsample": "nearest"},
    {"norm": "instance", "negative_slope": 0.01, "upsample": "transposed"},
    {"norm": "instance", "upsample": "bilinear", "conv_bias": True},
    {"norm": "group", "negative_slope": 0.2, "upsample": "nearest"},
    {"norm": "group", "upsample": "transposed"},
    {"norm": None, "negative_slope": 0.1, "upsample": "bilinear"},
    {"norm": None, "upsample": "transposed"},
]
BY_NORM = STYLES[1::2]
CONFIGS = [("torch", "memory"), ("torch", "speed"), ("auto", "speed")]  # the operators are tested on both backends


@pytest.fixture(autouse=True)
def no_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Backend "auto" is the CPU's, as on a machine where nobody set anything, unless a test asks for the device."""
    with contextlib.nullcontext() if "device" in request.fixturenames else as_users_run():
        yield


def twins(style: dict[str, Any], **options: Any) -> tuple[nn.Module, nn.Module]:
    plain = reference.UNet(2, 3, base_c=4, **style).double()
    for name, p in plain.named_parameters():
        if p.dim() == 1 and "double_conv" in name:
            nn.init.normal_(p)  # scales of both signs
    ours = fastunet.UNet(2, 3, base_c=4, **style, **options).double()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids="-".join)
def test_three_training_steps_and_a_prediction(config: tuple[str, str], style: dict[str, Any]) -> None:
    ours, plain = twins(style, backend=config[0], policy=config[1])
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (ours, plain)]
    for size in ((2, 2, 37, 43), (1, 2, 48, 35), (2, 2, 33, 32)):
        assert_same_step(ours, plain, torch.randn(size, dtype=torch.float64), rtol=1e-8, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
    x = torch.randn(1, 2, 41, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), **EXACT)


def test_nearest_stores_nothing_doubled() -> None:
    """Neither in a step, where no upsampling is called, nor until its backward."""
    kept = {}
    for upsample in ("nearest", "bilinear"):
        model = fastunet.UNet(2, 3, base_c=4, upsample=upsample, backend="torch", policy="memory")
        found: dict[int, Tensor] = {}
        keep = functools.partial(lambda found, x: found.setdefault(x.untyped_storage()._cdata, x), found)
        with trace() as calls, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(torch.randn(2, 2, 16, 16)).sum().backward()
        kept[upsample] = sum(x.untyped_storage().nbytes() for x in found.values())
        assert any(call.name == "fastunet.upsample_concat" for call in calls) == (upsample == "bilinear")
    # In float32 two doubled pictures of 4, 8, 16 and 32 channels, from 16² on downwards.
    assert kept["bilinear"] - kept["nearest"] == 4 * 2 * sum((4 << i) * (16 >> i) ** 2 for i in range(4))


@pytest.mark.parametrize("style", BY_NORM, ids=str)
def test_loss_predictions_and_checkpointing(style: dict[str, Any]) -> None:
    ours, plain = twins(style, backend="torch")
    x, labels = torch.randn(2, 2, 32, 37, dtype=torch.float64), torch.randint(0, 3, (2, 32, 37))
    value, expected = ours.loss(x, labels, DiceCELoss()), DiceCELoss()(plain(x), labels)
    torch.testing.assert_close(value, expected, **EXACT)
    assert torch.equal(ours.predict(x), plain.eval()(x).argmax(1).to(torch.uint8))
    plain.train()
    ours.use_checkpointing()
    assert_same_step(ours, plain, x, rtol=1e-8, atol=1e-10)


def test_compiled_and_exported() -> None:
    ours, plain = twins(STYLES[3], backend="torch")
    x = torch.randn(2, 2, 32, 37, dtype=torch.float64)
    torch._dynamo.reset()
    results = []
    for call, model in ((torch.compile(ours, fullgraph=True, backend="eager"), ours), (plain, plain)):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().mean(), [*model.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
    ours, plain = (model.eval() for model in twins(STYLES[1], backend="torch"))
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), plain(x), **EXACT)


def test_distributed(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for style in BY_NORM:
            ours, plain = twins(style, backend="torch")
            wrapped = nn.parallel.DistributedDataParallel(ours)
            x = torch.randn(2, 2, 32, 37, dtype=torch.float64)
            weights = torch.randn(2, 3, 32, 37, dtype=torch.float64)
            for model in (wrapped, plain):
                (model(x) * weights).mean().backward()
            for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-10)
    finally:
        dist.destroy_process_group()


def test_the_default_is_what_it_was() -> None:
    named = {"norm": "batch", "negative_slope": 0.0}
    for bilinear, upsample in ((False, "transposed"), (True, "bilinear")):
        old, new = fastunet.UNet(3, 2, bilinear, 4), fastunet.UNet(3, 2, base_c=4, upsample=upsample, **named)
        shapes = [{name: x.shape for name, x in model.state_dict().items()} for model in (old, new)]
        assert shapes[0] == shapes[1]
        assert [str(m) for m in old.children()] == [str(m) for m in new.children()]
        assert old.bilinear == new.bilinear == bilinear


# ---- blocks ------------------------------------------------------------------------------------------------------


def assert_same(
    module: nn.Module, lazily: Callable[[Tensor], Tensor], plainly: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Value, and gradients of the input and of every parameter."""
    results = []
    for function in (lazily, plainly):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        torch.manual_seed(1)
        results.append([y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [leaf, *module.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def lazy_pass(blocks: list[Any], config: tuple[str, str]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        context = Config(*config).context(x, nn.ModuleList(blocks))
        act = Activation(x)
        for block in blocks:
            act = block.lazy(Placed.of(act), context)
        return act.tensor(context)

    return function


def residual(block: ResidualBlock, x: Tensor) -> Tensor:
    skip = x if isinstance(block.skip, nn.Identity) else nn.Sequential(*block.skip)(x)
    return block.act(nn.Sequential(*block.conv)(x) + skip)


@pytest.mark.parametrize("config", CONFIGS, ids="-".join)
@pytest.mark.parametrize("norm", ["batch", "instance", None])
def test_residual_blocks(norm: str | None, config: tuple[str, str]) -> None:
    """Skip connections that are plain, normalised and averaged, behind a convolution whose act they apply."""
    stem = ConvSequence(nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.01))
    strided = ResidualBlock(4, 6, 2, norm=norm, negative_slope=0.01)
    wider = ResidualBlock(6, 4, norm=norm)
    blocks = [stem, ResidualBlock(4, 4, norm=norm, negative_slope=0.01), strided, wider]
    chain = nn.ModuleList(blocks).double()

    def plainly(x: Tensor) -> Tensor:
        x = nn.Sequential(*stem)(x)
        for block in blocks[1:]:
            x = residual(block, x)
        return x

    x = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    assert_same(chain, lazy_pass(blocks, config), plainly, x)
    for block in blocks[1:]:
        block.config = Config(*config)
    torch.testing.assert_close(blocks[1](x.repeat(1, 2, 1, 1)), residual(blocks[1], x.repeat(1, 2, 1, 1)), **EXACT)


def test_a_residual_block_through_the_kernels(device: str) -> None:
    skip_if_unsupported("triton", torch.float64, device)
    block = ResidualBlock(2, 3, 2, norm="instance", negative_slope=0.01).double()
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    assert_same(block, lazy_pass([block], ("triton", "memory")), lambda x: residual(block, x), x)


def test_a_residual_block_adds_in_one_pass_and_keeps_hooks() -> None:
    block = ResidualBlock(4, 4, norm="instance").double()
    block.config = Config("torch", "memory")
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    with trace() as calls:
        y = block(x)
    names = [call.name for call in calls if call.name.startswith("fastunet.")]
    assert names == [*["fastunet.conv2d", "fastunet.group_affine"] * 2, "fastunet.add_act"]
    seen: list[Tensor] = []
    block.act.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    torch.testing.assert_close(block(x), y, **EXACT)
    assert bool((seen[0] < 0).any()) or bool((y == seen[0]).all())


@pytest.mark.parametrize("config", CONFIGS, ids="-".join)
def test_learnt_slopes_and_average_pools(config: tuple[str, str]) -> None:
    block = ConvSequence(
        nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True), nn.PReLU(4), nn.AvgPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1), nn.PReLU(init=-0.1), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(2, 2),
    ).double()  # fmt: skip
    x = torch.randn(2, 2, 9, 6, dtype=torch.float64)
    assert_same(block, lazy_pass([block], config), nn.Sequential(*block), x)
    with torch.no_grad():
        block.eval()
        torch.testing.assert_close(lazy_pass([block], config)(x), nn.Sequential(*block)(x), **EXACT)
    context = Config("torch", "memory").context(x, block)
    with trace() as calls:
        block.lazy(Placed.of(Activation(x)), context)
    passes = [call.name.removeprefix("fastunet.") for call in calls]
    assert [name for name in passes if name in ("affine_prelu", "avg_pool2x2", "affine_act")] == [
        "affine_prelu", "avg_pool2x2", "affine_prelu", "avg_pool2x2",
    ]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids="-".join)
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_replicated_rows_and_columns(upsample: str, config: tuple[str, str]) -> None:
    """MONAI's BasicUNet at odd sizes: one more row or column repeats the last."""
    block = Up(4, 2, upsample=upsample, replicate=True, norm="instance", negative_slope=0.1).double()
    block.config = Config(*config)
    channels = 2 if upsample == "transposed" else 1
    for rows, columns in itertools.product((0, 1), (0, 1)):
        skip = torch.randn(2, 4 - channels if upsample == "nearest" else 2, 6 + rows, 8 + columns, dtype=torch.float64)
        x = torch.randn(2, 4 if upsample == "transposed" else channels, 3, 4, dtype=torch.float64)

        def plainly(x: Tensor, skip: Tensor = skip, rows: int = rows, columns: int = columns) -> Tensor:
            up = F.pad(block.up(x), [0, columns, 0, rows], mode="replicate")
            return nn.Sequential(*block.conv.double_conv)(torch.cat([skip, up], 1))

        assert_same(block, lambda x, skip=skip: block(x, skip), plainly, x)
    with pytest.raises(ValueError, match="at most one row and column more"):
        block(x, F.pad(skip, [0, 2]))


def test_blocks_are_copied_and_divide_by_their_stride() -> None:
    block = ResidualBlock(3, 4, 2, norm="group", negative_slope=0.1)
    assert halving(block) == 2
    assert halving(ConvSequence(block.conv[0], nn.PReLU(), nn.AvgPool2d(2))) == 4
    x = torch.randn(1, 3, 4, 6)
    torch.testing.assert_close(copy.deepcopy(block)(x), block(x), rtol=0, atol=0)


def test_kernels_are_launched_by_a_list(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the operators of an inference's second time; what norms the last layer by sample is part of its result."""
    pytest.importorskip("triton")
    model = FastNnUNet(2, 2, [16, 16], backend="triton").eval().to(device, torch.float16)
    first, second = (torch.randn(1, 2, 16, 18, device=device).half() for _ in range(2))
    with torch.no_grad():
        expected = [model(x) for x in (first, second)]
        monkeypatch.setattr(FastNnUNet, "_body", None)
        assert torch.equal(model(first), expected[0])
