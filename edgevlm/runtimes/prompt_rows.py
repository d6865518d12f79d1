"""What every row of a kv cache stands for, so that two prompts can share their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from edgevlm.core.errors import EdgeVLMError
from edgevlm.runtimes.image_cache import Picture
from edgevlm.runtimes.session import Float, Ints

Row: TypeAlias = int | tuple[str, int]  # a token id, or the n-th vision token of the picture with this key


@dataclass(frozen=True, eq=False)
class PromptRows:
    """A prompt ready for the decoder: its ids ``[T]``, and where the vision tokens of its pictures go.

    Raises EdgeVLMError when places and pictures do not match.
    """

    ids: Ints
    positions: Ints
    pictures: tuple[Picture, ...]

    def __post_init__(self) -> None:
        places, pictures = len(self.positions), len(self.pictures)
        if bool(places) != bool(pictures) or places % max(1, pictures):
            raise EdgeVLMError(
                f"the prompt has {places} places for the vision tokens of {pictures} images: "
                "the bundle's chat template must name every image once"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_picture(self) -> int:
        """N, 0 without pictures."""
        return len(self.positions) // max(1, len(self.pictures))

    def text_ids(self) -> list[int]:
        """The ids that are text."""
        return [int(token) for token in np.delete(self.ids, self.positions)]

    def rows(self) -> list[Row]:
        """One entry per row; two prompts with equal entries put equal rows into a kv cache."""
        rows: list[Row] = [int(token) for token in self.ids]
        for index, position in enumerate(self.positions):
            picture, token = divmod(index, self.tokens_per_picture)
            rows[position] = (self.pictures[picture].key, token)
        return rows

    def pictures_after(self, start: int) -> tuple[Picture, ...]:
        """The pictures with vision tokens at or after row ``start``."""
        num_before = int(np.searchsorted(self.positions, start))
        return self.pictures[num_before // max(1, self.tokens_per_picture) :]

    def place(self, features: Sequence[Float], embeds: Float, start: int) -> None:
        """Overwrite the image rows of ``embeds`` ``[1, T - start, D]``.

        ``features`` are those of ``pictures_after(start)``, each ``[1, N, D]``.  Raises EdgeVLMError when an
        image has another number of vision tokens than the prompt has places.
        """
        for found in {one.shape[1] for one in features} - {self.tokens_per_picture}:
            raise EdgeVLMError(
                f"the vision encoder returned {found} vision tokens for {self.tokens_per_picture} places: "
                "the bundle's manifest and graph disagree, export it again"
            )
        if features:
            positions = self.positions[self.positions >= start]
            embeds[0, positions - start] = np.concatenate(features, axis=1)[0, -len(positions) :]


def common_prefix(old: Sequence[Row], new: Sequence[Row]) -> int:
    """How many rows at the beginning are the same."""
    pairs = zip(old, new, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
