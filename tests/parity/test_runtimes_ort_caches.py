"""Decoders of other shapes on ONNX Runtime: caches that grow, in either width, and the inputs that exporters add.

The decoder of this file only adds up what its cache holds, so every logit can be counted by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile, RowTable, TensorSpec
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import DoesNotFitError, EdgeVLMError, IntegrityError, UnsupportedError, UsageError
from edgevlm.runtimes.embedding_table import EmbeddingTable
from edgevlm.runtimes.engines import DecoderEngine
from edgevlm.runtimes.on_onnxruntime import OnnxRuntime
from edgevlm.runtimes.session import Float

L, K, SIZE, V, CONTEXT = 2, 2, 4, 12, 32
D = K * SIZE
TABLE = np.random.default_rng(0).integers(-3, 4, (V, D)).astype(np.float32)  # whole numbers: float16 adds them exactly
HEAD = np.random.default_rng(1).integers(-2, 3, (D, V)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an exporter writes its decoder."""

    cache: str = "float32"
    positions: bool = False
    branch: bool = False
    keep: bool = False
    all_logits: bool = False


def counted(rows: Float, style: Style) -> Float:
    """The logits of the last of the rows [1, T, D]: layer ``i`` adds ``i + 1`` times keys and twice that of values."""
    total = rows[0].sum(0) * sum((layer + 1) * (1 + 2) for layer in range(L))
    logits: Float = (total @ HEAD).astype(np.float32)
    return logits + (rows.shape[1] - 1 if style.positions else 0)


def nodes(style: Style) -> list[onnx.NodeProto]:
    node = helper.make_node
    made = [
        node("Reshape", ["inputs_embeds", "apart"], ["rows"]),
        node("Transpose", ["rows"], ["wide"], perm=[0, 2, 1, 3]),
    ]
    made.append(
        node("Cast", ["wide"], ["key"], to=TensorProto.FLOAT16 if style.cache == "float16" else TensorProto.FLOAT)
    )
    made.append(node("Add", ["key", "key"], ["value"]))
    sums = []
    for layer in range(L):
        for kind in ("key", "value"):
            name = f"{layer}.{kind}"
            made.append(node("Concat", [f"past_key_values.{name}", kind], [f"present.{name}"], axis=2))
            made.append(node("Cast", [f"present.{name}"], [f"{name}.full"], to=TensorProto.FLOAT))
            made.append(node("ReduceSum", [f"{name}.full", "rows_axis"], [f"{name}.sum"]))
            made.append(node("Mul", [f"{name}.sum", f"times{layer}"], [f"{name}.part"]))
            sums.append(f"{name}.part")
    made += [node("Sum", sums, ["heads"]), node("Reshape", ["heads", "joined"], ["total"])]
    made.append(node("MatMul", ["total", "head"], ["plain"]))
    made.append(node("ReduceSum", ["attention_mask"], ["seen"], keepdims=0))
    made.append(
        node("ReduceMax", ["position_ids"], ["place"], keepdims=0)
        if style.positions
        else node("Sub", ["seen", "seen"], ["place"])
    )
    made += [
        node("Cast", ["place"], ["place.float"], to=TensorProto.FLOAT),
        node("Add", ["plain", "place.float"], ["last"]),
    ]
    if style.branch:  # "no cache yet" and "so many rows of it" must agree; else the logits are far off
        made += [
            node("Shape", ["past_key_values.0.key"], ["past.shape"], start=2, end=3),
            node("Greater", ["past.shape", "zero"], ["has"]),
        ]
        made += [
            node("Xor", ["has", "use_cache_branch"], ["wrong"]),
            node("Cast", ["wrong"], ["off"], to=TensorProto.FLOAT),
        ]
        made += [node("Mul", ["off", "far"], ["penalty"]), node("Add", ["last", "penalty"], ["checked"])]
    else:
        made.append(node("Identity", ["last"], ["checked"]))
    if style.all_logits:  # as many rows as came in, the last of which counts
        made += [
            node("Shape", ["inputs_embeds"], ["in.shape"], start=1, end=2),
            node("Concat", ["one", "in.shape", "v"], ["out.shape"], axis=0),
        ]
        made += [node("Expand", ["checked", "out.shape"], ["logits"])]
    elif style.keep:
        made += [
            node("Unsqueeze", ["num_logits_to_keep", "zero"], ["kept"]),
            node("Concat", ["one", "kept", "v"], ["out.shape"], axis=0),
        ]
        made += [node("Expand", ["checked", "out.shape"], ["logits"])]
    else:
        made.append(node("Identity", ["checked"], ["logits"]))
    return made


