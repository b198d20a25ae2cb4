"""Training steps whose kernels go through Triton's own launcher to a driver that checks and runs nothing.

Run by tests/test_launcher.py, with TRITON_LIBCUDA_PATH at the folder of that driver, in a process of its own. Kernels
are compiled as far as the launcher needs to know them, and tensors lie on the CPU, whose numbers nobody looks at.
"""

import json
import os
import re
import sys

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.runtime.jit import JITFunction

from fastunet import UNet, backend, ops
from fastunet.architecture import as_if_on
from fastunet.kernels import launching, replay


class Driver(driver.CudaDriver):  # type: ignore[misc]
    """Triton's, on a machine whose only device is an H100 that torch knows nothing of."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return 9, 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def shorter(backend=None, stages=None, options=None, language=None, capability=None):
    """Compile to Triton's own representation only, which says all that the launcher asks for."""
    if stages is None:
        return "shorter", "shorter"  # of the key in the cache

    def binary(source, metadata):
        for name in ("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"):
            metadata[name] = 0
        metadata |= {"global_scratch_align": 1, "profile_scratch_align": 1}
        metadata["name"] = re.search(r"tt\.func public @(\w+)", str(source))[1]
        return b"nothing"

    kept = {name: stages[name] for name in ("ttir", "ttgir")}
    stages.clear()
    stages.update(kept, cubin=binary)


def step(model, x):
    """What the driver was told, and which kernels Triton's own binding of arguments was asked for."""
    with open(os.environ["CHECKED"], "a+") as file:
        file.seek(0, os.SEEK_END)
        before, longer = file.tell(), len(LONGER)
        model(x).sum().backward()
        file.seek(before)
        return file.read().splitlines(), LONGER[longer:]


LONGER: list[str] = []
run = JITFunction.run


def longer(kernel, *args, **options):
    LONGER.append(kernel.__name__)
    return run(kernel, *args, **options)


def down_and_up(x):
    """What UNet has not: 3×3 convolutions of stride 2, plain and transposed."""
    down, up = (torch.zeros(shape, requires_grad=True) for shape in ((32, 16, 3, 3), (32, 16, 3, 3)))
    affine = torch.zeros(3, x.shape[1], dtype=torch.float32)
    settings = (2, x.shape[2:], [0] * 4, [False] * 2, True, False, False, None)
    y, *_ = ops.conv2d(x, affine, True, None, None, False, down, None, *settings, "auto")
    z, *_ = ops.conv_transpose2d(y, torch.zeros(3, 32, dtype=torch.float32), True, up, None, True, "auto")
    return z


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    knobs.runtime.add_stages_inspection_hook = shorter
    JITFunction.run = longer
    backend.triton_unavailable = lambda *device: None
    torch.set_default_dtype(torch.bfloat16)
    form = torch.channels_last
    network = UNet(3, 2, base_c=16).to(memory_format=form)
    x = torch.zeros(2, 3, 64, 64).contiguous(memory_format=form)
    features = torch.zeros(2, 16, 32, 32, requires_grad=True)
    with as_if_on("sm_90"):
        found = {
            "UNet": [step(network, x) for _ in range(4)],
            "strided": [step(down_and_up, features) for _ in range(4)],
        }
    found["replayed"] = len([known for known in replay._known.values() if type(known) is replay.Recording])
    found["unfit"] = list(replay._known.values()).count(replay._UNFIT)
    found["dynamo"] = "torch._dynamo" in sys.modules
    found["short"] = all(remembered.call is not None for remembered in launching._compiled.values())
    hooked: list[str] = []
    knobs.runtime.launch_enter_hook.add(lambda about: hooked.append(about.get()["name"]))
    told, _ = step(down_and_up, features)
    found["hooked"] = hooked, [line.split()[1] for line in told if line.startswith("launch")]
    knobs.runtime.launch_enter_hook.calls.clear()
    replay.forget()
    for about in launching._described.values():
        about["strides"][0] += 4  # 8 bytes more than there are
    try:
        step(network, x)
    except RuntimeError as error:
        found["refused"] = str(error)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
