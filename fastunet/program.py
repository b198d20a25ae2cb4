"""Somebody's model as a program: what fastunet's operators serve runs on activations, everything else as it was.

:func:`lower` reads the graph of a :class:`~fastunet.tracing.Trace`. Calls of PyTorch's own modules are cut out of it as
one step each, and so are calls of modules that somebody listens to; the rest stays aten operators. Then it finds what
runs lazily: convolutions with the normalisation and act behind them, 2×2 pooling, ×2 upsampling, sums, repeated rows,
and zero padding, cropping and concatenation in front of a convolution. Steps hand each other Activations, Placed or
tensors; a step that runs as it was is given stored tensors. Modules, parameters and buffers are the model's own, looked
up by name in each run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fastunet.activation import Activation, Context, Next, Placed, add, average, replicated
from fastunet.blocks import enlarge, lazily, pair, pool, role
from fastunet.tracing import Call, Name, Trace

_ATEN = torch.ops.aten
Modules = Mapping[str, nn.Module]
Lazy = Activation | Placed


class NotLowered(Exception):
    """A module that has to be called cannot be told from what is around it; the text says which."""


# ---- what runs ---------------------------------------------------------------------------------------------------


class Frame:
    """The values of one run, by name: tensors, numbers, or what stands for a tensor lazily."""

    def __init__(self, values: dict[str, Any], modules: Modules, context: Context):
        self.values, self.modules, self.context = values, modules, context
        self._stored: dict[str, Tensor] = {}

    def lazy(self, name: str) -> Lazy:
        """What a fused step reads."""
        value = self.values[name]
        return Activation(value) if isinstance(value, Tensor) else value

    def activation(self, name: str) -> Activation:
        """The same, stored if it is placed."""
        value = self.lazy(name)
        if not isinstance(value, Placed):
            return value
        if value.second is None and value.doubled[0]:  # once for all that reads it from now on
            self.values[name] = value = value.whole(self.context)
            return value
        return Activation(self.tensor(name))

    def plain(self, name: str) -> Any:
        """What a step reads that runs as it was: a lazy value is stored, once for all such steps."""
        value = self.values[name]
        return self.tensor(name) if isinstance(value, (Activation, Placed)) else value

    def tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            value = self.lazy(name)
            self._stored[name] = value.tensor(self.context)
        return self._stored[name]

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.values.pop(name, None)
            self._stored.pop(name, None)

    def resolve(self, argument: Any) -> Any:
        """An argument with its names replaced by values."""
        if isinstance(argument, Name):
            return self.plain(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)([self.resolve(x) for x in argument])
        if isinstance(argument, dict):
            return {key: self.resolve(x) for key, x in argument.items()}
        return argument


@dataclass(eq=False)
class Step:
    """One thing that the eager model does, or several of which fastunet makes one.

    ``run`` is given the frame; ``reads`` and ``writes`` are names. ``what`` says what it is and ``why`` why it runs as
    it was, None if it is fused. ``flops`` and ``bytes`` are what eager PyTorch multiplies, reads and writes in it.
    """

    what: str
    reads: list[str]
    writes: list[str]
    run: Callable[[Frame], None]
    why: str | None = None
    flops: int = 0
    bytes: int = 0
    dead: list[str] = field(default_factory=list)  # what nobody reads after it


class Program:
    """The steps of one graph. :meth:`run` takes flattened inputs and returns what the model would."""

    def __init__(self, trace: Trace, steps: list[Step], outputs: list[Any]):
        self._trace, self._outputs = trace, outputs
        self.steps = steps
        last: dict[str, Step] = {}
        for step in steps:
            last.update(dict.fromkeys((*step.reads, *step.writes), step))
        kept = {x for x in outputs if isinstance(x, Name)}
        for name, step in last.items():
            if name not in kept:
                step.dead.append(name)
        wanted = {*last, *kept}
        self._tensors = {name: of.rpartition(".") for name, of in trace.tensors.items() if name in wanted}
        self.fuses = any(step.why is None and step.flops for step in steps)

    def run(self, model: nn.Module, modules: Modules, inputs: Sequence[Any], context: Context) -> Any:
        values = {name: x for name, x in zip(self._trace.inputs, inputs, strict=True) if name is not None}
        for name, (owner, _, attribute) in self._tensors.items():
            values[name] = getattr(modules[owner] if owner else model, attribute)
        values.update(self._trace.constants)
        frame = Frame(values, modules, context)
        for step in self.steps:
            step.run(frame)
            frame.forget(step.dead)
        found = [frame.plain(x) if isinstance(x, Name) else x for x in self._outputs]
        return pytree.tree_unflatten(found, self._trace.out_spec)


def _activate(act: Activation, slope: float, frame: Frame) -> Activation:
    """act's value with one more activation function: the slopes multiply, if neither turns values around."""
    if slope < 0 or act.slope < 0:
        act = act.stored(frame.context)
    return act._replace(slope=act.slope * slope)


