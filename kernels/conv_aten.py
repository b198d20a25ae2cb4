"""3×3 convolutions whose matrix products are ATen's (cuDNN on a GPU), between edges in Triton.

    z = act(scale·(x − centre) + shift) of each source in its place, 0 beyond it     a pass a source
    y = conv(z, W) + bias;  mean and variance of y                                    a product, a pass over y
    g = the convolution's gradient of dY;  dx, daffine                                a product, a pass a source
    dW = the convolution's gradient of dY and z                                       a product

For layers with so many channels that a product outweighs these passes and cuDNN's is the faster one: which ones, says
the table (:mod:`fastunet.kernels.table`). z lives as long as the call: the backward normalises again.

Layout: activations NHWC, weights (K,3,3,C). Bytes, beside the product's own: reads each source and writes z, which the
product reads instead; reads y for its statistics; writes and reads g. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.layout import frame

from . import doubled
from .affine import affine_gradient, flat_tile, no_gradients, source_gradient, store_value
from .common import Source, affine_of, cdiv, empty_nhwc, load_affine, nhwc, normalise
from .launching import accumulator, launch
from .statistics import stats_of

aten = torch.ops.aten


@triton.jit(do_not_specialize=["pixels", "H", "W", "top", "left", "P", "Q"])
def _place_kernel(
    x_ptr, affine_ptr, z_ptr, pixels, H, W, top, left, P, Q, C, C_FIRST, C_TOTAL,
    SLOPE: tl.constexpr, SAMPLES: tl.constexpr, ZOOM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channels C_FIRST … of z in the frame (P, Q), from a source (H, W) placed at (top, left): of so many ``pixels`` of
    the batch, or of each sample. With a ZOOM each pixel in memory is as many rows and columns of the source."""
    memory_h = H
    memory_w = W
    if ZOOM is not None:
        memory_h //= ZOOM
        memory_w //= ZOOM
    if SAMPLES:
        n = tl.program_id(2).to(tl.int64)
        x_ptr += n * memory_h * memory_w * C
        z_ptr += n * pixels * C_TOTAL
        affine_ptr = affine_of(affine_ptr, n, C)
    m = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = m // Q % P - top
    w = m % Q - left
    real = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    if ZOOM is not None:
        h = h // ZOOM
        w = w // ZOOM
    mask = real[:, None] & (c < C)[None, :]
    affine = load_affine(affine_ptr, c, C)
    x = tl.load(x_ptr + ((m // Q // P * memory_h + h) * memory_w + w)[:, None] * C + c[None, :], mask=mask, other=0.0)
    z = tl.where(mask, normalise(x, affine, SLOPE, ACC), 0.0)
    index = m[:, None] * C_TOTAL + (C_FIRST + c)[None, :]
    tl.store(z_ptr + index, z.to(x.dtype), mask=(m < pixels)[:, None] & (c < C)[None, :])


def values(sources: Sequence[Source], size: Sequence[int]) -> Tensor:
    """z (N, C, *size), the sources' values side by side; a plain source that fills the frame is its own."""
    first = sources[0]
    if len(sources) == 1 and first.plain and first.fills(size):
        return first.x
    batch, total = first.x.shape[0], sum(source.channels for source in sources)
    z = empty_nhwc(first.x, batch, total, *size)
    pixels = batch * size[0] * size[1]
    start = 0
    for source in sources:
        if source.fills(size):
            store_value(z[:, start : start + source.channels], total, source.x, source.affine, source.slope)
        elif pixels and source.channels:
            block_p, block_c = flat_tile(source.channels, z.element_size(), 2)
            apart = batch if source.samples else 1
            launch(
                _place_kernel, (cdiv(pixels // apart, block_p), cdiv(source.channels, block_c), apart),
                source.x, source.affine, z, pixels // apart, source.height, source.width, source.top, source.left,
                *size, source.channels, start, total,
                SLOPE=source.act, SAMPLES=source.samples, ZOOM=source.zoom,
                BLOCK_P=block_p, BLOCK_C=block_c, ACC=accumulator(z.dtype), num_warps=4,
            )  # fmt: skip
        start += source.channels
    return z


def conv3x3(
    sources: Sequence[Source], size: Sequence[int], weight: Tensor, bias: Tensor | None, stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastunet.kernels.conv3x3.conv3x3`."""
    y = nhwc(aten.convolution(values(sources, size), nhwc(weight), bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    return y, *stats_of(y, stats)


def _backward(dy: Tensor, z: Tensor, weight: Tensor, mask: list[bool]) -> list[Tensor]:
    """The gradients of a convolution that ``mask`` asks for, by algorithms that give the same bits every time."""
    kept = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        return aten.convolution_backward(  # type: ignore[no-any-return]
            dy, z, nhwc(weight), [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )
    finally:
        torch.backends.cudnn.deterministic = kept


def split_gradient(
    g: Tensor, sources: Sequence[Source], mask: Sequence[bool], z: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(dx, daffine) of each source that ``mask`` asks for, empty tensors for the others, from the gradient ``g`` of the
    values of those asked for, side by side. ``z``, like g, is filled with those values, of sources that fill the frame.
    """
    total, size = g.shape[1], list(g.shape[2:])
    gradients = []
    start = 0
    for source, wanted in zip(sources, mask, strict=False):
        if not wanted:
            gradients.append(no_gradients(g))
            continue
        share = slice(start, start + source.channels)
        part, value = g[:, share], None if z is None else z[:, share]
        start += source.channels
        if z is None and source.channels == total and source.plain and source.fills(size):
            gradients.append((g, affine_gradient(g, None)))
        elif source.doubled:
            gradients.append(doubled.gradient(part, total, size, source, source.top, source.left))
        elif source.fills(size):
            gradients.append(source_gradient(part, total, source.x, source.affine, source.slope, value))
        else:
            part = nhwc(frame(part, (source.height, source.width), -source.top, -source.left))
            gradients.append(source_gradient(part, source.channels, source.x, source.affine, source.slope))
    return gradients


def _input_gradient(dy: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return nhwc(_backward(dy, z, weight, [True, False, False])[0])


def conv3x3_dgrad(
    dy: Tensor, weight: Tensor, sources: Sequence[Source], mask: Sequence[bool]
) -> list[tuple[Tensor, Tensor]]:
    """See :func:`fastunet.kernels.conv3x3.conv3x3_dgrad`."""
    batch, _, *size = dy.shape
    first = 0 if mask[0] else sources[0].channels
    total = sum(source.channels for source, wanted in zip(sources, mask, strict=False) if wanted)
    z = empty_nhwc(dy, batch, total, *size)  # for its shape
    return split_gradient(_input_gradient(dy, z, weight[:, first : first + total]), sources, mask)


def conv3x3_wgrad(dy: Tensor, weight: Tensor, sources: Sequence[Source]) -> Tensor:
    """See :func:`fastunet.kernels.conv3x3_wgrad.conv3x3_wgrad`; dW in the weight's dtype."""
    return _backward(dy, values(sources, dy.shape[2:]), weight, [False, True, False])[1]


def conv3x3_backward(
    dy: Tensor, weight: Tensor, sources: Sequence[Source]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What both give, for every source; of sources that fill the frame z is written by the pass that masks g."""
    size, everything = dy.shape[2:], [True] * len(sources)
    if (len(sources) == 1 and sources[0].plain) or not all(source.fills(size) for source in sources):
        return conv3x3_dgrad(dy, weight, sources, everything), conv3x3_wgrad(dy, weight, sources)
    z = empty_nhwc(dy, dy.shape[0], weight.shape[1], *size)
    gradients = split_gradient(_input_gradient(dy, z, weight), sources, everything, z)
    return gradients, _backward(dy, z, weight, [False, True, False])[1]
