"""The compiled kernels, executed on a CPU: a dozen cases on two chips, planted faults, and the interpreter itself.

What runs the project's kernels runs in processes of its own, because here Triton may already be in interpreter mode.
All other cases run by ``make ptx``, which prints a table, and not by a mark: there is one list of cases and one way to
run it.
"""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from processes import python

from benchmarks.ptx import values
from benchmarks.ptx.findings import Findings
from benchmarks.ptx.machine import FIRST_WARP, IN_STEP, LAST_WARP, Grid, Machine
from benchmarks.ptx.memory import GlobalMemory, sparse
from benchmarks.ptx.program import UnknownError

# ---- the project's kernels ---------------------------------------------------------------------------------------

needs_triton = pytest.mark.usefixtures("triton")


@pytest.fixture
def triton():
    return pytest.importorskip("triton", reason="compiling needs Triton, part of pip install 'fastunet[test]' on Linux")


@needs_triton
@pytest.mark.parametrize(
    ("chip", "dtype", "cases"),
    [("sm_80", "bf16", 13), ("sm_90", "bf16", 13), ("sm_80", "fp32", 13), ("sm_90", "tf32", 9)],
)
def test_kernels(chip, dtype, cases):
    done = python("-m", "benchmarks.ptx", "--quick", "--json", "--chip", chip, "--dtype", dtype)
    assert done.stdout, done.stderr
    trials = json.loads(done.stdout)
    assert [trial["said"] for trial in trials if not trial["passed"]] == []
    assert len(trials) == cases
    assert done.returncode == 0
    assert len(set().union(*(trial["launches"] for trial in trials))) >= 20


@needs_triton
def test_without_json_it_prints_a_line_a_case_and_a_table():
    done = python("-m", "benchmarks.ptx", "--quick", "--chip", "sm_80", "--dtype", "bf16", "--only", "confusion")
    assert done.returncode == 0, done.stderr
    case, _, heading, row, _, last = done.stdout.splitlines()
    assert case.startswith("ok     sm_80 confusion_matrix")
    assert heading.split() == ["kernel", "chip", "dtype", "launches", "error", "PyTorch", "findings"]
    assert row.split()[:4] == ["_confusion_matrix_kernel", "sm_80", "bf16", "1"]
    assert row.endswith("none")
    assert last == "1 cases, 1 kernels: all passed"


RECORDED = """
from benchmarks.ptx.trials import everything, missed, recorded

print(missed("sm_80", "bf16"), missed("sm_90", "bf16"))
launches = (launch for case in everything("bf16") for launch in recorded(case, "sm_90", "bf16"))
print(max(launch.kwargs["TILE"].outputs for launch in launches if launch.kernel.__name__ == "_conv3x3_fwd_kernel"))
"""


@needs_triton
def test_every_kernel_and_the_widest_tile_have_a_case():
    done = python("-c", RECORDED)
    assert done.stdout.split("\n")[:2] == ["[] []", "128"], done.stderr


MATTER = ["bar.sync removed", "cp.async.wait_group one later", "mbarrier wait skipped", "fence.proxy.async removed"]


@needs_triton
def test_planted_faults_are_noticed():
    done = python("-m", "benchmarks.ptx", "--faults", "44", "--json")
    assert done.stdout, done.stderr
    outcomes = json.loads(done.stdout)
    assert [outcome for outcome in outcomes if outcome["verdict"] == "UNNOTICED"] == []
    noticed = [outcome["kind"] for outcome in outcomes if outcome["verdict"] == "noticed"]
    assert set(MATTER) <= set(noticed)
    assert len(noticed) >= 25


# ---- what the interpreter finds, in kernels of a few lines -------------------------------------------------------

ENTRY = """
.visible .entry probe(
	.param .u64 .ptr .global .align 1 probe_param_0
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %h<9>;
	.reg .b32 %r<19>;
	.reg .f32 %f<9>;
	.reg .b64 %d<9>;
	ld.param.u64 %d1, [probe_param_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	shl.b32 %r3, %r1, 2;
	cvt.u64.u32 %d2, %r3;
	add.s64 %d2, %d1, %d2;
BODY
	ret;
                                        // -- End function
}
"""