def _run_layer(frame: Frame, reads: str, writes: str, modules: list[Any], after: tuple[bool, str | None]) -> None:
    value = frame.lazy(reads)
    if isinstance(value, Activation) and value.headed:  # the convolution before this one did its work
        frame.values[writes] = value._replace(headed=False)
        return
    pools, head = after
    found = [frame.modules[m] if isinstance(m, str) else m for m in modules]
    following = Next(pools, None if head is None else frame.modules[head])  # type: ignore[arg-type]
    placed = value if isinstance(value, Placed) else Placed.of(value)
    frame.values[writes] = lazily(found, placed, frame.context, following)


def _run_act(frame: Frame, reads: str, writes: str, slope: float) -> None:
    value = frame.lazy(reads)
    if isinstance(value, Placed) and (slope < 0 or (value.second is not None and value.second.slope < 0)):
        value = frame.activation(reads)
    if isinstance(value, Activation):
        frame.values[writes] = _activate(value, slope, frame)
        return
    second = None if value.second is None else _activate(value.second, slope, frame)
    frame.values[writes] = value._replace(first=_activate(value.first, slope, frame), second=second)


def _run_pool(frame: Frame, reads: str, writes: str, module: Any) -> None:
    found = frame.modules[module] if isinstance(module, str) else module
    frame.values[writes], frame.values[reads] = pool(found, frame.activation(reads), frame.context)


def _run_upsample(frame: Frame, reads: str, writes: str, module: Any, op: _Op) -> None:
    size = frame.resolve(op.args[0][1]) if op.module is None else None
    if size is not None and list(size) != [2 * n for n in _shape(frame.values[reads])[2:]]:
        _run_as_it_was(frame, op, copied=False)
        return
    found = frame.modules[module] if isinstance(module, str) else module
    up = enlarge(found, frame.activation(reads), frame.context)
    frame.values[writes] = up if up.doubled[0] else up.first


def _run_average(frame: Frame, reads: str, writes: str) -> None:
    frame.values[writes] = average(frame.activation(reads), frame.context)


def _run_sum(frame: Frame, reads: list[str], writes: str, op: _Op) -> None:
    a, b = (frame.activation(name) for name in reads)
    if a.x.shape != b.x.shape or a.x.dtype != b.x.dtype:
        _run_as_it_was(frame, op, op.changes)
        return
    frame.values[writes] = add(a, b, 1.0, frame.context)


def _run_replicate(frame: Frame, reads: str, writes: str, op: _Op) -> None:
    left, right, top, bottom = (*frame.resolve(op.args[0][1]), 0, 0)[:4]
    act = frame.activation(reads)
    if left or top or right not in (0, 1) or bottom not in (0, 1):
        _run_as_it_was(frame, op, op.changes)
        return
    height, width = act.x.shape[-2:]
    frame.values[writes] = replicated(act, (height + bottom, width + right), frame.context)


def _run_cat(frame: Frame, reads: list[str], writes: str) -> None:
    parts = [frame.lazy(name) for name in reads]
    placed = [x if isinstance(x, Placed) else Placed.of(x) for x in parts]
    first, second = (x if x.second is None else Placed.of(Activation(x.tensor(frame.context))) for x in placed)
    if first.size != second.size or first.first.x.dtype != second.first.x.dtype:
        frame.values[writes] = torch.cat([frame.plain(name) for name in reads], 1)
        return
    offset, doubled = (*first.offset[:2], *second.offset[:2]), (first.doubled[0], second.doubled[0])
    frame.values[writes] = Placed(first.first, second.first, first.size, offset, doubled)


