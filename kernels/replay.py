"""Calls that were made before, made again without their Python.

What a launcher does around its launches takes Python longer than many a launch takes the GPU: it looks at shapes, finds
a tile, allocates, slices, packs some sixty arguments. For arguments of the same shapes it does the same each time, with
other memory. So the second such call is recorded, as a list of what it allocates, which of ATen's functions it calls
and what it launches; from the third on that list is worked off. Values are never looked at. What is not known to be the
same the next time (a tensor from elsewhere, a number read from a tensor) makes a call one that is not recorded.

A launch gets addresses, which Triton need not ask tensors for; what only launches see, and is small, lies in one piece
of memory; and the TMA descriptors of an address are made once. Nothing is kept of a call's tensors, and what a call
needed for itself is dropped where it was needed last.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastunet.dispatch import Listener

MOST_RECORDED = 4096  # calls: a network has a hundred, each step the same
MOST_MAPS = 64  # of a launch: layers of the same sizes share its recording
LARGE = 1 << 16  # bytes of what has memory of its own, which is dropped before the call ends
ALIGNED = 256  # bytes

Call = Callable[..., Any]
Action = Callable[[list[Any]], None]

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
}


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()
_UNSEEN, _SEEN, _UNFIT = "unseen", "seen", "unfit"
_known: dict[tuple[Any, ...], Recording | str] = {}


def forget() -> None:
    """Forget what was recorded: from now on tiles or algorithms are chosen otherwise."""
    _known.clear()


def call(key: tuple[Any, ...], function: Call, args: Sequence[Any], like: int) -> Any:
    """``function(*args)``, by what it did before, where that is known; ``args[like]`` tells where new tensors lie.

    Whatever decides what is done, but for the arguments, is part of ``key``.
    """
    said = list(key)
    for x in args:
        if isinstance(x, Tensor):
            said += x.shape, x.stride(), x.dtype, x.data_ptr() % 16
        else:
            said.append(tuple(x) if type(x) is list else x)
    full = tuple(said)
    known = _known.get(full, _UNSEEN)
    if type(known) is Recording:
        return function(*args) if hooked() else known.play(args)
    if known is _UNSEEN:  # kernels are compiled now, and what is made once is made
        if len(_known) >= MOST_RECORDED:
            _known.clear()
        _known[full] = _SEEN
    elif known is _SEEN and not (args[like].is_cuda and torch.cuda.is_current_stream_capturing()):
        return _recorded(full, function, args, like)
    return function(*args)


def _recorded(full: tuple[Any, ...], function: Call, args: Sequence[Any], like: int) -> Any:
    args = _apart(args)
    recorder = Recorder(args, like)
    _thread.recorder = recorder
    try:
        with recorder:
            result = function(*args)
    finally:
        _thread.recorder = None
    _known[full] = recorder.recording(result) or _UNFIT
    return result


def _apart(args: Sequence[Any]) -> list[Any]:
    """Arguments of which no two are one tensor: next time they may be two, and which one was used is told by id."""
    seen: set[int] = set()
    found = []
    for x in args:
        found.append(x.detach() if id(x) in seen else x)
        if isinstance(x, Tensor):
            seen.add(id(x))
    return found


def hooked() -> bool:
    """Whether somebody has Triton call him at launches, as its profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def recorder() -> Recorder | None:
    """Who records this thread's launches."""
    return _thread.recorder


