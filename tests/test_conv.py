"""conv2d and conv_transpose2d, on both backends, against the plain composition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sources import DTYPES, LAYOUTS, assert_near, check_compiled, laid_out, random_affine, skip_if_unsupported
from torch import Tensor

from fastunet import ops
from fastunet.architecture import as_if_on
from fastunet.reference import functional as plain


@dataclass(frozen=True)
class Conv:
    """Shapes of one convolution. Each source lies at (top, left) in the frame and may stick out of it."""

    x0: tuple[int, ...]
    filters: int
    x1: tuple[int, ...] | None = None
    kernel: int = 3
    stride: int = 1
    size: tuple[int, int] | None = None
    offset: tuple[int, int, int, int] = (0, 0, 0, 0)
    affine: tuple[bool, bool] = (True, True)
    slope: tuple[float, float] = (0.0, 1.0)
    bias: bool = False
    stats: bool = True
    transposed: bool = False
    doubled: tuple[bool, bool] = (False, False)  # whether nearest ×2 of a source lies in the frame
    pool: str = ""  # the output is also 2×2-pooled: "all" for scales above 0, "by sign" of random ones

    @property
    def frame(self) -> tuple[int, int]:
        times = 2 if self.doubled[0] else 1
        return self.size or (times * self.x0[2], times * self.x0[3])

    @property
    def weight(self) -> tuple[int, ...]:
        channels = self.x0[1] + (self.x1[1] if self.x1 else 0)
        pair = (channels, self.filters) if self.transposed else (self.filters, channels)
        return (*pair, self.kernel, self.kernel)


NONE = (False, False)  # of two sources is doubled

CASES = {
    "image": Conv((2, 3, 7, 9), 5, affine=(False, False), slope=(1.0, 1.0)),
    "grey-1x1-pixels": Conv((3, 1, 1, 1), 1, bias=True),
    "lazy-17-to-20": Conv((1, 17, 5, 3), 20),
    "leaky": Conv((2, 3, 5, 6), 4, x1=(2, 2, 4, 6), slope=(0.01, 0.2)),
    "falling-transposed": Conv((1, 4, 3, 2), 3, slope=(-0.5, 1.0), kernel=3, transposed=True),
    "relu-without-affine": Conv((1, 4, 3, 5), 6, affine=(False, False), slope=(0.0, 0.0), bias=True, stats=False),
    "stride-2-odd": Conv((2, 6, 7, 5), 9, stride=2, bias=True),
    "stride-2-even": Conv((1, 5, 4, 6), 3, stride=2),
    "stride-2-many-channels": Conv((1, 70, 3, 4), 3, stride=2),
    "1x1-head": Conv((2, 20, 4, 3), 3, kernel=1, bias=True, stats=False),
    "1x1-many-channels": Conv((1, 70, 3, 5), 4, kernel=1, bias=True, stats=False),
    "skip-then-up-padded": Conv((2, 5, 7, 9), 6, x1=(2, 4, 6, 8), offset=(0, 0, 0, 0)),
    "padded-on-all-sides": Conv((1, 3, 9, 9), 4, x1=(1, 2, 6, 5), offset=(0, 0, 1, 2), bias=True),
    "up-then-skip-cropped": Conv((1, 4, 8, 9), 3, x1=(1, 5, 6, 5), size=(6, 5), offset=(-1, -2, 0, 0)),
    "many-channels-two-sources": Conv((1, 70, 3, 2), 33, x1=(1, 35, 2, 2), offset=(0, 0, 0, 0)),
    "doubled": Conv((2, 17, 3, 4), 5, doubled=(True, False), pool="all"),
    "doubled-pixel-beside-odd-skip": Conv((3, 2, 3, 3), 4, x1=(3, 3, 1, 1), doubled=(False, True), slope=(0.01, 0.0)),
    "doubled-inside-and-cropped": Conv(
        (1, 3, 4, 9), 4, x1=(1, 2, 2, 5), size=(7, 9), offset=(-1, 0, 2, -1), doubled=(True, True), bias=True
    ),
    "doubled-plain-cropped-to-itself": Conv(
        (1, 3, 4, 6), 2, None, 3, 1, (4, 6), (-2, -4, 0, 0), (False, False), (1.0, 1.0), doubled=(True, False)
    ),
    "pooled": Conv((2, 8, 4, 6), 8, pool="all"),
    "pooled-by-sign-odd": Conv((1, 8, 7, 5), 9, pool="by sign"),
    "pooled-image": Conv((1, 2, 5, 6), 4, affine=(False, False), slope=(1.0, 1.0), stats=False, pool="by sign"),
    "pooled-stride-2": Conv((1, 3, 5, 7), 4, stride=2, pool="by sign"),
    "wider-than-a-tile": Conv((1, 2, 3, 37), 3),
    "taller-than-a-tile": Conv((1, 2, 41, 2), 3),
    "few-pixels-of-many-images": Conv((70, 1, 2, 2), 2, kernel=1),
    "transposed-2x2": Conv((2, 5, 3, 4), 3, kernel=2, bias=True, stats=False, transposed=True),
    "transposed-2x2-1x1-pixels": Conv((2, 17, 1, 1), 20, kernel=2, bias=True, transposed=True),
    "transposed-3x3": Conv((2, 6, 3, 5), 4, bias=True, transposed=True),
    "transposed-3x3-plain": Conv((1, 3, 2, 1), 18, affine=(False, False), slope=(1.0, 1.0), transposed=True),
}


@dataclass
class Inputs:
    """The differentiable inputs of one convolution."""

    x0: Tensor
    affine0: Tensor | None
    x1: Tensor | None
    affine1: Tensor | None
    weight: Tensor
    bias: Tensor | None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tensors = (self.x0, self.affine0, self.x1, self.affine1, self.weight, self.bias)
        self.leaves = [t.requires_grad_() for t in tensors if t is not None]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in ``dtype``, the affines in the dtype of statistics."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = (dtype, wide, dtype, wide, dtype, dtype)
        tensors = (self.x0, self.affine0, self.x1, self.affine1, self.weight, self.bias)
        return Inputs(*(None if t is None else t.detach().to(k) for t, k in zip(tensors, kinds, strict=True)))


def draw(case: Conv, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    def source(shape: tuple[int, ...] | None, affine: bool) -> tuple[Tensor | None, Tensor | None]:
        if shape is None:
            return None, None
        x = torch.randn(shape, device=device).to(dtype)
        return x, random_affine(shape[1], device) if affine else None

    x0, affine0 = source(case.x0, case.affine[0])
    assert x0 is not None
    x1, affine1 = source(case.x1, case.affine[1])
    spread = (case.weight[0 if case.transposed else 1] * case.kernel**2) ** -0.5
    weight = (torch.randn(case.weight, device=device) * spread).to(dtype)
    bias = torch.randn(case.filters, device=device).to(dtype) if case.bias else None
    return Inputs(x0, affine0, x1, affine1, weight, bias)


def pooling(case: Conv, device: torch.device) -> tuple[bool, Tensor | None]:
    """(pool, pool_scale): of alternating signs, and 0."""
    signs = torch.tensor([-2.0, 0.0, 0.5], device=device).repeat(case.filters)[: case.filters]
    return bool(case.pool), signs if case.pool == "by sign" else None


def run(case: Conv, inputs: Inputs, backend: str | None, save: bool = False) -> list[Tensor]:
    """[y, mean, var] or [y], and the pooled y, from the operator, or the reference if ``backend`` is None."""
    source = (inputs.x0, inputs.affine0, case.slope[0])
    if case.transposed:
        function: Any = plain.conv_transpose2d if backend is None else ops.conv_transpose2d
        rest: tuple[Any, ...] = () if backend is None else (backend,)
        outputs = function(*source, inputs.weight, inputs.bias, case.stats, *rest)
    else:
        function = plain.conv2d if backend is None else ops.conv2d
        pool, scale = pooling(case, inputs.x0.device)
        rest = () if backend is None else (save, pool, scale, backend)
        outputs = function(
            *source, inputs.x1, inputs.affine1, case.slope[1], inputs.weight, inputs.bias,
            case.stride, case.frame, case.offset, case.doubled, case.stats, *rest,
        )  # fmt: skip
    found = list(outputs[:3] if case.stats else outputs[:1])
    if case.pool and backend is not None:
        found.append(outputs[4])
    elif case.pool:
        y = outputs[0]
        # Normalising by a scale of ±1, pooling and undoing it picks the same pixel; by 0, the first one.
        sign = torch.ones(case.filters).to(y) if scale is None else scale.sign().to(y)
        signed = sign.view(1, -1, 1, 1)
        flat = signed == 0
        first = y[..., : y.shape[2] // 2 * 2 : 2, : y.shape[3] // 2 * 2 : 2]
        found.append(torch.where(flat, first, F.max_pool2d(y * signed, 2) * signed))
    return found


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return list(torch.autograd.grad(outputs, leaves, seeds))


@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward(case: Conv, dtype: torch.dtype, save: bool, backend: str, device: str) -> None:
    skip_if_unsupported(backend, dtype, device)
    if backend == "triton" and save:
        pytest.skip("the kernels keep nothing normalised")
    inputs = draw(case, device, torch.float32 if dtype == torch.float64 else dtype)
    exact, inputs, plainly = inputs.to(torch.float64), inputs.to(dtype), inputs.to(dtype)
    truth, own, result = run(case, exact, None), run(case, plainly, None), run(case, inputs, backend, save)
    assert_near(result, truth, own, dtype)
    assert_near(gradients(result, inputs.leaves), gradients(truth, exact.leaves), gradients(own, plainly.leaves), dtype)
    for leaf, gradient in zip(inputs.leaves, gradients(run(case, inputs, backend, save), inputs.leaves), strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape


KNOWN = {name: case for name, case in CASES.items() if case.kernel == 3 and case.stride == 1 and not case.transposed}


def run_act(
    case: Conv, inputs: Inputs, affine: Tensor | None, backend: str | None, head: Sequence[Tensor | None] = (None, None)
) -> list[Tensor]:
    """z, or its 1×1 convolution, and z pooled if asked for, from the operator, or the reference if ``backend`` is
    None."""
    with torch.no_grad():
        if backend is not None:
            x1 = (inputs.x1, inputs.affine1, case.slope[1])
            found = ops.conv2d_act(
                inputs.x0, inputs.affine0, case.slope[0], *x1, inputs.weight, inputs.bias, case.frame, case.offset,
                case.doubled, affine, 0.0, bool(case.pool), *head, backend,
            )  # fmt: skip
            return list(found if case.pool else found[:1])
        z = plain.affine_act(run(case, inputs, None)[0], affine, 0.0)
        y = z if head[0] is None else F.conv2d(z, *head)
        return [y, F.max_pool2d(z, 2)] if case.pool else [y]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("case", "with_affine"),
    [*((case, True) for case in KNOWN.values()), (KNOWN["image"], False), (KNOWN["pooled"], False)],
    ids=[*KNOWN, "image-relu", "pooled-relu"],
)
def test_normalised_as_it_is_stored(
    case: Conv, with_affine: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    skip_if_unsupported(backend, dtype, device)
    inputs = draw(case, device, torch.float32 if dtype == torch.float64 else dtype)
    affine = random_affine(case.filters, device) if with_affine else None
    exact, inputs, plainly = inputs.to(torch.float64), inputs.to(dtype), inputs.to(dtype)
    wide = None if affine is None else affine.double()
    like = wide if dtype == torch.float64 else affine
    result, own = (run_act(case, each, like, kind) for each, kind in ((inputs, backend), (plainly, None)))
    assert_near(result, run_act(case, exact, wide, None), own, dtype)


@pytest.mark.parametrize("classes", [1, 3, 17])
@pytest.mark.parametrize("name", ["padded-on-all-sides", "many-channels-two-sources", "image"])
def test_a_head_on_what_is_not_stored(name: str, classes: int, backend: str, device: str) -> None:
    """Fused, behind programs that share a tile, and behind a picture's convolution."""
    case = CASES[name]
    inputs = draw(case, device)
    affine = random_affine(case.filters, device)
    head = [torch.randn(classes, case.filters, 1, 1, device=device), torch.randn(classes, device=device)]
    result, own = (run_act(case, inputs, affine, kind, head) for kind in (backend, None))
    wide = [t.double() for t in head]
    assert_near(result, run_act(case, inputs.to(torch.float64), affine.double(), None, wide), own, torch.float32)