def ran(body, words, programs=1, order=IN_STEP, shared=1024):
    """What was found when ``body`` ran on the 32-bit ``words`` of global memory. %r1 is the thread of 64, %r2 the
    program, %r3 four times the thread; %d1 the address of the words, %d2 that of the thread's."""
    findings, memory = Findings(), GlobalMemory(4)
    parameters = {"probe_param_0": np.uint64(memory.add(words.view(np.uint8), "words")).tobytes()}
    machine = Machine(ENTRY.replace("BODY", body))
    machine.run(Grid(memory, parameters, {}, (programs, 1, 1), shared, findings), order=order)
    return [finding.what for finding in findings]


def words(count=64):
    return np.arange(count, dtype=np.uint32) + np.uint32(100)


EXCHANGE = """
	ld.global.b32 %r4, [%d2];
	st.shared.b32 [%r3], %r4;
	{barrier}
	xor.b32 %r5, %r3, 128;
	ld.shared.b32 %r6, [%r5];
	st.global.b32 [%d2], %r6;
"""


@pytest.mark.parametrize("order", [IN_STEP, FIRST_WARP, LAST_WARP])
def test_warps_that_exchange(order):
    memory = words()
    assert ran(EXCHANGE.format(barrier="bar.sync 0;"), memory, order=order) == []
    assert memory.tolist() == [100 + (i ^ 32) for i in range(64)]


def test_warps_that_exchange_with_no_barrier():
    assert ran(EXCHANGE.format(barrier=""), words()) == [
        "shared race: read after another warp's write, no barrier between"
    ]


def test_lanes_of_one_warp_may_exchange():
    assert ran(EXCHANGE.format(barrier="").replace("128", "64"), words()) == []


OVERWRITE = "st.shared.b32 [%r3], %r1; bar.sync 0; xor.b32 %r5, %r3, 128; ld.shared.b32 %r6, [%r5];"


def test_write_after_read_with_no_barrier():
    assert ran(OVERWRITE + "bar.sync 0; st.shared.b32 [%r3], %r6;", words()) == []
    assert ran(OVERWRITE + "st.shared.b32 [%r3], %r6;", words()) == [
        "shared race: write after another warp's read, no barrier between"
    ]


def test_lanes_that_store_different_values():
    assert ran("and.b32 %r5, %r3, 252; and.b32 %r5, %r5, 128; st.shared.b32 [%r5], %r1;", words()) == [
        "lanes of one warp store different values to one address"
    ]
    assert ran("mov.u32 %r4, 7; mov.u32 %r5, 0; st.shared.b32 [%r5], %r4;", words()) == []


def test_warps_that_store_different_values():
    assert "two warps store different values to one address" in ran(
        "mov.u32 %r5, 0; st.shared.b32 [%r5], %r1;", words()
    )


def test_read_of_shared_memory_that_nothing_wrote():
    assert ran("ld.shared.b32 %r4, [%r3];", words()) == ["read of shared memory that nothing wrote"]


@pytest.mark.parametrize("access", ["ld.global.b32 %r4, [%d2];", "st.global.b32 [%d2], %r1;"])
def test_global_access_out_of_bounds(access):
    assert ran(access, words(60)) == ["global access out of bounds"]
    assert ran(f"setp.lt.u32 %p1, %r1, 60; @%p1 {access}", words(60)) == []


def test_shared_access_out_of_bounds():
    with pytest.raises(Exception, match="shared access out of bounds"):
        ran("st.shared.b32 [%r3], %r1;", words(), shared=128)


COPY = "cp.async.ca.shared.global [%r3], [%d2], 4; cp.async.commit_group; {wait} ld.shared.b32 %r4, [%r3];"


def test_copies_arrive_at_the_wait():
    memory = words()
    assert (
        ran(COPY.format(wait="cp.async.wait_group 0;") + "add.u32 %r4, %r4, 1; st.global.b32 [%d2], %r4;", memory) == []
    )
    assert memory.tolist() == list(range(101, 165))
    found = ran(COPY.format(wait="cp.async.wait_group 1;") + "cp.async.wait_group 0;", words())
    assert "shared race: read of bytes that a copy has not delivered" in found


def test_copies_that_nobody_waits_for():
    assert "asynchronous work is under way when the program ends" in ran(COPY.format(wait=""), words())


def test_programs_that_write_one_place():
    assert ran("st.global.b32 [%d2], %r2;", words(), programs=2) == [
        "global race: two threads write different values to one address"
    ]
    assert ran("st.global.b32 [%d2], %r1;", words(), programs=2) == []


