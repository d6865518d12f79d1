"""Our decoder against transformers', on tiny random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgevlm.models.decoder import Decoder
from edgevlm.models.kv_cache import KVCache
from edgevlm.shapes.config import DecoderConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LAYOUTS = {
    "llama": {"attention_bias": False, "qk_norm": False},
    "qwen2": {"attention_bias": True, "qk_norm": False},
    "qwen3": {"attention_bias": False, "qk_norm": True},
}


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Decoder]:
    """The reference model and ours with the same weights, RoPE base 50,000."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    sizes = {**SIZES, "head_dim": 16, "rope_parameters": rope}
    config = AutoConfig.for_model(request.param, **sizes, tie_word_embeddings=True, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_config(config).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms and biases too: fresh ones hide mistakes
    ours = Decoder(DecoderConfig(**SIZES, head_dim=16, rope_theta=50_000.0, **LAYOUTS[request.param]))
    ours.load_state_dict({k: v for k, v in reference.model.state_dict().items() if not k.startswith("embed_tokens")})
    return reference, ours.eval()


@torch.no_grad()
def test_hidden_states_equal_those_of_transformers(pair: tuple[torch.nn.Module, Decoder]) -> None:
    reference, ours = pair
    ids = torch.randint(0, 97, (2, 11))
    expected = reference.model(ids).last_hidden_state
    found = ours(reference.model.embed_tokens(ids))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_ten_steps_with_the_cache_equal_one_pass_without(pair: tuple[torch.nn.Module, Decoder]) -> None:
    reference, ours = pair
    ids = torch.randint(0, 97, (1, 17))
    embeds = reference.model.embed_tokens(ids)
    cache = KVCache(ours.config)
    stepwise = [ours(embeds[:, :7], kv_cache=cache)]
    stepwise += [ours(embeds[:, t : t + 1], kv_cache=cache) for t in range(7, 17)]
    torch.testing.assert_close(torch.cat(stepwise, 1), reference.model(ids).last_hidden_state, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_rewound_cache_forgets(pair: tuple[torch.nn.Module, Decoder]) -> None:
    _, ours = pair
    rows = torch.randn(1, 9, 64)
    cache = KVCache(ours.config)
    ours(rows[:, :6], kv_cache=cache)
    cache.rewind(4)
    again = ours(rows[:, 4:], kv_cache=cache)
    torch.testing.assert_close(again, ours(rows)[:, 4:], atol=2e-5, rtol=0)
