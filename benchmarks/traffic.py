"""The traffic ledger: bytes and FLOPs of a training step or an inference, counted with no GPU and no memory.

``python -m benchmarks.traffic --net unet --base 64 --size 512 --batch 8 --dtype bf16`` prints them layer by layer.

A step runs on the meta device and is noted operation by operation (:mod:`benchmarks.trace`). A *pass* is a kernel
launch, or an ATen operation that moves data; it is charged the tensors that it reads and writes, once each
(:mod:`benchmarks.access`). There are five accounts of one step:

- ``fastunet``: the passes really made, all kernels in Triton, nothing normalised kept (policy "memory").
- ``auto``: the same with the backend and policy that users get by default.
- ``eager``: PyTorch running :mod:`fastunet.reference`, channels_last.
- ``compile``: a model of torch.compile, on the generous side. Eager's passes without pointwise ones (ReLU, sums of
  gradients, casts) and paddings, which are taken to cost nothing inside their neighbours; the statistics of a batch
  normalisation stay a pass of their own, concatenations are copied, and a pool's winners take a byte instead of eight.
- ``floor``: fastunet's operators, each as good as it could be. What has to exist is written once, and read once by
  every matrix product and every other operator that takes it. A raw convolution output has to exist, since its
  statistics come after it; an upsampled tensor has not, since its reader can interpolate and sum its gradient up. A
  pool is written by the convolution before it. A weight gradient forms dY, the gradient of the raw output, from dy and
  y as it reads them, and writes it where the input's gradient is wanted too.

A step is forward, loss and backward, with convolution weights in the step's dtype and batch norms in float32, as under
autocast; autocast's copies of the weights and the optimizer's pass over them are the same for everybody and left out.
The loss is Dice and cross-entropy of logits, Dice of
probabilities. "Modelled" time is, summed over the passes, the longer of bytes / bandwidth and FLOPs / matrix rate, of
which a product attains the fraction that :mod:`benchmarks.model` gives it, and all of it at the floor.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

import fastunet
from benchmarks import nets
from benchmarks.access import Access, distinct, of_aten, storage
from benchmarks.chips import GPUS
from benchmarks.measure import DTYPES
from benchmarks.model import aten_rate, triton_rate
from benchmarks.nets import NetCase
from benchmarks.trace import Call, tensors_of, trace
from fastunet import reference

MODES: tuple[Literal["training", "inference"], ...] = ("training", "inference")


@dataclass(frozen=True)
class Roofs:
    """What a GPU does at most: bandwidth in GB/s, and the rate of matrix products in TFLOP/s."""

    bandwidth: float
    tflops: float


# ---- the step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """A step as it was traced: operations, where each belongs, and the bytes autograd kept for the backward."""

    calls: list[Call]
    phases: list[str]  # "forward", "loss", "backward", of each operation
    layers: list[str]  # the name of a convolution, or "loss"
    saved: int

    def __iter__(self) -> Iterator[tuple[Call, str, str]]:
        """Each (operation, phase, layer)."""
        return zip(self.calls, self.phases, self.layers, strict=True)


def run(
    case: NetCase,
    package: ModuleType,
    architecture: str = "sm_90",
    layout: torch.memory_format = torch.channels_last,
    **settings: str,
) -> Traced:
    """Trace a step of ``case`` as ``package`` (:mod:`fastunet` or :mod:`fastunet.reference`) does it."""
    training = case.mode == "training"
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[storage(x)] = x
        return x

    with torch.device("meta"):
        model, loss, x, labels = nets.parts(case, package, "meta", layout, **settings)
        parameters = list(model.parameters())
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with trace(architecture) as calls, torch.set_grad_enabled(training), hooks:
            y = model(x)
            ends = [len(calls)]
            if training:
                value = loss(y, labels)
                ends.append(len(calls))
                torch.autograd.grad(value, parameters)
    starts = zip(("forward", "loss", "backward"), [0, *ends], [*ends, len(calls)], strict=False)
    phases = [phase for phase, start, end in starts for _ in range(start, end)]
    own = {storage(t) for t in (*parameters, *model.buffers())}
    saved = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    return Traced(calls, phases, name_layers(model, calls, phases), saved)


# ---- layers ------------------------------------------------------------------------------------------------------

# What stands between two layers belongs to the one that reads it.
_SERVING = (
    "max_pool2", "avg_pool2", "pad_replicate.", "replication_pad2", "upsample_", "cat.", "constant_pad_nd.",
)  # fmt: skip
_COPIES = ("_to_copy.", "clone.", "copy_.", "to.dtype")


def owners(model: nn.Module) -> dict[int, str]:
    """The convolution that each parameter and buffer belongs to, by its storage: its own, or the one it follows."""
    found = {}
    layer = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            layer = name
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        found.update({storage(t): layer for t in tensors})
    return found


def name_layers(model: nn.Module, calls: list[Call], phases: list[str]) -> list[str]:
    """The layer of each operation: the module name of a convolution, or "loss".

    An operation with a parameter belongs to that layer. One without belongs to the layer whose result is its last
    operand; but what pools, upsamples, pads or concatenates, forward or backward, belongs to the layer that reads it.
    """
    own = owners(model)
    layers = [""] * len(calls)
    for i, call in enumerate(calls):
        layers[i] = next((own[storage(x)] for x in call.tensors if storage(x) in own), "")
        if layers[i] and call.name.partition(".")[2].startswith(_COPIES):
            own |= {storage(x): layers[i] for x in call.results}
    begun = next((i for i, phase in enumerate(phases) if phase == "backward" and layers[i]), len(calls))
    for i, phase in enumerate(phases):
        if phase == "loss" or (phase == "backward" and i < begun):
            layers[i] = "loss"

    reader: dict[int, str] = {}
    served: dict[tuple[str, int], str] = {}
    for i in reversed(range(len(calls))):
        call = calls[i]
        kind = call.name.partition(".")[2].partition("_backward")[0].partition(".")[0]
        if phases[i] == "forward" and not layers[i] and f"{kind}.".startswith(_SERVING):
            layers[i] = next((reader[storage(x)] for x in call.results if storage(x) in reader), "")
            served |= {(kind, storage(x)): layers[i] for x in call.tensors + call.results}
        if layers[i]:
            reader |= {storage(x): layers[i] for x in call.tensors if storage(x) not in own}

    source: dict[int, str] = {}
    for i, call in enumerate(calls):
        kind = call.name.partition(".")[2].partition("_backward")[0].partition(".")[0]
        if not layers[i]:
            known = [source[storage(x)] for x in call.tensors if storage(x) in source]
            known += [served[kind, storage(x)] for x in call.tensors if (kind, storage(x)) in served]
            layers[i] = known[-1] if known else "other"
        given = {storage(x) for x in call.tensors}
        source |= {storage(x): layers[i] for x in call.results if storage(x) not in given}
    return layers


# ---- passes and accounts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One kernel launch, or one ATen operation that moves data."""

    layer: str
    phase: str
    op: str
    name: str  # of the kernel, or of the ATen operation
    bytes: int
    flops: int
    rate: float = 1.0  # the fraction of the matrix rate that it attains, as benchmarks/model.py has it

    def seconds(self, roofs: Roofs) -> float:
        """Modelled time: the longer of moving the bytes and multiplying."""
        return max(self.bytes / (roofs.bandwidth * 1e9), self.flops / (roofs.tflops * 1e12 * self.rate))


