"""What a config refuses before anything is built of it."""

from __future__ import annotations

import math

import pytest

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.config import DecoderConfig, StemVitConfig, VitConfig

DECODER = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)
VIT = VitConfig(
    image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
STEM = StemVitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("config", "name"),
    [(DECODER, "rms_norm_eps"), (DECODER, "rope_theta"), (VIT, "layer_norm_eps"), (STEM, "layer_norm_eps")],
    ids=["norm", "rotary", "vit", "stem"],
)
def test_what_is_divided_by_is_above_zero(
    config: DecoderConfig | VitConfig | StemVitConfig, name: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=rf"{type(config).__name__}\.{name} must be above 0 and finite, got {value}"):
        type(config)(**{**vars(config), name: value})
