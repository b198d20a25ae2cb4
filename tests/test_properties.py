"""Every operator and function, called with what hypothesis draws, on both backends.

Of each call: results and gradients err at most twice as much as plain PyTorch's in the same dtype, contiguous or
channels_last (of many pixels contiguous), and a few roundings; nothing is written outside what was allocated, and no
operand is; and the same call told otherwise (pictures in another order, one after another, mirrored) has the same
results. ``--long MINUTES`` goes on drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from properties import FUNCTIONS, MANY, OPERATORS, SMALL, TINY, Draw, Operands, Problem, Size, mirrored, permuted
from sources import DTYPES, LAYOUTS, assert_near, guarded, relaid
from torch import Tensor

from fastunet import functional

Explore = Callable[..., None]
REGISTERED = {
    schema.name.partition("::")[2]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("fastunet::") and not schema.name.endswith("_backward")
}


def test_every_operator_has_a_strategy() -> None:
    """Backwards are called by their forwards."""
    assert OPERATORS.keys() == REGISTERED
    assert FUNCTIONS.keys() == set(functional.__all__)


def given(problem: Problem, layouts: dict[str, str], leaves: Sequence[str], device: str = "cpu") -> Operands:
    """The operands in memory of any kind; the ``leaves`` among them will have a gradient."""
    operands = {
        k: relaid(x.to(device), layouts[k]) if isinstance(x, Tensor) else x for k, x in problem.operands.items()
    }
    return operands | {name: operands[name].requires_grad_() for name in leaves}


def wide(problem: Problem, leaves: Sequence[str]) -> Operands:
    operands = {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in problem.operands.items()
    }
    return operands | {name: operands[name].requires_grad_() for name in leaves}


def gradients(
    results: Sequence[Tensor], seeds: Sequence[Tensor | None], operands: Operands, leaves: Sequence[str]
) -> list[Tensor]:
    """Those of the leaves, in their order; none if nothing that is asked for has one."""
    pairs = [(y, g) for y, g in zip(results, seeds, strict=True) if g is not None and y.requires_grad]
    if not pairs:
        return []
    outputs, given = [y for y, _ in pairs], [g.to(y) for y, g in pairs]
    asked = [operands[name] for name in leaves]
    return [g.cpu() for g in torch.autograd.grad(outputs, asked, given, allow_unused=True, materialize_grads=True)]


def memory(operands: Operands) -> dict[str, Tensor]:
    """All bytes of the operands, and of what lies around them."""
    kept = {name: x.detach().untyped_storage() for name, x in operands.items() if isinstance(x, Tensor)}
    return {name: torch.tensor([], dtype=torch.uint8, device=s.device).set_(s).clone() for name, s in kept.items()}


def cotangents(draw: Draw, problem: Problem, truths: Sequence[Tensor], large: bool) -> list[Tensor | None]:
    """Gradients of some of the results, dense or not, and one number for all elements as a sum's are."""
    kinds = [draw(st.sampled_from([*LAYOUTS, "expanded"])) for _ in truths]
    wanted = [draw(st.booleans()) for _ in truths]
    if not any(wanted):
        wanted[0] = True
    seeds: list[Tensor | None] = []
    for y, kind, asked in zip(truths, kinds, wanted, strict=True):
        if not asked or not y.is_floating_point() or not y.requires_grad:
            seeds.append(None)
        elif kind == "expanded" and problem.corners is None:
            seeds.append(torch.randn(()).to(problem.dtype).expand(y.shape))
        else:
            g = torch.rand(y.shape) + 0.1 if large else torch.randn(y.shape)  # of one sign, so that sums grow
            if problem.corners is not None and not seeds:
                g = torch.where(problem.corners(problem.operands), 0.0, g)
            seeds.append(relaid(g.to(problem.dtype), "contiguous" if kind == "expanded" else kind))
    return seeds


