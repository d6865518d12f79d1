"""OpenVINO as a back end, part by part, against PyTorch and with the files that ONNX Runtime reads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgevlm.bundle.manifest import DecoderShape, FusionShape, Manifest, PartFile, TensorSpec
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.errors import (
    ConfigError,
    DoesNotFitError,
    EdgeVLMError,
    IntegrityError,
    UnsupportedError,
    UsageError,
)
from edgevlm.core.optional import is_installed, require
from edgevlm.export.heads import cache_head_size
from edgevlm.export.parts import split
from edgevlm.export.target import Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes import openvino_graph
from edgevlm.runtimes.engines import DecoderEngine
from edgevlm.runtimes.on_openvino import OpenVino, OpenVinoBf16
from edgevlm.runtimes.session import Float
from edgevlm.shapes.config import DecoderConfig, FusionConfig, HybridConfig, MlpConfig, VitConfig, VlmConfig
from edgevlm.shipped import find_bundle

if not is_installed("openvino"):
    pytest.skip("openvino is not installed: pip install 'edgevlm[openvino]'", allow_module_level=True)

HYBRID = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
VIT = VitConfig(
    image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
CLIP = replace(VIT, hidden_act="quick_gelu", class_token=True, pre_layernorm=True, post_layernorm=False)
GPT2 = {
    "norm": "layer",
    "mlp": "gelu",
    "positions": "learned",
    "attention_bias": True,
    "output_bias": True,
    "tie_word_embeddings": False,
}
DECODERS: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "untied": {"tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt2-12": {**GPT2, "head_dim": 12, "num_key_value_heads": 2},
    "llama-12": {"head_dim": 12},
}
D, V, CONTEXT, THREADS = 64, 80, 32, 2


def tiny(
    spread_out: Callable[..., nn.Module],
    vision: HybridConfig | VitConfig = HYBRID,
    fusion: FusionConfig | None = None,
    **decoder: object,
) -> Vlm:
    """Random weights of ordinary size."""
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
    }
    config = DecoderConfig(**{**sizes, **heads, **decoder})  # type: ignore[arg-type]
    model = Vlm(VlmConfig(vision=vision, projector=MlpConfig(), decoder=config, fusion=fusion))
    return spread_out(model)  # type: ignore[return-value]


def bundle_of(model: Vlm, root: Path, *names: str) -> Bundle:
    """The parts ``names`` of ``model``, lowered; the rest of the bundle is as no test reads it."""
    config, target = model.config, OnnxTarget(Lowering())
    found = {part.name: part for part in split(model)}
    lowered = {name: target.lower(found[name], root, "fp32") for name in names}
    others = {name: lowered[names[0]] for name in found if name not in names}
    parts = (*lowered.values(), *(replace(part, part=name, table=None) for name, part in others.items()))
    decoder = config.decoder
    manifest = Manifest(
        name="tiny",
        family="test",
        parts=parts,
        image={"height": 32, "width": 32, "fit": "stretch"},
        prompt={},
        num_vision_tokens=config.num_vision_tokens,
        decoder=DecoderShape(
            decoder.num_hidden_layers,
            decoder.num_key_value_heads,
            cache_head_size(decoder),
            decoder.hidden_size,
            decoder.vocab_size,
        ),
        max_context=CONTEXT,
        fusion=FusionShape(num_layers=config.fusion.num_layers, skip_token_zero=False) if config.fusion else None,
    )
    return Bundle(root, manifest)


def open_decoder(bundle: Bundle, back_end: OpenVino) -> DecoderEngine:
    embedding = back_end.open_embedding(bundle, bundle.manifest.part("embed_tokens"))
    return back_end.open_decoder(bundle, bundle.manifest.part("decoder_model_merged"), embedding)


def rows(length: int) -> Float:
    return np.random.default_rng(length).standard_normal((1, length, D), np.float32)


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


@pytest.fixture
def back_end() -> OpenVino:
    return OpenVino(threads=THREADS)


@pytest.fixture(scope="module")
def nano() -> Bundle:
    return read_bundle(find_bundle("nano"), check=False)


@pytest.fixture
def nano_decoder(nano: Bundle, back_end: OpenVino) -> DecoderEngine:
    return open_decoder(nano, back_end)


# -- the decoder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_chunks_and_ten_steps_equal_pytorch(
    name: str, spread_out: Callable[..., nn.Module], tmp_path: Path, back_end: OpenVino
) -> None:
    model = tiny(spread_out, **DECODERS[name])
    engine = open_decoder(bundle_of(model, tmp_path, "embed_tokens", "decoder_model_merged"), back_end)
    reference = TorchSession(model)
    for length in (5, 1, 4):
        assert_close(found := engine.prefill(rows(length)), reference.prefill(rows(length)))
    for _ in range(10):
        token = int(found.argmax())
        assert_close(found := engine.decode(token), reference.decode(token))
    assert engine.position == reference.position == 20


def test_greedy_ids_of_nano_equal_those_of_onnx_runtime_for_64_tokens(
    nano: Bundle, nano_decoder: DecoderEngine
) -> None:
    reference = Reference(nano)
    prompt = nano_rows(nano, 40)
    found, expected = nano_decoder.prefill(prompt), reference.logits(prompt)
    for _ in range(64):
        token = int(expected.argmax())
        assert int(found.argmax()) == token
        found, expected = nano_decoder.decode(token), reference.logits(reference.embed(token))


class Reference:
    """The same files in ONNX Runtime, without any of our own runtime."""

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime

        decoder, embed = (bundle.manifest.part(name).file for name in ("decoder_model_merged", "embed_tokens"))
        self.session = onnxruntime.InferenceSession(bundle.path(decoder))
        self.table = onnxruntime.InferenceSession(bundle.path(embed))
        caches = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        self.past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}

    def embed(self, token: int) -> Float:
        return np.asarray(self.table.run(None, {"input_ids": np.array([[token]])})[0])

    def logits(self, embeds: Float) -> Float:
        length = next(iter(self.past.values())).shape[2] + embeds.shape[1]
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64), **self.past}
        names = [name.replace("past_key_values", "present") for name in self.past]
        logits, *present = self.session.run(["logits", *names], feeds)
        self.past = dict(zip(self.past, present, strict=True))
        return np.asarray(logits[0, -1])


def nano_rows(nano: Bundle, length: int, seed: int = 0) -> Float:
    ids = np.random.default_rng(seed).integers(0, nano.manifest.decoder.vocab_size, (1, length))
    embedding = OpenVino(threads=1).open_embedding(nano, nano.manifest.part("embed_tokens"))
    return embedding.embed(ids)


@pytest.mark.parametrize("kept", [0, 1, 6, 9])
def test_after_a_rewind_the_rest_is_computed_as_from_the_beginning(
    kept: int, nano: Bundle, nano_decoder: DecoderEngine
) -> None:
    prompt = nano_rows(nano, 9)
    expected = nano_decoder.prefill(prompt)
    nano_decoder.prefill(nano_rows(nano, 7, seed=1))
    nano_decoder.rewind(kept)
    nano_decoder.prefill(prompt[:, kept:]) if kept < 9 else nano_decoder.decode(3)
    nano_decoder.rewind(8)
    assert_close(nano_decoder.prefill(prompt[:, 8:]), expected)
    assert nano_decoder.position == 9


@pytest.mark.parametrize("position", [-1, 4])
def test_a_rewind_beyond_the_cache_is_refused_and_changes_nothing(
    position: int, nano: Bundle, nano_decoder: DecoderEngine
) -> None:
    nano_decoder.prefill(nano_rows(nano, 3))
    with pytest.raises(UsageError, match=rf"cannot rewind to row {position}: the kv cache holds 3"):
        nano_decoder.rewind(position)
    assert nano_decoder.position == 3


def test_more_rows_than_the_context_has_are_refused_and_change_nothing(
    nano: Bundle, nano_decoder: DecoderEngine
) -> None:
    prompt, limit = nano_rows(nano, 4), nano.manifest.max_context
    nano_decoder.prefill(prompt[:, :3])
    with pytest.raises(DoesNotFitError, match=rf"{limit + 3} rows do not fit into the context of {limit}"):
        nano_decoder.prefill(np.zeros((1, limit, prompt.shape[2]), np.float32))
    found = nano_decoder.prefill(prompt[:, 3:])
    nano_decoder.rewind(0)
    assert_close(nano_decoder.prefill(prompt), found)
    with pytest.raises(UsageError, match="at least one row"):
        nano_decoder.prefill(prompt[:, :0])


def test_an_interrupted_step_leaves_the_cache_as_it_was(
    nano: Bundle, nano_decoder: DecoderEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches Python when the engine is done: the rows are in the cache, but nobody saw their logits."""
    prompt = nano_rows(nano, 6)
    expected = nano_decoder.prefill(prompt)
    nano_decoder.rewind(4)

    def interrupted(graph: object, name: str) -> Float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(openvino_graph.Graph, "output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            nano_decoder.prefill(prompt[:, 4:])
    assert nano_decoder.position == 4
    assert_close(nano_decoder.prefill(prompt[:, 4:]), expected)


def test_logits_of_earlier_steps_stay_as_they_were(nano: Bundle, nano_decoder: DecoderEngine) -> None:
    first = nano_decoder.prefill(nano_rows(nano, 3))
    before = first.copy()
    nano_decoder.decode(5)
    assert np.array_equal(first, before)
    assert first.flags.writeable


def test_a_decoder_with_positions_and_logits_of_every_row_runs(tmp_path: Path, back_end: OpenVino) -> None:
    """As exporters of other projects write it: logits = head(rows + positions + mean of the cache)."""
    bundle = foreign_bundle(tmp_path)
    engine = open_decoder(bundle, back_end)
    prompt = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    for start, end in ((0, 2), (2, 3)):
        found = engine.prefill(prompt[:, start:end])
        expected = prompt[0, end - 1] + (end - 1) + prompt[0, :end].mean(0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    engine.rewind(1)
    np.testing.assert_allclose(engine.decode(1), 1 + 1 + (prompt[0, 0] + 1) / 2, rtol=1e-6)


def foreign_bundle(root: Path, **extra: tuple[str, tuple[int | str, ...]]) -> Bundle:
    """A decoder of one head of size 4, whose keys and values are its rows, and an embedding whose rows are 0 0 0 0,
    1 1 1 1 and so on.
    """
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["inputs_embeds", "one"], ["rows"]),
        *(
            node("Concat", [f"past_key_values.0.{kind}", "rows"], [f"present.0.{kind}"], axis=2)
            for kind in ("key", "value")
        ),
        node("ReduceMean", ["present.0.value", "cache_axes"], ["mean"], keepdims=0),
        node("Cast", ["position_ids"], ["positions"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["positions", "last"], ["columns"]),
        node("Add", ["inputs_embeds", "columns"], ["placed"]),
        node("Add", ["placed", "mean"], ["logits"]),
    ]
    cache: tuple[int | str, ...] = ("B", 1, "past", 4)
    inputs = {
        "inputs_embeds": ("float32", ("B", "T", 4)),
        "attention_mask": ("int64", ("B", "past+T")),
        "position_ids": ("int64", ("B", "T")),
        "past_key_values.0.key": ("float32", cache),
        "past_key_values.0.value": ("float32", cache),
        **extra,
    }
    outputs = {
        "logits": ("float32", ("B", "T", 4)),
        "present.0.key": ("float32", ("B", 1, "past+T", 4)),
        "present.0.value": ("float32", ("B", 1, "past+T", 4)),
    }
    constants = {"one": np.array([1]), "last": np.array([-1]), "cache_axes": np.array([1, 2])}
    decoder = write_graph(root, "decoder_model_merged", nodes, inputs, outputs, constants)
    table = {"table": np.repeat(np.arange(4, dtype=np.float32)[:, None], 4, axis=1)}
    embed = write_graph(
        root,
        "embed_tokens",
        [node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        {"input_ids": ("int64", ("B", "T"))},
        {"inputs_embeds": ("float32", ("B", "T", 4))},
        table,
    )
    manifest = Manifest(
        name="foreign",
        family="test",
        parts=(decoder, embed, replace(embed, part="vision_encoder")),
        image={},
        prompt={},
        num_vision_tokens=1,
        decoder=DecoderShape(1, 1, 4, 4, 4),
        max_context=8,
    )
    return Bundle(root, manifest)


Specs = dict[str, tuple[str, tuple[int | str, ...]]]


def write_graph(
    root: Path,
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: Specs,
    outputs: Specs,
    constants: dict[str, NDArray[np.generic]],
) -> PartFile:
    (root / "onnx").mkdir(parents=True, exist_ok=True)
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    infos = [
        [helper.make_tensor_value_info(key, kinds[dtype], shape) for key, (dtype, shape) in values.items()]
        for values in (inputs, outputs)
    ]
    weights = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, name, *infos, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), root / f"onnx/{name}.onnx")
    specs = [tuple(TensorSpec(key, *value) for key, value in values.items()) for values in (inputs, outputs)]
    return PartFile(
        part=name,
        target="onnx",
        precision="fp32",
        file=f"onnx/{name}.onnx",
        inputs=specs[0],
        outputs=specs[1],
        cache="grown" if name == "decoder_model_merged" else "shared",
    )


