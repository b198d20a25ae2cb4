"""The gate compiles all that the public surface can launch: each value of each argument, each switch of each kernel.

The schemas tell the arguments, the operators which weights they take, and the kernels their switches.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, python
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="cases are launched by Triton, part of pip install 'fastunet[test]' on Linux")

import fastunet
from benchmarks import nets
from benchmarks.cases import CASES, DTYPES, UNTIMED, WORDS, Case
from fastunet import checks, functional, losses, metrics, ops, verify
from fastunet.losses import DiceLoss
from fastunet.metrics import ConfusionMatrix

Value = tuple[str, str, str]  # operator, argument, value

OPERATORS = [
    schema.name.partition("::")[2]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("fastunet::") and schema.name != "fastunet::pool_fork"  # whose launches are max_pool2x2's
]


def arguments(operator: str) -> list[Any]:
    return list(getattr(ops, operator)._schema.arguments[:-1])  # the last is the backend


def possible(operator: str, argument: Any) -> list[str]:
    """The values of an argument that decide what is compiled."""
    kind, name = str(argument.type), argument.name
    if kind == "Optional[Tensor]":
        return ["None", "a tensor"]
    if kind in ("bool", "Optional[bool]"):
        return ["True", "False", "None"][: 2 if kind == "bool" else 3]
    if kind == "List[bool]":
        count = 2 if name == "doubled" else 4 if name == "mask" and operator == "conv2d_backward" else 3
        return [f"{i}: {wanted}" for i in range(count) for wanted in (True, False)]
    if kind == "str":
        return list(WORDS[name])
    if kind == "Tensor" and name in ("labels", "mask"):
        return [str(dtype) for dtype in checks.LABEL_DTYPES]
    return [str(dtype) for dtype in DTYPES] if name in ("x", "x0", "logits", "dtype") else []


def given(argument: Any, value: Any) -> list[str]:
    """The same of a value that is given."""
    kind = str(argument.type)
    if kind == "Optional[Tensor]":
        return ["None" if value is None else "a tensor"]
    if kind == "List[bool]":
        return [f"{i}: {wanted}" for i, wanted in enumerate(value)]
    return [str(value.dtype if isinstance(value, torch.Tensor) else value)]


def convolved(operator: str, operands: tuple[Any, ...]) -> str | None:
    """What a convolution is made with."""
    named = dict(zip([argument.name for argument in arguments(operator)], operands, strict=True))
    if (weight := named.get("weight")) is None or weight.dim() != 4:
        return None
    return f"{weight.shape[2]}×{weight.shape[3]} of stride {named.get('stride')}"


def taken(operator: str) -> Iterator[Value]:
    """The sizes of weights, and strides, that a forward operator takes."""
    operands = next(case for case in UNTIMED if case.op == operator).operands("meta")
    names = [argument.name for argument in arguments(operator)]
    if convolved(operator, operands) is None:
        return
    for side, stride in itertools.product(range(1, 6), range(1, 5) if "stride" in names else [None]):
        first, second = operands[names.index("weight")].shape[:2]
        tried = {"weight": operands[0].new_empty((first, second, side, side)), "stride": stride}
        call = tuple(tried.get(name, x) for name, x in zip(names, operands, strict=True))
        try:
            getattr(ops, operator)(*call, "torch")
        except ValueError:
            continue
        yield operator, "weight", str(convolved(operator, call))


class Noting:
    """A backend that notes what it is given."""

    def __init__(self) -> None:
        self.seen: set[Value] = set()

    def __getattr__(self, operator: str) -> Any:
        def call(*operands: Any) -> Any:
            for argument, value in zip(arguments(operator), operands, strict=True):
                self.seen |= {(operator, argument.name, each) for each in given(argument, value)}
            if weight := convolved(operator, operands):
                self.seen.add((operator, "weight", weight))
            return getattr(ops, operator)(*operands, "torch")

        return call


def unexercised(cases: Iterable[Case]) -> list[Value]:
    backend: Any = Noting()
    for case in cases:
        case.launch(backend)
    wanted = [
        (op, argument.name, value) for op in OPERATORS for argument in arguments(op) for value in possible(op, argument)
    ]
    wanted += [value for op in OPERATORS if not op.endswith("_backward") for value in taken(op)]
    return [value for value in wanted if value not in backend.seen]


def test_every_value_of_every_argument_is_in_a_case() -> None:
    assert unexercised([*CASES, *UNTIMED]) == []


def test_what_no_case_has_is_named() -> None:
    missing = unexercised(case for case in UNTIMED if case.op != "upsample_concat" and case.kernel != 2)
    assert ("upsample_concat", "align_corners", "None") in missing
    assert ("upsample_concat_backward", "skip_affine", "None") in missing
    assert ("conv_transpose2d", "weight", "2×2 of stride None") in missing
    assert all(value[0].startswith(("upsample_concat", "conv_transpose2d")) for value in missing)


# ---- what users run ----------------------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """Notes the arguments of every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Value] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastunet" and (operator := func._opname) in OPERATORS:
            for argument, value in zip(arguments(operator), args, strict=False):
                self.seen |= {(operator, argument.name, each) for each in given(argument, value)}
        return func(*args, **(kwargs or {}))


