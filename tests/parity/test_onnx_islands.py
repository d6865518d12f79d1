"""Models whose activations float16 cannot hold: with islands they compute what float32 does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgevlm.export.clean_graph import clean
from edgevlm.export.decoder_graph import Writing, decoder_graph
from edgevlm.export.half_graph import FLOAT, HALF, to_half
from edgevlm.export.overflow import overflowing_nodes
from edgevlm.export.parts import Part, split
from edgevlm.export.to_onnx import traced_graph
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import DecoderConfig, FastVitConfig, MlpConfig, VlmConfig

Feed = Mapping[str, NDArray[Any]]

DECODER = DecoderConfig(
    vocab_size=80,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=32,
)
FASTVIT = FastVitConfig(
    image_size=64, depths=(1, 1, 1), widths=(16, 32, 64), num_attention_stages=1, head_dim=16, num_gated_downsamples=1
)
HALF_ERROR = 5e-3  # relative L2, as of every float16 graph


@pytest.fixture
def model(spread_out: Callable[..., nn.Module]) -> Vlm:
    torch.manual_seed(0)
    return spread_out(Vlm(VlmConfig(vision=FASTVIT, projector=MlpConfig(), decoder=DECODER)))  # type: ignore[return-value]


@torch.no_grad()
def scale(model: nn.Module, factors: Mapping[str, float]) -> None:
    for name, factor in factors.items():
        model.get_parameter(name).mul_(factor)


def run(graph: ir.Model, feed: Feed) -> NDArray[np.float32]:
    """The first output, node by node in numpy: on a CPU ONNX Runtime would round nothing between two products."""
    half = {source.name for source in graph.graph.inputs if source.dtype == HALF}
    feed = {name: value.astype(np.float16) if name in half else value for name, value in feed.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        found: Any = ReferenceEvaluator(ir.to_proto(graph)).run(None, dict(feed))
    return np.asarray(found[0], np.float32)


def check_islands(write: Callable[[], ir.Model], feed: Feed) -> tuple[str, ...]:
    """Without islands the result is lost, with them it is float32's; returns them."""
    wide, half, mixed = write(), write(), write()
    islands = overflowing_nodes(wide, [feed])
    to_half(half)
    to_half(mixed, islands=islands)
    expected, found = run(wide, feed), run(mixed, feed)
    assert not np.isfinite(run(half, feed)).all()
    assert np.linalg.norm(found - expected) < HALF_ERROR * np.linalg.norm(expected)
    assert FLOAT in {value.dtype for value in mixed.graph.initializers.values()}
    return islands


def decoder_feed(part: Part) -> Feed:
    """Six rows of two sequences, nothing before them."""
    sizes = {"batch_size": 2, "sequence": 6, "total_sequence": 6, "past_sequence": 0}
    dice = np.random.default_rng(0)
    feed: dict[str, NDArray[Any]] = {}
    for spec in part.inputs:
        shape = [sizes.get(size, 0) if isinstance(size, str) else size for size in spec.shape]
        feed[spec.name] = np.ones(shape, np.int64)
        if spec.dtype != "int64":
            feed[spec.name] = dice.standard_normal(shape).astype(np.float32)
    return feed


def test_a_decoder_whose_mlp_overflows(model: Vlm) -> None:
    """Its first layer's gated product is some hundred thousand, as in models that were trained in bfloat16."""
    scale(model.decoder, {"layers.0.mlp.up_proj.weight": 1e5, "layers.0.mlp.down_proj.weight": 1e-5})
    part = next(part for part in split(model) if part.name == "decoder_model_merged")
    islands = check_islands(lambda: decoder_graph(part, Writing(plain=True)), decoder_feed(part))
    assert {name.split("layers.")[1][0] for name in islands} == {"0"}
    assert not [name for name in islands if "self_attn" in name]


def test_a_decoder_within_float16_has_no_islands(model: Vlm) -> None:
    part = next(part for part in split(model) if part.name == "decoder_model_merged")
    assert overflowing_nodes(decoder_graph(part, Writing(plain=True)), [decoder_feed(part)]) == ()


def test_an_encoder_whose_convolution_overflows(model: Vlm) -> None:
    block = "stages.0.blocks.0.mlp"
    factors = {f"{block}.fc1.weight": 5e4, f"{block}.fc1.bias": 5e4, f"{block}.fc2.weight": 2e-5}
    scale(model.vision_encoder, factors)
    part = split(model)[0]

    def write() -> ir.Model:
        graph = traced_graph(part)
        clean(graph)
        return graph

    pixels = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    islands = check_islands(write, {"pixel_values": pixels})
    assert [name.split("_")[1] for name in islands] == ["conv2d", "gelu", "conv2d"]
