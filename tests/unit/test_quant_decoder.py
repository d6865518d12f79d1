"""Which matrices of a decoder are rounded, under which names, and what computes with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgevlm.core.errors import ConfigError
from edgevlm.models.as_session import TorchSession
from edgevlm.models.checkpoint import load_model
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import linear_layers, quantize_decoder
from edgevlm.quant.fake import fake_quantized, round_in_blocks, round_per_call
from edgevlm.shapes.config import DecoderConfig

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
SWIGLU = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Vlm:
    return load_model(tiny_checkpoint).model


def with_decoder(model: Vlm, **changes: object) -> Vlm:
    """A fresh model whose decoder differs in these fields."""
    decoder: DecoderConfig = replace(model.config.decoder, **changes)  # type: ignore[arg-type]
    changed = Vlm(replace(model.config, decoder=decoder))
    changed.initialize(0)
    return changed.eval()


def paths(model: Vlm, precision: str = "int4-b32") -> set[str]:
    return set(quantize_decoder(model, precision).weights)


def under_layers(names: set[str]) -> set[str]:
    return {f"decoder.layers.{number}.{name}" for number in range(2) for name in names}


def test_every_linear_layer_of_the_decoder_and_the_tied_head_are_rounded(tiny: Vlm) -> None:
    assert paths(tiny) == under_layers(ATTENTION | SWIGLU) | {"lm_head"}


def test_layers_of_gpt2_have_their_own_names(tiny: Vlm) -> None:
    model = with_decoder(tiny, mlp="gelu", norm="layer", positions="learned", num_key_value_heads=2)
    assert paths(model) == under_layers(ATTENTION | {"mlp.fc1", "mlp.fc2"}) | {"lm_head"}


def test_attention_stays_float_where_the_graph_pads_its_heads(tiny: Vlm) -> None:
    assert paths(with_decoder(tiny, head_dim=24)) == under_layers(SWIGLU) | {"lm_head"}


def test_head_of_its_own_is_rounded_and_not_the_embedding(tiny: Vlm) -> None:
    model = with_decoder(tiny, tie_word_embeddings=False)
    head = quantize_decoder(model, "int8").weights["lm_head"]
    assert model.lm_head is not None
    torch.testing.assert_close(head.dequantize(), model.lm_head.weight.detach(), atol=2e-3, rtol=0)


def test_head8_rounds_the_head_alone_to_8_bits(tiny: Vlm) -> None:
    quantized = quantize_decoder(tiny, "int4-head8")
    assert quantized.precision == "int4-b128-head8"
    assert {path for path, weight in quantized.weights.items() if weight.bits == 8} == {"lm_head"}


def test_importance_reaches_the_matrix_that_it_is_of(tiny: Vlm) -> None:
    path = "decoder.layers.1.mlp.down_proj"
    counts = torch.rand(128, generator=torch.Generator().manual_seed(0)) ** 4
    plain, weighted = (quantize_decoder(tiny, "int4-b32", importance=i).weights for i in (None, {path: counts}))
    assert {name for name in plain if not torch.equal(plain[name].codes, weighted[name].codes)} == {path}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_float_precision_rounds_nothing_and_says_so(tiny: Vlm, precision: str) -> None:
    with pytest.raises(ConfigError, match=f"{precision} rounds nothing"):
        quantize_decoder(tiny, precision)


def test_matrix_that_cannot_be_rounded_is_named(tiny: Vlm) -> None:
    broken = tiny.get_submodule("decoder.layers.1.self_attn.k_proj")
    assert isinstance(broken, nn.Linear)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"decoder\.layers\.1\.self_attn\.k_proj: .*NaN"):
        quantize_decoder(tiny, "int4")


def test_report_counts_weights_up_to_all_of_them(tiny: Vlm) -> None:
    told: list[tuple[int, int]] = []
    quantize_decoder(tiny, "int8-dynamic", report=lambda done, total: told.append((done, total)))
    total = sum(layer.weight.numel() for _, layer in linear_layers(tiny)) + tiny.head_weight.numel()
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


def test_rounded_model_shares_what_it_does_not_round_and_leaves_the_original_alone(tiny: Vlm) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    fake = fake_quantized(tiny, quantize_decoder(tiny, "int4-b32"))
    own = {name for name, tensor in fake.state_dict().items() if not _shared(tensor, tiny)}
    assert own == {f"{name}.weight" for name in paths(tiny)}
    assert fake.embed_tokens is tiny.embed_tokens
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


@pytest.mark.parametrize(("precision", "largest"), [("int8", 0.05), ("int8-dynamic", 0.1), ("int4-b32", 0.7)])
def test_rounded_model_is_near_the_original_but_not_it(tiny: Vlm, precision: str, largest: float) -> None:
    fake = fake_quantized(tiny, quantize_decoder(tiny, precision))
    rows = tiny.embed_tokens(torch.arange(20)[None]).detach().numpy()
    found, reference = (TorchSession(model).prefill(rows) for model in (fake, tiny))
    distance = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
    assert 1e-4 < distance < largest


def test_biases_and_norms_of_heads_are_kept(tiny: Vlm) -> None:
    model = with_decoder(tiny, attention_bias=True, qk_norm=True)
    for parameter in model.decoder.parameters():
        parameter.data += 0.1
    fake = fake_quantized(model, quantize_decoder(model, "int8"))
    rows = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, reference = fake.decoder(rows), model.decoder(rows)
    torch.testing.assert_close(found, reference, atol=0.1, rtol=0)


def test_blocks_of_a_row_are_rounded_by_their_own_largest_value() -> None:
    inputs = torch.tensor([[127.0, 0.4, -126.6, 1.27, 0.004, 0.0]])
    found = round_in_blocks(inputs, 3)
    torch.testing.assert_close(found, torch.tensor([[127.0, 0.0, -127.0, 1.27, 0.0, 0.0]]))
    torch.testing.assert_close(round_in_blocks(inputs, 4)[0, 4:], torch.tensor([0.004, 0.0]))  # a short last block


def test_a_call_is_rounded_by_its_own_range_with_zero_in_it() -> None:
    inputs = torch.tensor([[1.0, 2.55], [1.004, 0.0]])
    torch.testing.assert_close(round_per_call(inputs), torch.tensor([[1.0, 2.55], [1.0, 0.0]]))
    below = round_per_call(torch.tensor([[-1.0, 1.55]]))
    torch.testing.assert_close(below, torch.tensor([[-1.0, 1.55]]))
    assert round_per_call(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def _shared(tensor: Tensor, model: Vlm) -> bool:
    return any(tensor.data_ptr() == other.data_ptr() for other in model.state_dict().values())
