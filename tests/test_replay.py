"""Calls made again: what was recorded gives, bit for bit, what the call itself gives."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _python_dispatch

from fastunet import dispatch, ops, verify
from fastunet.architecture import as_if_on

pytest.importorskip("triton", reason="Triton is not installed; it is part of pip install 'fastunet[test]' on Linux")
from triton.tools.tensor_descriptor import TensorDescriptor

from fastunet.kernels import replay, table


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    replay.forget()


def kinds() -> set[Any]:
    """What is known of the calls made so far."""
    return {replay.Recording if type(known) is replay.Recording else known for known in replay._known.values()}


# ---- operators ---------------------------------------------------------------------------------------------------


def drawn(case: verify.Case, turn: int, device: str) -> verify.Tensors:
    """Inputs of a case, other numbers each turn."""
    torch.manual_seed(turn)
    found: verify.Tensors = {}
    for name, shape in case.inputs.items():
        value = torch.randn(shape, dtype=verify._input_dtype(name, shape, torch.float32)).to(device)
        if len(shape) == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        found[name] = value.requires_grad_(name != "pixel_weight")
    if case.labels is not None:
        found["labels"] = torch.randint(case.labels[0], case.labels[1]).to(device)
    return found


SLOW = [  # in the interpreter
    "conv2d 1×17×9×11+8×8×10, 20×25×3×3", "conv2d 3×70×1×1, 33×70×3×3", "conv2d 1×6×8×7+5×10×10, 9×11×3×3",
    "conv2d doubled 2×9×8×7+5×4×3, 9×14×3×3", "conv_transpose2d 1×17×4×5, 17×6×3×3",
    "upsample_concat 2×8×5×3, 2×4×11×6, nearest", "upsample_concat 1×20×5×3, 1×4×9×6",
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [case for case in verify.CASES if f"{case.name} {case.shape}" not in SLOW],
    ids=lambda case: f"{case.name} {case.shape}",
)
def test_the_same_bits(case: verify.Case, device: str) -> None:
    def results(again: Callable[..., Any] | None) -> dict[str, list[Tensor]]:
        with as_if_on("sm_90"), mock.patch.object(dispatch, "repeating", return_value=again):
            return verify._outputs_and_gradients(lambda t: case.ours(t, "triton"), inputs, case.backward)

    for turn in range(3):
        inputs = drawn(case, turn, device)
        found = results(replay.call)
    for part, tensors in results(None).items():
        for a, b in zip(tensors, found[part], strict=True):
            assert torch.equal(a, b), part
            assert a.stride() == b.stride()
    assert kinds() == {replay.Recording}


def test_what_inference_recorded_serves_training(device: str) -> None:
    x, weight = torch.randn(1, 2, 4, 4, device=device), torch.randn(3, 2, 3, 3, device=device, requires_grad=True)

    def convolve() -> tuple[Tensor, ...]:
        more = (None, None, 1.0, weight, None, 1, (4, 4), (0, 0, 0, 0), [False, False], 0, False, False, None, "triton")
        return ops.conv2d(x, None, 1.0, *more)

    with as_if_on("sm_80"), mock.patch.object(dispatch, "repeating", return_value=replay.call):
        for _ in range(3):
            with torch.inference_mode():
                expected = convolve()[0]
        y = convolve()[0]
        y.sum().backward()
    assert torch.equal(y, expected)
    assert weight.grad is not None


# ---- launches by address -----------------------------------------------------------------------------------------


class Launcher:
    """What stands for Triton's: adds 1 to n numbers, which it finds by address or by a descriptor."""

    def __init__(self, tupled: bool):
        self.ending = replay.Ending(self.launch, self.expand, tupled)
        self.maps = 0

    def expand(self, *said: Any) -> tuple[Any, ...]:
        before, args = (said[:-1], said[-1]) if self.ending.tupled else (said[:5], said[5:])
        written: list[Any] = []
        for x in args:
            described = isinstance(x, TensorDescriptor)
            written += [["map", x.base.data_ptr()], *x.shape, *x.strides] if described else [x]
            self.maps += described
        return (*before, tuple(written)) if self.ending.tupled else (*before, *written)

    def launch(self, *said: Any) -> None:
        before, args = (said[:-1], said[-1]) if self.ending.tupled else (said[:5], said[5:])
        assert before == (7, 1, 1, "stream", "tag")
        to, source, n = args[0], args[1], args[-1]
        if isinstance(source, list):
            assert args[2:-1] == (n, 4, 4, 1)
            source = source[1]
        written, read = (np.ctypeslib.as_array((ctypes.c_float * n).from_address(at)) for at in (to, source))
        written[:] = read + 1

    def __call__(self, to: Tensor, source: Tensor, described: bool = False) -> Tensor:
        """Write source + 1 to ``to``, and tell who records it."""
        recorder = replay.recorder()
        if recorder is not None:
            x = TensorDescriptor(source, [source.numel(), 4], [4, 1], [1, 4]) if described else source
            recorder.told(self.ending, (7, 1, 1), 0, ("tag",), (to, x, source.numel()))
        with contextlib.nullcontext() if recorder is None else recorder.away():
            to.copy_(source + 1)
        return to


