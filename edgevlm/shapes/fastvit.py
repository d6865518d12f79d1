"""FastViT in FastViTHD's and MobileCLIP's proportions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class FastVitConfig:
    """A hybrid encoder of RepMixer stages, then attention stages; the defaults are FastViTHD, FastVLM's encoder.

    Sources: FastViT, arXiv:2303.14189; FastVLM, arXiv:2412.13303.
    """

    type: Literal["fastvit"] = "fastvit"
    image_size: int = 1024
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768, 1536)
    num_attention_stages: int = 2  # the last ones
    mlp_ratio: int = 4
    reparameterized: bool = False  # branches and batch norms are folded into the convolutions already

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "mlp_ratio")
        if self.image_size % self.stride:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the encoder's stride {self.stride}")

    @property
    def stride(self) -> int:
        """Pixels a feature stands for, along one side."""
        return 4 << (len(self.widths) - 1)

    @property
    def grid_size(self) -> int:
        """Side of the square of features that leaves the encoder."""
        return self.image_size // self.stride

    @property
    def feature_size(self) -> int:
        """Width of each of those features."""
        return 2 * self.widths[-1]
