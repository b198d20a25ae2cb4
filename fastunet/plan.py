"""Inference as the list of operations that it was.

To decide layer by layer how to run costs a small network on a CPU a tenth of its time, and a GPU's host a third of what
it takes; and what calls a layer holds the layer's input until it returns. So the second inference of a network on
pictures of one shape is noted as it calls ATen and fastunet's operators, and from the third on that list is worked off,
each tensor freed behind its last reader, as long as the network is what it was: the same modules with the same
settings, parameters and buffers, and nobody listening. Numbers may change: where something made of weights was kept
(:mod:`fastunet.folding`), it is compared with them first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, dtype, nn
from torch.nn.modules import module as _torch_module
from torch.utils.weak import WeakTensorKeyDictionary

from fastunet import folding
from fastunet.activation import Activation
from fastunet.blocks import known
from fastunet.dispatch import Listener, noted_by, runner

aten = torch.ops.aten
_MOST = 8  # lists of a network; for more shapes of pictures all are noted anew
_LONGEST = 1024  # inferences until a network that changed is noted again
_HELD = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMESPACES = ("aten", "fastunet", "mkldnn")  # what is called in others may know of more than its arguments
_FORM = operator.attrgetter("shape", "dtype", "is_cpu")
# Functions that call an operation in less time than it takes itself to read its arguments from Python.
_SHORTER: dict[Any, Any] = {
    aten.maximum.default: torch.maximum,
    aten.relu_.default: torch.relu_,
    # As no_grad lists them, and as inference_mode does.
    aten.convolution.default: torch.convolution,
    aten.conv2d.default: torch.conv2d,
    aten.conv_transpose2d.input: torch.conv_transpose2d,
    aten.native_batch_norm.default: torch.native_batch_norm,
    aten.batch_norm.default: torch.batch_norm,
}

_entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = WeakKeyDictionary()


def followed(network: nn.Module, x: Tensor, about: Hashable, function: Callable[[], Activation]) -> Activation:
    """``function()``, which is ``network`` of ``x``, or what it did when called so.

    Args:
        about: what else the operations depend on, beside the network, the device, the shape and the strides of x.
        function: without gradients, modes or transforms of functions.
    """
    entries = _entries.setdefault(network, {})
    key = (x.shape, x.stride(), x.dtype, x.device, about)
    entry = entries.get(key)
    if entry is None:
        if len(entries) >= _MOST:
            entries.clear()
        entry = entries[key] = _Entry()
    if (listed := entry.listed) is not None:
        y = listed.run(network, x)
        if y is not None:
            entry.pause = max(entry.pause - 1, 1)
            return y
        for each in [*entries.values()]:  # they are of the same network
            if each.listed is not None:
                each.forget()
    elif entry.waiting > 0:
        entry.waiting -= 1
    else:
        return entry.note(network, x, function)
    return function()


class _Entry:
    """What is known of a network and a shape."""

    def __init__(self) -> None:
        self.listed: _List | None = None
        self.waiting = self.pause = 1  # inferences before one is noted, and after what was noted is of no use

    def forget(self) -> None:
        self.listed = None
        self.waiting, self.pause = self.pause, min(2 * self.pause, _LONGEST)

    def note(self, network: nn.Module, x: Tensor, function: Callable[[], Activation]) -> Activation:
        was = _State(network)
        if not was.known(network):
            self.forget()
            return function()
        recorder = _Recorder(x, was.held)
        with noted_by(recorder):
            y = function()
        x_at: int = recorder.registers.get(y.x, -1)
        affine_at: int | None = None if y.affine is None else recorder.registers.get(y.affine, -1)
        if recorder.sound and -1 not in (x_at, affine_at) and was.unchanged(network):
            result = _Result(x_at, affine_at, y.slope, y.headed)
            self.listed = _List(was, _Compared(recorder.compared), recorder.steps, result)
        else:
            self.forget()
        return y


class _State:
    """The modules of a network, what they were and what they held: all but the network itself, which may go."""

    def __init__(self, network: nn.Module) -> None:
        modules = [*network.modules()]
        self._inner = modules[1:]  # hooks of the network itself run around all this
        attributes = self._attributes(network)
        self._values = [[*value] if type(value) is list else value for value in attributes]
        dicts: list[dict[str, Any]] = [module.__dict__[name] for module in modules for name in _HELD]
        self._empty = [each for each in dicts if not each]
        self._empty += [module.__dict__[name] for module in self._inner for name in _HOOKS]
        filled = [each for each in dicts if each]
        places = {id(value): i for i, value in enumerate(attributes)}
        self._places = [places[id(each)] for each in filled]
        self._sizes, self._names = [*map(len, filled)], [*chain.from_iterable(filled)]
        self._kinds: list[Any] = [*map(type, self._inner)]
        self._calls = self._called()
        self.held = [*_holding(filled)]
        self._tensors = [t for t in self.held if isinstance(t, Tensor)]
        self._forms = self._formed()

    def known(self, network: nn.Module) -> bool:
        """Whether nothing in it may do something else another time, or refer to the network."""
        plain = all(type(t) in (nn.Parameter, Tensor) for t in self._tensors) and all(
            _is_plain(value)
            for own in map(vars, (network, *self._inner))
            for name, value in own.items()
            if name not in _HELD
        )
        lasting = not any(module.training and any(True for _ in module.buffers(False)) for module in self._inner)
        return plain and lasting and all(type(m) is nn.ModuleList or known(m) for m in self._inner)

    def unchanged(self, network: nn.Module) -> bool:
        """Whether it is what it was; numbers in its tensors may be others."""
        try:
            attributes = self._attributes(network)
            filled = [*map(attributes.__getitem__, self._places)]  # others perhaps, which are only equal
            return (
                [*map(len, filled)] == self._sizes
                and [*chain.from_iterable(filled)] == self._names
                and all(map(operator.is_, _holding(filled), self.held))
                and not any(self._empty)
                and attributes == self._values
                and self._formed() == self._forms
                and not _torch_module._has_any_global_hook()
                and [*map(type, self._inner)] == self._kinds
                and self._called() == self._calls
            )
        except Exception:  # what somebody made an attribute may not be compared, nor have a length
            return False

    def _attributes(self, network: nn.Module) -> list[Any]:
        """The attributes of all modules in turn. The caches have lost them since the last inference, so that reading
        takes time: no more is read than has to be."""
        return [*chain.from_iterable(map(dict.values, map(vars, (network, *self._inner))))]

    def _formed(self) -> list[Any]:
        """What a tensor may become where it is: ATen checks it in operations whose parts are listed."""
        tensors = self._tensors
        return [*map(type, tensors), *map(_FORM, tensors), *map(Tensor.stride, tensors)]

    def _called(self) -> list[Any]:
        """The methods that somebody may replace in their classes."""
        forwards = (kind.forward for kind in dict.fromkeys(self._kinds))
        return [nn.Conv2d._conv_forward, nn.Module.__call__, nn.Module._call_impl, *forwards]


def _holding(filled: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, filled))


def _is_plain(value: Any) -> bool:
    """Whether an attribute is a number, a text or the like, or holds nothing else."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, dtype, Tensor)


