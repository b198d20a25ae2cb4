"""Networks drawn by a seed: changed as people change them, trained as people train them, beside the plain reference.

Both get the same weights, the same surgery and the same steps, in float64: outputs, gradients, statistics, averages and
predictions agree. What fails names its seed, and ``check(seed)`` repeats it. ``--long MINUTES`` goes on drawing.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sources import as_users_run
from test_models import LoRAConv, ScaledConv, about, scramble
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastunet
from fastunet import reference

# float64: the same sums in another order, through some twenty batch norms of which the lowest sees a dozen values, over
# two steps. A wrong term shows at 1e-3 or more.
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8}

NETWORKS: dict[str, dict[str, Any]] = {
    "UNet": {"n_channels": 3, "n_classes": 2},
    "StridedUNet": {"n_channels": 3, "n_classes": 2},
    "PlainUNet": {"in_channels": 3, "out_channels": 2},
    "BrainUNet": {"in_channels": 3, "out_channels": 1},
}


# ---- surgery: of one module, which is replaced by what is returned -------------------------------------------------


def _conv(old: nn.Conv2d, kind: type[nn.Conv2d] = nn.Conv2d, **options: Any) -> nn.Conv2d:
    settings = {
        "kernel_size": old.kernel_size,
        "stride": old.stride,
        "padding": old.padding,
        "bias": old.bias is not None,
    }
    return kind(old.in_channels, old.out_channels, dtype=old.weight.dtype, **(settings | options))


def _wider(old: nn.Conv2d) -> nn.Module:
    side = old.kernel_size[0]
    return _conv(old, kernel_size=side + 2, padding=old.padding[0] + 1)


def _dilated(old: nn.Conv2d) -> nn.Module:
    return _conv(old, dilation=2, padding=2 * old.padding[0])


def _seamed(old: nn.Conv2d) -> nn.Module:
    return _conv(old, padding_mode="replicate")


def _separable(old: nn.Conv2d) -> nn.Module:
    depthwise = nn.Conv2d(old.in_channels, old.in_channels, old.kernel_size, old.stride, old.padding,
                          groups=old.in_channels, dtype=old.weight.dtype)  # fmt: skip
    return nn.Sequential(depthwise, nn.Conv2d(old.in_channels, old.out_channels, 1, dtype=old.weight.dtype))


def _adapted(old: nn.Conv2d) -> nn.Module:
    return nn.Sequential(nn.Conv2d(old.in_channels, old.in_channels, 1, dtype=old.weight.dtype), old)


def _low_rank(old: nn.Conv2d) -> nn.Module:
    return LoRAConv(old) if old.stride == (1, 1) else _conv(old, ScaledConv)


def _pruned(old: nn.Module) -> nn.Module:
    with torch.no_grad():  # else the weight is no leaf until it is made anew, and PyTorch refuses to copy that
        prune.l1_unstructured(old, "weight", 0.3)
    return old


def _frozen(old: nn.Module) -> nn.Module:
    return old.requires_grad_(False)


def _resting(old: nn.Module) -> nn.Module:
    """A batch norm whose mode is set by nobody else."""
    old.train = lambda mode=True: old  # type: ignore[assignment,method-assign]
    old.training = False
    return old


def _set(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    def change(old: nn.Module) -> nn.Module:
        for name, value in settings.items():
            setattr(old, name, value)
        return old

    return change


def _halved(old: nn.Module) -> nn.Module:
    old.register_forward_pre_hook(lambda module, args: tuple(0.5 * x for x in args))
    return old


def _shifted(old: nn.Module) -> nn.Module:
    old.register_forward_hook(lambda module, args, y: y + 0.1)
    return old


def _damped(old: nn.Module) -> nn.Module:
    old.register_full_backward_hook(lambda module, gradients, _: tuple(g if g is None else 0.5 * g for g in gradients))
    return old


def _norm(make: Callable[[int], nn.Module]) -> Callable[[Any], nn.Module]:
    return lambda old: make(old.num_features).double()


Surgery = Callable[[Any], nn.Module]
ANY: list[Surgery] = [_halved, _shifted, _damped, _frozen]
SURGERIES: dict[type[nn.Module], list[Surgery]] = {
    nn.Conv2d: [
        _wider, _dilated, _seamed, _separable, _adapted, _low_rank, _pruned, parametrizations.weight_norm, *ANY,
    ],
    nn.ConvTranspose2d: [_pruned, *ANY],
    nn.BatchNorm2d: [
        _norm(lambda c: nn.GroupNorm(1, c)), _norm(lambda c: nn.InstanceNorm2d(c, affine=True)),
        _norm(lambda c: nn.BatchNorm2d(c, affine=False)), _norm(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        lambda old: nn.Identity(), _resting, _set(momentum=None), _set(eps=0.1, momentum=0.6), *ANY,
    ],
    nn.ReLU: [
        lambda old: nn.LeakyReLU(0.1), lambda old: nn.SiLU(), lambda old: nn.Identity(), _shifted, _damped,
        lambda old: nn.PReLU(dtype=torch.float64),
    ],
    nn.MaxPool2d: [lambda old: nn.AvgPool2d(2), lambda old: nn.MaxPool2d(3, 2, 1), _shifted],
}  # fmt: skip


def operate(model: nn.Module, path: str, number: int) -> None:
    """Surgery ``number`` of its kind on the module at ``path``."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, SURGERIES[type(module)][number](module))


