"""Who is timed: every provider, what it can serve, and how it runs a case.

A provider prepares a *step*: a function of no arguments that does the case's work once and returns its results and
gradients. All providers of a case get the same numbers and are compared with the same truth before they are timed.

======================  ============================================================================================
eager                   PyTorch's own modules in channels_last, with AMP in a network
eager-nchw              the same, contiguous
eager-bare              the convolution, pooling or upsampling without normalisation: less work than the others do
eager-graph             eager in a CUDA graph
compile                 torch.compile of eager, default mode; compile-graph: mode="reduce-overhead", in CUDA graphs;
                        compile-max-autotune: mode="max-autotune"
seed002                 a loss by seed 002's formulas, as written
monai, torchmetrics     their loss and their score
onnxruntime, tensorrt   a frozen network as ONNX (:mod:`.engines`); ONNX Runtime has no bfloat16 convolution
cudnn-graph             cuDNN's fusion of scale, bias, ReLU, convolution and the sums of its result
fastunet                backend="auto", of an operation too: what it chose; fastunet-torch and -triton: that backend;
                        fastunet-graph: in a CUDA graph; fastunet-compile: torch.compile, mode="reduce-overhead"
accelerated             PyTorch's own modules after fastunet.accelerate; accelerated-graph: in a CUDA graph
======================  ============================================================================================
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastunet
from benchmarks import engines, nets
from benchmarks.cases import Case, LossCase
from benchmarks.measure import DTYPES, Step, precision
from benchmarks.nets import NetCase
from fastunet import metrics, ops, reference
from fastunet.backend import triton_unavailable
from fastunet.losses import DiceCELoss

AnyCase = Case | NetCase | LossCase

# Normalise what they read.
_SOURCED = (
    "affine_act", "affine_prelu", "add_act", "avg_pool2x2", "pad_replicate", "conv2d", "conv_transpose2d",
    "max_pool2x2", "upsample_concat", "head_stats", "head_predict"
)  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """Whom to time, and how it is set up."""

    name: str
    kinds: tuple[str, ...]
    backend: str | None = None  # of fastunet
    compiled: str | None = None  # a mode of torch.compile; or "trace": only its front end, which takes seconds
    graph: bool = False
    engine: bool = False  # one of engines.py
    accelerated: bool = False  # PyTorch's own modules after fastunet.accelerate
    layout: torch.memory_format = torch.channels_last

    @property
    def memory(self) -> Literal["allocated", "reserved", "device"]:
        """Where its memory is seen: a CUDA graph's lies in a pool, and an engine for networks has its own allocator."""
        if self.engine and "net" in self.kinds:
            return "device"
        return "reserved" if self.graph or self.compiled in ("max-autotune", "reduce-overhead") else "allocated"


_ALL = ("net", "loss", "op")
PROVIDERS = {
    provider.name: provider
    for provider in [
        Provider("eager", ("net", "op")),
        Provider("seed002", ("loss",)),
        Provider("fastunet", _ALL, backend="auto"),
        Provider("fastunet-graph", ("net",), backend="auto", graph=True),
        Provider("eager-graph", ("net",), graph=True),
        Provider("accelerated", ("net",), accelerated=True),
        Provider("accelerated-graph", ("net",), accelerated=True, graph=True),
        Provider("fastunet-triton", _ALL, backend="triton"),
        Provider("fastunet-torch", _ALL, backend="torch"),
        Provider("eager-bare", ("op",)),
        Provider("eager-nchw", ("net",), layout=torch.contiguous_format),
        Provider("monai", ("loss",)),
        Provider("torchmetrics", ("loss",)),
        Provider("cudnn-graph", ("op",), engine=True),
        Provider("compile", _ALL, compiled="default"),
        Provider("compile-graph", ("net",), compiled="reduce-overhead"),
        Provider("fastunet-compile", ("net",), backend="auto", compiled="reduce-overhead"),
        Provider("onnxruntime", ("net",), engine=True, layout=torch.contiguous_format),
        Provider("tensorrt", ("net",), engine=True, layout=torch.contiguous_format),
        Provider("compile-max-autotune", ("net",), compiled="max-autotune"),
    ]
}


