"""Decoders in few bits in ONNX Runtime against PyTorch with the same rounding, in both dialects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgevlm.bundle.manifest import PartFile
from edgevlm.core.errors import UnsupportedError
from edgevlm.export.parts import Part, split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.quant.fake import fake_quantized
from edgevlm.shapes.config import DecoderConfig, HybridConfig, MlpConfig, VlmConfig

LAYOUTS: dict[str, dict[str, object]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {
        "norm": "layer",
        "mlp": "gelu",
        "positions": "learned",
        "attention_bias": True,
        "output_bias": True,
        "tie_word_embeddings": False,
    },
    "padded-heads": {"head_dim": 12, "attention_bias": True},
}
WEIGHT_ONLY = ("int8-b32", "int8-b64", "int8-b128", "int4-b32", "int4-b64", "int4-b128", "int4-b32-asym")
PRECISIONS = (*WEIGHT_ONLY, "int4-b128-asym-head8", "int4-b64-head8-rtn", "int8-dynamic")

# Kernel and reference add the same whole numbers and differ in the last bits of their sums, 1e-6 of the logits' spread
# as measured.  An activation that lies between two codes may fall to the other one, which is 3e-2 on models so small;
# a wrong scale, zero point or order of nibbles moves all logits by about their spread.
CLOSE, ONE_CODE = 1e-4, 0.1
HALF = 1e-2  # of the spread: float16 keeps 11 bits, measured 3e-3


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


def part_of(model: Vlm, name: str = "decoder_model_merged") -> Part:
    return next(part for part in split(model) if part.name == name)


def lower(model: Vlm, precision: str, folder: Path, *, plain: bool = False) -> tuple[PartFile, Vlm]:
    """The decoder's file and the PyTorch model that it should equal."""
    quantized = None if precision in ("fp32", "fp16") else quantize_decoder(model, precision)
    target = OnnxTarget(Lowering(plain=plain))
    file = target.lower(part_of(model), folder, precision, Extras(quantized=quantized))
    return file, model if quantized is None else fake_quantized(model, quantized)


class Steps:
    """A decoder's graph, fed by hand."""

    def __init__(self, path: Path, batch: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session, self.num_rows = onnxruntime.InferenceSession(str(path), options), 0
        caches = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        dtype = np.float16 if "16" in caches[0].type else np.float32
        self.past: dict[str, np.ndarray] = {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype) for value in caches
        }

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ``rows`` [B, T, D], which continue those before."""
        self.num_rows += rows.shape[1]
        mask = np.ones((rows.shape[0], self.num_rows), np.int64)
        logits, *present = map(
            np.asarray, self.session.run(None, {"inputs_embeds": rows, "attention_mask": mask, **self.past})
        )
        self.past = dict(zip(self.past, present, strict=True))
        return logits[:, 0]


def rows(length: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((batch, length, 72), np.float32)


def distances(steps: Steps, reference: TorchSession, lengths: tuple[int, ...]) -> list[float]:
    """How far logits are from the reference's, call by call, in units of their spread."""
    found = []
    for length in lengths:
        expected = reference.prefill(rows(length))
        found.append(float(np.abs(steps.logits(rows(length))[0] - expected).max() / expected.std()))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("plain", [False, True], ids=["contrib", "plain"])
def test_prefill_and_steps_equal_pytorch_with_the_same_rounding(
    plain: bool, precision: str, layout: str, tmp_path: Path
) -> None:
    file, reference = lower(tiny(**LAYOUTS[layout]), precision, tmp_path, plain=plain)
    prompts = [(5, 1), (3, 2, 1), (8, 1)]
    found = [max(distances(Steps(tmp_path / file.file), TorchSession(reference), lengths)) for lengths in prompts]
    assert min(found) < CLOSE
    assert max(found) < ONE_CODE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plain", [False, True], ids=["contrib", "plain"])
def test_float16_stays_near_pytorch(plain: bool, layout: str, tmp_path: Path) -> None:
    model = tiny(**LAYOUTS[layout])
    file, _ = lower(model, "fp16", tmp_path, plain=plain)
    assert max(distances(Steps(tmp_path / file.file), TorchSession(model), (5, 1, 1, 3, 1))) < HALF


def test_float16_has_a_cache_of_float16_and_speaks_float32(tmp_path: Path) -> None:
    file, _ = lower(tiny(), "fp16", tmp_path)
    dtypes = {spec.name: spec.dtype for spec in (*file.inputs, *file.outputs)}
    assert dtypes.pop("inputs_embeds") == dtypes.pop("logits") == "float32"
    assert dtypes.pop("attention_mask") == "int64"
    assert set(dtypes.values()) == {"float16"}
    assert len(dtypes) == 8


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_a_prefill_in_chunks_is_one_prefill(precision: str, tmp_path: Path) -> None:
    """Rows are rounded each for itself, so it does not matter which of them come in one call."""
    file, _ = lower(tiny(), precision, tmp_path)
    whole, parts = Steps(tmp_path / file.file), Steps(tmp_path / file.file)
    expected = whole.logits(rows(9))
    for chunk in (rows(9)[:, :4], rows(9)[:, 4:5], rows(9)[:, 5:]):
        found = parts.logits(chunk)
    assert np.abs(found - expected).max() < CLOSE * expected.std()


