"""The operators ``torch.ops.fastunet.*``: the one place where they are registered.

Each operator has a schema, two implementations with one signature (:mod:`fastunet.aten`, :mod:`fastunet.kernels`), a
fake that gives the result's shape, dtype and strides, and an exact derivative. The last argument of every operator,
``backend``, is "torch", "triton" or "auto" (see :func:`resolve_backend`). Derivatives are once differentiable.

A *source* ``(x, affine, relu)`` stands for ``act(scale·(x − centre) + shift)``: see :mod:`fastunet.aten`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastunet import aten
from fastunet.architecture import pretending
from fastunet.layout import memory_format, stats_dtype

BACKENDS = ("auto", "torch", "triton")
_LIBRARY = torch.library.Library("fastunet", "DEF")
_C, _dispatch_keys = torch._C, torch._C._dispatch_keys  # looked up a thousand times a step
_FUNCTIONS: dict[Callable[..., Any], type[torch.autograd.Function]] = {}
_IMPLEMENTATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}

# By whether the interpreter runs them: its bfloat16 arithmetic is wrong, and only it computes in float64.
_KERNEL_DTYPES = {
    False: (torch.float32, torch.float16, torch.bfloat16),
    True: (torch.float32, torch.float16, torch.float64),
}
_KERNEL_DTYPES_SAID = {
    False: "float32, float16 and bfloat16",
    True: "float32, float16 and float64 in the interpreter",
}


# ---- choice ------------------------------------------------------------------------------------------------------


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def triton_unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on this device, in a few words; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'fastunet[triton]')"
    if interpreting():
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    if device_type != "cuda":
        return f"Triton kernels need a CUDA device and the tensors are on {device_type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def check_backend(backend: str) -> None:
    """Raise ValueError for a ``backend`` that is none, before an operator prints its schema."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; check FASTUNET_BACKEND too")


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend ("torch" or "triton") that serves tensors of ``dtype`` on ``device``.

    ``backend="auto"`` takes FASTUNET_BACKEND if that is set, else Triton wherever its kernels run: CUDA GPUs of
    compute capability 8.0 or newer, or CPU tensors under TRITON_INTERPRET=1. float64 on a GPU and bfloat16 in the
    interpreter (whose bfloat16 arithmetic is wrong) go to torch.

    Raises:
        ValueError: unknown backend, or "triton" asked for where it cannot run.
    """
    return _resolved(wished(backend), device, dtype)


def _resolved(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """:func:`resolve_backend` of what is wished."""
    if backend not in BACKENDS:
        check_backend(backend)
    if backend == "torch":
        return backend
    kind = device.type
    reason = None if kind == "meta" and pretending() else triton_unavailable(kind, device.index)
    if reason is None and dtype.is_floating_point:
        interpreted = kind != "cuda" and interpreting()  # where it is a GPU, that is a reason above
        if dtype not in _KERNEL_DTYPES[interpreted]:
            reason = f"the Triton kernels take {_KERNEL_DTYPES_SAID[interpreted]}, and the tensors are {dtype}"
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend='triton' cannot be used here: {reason}")
        return backend
    if reason is None:
        return "triton"
    if kind == "cuda":
        _warn_once(f"fastunet runs on the torch backend: {reason}")
    return "torch"


def wished(backend: str) -> str:
    """``backend``, or what FASTUNET_BACKEND says in place of "auto"."""
    return os.environ.get("FASTUNET_BACKEND", backend) if backend == "auto" else backend


def _module(backend: str) -> ModuleType:
    if backend == "torch":
        return aten
    from fastunet import kernels

    return kernels


# Whose dtype and device decide the backend: the first there is.
_DECIDING = ("x0", "x", "logits", "mask", "mean", "var")


@functools.cache
def _deciding(name: str) -> int:
    names = [argument.name for argument in getattr(torch.ops.fastunet, name).default._schema.arguments]
    return next(names.index(x) for x in _DECIDING if x in names)


def serving(name: str, args: Sequence[Any]) -> tuple[str, Callable[..., Any]]:
    """The backend that serves operator ``name`` called with ``args``, and its function, which takes no ``backend``.

    Under "auto" the Triton backend leaves the matrix products of those layers to cuDNN for which its table says so.
    """
    like = args[_deciding(name)]
    asked = wished(args[-1])
    backend = _resolved(asked, like.device, like.dtype)
    function = getattr(_module(backend), name)
    if backend == "triton" and asked == "auto" and name in ("conv2d", "conv2d_act", "conv2d_backward"):
        function = functools.partial(function, mixed=True)
    return backend, function


def _activation(like: Tensor, shape: Sequence[int]) -> Tensor:
    """What operators return activations in: channels_last memory."""
    return like.new_empty(shape).contiguous(memory_format=torch.channels_last)


# ---- registration ------------------------------------------------------------------------------------------------


def _register(
    schema: str,
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    check: Callable[..., None] = lambda *operands: None,
) -> Callable[..., Any]:
    """Define one operator from its schema; its implementation is the function of that name in the chosen backend.

    ``check`` raises ValueError or TypeError for operands that do not fit together: kernels trust sizes. Every operator
    checks that all its tensors lie on one device.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    operator = getattr(torch.ops.fastunet, name).default
    names = [argument.name for argument in operator._schema.arguments]
    deciding = _deciding(name)

    def implementation(*args: Any) -> Any:
        operands = args[:-1]
        check(*operands)
        like = operands[deciding]
        _, call = serving(name, args)
        with torch._C._DisableAutocast():
            if like.is_cuda and like.get_device() != torch.cuda.current_device():
                with torch.cuda.device(like.device):
                    return call(*operands)
            return call(*operands)

    def dispatched(*args: Any) -> Any:
        _check_devices(names, deciding, args)
        _refuse_tangents(args)
        return implementation(*args)

    def checked_fake(*args: Any) -> Any:
        _check_devices(names, deciding, args)
        check(*args[:-1])
        return fake(*args)

    _IMPLEMENTATIONS[operator] = implementation  # for those who have made sure of what the dispatcher's way checks
    _LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunet::{name}", checked_fake, lib=_LIBRARY)
    if function is not None:
        _FUNCTIONS[operator] = function
        _LIBRARY.impl(name, lambda *args: _differentiable(operator, *args), "Autograd")
    return operator  # type: ignore[no-any-return]


