"""``torch.compile(model, backend="fastunet")``: what Dynamo traces, run by fastunet's operators where they serve it.

Dynamo's graphs call functions, with parameters among their inputs. Here convolutions and norms are made modules again:
the graph is a model then, in which :mod:`fastunet.accelerate` finds what it finds in any other; what it cannot serve
runs by PyTorch's own operators, as the graph has it. Gradients are autograd's.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastunet.accelerate import Accelerated, check_model
from fastunet.activation import Config

Bound = tuple[dict[str, Any], str, int]  # where a module keeps a tensor, its name there, and which of the inputs it is


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """What runs in place of ``graph_module``; the package's entry point among torch.compile's backends.

    Raises:
        TypeError: torch.compile was given a mode or options, which are Inductor's.
    """
    if options:
        what = " and no ".join(options)
        raise TypeError(f"expected no {what} for torch.compile's backend fastunet, which has none; leave it out")
    model = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    _write_numbers(model.graph, example_inputs)
    bound, kept = _with_modules(model, example_inputs)
    try:
        check_model(model)
    except (TypeError, ValueError):  # what accelerate refuses: several devices, shards
        return graph_module.forward
    if not any(isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) for module in model.children()):
        return graph_module.forward
    model.__dict__["forward"] = Accelerated(model, Config())
    lock = threading.RLock()

    def run(*inputs: Any) -> Any:
        # The parameters are those of this call: Dynamo takes one graph for all models of a kind, and for all threads.
        # Afterwards they are let go: what Dynamo has compiled outlives the models.
        with lock:
            try:
                for owner, name, i in bound:
                    owner[name] = inputs[i]
                return model(*(inputs[i] for i in kept))
            finally:
                for owner, name, _ in bound:
                    owner[name] = None

    return run


def _write_numbers(graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Write into the graph the numbers that norms take of its inputs, of which torch.export would know nothing.

    Where all is to be open, Dynamo makes tensors of epsilons and momenta. It traces again for others: operators that
    take numbers fix them.
    """
    places = [node for node in graph.nodes if node.op == "placeholder"]
    for place, x in zip(places, inputs, strict=True):
        for item in [user for user in place.users if user.op == "call_method" and user.target == "item"]:
            if type(x) is Tensor and x.dtype == torch.float64 and all(user.target in _MODULES for user in item.users):
                for user in list(item.users):
                    given = {name: float(x) if y is item else y for name, y in _arguments(user).items()}
                    user.args, user.kwargs = (), given
                graph.erase_node(item)


def _arguments(call: fx.Node) -> dict[str, Any]:
    """What a function of :data:`_MODULES` is called with, by names."""
    return inspect.signature(_MODULES[call.target]).bind(*call.args, **call.kwargs).arguments