def test_a_decoder_in_two_halves_is_refused_with_what_to_take(tmp_path: Path, back_end: OpenVino) -> None:
    bundle = foreign_bundle(tmp_path, use_cache_branch=("bool", (1,)))
    with pytest.raises(UnsupportedError, match="take --decoder-runtime onnxruntime"):
        open_decoder(bundle, back_end)


# -- encoder, fusion, embedding -------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [HYBRID, VIT], ids=["hybrid", "vit"])
def test_tiles_are_encoded_like_in_pytorch_one_after_the_other(
    vision: HybridConfig | VitConfig, spread_out: Callable[..., nn.Module], tmp_path: Path, back_end: OpenVino
) -> None:
    model = tiny(spread_out, vision)
    bundle = bundle_of(model, tmp_path, "vision_encoder")
    encoder = back_end.open_encoder(bundle, bundle.manifest.part("vision_encoder"))
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    found = encoder.encode(pixels)
    assert_close(found.tokens, TorchSession(model).encode(pixels).tokens)
    assert found.fusion_cache is None
    before = found.tokens.copy()
    encoder.encode(pixels[:1] + 1)
    assert np.array_equal(found.tokens, before)


def test_a_picture_and_text_are_fused_like_in_pytorch(
    spread_out: Callable[..., nn.Module], tmp_path: Path, back_end: OpenVino
) -> None:
    model = tiny(spread_out, CLIP, FusionConfig(num_layers=2, grid_size=2, resolution_ratio=2))
    bundle, reference = bundle_of(model, tmp_path, "vision_encoder", "fusion"), TorchSession(model)
    encoder = back_end.open_encoder(bundle, bundle.manifest.part("vision_encoder"))
    fusion = back_end.open_fusion(bundle, bundle.manifest.part("fusion"))
    pixels = np.random.default_rng(0).standard_normal((5, 3, 32, 32), np.float32)
    found, expected = encoder.encode(pixels), reference.encode(pixels)
    assert found.fusion_cache is not None
    assert expected.fusion_cache is not None
    assert_close(found.tokens, expected.tokens)
    assert_close(found.fusion_cache, expected.fusion_cache)
    for length in (3, 7):
        assert_close(fusion.fuse(found, rows(length)), reference.fuse(expected, rows(length)))
    with pytest.raises(UsageError, match="takes 5 views of a picture, got 4"):
        encoder.encode(pixels[:4])
    with pytest.raises(UsageError, match="takes one picture of 5 views, got 2"):
        encoder.encode(np.concatenate([pixels, pixels]))
    with pytest.raises(UnsupportedError, match="no pre-fusion"):
        fusion.fuse(replace(found, fusion_cache=None), rows(3))