def _check_devices(names: Sequence[str], deciding: int, args: Sequence[Any]) -> None:
    """Every tensor lies where the one does that decides the backend: kernels trust pointers, and what ATen makes of a
    tensor on the meta device is memory that nobody wrote."""
    device = args[deciding].device
    for name, x in zip(names, args, strict=True):
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(
                f"expected {name} on {device}, where {names[deciding]} is, got one on {x.device}; move one of them"
            )


def _refuse_tangents(args: Sequence[Any]) -> None:
    """Refuse forward-mode derivatives, which would silently be zero."""
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "expected no forward-mode derivative, got a tensor with a tangent: fastunet's operators differentiate "
                "backward only; fastunet.reference has the same networks with both"
            )


def _differentiable(operator: Callable[..., Any], *args: Any) -> Any:
    if torch.is_grad_enabled():
        return _applied(_FUNCTIONS[operator], *args)
    return _run(operator, *args)


def _applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, whose errors for what has no derivative here are a sentence of this library's."""
    try:
        if not (_unseen() and _plain(args)):
            return function.apply(*args)
        _thread.checked = True
        # Nothing of torch.func is left over among the arguments, for which apply would search them.
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    except RuntimeError:
        if not torch.compiler.is_compiling():
            refuse_transforms()
            _refuse_tangents(args)
        raise
    finally:
        _thread.checked = False


def refuse_tracing() -> None:
    """Say that torch.jit.trace is not served."""
    raise RuntimeError(
        "expected a call outside torch.jit.trace, which does not know fastunet's operators; use torch.export, or trace "
        "the same computation of fastunet.reference"
    )


def refuse_transforms() -> None:
    """Say why a call inside a transform of torch.func failed, if it was one."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "expected no transform of torch.func, got a call inside one: fastunet's operators have none; "
            "fastunet.reference has the same networks for them"
        )


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """``operator(*args)``, by the shorter way: a network's forward is dozens of small calls.

    Outside a compiler the autograd.Function is applied here rather than found by the dispatcher.
    """
    return operator(*args) if torch.compiler.is_compiling() else _differentiable(operator, *args)


def _first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse create_graph=True: there is no second derivative, and a gradient penalty would silently be constant."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a first derivative, got create_graph=True: fastunet's operators have no second one; "
                "fastunet.reference has the same networks with it"
            )
        return backward(ctx, *gradients)

    return checked


class _Thread(threading.local):
    """``checked``: the next :func:`_run` in this thread gets arguments that :func:`_applied` has looked at."""

    checked = False


_thread = _Thread()


def _run(operator: Callable[..., Any], *args: Any) -> Any:
    """``operator(*args)`` without a derivative.

    Where nobody else is to see the call, no argument is more than it seems and all lie on one device, it is the
    implementation's, without the dispatcher's 20 µs.
    """
    if torch.compiler.is_dynamo_compiling():  # which knows operators, and not what follows
        return operator(*args)
    checked, _thread.checked = _thread.checked, False
    with torch._C._AutoDispatchBelowAutograd():
        if checked or (_unseen() and _plain(args)):
            return _IMPLEMENTATIONS[operator](*args)
        try:
            return operator(*args)
        except RuntimeError:
            if torch._C._get_tracing_state():  # which fails an assertion of its own at lists of integers
                refuse_tracing()
            raise


def _unseen() -> bool:
    """Whether no mode, transform, tracer, profiler or forward-mode derivative watches."""
    return not (
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._dispatch_tls_is_dispatch_key_included(_C.DispatchKey.PreDispatch)
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state()
        or _C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def unwatched() -> bool:
    """Whether neither a compiler nor a tracer, a mode nor a transform of functions sees what is called."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


def _ordinary(device: str) -> set[int]:
    """The dispatch keys of tensors on ``device`` that are nothing else besides: made with gradients, or without."""
    keys = torch._C.DispatchKey
    made = torch._C.DispatchKeySet(getattr(keys, device)).add(getattr(keys, f"Autocast{device}"))
    return {made.raw_repr(), made.add(keys.ADInplaceOrView).add(getattr(keys, f"Autograd{device}")).raw_repr()}


_ORDINARY = _ordinary("CPU") | _ordinary("CUDA")
_PLAIN = {type(None), bool, int, float, str, list, tuple, torch.Size, torch.dtype}


def _plain(args: Sequence[Any]) -> bool:
    """Whether arguments are what they seem, no subclass, no view with a sign, no symbol, nothing batched or fake, and
    the tensors lie on one device."""
    first = None
    for x in args:
        if type(x) in _PLAIN:
            continue
        if not isinstance(x, Tensor) or _dispatch_keys(x).raw_repr() not in _ORDINARY:
            return False
        place = x.get_device()  # of the CPU −1; sooner told than x.device
        if first is None:
            first = place
        elif place != first:
            return False
    return True


