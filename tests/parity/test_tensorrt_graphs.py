"""Decoders for TensorRT, computed in their own types on the CPU, against PyTorch: what an engine must give, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgevlm.bundle.manifest import PartFile
from edgevlm.core.errors import EdgeVLMError, UsageError
from edgevlm.export.heard import Heard
from edgevlm.export.parts import Part, split
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_tensorrt import TensorRtTarget
from edgevlm.export.typed_ops import typed_part
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes.typed_graph import rounding_graph
from edgevlm.shapes.config import DecoderConfig, HybridConfig, Llama3Scaling, MlpConfig, VlmConfig
from edgevlm.verify.thresholds import DECODERS

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
    "gpt2": GPT2,
    "gpt2-7": {**GPT2, "head_dim": 7},
}
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
MAX_CONTEXT = 24
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


def decoder_part(model: Vlm) -> Part:
    return next(part for part in split(model) if part.name == "decoder_model_merged")


def lower(model: Vlm, folder: Path, precision: str = "fp32", extras: Extras | None = None) -> PartFile:
    extras = extras or Extras(max_context=MAX_CONTEXT)
    return TensorRtTarget(Lowering()).lower(decoder_part(model), folder, precision, extras)


class Rows:
    """The graph "rows": its cache is a bucket, whose rest is full of what nobody must see."""

    def __init__(self, folder: Path, file: PartFile, batch: int = 1) -> None:
        self.session = self._opened(folder, file)
        self.written = np.zeros(batch, np.int64)
        self.past = {
            spec.name: np.full([batch, *map(int, (spec.shape[1], 16, spec.shape[3]))], 30.0, NUMPY[spec.dtype])
            for spec in file.inputs
            if spec.name.startswith("past")
        }

    def _opened(self, folder: Path, file: PartFile) -> onnxruntime.InferenceSession:
        return opened(folder / file.file)

    def logits(self, rows: np.ndarray, counts: Sequence[int] | None = None) -> np.ndarray:
        """Logits [B, V] of the last of ``rows`` [B, T, D]; of sequence b ``counts[b]`` are kept, by default all."""
        feeds = {"inputs_embeds": rows, "write_indices": self.written, **self.past}
        logits, *present = run(self.session, feeds)
        self._keep(present, [rows.shape[1]] * len(rows) if counts is None else counts)
        return logits[:, 0]

    def _keep(self, present: list[np.ndarray], counts: Sequence[int]) -> None:
        for name, new in zip(self.past, present, strict=True):
            if int(self.written.max()) + new.shape[2] > self.past[name].shape[2]:
                more = np.full_like(self.past[name], -30.0)
                self.past[name] = np.concatenate((self.past[name], more), axis=2)
            for number, (start, count) in enumerate(zip(self.written, counts, strict=True)):
                self.past[name][number, :, start : start + count] = new[number, :, :count]
        self.written = self.written + np.array(counts)


class InPlace(Rows):
    """The graph that writes its cache itself."""

    def __init__(self, folder: Path, file: PartFile, batch: int = 1) -> None:
        super().__init__(folder, file, batch)
        self.past = {
            name: np.full((*past.shape[:2], MAX_CONTEXT, past.shape[3]), 30.0, past.dtype)
            for name, past in self.past.items()
        }

    def _opened(self, folder: Path, file: PartFile) -> onnxruntime.InferenceSession:
        return opened(folder / file.in_place)

    def _keep(self, present: list[np.ndarray], counts: Sequence[int]) -> None:
        self.past = dict(zip(self.past, present, strict=True))
        self.written = self.written + np.array(counts)


class RoundingRows(Rows):
    """A bfloat16 graph "rows", in float32 with every node's values rounded: ONNX Runtime has no bfloat16 on a CPU."""

    def _opened(self, folder: Path, file: PartFile) -> onnxruntime.InferenceSession:
        graph, options = rounding_graph(folder / file.file), onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
        return onnxruntime.InferenceSession(graph.model, options)


NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float32}
CACHES = {"rows": Rows, "in place": InPlace}


def opened(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options)


def run(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.array(found) for found in session.run(None, feeds)]


def rows(length: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((batch, length, D), np.float32)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 + 1e-5 * float(np.abs(expected).max()))


def graphs(folder: Path, file: PartFile) -> Iterator[Path]:
    yield from (folder / file.file, folder / file.in_place)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_chunks_and_steps_equal_pytorch(layout: str, cache: str, tmp_path: Path) -> None:
    model = tiny(**LAYOUTS[layout])
    graph, reference = CACHES[cache](tmp_path, lower(model, tmp_path)), TorchSession(model)
    for length in (5, 1, 1, 7, 1, 4, 1, 1):
        assert_close(graph.logits(rows(length))[0], reference.prefill(rows(length)))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layout", FAMILIES)
def test_sequences_of_a_batch_stand_where_their_own_rows_end(layout: str, cache: str, tmp_path: Path) -> None:
    """After six rows the second sequence keeps four of them, so the next rows stand at 6 and at 4."""
    model, counts, first = tiny(**LAYOUTS[layout]), (6, 4), rows(6, batch=2)
    graph, references = CACHES[cache](tmp_path, lower(model, tmp_path), batch=2), [TorchSession(model) for _ in counts]
    graph.logits(first, counts)
    for number, count in enumerate(counts):
        references[number].prefill(first[number : number + 1, :count])
    for length in (1, 3, 1):
        new = rows(length, batch=2)
        found = graph.logits(new)
        for number, reference in enumerate(references):
            assert_close(found[number], reference.prefill(new[number : number + 1]))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layout", FAMILIES)
