"""ONNX Runtime as a session: a two-layer decoder, written here, against the same decoder in NumPy.

The tiny bundle of this file also opens as a model and answers on the command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner
from typer.testing import CliRunner

from edgevlm.bundle.manifest import DecoderShape, FusionShape, Manifest, PartFile, RowTable, TensorSpec
from edgevlm.bundle.read import Bundle
from edgevlm.bundle.write import write_manifest, write_sums
from edgevlm.cli.app import app
from edgevlm.core.errors import (
    ConfigError,
    DoesNotFitError,
    EdgeVLMError,
    IntegrityError,
    MissingLibraryError,
    UnsupportedError,
    UsageError,
)
from edgevlm.runtimes.choices import Choices, PartChoice
from edgevlm.runtimes.composed import ComposedSession, Engines
from edgevlm.runtimes.on_onnxruntime import OnnxRuntime
from edgevlm.runtimes.open import RUNTIMES, open_bundle
from edgevlm.runtimes.sampling import Sampling
from edgevlm.runtimes.session import Float, ImageFeatures
from edgevlm.runtimes.tuned import TunedMachine, machine_key, surroundings, write_tune
from edgevlm.runtimes.video import Video

L, HEADS, K, SIZE, D, CONTEXT = 2, 4, 2, 16, 32, 96  # GroupQueryAttention rotates heads of 16, 32, … only
SPECIAL = ["<image>", "<|user|>", "<|assistant|>", "<|end|>"]
V = 256 + len(SPECIAL)
N, SIDE = 4, 8
VIEWS = 5  # of the fused bundle: four crops and the whole picture
AVAILABLE = onnxruntime.get_available_providers()
TOLERANCE = 2e-5  # float32 through two layers of width 32, logits of order one

KINDS = ("key", "value")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def weights() -> dict[str, Float]:
    """Random, but always the same."""
    random = np.random.default_rng(0)
    shapes = {"table": (V, D), "head": (D, V), "vision": (3 * SIDE * SIDE // N, D)}
    for layer in range(L):
        shapes |= {f"q{layer}": (D, HEADS * SIZE), f"k{layer}": (D, K * SIZE), f"v{layer}": (D, K * SIZE)}
        shapes |= {f"o{layer}": (HEADS * SIZE, D)}
    return {name: random.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}


WEIGHTS = weights()
ANGLES = np.arange(CONTEXT)[:, None] / 10_000 ** (np.arange(0, SIZE, 2) / SIZE)


def numpy_logits(embeds: Float) -> Float:
    """Logits of the last of the rows [1, T, D], computed from nothing, in float64."""
    T, rows = embeds.shape[1], embeds[0].astype(np.float64)
    past = np.tril(np.ones((T, T), bool))
    for layer in range(L):
        query, key, value = (
            (rows @ WEIGHTS[f"{kind}{layer}"]).reshape(T, -1, SIZE).transpose(1, 0, 2) for kind in "qkv"
        )
        query, key = rotate(query), rotate(key)
        key, value = (array.repeat(HEADS // K, axis=0) for array in (key, value))
        scores = np.where(past, query @ key.transpose(0, 2, 1) / SIZE**0.5, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ value
        rows = rows + mixed.transpose(1, 0, 2).reshape(T, -1) @ WEIGHTS[f"o{layer}"]
    return np.asarray(rows[-1] @ WEIGHTS["head"], np.float32)


def rotate(heads: NDArray[np.float64]) -> NDArray[np.float64]:
    T = heads.shape[1]
    cosine, sine = np.cos(ANGLES[:T]), np.sin(ANGLES[:T])
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


# -- the bundle -----------------------------------------------------------------------------------------


def save(path: Path, nodes: list[onnx.NodeProto], inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
    """Write a graph, with those of ``WEIGHTS`` and ``CONSTANTS`` that its nodes name."""
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used]
    graph = helper.make_graph(nodes, path.stem, [info(x) for x in inputs], [info(x) for x in outputs], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


CONSTANTS: dict[str, NDArray[np.generic]] = {
    **WEIGHTS,
    "cosine": np.cos(ANGLES).astype(np.float32),
    "sine": np.sin(ANGLES).astype(np.float32),
    "one": np.array([1], np.int64),
    "second": np.array(1, np.int64),
    "minus_one": np.array([-1], np.int64),
    "far": np.array([2**31], np.int64),
    "patches": np.array([-1, N, 3 * SIDE * SIDE // N], np.int64),
    "first_axis": np.array([0], np.int64),
    "first_axes": np.array([0, 1], np.int64),
    "all_but_last": np.array([0, 1, 2, 3], np.int64),
}


def info(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = TensorProto.INT64 if spec.dtype == "int64" else TensorProto.FLOAT
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def decoder_nodes() -> list[onnx.NodeProto]:
    node = helper.make_node
    nodes = [
        node("ReduceSum", ["attention_mask", "one"], ["seen"], keepdims=0),
        node("Sub", ["seen", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["shape"]),
        node("Gather", ["shape", "second"], ["length"]),
        node("Cast", ["length"], ["total_sequence_length"], to=TensorProto.INT32),
    ]
    rows = "inputs_embeds"
    for i in range(L):
        nodes += [node("MatMul", [rows, f"{kind}{i}"], [f"{kind}{i}.out"]) for kind in "qkv"]
        packed = [f"{kind}{i}.out" for kind in "qkv"] + [f"past_key_values.{i}.{kind}" for kind in KINDS]
        attention = node(
            "GroupQueryAttention",
            [*packed, "seqlens_k", "total_sequence_length", "cosine", "sine"],
            [f"mixed{i}", *(f"present.{i}.{kind}" for kind in KINDS)],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=K,
            do_rotary=1,
        )
        nodes += [attention, node("MatMul", [f"mixed{i}", f"o{i}"], [f"out{i}"])]
        nodes.append(node("Add", [rows, f"out{i}"], [f"rows{i}"]))
        rows = f"rows{i}"
    nodes.append(node("Slice", [rows, "minus_one", "far", "one"], ["last_row"]))
    return [*nodes, node("MatMul", ["last_row", "head"], ["logits"])]


def cache_specs(prefix: str, length: str) -> list[TensorSpec]:
    names = [f"{prefix}.{layer}.{kind}" for layer in range(L) for kind in KINDS]
    return [TensorSpec(name, "float32", ("B", K, length, SIZE)) for name in names]


PIXELS = [TensorSpec("pixel_values", "float32", ("B", 3, SIDE, SIDE))]
FEATURES = [TensorSpec("image_features", "float32", ("B", N, D))]
IDS = [TensorSpec("input_ids", "int64", ("B", "T"))]
EMBEDS = [TensorSpec("inputs_embeds", "float32", ("B", "T", D))]
MASK = [TensorSpec("attention_mask", "int64", ("B", "past+T"))]
GRAPHS = {
    "vision_encoder": (
        [
            helper.make_node("Reshape", ["pixel_values", "patches"], ["flat"]),
            helper.make_node("MatMul", ["flat", "vision"], ["image_features"]),
        ],
        PIXELS,
        FEATURES,
    ),
    "embed_tokens": ([helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])], IDS, EMBEDS),
    "decoder_model_merged": (
        decoder_nodes(),
        EMBEDS + MASK + cache_specs("past_key_values", "past"),
        [TensorSpec("logits", "float32", ("B", 1, V)), *cache_specs("present", "past+T")],
    ),
}


CACHE = [TensorSpec("fusion_cache", "float32", (1, 1, 1, N, D))]
FUSED_GRAPHS = {  # the picture is the mean of its views, and text is fused by adding the mean of the picture
    **GRAPHS,
    "vision_encoder": (
        [
            helper.make_node("Reshape", ["pixel_values", "patches"], ["flat"]),
            helper.make_node("MatMul", ["flat", "vision"], ["views"]),
            helper.make_node("ReduceMean", ["views", "first_axis"], ["image_features"]),
            helper.make_node("Unsqueeze", ["image_features", "first_axes"], ["fusion_cache"]),
        ],
        [TensorSpec("pixel_values", "float32", (VIEWS, 3, SIDE, SIDE))],
        [TensorSpec("image_features", "float32", (1, N, D)), *CACHE],
    ),
    "fusion": (
        [
            helper.make_node("ReduceMean", ["fusion_cache", "all_but_last"], ["mean"], keepdims=0),
            helper.make_node("Add", ["inputs_embeds", "mean"], ["fused_embeds"]),
        ],
        EMBEDS + CACHE,
        [TensorSpec("fused_embeds", "float32", ("B", "T", D))],
    ),
}


def write_bundle(root: Path, fused: bool = False) -> Bundle:
    """A whole bundle, as an export would write it."""
    (root / "onnx").mkdir(parents=True)
    parts = []
    for name, (nodes, inputs, outputs) in (FUSED_GRAPHS if fused else GRAPHS).items():
        save(root / f"onnx/{name}.onnx", nodes, inputs, outputs)
        parts.append(
            PartFile(
                part=name,
                target="onnx",
                precision="fp32",
                file=f"onnx/{name}.onnx",
                inputs=tuple(inputs),
                outputs=tuple(outputs),
            )
        )
    (root / "tokenizer.json").write_text(tokenizer().to_str(), encoding="utf-8")
    (root / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    manifest = Manifest(
        name="tiny",
        family="test",
        parts=tuple(parts),
        image={"height": SIDE, "width": SIDE, "fit": "stretch", "split": {"type": "crops"} if fused else None},
        prompt={"image_token": "<image>", "num_vision_tokens": N, "stop_token_ids": [V - 1]},
        num_vision_tokens=N,
        decoder=DecoderShape(L, K, SIZE, D, V),
        max_context=CONTEXT,
        fusion=FusionShape(num_layers=1, skip_token_zero=True) if fused else None,
    )
    manifest = write_manifest(root, manifest)
    write_sums(root)
    return Bundle(root, manifest)


def tokenizer() -> Inner:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return inner


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def fused_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "fused", fused=True)


@pytest.fixture
def session(bundle: Bundle) -> Iterator[ComposedSession]:
    opened = open_session(bundle)
    yield opened
    opened.close()


def open_session(bundle: Bundle, **options: Any) -> ComposedSession:
    """Every part on one back end, its own graph for the embedding included."""
    back_end, part = OnnxRuntime(**{"threads": 1} | options), bundle.manifest.part
    embedding = back_end.open_embedding(bundle, part("embed_tokens"))
    return ComposedSession(
        Engines(
            encoder=back_end.open_encoder(bundle, part("vision_encoder")),
            fusion=back_end.open_fusion(bundle, part("fusion")) if bundle.manifest.fusion else None,
            embedding=embedding,
            decoder=back_end.open_decoder(bundle, part("decoder_model_merged"), embedding),
        )
    )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8)).save(path)
    return path


def random_rows(num_rows: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).normal(0, 1, (1, num_rows, D)).astype(np.float32)


def prefill_in_chunks(session: ComposedSession, rows: Float, chunks: Sequence[int]) -> Float:
    edges = np.cumsum(chunks)[:-1]
    return [session.prefill(chunk) for chunk in np.split(rows, edges, axis=1)][-1]


# -- the session ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [5, 15], [19, 1], [1, 19], [3, 4, 5, 8]], ids=str)
def test_a_prefill_in_any_chunks_is_the_decoder_in_numpy(session: ComposedSession, chunks: list[int]) -> None:
    rows = random_rows(20)
    assert np.abs(prefill_in_chunks(session, rows, chunks) - numpy_logits(rows)).max() < TOLERANCE
    assert session.position == 20


@pytest.mark.parametrize("kept", [0, 1, 10, 19])
def test_after_a_rewind_the_forgotten_rows_have_no_effect(session: ComposedSession, kept: int) -> None:
    rows, other = random_rows(20), random_rows(30, seed=1)
    session.prefill(np.concatenate([rows[:, :kept], other], axis=1))
    session.rewind(kept)
    assert np.abs(session.prefill(rows[:, kept:]) - numpy_logits(rows)).max() < TOLERANCE


def test_decode_is_embed_and_prefill(session: ComposedSession) -> None:
    rows, tokens = random_rows(5), [7, 200, 7]
    session.prefill(rows)
    steps = [session.decode(token) for token in tokens]
    for count, logits in enumerate(steps, start=1):
        all_rows = np.concatenate([rows, WEIGHTS["table"][None, tokens[:count]]], axis=1)
        assert np.abs(logits - numpy_logits(all_rows)).max() < TOLERANCE


def test_the_shared_buffer_gives_what_separate_buffers_give(session: ComposedSession, bundle: Bundle) -> None:
    import onnxruntime

    graph = onnxruntime.InferenceSession(bundle.path("onnx/decoder_model_merged.onnx"))
    past = [np.zeros((1, K, 0, SIZE), np.float32)] * (2 * L)
    rows, seen = random_rows(12), 0
    for chunk in np.split(rows, [7, 8], axis=1):
        seen += chunk.shape[1]
        names = [spec.name for spec in cache_specs("past_key_values", "past")]
        feeds = {"inputs_embeds": chunk, "attention_mask": np.ones((1, seen), np.int64)}
        logits, *past = graph.run(None, feeds | dict(zip(names, past, strict=True)))
        assert np.abs(session.prefill(chunk) - logits[0, 0]).max() < TOLERANCE


def test_the_context_can_be_used_to_its_last_row(session: ComposedSession) -> None:
    rows = random_rows(CONTEXT)
    session.prefill(rows[:, :-1])
    assert np.abs(session.prefill(rows[:, -1:]) - numpy_logits(rows)).max() < TOLERANCE


def test_rows_beyond_the_context_are_refused_before_the_engine_sees_them(session: ComposedSession) -> None:
    session.prefill(random_rows(CONTEXT - 1))
    not_rows_of_this_decoder = np.zeros((1, 2, D + 1), np.float32)
    with pytest.raises(DoesNotFitError, match="97 rows do not fit into the context of 96"):
        session.prefill(not_rows_of_this_decoder)
    session.decode(1)
    with pytest.raises(DoesNotFitError):
        session.decode(1)
    assert session.position == CONTEXT


def test_logits_of_several_steps_can_be_kept(session: ComposedSession) -> None:
    first = session.prefill(random_rows(3))
    before = first.copy()
    session.decode(1)
    assert np.array_equal(first, before)


def test_rows_that_are_not_contiguous_are_read_right(session: ComposedSession) -> None:
    rows = random_rows(10)
    strided = np.repeat(rows, 2, axis=1)[:, ::2]
    assert np.abs(session.prefill(strided) - numpy_logits(rows)).max() < TOLERANCE


def test_embeds_and_features_belong_to_the_caller(session: ComposedSession) -> None:
    embeds = session.embed(np.array([[1, 2]]))
    features = session.encode(np.ones((1, 3, SIDE, SIDE), np.float32)).tokens
    embeds[0, 0] = features[0, 0]
    assert np.array_equal(session.embed(np.array([[1, 2]]))[0], WEIGHTS["table"][[1, 2]])
    assert features.shape == (1, N, D)


def test_tiles_give_their_tokens_one_after_the_other(session: ComposedSession) -> None:
    tiles = np.random.default_rng(2).normal(0, 1, (3, 3, SIDE, SIDE)).astype(np.float32)
    one_by_one = [session.encode(tile[None]).tokens for tile in tiles]
    assert np.array_equal(session.encode(tiles).tokens, np.concatenate(one_by_one, axis=1))
    assert session.encode(tiles).tokens.shape == (1, 3 * N, D)


def test_a_model_without_pre_fusion_does_not_fuse(session: ComposedSession) -> None:
    with pytest.raises(UnsupportedError, match="no pre-fusion"):
        session.fuse(ImageFeatures(random_rows(N)), random_rows(3))


@pytest.mark.parametrize("position", [-1, 4])
def test_rewinding_to_rows_that_do_not_exist_is_refused(session: ComposedSession, position: int) -> None:
    session.prefill(random_rows(3))
    with pytest.raises(UsageError, match="the kv cache holds 3"):
        session.rewind(position)


def test_an_empty_prefill_is_refused(session: ComposedSession) -> None:
    with pytest.raises(UsageError, match="at least one row"):
        session.prefill(random_rows(0))


def test_a_closed_session_says_so(session: ComposedSession) -> None:
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.decode(1)


def test_a_failure_of_the_engine_is_one_line_and_leaves_the_cache(session: ComposedSession) -> None:
    session.prefill(random_rows(3))
    with pytest.raises(EdgeVLMError, match="decoder_model_merged: onnxruntime failed") as failed:
        session.prefill(np.zeros((1, 2, D + 1), np.float32))
    assert "\n" not in str(failed.value)
    assert session.position == 3
    session.decode(1)


def test_the_back_end_says_what_it_runs_on() -> None:
    info = OnnxRuntime(threads=1).info
    assert info == {"library": "onnxruntime", "version": info["version"], "device": "cpu", "threads": 1}


def test_by_default_it_uses_the_cores_that_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.runtimes.on_onnxruntime.compute_cores", lambda: 1)
    assert OnnxRuntime().info["threads"] == 1


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_below_one_are_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match="threads"):
        OnnxRuntime(threads=threads)


# -- bundles that cannot be run -------------------------------------------------------------------------


@pytest.mark.parametrize("part", GRAPHS)
@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x0a" * 99], ids=["empty", "text", "noise"])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, part: str, content: bytes) -> None:
    broken = write_bundle(tmp_path / "tiny")
    broken.path(f"onnx/{part}.onnx").write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{part}.onnx: cannot be loaded"):
        open_session(broken)


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    broken = write_bundle(tmp_path / "tiny")
    broken.path("onnx/embed_tokens.onnx").unlink()
    with pytest.raises(IntegrityError):
        open_session(broken)


def test_an_operator_that_this_onnxruntime_lacks_is_named(tmp_path: Path) -> None:
    broken = write_bundle(tmp_path / "tiny")
    new = helper.make_node("OperatorOfTomorrow", ["input_ids"], ["inputs_embeds"], domain="com.microsoft")
    save(broken.path("onnx/embed_tokens.onnx"), [new], IDS, EMBEDS)
    with pytest.raises(UnsupportedError, match="OperatorOfTomorrow"):
        open_session(broken)


@pytest.mark.parametrize("other", [{"num_key_value_heads": 1}, {"head_size": 32}, {"num_layers": 1}], ids=str)
def test_a_cache_of_another_shape_than_promised_is_refused(bundle: Bundle, other: dict[str, int]) -> None:
    shape = replace(bundle.manifest.decoder, **other)
    broken = replace(bundle, manifest=replace(bundle.manifest, decoder=shape))
    with pytest.raises(IntegrityError, match="the graph has another"):
        open_session(broken)


def test_a_cache_larger_than_memory_does_not_fit(bundle: Bundle) -> None:
    broken = replace(bundle, manifest=replace(bundle.manifest, max_context=10**13))
    with pytest.raises(DoesNotFitError, match="not enough memory"):
        open_session(broken)


def test_without_onnxruntime_the_command_that_fixes_it_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingLibraryError, match="pip install onnxruntime"):
        open_session(bundle)


# -- the whole model ------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_numpy(bundle: Bundle, picture: Path) -> None:
    with open_bundle(bundle.root) as vlm:
        answer = vlm.ask(picture, "What is this?", max_tokens=12)
        ids = vlm.processor.input_ids([{"role": "user", "content": [{"type": "image"}, text("What is this?")]}])
        rows = WEIGHTS["table"][ids]
        pixels = vlm.processor.pixels(picture)
        rows[vlm.processor.image_positions(ids)] = pixels.reshape(N, -1) @ WEIGHTS["vision"]
    expected: list[int] = []
    while len(expected) < 12 and (token := int(numpy_logits(rows[None]).argmax())) != V - 1:
        expected.append(token)
        rows = np.concatenate([rows, WEIGHTS["table"][[token]]])
    assert answer.token_ids == tuple(expected)


def test_fused_greedy_tokens_are_those_of_numpy(fused_bundle: Bundle, picture: Path) -> None:
    with open_bundle(fused_bundle.root) as vlm:
        answer = vlm.ask(picture, "What! is this?", max_tokens=12)
        ids = vlm.processor.input_ids([{"role": "user", "content": [{"type": "image"}, text("What! is this?")]}])
        vision = (vlm.processor.pixels(picture).reshape(VIEWS, N, -1) @ WEIGHTS["vision"]).mean(0)
        rows = WEIGHTS["table"][ids] + np.where(ids != 0, 1, 0)[:, None] * vision.mean(0)
        rows[vlm.processor.image_positions(ids)] = vision
    expected: list[int] = []
    rows = rows.astype(np.float32)
    while len(expected) < 12 and (token := int(numpy_logits(rows[None]).argmax())) != V - 1:
        expected.append(token)
        rows = np.concatenate([rows, WEIGHTS["table"][[token]]])
    assert 0 in ids  # "!", which pre-fusion leaves out
    assert answer.token_ids == tuple(expected)


def test_a_fused_conversation_that_reuses_the_cache_says_the_same(fused_bundle: Bundle, picture: Path) -> None:
    with open_bundle(fused_bundle.root) as reusing, open_bundle(fused_bundle.root) as computing:
        chats = [reusing.chat(), computing.chat()]
        for prompt, image in (("one", picture), ("two", None), ("three", None)):
            computing.ask(None, "in between")
            first, second = (chat.say(prompt, image, max_tokens=6).read() for chat in chats)
            assert first.token_ids == second.token_ids
            assert first.num_cached_tokens > second.num_cached_tokens or prompt == "one"


def test_views_that_are_not_one_picture_are_refused(fused_bundle: Bundle) -> None:
    session = open_session(fused_bundle)
    for count in (1, VIEWS + 1, 2 * VIEWS):
        with pytest.raises(UsageError, match=f"5 views.*got {2 if count == 10 else count}"):
            session.encode(np.zeros((count, 3, SIDE, SIDE), np.float32))


def test_a_video_is_answered_frame_by_frame(fused_bundle: Bundle, picture: Path) -> None:
    with open_bundle(fused_bundle.root) as vlm:
        answer = vlm.ask(Video(frames=[picture, picture]), "Hello", max_tokens=3)
        assert answer.num_vision_tokens == 2 * N


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_a_conversation_that_reuses_the_cache_says_the_same(bundle: Bundle, picture: Path) -> None:
    with open_bundle(bundle.root) as reusing, open_bundle(bundle.root) as computing:
        chats = [reusing.chat(), computing.chat()]
        for prompt, image in (("one", picture), ("two", None), ("three", None)):
            computing.ask(None, "in between")
            first, second = (chat.say(prompt, image, max_tokens=6).read() for chat in chats)
            assert first.token_ids == second.token_ids
            assert first.num_cached_tokens > second.num_cached_tokens or prompt == "one"


def test_equal_seeds_give_equal_answers(bundle: Bundle, picture: Path) -> None:
    options = Sampling(temperature=1.0, top_p=0.9, seed=5)
    with open_bundle(bundle.root) as vlm:
        answers = {vlm.ask(picture, "Hello", max_tokens=8, sampling=options).token_ids for _ in range(3)}
    assert len(answers) == 1


def test_the_model_says_what_it_runs_on(bundle: Bundle) -> None:
    with open_bundle(bundle.root, threads=1) as vlm:
        assert vlm.name == "tiny"
        assert vlm.max_context == CONTEXT
        assert (vlm.info["runtime"], vlm.info["threads"]) == ("onnxruntime", 1)
        assert len(vlm.info["bundle_sha256"]) == 64


def test_an_unknown_runtime_is_named_with_the_known_ones(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match=r"no runtime named 'onnx-runtime'.*Did you mean 'onnxruntime'"):
        open_bundle(bundle.root, "onnx-runtime")


def test_a_flipped_byte_is_noticed_before_anything_is_loaded(tmp_path: Path) -> None:
    broken = write_bundle(tmp_path / "tiny")
    file = broken.path("onnx/embed_tokens.onnx")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="embed_tokens"):
        open_bundle(broken.root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_vision_tokens": N + 1}, "the prompt has 4 vision tokens per image, the manifest 5"),
        ({"image": {"height": SIDE, "width": 16, "fit": "pad"}}, "pictures become 8 x 16 pixels, .* takes 8 x 8"),
        (
            {
                "num_vision_tokens": 2,
                "prompt": {"image_token": "<image>", "num_vision_tokens": 2, "stop_token_ids": [V - 1]},
            },
            "vision_encoder.onnx gives 4 vision tokens, the manifest says 2",
        ),
    ],
    ids=["prompt", "pixels", "features"],
)
def test_a_bundle_whose_parts_disagree_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    broken = write_bundle(tmp_path / "tiny")
    write_manifest(broken.root, replace(broken.manifest, **change))
    write_sums(broken.root)
    with pytest.raises(IntegrityError, match=words) as error:
        open_bundle(broken.root)
    assert error.value.exit_code == 7


def drop_tensor(manifest: Manifest, name: str) -> Manifest:
    """The manifest without the output ``name`` of its vision encoder."""
    parts = [
        replace(part, outputs=tuple(tensor for tensor in part.outputs if tensor.name != name))
        if part.part == "vision_encoder"
        else part
        for part in manifest.parts
    ]
    return replace(manifest, parts=tuple(parts))


def resize_tensor(manifest: Manifest, name: str, part_name: str, shape: tuple[int | str, ...]) -> Manifest:
    """The manifest with another shape for the input ``name`` of a part."""
    other = TensorSpec(name, "float32", shape)
    parts = [
        replace(part, inputs=tuple(other if tensor.name == name else tensor for tensor in part.inputs))
        if part.part == part_name
        else part
        for part in manifest.parts
    ]
    return replace(manifest, parts=tuple(parts))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: drop_tensor(m, "fusion_cache"),
            "reads a fusion_cache, which onnx/vision_encoder.onnx does not give",
        ),
        (
            lambda m: replace(m, fusion=None, parts=tuple(p for p in m.parts if p.part != "fusion")),
            "gives a fusion_cache, but no part fusion reads it",
        ),
        (
            lambda m: resize_tensor(m, "fusion_cache", "fusion", (1, 1, 1, N + 1, D)),
            "gives a fusion_cache of 1 x 1 x 1 x 4 x 32, onnx/fusion.onnx takes 1 x 1 x 1 x 5 x 32",
        ),
        (
            lambda m: resize_tensor(m, "pixel_values", "vision_encoder", (2, 3, SIDE, SIDE)),
            "pictures become 5 views, onnx/vision_encoder.onnx takes 2",
        ),
        (lambda m: replace(m, image={**m.image, "split": None}), "pictures become 1 views, .* takes 5"),
    ],
    ids=["no cache", "no fusion", "cache shape", "views", "split"],
)
def test_a_fused_bundle_whose_parts_disagree_is_refused(
    tmp_path: Path, change: Callable[[Manifest], Manifest], words: str
) -> None:
    broken = write_bundle(tmp_path / "fused", fused=True)
    write_manifest(broken.root, change(broken.manifest))
    write_sums(broken.root)
    with pytest.raises(IntegrityError, match=words):
        open_bundle(broken.root)


@pytest.mark.parametrize("kept", ["part", "field"])
def test_a_part_fusion_and_its_field_come_together(tmp_path: Path, kept: str) -> None:
    broken = write_bundle(tmp_path / "fused", fused=True)
    manifest = json.loads((broken.root / "edgevlm.json").read_text())
    if kept == "part":
        manifest["fusion"] = None
    else:
        manifest["parts"] = [part for part in manifest["parts"] if part["part"] != "fusion"]
        del manifest["file_bytes"]["onnx/fusion.onnx"]
    (broken.root / "edgevlm.json").write_text(json.dumps(manifest))
    write_sums(broken.root)
    with pytest.raises(IntegrityError, match=f"belong together; found only the {kept}"):
        open_bundle(broken.root)


def test_of_several_precisions_the_first_is_the_one_that_runs_and_is_told(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "tiny")
    others = tuple(replace(part, precision="int8") for part in bundle.manifest.parts)
    write_manifest(bundle.root, replace(bundle.manifest, parts=(*bundle.manifest.parts, *others)))
    write_sums(bundle.root)
    with open_bundle(bundle.root) as vlm:
        assert set(vlm.info["precisions"].values()) == {"fp32"}


# -- devices, precisions and tuned choices --------------------------------------------------------------


@pytest.mark.skipif(
    "AzureExecutionProvider" not in AVAILABLE, reason="this onnxruntime has no provider that runs nothing"
)
@pytest.mark.parametrize("tells", [True, False], ids=["new", "old"])
def test_a_device_that_leaves_all_to_the_cpu_is_an_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tells: bool
) -> None:
    if not tells:  # an onnxruntime that cannot say who computes what
        name = "get_provider_graph_assignment_info"
        monkeypatch.delattr(next(kind for kind in onnxruntime.InferenceSession.__mro__ if name in vars(kind)), name)
    with pytest.raises(UnsupportedError, match=r"leaves .*nodes to the CPU"):
        open_bundle(bundle.root, device="azure")


@pytest.mark.skipif("CUDAExecutionProvider" in AVAILABLE, reason="this onnxruntime has CUDA")
def test_a_device_that_is_not_installed_is_named_with_its_fix(bundle: Bundle) -> None:
    with pytest.raises(MissingLibraryError, match="CUDAExecutionProvider is not in the installed package"):
        open_bundle(bundle.root, device="cuda")


def add_decoder(bundle: Bundle, precision: str, head: Float) -> Bundle:
    """The bundle with a second decoder, whose head is another."""
    file = f"onnx/decoder_model_merged_{precision}.onnx"
    nodes, inputs, outputs = GRAPHS["decoder_model_merged"]
    CONSTANTS["head"], kept = head, CONSTANTS["head"]
    save(bundle.root / file, nodes, inputs, outputs)
    CONSTANTS["head"] = kept
    part = replace(bundle.manifest.part("decoder_model_merged"), precision=precision, file=file)
    manifest = write_manifest(bundle.root, replace(bundle.manifest, parts=(*bundle.manifest.parts, part)))
    write_sums(bundle.root)
    return Bundle(bundle.root, manifest)


def first_logits(bundle: Bundle, **wishes: Any) -> Float:
    with open_bundle(bundle.root, threads=1, **wishes) as vlm, vlm.exclusive() as session:
        return session.prefill(random_rows(3))


def test_a_precision_that_is_asked_for_is_the_one_that_runs_and_is_told(tmp_path: Path) -> None:
    bundle = add_decoder(write_bundle(tmp_path / "tiny"), "int4", 2 * WEIGHTS["head"])
    assert np.allclose(first_logits(bundle, decoder_precision="int4"), 2 * first_logits(bundle), atol=TOLERANCE)
    with open_bundle(bundle.root, decoder_precision="int4") as vlm:
        assert vlm.info["precisions"] == {
            "vision_encoder": "fp32",
            "embed_tokens": "fp32",
            "decoder_model_merged": "int4",
        }
        assert (vlm.info["encoder"]["runtime"], vlm.info["encoder"]["precision"]) == ("onnxruntime", "fp32")


def test_a_precision_that_the_bundle_lacks_is_refused_with_those_it_has(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match="decoder_model_merged for onnx has no precision 'int4'; it has fp32"):
        open_bundle(bundle.root, decoder_precision="int4")
    with pytest.raises(UnsupportedError, match="vision_encoder for onnx has no precision 'int8'; it has fp32"):
        open_bundle(bundle.root, encoder_precision="int8")


def test_what_was_tuned_for_this_machine_is_followed_until_something_is_wished(tmp_path: Path) -> None:
    bundle = add_decoder(write_bundle(tmp_path / "tiny"), "int4", 2 * WEIGHTS["head"])
    best = Choices(encoder=PartChoice(threads=2), decoder=PartChoice(precision="int4", threads=1))
    tuned = TunedMachine(holds_for=surroundings(bundle.root), goal="ttft", choices={"ttft": best})
    write_tune(bundle.root, tuned, key=machine_key(), manifest=bundle.manifest, known=RUNTIMES)
    with open_bundle(bundle.root) as vlm:
        assert vlm.info["precisions"]["decoder_model_merged"] == "int4"
        assert (vlm.info["threads"], vlm.info["encoder"]["threads"]) == (1, 2)
    with open_bundle(bundle.root, decoder_precision="fp32", threads=1) as vlm:
        assert vlm.info["precisions"]["decoder_model_merged"] == "fp32"
        assert vlm.info["encoder"]["threads"] == 1


def with_table(bundle: Bundle) -> Bundle:
    """The bundle with rows that need no graph, whose graph is spoilt to prove it."""
    WEIGHTS["table"].astype("<f4").tofile(bundle.root / "onnx/rows.bin")
    bundle.path("onnx/embed_tokens.onnx").write_bytes(b"no graph")
    table = RowTable(file="onnx/rows.bin", offset=0, dtype="float32", num_rows=V, num_columns=D)
    parts = [
        replace(part, extra_files=("onnx/rows.bin",), table=table) if part.part == "embed_tokens" else part
        for part in bundle.manifest.parts
    ]
    manifest = write_manifest(bundle.root, replace(bundle.manifest, parts=tuple(parts)))
    write_sums(bundle.root)
    return Bundle(bundle.root, manifest)


def test_rows_from_a_table_give_the_answers_of_the_graph(tmp_path: Path, bundle: Bundle, picture: Path) -> None:
    table = with_table(write_bundle(tmp_path / "tiny"))
    with open_bundle(table.root) as rows, open_bundle(bundle.root) as graph:
        answers = [vlm.ask(picture, "What is this?", max_tokens=12).token_ids for vlm in (rows, graph)]
    assert answers[0] == answers[1]


# -- the command line -----------------------------------------------------------------------------------


def run(bundle: Bundle, *arguments: str, lines: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["run", str(bundle.root), *arguments], input=lines)
    return result.exit_code, result.stdout, result.stderr


def test_run_prints_the_answer_and_nothing_else(bundle: Bundle, picture: Path) -> None:
    code, out, _ = run(bundle, "--image", str(picture), "--prompt", "Hello", "--max-tokens", "5")
    with open_bundle(bundle.root) as vlm:
        expected = vlm.ask(picture, "Hello", max_tokens=5).text
    assert (code, out) == (0, expected + "\n")


def test_run_with_json_prints_one_object(bundle: Bundle, picture: Path) -> None:
    code, out, _ = run(bundle, "--image", str(picture), "--prompt", "Hello", "--max-tokens", "5", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (len(answer["token_ids"]), answer["finish_reason"]) == (5, "length")
    assert answer["timings"]["ttft_user_ms"] > 0


def test_run_answers_about_the_frames_of_a_video(fused_bundle: Bundle, picture: Path) -> None:
    frames = ["--frames", str(picture), "--frames", str(picture)]
    code, out, _ = run(fused_bundle, *frames, "--prompt", "Hello", "--max-tokens", "5", "--json")
    assert (code, json.loads(out)["num_vision_tokens"]) == (0, 2 * N)


def test_run_takes_a_picture_or_frames_not_both(fused_bundle: Bundle, picture: Path) -> None:
    code, out, err = run(fused_bundle, "--frames", str(picture), "--image", str(picture), "--prompt", "Hello")
    assert (code, out) == (2, "")
    assert "--image and --frames are both given" in err


def test_run_refuses_frames_for_a_model_that_reads_no_video(bundle: Bundle, picture: Path) -> None:
    code, out, err = run(bundle, "--frames", str(picture), "--prompt", "Hello")
    assert (code, out) == (3, "")
    assert "reads pictures, not videos" in err


def test_run_with_json_needs_a_prompt(bundle: Bundle) -> None:
    code, out, err = run(bundle, "--json")
    assert (code, out) == (2, "")
    assert "--json needs --prompt" in err


def test_run_verbosely_tells_the_times_on_stderr(bundle: Bundle) -> None:
    code, _, err = run(bundle, "--prompt", "Hello", "--max-tokens", "5", "-v")
    assert code == 0
    assert "first text after" in err


def test_a_chat_reads_questions_from_a_pipe(bundle: Bundle, picture: Path) -> None:
    lines = f"/image {picture}\nHello\n\n/reset\nHello\n/quit\nnever asked\n"
    code, out, _ = run(bundle, "--max-tokens", "5", lines=lines)
    with open_bundle(bundle.root) as vlm:
        expected = [vlm.ask(image, "Hello", max_tokens=5).text for image in (picture, None)]
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))


@pytest.mark.parametrize(
    ("lines", "message"),
    [("/image nowhere.png\n", "no file at nowhere.png"), ("/sing\n", "no command /sing")],
)
def test_a_mistake_in_a_piped_chat_ends_it_with_a_code(bundle: Bundle, lines: str, message: str) -> None:
    code, _, err = run(bundle, lines=lines)
    assert code == 2
    assert message in err


def test_run_refuses_an_empty_prompt(bundle: Bundle) -> None:
    code, out, err = run(bundle, "--prompt", "")
    assert (code, out) == (2, "")
    assert "the prompt is empty" in err


def test_run_refuses_a_prompt_longer_than_the_context(bundle: Bundle) -> None:
    code, out, err = run(bundle, "--prompt", "a" * 200)
    assert (code, out) == (5, "")
    assert "the context of tiny holds 96" in err


def test_run_refuses_an_unknown_bundle(bundle: Bundle, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path / "nothing"), "--prompt", "Hello"])
    assert result.exit_code == 2
