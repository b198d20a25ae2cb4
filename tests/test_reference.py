"""The reference: known parameter counts and keys, and each formula against an independent spelling of it."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import reference
from fastunet.reference import functional as RF

# Parameters, state_dict entries, and the start of a SHA-256 over the lines "key:shape" in state_dict order. The first
# three and "brain" are those of published checkpoints, the rest those of the networks they are named after.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, int, str]] = {
    "milesial": (lambda: reference.UNet(3, 2), 31_037_698, 118, "1c4f4be753543b87"),
    "milesial-bilinear": (lambda: reference.UNet(3, 2, bilinear=True), 17_263_042, 110, "0c75d27836954621"),
    "milesial-v1": (lambda: reference.UNet(3, 2, True, conv_bias=True), 17_267_458, 128, "81b2cb9c4f442636"),
    "brain": (reference.BrainUNet, 7_763_041, 118, "a81fae7751ab77be"),
    "seed000": (reference.StridedUNet, 37_665_027, 184, "7b6405c6a242bbb6"),
    "seed001": (lambda: reference.UNet001(19), 31_038_803, 118, "f03e19da4d298ee1"),
    "seed001-bilinear": (lambda: reference.UNet001(19, bilinear=True), 17_264_147, 110, "2f5d814e662e360d"),
    "seed002": (lambda: reference.UNet(3, 22), 31_038_998, 118, "598e9b06d533e698"),
    "seed002-bilinear": (lambda: reference.UNet(3, 22, bilinear=True), 17_264_342, 110, "81aba71a8f2bca12"),
    "seed004": (lambda: reference.PlainUNet(3, 1), 7_760_097, 46, "d4b2352b5d09b7d6"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_count_and_state_dict_keys(name: str) -> None:
    build, parameters, entries, digest = ARCHITECTURES[name]
    with torch.device("meta"):
        model = build()
    state = model.state_dict()
    lines = "\n".join(f"{key}:{'x'.join(map(str, value.shape))}" for key, value in state.items())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(state) == entries
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("milesial", ["inc.double_conv.0.weight", "down1.maxpool_conv.1.double_conv.4.running_var", "up4.up.bias"]),
        ("milesial-v1", ["inc.double_conv.0.bias", "up1.conv.double_conv.3.bias", "outc.conv.weight"]),
        ("brain", ["encoder1.enc1conv1.weight", "bottleneck.bottlenecknorm2.running_mean", "conv.bias"]),
        ("seed000", ["d1.Conv_BN_ReLU_2.3.bias", "d4.downsample.0.weight", "u1.upsample.1.running_var", "o.6.weight"]),
        ("seed001", ["conv1.double_conv.0.weight", "down4.down.1.double_conv.3.weight", "outc.co.0.bias"]),
        ("seed004", ["encoder1.0.weight", "bottleneck.2.bias", "upconv4.weight", "decoder1.2.weight", "output.bias"]),
    ],
)
def test_some_keys_by_name(name: str, keys: list[str]) -> None:
    with torch.device("meta"):
        state = ARCHITECTURES[name][0]().state_dict()
    assert set(keys) <= set(state)


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "unet": (lambda: reference.UNet(3, 2, base_c=4), (3, 37, 53)),
    "unet-bilinear": (lambda: reference.UNet(1, 5, bilinear=True, base_c=4), (1, 16, 20)),
    "seed001": (lambda: reference.UNet001(6, base_c=4), (3, 37, 20)),
    "strided": (lambda: reference.StridedUNet(base_c=4), (3, 32, 16)),
    "plain": (lambda: reference.PlainUNet(3, 2, 4), (3, 16, 32)),
    "brain": (lambda: reference.BrainUNet(init_features=4), (3, 32, 16)),
}


@pytest.mark.parametrize("name", SMALL)
def test_output_shape_and_gradient_to_every_parameter(name: str) -> None:
    build, size = SMALL[name]
    model = build()
    y = model(torch.randn(2, *size))
    assert y.shape[0] == 2
    assert y.shape[2:] == size[1:]
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["strided", "brain"])
def test_sigmoid_heads_return_probabilities(name: str) -> None:
    build, size = SMALL[name]
    y = build()(3 * torch.randn(2, *size))
    assert bool(((y > 0) & (y < 1)).all())


@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
def test_seed001_is_the_same_function_under_other_names(bilinear: bool) -> None:
    ours, theirs = reference.UNet(3, 4, bilinear, base_c=4), reference.UNet001(4, bilinear, base_c=4)
    renamed = reference.rename_keys(theirs.state_dict(), "milesial")
    assert list(renamed) == list(ours.state_dict())
    assert list(reference.rename_keys(renamed, "seed001")) == list(theirs.state_dict())
    assert list(reference.rename_keys(renamed, "milesial")) == list(renamed)
    ours.load_state_dict(renamed)
    x = torch.randn(2, 3, 21, 35)
    assert torch.equal(ours(x), theirs(x))


def test_rename_keys_refuses_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match=r"expected layout to be one of milesial, seed001, got 'x'"):
        reference.rename_keys({}, "x")


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# float64 throughout: the two spellings differ by a few roundings of 1e-16, times sums of a few hundred terms.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def test_conv_with_lazy_batch_norm_is_conv_bn_relu_conv() -> None:
    x, first, second, gamma, beta = _rand(2, 3, 5, 7), _rand(4, 3, 3, 3), _rand(2, 4, 3, 3), _rand(4), _rand(4)
    y, mean, var = RF.conv2d(x, None, 1.0, None, None, 1.0, first, None, 1, (5, 7), (0, 0, 0, 0), (False, False), True)
    affine = RF.bn_affine(mean, var, gamma, beta, 1e-5)
    z, *_ = RF.conv2d(y, affine, 0.0, None, None, 1.0, second, None, 2, (5, 7), (0, 0, 0, 0), (False, False), False)
    plain = F.conv2d(RF.conv_bn_relu(x, first, gamma, beta, training=True), second, stride=2, padding=1)
    torch.testing.assert_close(z, plain, **CLOSE)
    operands, direction = (x, first, second, gamma, beta), torch.randn_like(z)
    expected = torch.autograd.grad(plain, operands, direction, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(z, operands, direction), expected, **CLOSE)


def test_conv_of_two_placed_sources_is_pad_cat_conv() -> None:
    skip, up, weight, bias = _rand(2, 3, 7, 5), _rand(2, 2, 6, 6), _rand(4, 5, 3, 3), _rand(4)
    y, *_ = RF.conv2d(skip, None, 0.0, up, None, 1.0, weight, bias, 1, (7, 5), (0, 0, 0, -1), (False, False), False)
    z = torch.cat([skip.relu(), F.pad(up[..., 1:], [0, 0, 0, 1])], 1)
    torch.testing.assert_close(y, F.conv2d(z, weight, bias, padding=1), **CLOSE)


@pytest.mark.parametrize("kernel", [2, 3])
def test_conv_transpose_doubles_the_size_and_is_the_adjoint_of_a_strided_conv(kernel: int) -> None:
    x, weight, probe = _rand(2, 3, 4, 5), _rand(3, 2, kernel, kernel), _rand(2, 2, 8, 10)
    y, mean, var = RF.conv_transpose2d(x, None, 1.0, weight, None, True)
    adjoint = F.conv2d(probe, weight, stride=2, padding=kernel - 2)
    torch.testing.assert_close((y * probe).sum(), (x * adjoint).sum(), **CLOSE)
    torch.testing.assert_close((mean, var), (y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)), **CLOSE)


def test_max_pool_is_taken_after_the_affine() -> None:
    x = _rand(1, 3, 4, 5)
    affine = torch.tensor([[2.0, -1.0, 0.0], [1.0, 2.0, 3.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
    p = RF.max_pool2x2(x, affine, 1.0)
    windows = x[..., :4].unflatten(2, (2, 2)).unflatten(4, (2, 2))
    high, low = windows.amax((3, 5)), windows.amin((3, 5))
    torch.testing.assert_close(p[:, 0], 2 * (high[:, 0] - 0.5) + 1, **CLOSE)
    torch.testing.assert_close(p[:, 1], 2 - low[:, 1], **CLOSE)
    torch.testing.assert_close(p[:, 2], torch.full_like(p[:, 2], 3.0), **CLOSE)


@pytest.mark.parametrize("skip_first", [True, False])
def test_upsample_concat_places_the_larger_margin_below_and_right(skip_first: bool) -> None:
    x, skip = _rand(1, 2, 2, 3), _rand(1, 3, 7, 5)
    y = RF.upsample_concat(x, None, 1.0, skip, None, 0.0, True, skip_first)
    up = y[:, 3:] if skip_first else y[:, :2]
    assert torch.equal(y[:, :3] if skip_first else y[:, 2:], skip.relu())
    assert not up[:, :, :1].any()
    assert not up[:, :, 5:].any()
    full = RF.upsample_concat(x, None, 1.0, None, None, 1.0, True, True)
    assert torch.equal(up[:, :, 1:5], full[..., 1:])
    torch.testing.assert_close(full[..., ::3, ::5], x[..., ::1, ::2], **CLOSE)  # aligned corners keep the corners


def test_dice_loss_and_soft_miou_by_hand() -> None:
    """Two pixels, two classes: p(class 1) = 3/4 and 1/4, labels 1 and 0, so tp = 3/4, fp = fn = 1/4 in both classes."""
    logits = torch.tensor([3.0, 1 / 3], dtype=torch.float64).log().view(1, 1, 1, 2)
    logits = torch.cat([torch.zeros_like(logits), logits], 1)
    labels = torch.tensor([[[1, 0]]])
    torch.testing.assert_close(RF.dice_loss(logits, labels, smooth=0.0).item(), 1 - 1.5 / 2)
    torch.testing.assert_close(RF.dice_loss(logits, labels, beta=2.0, smooth=0.5).item(), 1 - 4.25 / 5.5)
    torch.testing.assert_close(RF.soft_miou(logits, labels, smooth=0.0).item(), 0.75 / 1.25)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_softmax_stats_give_cross_entropy_and_the_dice_loss(weighted: bool) -> None:
    logits, labels = _rand(2, 4, 5, 7), torch.randint(0, 4, (2, 5, 7))
    dropped = torch.rand(2, 5, 7) < 0.3
    weight = torch.rand(2, 5, 7, dtype=torch.float64) if weighted else None
    stats = RF.softmax_stats(logits, labels.masked_fill(dropped, 255), weight, "softmax", 255, [True] * 3).sum(0)
    kept = ~dropped if weight is None else ~dropped * weight
    expected = (F.cross_entropy(logits, labels, reduction="none") * kept).sum() / kept.sum()
    torch.testing.assert_close(stats[:, 4].sum() / stats[:, 5].sum(), expected, **CLOSE)
    tp, p, y, *_ = RF.softmax_stats(logits, labels, None, "softmax", -1, [False] * 3).sum(0).unbind(1)
    torch.testing.assert_close(1 - ((2 * tp + 1e-5) / (p + y + 1e-5)).mean(), RF.dice_loss(logits, labels), **CLOSE)
    squares = RF.softmax_stats(logits, labels, weight, "softmax", -1, [True, False, False])[..., 3]
    torch.testing.assert_close(squares, logits.softmax(1).square().sum((2, 3)), **CLOSE)


def test_sigmoid_stats_give_binary_cross_entropy() -> None:
    logits, labels = _rand(2, 3, 5, 7), torch.randint(0, 2, (2, 3, 5, 7))
    ignored = torch.rand(2, 3, 5, 7) < 0.3
    weight = torch.rand(2, 5, 7, dtype=torch.float64)
    stats = RF.softmax_stats(logits, labels.masked_fill(ignored, -1), weight, "sigmoid", -1, [True] * 3)
    ce = F.binary_cross_entropy_with_logits(logits, labels.double(), weight.unsqueeze(1), reduction="none")
    torch.testing.assert_close(stats[..., 4], (ce * ~ignored).sum((2, 3)), **CLOSE)
    torch.testing.assert_close(stats[..., 5], (weight.unsqueeze(1) * ~ignored).sum((2, 3)), **CLOSE)
    p, y = logits.sigmoid() * ~ignored, labels * ~ignored
    expected = torch.stack([v.sum((2, 3)) for v in (p * y, p, y.double(), p * p)], 2)
    torch.testing.assert_close(stats[..., :4], expected, **CLOSE)


def test_confusion_matrix_counts_labels_by_row_and_skips_ignored() -> None:
    labels = torch.tensor([[[0, 1, 1, 255, 7]]])
    logits = torch.tensor([[[[5.0, 0.0, 5.0, 0.0, 5.0]], [[1.0, 1.0, 1.0, 1.0, 1.0]]]])  # 0, 1, 0, 1, 0
    expected = torch.tensor([[1, 0], [1, 1], [1, 0]])
    assert torch.equal(RF.confusion_matrix(logits, labels, 255, 0.0), expected)
    assert torch.equal(RF.confusion_matrix(4 - logits[:, :1], labels, 255, 0.0), expected)
