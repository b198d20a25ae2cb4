"""Which tensors a kernel launch reads and writes, from the kernel itself.

Triton's IR, built for the constants of that launch, says which of its pointers reach a load and which a store. An
absent operand is None, which is no pointer. A launch is charged the whole of each tensor that it
reads or writes, also where it needs a part (the half of a weight that serves one of two sources).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from triton._C.libtriton import ir
from triton.compiler.compiler import ASTSource, make_backend

from benchmarks.access import Access, distinct
from benchmarks.chips import target_of
from benchmarks.recorder import Launch, Specialisation, specialise

_TARGET = target_of("sm_90")  # pointers reach the same loads on every chip
_LOADS = {"tt.load", "tt.descriptor_load", "tt.descriptor_gather"}
_STORES = {"tt.store", "tt.descriptor_store", "tt.descriptor_scatter"}
_UPDATES = {"tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_reduce"}

# By Launch.key: numbers of the pointers read, of those written, and whether there is a matrix product.
_patterns: dict[tuple[Any, ...], tuple[set[int], set[int], bool]] = {}


def of_launch(launch: Launch) -> Access:
    """The tensors that a launch reads and writes."""
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    values = [getattr(named[name], "base", named[name]) for name in launch.kernel.arg_names]  # .base of a descriptor
    pointers = [x for x in values if isinstance(x, Tensor)]
    if launch.key not in _patterns:
        _patterns[launch.key] = _pattern(specialise(launch, _TARGET))
    read, written, multiplies = _patterns[launch.key]
    return Access(distinct(pointers[i] for i in read), distinct(pointers[i] for i in written), multiplies)


def _pattern(wanted: Specialisation) -> tuple[set[int], set[int], bool]:
    context = ir.context()
    module = _module(wanted, context)
    function = module.get_function(module.get_entry_func_name())
    arguments = [function.args(i) for i in range(function.get_num_args())]
    pointers = [x for x in arguments if str(x.get_type()).startswith(("!tt.ptr", "!tt.tensordesc"))]
    roots = {pointer.id(): {i} for i, pointer in enumerate(pointers)}
    operations: list[Any] = []
    module.walk(operations.append)
    names = [op.get_name() for op in operations]
    if "tt.call" in names:
        raise RuntimeError(f"expected every function that {wanted.name} calls to be inlined; drop its noinline=True")
    flows = list(_flows(operations))
    while any([_spread(roots, *flow) for flow in flows]):  # a list: every flow, every time
        pass
    read: set[int] = set()
    written: set[int] = set()
    for op, name in zip(operations, names, strict=True):
        if name in _LOADS | _UPDATES:
            read |= roots[op.get_operand(0).id()]
        if name in _STORES | _UPDATES:
            written |= roots[op.get_operand(0).id()]
    # Products with a few filters are sums of multiply-adds.
    multiplies = wanted.name.startswith("_conv_few_") or any("dot" in name for name in names)
    return read, written, multiplies


def _module(wanted: Specialisation, context: Any) -> Any:
    """A kernel in Triton's IR, with the functions it calls inlined and what its constants rule out removed."""
    backend = make_backend(wanted.target)
    options = backend.parse_options(wanted.options)
    source = ASTSource(wanted.kernel, wanted.signature, wanted.constants, wanted.attributes)
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    module = source.make_ir(wanted.target, options, codegen, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return stages["ttir"](module, {})


def _flows(operations: list[Any]) -> Iterable[tuple[list[int], list[int]]]:
    """(values, values) between which a pointer passes: from the operands of an operation to its results, and among
    the operands, block arguments, yields and results of a loop or a condition, which line up at their ends."""
    last = {op.get_block().get_parent().id(): op for op in operations if op.get_name() != "builtin.module"}
    for op in operations:
        operands = [op.get_operand(i).id() for i in range(op.get_num_operands())]
        results = [op.get_result(i).id() for i in range(op.get_num_results())]
        if op.get_num_regions() == 0:
            if op.get_name() not in _LOADS | _UPDATES:
                yield operands, results
            continue
        groups = [operands, results]
        for i in range(op.get_num_regions()):
            end = last.get(op.get_region(i).id())
            if end is not None:
                block = end.get_block()
                groups.append([block.get_argument(j).id() for j in range(block.get_num_arguments())])
                groups.append([end.get_operand(j).id() for j in range(end.get_num_operands())])
        for place in range(1, max(map(len, groups)) + 1):
            joined = [group[-place] for group in groups if len(group) >= place]
            yield joined, joined


def _spread(roots: dict[int, set[int]], sources: list[int], targets: list[int]) -> bool:
    """Add what the sources point into to what the targets do; whether that was news."""
    found: set[int] = set().union(*(roots.get(source, set()) for source in sources))
    news = False
    for target in targets:
        known = roots.setdefault(target, set())
        news = news or not found <= known
        known |= found
    return news
