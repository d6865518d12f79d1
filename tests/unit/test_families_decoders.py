"""Configs of foreign decoders say what transformers reads in them, and what we do not have is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.decoders import DEFAULTS, decoder_config, place_decoder
from edgevlm.families.family import NOT_NEEDED, Placement

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def read(kind: str, **values: Any) -> Any:
    return decoder_config(values, kind, where="config.json")


@pytest.mark.parametrize("kind", DEFAULTS)
def test_an_empty_config_means_what_transformers_means(kind: str) -> None:
    reference, ours = AutoConfig.for_model(kind), read(kind)
    assert [getattr(ours, name) for name in SAME] == [getattr(reference, name) for name in SAME]
    assert ours.rope_theta == reference.rope_parameters["rope_theta"]
    assert ours.head_dim == (getattr(reference, "head_dim", None) or reference.hidden_size // 32)
    assert (ours.attention_bias, ours.qk_norm) == (kind == "qwen2", kind == "qwen3")


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_transformers_writes_is_read(kind: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    reference = AutoConfig.for_model(kind, **SIZES, num_key_value_heads=2, head_dim=24, rope_parameters=rope)
    ours = read(kind, **reference.to_diff_dict())
    assert [getattr(ours, name) for name in SAME] == [getattr(reference, name) for name in SAME]
    assert (ours.head_dim, ours.rope_theta, ours.rope_scaling) == (24, 50_000.0, None)


def test_older_files_say_the_same_with_other_keys() -> None:
    old = read("llama", **SIZES, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = read("llama", **SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old == new
    assert (old.rope_theta, old.rope_scaling.factor, old.rope_scaling.high_freq_factor) == (5e5, 32.0, 4.0)


def test_sizes_that_follow_from_others_need_not_be_given() -> None:
    ours = read("llama", **SIZES)
    assert (ours.num_key_value_heads, ours.head_dim) == (4, 16)


@pytest.mark.parametrize(
    ("kind", "given", "biases"),
    [
        ("llama", True, (True, True)),
        ("qwen3", True, (True, True)),
        ("llama", False, (False, False)),
        ("qwen2", False, (True, False)),
        ("mistral", True, (False, False)),
    ],
)
def test_biases_of_attention_are_a_setting_for_some(kind: str, given: bool, biases: tuple[bool, bool]) -> None:
    ours = read(kind, **SIZES, num_key_value_heads=4, attention_bias=given)
    assert (ours.attention_bias, ours.output_bias) == biases


def test_a_null_is_no_value() -> None:
    ours = read("qwen2", **SIZES, num_key_value_heads=4, head_dim=None, rope_scaling=None)
    assert (ours.head_dim, ours.rope_scaling) == (16, None)


@pytest.mark.parametrize(
    ("kind", "values", "context"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 32_768}, 32_768),
        ("mistral", {"sliding_window": 512}, 512),
        ("qwen2", {"sliding_window": 512, "max_position_embeddings": 1024}, 1024),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True}, 512),
        ("llama", {"max_position_embeddings": 131_072}, 131_072),
    ],
)
def test_the_context_ends_where_a_window_would_slide(kind: str, values: dict[str, Any], context: int) -> None:
    assert read(kind, **values).max_position_embeddings == context


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("lama", {}, "Did you mean 'llama'"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "of type 'yarn'; known: default, llama3"),
    ],
)
def test_what_we_do_not_have_is_refused(kind: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        read(kind, **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; expected a table"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "must be a multiple"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read("llama", **values)


def test_names_keep_what_follows_the_prefix() -> None:
    prefix, head = "language_model.model.", "language_model.lm_head.weight"

    def place(name: str) -> tuple[Placement, ...] | None:
        return place_decoder(name, prefix=prefix, head=head)

    inner = "layers.3.self_attn.q_proj.weight"
    assert place(prefix + inner) == (Placement(name=f"decoder.{inner}"),)
    assert place(prefix + "norm.weight") == (Placement(name="decoder.norm.weight"),)
    assert place(prefix + "embed_tokens.weight") == (Placement(name="embed_tokens.weight"),)
    assert place(head) == (Placement(name="lm_head.weight"),)
    assert place(prefix + "layers.3.self_attn.rotary_emb.inv_freq") == NOT_NEEDED
    assert place("model.layers.3.mlp.up_proj.weight") is None
    assert place(prefix + "mm_projector.0.weight") is None
