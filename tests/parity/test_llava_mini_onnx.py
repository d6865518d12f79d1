"""Models with pre-fusion as graphs, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgevlm.export.parts import split
from edgevlm.export.target import Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import (
    DecoderConfig,
    FusionConfig,
    HybridConfig,
    Llama3Scaling,
    MlpConfig,
    VitConfig,
    VlmConfig,
)

CLIP = VitConfig(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    hidden_act="quick_gelu",
    class_token=True,
    pre_layernorm=True,
    post_layernorm=False,
)
HYBRID = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
DECODER = DecoderConfig(
    vocab_size=80,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
    rope_scaling=Llama3Scaling(original_max_position_embeddings=32),
    tie_word_embeddings=False,
)
MODELS = {
    "one-token": (CLIP, FusionConfig(num_layers=3, grid_size=1)),
    "high-resolution": (CLIP, FusionConfig(num_layers=2, grid_size=2, resolution_ratio=2)),
    "three-by-three": (CLIP, FusionConfig(num_layers=1, grid_size=3, num_heads=4)),
    "hybrid": (HYBRID, FusionConfig(num_layers=2, grid_size=2, num_heads=4)),
    "hybrid-pool": (HYBRID, FusionConfig(num_layers=2, grid_size=3, compressor="pool")),
}
ATOL = 2e-5  # of values up to about 5


def model_of(name: str, spread_out: Callable[..., nn.Module]) -> Vlm:
    vision, fusion = MODELS[name]
    model = spread_out(Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=DECODER, fusion=fusion)))
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model  # type: ignore[return-value]


def lower(model: Vlm, name: str, folder: Path, **options: bool) -> onnxruntime.InferenceSession:
    part = next(part for part in split(model) if part.name == name)
    return onnxruntime.InferenceSession(str(folder / OnnxTarget(Lowering(**options)).lower(part, folder).file))


@pytest.mark.parametrize("name", MODELS)
def test_both_graphs_equal_pytorch(name: str, spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = model_of(name, spread_out)
    assert [part.name for part in split(model)] == ["vision_encoder", "fusion", "embed_tokens", "decoder_model_merged"]
    encoder, fusion, reference = (
        lower(model, "vision_encoder", tmp_path),
        lower(model, "fusion", tmp_path),
        TorchSession(model),
    )
    random = np.random.default_rng(0)
    pixels = random.standard_normal((model.config.num_views, 3, 32, 32), np.float32)
    tokens, cache = encoder.run(None, {"pixel_values": pixels})
    features = reference.encode(pixels)
    assert features.fusion_cache is not None
    np.testing.assert_allclose(tokens, features.tokens, atol=ATOL)
    np.testing.assert_allclose(cache, features.fusion_cache, atol=ATOL)
    for num_rows in (1, 2, 40):
        rows = random.standard_normal((1, num_rows, 64), np.float32)
        (fused,) = fusion.run(None, {"inputs_embeds": rows, "fusion_cache": cache})
        np.testing.assert_allclose(fused, reference.fuse(features, rows), atol=ATOL)


def test_sizes_are_fixed_but_for_the_length_of_the_text(spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = model_of("high-resolution", spread_out)
    encoder, fusion = lower(model, "vision_encoder", tmp_path), lower(model, "fusion", tmp_path)
    shapes = {value.name: value.shape for value in (*encoder.get_inputs(), *encoder.get_outputs())}
    cache = [2, 2, 1, 4 * 16 + 16 + 4, 32]
    assert shapes == {"pixel_values": [5, 3, 32, 32], "image_features": [1, 4, 64], "fusion_cache": cache}
    shapes = {value.name: value.shape for value in (*fusion.get_inputs(), *fusion.get_outputs())}
    rows = [1, "sequence", 64]
    assert shapes == {"inputs_embeds": rows, "fusion_cache": cache, "fused_embeds": rows}


def test_the_graph_holds_the_baked_compressor(spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    lower(model_of("three-by-three", spread_out), "vision_encoder", tmp_path)
    graph = onnx.load(tmp_path / "onnx" / "vision_encoder.onnx").graph
    assert {node.op_type for node in graph.node}.isdisjoint({"Resize", "MultiHeadAttention", "Attention"})
    names = {weight.name for weight in graph.initializer}
    assert any("compressor.scores" in name for name in names)
    assert not any("compressor.query" in name or "compressor.k_proj" in name for name in names)


def test_half_storage_halves_the_fusion_and_changes_no_weight(
    spread_out: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = model_of("one-token", spread_out)
    (tmp_path / "half").mkdir()
    whole, half = lower(model, "fusion", tmp_path), lower(model, "fusion", tmp_path / "half", half_storage=True)
    feeds = {
        "inputs_embeds": torch.randn(1, 7, 64).numpy(),
        "fusion_cache": torch.randn(3, 2, 1, 17, 32).numpy(),
    }
    assert np.array_equal(whole.run(None, feeds)[0], half.run(None, feeds)[0])
    sizes = [(folder / "onnx" / "fusion.onnx").stat().st_size for folder in (tmp_path, tmp_path / "half")]
    assert sizes[1] < 0.8 * sizes[0]
