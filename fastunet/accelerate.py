"""``fastunet.accelerate(model)``: the U-Net that you already have, made fast in place; ``restore`` undoes it.

The model keeps its class, its parameters and its state_dict. In its ``__dict__`` there is a ``forward`` now, which runs
a :class:`~fastunet.program.Program` of the model where there is one for its modes, attributes and hooks and for the
input's size, and otherwise the forward of its class. Programs are made when they are first needed, from what
``torch.export`` says, and are never saved: copies share them, and what is unpickled makes its own.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from fastunet.activation import Config
from fastunet.backend import resolve_backend
from fastunet.blocks import LazyModule
from fastunet.checks import said
from fastunet.dispatch import transformed
from fastunet.program import NotLowered, Program, lower
from fastunet.tracing import OURS, NotTraced, Structure, Trace

Model = TypeVar("Model", bound=nn.Module)

_GRAPHS = 8  # of one structure at most, for so many kinds of sizes; beyond, and after two failures, the model's forward
_FAILURES = 2
_SIZES = ((128, 192), (256, 256), (512, 512), (64, 64))  # sizes of pictures, where no example says one


def accelerate(model: Model, example_input: Any = None, *, backend: str = "auto", policy: str = "speed") -> Model:
    """Make ``model`` run by fastunet's operators, in place, and return it.

    Convolutions with the batch, instance or group norm and ReLU behind them, 2×2 pooling, ×2 upsampling, zero padding
    and concatenation are fused; everything else runs as it was. ``model.fastunet_report()`` says what is which, and
    why. The model's class, parameters, buffers, state_dict, modes, copies and pickles are what they were. A module
    inside that has a hook, or whose forward is patched, is called as it is. A model whose modules or attributes change
    is traced again. What a forward decides by anything else, Python's random numbers or a global variable, say, is
    decided when it is traced.

    On a CPU, where nothing is gained, the model's own forward runs, unless a backend is asked for; and so it does
    under ``torch.compile``, ``torch.export`` and other tracers, and for an input that torch.export cannot serve, which
    is said once.

    Args:
        model: a network of pictures (N, C, H, W) that ``torch.export`` can trace, on one device.
        example_input: an input (N, C, H, W) of the model, or a tuple of its inputs. If given, outputs, gradients and
            running statistics are compared with the model's own, on copies.
        backend, policy: as of :class:`fastunet.UNet`.

    Raises:
        TypeError: no module; a scripted, compiled, quantised, sharded or wrapped one; no tensors.
        ValueError: modules on two devices, a 3-D network, one that cannot be traced, nothing to fuse.
        RuntimeError: other results than the model's own.
    """
    config = Config.checked(backend, policy)
    check_model(model)
    examples = _examples(model, example_input)
    if isinstance(model.__dict__.get("forward"), Accelerated):
        restore(model)
    accelerated = Accelerated(model, config)
    for example in examples:
        try:
            report = accelerated.traced_ahead(example)
            break
        except NotTraced as error:
            if example is examples[-1]:
                raise ValueError(
                    f"expected a model that torch.export can trace, got {type(model).__name__}, of which it says: "
                    f"{error}; pass an example_input of a size that it takes, or leave the model as it is"
                ) from error
    if not any(line.fused and line.flops for line in report.lines):
        why = next((line.why for line in report.lines if line.what == "the whole model"), "nothing to fuse")
        raise ValueError(
            f"expected a model with convolutions that fastunet can run, got {type(model).__name__}: {why}; leave it as "
            "it is"
        )
    if example_input is not None:
        _compare(model, accelerated, pytree.tree_map(_two, examples[0]))
    model.__dict__.update(accelerated.attributes())
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place, and return ``model``.

    Raises:
        ValueError: it is not accelerated.
    """
    accelerated = model.__dict__.get("forward") if isinstance(model, nn.Module) else None
    if not isinstance(accelerated, Accelerated):
        raise ValueError(
            f"expected a model that fastunet.accelerate returned, got {type(model).__name__}; pass that one"
        )
    for name in OURS:
        model.__dict__.pop(name, None)
    return model


