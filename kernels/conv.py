"""Which kernel convolves.

    conv2d            y[n,p,q,k] = bias[k] + Σ z[n, p·stride + r − pad, q·stride + s − pad, c] · W[k,c,r,s]
    conv_transpose2d  y[n,p,q,k] = bias[k] + Σ z[n, (p + pad − r)/2, (q + pad − s)/2, c] · W[c,k,r,s]   (where exact)

summed over the taps (r, s) and channels c of z = act(scale·(x − centre) + shift); z is zero outside its source. With
statistics, each tile also yields the mean and the centred sum of squares of its y as rounded to y's dtype.

Of 3×3 convolutions of stride 1 there are several algorithms. "triton" normalises its sources while it loads them.
"stored" is the same kernels on sources that were normalised in a pass of their own, which costs a write and a read of
each and leaves the main loop nothing but products: on an H200 a loop with a prologue takes up to twice as long. "cudnn"
is ATen's product between the same edges.

Layout: activations NHWC, weights as channels_last memory, (K,R,S,C) for conv2d and (C,R,S,K) for conv_transpose2d; one
copy of the weights serves forward and dgrad. Bytes: each source and W are read, y is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastunet.layout import NOTHING, lowered, no_stats

from . import conv_aten
from .affine import affine_act
from .common import Source
from .conv3x3 import conv3x3, conv3x3_dgrad
from .conv3x3_wgrad import conv3x3_wgrad
from .conv_down import conv_down
from .conv_few import conv_few
from .conv_few import serves as few
from .conv_image import conv_image, serves
from .conv_up import conv_up
from .pool import max_pool2x2
from .samples import stored
from .table import algorithm, algorithm_forced, arithmetic

# By kind and algorithm; for a kind without an entry an algorithm is not offered.
FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("conv3x3_fwd", "triton"): conv3x3,
    ("conv3x3_fwd", "stored"): conv3x3,
    ("conv3x3_fwd", "cudnn"): conv_aten.conv3x3,
    # Where the result is normalised before it is stored, as in inference.
    ("conv3x3_act", "triton"): conv3x3,
    ("conv3x3_act", "cudnn"): conv_aten.conv3x3,
    ("conv3x3_dgrad", "triton"): conv3x3_dgrad,
    ("conv3x3_dgrad", "cudnn"): conv_aten.conv3x3_dgrad,
    ("conv3x3_wgrad", "triton"): conv3x3_wgrad,
    ("conv3x3_wgrad", "stored"): conv3x3_wgrad,
    ("conv3x3_wgrad", "cudnn"): conv_aten.conv3x3_wgrad,
}


def chosen(kind: str, sources: Sequence[Source], filters: int, width: int, mixed: bool) -> str:
    """The algorithm for ``kind`` on these sources: if ``mixed`` what the table says is the fastest, else Triton's own
    way to it."""
    name = algorithm_forced(kind)
    if name is not None:
        return name
    x = sources[0].x
    name = algorithm(kind, tuple(source.channels for source in sources), filters, width, x.shape[0], arithmetic(x))
    if mixed or name in ("triton", "stored"):
        return name
    return "stored" if kind == "conv3x3_fwd" else "triton"


def computing(
    kind: str, sources: Sequence[Source], filters: int, width: int, mixed: bool
) -> tuple[Callable[..., Any], Sequence[Source]]:
    """The function for ``kind`` by the algorithm :func:`chosen`, and the sources as it takes them."""
    name = chosen(kind, sources, filters, width, mixed)
    return FUNCTIONS[kind, name], list(map(stored, sources)) if name == "stored" else sources


def joined(sources: Sequence[Source], size: Sequence[int]) -> Source:
    """What is placed in the frame as one source; formed in memory unless it is one source that fills the frame."""
    if len(sources) == 1 and sources[0].fills(size):
        return sources[0]
    return Source(conv_aten.values(sources, size), None, 1.0)


def conv2d(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    stats: int,
    save: bool,
    pool: bool,
    pool_scale: Tensor | None,
    mixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv2d`; nothing normalised is stored, so there is nothing to ``save``.

    ``mixed`` allows other algorithms than Triton's where the table says that they are faster.
    """
    sources = placed(x0, affine0, slope0, x1, affine1, slope1, offset, doubled)
    weight, bias = multiplying(x0, weight), lowered(x0, bias)
    pooled: Tensor | None = None
    if len(sources) == 1 and stride == 1 and serves(sources[0], size, weight):
        y, mean, var = conv_image(sources[0], weight, bias, stats)
    elif weight.shape[-1] == 3 and stride == 1:
        compute, sources = computing("conv3x3_fwd", sources, weight.shape[0], size[1], mixed)
        if compute is conv3x3:
            y, mean, var, pooled = conv3x3(sources, size, weight, bias, stats, pool, pool_scale)
        else:
            y, mean, var = compute(sources, size, weight, bias, stats)
    elif few(weight) and not stats:
        y = conv_few(joined(sources, size), weight, bias)
        mean, var = no_stats(x0), no_stats(x0)
    else:
        y, mean, var = conv_down(joined(sources, size), weight, bias, stats, stride)
    if pooled is None:
        pooled = max_pool2x2(y, pool_scale) if pool else x0.new_empty(0)
    return y, mean, var, x0.new_empty(0), pooled


