"""Graphs for TensorRT: ONNX in which every tensor has the type that it is computed in.

TensorRT reads them strongly typed, so the file alone says what is rounded and where float32 stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from edgevlm.bundle.manifest import PartFile
from edgevlm.core.errors import UnsupportedError, UsageError
from edgevlm.export.clean_graph import clean
from edgevlm.export.decoder_graph import Writing, decoder_graph
from edgevlm.export.embedding_graph import TABLE, embedding_graph
from edgevlm.export.half_graph import to_half
from edgevlm.export.overflow import overflowing_nodes
from edgevlm.export.parts import Part
from edgevlm.export.static_qdq import decoder_scales, quantize_static_symmetric
from edgevlm.export.storage import row_table, save_graph
from edgevlm.export.target import Extras, Lowering
from edgevlm.export.to_onnx import as_written, strip_notes, traced_graph
from edgevlm.export.typed_ops import keep_in_place, past_joined, typed_part
from edgevlm.quant.schemes import ENCODERS, decoder_precision

FOLDER = "tensorrt"
HALF, BRAIN = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
FLOATS = ("fp16", "fp32", "bf16")
STATIC: Mapping[str, Literal["int8", "fp8"]] = MappingProxyType({"int8": "int8", "int8-static": "int8", "fp8": "fp8"})
SUFFIXES = MappingProxyType({"fp32": "", "int8-static": "_int8", "int4": "_q4"})  # others are called as they are
BRAIN_OPSET = 22  # the first whose convolutions and poolings take bfloat16
FLOAT4, FLOAT4_OPSET, FLOAT4_IR = "nvfp4", 23, 11


class TensorRtTarget:
    """One ``tensorrt/<part><suffix>.onnx`` per part and precision; of a decoder two graphs that share their weights.

    What rounds computes the rest in float16.  Nodes that overflow float16 on the part's feeds stay float32; they are
    looked for once, whatever the number of precisions.
    """

    def __init__(self, lowering: Lowering) -> None:
        """Raises UsageError for ways of lowering that are other targets'."""
        if lowering.plain or lowering.static_batch:
            raise UsageError(
                "--plain and --static-batch are for --target onnx: TensorRT's graphs have standard operators alone, "
                "and `edgevlm build --batch 1` fixes the batch"
            )
        self.lowering = lowering
        self._wide: dict[str, tuple[str, ...]] = {}

    def lower(self, part: Part, root: Path, precision: str = "fp16", extras: Extras | None = None) -> PartFile:
        """Write the part's graphs and say what they are.

        Raises UnsupportedError for a precision that the part cannot have.
        """
        extras = extras or Extras()
        if part.name == "embed_tokens":
            return self._embedding(part, root, precision)
        if part.name == "decoder_model_merged":
            return self._decoder(typed_part(part), root, precision, extras)
        return self._traced(part, root, precision, extras)

    def _embedding(self, part: Part, root: Path, precision: str) -> PartFile:
        """The table of rows, which no engine is needed to read."""
        _check_precision(part, precision, ("fp16", "fp32"))
        graph = embedding_graph(part, half=precision == "fp16", half_storage=self.lowering.half_storage)
        file = _saved(graph, part, root, precision, Extras(), external=True)
        return replace(file, table=row_table(root, file.file, TABLE))

    def _traced(self, part: Part, root: Path, precision: str, extras: Extras) -> PartFile:
        """An encoder or its fusion."""
        _check_precision(part, precision, ENCODERS[FOLDER] if part.name == "vision_encoder" else FLOATS)
        graph = traced_graph(part)
        clean(graph)
        wide = self._typed(graph, part, precision, extras)
        if precision == "bf16":
            graph.graph.opset_imports[""] = BRAIN_OPSET
        return replace(_saved(graph, part, root, precision, extras), kept_wide=wide)

    def _decoder(self, part: Part, root: Path, precision: str, extras: Extras) -> PartFile:
        """The graph "rows", and made of its file, so that there is one copy of the weights, the one in place."""
        decoder_precision(precision, FOLDER)
        weights = {} if extras.quantized is None else extras.quantized.weights
        if not weights and precision not in (*FLOATS, *STATIC):
            raise UnsupportedError(
                f"{part.name} in {precision} needs codes, which edgevlm.quant makes: none were given"
            )
        graph = decoder_graph(part, Writing(typed=True, quantized={} if precision in STATIC else weights))
        wide = self._typed(graph, part, precision, extras)
        if precision.startswith(FLOAT4):
            graph.graph.opset_imports[""], graph.ir_version = FLOAT4_OPSET, FLOAT4_IR
        file = _saved(graph, part, root, precision, extras, external=True)
        in_place = f"{file.file.removesuffix('.onnx')}_in_place.onnx"
        config = part.model.config.decoder
        write_in_place(root / file.file, root / in_place, extras.max_context or config.max_position_embeddings)
        beside = (*file.extra_files, in_place)
        return replace(file, cache="rows", in_place=in_place, extra_files=beside, kept_wide=wide)

    def _typed(self, graph: ir.Model, part: Part, precision: str, extras: Extras) -> tuple[str, ...]:
        """Give every tensor its type; returns the nodes that float16 is too narrow for."""
        if precision == "fp32":
            return ()
        if precision == "bf16":
            to_half(graph, dtype=BRAIN)
            return ()
        wide = self._wide_nodes(graph, part, extras)
        if precision in STATIC:
            report = quantize_static_symmetric(graph, extras.feeds, STATIC[precision])
            if part.name == "decoder_model_merged":
                extras.tell_scales(decoder_scales(report))
        to_half(graph, islands=wide, dtype=HALF)
        return wide

    def _wide_nodes(self, graph: ir.Model, part: Part, extras: Extras) -> tuple[str, ...]:
        """Names of nodes that overflow float16 on the feeds; none are known without feeds.

        Codes change little in the range of values, so a decoder's are looked for in float, which every engine runs.
        """
        if not extras.feeds:
            return ()
        if part.name not in self._wide:
            coded = part.name == "decoder_model_merged" and extras.quantized is not None
            plain = decoder_graph(part, Writing(typed=True)) if coded else graph
            cached = {f"node.{value.name}" for value in past_joined(plain.graph)}  # of the kv cache's own type
            found = overflowing_nodes(plain, extras.feeds)
            self._wide[part.name] = tuple(name for name in found if name not in cached)
        return self._wide[part.name]


