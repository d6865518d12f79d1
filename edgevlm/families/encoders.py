"""The vision transformers that other projects build on: their configs and their tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgevlm.core.config import from_mapping, shown
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.family import NOT_NEEDED, Placement, Placements
from edgevlm.families.values import known_name, require
from edgevlm.shapes.config import VitConfig

_ALL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP = {"class_token": True, "pre_layernorm": True}
# What a kind does without saying so in config.json: transformers leaves out what equals these.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {
        **_ALL,
        **_CLIP,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        **_ALL,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
ENCODER = "vision_encoder."
RENAMED = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "embeddings.patch_embedding.bias": "patch_embedding.bias",
    "embeddings.position_embedding.weight": "position_embedding",
    "pre_layrnorm.weight": "pre_layernorm.weight",  # misspelt in every CLIP checkpoint
    "pre_layrnorm.bias": "pre_layernorm.bias",
    "post_layernorm.weight": "post_layernorm.weight",
    "post_layernorm.bias": "post_layernorm.bias",
}
UNUSED = ("embeddings.position_ids", "head.")  # counted, not stored; SigLIP's pooled feature
LAYER = re.compile(r"encoder\.layers\.(\d{1,9})\.(.+)")


def vision_config(values: Mapping[str, Any], kind: object, *, feature_layer: int | None, where: str) -> VitConfig:
    """The encoder that transformers' config ``values`` of model type ``kind`` describes, as far as it is needed.

    ``feature_layer`` counts as in transformers' ``hidden_states``: 0 is what enters the first block, -1 what leaves
    the last one, both without the norm that follows.  None is ``last_hidden_state``, for which SigLIP applies it.
    Raises UnsupportedError for another kind or activation, ConfigError for wrong values.
    """
    kind = known_name("vision encoder", kind, DEFAULTS, where=where)
    given = {**DEFAULTS[kind], **{name: value for name, value in values.items() if value is not None}}
    require(given, {"hidden_act": ACTIVATIONS}, where=where)
    given["num_hidden_layers"] = num_blocks(given["num_hidden_layers"], feature_layer, where=where)
    given["post_layernorm"] = feature_layer is None and kind == "siglip_vision_model"
    return from_mapping(VitConfig, given, strict=False, where=where)


def num_blocks(depth: int, feature_layer: int | None, *, where: str) -> int:
    """How many of ``depth`` blocks run until ``hidden_states[feature_layer]``.  Raises ConfigError when none does."""
    if feature_layer is None or not isinstance(depth, int):  # what is no number, the config itself refuses
        return depth
    if isinstance(feature_layer, bool) or not isinstance(feature_layer, int):
        raise UnsupportedError(f"{where}: features of several layers ({shown(feature_layer)}); expected one number")
    blocks = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 1 <= blocks <= depth:
        raise ConfigError(
            f"{where}: feature layer {shown(feature_layer)} of {shown(depth)} blocks; "
            f"expected {shown(-depth)} to {shown(depth)}, not 0"
        )
    return blocks


def place_vit(name: str, *, prefix: str, config: VitConfig) -> Placements | None:
    """Where CLIP's or SigLIP's tensor ``name`` goes; NOT_NEEDED past the last block that runs, None for any other.

    ``prefix`` is all that stands before ``embeddings`` and ``encoder``.
    """
    inner = name.removeprefix(prefix)
    if not name.startswith(prefix) or not inner:
        return None
    if inner.startswith(UNUSED):
        return NOT_NEEDED
    if found := LAYER.fullmatch(inner):
        number, rest = int(found[1]), found[2].removeprefix("mlp.")
        return (
            (Placement(name=f"{ENCODER}layers.{number}.{rest}"),) if number < config.num_hidden_layers else NOT_NEEDED
        )
    if inner.startswith("post_layernorm.") and not config.post_layernorm:
        return NOT_NEEDED
    return (Placement(name=ENCODER + RENAMED[inner]),) if inner in RENAMED else None