def serving(case: AnyCase) -> list[Provider]:
    """The providers that can do ``case`` at all, the plainest first and the slowest to prepare last."""
    return [provider for provider in PROVIDERS.values() if _serves(provider, case)]


def _serves(provider: Provider, case: AnyCase) -> bool:
    if case.kind not in provider.kinds:
        return False
    if isinstance(case, NetCase):
        if provider.engine:
            return case.mode == "frozen" and (provider.name != "onnxruntime" or case.dtype != "bf16")
        return True
    if isinstance(case, LossCase):
        if case.function == "confusion_matrix":
            return provider.name in ("torchmetrics", "fastunet")
        return provider.name != "torchmetrics" and (provider.name != "monai" or case.function == "dice_ce")
    if case.algorithm and provider.backend == "auto":
        return False  # the case names its algorithm, where "auto" would choose one
    if provider.engine:
        plain = (
            not (case.skip or case.bias or case.pool or case.algorithm or case.doubled)
            and case.layout == "channels_last"
        )
        fused = case.op == "conv2d" and case.mode == "inference" and case.affine and case.stats
        return plain and fused and case.dtype.itemsize == 2
    if provider.compiled:
        return case.mode in ("inference", "training")  # its backward frees what a second backward would need
    return provider.name != "eager-bare" or (case.op in _SOURCED[1:] and case.affine)


def unavailable(provider: Provider, device: torch.device) -> str | None:
    """Why ``provider`` cannot run here, in a few words; None if it can."""
    if provider.graph and device.type != "cuda":
        return "CUDA graphs need a GPU"
    if provider.backend == "triton":
        return triton_unavailable(device.type)
    if provider.engine:
        return engines.unavailable(provider.name, device)
    if provider.name in ("monai", "torchmetrics") and importlib.util.find_spec(provider.name) is None:
        return f"{provider.name} is not installed"
    return None


def prepare(provider: Provider, case: AnyCase, problem: Problem) -> Step:
    """The step of ``provider``; it compiles or captures when it is called first, or here."""
    if isinstance(case, NetCase):
        step = _net_step(provider, case, problem.data)
    elif isinstance(case, LossCase):
        step = _loss_step(provider, case, *problem.data)
    else:
        step = _op_step(provider, case, problem.data)
    return _graphed(step) if provider.graph else step


def checked(provider: Provider, case: AnyCase, problem: Problem) -> tuple[Step, dict[str, float]]:
    """The step of ``provider``, whose results and gradients are right, and their errors.

    Raises:
        WrongNumbersError: they are not.
    """
    step = prepare(provider, case, problem)
    return step, problem.check(step(), compared(provider, case))


def compared(provider: Provider, case: AnyCase) -> int | None:
    """How many of a step's results have a truth to be compared with; None for all of them.

    Where PyTorch's modules normalise, their gradients include those of the batch norm's statistics, which fastunet
    computes one layer further down: the same work in total, of which only the forward can be compared. cuDNN's graph
    gives sums instead of a mean and a variance.
    """
    if not isinstance(case, Case) or provider.backend is not None or not (case.affine and case.op in _SOURCED):
        return None
    same = provider.name != "eager-bare" and case.op != "max_pool2x2" and case.mode in ("inference", "training")
    return 1 if same else 0


# ---- truth -------------------------------------------------------------------------------------------------------

# Relative error of a whole tensor in the Euclidean norm: a few roundings of the dtype, since sums are long and centred.
# float32 convolutions use TF32 by default, whose roundings are float16's.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
TF32_TOLERANCE = 3e-3


class WrongNumbersError(Exception):
    """A provider's results are not the case's."""