@dataclass(frozen=True)
class Account:
    """The passes of a step, and the bytes kept between forward and backward, parameters and buffers left out."""

    passes: list[Pass]
    saved: int = 0

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.passes)

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.passes)

    def seconds(self, roofs: Roofs) -> float:
        return sum(p.seconds(roofs) for p in self.passes)

    def of_layer(self, layer: str) -> Account:
        """The passes of one layer."""
        return Account([p for p in self.passes if p.layer == layer])


Rule = Callable[[Call], list[Access]]  # the passes of an operation


def account(step: Traced, rule: Rule) -> Account:
    """The passes that ``rule`` finds in a step; an operation's FLOPs are shared by its matrix products."""
    passes = []
    for call, phase, layer in step:
        found = rule(call)
        products = sum(access.multiplies for access in found)
        each = flops_of(call) // products if products else 0
        passes += [
            Pass(layer, phase, call.name, access.name, access.bytes, each if access.multiplies else 0, access.rate)
            for access in found
        ]
    return Account(passes, step.saved)


def made(call: Call) -> list[Access]:
    """The passes that an operation makes: its launches, and the ATen operations in it or that it is."""
    found = []
    if call.launches:
        from benchmarks.pointers import of_launch  # needs Triton, which counting plain PyTorch does not

        for launch in call.launches:
            rate = triton_rate(launch, call.architecture)
            found.append(replace(of_launch(launch), name=launch.kernel.__name__, rate=rate))
    for inner in [call] if call.name.startswith("aten.") else call.inner:
        found += [replace(access, name=inner.name, rate=aten_rate(inner)) for access in of_aten(inner)]
    return found


