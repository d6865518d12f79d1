"""What a model is made of, as frozen data.

    VlmConfig
    ├── vision     HybridConfig | VitConfig | FastVitConfig | StemVitConfig     picture  -> H·W features
    ├── projector  MlpConfig | UnshuffleConfig | PoolConfig | QueriesConfig     features -> N vision tokens of width D
    ├── fusion     FusionConfig or nothing                                      fewer tokens, text that has seen them
    └── decoder    DecoderConfig                                                tokens   -> logits

Fields that hubs know keep the hub's name.  ``type`` is the tag by which a file says which config it holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.checks import check_above_zero, check_heads, check_positive, check_stages
from edgevlm.shapes.fastvit import FastVitConfig
from edgevlm.shapes.fusion import FusionConfig
from edgevlm.shapes.stem_vit import StemVitConfig

__all__ = [
    "DecoderConfig",
    "FastVitConfig",
    "FusionConfig",
    "HybridConfig",
    "Llama3Scaling",
    "MlpConfig",
    "PoolConfig",
    "QueriesConfig",
    "StemVitConfig",
    "UnshuffleConfig",
    "VitConfig",
    "VlmConfig",
    "check_positive",
]


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretched rotary positions, for texts longer than the first training's.

    Frequencies that turn more than ``high_freq_factor`` times in ``original_max_position_embeddings`` rows stay, those
    that turn less than ``low_freq_factor`` times are divided by ``factor``, with a smooth step between.
    """

    type: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        check_positive(self, "original_max_position_embeddings")
        if self.factor <= 0 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling: factor ({self.factor}) and low_freq_factor ({self.low_freq_factor}) must be above 0, "
                f"high_freq_factor ({self.high_freq_factor}) above low_freq_factor"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder of the Llama layout; Qwen2, Qwen3 and SmolLM2 are settings of it.

    GPT-2's layout is ``norm`` layer, ``mlp`` gelu, ``positions`` learned and both attention biases.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6  # of whichever norm
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    attention_bias: bool = False  # on query, key and value (Qwen2)
    output_bias: bool = False  # on what leaves the attention
    qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
    tie_word_embeddings: bool = True
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu: Linear, exact GELU, Linear, both with biases
    positions: Literal["rotary", "learned"] = "rotary"  # learned: a table added to the decoder's input

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        check_positive(self, "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        check_above_zero(self, "rms_norm_eps", "rope_theta")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, got {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A plain vision transformer with learned positions: SigLIP's layout by default, CLIP's by its settings.

    ``num_hidden_layers`` counts the blocks that run: of CLIP's 24, LLaVA reads what the 23rd gives.  A rest of pixels
    that fills no patch (384 of 14 a side) is not looked at.
    """

    type: Literal["vit"] = "vit"
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "quick_gelu"] = "gelu_pytorch_tanh"
    class_token: bool = False  # CLIP: a first token that stands for no patch; it is dropped at the end
    pre_layernorm: bool = False  # CLIP: a norm before the first block, and no bias in the patch embedding
    post_layernorm: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "patch_size", "hidden_size", "intermediate_size")
        check_positive(self, "num_hidden_layers", "num_attention_heads")
        check_above_zero(self, "layer_norm_eps")
        if self.image_size < self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        check_heads(self, self.hidden_size, self.num_attention_heads)

    @property
    def grid_size(self) -> int:
        """Side of the square of features that leaves the encoder."""
        return self.image_size // self.patch_size

    @property
    def feature_size(self) -> int:
        """Width of each of those features."""
        return self.hidden_size


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """A small convolutional encoder with attention in its last stage (FastViT's idea, arXiv:2303.14189).

    The stem divides the picture by 4, each further stage by 2.
    """

    type: Literal["hybrid"] = "hybrid"
    image_size: int
    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (2, 4, 4)
    mlp_ratio: int = 3
    kernel_size: int = 3  # of the depthwise convolutions
    head_dim: int = 32
    reparameterized: bool = False  # batch norms and residuals are folded into the convolutions already

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "mlp_ratio", "head_dim")
        check_stages(self, self.widths, self.depths)
        if self.image_size % self.stride:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the encoder's stride {self.stride}")
        if self.widths[-1] % self.head_dim:
            raise ConfigError(f"the last width, {self.widths[-1]}, does not divide by head_dim {self.head_dim}")
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size must be odd, got {self.kernel_size}")

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
        return self.widths[-1]


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """One vision token per feature: Linear, GELU, Linear (LLaVA-1.5).

    ``num_layers`` 1 is a Linear alone; ``hidden_size`` is the width between two, by default the decoder's.
    """

    type: Literal["mlp"] = "mlp"
    factor: Literal[1] = 1
    num_layers: Literal[1, 2] = 2
    hidden_size: int | None = None
    bias: bool = True
    final_gelu: bool = False  # a GELU after the last Linear (NanoVLMs)
    end_row: bool = False  # a learned row behind those of the features (LLaVA-NeXT's image_newline)


@dataclass(frozen=True, kw_only=True)
class UnshuffleConfig:
    """``factor`` x ``factor`` neighbours become one token of ``factor``² times the width, then the MLP."""

    type: Literal["unshuffle"] = "unshuffle"
    factor: int = 2
    num_layers: Literal[1, 2] = 2
    hidden_size: int | None = None
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """``factor`` x ``factor`` neighbours are averaged into one token, then the MLP."""

    type: Literal["pool"] = "pool"
    factor: int = 2
    num_layers: Literal[1, 2] = 2
    hidden_size: int | None = None
    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """``num_queries`` of ``table_size`` learned queries attend to the features; any first ones serve (MQT).

    Source: Matryoshka Query Transformer, arXiv:2405.19315, as the released code behaves.
    """

    type: Literal["queries"] = "queries"
    factor: Literal[1] = 1
    num_queries: int = 256
    table_size: int = 256  # queries that the checkpoint holds: a square, whose positions cover the picture
    num_heads: int = 16

    def __post_init__(self) -> None:
        check_positive(self, "num_queries", "table_size", "num_heads")
        if math.isqrt(self.table_size) ** 2 != self.table_size:
            raise ConfigError(f"QueriesConfig.table_size must be a square such as 256, got {self.table_size}")
        if self.num_queries > self.table_size:
            raise ConfigError(f"num_queries must be 1 to {self.table_size}, got {self.num_queries}")


@dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """A whole vision-language model."""

    vision: HybridConfig | VitConfig | FastVitConfig | StemVitConfig
    projector: MlpConfig | UnshuffleConfig | PoolConfig | QueriesConfig
    decoder: DecoderConfig
    fusion: FusionConfig | None = None
    model_type: str = "edgevlm"

    def __post_init__(self) -> None:
        if self.projector.factor < 1 or self.vision.grid_size % self.projector.factor:
            raise ConfigError(
                f"a grid of {self.vision.grid_size}x{self.vision.grid_size} features does not divide by "
                f"the projector's factor {self.projector.factor}"
            )

        if self.fusion is not None and not (self.projector.type == "mlp" and self.decoder.positions == "rotary"):
            raise ConfigError(
                f"fusion needs a projector of type mlp and rotary positions, found {self.projector.type} and "
                f"{self.decoder.positions}: the compressor reduces the tokens, and text continues the cached positions"
            )
        if self.fusion is not None and isinstance(self.projector, MlpConfig) and self.projector.end_row:
            raise ConfigError(
                "fusion has no place for a projector's end_row: the compressor decides how many rows there are"
            )

    @property
    def num_vision_tokens(self) -> int:
        """Rows that the decoder reads of one picture, or of one tile of it (N)."""
        if self.fusion is not None:
            return self.fusion.num_vision_tokens
        if isinstance(self.projector, QueriesConfig):
            return self.projector.num_queries
        side = self.vision.grid_size // self.projector.factor
        return side * side + (isinstance(self.projector, MlpConfig) and self.projector.end_row)

    @property
    def num_views(self) -> int:
        """Pictures of the encoder's size that it takes at once; more than 1 for a high-resolution LLaVA-Mini."""
        return 1 if self.fusion is None else self.fusion.num_views
