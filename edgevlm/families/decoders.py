"""The decoders that other projects build on: their configs and their tensor names.

Inside ``layers`` our modules are called as transformers calls them, so names need no more than another prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.core.config import from_mapping
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.core.registry import unknown_name
from edgevlm.families.family import NOT_NEEDED, Placement, Placements
from edgevlm.shapes.config import DecoderConfig, Llama3Scaling

# What a family of decoders does without saying so in config.json.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False},
    "mistral": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False},
    "qwen2": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "attention_bias": True},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "qk_norm": True},
}
REFUSED = {
    "use_sliding_window": "sliding-window attention",
    "mlp_bias": "biases in the MLP",
    "pretraining_tp": "split weights",
}


def decoder_config(values: Mapping[str, Any], kind: str, *, where: str) -> DecoderConfig:
    """The decoder that transformers' config ``values`` of model type ``kind`` describes.

    Raises UnsupportedError for a kind or a setting that we do not have, ConfigError for missing or wrong values.
    """
    if kind not in DEFAULTS:
        raise UnsupportedError(f"{where}: " + unknown_name("decoder", kind, list(DEFAULTS)))
    _refuse(values, where)
    heads = values.get("num_attention_heads")
    given = {name: value for name, value in values.items() if value is not None}
    derived = {
        "num_key_value_heads": heads,
        "head_dim": values["hidden_size"] // heads if heads and values.get("hidden_size") else None,
        **_rotary(given, where),
    }
    known = {name: value for name, value in derived.items() if value is not None}
    if kind == "qwen2":  # its biases are not a setting
        given.pop("attention_bias", None)
    return from_mapping(
        DecoderConfig, {**DEFAULTS[kind], **known, **given, **_rotary(given, where)}, strict=False, where=where
    )


def place_decoder(name: str, *, prefix: str = "model.", head: str = "lm_head.weight") -> Placements | None:
    """Where ``<prefix>embed_tokens``, ``layers`` and ``norm`` and the head go; None for any other name."""
    if name == head:
        return (Placement(name="lm_head.weight"),)
    inner = name.removeprefix(prefix)
    if inner == name:
        return None
    if inner.endswith("rotary_emb.inv_freq"):  # old files store what follows from rope_theta
        return NOT_NEEDED
    if inner.startswith("embed_tokens."):
        return (Placement(name=inner),)
    if inner.startswith(("layers.", "norm.")):
        return (Placement(name=f"decoder.{inner}"),)
    return None


def _rotary(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 5 writes as ``rope_parameters``."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    result: dict[str, Any] = {"rope_scaling": None}
    if "rope_theta" in rope:
        result["rope_theta"] = rope["rope_theta"]
    if kind == "llama3":
        fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        result["rope_scaling"] = {name: rope[name] for name in fields if name in rope}
        from_mapping(Llama3Scaling, result["rope_scaling"], strict=True, where=f"{where}: rope_scaling")
    elif kind != "default":
        raise UnsupportedError(f"{where}: rotary positions of type {kind!r}; known: default, llama3")
    return result


def _refuse(values: Mapping[str, Any], where: str) -> None:
    for name, what in REFUSED.items():
        if values.get(name) not in (None, False, 1):
            raise UnsupportedError(f"{where}: {name} {values[name]}: {what} is not supported; expected none")
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{where}: hidden_act {activation!r}; these decoders use 'silu'")