def test_dynamic_activations_depend_on_the_chunks(tmp_path: Path) -> None:
    """One scale serves a whole call, so chunks are rounded otherwise than the whole: near, not equal."""
    file, _ = lower(tiny(), "int8-dynamic", tmp_path)
    whole, parts = Steps(tmp_path / file.file), Steps(tmp_path / file.file)
    expected = whole.logits(rows(9))
    for chunk in (rows(9)[:, :4], rows(9)[:, 4:]):
        found = parts.logits(chunk)
    assert CLOSE < np.abs(found - expected).max() / expected.std() < 0.3


@pytest.mark.parametrize("precision", ["int4-b32", "int4-b128-asym", "int8-b32"])
def test_a_sequence_in_a_batch_is_as_alone(precision: str, tmp_path: Path) -> None:
    file, _ = lower(tiny(), precision, tmp_path)
    batch, alone = Steps(tmp_path / file.file, batch=2), [Steps(tmp_path / file.file) for _ in range(2)]
    for length in (6, 1, 1):
        found = batch.logits(rows(length, batch=2))
        for number, steps in enumerate(alone):
            expected = steps.logits(rows(length, batch=2)[number : number + 1])[0]
            assert np.abs(found[number] - expected).max() < CLOSE * expected.std()


@pytest.mark.parametrize(
    ("precision", "plain", "operators"),
    [
        ("int4-b32", False, {"MatMulNBits"}),
        ("int8-dynamic", False, {"DynamicQuantizeMatMul"}),
        ("int4-b32", True, {"DequantizeLinear", "MatMul"}),
        ("int8-dynamic", True, {"MatMulInteger", "MatMul"}),
    ],
)
def test_every_matrix_is_rounded_and_what_belongs_together_is_one(
    precision: str, plain: bool, operators: set[str], tmp_path: Path
) -> None:
    """Of two layers each has qkv, o, gate and up, and down; then comes the head."""
    file, _ = lower(tiny(), precision, tmp_path, plain=plain)
    kinds = [node.op_type for node in ir.load(tmp_path / file.file).graph]
    products = {"MatMulNBits", "DynamicQuantizeMatMul", "DequantizeLinear", "MatMul", "MatMulInteger"}
    assert products & set(kinds) == operators
    (rounded,) = operators - {"MatMul"}
    attention = 4 if plain else 0  # two products in each layer that no weight takes part in
    assert kinds.count(rounded) == 9
    assert kinds.count("MatMul") == attention + 9 * (rounded == "DequantizeLinear")


@pytest.mark.parametrize(
    ("precision", "suffix"),
    [
        ("fp32", ""),
        ("fp16", "_fp16"),
        ("int8-b32", "_int8"),
        ("int8-dynamic", "_quantized"),
        ("int4-b128", "_q4"),
    ],
)
def test_files_are_called_as_transformers_js_calls_them(precision: str, suffix: str, tmp_path: Path) -> None:
    assert lower(tiny(), precision, tmp_path)[0].file == f"onnx/decoder_model_merged{suffix}.onnx"
    plain, _ = lower(tiny(), precision, tmp_path, plain=True)
    assert plain.file == f"onnx/decoder_model_merged{suffix}_plain.onnx"
    assert (plain.precision, plain.cache) == (precision, "grown")


def test_a_second_file_of_a_kind_takes_the_name_that_it_is_given(tmp_path: Path) -> None:
    model = tiny()
    extras = Extras(quantized=quantize_decoder(model, "int4-b32-asym"), suffix="_int4_b32_asym")
    file = OnnxTarget(Lowering()).lower(part_of(model), tmp_path, "int4-b32-asym", extras)
    assert file.file == "onnx/decoder_model_merged_int4_b32_asym.onnx"


@pytest.mark.parametrize(
    ("part", "precision", "known"),
    [
        ("decoder_model_merged", "int4-b128", "needs codes"),
        ("embed_tokens", "int8", "fp32, fp16"),
        ("vision_encoder", "int4-b128", "fp32, fp16, int8"),
        ("vision_encoder", "int8-dynamic", "fp32, fp16, int8"),
    ],
)
def test_a_precision_that_a_part_cannot_have_is_refused(part: str, precision: str, known: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=known):
        OnnxTarget(Lowering()).lower(part_of(tiny(), part), tmp_path, precision)
