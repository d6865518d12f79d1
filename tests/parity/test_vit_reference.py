"""Our vision transformer against transformers' CLIP and SigLIP, on tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.encoders import place_vit, vision_config
from edgevlm.families.family import NOT_NEEDED
from edgevlm.models.vision.vit import VisionTransformer

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96}
DEPTH = {"num_hidden_layers": 3, "num_attention_heads": 4}
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
KINDS: dict[str, Any] = {CLIP: (CLIPVisionConfig, CLIPVisionModel), SIGLIP: (SiglipVisionConfig, SiglipVisionModel)}
Spread = Callable[..., nn.Module]
Close = Callable[..., float]


def reference_of(kind: str, **changes: Any) -> nn.Module:
    config_class, model_class = KINDS[kind]
    return model_class(config_class(**{**SIZES, **DEPTH, **changes}, attn_implementation="eager"))


def ours_of(reference: nn.Module, kind: str, feature_layer: int | None) -> VisionTransformer:
    """Our encoder with the reference's weights, of which every one is placed or known to be unused."""
    config = vision_config(reference.config.to_diff_dict(), kind, feature_layer=feature_layer, where="config.json")
    weights = {}
    for name, tensor in reference.state_dict().items():
        places = place_vit(f"tower.{name}", prefix="tower.", config=config)
        assert places is not None, name
        weights |= {where.name.removeprefix("vision_encoder."): tensor for where in places}
    ours = VisionTransformer(config).eval()
    ours.load_state_dict(weights)
    return ours


@pytest.mark.parametrize("feature_layer", [-1, -2, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_of_a_layer_equal_transformers(
    kind: str, feature_layer: int, spread_out: Spread, assert_close: Close
) -> None:
    reference = spread_out(reference_of(kind))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = reference(pixels, output_hidden_states=True).hidden_states[feature_layer]
    expected = expected[:, 1:] if kind == CLIP else expected
    assert_close(ours_of(reference, kind, feature_layer)(pixels), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_border_that_fills_no_patch_is_left_out_as_transformers_does(
    kind: str, spread_out: Spread, assert_close: Close
) -> None:
    """SigLIP's largest has 384 pixels of patches of 14: 27 a side, and 6 pixels more."""
    reference = spread_out(reference_of(kind, image_size=30))
    pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if kind == CLIP else expected
    assert_close(ours_of(reference, kind, -2)(pixels), expected)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_last_hidden_state_equals_transformers(
    kind: str, hidden_act: str, spread_out: Spread, assert_close: Close
) -> None:
    reference = spread_out(reference_of(kind, hidden_act=hidden_act))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = reference(pixels).last_hidden_state
    assert_close(ours_of(reference, kind, None)(pixels), expected[:, 1:] if kind == CLIP else expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_config_json_leaves_out_means_what_transformers_means(kind: str) -> None:
    reference = KINDS[kind][0]()
    ours = vision_config({}, kind, feature_layer=-1, where="config.json")
    same = (*SIZES, *DEPTH, "hidden_act", "layer_norm_eps")
    assert [getattr(ours, name) for name in same] == [getattr(reference, name) for name in same]


def test_blocks_behind_the_feature_layer_are_neither_built_nor_needed() -> None:
    config = vision_config({**SIZES, **DEPTH}, CLIP, feature_layer=-2, where="config.json")
    assert (config.num_hidden_layers, config.post_layernorm) == (2, False)
    assert place_vit("encoder.layers.2.mlp.fc1.weight", prefix="", config=config) == NOT_NEEDED
    assert place_vit("post_layernorm.weight", prefix="", config=config) == NOT_NEEDED
    assert place_vit("embeddings.position_ids", prefix="", config=config) == NOT_NEEDED
    assert place_vit("encoder.layers.1.mlp.fc1.weight", prefix="", config=config) != NOT_NEEDED


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc1.weight", "tower.encoder.norm.weight", "tower.", "tower.x"])
def test_a_strange_name_has_no_place(name: str) -> None:
    config = vision_config({**SIZES, **DEPTH}, CLIP, feature_layer=-2, where="config.json")
    assert place_vit(name, prefix="tower.", config=config) is None


@pytest.mark.parametrize(
    ("values", "kind", "layer", "words"),
    [
        ({}, "clip_vison_model", -2, "Did you mean 'clip_vision_model'"),
        ({"hidden_act": "relu"}, CLIP, -2, "hidden_act is 'relu'; expected 'gelu'"),
        ({}, CLIP, [-2, -5], r"features of several layers \(\[-2, -5\]\)"),
    ],
)
def test_what_we_do_not_have_is_refused(values: dict[str, Any], kind: str, layer: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        vision_config(values, kind, feature_layer=layer, where="config.json")


@pytest.mark.parametrize("layer", [0, 13, -13])
def test_a_layer_that_does_not_exist_is_named(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"feature layer {layer} of 12 blocks; expected -12 to 12, not 0"):
        vision_config({}, CLIP, feature_layer=layer, where="config.json")


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": "many"}, {"image_size": [32, 32]}, {"patch_size": 500}, {"num_attention_heads": 7}]
)
def test_wrong_sizes_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values)).removeprefix("num_attention_")):
        vision_config(values, CLIP, feature_layer=-2, where="config.json")
