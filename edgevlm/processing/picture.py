"""A picture, or the frames of a video, as the vision encoder reads it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from edgevlm.processing.resample import Float

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Picture:
    """The views ``pixel_values`` [S, 3, H, W] of one picture, in the order in which they are encoded.

    ``grid`` counts the rows and columns of its tiles, (1, 1) for a picture that is not cut and (F, 1) for a
    video of F frames.  Pictures with equal pixels and grids have the same ``key``.
    """

    pixel_values: Float
    grid: Grid
    key: str

    @classmethod
    def of(cls, pixel_values: Float, grid: Grid = (1, 1)) -> Picture:
        """Name the pixels by their hash (about half a millisecond per million bytes)."""
        digest = hashlib.sha256(np.ascontiguousarray(pixel_values).data)
        digest.update(repr((pixel_values.shape, grid)).encode())
        return cls(pixel_values, grid, digest.hexdigest())