@pytest.mark.parametrize("kind", [OpenVino, OpenVinoBf16])
def test_embedding_rows_are_exact_in_both_runtimes(kind: type[OpenVino], nano: Bundle) -> None:
    embedding = kind(threads=1).open_embedding(nano, nano.manifest.part("embed_tokens"))
    ids, row = np.array([[0, 7, 300]]), np.zeros((1, 1, nano.manifest.decoder.hidden_size), np.float32)
    reference = Reference(nano)
    assert np.array_equal(embedding.embed(ids)[0, 1:2], reference.embed(7)[0])
    embedding.write_row(300, row)
    assert np.array_equal(row, embedding.embed(ids)[:, 2:])


# -- precision, devices, errors -------------------------------------------------------------------------


def has_bf16() -> bool:
    try:
        OpenVinoBf16(threads=1)
    except UnsupportedError:
        return False
    return True


def test_float32_is_computed_in_float32_and_bf16_only_where_it_was_asked_for(nano: Bundle) -> None:
    """bfloat16 keeps 8 bits: about a hundredth of the logits, a thousand times what float32 may be off."""
    if not has_bf16():
        pytest.skip("this processor has no bfloat16 instructions")
    prompt = nano_rows(nano, 20)
    exact = Reference(nano).logits(prompt)
    errors = [
        float(np.abs(open_decoder(nano, kind(threads=THREADS)).prefill(prompt) - exact).max() / np.abs(exact).max())
        for kind in (OpenVino, OpenVinoBf16)
    ]
    assert errors[0] < 2e-5
    assert 1e-4 < errors[1] < 0.1