def test_float16_stays_within_its_threshold(layout: str, cache: str, tmp_path: Path) -> None:
    model = tiny(**LAYOUTS[layout])
    graph, reference = CACHES[cache](tmp_path, lower(model, tmp_path, "fp16")), TorchSession(model)
    assert {past.dtype for past in graph.past.values()} == {np.dtype(np.float16)}
    for length in (5, 1, 7, 1):
        assert relative(graph.logits(rows(length))[0], reference.prefill(rows(length))) < DECODERS["fp16"].stage.limit


@pytest.mark.parametrize("layout", FAMILIES)
def test_bfloat16_stays_within_its_threshold(layout: str, tmp_path: Path) -> None:
    model = tiny(**LAYOUTS[layout])
    file = lower(model, tmp_path, "bf16")
    assert {spec.dtype for spec in file.inputs if spec.name.startswith("past")} == {"bfloat16"}
    graph, reference = RoundingRows(tmp_path, file), TorchSession(model)
    for length in (5, 1, 7, 1):
        distance = relative(graph.logits(rows(length))[0], reference.prefill(rows(length)))
        assert 1e-4 < distance < DECODERS["bf16"].stage.limit


@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8-static", "fp8"])
def test_graphs_are_standard_and_share_one_file_of_weights(precision: str, layout: str, tmp_path: Path) -> None:
    model = tiny(**LAYOUTS[layout])
    feeds = Heard(sequences=[rows(9), rows(4)]).feeds(typed_part(decoder_part(model)))
    file = lower(model, tmp_path, precision, Extras(max_context=MAX_CONTEXT, feeds=feeds))
    assert file.cache == "rows"
    assert set(file.extra_files) == {f"{file.file}_data", file.in_place}
    for path, opset in zip(graphs(tmp_path, file), (21, 24), strict=True):
        graph = ir.load(path).graph
        assert dict(graph.opset_imports) == {"": opset}
        assert {node.domain for node in graph} == {""}
        stored = [value.const_value for value in graph.initializers.values()]
        assert {tensor.location for tensor in stored if isinstance(tensor, ir.ExternalTensor)} == {
            f"{Path(file.file).name}_data"
        }
        onnx.checker.check_model(str(path), full_check=True)  # infers every type and shape, and compares
    weights = sum((tmp_path / name).stat().st_size for name in (file.file, file.in_place))
    assert weights < 2 * 100_000  # of both graphs without what lies beside them


@pytest.mark.parametrize("layout", FAMILIES)
def test_nothing_is_cast_that_need_not_be(layout: str, tmp_path: Path) -> None:
    """The file says all types, so what is cast are rows, logits, and what every float16 graph computes in float32."""
    path = tmp_path / lower(tiny(**LAYOUTS[layout]), tmp_path, "fp16").in_place
    graph = ir.load(path).graph
    near = {"Pow", "ReduceMean", "Sqrt", "Add", "Div"}
    for node in (node for node in graph if node.op_type == "Cast"):
        value, result = node.inputs[0], node.outputs[0]
        assert value is not None
        around = {user.op_type for user, _ in result.uses()} | {getattr(value.producer(), "op_type", "")}
        assert value.is_graph_input() or result.is_graph_output() or around & near, node.name


def outgrown() -> Vlm:
    """A model whose first mlp makes values beyond float16's range, and brings them back."""
    model = tiny()
    mlp = model.decoder.layers[0].mlp
    mlp.up_proj.weight.data *= 1e5  # type: ignore[union-attr,operator]
    mlp.down_proj.weight.data *= 1e-5  # type: ignore[union-attr,operator]
    return model


@pytest.mark.parametrize("cache", CACHES)
def test_nodes_that_overflow_stay_float32(cache: str, tmp_path: Path) -> None:
    model = outgrown()
    feeds = Heard(sequences=[rows(9)]).feeds(typed_part(decoder_part(model)))
    file = lower(model, tmp_path, "fp16", Extras(max_context=MAX_CONTEXT, feeds=feeds))
    assert {"layers.0.mlp"} == {".".join(name.split(".")[1:4]) for name in file.kept_wide}
    graph, reference = CACHES[cache](tmp_path, file), TorchSession(model)
    for length in (9, 1):
        assert relative(graph.logits(rows(length))[0], reference.prefill(rows(length))) < DECODERS["fp16"].stage.limit


@pytest.mark.parametrize(
    ("precision", "known"), [("int8", "int8-static"), ("int8-dynamic", "fp8"), ("int4-b32", "int4"), ("q4", "nvfp4")]
)
def test_a_precision_that_tensorrt_lacks_is_refused_with_those_it_has(
    precision: str, known: str, tmp_path: Path
) -> None:
    with pytest.raises(EdgeVLMError, match=known):
        lower(tiny(), tmp_path, precision)


def test_other_targets_ways_of_lowering_are_refused() -> None:
    for lowering in (Lowering(plain=True), Lowering(static_batch=True)):
        with pytest.raises(UsageError, match="are for --target onnx"):
            TensorRtTarget(lowering)
