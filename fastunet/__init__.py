"""fastunet: the U-Net people already use, made fast; verified against plain PyTorch (:mod:`fastunet.reference`)."""

from pathlib import Path

# An editable install is a folder of links (pyproject.toml), made once: the folder behind them also has newer modules.
__path__ = [str(Path(__file__).resolve().parent)]

import fastunet.versions as _versions  # refuses what is too old # noqa: F401
from fastunet import functional, losses, metrics, reference
from fastunet.accelerate import accelerate, restore
from fastunet.blocks import ConvSequence, DoubleConv
from fastunet.checkpoint import load_checkpoint, save_checkpoint
from fastunet.models import BrainUNet, PlainUNet, StridedUNet, UNet

# In a checkout kernels/ lies beside this folder instead of inside it; they are used even if another checkout is
# installed. Beside an installed wheel there may be Hugging Face's package `kernels`, which has no tiles.json.
if (Path(__path__[0]).parent / "kernels" / "tiles.json").is_file():
    __path__.append(str(Path(__path__[0]).parent))

__version__ = "0.1.0"

__all__ = [
    "BrainUNet",
    "ConvSequence",
    "DoubleConv",
    "PlainUNet",
    "StridedUNet",
    "UNet",
    "__version__",
    "accelerate",
    "functional",
    "load_checkpoint",
    "losses",
    "metrics",
    "reference",
    "restore",
    "save_checkpoint",
]
