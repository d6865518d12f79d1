"""OpenVINO on the CPU, from the ONNX files that every bundle holds.

The kv cache is the engine's own state: what a graph calls past and present becomes one variable for each key and
value, which grows by the new rows and never passes through Python.  Rewinding shortens it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import ConfigError, IntegrityError, UnsupportedError, UsageError
from edgevlm.core.hardware import compute_cores
from edgevlm.core.optional import require
from edgevlm.runtimes.choices import MOST_THREADS
from edgevlm.runtimes.context import Context
from edgevlm.runtimes.encoder_views import encode_views, views_at_once
from edgevlm.runtimes.engines import DecoderEngine, Embedding, Encoder, TextFusion
from edgevlm.runtimes.openvino_graph import Graph, errors, keep_inside, properties, read
from edgevlm.runtimes.session import Float, ImageFeatures, Ints

DEVICE = "CPU"
FREE = -1  # a size that changes from call to call, in OpenVINO's words
PAST = "past_key_values."


class OpenVino:
    """A ``BackEnd`` that computes in float32, whatever the processor would rather do.

    Raises ConfigError for an impossible number of threads, UnsupportedError for another device than the CPU,
    MissingLibraryError without openvino.
    """

    target: ClassVar[str] = "onnx"
    computes_in = "f32"

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise ConfigError(f"threads must be 1 to {MOST_THREADS}, got {threads}")
        if device is not None and device.lower() != "cpu":
            raise UnsupportedError(f"openvino runs on the device cpu here, not on {device!r}: leave --device out")
        self._threads = threads or compute_cores()
        core = require("openvino").Core
        with errors("openvino"):
            self._core = core()

    @property
    def info(self) -> Mapping[str, Any]:
        return {
            "library": "openvino",
            "version": require("openvino").__version__.partition("-")[0],  # of 2026.4.1-22000-abcdef-releases/2026/4
            "device": "cpu",
            "threads": self._threads,
            "computes_in": self.computes_in,
        }

    def open_encoder(self, bundle: Bundle, part: PartFile) -> Encoder:
        """The vision encoder for pictures of the bundle's size: with every size fixed it runs fastest."""
        sizes = {"pixel_values": (views_at_once(part), 3, *_image_size(bundle.manifest, part))}
        return _Encoder(self._open(bundle, part, sizes), views_at_once(part), fuses=bundle.manifest.fusion is not None)

    def open_fusion(self, bundle: Bundle, part: PartFile) -> TextFusion:
        return _Fusion(self._open(bundle, part, {}))

    def open_embedding(self, bundle: Bundle, part: PartFile) -> Embedding:
        # It looks up rows: nothing to share between threads, and nothing that bfloat16 would make faster.
        return _Embedding(self._open(bundle, part, {"input_ids": (1, FREE)}, threads=1, computes_in="f32"))

    def open_decoder(self, bundle: Bundle, part: PartFile, embedding: Embedding) -> DecoderEngine:
        _refuse_halves(part)
        return _Decoder(self._open(bundle, part, _of_one_sequence(part)), bundle.manifest, part, embedding)

    def _open(
        self,
        bundle: Bundle,
        part: PartFile,
        sizes: Mapping[str, Sequence[int]],
        *,
        threads: int | None = None,
        computes_in: str | None = None,
    ) -> Graph:
        """The part's graph for inputs of these ``sizes``, a kv cache kept inside."""
        file, computes_in = str(bundle.path(part.file)), computes_in or self.computes_in
        with errors(file, otherwise=IntegrityError):
            model = read(file)
            if cache := _cache_names(part):
                _check_decoder(model, part, bundle.manifest.decoder)
            if sizes:
                model.reshape({name: list(size) for name, size in sizes.items()})
            keep_inside(model, cache)
            compiled = self._core.compile_model(model, DEVICE, properties(threads or self._threads, computes_in))
            return Graph(compiled.create_infer_request(), part.part)


class OpenVinoBf16(OpenVino):
    """The same in bfloat16: faster on processors with instructions for it, with three digits instead of seven.

    Raises UnsupportedError on a processor without, where OpenVINO would silently compute in something else.
    """

    computes_in = "bf16"

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
        super().__init__(device=device, threads=threads)
        with errors("openvino"):
            able = self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in able:
            raise UnsupportedError(
                f"this processor has no bfloat16 instructions (OpenVINO finds {', '.join(able)}): "
                "take --runtime openvino"
            )


class _Part:
    """What every opened part can do: be closed."""

    def __init__(self, graph: Graph) -> None:
        self._graph: Graph | None = graph

    def close(self) -> None:
        self._graph = None

    def _opened(self) -> Graph:
        if self._graph is None:
            raise UsageError("this session is closed: open the bundle again")
        return self._graph


class _Encoder(_Part):
    def __init__(self, graph: Graph, num_views: int, *, fuses: bool) -> None:
        super().__init__(graph)
        self._num_views, self._fuses = num_views, fuses
        self._outputs = ["image_features", "fusion_cache"] if fuses else ["image_features"]

    def encode(self, pixel_values: Float) -> ImageFeatures:
        self._opened()
        return encode_views(pixel_values, self._num_views, self._run, fuses=self._fuses)

    def _run(self, pixel_values: Float) -> list[Float]:
        graph = self._opened()
        graph.feed("pixel_values", _floats(pixel_values))
        graph.run()
        return [graph.floats(name) for name in self._outputs]


