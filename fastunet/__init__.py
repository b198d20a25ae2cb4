"""fastunet: the U-Net people already use, made fast; verified against plain PyTorch (:mod:`fastunet.reference`)."""

import importlib.util
from pathlib import Path

# An editable install is a folder of links (pyproject.toml): what they lead to has modules that came since, too.
__path__ = [str(Path(__file__).resolve().parent)]

from fastunet import functional, losses, metrics, reference
from fastunet.models import BrainUNet, PlainUNet, StridedUNet, UNet

# In a checkout that is not installed, kernels/ lies beside this folder instead of inside it.
if importlib.util.find_spec("fastunet.kernels") is None and (Path(__path__[0]).parent / "kernels").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

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