# ---- the report --------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """``times`` steps of one kind: what they are, whether they are fused, and if not, why."""

    mode: str
    what: str
    times: int
    fused: bool
    why: str
    flops: int
    bytes: int


class Report(NamedTuple):
    """What of a model is fused, in training and in evaluation; printed, it is a table.

    FLOPs are those of convolutions and matrix products in a forward; bytes are what eager PyTorch's operators read and
    write in it, each of their tensors once; both at the size of the picture with which the model was traced.
    """

    model: str
    lines: tuple[Line, ...]

    def share(self, mode: str, of: str) -> float:
        """The part of all "flops" or "bytes" in "training" or "evaluation" that is fused, 0 to 1."""
        lines = [line for line in self.lines if line.mode == mode]
        whole = sum(getattr(line, of) for line in lines)
        return sum(getattr(line, of) for line in lines if line.fused) / whole if whole else 0.0

    def __str__(self) -> str:
        said = []
        for mode in dict.fromkeys(line.mode for line in self.lines):
            flops, size = (100 * self.share(mode, of) for of in ("flops", "bytes"))
            said.append(f"{self.model}, {mode}: {flops:.1f} % of the FLOPs and {size:.1f} % of the bytes are fused")
            lines = [line for line in self.lines if line.mode == mode]
            for line in sorted(lines, key=lambda line: (not line.fused, -line.bytes)):
                verdict = "fused" if line.fused else "left"
                why = "" if line.fused else f": {line.why}"
                said.append(f"  {verdict:<6}{line.times:>4} × {line.what}{why}")
        return "\n".join(said)


def _lines(program: Program, mode: str) -> Iterator[Line]:
    kinds: dict[tuple[str, str | None], list[int]] = {}
    for step in program.steps:
        if not (step.flops or step.bytes):
            continue  # sizes and views
        sums = kinds.setdefault((step.what, step.why), [0, 0, 0])
        for i, n in enumerate((1, step.flops, step.bytes)):
            sums[i] += n
    for (what, why), (count, flops, size) in kinds.items():
        yield Line(mode, what, count, why is None, why or "", flops, size)


# ---- the model's forward -----------------------------------------------------------------------------------------


