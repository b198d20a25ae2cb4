"""fastunet: the U-Net people already use, made fast; verified against plain PyTorch (:mod:`fastunet.reference`)."""

from fastunet import functional, losses, metrics, reference
from fastunet.models import BrainUNet, PlainUNet, StridedUNet, UNet

__version__ = "0.1.0"

__all__ = [
    "BrainUNet",
    "PlainUNet",
    "StridedUNet",
    "UNet",
    "__version__",
    "functional",
    "losses",
    "metrics",
    "reference",
]
