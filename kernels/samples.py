"""Sources whose affine differs by sample, (N, 3, C), and statistics of each sample: in passes of their own.

    z = act(scale[n]·(x − centre[n]) + shift[n])      stored for the call, in whose stead the operation reads it
    dx, daffine                                       from the operation's gradient of z
    mean, var (N, K)                                  of the y that a convolution wrote

A convolution that normalises what it loads does so once a tap, and takes longer than this on a GPU (CONTRIBUTING.md). z
lives as long as the call: the backward normalises again. Bytes: a write and a read of each z, and of its gradient; a
read of y. Accumulation: float32 (float64 for float64).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastunet.layout import NOTHING, SAMPLES

from .affine import affine_act, affine_act_backward
from .statistics import sample_stats

_SOURCES = (
    ("x", "affine", "slope"), ("x0", "affine0", "slope0"), ("x1", "affine1", "slope1"),
    ("skip", "skip_affine", "skip_slope"),
)  # fmt: skip


def by_sample(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, an operation or its backward on sources with affines (3, C), for those with (N, 3, C) too."""
    names = list(inspect.signature(function).parameters)
    sources = [tuple(map(names.index, source)) for source in _SOURCES if set(source) <= set(names)]
    backward = function.__name__.endswith("_backward")  # whose first results are (dx, daffine) of each source
    statistics = names.index("stats") if "stats" in names else None
    affines = [affine for _, affine, _ in sources]

    @functools.wraps(function)
    def served(*args: Any, **options: Any) -> Any:
        of_samples = statistics is not None and args[statistics] == SAMPLES
        if not of_samples:
            for i in affines:
                if args[i] is not None and args[i].dim() == 3:
                    break
            else:
                return function(*args, **options)
        apart = [(i, *at) for i, at in enumerate(sources) if args[at[1]] is not None and args[at[1]].dim() == 3]
        given = list(args)
        for _, x, affine, slope in apart:
            given[x], given[affine], given[slope] = affine_act(args[x], args[affine], args[slope]), None, 1.0
        if statistics is not None and of_samples:
            given[statistics] = NOTHING
        found = function(*given, **options)
        if of_samples:
            y, _, _, *rest = found
            return y, *sample_stats(y), *rest
        if not backward:
            return found
        gradients = list(found)
        for i, x, affine, slope in apart:
            if gradients[2 * i].shape == args[x].shape:  # else it was not asked for
                gradients[2 * i : 2 * i + 2] = affine_act_backward(gradients[2 * i], args[x], args[affine], args[slope])
        return tuple(gradients)

    return served