CONSTANTS: dict[str, NDArray[np.generic]] = {
    "apart": np.array([0, 0, K, SIZE], np.int64),
    "joined": np.array([1, 1, D], np.int64),
    "rows_axis": np.array([2], np.int64),
    "zero": np.array([0], np.int64),
    "one": np.array([1], np.int64),
    "v": np.array([V], np.int64),
    "far": np.array([1e6], np.float32),
    "times0": np.array([1], np.float32),
    "times1": np.array([2], np.float32),
    "head": HEAD,
}
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


def cache_specs(prefix: str, length: str, style: Style) -> list[TensorSpec]:
    names = [f"{prefix}.{layer}.{kind}" for layer in range(L) for kind in ("key", "value")]
    return [TensorSpec(name, style.cache, (1, K, length, SIZE)) for name in names]


def write_bundle(root: Path, style: Style, *, extra: str | None = None) -> Bundle:
    """The decoder alone; other parts of the manifest are names."""
    inputs = [TensorSpec("inputs_embeds", "float32", (1, "T", D)), TensorSpec("attention_mask", "int64", (1, "total"))]
    inputs += cache_specs("past_key_values", "past", style)
    inputs += [TensorSpec("position_ids", "int64", (1, "T"))] if style.positions else []
    inputs += [TensorSpec("use_cache_branch", "bool", (1,))] if style.branch else []
    inputs += [TensorSpec("num_logits_to_keep", "int64", ())] if style.keep else []
    inputs += [TensorSpec(extra, "int64", (1, "T"))] if extra else []
    rows = "T" if style.all_logits else "kept" if style.keep else 1
    outputs = [TensorSpec("logits", "float32", (1, rows, V)), *cache_specs("present", "total", style)]
    (root / "onnx").mkdir(parents=True)
    made = nodes(style)
    used = {name for node in made for name in node.input}
    constants = [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used]
    values = [
        [helper.make_tensor_value_info(x.name, TYPES[x.dtype], x.shape) for x in side] for side in (inputs, outputs)
    ]
    graph = helper.make_graph(made, "decoder", *values, constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), root / "onnx/decoder.onnx"
    )
    (root / "onnx/rows.bin").write_bytes(b"head" + TABLE.astype("<f2").tobytes())
    decoder = PartFile(
        part="decoder_model_merged",
        target="onnx",
        precision="fp32",
        file="onnx/decoder.onnx",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        cache="grown",
    )
    table = RowTable(file="onnx/rows.bin", offset=4, dtype="float16", num_rows=V, num_columns=D)
    rows_part = replace(decoder, part="embed_tokens", file="onnx/rows.bin", cache="shared", table=table)
    manifest = Manifest(
        name="counting",
        family="test",
        parts=(replace(decoder, part="vision_encoder"), rows_part, decoder),
        image={},
        prompt={},
        num_vision_tokens=1,
        decoder=DecoderShape(L, K, SIZE, D, V),
        max_context=CONTEXT,
    )
    return Bundle(root, manifest)


def open_decoder(bundle: Bundle) -> DecoderEngine:
    table = bundle.manifest.part("embed_tokens").table
    assert table is not None
    part = bundle.manifest.part("decoder_model_merged")
    return OnnxRuntime(threads=1).open_decoder(bundle, part, EmbeddingTable(bundle, table))


def rows_of(*tokens: int) -> Float:
    rows: Float = TABLE[list(tokens)][None]
    return rows