@pytest.mark.parametrize("name", ["image", "padded-on-all-sides", "pooled"])
def test_opcheck_conv2d_act(name: str, backend: str, device: str) -> None:
    case = CASES[name]
    inputs = draw(case, device)
    x1 = (None, None, 1.0) if inputs.x1 is None else (inputs.x1.detach(), inputs.affine1.detach(), 1.0)
    bias = None if inputs.bias is None else inputs.bias.detach()
    affine0 = None if inputs.affine0 is None else inputs.affine0.detach()
    arguments = (
        inputs.x0.detach(), affine0, case.slope[0], *x1, inputs.weight.detach(), bias, case.frame, case.offset,
        case.doubled, random_affine(case.filters, device), 0.0, bool(case.pool), None, None, backend,
    )  # fmt: skip
    torch.library.opcheck(ops.conv2d_act, arguments)


# Channels whose rows TMA can move, so that each case has a path for Hopper and one for older chips.
EVEN = {
    "3x3": Conv((3, 4, 3, 5), 6, bias=True),
    "3x3-a-tile-inside": Conv((2, 2, 3, 130), 2),  # which needs no mask
    "3x3-two-sources": Conv((1, 4, 5, 4), 6, x1=(1, 2, 4, 4), offset=(0, 0, 1, -1)),
    "doubled-a-tile-inside": Conv((2, 2, 2, 65), 2, doubled=(True, False)),
    "1x1": Conv((3, 4, 2, 5), 6, kernel=1, bias=True),
    "1x1-two-sources": Conv((2, 4, 3, 2), 2, x1=(2, 2, 2, 3), offset=(0, 0, 0, -1), kernel=1),
    "stride-2": Conv((3, 4, 5, 6), 6, stride=2, bias=True),
    "stride-2-odd-width": Conv((2, 4, 4, 7), 2, stride=2),
    "stride-2-cropped": Conv((2, 4, 4, 6), 2, stride=2, size=(3, 4), offset=(-1, 1, 0, 0)),
    "stride-2-a-tile-inside": Conv((1, 2, 4, 130), 2, stride=2),
    "transposed-2x2": Conv((3, 4, 2, 3), 6, kernel=2, bias=True, transposed=True),
    "transposed-2x2-wider-than-a-tile": Conv((1, 2, 2, 35), 2, kernel=2, transposed=True),
    "transposed-3x3": Conv((3, 4, 2, 3), 6, bias=True, transposed=True),
    "transposed-3x3-wider-than-a-tile": Conv((1, 2, 2, 35), 2, transposed=True),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has one architecture, which the other tests are for")
@pytest.mark.parametrize("chip", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", EVEN.values(), ids=EVEN)
def test_every_chip(case: Conv, chip: str) -> None:
    """Float64: the kernels take the same paths as in 16 bits, and the interpreter computes them exactly."""
    tiles = pytest.importorskip("fastunet.kernels.tiles")
    inputs = draw(case, "cpu").to(torch.float64)
    exact = inputs.to(torch.float64)
    truth = run(case, exact, None)
    with as_if_on(chip):
        assert tiles.movable(inputs.x0) == (chip == "sm_90")
        result = run(case, inputs, "triton")
        found = gradients(result, inputs.leaves)
    assert_near(result, truth, truth, torch.float64)
    expected = gradients(truth, exact.leaves)
    assert_near(found, expected, expected, torch.float64)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["y", "mean", "var"])
def test_gradient_of_one_output_alone(which: int, backend: str, device: str) -> None:
    case = CASES["lazy-17-to-20"]
    inputs = draw(case, device)
    exact, plainly = inputs.to(torch.float64), inputs.to(torch.float32)
    results = [
        gradients(run(case, each, kind)[which : which + 1], each.leaves)
        for each, kind in ((inputs, backend), (exact, None), (plainly, None))
    ]
    assert_near(*results, torch.float32)


@pytest.mark.parametrize("name", ["lazy-17-to-20", "padded-on-all-sides", "transposed-3x3", "1x1-head"])
def test_only_the_gradients_asked_for(name: str, backend: str, device: str) -> None:
    case = CASES[name]
    inputs = draw(case, device)
    whole = gradients(run(case, inputs, backend), inputs.leaves)
    for i, leaf in enumerate(inputs.leaves):
        for other in inputs.leaves:
            other.requires_grad_(other is leaf)
        (alone,) = gradients(run(case, inputs, backend), [leaf])
        torch.testing.assert_close(alone, whole[i], rtol=1e-6, atol=1e-6)  # ATen may choose another algorithm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["padded-on-all-sides", "transposed-2x2"])
def test_any_layout(name: str, layout: str, backend: str, device: str) -> None:
    case = CASES[name]
    inputs = draw(case, device)
    dense = run(case, inputs, backend)
    gradient = torch.randn(1, 1, 1, 1, device=device).expand(dense[0].shape)  # not dense either
    expected = [dense[0], *torch.autograd.grad(dense[0], inputs.leaves, gradient.contiguous())]
    moved = inputs.to(torch.float32)
    for attribute in ("x0", "x1", "weight"):
        value = getattr(moved, attribute)
        if value is not None:
            other = laid_out(tuple(value.shape), layout, torch.float32, device)
            setattr(moved, attribute, other.copy_(value.detach()).requires_grad_())
    moved.__post_init__()
    y = run(case, moved, backend)[0]
    results = [y, *torch.autograd.grad(y, moved.leaves, gradient)]
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)  # ATen sums in another order per layout
    weight_gradient = results[1 + next(i for i, leaf in enumerate(moved.leaves) if leaf is moved.weight)]
    if layout in ("contiguous", "channels_last"):
        assert weight_gradient.stride() == moved.weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_filter_in_any_memory(layout: str, device: str) -> None:
    """Its stride means nothing, and ATen lays a gradient out by it that it then refuses, in float64."""
    case = Conv((3, 4, 8, 9), 1)
    inputs = draw(case, device).to(torch.float64)
    dense = run(case, inputs, "torch")
    expected = gradients(dense, inputs.leaves)
    inputs.weight = laid_out((1, 4, 3, 3), layout, torch.float64, device).copy_(inputs.weight.detach())
    inputs.__post_init__()
    results = run(case, inputs, "torch")
    for found, value in zip([*results, *gradients(results, inputs.leaves)], [*dense, *expected], strict=True):
        torch.testing.assert_close(found, value)


