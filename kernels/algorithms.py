"""Which function computes a 3×3 convolution of stride 1.

"triton" normalises its sources while it loads them. "stored" is the same kernels on sources that were normalised in a
pass of their own, which costs a write and a read of each and leaves the main loop nothing but products: on an H200 a
loop with a prologue takes up to twice as long. "cudnn" and "winograd" are other products between the same edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastunet.kernels import conv_aten, winograd
from fastunet.kernels.affine import affine_act
from fastunet.kernels.common import Source
from fastunet.kernels.conv3x3 import conv3x3, conv3x3_dgrad
from fastunet.kernels.conv3x3_wgrad import conv3x3_wgrad
from fastunet.kernels.table import algorithm, algorithm_forced, place

# By kind and algorithm; for a kind without an entry an algorithm is not offered.
FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("conv3x3_fwd", "triton"): conv3x3,
    ("conv3x3_fwd", "stored"): conv3x3,
    ("conv3x3_fwd", "cudnn"): conv_aten.conv3x3,
    ("conv3x3_fwd", "winograd"): winograd.conv3x3,
    # Where the result is normalised before it is stored, as in inference.
    ("conv3x3_act", "triton"): conv3x3,
    ("conv3x3_act", "cudnn"): conv_aten.conv3x3,
    ("conv3x3_dgrad", "triton"): conv3x3_dgrad,
    ("conv3x3_dgrad", "cudnn"): conv_aten.conv3x3_dgrad,
    ("conv3x3_dgrad", "winograd"): winograd.conv3x3_dgrad,
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
    name = algorithm(kind, tuple(source.channels for source in sources), filters, width, x.shape[0], place(x))
    if mixed or name in ("triton", "stored"):
        return name
    return "stored" if kind == "conv3x3_fwd" else "triton"


def computing(
    kind: str, sources: Sequence[Source], filters: int, width: int, mixed: bool
) -> tuple[Callable[..., Any], Sequence[Source]]:
    """The function for ``kind`` by the algorithm :func:`chosen`, and the sources as it takes them."""
    name = chosen(kind, sources, filters, width, mixed)
    return FUNCTIONS[kind, name], list(map(_stored, sources)) if name == "stored" else sources


def _stored(source: Source) -> Source:
    """The source, normalised: itself if it is plain."""
    if source.affine is None and not source.relu:
        return source
    return Source(affine_act(source.x, source.affine, source.relu), None, False, source.top, source.left)
