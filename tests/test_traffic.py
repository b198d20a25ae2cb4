"""The traffic ledger: what it counts is what is moved, and its totals are those of the design.

Launches are counted in processes of their own, because here Triton may already be in interpreter mode.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from textwrap import dedent

import pytest
import torch
import torch.nn.functional as F
from processes import python

import fastunet
from benchmarks import nets, traffic
from benchmarks.access import extent, of_aten
from benchmarks.nets import NetCase
from benchmarks.trace import trace
from fastunet import reference

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="launches need Triton, which is part of pip install 'fastunet[test]' on Linux",
)


def answer(script: str, interpret: bool = False):
    """What ``script`` prints, as JSON."""
    done = python("-c", dedent(script), **({"TRITON_INTERPRET": "1"} if interpret else {}))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- ATen --------------------------------------------------------------------------------------------------------


def passes(function, *operands):
    """Bytes of each pass of ``function(*operands)``."""
    with trace() as calls:
        function(*operands)
    return [access.bytes for call in calls for access in of_aten(call)]


def meta(*shape, dtype=torch.float32, **about):
    return torch.empty(shape, dtype=dtype, device="meta", **about)


def test_a_pass_reads_its_operands_and_writes_its_result():
    assert passes(torch.add, meta(10, 6), meta(10, 6, dtype=torch.float16)) == [60 * (4 + 2 + 4)]


def test_an_operand_given_twice_is_read_once():
    x = meta(60)
    assert passes(torch.mul, x, x) == [60 * 8]


def test_what_is_changed_in_place_is_read_and_written():
    assert passes(lambda x: x.relu_(), meta(60)) == [60 * 8]


@pytest.mark.parametrize("function", [torch.Tensor.t, lambda x: x[2:].expand(3, 4, 6), torch.empty_like])
def test_views_and_empty_tensors_are_free(function):
    assert passes(function, meta(6, 6)) == []


def test_what_is_overwritten_or_gives_a_shape_is_not_read():
    assert passes(lambda x: x.zero_(), meta(60)) == [60 * 4]
    assert passes(lambda x, y: x.copy_(y), meta(60), meta(60, dtype=torch.float16)) == [60 * (4 + 2)]
    assert passes(torch.zeros_like, meta(60)) == [60 * 4]


def test_an_expanded_operand_has_the_bytes_of_what_it_expands():
    assert extent(meta(5, 1, 7).expand(5, 9, 7)) == 35 * 4
    assert extent(meta(5, 0)) == 0
    assert extent(meta().expand(5, 9)) == 4


def test_a_convolution_and_its_backward():
    x, w, b = meta(2, 3, 8, 8, requires_grad=True), meta(5, 3, 3, 3, requires_grad=True), meta(5, requires_grad=True)
    size_x, size_w, size_y = 2 * 3 * 64 * 4, 5 * 27 * 4, 2 * 5 * 64 * 4
    y = F.conv2d(x, w, b, padding=1)
    assert passes(F.conv2d, x, w, b, 1, 1) == [size_x + size_w + 5 * 4 + size_y]
    dx, dw, db = size_y + size_w + size_x, size_y + size_x + size_w, size_y + 5 * 4
    assert passes(torch.autograd.grad, y, [x, w, b], torch.empty_like(y)) == [dx, dw, db]


@pytest.mark.parametrize(("training", "forward", "backward"), [(True, 3, 5), (False, 2, 4)])
def test_a_batch_norm_reads_the_batch_again_for_what_needs_its_sums(training, forward, backward):
    x = meta(2, 64, 32, 32, requires_grad=True)
    vectors = [meta(64), meta(64), meta(64, requires_grad=True), meta(64, requires_grad=True)]
    size = x.numel() * 4
    small = 12 * 64 * 4  # no more vectors of statistics and parameters are read or written
    (found,) = passes(F.batch_norm, x, *vectors, training)
    assert forward * size < found <= forward * size + small
    y = F.batch_norm(x, *vectors, training)
    (found,) = passes(torch.autograd.grad, y, [x, *vectors[2:]], torch.empty_like(y))
    assert backward * size < found <= backward * size + small


def test_a_pool_writes_its_winners_and_its_backward_reads_them():
    x = meta(2, 4, 8, 8, requires_grad=True)
    size = x.numel() * 4
    pooled, winners = size // 4, size // 4 * 2
    assert passes(F.max_pool2d, x, 2) == [size + pooled + winners]
    y = F.max_pool2d(x, 2)
    assert passes(torch.autograd.grad, y, x, torch.empty_like(y)) == [pooled + winners + size]


# ---- launches ----------------------------------------------------------------------------------------------------

SMALL = """
    import json, torch
    from benchmarks.cases import Case
    from fastunet import kernels
    H = torch.float16
    CASES = {
        "affine_act": Case("affine_act", (2, 5, 6, 8), dtype=H),
        "bn_affine": Case("bn_affine", (2, 70, 6, 8), dtype=H),
        "conv2d": Case("conv2d", (2, 5, 7, 9), dtype=H, filters=6),
        "conv2d with bias": Case("conv2d", (2, 5, 7, 9), dtype=H, filters=6, bias=True, stats=False, affine=False),
        "conv2d of an image": Case("conv2d", (2, 3, 7, 9), filters=6, dtype=torch.float32, affine=False, image=True),
        "conv2d 1x1": Case("conv2d", (2, 5, 6, 8), dtype=H, filters=6, kernel=1, stats=False, bias=True),
        "conv2d stride 2": Case("conv2d", (1, 5, 6, 8), dtype=H, filters=6, stride=2),
        "conv2d of two": Case("conv2d", (1, 5, 6, 8), dtype=H, filters=6, skip=7),
        "conv_transpose2d": Case("conv_transpose2d", (1, 5, 6, 8), dtype=H, filters=6, kernel=2, bias=True),
        "conv_transpose2d 3x3": Case("conv_transpose2d", (1, 5, 6, 8), dtype=H, filters=6, kernel=3, stats=False),
        "max_pool2x2": Case("max_pool2x2", (2, 5, 6, 8), dtype=H),
        "max_pool2x2 of a plain": Case("max_pool2x2", (2, 5, 6, 8), dtype=H, affine=False),
        "upsample_concat": Case("upsample_concat", (1, 5, 6, 8), dtype=H, skip=7),
        "upsample_concat alone": Case("upsample_concat", (1, 5, 6, 8), dtype=H),
        "softmax_stats": Case("softmax_stats", (2, 5, 6, 8), dtype=torch.float32, weighted=True),
        "sigmoid": Case("softmax_stats", (2, 5, 6, 8), dtype=H, loss="sigmoid", labels=torch.uint8),
    }