def test_the_gradient_of_one_channel_keeps_its_digits(device: str) -> None:
    """The stride over it means nothing, but oneDNN took it for a reason to add up less exactly."""
    case = Conv((2, 1, 256, 256), 22, kernel=1, affine=(False, False), slope=(1.0, 1.0), stats=False)
    inputs = draw(case, device)
    inputs.x0 = inputs.x0.detach().abs().requires_grad_()
    inputs.leaves = [inputs.weight]

    def gradient(inputs: Inputs, backend: str | None) -> list[Tensor]:
        (y,) = run(case, inputs, backend)
        return list(torch.autograd.grad(y.sum(), inputs.weight))

    truth, own = gradient(inputs.to(torch.float64), None), gradient(inputs, None)
    assert_near(gradient(inputs, "torch"), truth, own, torch.float32)


@pytest.mark.parametrize("name", ["lazy-17-to-20", "transposed-2x2"])
def test_empty_batch(name: str, backend: str, device: str) -> None:
    case = CASES[name]
    case = Conv(**{**case.__dict__, "x0": (0, *case.x0[1:])})
    inputs = draw(case, device)
    outputs = run(case, inputs, backend)
    assert outputs[0].shape[0] == 0
    for leaf, gradient in zip(inputs.leaves, gradients(outputs, inputs.leaves), strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(leaf))