STYLES = {
    "plain": Style(),
    "half": Style(cache="float16"),
    "positions": Style(positions=True),
    "branch": Style(branch=True),
    "keep": Style(keep=True),
    "all logits": Style(all_logits=True),
    "everything": Style(cache="float16", positions=True, branch=True, keep=True),
}


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
def test_a_grown_cache_holds_every_row_whatever_the_chunks(tmp_path: Path, style: Style) -> None:
    decoder = open_decoder(write_bundle(tmp_path, style))
    for chunk in ([1, 2, 3], [4], [5, 6, 7, 8]):
        logits = decoder.prefill(rows_of(*chunk))
    assert np.array_equal(logits, counted(rows_of(1, 2, 3, 4, 5, 6, 7, 8), style))
    assert np.array_equal(decoder.decode(9), counted(rows_of(1, 2, 3, 4, 5, 6, 7, 8, 9), style))
    assert decoder.position == 9


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
@pytest.mark.parametrize("kept", [0, 1, 4, 5])
def test_after_a_rewind_a_grown_cache_has_only_the_rows_that_stay(tmp_path: Path, style: Style, kept: int) -> None:
    decoder = open_decoder(write_bundle(tmp_path, style))
    before = [1, 2, 3, 4, 5]
    decoder.prefill(rows_of(*before))
    decoder.rewind(kept)
    decoder.prefill(rows_of(7, 8))
    assert np.array_equal(decoder.decode(9), counted(rows_of(*before[:kept], 7, 8, 9), style))


def test_two_rewinds_in_a_row_count_as_the_second(tmp_path: Path) -> None:
    decoder = open_decoder(write_bundle(tmp_path, Style()))
    decoder.prefill(rows_of(1, 2, 3, 4, 5))
    decoder.rewind(4)
    decoder.rewind(2)
    assert np.array_equal(decoder.decode(6), counted(rows_of(1, 2, 6), Style()))


def test_a_failure_leaves_a_grown_cache_as_it_was(tmp_path: Path) -> None:
    decoder = open_decoder(write_bundle(tmp_path, Style()))
    decoder.prefill(rows_of(1, 2, 3))
    decoder.rewind(2)
    with pytest.raises(EdgeVLMError, match="onnxruntime failed"):
        decoder.prefill(np.zeros((1, 2, D + 1), np.float32))
    assert np.array_equal(decoder.decode(4), counted(rows_of(1, 2, 4), Style()))


def test_a_grown_cache_can_be_used_to_its_last_row(tmp_path: Path) -> None:
    decoder = open_decoder(write_bundle(tmp_path, Style()))
    decoder.prefill(np.repeat(rows_of(1), CONTEXT - 1, axis=1))
    assert np.array_equal(decoder.decode(1), counted(np.repeat(rows_of(1), CONTEXT, axis=1), Style()))
    with pytest.raises(DoesNotFitError, match="33 rows do not fit"):
        decoder.decode(1)


def test_logits_of_a_grown_cache_are_the_callers(tmp_path: Path) -> None:
    decoder = open_decoder(write_bundle(tmp_path, Style()))
    first = decoder.prefill(rows_of(1))
    kept = first.copy()
    decoder.decode(2)
    assert np.array_equal(first, kept)
    first[:] = 0  # writable, and nobody else's
    decoder.rewind(0)
    assert np.array_equal(decoder.prefill(rows_of(1)), kept)


def test_a_decoder_that_wants_what_nobody_can_give_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the decoder wants token_type_ids"):
        open_decoder(write_bundle(tmp_path, Style(), extra="token_type_ids"))


def test_a_closed_decoder_says_so(tmp_path: Path) -> None:
    decoder = open_decoder(write_bundle(tmp_path, Style()))
    decoder.close()
    for use in (lambda: decoder.decode(1), lambda: decoder.prefill(rows_of(1))):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_the_promise_of_another_cache_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, Style())
    shape = replace(bundle.manifest.decoder, num_key_value_heads=1)
    with pytest.raises(IntegrityError, match="the graph has another"):
        open_decoder(replace(bundle, manifest=replace(bundle.manifest, decoder=shape)))
