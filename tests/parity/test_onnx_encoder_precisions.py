"""Encoders in float16 and int8, cleaned, with fixed or free sizes, against PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgevlm.core.errors import UnsupportedError
from edgevlm.export.clean_graph import clean
from edgevlm.export.encoder_int8 import quantize_static
from edgevlm.export.half_graph import to_half
from edgevlm.export.parts import split, traced_module
from edgevlm.export.to_onnx import traced_graph
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import (
    DecoderConfig,
    FastVitConfig,
    FusionConfig,
    HybridConfig,
    MlpConfig,
    PoolConfig,
    QueriesConfig,
    StemVitConfig,
    UnshuffleConfig,
    VitConfig,
    VlmConfig,
)

Float = NDArray[np.float32]

DECODER = DecoderConfig(
    vocab_size=80,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=32,
)
FASTVIT = FastVitConfig(
    image_size=64, depths=(1, 1, 1), widths=(16, 32, 64), num_attention_stages=1, head_dim=16, num_gated_downsamples=1
)
HYBRID = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
VIT = VitConfig(
    image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
CLIP = replace(VIT, hidden_act="quick_gelu", class_token=True, pre_layernorm=True, post_layernorm=False)
STEM = StemVitConfig(image_size=32, patch_size=8, hidden_size=50, num_hidden_layers=2, num_attention_heads=2)
ENCODERS = {
    "fastvit-mlp": (FASTVIT, MlpConfig()),
    "hybrid-pool": (HYBRID, PoolConfig()),
    "siglip-unshuffle": (VIT, UnshuffleConfig()),
    "clip-mlp": (CLIP, MlpConfig()),
    "clip-queries": (CLIP, QueriesConfig(num_queries=4)),
    "stem-vit": (STEM, MlpConfig(num_layers=1, final_gelu=True)),
}
HALF_ERROR = 5e-3  # relative L2; float16 has 11 bits, and sums of some hundred terms lose two or three
NUM_CALIBRATION = 32  # pictures, as an export takes: ranges from two of them cut what the third one holds
INT8_ERROR = 7e-2
"""Relative L2 of these random encoders, whose layers all count alike.