def test_statistics_are_centred(backend: str, device: str) -> None:
    """Mean 1000, deviation 1: a one-pass variance in float32 would be off by a tenth."""
    x = (torch.randn(2, 1, 33, 17, device=device, dtype=torch.float64) + 1000).float()
    weight = torch.zeros(2, 1, 3, 3, device=device)
    weight[:, :, 1, 1] = 1
    y, mean, var, *_ = ops.conv2d(
        x, None, 1.0, None, None, 1.0, weight, None, 1, (33, 17), (0, 0, 0, 0), NONE, True, False, False, None, backend
    )
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)  # float32's rounding of 1000
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_statistics_are_of_the_rounded_output(backend: str, device: str) -> None:
    """The normalisation reads y in its dtype, so its statistics must be those of that y."""
    x = torch.randn(2, 4, 9, 9, device=device).half()
    weight = torch.randn(3, 4, 3, 3, device=device).half() * 50
    y, mean, var, *_ = ops.conv2d(
        x, None, 1.0, None, None, 1.0, weight, None, 1, (9, 9), (0, 0, 0, 0), NONE, True, False, False, None, backend
    )
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-4)  # float32 sums
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_nan_and_infinity_go_where_they_go_in_pytorch(backend: str, device: str) -> None:
    case = Conv((1, 2, 5, 5), 2, affine=(True, True), stats=False)
    inputs = draw(case, device)
    with torch.no_grad():
        inputs.affine0[0] = 1.0
        inputs.x0[0, 0, 0, 0] = float("nan")
        inputs.x0[0, 1, 4, 4] = float("inf")
    exact = inputs.to(torch.float64)
    y, truth = run(case, inputs, backend)[0], run(case, exact, None)[0]
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_zero_whatever_the_affine_makes_of_zero(stride: int, backend: str, device: str) -> None:
    if backend == "torch":
        pytest.skip("folds the affine: its shift is no number here")
    case = Conv((1, 2, 5, 6), 2, affine=(True, True), stats=False, stride=stride)
    inputs = draw(case, device)
    with torch.no_grad():
        inputs.affine0[:, 0] = torch.tensor([float("inf"), 0.0, 0.0])
        inputs.x0[:, 0] = -1.0
    truth = run(case, inputs.to(torch.float64), None)[0]
    assert truth.isfinite().all()
    torch.testing.assert_close(run(case, inputs, backend)[0].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "counted"), [(100, 1), (300, 1), (2500, 1), (300, 2), (2500, 2)])