def test_bf16_is_refused_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = require("openvino")

    class OldProcessor(openvino.Core):  # type: ignore[name-defined,misc]
        def get_property(self, *names: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", OldProcessor)
    with pytest.raises(UnsupportedError, match=r"no bfloat16 .*finds FP32, INT8.*take --runtime openvino"):
        OpenVinoBf16()


def test_info_says_what_a_measurement_must_carry(back_end: OpenVino) -> None:
    info = dict(back_end.info)
    assert require("openvino").__version__.startswith(info.pop("version"))
    assert info == {"library": "openvino", "device": "cpu", "threads": THREADS, "computes_in": "f32"}


def test_the_cpu_may_be_spelled_either_way() -> None:
    assert OpenVino(device="CPU").info["device"] == OpenVino(device="cpu").info["device"] == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda", "cpu:1"])
def test_another_device_is_refused_not_replaced(device: str) -> None:
    with pytest.raises(UnsupportedError, match=f"the device cpu here, not on '{device}'"):
        OpenVino(device=device)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_impossible_threads_are_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match="threads must be 1 to 256"):
        OpenVino(threads=threads)


@pytest.mark.parametrize("content", [b"hello", b"", b"\x08\x0a" + bytes(1000)], ids=["text", "empty", "zeros"])
def test_a_damaged_file_is_one_clear_error_and_nothing_else(
    content: bytes, tmp_path: Path, back_end: OpenVino, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = foreign_bundle(tmp_path)
    (tmp_path / "onnx/embed_tokens.onnx").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"embed_tokens\.onnx: cannot be loaded \(.+\); copy or export") as error:
        back_end.open_embedding(bundle, bundle.manifest.part("embed_tokens"))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_truncated_graph_is_damaged(nano: Bundle, tmp_path: Path, back_end: OpenVino) -> None:
    part = nano.manifest.part("decoder_model_merged")
    (tmp_path / "onnx").mkdir()
    (tmp_path / part.file).write_bytes(nano.path(part.file).read_bytes()[:5000])
    embedding = back_end.open_embedding(nano, nano.manifest.part("embed_tokens"))
    with pytest.raises(IntegrityError, match="cannot be loaded"):
        back_end.open_decoder(Bundle(tmp_path, nano.manifest), part, embedding)


