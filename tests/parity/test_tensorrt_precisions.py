"""Graphs for TensorRT in few bits, run by ONNX Runtime, against PyTorch with the same rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgevlm.core.errors import UnsupportedError
from edgevlm.export.clean_graph import clean
from edgevlm.export.decoder_graph import Writing, decoder_graph
from edgevlm.export.half_graph import to_half
from edgevlm.export.parts import Part, split, traced_module
from edgevlm.export.ranges import Feed
from edgevlm.export.static_qdq import decoder_scales, quantize_static_symmetric
from edgevlm.export.to_onnx import traced_graph
from edgevlm.export.typed_ops import typed_part
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.quant.fake import fake_quantized
from edgevlm.shapes.config import (
    DecoderConfig,
    FastVitConfig,
    HybridConfig,
    MlpConfig,
    UnshuffleConfig,
    VitConfig,
    VlmConfig,
)

Float = NDArray[np.float32]

LAYOUTS: Mapping[str, Mapping[str, object]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False, "attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {"norm": "layer", "mlp": "gelu", "positions": "learned", "output_bias": True, "attention_bias": True},
    "padded-heads": {"head_dim": 12},
}
FORMATS: Mapping[str, Literal["int8", "fp8"]] = {"int8-static": "int8", "fp8": "fp8"}
WEIGHTS_ALONE = ("int4-b64", "int4-b128", "int4-b128-rtn", "nvfp4", "nvfp4-rtn")

# Of the logits' spread.  Graph and reference round alike, 1e-6 as measured; an activation between two codes may fall to
# the other one, and in E4M3 those lie an eighth apart.  What swaps scales, codes or rows moves logits by their spread.
CLOSE, ONE_CODE = 1e-4, 0.2
HALF = 1e-2  # float16 keeps 11 bits, measured 3e-3 where activations are not rounded
FASTVIT = FastVitConfig(
    image_size=64, depths=(1, 1, 1), widths=(16, 32, 64), num_attention_stages=1, head_dim=16, num_gated_downsamples=1
)
VIT = VitConfig(
    image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
ENCODERS: Mapping[str, tuple[FastVitConfig | HybridConfig | VitConfig, MlpConfig | UnshuffleConfig]] = {
    "fastvit-mlp": (FASTVIT, MlpConfig()),
    "hybrid-mlp": (HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1)), MlpConfig()),
    "siglip-unshuffle": (VIT, UnshuffleConfig()),
}
ENCODER_ERROR = {"int8": 7e-2, "fp8": 0.12}  # relative L2, random weights: measured up to 0.03 and 0.07
NUM_CALIBRATION = 32


def tiny(**decoder: object) -> Vlm:
    sizes = {"vocab_size": 81, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 32}
    config = DecoderConfig(**{**sizes, **heads, **decoder})  # type: ignore[arg-type]
    vision = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
    model = Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=config))
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def decoder_part(model: Vlm) -> Part:
    return typed_part(next(part for part in split(model) if part.name == "decoder_model_merged"))


def rows(length: int, seed: int = 0) -> Float:
    return np.random.default_rng(length + 100 * seed).standard_normal((1, length, 72), np.float32)


def empty_caches(part: Part) -> dict[str, Float]:
    shapes = {spec.name: spec.shape for spec in part.inputs if spec.name.startswith("past")}
    return {name: np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32) for name, shape in shapes.items()}


def call(part: Part, rows: Float) -> Feed:
    """The inputs of a first call."""
    return {"inputs_embeds": rows, "write_indices": np.zeros(1, np.int64), **empty_caches(part)}


def written(model: Vlm, precision: str) -> tuple[ir.Model, Vlm]:
    """The float32 decoder graph that rounds as ``precision`` says, and the PyTorch model that it should equal."""
    part = decoder_part(model)
    if precision not in FORMATS:
        quantized = quantize_decoder(model, precision, target="tensorrt")
        graph = decoder_graph(part, Writing(typed=True, quantized=quantized.weights))
    else:
        graph, feeds = decoder_graph(part, Writing(typed=True)), [call(part, rows(8, seed)) for seed in range(1, 9)]
        report = quantize_static_symmetric(graph, feeds, FORMATS[precision])
        scales = decoder_scales(report)
        quantized = quantize_decoder(model, precision, target="tensorrt", input_scales=scales)
    return graph, fake_quantized(model, quantized)


def saved(graph: ir.Model, path: Path) -> Path:
    """The graph as ONNX Runtime reads it: it has no 4-bit floats, all of which are 8-bit floats, too."""
    for value in graph.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT4E2M1:
            assert value.const_value is not None
            codes = value.const_value.numpy().astype(np.float32).astype(ir.DataType.FLOAT8E4M3FN.numpy())
            value.const_value, value.type = ir.tensor(codes), ir.TensorType(ir.DataType.FLOAT8E4M3FN)
            value.const_value.name = value.name
    ir.save(graph, path)
    return path


def opened(path: Path) -> onnxruntime.InferenceSession:
    """The graph as it is written: ONNX Runtime's optimizers take 8-bit floats for integers, and fail."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options)


