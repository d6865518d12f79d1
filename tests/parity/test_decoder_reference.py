"""Our decoder against transformers', on tiny random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PretrainedConfig

from edgevlm.models.decoder import Decoder, rotary_frequencies
from edgevlm.models.kv_cache import KVCache
from edgevlm.shapes.config import DecoderConfig, Llama3Scaling

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
BASE = {"rope_type": "default", "rope_theta": 50_000.0}
# Of 8 frequencies over 16 original positions the first is kept, two lie between, the rest are divided.
STRETCH = {
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
LAYOUTS = {
    "llama": {},
    "llama3": {"rope_theta": 500.0, "rope_scaling": Llama3Scaling(**STRETCH)},  # type: ignore[arg-type]
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}
ROPE = {"llama3": {"rope_type": "llama3", "rope_theta": 500.0, **STRETCH}}


def llama_pair(layout: str) -> tuple[torch.nn.Module, Decoder]:
    kind = "llama" if layout == "llama3" else layout
    sizes = {**SIZES, "head_dim": 16, "rope_parameters": ROPE.get(layout, BASE), "tie_word_embeddings": True}
    reference = randomized(AutoConfig.for_model(kind, **sizes))
    settings = {"rope_theta": 50_000.0, **LAYOUTS[layout]}
    ours = Decoder(DecoderConfig(**SIZES, head_dim=16, **settings))  # type: ignore[arg-type]
    ours.load_state_dict({k: v for k, v in reference.model.state_dict().items() if not k.startswith("embed_tokens")})
    return reference.model, ours.eval()


def gpt2_pair() -> tuple[torch.nn.Module, Decoder]:
    """A width of 4 heads of 12, exact GELU."""
    sizes = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 80, "n_positions": 64}
    reference = randomized(GPT2Config(**sizes, activation_function="gelu", layer_norm_epsilon=1e-5))
    assert isinstance(reference, GPT2LMHeadModel)
    layout = {"norm": "layer", "mlp": "gelu", "positions": "learned", "attention_bias": True, "output_bias": True}
    own = {"hidden_size": 48, "intermediate_size": 80, "num_key_value_heads": 4, "head_dim": 12}
    ours = Decoder(DecoderConfig(**{**SIZES, **own, **layout}))  # type: ignore[arg-type]
    ours.load_state_dict(our_names(reference.transformer.state_dict()))
    return reference.transformer, ours.eval()


def randomized(config: PretrainedConfig) -> torch.nn.Module:
    """Norms and biases too: fresh ones hide mistakes."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return reference


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors as a Decoder has them; its matrices are (inputs, outputs), query, key and value side by side."""
    ours = {"embed_positions.weight": theirs["wpe.weight"]}
    parts = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for name, tensor in theirs.items():
        tensor = tensor.T.contiguous() if ".c_" in name and tensor.ndim == 2 else tensor
        if name.startswith("ln_f"):
            ours[name.replace("ln_f", "norm")] = tensor
        elif name.startswith("h."):
            _, layer, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            split = zip(("q", "k", "v"), tensor.chunk(3), strict=True)
            both = {f"self_attn.{p}_proj": t for p, t in split} if part == "attn.c_attn" else {parts[part]: tensor}
            ours |= {f"layers.{layer}.{own}.{kind}": t for own, t in both.items()}
    return ours


@pytest.fixture(params=[*LAYOUTS, "gpt2"])
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Decoder]:
    """The reference and ours with the same weights; RoPE base 50,000 where nothing else is said."""
    return gpt2_pair() if request.param == "gpt2" else llama_pair(request.param)


def rows_of(decoder: Decoder, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, decoder.config.hidden_size, generator=generator)


@torch.no_grad()
def test_hidden_states_equal_those_of_transformers(pair: tuple[torch.nn.Module, Decoder]) -> None:
    reference, ours = pair
    rows = rows_of(ours, 2, 60)
    expected = reference(inputs_embeds=rows).last_hidden_state
    torch.testing.assert_close(ours(rows), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_ten_steps_with_the_cache_equal_one_pass_without(pair: tuple[torch.nn.Module, Decoder]) -> None:
    reference, ours = pair
    rows = rows_of(ours, 1, 17)
    cache = KVCache(ours.config)
    stepwise = [ours(rows[:, :7], kv_cache=cache)]
    stepwise += [ours(rows[:, t : t + 1], kv_cache=cache) for t in range(7, 17)]
    expected = reference(inputs_embeds=rows).last_hidden_state
    torch.testing.assert_close(torch.cat(stepwise, 1), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_rewound_cache_forgets(pair: tuple[torch.nn.Module, Decoder]) -> None:
    _, ours = pair
    rows = rows_of(ours, 1, 9)
    cache = KVCache(ours.config)
    ours(rows[:, :6], kv_cache=cache)
    cache.rewind(4)
    again = ours(rows[:, 4:], kv_cache=cache)
    torch.testing.assert_close(again, ours(rows)[:, 4:], atol=2e-5, rtol=0)


@torch.no_grad()
def test_given_positions_count_instead_of_the_place_in_the_batch(pair: tuple[torch.nn.Module, Decoder]) -> None:
    """Packed training: a sequence that begins anew at position 0, blind for the one before it."""
    _, ours = pair
    rows = rows_of(ours, 1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    own = (torch.arange(9) >= 4).unsqueeze(1) == (torch.arange(9) >= 4)
    mask = (own & torch.ones(9, 9, dtype=torch.bool).tril()).view(1, 1, 9, 9)
    packed = ours(rows, positions=positions, mask=mask)
    torch.testing.assert_close(packed[:, 4:], ours(rows[:, 4:]), atol=2e-5, rtol=0)


def test_llama_3_frequencies_equal_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    stretch = {**STRETCH, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretch["original_max_position_embeddings"] = 8192
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, **stretch}
    sizes = {**SIZES, "head_dim": 64, "max_position_embeddings": 131_072}
    reference = LlamaRotaryEmbedding(AutoConfig.for_model("llama", **sizes, rope_parameters=rope))
    settings = {"rope_theta": 500_000.0, "rope_scaling": Llama3Scaling(**stretch)}  # type: ignore[arg-type]
    found = rotary_frequencies(DecoderConfig(**sizes, **settings))  # type: ignore[arg-type]
    torch.testing.assert_close(found, reference.inv_freq, atol=0, rtol=1e-6)
    plain = rotary_frequencies(DecoderConfig(**sizes, rope_theta=500_000.0))  # type: ignore[arg-type]
    kept, divided = found == plain, torch.isclose(found, plain / 32)
    assert min(kept.sum(), divided.sum(), (~kept & ~divided).sum()) >= 3
