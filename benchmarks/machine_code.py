"""What a compiled kernel costs, read from its machine code: no GPU needed.

NVIDIA: cuobjdump (shipped with Triton) gives registers, stack and SASS. AMD: the assembly states its own resources.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from triton import knobs

from benchmarks.chips import Chip
from benchmarks.main_loop import Loop, is_tensor, main_loop, parse_amd, parse_sass


@dataclass(frozen=True)
class Resources:
    """One kernel on one chip. Widths are bytes per thread and access, with the number of such instructions."""

    registers: int
    spilled_bytes: int  # local memory (NVIDIA) or scratch (AMD) a thread
    shared_bytes: int  # a block
    blocks: int  # that one multiprocessor holds at a time
    dots: int  # tl.dot in the source whose operands tensor cores accept
    tensor: dict[str, int]  # tensor-core instructions
    serialised: bool  # whether each wgmma waits for the one before it
    loop: Loop | None  # the main loop, of a kernel that has tensor instructions in a loop
    loads: dict[int, int]  # global loads
    stores: dict[int, int]  # global stores
    tma: int  # bulk tensor copies
    float64: int  # instructions that compute in float64


def resident_blocks(chip: Chip, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Blocks of ``warps`` warps that one multiprocessor of ``chip`` holds at a time; 0 if not even one.

    Each scheduler has a quarter of the registers and gives them to warps in steps of 8 a thread; shared memory comes
    in steps of 128 bytes; a multiprocessor of sm_100 has 512 columns of tensor memory.
    """
    lanes = int(chip.target.warp_size)
    by_registers = 4 * (chip.registers // 4 // (max(-(-registers // 8), 1) * 8 * lanes)) // warps
    by_shared = chip.shared // (-(-(shared + chip.reserved) // 128) * 128 or 1)
    by_tensor_memory = 512 // tensor_columns if tensor_columns else chip.blocks
    return min(chip.blocks, chip.threads // (warps * lanes), by_registers, by_shared, by_tensor_memory)


# A float32 dot uses the tensor cores only when its precision was lowered to TF32.
_DOT = re.compile(r"tt\.dot(?:_scaled)? .*?(inputPrecision = (?:tf32|bf16)\w*)?[^:\n]*: tensor<(?:\d+x)+(\w+)")
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?([a-z0-9_]+)")
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}


def read(compiled: Any, chip: Chip) -> Resources:
    """The resources of ``compiled``, a kernel compiled by Triton for ``chip``."""
    dots = sum(operand != "f32" or bool(lowered) for lowered, operand in _DOT.findall(compiled.asm["ttir"]))
    shared = int(compiled.metadata.shared)
    if chip.amd:
        return _read_amd(compiled.asm["amdgcn"], shared, dots, compiled.metadata.num_warps, chip)
    return _read_nvidia(compiled, shared, dots, chip)


def _read_nvidia(compiled: Any, shared: int, dots: int, chip: Chip) -> Resources:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name],
            check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        ).stdout  # fmt: skip
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    code = parse_sass(dump)
    opcodes = Counter(instruction.opcode for instruction in code)
    warps = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)[1]) // 32  # type: ignore[index]
    names = Counter(instruction.opcode.partition(".")[0] for instruction in code)
    return Resources(
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"] or 4 * (names["LDL"] + names["STL"]),
        shared_bytes=shared,
        dots=dots,
        blocks=resident_blocks(chip, warps, numbers["REG"], shared, compiled.metadata.tmem_size),
        tensor={name: count for name, count in sorted(names.items()) if is_tensor(name)},
        serialised=serialised(ptx, opcodes),
        loop=main_loop(code, warps, 16 * chip.rate, _block_shape(ptx)),
        loads=_widths((opcode, count) for opcode, count in opcodes.items() if opcode.startswith(("LDG", "LDGSTS"))),
        stores=_widths((opcode, count) for opcode, count in opcodes.items() if opcode.startswith("STG")),
        tma=names["UTMALDG"] + names["UTMASTG"],
        float64=len(re.findall(r"\.f64\b", ptx)),
    )


def serialised(ptx: str, opcodes: Mapping[str, int]) -> bool:
    """Whether ptxas made each wgmma wait for the one before; Triton does not show its message that they "are
    serialized".

    In ``ptx`` a fence comes before each dot, which is one wgmma or several. Serialised, one comes before each wgmma,
    and a wait behind it.
    """
    products, fences, waits = (
        sum(count for opcode, count in opcodes.items() if opcode.startswith(name))
        for name in (("HGMMA", "QGMMA", "IGMMA"), "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR")
    )
    several = ptx.count("wgmma.fence.") < ptx.count("wgmma.mma_async.")
    return several and fences >= products and waits >= products


# A tcgen05.mma says what it multiplies in a register: N / 8 in bits 17 to 22, M / 16 in bits 24 to 28 (PTX manual,
# "Instruction descriptor"). One always reads 32 bytes of each row.
_TCGEN05 = re.compile(r"tcgen05\.mma\.\S*kind::(\w+) \[.*?\], [^;]*?(%r\d+), %p\d+;")
_TCGEN05_DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32}


def _block_shape(ptx: str) -> int:
    """m·n·k of the smallest tcgen05.mma in ``ptx``; 0 if there is none."""
    values = dict(re.findall(r"mov\.b32 \s*(%r\d+), (\d+);", ptx))
    found = [(int(values[register]), _TCGEN05_DEPTH[kind]) for kind, register in _TCGEN05.findall(ptx)]
    return min(((about >> 24 & 31) * 16 * (about >> 17 & 63) * 8 * depth for about, depth in found), default=0)


def _widths(opcodes: Iterable[tuple[str, int]]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for opcode, count in opcodes:
        parts = opcode.split(".")
        narrow = 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4
        found[next((int(part) // 8 for part in parts if part in ("64", "128", "256")), narrow)] += count
    return dict(sorted(found.items()))


def _read_amd(assembly: str, shared: int, dots: int, warps: int, chip: Chip) -> Resources:
    def stated(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    instructions = parse_amd(assembly)
    code = Counter(instruction.opcode for instruction in instructions)
    accesses: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for name, count in code.items():
        if match := _AMD_ACCESS.match(name):
            kind = match[2].removesuffix("_d16_hi").removesuffix("_d16")
            base, _, times = kind.partition("x")
            accesses[match[1]][_AMD_BYTES[base] * int(times or 1)] += count
    return Resources(
        registers=stated("vgpr_count"),
        spilled_bytes=stated("private_segment_fixed_size") or 4 * stated("vgpr_spill_count"),
        shared_bytes=shared,
        dots=dots,
        blocks=resident_blocks(chip, warps, stated("vgpr_count"), shared),
        tensor={name: count for name, count in sorted(code.items()) if is_tensor(name)},
        serialised=False,
        loop=main_loop(instructions, warps, 0, 0),
        loads=dict(sorted(accesses["load"].items())),
        stores=dict(sorted(accesses["store"].items())),
        tma=0,
        float64=sum(count for name, count in code.items() if "f64" in name),
    )
