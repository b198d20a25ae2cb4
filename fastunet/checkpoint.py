"""Checkpoints of U-Nets: of which network the weights are, loading without executing, saving whole or not at all."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fastunet import models
from fastunet.blocks import NORMS
from fastunet.checks import misfit, said
from fastunet.errors import UserError
from fastunet.files import written_whole
from fastunet.reference import rename_keys

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts of keys
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "weights")  # what holds the weights, often
_BESIDE = ("mask_values", "n_averaged")  # entries of a state_dict that are no weights: milesial's, AveragedModel's


class CheckpointError(UserError):
    """The file is no checkpoint that can be used; the message is one sentence with the file and what to do."""


@dataclass(frozen=True)
class Architecture:
    """A network's class, and the arguments with which it was constructed."""

    kind: str
    channels: int
    classes: int
    width: int
    bilinear: bool = False
    conv_bias: bool = False
    norm: str | None = "batch"
    negative_slope: float = 0.0
    upsample: str | None = None

    def _options(self) -> dict[str, Any]:
        width, usual = ("base_c", 64) if self.kind in ("UNet", "StridedUNet") else ("init_features", 32)
        options = (
            (width, self.width, usual), ("bilinear", self.bilinear, False), ("conv_bias", self.conv_bias, False),
            ("norm", self.norm, "batch"), ("negative_slope", self.negative_slope, 0), ("upsample", self.upsample, None),
        )  # fmt: skip
        return {name: value for name, value, default in options if value != default}

    def __str__(self) -> str:
        """The call that constructs it: ``UNet(3, 2, bilinear=True, conv_bias=True)``."""
        options = "".join(f", {name}={value!r}" for name, value in self._options().items())
        return f"{self.kind}({self.channels}, {self.classes}{options})"

    def mode(self) -> str:
        """What its kind leaves open, in words."""
        if self.kind != "UNet":
            return f"a {self.kind}"
        extra = [f"{self.norm or 'no'} norms"] * (self.norm != "batch") + ["conv biases"] * self.conv_bias
        up = self.upsample or ("bilinear" if self.bilinear else "transposed")
        return " with ".join([up, " and ".join(extra)] if extra else [up])

    def told(self, hidden: Mapping[str, Any]) -> Architecture:
        """The same with the arguments that shapes do not tell."""
        return replace(self, **hidden, bilinear=self.bilinear and "upsample" not in hidden)

    def build(self, **settings: Any) -> nn.Module:
        """The network, with ``settings`` (backend, policy) of its constructor."""
        network: nn.Module = getattr(models, self.kind)(self.channels, self.classes, **self._options(), **settings)
        return network


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: the weights, under the key names of the network, on the CPU, in the file's dtypes.
        architecture: the network that they are of.
        mask_values: the values of the masks, in the order of the classes, where the file tells them (milesial's version
            4, and :func:`save_checkpoint`), else None.
        rest: whatever else is in the file: an epoch, an optimizer's state.
    """

    state: dict[str, Tensor]
    architecture: Architecture
    mask_values: list[Any] | None = None
    rest: dict[str, Any] = field(default_factory=dict)


def load_checkpoint(path: str | Path, *, backend: str = "auto", policy: str = "speed") -> nn.Module:
    """The network whose weights are in ``path``, in eval mode on the CPU; its architecture is read off the shapes.

    Known are the checkpoints of milesial/Pytorch-UNet, versions 1 to 4 (bilinear or transposed, with biases in the
    convolutions or without, with ``mask_values``, which become an attribute), of mateuszbuda's brain segmentation, of
    :class:`~fastunet.StridedUNet` and :class:`~fastunet.PlainUNet`, and what :func:`save_checkpoint` wrote; as a
    state_dict or as an entry of a dict; saved from DDP, FSDP2 or a compiled network; 16-bit weights, which become
    float32; and safetensors, with ``pip install 'fastunet[safetensors]'``.

    Args:
        path: the file. It is read with ``weights_only=True``: nothing of it is executed.
        backend, policy: as in :class:`~fastunet.UNet`.

    Raises:
        CheckpointError: the file cannot be read, wants to be executed, or holds another network; one sentence.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.architecture.norm == _EITHER:
        raise CheckpointError(
            f"{path} is of a UNet with instance or with group norms, and does not tell which: construct the network "
            "yourself and call its load_state_dict"
        )
    with torch.device("meta"):  # no memory, and no random numbers, for weights that are replaced
        model = checkpoint.architecture.build(backend=backend, policy=policy)
    state = {name: _widened(x) for name, x in checkpoint.state.items()}
    wrong = misfit(model, state, strict=True)
    if wrong is not None:
        what = wrong.partition(", got one ")[2].partition("; ")[0] or "with other keys"
        raise CheckpointError(
            f"{path} looks like {checkpoint.architecture}, but {what}: construct the network yourself and call its "
            "load_state_dict"
        )
    model.load_state_dict(state, assign=True)
    if checkpoint.mask_values is not None:
        model.mask_values = checkpoint.mask_values  # type: ignore[assignment]
    return model.eval()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What is in ``path``, and of which network; see :func:`load_checkpoint` for the kinds and the errors."""
    path = Path(path)
    content = _read(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {said(content)}, not a state_dict: save model.state_dict()")
    weights, rest = _weights_in(content, path)
    beside = {name: weights[name] for name in _BESIDE if name in weights}
    state = _plainly_named({name: x for name, x in weights.items() if name not in beside})
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise CheckpointError(f"{path} holds {said(x)} as {name}, not a tensor: save model.state_dict()")
        # A view may claim more than is there: (2²⁰, 2²⁰) of one number.
        if x.layout is not torch.strided or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path} holds {name} as a tensor {tuple(x.shape)} that is not stored whole: save model.state_dict()"
            )
    architecture = recognise(state)
    if architecture is None:
        first = ", ".join(map(said, list(state)[:2])) or "no keys"
        raise CheckpointError(
            f"{path} holds no U-Net that is known here, its keys begin with {first}: construct the network yourself "
            "and call its load_state_dict"
        )
    values = beside.get("mask_values", rest.pop("mask_values", None))
    if isinstance(rest.get("architecture"), Mapping) and rest["architecture"].keys() <= _HIDDEN.keys():
        hidden = rest.pop("architecture")
        slope = hidden.get("negative_slope", 0.0)
        others = all(value in _HIDDEN[name] for name, value in hidden.items() if name != "negative_slope")
        if not (others and isinstance(slope, float) and math.isfinite(slope)):
            raise CheckpointError(f"{path} tells of a network {said(hidden)}, which is none: construct it yourself")
        architecture = architecture.told(hidden)
    return Checkpoint(_milesial(state), architecture, None if values is None else list(values), rest)


def save_checkpoint(path: str | Path, model: nn.Module, *, mask_values: Any = None, **rest: Any) -> None:
    """Write the weights of ``model`` to ``path``, whole or not at all; :func:`load_checkpoint` reads them.

    Without ``rest`` the file is a state_dict, with ``mask_values`` among its entries, as milesial/Pytorch-UNet saves
    and loads it; with ``rest`` (an epoch, an optimizer's state_dict) a dict of ``state_dict``, ``mask_values`` and
    those; what shapes do not tell of a :class:`~fastunet.UNet` (``norm``, ``negative_slope``, ``upsample="nearest"``)
    is an entry ``architecture``. A path that ends in .safetensors gets that format, which holds tensors only.

    Args:
        path: the file; one of that name is replaced.
        model: a network, also inside DDP or torch.compile: the keys are those of the network itself.
        mask_values: the values in the masks, in the order of the classes.
        rest: whatever ``torch.load(weights_only=True)`` can read back.

    Raises:
        UserError: the file cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    state: dict[str, Any] = _plainly_named(model.state_dict())
    hidden = _hidden(model)
    if path.suffix == ".safetensors":
        if rest:
            raise UserError(f"{path} can hold tensors only, not {said(next(iter(rest)))}: take a name with .pth")
        save = _safetensors(path, "save")
        told = {"mask_values": json.dumps(mask_values), "architecture": json.dumps(hidden)}
        whole = {name: x.detach().cpu().contiguous().clone() for name, x in state.items()}

        def write(file: BinaryIO) -> None:
            file.write(save(whole, metadata={"format": "pt", **told}))
    else:
        beside = {} if mask_values is None else {"mask_values": mask_values}
        rest = {**rest, "architecture": hidden} if hidden else rest
        content = {"state_dict": state, **beside, **rest} if rest else {**state, **beside}

        def write(file: BinaryIO) -> None:
            torch.save(content, file)

    try:
        with written_whole(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer tells of a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the disk may be full"
        raise UserError(f"{path} cannot be written ({reason}): choose another place for the checkpoint") from error


# ---- recognition -------------------------------------------------------------------------------------------------


def recognise(state: Mapping[str, Any]) -> Architecture | None:
    """The network that a state_dict, with plain keys, is of; None if it is none of these."""
    state = _milesial(state)

    def shape(name: str) -> tuple[int, ...]:
        x = state.get(name)
        return tuple(x.shape) if isinstance(x, Tensor) and x.dim() == 4 else (0, 0, 0, 0)

    for kind, (first, last) in _ENDS.items():
        if 0 in (*shape(first), *shape(last)):
            continue
        sizes = shape(first)[1], shape(last)[0], shape(first)[0]
        if kind != "UNet":
            return Architecture(kind, *sizes)
        bilinear, bias = "up1.up.weight" not in state, "inc.double_conv.0.bias" in state
        if "inc.double_conv.1.weight" not in state:
            return Architecture(kind, *sizes, bilinear=bilinear, norm=None)
        norm = "batch" if "inc.double_conv.1.running_mean" in state else _EITHER
        return Architecture(kind, *sizes, bilinear=bilinear, conv_bias=bias, norm=norm)
    return None


# The weights of the first and of the last convolution of each kind.
_ENDS = {
    "UNet": ("inc.double_conv.0.weight", "outc.conv.weight"),
    "StridedUNet": ("d1.Conv_BN_ReLU_2.0.weight", "o.6.weight"),
    "PlainUNet": ("encoder1.0.weight", "output.weight"),
    "BrainUNet": ("encoder1.enc1conv1.weight", "conv.weight"),
}


_EITHER = "instance or group"  # whose keys and shapes are the same
_HIDDEN: dict[str, tuple[str | None, ...]] = {"norm": NORMS, "negative_slope": (), "upsample": ("nearest",)}


def _hidden(model: nn.Module) -> dict[str, Any]:
    """The arguments of a UNet, also inside a wrapper, that its keys and shapes do not tell."""
    unet = next((module for module in model.modules() if isinstance(module, models.UNet)), None)
    block, up = (getattr(getattr(unet, part, None), name, ()) for part, name in (("inc", "double_conv"), ("up1", "up")))
    _, norm, act, *_ = [*block, None, None, None] if isinstance(block, nn.Sequential) else [None] * 3
    named = {nn.InstanceNorm2d: "instance", nn.GroupNorm: "group"}
    found: dict[str, Any] = {"norm": named[type(norm)]} if type(norm) in named else {}
    if isinstance(act, nn.LeakyReLU):
        found["negative_slope"] = float(act.negative_slope)
    if isinstance(up, nn.Upsample) and up.mode == "nearest":
        found["upsample"] = "nearest"
    return found


def other_mode(model: nn.Module, state_dict: Any) -> str | None:
    """A sentence, if ``state_dict`` is of a known network that is constructed otherwise than ``model``; else None."""
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        return None
    own, given = recognise(model.state_dict()), recognise(state_dict)
    if own is None or given is None or own == given:
        return None
    mine = own.told(_hidden(model))
    return f"expected the state_dict of {mine}, got that of another network; this checkpoint is {given.mode()}: {given}"


def _milesial(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same under milesial's names, if it has another's names of that network."""
    return rename_keys(state, "milesial") if "conv1.double_conv.0.weight" in state else dict(state)


def _plainly_named(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what DDP, FSDP and torch.compile put into keys, and without what a wrapper puts before all."""
    names = {name: ".".join(part for part in str(name).split(".") if part not in _WRAPPERS) for name in state}
    for first, _ in (*_ENDS.values(), ("conv1.double_conv.0.weight", "")):
        for name in names.values():
            prefix = name.removesuffix(first)
            if prefix != name and prefix.endswith(".") and all(n.startswith(prefix) for n in names.values()):
                return {plain.removeprefix(prefix): state[old] for old, plain in names.items()}
    return {plain: state[old] for old, plain in names.items()}


def _weights_in(content: Mapping[str, Any], path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """(the entry of ``content`` that is a state_dict, or itself; the other entries)."""
    if sum(isinstance(x, Tensor) for x in content.values()) > 1:
        return content, {}
    nested = {
        name: x
        for name, x in content.items()
        if isinstance(x, Mapping) and x and sum(isinstance(y, Tensor) for y in x.values()) > len(x) // 2
    }
    name = next((name for name in (*_ENTRIES, *nested) if name in nested), None)
    if name is None or (name not in _ENTRIES and len(nested) > 1):
        found = ", ".join(map(said, list(nested or content)[:5])) or "nothing"
        which = "several state_dicts" if nested else "no state_dict"
        raise CheckpointError(f"{path} holds {which} ({found}): save model.state_dict()")
    return nested[name], {other: x for other, x in content.items() if other != name}


def _widened(x: Tensor) -> Tensor:
    """A copy of its own, float32 if it was of 16 bits: every such number is one of float32."""
    dtype = torch.float32 if x.is_floating_point() and x.element_size() < 4 else x.dtype
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


# ---- files -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The content of the file; nothing of it is executed, and no more is read than the file holds."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): give a checkpoint") from error
    try:
        if path.suffix == ".safetensors" or (start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 27):
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > os.path.getsize(path):  # PyTorch stores; what is compressed may be a bomb
                raise CheckpointError(f"{path} unpacks to {unpacked:,} bytes: save it again with torch.save")
        elif not start.startswith(b"\x80\x02"):  # as torch.save began before it made archives
            raise ValueError("neither")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's own text says how to execute it.
        raise CheckpointError(
            f"cannot read {path} (wants to run code, or is damaged): save model.state_dict() with torch.save"
        ) from error
    except Exception as error:  # readers of damaged files raise whatever they stumble on
        raise CheckpointError(f"cannot read {path} (damaged, or not a checkpoint): replace it") from error


def _safetensors(path: Path, function: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(f"{path} is of the format safetensors: pip install 'fastunet[safetensors]'") from error
    return getattr(safetensors.torch, function)


def _read_safetensors(path: Path) -> dict[str, Any]:
    load = _safetensors(path, "safe_open")
    with load(path, framework="pt", device="cpu") as file:
        content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = file.metadata() or {}
    told = {name: json.loads(metadata[name]) for name in ("mask_values", "architecture") if name in metadata}
    return {"state_dict": content, **{name: value for name, value in told.items() if value}}
