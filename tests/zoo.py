"""What ``fastunet.accelerate`` does to well-known models in training: the table of the README.

    python tests/zoo.py              every model whose package is installed (pip install 'fastunet[zoo]')
    python tests/zoo.py nnU-Net      those whose name holds one of these words

FLOPs and bytes fused are the report's, of a forward at 128×192. What is kept for the backward, as part of what plain
PyTorch keeps, is counted by hooks for saved tensors at 64×64, on the torch backend under policy "memory", which keeps
those activations that the kernels keep.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from test_accelerate import Jvanvugt, LeeJunHyun, monai
from torch import Tensor, nn

import fastunet
from fastunet import reference


def nnunet(name: str, **blocks: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from dynamic_network_architectures.architectures import unet

        model: nn.Module = getattr(unet, name)(
            input_channels=3, n_stages=6, features_per_stage=[32, 64, 128, 256, 512, 512], conv_op=nn.Conv2d,
            kernel_sizes=[3] * 6, strides=[1] + [2] * 5, num_classes=2, conv_bias=True, norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
            deep_supervision=True, **blocks,
        )  # fmt: skip
        return model

    return make


def smp() -> nn.Module:
    import segmentation_models_pytorch

    model: nn.Module = segmentation_models_pytorch.Unet("resnet34", encoder_weights=None, classes=2)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "milesial/Pytorch-UNet, transposed": lambda: reference.UNet(3, 2),
    "milesial/Pytorch-UNet, bilinear": lambda: reference.UNet(3, 2, True),
    "mateuszbuda/brain-segmentation-pytorch": reference.BrainUNet,
    "LeeJunHyun's U_Net": lambda: LeeJunHyun(3, 2, 64),
    "jvanvugt/pytorch-unet, padded": lambda: Jvanvugt(3, 2, 64),
    "MONAI BasicUNet": monai("BasicUNet", 2, 3, 2),
    "MONAI UNet": monai("UNet", 2, 3, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2),
    "MONAI DynUNet, 2-D": monai(
        "DynUNet", 2, 3, 2, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=[32, 64, 128, 256, 512]
    ),
    "nnU-Net PlainConvUNet, 2-D": nnunet("PlainConvUNet", n_conv_per_stage=[2] * 6, n_conv_per_stage_decoder=[2] * 5),
    "nnU-Net ResidualEncoderUNet, 2-D": nnunet(
        "ResidualEncoderUNet", n_blocks_per_stage=[1, 3, 4, 6, 6, 6], n_conv_per_stage_decoder=[1] * 5
    ),
    "SMP Unet, ResNet-34": smp,
}  # fmt: skip


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        alive = model(x)  # its graph, so that no memory is used twice
    del alive
    return sum(found.values())


def main(words: list[str]) -> None:
    print("| model | FLOPs fused | bytes fused | kept for the backward |\n|---|---|---|---|")
    for name, make in MODELS.items():
        if words and not any(word in name for word in words):
            continue
        try:
            plain = make()
        except ImportError as error:
            print(f"| {name} | cannot be imported: {error} |")
            continue
        ours = fastunet.accelerate(copy.deepcopy(plain), backend="torch", policy="memory")
        report = ours.fastunet_report()  # type: ignore[operator]
        flops, size = (100 * report.share("training", of) for of in ("flops", "bytes"))
        x = torch.randn(2, 3, 64, 64)
        print(f"| {name} | {flops:.1f} % | {size:.1f} % | {kept(ours, x) / kept(plain, x):.2f} × |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