@pytest.mark.parametrize("tupled", [False, True])
def test_launches_get_the_addresses_of_this_call(tupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(replay, "driver", SimpleNamespace(active=active))
    add_one = Launcher(tupled)

    def function(x: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
        small = add_one(x.new_empty(5), x)  # which only launches see
        large = x.new_empty(replay.LARGE)
        add_one(large[3:8], small, described=True)
        add_one(wide[2], large[3:8])
        other = add_one(wide.new_empty(5, dtype=torch.float32), wide[2])
        doubled = other * 2  # ATen reads what was launched, and is read by a launch
        result = add_one(x.new_empty((5, 1)).view(5), doubled, described=True)
        return result, result.view(5, 1).t(), x.new_empty(0), add_one(x.new_empty(5, dtype=torch.float32), x[:])

    for turn in range(6):
        x, wide = torch.arange(16.0)[turn : turn + 5].clone(), torch.zeros(4, 5, dtype=torch.float32)
        kept = [torch.empty(replay.LARGE) for _ in range(turn)]  # memory lies elsewhere each time
        found = replay.call(("addresses",), function, (x, wide), 0)
        assert torch.equal(found[0], (x + 4) * 2 + 1)
        assert torch.equal(found[1], found[0][None])
        assert found[1].data_ptr() == found[0].data_ptr()
        assert torch.equal(found[3], x + 1)
        assert torch.equal(wide[2], x + 3)
        assert wide.abs().sum() == wide[2].abs().sum()
        del kept
    assert kinds() == {replay.Recording}
    assert add_one.maps >= 4


# ---- what a call may do ------------------------------------------------------------------------------------------

ELSEWHERE = torch.ones(3)


def slices(x: Tensor, n: int) -> tuple[Tensor, ...]:
    """Views with an offset, a view of a view, another dtype, something empty, and one changed in place."""
    wide = x.new_empty((2, 6))
    wide.zero_()
    wide[1, 2:5].add_(x)
    doubled = torch.empty_like(x, dtype=torch.float64)
    doubled.copy_(x * n)
    first, second = wide.split(3, 1)
    return wide, wide[1][3:], doubled, x.new_empty(0), first, second.t(), x


def single(x: Tensor, n: int) -> tuple[Tensor]:
    return (x.view(3, 1).expand(3, n).clone(),)


def plain(x: Tensor, n: int) -> Tensor:
    return x + n


def deterministic(x: Tensor, n: int) -> Tensor:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        return x * n
    finally:
        torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("function", [slices, single, plain, deterministic])
def test_values_views_and_flags(function: Callable[..., Any]) -> None:
    flags = []
    for turn in range(5):
        x = torch.randn(8)[turn : turn + 3]  # behind something, and not always as well aligned
        x = x if turn % 2 else x.clone()
        found = replay.call((function,), function, (x, 3), 0)
        expected = function(x, 3)
        assert type(found) is type(expected)
        many = isinstance(found, tuple)
        for a, b in zip(found if many else [found], expected if many else [expected], strict=True):
            assert torch.equal(a, b)
            assert (a.stride(), a.dtype) == (b.stride(), b.dtype)
        flags.append(torch.backends.cudnn.deterministic)
    assert replay.Recording in kinds()
    assert flags == [False] * 5


def test_what_was_deterministic_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was the one to ask for it while the call was recorded, and whatever is asked for later."""
    flags = []

    class Watching(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            flags.append(torch.backends.cudnn.deterministic)
            return function(*args, **(kwargs or {}))

    x = torch.ones(3)
    for turn in range(3):
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", turn < 2)
        with Watching():
            replay.call((), deterministic, (x, 3), 0)
    assert kinds() == {replay.Recording}
    assert flags == [True] * 3
    assert not torch.backends.cudnn.deterministic


def test_one_tensor_may_be_two_next_time() -> None:
    for turn in range(4):
        x, y = torch.randn(3), torch.randn(3)
        again = x if turn < 2 else y
        assert torch.equal(replay.call((), torch.sub, (x, again), 0), x - again)
    assert kinds() == {replay.Recording}


def test_two_threads_may_record_at_the_same_time() -> None:
    inside, left = threading.Event(), threading.Event()

    def other() -> None:
        with replay.Recorder([torch.ones(3)], 0):
            inside.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with replay.Recorder([torch.ones(3)], 0):
        thread.start()
        assert inside.wait(10)
    left.set()
    thread.join()
    assert not _python_dispatch.is_in_torch_dispatch_mode()


@pytest.mark.parametrize(
    "function", [lambda x: x * float(x[0]), lambda x: x + ELSEWHERE, lambda x: x + torch.tensor([1.0, 2.0, 3.0])]
)
def test_what_may_be_otherwise_next_time_is_not_recorded(function: Callable[[Tensor], Tensor]) -> None:
    for turn in range(4):
        x = torch.full((3,), 1.0 + turn)
        assert torch.equal(replay.call((function,), function, (x,), 0), function(x))
    assert kinds() == {replay._UNFIT}


def test_other_arguments_are_another_call() -> None:
    x = torch.ones(4, 4)
    others = [(x, 1), (x, 2), (x.t()[:3], 1), (x[:3], 1), (x.double(), 1), (x.flatten()[1:], 1)]
    for _ in range(3):
        for args in others:
            assert torch.equal(replay.call(("plain",), plain, args, 0), plain(*args))
    assert len(replay._known) == len(others)


def test_what_is_not_needed_any_more_is_dropped() -> None:
    held: list[int] = []

    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + 1
        return x

    large = torch.zeros(replay.LARGE)
    for _ in range(3):
        replay.call(("chain",), chain, (large,), 0)
    (recording,) = replay._known.values()
    assert isinstance(recording, replay.Recording)
    values: list[Any] = [large, *recording.made]
    for step in recording.steps:
        step(values)
        held.append(sum(isinstance(x, Tensor) for x in values))
    assert max(held) == 3  # the argument, what is read and what is written


def test_another_tile_or_algorithm_is_another_call() -> None:
    replay._known["something"] = replay._SEEN  # type: ignore[index]
    with table.forced({}):
        assert kinds() == set()
        replay._known["something"] = replay._SEEN  # type: ignore[index]
    assert kinds() == set()
    replay._known["something"] = replay._SEEN  # type: ignore[index]
    table.forget()
    assert kinds() == set()
