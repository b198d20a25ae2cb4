"""The shorter ways to a launch and to an operator end where the long ones do; and what a step costs the host."""

from __future__ import annotations

import pytest
import torch
from processes import python
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from fastunet import dispatch, ops
from fastunet.dispatch import call

pytest.importorskip("triton")

# In a process of its own, whose kernels are not the interpreter's. Nothing is compiled: what Triton would be given is
# what its own binding of the arguments says.
SHORTER = """
from unittest import mock
import torch
from triton.runtime.jit import JITFunction
from benchmarks.cases import CASES
from fastunet import kernels
from fastunet.architecture import as_if_on
from fastunet.kernels import common, launching

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: shorter.append((self.kernel, tuple(grid)[:3], args))

def run(kernel, *args, grid, warmup, **options):
    bound = kernel.signature.bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names})
    assert list(bound.arguments) == kernel.arg_names, kernel
    triton.append((kernel, (*grid, 1, 1)[:3], tuple(bound.arguments.values())))
    return Compiled(kernel)

def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    if hasattr(a, "base"):
        return all(same(value, vars(b)[name]) for name, value in vars(a).items()) and len(vars(a)) == len(vars(b))
    return type(a) is type(b) and a == b

launched = set()
for name in ("sm_80", "sm_90"):
    for case in dict.fromkeys(CASES):
        triton, shorter = [], []
        patched = mock.patch.object(JITFunction, "run", run), mock.patch.object(launching, "_compiled", {})
        with as_if_on(name), patched[0], patched[1]:
            case.launch(kernels)
            first = [*triton]
            assert len(first) > 0 or case.algorithm
            before = len(shorter)
            case.launch(kernels)
        again = shorter[before:]
        # Only what is not aligned goes through Triton twice; what was alike in the first run went the shorter way.
        unaligned = [x[0] for x in triton[len(first):]]
        assert len(unaligned) + len(again) == len(first) + before
        assert all(kernel.__name__.startswith("_upsample") for kernel in unaligned), case
        for kernel, grid, args in first:
            if kernel in unaligned:
                continue
            assert any(k is kernel and g == grid and len(a) == len(args) and all(map(same, args, a))
                       for k, g, a in again), (case, kernel)
        launched |= {x[0].__name__ for x in first}
print(len(launched))

# What differs in one integer, dtype, option or device, or is not aligned, is not the same.
kernel = common._sum_slabs_kernel
x, y = torch.zeros(4096 + 8), torch.zeros(64)
triton, shorter = [], []
with mock.patch.object(JITFunction, "run", run), mock.patch.object(launching, "_compiled", {}):
    def launch(x=x[:4096], slabs=64, block=64, **more):
        launching.launch(kernel, (1,), x, y.to(x.device), slabs, 64, GROUP=64, BLOCK=block, **more)
    for _ in range(2):
        launch(), launch(slabs=48), launch(block=32), launch(num_warps=4)
        launch(x[:4096].double()), launch(x.to("meta"))
    assert (len(triton), len(shorter)) == (6, 6)
    launch(x[1:4097]), launch(x[1:4097])
    assert (len(triton), len(shorter)) == (8, 6)
    launch(x[4:4100])
    assert (len(triton), len(shorter)) == (8, 7)
    assert len(launching._compiled) == 6
print("ok")
"""


def printed(*command: str) -> str:
    done = python(*command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_launched_again_gets_the_arguments_that_triton_would_give():
    kernels, ok = printed("-c", SHORTER).split()
    assert int(kernels) >= 25
    assert ok == "ok"


def test_the_host_time_of_steps_is_told():
    said = printed("-m", "benchmarks.host", "--seconds", "0").splitlines()
    rows = [line.split() for line in said[2:]]
    assert [row[:2] for row in rows] == [
        [network, step] for network in ("transposed", "bilinear", "nnunet") for step in ("training", "inference")
    ]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 and int(row[4]) > 30 for row in rows)


# ---- operators ---------------------------------------------------------------------------------------------------


def rectified(x: Tensor, backend: str) -> Tensor:
    affine = torch.tensor([[1.5, -2.0], [0.1, 0.3], [0.2, -0.4]], device=x.device)
    z: Tensor = call(ops.affine_act, x, affine, 0.0, backend)
    return z


@pytest.fixture
def x(device: str) -> Tensor:
    return torch.randn(1, 2, 3, 4, device=device)


def test_a_view_with_a_sign_is_its_value(x: Tensor, backend: str) -> None:
    negative = torch._neg_view(x)
    assert negative.is_neg()
    torch.testing.assert_close(rectified(negative, backend), rectified(-x, backend))
    labels = torch.zeros(1, 3, 4, dtype=torch.int64, device=x.device)
    found = [
        call(ops.softmax_stats, each, labels, None, "softmax", -1, [True, True, True], backend)
        for each in (negative, -x)
    ]
    torch.testing.assert_close(*found)


def test_gradients_in_batches(x: Tensor, backend: str) -> None:
    z = rectified(x.requires_grad_(), backend)
    incoming = torch.randn(3, *z.shape, device=x.device)
    (together,) = torch.autograd.grad(z, x, incoming, retain_graph=True, is_grads_batched=True)
    alone = [torch.autograd.grad(z, x, each, retain_graph=True)[0] for each in incoming]
    torch.testing.assert_close(together, torch.stack(alone))


def test_compiled_autograd_sees_one_graph(x: Tensor) -> None:
    z = rectified(x.requires_grad_(), "torch")
    (expected,) = torch.autograd.grad(z, x, torch.ones_like(z), retain_graph=True)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        z.backward(torch.ones_like(z))
    torch.testing.assert_close(x.grad, expected)


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_who_watches_sees_operators(x: Tensor, backend: str) -> None:
    with torch.no_grad(), Watching() as mode:
        rectified(x, backend)
    assert "fastunet.affine_act.default" in mode.seen
    with torch.no_grad():
        graph = make_fx(lambda x: rectified(x, backend), pre_dispatch=True)(x)
    assert "fastunet.affine_act.default" in {str(node.target) for node in graph.graph.nodes}
    with torch.profiler.profile() as profile:
        rectified(x, backend)
    assert "fastunet::affine_act" in {event.name for event in profile.events()}


def test_nobody_else_waits_for_the_dispatcher(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, ops.affine_act, lambda x, *rest: x + 7)
    torch.testing.assert_close(rectified(x, "torch"), x + 7)
    with torch.inference_mode():
        torch.testing.assert_close(rectified(x.clone(), "torch"), x + 7)
    with Watching():
        assert rectified(x, "torch").min() >= 0


def test_what_is_plain(x: Tensor) -> None:
    assert dispatch._ordinary([x, torch.nn.Parameter(x), None, True, 1, 0.5, "auto", [1, 2], (3,), x.shape, x.dtype])
    for odd in (x.to("meta"), torch._neg_view(x), torch._efficientzerotensor(3), x.to_sparse(), object()):
        assert not dispatch._ordinary([x, odd])