def _run_frame(frame: Frame, reads: str, writes: str, sides: Callable[[Frame, Placed], Sequence[int]]) -> None:
    """Zeros around a value, or less of it: ``sides`` says how much on the left, right, top and bottom."""
    value = frame.lazy(reads)
    placed = value if isinstance(value, Placed) else Placed.of(value)
    left, right, top, bottom = sides(frame, placed)
    (height, width), (y, x) = placed.size, placed.offset[:2]
    rows, columns = placed.extent
    whole = 0 <= y <= height - rows and 0 <= x <= width - columns
    if placed.second is not None or not (whole or max(left, right, top, bottom) <= 0):
        # What was cropped is not what lies around it.
        placed, y, x = Placed.of(frame.activation(reads)), 0, 0
    size = (height + top + bottom, width + left + right)
    frame.values[writes] = placed._replace(size=size, offset=(y + top, x + left, 0, 0))


def _run_as_it_was(frame: Frame, op: _Op, copied: bool) -> None:
    """An operator or a module, on stored tensors. ``copied``: it changes its first input, which others may keep."""
    if op.target is _ATEN.sym_size.int:  # no reason to store a value
        value, dim = op.args[0]
        frame.values[op.name] = _shape(frame.values[value])[dim]
        return
    args, kwargs = frame.resolve(op.args)
    if copied:
        args = (_own(frame, op.reads[0], args[0]), *args[1:])
    if op.target is not None:
        frame.values[op.name] = op.target(*args, **kwargs)
        return
    found = pytree.tree_leaves(frame.modules[op.name](*args, **kwargs))
    frame.values.update(zip(op.writes, found, strict=True))


def _run_dropout(frame: Frame, op: _Op, copied: bool) -> None:
    if frame.modules[op.name].training:
        _run_as_it_was(frame, op, copied)
    else:
        frame.values[op.writes[0]] = frame.values[op.reads[0]]


def _own(frame: Frame, name: str, z: Tensor) -> Tensor:
    """``z`` to be changed in place: a copy where an operator may have kept it for its backward."""
    value = frame.values[name]
    return z.clone() if isinstance(value, Activation) and value.plain else z


def _shape(value: Any) -> Sequence[int]:
    if isinstance(value, Placed):
        acts = [value.first] if value.second is None else [value.first, value.second]
        return (value.first.x.shape[0], sum(act.x.shape[1] for act in acts), *value.size)
    shape: Sequence[int] = value.x.shape if isinstance(value, Activation) else value.shape
    return shape


# ---- what the eager model does -----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Op:
    """A call of a module, or a node of the graph, as it stands in the eager model."""

    name: str  # of the module, or of the node
    module: nn.Module | None
    target: Any  # the operator, if it is no module
    args: Any  # (args, kwargs), with a Name for each value
    writes: list[str]
    nodes: list[fx.Node]  # what it is in the graph
    hooked: bool = False

    @property
    def reads(self) -> list[str]:
        return [x for x in pytree.tree_leaves(self.args) if isinstance(x, Name)]

    @property
    def what(self) -> str:
        if self.module is not None:
            return type(self.module).__name__
        name = getattr(self.target, "_opname", None) or getattr(self.target, "__name__", None)
        return str(name or self.target).strip("_")

    @property
    def changes(self) -> bool:
        """Whether it changes its first input in place."""
        return _mutates(self.target) if self.module is None else bool(getattr(self.module, "inplace", False))

    @property
    def may_alias(self) -> bool:
        """Whether what it returns may be (part of) its first input's memory."""
        if self.module is not None:
            return isinstance(self.module, (nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd))
        schema = getattr(self.target, "_schema", None)
        return schema is None or self.what in _MAY_ALIAS or any(r.alias_info is not None for r in schema.returns)


_MAY_ALIAS = {"contiguous", "dropout", "feature_dropout", "reshape", "flatten", "to", "getitem", "expand_as", "chunk"}


