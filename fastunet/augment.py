"""The U-Net paper's augmentation, by kornia: what makes a few dozen annotated pictures enough.

``pip install 'fastunet[augment]'`` brings kornia. Images and masks are moved together; masks keep their exact values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastunet.checks import check_flags, check_number, check_tensor
from fastunet.errors import UserError

_EXACT = 1 << 24  # integers up to here are float32 numbers, which kornia's masks are


class Augmentation(nn.Module):
    """Random shift, rotation, elastic deformation, grey values and flips, of images and what belongs to their pixels.

    What comes into the picture at a border is its mirror image. Each picture of a batch is drawn anew, from PyTorch's
    global generator: ``torch.manual_seed`` repeats it. Images are interpolated bilinearly; masks take the nearest
    pixel.

    Args:
        shift: the farthest shift along each axis, as a share of the side.
        rotation: the largest angle, in degrees, either way.
        elastic: standard deviation of the smooth displacements, in pixels.
        grey: how far brightness and contrast vary, as a share: 0.2 scales an image by 0.8 to 1.2 and adds −0.2 to 0.2.
        flips: mirror half of the pictures, along each axis.
        zero turns an augmentation off.

    Raises:
        UserError: kornia cannot be imported.
        ValueError, TypeError: a number out of range.

    Source: Ronneberger et al. 2015 (arXiv:1505.04597), section 3.1. Its displacements of 10 pixels are drawn on a grid
    of 3×3 and interpolated; here they are noise, smoothed over a sixth of the side.
    """

    def __init__(
        self,
        *,
        shift: float = 0.1,
        rotation: float = 180.0,
        elastic: float = 10.0,
        grey: float = 0.2,
        flips: bool = True,
    ):
        super().__init__()
        for name, value, most in (("shift", shift, 1), ("rotation", rotation, 180), ("grey", grey, 1)):
            check_number(name, value)
            if not 0 <= value <= most:
                raise ValueError(f"expected {name} from 0 to {most}, got {value}; 0 turns it off")
        check_number("elastic", elastic)
        if elastic < 0:
            raise ValueError(f"expected elastic as pixels from 0 on, got {elastic}; 0 turns it off")
        check_flags(flips=flips)
        self.shift, self.rotation, self.elastic, self.grey, self.flips = shift, rotation, elastic, grey, bool(flips)
        _imported()
        self._made: dict[tuple[int, int, int], Any] = {}

    def extra_repr(self) -> str:
        names = ("shift", "rotation", "elastic", "grey", "flips")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @torch.no_grad()
    def forward(self, images: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
        """(images, *masks), all of a batch moved alike.

        Args:
            images: (N, C, H, W), floating-point; between 0 and 1, or standardised, for ``grey``'s sake.
            masks: (N, H, W) each: labels, with their ignore_index, or numbers of cells, or weights of pixels; of any
                dtype.
        """
        check_tensor("images", images)
        if images.dim() != 4 or not images.is_floating_point():
            raise ValueError(
                f"expected images (N, C, H, W) of floating-point numbers, got {images.dtype} {tuple(images.shape)}; "
                "scale them, for example images.float() / 255"
            )
        for mask in masks:
            check_tensor("masks", mask)
            if mask.shape != images[:, 0].shape:
                raise ValueError(
                    f"expected masks {tuple(images[:, 0].shape)} for images {tuple(images.shape)}, got "
                    f"{tuple(mask.shape)}; pass those of the same pictures"
                )
        if images.numel() == 0:
            return images, *masks
        augment = self._for(images.shape[2], images.shape[3], len(masks))
        # Large numbers, as of cells, are exact as places in a list.
        listed = [_listed(mask) for mask in masks]
        moved = augment(images.float(), *(index.float().unsqueeze(1) for _, index in listed))
        image, *rest = moved if masks else [moved]
        taken = [
            index.squeeze(1).to(mask.dtype) if values is None else values[index.squeeze(1).long()]
            for mask, (values, _), index in zip(masks, listed, rest, strict=True)
        ]
        return image.to(images.dtype), *taken

    def _for(self, height: int, width: int, masks: int) -> Any:
        """kornia's composition for pictures of this size, and so many masks."""
        if (height, width, masks) not in self._made:
            kornia, of_masks = _imported()
            mirrored, always = {"padding_mode": "reflection", "align_corners": False}, {"p": 1.0}
            steps: list[Any] = []
            if self.flips:
                steps += [kornia.RandomHorizontalFlip(p=0.5), kornia.RandomVerticalFlip(p=0.5)]
            if self.shift or self.rotation:
                steps.append(kornia.RandomAffine(float(self.rotation), (self.shift, self.shift), **mirrored, **always))
            if self.elastic:
                deviations = max(height / 6, 1.0), max(width / 6, 1.0)
                sizes = tuple(2 * math.ceil(2 * deviation) + 1 for deviation in deviations)
                # Uniform noise of ±1 has the deviation 1/√3; smoothed by s along both axes, 1/(2·√π·s) of it is left.
                left = 1 / (2 * math.sqrt(3 * math.pi * deviations[0] * deviations[1]))
                alpha = tuple(self.elastic / (side / 2) / left for side in (width, height))  # the sides are 2 long
                steps.append(kornia.RandomElasticTransform(sizes, deviations, alpha, **mirrored, **always))
            if self.grey:
                span = (1 - self.grey, 1 + self.grey)
                steps += [
                    kornia.RandomContrast(span, clip_output=False, **always),
                    kornia.RandomBrightness(span, clip_output=False, **always),
                ]
            self._made[height, width, masks] = kornia.AugmentationSequential(
                *steps, data_keys=["input", *["mask"] * masks], extra_args=of_masks
            )
        return self._made[height, width, masks]


def _listed(mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """(None, mask) if float32 holds each of its numbers, else (its values in order, the place of each pixel's)."""
    wide = mask.dtype.itemsize > 2 and mask.dtype != torch.float32
    if not wide or (not mask.is_floating_point() and bool((mask.abs() <= _EXACT).all())):
        return None, mask
    values, places = torch.unique(mask, return_inverse=True)
    return values, places


def _imported() -> tuple[Any, Any]:
    """(kornia.augmentation, how it resamples masks)."""
    try:
        import kornia.augmentation
        from kornia.constants import DataKey, Resample
    except ImportError as error:
        raise UserError("augmentation needs kornia, which is not installed: pip install 'fastunet[augment]'") from error
    return kornia.augmentation, {DataKey.MASK: {"resample": Resample.NEAREST, "align_corners": False}}