class _Fusion(_Part):
    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        graph = self._opened()
        if features.fusion_cache is None:
            raise UnsupportedError("this model has no pre-fusion: its text rows go to the decoder as they are")
        graph.feed("inputs_embeds", _floats(inputs_embeds))
        graph.feed("fusion_cache", _floats(features.fusion_cache))
        graph.run()
        return graph.floats("fused_embeds")


class _Embedding(_Part):
    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._token = np.zeros((1, 1), np.int64)

    def embed(self, input_ids: Ints) -> Float:
        graph = self._opened()
        graph.feed("input_ids", np.ascontiguousarray(input_ids, np.int64))
        graph.run()
        return graph.floats("inputs_embeds")

    def write_row(self, token: int, row: Float) -> None:
        graph = self._opened()
        self._token[0, 0] = token
        graph.feed("input_ids", self._token)
        graph.run()
        row[...] = graph.output("inputs_embeds")


class _Decoder(_Part):
    """One sequence, of which the engine's state holds the rows up to ``position``."""

    def __init__(self, graph: Graph, manifest: Manifest, part: PartFile, embedding: Embedding) -> None:
        super().__init__(graph)
        self._embedding, self._context = embedding, Context(manifest.max_context)
        self._row = np.zeros((1, 1, manifest.decoder.hidden_size), np.float32)
        self._mask = np.ones((1, manifest.max_context), np.int64)
        asks = any(tensor.name == "position_ids" for tensor in part.inputs)
        self._positions = np.arange(manifest.max_context, dtype=np.int64)[None] if asks else None

    @property
    def max_context(self) -> int:
        return self._context.max_context

    @property
    def position(self) -> int:
        return self._context.position

    def prefill(self, inputs_embeds: Float) -> Float:
        return self._append(_floats(inputs_embeds))

    def decode(self, token: int) -> Float:
        self._opened()
        self._embedding.write_row(token, self._row)
        return self._append(self._row)

    def rewind(self, position: int) -> None:
        graph = self._opened()
        self._context.rewind(position)
        graph.keep_rows(position)

    def _append(self, rows: Float) -> Float:
        """Logits [V] of the last of ``rows`` [1, T, D]; with an error, or Ctrl-C, the cache is as it was."""
        graph, start, end = self._opened(), self._context.position, self._context.end(rows.shape[1])
        try:
            graph.feed("inputs_embeds", rows)
            graph.feed("attention_mask", self._mask[:, :end])
            if self._positions is not None:
                graph.feed("position_ids", self._positions[:, start:end])
            graph.run()
            logits = np.array(graph.output("logits")[0, -1], np.float32)  # a copy: the caller may keep several
            self._context.position = end
        except BaseException:
            graph.keep_rows(self._context.position)
            raise
        return logits


def _cache_names(part: PartFile) -> dict[str, str]:
    """The name of every past, with that of the present that follows it."""
    pasts = [tensor.name for tensor in part.inputs if tensor.name.startswith(PAST)]
    return {name: f"present.{name.removeprefix(PAST)}" for name in pasts}


def _refuse_halves(part: PartFile) -> None:
    if any(tensor.name == "use_cache_branch" for tensor in part.inputs):
        raise UnsupportedError(
            f"{part.file}: a graph with one half for prompts and one for single tokens does not run with openvino: "
            "take --decoder-runtime onnxruntime"
        )


def _of_one_sequence(part: PartFile) -> dict[str, tuple[int, ...]]:
    """The sizes of the decoder's inputs with a batch of one, so that an empty cache has its true shape."""
    return {
        tensor.name: (1, *(size if isinstance(size, int) else FREE for size in tensor.shape[1:]))
        for tensor in part.inputs
        if tensor.shape
    }


def _check_decoder(model: Any, part: PartFile, shape: DecoderShape) -> None:
    """Refuse a decoder whose kv cache is not the one that the manifest describes."""
    heads = (shape.num_key_value_heads, shape.head_size)
    kinds = [f"{layer}.{kind}" for layer in range(shape.num_layers) for kind in ("key", "value")]
    caches = [value for value in model.inputs if len(value.partial_shape) == 4]
    found = {
        name: tuple(_size(value.partial_shape[axis]) for axis in (1, 3)) for value in caches for name in value.names
    }
    if found != {f"{PAST}{kind}": heads for kind in kinds}:
        raise IntegrityError(
            f"{part.part}: the manifest promises a kv cache of {shape.num_layers} layers with "
            f"{heads[0]} heads of {heads[1]}, the graph has another: export the bundle again"
        )


def _size(dimension: Any) -> int:
    return int(dimension.get_length()) if dimension.is_static else FREE


def _image_size(manifest: Manifest, part: PartFile) -> tuple[int, int]:
    """Height and width in pixels: the graph's, else those that the bundle's preprocessing gives.

    Raises IntegrityError for an encoder that does not take pictures.
    """
    shapes = [tensor.shape for tensor in part.inputs if tensor.name == "pixel_values"]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise IntegrityError(f"{part.file}: the manifest names no input pixel_values of four dimensions")
    height, width = (
        size if isinstance(size, int) else int(manifest.image.get(name, FREE))
        for size, name in zip(shapes[0][2:], ("height", "width"), strict=True)
    )
    return height, width


def _floats(array: NDArray[Any]) -> Float:
    return np.ascontiguousarray(array, np.float32)
