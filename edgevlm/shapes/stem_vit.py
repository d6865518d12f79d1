"""The vision transformer of the NanoVLMs paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.checks import check_heads, check_positive


@dataclass(frozen=True, kw_only=True)
class StemVitConfig:
    """A few transformer blocks behind a convolutional stem (NanoVLMs, arXiv:2502.07838)."""

    type: Literal["stem_vit"] = "stem_vit"
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    stem: Literal["patch", "image"] = "patch"  # convolutions inside each patch, or over the whole picture
    visual_tokens: Literal["cls", "all"] = "cls"

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_heads(self, self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid_size(self) -> int:
        """Side of the square of features that leaves the encoder."""
        return 1 if self.visual_tokens == "cls" else self.image_size // self.patch_size

    @property
    def feature_size(self) -> int:
        """Width of each of those features."""
        return self.hidden_size
