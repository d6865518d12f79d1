"""The decoders that other projects build on: their configs and their tensor names.

Inside ``layers`` our modules are called as transformers calls them, so names need no more than another prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.core.config import from_mapping, shown
from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.family import NOT_NEEDED, Placement, Placements
from edgevlm.families.values import known_name, require, table
from edgevlm.shapes.config import DecoderConfig

_ALL = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_QWEN = {**_ALL, "vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768}
# What a kind does without saying so in config.json: transformers leaves out what equals these.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_ALL, "vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048},
    "mistral": {
        **_ALL,
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,  # null where there is none
    },
    "qwen2": {**_QWEN, "num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False},
    "qwen3": {
        **_QWEN,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
}
# What no config can change.
FIXED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "output_bias": False},
    "qwen2": {"attention_bias": True, "output_bias": False},
    "qwen3": {"qk_norm": True},
}
EXPECTED: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "mlp_bias": (False, None)}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def text_decoder(values: Mapping[str, Any], *, kind: str, where: str) -> DecoderConfig:
    """The decoder that ``text_config`` describes, of ``kind`` where it names none; either table may tie the head.

    Raises what ``decoder_config`` raises.
    """
    text = table(values, "text_config", where=where) if values.get("text_config") else {}
    tied = bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    given = {**text, "tie_word_embeddings": tied}
    return decoder_config(given, text.get("model_type", kind), where=f"{where}: text_config")


def decoder_config(values: Mapping[str, Any], kind: object, *, where: str) -> DecoderConfig:
    """The decoder that transformers' config ``values`` of model type ``kind`` describes.

    Where attention would look back no further than a window, the context ends with the window: within it nothing
    differs.  Raises UnsupportedError for a kind or a setting that we do not have, ConfigError for wrong values.
    """
    kind = known_name("decoder", kind, DEFAULTS, where=where)
    stated = {name: value for name, value in values.items() if value is not None or name == "sliding_window"}
    biases = {"output_bias": stated.get("attention_bias", False)}  # the setting is for all four; Qwen2 has three
    given = {**DEFAULTS[kind], **stated, **biases, **FIXED[kind]}
    require(given, EXPECTED, where=where)
    given = {**_derived(given), **given, **_rotary(values, where), **_context(given)}
    return from_mapping(DecoderConfig, given, strict=False, where=where)


def place_decoder(name: str, *, prefix: str = "model.", head: str = "lm_head.weight") -> Placements | None:
    """Where ``<prefix>embed_tokens``, ``layers`` and ``norm`` and the head go; None for any other name."""
    if name == head:
        return (Placement(name="lm_head.weight"),)
    if not name.startswith(prefix):
        return None
    inner = name[len(prefix) :]
    if inner.endswith("rotary_emb.inv_freq"):  # old files store what follows from rope_theta
        return NOT_NEEDED
    if inner == "embed_tokens.weight":
        return (Placement(name=inner),)
    if inner.startswith(("layers.", "norm.")):
        return (Placement(name=f"decoder.{inner}"),)
    return None


def _derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that follow from others unless they are given."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if not isinstance(width, int) or not isinstance(heads, int):  # from_mapping says so
        return {}
    return {"num_key_value_heads": heads, "head_dim": width // max(heads, 1)}


def _context(values: Mapping[str, Any]) -> dict[str, Any]:
    """The positions over which windowed attention, where it is on, is ordinary attention."""
    window, length = values.get("sliding_window"), values["max_position_embeddings"]
    if not isinstance(window, int) or not isinstance(length, int) or not values.get("use_sliding_window", True):
        return {}
    return {"max_position_embeddings": min(window, length)}


def _rotary(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 5 writes as ``rope_parameters``."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= table(values, name, where=where) if values.get(name) else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if kind == "default":
        return {**theta, "rope_scaling": None}
    if kind != "llama3":
        raise UnsupportedError(f"{where}: rotary positions of type {shown(kind)}; known: default, llama3")
    if missing := [name for name in LLAMA3 if name not in rope]:
        raise ConfigError(f"{where}: rope_scaling of type 'llama3' lacks {', '.join(missing)}")
    return {**theta, "rope_scaling": {name: rope[name] for name in LLAMA3}}