class Ending(NamedTuple):
    """Where a launch in Triton ends: the ``launcher`` that tells the driver, its arguments one tuple if ``tupled``; and
    what gives it those, with descriptors as the driver takes them: None if there are none."""

    launcher: Call
    expand: Call | None
    tupled: bool

    def expanded(self, before: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Arguments as the launcher gets them."""
        assert self.expand is not None
        if self.tupled:
            return list(self.expand(*before, tuple(args))[-1])
        return list(self.expand(*before, *args)[len(before) :])


class Recording:
    """What a call does: steps on a list of its arguments and of what is ``made``; which of these are its results."""

    def __init__(self, steps: Sequence[Action], made: Sequence[Any], results: Sequence[int], several: bool):
        self.steps, self.made = tuple(steps), tuple(made)
        one = results[0]
        pick: Call = itemgetter(*results)
        self.results: Call = (lambda values: (values[one],)) if several and len(results) == 1 else pick

    def play(self, args: Sequence[Any]) -> Any:
        """The call with other arguments of the same kind."""
        values = [*args, *self.made]
        for step in self.steps:
            step(values)
        return self.results(values)


# ---- recording ---------------------------------------------------------------------------------------------------


class _Number(int):
    """Where a value is found."""


class _Step(NamedTuple):
    """What is done, once all of ``tensors`` are there, and what only has to lie somewhere: both by number."""

    action: Action
    tensors: Sequence[int]
    memory: Sequence[int] = ()


class _About(NamedTuple):
    """A tensor without its memory, of which it has so many ``bytes``."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    bytes: int


class Recorder(Listener):
    """Collects what a call does as steps on a list of values: its arguments, and what is made or given by number."""

    def __init__(self, args: Sequence[Any], like: int):
        super().__init__()
        self.count, self.like, self.device = len(args), like, args[like].device
        self.made: list[Any] = []  # the values behind the arguments, as they are in the beginning
        self.steps: list[_Step | int] = []  # a number: what is allocated
        self.numbers: dict[int, int] = {}  # by id
        self.about: dict[int, _About] = {}  # by number; the tensors themselves may go
        self.alive: list[Any] = []
        self.views: dict[int, int] = {}  # by the number of a view which was not needed yet, that of its base
        self.addresses: dict[int, int] = {}  # by a tensor's number, that of its address
        self.streams: dict[int, int] = {}  # by device, the number of its current stream
        self.listens = True
        self.failed = any(type(x) is list and any(isinstance(y, Tensor) for y in x) for x in args)
        for i, x in enumerate(args):
            if isinstance(x, Tensor):
                self._is(x, i)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.listens and not self.failed:
            self._called(function, args, kwargs or {}, result)
        return result

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, what is called is not recorded."""
        self.listens = False
        try:
            yield
        finally:
            self.listens = True

    # ---- numbers

    def _new(self, value: Any = None) -> int:
        """A number for a value; None: a step makes it."""
        self.made.append(value)
        return self.count + len(self.made) - 1

    def _is(self, x: Tensor, number: int) -> int:
        self.about.setdefault(number, _About(x.shape, x.stride(), int(x.storage_offset()), x.dtype, _bytes(x)))
        self.numbers[id(x)] = number
        self.alive.append(weakref.ref(x, partial(self._gone, id(x))))
        return number

    def _gone(self, name: int, _: Any) -> None:
        """Another tensor may get this id."""
        self.numbers.pop(name, None)

    def constant(self, x: Any) -> int:
        """The number of what is the same in each call."""
        return self._is(x, self._new(x)) if isinstance(x, Tensor) else self._new(x)

    def _value(self, x: Tensor, memory: bool = False) -> int:
        """The number of a tensor; or, if only its ``memory`` matters, of one that begins where it begins."""
        number = self.numbers.get(id(x))
        if number is None:  # from elsewhere
            self.failed = True
            return 0
        base = self.views.get(number)
        if base is None:
            return number
        if memory and x.storage_offset() == self.about[base].offset:
            return base
        del self.views[number]
        self.steps.append(_Step(_view(number, base, x, self.about[base].offset), (number, base)))
        return number

    def _address(self, x: Tensor) -> tuple[int, int]:
        """The number of a tensor's address, and of the tensor that lies there."""
        number = self.numbers.get(id(x))
        if number is None:
            self.failed = True
            return 0, 0
        base = self.views.get(number, number)
        if base not in self.addresses:
            self.addresses[base] = self._new()
        further = (int(x.storage_offset()) - self.about[base].offset) * x.element_size()
        if base == number or further == 0:
            return self.addresses[base], base
        made = self._new()
        self.steps.append(_Step(_further(made, self.addresses[base], further), (), (base,)))
        return made, base

    # ---- what is done

    def _called(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        several = isinstance(result, tuple | list)
        results = result if several else (result,)
        if not all(x is None or isinstance(x, Tensor) for x in results):  # a number that was read from a tensor, say
            self.failed = True
        elif function in _ALLOCATIONS:
            self.steps.append(self._is(result, self._new()))
        elif args and not several and self._shows(result, args[0]):
            number = self.numbers[id(args[0])]
            base = self.views.get(number, number)
            if self.about[base][:3] == (result.shape, result.stride(), result.storage_offset()):
                self._is(result, base)
            else:
                self.views[self._is(result, self._new())] = base
        else:
            numbers: list[int] = []

            def template(x: Any) -> Any:
                if isinstance(x, Tensor):
                    numbers.append(self._value(x))
                    return _Number(numbers[-1])
                return [template(y) for y in x] if isinstance(x, list | tuple) else x

            given, named = template(args), {name: template(x) for name, x in kwargs.items()}
            # What is none of the arguments, changed in place, is new.
            to = [None if x is None or id(x) in self.numbers else self._is(x, self._new()) for x in results]
            action = _function(function, given, named, to, several, torch.backends.cudnn.deterministic)
            self.steps.append(_Step(action, [*numbers, *(i for i in to if i is not None)]))

    def _shows(self, view: Any, x: Any) -> bool:
        """Whether ``view`` is a view of ``x``, which is known, by other sizes and strides."""
        return (
            isinstance(x, Tensor)
            and isinstance(view, Tensor)
            and id(x) in self.numbers
            and id(view) not in self.numbers
            and view.dtype == x.dtype
            and view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() != 0
        )

    def launched(self, fire: Call, args: Sequence[Any]) -> None:
        """A launch by Triton: ``fire(*args)``, with tensors and descriptors."""
        if self.failed:
            return
        numbers = [self._operand(x) for x in args]
        pick = itemgetter(*numbers)
        self.steps.append(_Step(lambda values: fire(*pick(values)), numbers))

    def _operand(self, x: Any) -> int:
        if isinstance(x, Tensor):
            return self._value(x, memory=True)
        if type(x) is not TensorDescriptor:
            return self.constant(x)
        number, base = self._new(), self._value(x.base, memory=True)
        self.steps.append(_Step(_descriptor(number, base, vars(x)), (number, base)))
        return number

    def told(
        self, ending: Ending, grid: Sequence[int], device: int, between: Sequence[Any], args: Sequence[Any]
    ) -> None:
        """A launch as the driver is told it: with addresses for tensors, and what it makes of descriptors for those."""
        if self.failed:
            return
        if device not in self.streams:
            number = self.streams[device] = self._new()
            self.steps.append(_Step(_stream(number, device), ()))
        before = [*map(self.constant, grid), self.streams[device], *map(self.constant, between)]
        addresses, used, marked = [], [], []
        for x in args:
            if isinstance(x, Tensor):
                address, base = self._address(x)
                used.append(base)
                marked.append(_Number(address))
            elif type(x) is TensorDescriptor:
                address, base = self._address(x.base)
                used.append(base)
                addresses.append(address)
                marked.append(x)
            else:
                marked.append(_Number(self.constant(x)))
        operands: Sequence[int] = marked
        if addresses:
            expanded = ending.expanded(before, marked)
            places = [i for i, x in enumerate(expanded) if type(x) not in (_Number, int)]
            maps = {i: self._new() for i in places}
            self.steps.append(_Step(_maps(ending, before, marked, addresses, maps), (), used))
            operands = [
                maps[i] if i in maps else x if type(x) is _Number else self.constant(x) for i, x in enumerate(expanded)
            ]
        self.steps.append(_Step(_launch(ending, before, operands), (), used))

    # ---- the end

    def recording(self, result: Any) -> Recording | None:
        """What was recorded of a call with this ``result``; None: it is not to be made again this way."""
        several = isinstance(result, tuple | list)
        results = [
            self._value(x) if isinstance(x, Tensor) else self.constant(x) for x in (result if several else [result])
        ]
        if self.failed:
            return None
        last: dict[int, int] = {}  # by number, the last step that uses it
        seen = set(results)  # what is used as a tensor, not only as memory
        for i, step in enumerate(self.steps):
            if isinstance(step, _Step):
                seen.update(step.tensors)
                last.update(dict.fromkeys([*step.tensors, *step.memory], i))
        shared = {
            step: self.about[step].bytes
            for step in self.steps
            if isinstance(step, int) and step in self.addresses and step not in seen
            if 0 < self.about[step].bytes < LARGE
        }
        actions = [_scratch(self._new(), self.like, [(self.addresses[i], size) for i, size in shared.items()])]
        known = {i for i in self.addresses if i < self.count}
        actions.append(_addresses([(self.addresses[i], i) for i in known]))
        for i, address in self.addresses.items():
            if i >= self.count and self.made[i - self.count] is not None:
                self.made[address - self.count] = self.made[i - self.count].data_ptr()
                known.add(i)
        for i, step in enumerate(self.steps):
            if not isinstance(step, int):
                made = [n for n in step.tensors if n in self.addresses and n not in known]
                known.update(made)
                used = {*step.tensors, *step.memory}
                drops = [n for n in used if last[n] == i and n not in shared and self._drops(n, results)]
                actions += [step.action, _addresses([(self.addresses[n], n) for n in made]), _drop(drops)]
            elif self.about[step].shape == (0,):
                with torch.inference_mode(False):  # autograd may keep it
                    self.made[step - self.count] = torch.empty(0, dtype=self.about[step].dtype, device=self.device)
                if step in self.addresses:
                    self.made[self.addresses[step] - self.count] = 0
            elif step not in shared and (step in seen or step in self.addresses):
                same = self.about[step].dtype == self.about[self.like].dtype
                actions.append(_allocation(step, self.like, self.about[step], same, self.addresses.get(step)))
                known.add(step)
        return Recording([action for action in actions if action is not None], self.made, results, several)

    def _drops(self, number: int, results: list[int]) -> bool:
        """Whether a value is memory of the call's own that matters."""
        made = number >= self.count and self.made[number - self.count] is None
        return made and number in self.about and number not in results and self.about[number].bytes >= LARGE


def _bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes()


# ---- actions -----------------------------------------------------------------------------------------------------


def _scratch(number: int, like: int, wanted: Sequence[tuple[int, int]]) -> Action | None:
    """Memory for all that only launches see: the numbers of addresses, and how many bytes lie there."""
    total, places = 0, []
    for address, size in wanted:
        places.append((address, total))
        total += -(-size // ALIGNED) * ALIGNED
    if not places:
        return None

    def action(values: list[Any]) -> None:
        values[number] = x = values[like].new_empty(total, dtype=torch.uint8)
        start = x.data_ptr()
        for address, further in places:
            values[address] = start + further

    return action


def _addresses(pairs: Sequence[tuple[int, int]]) -> Action | None:
    if not pairs:
        return None

    def action(values: list[Any]) -> None:
        for address, number in pairs:
            values[address] = values[number].data_ptr()

    return action


def _allocation(number: int, like: int, about: _About, same: bool, address: int | None) -> Action:
    size, strides, _, dtype, _ = about
    at = number if address is None else address

    def action(values: list[Any]) -> None:
        values[number] = values[like].new_empty_strided(size, strides)

    def addressed(values: list[Any]) -> None:
        values[number] = x = values[like].new_empty_strided(size, strides)
        values[at] = x.data_ptr()

    def converted(values: list[Any]) -> None:
        values[number] = x = values[like].new_empty_strided(size, strides, dtype=dtype)
        if address is not None:
            values[at] = x.data_ptr()

    return converted if not same else action if address is None else addressed


def _view(number: int, base: int, view: Tensor, offset: int) -> Action:
    size, strides, further = view.shape, view.stride(), view.storage_offset() - offset

    def action(values: list[Any]) -> None:
        x = values[base]
        values[number] = x.as_strided(size, strides, x.storage_offset() + further)

    return action


def _further(number: int, address: int, further: int) -> Action:
    def action(values: list[Any]) -> None:
        values[number] = values[address] + further

    return action


def _descriptor(number: int, base: int, about: dict[str, Any]) -> Action:
    about = {name: value for name, value in about.items() if name != "base"}

    def action(values: list[Any]) -> None:
        values[number] = descriptor = object.__new__(TensorDescriptor)
        vars(descriptor).update(about, base=values[base])

    return action


def _stream(number: int, device: int) -> Action:
    def action(values: list[Any]) -> None:
        values[number] = driver.active.get_current_stream(device)

    return action


class _At:
    """Memory of which only the address is known."""

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _maps(
    ending: Ending, before: Sequence[int], marked: Sequence[Any], addresses: Sequence[int], maps: dict[int, int]
) -> Action:
    """What the driver makes of a launch's descriptors: allocators give the same addresses again and again."""
    about = [{**vars(x), "base": None} if type(x) is TensorDescriptor else x for x in marked]
    known: dict[Any, list[Any]] = {}
    at, one = itemgetter(*addresses), len(addresses) == 1
    places, numbers = list(maps), list(maps.values())

    def made(found: Sequence[int]) -> list[Any]:
        left, given = iter(found), []
        for x in about:
            if type(x) is dict:
                descriptor = object.__new__(TensorDescriptor)
                vars(descriptor).update(x, base=_At(next(left)))
                given.append(descriptor)
            else:
                given.append(x)
        expanded = ending.expanded(before, given)
        return [expanded[i] for i in places]

    def action(values: list[Any]) -> None:
        found = at(values)
        items = known.get(found)
        if items is None:
            if len(known) >= MOST_MAPS:
                known.clear()
            items = known[found] = made((found,) if one else found)
        for number, item in zip(numbers, items, strict=True):
            values[number] = item

    return action


def _launch(ending: Ending, before: Sequence[int], operands: Sequence[int]) -> Action:
    fire = ending.launcher
    if ending.tupled:
        first, rest = itemgetter(*before), itemgetter(*operands)
        return lambda values: fire(*first(values), rest(values))
    pick = itemgetter(*before, *operands)
    return lambda values: fire(*pick(values))


def _function(
    function: Any,
    args: list[Any],
    kwargs: dict[str, Any],
    to: list[int | None],
    several: bool,
    deterministic: bool,
) -> Action:
    def action(values: list[Any]) -> None:
        result = function(*_filled(args, values), **{name: _filled(x, values) for name, x in kwargs.items()})
        for number, x in zip(to, result if several else (result,), strict=True):
            if number is not None:
                values[number] = x

    def as_then(values: list[Any]) -> None:  # whoever asked for it, the call itself or somebody around the recording
        kept = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True
        try:
            action(values)
        finally:
            torch.backends.cudnn.deterministic = kept

    return as_then if deterministic else action


def _filled(template: Any, values: list[Any]) -> Any:
    if type(template) is _Number:
        return values[template]
    return [_filled(x, values) for x in template] if type(template) is list else template


def _drop(numbers: Sequence[int]) -> Action | None:
    if not numbers:
        return None

    def action(values: list[Any]) -> None:
        for number in numbers:
            values[number] = None

    return action
