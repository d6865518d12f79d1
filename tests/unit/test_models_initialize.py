"""Fresh weights follow from the seed alone."""

from __future__ import annotations

import pytest
import torch

from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import (
    DecoderConfig,
    FastVitConfig,
    FusionConfig,
    HybridConfig,
    MlpConfig,
    QueriesConfig,
    StemVitConfig,
    UnshuffleConfig,
    VitConfig,
    VlmConfig,
)

DECODER = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
VIT = VitConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    class_token=True,
    pre_layernorm=True,
)
STEM = StemVitConfig(image_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
FAST = FastVitConfig(image_size=64, depths=(1, 1, 1, 1, 1), widths=(8, 16, 32, 32, 32))
MODELS = {
    "hybrid": VlmConfig(
        vision=HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1)), projector=UnshuffleConfig(), decoder=DECODER
    ),
    "vit": VlmConfig(vision=VIT, projector=MlpConfig(), decoder=DECODER),
    "fastvit": VlmConfig(vision=FAST, projector=MlpConfig(), decoder=DECODER),
    "stem": VlmConfig(vision=STEM, projector=MlpConfig(), decoder=DECODER),
    "queries": VlmConfig(
        vision=VIT, projector=QueriesConfig(num_queries=2, table_size=4, num_heads=2), decoder=DECODER
    ),
    "fusion": VlmConfig(
        vision=VIT, projector=MlpConfig(), decoder=DECODER, fusion=FusionConfig(num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_gives_one_model_and_another_gives_another(name: str) -> None:
    models = []
    for before, seed in enumerate((0, 0, 1)):
        torch.manual_seed(before)  # what modules draw while they are built differs
        models.append(Vlm(MODELS[name]))
        models[-1].initialize(seed)
    first, again, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    drawn = {name for name, tensor in first.items() if tensor.unique().numel() > 1 and tensor.requires_grad}
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("name", ["vit", "queries"])
def test_positions_class_and_queries_are_small_normal_values(name: str) -> None:
    model = Vlm(MODELS[name]).requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(7.0)
    model.initialize(0)
    names = ("position_embedding", "class_embedding", "projector.query")
    found = [tensor for key, tensor in model.named_parameters() if key.endswith(names)]
    assert len(found) == (2 if name == "vit" else 3)
    assert all(0.01 < float(tensor.std()) < 0.03 for tensor in found)