def test_an_operator_that_openvino_lacks_is_named(tmp_path: Path, back_end: OpenVino) -> None:
    specs: Specs = {"input_ids": ("int64", ("B", "T"))}
    node = helper.make_node("Frobnicate", ["input_ids"], ["inputs_embeds"], domain="com.microsoft")
    outputs: Specs = {"inputs_embeds": ("float32", ("B", "T", 4))}
    bundle = foreign_bundle(tmp_path)
    part = write_graph(tmp_path, "embed_tokens", [node], specs, outputs, {})
    with pytest.raises(UnsupportedError, match=r"lacks an operator \(.*Frobnicate.*take --runtime onnxruntime"):
        back_end.open_embedding(bundle, part)


def test_a_cache_that_the_manifest_does_not_describe_is_refused(nano: Bundle, back_end: OpenVino) -> None:
    shape = replace(nano.manifest.decoder, num_layers=nano.manifest.decoder.num_layers + 1)
    other = Bundle(nano.root, replace(nano.manifest, decoder=shape))
    with pytest.raises(IntegrityError, match=r"promises a kv cache of 5 layers with 2 heads of 64"):
        open_decoder(other, back_end)


def test_wrong_pictures_are_one_clear_error(nano: Bundle, back_end: OpenVino) -> None:
    encoder = back_end.open_encoder(nano, nano.manifest.part("vision_encoder"))
    with pytest.raises(EdgeVLMError, match=r"vision_encoder: openvino failed \(.*incompatible.*\)") as error:
        encoder.encode(np.zeros((1, 3, 8, 8), np.float32))
    assert "\n" not in str(error.value)


def test_closed_parts_say_so(nano: Bundle, back_end: OpenVino, nano_decoder: DecoderEngine) -> None:
    encoder = back_end.open_encoder(nano, nano.manifest.part("vision_encoder"))
    encoder.close()
    nano_decoder.close()
    for use in (
        lambda: encoder.encode(np.zeros((1, 3, 8, 8), np.float32)),
        lambda: nano_decoder.decode(1),
        lambda: nano_decoder.rewind(0),
    ):
        with pytest.raises(UsageError, match="this session is closed"):
            use()


def test_importing_openvino_reports_to_nobody_and_prints_nothing(tmp_path: Path) -> None:
    """The library's telemetry would write an identity into the home folder and send an event at its import."""
    code = (
        "import sys; from edgevlm.runtimes.on_openvino import OpenVino; OpenVino(); "
        "assert not [m for m in sys.modules if 'openvino_telemetry' in m]; "
        "import importlib.util; assert importlib.util.find_spec('openvino_telemetry')"
    )
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HOME": str(home), "PATH": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.iterdir()) == []