class Accelerated:
    """The ``forward`` of an accelerated model: a program where one serves the call, else that of the model's class."""

    def __init__(self, model: nn.Module, config: Config):
        self._model = weakref.ref(model)
        self.config = config
        self.example: tuple[Any, ...] = ()  # inputs to trace with
        self._report = Report(type(model).__name__, ())
        self._traces: dict[Any, list[Trace]] = {}  # by the structure's key
        self._forget()

    def _forget(self) -> None:
        self._structure: Structure | None = None
        self._programs: dict[Trace, Program | None] = {}
        self._failures: dict[Any, int] = {}
        self._said: set[str] = set()

    def attributes(self) -> dict[str, Any]:
        """What an accelerated model has in its ``__dict__``."""
        return dict(zip(OURS, (self, self.report, self.replicate), strict=True))

    # ---- copies ----

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "config": self.config, "example": self.example}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])
        self.config, self.example = state["config"], state["example"]
        self._traces, self._report = {}, Report(type(state["model"]).__name__, ())
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerated:
        return self.of(copy.deepcopy(self._alive(), memo), self.config)

    def of(self, twin: nn.Module, config: Config) -> Accelerated:
        """The forward of a copy of the model, by the same graphs."""
        found = Accelerated(twin, config)
        found.example, found._report = self.example, self._report
        found._traces = {key: list(traces) for key, traces in self._traces.items()}
        return found

    def replicate(self) -> Any:
        """A replica for nn.DataParallel, which has tensors of its own and runs as the model was."""
        model = self._alive()
        replica = type(model)._replicate_for_data_parallel(model)
        for name in OURS:
            replica.__dict__.pop(name, None)
        return replica

    def _alive(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("expected the forward of a model that is still there, got one of a deleted model")
        return model

    # ---- calls ----

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self._alive()).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:  # which torch.export asks a forward for
        code: CodeType = type(self._alive()).forward.__code__
        return code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._alive()
        if transformed() or _torch_module._has_any_global_hook():
            return type(model).forward(model, *args, **kwargs)
        x = self._picture(model, args, kwargs)
        context = None if x is None else self.config.context(x, model)
        if context is None or context.eager:
            return type(model).forward(model, *args, **kwargs)
        found = self._program(model, args, kwargs)
        if found is None:
            try:
                return type(model).forward(model, *args, **kwargs)
            except Exception:
                self._failures.clear()  # it was the call that was wrong, and no graph would have served it
                raise
        program, structure, inputs = found
        return program.run(model, structure.modules, inputs, context)

    def _picture(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The first picture among the inputs; None if an input is anything that only the model itself should judge."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        parameter = next(model.parameters(), None)
        if parameter is None or any(type(x) not in (Tensor, nn.Parameter) for x in (*tensors, parameter)):
            return None
        device = parameter.device
        x = next((x for x in tensors if x.dim() == 4), None)
        if x is None or x.layout is not torch.strided or any(x.device != device for x in tensors):
            return None
        usual = x.dtype == parameter.dtype or (x.is_floating_point() and torch.is_autocast_enabled(device.type))
        return x if usual and not x.is_meta else None

    def _program(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Program, Structure, list[Any]] | None:
        """The program that serves a call, what it is the program of, and the call's inputs, flattened."""
        structure = self._structure
        if structure is None or not structure.holds(model):
            structure = self._structure = Structure(model)
            structure.traces = self._traces.setdefault(structure.key, [])
        for trace in structure.traces:
            inputs = trace.serves(model, args, kwargs)
            if inputs is not None:
                break
        else:
            new = self._traced(model, structure, args, kwargs)
            if new is None:
                return None
            trace, inputs = new
        program = self._lowered(trace, structure)
        return None if program is None else (program, structure, inputs)

    def _traced(
        self, model: nn.Module, structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Trace, list[Any]] | None:
        shapes = ", ".join(str(tuple(x.shape)) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if len(structure.traces) >= _GRAPHS or self._failures.get(structure.key, 0) >= _FAILURES:
            self._say(f"inputs of shape {shapes}, say, are more kinds of sizes than it has graphs for")
            return None
        try:
            with torch.inference_mode(False):  # whose tensors no graph can have
                like = pytree.tree_map(_like, (tuple(args), dict(kwargs)))
            trace = Trace(model, structure, *like)
            inputs = trace.serves(model, args, kwargs)
            if inputs is None:
                raise NotTraced("the graph does not hold for the input that it is made of")
        except NotTraced as error:
            self._failures[structure.key] = self._failures.get(structure.key, 0) + 1
            self._say(f"torch.export cannot serve an input of shape {shapes} ({error})")
            return None
        structure.traces.append(trace)
        return trace, inputs

    def _lowered(self, trace: Trace, structure: Structure) -> Program | None:
        if trace not in self._programs:
            try:
                self._programs[trace] = lower(trace, structure.modules, structure.touched)
            except NotLowered as error:
                self._say(str(error))
                self._programs[trace] = None
        return self._programs[trace]

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            kind = type(self._alive()).__name__
            warnings.warn(f"fastunet.accelerate: {kind} runs by its own forward: {why}", RuntimeWarning, stacklevel=5)

    # ---- the report ----

    def traced_ahead(self, example: Sequence[Any]) -> Report:
        """Trace the model in training and in evaluation, for inputs like ``example``.

        Raises:
            NotTraced: torch.export cannot, and never could.
        """
        with torch.inference_mode(False):
            self.example = tuple(_like(_two(x)) for x in example)
        model, lines = self._alive(), list[Line]()
        for mode in ("training", "evaluation"):
            with _in_mode(model, mode == "training"):
                structure = Structure(model)
                traces = self._traces.setdefault(structure.key, [])
                try:
                    if not traces:
                        traces.append(Trace(model, structure, self.example, {}))
                    lines += _lines(lower(traces[0], structure.modules, structure.touched), mode)
                except NotTraced as error:
                    if not self._report.lines:
                        raise
                    lines.append(Line(mode, "the whole model", 1, False, str(error), 0, 0))
                except NotLowered as error:
                    lines.append(Line(mode, "the whole model", 1, False, str(error), 0, 0))
        self._report = Report(type(model).__name__, tuple(lines))
        return self._report

    def report(self) -> Report:
        """What of the model, as it is now, is fused and what is left, and why."""
        model = self._model()
        if model is None:  # it was asked for the report, and for nothing else, when it was deleted
            return self._report
        like = next(model.parameters())
        given = [x.to(like) if _is_picture(x) else x for x in self.example]
        return self.traced_ahead([x.to(like.device) if isinstance(x, Tensor) else x for x in given])


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, every module of ``model`` is in training or in evaluation."""
    kept = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in kept:
            module.training = training
        yield
    finally:
        for module, was in kept:
            module.training = was


def _like(x: Any) -> Any:
    """An input to trace with, in place of ``x``."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x


def _two(x: Any) -> Any:
    """Two pictures in place of one: a graph of one holds for one only, and a batch norm may need more than one."""
    return torch.cat([x, x.flip(-1)]) if isinstance(x, Tensor) and x.dim() == 4 and len(x) == 1 else x


# ---- what is refused ---------------------------------------------------------------------------------------------

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "torchao.")


def check_model(model: Any) -> None:
    """Raise TypeError or ValueError for what :func:`accelerate` refuses, whatever its input."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model as an nn.Module, got {said(model)}; pass the network itself")
    kind = type(model).__name__
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError(f"expected a model in Python, got {kind}, which is scripted; accelerate the one it was made of")
    if hasattr(model, "_orig_mod"):
        raise TypeError(f"expected a model that is not compiled, got {kind}; pass model._orig_mod")
    sharded = [m for m in model.modules() if any("fsdp" in base.__module__ for base in type(m).__mro__)]
    if sharded or any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise TypeError(f"expected a model with whole parameters, got {kind} sharded by FSDP; accelerate it before DDP")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"expected the model itself, got {kind} around it; pass model.module")
    if any(type(m).__module__.startswith(_QUANTISED) for m in model.modules()):
        raise TypeError(f"expected a model in floating point, got {kind} with quantised modules; pass the original")
    solid = next(((n, m) for n, m in model.named_modules() if "3d" in type(m).__name__.lower()), None)
    if solid is not None:
        raise ValueError(
            f"expected a network of pictures, got {kind} with a {type(solid[1]).__name__} ({solid[0]}); leave it: "
            "fastunet has no operators for volumes"
        )
    devices = sorted({str(t.device) for t in itertools.chain(model.parameters(), model.buffers())})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(f"expected a model on one device, got {kind} on {' and '.join(devices)}; move it with .to()")
    if any(isinstance(m, LazyModule) for m in model.modules()):
        raise TypeError(
            f"expected somebody else's network, got {kind}, which runs by fastunet's operators already; "
            "leave it as it is"
        )
    if "forward" in model.__dict__ and not isinstance(model.__dict__["forward"], Accelerated):
        raise TypeError(f"expected a model whose forward is its class's, got {kind} with one of its own; remove it")


def _examples(model: nn.Module, example_input: Any) -> list[tuple[Any, ...]]:
    """Inputs to trace ``model`` with: those that are given, or some of sizes that most models take."""
    if isinstance(example_input, Tensor):
        return [(example_input,)]
    if isinstance(example_input, tuple) and any(isinstance(x, Tensor) for x in example_input):
        return [example_input]
    if example_input is not None:
        raise TypeError(
            f"expected example_input as a tensor or a tuple of the model's inputs, got {said(example_input)}; "
            "convert it"
        )
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError(
            f"expected a model with 2-D convolutions, got {type(model).__name__} with nothing to fuse; leave it as it "
            "is"
        )
    like = conv.weight.detach()
    return [(like.new_zeros((2, conv.in_channels, *size)),) for size in _SIZES]


# ---- the comparison on the spot ----------------------------------------------------------------------------------

_Step = dict[str, Tensor]  # what a step gives, by names that begin with one of
_PARTS = ("output", "gradient", "buffer")


def _compare(model: nn.Module, accelerated: Accelerated, args: tuple[Any, ...]) -> None:
    """A training step and an evaluation of copies: in float64, where all must agree, and as the model is.

    In float64 fastunet's operators are compositions of PyTorch's own, and each tensor agrees to a hundred thousand
    roundings. In the model's dtype outputs and gradients, as wholes, may err three times as much as PyTorch's own
    results in the worse of its two memory formats: a network amplifies roundings, so that no fixed number would do.
    """
    exact = args, model, torch.float64
    truth = _step(*exact)
    largest = {part: max(float(t.norm()) for t in _of(truth, part)) for part in _PARTS if _of(truth, part)}
    for name, value in _step(*exact, accelerated, Config("torch", accelerated.config.policy)).items():
        # A bias in front of a batch norm has no gradient but roundings of the others.
        floor = 0.01 * largest[name.partition(" ")[0]]
        _judge(name, _error(value, truth[name], floor), 1e5 * torch.finfo(torch.float64).eps)
    dtype = next(model.parameters()).dtype
    if dtype == torch.float64:
        return
    plain = [_step(args, model, dtype, memory_format=f) for f in (torch.contiguous_format, torch.channels_last)]
    device = next(model.parameters()).device
    runs = resolve_backend(accelerated.config.backend, device, dtype)
    ours = _step(args, model, dtype, accelerated, Config(runs, accelerated.config.policy))
    for part in _PARTS[:2]:
        if wanted := _of(truth, part):
            whole = torch.cat(wanted)
            allowed = 3 * max(_error(torch.cat(_of(step, part)), whole) for step in plain) + 8 * torch.finfo(dtype).eps
            _judge(f"the {part}s as a whole", _error(torch.cat(_of(ours, part)), whole), allowed)


def _step(
    args: tuple[Any, ...],
    model: nn.Module,
    dtype: torch.dtype,
    accelerated: Accelerated | None = None,
    config: Config | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> _Step:
    """Outputs in evaluation, then outputs, gradients and buffers of a step in training, of a copy of ``model``.

    Dropouts drop nothing: what they draw depends on the memory format.
    """
    twin = copy.deepcopy(model).to(dtype)
    twin.to(memory_format=memory_format)  # type: ignore[call-overload]
    if accelerated is not None and config is not None:
        twin.__dict__["forward"] = accelerated.of(twin, config)
    floating = (x.to(dtype, memory_format=memory_format) if _is_picture(x) else x for x in args)
    given = [x.detach().clone() if isinstance(x, Tensor) else x for x in floating]
    found: _Step = {}
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(given[0].device.type, enabled=False):
        for training in (False, True):
            for module in twin.modules():
                module.training = training and not isinstance(module, nn.modules.dropout._DropoutNd)
            outputs = [x for x in pytree.tree_leaves(twin(*given)) if isinstance(x, Tensor) and x.is_floating_point()]
            for i, x in enumerate(outputs):
                found[f"output {i} in {'training' if training else 'evaluation'}"] = x.detach()
        generator = torch.Generator().manual_seed(0)
        pairs = [(x, torch.randn(x.shape, generator=generator).to(x)) for x in outputs if x.requires_grad]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])
    found.update((f"gradient of {name}", p.grad) for name, p in twin.named_parameters() if p.grad is not None)
    found.update((f"buffer {name}", b) for name, b in twin.named_buffers() if b.is_floating_point())
    return found


def _is_picture(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()


def _of(step: _Step, part: str) -> list[Tensor]:
    """The tensors of one of :data:`_PARTS`, flattened, in float64."""
    return [t.flatten().double() for name, t in step.items() if name.startswith(part)]


def _error(x: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    """The norm of the difference, as part of the truth's, or of ``floor`` if that is larger."""
    return float((x.double() - truth).norm() / truth.norm().clamp(min=floor))


def _judge(name: str, error: float, allowed: float) -> None:
    if not error <= allowed:  # NaN fails
        raise RuntimeError(
            f"expected the model's own results, got {name} off by {error:.1e} of its size (allowed {allowed:.1e}); the "
            "model is left as it was: use it so, and report it"
        )
