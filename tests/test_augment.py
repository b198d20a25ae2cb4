"""The U-Net paper's augmentation: images and masks move alike, masks keep their numbers, borders are mirrors."""

from __future__ import annotations

import math
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastunet.augment import Augmentation
from fastunet.errors import UserError

pytest.importorskip("kornia", reason="part of pip install 'fastunet[augment]'")

SIZE = (96, 128)
STILL = {"shift": 0.0, "rotation": 0.0, "elastic": 0.0, "grey": 0.0, "flips": False}
ONE_BY_ONE = {
    "shift": {"shift": 0.2}, "rotation": {"rotation": 90.0}, "elastic": {"elastic": 6.0}, "flips": {"flips": True},
    "all": {"shift": 0.1, "rotation": 180.0, "elastic": 6.0, "flips": True},
}  # fmt: skip


def places(count: int) -> Tensor:
    """(count, 2, H, W): the row and the column of each pixel."""
    return torch.stack(torch.meshgrid(*map(torch.arange, SIZE), indexing="ij")).expand(count, 2, *SIZE)


@pytest.mark.parametrize("what", ONE_BY_ONE)
def test_masks_move_with_their_images_and_keep_their_numbers(what: str) -> None:
    torch.manual_seed(0)
    rows, columns = places(6).unbind(1)
    cells = columns.long() + 2**40  # as numbers that float32 does not hold
    weight = rows.double() / 7
    images, *masks = Augmentation(**{**STILL, **ONE_BY_ONE[what]})(places(6).float() / 128, rows.byte(), cells, weight)
    assert not torch.equal(masks[0], rows.byte())
    assert [mask.dtype for mask in masks] == [torch.uint8, torch.int64, torch.float64]
    assert torch.equal(masks[0].double() / 7, masks[2])
    assert set(masks[1].unique().tolist()) <= set(cells.unique().tolist())
    # Each of two steps takes the nearest pixel of a mask where it interpolates in an image: half a pixel,
    # and more where the second stretches what the first did.
    for image, mask in ((images[:, 0], masks[0]), (images[:, 1], masks[1] - 2**40)):
        apart = (image * 128 - mask).abs()
        assert apart.mean() < 0.6
        assert apart.max() < 4


def test_grey_values_leave_masks_alone() -> None:
    images, labels = torch.rand(8, 3, *SIZE) - 0.5, torch.randint(0, 255, (8, *SIZE))
    changed, same = Augmentation(**{**STILL, "grey": 0.2})(images, labels)
    assert torch.equal(same, labels)
    for before, after in zip(images, changed, strict=True):
        slope = (after.std() / before.std()).item()
        offset = (after.mean() - slope * before.mean()).item()
        torch.testing.assert_close(after, slope * before + offset)  # and nothing is cut off at 0 or 1
        assert 0.8 <= slope <= 1.2
        assert abs(offset) <= 0.2 * 1.2
        assert abs(offset) + abs(slope - 1) > 1e-3


def test_borders_are_mirrored() -> None:
    images, mask = Augmentation(**{**STILL, "shift": 0.4, "elastic": 10.0})(
        torch.ones(4, 1, *SIZE), torch.ones(4, *SIZE)
    )
    torch.testing.assert_close(images, torch.ones_like(images))
    assert torch.equal(mask, torch.ones_like(mask))


def test_displacements_have_the_pixels_that_are_asked_for() -> None:
    torch.manual_seed(0)
    augment = Augmentation(**{**STILL, "elastic": 5.0})
    moved = augment(places(48).float())[0] - places(48)
    inner = moved[:, :, 32:-32, 32:-32]  # where no border mirrors
    # 48 pictures of a few independent displacements each: a tenth
    torch.testing.assert_close(inner.std((0, 2, 3)), torch.tensor([5.0, 5.0]), rtol=0.3, atol=0)


def test_nothing_is_nothing_and_the_seed_repeats() -> None:
    images, labels = torch.rand(2, 1, *SIZE), torch.randint(0, 3, (2, *SIZE))
    for same, given in zip(Augmentation(**STILL)(images, labels), (images, labels), strict=True):
        assert torch.equal(same, given)
    augment = Augmentation()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(pickle.loads(pickle.dumps(augment))(images.half(), labels))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][1], drawn[2][1])
    assert drawn[0][0].dtype == torch.float16
    assert augment(images[:0], labels[:0])[1].shape == (0, *SIZE)
    assert "rotation=180.0" in repr(augment)
    assert not math.isnan(float(drawn[0][0].sum()))


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "shift": (lambda: Augmentation(shift=2), ValueError, "expected shift from 0 to 1, got 2; 0 turns it off"),
    "elastic": (lambda: Augmentation(elastic=-1), ValueError, "expected elastic as pixels from 0 on, got -1"),
    "flips": (lambda: Augmentation(flips="no"), TypeError, "expected flips to be True or False, got 'no'"),
    "bytes": (
        lambda: Augmentation()(torch.zeros(1, 1, 8, 8).byte()), ValueError, "got torch.uint8 (1, 1, 8, 8); scale them"),
    "mask": (
        lambda: Augmentation()(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 9)),
        ValueError, "expected masks (1, 8, 8) for images (1, 1, 8, 8), got (1, 8, 9); pass those of the same pictures"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_refused(call: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert sentence in str(caught.value)


def test_without_kornia_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(UserError, match=r"pip install 'fastunet\[augment\]'"):
        Augmentation()
