"""Which function computes a 3×3 convolution of stride 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastunet.kernels import conv_aten, winograd
from fastunet.kernels.common import Source
from fastunet.kernels.conv3x3 import conv3x3, conv3x3_dgrad
from fastunet.kernels.conv3x3_wgrad import conv3x3_wgrad
from fastunet.kernels.table import algorithm, algorithm_forced

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
        channels = [source.channels for source in sources]
        name = algorithm(kind, channels, filters, width, sources[0].x) if mixed else "triton"
    return FUNCTIONS[kind, name]