# ---- what is drawn -----------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """One network, what is done to it, and how it is trained."""

    network: str
    settings: dict[str, Any]
    options: dict[str, str]  # backend and policy
    shape: tuple[int, int, int, int]
    channels_last: bool
    surgeries: list[tuple[str, int]]  # of which module, which
    training: str
    momentum: float


TRAININGS = ["plain", "plain", "accumulation", "checkpointing", "amp", "ddp", "ema", "export"]


def draw(seed: int, long: bool = False) -> Drawn:
    """The same for the same seed. Compilers and the interpreter take long."""
    rng = random.Random(seed)
    network = rng.choice(["UNet", "UNet", *NETWORKS])
    base = "init_features" if network in ("PlainUNet", "BrainUNet") else "base_c"
    settings = NETWORKS[network] | {base: rng.choice([2, 3, 4])}
    if network == "UNet":
        settings |= {"bilinear": rng.random() < 0.5, "conv_bias": rng.random() < 0.3}
        settings["base_c"] += settings["base_c"] % 2  # a bilinear network halves it
    training = rng.choice([*TRAININGS, *(["compile"] if long else [])]) if seed else "compile"
    backends = ["torch", "torch", "auto", *(["triton"] if long and rng.random() < 0.1 else [])]
    options = {"backend": rng.choice(backends), "policy": rng.choice(["speed", "memory"])}
    shape = (rng.choice([2, 3]), 3, rng.randint(32, 48), rng.randint(32, 60))
    model = getattr(reference, network)(**settings)
    paths = [path for path, module in model.named_modules() if type(module) in SURGERIES]
    count = rng.choice([0, 1, 1, 2, 3, 6])
    chosen = [
        (path, rng.randrange(len(SURGERIES[type(model.get_submodule(path))]))) for path in rng.sample(paths, count)
    ]
    return Drawn(network, settings, options, shape, rng.random() < 0.3, chosen, training, rng.choice([0.0, 0.9]))


def built(drawn: Drawn) -> tuple[nn.Module, nn.Module]:
    """(fastunet's, the reference) after surgery, with the same weights."""
    plain = scramble(getattr(reference, drawn.network)(**drawn.settings)).double()
    fast = getattr(fastunet, drawn.network)(**drawn.settings, **drawn.options).double()
    fast.load_state_dict(plain.state_dict())
    for model in (fast, plain):
        for module in model.modules():  # PyTorch forbids backward hooks beside operations in place
            if isinstance(module, nn.ReLU):
                module.inplace = False
        torch.manual_seed(1)
        for path, number in drawn.surgeries:
            operate(model, path, number)
        if drawn.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast.load_state_dict(plain.state_dict())
    return fast, plain


# ---- what is compared --------------------------------------------------------------------------------------------


def same(found: Tensor | None, expected: Tensor | None, name: str) -> None:
    if expected is None or found is None:
        assert found is None, name
        assert expected is None, name
    else:
        torch.testing.assert_close(found, expected, **CLOSE, msg=about(name))


def same_state(fast: nn.Module, plain: nn.Module) -> None:
    """Gradients, parameters and buffers."""
    theirs = dict(plain.named_parameters())
    for name, p in fast.named_parameters():
        same(p.grad, theirs[name].grad, f"gradient of {name}")
        same(p.detach(), theirs[name].detach(), name)
    buffers = dict(plain.named_buffers())
    for name, buffer in fast.named_buffers():
        same(buffer, buffers[name], name)


def backward(y: Tensor, share: float = 1.0) -> None:
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weight.to(y.dtype)).mean().mul(share).backward()


