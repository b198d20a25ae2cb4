"""How operators are registered, differentiated and called; every private name of PyTorch's C++ part is used here.

:func:`register` defines one from its schema. Its derivative follows from names, as in PyTorch's derivatives.yaml: see
:func:`register_backward`. :func:`call` and :func:`run` reach an operator's function without the dispatcher, whose way
takes 20 µs, where no mode, tracer or profiler has to see the call.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._library.utils import get_layout_constraint_tag
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from fastunet.architecture import pretended
from fastunet.backend import deciding, repeating, requested, serving
from fastunet.layout import activation, memory_format, no_stats
from fastunet.versions import numbers

Operator = Any  # torch._ops.OpOverload

_C, _dispatch_keys = torch._C, torch._C._dispatch_keys  # looked up a thousand times a step
_LIBRARY = torch.library.Library("fastunet", "DEF")
_FUNCTIONS: dict[Operator, type[torch.autograd.Function]] = {}
_IMPLEMENTATIONS: dict[Operator, Callable[..., Any]] = {}
_GRADIENTS: dict[Operator, list[list[str]]] = {}  # of which arguments a backward's results are the gradients


# ---- registration ------------------------------------------------------------------------------------------------


def register(
    schema: str,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    backward: Operator = None,
    results: Mapping[str, bool | str] | None = None,
) -> Operator:
    """Define an operator; its implementation is the function of that name in the chosen backend.

    Args:
        schema: as PyTorch writes it; the last argument is ``backend``.
        fake: gives the result's shape, dtype and strides; takes those of the operator's arguments that it names.
        check: raises ValueError or TypeError for arguments that do not fit together, since kernels trust sizes; takes
            those that it names. That all tensors lie on one device is always checked.
        backward: what :func:`register_backward` returned; None: there is no derivative.
        results: the names of the results in order, and whether each has a gradient: True, False, or the argument that
            says so. A result without one is empty, or is read by the backward only.
    """
    names = _names(_C.parse_schema(schema))
    operator = _define(schema, _bound(fake, names), None if check is None else _bound(check, names))
    if backward is None:
        _FUNCTIONS[operator] = _underivable(operator)
    else:
        assert results is not None
        _FUNCTIONS[operator] = _derivative(operator, backward, results)
    _LIBRARY.impl(operator._opname, lambda *args: _differentiable(operator, *args), "Autograd")
    return operator


def register_backward(
    schema: str, gradients: str, fake: Callable[..., Any] | None = None, **unlike: Callable[..., Tensor]
) -> Operator:
    """Define the backward of an operator. The names of its arguments say what it is called with.

    "dy" is the gradient of the forward's result "y", and None where there is none; "mask" says which groups of
    ``gradients`` are wanted, in booleans. Any other name is that of an argument or a result of the forward, and what is
    neither is None. The first result serves the gradients of the others alone: where those have none, an empty tensor
    stands for it.

    Args:
        schema: as in :func:`register`.
        gradients: the arguments of the forward whose gradients are the results, in groups: "x affine, weight, bias". A
            group of two is a source and its affine.
        fake: as in :func:`register`. By default a gradient looks like the argument it is the gradient of, but for a
            source's, which is channels_last; and what is not wanted is empty.
        **unlike: by name, how a gradient looks if it is wanted and does not look like the argument.
    """
    names, groups = _names(_C.parse_schema(schema)), [group.split() for group in gradients.split(",")]
    operator = _define(schema, _bound(fake, names) if fake else _gradients_fake(names, groups, unlike))
    _GRADIENTS[operator] = groups
    return operator


def register_composite(schema: str, function: type[torch.autograd.Function]) -> Operator:
    """Define an operator that is ``function`` and nothing of its own: whoever traces sees what that calls."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, lambda *args: apply(function, *args), "CompositeImplicitAutograd")
    return getattr(torch.ops.fastunet, name).default


