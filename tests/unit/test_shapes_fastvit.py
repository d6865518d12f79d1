"""What follows from the config of a FastViT."""

from __future__ import annotations

from typing import Any

import pytest

from edgevlm.core.errors import ConfigError
from edgevlm.shapes.config import FastVitConfig
from edgevlm.shapes.fastvit import MCI


@pytest.mark.parametrize(("side", "num_tokens"), [(256, 16), (512, 64), (768, 144), (1024, 256), (2048, 1024)])
def test_fastvithd_makes_one_feature_of_64_by_64_pixels(side: int, num_tokens: int) -> None:
    config = FastVitConfig(image_size=side)
    assert config.grid_size**2 == num_tokens
    assert config.feature_size == 3072


def test_four_stages_divide_by_32_and_five_by_64() -> None:
    assert {name: config.stride for name, config in MCI.items()} == {
        "fastvit_mci0": 32,
        "fastvit_mci1": 32,
        "fastvit_mci2": 32,
        "fastvit_mci3": 64,
        "fastvit_mci4": 64,
    }


def test_attention_and_gates_stand_at_the_end() -> None:
    small, large = MCI["fastvit_mci0"], MCI["fastvit_mci3"]
    assert [small.has_attention(stage) for stage in range(4)] == [False, False, False, True]
    assert [small.has_gate(stage) for stage in range(4)] == [False, False, True, True]
    assert [large.has_attention(stage) for stage in range(5)] == [False, False, False, True, True]
    assert not any(large.has_gate(stage) for stage in range(5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 1000}, "image_size 1000 is not a multiple of the encoder's stride 64"),
        ({"depths": (1, 2)}, "must be of one length"),
        ({"depths": (), "widths": ()}, "must be of one length, at least 1"),
        ({"widths": (0, 32, 64, 64, 64)}, "must be at least 1 each"),
        ({"num_attention_stages": 6}, "num_attention_stages must be 0 to 5 with 5 stages, got 6"),
        ({"num_gated_downsamples": 5}, "num_gated_downsamples must be 0 to 4 with 5 stages, got 5"),
        ({"widths": (16, 32, 64, 80, 96)}, "width 80 of an attention stage does not divide by head_dim 32"),
        ({"mlp_ratio": 0}, "mlp_ratio must be at least 1"),
    ],
)
def test_configs_refuse_what_cannot_be_built(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastVitConfig(**wrong)
