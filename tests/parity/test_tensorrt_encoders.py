"""Encoders and fusion lowered for TensorRT, computed in their own types on the CPU, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgevlm.bundle.manifest import PartFile
from edgevlm.export.heard import Heard
from edgevlm.export.parts import Part, split, traced_module
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_tensorrt import TensorRtTarget
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes.typed_graph import rounding_graph
from edgevlm.shapes.config import (
    DecoderConfig,
    FastVitConfig,
    HybridConfig,
    MlpConfig,
    PoolConfig,
    QueriesConfig,
    StemVitConfig,
    UnshuffleConfig,
    VitConfig,
    VlmConfig,
)
from edgevlm.shapes.fusion import FusionConfig

Float = NDArray[np.float32]
Vision: TypeAlias = HybridConfig | VitConfig | FastVitConfig | StemVitConfig
Projector: TypeAlias = MlpConfig | UnshuffleConfig | PoolConfig | QueriesConfig

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
ENCODERS: dict[str, tuple[Vision, Projector]] = {
    "fastvit-mlp": (FASTVIT, MlpConfig()),
    "hybrid-pool": (HYBRID, PoolConfig()),
    "siglip-unshuffle": (VIT, UnshuffleConfig()),
    "clip-mlp": (CLIP, MlpConfig()),
    "clip-queries": (CLIP, QueriesConfig(num_queries=4)),
    "stem-vit": (STEM, MlpConfig(num_layers=1, final_gelu=True)),
}
ERRORS = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.12, "fp8": 0.15}  # relative L2; random layers count alike
FUSION = FusionConfig(num_layers=2, grid_size=2, resolution_ratio=2)


@pytest.fixture(autouse=True)
def same_biases() -> None:
    """``spread_out`` adds to what biases are, and PyTorch begins them at random."""
    torch.manual_seed(0)


def pictures(num: int, side: int, seed: int = 0) -> Float:
    """Smooth colours with a little noise, as pictures are: [num, 3, side, side] in [0, 1]."""
    dice = np.random.default_rng(seed)
    coarse = np.kron(dice.random((num, 3, 4, 4)), np.ones((1, 1, side // 4, side // 4)))
    return np.asarray(0.8 * coarse + 0.2 * dice.random((num, 3, side, side)), np.float32)


def run(folder: Path, file: PartFile, feeds: dict[str, Float]) -> list[Float]:
    """The outputs of a graph.

    Without kernels of its own for bfloat16, ONNX Runtime rounds to it behind every node; where codes are, it is not to
    move them about, since of 8-bit floats it can neither slice nor transpose any.
    """
    onnx.checker.check_model(str(folder / file.file), full_check=True)
    options, graph = onnxruntime.SessionOptions(), str(folder / file.file)
    options.log_severity_level = 3
    if file.precision in ("int8", "fp8"):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if file.precision == "bf16":
        session = onnxruntime.InferenceSession(rounding_graph(folder / file.file).model, options)
    else:
        session = onnxruntime.InferenceSession(graph, options)
    return [np.asarray(found, np.float32) for found in session.run(None, feeds)]


def lower(part: Part, folder: Path, precision: str, heard: Heard | None = None) -> PartFile:
    extras = Extras() if heard is None else Extras(feeds=heard.feeds(part))
    return TensorRtTarget(Lowering()).lower(part, folder, precision, extras)


def error(found: Float, expected: Float) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def pairs() -> Iterator[object]:
    """Every encoder in every precision; quickly in the usual one, and one of them in all."""
    for name in ENCODERS:
        for precision in ERRORS:
            quick = precision == "fp16" or name == "hybrid-pool"
            yield pytest.param(name, precision, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "precision"), list(pairs()))
def test_an_encoder_is_near_pytorch(
    name: str, precision: str, spread_out: Callable[..., nn.Module], tmp_path: Path
) -> None:
    vision, projector = ENCODERS[name]
    model = spread_out(Vlm(VlmConfig(vision=vision, projector=projector, decoder=DECODER)))
    assert isinstance(model, Vlm)
    part, side = split(model)[0], vision.image_size
    heard = Heard(pixels=[pictures(1, side, seed) for seed in range(16)])
    file, pixels = lower(part, tmp_path, precision, heard), pictures(2, side, seed=99)
    with torch.no_grad():
        expected = traced_module(part).eval()(torch.from_numpy(pixels)).numpy()
    assert error(run(tmp_path, file, {"pixel_values": pixels})[0], expected) < ERRORS[precision]
    assert (file.kept_wide, file.target, file.cache, file.in_place) == ((), "tensorrt", "shared", "")


@pytest.mark.parametrize("precision", ["fp16", pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_an_encoder_with_pre_fusion_and_its_fusion(
    precision: str, spread_out: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Five views at once to tokens and cache, and text that sees the cache."""
    model = spread_out(Vlm(VlmConfig(vision=CLIP, projector=MlpConfig(), decoder=DECODER, fusion=FUSION)))
    assert isinstance(model, Vlm)
    encoder, fusion, *_ = split(model)
    heard = Heard(pixels=[pictures(5, 32, seed) for seed in range(2)])
    pixels, text = pictures(5, 32, seed=9), np.random.default_rng(0).standard_normal((1, 7, 64), np.float32)
    with torch.no_grad():
        expected = [found.numpy() for found in model.encode_fused(torch.from_numpy(pixels))]
        fused = model.fuse(torch.from_numpy(expected[1]), torch.from_numpy(text)).numpy()
    tokens, cache = run(tmp_path, lower(encoder, tmp_path, precision, heard), {"pixel_values": pixels})
    feeds = {"inputs_embeds": text, "fusion_cache": expected[1]}
    (found,) = run(tmp_path, lower(fusion, tmp_path, precision, Heard(fused=[feeds])), feeds)
    distances = [error(*pair) for pair in ((tokens, expected[0]), (cache, expected[1]), (found, fused))]
    assert max(distances) < ERRORS[precision]


def test_one_graph_of_free_sizes_serves_all_pictures(spread_out: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = spread_out(Vlm(VlmConfig(vision=HYBRID, projector=MlpConfig(), decoder=DECODER)))
    assert isinstance(model, Vlm)
    part = split(model, free_sizes=True)[0]
    heard = Heard(pixels=[pictures(1, side, side) for side in (32, 64)])
    file = lower(part, tmp_path, "fp16", heard)
    for side in (32, 64):
        pixels = pictures(2, side, seed=5)
        with torch.no_grad():
            expected = traced_module(part).eval()(torch.from_numpy(pixels)).numpy()
        assert error(run(tmp_path, file, {"pixel_values": pixels})[0], expected) < ERRORS["fp16"]