def _define(
    schema: str, fake: Callable[[Sequence[Any]], Any], check: Callable[[Sequence[Any]], None] | None = None
) -> Operator:
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    operator = getattr(torch.ops.fastunet, name).default
    names, like = _names(operator._schema), deciding(name)

    def implementation(*args: Any) -> Any:
        if check is not None:
            check(args)
        _, function = serving(name, args)
        x = args[like]
        with _C._DisableAutocast():
            if x.is_cuda and x.get_device() != torch.cuda.current_device():
                with torch.cuda.device(x.device):
                    return function(*args[:-1])
            return function(*args[:-1])

    def repeated(*args: Any) -> Any:
        """The same, by what an earlier call did where Triton may be asked."""
        x, chip, backend = args[like], pretended(), requested(args[-1])
        if backend != "torch" and (x.is_cuda or chip is not None):
            device = x.get_device()
            again = repeating("cuda", device) if x.is_cuda else repeating("cpu", None)
            if again is not None and (not x.is_cuda or device == torch.cuda.current_device()):
                key = name, backend, device, chip, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
                with _C._DisableAutocast():
                    return again(key, implementation, args, like)
        return implementation(*args)

    def dispatched(*args: Any) -> Any:
        if _unseen() and _ordinary(args):
            return repeated(*args)
        _check_devices(names, like, args)
        _refuse_tangents(args)
        return implementation(*args)

    def checked_fake(*args: Any) -> Any:
        _introduce_to_inductor()
        _check_devices(names, like, args)
        if check is not None:
            check(args)
        return fake(args)

    _IMPLEMENTATIONS[operator] = repeated  # for those who have made sure of what ``dispatched`` checks
    _LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunet::{name}", checked_fake, lib=_LIBRARY)
    return operator


def _introduce_to_inductor() -> None:
    """Tell inductor, if somebody uses it, that our operators run as they are: what it finds out by itself too, but
    before PyTorch 2.13 it makes a text first, of the operator's arguments and theirs and so on, which never ends."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or numbers(torch.__version__) >= (2, 13):
        return
    for operator in _IMPLEMENTATIONS:
        if operator not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator))
            lowering.make_fallback(operator, constraint, warn=False)


def _names(schema: Any) -> list[str]:
    return [argument.name for argument in schema.arguments]


def _picking(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the elements at ``positions`` out of a sequence."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0))


def _bound(function: Callable[..., Any], names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """``function`` of all the arguments of an operator, of which it takes those that it has a parameter for."""
    pick = _picking([names.index(name) for name in inspect.signature(function).parameters])
    return lambda args: function(*pick(args))


def _gradients_fake(
    names: Sequence[str], groups: Sequence[Sequence[str]], unlike: Mapping[str, Callable[..., Tensor]]
) -> Callable[[Sequence[Any]], Any]:
    """The fake of a backward with arguments ``names``, as :func:`register_backward` says it."""
    others = {name: _bound(function, names) for name, function in unlike.items()}

    def gradients(args: Sequence[Any]) -> Any:
        given = dict(zip(names, args, strict=True))
        like = next(x for x in map(given.get, ("x0", "x", "logits")) if x is not None)
        found: list[Tensor] = []
        for (name, *affine), wanted in zip(groups, given.get("mask", [True] * len(groups)), strict=True):
            x = given.get(name)
            if name in others:
                looks = others[name](args)
                found.append(looks if wanted else looks.new_empty(0))
            elif not wanted or x is None:
                found += [(like if x is None else x).new_empty(0), *(no_stats(like) for _ in affine)]
            elif affine:
                rows = given[affine[0]]
                found += [activation(x, x.shape), no_stats(x) if rows is None else rows.new_empty(rows.shape)]
            else:
                found.append(torch.empty_like(x, memory_format=memory_format(x)))
        return tuple(found) if len(found) > 1 else found[0]

    return gradients


def _derivative(
    operator: Operator, backward: Operator, results: Mapping[str, bool | str]
) -> type[torch.autograd.Function]:
    """The derivative of ``operator`` by ``backward``.

    Everything that follows from names is found out here, once, as positions: a step is dozens of these.
    """
    names, outputs, groups = _names(operator._schema), list(results), _GRADIENTS[backward]
    kinds = {argument.name: str(argument.type) for argument in backward._schema.arguments}

    # Kept from the forward's arguments and results: those that the backward takes, tensors apart from others.
    known = [*names, *outputs]
    tensors = [i for i, name in enumerate(known) if "Tensor" in kinds.get(name, "")]
    others = [i for i, name in enumerate(known) if name in kinds and i not in tensors]
    tensors_of, others_of = _picking(tensors), _picking(others)
    # Where the backward's arguments are among the gradients, what was kept, the mask and a None, in this order.
    there = [*(f"d{name}" for name in outputs), *(known[i] for i in tensors + others), "mask"]
    positions = [there.index(name) if name in there else len(there) for name in kinds]
    assert all(name in there or kind == "Optional[Tensor]" for name, kind in kinds.items()), f"{operator}: {there}"

    count, several, masked = len(names), len(outputs) > 1, "mask" in kinds
    sources = [(names.index(group[0]), names.index(group[-1])) for group in groups]
    gives = list(enumerate(names.index(name) for group in groups for name in group))
    # Results that have no gradient unless the argument at a position says so; None: they never have one.
    without = [(i, names.index(has) if has else None) for i, has in enumerate(results.values()) if has is not True]
    first, serves = len(names), [i for _, i in without if i is not None] if outputs[0] in kinds else []

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            found = run(operator, *args)
            if not several:
                values = [*args, found]
            else:
                ctx.set_materialize_grads(False)
                ctx.mark_non_differentiable(*[found[i] for i, has in without if has is None or not args[has]])
                values = [*args, *found]
                if serves and not any([args[i] for i in serves]):
                    values[first] = found[0].new_empty(0)  # keep no memory that the backward has no use for
            ctx.save_for_backward(*tensors_of(values))
            ctx.others = others_of(values)
            return found

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            refuse_second_derivative()
            for gradient in gradients:
                if gradient is not None:
                    break
            else:
                return (None,) * count
            need = ctx.needs_input_grad
            mask = [need[x] or need[affine] for x, affine in sources] if masked else None
            given = (*gradients, *ctx.saved_tensors, *ctx.others, mask, None)
            found = run(backward, *[given[i] for i in positions])  # no itemgetter: compiled autograd does not know one
            if len(gives) == 1:
                found = (found,)
            wanted: list[Tensor | None] = [None] * count
            for i, position in gives:
                if need[position]:
                    wanted[position] = found[i]
            return tuple(wanted)

    Derivative.__name__ = Derivative.__qualname__ = operator._opname
    return Derivative


def _underivable(operator: Operator) -> type[torch.autograd.Function]:
    """``operator``, which has no derivative: a program that was exported without gradients may be called with them, but
    nobody gets one that is missing a part."""

    class Underivable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return run(operator, *args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(
                f"expected no gradient through fastunet::{operator._opname}, which has no derivative, got a backward; "
                "export or trace the network with gradients enabled, where it is not called"
            )

    Underivable.__name__ = Underivable.__qualname__ = operator._opname
    return Underivable


def refuse_second_derivative() -> None:
    """Refuse create_graph=True in a backward: a gradient penalty would silently be constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "expected a first derivative, got create_graph=True: fastunet's operators have no second one; take the "
            "same network of fastunet.reference"
        )