class Steps:
    """A decoder's graph of the kind "rows", fed by hand."""

    def __init__(self, path: Path, part: Part, dtype: type[np.floating]) -> None:
        self.session, self.num_rows = opened(path), 0
        self.past = {name: cache.astype(dtype) for name, cache in empty_caches(part).items()}

    def logits(self, rows: Float) -> Float:
        """Logits [V] of the last of ``rows`` [1, T, D], which continue those before."""
        feeds = {"inputs_embeds": rows, "write_indices": np.array([self.num_rows]), **self.past}
        logits, *present = map(np.asarray, self.session.run(None, feeds))
        self.num_rows += rows.shape[1]
        pairs = zip(self.past.items(), present, strict=True)
        self.past = {name: np.concatenate((old, new), axis=2) for (name, old), new in pairs}
        return np.asarray(logits[0, 0], np.float32)


def distances(steps: Steps, reference: Vlm, lengths: tuple[int, ...]) -> list[float]:
    """How far logits are from the reference's, call by call, in units of their spread."""
    session, found = TorchSession(reference), []
    for length in lengths:
        expected = session.prefill(rows(length))
        found.append(float(np.abs(steps.logits(rows(length)) - expected).max() / expected.std()))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", [*WEIGHTS_ALONE, *FORMATS])
def test_prefill_and_steps_equal_pytorch_with_the_same_rounding(precision: str, layout: str, tmp_path: Path) -> None:
    model = tiny(**LAYOUTS[layout])
    graph, reference = written(model, precision)
    part, path = decoder_part(model), saved(graph, tmp_path / "graph.onnx")
    prompts = [(5, 1), (3, 2, 1), (8, 1)]
    found = [
        distance for lengths in prompts for distance in distances(Steps(path, part, np.float32), reference, lengths)
    ]
    assert min(found) < CLOSE
    assert max(found) < ONE_CODE


