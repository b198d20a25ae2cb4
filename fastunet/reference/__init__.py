"""fastunet in plain PyTorch: the definition of every operation (:mod:`.functional`) and architecture (:mod:`.models`).

Nothing here is fused or lazy, and nothing here uses the rest of fastunet. In float64 it is the truth of every test.
"""

from fastunet.reference import functional
from fastunet.reference.models import (
    KEY_LAYOUTS,
    BrainUNet,
    DoubleConv,
    Down,
    OutConv,
    PlainUNet,
    StridedDown,
    StridedUNet,
    StridedUp,
    UNet,
    UNet001,
    Up,
    rename_keys,
)

__all__ = [
    "KEY_LAYOUTS",
    "BrainUNet",
    "DoubleConv",
    "Down",
    "OutConv",
    "PlainUNet",
    "StridedDown",
    "StridedUNet",
    "StridedUp",
    "UNet",
    "UNet001",
    "Up",
    "functional",
    "rename_keys",
]
