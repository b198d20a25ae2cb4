"""nnU-Net without a fork: its own networks, run by fastunet's operators, in 2-D.

There are two doors, of which one is enough:

- A trainer. nnU-Net looks for trainers in the folders that the environment variable ``nnUNet_extTrainer`` names. A file
  there that says ``from fastunet.nnunet import nnUNetTrainerFastunet`` serves ``-tr nnUNetTrainerFastunet``.
- The plans. Where they name ``fastunet.nnunet.PlainConvUNet`` as ``network_class_name``, every trainer and every
  prediction takes that network. Where fastunet is not installed, nnU-Net finds its own of the same name.

Losses, optimiser, augmentation and checkpoints are nnU-Net's: :func:`fastunet.accelerate` leaves parameters and names.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastunet.accelerate import accelerate

try:
    from dynamic_network_architectures.architectures import unet
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError as error:
    raise ImportError(
        f"expected nnU-Net's packages beside fastunet.nnunet, got none that can be imported ({error}); "
        "pip install 'fastunet[nnunet]'"
    ) from error


class Accelerated:
    """What makes a trainer of nnU-Net fast: ``class MyTrainer(Accelerated, nnUNetTrainer_250epochs): pass``.

    Raises (when the network is built):
        ValueError: the configuration is 3-D, or its network has nothing that fastunet can run.
    """

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of the trainer behind, accelerated. nnU-Net looks at these names to know what to pass."""
        network: nn.Module = super().build_network_architecture(  # type: ignore[misc]
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return accelerate(network)

    def _do_i_compile(self) -> bool:
        """No, whatever ``nnUNet_compile`` says: what torch.compile takes is the network's own forward."""
        return False


class nnUNetTrainerFastunet(Accelerated, nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's default trainer, with its network accelerated."""


def PlainConvUNet(*args: Any, **kwargs: Any) -> nn.Module:
    """nnU-Net's network of that name, accelerated; errors as of :func:`fastunet.accelerate`."""
    network: nn.Module = unet.PlainConvUNet(*args, **kwargs)
    return accelerate(network)


def ResidualEncoderUNet(*args: Any, **kwargs: Any) -> nn.Module:
    """nnU-Net's network of that name, accelerated; errors as of :func:`fastunet.accelerate`."""
    network: nn.Module = unet.ResidualEncoderUNet(*args, **kwargs)
    return accelerate(network)