@pytest.mark.parametrize("precision", [*WEIGHTS_ALONE, *FORMATS])
def test_the_rest_in_float16_changes_no_code_and_no_scale(precision: str, tmp_path: Path) -> None:
    model = tiny()
    (wide, reference), (graph, _) = (written(model, precision) for _ in range(2))
    to_half(graph)
    before, after = (
        {
            node.outputs[0].name: [constant.numpy().astype(np.float64) for constant in constants(node)]
            for node in each.graph
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        }
        for each in (wide, graph)
    )
    assert all(np.array_equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
    found = distances(Steps(saved(graph, tmp_path / "half.onnx"), decoder_part(model), np.float16), reference, (5, 1))
    assert max(found) < (ONE_CODE if precision in FORMATS else HALF)


def constants(node: ir.Node) -> list[ir.TensorProtocol]:
    """The tensors that a node reads: codes, scales, zero points."""
    return [value.const_value for value in node.inputs if value is not None and value.const_value is not None]


@pytest.mark.parametrize("precision", FORMATS)
def test_every_product_with_a_weight_reads_codes_and_attention_does_not(precision: str) -> None:
    """Of two layers each has qkv, o, gate and up, and down; then comes the head."""
    graph, _ = written(tiny(), precision)
    products = [node for node in graph.graph if node.op_type == "MatMul"]
    sources = [[value.producer() for value in node.inputs if value is not None] for node in products]
    rounded = [[node is not None and node.op_type == "DequantizeLinear" for node in pair] for pair in sources]
    assert rounded.count([True, True]) == 9
    assert rounded.count([False, False]) == 4


@pytest.mark.parametrize("precision", FORMATS)
def test_scales_are_positive_halves_and_zero_points_zero(precision: str) -> None:
    graph, _ = written(tiny(), precision)
    nodes = [node for node in graph.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in nodes:
        scale, zero = (constant.numpy().astype(np.float32) for constant in constants(node)[-2:])
        assert (scale > 0).all()
        assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
        assert not zero.any()


def model_of(name: str, spread_out: Callable[..., nn.Module]) -> Vlm:
    torch.manual_seed(0)
    vision, projector = ENCODERS[name]
    model = spread_out(Vlm(VlmConfig(vision=vision, projector=projector, decoder=tiny().config.decoder)))
    assert isinstance(model, Vlm)
    return model


def pictures(num: int, side: int, seed: int = 0) -> Float:
    """Smooth colours with a little noise, as pictures are: [num, 3, side, side] in [0, 1]."""
    dice = np.random.default_rng(seed)
    coarse = np.kron(dice.random((num, 3, 4, 4)), np.ones((1, 1, side // 4, side // 4)))
    return np.asarray(0.8 * coarse + 0.2 * dice.random((num, 3, side, side)), np.float32)


def encoder_graph(model: Vlm) -> ir.Model:
    graph = traced_graph(split(model)[0])
    clean(graph)
    return graph


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_an_encoder_in_8_bits_is_near_pytorch_in_float16_too(
    format: Literal["int8", "fp8"], name: str, spread_out: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = model_of(name, spread_out)
    side = model.config.vision.image_size
    graph, pixels = encoder_graph(model), pictures(2, side, seed=1)
    report = quantize_static_symmetric(graph, [{"pixel_values": pictures(NUM_CALIBRATION, side)}], format)
    with torch.no_grad():
        expected = traced_module(split(model)[0]).eval()(torch.from_numpy(pixels)).numpy()
    found = []
    for turn in (lambda _: None, to_half):
        turn(graph)
        ir.save(graph, tmp_path / "graph.onnx")
        session = opened(tmp_path / "graph.onnx")
        found.append(np.asarray(session.run(None, {"pixel_values": pixels})[0]))
    assert report.quantized
    assert all(0 < error(each, expected) < ENCODER_ERROR[format] for each in found)


def error(found: Float, expected: Float) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_depthwise_convolutions_gates_and_biases_stay_float(spread_out: Callable[..., nn.Module]) -> None:
    int8, fp8 = (encoder_graph(model_of("fastvit-mlp", spread_out)) for _ in range(2))
    feeds = [{"pixel_values": pictures(2, 64)}]
    kept = set(quantize_static_symmetric(int8, feeds, "int8").kept_float)
    kept_by_fp8 = set(quantize_static_symmetric(fp8, feeds, "fp8").kept_float)
    convolutions = {node.name or "": node for node in int8.graph if node.op_type == "Conv"}
    grouped = {name for name, node in convolutions.items() if node.attributes.get_int("group", 1) > 1}
    assert grouped < kept < kept_by_fp8  # gates and, in fp8, the stem that reads three colours
    assert all(
        node.inputs[2] in int8.graph.initializers.values() for node in convolutions.values() if len(node.inputs) > 2
    )


def test_what_cannot_be_rounded_is_refused_with_the_part() -> None:
    part = decoder_part(tiny())
    with pytest.raises(UnsupportedError, match="fp8 needs pictures"):
        quantize_static_symmetric(decoder_graph(part, Writing(typed=True)), [], "fp8")
    bad = call(part, np.full((1, 2, 72), np.nan, np.float32))
    with pytest.raises(UnsupportedError, match=r"not finite.*decoder_model_merged"):
        quantize_static_symmetric(decoder_graph(part, Writing(typed=True)), [bad], "int8")
