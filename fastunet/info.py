"""``fastunet info``: versions, devices, and which backend each operation takes on them, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import warnings

import torch

import fastunet
from fastunet.backend import BACKENDS, resolve_backend, triton_unavailable
from fastunet.errors import UserError

OPERATIONS = (
    "conv2d",
    "conv2d_act",
    "conv_transpose2d",
    "max_pool2x2",
    "avg_pool2x2",
    "pad_replicate",
    "upsample_concat",
    "affine_act",
    "affine_prelu",
    "add_act",
    "bn_affine",
    "softmax_stats",
    "head_stats",
    "head_predict",
    "confusion_matrix",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    setting = os.environ.get("FASTUNET_BACKEND", "auto")
    if setting not in BACKENDS:
        raise UserError(f"FASTUNET_BACKEND is {setting!r}: set it to one of {', '.join(BACKENDS)}, or unset it")
    print(f"fastunet  {fastunet.__version__}\npython    {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "numpy"):
        print(f"{package:<9} {_version(package)}")
    print("\ndevices")
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    for device in devices:
        print(f"  {device!s:<8} {_describe(device)}")
    print(f"\nbackend of each operation (backend='auto', FASTUNET_BACKEND={setting})")
    for device in devices:
        _print_choices(device, setting)
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, threads: {torch.get_num_threads()}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )


def _print_choices(device: torch.device, setting: str) -> None:
    """One row per operation and one column per dtype, then the reasons."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    print(f"  {device!s:<19}" + " ".join(f"{name:<9}" for name in names).rstrip())
    choices = [_choose(device, dtype, setting) for dtype in DTYPES]
    for operation in OPERATIONS:
        print(f"    {operation:<17}" + " ".join(f"{choice:<9}" for choice, _ in choices).rstrip())
    reasons: dict[str, list[str]] = {}
    for name, (_, reason) in zip(names, choices, strict=True):
        reasons.setdefault(reason, []).append(name)
    for reason, dtypes in reasons.items():
        print(f"    {'all' if len(reasons) == 1 else ', '.join(dtypes)}: {reason}")


def _choose(device: torch.device, dtype: torch.dtype, setting: str) -> tuple[str, str]:
    """(backend, why) for tensors of ``dtype`` on ``device``; the backend is "none" where the setting cannot be met."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the reason is printed here
            backend = resolve_backend("auto", device, dtype)
    except ValueError as error:
        return "none", str(error)
    if setting != "auto":
        return backend, f"FASTUNET_BACKEND={setting}"
    if backend == "triton":
        return backend, "the Triton kernels run here"
    unavailable = triton_unavailable(device.type, device.index)
    if unavailable is not None:
        return backend, unavailable
    try:
        resolve_backend("triton", device, dtype)
    except ValueError as error:
        return backend, str(error).partition(": ")[2].partition("; ")[0]
    return backend, f"{str(dtype).removeprefix('torch.')} is served by torch on a GPU"
