"""Fixed positions of a square grid: sines and cosines of column and row.

The order is that of masked autoencoders (He et al. 2021, arXiv:2111.06377): the first half of the channels tells the
column, the second half the row, and each half is all of its sines, then all of its cosines.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from edgevlm.core.errors import ConfigError


def sine_grid(side: int, width: int) -> Tensor:
    """The table ``(side², width)`` of the points of a grid, row by row.  Raises ConfigError unless 4 divides width."""
    if width % 4:
        raise ConfigError(f"positions of a grid need a width that 4 divides, got {width}")
    steps = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.cat((_waves(columns.flatten(), width // 2), _waves(rows.flatten(), width // 2)), dim=1).float()


def resized_grid(table: Tensor, side: int) -> Tensor:
    """``table`` (C², width) stretched bicubically to ``(side², width)``, in float32; itself where it fits already."""
    old = math.isqrt(table.shape[0])
    if old == side:
        return table
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grown = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grown.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)


def _waves(positions: Tensor, width: int) -> Tensor:
    """``[sin(p·ω), cos(p·ω)]`` with ``ω_i = 10000^(−2i / width)``: ``(P,) -> (P, width)``."""
    half = width // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.unsqueeze(1) * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)