def _trained(fast: nn.Module, plain: nn.Module, drawn: Drawn, call: nn.Module) -> None:
    """Two steps of both; ``call`` is what is called in fast's stead."""
    models = fast, plain
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=drawn.momentum) for model in models]
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True) for m in models
                if drawn.training == "ema"]  # fmt: skip
    pieces = 2 if drawn.training == "accumulation" else 1
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(pieces):
            x = torch.randn(drawn.shape, dtype=torch.float64)
            leaves = [x.clone().requires_grad_() for _ in models]
            outputs = [model(leaf) for model, leaf in zip((call, plain), leaves, strict=True)]
            same(*outputs, "output")  # type: ignore[call-arg]
            for y in outputs:
                backward(y, 1 / pieces)
            same(leaves[0].grad, leaves[1].grad, "gradient of the input")
        same_state(*models)
        for optimizer in optimizers:
            optimizer.step()
        for average, model in zip(averages, models, strict=False):
            average.update_parameters(model)
    if averages:
        same_state(*averages)
        x = torch.randn(drawn.shape, dtype=torch.float64)
        same(*(average.eval()(x).detach() for average in averages), "output of the average")  # type: ignore[call-arg]


def _predicted(fast: nn.Module, plain: nn.Module, drawn: Drawn) -> None:
    """After training: evaluation, a copy, and masks."""
    x = torch.randn(drawn.shape, dtype=torch.float64)
    fast.eval(), plain.eval()
    with torch.no_grad():
        expected = plain(x)
        same(fast(x), expected, "output in evaluation")
        if drawn.training != "ddp":
            same(copy.deepcopy(fast)(x), expected, "output of a copy")
        if drawn.network in ("UNet", "PlainUNet"):
            top = expected.topk(2, 1).values
            clear = top[:, 0] - top[:, 1] > 1e-5
            assert torch.equal(fast.predict(x)[clear], expected.argmax(1).to(torch.uint8)[clear])  # type: ignore[operator]


def _amp(fast: nn.Module, plain: nn.Module, drawn: Drawn) -> None:
    """Under autocast: at most twice the reference's error, of the output and of all gradients together."""
    truth = copy.deepcopy(plain).eval()
    fast, plain = fast.float().eval(), plain.float().eval()
    x = torch.randn(drawn.shape)
    errors = []
    expected = truth(x.double())
    backward(expected)
    for model in (fast, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        backward(y.float())
        pairs = [(y.detach(), expected.detach())]
        pairs += [
            (p.grad, q.grad) for p, q in zip(model.parameters(), truth.parameters(), strict=True) if q.grad is not None
        ]
        errors.append([float((a.double() - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs])
    mine, theirs = (torch.tensor(e) for e in errors)
    assert mine[0] <= 2 * theirs[0] + 2**-7, (mine[0], theirs[0])
    assert mine.isfinite().all()
    assert mine.median() <= 2 * theirs.median() + 2**-7, (mine.median(), theirs.median())


def _export(fast: nn.Module, plain: nn.Module, drawn: Drawn) -> None:
    fast.eval(), plain.eval()
    x = torch.randn(drawn.shape, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(fast, (x,)).module()
        same(program(x), plain(x), "output of the exported program")


@contextlib.contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{time.monotonic_ns()}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check(seed: int, folder: Path, long: bool = False) -> None:
    """Everything about the network of a seed."""
    drawn = draw(seed, long)
    torch.manual_seed(seed)
    with contextlib.ExitStack() as stack:
        if drawn.options["backend"] == "auto":
            stack.enter_context(as_users_run())
        try:
            fast, plain = built(drawn)
            call = fast
            if drawn.training == "amp":
                return _amp(fast, plain, drawn)
            if drawn.training == "export":
                return _export(fast, plain, drawn)
            if drawn.training == "checkpointing":
                fast.use_checkpointing()  # type: ignore[operator]
            elif drawn.training == "compile":
                torch._dynamo.reset()
                call = torch.compile(fast, backend="aot_eager")  # type: ignore[assignment]
            elif drawn.training == "ddp":
                stack.enter_context(_one_process(folder))
                call = nn.parallel.DistributedDataParallel(fast)
            _trained(fast, plain, drawn, call)
            _predicted(fast, plain, drawn)
        except Exception as error:
            raise AssertionError(f"seed {seed}{', long' if long else ''}: {drawn}") from error


@pytest.mark.parametrize("seed", range(26))
def test_a_drawn_network(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


def test_ever_other_networks(seconds: float, tmp_path: Path) -> None:
    """One more than above, and with --long as many as there is time for."""
    stop = time.monotonic() + seconds
    for seed in itertools.count(random.SystemRandom().randrange(10**6, 10**9) if seconds else 26):
        check(seed, tmp_path, bool(seconds))
        if time.monotonic() >= stop:
            break