def _mutates(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _owners(node: fx.Node) -> list[str]:
    """The modules in whose calls a node is, outermost first."""
    return [entry[0] for entry in node.meta.get("nn_module_stack", {}).values()]


def _called(trace: Trace, modules: Modules, hooked: frozenset[str]) -> list[tuple[Call, bool]]:
    """The calls that are cut out of the graph as wholes, and whether somebody listens to them.

    Raises:
        NotLowered: one to which somebody listens cannot be cut out.
    """
    listened = {id(modules[name]) for name in hooked}
    owner: dict[fx.Node, str] = {}
    found = []
    for call in sorted(trace.calls, key=lambda call: (id(modules[call.name]) not in listened, call.name.count("."))):
        heard = id(modules[call.name]) in listened
        region = call.nodes
        outer = {owner.get(node, "") for node in region}
        if region and all(name and _within(call.name, name) for name in outer):
            continue  # inside one that is cut out
        outputs = {x for x in call.outputs if isinstance(x, Name)}
        fits = (
            region
            and outer == {""}
            and len(outputs) == len(call.outputs)
            and all(node.name in outputs or set(node.users) <= {*region, *_sizes(node)} for node in region)
            and (not heard or all(any(_within(name, call.name) for name in _owners(node)) for node in region))
        )
        if fits:
            owner.update(dict.fromkeys(region, call.name))
            found.append((call, heard))
        elif heard:
            raise NotLowered(
                f"what goes in and out of {call.name}, which has a hook or a patch, is not all of its work"
            )
    return found


def _sizes(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is _ATEN.sym_size.int]


def _ops(trace: Trace, modules: Modules, hooked: frozenset[str]) -> list[_Op]:
    """The eager model, in order: modules that are called, and the nodes that are left. What nobody reads is left out,
    unless it changes something."""
    nodes = {node.name: node for node in trace.graph.nodes}
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    found: list[tuple[int, _Op]] = []
    calls = _called(trace, modules, hooked)
    done = {node for call, _ in calls for node in call.nodes}
    names = {call.name for call, _ in calls}
    for call, heard in calls:
        args = pytree.tree_unflatten(call.inputs, call.in_spec)
        op = _Op(call.name, modules[call.name], None, args, call.outputs, call.nodes, heard)
        found.append((max(order[nodes[x]] for x in call.outputs), op))
    for node in trace.graph.nodes:
        if node.op != "call_function" or node in done or node.target is _ATEN._assert_tensor_metadata.default:
            continue
        if _mutates(node.target) and any(_within(name, other) for name in _owners(node)[-1:] for other in names):
            continue  # the count of batches, say, which the module that is called counts
        args = fx.node.map_arg((node.args, node.kwargs), lambda x: Name(x.name))
        found.append((order[node], _Op(node.name, None, node.target, args, [node.name], [node])))
    ops = [op for _, op in sorted(found, key=lambda pair: pair[0])]
    wanted: set[str] = {x for x in trace.outputs if isinstance(x, Name)}
    kept = []
    for op in reversed(ops):
        effect = op.module is not None or op.changes or "assert" in op.what
        if effect or any(name in wanted for name in op.writes):
            wanted.update(op.reads)
            kept.append(op)
    return kept[::-1]


def _straightened(ops: list[_Op], outputs: list[Any]) -> tuple[list[_Op], list[Any]]:
    """Without what returns its input, and with names for what is changed in place: who reads it later reads the result.

    Raises:
        NotLowered: something else is changed with it.
    """
    names: dict[str, str] = {}
    bases: dict[str, str] = {}
    stale: set[str] = set()

    def now(argument: Any) -> Any:
        if isinstance(argument, Name):
            if argument in stale:
                raise NotLowered("a tensor is read after a view of it was changed in place")
            return Name(names.get(argument, argument))
        if isinstance(argument, (list, tuple)):
            return type(argument)([now(x) for x in argument])
        return {key: now(x) for key, x in argument.items()} if isinstance(argument, dict) else argument

    found = []
    for op in ops:
        op.args = now(op.args)
        if _drops_nothing(op):
            names[op.writes[0]] = op.reads[0]
            continue
        found.append(op)
        if op.changes and op.reads:
            changed = op.reads[0]
            stale.update(
                x for x in {*bases, *bases.values()} if x != changed and _root(bases, x) == _root(bases, changed)
            )
            for old in [changed, *(x for x, new in names.items() if new == changed)]:
                names[old] = op.writes[0]
        elif op.may_alias and op.reads:
            bases.update(dict.fromkeys(op.writes, op.reads[0]))
    return found, now(outputs)


def _root(bases: Mapping[str, str], name: str) -> str:
    """The tensor whose memory ``name`` may be a part of."""
    while name in bases:
        name = bases[name]
    return name


def _drops_nothing(op: _Op) -> bool:
    """Whether it is a dropout that returns its input, in training too."""
    if isinstance(op.module, nn.modules.dropout._DropoutNd):
        return op.module.p == 0 and not op.hooked
    if op.target is _ATEN.dropout.default:
        _, p, training = op.args[0]
        return p == 0 or not training
    return False


# ---- what of it fastunet does ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Layer:
    """A convolution, and the normalisation and act that alone read it."""

    ops: list[_Op]
    modules: list[Any]  # names, or modules for acts that are none in the model


def lower(trace: Trace, modules: Modules, hooked: frozenset[str]) -> Program:
    """The program of ``trace``; modules named in ``hooked`` are called as they are.

    Raises:
        NotLowered: one of them cannot be called alone.
    """
    ops, outputs = _straightened(_ops(trace, modules, hooked), trace.outputs)
    return Program(trace, _Lowering(trace, ops, outputs).steps(), outputs)


class _Lowering:
    def __init__(self, trace: Trace, ops: list[_Op], outputs: list[Any]):
        self._ops = ops
        self._values = {node.name: node.meta.get("val") for node in trace.graph.nodes}
        self._inputs = {node.name for node in trace.graph.nodes if node.op == "placeholder"}
        self._readers: dict[str, list[Any]] = {}
        self._writer: dict[str, _Op] = {}
        for op in ops:
            self._writer.update(dict.fromkeys(op.writes, op))
            for name in op.reads:
                self._readers.setdefault(name, []).append(op)
        for name in outputs:
            if isinstance(name, Name):
                self._readers.setdefault(name, []).append(None)
        self._kinds = {id(op): self._kind(op) for op in ops}
        self._changed = {op.reads[0]: op for op in ops if op.changes and op.reads}
        self._layers: dict[int, _Layer] = {}  # by each of its operations
        self._fused: set[int] = set()
        self._find_layers()
        self._find_others()

    # ---- recognising ----

    def _kind(self, op: _Op) -> str | None:
        """What fastunet could do in its stead."""
        if op.hooked or not op.reads or not op.writes:
            return None
        value = self._values.get(op.reads[0])
        if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
            return None
        if op.module is not None:
            if isinstance(op.module, nn.modules.dropout._DropoutNd):
                return "dropout"
            alone = pytree.tree_leaves(op.args) == op.reads and len(op.reads) == len(op.writes) == 1
            return role(op.module) if alone else None
        reader = _NODES.get(op.target)
        return None if reader is None else reader(self, op, *op.args[0], **op.args[1])

    def _of_cat(self, op: _Op, tensors: Any, dim: int = 0) -> str | None:
        values = [self._values.get(x) for x in tensors]
        fits = len(tensors) == 2 and dim in (1, -3) and all(isinstance(x, Tensor) and x.dim() == 4 for x in values)
        return "cat" if fits else None

    def _of_pad(
        self, op: _Op, x: Any, pad: Sequence[Any], mode: str = "constant", value: float | None = None
    ) -> str | None:
        nothing = not any(isinstance(n, Name) or n for n in pad)  # whatever the mode would repeat
        if mode == "replicate" and len(pad) == 4 and not nothing:
            return "replicate"
        return "frame" if (mode == "constant" and not value and len(pad) in (2, 4)) or nothing else None

    def _of_sum(self, op: _Op, x: Any, other: Any, alpha: Any = 1) -> str | None:
        values = [self._values.get(name) if isinstance(name, Name) else None for name in (x, other)]
        fits = alpha == 1 and all(isinstance(v, Tensor) and v.dim() == 4 for v in values)
        if not fits:
            return None
        first, second = ([*map(_size, v.shape)] for v in values)  # type: ignore[union-attr]
        return "sum" if first == second and values[0].dtype == values[1].dtype else None  # type: ignore[union-attr]

    def _of_average(
        self, op: _Op, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor: int | None = None,
    ) -> str | None:  # fmt: skip
        settings = (pair(kernel), pair(stride or kernel), pair(padding))
        return "average" if settings == ((2, 2), (2, 2), (0, 0)) and not ceil_mode and divisor is None else None

    def _of_slice(self, op: _Op, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str | None:
        everything = start in (None, 0) and end in (None, 2**63 - 1)
        return "frame" if step == 1 and (dim in (2, 3, -1, -2) or everything) else None

    def _of_pool(self, op: _Op, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, *rest: Any) -> str | None:
        settings = (pair(kernel), pair(stride or kernel), pair(padding))
        plain = settings == ((2, 2), (2, 2), (0, 0)) and all(pair(r) in ((1, 1), (0, 0)) for r in rest)
        return "pool" if plain and not (len(rest) > 1 and rest[1]) else None

    def _of_upsample(self, op: _Op, x: Any, size: Any, *settings: Any) -> str | None:
        if size is None:
            return "upsample" if list(settings[-1] or ()) == [2.0, 2.0] else None
        # A size that is computed may be twice the input's, or not: that shows in each run.
        before, after = self._values[x], self._values[op.writes[0]]
        doubled = all(_size(after.shape[d]) == 2 * _size(before.shape[d]) for d in (2, 3))
        return "upsample" if doubled else None

    def _of_relu(self, op: _Op, x: Any) -> str:
        return "act"

    def _of_leaky_relu(self, op: _Op, x: Any, slope: float = 0.01) -> str:
        return "act"

    # ---- what is fused ----

    def _only_reader(self, name: str) -> _Op | None:
        readers = self._readers.get(name, [])
        return readers[0] if len(readers) == 1 else None

    def _find_layers(self) -> None:
        for op in self._ops:
            kind = self._kinds[id(op)]
            if kind in ("conv", "conv_transpose"):
                self._layers[id(op)] = _Layer([op], [op.name])
            elif kind in ("norm", "act", "prelu"):
                before = self._writer.get(op.reads[0])
                layer = None if before is None else self._layers.get(id(before))
                if layer is None or layer.ops[-1] is not before or self._only_reader(op.reads[0]) is not op:
                    continue
                last = self._kinds[id(before)]
                if (
                    last in ("act", "prelu")
                    or (last == "norm" and kind == "norm")
                    or (kind == "prelu" and last != "norm")
                ):
                    continue
                if kind == "act" and last != "norm" and not self._loaded(op):
                    continue  # stored by it, and kept, there is one tensor, and not the convolution's output beside it
                layer.ops.append(op)
                layer.modules.append(op.name if op.module is not None else nn.LeakyReLU(_slope(op)))
                self._layers[id(op)] = layer

    def _loaded(self, op: _Op) -> bool:
        """Whether somebody reads its result who could apply it while loading."""
        readers = [r for r in self._readers.get(op.writes[0], []) if r is not None]
        return any(self._kinds[id(r)] in (*_READS, "cat") for r in readers)

    def _find_others(self) -> None:
        """Backwards: whether a concatenation or a frame is worth it depends on who reads it."""
        self._fused.update(self._layers)
        for op in reversed(self._ops):
            kind = self._kinds[id(op)]
            readers = self._readers.get(op.writes[0], []) if op.writes else []
            if kind in ("pool", "average", "replicate", "dropout"):
                self._fused.add(id(op))
            elif kind == "upsample":  # which may be read, by a convolution, later than it was
                self._take(op, True)
            elif kind == "sum":  # of what is lazy on one side at least
                self._take(op, any(self._is(self._writer.get(x), "norm", "act", "average", "sum") for x in op.reads))
            elif kind == "cat":
                self._take(op, bool(readers) and all(self._is(r, "conv") for r in readers))
            elif kind == "frame":
                self._take(op, bool(readers) and all(self._is(r, "conv", "cat", "frame") for r in readers))
            elif kind == "act" and id(op) not in self._layers and op.reads[0] not in self._inputs:
                # A value that is lazy anyway, or is read by what applies it while it loads.
                before = self._is(self._writer.get(op.reads[0]), "norm", "pool", "upsample", "sum")
                self._take(op, before or any(self._is(r, *_READS, "norm", "cat") for r in readers))

    def _take(self, op: _Op, fused: bool) -> None:
        # What is changed in place later is not what was read.
        if fused and all(self._changed.get(name, op) is op for name in op.reads):
            self._fused.add(id(op))

    def _is(self, op: _Op | None, *kinds: str) -> bool:
        """Whether ``op`` is of one of these kinds, and fused."""
        return op is not None and self._kinds[id(op)] in kinds and (id(op) in self._fused or id(op) in self._layers)

    # ---- steps ----

    def steps(self) -> list[Step]:
        found = []
        for op in self._ops:
            layer = self._layers.get(id(op))
            if layer is None:
                found.append(self._step(op))
            elif layer.ops[0] is op:
                found.append(self._layer_step(layer))
        return found

    def _layer_step(self, layer: _Layer) -> Step:
        reads, writes = layer.ops[0].reads[0], layer.ops[-1].writes[0]
        readers = [r for r in self._readers.get(writes, []) if r is not None]
        pools = any(self._kinds[id(r)] == "pool" for r in readers)
        head, only = None, self._only_reader(writes)
        if only is not None and id(only) in self._layers and self._kinds[id(only)] == "conv":
            following = self._layers[id(only)]
            conv = only.module
            assert isinstance(conv, nn.Conv2d)
            if len(following.ops) == 1 and conv.kernel_size == (1, 1):
                head = only.name
        run = partial(_run_layer, reads=reads, writes=writes, modules=layer.modules, after=(pools, head))
        what = " → ".join(_said(op) for op in layer.ops)
        return self._costed(Step(what, [reads], [writes], run), layer.ops)

    def _step(self, op: _Op) -> Step:
        kind = self._kinds[id(op)]
        run: Any
        if id(op) not in self._fused:
            run = partial(_run_as_it_was, op=op, copied=op.changes)
            return self._costed(Step(_said(op), op.reads, op.writes, run, self._why(op, kind)), [op])
        reads, writes = op.reads[0], op.writes[0]
        named = op.name if op.module is not None else None
        if kind == "act":
            run = partial(_run_act, reads=reads, writes=writes, slope=_slope(op))
        elif kind == "pool":
            run = partial(_run_pool, reads=reads, writes=writes, module=named or nn.MaxPool2d(2))
        elif kind == "upsample":
            run = partial(_run_upsample, reads=reads, writes=writes, module=named or _upsampling(op), op=op)
        elif kind == "average":
            run = partial(_run_average, reads=reads, writes=writes)
        elif kind == "sum":
            run = partial(_run_sum, reads=op.reads, writes=writes, op=op)
        elif kind == "replicate":
            run = partial(_run_replicate, reads=reads, writes=writes, op=op)
        elif kind == "cat":
            run = partial(_run_cat, reads=op.reads, writes=writes)
        elif kind == "frame":
            run = partial(_run_frame, reads=reads, writes=writes, sides=_SIDES[op.target](*op.args[0]))
        else:
            run = partial(_run_dropout, op=op, copied=op.changes)
            return self._costed(Step(_said(op), op.reads, op.writes, run, "it is random"), [op])
        return self._costed(Step(_said(op), op.reads, op.writes, run), [op])

    def _costed(self, step: Step, ops: list[_Op]) -> Step:
        for op in ops:
            moves = op.changes or not op.may_alias  # views cost nothing
            step.flops += sum(map(_flops, op.nodes))
            step.bytes += sum(map(_bytes, op.nodes)) if moves else 0
        return step

    def _why(self, op: _Op, kind: str | None) -> str:
        if op.hooked:
            return "somebody listens: it has a hook, a patch or a compiled call"
        if kind == "norm":
            return "it does not follow a fused convolution that nobody else reads"
        if kind == "sum":
            return "neither side is normalised lazily"
        if kind == "prelu":
            return "it does not follow a norm that is fused"
        if kind in ("cat", "frame"):
            return "not only fused convolutions read it"
        if kind == "act":
            return "nothing fused is beside it"
        if isinstance(op.module, nn.Conv2d | nn.ConvTranspose2d):
            return "no kernel for its size, stride, padding or groups"
        return "no operator for it"


def _slope(op: _Op) -> float:
    """Below zero, of an act."""
    if op.module is not None:
        return float(getattr(op.module, "negative_slope", 1.0 if isinstance(op.module, nn.Identity) else 0.0))
    if "leaky" not in op.what:
        return 0.0
    return float(op.args[0][1]) if len(op.args[0]) > 1 else 0.01


def _upsampling(op: _Op) -> nn.Upsample:
    if "nearest" in op.what:
        return nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=op.args[0][2])


def _padding(x: Any, pad: Sequence[Any], *_: Any) -> Callable[[Frame, Placed], Sequence[int]]:
    return lambda frame, placed: (*frame.resolve(pad), 0, 0)[:4]


def _slicing(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    def sides(frame: Frame, placed: Placed) -> Sequence[int]:
        if dim in (0, 1):
            return 0, 0, 0, 0
        size = placed.size[dim - 2 if dim > 0 else dim]
        first, last, _ = slice(frame.resolve(start), frame.resolve(end)).indices(size)
        cut = (-first, max(last, first) - size)
        return (0, 0, *cut) if dim in (2, -2) else (*cut, 0, 0)

    return sides


_READS = (
    "conv",
    "conv_transpose",
    "pool",
    "average",
    "upsample",
    "replicate",
    "sum",
)  # what applies an act as it loads
_SIDES: dict[Any, Callable[..., Callable[[Frame, Placed], Sequence[int]]]] = {
    _ATEN.pad.default: _padding,
    _ATEN.slice.Tensor: _slicing,
}
_NODES: dict[Any, Callable[..., str | None]] = {
    _ATEN.relu.default: _Lowering._of_relu,
    _ATEN.relu_.default: _Lowering._of_relu,
    _ATEN.leaky_relu.default: _Lowering._of_leaky_relu,
    _ATEN.leaky_relu_.default: _Lowering._of_leaky_relu,
    _ATEN.max_pool2d.default: _Lowering._of_pool,
    _ATEN.avg_pool2d.default: _Lowering._of_average,
    _ATEN.add.Tensor: _Lowering._of_sum,
    _ATEN.add_.Tensor: _Lowering._of_sum,
    _ATEN.cat.default: _Lowering._of_cat,
    _ATEN.pad.default: _Lowering._of_pad,
    _ATEN.slice.Tensor: _Lowering._of_slice,
    _ATEN.upsample_bilinear2d.vec: _Lowering._of_upsample,
    _ATEN.upsample_nearest2d.vec: _Lowering._of_upsample,
}


# ---- what it costs -----------------------------------------------------------------------------------------------


def _said(op: _Op) -> str:
    """``op`` in a report: what it is, and what of it decides whether it is served."""
    if isinstance(op.module, nn.Conv2d | nn.ConvTranspose2d):
        size = "×".join(map(str, op.module.kernel_size))
        stride = "" if set(op.module.stride) == {1} else f" stride {op.module.stride[0]}"
        groups = "" if op.module.groups == 1 else f" groups {op.module.groups}"
        return f"{op.what} {size}{stride}{groups}"
    if op.module is None and op.what.startswith("upsample") and op.args[0][1] is not None:
        return f"{op.what}, where it doubles"
    return op.what


def _size(n: Any) -> int:
    """A size, as it was when it was traced."""
    return n if isinstance(n, int) else int(n.node.hint)


def _numel(x: Any) -> int:
    return math.prod(map(_size, x.shape))


def _bytes(node: fx.Node) -> int:
    """What a node's operator reads and writes, each tensor once."""
    if not _is_tensor(node):
        return 0
    tensors = [x.meta["val"] for x in (*node.all_input_nodes, node) if _is_tensor(x)]
    return sum(_numel(x) * x.element_size() for x in tensors)


def _flops(node: fx.Node) -> int:
    """Two for each multiplication of a convolution or a matrix product; other operators have few."""
    tensors = [x.meta["val"] for x in node.all_input_nodes if _is_tensor(x)]
    name = getattr(node.target, "_opname", "")
    if not _is_tensor(node) or len(tensors) < 2:
        return 0
    x, weight = tensors[:2]
    if name.startswith("conv"):
        pixels = x if "transpose" in name else node.meta["val"]
        return 2 * _numel(pixels) * _numel(weight) // int(weight.shape[0])
    if name in ("linear", "matmul", "mm", "bmm"):
        return 2 * _numel(node.meta["val"]) * _size(x.shape[-1])
    return 0
