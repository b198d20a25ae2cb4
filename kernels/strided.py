"""Convolutions that are not 3×3 of stride 1, as the few forms that their kernels know.

A 2×2 filter of stride 2 is one of 2×1: two pixels that lie side by side in memory are one with twice the channels, and
(C,2,2,K) weights are (C,2,1,2·K) weights. So of stride 2 only 3×3 filters need every second column, in gemm.py WIDE.
"""

from __future__ import annotations

from torch import Tensor

from .common import nhwc

MOST_COLUMNS = 2**30  # of a picture, whose columns 32 bits number, those of a last tile beyond it too


def as_rows(x: Tensor, ksize: int, stride: int, apart: bool) -> Tensor:
    """An NHWC tensor as the filter sees it that has ``stride`` on it: itself if that is 3×3.

    Of 2×2, each row or pair of rows is a picture, and pairs of pixels are one. Of 1×1, all pixels are one row if 32
    bits number them. So the tiles of small pictures come out full; but samples that differ are kept ``apart``.
    """
    if ksize == 3 or (ksize == 1 and x.shape[0] * x.shape[2] * x.shape[3] > MOST_COLUMNS):
        return x
    pixels = x.permute(0, 2, 3, 1)
    batch = x.shape[0] if apart else 1 if ksize == 1 else -1
    shape = (batch, 1, -1) if ksize == 1 else (batch, -1 if apart else stride, pixels.shape[2] // stride)
    return pixels.reshape(*shape, x.shape[1] * stride).permute(0, 3, 1, 2)


def taps(weight: Tensor) -> Tensor:
    """Weights as (first, taps, second), where filters of 2×2 are 2×1."""
    ksize = weight.shape[-1]
    return nhwc(weight).permute(0, 2, 3, 1).reshape(weight.shape[0], 9 if ksize == 3 else ksize, -1)
