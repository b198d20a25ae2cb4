"""The parts of :class:`~fastunet.UNet` under the module name that users of milesial/Pytorch-UNet import them from."""

from fastunet.blocks import DoubleConv, Down, OutConv, Up

__all__ = ["DoubleConv", "Down", "OutConv", "Up"]