def compiled(call: Call) -> list[Access]:
    """The passes of an operation of plain PyTorch in the model of torch.compile."""
    kind = call.name.partition(".")[2]
    if torch.Tag.pointwise in call.func.tags or kind.startswith(("constant_pad_nd.", "_to_copy.", "copy_.")):
        return []
    winners = [x for x in call.tensors + call.results if x.dtype == torch.int64 and kind.startswith("max_pool2d")]
    return [replace(access, spared=sum(7 * x.numel() for x in winners)) for access in made(call)]


def floor(step: Traced) -> Rule:
    """The rule that finds the passes of fastunet's operators at the floor; ATen's between them could be left out."""
    small = {  # what stands in for an upsampled tensor
        storage(call.results[0]): tensors_of([call.named["x"], call.named["affine"]])
        for call in step.calls
        if call.name == "fastunet.upsample_concat" and call.named["skip"] is None
    }

    def rule(call: Call) -> list[Access]:
        kind = call.name.partition(".")[2]
        if not call.name.startswith("fastunet.") or (kind.startswith("upsample") and call.named["skip"] is None):
            return []
        if kind == "max_pool2x2":
            return [Access((), tuple(call.results), name="pool")]
        if kind in ("conv2d", "conv2d_act", "conv_transpose2d"):
            read = [t for x in call.tensors for t in small.get(storage(x), [x])]
            return [Access(distinct(read), distinct(call.results), True, name="fprop")]
        if kind in ("conv2d_backward", "conv_transpose2d_backward"):
            return _least_of_convolution_backward(call, small)
        return [Access(distinct(call.tensors), distinct(call.results), name="once")]

    return rule


def _least_of_convolution_backward(call: Call, small: dict[int, list[Tensor]]) -> list[Access]:
    given = call.named
    *gradients, dweight, dbias = call.results
    read = tensors_of([given["dy"], given["dmean"], given["dvar"]])
    dy, formed = [given["dy"]], []
    if given["dmean"] is not None or given["dvar"] is not None:
        read += [given["y"], given["mean"]]
        dy = formed = [given["y"]]  # of dY's size
    masks: list[Tensor] = []  # what dgrad reads to apply the derivative of a source's affine and ReLU
    wanted: list[Tensor] = []  # of the size of the gradients it writes
    for i, number in enumerate(("",) if "x" in given else ("0", "1")):
        x, affine, slope = (given[f"{name}{number}"] for name in ("x", "affine", "slope"))
        if x is None:
            continue
        source = small.get(storage(x)) or tensors_of([x, affine])
        read += source
        if gradients[2 * i].numel():
            wanted += source
            if affine is not None or slope != 1 or storage(x) in small:
                masks += source
    wgrad = Access(distinct(read), distinct([dweight, dbias, *(formed if wanted else [])]), True, name="wgrad")
    dgrad = Access(distinct([*dy, given["weight"], *masks]), distinct(wanted), True, name="dgrad")
    return [wgrad, dgrad] if wanted else [wgrad]