def has_values(x: Tensor) -> bool:
    """Whether code may look at the values of ``x`` here and now: it is no fake, no batch, and nobody traces."""
    return not (
        torch._C._dispatch_keys(x).raw_repr() not in _ORDINARY
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or torch._C._get_tracing_state()
    )


def _given(gradient: Tensor, wanted: bool) -> Tensor | None:
    return gradient if wanted else None


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_source(x: Tensor, affine: Tensor | None, like: Tensor) -> None:
    """One source, beside operand ``like``: rank, batch, dtype, and an affine that fits it."""
    if x.dim() != 4:
        raise ValueError(f"expected a source of shape (N, C, H, W), got {_shape(x)}")
    if x.shape[0] != like.shape[0]:
        raise ValueError(f"expected sources of one batch size, got {like.shape[0]} and {x.shape[0]}")
    _check_kind("source", x, like)
    if affine is not None:
        if affine.dim() != 2 or affine.shape[0] != 3 or affine.shape[1] != x.shape[1]:
            raise ValueError(
                f"expected an affine of shape (3, {x.shape[1]}) for {x.shape[1]} channels, got {_shape(affine)}"
            )
        if affine.dtype != stats_dtype(x.dtype):
            raise TypeError(f"expected an affine of {stats_dtype(x.dtype)} for a {x.dtype} source, got {affine.dtype}")


def _check_kind(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype:
        raise TypeError(f"expected a {name} of the source's dtype {like.dtype}, got {x.dtype}")


def _check_filters(
    weight: Tensor, bias: Tensor | None, x: Tensor, axis: int, channels: int, sides: Sequence[int]
) -> None:
    """Weights whose dimension ``axis`` reads ``channels`` channels, square with a side in ``sides``; and their bias."""
    _check_kind("weight", weight, x)
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] in sides
    if not square or weight.shape[axis] != channels:
        pair = f"({channels}, K" if axis == 0 else f"(K, {channels}"
        shapes = " or ".join(f"{pair}, {side}, {side})" for side in sides)
        raise ValueError(
            f"expected a weight of shape {shapes} for sources of {channels} channels, got {_shape(weight)}"
        )
    if bias is not None:
        _check_kind("bias", bias, x)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[1 - axis]:
            raise ValueError(f"expected a bias of shape ({weight.shape[1 - axis]},), got {_shape(bias)}")


def _empty_stats(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=stats_dtype(x.dtype))


# ---- affine_act --------------------------------------------------------------------------------------------------


class _AffineAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Tensor | None, relu: bool, backend: str) -> Tensor:
        ctx.save_for_backward(x, affine)
        ctx.config = (relu, backend)
        return _run(affine_act, x, affine, relu, backend)  # type: ignore[no-any-return]

    @staticmethod
    @_first_order
    def backward(ctx: Any, dz: Tensor) -> Any:
        dx, daffine = _run(affine_act_backward, dz, *ctx.saved_tensors, *ctx.config)
        return _given(dx, ctx.needs_input_grad[0]), _given(daffine, ctx.needs_input_grad[1]), None, None


def _affine_act_fake(x: Tensor, affine: Tensor | None, relu: bool, backend: str) -> Tensor:
    return _activation(x, x.shape)


def _affine_act_backward_fake(dz: Tensor, x: Tensor, affine: Tensor | None, relu: bool, backend: str) -> Any:
    return _source_gradient_fake(x, affine)


affine_act = _register(
    "affine_act(Tensor x, Tensor? affine, bool relu, str backend) -> Tensor",
    _affine_act_fake,
    _AffineAct,
    lambda x, affine, relu: _check_source(x, affine, x),
)
affine_act_backward = _register(
    "affine_act_backward(Tensor dz, Tensor x, Tensor? affine, bool relu, str backend) -> (Tensor, Tensor)",
    _affine_act_backward_fake,
)


# ---- bn_affine ---------------------------------------------------------------------------------------------------


def _bn_gradients(ctx: Any, daffine: Tensor) -> list[Tensor | None]:
    var, weight = ctx.saved_tensors
    dmean, dvar, dweight, dbias = _run(bn_affine_backward, daffine, var, weight, *ctx.config)
    need = ctx.needs_input_grad
    return [
        _given(dmean, need[0]),
        _given(dvar, need[1]),
        dweight.to(ctx.dtypes[0]) if need[2] else None,
        dbias.to(ctx.dtypes[1]) if need[3] else None,
    ]


