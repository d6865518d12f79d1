"""FastViT in FastViTHD's and MobileCLIP's proportions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.checks import check_positive, check_stages


@dataclass(frozen=True, kw_only=True)
class FastVitConfig:
    """A hybrid encoder of RepMixer stages, then attention stages; the defaults are FastViTHD, FastVLM's encoder.

    Sources: FastViT, arXiv:2303.14189; FastVLM, arXiv:2412.13303.
    """

    type: Literal["fastvit"] = "fastvit"
    image_size: int = 1024
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768, 1536)
    num_attention_stages: int = 2  # the last ones, each behind a convolution that tells positions apart
    attention_norm: Literal["layer", "batch"] = "layer"  # in front of attention
    head_dim: int = 32
    mlp_ratio: int = 4
    stem_scale_branch: bool = False  # the stem trains with 1x1 branches beside its 3x3 convolutions
    num_gated_downsamples: int = 0  # the last ones, with squeeze-and-excite
    downsample_act: bool = True  # GELU between the two convolutions of a downsample; FastViT's first models have none
    reparameterized: bool = False  # branches and their batch norms are folded into the convolutions already

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "mlp_ratio", "head_dim")
        check_stages(self, self.widths, self.depths)
        self._check_stages("num_attention_stages", len(self.widths))
        self._check_stages("num_gated_downsamples", len(self.widths) - 1)
        for width in self.widths[len(self.widths) - self.num_attention_stages :]:
            if width % self.head_dim:
                raise ConfigError(f"width {width} of an attention stage does not divide by head_dim {self.head_dim}")
        if self.image_size % self.stride:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the encoder's stride {self.stride}")

    def _check_stages(self, name: str, most: int) -> None:
        if not 0 <= getattr(self, name) <= most:
            raise ConfigError(f"{name} must be 0 to {most} with {len(self.widths)} stages, got {getattr(self, name)}")

    def has_attention(self, stage: int) -> bool:
        """Whether ``stage``, counted from 0, mixes tokens by attention."""
        return stage >= len(self.widths) - self.num_attention_stages

    def has_gate(self, stage: int) -> bool:
        """Whether the downsample that ``stage`` begins with has squeeze-and-excite."""
        return stage >= len(self.widths) - self.num_gated_downsamples

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


def _mobileclip(depths: tuple[int, ...], widths: tuple[int, ...]) -> FastVitConfig:
    """A MobileCLIP encoder of four stages."""
    return FastVitConfig(
        image_size=256,
        depths=depths,
        widths=widths,
        num_attention_stages=1,
        attention_norm="batch",
        mlp_ratio=3,
        stem_scale_branch=True,
        num_gated_downsamples=2,
    )


# By timm's names.  Sources: MobileCLIP, arXiv:2311.17049 (mci0 to mci2); MobileCLIP2, arXiv:2508.20691 (mci3, mci4).
MCI: Mapping[str, FastVitConfig] = {
    "fastvit_mci0": _mobileclip((2, 6, 10, 2), (64, 128, 256, 512)),
    "fastvit_mci1": _mobileclip((4, 12, 20, 4), (64, 128, 256, 512)),
    "fastvit_mci2": _mobileclip((4, 12, 24, 4), (80, 160, 320, 640)),
    "fastvit_mci3": FastVitConfig(),
    "fastvit_mci4": FastVitConfig(depths=(2, 12, 24, 4, 4), widths=(128, 256, 512, 1024, 2048)),
}
