"""What is where: a second task for the encoder, from which it learns to see long before it learns to answer.

Each cell of the encoder's grid says whether an object's centre lies in it, and if so its shape, color,
texture, size and what is printed on it.  The head is thrown away after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.evaluation.scenes import COLORS, SHAPES, TEXTURES, WORDS, Scene, SceneObject

SIZES = ("small", "large")
NOTHING = 10  # the class of "no digit here"; digits are 0 … 9
CLASSES = (len(SHAPES), len(COLORS), len(TEXTURES), len(SIZES), len(WORDS) + 1, NOTHING + 1, NOTHING + 1)


class FactsHead(nn.Module):
    """Loss of reading every object's facts off the encoder's grid of features (B, G·G, F)."""

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        self.presence = nn.Linear(feature_size, 1)
        self.facts = nn.Linear(feature_size, sum(CLASSES))

    def forward(self, features: Tensor, scenes: Sequence[Scene]) -> Tensor:
        grid = round(features.shape[1] ** 0.5)
        batch, cell, facts = labels(scenes, grid)
        present = torch.zeros(features.shape[:2])
        present[batch, cell] = 1.0
        found = F.binary_cross_entropy_with_logits(self.presence(features).float().squeeze(-1), present)
        guesses = self.facts(features[batch, cell]).float().split(CLASSES, dim=-1)
        read = sum((F.cross_entropy(guess, facts[:, i]) for i, guess in enumerate(guesses)), torch.zeros(()))
        return 4 * found + read / len(CLASSES)


def labels(scenes: Sequence[Scene], grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scene number, grid cell and facts of every object."""
    rows = [(number, _cell(item, grid), *_facts(item)) for number, scene in enumerate(scenes) for item in scene.objects]
    table = torch.tensor(rows)
    return table[:, 0], table[:, 1], table[:, 2:]


def _cell(item: SceneObject, grid: int) -> int:
    x0, y0, x1, y1 = item.box
    column, row = int((x0 + x1) / 2 * grid), int((y0 + y1) / 2 * grid)
    return min(row, grid - 1) * grid + min(column, grid - 1)


def _facts(item: SceneObject) -> tuple[int, ...]:
    digits = [int(character) for character in item.text] if item.text.isdigit() else []
    first, second = (*digits, NOTHING, NOTHING)[:2]
    word = WORDS.index(item.text) + 1 if item.text in WORDS else 0
    return (
        SHAPES.index(item.shape),
        COLORS.index(item.color),
        TEXTURES.index(item.texture),
        SIZES.index(item.size),
        word,
        first,
        second,
    )
