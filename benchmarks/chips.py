"""The chips that kernels are compiled for, and the GPUs whose speed is modelled: each fact once. It needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget


def target_of(architecture: str) -> GPUTarget:
    """What Triton is told to compile for "sm_90", "gfx942", …"""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Chip:
    """An architecture: what one multiprocessor (compute unit) has, and what one block may have of it."""

    architecture: str
    threads: int
    blocks: int
    shared: int  # bytes
    shared_limit: int  # bytes a block
    registers: int = 65536  # of 32 bits, a quarter for each scheduler
    reserved: int = 1024  # bytes of shared memory that the driver takes for each block
    rate: int = 0  # dense 16-bit multiply-adds of the tensor cores a clock, accumulated in float32; 0: not modelled

    @property
    def target(self) -> GPUTarget:
        return target_of(self.architecture)

    @property
    def amd(self) -> bool:
        return self.architecture.startswith("gfx")


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". AMD: the CDNA 3 and CDNA 4
# instruction set manuals (512 vector registers a lane for each of four SIMDs, 8 waves each, local data share) and
# LLVM's AMDGPU target (16 groups of several waves, for lack of barriers).
# Rates are peak FLOP/s of the data sheets / 2 / multiprocessors / boost clock, of the chip that has all its tensor
# cores (GeForce cards of sm_86, sm_89 and sm_120 have half as much with float32 sums):
#   A100 312 T / 2 / 108 / 1.41 GHz = 1024 · A40 149.7 T / 2 / 84 / 1.74 GHz = 512 · L4 121 T / 2 / 58 / 2.04 GHz = 512
#   H100 SXM 989.4 T / 2 / 132 / 1.83 GHz = 2048 · B200 2.25 P / 2 / 148 / 1.86 GHz = 4096
#   RTX PRO 6000 503.8 T / 2 / 188 / 2.62 GHz = 512
CHIPS = {
    chip.architecture: chip
    for chip in (
        Chip("sm_80", 2048, 32, 164 << 10, 163 << 10, rate=1024),
        Chip("sm_86", 1536, 16, 100 << 10, 99 << 10, rate=512),
        Chip("sm_89", 1536, 24, 100 << 10, 99 << 10, rate=512),
        Chip("sm_90", 2048, 32, 228 << 10, 227 << 10, rate=2048),
        Chip("sm_100", 2048, 32, 228 << 10, 227 << 10, rate=4096),
        Chip("sm_120", 1536, 24, 100 << 10, 99 << 10, rate=512),
        Chip("gfx942", 2048, 16, 64 << 10, 64 << 10, registers=131072, reserved=0),
        Chip("gfx950", 2048, 16, 160 << 10, 160 << 10, registers=131072, reserved=0),
    )
}


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: bandwidth in GB/s, and dense TFLOP/s, accumulated in float32, of 16-bit operands and of
    TF32."""

    architecture: str
    bandwidth: float
    tflops: float
    tf32_tflops: float


GPUS = {
    "a100": Gpu("sm_80", 2039.0, 312.0, 156.0),
    "rtx4090": Gpu("sm_89", 1008.0, 165.2, 82.6),
    "l40s": Gpu("sm_89", 864.0, 362.0, 183.0),
    "h100": Gpu("sm_90", 3350.0, 989.0, 494.0),
    "h200": Gpu("sm_90", 4800.0, 989.0, 494.0),
    "b200": Gpu("sm_100", 8000.0, 2250.0, 1125.0),
    "mi300x": Gpu("gfx942", 5300.0, 1307.0, 654.0),
}
