"""The graphs that TensorRT reads, on ONNX Runtime's CPU, computed in their own types: what proves them without a GPU.

A graph in float32 runs as it is; any other one as ``typed_graph`` says, in float32 with a rounding behind every node.
Quantized weights and activations are taken literally: what a QuantizeLinear and a DequantizeLinear say is computed, and
no kernel that rounds in another way takes their place.  It answers as a GPU does up to the order of sums and the
roundings that fused kernels leave out, at the speed and in the memory of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import IntegrityError, UnsupportedError
from edgevlm.core.optional import require
from edgevlm.runtimes.engines import DecoderEngine, Embedding
from edgevlm.runtimes.heap import give_back
from edgevlm.runtimes.on_onnxruntime import OnnxRuntime
from edgevlm.runtimes.ort_decoder import OnnxDecoder
from edgevlm.runtimes.ort_graph import Graph, errors, session_options
from edgevlm.runtimes.typed_graph import FLOAT8E4M3FN, RoundingGraph, rounding_graph

IN_PLACE = "in-place"


class TensorRtOnCpu(OnnxRuntime):
    """A ``BackEnd`` over the parts of the target tensorrt.

    ``device``: None or cpu for the decoder that gives its new rows, in-place for the one that writes them into its
    cache itself.  Raises UnsupportedError for another one, and for the in-place decoder of a bundle that has none;
    MissingLibraryError without onnxruntime or, for anything but float32, without onnx.
    """

    target: ClassVar[str] = "tensorrt"

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
        wished = (device or "cpu").lower()
        if wished not in ("cpu", IN_PLACE):
            raise UnsupportedError(
                f"tensorrt-on-cpu has the devices cpu and {IN_PLACE}, which choose the decoder's graph, not {device!r}"
            )
        super().__init__(threads=threads)
        self._in_place = wished == IN_PLACE

    @property
    def info(self) -> Mapping[str, Any]:
        kv_cache = "in place" if self._in_place else "rows"
        return {**super().info, "computes_in": "float32, rounded to the graph's types", "kv_cache": kv_cache}

    def open_decoder(self, bundle: Bundle, part: PartFile, embedding: Embedding) -> DecoderEngine:
        chosen = _in_place(part) if self._in_place else part
        return OnnxDecoder(self._open(bundle, chosen), chosen, bundle.manifest, embedding)

    def _open(self, bundle: Bundle, part: PartFile) -> Graph:
        if part.precision == "fp32":
            return super()._open(bundle, part)
        file = bundle.path(part.file)
        with errors(str(file), otherwise=IntegrityError):
            graph = rounding_graph(file)
            options = session_options(part.part, self._threads, self._device)
            held = _let_read(options, graph)
            session = require("onnxruntime").InferenceSession(graph.model, options, providers=self._device.providers)
        give_back()
        return Graph(part.part, session, self._device, {}, held)


def _in_place(part: PartFile) -> PartFile:
    """The decoder whose graph writes new rows into its cache."""
    if not part.in_place:
        raise UnsupportedError(f"{part.file}: the bundle holds no decoder that fills its cache in place: no --device")
    return replace(part, file=part.in_place, in_place="", cache="shared")


def _let_read(options: Any, graph: RoundingGraph) -> list[Any]:
    """Tell ``options`` where the graph's constants are; what comes back must live as long as the session."""
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.folder))
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # so that constants are also unpacked just once
    make = require("onnxruntime").OrtValue.ortvalue_from_numpy_with_onnx_type
    values = [make(codes, FLOAT8E4M3FN) for codes in graph.widened.values()]
    if values:
        options.add_external_initializers(list(graph.widened), values)
    return [*values, *graph.widened.values()]