def test_atomic_sums():
    memory = words()
    body = "and.b32 %r5, %r3, 4; cvt.u64.u32 %d3, %r5; add.s64 %d3, %d1, %d3; red.global.add.u32 [%d3], %r1;"
    assert ran(body, memory) == []
    assert memory[:3].tolist() == [100 + sum(range(0, 64, 2)), 101 + sum(range(1, 64, 2)), 102]
    body = "mov.u32 %r5, 0; st.shared.b32 [%r5], %r5; bar.sync 0; atom.shared.add.u32 %r6, [%r5], 2;"
    assert ran(f"{body} st.global.b32 [%d2], %r6;", memory) == []
    assert sorted(memory.tolist()) == list(range(0, 128, 2))


def test_atomic_sum_with_no_barrier_behind_the_store():
    body = "mov.u32 %r5, 0; st.shared.b32 [%r5], %r5; atom.shared.add.u32 %r6, [%r5], 2;"
    assert "shared race: update after another warp's write, no barrier between" in ran(body, words())


@pytest.mark.parametrize("writer", [0, 19])  # of 20 programs, of which 16 run in step
def test_program_that_reads_what_another_writes(writer):
    body = f"setp.eq.u32 %p1, %r2, {writer}; @%p1 st.global.b32 [%d2], %r2; @!%p1 ld.global.b32 %r4, [%d2];"
    assert ran(body, words(), programs=20) == ["global race: a program reads what another one writes"]


def test_threads_that_meet_at_different_barriers():
    body = "setp.lt.u32 %p1, %r1, 32;\n\t@%p1 bra $L1;\n\tbar.sync 0;\n\tbra $L2;\n$L1:\n\tbar.sync 0;\n$L2:\n"
    assert ran(body, words()) == ["threads of a CTA meet at different barriers"]


def test_loop_without_end():
    with pytest.raises(Exception, match="probe does not end"):
        ran("$L1:\n\tbra $L1;", words())


def test_divergence():
    memory = words()
    body = "setp.lt.u32 %p1, %r1, 5;\n\t@%p1 bra $L1;\n\tmov.u32 %r4, 1;\n\tbra $L2;\n$L1:\n\tmov.u32 %r4, 2;\n$L2:\n"
    assert ran(body + "\tst.global.b32 [%d2], %r4;", memory) == []
    assert memory.tolist() == [2] * 5 + [1] * 59


UNKNOWN = [
    "brev.b32 %r4, %r1;",
    "cvt.rz.bf16.f32 %h1, %f1;",
    "cvt.rn.relu.bf16.f32 %h1, %f1;",
    "cvt.rz.bf16x2.f32 %r4, %f1, %f2;",
    "cvt.rn.satfinite.tf32.f32 %r4, %f1;",
    "cvt.s32.f32 %r4, %f1;",
    "cvt.rm.f32.s32 %f1, %r1;",
    "cvt.sat.u8.s32 %h1, %r1;",
    "add.rz.f32 %f1, %f2, %f3;",
    "add.sat.s32 %r4, %r1, %r2;",
    "div.rz.f32 %f1, %f2, %f3;",
    "div.f32 %f1, %f2, %f3;",
    "fma.rn.relu.f16 %h1, %h2, %h3, %h4;",
    "fma.rn.ftz.f16 %h1, %h2, %h3, %h4;",
    "mul.rn.f64 %d3, %d1, %d2;",
    "setp.lt.ftz.f32 %p1, %f1, %f2;",
    "ld.acquire.gpu.global.b32 %r4, [%d1];",
    "ld.local.b32 %r4, [%d1];",
    "ld.param.b32 %r4, [elsewhere];",
    "atom.acq_rel.gpu.shared.add.u32 %r4, [%r3], 1;",
    "fence.proxy.tensormap::generic.acquire.gpu [%d1], 128;",
    "griddepcontrol.wait;",
    "mov.u32 %r4, %clock;",
    "mov.u32 %r4, %x4;",
    "bar.sync 1, 32;",
    "@%p1 bar.sync 0;",
    "bra $nowhere;",
    "call function;",
]


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_what_is_unknown_is_named_when_a_kernel_is_read(instruction):
    opcode = (instruction.partition("@%p1 ")[2] or instruction).split()[0].rstrip(";")
    with pytest.raises(UnknownError) as error:
        Machine(ENTRY.replace("BODY", f"ret;\n{instruction}"))
    assert str(error.value) == f"{opcode} is not understood: {instruction}"


