"""Drawings of cells, as under a microscope: what the demo learns where no pictures are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _blur(image: Array, radius: float) -> Array:
    """Gaussian blur with deviation ``radius`` pixels, periodic."""
    rows, columns = np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])
    transfer = np.exp(-2 * (np.pi * radius) ** 2 * (rows**2 + columns**2))
    return np.fft.irfft2(np.fft.rfft2(image) * transfer, image.shape)


def _noise(rng: np.random.Generator, size: int, radius: float) -> Array:
    """A smooth random field (size, size) with mean 0, deviation 1 and details of ``radius`` pixels."""
    field = _blur(rng.standard_normal((size, size)), radius)
    unit: Array = (field - field.mean()) / field.std()
    return unit


def draw_cells(rng: np.random.Generator, size: int) -> tuple[Array, npt.NDArray[np.uint8]]:
    """One picture: grey values 0 … 255 and labels, both (size, size)."""
    pitch = 46.0
    lattice = np.arange(-pitch, size + 2 * pitch, pitch)
    centres = np.stack(np.meshgrid(lattice, lattice, indexing="ij"), -1).reshape(-1, 2)
    centres = centres + rng.uniform(-0.42, 0.42, centres.shape) * pitch
    centres = centres[rng.random(len(centres)) > 0.15]
    weight = rng.uniform(0, 9, len(centres))

    # Cells are the regions nearest to a centre, in space bent by smooth fields; membranes run where two are as near.
    rows, columns = np.mgrid[:size, :size] + np.stack([7 * _noise(rng, size, 14), 7 * _noise(rng, size, 14)])
    nearest, second = np.full((2, size, size), np.inf)
    owner = np.zeros((size, size), np.intp)
    for index, (row, column) in enumerate(centres):
        distance = np.hypot(rows - row, columns - column) - weight[index]
        owner = np.where(distance < nearest, index, owner)
        second = np.minimum(second, np.maximum(distance, nearest))
        nearest = np.minimum(nearest, distance)
    gap = second - nearest
    membrane = gap < 4.2 + 1.1 * _noise(rng, size, 20)

    # A nucleus sits near the centre of most cells.
    radius = np.where(rng.random(len(centres)) < 0.75, rng.uniform(8, 13, len(centres)), 0.0)
    middle = centres + rng.uniform(-5, 5, centres.shape)
    stretch = rng.uniform(0.8, 1.25, len(centres))
    from_middle = np.hypot((rows - middle[owner, 0]) * stretch[owner], (columns - middle[owner, 1]) / stretch[owner])
    depth = np.where(radius[owner] > 0, radius[owner] - from_middle, -99.0)
    depth = np.minimum(depth, (gap - 13) / 2)  # the envelope keeps clear of the membrane
    nucleus = (depth > 0) & ~membrane

    grey = 0.70 + 0.06 * rng.standard_normal(len(centres))[owner] + 0.05 * _noise(rng, size, 1.6)
    vesicle = _noise(rng, size, 2.2) > 2.15
    grey = np.where(vesicle, 0.34, grey)
    grey = np.where(nucleus, 0.60 + 0.09 * _noise(rng, size, 2.5), grey)
    grey = np.where(np.abs(depth) < 1.1, 0.36, grey)
    grey = np.where(membrane, 0.30 + 0.06 * _noise(rng, size, 3.0), grey)
    light = 1.0 + 0.13 * _noise(rng, size, size / 6)
    grey = _blur(grey, 0.9) * light + 0.065 * rng.standard_normal((size, size))
    labels = np.where(membrane, 0, np.where(nucleus, 2, 1)).astype(np.uint8)
    return np.clip(255 * grey, 0, 255).round(), labels