class _Step(NamedTuple):
    """An operation. Where its ``places`` are, arguments are read from registers."""

    function: Any
    arguments: list[Any]
    places: list[tuple[int, int | list[int]]]  # of an argument: its register, or those of a list
    options: dict[str, Any]
    results: list[int]  # the registers of what comes out
    several: bool  # whether that is a tuple

    def read(self) -> set[int]:
        return {register for _, at in self.places for register in ([at] if isinstance(at, int) else at)}

    def writes(self) -> bool:
        """Whether it changes an argument."""
        return bool(self.function._schema.is_mutable)


class _Result(NamedTuple):
    """An :class:`Activation` whose tensors are in registers."""

    x: int
    affine: int | None
    slope: float
    headed: bool


class _Recorder(Listener):
    """Notes the operations that are called inside."""

    def __init__(self, x: Tensor, held: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self.compared: list[tuple[Tensor, Tensor]] = []  # what was kept, and what it was equal to
        self.sound = True  # whether they depend on x and on tensors that last, and on nothing else
        self.registers: Any = WeakTensorKeyDictionary()
        self.registers[x] = 0
        self._count = 1
        self._given = {0}  # registers of x and of views of what lasts, which nothing may change
        self._lasting = {id(t) for t in (*held, *folding.everything())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, places = [*args], []
        given = False
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                register = self.registers.get(value)
                if register is None:
                    self.sound &= id(value) in self._lasting
                else:
                    places.append((i, register))
                    arguments[i] = None
                if register is None or register in self._given:
                    given = True
                    self.sound &= not _written(func._schema.arguments[i])
            elif isinstance(value, list | tuple) and any(isinstance(t, Tensor) for t in value):
                among = [self.registers.get(t) for t in value]
                self.sound &= None not in among
                places.append((i, among))
                arguments[i] = None
        options = dict(kwargs or {})
        self.sound &= not any(isinstance(value, Tensor) for value in options.values())
        found = func(*args, **options)
        several = isinstance(found, tuple)
        results = found if several else (found,)
        if func is aten.equal.default and not places:
            self.compared.append((args[0], args[1]))
        elif all(isinstance(t, Tensor) for t in results):
            registers = [self._register(t, given and _is_part(func, i)) for i, t in enumerate(results)]
            self.steps.append(_Step(func, arguments, places, options, registers, several))
        else:  # something was decided by numbers
            self.sound = False
        # What was kept of weights is of no use, or they are being kept.
        self.sound &= found is not False and func is not aten.to_mkldnn.default
        self.sound &= func.namespace in _NAMESPACES
        return found

    def _register(self, t: Tensor, given: bool) -> int:
        """That of a result, which is perhaps a view of what was given."""
        register: int | None = self.registers.get(t)
        if register is None:
            register = self.registers[t] = self._count
            self._count += 1
            if given:
                self._given.add(register)
        return register


def _is_part(func: Any, i: int) -> bool:
    """Whether the i-th result shares memory with an argument, by an operation's schema."""
    return func._schema.returns[i].alias_info is not None


def _written(argument: Any) -> bool:
    """Whether an operation changes it, by its schema."""
    return argument.alias_info is not None and argument.alias_info.is_write


class _Compared:
    """Copies of numbers that a network had when it was noted, and its tensors, which still have to be equal to them."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        vectors = [pair for pair in pairs if pair[0].dim() == 1]
        self._pairs = [pair for pair in pairs if pair[0].dim() != 1]
        self._vectors = [now for _, now in vectors]  # so many and so small that joining them first takes less time
        self._joined = torch.cat([kept for kept, _ in vectors]) if vectors else None

    def unchanged(self) -> bool:
        """Whether they are. Ask only where shapes and dtypes are what they were."""
        same = self._joined is None or torch.equal(self._joined, torch.cat(self._vectors))
        return same and all(torch.equal(kept, now) for kept, now in self._pairs)


class _List:
    """The operations of a network, as long as it is what it was."""

    def __init__(self, state: _State, compared: _Compared, steps: list[_Step], result: _Result) -> None:
        self._state, self._compared, self._result = state, compared, result
        self._steps: list[tuple[_Step, list[int]]] = []  # and which registers nobody reads behind it
        needed = {register for register in result[:2] if register is not None}
        for step in reversed(steps):
            if not needed.isdisjoint(step.results) or step.writes():
                last = step.read().union(step.results)
                function = _SHORTER.get(step.function) or runner(step.function)
                self._steps.append((step._replace(function=function), [*last - needed]))
                needed |= last
        self._steps.reverse()
        self._count = 1 + max(needed)

    def run(self, network: nn.Module, x: Tensor) -> Activation | None:
        """What comes of x; None if the list is no longer true."""
        registers: list[Any] = [None] * self._count
        registers[0] = x
        try:
            if not (self._state.unchanged(network) and self._compared.unchanged()):
                return None
            for (function, given, places, options, results, several), done in self._steps:
                arguments = given.copy()
                for i, at in places:
                    arguments[i] = registers[at] if isinstance(at, int) else [registers[j] for j in at]
                found = function(*arguments, **options)
                if several:
                    for register, t in zip(results, found, strict=True):
                        registers[register] = t
                    del t
                else:
                    registers[results[0]] = found
                for register in done:
                    registers[register] = None
                del arguments, found
        except (RuntimeError, TypeError, ValueError, IndexError):  # the usual call tells it better
            return None
        y, affine, slope, headed = self._result
        return Activation(registers[y], None if affine is None else registers[affine], slope, headed=headed)