# Arguments of which ``fastunet verify`` has one value only: its cases are a sample, each run in several dtypes, and the
# whole networks of float64 behind them have the others.
SAMPLED = {
    "affine_act": "affine",
    "affine_prelu": "affine",
    "add_act": "affine",
    "avg_pool2x2": "affine",
    "pad_replicate": "affine",
    "bn_affine": "weight bias",
    "bn_affine_running": "weight bias",
    "group_affine": "weight bias",
    "conv2d": "save pool pool_scale",
    "conv2d_act": "affine0 x1 affine1 doubled bias affine pool head_bias",
    "conv_transpose2d": "affine bias",
    "head_predict": "affine bias output dtype",
    "head_stats": "affine bias labels pixel_weight wanted",
    "max_pool2x2": "affine",
    "softmax_stats": "labels pixel_weight wanted",
    "upsample_concat": "affine skip skip_affine skip_first",
    "confusion_matrix": "labels",
    "confusion_matrix_of_masks": "mask labels",
}


def test_verify_calls_every_operator_and_what_it_samples_is_named() -> None:
    with Watching() as watching:
        for case in verify.CASES:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                assert all(row.passed for row in verify._compare(case, dtype, torch.device("cpu"), "torch"))
    forward = [operator for operator in OPERATORS if not operator.endswith("_backward")]
    assert set(forward) <= {operator for operator, _, _ in watching.seen}
    sampled = {
        (operator, argument.name)
        for operator in forward
        for argument in arguments(operator)
        if any((operator, argument.name, value) not in watching.seen for value in possible(operator, argument))
    }
    assert sampled == {(operator, name) for operator, names in SAMPLED.items() for name in names.split()}


def test_every_network_is_verified_and_timed() -> None:
    public = {name for name in fastunet.__all__ if isinstance(getattr(fastunet, name), type)}
    public -= {"ConvSequence", "DoubleConv"}  # which the networks are made of
    assert {ours.__name__ for ours, *_ in verify.NETWORKS.values()} == public
    assert public <= {network.name for network in nets.NETWORKS.values()}


# Arguments that are the same for everybody, or say where something runs.
EVERYWHERE = {
    "self",
    "args",
    "kwargs",
    "x",
    "logits",
    "labels",
    "weight",
    "bias",
    "backend",
    "options",
    "dice",
    "unknown",
}


def public_arguments() -> Iterator[tuple[str, str]]:
    """Every argument that may be left out, of everything that is public."""
    networks = [getattr(fastunet, name) for name in fastunet.__all__]
    modules = (functional, losses, metrics)
    public = [*networks, *(getattr(module, name) for module in modules for name in module.__all__)]
    methods = [getattr(fastunet.UNet, name) for name in ("loss", "predict", "predict_proba", "use_checkpointing")]
    methods += [DiceLoss.preset, ConfusionMatrix.update, losses._OverlapLoss]
    for each in [*(x for x in public if callable(x)), *methods]:
        for name, parameter in inspect.signature(each).parameters.items():
            if parameter.default is not parameter.empty and name not in EVERYWHERE:
                yield each.__name__, name


def named_in_tests() -> set[str]:
    """Keywords of calls, and names in dicts, of all tests but the table of wrong calls; arguments by position too."""
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        if path.name not in ("test_wrong_calls.py", Path(__file__).name):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword):
                    found.add(str(node.arg))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_every_argument_of_the_surface_is_given_in_a_test() -> None:
    known = named_in_tests()
    assert [pair for pair in public_arguments() if pair[1] not in known] == []
    assert len({*public_arguments()}) > 60


# In a process of its own, whose kernels are not the interpreter's.
SWITCHES = """
import collections, json, re
from benchmarks.cases import CASES, UNTIMED
from benchmarks.recorder import flat, record
from fastunet import kernels
from fastunet.architecture import as_if_on

def launched(cases):
    for chip in ("sm_80", "sm_90"):
        with as_if_on(chip), record() as launches:
            for case in cases:
                case.launch(kernels)
        for launch in launches:
            yield launch.kernel, dict(zip(launch.kernel.arg_names, launch.args)), launch.kwargs

may_be_left_out = set()  # what a kernel compares with None, or what is None somewhere
for kernel, operands, _ in launched([*CASES, *UNTIMED]):
    compared = re.findall(r"(\\w+) is (?:not )?None", kernel.src)
    may_be_left_out |= {(kernel, name) for name, x in operands.items() if x is None or name in compared}

def one_way(cases):
    seen = collections.defaultdict(set)
    for kernel, operands, options in launched(cases):
        constants = flat({name: value for name, value in options.items() if name in kernel.arg_names})
        switches = {name: value for name, value in constants.items() if isinstance(value, bool)}
        switches |= {name: x is not None for name, x in operands.items() if (kernel, name) in may_be_left_out}
        for name, value in switches.items():
            seen[kernel.__name__, name].add(value)
    return [switch for switch, values in seen.items() if len(values) == 1]

print(json.dumps([one_way([*CASES, *UNTIMED]), one_way(CASES)]))
"""


def test_every_switch_of_every_kernel_is_thrown_both_ways() -> None:
    done = python("-c", SWITCHES)
    assert done.returncode == 0, done.stderr
    of_all, of_timed = json.loads(done.stdout)
    assert of_all == []
    assert ["_conv3x3_fwd_kernel", "head_bias_ptr"] in of_timed
