"""ONNX Runtime, on the CPU or on a device that the installed package knows.

``ort_graph.py`` opens graphs, ``ort_devices.py`` says where they run, ``ort_decoder.py`` and ``ort_cache.py`` hold
the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import UnsupportedError
from edgevlm.core.hardware import compute_cores
from edgevlm.core.optional import require
from edgevlm.runtimes.choices import check_threads
from edgevlm.runtimes.encoder_views import encode_views, views_at_once
from edgevlm.runtimes.engines import DecoderEngine, Embedding, Encoder, TextFusion
from edgevlm.runtimes.ort_decoder import OnnxDecoder
from edgevlm.runtimes.ort_devices import Device, device_of
from edgevlm.runtimes.ort_graph import Graph, bind, errors, open_graph, still_open
from edgevlm.runtimes.session import Float, ImageFeatures, Ints


class OnnxRuntime:
    """A ``BackEnd`` over ONNX files.

    ``device``: cpu (the default), cuda, tensorrt, coreml or another provider by its short name, see
    ``ort_devices``.  ``threads``: cores to compute with; by default the physical ones that this process may use,
    affinity and a container's quota respected.  Raises ConfigError for an impossible number of threads,
    UnsupportedError for a device that nobody knows, MissingLibraryError for one that the installed onnxruntime lacks,
    and without onnxruntime.  Opening raises what ``open_graph`` raises.
    """

    target: ClassVar[str] = "onnx"

    def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
        check_threads(threads)
        self._threads = threads or compute_cores()
        self._device: Device = device_of(device)
        self._elsewhere: dict[str, Mapping[str, int]] = {}

    @property
    def info(self) -> Mapping[str, Any]:
        """``elsewhere``, on a device only: the nodes of each part that the CPU computes all the same."""
        version = require("onnxruntime").__version__
        name = self._device.name
        told = {"library": "onnxruntime", "version": version, "device": name, "threads": self._threads}
        return told if name == "cpu" else {**told, "elsewhere": dict(self._elsewhere)}

    def open_encoder(self, bundle: Bundle, part: PartFile) -> Encoder:
        fuses = bundle.manifest.fusion is not None
        return OnnxEncoder(self._open(bundle, part), views_at_once(part), fuses=fuses)

    def open_fusion(self, bundle: Bundle, part: PartFile) -> TextFusion:
        return OnnxFusion(self._open(bundle, part))

    def open_embedding(self, bundle: Bundle, part: PartFile) -> Embedding:
        # It looks up rows: nothing to share between threads, and nothing that would be worth a way to a device.
        return OnnxEmbedding(open_graph(bundle, part, device_of("cpu"), 1), bundle.manifest.decoder.hidden_size)

    def open_decoder(self, bundle: Bundle, part: PartFile, embedding: Embedding) -> DecoderEngine:
        return OnnxDecoder(self._open(bundle, part), part, bundle.manifest, embedding)

    def _open(self, bundle: Bundle, part: PartFile) -> Graph:
        graph = open_graph(bundle, part, self._device, self._threads)
        self._elsewhere[part.part] = graph.elsewhere
        return graph


class OnnxEncoder:
    """Pixels to features; ``num_views`` tiles at a time."""

    def __init__(self, graph: Graph, num_views: int, *, fuses: bool) -> None:
        self._graph: Graph | None = graph
        self._num_views, self._fuses = num_views, fuses
        self._outputs = ["image_features", "fusion_cache"] if fuses else ["image_features"]

    def encode(self, pixel_values: Float) -> ImageFeatures:
        graph = still_open(self._graph)
        return encode_views(
            pixel_values,
            self._num_views,
            lambda pixels: graph.run(self._outputs, {"pixel_values": pixels}),
            fuses=self._fuses,
        )

    def close(self) -> None:
        self._graph = None


class OnnxFusion:
    """Text rows that have seen the picture."""

    def __init__(self, graph: Graph) -> None:
        self._graph: Graph | None = graph

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        """One allocation: the rows, which the caller keeps."""
        if features.fusion_cache is None:
            raise UnsupportedError("this model has no pre-fusion: its text rows go to the decoder as they are")
        feeds = {"inputs_embeds": inputs_embeds, "fusion_cache": features.fusion_cache}
        fused: Float = still_open(self._graph).run(["fused_embeds"], feeds)[0]
        return fused

    def close(self) -> None:
        self._graph = None


class OnnxEmbedding:
    """The embedding as a graph, of bundles that do not say where its rows lie."""

    def __init__(self, graph: Graph, width: int) -> None:
        self._graph: Graph | None = graph
        self._token, self._row = np.zeros((1, 1), np.int64), np.zeros((1, 1, width), np.float32)
        self._lookup = graph.session.io_binding()
        bind(self._lookup.bind_input, "input_ids", self._token)
        bind(self._lookup.bind_output, "inputs_embeds", self._row)

    def embed(self, input_ids: Ints) -> Float:
        """One allocation: the rows, which the caller keeps."""
        embeds: Float = still_open(self._graph).run(["inputs_embeds"], {"input_ids": input_ids})[0]
        return embeds

    def write_row(self, token: int, row: Float) -> None:
        """No allocation; one copy of a row."""
        graph = still_open(self._graph)
        self._token[0, 0] = token
        with errors(graph.name):
            graph.session.run_with_iobinding(self._lookup)
        row[...] = self._row

    def close(self) -> None:
        self._graph = None
        del self._lookup
