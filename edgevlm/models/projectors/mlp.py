"""Projectors: a token reducer, then Linear - GELU - Linear.

Source: LLaVA-1.5, Liu et al. 2023, arXiv:2310.03744, section 3.2 (the MLP).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.config import MlpConfig, PoolConfig, UnshuffleConfig, VlmConfig


def make_projector(config: VlmConfig) -> nn.Sequential:
    """``(B, H·W, features)`` to ``(B, N, D)``."""
    projector = config.projector
    assert isinstance(projector, (MlpConfig, UnshuffleConfig, PoolConfig))
    features, width = config.vision.feature_size, config.decoder.hidden_size
    reducer: nn.Module = nn.Identity()
    if isinstance(projector, UnshuffleConfig):
        reducer, features = SpaceToDepth(projector.factor), features * projector.factor**2
    elif isinstance(projector, PoolConfig):
        reducer = AveragePool(projector.factor)
    last: list[nn.Module] = []
    if isinstance(projector, MlpConfig) and projector.final_gelu:
        last.append(nn.GELU())
    if isinstance(projector, MlpConfig) and projector.end_row:
        last.append(EndRow(width))
    if projector.num_layers == 1:
        return nn.Sequential(reducer, nn.Linear(features, width, bias=projector.bias), *last)
    inner = projector.hidden_size or width
    first, second = nn.Linear(features, inner, bias=projector.bias), nn.Linear(inner, width, bias=projector.bias)
    return nn.Sequential(reducer, first, nn.GELU(), second, *last)


class SpaceToDepth(nn.Module):
    """Trade tokens for channels: ``(B, N, D) -> (B, N / f², D · f²)``.

    A permutation, so no value is lost.  ``N`` must be a square whose side ``f`` divides.

    Source: Shi et al. 2016, arXiv:1609.05158 (there in the inverse direction).
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, tokens: Tensor) -> Tensor:
        f = self.factor
        B, N, D = tokens.shape
        side = grid_side(N, f)
        grid = tokens.view(B, side // f, f, side // f, f, D)
        return grid.permute(0, 1, 3, 2, 4, 5).reshape(B, N // f**2, D * f**2)


class EndRow(nn.Module):
    """Put one learned row behind the others: ``(B, N, D) -> (B, N + 1, D)``.

    Source: LLaVA-NeXT's notes of January 2024, where it ends a picture's line of tiles.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat((tokens, self.row.expand(len(tokens), 1, -1)), dim=1)


class AveragePool(nn.Module):
    """Average every ``f`` x ``f`` square of tokens: ``(B, N, D) -> (B, N / f², D)``."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, tokens: Tensor) -> Tensor:
        B, N, D = tokens.shape
        side = grid_side(N, self.factor)
        grid = tokens.transpose(1, 2).reshape(B, D, side, side)
        return F.avg_pool2d(grid, self.factor).flatten(2).transpose(1, 2)


def grid_side(num_tokens: int, factor: int) -> int:
    """Side of the square that ``num_tokens`` fill; ConfigError when ``factor`` does not divide it."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens or side % factor:
        raise ConfigError(f"{num_tokens} vision tokens are not a square grid divisible by {factor}")
    return side
