"""What ``torch.export`` says of somebody's model: its graph, the calls of its modules, and for which inputs both hold.

The training IR is taken, which has the operators that the model called (``batch_norm``, not what it is made of), with
batch, height and width left open. Beside it, :class:`Structure` notes what the graph depends on that is no tensor:
types, attributes and modes of the modules. It tells quickly, in each call, whether they still are what they were.
"""

from __future__ import annotations

import enum
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from fastunet.conditions import condition

_PLAIN = (enum.Enum, int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, type)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PATCHES = ("forward", "_call_impl", "_compiled_call_impl")
OURS = ("forward", "fastunet_report", "_replicate_for_data_parallel")  # what an accelerated model has in its __dict__
_INTERNAL = {*nn.Module().__dict__, *_PATCHES, *OURS} - {"training"}


class NotTraced(Exception):
    """torch.export refused, or gave what is not understood here; the text says why."""


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is one of PyTorch's own that has no other inside: it is called, not traced through."""
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


def touched(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs anything besides its class's forward: hooks, a patch, a compiled call."""
    own = module.__dict__
    return any(own[name] for name in _HOOKS) or any(own.get(name) is not None for name in _PATCHES)


def _noted(value: Any) -> Any:
    """``value`` as it is compared later, if it decides nothing by its elements' values; else :data:`_IGNORED`."""
    if isinstance(value, _PLAIN) or (callable(value) and not isinstance(value, nn.Module)):
        return value
    if isinstance(value, (list, tuple)):
        if any(isinstance(x, Tensor) for x in value):
            return _IGNORED  # what a forward leaves there for itself
        items = [_noted(x) for x in value]
        return _IGNORED if _IGNORED in items else type(value)(items) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        items = [_noted(x) for x in value.values()]
        return _IGNORED if _IGNORED in items else dict(zip(value, items, strict=True))
    if isinstance(value, Tensor):
        return value  # its elements are read in each call, of this very tensor: compared by identity
    return _IGNORED


_IGNORED: Any = type("Ignored", (), {})()


def _frozen(value: Any) -> Any:
    """``value``, of what :func:`_noted` returns, as something that can be hashed."""
    if isinstance(value, dict):
        return tuple((key, _frozen(x)) for key, x in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(x) for x in value)
    return value


class Structure:
    """What the forward of ``model`` depends on besides its tensors, as it is now.

    It holds no reference to the model itself, which may hold one to it.

    Attributes:
        modules: every module inside by each of its names.
        touched: names of modules inside that run more than their class's forward.
        key: equal for structures of which one graph serves.
    """

    def __init__(self, model: nn.Module):
        everything = dict(model.named_modules(remove_duplicate=False))
        self.modules = {name: module for name, module in everything.items() if module is not model}
        self.touched = frozenset(name for name, module in self.modules.items() if touched(module))
        facts = []
        self._rows: list[tuple[nn.Module | None, type, int, Callable[[Any], Any], Any]] = []
        seen: set[nn.Module] = set()
        for name, module in everything.items():
            own, values = module.__dict__, {}
            for attribute, value in own.items():
                if attribute in _HOOKS or attribute == "_modules":
                    values[attribute] = type(value)(value)
                elif attribute not in ("_parameters", "_buffers"):
                    noted = _noted(value)
                    if noted is not _IGNORED:
                        values[attribute] = noted
            if module is model:  # hooks on the model itself run around whatever its forward is
                for attribute in _HOOKS:
                    values.pop(attribute, None)
            if module not in seen:
                seen.add(module)
                # The mode comes along twice, so that the getter never has a single name, whose value it would not pair.
                names = (*values, "training")
                getter, noted = itemgetter(*names), (*values.values(), module.training)
                self._rows.append((None if module is model else module, type(module), len(own), getter, noted))
            kept = tuple(
                (attribute, _frozen(value)) for attribute, value in values.items() if attribute not in _INTERNAL
            )
            facts.append((name, type(module), tuple(module._modules), kept))
        self.key = (self.touched, *facts)
        self.traces: list[Trace] = []  # what was traced of it

    def holds(self, model: nn.Module) -> bool:
        """Whether nothing of it changed since."""
        try:
            for part, kind, count, getter, values in self._rows:
                module = model if part is None else part
                own = module.__dict__
                if type(module) is not kind or len(own) != count or getter(own) != values:
                    return False
        except (KeyError, ValueError, RuntimeError):  # an attribute is gone, or became an array
            return False
        return True


class Call(NamedTuple):
    """One call of a module: of what it was called, in flattened names of values or constants, and what it returned.
    ``nodes`` are what it is in the graph."""

    name: str
    inputs: list[Any]
    in_spec: Any
    outputs: list[Any]
    nodes: list[fx.Node]


class Name(str):
    """The name of a value, among arguments of other kinds."""


class Trace:
    """The graph of one forward.

    Attributes:
        graph: of aten operators and sizes; a placeholder stands for each parameter, buffer and input.
        calls: the calls in it of PyTorch's own modules, and of modules that somebody listens to.
        tensors: what the model's names of the parameters and buffers are, by their placeholders.
        constants: tensors that the forward made, and subgraphs, by their names.
        inputs: the placeholders of inputs, in flattened order.
        outputs: what is returned, :class:`Name` or constant, flattened as ``out_spec`` says.
    """

    def __init__(self, model: nn.Module, structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]):
        program = _exported(model, structure, args, kwargs)
        signature = program.graph_signature
        self.graph: fx.Graph = program.graph
        self.tensors: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self._in_spec, self.out_spec = program.call_spec
        self.inputs: list[str | None] = []
        self._fixed: list[Any] = []
        for spec in signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.tensors[spec.arg.name] = spec.target
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self.constants[spec.arg.name] = program.constants[spec.target]
            elif spec.kind is InputKind.USER_INPUT:
                constant = isinstance(spec.arg, ConstantArgument)
                self.inputs.append(None if constant else spec.arg.name)
                self._fixed.append(spec.arg.value if constant else None)
            else:
                raise NotTraced(f"it takes a {spec.kind.name.lower().replace('_', ' ')}")
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
            raise NotTraced("it changes tensors in place that it was given")
        nodes = {node.name: node for node in self.graph.nodes}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self.constants[node.name] = getattr(program.graph_module, node.target)
        self.outputs = [
            Name(x.name) if isinstance(x, fx.Node) else x for x in pytree.tree_leaves(self.graph.output_node().args[0])
        ]
        heard = {id(structure.modules[name]) for name in structure.touched}
        others = {name: module for name, module in structure.modules.items() if id(module) not in heard}
        for inner in self.constants.values():
            if isinstance(inner, fx.GraphModule):
                _check_inner(inner, others, structure.modules)
        self.calls = [*_recorded(program, nodes), *_of_leaves(self.graph, others, self.tensors)]
        self._note_guards(program, nodes)
        # A graph that names a device or a dtype, or holds tensors, is right for these only.
        first = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self._made_for = (first.device, first.dtype)
        self._bound = bool(self.constants) or any(
            isinstance(x, (torch.device, torch.dtype))
            for node in self.graph.nodes
            if node.op == "call_function" and node.target is not torch.ops.aten._assert_tensor_metadata.default
            for x in pytree.tree_leaves((node.args, node.kwargs))
        )

    def _note_guards(self, program: Any, nodes: Mapping[str, fx.Node]) -> None:
        code = getattr(program, "_guards_code", None)
        if code is None:
            raise NotTraced("this PyTorch does not say for which sizes a graph holds")
        try:
            self._guards = [condition(line) for line in code]
        except ValueError as error:
            raise NotTraced(str(error)) from error
        self._shapes: list[list[tuple[int, int]] | None] = []  # of each input the least and the largest sizes
        for name in self.inputs:
            value = None if name is None else nodes[name].meta["val"]
            if not isinstance(value, Tensor):
                self._shapes.append(None)
                continue
            bounds = []
            for size in value.shape:
                if isinstance(size, int):
                    bounds.append((size, size))
                    continue
                within = program.range_constraints.get(size.node.expr)
                if within is None:  # a multiple of something, say
                    bounds.append((int(size), int(size)))
                else:
                    bounds.append((int(within.lower), int(within.upper) if within.upper.is_Integer else 2**63))
            self._shapes.append(bounds)

    def serves(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The inputs, flattened as :attr:`inputs`, if the graph holds for them; else None."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec != self._in_spec:
            return None
        for value, bounds, name, fixed in zip(leaves, self._shapes, self.inputs, self._fixed, strict=True):
            if bounds is None:
                if name is None and not (type(value) is type(fixed) and value == fixed):
                    return None
                continue
            if not isinstance(value, Tensor):
                return None
            shape = value.shape
            if len(shape) != len(bounds) or not all(
                low <= size <= high for size, (low, high) in zip(shape, bounds, strict=True)
            ):
                return None
            if self._bound and (value.device, value.dtype) != self._made_for:
                return None
        try:
            given = _forward_signature(model).bind(*args, **kwargs).arguments
            return leaves if all(holds(given) for holds in self._guards) else None
        except (TypeError, NameError, ArithmeticError, LookupError, AttributeError):
            return None


def _check_inner(graph: fx.GraphModule, others: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> None:
    """Refuse a part under no_grad or autocast, in which no module is called, if one in it has to be."""
    for node in graph.graph.nodes:
        for name, _ in node.meta.get("nn_module_stack", {}).values():
            name = name.partition("@")[0]
            module = modules.get(name)
            if module is not None and (name not in others or getattr(module, "momentum", 0) is None):
                raise NotTraced(f"{name}, which has to be called, is called under no_grad or autocast")
    for inner in graph.children():
        if isinstance(inner, fx.GraphModule):
            _check_inner(inner, others, modules)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _recorded(program: Any, nodes: Mapping[str, fx.Node]) -> Iterator[Call]:
    """The calls whose signatures torch.export was asked to keep."""
    for entry in program.module_call_graph:
        if not entry.fqn or entry.signature is None or not entry.signature.outputs:
            continue
        inputs, outputs = (
            [x.value if isinstance(x, ConstantArgument) else Name(x.name) for x in arguments]
            for arguments in (entry.signature.inputs, entry.signature.outputs)
        )
        # All that lies between them, but for sizes.
        found: dict[fx.Node, None] = {}
        waiting = [nodes[x] for x in outputs if isinstance(x, Name)]
        while waiting:
            node = waiting.pop()
            if node not in found and node.name not in inputs and node.op != "placeholder" and _is_tensor(node):
                found[node] = None
                waiting += node.all_input_nodes
        yield Call(entry.fqn.partition("@")[0], inputs, entry.signature.in_spec, outputs, list(found))


_ONE_INPUT = pytree.tree_structure(((0,), {}))


def _of_leaves(graph: fx.Graph, modules: Mapping[str, nn.Module], tensors: Mapping[str, str]) -> Iterator[Call]:
    """The calls of PyTorch's own modules that took one tensor and nothing else, and returned one."""
    regions: dict[str, tuple[str, list[fx.Node]]] = {}
    for node in graph.nodes:
        stack = [*node.meta.get("nn_module_stack", {}).items()]
        if node.op == "call_function" and stack and _is_tensor(node):
            key, (name, _) = stack[-1]  # the key tells apart several calls of one module
            if name in modules and is_leaf(modules[name]):
                regions.setdefault(key, (name, []))[1].append(node)
    owners = {placeholder: modules.get(of.rpartition(".")[0]) for placeholder, of in tensors.items()}
    for name, region in regions.values():
        # By identity: a module may have several names.
        own = {placeholder for placeholder, owner in owners.items() if owner is modules[name]}
        known = {*own, *(node.name for node in region)}
        inputs = {x.name for node in region for x in node.all_input_nodes if _is_tensor(x)} - known
        outputs = [node.name for node in region if any(user not in region for user in node.users)]
        if len(inputs) == len(outputs) == 1 and _is_called_plainly(modules[name], region):
            yield Call(name, [Name(inputs.pop())], _ONE_INPUT, [Name(outputs[0])], region)


def _is_called_plainly(module: nn.Module, region: Sequence[fx.Node]) -> bool:
    """Whether it is not a transposed convolution that was told the size of its output."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return True
    padding = region[-1].args[5] if len(region[-1].args) > 5 else [0] * len(module.output_padding)
    return list(padding) == list(module.output_padding)  # type: ignore[arg-type]


def _forward_signature(model: nn.Module) -> inspect.Signature:
    """Of the class's own forward, without self."""
    signature = inspect.signature(type(model).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _open(value: Any) -> Any:
    """Which sizes of an input are left open: all but the channels, and sizes of 1, which broadcast."""
    if not isinstance(value, Tensor):
        return None
    return {d: torch.export.Dim.AUTO for d, n in enumerate(value.shape) if d != 1 and n != 1}


def _exported(model: nn.Module, structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The exported program, with the signatures of the calls of modules that are touched."""
    heard = {id(structure.modules[name]) for name in structure.touched}
    wanted = tuple(name for name, module in structure.modules.items() if id(module) in heard)
    try:
        bound = _forward_signature(model).bind(*args, **kwargs)
    except TypeError as error:
        raise NotTraced(str(error)) from error
    shapes = pytree.tree_map(_open, dict(bound.arguments))
    with _as_called(model):
        try:
            return torch.export.export(
                model, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False,
                preserve_module_call_signature=wanted,
            )  # fmt: skip
        except Exception as error:  # whatever a model's forward raises under a tracer
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise NotTraced(lines[0].strip()) from error


@contextmanager
def _as_called(model: nn.Module) -> Iterator[None]:
    """Inside, modules are as their classes made them: no hooks, patches, autocast; and nothing is said.

    Hooks are no part of a graph: modules that have some are called. A batch norm without a momentum reads how many
    batches it has seen, which has no value in a graph; it too is called.
    """
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    patched = {name: model.__dict__.pop(name) for name in _PATCHES if name in model.__dict__}

    def put(own: dict[str, Any], name: str, value: Any) -> None:
        replaced.append((own, name, own[name]))
        own[name] = value

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Instead of whatever hooks there are, to offload, say: only the last ones count.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        for owner, name in (
            (torch.autograd.Function, "apply"),
            (Tensor, "register_hook"),
            (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
        ):
            if hasattr(owner, name):
                stack.enter_context(_refused(owner, name))
        stack.enter_context(_attributes_kept(model))
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            for module in model.modules():
                own = module.__dict__
                for name in _HOOKS:
                    if own[name]:
                        put(own, name, type(own[name])())
                if isinstance(module, nn.modules.batchnorm._NormBase) and own.get("momentum", 0) is None:
                    put(own, "momentum", 0.1)
            yield
        finally:
            for own, name, value in replaced:
                own[name] = value
            model.__dict__.update(patched)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _refused(owner: Any, name: str) -> Iterator[None]:
    """Inside, ``owner.name`` raises in this thread: what it does to gradients is no part of a graph."""
    own, kept, thread = name in owner.__dict__, getattr(owner, name), threading.get_ident()
    raw = owner.__dict__.get(name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise NotTraced(f"its forward calls {owner.__name__}.{name}, of which a graph knows nothing")
        return kept(*args, **kwargs) if not isinstance(raw, classmethod) else raw.__func__(*args, **kwargs)

    setattr(owner, name, classmethod(refuse) if isinstance(raw, classmethod) else refuse)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, raw)
        else:
            delattr(owner, name)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, setting an attribute of a module of ``model`` raises: nothing would set it later."""
    inside, usual = {id(m) for m in model.modules() if not is_leaf(m)}, nn.Module.__setattr__

    def refuse(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in inside and not (name in module._parameters or name in module._buffers):
            raise NotTraced(f"its forward sets {type(module).__name__}.{name}")
        usual(module, name, value)

    nn.Module.__setattr__ = refuse  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.__setattr__ = usual  # type: ignore[method-assign]