"""

COUNTED = """
    from benchmarks.pointers import of_launch
    from benchmarks.recorder import record
    found = {}
    for name, case in CASES.items():
        with record() as launches:
            case.launch(kernels)
        found[name] = [(launch.kernel.__name__, of_launch(launch).bytes) for launch in launches]
    print(json.dumps(found))
"""

# The truth: every address that the kernels load from or store to, in the interpreter.
TOUCHED = """
    import numpy as np
    from triton.runtime import interpreter
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    read, written, found = {}, {}, {}

    def note(where, pointers, mask):
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        where.update((int(address), size) for address in pointers.data[mask.data])

    def noted_load(self, pointers, mask, *rest):
        note(read, pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(written, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_call(self, *args, **kwargs):
        read.clear(), written.clear()
        call(self, *args, **kwargs)
        found[name].append((self.fn.__name__, sum(read.values()) + sum(written.values())))

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = noted_load, noted_store, noted_call
    for name, case in CASES.items():
        found[name] = []
        case.launch(kernels, "cpu")
    print(json.dumps(found))
"""


@functools.cache
def launches():
    """(counted, touched): for each small case, (kernel, bytes) of its launches."""
    return tuple(answer(dedent(SMALL) + dedent(text), text is TOUCHED) for text in (COUNTED, TOUCHED))


SMALL_CASES = [line.split('"')[1] for line in SMALL.splitlines() if ": Case(" in line]


# What reads or writes a part of a tensor that is counted whole.
PARTS = {
    "_max_pool2x2_fwd_kernel": "one row of the affine",
    "_max_pool2x2_bwd_kernel": "one row of the affine",
    "_softmax_stats_backward_kernel": "four of the six gradients per class",
}


@NEEDS_TRITON
@pytest.mark.parametrize("case", SMALL_CASES)
def test_a_launch_is_counted_what_it_touches(case):
    counted, touched = (found[case] for found in launches())
    assert [name for name, _ in counted] == [name for name, _ in touched]
    for (name, counted_bytes), (_, truth) in zip(counted, touched, strict=True):
        assert counted_bytes >= truth, name
        if name not in PARTS:
            assert counted_bytes == truth, name


@NEEDS_TRITON
def test_launches_by_hand():
    counted, _ = launches()
    tensor, affine = 2 * 5 * 6 * 8 * 2, 3 * 5 * 4
    assert counted["affine_act"] == [
        ["_affine_act_fwd_kernel", 2 * tensor + affine],
        ["_affine_act_bwd_kernel", 3 * tensor + 2 * affine],  # one slab of daffine, which is daffine
    ]
    x, w, y = 2 * 5 * 7 * 9 * 2, 6 * 5 * 9 * 2, 2 * 6 * 7 * 9 * 2
    assert counted["conv2d with bias"][0] == ["_conv_image_fwd_kernel", x + w + 6 * 2 + y]
    skip, small = 1 * 7 * 12 * 16 * 2, 1 * 5 * 6 * 8 * 2
    affines = (5 + 7) * 3 * 4
    assert counted["upsample_concat"][0] == [
        "_upsample_concat_fwd_kernel",
        small + skip + affines + 1 * (5 + 7) * 12 * 16 * 2,
    ]


PLANTED = """
    import json, torch, triton, triton.language as tl
    from benchmarks.pointers import of_launch
    from benchmarks.recorder import record

    @triton.jit
    def helper(x_ptr, y_ptr, i):
        tl.store(y_ptr + i, tl.load(x_ptr + i))

    @triton.jit
    def _called_kernel(x_ptr, y_ptr, z_ptr):
        helper(x_ptr, y_ptr, tl.arange(0, 16))

    @triton.jit
    def _absent_kernel(x_ptr, y_ptr, z_ptr, HAS_Z: tl.constexpr):
        i = tl.arange(0, 16)
        x = tl.load(x_ptr + i)
        if HAS_Z:
            x += tl.load(z_ptr + i)
        tl.store(y_ptr + i, x)

    @triton.jit
    def _moving_kernel(x_ptr, y_ptr, z_ptr, n):
        at = x_ptr + tl.arange(0, 16)
        to = y_ptr + tl.arange(0, 16)
        for _ in range(n):
            tl.store(to, tl.load(at))
            at += 16
            to += 16

    @triton.jit
    def _until_kernel(x_ptr, y_ptr, z_ptr, n):
        at = x_ptr
        while n > 0:
            at += n
            n = n // 2
        tl.store(y_ptr, tl.load(at))

    @triton.jit
    def _choosing_kernel(x_ptr, y_ptr, z_ptr, n):
        if n > 3:
            at = x_ptr
        else:
            at = z_ptr
        tl.store(y_ptr, tl.load(at))

    @triton.jit
    def _adding_kernel(x_ptr, y_ptr, z_ptr):
        tl.atomic_add(y_ptr, tl.load(x_ptr))

    @triton.jit
    def _descriptor_kernel(x_ptr, y_ptr, z_ptr, n):
        x = tl.make_tensor_descriptor(x_ptr, [n, 16], [16, 1], [4, 16])
        y = tl.make_tensor_descriptor(y_ptr, [n, 16], [16, 1], [4, 16])
        y.store([0, 0], x.load([0, 0]))

    @triton.jit
    def _product_kernel(x_ptr, y_ptr, z_ptr):
        i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(y_ptr + i, tl.dot(tl.load(x_ptr + i), tl.load(z_ptr + i)))
"""


POINTERS = {
    "through a function": ("called", "", "x|y"),
    "an absent operand's pointer": ("absent", ", HAS_Z=False", "x|y"),
    "the same pointer in use": ("absent", ", HAS_Z=True", "xz|y"),
    "pointers that a loop moves": ("moving", ", 7", "x|y"),
    "a pointer that a while loop moves": ("until", ", 7", "x|y"),
    "a pointer that a condition chooses": ("choosing", ", 7", "xz|y"),
    "an atomic": ("adding", "", "xy|y"),
    "a tensor descriptor": ("descriptor", ", 7", "x|y"),
    "a matrix product": ("product", "", "xz|y"),
}


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """For each of POINTERS, what the launch reads and writes, and whether it has a matrix product."""
    file = tmp_path_factory.mktemp("planted") / "planted.py"  # Triton reads a kernel's source
    lines = ['x, y, z = (torch.empty(16, 16, device="meta") for _ in range(3))', "with record() as launches:"]
    lines += [f"    _{kernel}_kernel[(1,)](x, y, z{more})" for kernel, more, _ in POINTERS.values()]
    lines += ["found = []", "for access in map(of_launch, launches):"]
    lines += ["    sides = [''.join(k for k in 'xyz' if any(t is globals()[k] for t in ts))"]
    lines += ["             for ts in (access.read, access.written)]"]
    lines += ["    found.append(('|'.join(sides), access.multiplies))", "print(json.dumps(found))"]
    file.write_text(dedent(PLANTED) + "\n".join(lines))
    done = python(str(file))
    assert done.returncode == 0, done.stderr
    return dict(zip(POINTERS, json.loads(done.stdout), strict=True))


@NEEDS_TRITON
@pytest.mark.parametrize("case", POINTERS)
def test_a_pointer_is_followed(case, followed):
    kernel, _, expected = POINTERS[case]
    assert followed[case] == [expected, kernel == "product"]


# ---- steps -------------------------------------------------------------------------------------------------------

NETS = {
    "unet": NetCase(),
    "bilinear": NetCase("unet-bilinear"),
    "strided": NetCase("strided", base=32, size=256, classes=2),
    "plain": NetCase("plain", base=32, size=256),
    "brain": NetCase("brain", base=32, size=256),
    "nnunet": NetCase("nnunet", base=32),
}

COUNTS = """
    import json, torch
    from dataclasses import replace
    import fastunet
    from benchmarks.access import storage
    from benchmarks.cases import Case
    from benchmarks.nets import NetCase
    from benchmarks.traffic import MODES, Roofs, accounts, made, run, summary
    from fastunet.kernels.launching import real_word
    from tests.op_bytes import op_bytes

    nets = {nets}
    found = {{}}
    for name, net in nets.items():
        for mode in MODES:
            each = accounts(replace(net, mode=mode))
            found[f"{{name}} {{mode}}"] = summary(each, Roofs(4800, 989)) | {{
                "layers": {{key: sorted({{p.layer for p in each[key].passes}}) for key in ("fastunet", "eager")}},
                "negative": [p.name for a in each.values() for p in a.passes if p.bytes < 0],
            }}
    loss = Case("softmax_stats", (8, 22, 512, 512), dtype=torch.float32)
    up = Case("upsample_concat", (8, 64, 256, 256), skip=64)
    head = Case("head_stats", (8, 64, 512, 512), filters=22, kernel=1)
    for case in (loss, up, head):
        found[case.op] = op_bytes(case)

    found["wrong"] = wrong = []
    for net in nets.values():
        step = run(replace(net, base=16, size=48, batch=2), fastunet)
        initialised = {{storage(real_word(torch.device("meta")))}}
        for call in step.calls:
            given = {{storage(x) for x in call.tensors}}
            passes = made(call)
            written = {{storage(x) for access in passes for x in access.written}}
            for x in call.results:
                if x.numel() and storage(x) not in given | written and "empty" not in call.name:
                    wrong.append(f"{{net}}: nothing writes the result of {{call.name}}")
            for access in passes:
                if not {{storage(x) for x in access.read}} <= initialised | given | written:
                    wrong.append(f"{{net}}: {{call.name}} reads what nothing wrote")
            initialised |= written
    print(json.dumps(found))
"""


@functools.cache
def counts():
    """The summary of a step, and the names of its layers, by "net mode"; the bytes of single operations; and results
    that nothing writes, and operands of a launch that nothing wrote before, in small networks."""
    return answer(COUNTS.format(nets=NETS))


def eager(net):
    """The account of a step in eager PyTorch."""
    return traffic.account(traffic.run(net, reference), traffic.made)


STEPS = [f"{name} {mode}" for name in NETS for mode in traffic.MODES]


@NEEDS_TRITON
def test_every_result_is_written_and_nothing_is_read_that_is_not():
    assert counts()["wrong"] == []


@NEEDS_TRITON
@pytest.mark.parametrize("step", STEPS)
def test_flops_are_those_that_pytorch_counts(step):
    found = counts()[step]
    assert found["fastunet_flops"] == found["auto_flops"] == found["eager_flops"]


@NEEDS_TRITON
@pytest.mark.parametrize("step", STEPS)
def test_the_accounts_are_in_order(step):
    found = counts()[step]
    assert found["floor_bytes"] <= found["fastunet_bytes"] < found["eager_bytes"]
    assert found["floor_bytes"] < found["compile_bytes"] < found["eager_bytes"]
    assert found["negative"] == []


@NEEDS_TRITON
@pytest.mark.parametrize("step", STEPS)
def test_every_pass_has_a_layer(step):
    name, mode = step.split()
    model = NETS[name].model(reference)
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    convolutions = {key for key, module in model.named_modules() if isinstance(module, kinds)}
    expected = convolutions | ({"loss"} if mode == "training" else set())
    found = counts()[step]["layers"]
    assert found["eager"] == sorted(expected)
    # Without gradients a 1×1 head is part of the convolution before it, unless that has statistics to take first.
    heads = {key for key in convolutions if model.get_submodule(key).kernel_size == (1, 1) and name != "nnunet"}
    assert found["fastunet"] == sorted(expected - heads if mode == "inference" else expected)


# GB from the design, at base 64, 8×3×512×512, bfloat16: counted there by hand, layer by layer. A twentieth is granted
# for what that leaves out or puts in (the loss, the layers' own weights, the last convolution). The design's floor was
# 23.2 and 19.7, with pooling in passes of its own; now the convolution that writes pools too: 1.4 and 2.2 less. Its
# inferences moved 5.4 and 4.1, and stored what the head reads: 0.5 more than now.
DESIGN = {
    "unet training": {"eager": 52.3, "compile": 36.4, "floor": 21.8},
    "bilinear training": {"eager": 47.6, "compile": 32.9, "floor": 17.5},
    "unet inference": {"floor": 4.9},
    "bilinear inference": {"eager": 16.8, "floor": 3.6},
}


@NEEDS_TRITON
@pytest.mark.parametrize("step", DESIGN)
def test_totals_are_those_of_the_design(step):
    for name, gigabytes in DESIGN[step].items():
        assert counts()[step][f"{name}_bytes"] == pytest.approx(gigabytes * 1e9, rel=0.05), name


@NEEDS_TRITON
@pytest.mark.parametrize("step", ["unet training", "bilinear training"])
def test_fastunet_keeps_to_its_promises(step):
    found = counts()[step]
    assert found["fastunet_saved_bytes"] <= 0.55 * found["eager_saved_bytes"]
    # An H200 took 1.5 times what is modelled of eager PyTorch, 1.3 times of torch.compile, 1.1 times of fastunet: only
    # the order of what is modelled alike says something.
    assert found["modelled_ms"]["auto"] < found["modelled_ms"]["eager"]
    assert found["modelled_ms"]["auto"] <= found["modelled_ms"]["fastunet"]
    assert found["auto_saved_bytes"] == found["fastunet_saved_bytes"], "what cuDNN reads is not kept"


@NEEDS_TRITON
def test_nnunet_moves_and_keeps_less_than_eager():
    found = counts()["nnunet training"]
    assert found["fastunet_saved_bytes"] <= 0.55 * found["eager_saved_bytes"]
    assert max(found["auto_bytes"], found["fastunet_bytes"]) <= 0.50 * found["eager_bytes"]  # of the contiguous 0.52


@NEEDS_TRITON
def test_the_loss_moves_an_eighth_of_the_formula_with_a_one_hot():
    ours, plain = counts()["softmax_stats"]
    logits, labels = 8 * 22 * 512 * 512 * 4, 8 * 512 * 512 * 8
    assert sum(ours) <= sum(plain) / 8
    assert sum(ours) == pytest.approx(3 * logits + 2 * labels, rel=0.01)  # read, read again, gradient written


LOSS_MEMORY = """
    import json, torch
    from benchmarks.access import storage
    from benchmarks.trace import trace
    from benchmarks.nets import plain_dice_ce
    from fastunet.losses import DiceCELoss

    with torch.device("meta"):
        logits = torch.empty(8, 22, 512, 512, requires_grad=True)
        labels = torch.empty(8, 512, 512, dtype=torch.int64)
        with trace() as calls:
            gradient = torch.autograd.grad(DiceCELoss()(logits, labels), logits)
        made = [t for call in calls for t in call.results]
        made += [t for call in calls for inner in call.inner for t in inner.results]
        made += [a for call in calls for launch in call.launches for a in launch.args if isinstance(a, torch.Tensor)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = plain_dice_ce(logits, labels)
    known = {storage(t) for t in (logits, labels, *gradient)}
    print(json.dumps([
        sum({storage(t): t.untyped_storage().nbytes() for t in tensors if storage(t) not in known}.values())
        for tensors in (made, kept)
    ]))
"""


@NEEDS_TRITON
def test_the_loss_needs_a_tenth_of_the_formulas_memory_beyond_logits_and_gradient():
    """At most all that is ever made for it, against no more than what the formula keeps for its backward."""
    ours, kept = answer(LOSS_MEMORY)
    assert 0 < ours <= kept / 10
    assert kept >= 2 * 8 * 22 * 512 * 512 * 4  # probabilities and the one-hot, at least


@NEEDS_TRITON
def test_upsample_pad_concat_moves_half_forward_and_two_fifths_backward():
    ours, plain = counts()["upsample_concat"]
    skip = 8 * 64 * 512 * 512 * 2
    assert ours[0] <= 0.5 * plain[0]
    assert ours[1] <= 0.4 * plain[1]
    assert ours[0] == pytest.approx((0.25 + 1 + 2) * skip, rel=0.01)
    assert ours[1] == pytest.approx((2 + 0.25 + 0.25 + 1 + 1) * skip, rel=0.04)  # and slabs of daffine


@NEEDS_TRITON
def test_the_logit_free_head_reads_the_last_activation_twice_and_writes_its_gradient():
    ours, plain = counts()["head_stats"]
    x, labels = 8 * 64 * 512 * 512 * 2, 8 * 512 * 512 * 8
    assert sum(ours) <= sum(plain) / 8
    assert ours[0] == pytest.approx(x + labels, rel=0.01)
    assert ours[1] == pytest.approx(2 * x + labels, rel=0.03)  # and slabs of dW


NO_LOGITS = """
    import json, torch, fastunet
    from benchmarks.trace import trace
    from fastunet.losses import DiceCELoss

    with torch.device("meta"):
        model = fastunet.UNet(3, 37, base_c=16).to(memory_format=torch.channels_last)
        x, labels = torch.empty(2, 3, 96, 80), torch.empty(2, 96, 80, dtype=torch.int64)
        found = []
        for step in (lambda: model.loss(x, labels, DiceCELoss()), lambda: DiceCELoss()(model(x), labels)):
            with trace() as calls:
                torch.autograd.grad(step(), list(model.parameters()))
            tensors = []
            for call in calls:
                tensors += call.results + [t for inner in call.inner for t in inner.results]
                tensors += [a for launch in call.launches for a in launch.args if isinstance(a, torch.Tensor)]
            made = [call.name for call in calls if call.name.startswith("fastunet.head")]
            found.append([made, sum(t.numel() == 2 * 37 * 96 * 80 for t in tensors)])
    print(json.dumps(found))
"""


@NEEDS_TRITON
def test_no_launch_and_no_result_has_the_size_of_the_logits():
    (ours, none), (_, some) = answer(NO_LOGITS)
    assert ours == ["fastunet.head_stats", "fastunet.head_stats_backward"]
    assert none == 0
    assert some > 0  # with the logits stored they are found


def test_what_eager_keeps_is_what_it_keeps_with_data():
    net = NetCase(base=4, size=32, batch=2, dtype="fp32")
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    model = net.model(reference)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (2, 32, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        nets.plain_loss(net)(model(x), labels).backward()
    for t in (*model.parameters(), *model.buffers()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    expected = sum(storage.nbytes() for storage in kept.values())
    assert traffic.run(net, reference).saved == expected


def test_the_torch_backend_is_counted_by_its_aten_operations():
    net = NetCase(base=8, size=32, batch=1)
    step = traffic.run(net, fastunet, backend="torch")
    assert {call.backend for call in step.calls if call.name.startswith("fastunet.")} == {"torch"}
    found = traffic.account(step, traffic.made)
    assert found.flops == eager(net).flops  # also of the convolutions inside operators
    assert not {"aten.conv2d.default", "aten.batch_norm.default"} & {p.name for p in found.passes}  # in one piece


def test_a_convolution_of_a_channels_last_tensor_is_channels_last_as_on_a_gpu():
    x, weight = meta(2, 3, 8, 8).to(memory_format=torch.channels_last), meta(5, 3, 3, 3)
    with trace():
        assert F.conv2d(x, weight).is_contiguous(memory_format=torch.channels_last)
        assert F.conv2d(x.contiguous(), weight).is_contiguous()


def test_eager_is_counted_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "benchmarks.recorder", raising=False)
    training, inference = (eager(NetCase(base=8, size=32, batch=1, mode=mode)) for mode in traffic.MODES)
    assert training.bytes > 0
    assert training.flops == 3 * inference.flops - 2 * 32 * 32 * 3 * 8 * 9


# ---- the command -------------------------------------------------------------------------------------------------


def ledger(arguments):
    done = python("-m", "benchmarks.traffic", *arguments.split())
    assert done.returncode == 0, done.stderr
    return done.stdout


@NEEDS_TRITON
def test_the_command_prints_one_json_object():
    found = json.loads(ledger("--net unet --bilinear --base 64 --size 512 --batch 8 --dtype bf16 --json"))
    keys = [f"{name}_bytes" for name in ("fastunet", "eager", "floor", "fastunet_saved", "eager_saved")]
    for part in (found, found["inference"]):
        assert all(isinstance(part[key], int) for key in [*keys, "fastunet_flops"])
    assert found["fastunet_bytes"] == counts()["bilinear training"]["fastunet_bytes"]
    assert found["inference"]["eager_saved_bytes"] == 0


@NEEDS_TRITON
def test_the_command_prints_layers_and_takes_other_roofs():
    printed = ledger("--base 8 --size 64 --batch 1 --bandwidth 1 --tflops 1000")
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    names = ("fastunet", "auto", "eager", "compile", "floor")
    gigabytes, times = ([word for name in names for word in (name, unit)] for unit in ("GB", "ms"))
    assert lines["layer"] == [*gigabytes, "ratio", *times, "launches"]
    assert "down1.maxpool_conv.1.double_conv.0" in lines
    assert "modelled:" in lines["times"]
    total = list(map(float, lines["total"]))
    assert total[6:11] == pytest.approx([1e3 * x for x in total[:5]], abs=0.51)  # at 1 GB/s a gigabyte takes a second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--net strided --bilinear", "expected --bilinear with --net unet, got --net strided"),
        ("--size 8", "expected --size of at least 16, got 8"),
        ("--bandwidth -1", "expected --bandwidth and --tflops above 0"),
        ("--size 16", "expected triton, which is not installed"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(SystemExit):
        traffic.main(arguments.split())
    assert message in capsys.readouterr().err