@dataclass
class Problem:
    """A case's numbers: what every provider starts from, and what it must arrive at."""

    data: Any
    truth: list[Tensor]
    forward: int  # the first results are the forward's, the others are gradients
    allowed: tuple[float, float]  # of the forward and of the gradients

    @property
    def device(self) -> torch.device:
        return self.truth[0].device

    def errors(self, found: Sequence[Tensor]) -> dict[str, float]:
        """The error of the forward's results and of the gradients, each as far as there are any."""
        pairs = list(zip(found, self.truth, strict=False))
        parts = {"forward": pairs[: self.forward], "gradient": pairs[self.forward :]}
        return {part: self._error(of) for part, of in parts.items() if of}

    def shift(self, found: Sequence[Tensor]) -> float | None:
        """Of the first result the part of its error along the truth, relative to it; None of integers.

        Rounding leaves next to none; operands that are cut off instead make results smaller: below 0.
        """
        truth = self.truth[0]
        if not truth.is_floating_point():
            return None
        return float((_difference(found[0], truth) * truth).sum() / truth.square().sum().clamp_min(1e-30))

    def check(self, found: Sequence[Tensor], compared: int | None) -> dict[str, float]:
        """The errors of the first ``compared`` of ``found``, if they are allowed; None: of all, and all must be there.

        Raises:
            WrongNumbersError: they are not allowed, or something is missing.
        """
        if compared is None and len(found) != len(self.truth):
            raise WrongNumbersError(f"expected {len(self.truth)} results and gradients, got {len(found)}")
        errors = self.errors(found[:compared])
        for part, allowed in zip(("forward", "gradient"), self.allowed, strict=True):
            if not errors.get(part, 0.0) <= allowed:  # a NaN is refused too
                raise WrongNumbersError(f"{part}: relative error {errors[part]:.1e}, allowed {allowed:.1e}")
        return errors

    def _error(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        """The largest of the tensors' errors in the Euclidean norm, each relative to its truth. Of integers, classes
        and counts, it is the share that differs."""
        if any(found.shape != truth.shape for found, truth in pairs):
            return math.inf
        if not pairs[0][1].is_floating_point():
            return max(float((found != truth).float().mean()) for found, truth in pairs)
        errors = [_difference(found, truth).norm() / truth.norm().clamp_min(1e-12) for found, truth in pairs]
        return float(torch.stack(errors).max())  # max() of a NaN is NaN


def _difference(found: Tensor, truth: Tensor) -> Tensor:
    return found.detach().to(truth.dtype) - truth


def pose(case: AnyCase, device: torch.device) -> Problem:
    """The numbers of ``case``, drawn from a fixed seed, and the truth about them."""
    torch.manual_seed(0)
    kept, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # truth is computed once
    try:
        if isinstance(case, NetCase):
            return _pose_net(case, device)
        if isinstance(case, LossCase):
            return _pose_loss(case, device)
        return _pose_op(case, device)
    finally:
        torch.backends.cudnn.benchmark = kept


# ---- networks ----------------------------------------------------------------------------------------------------


@dataclass
class _NetData:
    x: Tensor
    labels: Tensor
    weights: dict[str, Tensor]


@dataclass
class _NetProblem(Problem):
    """A network's step. The gradients of a whole network are ill-conditioned, and 16-bit PyTorch's own error is the
    measure: by how much it grows from layer to layer is much the same whoever rounds."""

    names: list[str] = field(default_factory=list)  # of the parameters
    scales: list[Tensor] = field(default_factory=list)  # of each gradient
    plain: list[tuple[float, float]] = field(default_factory=list)  # error and shift of each in plain PyTorch
    slack: float = 0.0

    def _error(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        """The error of all as one long vector, to which a gradient that is zero in truth adds little."""
        if any(found.shape != truth.shape for found, truth in pairs):
            return math.inf
        differences = torch.stack([_difference(found, truth).norm() for found, truth in pairs])
        return float(differences.norm() / torch.stack([truth.norm() for _, truth in pairs]).norm())

    def check(self, found: Sequence[Tensor], compared: int | None) -> dict[str, float]:
        """The same, and the gradient of each parameter by itself: one wrong layer is lost among all."""
        errors = super().check(found, compared)
        each = zip(self.names, self.truth[self.forward :], self.judged(found), self.plain, strict=False)
        for name, truth, (error, shift), (plain, plain_shift) in each:
            allowed = 2 * plain + self.slack
            if not error <= allowed:
                raise WrongNumbersError(f"gradient of {name}: relative error {error:.1e}, allowed {allowed:.1e}")
            shift = abs(shift - plain_shift)
            allowed = (0.2 + 1.5 / math.sqrt(truth.numel())) * plain + self.slack
            if not shift <= allowed:
                raise WrongNumbersError(f"gradient of {name}: its size is off by {shift:.1e}, allowed {allowed:.1e}")
        return errors

    def judged(self, found: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Of each gradient its error, relative to its scale, and of that the part along the truth.

        Noise is nearly at right angles to the truth: the shift is small where the error is not, and sees a factor.
        """
        pairs = []
        for gradient, truth, scale in zip(found[self.forward :], self.truth[self.forward :], self.scales, strict=False):
            difference = _difference(gradient, truth)
            pairs.append(torch.stack([difference.norm() / scale, (difference * truth).sum() / scale.square()]))
        return [(error, shift) for error, shift in torch.stack(pairs).tolist()] if pairs else []


# Relative error granted beyond plain PyTorch's: of the forward, of all gradients together, and of a single gradient,
# which jumps where rounding turns a ReLU on or off.
_SLACK = {
    "fp32": (1e-5, 1e-4, 1e-2), "tf32": (2e-3, 2e-2, 2e-2), "fp16": (4e-3, 2e-2, 2e-2), "bf16": (3e-2, 5e-2, 5e-2),
}  # fmt: skip


def _pose_net(case: NetCase, device: torch.device) -> Problem:
    """Truth is float32 without TF32. The error of plain PyTorch in the case's dtype, the worse of two layouts, is the
    measure: a provider may err twice as much."""
    data = _net_data(case, device)
    with precision("fp32"):
        step = _net_step(PROVIDERS["eager-nchw"], case, data, exact=True)
        truth = [t.clone() for t in step()]
    forward, gradients, slack = _SLACK[case.dtype]
    names = [name for name, _ in case.model(reference).named_parameters()] if case.mode == "training" else []
    problem = _NetProblem(data, truth, 1, (math.inf, math.inf), names, _scales(names, truth[1:]), slack=slack)
    runs = [_net_step(PROVIDERS[name], case, data)() for name in ("eager", "eager-nchw")]
    errors = [problem.errors(run) for run in runs]
    worst = [max(error.get(part, 0) for error in errors) for part in ("forward", "gradient")]
    problem.allowed = (2 * worst[0] + forward, 2 * worst[1] + gradients)
    judged = [problem.judged(run) for run in runs]
    problem.plain = [(max(a[0], b[0]), (a[1] + b[1]) / 2) for a, b in zip(*judged, strict=True)]
    return problem


def _scales(names: list[str], gradients: list[Tensor]) -> list[Tensor]:
    """What the error of each gradient is relative to: its own size; of a convolution's bias, the weight's if that is
    larger. Before a batch norm, or a convolution and one, a bias has little gradient but what rounding makes."""
    sizes = {name: g.norm() / math.sqrt(g.numel()) for name, g in zip(names, gradients, strict=True)}
    scales = []
    for name, gradient in zip(names, gradients, strict=True):
        size = sizes[name]
        weight = name.removesuffix("bias") + "weight"
        if name.endswith("bias") and weight in sizes and gradients[names.index(weight)].dim() == 4:
            size = torch.maximum(size, sizes[weight])
        scales.append((size * math.sqrt(gradient.numel())).clamp_min(1e-30))
    return scales


def _net_data(case: NetCase, device: torch.device) -> _NetData:
    model = case.model(reference)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    weights = {name: value.to(device) for name, value in model.state_dict().items()}
    return _NetData(*case.data(device), weights)


def once(provider: Provider, case: NetCase, device: torch.device) -> None:
    """Run a step of a network once: compilers then find it in their caches."""
    _net_step(provider, case, _net_data(case, device))()


def _net_step(provider: Provider, case: NetCase, data: _NetData, exact: bool = False) -> Step:
    """``exact``: in float32, whatever the case's dtype."""
    backend = provider.backend
    model = case.model(reference) if backend is None else case.model(fastunet, backend=backend)
    model.load_state_dict(data.weights)
    model = model.to(data.x.device).to(memory_format=provider.layout)  # type: ignore[call-overload]
    if provider.accelerated:
        model = fastunet.accelerate(model)
    x = data.x.contiguous(memory_format=provider.layout)

    def amp() -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if exact else nets.autocast(case, x.device)

    if case.mode == "training":
        loss = nets.plain_loss(case) if backend is None else nets.our_loss(case, backend)

        def forward_loss(x: Tensor, labels: Tensor) -> Tensor:
            with amp():
                return loss(model(x), labels)

        return nets.training_step(model, _compiled(provider, forward_loss), x, data.labels)
    model.eval()
    if case.mode == "frozen" and not exact:
        dtype = DTYPES[case.dtype]
        freeze = getattr(fastunet, "freeze", None)
        if backend is None:
            model, x = nets.folded(model).to(dtype), x.to(dtype)
            if provider.engine:
                return engines.frozen(provider.name, model, x, case.dtype == "tf32")
        elif freeze is not None:
            model, x = freeze(model, dtype=dtype), x.to(dtype)
    forward = _compiled(provider, model)

    def infer() -> list[Tensor]:
        with torch.inference_mode(), amp():
            return [forward(x)]

    return infer


def _compiled(provider: Provider, function: Callable[..., Any]) -> Callable[..., Any]:
    if provider.compiled is None:
        return function
    how: dict[str, Any] = {"backend": "eager"} if provider.compiled == "trace" else {"mode": provider.compiled}
    compiled = torch.compile(function, dynamic=False, **how)

    @functools.wraps(compiled)
    def run(*args: Any, **operands: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **operands)

    return run


def _graphed(step: Step) -> Step:
    """``step`` captured in a CUDA graph, after three runs on a stream of their own.

    The graph reads the step's weights and inputs where they lay: they live as long as the replay does.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay(kept: Step = step) -> list[Tensor]:
        graph.replay()
        return results

    return replay


# ---- losses ------------------------------------------------------------------------------------------------------


def _pose_loss(case: LossCase, device: torch.device) -> Problem:
    logits, labels = case.data(device)
    if case.function == "confusion_matrix":
        pairs = labels.flatten() * case.shape[1] + logits.argmax(1).flatten()
        counts = torch.bincount(pairs, minlength=case.shape[1] ** 2).view(case.shape[1], -1)
        return Problem((logits, labels), [counts.double()], 1, (0, 0))
    exact = logits.detach().double().requires_grad_()
    truth = _loss_step(PROVIDERS["seed002"], case, exact, labels)()
    # The losses are computed in float32, and the gradient is rounded to the logits' dtype.
    return Problem((logits, labels), truth, 1, (1e-4, 1e-4 + torch.finfo(case.dtype).eps))


def _loss_step(provider: Provider, case: LossCase, logits: Tensor, labels: Tensor) -> Step:
    if case.function == "confusion_matrix":
        return _score_step(provider, case, logits, labels)
    function = _loss_function(provider, case)
    if provider.compiled:
        function = _compiled(provider, function)

    def step() -> list[Tensor]:
        value = function(logits, labels)
        return [value.detach(), *torch.autograd.grad(value, logits)]

    return step


def _loss_function(provider: Provider, case: LossCase) -> Callable[[Tensor, Tensor], Tensor]:
    if provider.backend is not None:
        backend = provider.backend
        if case.function == "soft_miou":
            return functools.partial(metrics.soft_miou, backend=backend)
        return DiceCELoss(backend=backend)
    if provider.name == "monai":
        from monai.losses import DiceCELoss as MonaiLoss

        monai = MonaiLoss(softmax=True, to_onehot_y=True, batch=True)
        return lambda logits, labels: monai(logits.float(), labels.unsqueeze(1))
    plain = reference.functional.soft_miou if case.function == "soft_miou" else nets.plain_dice_ce
    return lambda logits, labels: plain(nets.single(logits), labels)


def _score_step(provider: Provider, case: LossCase, logits: Tensor, labels: Tensor) -> Step:
    classes = case.shape[1]
    if provider.name == "torchmetrics":
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        return lambda: [multiclass_confusion_matrix(logits, labels, classes, validate_args=False)]

    def step() -> list[Tensor]:
        score = metrics.ConfusionMatrix(classes).to(logits.device)
        score.update(logits, labels)
        return [score.matrix]

    return step


# ---- operations --------------------------------------------------------------------------------------------------

_EPS = 1e-5


@dataclass
class _Norm:
    """The batch norm whose affine a source carries: its own batch statistics, weight and bias."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor


@dataclass
class _OpData:
    operands: dict[str, Any]  # by the names in the operator's schema
    norms: dict[str, _Norm]  # by the name of the source they normalise


def _pose_op(case: Case, device: torch.device) -> Problem:
    """Truth is the reference in float64, or in float32 where the device's memory is too small for that."""
    data = _op_data(case, device)
    dtypes = [torch.float64, torch.float32]
    for dtype in dtypes:
        try:
            with precision("fp32"):
                operands = {name: _cast(value, dtype) for name, value in data.operands.items()}
                truth = [t.detach() for t in _step(case, _reference(case), operands)()]
            break
        except torch.OutOfMemoryError:
            if dtype is dtypes[-1]:
                raise
    leaves = sum(_trained(case, name, value) for name, value in data.operands.items())
    results = len(truth) - (0 if case.mode == "inference" else leaves)
    tf32 = case.dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    allowed = TF32_TOLERANCE if tf32 else TOLERANCE[case.dtype]
    if case.op == "confusion_matrix":
        allowed = 0  # of the same logits
    # Rounding can decide which of four pixels a pool takes; the gradient then goes to another one. Where that happens
    # to a share s of the pixels, the error in the Euclidean norm is about the root of s.
    return Problem(data, truth, results, (allowed, math.sqrt(allowed) if case.pool else allowed))


def _op_data(case: Case, device: torch.device) -> _OpData:
    names = [argument.name for argument in getattr(torch.ops.fastunet, case.op).default._schema.arguments]
    operands = dict(zip(names, case.operands(device), strict=False))
    norms = {}
    for source, affine in (("x", "affine"), ("x0", "affine0"), ("x1", "affine1"), ("skip", "skip_affine")):
        if operands.get(source) is not None and operands.get(affine) is not None:
            mean, var = reference.functional.statistics(operands[source].float(), 1)
            norms[source] = _Norm(mean, var, operands[affine][0].clone(), operands[affine][1].clone())
            operands[affine] = reference.functional.bn_affine(mean, var, norms[source].weight, norms[source].bias, _EPS)
    return _OpData(operands, norms)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _op_step(provider: Provider, case: Case, data: _OpData) -> Step:
    if provider.engine:
        operands = data.operands
        return engines.cudnn_graph(operands["x0"], operands["affine0"], operands["weight"], case.stride)
    if provider.backend is not None:
        step = _step(case, _ours(case, provider.backend), data.operands)

        def chosen() -> list[Tensor]:
            with case.choosing():
                return step()

        return chosen if case.algorithm and provider.backend == "triton" else step
    if not data.norms:
        plain: dict[str, Callable[..., list[Tensor]]]
        plain = {"softmax_stats": _plain_stats, "confusion_matrix": _plain_counts}
        return _step(case, _compiled(provider, plain.get(case.op) or _reference(case)), data.operands)
    operands = {name: value for name, value in data.operands.items() if "affine" not in name}
    if provider.name != "eager-bare":
        for source, norm in data.norms.items():
            operands |= {f"{source}_{key}": value for key, value in vars(norm).items()}
    return _step(case, _compiled(provider, _modules(case, provider.name != "eager-bare")), operands)


def _reference(case: Case) -> Callable[..., list[Tensor]]:
    """The operation by fastunet.reference; what is pooled stays as it was before normalisation, as in the operator."""
    if case.op == "max_pool2x2":
        return lambda x, affine: [reference.functional.max_pool2x2(x, None, 1.0)]  # scales are above 0
    if case.op == "conv2d_act":
        return _conv_norm_relu
    function = getattr(reference.functional, case.op)
    if case.op == "conv2d":

        def conv2d(save: bool, pool: bool, pool_scale: Tensor | None, **operands: Any) -> list[Tensor]:
            found = _list(function(**operands))
            return [*found, F.max_pool2d(found[0], 2)] if pool else found  # scales are above 0

        return conv2d
    return lambda **operands: _list(function(**operands))


def _conv_norm_relu(
    x0: Tensor, x1: Tensor | None, weight: Tensor, bias: Tensor | None, affine: Tensor, pool: bool,
    head_weight: Tensor | None, **rest: Any,
) -> list[Tensor]:  # fmt: skip
    """A convolution of plain sources, batch norm by running statistics, ReLU, and pooling or a 1×1 convolution."""
    y = F.conv2d(x0 if x1 is None else torch.cat([x0, x1], 1), weight, bias, 1, 1)
    scale, shift, centre = affine
    z = F.relu(torch.batch_norm(y, scale, shift, centre, torch.ones_like(centre), False, 0.0, 0.0, True))
    if head_weight is not None:
        return [F.conv2d(z, head_weight)]
    return [z, F.max_pool2d(z, 2)] if pool else [z]


def _ours(case: Case, backend: str) -> Callable[..., list[Tensor]]:
    operator = getattr(ops, case.op)
    return lambda **operands: _list(operator(*operands.values(), backend))


def _list(results: Any) -> list[Tensor]:
    return [y for y in ([results] if isinstance(results, Tensor) else results) if y.numel()]


def _modules(case: Case, normalise: bool) -> Callable[..., list[Tensor]]:
    """The same work as a network of PyTorch's modules does it: batch norm and ReLU in passes of their own."""

    def source(name: str, operands: dict[str, Any], act: bool = True) -> Tensor:
        x: Tensor = operands[name]
        if not normalise:
            return x
        mean, var, weight, bias = (operands[f"{name}_{key}"] for key in ("mean", "var", "weight", "bias"))
        if case.mode == "inference" and (not case.stats or case.op == "head_predict"):  # a network in eval mode
            return F.relu(F.batch_norm(x, mean, var, weight, bias, eps=_EPS))
        z = F.batch_norm(x, None, None, weight, bias, training=True, eps=_EPS)
        return F.relu(z) if act else z

    def conv2d(**operands: Any) -> list[Tensor]:
        names = ["x0"] if operands["x1"] is None else ["x0", "x1"]
        parts = [
            F.interpolate(source(name, operands), scale_factor=2) if doubled else source(name, operands)
            for name, doubled in zip(names, operands["doubled"], strict=False)
        ]
        z = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        weight = operands["weight"]
        y = F.conv2d(z, weight, operands["bias"], operands["stride"], weight.shape[-1] // 2)
        return [y, F.max_pool2d(y, 2)] if operands["pool"] else [y]

    def conv_transpose2d(**operands: Any) -> list[Tensor]:
        weight = operands["weight"]
        margin = 0 if weight.shape[-1] == 2 else 1
        return [F.conv_transpose2d(source("x", operands), weight, operands["bias"], 2, margin, margin)]

    def max_pool2x2(**operands: Any) -> list[Tensor]:
        return [F.max_pool2d(source("x", operands), 2)]

    def upsample_concat(**operands: Any) -> list[Tensor]:
        align = operands["align_corners"]
        mode = "nearest" if align is None else "bilinear"
        up = F.interpolate(source("x", operands), scale_factor=2, mode=mode, align_corners=align)
        if operands["skip"] is None:
            return [up]
        skip = source("skip", operands)
        rows, columns = skip.shape[2] - up.shape[2], skip.shape[3] - up.shape[3]
        if rows or columns:
            up = F.pad(up, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return [torch.cat([skip, up], 1)]

    def affine_act(**operands: Any) -> list[Tensor]:
        return [source("x", operands)]

    def add_act(**operands: Any) -> list[Tensor]:
        return [F.relu(source("x", operands) + source("skip", operands))]

    def avg_pool2x2(**operands: Any) -> list[Tensor]:
        return [F.avg_pool2d(source("x", operands), 2)]

    def pad_replicate(**operands: Any) -> list[Tensor]:
        return [F.pad(source("x", operands), [0, operands["columns"], 0, operands["rows"]], mode="replicate")]

    def affine_prelu(**operands: Any) -> list[Tensor]:
        return [F.prelu(source("x", operands, act=False), operands["slopes"].to(operands["x"].dtype))]

    def head_stats(**operands: Any) -> list[Tensor]:
        statistics = ("labels", "pixel_weight", "mode", "ignore_index", "wanted")
        logits = F.conv2d(source("x", operands), operands["weight"], operands["bias"])
        return _plain_stats(logits, **{name: operands[name] for name in statistics})

    def head_predict(**operands: Any) -> list[Tensor]:
        logits = F.conv2d(source("x", operands), operands["weight"], operands["bias"])
        if operands["output"] == "argmax":
            return [logits.argmax(1).to(torch.uint8)]
        p = logits.softmax(1) if operands["output"] == "softmax" else logits.sigmoid()
        return [(p > operands["threshold"]).to(torch.uint8) if operands["output"] == "threshold" else p]

    functions = (
        conv2d, conv_transpose2d, max_pool2x2, avg_pool2x2, pad_replicate, upsample_concat, affine_act, affine_prelu,
        add_act, head_stats, head_predict
    )  # fmt: skip
    return {function.__name__: function for function in functions}[case.op]


def _plain_stats(
    logits: Tensor, labels: Tensor, pixel_weight: Tensor | None, mode: str, ignore_index: int, wanted: Sequence[bool]
) -> list[Tensor]:
    """The statistics of ``softmax_stats`` as one writes them with care: in float32, the unwanted ones left out.

    No label of a case is ``ignore_index``.
    """
    logits = logits.float()
    if mode == "softmax":
        log_p = logits.log_softmax(1)
        p, spread = log_p.exp(), -log_p
        y = share = torch.zeros_like(p).scatter_(1, labels.long().unsqueeze(1), 1)
        ce = y * spread
    else:
        p, y = logits.sigmoid(), labels.view_as(logits).float()
        share, ce = torch.ones_like(p), F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        spread = F.softplus(logits) + F.softplus(-logits)
    w = 1 if pixel_weight is None else pixel_weight.unsqueeze(1)
    none = p.new_zeros(p.shape[:2])
    squares, entropy, smoothing = wanted
    sums = [(p * y).sum((2, 3)), p.sum((2, 3)), y.sum((2, 3)), p.square().sum((2, 3)) if squares else none]
    sums += [(w * ce).sum((2, 3)), (w * share).sum((2, 3))] if entropy else [none, none]
    sums += [(w * spread).sum((2, 3)) if smoothing else none]
    return [torch.stack(sums, 2)]


def _plain_counts(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float) -> list[Tensor]:
    """The counts of ``confusion_matrix``, with its last row of labels that are no class; there are none in a case."""
    classes = max(logits.shape[1], 2)
    guess = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > threshold).long()
    pairs = labels.long().flatten() * classes + guess.flatten()
    return [torch.bincount(pairs, minlength=(classes + 1) * classes).view(classes + 1, classes)]


def _step(case: Case, function: Callable[..., list[Tensor]], operands: dict[str, Any]) -> Step:
    """Run ``function`` forward, and backward as the case's mode says; operands are copied as leaves."""
    operands = {
        name: value.detach().requires_grad_() if _trained(case, name, value) else value
        for name, value in operands.items()
    }
    leaves = [x for x in operands.values() if isinstance(x, Tensor) and x.requires_grad]

    if case.mode == "inference":

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return function(**operands)

        return infer
    results = function(**operands)
    incoming = [_incoming(y, i) for i, y in enumerate(results)]
    if case.mode == "training":
        del results

        def train() -> list[Tensor]:
            found = function(**operands)
            return [*(y.detach() for y in found), *torch.autograd.grad(found, leaves, incoming)]

        return train
    return lambda: list(torch.autograd.grad(results, leaves, incoming, retain_graph=True))


def _trained(case: Case, name: str, value: Any) -> bool:
    """Whether the case wants the gradient of an operand."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or name.endswith(("_mean", "_var", "_scale")):
        return False
    if name == "pixel_weight" or (case.op, name) == ("max_pool2x2", "affine"):
        return False  # the operators have none
    weights = name in ("weight", "bias") and case.op != "bn_affine"
    if case.mode in ("dgrad", "wgrad"):
        return weights == (case.mode == "wgrad")
    return weights or not case.image


def _incoming(y: Tensor, seed: int) -> Tensor:
    """A gradient for result ``y``: the same numbers, of 8 bits of mantissa, in every dtype and layout."""
    generator = torch.Generator(y.device).manual_seed(seed)
    random = torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32)
    return torch.empty_like(y).copy_(random.to(torch.bfloat16))
