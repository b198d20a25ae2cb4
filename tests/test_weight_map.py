"""The U-Net paper's weight map against distances to every pixel of every cell, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastunet.losses import DiceCELoss, unet_weight_map


def brute(labels: Tensor, w0: float, sigma: float) -> Tensor:
    """The formula in float64, of one picture."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in labels.shape), indexing="ij")
    distances = []
    for cell in labels.unique()[labels.unique() != 0]:
        y, x = (labels == cell).nonzero().unbind(1)
        squares = (rows.unsqueeze(-1) - y) ** 2 + (columns.unsqueeze(-1) - x) ** 2
        distances.append(squares.amin(-1).double().sqrt())
    if len(distances) < 2:
        return torch.ones(labels.shape, dtype=torch.float64)
    d1, d2 = torch.stack(distances).sort(0)[0][:2]
    return 1 + w0 * torch.exp(-((d1 + d2) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize("sigma", [1.0, 5.0])
@pytest.mark.parametrize("cells", [0, 1, 2, 7])
@pytest.mark.parametrize("density", [0.01, 0.3], ids=["sparse", "dense"])
def test_is_the_papers_formula(density: float, cells: int, sigma: float) -> None:
    labels = torch.randint(0, cells + 1, (2, 23, 31)) * (torch.rand(2, 23, 31) < density)
    expected = torch.stack([brute(picture, 10.0, sigma) for picture in labels])
    weights = unet_weight_map(labels.to(torch.uint8), w0=10.0, sigma=sigma)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-6)  # float32 of numbers up to 11


def test_cells_of_a_bool_mask_are_its_components() -> None:
    labels = torch.zeros(12, 20, dtype=torch.int64)
    labels[1:5, 1:8] = 1
    labels[2:4, 3:6] = 0  # a hole
    labels[5, 8] = 1  # touches by a corner
    labels[6:11, 11:14] = 2
    labels[1:3, 17:] = 3
    torch.testing.assert_close(unet_weight_map(labels > 0), unet_weight_map(labels), rtol=0, atol=0)


def test_a_winding_component_is_one() -> None:
    mask = torch.zeros(41, 41, dtype=torch.bool)
    mask[::4] = True  # a snake: rows joined at alternating ends
    for k, row in enumerate(range(0, 40, 4)):
        mask[row : row + 4, 0 if k % 2 else 40] = True
    assert (unet_weight_map(mask) == 1).all()


def test_classes_have_weights_of_their_own() -> None:
    labels = torch.tensor([[0, 1, 1]])
    assert unet_weight_map(labels, class_weight=(0.5, 2.0)).tolist() == [[0.5, 2.0, 2.0]]


def test_is_a_pixel_weight() -> None:
    labels = torch.randint(0, 3, (2, 8, 9))
    value = DiceCELoss(lambda_dice=0)(torch.randn(2, 2, 8, 9), labels.clamp(max=1), unet_weight_map(labels))
    assert value > 0


def test_no_pixels() -> None:
    assert unet_weight_map(torch.zeros(0, 4, 5, dtype=torch.int64)).shape == (0, 4, 5)


def test_numbers_of_cells_keep_their_64_bits() -> None:
    labels = torch.zeros(1, 24, 30, dtype=torch.int64)
    labels[:, 4:20, 4:14], labels[:, 4:20, 17:27] = 1, 2
    wide = torch.where(labels == 2, 1 + 2**32, torch.where(labels == 1, 2**32, 0))
    torch.testing.assert_close(unet_weight_map(wide), unet_weight_map(labels), rtol=0, atol=0)
    assert (unet_weight_map(labels) > 2).any()
    with pytest.raises(TypeError, match=r"expected labels as a torch\.Tensor, got ndarray"):
        unet_weight_map(labels.numpy())
