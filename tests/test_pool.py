"""max_pool2x2 and pool_fork, on both backends, against nn.MaxPool2d of the normalised values in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sources import DTYPES, LAYOUTS, check_compiled, laid_out, large_gpu, random_affine, skip_if_unsupported, truth
from torch import Tensor

from fastunet import ops

SHAPES = {"1x1x2x2": (1, 1, 2, 2), "3x3x5x7": (3, 3, 5, 7), "2x17x3x4": (2, 17, 3, 4), "1x70x2x9": (1, 70, 2, 9)}


def pooled_truth(x: Tensor, affine: Tensor | None) -> Tensor:
    """The raw values that win, channel by channel, by PyTorch's own max-pool; differentiable."""
    channels = []
    for c in range(x.shape[1]):
        one, scale = x[:, c : c + 1], 1.0 if affine is None else float(affine[0, c])
        if scale == 0:
            channels.append(one[:, :, : one.shape[2] // 2 * 2 : 2, : one.shape[3] // 2 * 2 : 2])
        else:
            channels.append(F.max_pool2d(one, 2) if scale > 0 else -F.max_pool2d(-one, 2))
    return torch.cat(channels, 1)


def gradients(*gradient_shapes: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in gradient_shapes]


def halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], shape[2] // 2, shape[3] // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(
    shape: tuple[int, ...], with_affine: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    skip_if_unsupported(backend, dtype, device)
    # Small integers: most windows have ties, and the winner among equals must be PyTorch's.
    x = torch.randint(-2, 3, shape, device=device).to(dtype).requires_grad_()
    affine = random_affine(shape[1], device) if with_affine else None
    dp, dskip = gradients(halved(shape), shape, dtype=dtype, device=device)
    exact_x = x.detach().double().requires_grad_()
    exact = pooled_truth(exact_x, affine)

    p = ops.max_pool2x2(x, affine, backend)
    torch.testing.assert_close(p.double(), exact, rtol=0, atol=0)
    exact.backward(dp.double())
    p.backward(dp)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=0, atol=0)

    merged = ops.max_pool2x2_backward(x.detach(), affine, dp, dskip, backend)
    torch.testing.assert_close(merged, (exact_x.grad + dskip.double()).to(dtype))  # one rounding of the sum


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.1], ids=["linear", "relu", "leaky"])
def test_equals_pooling_of_the_normalised(slope: float, backend: str, device: str) -> None:
    """The promise of the op: act(affine(pool(x))) = MaxPool2d(act(affine(x))), exactly, for scales of any sign."""
    x = torch.randn(2, 6, 5, 7, device=device)
    affine = random_affine(6, device)
    pooled = truth(ops.max_pool2x2(x, affine, backend), affine, slope)
    torch.testing.assert_close(pooled, F.max_pool2d(truth(x, affine, slope), 2), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, backend: str, device: str) -> None:
    shape = (2, 3, 5, 4)
    x, dskip = (laid_out(shape, each, torch.float32, device) for each in (layout, LAYOUTS[-1 - LAYOUTS.index(layout)]))
    dp = torch.randn(1, 1, 1, 1, device=device).expand(halved(shape))
    affine = random_affine(6, device)[:, ::2]  # three rows that are not dense
    dense = (x.contiguous(), affine.contiguous())
    torch.testing.assert_close(ops.max_pool2x2(x, affine, backend), ops.max_pool2x2(*dense, backend), rtol=0, atol=0)
    torch.testing.assert_close(
        ops.max_pool2x2_backward(x, affine, dp, dskip, backend),
        ops.max_pool2x2_backward(*dense, dp.contiguous(), dskip.contiguous(), backend),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("with_affine", [False, True], ids=["plain", "affine"])
def test_nan_and_infinity(with_affine: bool, backend: str, device: str) -> None:
    """A NaN wins its window whatever the scale, and takes the gradient, as in PyTorch (of two NaNs, the last one)."""
    nan, inf = torch.nan, torch.inf
    windows = [[nan, 1, 2, 3], [1, 2, 3, nan], [1, nan, nan, 9], [inf, -inf, 0, nan], [-inf, -inf, -inf, inf]]
    x = torch.tensor(windows, device=device).view(5, 1, 2, 2).repeat(1, 3, 1, 1)
    affine = torch.tensor([[1.0, -1, 0], [0, 0, 0], [0, 0, 0]], device=device) if with_affine else None
    signed = x if affine is None else torch.stack([x[:, 0], -x[:, 1], x[:, 2]], 1)
    expected, winners = F.max_pool2d(signed, 2, return_indices=True)
    if affine is not None:
        expected[:, 1] *= -1
        flat = ~expected[:, 2].isnan()
        expected[:, 2][flat], winners[:, 2][flat] = x[:, 2, :1, :1][flat], 0
    p = ops.max_pool2x2(x, affine, backend)
    torch.testing.assert_close(p, expected, rtol=0, atol=0, equal_nan=True)
    dx = ops.max_pool2x2_backward(x, affine, torch.ones_like(p), None, backend)
    assert torch.equal(dx.flatten(2).argmax(2), winners.flatten(1))
    assert torch.equal(dx.sum((2, 3)), torch.ones(5, 3, device=device))


@pytest.mark.parametrize("shape", [(1, 3, 3, 5), (2, 2, 2, 2)], ids=["odd", "even"])
def test_either_gradient_may_be_missing(shape: tuple[int, ...], backend: str, device: str) -> None:
    x = torch.randn(shape, device=device)
    dp, dskip = gradients(halved(shape), shape, dtype=torch.float32, device=device)
    zero = torch.zeros_like(x)
    only_pool = ops.max_pool2x2_backward(x, None, dp, None, backend)
    only_skip = ops.max_pool2x2_backward(x, None, None, dskip, backend)
    both = ops.max_pool2x2_backward(x, None, dp, dskip, backend)
    torch.testing.assert_close(only_skip, dskip, rtol=0, atol=0)
    assert only_skip.data_ptr() != dskip.data_ptr()
    torch.testing.assert_close(only_pool + dskip, both, rtol=0, atol=0)
    torch.testing.assert_close(ops.max_pool2x2_backward(x, None, None, None, backend), zero, rtol=0, atol=0)


def test_empty_batch(backend: str, device: str) -> None:
    x = torch.empty(0, 3, 5, 4, device=device)
    affine = random_affine(3, device)
    p = ops.max_pool2x2(x, affine, backend)
    assert p.shape == (0, 3, 2, 2)
    assert ops.max_pool2x2_backward(x, affine, p, x, backend).shape == x.shape


@pytest.mark.parametrize("size", [(1, 4), (4, 1)], ids=["one_row", "one_column"])
def test_too_small_is_refused(size: tuple[int, int], backend: str, device: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"at least 2×2|too small"):
        ops.max_pool2x2(torch.randn(1, 2, *size, device=device), None, backend)


def test_same_bits_every_time(backend: str, device: str) -> None:
    x, dskip = torch.randn(2, 5, 9, 8, device=device), torch.randn(2, 5, 9, 8, device=device)
    dp = torch.randn(2, 5, 4, 4, device=device)
    affine = random_affine(5, device)
    first, second = (ops.max_pool2x2_backward(x, affine, dp, dskip, backend) for _ in range(2))
    assert torch.equal(first, second)


def test_gradcheck(backend: str, device: str) -> None:
    skip_if_unsupported(backend, torch.float64, device)
    # A shuffled grid: no two values are closer than the finite difference.
    x = torch.randperm(2 * 3 * 3 * 5, device=device).double().view(2, 3, 3, 5).requires_grad_()
    affine = random_affine(3, device, torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.max_pool2x2(x, affine, backend), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: ops.pool_fork(x, affine, backend), (x,), fast_mode=True)


@pytest.mark.parametrize("with_affine", [False, True], ids=["plain", "affine"])
def test_opcheck(with_affine: bool, backend: str, device: str) -> None:
    x = laid_out((2, 3, 3, 4), "channels_last", torch.float32, device)
    affine = random_affine(3, device) if with_affine else None
    dp, dskip = gradients((2, 3, 1, 2), (2, 3, 3, 4), dtype=torch.float32, device=device)
    torch.library.opcheck(ops.max_pool2x2, (x.clone().requires_grad_(), affine, backend))
    torch.library.opcheck(ops.max_pool2x2_backward, (x, affine, dp, dskip, backend))
    torch.library.opcheck(ops.max_pool2x2_backward, (x, affine, dp, None, backend))


def test_compiled(backend: str, device: str) -> None:
    affine = random_affine(3, device)

    def pool(x: Tensor) -> Tensor:
        return (ops.max_pool2x2(2 * x, affine, backend) ** 2).sum()

    def fork(x: Tensor) -> Tensor:
        pooled, skip = ops.pool_fork(2 * x, affine, backend)
        return (pooled**2).sum() + (skip**3).sum()

    for function in (pool, fork):
        check_compiled(function, torch.randn(1, 3, 3, 4, device=device))


@pytest.mark.parametrize("used", ["both", "pooled", "skip"])
def test_fork_merges_the_gradients(used: str, backend: str, device: str) -> None:
    """pool_fork(x) is (pool(x), x): the skip shares x's memory, and dx is the sum of the gradients of what was used."""
    start = torch.randn(2, 3, 5, 4, device=device)
    affine = random_affine(3, device)
    x, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    pooled, skip = ops.pool_fork(x, affine, backend)
    assert skip.data_ptr() == x.data_ptr()
    torch.testing.assert_close(skip, x, rtol=0, atol=0)
    losses = {}
    for name, p, s in (("fork", pooled, skip), ("plain", ops.max_pool2x2(plain, affine, backend), plain)):
        parts = {"pooled": (p**2).sum(), "skip": (s**3).sum()}
        losses[name] = sum(parts.values()) if used == "both" else parts[used]
        losses[name].backward()
    torch.testing.assert_close(losses["fork"], losses["plain"], rtol=0, atol=0)
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-6, atol=1e-6)  # one sum, rounded once in either


@large_gpu
def test_beyond_32_bit_offsets(device: str) -> None:
    x = torch.zeros(1, 64, 1026, 32768, dtype=torch.float16, device=device).contiguous(
        memory_format=torch.channels_last
    )
    assert x.numel() > 2**31
    x[0, -1, -1, -1] = 3
    p = ops.max_pool2x2(x, None, "triton")
    assert p[0, -1, -1, -1] == 3
    assert ops.max_pool2x2_backward(x, None, p, x, "triton")[0, -1, -1, -2:].tolist() == [0, 6]
