"""upsample_concat, on both backends, against F.interpolate, F.pad and torch.cat in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sources import DTYPES, LAYOUTS, check_compiled, laid_out, large_gpu, random_affine, skip_if_unsupported, truth
from torch import Tensor, nn

from benchmarks.trace import trace
from fastunet import ops
from fastunet.activation import Activation, Context
from fastunet.blocks import enlarge

# (shape of x, channels of skip, its rows and columns beyond 2H and 2W)
CASES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "up_only": ((3, 3, 3, 5), 0, 0, 0),
    "one_pixel": ((1, 1, 1, 1), 1, 0, 0),
    "one_row": ((2, 2, 1, 4), 3, 1, 0),
    "same_size": ((1, 17, 2, 3), 5, 0, 0),
    "odd_skip": ((1, 3, 3, 2), 4, 1, 1),
    "padded_unevenly": ((2, 2, 2, 3), 1, 5, 2),
    "cropped": ((1, 3, 4, 3), 2, -3, -1),
    "padded_and_cropped": ((1, 1, 2, 3), 3, 3, -3),
    "many_channels": ((1, 70, 2, 2), 66, -1, 1),
}

# float32: some ten roundings of values of order 10. 16 bits: ATen rounds z before it interpolates and again after, and
# once more for each gradient on the way; the kernels round once.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def sources(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor | None]:
    shape, skip_channels, more_rows, more_columns = CASES[case]
    skip_shape = (shape[0], skip_channels, 2 * shape[2] + more_rows, 2 * shape[3] + more_columns)
    x, skip = (torch.randn(each, device=device).to(dtype) for each in (shape, skip_shape))
    return x, skip if skip_channels else None


def upsampled_truth(
    x: Tensor,
    affine: Tensor | None,
    slope: float,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    skip_slope: float,
    align_corners: bool | None,
    skip_first: bool,
) -> Tensor:
    mode = "nearest" if align_corners is None else "bilinear"
    up = F.interpolate(truth(x, affine, slope), scale_factor=2, mode=mode, align_corners=align_corners)
    if skip is None:
        return up
    rows, columns = (skip.shape[i] - up.shape[i] for i in (2, 3))
    up = F.pad(up, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
    parts = [truth(skip, skip_affine, skip_slope), up]
    return torch.cat(parts if skip_first else parts[::-1], 1)


def check(args: tuple[Any, ...], dtype: torch.dtype, backend: str) -> None:
    """Value and all gradients of one call against float64."""
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
    actual, exact = list(args), list(args)
    for i in tensors:
        actual[i] = args[i].detach().clone().requires_grad_()
        exact[i] = args[i].detach().double().requires_grad_()
    y = ops.upsample_concat(*actual, backend)
    expected = upsampled_truth(*exact)
    dy = torch.randn_like(expected).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    tolerance = ROUNDING[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for i in tensors:
        # A gradient sums up to 16 terms per element, that of an affine all pixels: hence 4 times the rounding of one.
        torch.testing.assert_close(
            actual[i].grad.double(),
            exact[i].grad,
            rtol=4 * tolerance,
            atol=4 * tolerance,
            msg=lambda m, i=i: f"{i}: {m}",
        )


@pytest.mark.parametrize("align_corners", [False, True, None], ids=["half_pixel", "align_corners", "nearest"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case: str, align_corners: bool | None, backend: str, device: str) -> None:
    x, skip = sources(case, torch.float32, device)
    affine = random_affine(x.shape[1], device)
    skip_affine = None if skip is None else random_affine(skip.shape[1], device)
    check((x, affine, 0.0, skip, skip_affine, 0.0, align_corners, True), torch.float32, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    skip_if_unsupported(backend, dtype, device)
    x, skip = sources("odd_skip", dtype, device)
    check((x, random_affine(3, device), 0.0, skip, random_affine(4, device), 0.0, True, True), dtype, backend)


@pytest.mark.parametrize("skip_first", [False, True], ids=["up_first", "skip_first"])
@pytest.mark.parametrize("normalised", ["neither", "up", "skip"])
def test_either_source_may_be_plain(normalised: str, skip_first: bool, backend: str, device: str) -> None:
    x, skip = sources("odd_skip", torch.float32, device)
    affine = random_affine(3, device) if normalised == "up" else None
    skip_affine = random_affine(4, device) if normalised == "skip" else None
    args = (
        x,
        affine,
        0.0 if normalised == "skip" else 1.0,
        skip,
        skip_affine,
        0.0 if normalised == "up" else 1.0,
        False,
        skip_first,
    )
    check(args, torch.float32, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, backend: str, device: str) -> None:
    other = LAYOUTS[-1 - LAYOUTS.index(layout)]
    x, skip = (
        laid_out(shape, each, torch.float32, device) for shape, each in (((2, 3, 1, 2), layout), ((2, 2, 2, 5), other))
    )
    affine = random_affine(6, device)[:, ::2]  # three rows that are not dense
    dy = laid_out((2, 5, 2, 5), layout, torch.float32, device)
    sliced = (x, affine, 0.0, skip, None, 1.0, True, True, backend)
    dense = (x.contiguous(), affine.contiguous(), 0.0, skip.contiguous(), None, 1.0, True, True, backend)
    # ATen's order of sums and use of fused multiply-adds depend on the layout: hence a few roundings.
    torch.testing.assert_close(ops.upsample_concat(*sliced), ops.upsample_concat(*dense), rtol=1e-5, atol=1e-5)
    for actual, expected in zip(
        ops.upsample_concat_backward(dy, *sliced), ops.upsample_concat_backward(dy.contiguous(), *dense), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_coordinates_are_exact(device: str) -> None:
    """On pixels 0, 1, 0, 1, … the value is λ or 1 − λ itself: right to the last digit however far from the origin.

    A coordinate o·(W − 1)/(2W − 1) rounded in float32, as in PyTorch, would cost λ about 1e-5 here.
    """
    x = torch.arange(2 * 151, dtype=torch.float32, device=device).remainder(2).view(1, 1, 1, -1)
    y = ops.upsample_concat(x, None, 1.0, None, None, 1.0, True, False, "triton")
    exact = upsampled_truth(x.double(), None, 1.0, None, None, 1.0, True, False)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-7)  # the division and 1 − λ, one rounding each


def test_wide_rows(device: str) -> None:
    """Rows of several tiles and of several programs in the backward, the last of them ragged."""
    x, skip = torch.randn(1, 2, 1, 531, device=device), torch.randn(1, 1, 2, 1060, device=device)
    check((x, random_affine(2, device), 1.0, skip, None, 0.0, False, False), torch.float32, "triton")


@pytest.mark.parametrize("align_corners", [False, True], ids=["half_pixel", "align_corners"])
def test_nan_stays_where_it_is(align_corners: bool, backend: str, device: str) -> None:
    """A NaN or an infinity passes the ReLU and reaches the outputs it has a weight in, but not the padding or the skip.

    (PyTorch multiplies some neighbours by a weight of zero, so that there a NaN spreads one output further.)
    """
    x, skip = torch.zeros(1, 2, 3, 3, device=device), torch.zeros(1, 1, 8, 8, device=device)
    x[0, 0, 1, 1], x[0, 1, 1, 1] = torch.nan, torch.inf
    y = ops.upsample_concat(x, None, 0.0, skip, None, 1.0, align_corners, True, backend)
    # Outputs 1 to 4 of 6 lie between source 1 and one of its neighbours; the picture starts at (1, 1).
    assert y[0, 1, 2:6, 2:6].isnan().all()
    assert y[0, 2, 2:6, 2:6].isinf().all()
    assert torch.equal(y[:, :1], skip)
    assert torch.equal(y[..., [0, -1], :], torch.zeros(1, 3, 2, 8, device=device))
    if backend == "triton":
        assert int((y[0, 1:] != 0).sum()) == 2 * 16


def test_nan_stays_in_its_own_outputs_of_nearest(backend: str, device: str) -> None:
    x = torch.zeros(1, 1, 3, 3, device=device)
    x[0, 0, 1, 1] = torch.nan
    x.requires_grad_()
    y = ops.upsample_concat(x, None, 1.0, None, None, 1.0, None, True, backend)
    assert y[0, 0, 2:4, 2:4].isnan().all()
    assert int(y.isnan().sum()) == 4
    dy = torch.zeros_like(y)
    dy[0, 0, 0, 0] = torch.nan
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.isnan().flatten().tolist() == [True] + 8 * [False]


@pytest.mark.parametrize("align_corners", [False, True, None], ids=["half_pixel", "align_corners", "nearest"])
def test_an_upsample_module_runs_lazily(align_corners: bool | None, device: str) -> None:
    module = nn.Upsample(scale_factor=2, mode="nearest" if align_corners is None else "bilinear")
    module.align_corners = align_corners
    x, affine = torch.randn(1, 3, 4, 5, device=device), random_affine(3, device)
    with trace() as calls:
        placed = enlarge(module, Activation(x, affine, 0.0), Context("torch"))
        assert placed.doubled[0] == (align_corners is None and not calls)  # left to the convolution that reads it
        up = placed.whole(Context("torch"))
    assert [call.name for call in calls] == ["fastunet.upsample_concat"]
    torch.testing.assert_close(up.x, module(truth(x, affine, 0.0)), rtol=1e-5, atol=1e-5)


def test_empty_batch(backend: str, device: str) -> None:
    x, skip = torch.empty(0, 3, 2, 3, device=device), torch.empty(0, 2, 5, 6, device=device)
    affine = random_affine(3, device)
    args = (x, affine, 0.0, skip, random_affine(2, device), 0.0, True, True, backend)
    y = ops.upsample_concat(*args)
    assert y.shape == (0, 5, 5, 6)
    dx, daffine, dskip, dskip_affine = ops.upsample_concat_backward(y, *args)
    assert (dx.shape, dskip.shape) == (x.shape, skip.shape)
    assert daffine.tolist() == [[0] * 3] * 3
    assert dskip_affine.tolist() == [[0] * 2] * 3


def test_same_bits_every_time(backend: str, device: str) -> None:
    x, skip = sources("padded_and_cropped", torch.float32, device)
    args = (x, random_affine(1, device), 0.0, skip, random_affine(3, device), 0.0, True, True, backend)
    first = ops.upsample_concat(*args)
    assert torch.equal(first, ops.upsample_concat(*args))
    if backend == "torch" and device == "cuda":
        pytest.skip("PyTorch's bilinear backward adds with atomics on a GPU")
    once, again = (ops.upsample_concat_backward(first, *args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("align_corners", [False, True, None], ids=["half_pixel", "align_corners", "nearest"])
def test_gradcheck(align_corners: bool | None, backend: str, device: str) -> None:
    skip_if_unsupported(backend, torch.float64, device)
    x, skip = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((1, 2, 2, 1), (1, 1, 3, 1))
    )
    affine, skip_affine = (random_affine(c, device, torch.float64).requires_grad_() for c in (2, 1))

    def function(x: Tensor, affine: Tensor, skip: Tensor, skip_affine: Tensor) -> Any:
        return ops.upsample_concat(x, affine, 0.0, skip, skip_affine, 0.0, align_corners, True, backend)

    assert torch.autograd.gradcheck(function, (x, affine, skip, skip_affine), fast_mode=True)


@pytest.mark.parametrize("with_skip", [False, True], ids=["up_only", "skip"])
def test_opcheck(with_skip: bool, backend: str, device: str) -> None:
    x = torch.randn(2, 2, 1, 1, device=device)
    skip = torch.randn(2, 1, 2, 3, device=device) if with_skip else None
    affine = random_affine(x.shape[1], device)
    rest = (1.0, True, True, backend)
    differentiable = [t.clone().requires_grad_() if t is not None else None for t in (x, affine, skip)]
    torch.library.opcheck(ops.upsample_concat, (*differentiable[:2], True, differentiable[2], None, *rest))
    dy = torch.randn_like(ops.upsample_concat(x, affine, 0.0, skip, None, *rest))
    torch.library.opcheck(ops.upsample_concat_backward, (dy, x, affine, 0.0, skip, None, *rest))


def test_compiled(backend: str, device: str) -> None:
    def function(x: Tensor, affine: Tensor, skip: Tensor) -> Tensor:
        return (ops.upsample_concat(2 * x, affine, 0.0, 2 * skip, None, 0.0, True, True, backend) ** 2).sum()

    x, skip = torch.randn(1, 2, 1, 2, device=device), torch.randn(1, 1, 2, 3, device=device)
    check_compiled(function, x, random_affine(2, device), skip)


@large_gpu
def test_beyond_32_bit_offsets(device: str) -> None:
    x = torch.zeros(1, 64, 513, 16384, dtype=torch.float16, device=device)
    x[0, -1, -1, -1] = 3
    y = ops.upsample_concat(x, None, 1.0, None, None, 1.0, True, True, "triton")
    assert y.numel() > 2**31
    assert y[0, -1, -1, -1] == 3
    dx, *_ = ops.upsample_concat_backward(y, x, None, 1.0, None, None, 1.0, True, True, "triton")
    assert dx[0, -1, -1, -1] > 3