def check(problem: Problem, draw: Draw, backend: str, size: Size, device: str) -> None:
    """All the claims of one call."""
    tensors = [name for name, x in problem.operands.items() if isinstance(x, Tensor)]
    layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in tensors}
    leaves = [name for name in problem.leaves if draw(st.sampled_from([True, True, False]))]
    operands, names = given(problem, layouts, leaves, device), list(problem.results)
    before = memory(operands)
    with guarded():
        outputs = list(problem.ours(operands, backend))
    found = [y.cpu() for y in outputs]
    untouched(problem, before, operands)
    for y, sample in zip(found, problem.results.values(), strict=True):
        assert not sample or len(y) == problem.batch
    if problem.batch == 0 and any(problem.results.values()):
        return nothing_of_nothing(outputs, [operands[name] for name in leaves])

    exact = wide(problem, leaves)
    truths = list(problem.truth(exact, found))
    plainly = [given(problem, dict.fromkeys(tensors, layout), leaves) for layout in PLAIN]
    owns = [list(problem.truth(operands, found)) for operands in plainly]
    own = worst(truths, owns, [size is not MANY for _ in truths])
    neighbour = neighbours(problem, leaves)

    def results() -> tuple[list[Tensor], ...]:
        return tuple(list(problem.truth(moved, found)) for moved in neighbour())

    near(problem, found, truths, own, names, results)
    seeds = cotangents(draw, problem, truths, size is MANY)
    dense = [None if g is None else g.contiguous() for g in seeds]
    before = memory(operands)
    with guarded():
        mine = gradients(outputs, seeds, operands, leaves)
    untouched(problem, before, operands)
    expected = gradients(truths, dense, exact, leaves)
    each = [
        gradients(own, [None if g is None else relaid(g, layout) for g in dense], operands, leaves)
        for layout, own, operands in zip(PLAIN, owns, plainly, strict=True)
    ]
    plain = worst(expected, each, [size is not MANY or name == "weight" for name in leaves])

    def of_neighbour() -> tuple[list[Tensor], ...]:
        return tuple(gradients(problem.truth(moved, found), dense, moved, leaves) for moved in neighbour())

    near(problem, mine, expected, plain, [f"gradient of {name}" for name in leaves], of_neighbour)
    for name, gradient in zip(leaves, mine, strict=bool(mine)):
        assert gradient.dtype == operands[name].dtype, name
    if size is not MANY:

        def anew(other: Problem) -> list[Tensor]:
            with torch.no_grad():
                return [y.cpu() for y in other.ours(given(other, layouts, [], device), backend)]

        def agree(found: Sequence[Tensor], names: Sequence[str]) -> None:
            # PyTorch's own error would be another one too, for what it is: twice as much is granted.
            # Of two classes that are as likely either may be found, and another one than before.
            near(problem, found, problem.truth(exact, found) if problem.exact else truths, own, names, results, 4)

        told_otherwise(problem, draw, anew, agree)


PLAIN = ("contiguous", "channels_last")  # in whose order PyTorch sums, and so errs, differently


def worst(truths: Sequence[Tensor], owns: Sequence[Sequence[Tensor]], either: Sequence[bool]) -> list[Tensor]:
    """Of PyTorch's results in ``either`` memory format the one that errs more, else the contiguous one's: channels_last
    PyTorch adds many pixels one by one. But a weight's gradient is a product's, of oneDNN, which sums as it likes."""
    return [
        max(
            each if both else each[:1],
            key=lambda y, truth=truth: float((y.double() - truth).detach().abs().max()) if y.numel() else 0.0,
        )
        for truth, each, both in zip(truths, zip(*owns, strict=True), either, strict=False)
    ]


def neighbours(problem: Problem, leaves: Sequence[str]) -> Callable[[], tuple[Operands, Operands]]:
    """What draws the operands a rounding or so apart, in float64 and in their own dtype."""
    eps = torch.finfo(problem.dtype).eps

    def draw() -> tuple[Operands, Operands]:
        moved = {k: x * (1 + eps * torch.randn_like(x)) if _real(x) else x for k, x in problem.operands.items()}
        there = replace(problem, operands=moved)
        return wide(there, leaves), given(there, {k: "contiguous" for k in moved}, leaves)

    return draw


