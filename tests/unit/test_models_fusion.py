"""Compression and pre-fusion: what holds for the parts, whatever encoder and decoder stand around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgevlm.core.errors import ConfigError, UnsupportedError, UsageError
from edgevlm.distill.recipe import Optimization, SceneData, TrainRecipe
from edgevlm.families.folder import ModelFolder
from edgevlm.families.native import FAMILY
from edgevlm.families.tensors import read_headers
from edgevlm.models.checkpoint import save_native
from edgevlm.models.compressor import PoolCompressor, QueryCompressor
from edgevlm.models.decoder import causal_mask, rotary_table
from edgevlm.models.fusion import one_raster
from edgevlm.models.grid_positions import resized_grid, sine_grid
from edgevlm.models.vision.reparameterize import reparameterize
from edgevlm.models.vlm import Vlm
from edgevlm.models.weights import load_weights
from edgevlm.shapes.config import (
    DecoderConfig,
    FusionConfig,
    HybridConfig,
    Llama3Scaling,
    MlpConfig,
    PoolConfig,
    VitConfig,
    VlmConfig,
)

HYBRID = HybridConfig(image_size=48, widths=(16, 32), depths=(1, 1))
VIT = VitConfig(
    image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
DECODER = DecoderConfig(
    vocab_size=80,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rope_scaling=Llama3Scaling(original_max_position_embeddings=32),
)
FUSION = FusionConfig(num_layers=2, grid_size=2, num_heads=4)


def make(fusion: FusionConfig = FUSION, vision: HybridConfig | VitConfig = VIT, **decoder: object) -> Vlm:
    """Spread-out weights, so that mistakes show."""
    config = VlmConfig(
        vision=vision,
        projector=MlpConfig(),
        decoder=replace(DECODER, **decoder),
        fusion=fusion,  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    model = Vlm(config)
    model.initialize(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def views(model: Vlm, seed: int = 0) -> Tensor:
    side = model.config.vision.image_size
    return torch.randn(model.config.num_views, 3, side, side, generator=torch.Generator().manual_seed(seed))


def text(num_rows: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, num_rows, 64, generator=torch.Generator().manual_seed(9))


def test_the_grid_of_positions_tells_columns_before_rows_and_sines_before_cosines() -> None:
    table = sine_grid(2, 8)
    right, below = table[1], table[2]
    sine, cosine = [0.8414710, 0.0099998], [0.5403023, 0.9999500]  # of 1 and of 1 / 100
    torch.testing.assert_close(right, torch.tensor([*sine, *cosine, 0, 0, 1, 1]))
    torch.testing.assert_close(below, torch.tensor([0, 0, 1, 1, *sine, *cosine]))


def test_a_table_that_fits_is_not_stretched_and_one_point_stretches_to_equal_ones() -> None:
    table = sine_grid(3, 16)
    assert resized_grid(table, 3) is table
    assert resized_grid(table[:1], 4).unique(dim=0).shape == (1, 16)


def test_positions_need_a_width_that_four_divides() -> None:
    with pytest.raises(ConfigError, match="4 divides, got 30"):
        sine_grid(2, 30)


@pytest.mark.parametrize("grid_size", [1, 2, 3])
@pytest.mark.parametrize(("width", "num_heads"), [(32, 8), (48, 3), (64, 1)])
@torch.no_grad()
def test_the_baked_compressor_is_the_same_map(grid_size: int, width: int, num_heads: int) -> None:
    torch.manual_seed(0)
    compressor = QueryCompressor(FusionConfig(grid_size=grid_size, num_heads=num_heads), width, 6)
    for parameter in compressor.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    features = 2 * torch.randn(3, 36, width)
    expected = compressor(features)
    assert (compressor.bake()(features) - expected).abs().max() <= 2e-6 * expected.abs().max()


@torch.no_grad()
def test_positions_of_the_features_matter_to_several_queries_and_not_to_one() -> None:
    torch.manual_seed(0)
    features, order = torch.randn(1, 36, 32), torch.randperm(36)
    for grid_size, moves in ((1, False), (2, True)):
        compressor = QueryCompressor(FusionConfig(grid_size=grid_size, num_heads=4), 32, 6)
        compressor.query += torch.randn_like(compressor.query)
        difference = (compressor(features) - compressor(features[:, order])).abs().max()
        assert (difference > 1e-3) == moves


def test_pooling_averages_the_cells_of_a_grid_row_by_row() -> None:
    features = torch.arange(16.0).view(1, 16, 1)
    assert PoolCompressor(2, 4)(features).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert PoolCompressor(1, 4)(features).item() == 7.5
    assert PoolCompressor(3, 4)(features)[0, 0].item() == 2.5  # rows and columns 0 and 1: cells overlap


def test_crops_become_one_raster_in_reading_order() -> None:
    crops = torch.arange(16.0).view(1, 4, 4, 1)  # four crops of 2 x 2
    assert one_raster(crops).view(4, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("compressor", ["query", "pool"])
@pytest.mark.parametrize("vision", [HYBRID, VIT], ids=["hybrid", "vit"])
@torch.no_grad()
def test_picture_and_text_apart_equal_all_rows_in_one_pass(
    vision: HybridConfig | VitConfig, compressor: str, ratio: int
) -> None:
    model = make(replace(FUSION, compressor=compressor, resolution_ratio=ratio), vision)  # type: ignore[arg-type]
    fusion, rows = model.fusion, text(9)
    assert fusion is not None
    features = model.vision_encoder(views(model))
    crops = one_raster(features[None, :-1]) if ratio > 1 else features
    seen = torch.cat((crops, features[-1:]), dim=1) if ratio > 1 else crops
    hidden = torch.cat((model.projector(seen), model.projector(fusion.compressor(crops)), rows), dim=1)
    rotary = rotary_table(torch.arange(hidden.shape[1]).unsqueeze(0), model.config.decoder)
    for layer in fusion.layers:
        hidden = layer(hidden, rotary, causal_mask(hidden.shape[1], 0, hidden.device), None)
    tokens, cache = model.encode_fused(views(model))
    assert cache.shape == (2, 2, 2, seen.shape[1] + 4, 16)
    scale = hidden.abs().max()
    torch.testing.assert_close(tokens / scale, hidden[:, -13:-9] / scale, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.fuse(cache, rows) / scale, hidden[:, -9:] / scale, atol=1e-6, rtol=0)


@torch.no_grad()
def test_text_in_parts_that_share_a_beginning_is_fused_alike() -> None:
    model = make()
    _, cache = model.encode_fused(views(model))
    torch.testing.assert_close(model.fuse(cache, text(9)[:, :5]), model.fuse(cache, text(9))[:, :5], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_that_are_not_kept_are_as_if_absent_and_come_back_unchanged() -> None:
    model, rows = make(), text(8, batch=2)
    pictures = torch.stack((views(model, 0), views(model, 1)))
    kept = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    tokens, fused = model.forward_fused(pictures, rows, kept)
    for number in range(2):
        alone, cache = model.encode_fused(pictures[number])
        torch.testing.assert_close(tokens[number], alone[0], atol=1e-5, rtol=0)
        expected = model.fuse(cache, rows[number, kept[number]][None])[0]
        torch.testing.assert_close(fused[number, kept[number]], expected, atol=1e-5, rtol=0)
        assert torch.equal(fused[number, ~kept[number]], rows[number, ~kept[number]])


def test_gradients_reach_all_that_is_fused_and_no_embedding() -> None:
    model = make(vision=HYBRID).train()
    rows = model.embed_tokens(torch.arange(6).unsqueeze(0))
    tokens, fused = model.forward_fused(views(model)[None], rows, torch.ones(1, 6, dtype=torch.bool))
    (tokens.square().sum() + fused.square().sum()).backward()
    lacking = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(name.startswith(("embed_tokens.", "decoder.")) for name in lacking)
    assert "embed_tokens.weight" in lacking


def test_a_fresh_fusion_begins_as_the_first_layers_of_the_decoder() -> None:
    config = VlmConfig(vision=VIT, projector=MlpConfig(), decoder=DECODER, fusion=FUSION)
    model, again = Vlm(config), Vlm(config)
    model.initialize(3)
    again.initialize(3)
    assert model.fusion is not None
    for mine, its in zip(model.fusion.layers, model.decoder.layers, strict=False):
        assert all(torch.equal(tensor, its.state_dict()[name]) for name, tensor in mine.state_dict().items())
    for name, tensor in model.fusion.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[f"fusion.{name}"])


@torch.no_grad()
def test_a_native_checkpoint_holds_the_fusion_in_inference_form(tmp_path: Path) -> None:
    model = make()
    tokens, cache = model.encode_fused(views(model))
    save_native(reparameterize(model), tmp_path, dtype=torch.float32)
    config = FAMILY.config(ModelFolder(tmp_path))
    again = load_weights(config, read_headers(tmp_path), FAMILY, torch.float32, where="here").eval()
    found_tokens, found_cache = again.encode_fused(views(again))
    torch.testing.assert_close(found_tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_cache, cache, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ratio", "num_views"), [(1, 1), (2, 5), (3, 10)])
def test_views_are_counted(ratio: int, num_views: int) -> None:
    model = make(replace(FUSION, resolution_ratio=ratio))
    assert model.config.num_views == num_views
    with pytest.raises(UsageError, match=f"2 views of one picture; the model takes {num_views}"):
        model.encode_fused(torch.zeros(2, 3, 32, 32))


def test_a_model_without_fusion_says_so() -> None:
    model = Vlm(VlmConfig(vision=VIT, projector=MlpConfig(), decoder=DECODER))
    with pytest.raises(UnsupportedError, match="no pre-fusion"):
        model.encode_fused(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UnsupportedError, match="no pre-fusion"):
        model.fuse(torch.zeros(1, 2, 2, 5, 16), text(3))


def test_training_says_that_it_does_not_fuse_yet() -> None:
    model = VlmConfig(vision=HYBRID, projector=MlpConfig(), decoder=replace(DECODER, vocab_size=4096), fusion=FUSION)
    with pytest.raises(UnsupportedError, match="training does not fuse"):
        TrainRecipe(
            name="x",
            model=model,
            data=SceneData(num_scenes=64),
            optimization=Optimization(steps=1, warmup_steps=0, decay_steps=0),
        )


def test_what_does_not_go_with_fusion_is_refused() -> None:
    with pytest.raises(ConfigError, match="fusion needs a projector of type mlp"):
        VlmConfig(vision=VIT, projector=PoolConfig(), decoder=DECODER, fusion=FUSION)
    with pytest.raises(ConfigError, match="rotary positions, found mlp and learned"):
        VlmConfig(vision=VIT, projector=MlpConfig(), decoder=replace(DECODER, positions="learned"), fusion=FUSION)
    with pytest.raises(ConfigError, match="no place for a projector's end_row"):
        VlmConfig(vision=VIT, projector=MlpConfig(end_row=True), decoder=DECODER, fusion=FUSION)
    with pytest.raises(ConfigError, match="width 32 does not divide by 5 heads"):
        make(replace(FUSION, num_heads=5))
