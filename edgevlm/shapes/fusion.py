"""Modality pre-fusion: what LLaVA-Mini puts between projector and decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgevlm.shapes.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """A compressor to ``grid_size``² vision tokens and ``num_layers`` decoder layers before the decoder.

    Source: LLaVA-Mini, arXiv:2501.03895, as the released code behaves.
    """

    type: Literal["llava_mini"] = "llava_mini"
    num_layers: int = 4
    grid_size: int = 1  # C: side of the square of compressed tokens
    compressor: Literal["query", "pool"] = "query"
    num_heads: int = 8  # of the query compressor
    resolution_ratio: int = 1  # n: n² crops and the whole picture; 1 is the whole picture alone
    skip_token_zero: bool = False  # the released code takes token id 0 for padding and leaves it out of the fusion

    def __post_init__(self) -> None:
        check_positive(self, "num_layers", "grid_size", "num_heads", "resolution_ratio")

    @property
    def num_vision_tokens(self) -> int:
        """Rows that the decoder reads of one picture (K)."""
        return self.grid_size**2

    @property
    def num_views(self) -> int:
        """Pictures of the encoder's size that one picture is cut into."""
        return 1 if self.resolution_ratio == 1 else self.resolution_ratio**2 + 1

    def side_of_views(self, grid_size: int) -> int:
        """Side of the square of features that the compressor reads, where one view gives ``grid_size`` squared."""
        return grid_size * self.resolution_ratio