def _real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def near(
    problem: Problem,
    found: Sequence[Tensor],
    truths: Sequence[Tensor],
    own: Sequence[Tensor],
    names: Sequence[str],
    neighbour: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    times: float = 2,
) -> None:
    """Whether what was found errs at most ``times`` as much as plain PyTorch's ``own``, and eight roundings, as a sum
    of some hundred numbers does in another order than PyTorch's. Of a few numbers PyTorch's may be right by chance:
    then at most ``times`` as much as it errs for operands a rounding apart, or as their truth differs."""
    # Terms that are all alike are all rounded alike: their sum is as far off as they are.
    many = any(isinstance(x, Tensor) and x.numel() > 2**17 for x in problem.operands.values())
    for i, (y, truth, plain, name) in enumerate(zip(found, truths, own, names, strict=bool(found))):
        if problem.exact:
            assert torch.equal(y.detach(), truth), name
            continue
        coarser = max(y.dtype, problem.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        try:
            assert_near([y.detach()], [truth], [plain], coarser, [name], times, 32 if many else 8)
        except AssertionError:
            bound = torch.zeros(())
            for _ in range(6):
                true, rounded = (results[i].detach() for results in neighbour())
                bound = torch.stack([bound, (true - truth).abs().max(), (rounded - true).abs().max()]).max()
            if not (y.detach() - truth).abs().max() <= times * bound:
                raise


def untouched(problem: Problem, before: dict[str, Tensor], operands: Operands) -> None:
    after = memory(operands)
    for name in before:
        if name not in problem.written:
            assert torch.equal(before[name], after[name]), f"{name} was written to"


def nothing_of_nothing(found: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Of an empty batch there is nothing, and no gradient."""
    results = [y for y in found if y.requires_grad]
    if results and leaves:
        seeds = [*map(torch.ones_like, results)]
        for leaf, gradient in zip(leaves, torch.autograd.grad(results, leaves, seeds, allow_unused=True), strict=True):
            assert gradient is None or gradient.shape == leaf.shape
            assert gradient is None or not gradient.any()


def told_otherwise(
    problem: Problem, draw: Draw, results: Callable[[Problem], list[Tensor]], agree: Callable[..., None]
) -> None:
    """The same pictures in another order, in two batches and mirrored."""

    names = list(problem.results)
    if problem.batch > 1:
        order = torch.randperm(problem.batch)
        found = results(permuted(problem, order))
        back = [y[order.argsort()] if sample else y for y, sample in zip(found, problem.results.values(), strict=True)]
        agree(back, [f"{name}, pictures in another order" for name in names])
        at = draw(st.integers(1, problem.batch - 1))
        halves = torch.arange(problem.batch).split([at, problem.batch - at])
        parts = [results(permuted(problem, half)) for half in halves]
        if problem.exact or all(problem.results.values()):  # counts add up; statistics do not
            pairs = zip(zip(*parts, strict=True), problem.results.values(), strict=True)
            joined = [torch.cat(y) if sample else y[0] + y[1] for y, sample in pairs]
            agree(joined, [f"{name}, batch in two parts" for name in names])
    axis = draw(st.sampled_from([-2, -1]))
    other = mirrored(problem, axis)
    if other is not None:
        back = [
            y.flip(axis) if y.dim() == 4 or (y.dim() == 3 and y.dtype == torch.uint8) else y for y in results(other)
        ]
        agree(back, [f"{name}, mirrored" for name in names])


CALLS: dict[str, Callable[[Draw, Size], Problem]] = OPERATORS | {f"functional.{k}": f for k, f in FUNCTIONS.items()}


# A convolution takes a second or more in the interpreter.
SLOW = {"conv2d": 6, "conv2d_act": 4, "conv_transpose2d": 10, "upsample_concat": 4, "functional.conv_bn_relu": 2,
        "functional.upsample_pad_concat": 2}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_any_call(name: str, backend: str, device: str, explore: Explore) -> None:
    size = SMALL
    if backend == "triton":
        size = TINY if device == "cpu" else replace(SMALL, dtypes=DTYPES)  # no GPU multiplies float64 there
    explore(claims(name, size, backend, device), SLOW.get(name, 15) if size is TINY else 30)


def claims(name: str, size: Size, backend: str, device: str) -> Callable[[Any], None]:
    """What hypothesis is to call with its data."""

    def hold(data: Any) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**20), label="seed"))
        check(CALLS[name](data.draw, size), data.draw, backend, size, device)

    return hold


LARGE = ["affine_act", "conv2d", "conv2d_act", "conv_transpose2d", "max_pool2x2", "upsample_concat", "softmax_stats",
         "head_stats", "confusion_matrix", "functional.conv_bn_relu"]  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_many_pixels(name: str, device: str, explore: Explore) -> None:
    """Where a sum that is added up one by one loses its digits."""
    explore(claims(name, MANY, "torch", device), 3)