def test_addresses_beyond_4_gigabytes():
    memory = sparse((1 << 33) + 64, np.uint32)
    place = (1 << 33) * 4
    assert ran(f"add.s64 %d3, %d2, {place}; st.global.b32 [%d3], %r1; ld.global.b32 %r4, [%d3];", memory) == []
    assert memory[-64:].tolist() == list(range(64))
    assert ran(f"add.s64 %d3, %d2, {place + 4}; st.global.b32 [%d3], %r1;", memory) == ["global access out of bounds"]


# ---- arithmetic --------------------------------------------------------------------------------------------------


def computed(body, a, b, c):
    """%r7 after ``body``, of threads for which %r4, %r5, %r6 are the 32-bit words a, b, c."""
    memory = np.concatenate([np.asarray(x).view(np.uint32) for x in (a, b, c)])
    assert len(memory) == 3 * 64
    load = "ld.global.b32 %r4, [%d2]; ld.global.b32 %r5, [%d2+256]; ld.global.b32 %r6, [%d2+512];"
    assert ran(f"{load} {body} st.global.b32 [%d2], %r7;", memory) == []
    return memory[:64]


def random_floats(count, generator):
    bits = generator.integers(0, 1 << 32, count, np.uint32)
    return np.where(np.isfinite(bits.view(np.float32)), bits.view(np.float32), np.float32(1.5))


def rounded(x, bits, least):
    """The Fraction rounded to so many bits of mantissa, to nearest even; ``least`` is the exponent of the least bit."""
    if x == 0:
        return Fraction(0)
    exponent = max(len(bin(abs(x.numerator))) - len(bin(x.denominator)) - bits - 1, least)
    while abs(x) / Fraction(2) ** exponent >= 1 << bits:
        exponent += 1
    return round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent  # Python's rounds halves to even


def test_fused_multiply_add_is_rounded_once():
    generator = np.random.default_rng(0)
    a, b = (random_floats(4000, generator) for _ in range(2))
    a, b = np.ldexp(np.frexp(a)[0], 4), np.ldexp(np.frexp(b)[0], 3)
    # Addends that nearly cancel the product or end half-way between two floats, and products near the least float.
    c = np.concatenate(
        [-(a * b)[:1000], (a * b)[1000:2000] * np.float32(2.0**24), np.ldexp(a, -30)[2000:3000], a[3000:]]
    )
    a[3000:] *= np.float32(2.0**-80)
    b[3000:] *= np.float32(2.0**-60)
    c[3000:] *= np.float32(2.0**-125)
    found = values.fma(a, b, c)
    for x, y, z, got in zip(*(v.tolist() for v in (a, b, c, found)), strict=True):
        assert Fraction(got) == rounded(Fraction(x) * Fraction(y) + Fraction(z), 24, -149)


@pytest.mark.parametrize(("kind", "bits", "least"), [("bf16", 8, -133), ("f16", 11, -24)])
def test_fused_multiply_add_of_16_bits(kind, bits, least):
    generator = np.random.default_rng(0)
    x = [generator.standard_normal(3000).astype(np.float32) for _ in range(3)]
    x[2][:1000] *= np.float32(2.0**-14)
    x[2][1000:2000] = -x[0][1000:2000] * x[1][1000:2000]
    _, decode, encode = values.FORMATS[kind]
    a, b, c = (decode(encode(v)) for v in x)
    for p, q, r, got in zip(*(v.tolist() for v in (a, b, c, decode(encode(values.fma_16(a, b, c))))), strict=True):
        assert Fraction(got) == rounded(Fraction(p) * Fraction(q) + Fraction(r), bits, least)


def test_bfloat16_is_pytorch_s():
    import torch

    x = random_floats(10000, np.random.default_rng(0))
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(values.to_bf16(x), expected)
    assert values.to_bf16(np.array([np.nan], np.float32)).tolist() == [0x7FFF]