# ---- refusals ----------------------------------------------------------------------------------------------------


def _check_devices(names: Sequence[str], like: int, args: Sequence[Any]) -> None:
    """Refuse tensors on two devices: kernels trust pointers, and from one on the meta device ATen makes numbers that
    nobody computed."""
    device = args[like].device
    for name, x in zip(names, args, strict=True):
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(
                f"expected {name} on {device}, where {names[like]} is, got one on {x.device}; move one of them"
            )


def _refuse_tangents(args: Sequence[Any]) -> None:
    """Refuse forward-mode derivatives, which would silently be zero."""
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "expected no forward-mode derivative, got a tensor with a tangent: fastunet's operators differentiate "
                "backward only; take the same network of fastunet.reference"
            )


def refuse_tracing() -> None:
    """Say that torch.jit.trace is not served."""
    raise RuntimeError(
        "expected a call outside torch.jit.trace, which does not know fastunet's operators, got one inside; use "
        "torch.export, or trace the same computation of fastunet.reference"
    )


def refuse_scripting() -> None:
    """Say that torch.jit.script is not served."""
    raise RuntimeError(
        "expected no torch.jit.script, which does not know fastunet's operators, got a network to compile; use "
        "torch.export, or script the same network of fastunet.reference"
    )


def refuse_transforms() -> None:
    """Say why a call inside a transform of torch.func failed, if it was one."""
    if _C._are_functorch_transforms_active():
        raise RuntimeError(
            "expected no transform of torch.func, got a call inside one: fastunet's operators have none; take the same "
            "network of fastunet.reference"
        )


# ---- calls -------------------------------------------------------------------------------------------------------


def call(operator: Operator, *args: Any) -> Any:
    """``operator(*args)``, by the shorter way: a network's forward is dozens of small calls.

    Outside a compiler the autograd.Function is applied here rather than found by the dispatcher.
    """
    return operator(*args) if torch.compiler.is_compiling() else _differentiable(operator, *args)


def _differentiable(operator: Operator, *args: Any) -> Any:
    if torch.is_grad_enabled():
        return apply(_FUNCTIONS[operator], *args)
    return run(operator, *args)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, whose errors for what has no derivative here are a sentence of this library's."""
    try:
        if not (_unseen() and _ordinary(args)):
            return function.apply(*args)
        _thread.checked = True
        # The apply of the base class: torch's own searches the arguments for leftovers of torch.func first.
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    except RuntimeError:
        if not torch.compiler.is_compiling():
            refuse_transforms()
            _refuse_tangents(args)
        raise
    finally:
        _thread.checked = False


class _Thread(threading.local):
    """``checked``: the next :func:`run` in this thread gets arguments that :func:`apply` has looked at."""

    checked = False


_thread = _Thread()