Rounding a tensor to 8 bits costs some 0.9 % of it (256 levels over 8 standard deviations), and rounded layers add up in
squares: the 14 of one FastViT, alone 0.4 to 1.9 % each, give 3.5 %, and all together measured the same.  Ten random
FastViTs had 1.4 to 6.4 %, four of every other encoder up to 3.1 %; weight scales wrong by a tenth gave 30 % and more.
"""


@pytest.fixture(autouse=True)
def same_biases() -> None:
    """``spread_out`` adds to what biases are, and PyTorch begins them at random."""
    torch.manual_seed(0)


def model_of(name: str, spread_out: Callable[..., nn.Module]) -> Vlm:
    vision, projector = ENCODERS[name]
    return spread_out(Vlm(VlmConfig(vision=vision, projector=projector, decoder=DECODER)))  # type: ignore[return-value]


def pictures(num: int, height: int, width: int, seed: int = 0) -> Float:
    """Smooth colours with a little noise, as pictures are: [num, 3, height, width] in [0, 1]."""
    dice = np.random.default_rng(seed)
    coarse = np.kron(dice.random((num, 3, 4, 4)), np.ones((1, 1, height // 4, width // 4)))
    return np.asarray(0.8 * coarse + 0.2 * dice.random((num, 3, height, width)), np.float32)


def graph_of(model: Vlm, **options: bool) -> ir.Model:
    graph = traced_graph(split(model, **options)[0])
    clean(graph)
    return graph


def run(graph: ir.Model, folder: Path, pixels: Float, *, fused: bool = True) -> Float:
    """The first output of the graph for ``pixels``."""
    options = onnxruntime.SessionOptions()
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    ir.save(graph, folder / "graph.onnx")
    session = onnxruntime.InferenceSession(str(folder / "graph.onnx"), options)
    return np.asarray(session.run(None, {"pixel_values": pixels})[0])


@torch.no_grad()
def expected_of(model: Vlm, pixels: Float) -> Float:
    return np.asarray(traced_module(split(model)[0]).eval()(torch.from_numpy(pixels)).numpy())


def error(found: Float, expected: Float) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def kinds(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_clean_graph_computes_the_same(name: str, spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = model_of(name, spread_out)
    pixels = pictures(3, *2 * [model.config.vision.image_size])
    graph = graph_of(model)
    assert error(run(graph, tmp_path, pixels), expected_of(model, pixels)) < 1e-5
    assert not {"BatchNormalization", "Erf", "Cast"} & set(kinds(graph))
    assert kinds(graph)["Shape"] <= int("clip" in name or "stem" in name)  # a class token for each picture


@pytest.mark.parametrize("name", ENCODERS)
def test_float16_is_near_pytorch(name: str, spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = model_of(name, spread_out)
    pixels = pictures(2, *2 * [model.config.vision.image_size])
    graph = graph_of(model)
    to_half(graph)
    found = run(graph, tmp_path, pixels)
    assert found.dtype == np.float32
    assert 0 < error(found, expected_of(model, pixels)) < HALF_ERROR
    assert not [value for value in graph.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]


@pytest.mark.parametrize("name", ENCODERS)
def test_int8_is_near_pytorch_and_fused_as_unfused(
    name: str, spread_out: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = model_of(name, spread_out)
    side = model.config.vision.image_size
    graph, pixels = graph_of(model), pictures(2, side, side, seed=1)
    report = quantize_static(graph, [pictures(NUM_CALIBRATION, side, side)])
    found, unfused = run(graph, tmp_path, pixels), run(graph, tmp_path, pixels, fused=False)
    assert report.quantized
    assert error(found, unfused) < INT8_ERROR / 2
    assert 0 < error(found, expected_of(model, pixels)) < INT8_ERROR


def test_depthwise_convolutions_stay_float_unless_asked_for(spread_out: Callable[..., nn.Module]) -> None:
    model, batches = model_of("fastvit-mlp", spread_out), [pictures(2, 64, 64)]
    usual, all_of_them = graph_of(model), graph_of(model)
    num_kept = len(quantize_static(usual, batches).kept_float)
    report = quantize_static(all_of_them, batches, depthwise=True)
    assert len(report.kept_float) == 4 < num_kept  # two gates' two convolutions of one pixel
    depthwise = [node for node in usual.graph if node.op_type == "Conv" and node.attributes["group"].as_int() > 1]
    assert depthwise
    assert all(node.inputs[1] in usual.graph.initializers.values() for node in depthwise)


def test_a_static_batch_fixes_every_size(spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    model, pixels = model_of("siglip-unshuffle", spread_out), pictures(1, 32, 32)
    graph = graph_of(model, static_batch=True)
    assert all(isinstance(size, int) for value in graph.graph.inputs for size in value.shape or ())
    assert "Shape" not in kinds(graph)
    assert error(run(graph, tmp_path, pixels), expected_of(model, pixels)) < 1e-5
    quantize_static(graph, [pictures(NUM_CALIBRATION, 32, 32)])
    assert error(run(graph, tmp_path, pixels), expected_of(model, pixels)) < INT8_ERROR


@pytest.mark.parametrize(("vision", "stride"), [(FASTVIT, 16), (HYBRID, 8)], ids=["fastvit", "hybrid"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_one_graph_serves_pictures_of_any_size(
    vision: FastVitConfig | HybridConfig,
    stride: int,
    precision: str,
    spread_out: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    """In int8 the ranges come from pictures of every size: those of 64 pixels alone cost 15 to 19 % at 128."""
    sizes = ((4, 4), (8, 8), (8, 4))
    model = spread_out(Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=DECODER)))
    assert isinstance(model, Vlm)
    graph = graph_of(model, free_sizes=True)
    if precision == "fp16":
        to_half(graph)
    if precision == "int8":
        each = NUM_CALIBRATION // 2
        quantize_static(graph, [pictures(each, rows * stride, columns * stride) for rows, columns in sizes])
    allowed = {"fp32": 1e-5, "fp16": HALF_ERROR, "int8": INT8_ERROR}[precision]
    for rows, columns in sizes:
        pixels = pictures(2, rows * stride, columns * stride, seed=1)
        found = run(graph, tmp_path, pixels)
        assert found.shape == (2, rows * columns, 64)
        assert error(found, expected_of(model, pixels)) < allowed


@pytest.mark.parametrize("name", ["siglip-unshuffle", "hybrid-pool", "clip-mlp", "stem-vit"])
def test_other_encoders_read_one_size(name: str, spread_out: Callable[..., nn.Module]) -> None:
    with pytest.raises(UnsupportedError, match="one size"):
        split(model_of(name, spread_out), free_sizes=True)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_encoder_with_pre_fusion(precision: str, spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Its graph reads five views at once and gives two outputs; calibration pictures come as five views, too."""
    fusion = FusionConfig(num_layers=2, grid_size=2, resolution_ratio=2)
    model = spread_out(Vlm(VlmConfig(vision=CLIP, projector=MlpConfig(), decoder=DECODER, fusion=fusion)))
    assert isinstance(model, Vlm)
    part, pixels = split(model)[0], pictures(5, 32, 32, seed=1)
    graph = traced_graph(part)
    clean(graph)
    with torch.no_grad():
        tokens, _ = traced_module(part)(torch.from_numpy(pixels))
    if precision == "fp16":
        to_half(graph)
    else:
        quantize_static(graph, [pictures(5, 32, 32), pictures(5, 32, 32, seed=2)])
    allowed = HALF_ERROR if precision == "fp16" else INT8_ERROR
    assert 0 < error(run(graph, tmp_path, pixels), tokens.numpy()) < allowed