def flops_of(call: Call) -> int:
    """Floating-point operations of an operation's matrix products."""
    if call.name.startswith("aten."):
        formula = flop_registry[call.func.overloadpacket]
        results: Any = call.results[0] if len(call.results) == 1 else call.results
        if "output_mask" in call.named:
            each = iter(call.results)
            results = [next(each) if wanted else None for wanted in call.named["output_mask"]]
        return int(formula(*call.args, **call.kwargs, out_val=results))
    given = call.named
    kind = call.name.removeprefix("fastunet.")
    if kind in ("conv2d", "conv2d_act"):
        y = call.results[0]
        head = given.get("head_weight")
        filters = given["weight"].numel() + (0 if head is None else head.numel())
        return 2 * y.shape[0] * y.shape[2] * y.shape[3] * int(filters)
    if kind.startswith("conv_transpose2d"):
        once = 2 * int(given["x"].numel()) * int(given["weight"][0].numel())
        return once * (sum(given["mask"][:2]) if "mask" in given else 1)
    if kind == "conv2d_backward":
        dy, weight = given["y"] if given["dy"] is None else given["dy"], given["weight"]
        wanted = given["mask"][2] * weight.shape[1]  # input channels
        for x, needed in zip((given["x0"], given["x1"]), given["mask"], strict=False):
            wanted += 0 if x is None else needed * x.shape[1]
        return int(2 * dy.numel() * weight[0, 0].numel() * wanted)
    raise RuntimeError(f"expected a formula for the FLOPs of {call.name}, which multiplies matrices: add one")


def accounts(case: NetCase, architecture: str = "sm_90") -> dict[str, Account]:
    """The five accounts of a step of ``case``, by name."""
    ours = run(case, fastunet, architecture, backend="triton", policy="memory")
    plain = run(case, reference)
    return {
        "fastunet": account(ours, made),
        "auto": account(run(case, fastunet, architecture), made),
        "eager": account(plain, made),
        "compile": replace(account(plain, compiled), saved=0),
        "floor": replace(account(ours, floor(ours)), saved=0),
    }


# ---- what is printed ---------------------------------------------------------------------------------------------


def as_text(found: dict[str, Account], roofs: Roofs) -> str:
    """Layer by layer, then kernel by kernel, as text."""
    lines = [("layer", *(f"{name} GB" for name in found), "ratio", *(f"{name} ms" for name in found), "launches")]
    for layer in [*dict.fromkeys(p.layer for p in found["eager"].passes), "total"]:
        rows = {name: a if layer == "total" else a.of_layer(layer) for name, a in found.items()}
        lines.append(
            (
                layer,
                *(f"{a.bytes / 1e9:.3f}" for a in rows.values()),
                f"{rows['fastunet'].bytes / rows['eager'].bytes:.2f}",
                *(f"{a.seconds(roofs) * 1e3:.2f}" for a in rows.values()),
                f"{len(rows['fastunet'].passes)}",
            )
        )
    kernels: dict[str, list[Pass]] = defaultdict(list)
    for p in found["fastunet"].passes:
        kernels[p.name].append(p)
    by_kernel = [("fastunet's kernels", "launches", "GB", "TFLOP", "ms")]
    small = found["fastunet"].bytes / 1000
    groups = {name: Account(passes) for name, passes in kernels.items()}
    rest = [name for name, of in groups.items() if of.bytes < small and not of.flops]
    groups[f"{len(rest)} others"] = Account([p for name in rest for p in groups.pop(name).passes])
    for name, of in sorted(groups.items(), key=lambda item: -item[1].bytes):
        cells = (f"{of.bytes / 1e9:.3f}", f"{of.flops / 1e12:.3f}", f"{of.seconds(roofs) * 1e3:.2f}")
        by_kernel.append((name, str(len(of.passes)), *cells))
    return f"{aligned(lines)}\n\n{aligned(by_kernel)}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, the first column to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def summary(found: dict[str, Account], roofs: Roofs) -> dict[str, Any]:
    """The totals of one step as numbers with names."""
    totals: dict[str, Any] = {f"{name}_bytes": a.bytes for name, a in found.items()}
    for name in ("fastunet", "auto", "eager"):
        a = found[name]
        totals |= {f"{name}_saved_bytes": a.saved, f"{name}_flops": a.flops, f"{name}_launches": len(a.passes)}
    return totals | {"modelled_ms": {name: round(a.seconds(roofs) * 1e3, 3) for name, a in found.items()}}