def conv2d_act(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    offset: Sequence[int],
    doubled: Sequence[bool],
    affine: Tensor | None,
    slope: float,
    pool: bool,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    mixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastunet.aten.conv2d_act`, and for ``mixed`` :func:`conv2d`."""
    sources = placed(x0, affine0, slope0, x1, affine1, slope1, offset, doubled)
    pooled: Tensor | None = None
    weight, bias = multiplying(x0, weight), lowered(x0, bias)
    head = None if head_weight is None else (multiplying(x0, head_weight), lowered(x0, head_bias))
    if len(sources) == 1 and serves(sources[0], size, weight):
        z, _, _ = conv_image(sources[0], weight, bias, NOTHING, affine, slope)
    else:
        compute, sources = computing("conv3x3_act", sources, weight.shape[0], size[1], mixed)
        if compute is conv3x3:
            z, _, _, pooled = conv3x3(sources, size, weight, bias, NOTHING, pool, None, affine, slope, head)
            head = None
        else:
            y, _, _ = compute(sources, size, weight, bias, NOTHING)
            z = affine_act(y, affine, slope)
    if pooled is None:
        pooled = max_pool2x2(z, None) if pool else x0.new_empty(0)
    if head is not None:
        source = Source(z, None, 1.0)
        z = conv_few(source, *head) if few(head[0]) else conv_down(source, *head, NOTHING, 1)[0]
    return z, pooled


def multiplying(x: Tensor, weight: Tensor) -> Tensor:
    """``weight`` in x's dtype; where that is a copy, in the layout in which kernels read it."""
    found: Tensor = lowered(x, weight, torch.channels_last)
    return found


def placed(
    x0: Tensor,
    affine0: Tensor | None,
    slope0: float,
    x1: Tensor | None,
    affine1: Tensor | None,
    slope1: float,
    offset: Sequence[int],
    doubled: Sequence[bool],
) -> Sequence[Source]:
    """One or two sources, each at its (top, left) of ``offset``, and those ``doubled`` that are."""
    first = Source(x0, affine0, slope0, offset[0], offset[1], doubled[0])
    return [first] if x1 is None else [first, Source(x1, affine1, slope1, offset[2], offset[3], doubled[1])]


def conv_transpose2d(
    x: Tensor, affine: Tensor | None, slope: float, weight: Tensor, bias: Tensor | None, stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastunet.aten.conv_transpose2d`."""
    return conv_up(Source(x, affine, slope), multiplying(x, weight), lowered(x, bias), stats)