def test_tf32_products_cut_their_operands_off():
    """Of what TF32 has no bits for nothing is left, though it is more than half of its last bit."""
    x, ones = np.full(64, 1 + 2.0**-11 + 2.0**-12, np.float32), np.ones(64, np.float32)
    left, right, sums = "{%r4, %r4, %r4, %r4}", "{%r5, %r5}", "{%r8, %r8, %r8, %r8}"
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r9, %r10, %r11, %r7}"
    found = computed(f"mov.b32 %r8, 0; {product}, {left}, {right}, {sums};", x, ones, ones).view(np.float32)
    assert found.tolist() == [8.0] * 64
    rounded = computed("cvt.rna.tf32.f32 %r7, %r4;", x, ones, ones).view(np.float32)
    assert rounded.tolist() == [1 + 2.0**-10] * 64


@pytest.mark.parametrize("name", values.ERRORS)
def test_approximations_err_as_they_may(name):
    generator = np.random.default_rng(0)
    operands = [generator.uniform(0.1, 3, 20000).astype(np.float32) for _ in range(2 if name == "div" else 1)]
    found = values.approximate(name, *operands).astype(np.float64)
    true = values.EXACT[name](*(x.astype(np.float64) for x in operands))
    errors = np.abs(found - true) / np.abs(true)
    assert 0.5 * values.ERRORS[name] < errors.max() <= values.ERRORS[name]
    assert np.array_equal(found, values.approximate(name, *operands))


def signed(x):
    return (x & 0xFFFFFFFF) - (x >> 31 << 32)


INTEGERS = {
    "mul.hi.s32 %r7, %r4, %r5;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.hi.u32 %r7, %r4, %r5;": lambda a, b, c: a * b >> 32,
    "div.s32 %r7, %r4, %r5;": lambda a, b, c: abs(signed(a)) // abs(signed(b)) * (-1) ** ((a ^ b) >> 31),
    "rem.u32 %r7, %r4, %r5;": lambda a, b, c: a % b,
    "shl.b32 %r7, %r4, 33;": lambda a, b, c: 0,
    "shr.s32 %r7, %r4, 33;": lambda a, b, c: -(a >> 31),
    "bfe.u32 %r7, %r4, 5, 9;": lambda a, b, c: a >> 5 & 511,
    "bfe.s32 %r7, %r4, 30, 9;": lambda a, b, c: signed(a) >> 30,
    "prmt.b32 %r7, %r4, %r5, 0x5410;": lambda a, b, c: (a & 0xFFFF) | (b & 0xFFFF) << 16,
    "popc.b32 %r7, %r4;": lambda a, b, c: bin(a).count("1"),
    "max.u16x2 %r7, %r4, %r5;": lambda a, b, c: max(a >> 16, b >> 16) << 16 | max(a & 0xFFFF, b & 0xFFFF),
    "add.u16x2 %r7, %r4, %r5;": lambda a, b, c: (a + (b & 0xFFFF0000) & 0xFFFF0000) | (a + b & 0xFFFF),
    "mad.wide.u32 %d3, %r4, %r5, %d1; sub.s64 %d3, %d3, %d1; mov.b64 {%r8, %r7}, %d3;": lambda a, b, c: a * b >> 32,
    "cvt.u16.u32 %h1, %r4; cvt.s32.s16 %r7, %h1;": lambda a, b, c: (a & 0xFFFF) - (a >> 15 & 1) * 65536,
    "setp.lt.s32 %p1, %r4, %r5; selp.b32 %r7, %r4, %r5, %p1;": lambda a, b, c: min(signed(a), signed(b)),
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integers(body):
    a, b, c = np.random.default_rng(0).integers(1, 1 << 32, (3, 64), np.uint32)
    found = computed(body, a, b, c).tolist()
    assert found == [INTEGERS[body](*x) & 0xFFFFFFFF for x in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]


def test_comparisons_with_nan():
    a = np.array([1, 2, np.nan, 3] * 16, np.float32)
    b = np.array([2, 1, 1, np.nan] * 16, np.float32)
    for test, expected in [("lt", [1, 0, 0, 0]), ("ltu", [1, 0, 1, 1]), ("ne", [1, 1, 0, 0]), ("neu", [1, 1, 1, 1])]:
        body = f"setp.{test}.f32 %p1, %r4, %r5; selp.b32 %r7, 1, 0, %p1;"
        assert computed(body, a, b, a)[:4].tolist() == expected
    assert computed("max.f32 %r7, %r4, %r5;", a, b, a).view(np.float32)[:4].tolist() == [2, 2, 1, 3]
    assert np.isnan(computed("max.NaN.f32 %r7, %r4, %r5;", a, b, a).view(np.float32)[2:4]).all()
