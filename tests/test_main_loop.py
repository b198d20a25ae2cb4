"""What the compile gate reads in machine code: loops, their cost, and how many blocks fit on a chip."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the chips are described in Triton's terms")

from benchmarks.chips import CHIPS
from benchmarks.machine_code import _block_shape, resident_blocks, serialised
from benchmarks.main_loop import main_loop, multiply_bits, natural_loops, parse_amd, parse_sass


def sass(*lines: str) -> str:
    """Instructions as cuobjdump prints them, 16 bytes each."""
    return "\n".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */" for i, line in enumerate(lines))


# An outer loop from 0x10, an inner one from 0x20 whose slow path is behind EXIT, and ptxas' padding.
NESTED = sass(
    "MOV R1, c[0x0][0x28]",
    "IADD3 R2, R2, 0x1, RZ",
    "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64]",
    "@!P1 BRA 0xd0",
    "LDS.128 R4, [R3]",
    "STS.128 [R3], R4",
    "LDSM.16.M88.4 R4, [R3]",
    "@P2 IMAD R0, R0, R0, R0",
    "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR16], R24, gsb0",
    "BRA.U UP0, 0x20",
    "@!P0 BRA 0x10",
    "STG.E.128 desc[UR4][R8.64], R24",
    "EXIT",
    "NANOSLEEP 0x10",
    "BRA 0x40",
    "BRA 0xf0",
)


def test_main_loop_is_the_innermost_with_its_slow_path():
    loop = main_loop(parse_sass(NESTED), warps=4, bits=2048 * 16, block_shape=0)
    assert loop is not None
    assert (loop.instructions, loop.tensor, loop.others) == (10, 1, 9)  # 0x20 to 0x90, and 0xd0 and 0xe0
    assert (loop.shared_stores, loop.shared_loads, loop.async_copies, loop.bulk_copies) == (1, 1, 1, 0)


def test_issue_slots_per_tensor_clock():
    # 10 instructions of 4 warps on 4 schedulers are 10 slots; 64·64·16 multiply-adds at 2048 a clock are 32 clocks.
    loop = main_loop(parse_sass(NESTED), warps=4, bits=2048 * 16, block_shape=0)
    assert loop is not None
    assert loop.issue_slots == pytest.approx(10 / 32, abs=1e-3)
    # Two warpgroups issue twice as much for twice the work.
    assert main_loop(parse_sass(NESTED), warps=8, bits=2048 * 16, block_shape=0) == loop


def test_loop_that_is_left_by_a_call():
    code = parse_sass(sass("NOP", "HMMA.16816.F32.BF16 R4, R8, R2, R4", "@P0 CALL.REL.NOINC 0x40", "BRA 0x10", "EXIT"))
    assert natural_loops(code) == [{1, 2, 3}]


def test_waits():
    code = parse_sass(sass("HGMMA.64x64x16.F32.BF16 R24, R4", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P0 BRA 0x0", "EXIT"))
    loop = main_loop(code, 4, 2048 * 16, 0)
    assert loop is not None
    assert (loop.waits, loop.least_slots) == (1, None)


@pytest.mark.parametrize(
    ("fences", "arrivals", "waits", "expected"),
    [
        (2, 2, 2, False),
        (2, 8, 8, True),
        (2, 8, 2, False),  # ptxas puts one before each, and lets them run on
        (2, 4, 2, False),  # where sums lie in other registers, a second one
        (8, 8, 8, False),  # a dot is one wgmma
    ],
)
def test_serialised(fences, arrivals, waits, expected):
    ptx = "wgmma.fence.sync.aligned;\n" * fences + "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {};\n" * 8
    opcodes = {"WARPGROUP.ARRIVE": arrivals, "WARPGROUP.DEPBAR.LE": waits, "HGMMA.64x64x16.F32.BF16": 8}
    assert serialised(ptx, opcodes) == expected


def test_no_main_loop():
    straight = sass("HMMA.16816.F32.BF16 R4, R8, R2, R4", "EXIT", "BRA 0x20")
    turning = sass("FFMA R4, R8, R2, R4", "@P0 BRA 0x0", "EXIT")
    assert all(main_loop(parse_sass(text), 4, 1, 0) is None for text in (straight, turning))


def test_of_several_loops_the_worst_counts():
    hmma = "HMMA.16816.F32.BF16 R4, R8, R2, R4"
    code = parse_sass(sass(hmma, "@P0 BRA 0x0", hmma, "NOP", "@P0 BRA 0x20", "EXIT"))
    loop = main_loop(code, 4, 1024 * 16, 0)
    assert loop is not None
    assert loop.instructions == 3
    assert loop.issue_slots == pytest.approx(3 / 8, abs=1e-3)
    assert loop.least_slots == pytest.approx(2 / 8, abs=1e-3)


def test_amd_loop():
    text = """
