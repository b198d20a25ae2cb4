"""The U-Net paper's weight map, by an exact distance transform to the two nearest cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.checks import check_number, check_tensor, said


def unet_weight_map(
    labels: Tensor, w0: float = 10.0, sigma: float = 5.0, class_weight: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The U-Net paper's weights of pixels, w_c + w0·exp(−(d1 + d2)² / (2·sigma²)): large where two cells nearly touch.

    d1 and d2 are the Euclidean distances in pixels to the nearest and to the second nearest cell (0 inside a cell);
    where a picture has fewer than two cells the second term is 0. Ronneberger et al. 2015 (arXiv:1505.04597), eq. 2.
    Made for :class:`DiceCELoss`'s ``pixel_weight``; takes about a second for 512×512 on a CPU core: compute it once.

    Args:
        labels: (H, W) or (N, H, W), integer: 0 is background and each cell has a number of its own. Of a bool mask the
            cells are the connected components (of 8 neighbours).
        w0: height of the second term.
        sigma: its width in pixels, > 0.
        class_weight: w_c of background and of cells.

    Returns:
        float32 of the labels' shape, on their device.

    Raises:
        ValueError: another shape, or sigma ≤ 0.
        TypeError: floating-point labels.
    """
    check_tensor("labels", labels)
    if labels.dim() not in (2, 3):
        raise ValueError(f"expected labels of shape (H, W) or (N, H, W), got {tuple(labels.shape)}; reshape them")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"expected integer labels, or a bool mask, got {labels.dtype}; convert them with .long()")
    if not isinstance(class_weight, Sequence) or isinstance(class_weight, str) or len(class_weight) != 2:
        raise TypeError(
            f"expected class_weight as two numbers, of background and of cells, got {said(class_weight)}; pass a pair"
        )
    for name, value in (("w0", w0), ("sigma", sigma), *(("class_weight", weight) for weight in class_weight)):
        check_number(name, value)
    if sigma <= 0:
        raise ValueError(f"expected sigma > 0, got {sigma}; the paper's is 5 pixels")
    if labels.numel() == 0:
        return torch.zeros(labels.shape, device=labels.device)
    cells = labels if labels.dim() == 3 else labels.unsqueeze(0)
    cells = _components(cells) if cells.dtype == torch.bool else cells.to(torch.int64)
    d1, d2 = _two_nearest(cells, math.ceil(7 * sigma))  # farther, the second term is below 3e-11·w0
    border = w0 * torch.exp(-((d1.sqrt() + d2.sqrt()) ** 2) / (2 * sigma**2))
    base = torch.where(cells != 0, class_weight[1], class_weight[0])
    return (base + border).view(labels.shape)


def _components(mask: Tensor) -> Tensor:
    """(N, H, W) bool → int64: 0 outside, and the same number on each connected component (of 8 neighbours)."""
    number = torch.arange(1, mask.numel() + 1, device=mask.device).view(mask.shape) * mask
    while True:
        grown = F.max_pool2d(number.unsqueeze(1), 3, 1, 1).squeeze(1) * mask
        if torch.equal(grown, number):
            return number
        chain = torch.cat([grown.new_zeros(1), grown.flatten()])  # pixel's number → the number it has grown to
        number = chain[chain[grown]]


def _two_nearest(cells: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Squared distances from each pixel to the nearest and second nearest cell of (N, H, W); inf beyond ``reach``.

    First along columns, then along rows over what the columns found: of a column, only its two nearest cells can be
    among the two nearest of all.
    """
    far = torch.full(cells.shape, math.inf, device=cells.device)
    columns = [(torch.where(cells != 0, 0.0, far), cells)]
    rows = _nearest_along(columns, 1, reach)
    (d1, _), (d2, _) = _nearest_along(rows, 2, reach)
    return d1, d2


def _nearest_along(candidates: list[tuple[Tensor, Tensor]], axis: int, reach: int) -> list[tuple[Tensor, Tensor]]:
    """The two nearest different cells of ``candidates`` (squared distance, cell), up to ``reach`` away along axis."""
    first, second = (
        (torch.full_like(candidates[0][0], math.inf), torch.zeros_like(candidates[0][1])) for _ in range(2)
    )
    length = first[0].shape[axis]
    for shift in range(max(-reach, 1 - length), min(reach, length - 1) + 1):
        here = (slice(None),) * axis + (slice(max(0, -shift), length - max(0, shift)),)
        there = (slice(None),) * axis + (slice(max(0, shift), length - max(0, -shift)),)
        for distance, cell in candidates:
            d, k = distance[there] + shift**2, cell[there]
            (d1, k1), (d2, k2) = ((t[here], u[here]) for t, u in (first, second))
            closer, other = d < d1, k != k1
            demoted, better = closer & other, other & (d < d2)
            found = (
                torch.where(demoted, d1, torch.where(better, d, d2)),
                torch.where(demoted, k1, torch.where(better, k, k2)),
            )
            second[0][here], second[1][here] = found
            first[0][here], first[1][here] = torch.where(closer, d, d1), torch.where(closer, k, k1)
    return [first, second]
