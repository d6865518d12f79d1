"""What a config refuses before anything is built of it."""

from __future__ import annotations

import math
from dataclasses import replace

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


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("hidden_size", 10**30), ("max_position_embeddings", 10**12)]
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be at most"):
        replace(DECODER, **{key: value})