def write_in_place(rows: Path, path: Path, max_context: int) -> None:
    """Write the graph in place at ``path``: the decoder's graph ``rows`` in the same folder, with that one's weights.

    Its caches have ``max_context`` rows.
    """
    model = ir.load(rows)
    keep_in_place(model, max_context)
    save_graph(model, path, external=False)


def _check_precision(part: Part, precision: str, known: tuple[str, ...]) -> None:
    if precision not in known:
        raise UnsupportedError(f"{part.name} cannot be exported in {precision!r}; it can in {', '.join(known)}")


def _saved(
    graph: ir.Model, part: Part, root: Path, precision: str, extras: Extras, *, external: bool | None = None
) -> PartFile:
    """The file of ``graph``; ``external`` weights lie beside it, whatever their size."""
    strip_notes(graph)
    name = f"{part.name}{_suffix(precision, extras)}.onnx"
    beside = save_graph(graph, root / FOLDER / name, external=external)
    return PartFile(
        part=part.name,
        target=FOLDER,
        precision=precision,
        file=f"{FOLDER}/{name}",
        extra_files=tuple(f"{FOLDER}/{other}" for other in beside),
        inputs=as_written(part.inputs, graph.graph.inputs),
        outputs=as_written(part.outputs, graph.graph.outputs),
    )


def _suffix(precision: str, extras: Extras) -> str:
    if extras.suffix is not None:
        return extras.suffix
    kind = precision.split("-b")[0]
    return SUFFIXES.get(kind, f"_{kind.replace('-', '_')}")
