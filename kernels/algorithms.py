"""Which function computes a 3×3 convolution of stride 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastunet.kernels import conv_aten, winograd
from fastunet.kernels.common import Source
from fastunet.kernels.conv3x3 import conv3x3, conv3x3_dgrad
from fastunet.kernels.conv3x3_wgrad import conv3x3_wgrad
from fastunet.kernels.table import algorithm, algorithm_forced, place

# By kind and algorithm; for a kind without an entry an algorithm is not offered.
FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("conv3x3_fwd", "triton"): conv3x3,
    ("conv3x3_fwd", "cudnn"): conv_aten.conv3x3,
    ("conv3x3_fwd", "winograd"): winograd.conv3x3,
    ("conv3x3_dgrad", "triton"): conv3x3_dgrad,
    ("conv3x3_dgrad", "cudnn"): conv_aten.conv3x3_dgrad,
    ("conv3x3_dgrad", "winograd"): winograd.conv3x3_dgrad,
    ("conv3x3_wgrad", "triton"): conv3x3_wgrad,
    ("conv3x3_wgrad", "cudnn"): conv_aten.conv3x3_wgrad,
}


def computing(kind: str, sources: Sequence[Source], filters: int, width: int, mixed: bool) -> Callable[..., Any]:
    """The function for ``kind`` on these sources: Triton's, or if ``mixed`` what the table says is the fastest."""
    name = algorithm_forced(kind)
    if name is None:
        name = "triton"
        if mixed:
            x = sources[0].x
            name = algorithm(kind, tuple(source.channels for source in sources), filters, width, x.shape[0], place(x))
    return FUNCTIONS[kind, name]
