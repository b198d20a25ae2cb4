"""What a compiled kernel costs, read from its machine code: no GPU needed.

NVIDIA: cuobjdump (shipped with Triton) gives registers, stack and SASS. AMD: the assembly states its own resources.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Chip:
    """A GPU architecture and the bytes of shared memory that one block may have."""

    target: GPUTarget
    shared_limit: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 99 << 10),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 99 << 10),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 << 10),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 << 10),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 << 10),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), 160 << 10),
}


@dataclass(frozen=True)
class Resources:
    """One kernel on one chip. Widths are bytes per thread and access, with the number of such instructions."""

    registers: int
    spilled_bytes: int  # local memory (NVIDIA) or scratch (AMD) a thread
    shared_bytes: int  # a block
    dots: int  # tl.dot in the source whose operands tensor cores accept
    tensor: dict[str, int]  # tensor-core instructions
    loads: dict[int, int]  # global loads
    stores: dict[int, int]  # global stores
    tma: int  # bulk tensor copies
    float64: int  # instructions that compute in float64


# A float32 dot uses the tensor cores only when its precision was lowered to TF32.
_DOT = re.compile(r"tt\.dot(?:_scaled)? .*?(inputPrecision = (?:tf32|bf16)\w*)?[^:\n]*: tensor<(?:\d+x)+(\w+)")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_AMD = re.compile(r"^\s+([a-z]\w+)", re.MULTILINE)
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?([a-z0-9_]+)")
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}


def read(compiled: Any, chip: Chip) -> Resources:
    """The resources of ``compiled``, a kernel compiled by Triton for ``chip``."""
    dots = sum(operand != "f32" or bool(lowered) for lowered, operand in _DOT.findall(compiled.asm["ttir"]))
    shared = int(compiled.metadata.shared)
    if chip.target.backend == "hip":
        return _read_amd(compiled.asm["amdgcn"], shared, dots)
    return _read_nvidia(compiled.asm["cubin"], compiled.asm["ptx"], shared, dots)


def _read_nvidia(cubin: bytes, ptx: str, shared: int, dots: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(_SASS.findall(sass))
    names: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        names[opcode.partition(".")[0]] += count
    return Resources(
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"] or 4 * (names["LDL"] + names["STL"]),
        shared_bytes=shared,
        dots=dots,
        tensor={name: count for name, count in sorted(names.items()) if name.endswith("MMA")},
        loads=_widths((opcode, count) for opcode, count in opcodes.items() if opcode.startswith(("LDG", "LDGSTS"))),
        stores=_widths((opcode, count) for opcode, count in opcodes.items() if opcode.startswith("STG")),
        tma=names["UTMALDG"] + names["UTMASTG"],
        float64=len(re.findall(r"\.f64\b", ptx)),
    )


def _cuobjdump(*args: str) -> str:
    return subprocess.run(
        [knobs.nvidia.cuobjdump.path, *args], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout


def _widths(opcodes: Iterable[tuple[str, int]]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for opcode, count in opcodes:
        parts = opcode.split(".")
        narrow = 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4
        found[next((int(part) // 8 for part in parts if part in ("64", "128", "256")), narrow)] += count
    return dict(sorted(found.items()))


def _read_amd(assembly: str, shared: int, dots: int) -> Resources:
    def stated(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    code = Counter(_AMD.findall(assembly))
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
        tensor={name: count for name, count in sorted(code.items()) if name.startswith(("v_mfma", "v_smfmac"))},
        loads=dict(sorted(accesses["load"].items())),
        stores=dict(sorted(accesses["store"].items())),
        tma=0,
        float64=sum(count for name, count in code.items() if "f64" in name),
    )