_kernel:
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	ds_read_b128 v[0:3], v4
	v_mfma_f32_32x32x8_bf16 v[2:17], v[0:1], v[2:3], v[2:17]
	ds_write_b64 v4, v[0:1]
	s_cbranch_vccnz .LBB0_1
.LBB0_2:
	s_endpgm
.Lfunc_end0:
	v_mfma_f32_32x32x8_bf16 v[2:17], v[0:1], v[2:3], v[2:17]
"""
    loop = main_loop(parse_amd(text), 4, 0, 0)
    assert loop is not None
    assert (loop.instructions, loop.tensor, loop.shared_stores, loop.shared_loads) == (4, 1, 1, 1)
    assert loop.issue_slots is None


@pytest.mark.parametrize(
    ("chip", "opcode", "clocks"),
    [
        ("sm_90", "HGMMA.64x256x16.F32.BF16", 128),
        ("sm_90", "HGMMA.64x256x8.F32.TF32", 128),
        ("sm_90", "QGMMA.64x256x32.F32.E4M3.E4M3", 128),
        ("sm_80", "HMMA.16816.F32.BF16", 8),  # four warps, one on each quarter: 2048 / 256
        ("sm_80", "HMMA.1688.F32.TF32", 8),
        ("sm_89", "HMMA.16816.F32", 16),
        ("sm_100", "UTCHMMA", 32),
    ],
)
def test_tensor_clocks_of_one_instruction(chip, opcode, clocks):
    assert multiply_bits(opcode, 4, 128 * 64 * 16) / (CHIPS[chip].rate * 16) == clocks


def test_shape_of_a_tcgen05():
    text = """
	mov.b32 	%r265, 135267472;
	@%p65 tcgen05.mma.cta_group::1.kind::f16 [ %r432 + 0 ], [ %r264 + 0 ], %rd145, %r265, %p64;
	@%p90 tcgen05.mma.cta_group::1.kind::f16 [ %r1062 + 0 ], %rd230, %rd231, %r265, %p89;
"""
    assert _block_shape(text) == 128 * 64 * 16
    assert _block_shape("ret;") == 0


@pytest.mark.parametrize(
    ("chip", "warps", "registers", "shared", "columns", "blocks"),
    [
        ("sm_90", 8, 136, 36864, 0, 1),  # 3 warps on each scheduler: 16384 / (136 · 32)
        ("sm_90", 8, 128, 36864, 0, 2),
        ("sm_90", 4, 16, 0, 0, 16),  # 2048 threads
        ("sm_90", 1, 16, 0, 0, 32),
        ("sm_90", 4, 32, 113 << 10, 0, 2),  # 228 KiB, less 1 KiB for each block
        ("sm_90", 4, 32, 114 << 10, 0, 1),
        ("sm_86", 8, 32, 0, 0, 6),
        ("sm_86", 1, 32, 0, 0, 16),
        ("sm_100", 4, 32, 0, 256, 2),
        ("sm_90", 16, 255, 0, 0, 0),
        ("gfx942", 4, 128, 0, 0, 4),  # 512 registers a lane: four waves on each SIMD
        ("gfx942", 4, 64, 32 << 10, 0, 2),
    ],
)
def test_resident_blocks(chip, warps, registers, shared, columns, blocks):
    assert resident_blocks(CHIPS[chip], warps, registers, shared, columns) == blocks
