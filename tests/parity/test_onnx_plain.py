"""Decoders in standard operators: the same numbers, whoever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgevlm.export.parts import split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.shapes.config import DecoderConfig, HybridConfig, Llama3Scaling, MlpConfig, VlmConfig

STRETCH = Llama3Scaling(factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=8)
GPT2 = {"norm": "layer", "mlp": "gelu", "positions": "learned", "attention_bias": True, "output_bias": True}
LAYOUTS: dict[str, dict[str, object]] = {
    "llama": {},
    "one-group": {"num_key_value_heads": 1},
    "no-groups": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "llama3-18": {"head_dim": 18, "rope_theta": 500.0, "rope_scaling": STRETCH},
    "qwen3-20": {"qk_norm": True, "head_dim": 20},
    "gpt2": GPT2,
    "gpt2-7": {**GPT2, "head_dim": 7},
}
PRECISIONS = ("fp32", "fp16", "int8-b32", "int8-dynamic", "int4-b32", "int4-b32-asym")
D = 64


def tiny(**decoder: object) -> Vlm:
    sizes = {"vocab_size": 80, "hidden_size": D, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 32}
    config = DecoderConfig(**{**sizes, **heads, **decoder})  # type: ignore[arg-type]
    vision = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
    model = Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=config))
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def lower(model: Vlm, folder: Path, precision: str = "fp32") -> Path:
    part = next(part for part in split(model) if part.name == "decoder_model_merged")
    quantized = quantize_decoder(model, precision) if precision.startswith("int") else None
    extras = Extras(quantized=quantized)
    return folder / OnnxTarget(Lowering(plain=True)).lower(part, folder, precision, extras).file


class Steps:
    """A decoder's graph, fed by hand; ``run`` takes what ONNX Runtime's sessions take."""

    def __init__(self, path: Path, batch: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options)
        caches = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        self.past: dict[str, np.ndarray] = {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32) for value in caches
        }

    def logits(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ``rows`` [B, T, D]; ``mask`` [B, S] covers those before, too."""
        feeds = {"inputs_embeds": rows, "attention_mask": mask, **self.past}
        logits, *present = map(np.asarray, self.session.run(None, feeds))
        self.past = dict(zip(self.past, present, strict=True))
        return logits[:, 0]


def rows(length: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((batch, length, D), np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 + 1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_chunks_and_steps_equal_pytorch(layout: str, tmp_path: Path) -> None:
    model = tiny(**LAYOUTS[layout])
    steps, reference, end = Steps(lower(model, tmp_path)), TorchSession(model), 0
    for length in (5, 1, 1, 7, 1, 4, 1, 1):
        end += length
        assert_close(steps.logits(rows(length), np.ones((1, end), np.int64))[0], reference.prefill(rows(length)))


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(layout: str, tmp_path: Path) -> None:
    """Of two sequences the second is two rows shorter: it stands at the end of the batch's rows, behind padding."""
    model = tiny(**LAYOUTS[layout])
    steps, batch = Steps(lower(model, tmp_path), batch=2), rows(6, batch=2)
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    first = steps.logits(batch, mask)
    second = steps.logits(rows(1, batch=2), np.concatenate((mask, np.ones((2, 1), np.int64)), axis=1))
    for number, start in ((0, 0), (1, 2)):
        reference = TorchSession(model)
        assert_close(first[number], reference.prefill(batch[number : number + 1, start:]))
        assert_close(second[number], reference.prefill(rows(1, batch=2)[number : number + 1]))


@pytest.mark.parametrize("layout", ["qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_is_standard_and_of_opset_21(precision: str, layout: str, tmp_path: Path) -> None:
    path = lower(tiny(**LAYOUTS[layout]), tmp_path, precision)
    graph = ir.load(path).graph
    assert dict(graph.opset_imports) == {"": 21}
    assert {node.domain for node in graph} == {""}
    assert not {"Attention", "RotaryEmbedding", "RMSNormalization"} & {node.op_type for node in graph}  # opset 23's
    onnx.checker.check_model(onnx.load(path), full_check=True)  # infers every type and shape, and compares


@pytest.mark.parametrize("layout", ["qwen2", "gpt2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_computes_the_same(precision: str, layout: str, tmp_path: Path) -> None:
    """It reads 4-bit blocks, whole-number products and empty caches as ONNX means them."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'edgevlm[openvino]'")
    path = lower(tiny(**LAYOUTS[layout], intermediate_size=100), tmp_path, precision)  # the last block is short
    steps = Steps(path)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    past = {name: value.astype(np.float16 if precision == "fp16" else np.float32) for name, value in steps.past.items()}
    steps.past = past
    allowed = {"fp32": 2e-5, "fp16": 1e-2}.get(precision, 0.15)  # it rounds activations in blocks of its own
    for length, end in ((5, 5), (1, 6), (1, 7)):
        feeds = {"inputs_embeds": rows(length), "attention_mask": np.ones((1, end), np.int64)}
        found = compiled({**feeds, **past})
        expected = steps.logits(feeds["inputs_embeds"], feeds["attention_mask"])
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        assert np.abs(found["logits"][:, 0] - expected).max() < allowed * expected.std()