# ---- the command -------------------------------------------------------------------------------------------------

_BILINEAR = "unet-bilinear"


def add_net_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`case_of` reads."""
    parser.add_argument(
        "--net", choices=sorted(set(nets.NETWORKS) - {_BILINEAR}), default="unet", help="default: %(default)s"
    )
    parser.add_argument("--bilinear", action="store_true", help="upsample by interpolation (unet)")
    for name, default, text in (
        ("base", 64, "channels of the first block"), ("size", 512, "height and width of a picture"),
        ("batch", 8, "pictures in a batch"), ("classes", 2, "channels of the output"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: %(default)s")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="default: %(default)s")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="default: %(default)s")
    for name, unit in (("bandwidth", "GB/s"), ("tflops", "TFLOP/s")):
        parser.add_argument(f"--{name}", type=float, metavar=unit, help="a roof, instead of this command's own")


def case_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> NetCase:
    """The step of a network that the arguments name."""
    for name, least in (("base", 1), ("size", 16), ("batch", 1), ("classes", 1)):
        if getattr(options, name) < least:
            parser.error(f"expected --{name} of at least {least}, got {getattr(options, name)}")
    if options.bilinear and options.net != "unet":
        parser.error(f"expected --bilinear with --net unet, got --net {options.net}; leave one of them out")
    sizes = (options.base, options.size, options.batch)
    net = _BILINEAR if options.bilinear else options.net
    return NetCase(net, *sizes, options.dtype, options.mode, options.classes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description="Count the bytes and FLOPs of a step, with no GPU."
    )
    add_net_arguments(parser)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200", help="its data sheet models the times")
    parser.add_argument("--json", action="store_true", help="print one JSON object: training, and under it inference")
    options = parser.parse_args(arguments)
    case = case_of(parser, options)
    gpu = GPUS[options.gpu]
    rate = gpu.tf32_tflops if DTYPES[case.dtype] == torch.float32 else gpu.tflops
    roofs = Roofs(options.bandwidth or gpu.bandwidth, options.tflops or rate)
    if min(roofs.bandwidth, roofs.tflops) <= 0:
        parser.error("expected --bandwidth and --tflops above 0; leave them out for the data sheet's")
    if importlib.util.find_spec("triton") is None:
        parser.error("expected triton, which is not installed: pip install 'fastunet[bench]'")

    modes = MODES if options.json else (options.mode,)
    found = {mode: accounts(replace(case, mode=mode), gpu.architecture) for mode in modes}
    about = {name: getattr(options, name) for name in ("net", "bilinear", "base", "size", "batch", "dtype", "classes")}
    form = f"{options.net}{' bilinear' if options.bilinear else ''}"
    named = f"{form}, base {case.base}, {case.batch}×3×{case.size}×{case.size}"
    if options.json:
        training, inference = (summary(found[mode], roofs) for mode in MODES)
        print(json.dumps(about | {"gpu": options.gpu, **asdict(roofs)} | training | {"inference": inference}))
    else:
        step = found[options.mode]
        print(f"{options.mode} step of {named}, {options.dtype}; counted, not measured\n")
        print(as_text(step, roofs))
        kept = {name: step[name].saved / 1e9 for name in ("fastunet", "auto", "eager")}
        print("\nkept for the backward: " + ", ".join(f"{name} {size:.2f} GB" for name, size in kept.items()))
        nchw = account(run(case, reference, layout=torch.contiguous_format), made)
        print(
            f"eager in contiguous memory: {nchw.bytes / 1e9:.3f} GB, {nchw.saved / 1e9:.2f} GB kept, not counting what "
            "cuDNN copies for tensor cores"
        )
        print(f"times are modelled: {options.gpu}, {roofs.bandwidth:g} GB/s, {roofs.tflops:g} TFLOP/s; no launch costs")
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter launches nothing that could be noted
    sys.exit(main())