def test_statistics_of_many_tiles(count: int, counted: int, device: str) -> None:
    statistics = pytest.importorskip("fastunet.kernels.statistics")
    tiles = torch.randn(count, 7, 5, device=device) + 10
    mean = tiles.mean(1)
    m2 = (tiles - mean[:, None]).square().sum(1)
    counts = torch.full((count // counted,), 7.0, device=device)
    merged = statistics.merge_stats(mean, m2, counts, counted)
    exact = tiles.double().flatten(0, 1)
    torch.testing.assert_close(merged[0].double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(merged[1].double(), exact.var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["padded-on-all-sides", "stride-2-odd", "transposed-3x3", "few-pixels-of-many-images"])
def test_the_same_bits_every_time(name: str, backend: str, device: str) -> None:
    case = CASES[name]
    inputs = draw(case, device)
    first, second = (
        [*outputs, *gradients(outputs, inputs.leaves)] for outputs in (run(case, inputs, backend) for _ in range(2))
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


GRADCHECK = {
    "two-sources": Conv((1, 2, 3, 3), 2, x1=(1, 1, 2, 2), offset=(0, 0, 0, 1), bias=True),
    "leaky": Conv((1, 2, 3, 3), 2, x1=(1, 1, 2, 2), slope=(0.1, -0.5)),
    "stride-2": Conv((2, 1, 3, 2), 2, stride=2),
    "doubled": Conv((1, 2, 1, 2), 2, x1=(1, 1, 3, 4), doubled=(True, False), slope=(0.1, 1.0)),
    "pooled": Conv((1, 1, 2, 3), 2, pool="all"),
    "transposed-2x2": Conv((1, 2, 2, 2), 1, kernel=2, bias=True, transposed=True),
    "transposed-3x3": Conv((1, 1, 2, 2), 2, transposed=True),
}


@pytest.mark.parametrize("case", GRADCHECK.values(), ids=GRADCHECK)
def test_gradcheck(case: Conv, backend: str, device: str) -> None:
    skip_if_unsupported(backend, torch.float64, device)
    inputs = draw(case, device).to(torch.float64)
    with torch.no_grad():  # away from the kink of ReLU
        for x, affine in ((inputs.x0, inputs.affine0), (inputs.x1, inputs.affine1)):
            if x is not None:
                affine[0] = affine[0].abs() + 0.5
                x.copy_(x.sign() * (x.abs() + 0.2) + affine[2].view(1, -1, 1, 1))
                affine[1] *= 0.1

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        found = iter(leaves)
        tensors = (inputs.x0, inputs.affine0, inputs.x1, inputs.affine1, inputs.weight, inputs.bias)
        again = [None if t is None else next(found) for t in tensors]
        again_inputs = Inputs.__new__(Inputs)
        for name, value in zip(("x0", "affine0", "x1", "affine1", "weight", "bias"), again, strict=True):
            setattr(again_inputs, name, value)
        return tuple(run(case, again_inputs, backend))

    torch.autograd.gradcheck(function, inputs.leaves, fast_mode=True)


def conv2d_arguments(case: Conv, inputs: Inputs, backend: str, save: bool) -> tuple[Any, ...]:
    return (
        inputs.x0, inputs.affine0, case.slope[0], inputs.x1, inputs.affine1, case.slope[1], inputs.weight, inputs.bias,
        case.stride, case.frame, case.offset, case.doubled, case.stats, save, *pooling(case, inputs.x0.device), backend,
    )  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
def test_opcheck_conv2d(save: bool, channels_last: bool, backend: str, device: str) -> None:
    if backend == "triton" and save:
        pytest.skip("the kernels keep nothing normalised")
    case = Conv((2, 2, 4, 3), 3, x1=(2, 1, 2, 1), doubled=(False, True), bias=True, pool="all")
    inputs = draw(case, device)
    if channels_last:
        inputs.x0 = inputs.x0.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    arguments = conv2d_arguments(case, inputs, backend, save)
    torch.library.opcheck(ops.conv2d, arguments)
    with torch.no_grad():
        y, mean, var, z, pooled = ops.conv2d(*arguments)
        torch.library.opcheck(
            ops.conv2d_backward,
            (
                torch.randn_like(y), mean, var, torch.randn_like(pooled), y, mean, None, inputs.x0.detach(),
                inputs.affine0.detach(), case.slope[0], inputs.x1.detach(), inputs.affine1.detach(), case.slope[1],
                inputs.weight.detach(), z, case.stride, case.frame, case.offset, case.doubled,
                [True, False, True, True], backend,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("kernel", [2, 3])
def test_opcheck_conv_transpose2d(kernel: int, backend: str, device: str) -> None:
    case = Conv((2, 2, 2, 3), 3, kernel=kernel, bias=True, transposed=True)
    inputs = draw(case, device)
    source = (inputs.x0, inputs.affine0, 0.0)
    torch.library.opcheck(ops.conv_transpose2d, (*source, inputs.weight, inputs.bias, True, backend))
    with torch.no_grad():
        y, mean, var = ops.conv_transpose2d(*source, inputs.weight, inputs.bias, True, backend)
        torch.library.opcheck(
            ops.conv_transpose2d_backward,
            (
                torch.randn_like(y), None, var, y, mean, inputs.x0.detach(), inputs.affine0.detach(), 0.0,
                inputs.weight.detach(), [True, True, True], backend,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("doubled", [False, True])
def test_compiles_to_one_graph(doubled: bool, backend: str, device: str) -> None:
    case = Conv((1, 2, 4, 3), 3)
    inputs = draw(case, device)

    def function(x: Tensor, affine: Tensor, weight: Tensor) -> Tensor:
        source, settings = (x, affine, 0.0), ((4, 3), (0, 0, 0, 0), [doubled, False], True, False, False, None)
        y, mean, var, *_ = ops.conv2d(*source, None, None, 1.0, weight, None, 1, *settings, backend)
        return (y.sum() + mean.sum() + var.sum()) * 2

    check_compiled(function, inputs.x0, inputs.affine0, inputs.weight)


MISFITS = {
    "channels": ({"weight": (4, 5, 3, 3)}, r"weight of shape \(K, 3, 3, 3\) or \(K, 3, 1, 1\).*got \(4, 5, 3, 3\)"),
    "kernel": ({"weight": (4, 3, 5, 5)}, r"weight of shape .* got \(4, 3, 5, 5\)"),
    "bias": ({"bias": (3,)}, r"bias of shape \(4,\), got \(3,\)"),
    "affine": ({"affine0": (3, 2)}, r"affine of shape \(3, 3\) or \(2, 3, 3\) for a source of .*, got \(3, 2\)"),
    "batch": ({"x1": (1, 2, 4, 4), "weight": (4, 5, 3, 3)}, "one batch size, got 2 and 1"),
    "stride": ({"stride": 3}, "stride 1, or 2 for a 3×3 weight, got 3"),
    "doubled": ({"doubled": [True]}, "doubled to be 2 booleans, one for each source, got 1"),
    "doubled-stride-2": ({"doubled": [True, False], "stride": 2}, "under a 3×3 weight with stride 1, got .* stride 2;"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_operands_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, backend: str, device: str) -> None:
    """Kernels compute addresses from sizes: what does not fit must not reach them."""
    shapes: dict[str, Any] = {
        "x0": (2, 3, 4, 4), "affine0": (3, 3), "x1": None, "weight": (4, 3, 3, 3), "bias": (4,), "stride": 1
    } | changes  # fmt: skip
    t = {name: torch.randn(s, device=device) if isinstance(s, tuple) else s for name, s in shapes.items()}
    with pytest.raises(ValueError, match=message) as caught:
        ops.conv2d(
            t["x0"], t["affine0"], 0.0, t["x1"], None, 1.0, t["weight"], t["bias"], t["stride"], (4, 4),
            (0, 0, 0, 0), changes.get("doubled", NONE), False, False, False, None, backend,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [EVEN["1x1"], CASES["few-pixels-of-many-images"]], ids=["1x1", "many-images"])
def test_pixels_too_many_for_one_row(case: Conv, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than 32 bits number stay where they are, in rows and pictures."""
    monkeypatch.setattr(pytest.importorskip("fastunet.kernels.strided"), "MOST_COLUMNS", 10)
    inputs = draw(case, device)
    exact = inputs.to(torch.float64)
    truth, own, result = run(case, exact, None), run(case, inputs, None), run(case, inputs, "triton")
    assert_near(result, truth, own, torch.float32)
    assert_near(
        gradients(result, inputs.leaves), gradients(truth, exact.leaves), gradients(own, inputs.leaves), torch.float32
    )


@pytest.mark.parametrize("name", ["image", "1x1-head"])
def test_a_program_of_many_tiles(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of pictures with millions of pixels: a program walks several tiles, of which the last is not full."""
    for module, constant in (("image", "_PROGRAMS"), ("image", "_SLABS"), ("few", "_PROGRAMS"), ("few", "_ROUNDS")):
        monkeypatch.setattr(pytest.importorskip(f"fastunet.kernels.conv_{module}"), constant, 1)
    inputs = draw(CASES[name], device)
    exact = inputs.to(torch.float64)
    truth, own, result = (run(CASES[name], *of) for of in ((exact, None), (inputs, None), (inputs, "triton")))
    assert_near(result, truth, own, torch.float32)
    assert_near(
        gradients(result, inputs.leaves), gradients(truth, exact.leaves), gradients(own, inputs.leaves), torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize("ones", [False, True], ids=["", "ones"])
def test_what_statistics_add_is_not_lost_in_16_bits(
    ones: bool, pool: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    """A gradient of the mean gives each pixel a fifth of the last digit of the pixel's own gradient. Rounded to the
    nearest, none of it would be left; over all pixels, which the gradient of the bias adds up, it must be all there,
    also where below the gradient digits are half as large as above it."""
    skip_if_unsupported(backend, dtype, device)
    x = torch.ones(1, 1, 64, 48, device=device, dtype=dtype)
    weight = torch.full((2, 1, 1, 1), 0.5, device=device, dtype=dtype, requires_grad=True)
    pools = torch.ones(2, device=device) if pool else None
    y, mean, _, _, p = ops.conv2d(
        x, None, 1.0, None, None, 1.0, weight, None, 1, (64, 48), (0, 0, 0, 0), NONE, 1, True, pool, pools, backend
    )  # fmt: skip
    half = torch.rand(1, 2, 32, 48, device=device).mul(not ones).add(1).to(dtype)  # from 1 to 2: one last digit
    dy = torch.cat((half, -half), 2)
    digit = torch.finfo(dtype).eps
    share = torch.tensor([0.2, -0.2], device=device) * digit
    (found,) = torch.autograd.grad([y, mean, *[p] * pool], weight, [dy, share * 64 * 48, *[torch.zeros_like(p)] * pool])
    torch.testing.assert_close(found.flatten().float(), share * 64 * 48, rtol=0.05, atol=0.0)


def test_statistics_without_a_gradient_stay_so(backend: str, device: str) -> None:
    case = CASES["relu-without-affine"]
    inputs = draw(case, device)
    y, mean, var, z, _ = ops.conv2d(*conv2d_arguments(case, inputs, backend, True))
    assert y.requires_grad
    assert not any(t.requires_grad for t in (mean, var, z))


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_follows_pytorchs_convolutions(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = pytest.importorskip("fastunet.kernels.launching")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert conv.precision(torch.float32) == ("tf32" if allowed else "ieee")
    assert conv.precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["padded-on-all-sides", "transposed-2x2", "1x1-head"])
def test_wide_weights_beside_narrow_sources(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """The same sums as of weights in the sources' dtype, whose gradients are rounded but once: to float32."""
    skip_if_unsupported(backend, dtype, device)
    case = CASES[name]
    narrow = draw(case, device).to(dtype)
    wide = replace(narrow, weight=narrow.weight.detach().float(), bias=narrow.bias.detach().float())
    outputs, expected = run(case, wide, backend), run(case, narrow, backend)
    assert all(map(torch.equal, outputs, expected))
    found, rounded = gradients(outputs, wide.leaves), gradients(expected, narrow.leaves)
    assert [g.dtype for g in found[-2:]] == [torch.float32] * 2
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(found, rounded, strict=True))
    if backend == "triton":
        assert not torch.equal(found[-2], rounded[-2].float())


def test_gradients_that_nobody_wants_are_promised_in_their_dtype(backend: str, device: str) -> None:
    """What a compiler is told of them, as of others, is so: empty, in the weight's dtype, which is not the source's."""
    skip_if_unsupported(backend, torch.float16, device)
    x0, dy = (torch.randn(1, channels, 2, 3, device=device).half() for channels in (2, 3))
    weight, nothing = torch.randn(3, 2, 3, 3, device=device), torch.empty(0, device=device)
    source, given = (x0, None, 1.0, None, None, 1.0), (dy, None, None, None, dy, nothing, None)
    for mask in ([True, False, False, False], [False, False, True, False]):
        more = (weight, x0.new_empty(0), 1, (2, 3), (0, 0, 0, 0), [False, False], mask, backend)
        torch.library.opcheck(ops.conv2d_backward, (*given, *source, *more), test_utils="test_faketensor")