def run(operator: Operator, *args: Any) -> Any:
    """``operator(*args)`` without a derivative.

    Where nobody else is to see the call, no argument is more than it seems and all lie on one device, it is the
    implementation's, without the dispatcher.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo knows operators, and not the calls below
        return operator(*args)
    checked, _thread.checked = _thread.checked, False
    with _C._AutoDispatchBelowAutograd():
        if checked or (_unseen() and _ordinary(args)):
            return _IMPLEMENTATIONS[operator](*args)
        try:
            return operator(*args)
        except RuntimeError:
            if _C._get_tracing_state():  # the tracer fails an assertion at lists of integers
                refuse_tracing()
            raise


def runner(operation: Any) -> Callable[..., Any]:
    """What calls an operation, anybody's, without a derivative: :func:`run`, if it is one of those that it knows."""
    return partial(run, operation) if operation in _IMPLEMENTATIONS else operation


class Listener(TorchDispatchMode):
    """A mode that sees what its thread calls and changes nothing of it.

    PyTorch's own tell all threads by one flag, which two that listen at the same time would leave set; and the first
    that is entered imports Dynamo, to keep it away, which takes seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> Listener:
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()


class _Noting(threading.local):
    modes = 0


_noting = _Noting()


@contextmanager
def noted_by(mode: Listener) -> Iterator[None]:
    """Inside, ``mode`` sees what is called: to be :func:`unwatched` by others is enough."""
    with mode:
        _noting.modes += 1
        try:
            yield
        finally:
            _noting.modes -= 1


def _intercepted(modes: int = 0) -> object:
    """Whether a mode, beside so many, a transform or a tracer takes the place of what is called."""
    return (
        _C._len_torch_dispatch_stack() > modes
        or _C._dispatch_tls_is_dispatch_key_included(_C.DispatchKey.PreDispatch)
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state()
    )


def unwatched() -> bool:
    """Whether neither a compiler nor a tracer, a mode nor a transform of functions sees what is called."""
    return not (torch.compiler.is_compiling() or _intercepted(_noting.modes))


def transformed() -> bool:
    """Whether a compiler, a tracer, a transform of functions or a forward-mode derivative takes what is called."""
    return bool(
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def replaced() -> bool:
    """Whether a mode may replace functions of PyTorch's while they are called from Python."""
    return bool(_C._len_torch_function_stack())


def free() -> bool:
    """Whether other operations with the same results may be called: gradients are off, and nobody takes or replaces
    what is called (:func:`transformed`, :func:`replaced`)."""
    return not (torch.is_grad_enabled() or transformed() or replaced())


def _unseen() -> bool:
    """Whether nobody sees an operator's call: no mode, transform, tracer, profiler or forward-mode derivative."""
    return not (_intercepted() or replaced() or _C._autograd._profiler_enabled() or forward_ad._current_level >= 0)


def _keys(device: str) -> set[int]:
    """The dispatch keys of tensors on ``device`` that are nothing else besides: made with gradients, or without."""
    keys = _C.DispatchKey
    made = _C.DispatchKeySet(getattr(keys, device)).add(getattr(keys, f"Autocast{device}"))
    return {made.raw_repr(), made.add(keys.ADInplaceOrView).add(getattr(keys, f"Autograd{device}")).raw_repr()}


_KEYS = _keys("CPU") | _keys("CUDA")
_TYPES = {type(None), bool, int, float, str, list, tuple, torch.Size, torch.dtype}


def _ordinary(args: Sequence[Any]) -> bool:
    """Whether arguments are what they seem, no subclass, no view with a sign, no symbol, nothing batched or fake, and
    the tensors lie on one device."""
    first = None
    for x in args:
        if type(x) in _TYPES:
            continue
        if not isinstance(x, Tensor) or _dispatch_keys(x).raw_repr() not in _KEYS:
            return False
        device = x.get_device()  # −1 on the CPU; faster than x.device
        if first is None:
            first = device
        elif device != first:
            return False
    return True


def composition(operator: Operator) -> Callable[..., Any] | None:
    """What PyTorch composes ``operator`` of, as one function; None if it has a kernel of its own."""
    if not _C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
        return None
    return partial(operator._op_dk, _C.DispatchKey.CompositeImplicitAutograd)


def has_values(x: Tensor) -> bool:
    """Whether code may look at the values of ``x`` here and now: it is no fake, no batch, and nobody traces."""
    return not (
        _dispatch_keys(x).raw_repr() not in _KEYS
        or _C._get_dispatch_mode(_C._TorchDispatchModeKey.FAKE)
        or _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY)
        or _C._dispatch_tls_is_dispatch_key_included(_C.DispatchKey.PreDispatch)
        or _C._get_tracing_state()
    )