def _with_modules(model: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[Bound], list[int]]:
    """Put modules into the graph, and say where the tensors in these come from, and which inputs are left."""
    graph, bound = model.graph, list[Bound]()
    places = [node for node in graph.nodes if node.op == "placeholder"]
    position = {node: i for i, node in enumerate(places)}
    values = {node: node.meta.get("example_value") for node in graph.nodes}
    made: dict[Any, nn.Module] = {}  # of which one serves all calls with the same tensors, as it did in the model
    names: dict[nn.Module, str] = {}

    def bind(owner: dict[str, Any], name: str, i: int) -> None:
        owner[name] = inputs[i]
        bound.append((owner, name, i))

    for n, node in enumerate(list(graph.nodes)):
        make = _MODULES.get(node.target) if node.op == "call_function" else None
        if make is None:
            continue
        call = _arguments(node)
        x = values.get(call["input"])
        own = {name: position.get(y) for name, y in call.items() if isinstance(y, fx.Node) and name != "input"}
        tensors = {name: i for name, i in own.items() if i is not None and _fits(name, inputs[i])}
        plain = len(tensors) == len(own) == len(node.all_input_nodes) - 1  # nothing else is computed
        if not (plain and isinstance(x, Tensor) and x.dim() == 4):
            continue
        constants = {name: y for name, y in call.items() if name not in own and name != "input"}
        twin = make, repr(constants), *tensors.items()
        module = made.get(twin) if tensors else None
        if module is None:
            module = make(x, **constants, **{name: inputs[i] for name, i in tensors.items()})
            if module is None:
                continue
            made[twin], names[module] = module, f"fused_{n}"
            model.add_submodule(names[module], module)
            for name, i in tensors.items():
                bind(module._buffers if name.startswith("running_") else module._parameters, name, i)
        with graph.inserting_before(node):
            called = graph.call_module(names[module], (call["input"],))
        values[called] = values[node]
        node.replace_all_uses_with(called)
        graph.erase_node(node)

    sizes = {str(n): (node, d) for node in places for d, n in enumerate(getattr(values[node], "shape", ()))}
    with graph.inserting_after(places[-1]):
        for node, i in position.items():
            if node.users and _lasts(inputs[i]):
                bind(model._parameters if isinstance(inputs[i], nn.Parameter) else model._buffers, f"own_{i}", i)
                node.replace_all_uses_with(graph.get_attr(f"own_{i}"))
            elif node.users and isinstance(values[node], torch.SymInt) and str(values[node]) in sizes:
                # Read off a tensor: what takes a number is traced again for each other one.
                node.replace_all_uses_with(graph.call_method("size", sizes[str(values[node])]))
    kept = [i for node, i in position.items() if node.users]
    for node in places:
        if not node.users:
            graph.erase_node(node)
    model.recompile()
    return bound, kept


def _lasts(x: Any) -> bool:
    """Whether an input is a parameter or a buffer, which Dynamo marks."""
    return isinstance(x, nn.Parameter) or getattr(x, "_dynamo_static_input_type", None) is not None


def _fits(name: str, x: Any) -> bool:
    """Whether an input may be what a module calls ``name``: torch.export takes no other tensor for a parameter."""
    return _lasts(x) if name.startswith("running_") else isinstance(x, nn.Parameter)


# ---- functions as modules: arguments as PyTorch names them, tensors to be bound; None where no module does it -------


def _conv(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> nn.Module:  # fmt: skip
    outputs, inputs, *size = weight.shape
    more = (stride, padding, dilation, groups, bias is not None)
    return nn.Conv2d(inputs * groups, outputs, (size[0], size[1]), *more, device="meta")


def _conv_transpose(
    input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> nn.Module:  # fmt: skip
    inputs, outputs, *size = weight.shape
    more = (stride, padding, output_padding, groups, bias is not None, dilation)
    return nn.ConvTranspose2d(inputs, outputs * groups, (size[0], size[1]), *more, device="meta")


def _batch_norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: Any = 0.1, eps: float = 1e-5,
) -> nn.Module | None:  # fmt: skip
    if (weight is None) != (bias is None) or running_mean is None:
        return None
    norm = nn.BatchNorm2d(int(input.shape[1]), eps, momentum, weight is not None, device="meta")
    norm.num_batches_tracked = None  # the graph itself counts
    return norm.train(training)


def _instance_norm(
    input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: Any = 0.1, eps: float = 1e-5,
) -> nn.Module | None:  # fmt: skip
    if (weight is None) != (bias is None) or running_mean is not None:
        return None
    return nn.InstanceNorm2d(int(input.shape[1]), eps, affine=weight is not None, device="meta")


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> nn.Module | None:
    if (weight is None) != (bias is None):
        return None
    return nn.GroupNorm(num_groups, int(input.shape[1]), eps, weight is not None, device="meta")


def _prelu(input: Tensor, weight: Tensor) -> nn.Module:
    return nn.PReLU(weight.numel(), device="meta")


_MODULES: dict[Any, Callable[..., nn.Module | None]] = {
    torch.conv2d: _conv,
    torch.conv_transpose2d: _conv_transpose,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    torch.prelu: _prelu,
}