class _BnAffine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
    ) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.config = (eps, backend)
        ctx.dtypes = (weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        return _run(bn_affine, mean, var, weight, bias, eps, backend)  # type: ignore[no-any-return]

    @staticmethod
    @_first_order
    def backward(ctx: Any, daffine: Tensor) -> Any:
        return *_bn_gradients(ctx, daffine), None, None


class _BnAffineRunning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        count: int,
        momentum: float,
        eps: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.config = (eps, backend)
        ctx.dtypes = (weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        return _run(  # type: ignore[no-any-return]
            bn_affine_running, mean, var, weight, bias, running_mean, running_var, count, momentum, eps, backend
        )

    @staticmethod
    @_first_order
    def backward(ctx: Any, daffine: Tensor) -> Any:
        return *_bn_gradients(ctx, daffine), *(None,) * 6


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_WIDER = {torch.float32: (torch.float32, torch.bfloat16, torch.float16), torch.float64: _FLOATING}


def _check_bn_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Tensor | float
) -> None:
    narrow = _NO_WIDER.get(mean.dtype, ())
    vectors: list[tuple[str, Any, tuple[torch.dtype, ...]]]
    vectors = [("var", var, narrow), ("weight", weight, narrow), ("bias", bias, narrow)]
    if len(running) > 1:  # what moves towards the statistics may have any dtype
        vectors += [("running_mean", running[0], _FLOATING), ("running_var", running[1], _FLOATING)]
    shape = mean.shape
    for name, vector, dtypes in vectors:
        if vector is None:
            continue
        if vector.shape != shape:
            raise ValueError(f"expected a {name} of the statistics' shape {_shape(mean)}, got {_shape(vector)}")
        if vector.dtype not in dtypes:
            raise TypeError(f"expected a {name} of {mean.dtype}, as the statistics, or narrower, got {vector.dtype}")


bn_affine = _register(
    "bn_affine(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str backend) -> Tensor",
    lambda mean, *rest: mean.new_empty((3, mean.shape[0])),
    _BnAffine,
    _check_bn_affine,
)
# The same, and the running statistics move in that launch. An operator of its own: compilers take one that may write
# to nothing for one that does.
bn_affine_running = _register(
    "bn_affine_running(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!) running_mean,"
    " Tensor(b!) running_var, SymInt count, float momentum, float eps, str backend) -> Tensor",
    lambda mean, *rest: mean.new_empty((3, mean.shape[0])),
    _BnAffineRunning,
    _check_bn_affine,
)
bn_affine_backward = _register(
    "bn_affine_backward(Tensor daffine, Tensor var, Tensor? weight, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda daffine, var, weight, eps, backend: tuple(torch.empty_like(var) for _ in range(4)),
)


# Not an operator: plain modules on a CPU, which nobody watches, alone are helped by it (fastunet/eager.py).
class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, var = aten.batch_norm_act(x, weight, bias, eps, relu)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, z if relu else None, weight, mean, var)
        ctx.config = eps, relu
        return z, mean, var

    @staticmethod
    @_first_order
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> Any:
        if dz is None:
            return (None,) * 5
        gradients = aten.batch_norm_act_backward(dz, *ctx.saved_tensors, *ctx.config)
        wanted = ctx.needs_input_grad
        return *(g if need else None for g, need in zip(gradients, wanted, strict=False)), None, None


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastunet.aten.batch_norm_act` with its derivative; the statistics have none."""
    return _applied(_BatchNormAct, x, weight, bias, eps, relu)  # type: ignore[no-any-return]


# ---- conv2d ------------------------------------------------------------------------------------------------------


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        affine0: Tensor | None,
        relu0: bool,
        x1: Tensor | None,
        affine1: Tensor | None,
        relu1: bool,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        size: Sequence[int],
        offset: Sequence[int],
        stats: bool,
        save: bool,
        pool: bool,
        pool_scale: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, mean, var, z, pooled = _run(
            conv2d, x0, affine0, relu0, x1, affine1, relu1, weight, bias, stride, size, offset, stats, save,
            pool, pool_scale, backend,
        )  # fmt: skip
        # y is needed only to spread the gradients of the statistics and of what is pooled; its storage is the
        # consumer's saved input anyway.
        kept = y if stats or pool else x0.new_empty(0)
        ctx.save_for_backward(kept, mean, pool_scale, x0, affine0, x1, affine1, weight, z)
        ctx.config = (relu0, relu1, stride, size, offset, backend)
        constant = [z] + ([] if stats else [mean, var]) + ([] if pool else [pooled])
        ctx.mark_non_differentiable(*constant)  # the last call is the one that counts
        return y, mean, var, z, pooled

    @staticmethod
    @_first_order
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, _dz: Tensor | None, dp: Tensor | None
    ) -> Any:
        y, mean, pool_scale, x0, affine0, x1, affine1, weight, z = ctx.saved_tensors
        relu0, relu1, stride, size, offset, backend = ctx.config
        if dy is None and dmean is None and dvar is None and dp is None:
            return (None,) * 16
        need = ctx.needs_input_grad
        mask = [need[0] or need[1], need[3] or need[4], need[6], need[7]]
        dx0, daffine0, dx1, daffine1, dweight, dbias = _run(
            conv2d_backward, dy, dmean, dvar, dp, y, mean, pool_scale, x0, affine0, relu0, x1, affine1, relu1,
            weight, z, stride, size, offset, mask, backend,
        )  # fmt: skip
        return (
            _given(dx0, need[0]), _given(daffine0, need[1]), None,
            _given(dx1, need[3]), _given(daffine1, need[4]), None,
            _given(dweight, need[6]), _given(dbias, need[7]), *(None,) * 8,
        )  # fmt: skip


def _conv2d_fake(
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    stats: bool,
    save: bool,
    pool: bool,
    pool_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, filters = x0.shape[0], weight.shape[0]
    height, width = ((n - 1) // stride + 1 for n in size)
    y = _activation(x0, (batch, filters, height, width))
    mean, var = (x0.new_empty(filters if stats else 0, dtype=stats_dtype(x0.dtype)) for _ in range(2))
    plain = affine0 is None and not relu0 and x1 is None and list(size) == list(x0.shape[-2:])
    if save and not plain and resolve_backend(backend, x0.device, x0.dtype) == "torch":
        z = _activation(x0, (batch, weight.shape[1], *size))
    else:
        z = x0.new_empty(0)
    pooled = _activation(x0, (batch, filters, height // 2, width // 2)) if pool else x0.new_empty(0)
    return y, mean, var, z, pooled


def _conv2d_backward_fake(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    dp: Tensor | None,
    y: Tensor,
    mean: Tensor,
    pool_scale: Tensor | None,
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    z: Tensor,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    mask: Sequence[bool],
    backend: str,
) -> Any:
    results = []
    for x, affine, wanted in ((x0, affine0, mask[0]), (x1, affine1, mask[1])):
        if x is None or not wanted:
            results += [x0.new_empty(0), _empty_stats(x0)]
        else:
            results += _source_gradient_fake(x, affine)
    return (*results, *_weight_gradient_fake(weight, mask[2], mask[3], weight.shape[0]))


def _source_gradient_fake(x: Tensor, affine: Tensor | None) -> tuple[Tensor, Tensor]:
    return _activation(x, x.shape), _empty_stats(x) if affine is None else affine.new_empty(affine.shape)


def _weight_gradient_fake(weight: Tensor, need_weight: bool, need_bias: bool, filters: int) -> tuple[Tensor, Tensor]:
    dweight = torch.empty_like(weight, memory_format=memory_format(weight)) if need_weight else weight.new_empty(0)
    return dweight, weight.new_empty(filters if need_bias else 0)


def _check_conv2d(
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    size: Sequence[int],
    offset: Sequence[int],
    stats: bool,
    save: bool,
    pool: bool,
    pool_scale: Tensor | None,
) -> None:
    _check_source(x0, affine0, x0)
    if x1 is not None:
        _check_source(x1, affine1, x0)
    _check_filters(weight, bias, x0, 1, x0.shape[1] + (0 if x1 is None else x1.shape[1]), (3, 1))
    if stride not in (1, 2) or (stride == 2 and weight.shape[2] == 1):
        raise ValueError(f"expected stride 1, or 2 for a 3×3 weight, got {stride}")
    if len(size) != 2 or len(offset) != 4:
        raise ValueError(f"expected a size of 2 and an offset of 4 numbers, got {len(size)} and {len(offset)}")
    if pool_scale is not None and tuple(pool_scale.shape) != (weight.shape[0],):
        raise ValueError(f"expected a pool_scale of shape ({weight.shape[0]},), got {_shape(pool_scale)}")


conv2d = _register(
    "conv2d(Tensor x0, Tensor? affine0, bool relu0, Tensor? x1, Tensor? affine1, bool relu1, Tensor weight,"
    " Tensor? bias, int stride, SymInt[] size, SymInt[] offset, bool stats, bool save, bool pool,"
    " Tensor? pool_scale, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv2d_fake,
    _Conv2d,
    _check_conv2d,
)
conv2d_backward = _register(
    "conv2d_backward(Tensor? dy, Tensor? dmean, Tensor? dvar, Tensor? dp, Tensor y, Tensor mean,"
    " Tensor? pool_scale, Tensor x0, Tensor? affine0,"
    " bool relu0, Tensor? x1, Tensor? affine1, bool relu1, Tensor weight, Tensor z, int stride, SymInt[] size,"
    " SymInt[] offset, bool[] mask, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv2d_backward_fake,
)


# ---- conv2d_act --------------------------------------------------------------------------------------------------


def _conv2d_act_fake(
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    offset: Sequence[int],
    affine: Tensor | None,
    relu: bool,
    pool: bool,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, filters = x0.shape[0], weight.shape[0]
    pooled = _activation(x0, (batch, filters, size[0] // 2, size[1] // 2)) if pool else x0.new_empty(0)
    return _activation(x0, (batch, filters if head_weight is None else head_weight.shape[0], *size)), pooled


def _check_conv2d_act(
    x0: Tensor,
    affine0: Tensor | None,
    relu0: bool,
    x1: Tensor | None,
    affine1: Tensor | None,
    relu1: bool,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    offset: Sequence[int],
    affine: Tensor | None,
    relu: bool,
    pool: bool,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
) -> None:
    _check_conv2d(
        x0, affine0, relu0, x1, affine1, relu1, weight, bias, 1, size, offset, False, False, False, None
    )  # fmt: skip
    if weight.shape[2] != 3:
        raise ValueError(f"expected a 3×3 weight, got one of shape {_shape(weight)}")
    if affine is not None and tuple(affine.shape) != (3, weight.shape[0]):
        raise ValueError(f"expected an affine of shape (3, {weight.shape[0]}) for the result, got {_shape(affine)}")
    if head_weight is not None:
        if pool:
            raise ValueError("expected no pooling under a head, in whose stead nothing else is stored")
        _check_filters(head_weight, head_bias, x0, 1, weight.shape[0], (1,))


# Has no derivative: what training does instead keeps y, from which all else follows.
conv2d_act = _register(
    "conv2d_act(Tensor x0, Tensor? affine0, bool relu0, Tensor? x1, Tensor? affine1, bool relu1, Tensor weight,"
    " Tensor? bias, SymInt[] size, SymInt[] offset, Tensor? affine, bool relu, bool pool,"
    " Tensor? head_weight, Tensor? head_bias, str backend) -> (Tensor, Tensor)",
    _conv2d_act_fake,
    check=_check_conv2d_act,
)


# ---- conv_transpose2d --------------------------------------------------------------------------------------------


class _ConvTranspose2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine: Tensor | None,
        relu: bool,
        weight: Tensor,
        bias: Tensor | None,
        stats: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, mean, var = _run(conv_transpose2d, x, affine, relu, weight, bias, stats, backend)
        ctx.save_for_backward(y if stats else x.new_empty(0), mean, x, affine, weight)
        ctx.config = (relu, backend)
        if not stats:
            ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @_first_order
    def backward(ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None) -> Any:
        y, mean, x, affine, weight = ctx.saved_tensors
        relu, backend = ctx.config
        if dy is None and dmean is None and dvar is None:
            return (None,) * 7
        need = ctx.needs_input_grad
        mask = [need[0] or need[1], need[3], need[4]]
        dx, daffine, dweight, dbias = _run(
            conv_transpose2d_backward, dy, dmean, dvar, y, mean, x, affine, relu, weight, mask, backend
        )
        return (
            _given(dx, need[0]), _given(daffine, need[1]), None,
            _given(dweight, need[3]), _given(dbias, need[4]), None, None,
        )  # fmt: skip


def _conv_transpose2d_fake(
    x: Tensor, affine: Tensor | None, relu: bool, weight: Tensor, bias: Tensor | None, stats: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width = x.shape
    filters = weight.shape[1]
    y = _activation(x, (batch, filters, 2 * height, 2 * width))
    mean, var = (x.new_empty(filters if stats else 0, dtype=stats_dtype(x.dtype)) for _ in range(2))
    return y, mean, var


def _conv_transpose2d_backward_fake(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    y: Tensor,
    mean: Tensor,
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    mask: Sequence[bool],
    backend: str,
) -> Any:
    source = _source_gradient_fake(x, affine) if mask[0] else (x.new_empty(0), _empty_stats(x))
    return (*source, *_weight_gradient_fake(weight, mask[1], mask[2], weight.shape[1]))


def _check_conv_transpose2d(
    x: Tensor, affine: Tensor | None, relu: bool, weight: Tensor, bias: Tensor | None, stats: bool
) -> None:
    _check_source(x, affine, x)
    _check_filters(weight, bias, x, 0, x.shape[1], (2, 3))


conv_transpose2d = _register(
    "conv_transpose2d(Tensor x, Tensor? affine, bool relu, Tensor weight, Tensor? bias, bool stats, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _conv_transpose2d_fake,
    _ConvTranspose2d,
    _check_conv_transpose2d,
)
conv_transpose2d_backward = _register(
    "conv_transpose2d_backward(Tensor? dy, Tensor? dmean, Tensor? dvar, Tensor y, Tensor mean, Tensor x,"
    " Tensor? affine, bool relu, Tensor weight, bool[] mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _conv_transpose2d_backward_fake,
)


# ---- max_pool2x2 -------------------------------------------------------------------------------------------------


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, affine)
        ctx.backend = backend
        return _run(max_pool2x2, x, affine, backend)  # type: ignore[no-any-return]

    @staticmethod
    @_first_order
    def backward(ctx: Any, dp: Tensor) -> Any:
        return _run(max_pool2x2_backward, *ctx.saved_tensors, dp, None, ctx.backend), None, None


class _PoolFork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, affine)
        ctx.backend = backend
        return _run(max_pool2x2, x, affine, backend), x.view_as(x)

    @staticmethod
    @_first_order
    def backward(ctx: Any, dp: Tensor | None, dskip: Tensor | None) -> Any:
        if dp is None:
            return dskip, None, None
        return _run(max_pool2x2_backward, *ctx.saved_tensors, dp, dskip, ctx.backend), None, None


def _max_pool_fake(x: Tensor, affine: Tensor | None, backend: str) -> Tensor:
    batch, channels, height, width = x.shape
    return _activation(x, (batch, channels, height // 2, width // 2))


max_pool2x2 = _register(
    "max_pool2x2(Tensor x, Tensor? affine, str backend) -> Tensor",
    _max_pool_fake,
    _MaxPool,
    lambda x, affine: _check_source(x, affine, x),
)
max_pool2x2_backward = _register(
    "max_pool2x2_backward(Tensor x, Tensor? affine, Tensor? dp, Tensor? dskip, str backend) -> Tensor",
    lambda x, affine, dp, dskip, backend: _activation(x, x.shape),
)

# A pooled activation is also a skip connection: pool_fork returns (pooled, x), and its backward adds the two gradients
# in the pass that scatters the first. x comes back as a view, which only a composite operator may return.
_LIBRARY.define("pool_fork(Tensor(a) x, Tensor? affine, str backend) -> (Tensor, Tensor(a))")
_LIBRARY.impl("pool_fork", lambda *args: _applied(_PoolFork, *args), "CompositeImplicitAutograd")
pool_fork = torch.ops.fastunet.pool_fork.default


# ---- upsample_concat ---------------------------------------------------------------------------------------------


class _UpsampleConcat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine: Tensor | None,
        relu: bool,
        skip: Tensor | None,
        skip_affine: Tensor | None,
        skip_relu: bool,
        align_corners: bool | None,
        skip_first: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, affine, skip, skip_affine)
        ctx.config = (relu, skip_relu, align_corners, skip_first, backend)
        return _run(  # type: ignore[no-any-return]
            upsample_concat, x, affine, relu, skip, skip_affine, skip_relu, align_corners, skip_first, backend
        )

    @staticmethod
    @_first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, affine, skip, skip_affine = ctx.saved_tensors
        relu, skip_relu, *rest = ctx.config
        dx, daffine, dskip, dskip_affine = _run(
            upsample_concat_backward, dy, x, affine, relu, skip, skip_affine, skip_relu, *rest
        )
        need = ctx.needs_input_grad
        return (
            _given(dx, need[0]), _given(daffine, need[1]), None,
            _given(dskip, need[3]), _given(dskip_affine, need[4]), *(None,) * 4,
        )  # fmt: skip


def _upsample_concat_fake(
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    skip_relu: bool,
    align_corners: bool | None,
    skip_first: bool,
    backend: str,
) -> Tensor:
    batch, channels, height, width = x.shape
    shape = (batch, channels, 2 * height, 2 * width)
    if skip is not None:
        shape = (batch, channels + skip.shape[1], skip.shape[2], skip.shape[3])
    return _activation(x, shape)


def _upsample_concat_backward_fake(
    dy: Tensor,
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    skip_relu: bool,
    align_corners: bool | None,
    skip_first: bool,
    backend: str,
) -> Any:
    lower = _source_gradient_fake(x, affine)
    if skip is None:
        return (*lower, x.new_empty(0), _empty_stats(x))
    return (*lower, *_source_gradient_fake(skip, skip_affine))


def _check_upsample_concat(
    x: Tensor, affine: Tensor | None, relu: bool, skip: Tensor | None, skip_affine: Tensor | None, *settings: bool
) -> None:
    _check_source(x, affine, x)
    if skip is not None:
        _check_source(skip, skip_affine, x)


upsample_concat = _register(
    "upsample_concat(Tensor x, Tensor? affine, bool relu, Tensor? skip, Tensor? skip_affine, bool skip_relu,"
    " bool? align_corners, bool skip_first, str backend) -> Tensor",
    _upsample_concat_fake,
    _UpsampleConcat,
    _check_upsample_concat,
)
upsample_concat_backward = _register(
    "upsample_concat_backward(Tensor dy, Tensor x, Tensor? affine, bool relu, Tensor? skip, Tensor? skip_affine,"
    " bool skip_relu, bool? align_corners, bool skip_first, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _upsample_concat_backward_fake,
)


# ---- softmax_stats -----------------------------------------------------------------------------------------------


class _SoftmaxStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        pixel_weight: Tensor | None,
        mode: str,
        ignore_index: int,
        wanted: Sequence[bool],
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(logits, labels, pixel_weight)
        ctx.config = (mode, ignore_index, wanted, backend)
        return _run(softmax_stats, logits, labels, pixel_weight, *ctx.config)  # type: ignore[no-any-return]

    @staticmethod
    @_first_order
    def backward(ctx: Any, dstats: Tensor) -> Any:
        return _run(softmax_stats_backward, dstats, *ctx.saved_tensors, *ctx.config), *(None,) * 6


def _softmax_stats_fake(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
    backend: str,
) -> Tensor:
    return logits.new_empty((logits.shape[0], logits.shape[1], 7), dtype=stats_dtype(logits.dtype))


def _softmax_stats_backward_fake(
    dstats: Tensor,
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
    backend: str,
) -> Tensor:
    return torch.empty_like(logits, memory_format=memory_format(logits))


def _check_softmax_stats(
    logits: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
) -> None:
    if logits.dim() != 4 or logits.shape[1] > 256:
        raise ValueError(f"expected logits of shape (N, C, H, W) with at most 256 classes, got {_shape(logits)}")
    _check_statistics(logits.shape, labels, pixel_weight, mode, wanted)


def _check_statistics(
    shape: Sequence[int], labels: Tensor, pixel_weight: Tensor | None, mode: str, wanted: Sequence[bool]
) -> None:
    """What statistics of logits of ``shape`` are made with."""
    if len(wanted) != 3:
        raise ValueError(f"expected wanted to be 3 booleans, got {len(wanted)}")
    batch, classes, height, width = shape
    plane = (batch, height, width)
    fits = tuple(labels.shape) == plane if mode == "softmax" or classes == 1 else False
    if not fits and not (mode == "sigmoid" and tuple(labels.shape) == tuple(shape)):
        raise ValueError(f"expected labels of shape {plane} for logits of shape {tuple(shape)}, got {_shape(labels)}")
    if pixel_weight is not None and tuple(pixel_weight.shape) != plane:
        raise ValueError(f"expected pixel_weight of shape {plane}, got {_shape(pixel_weight)}")


softmax_stats = _register(
    "softmax_stats(Tensor logits, Tensor labels, Tensor? pixel_weight, str mode, int ignore_index, bool[] wanted,"
    " str backend) -> Tensor",
    _softmax_stats_fake,
    _SoftmaxStats,
    _check_softmax_stats,
)
softmax_stats_backward = _register(
    "softmax_stats_backward(Tensor dstats, Tensor logits, Tensor labels, Tensor? pixel_weight, str mode,"
    " int ignore_index, bool[] wanted, str backend) -> Tensor",
    _softmax_stats_backward_fake,
)


# ---- head_stats --------------------------------------------------------------------------------------------------


class _HeadStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine: Tensor | None,
        relu: bool,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        pixel_weight: Tensor | None,
        mode: str,
        ignore_index: int,
        wanted: Sequence[bool],
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, affine, weight, bias, labels, pixel_weight)
        ctx.config = (relu, mode, ignore_index, wanted, backend)
        return _run(  # type: ignore[no-any-return]
            head_stats, x, affine, relu, weight, bias, labels, pixel_weight, mode, ignore_index, wanted, backend
        )

    @staticmethod
    @_first_order
    def backward(ctx: Any, dstats: Tensor) -> Any:
        x, affine, weight, bias, labels, pixel_weight = ctx.saved_tensors
        relu, mode, ignore_index, wanted, backend = ctx.config
        need = ctx.needs_input_grad
        dx, daffine, dweight, dbias = _run(
            head_stats_backward, dstats, x, affine, relu, weight, bias, labels, pixel_weight, mode, ignore_index,
            wanted, [need[0] or need[1], need[3], need[4]], backend,
        )  # fmt: skip
        return (
            _given(dx, need[0]), _given(daffine, need[1]), None,
            _given(dweight, need[3]), _given(dbias, need[4]), *(None,) * 6,
        )  # fmt: skip


def _head_stats_fake(
    x: Tensor, affine: Tensor | None, relu: bool, weight: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], 7), dtype=stats_dtype(x.dtype))


def _head_stats_backward_fake(
    dstats: Tensor,
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
    mask: Sequence[bool],
    backend: str,
) -> Any:
    source = _source_gradient_fake(x, affine) if mask[0] else (x.new_empty(0), _empty_stats(x))
    return (*source, *_weight_gradient_fake(weight, mask[1], mask[2], weight.shape[0]))


def _check_head(x: Tensor, affine: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    _check_source(x, affine, x)
    _check_filters(weight, bias, x, 1, x.shape[1], (1,))
    if weight.shape[0] > 256:
        raise ValueError(f"expected a weight of at most 256 classes, got {weight.shape[0]}")


def _check_head_stats(
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pixel_weight: Tensor | None,
    mode: str,
    ignore_index: int,
    wanted: Sequence[bool],
) -> None:
    _check_head(x, affine, weight, bias)
    _check_statistics((x.shape[0], weight.shape[0], *x.shape[2:]), labels, pixel_weight, mode, wanted)


head_stats = _register(
    "head_stats(Tensor x, Tensor? affine, bool relu, Tensor weight, Tensor? bias, Tensor labels, Tensor? pixel_weight,"
    " str mode, int ignore_index, bool[] wanted, str backend) -> Tensor",
    _head_stats_fake,
    _HeadStats,
    _check_head_stats,
)
head_stats_backward = _register(
    "head_stats_backward(Tensor dstats, Tensor x, Tensor? affine, bool relu, Tensor weight, Tensor? bias,"
    " Tensor labels, Tensor? pixel_weight, str mode, int ignore_index, bool[] wanted, bool[] mask, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _head_stats_backward_fake,
)


# ---- head_predict ------------------------------------------------------------------------------------------------


OUTPUTS = ("argmax", "threshold", "softmax", "sigmoid")


def _head_predict_fake(
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    output: str,
    threshold: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    batch, _, height, width = x.shape
    if output == "argmax":
        return x.new_empty((batch, height, width), dtype=torch.uint8)
    return _activation(x, (batch, weight.shape[0], height, width)).to(torch.uint8 if output == "threshold" else dtype)


def _check_head_predict(
    x: Tensor,
    affine: Tensor | None,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    output: str,
    threshold: float,
    dtype: torch.dtype,
) -> None:
    _check_head(x, affine, weight, bias)
    if output not in OUTPUTS:
        raise ValueError(f"expected output {', '.join(map(repr, OUTPUTS[:-1]))} or {OUTPUTS[-1]!r}, got {output!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"expected a floating-point dtype for probabilities, got {dtype}")


head_predict = _register(
    "head_predict(Tensor x, Tensor? affine, bool relu, Tensor weight, Tensor? bias, str output, float threshold,"
    " ScalarType dtype, str backend) -> Tensor",
    _head_predict_fake,
    check=_check_head_predict,
)


# ---- confusion_matrix --------------------------------------------------------------------------------------------


def _confusion_matrix_fake(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float, backend: str) -> Tensor:
    classes = max(logits.shape[1], 2)
    return logits.new_empty((classes + 1, classes), dtype=torch.int64)


def _check_confusion_matrix(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float) -> None:
    if logits.dim() != 4 or not 1 <= logits.shape[1] <= 256:
        raise ValueError(f"expected logits of shape (N, C, H, W) with 1 to 256 classes, got {_shape(logits)}")
    plane = (logits.shape[0], *logits.shape[2:])
    if tuple(labels.shape) != plane:
        raise ValueError(f"expected labels of shape {plane} for logits of shape {_shape(logits)}, got {_shape(labels)}")


confusion_matrix = _register(
    "confusion_matrix(Tensor logits, Tensor labels, int ignore_index, float threshold, str backend) -> Tensor",
    _confusion_matrix_fake,
    check=_check_confusion_matrix,
)


def _confusion_matrix_of_masks_fake(
    mask: Tensor, labels: Tensor, classes: int, ignore_index: int, backend: str
) -> Tensor:
    return mask.new_empty((classes + 1, classes), dtype=torch.int64)


def _check_confusion_matrix_of_masks(mask: Tensor, labels: Tensor, classes: int, ignore_index: int) -> None:
    if mask.is_floating_point() or labels.is_floating_point():
        raise TypeError(f"expected integer masks, got {mask.dtype} and labels of {labels.dtype}")
    if mask.shape != labels.shape:
        raise ValueError(f"expected a mask of the labels' shape {_shape(labels)}, got {_shape(mask)}")
    if not 2 <= classes <= 256:
        raise ValueError(f"expected 2 to 256 classes, got {classes}")


confusion_matrix_of_masks = _register(
    "confusion_matrix_of_masks(Tensor mask, Tensor labels, int classes, int ignore_index, str backend) -> Tensor",
    _confusion_matrix_of_masks_fake,
    check=_check_confusion_matrix_of_masks,
)
