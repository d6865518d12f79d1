"""The vision transformer of the NanoVLMs paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.checks import check_above_zero, check_heads, check_positive

STEM_CHANNELS = (32, 64)
MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class StemVitConfig:
    """A few transformer blocks behind a convolutional stem (NanoVLMs, arXiv:2502.07838).

    The stem's two convolutions see either one patch each, zeros around it, or the whole picture, with zeros around
    that alone; both have the same weights.  Where the paper is silent: 32 and 64 channels of 3x3, MLPs of 4 times the
    width, exact GELU, biases everywhere.
    """

    type: Literal["stem_vit"] = "stem_vit"
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-5
    stem: Literal["patch", "image"] = "patch"
    visual_tokens: Literal["cls", "all"] = "cls"  # the class token, or every other one

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_above_zero(self, "layer_norm_eps")
        check_heads(self, self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.patch_size % 2:
            raise ConfigError(f"patch_size must be even, since the stem halves it, got {self.patch_size}")

    @property
    def num_patches(self) -> int:
        """Tokens beside the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def grid_size(self) -> int:
        """Side of the square of features that leaves the encoder."""
        return 1 if self.visual_tokens == "cls" else self.image_size // self.patch_size

    @property
    def feature_size(self) -> int:
        """Width of each of those features."""
        return self.hidden_size
