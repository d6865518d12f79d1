"""The decoder on ONNX Runtime: rows in, logits of the last one out, and a kv cache in between."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile
from edgevlm.core.errors import IntegrityError, UnsupportedError
from edgevlm.runtimes.context import Context
from edgevlm.runtimes.engines import Embedding
from edgevlm.runtimes.kv_cache import cache_names
from edgevlm.runtimes.ort_cache import Cache, GrownCache, RowsCache, SharedCache, memory_on
from edgevlm.runtimes.ort_graph import Graph, bind, errors, still_open
from edgevlm.runtimes.ort_resident import Resident
from edgevlm.runtimes.session import Float

DTYPES: Mapping[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
CACHES: Mapping[str, Any] = {"shared": SharedCache, "grown": GrownCache, "rows": RowsCache}
MASK, WRITTEN = "attention_mask", "write_indices"  # either one tells a graph how far its cache is filled
UNSHARED = 2  # references to an array that one variable alone holds: the variable, and getrefcount's argument
OPTIONAL = ("position_ids", "use_cache_branch", "num_logits_to_keep")  # of other exporters' graphs


class OnnxDecoder:
    """A ``DecoderEngine``; ``embedding`` gives it the row of the token that was chosen.

    The graph learns how far its cache is filled from ``attention_mask``, or from ``write_indices`` [1], the number of
    rows in it.  Raises IntegrityError for a graph whose kv cache is not the promised one, UnsupportedError for a graph
    that wants more than rows, mask and positions, or a cache of rows on a device that keeps its own, DoesNotFitError
    for a cache larger than memory.
    """

    def __init__(self, graph: Graph, part: PartFile, manifest: Manifest, embedding: Embedding) -> None:
        self._graph: Graph | None = graph
        self._context, self._embedding = Context(manifest.max_context), embedding
        self._types = {value.name: value.type for value in graph.session.get_inputs()}
        _check_decoder(graph, manifest.decoder)
        _check_inputs(part, self._types)
        with errors(f"a kv cache of {manifest.max_context:,} rows"):
            self._cache = _cache(graph, part, manifest)
            self._mask = np.ones((1, manifest.max_context), np.int64)
            self._positions = np.arange(manifest.max_context, dtype=np.int64)[None]
        self._masked = MASK in self._types
        self._row = np.zeros((1, 1, manifest.decoder.hidden_size), np.float32)
        self._input_dtype = DTYPES.get(self._types["inputs_embeds"], np.float32)
        self._logits_shape = (1, 1, manifest.decoder.vocab_size)
        self._last: NDArray[Any] | None = None  # the logits given out last
        self._all_logits, self._logits_dtype = _logits_of(graph)
        self._branches = (np.zeros(1, np.bool_), np.ones(1, np.bool_))
        self._one = np.array(1, np.int64)
        with errors(graph.name):
            self._resident = self._on_device(graph) if graph.device.off_host else None
        self._prefill, self._step = self._binding(), self._binding()
        self._row_stays = self._input_dtype is np.float32 and self._resident is None
        if self._resident:
            self._resident.attach_row(self._step)
            self._resident.attach_logits(self._step)
        elif self._row_stays:
            bind(self._step.bind_input, "inputs_embeds", self._row)

    @property
    def max_context(self) -> int:
        return self._context.max_context

    @property
    def position(self) -> int:
        return self._context.position

    def prefill(self, inputs_embeds: Float) -> Float:
        graph, end = still_open(self._graph), self._context.end(inputs_embeds.shape[1])
        embeds = np.ascontiguousarray(inputs_embeds, self._input_dtype)
        with errors(graph.name):
            bind(self._prefill.bind_input, "inputs_embeds", embeds)
            return self._next_logits(graph, self._prefill, end)

    def decode(self, token: int) -> Float:
        graph, end = still_open(self._graph), self._context.end(1)
        self._embedding.write_row(token, self._row)
        with errors(graph.name):
            if self._resident:
                self._resident.put_row(self._row)
                self._run(graph, self._step, end)
                return self._resident.take_logits()
            if not self._row_stays:
                row = np.ascontiguousarray(self._row, self._input_dtype)
                bind(self._step.bind_input, "inputs_embeds", row)
            return self._next_logits(graph, self._step, end)

    def rewind(self, position: int) -> None:
        self._context.rewind(position)

    def close(self) -> None:
        """Give graph and cache back."""
        self._graph = None
        del self._cache, self._prefill, self._step, self._resident

    def _binding(self) -> Any:
        binding = still_open(self._graph).session.io_binding()
        self._cache.attach(binding)
        if "num_logits_to_keep" in self._types:
            bind(binding.bind_input, "num_logits_to_keep", self._one)
        return binding

    def _next_logits(self, graph: Graph, binding: Any, end: int) -> Float:
        """Logits [V] of the last row, in memory that the caller keeps: the engine writes there itself."""
        logits = self._room(end - self._context.position)
        bind(binding.bind_output, "logits", logits)
        self._run(graph, binding, end)
        return np.asarray(logits[0, -1], np.float32)

    def _run(self, graph: Graph, binding: Any, end: int) -> None:
        """Append rows up to ``end``; rows and logits are bound already."""
        start = self._context.position
        # Of the inputs only the number of rows changes from token to token: views of numbers that lie ready.
        if self._masked and self._resident:
            self._resident.bind_mask(binding, MASK, end)
        elif self._masked:
            bind(binding.bind_input, MASK, self._mask[:, :end])
        else:
            bind(binding.bind_input, WRITTEN, self._positions[0, start : start + 1])
        self._bind_optional(binding, start, end)
        self._cache.before(binding, start, end)
        graph.session.run_with_iobinding(binding)
        if graph.device.off_host:
            binding.synchronize_outputs()
        self._cache.after(end)
        self._context.position = end

    def _on_device(self, graph: Graph) -> Resident:
        row = np.zeros(self._row.shape, self._input_dtype)
        return Resident(graph.device, row, self._logits_dtype, self._logits_shape[-1], self._context.max_context)

    def _room(self, num_rows: int) -> NDArray[Any]:
        """Where the logits go: of the last row, or of all where the graph gives them all.

        The memory of the last ones serves again once nobody holds them: new memory of this size comes page by page from
        the system, which for 150,000 logits costs some percent of a token's time.
        """
        batch, _, vocabulary = self._logits_shape
        shape = (batch, num_rows if self._all_logits else 1, vocabulary)
        last, self._last = self._last, None
        if last is None or last.shape != shape or sys.getrefcount(last) > UNSHARED:
            last = np.empty(shape, self._logits_dtype)
        self._last = last
        return last

    def _bind_optional(self, binding: Any, start: int, end: int) -> None:
        if "position_ids" in self._types:
            bind(binding.bind_input, "position_ids", self._positions[:, start:end])
        if "use_cache_branch" in self._types:
            bind(binding.bind_input, "use_cache_branch", self._branches[start > 0])


def _cache(graph: Graph, part: PartFile, manifest: Manifest) -> Cache:
    shape, names = manifest.decoder, cache_names(manifest.decoder)
    if part.cache == "rows" and graph.device.off_host:
        raise UnsupportedError(
            f"{part.file}: a kv cache of rows is put together on the host, the device {graph.device.name} keeps its "
            "own: export with --target onnx, or leave --device out"
        )
    past = next(value for value in graph.session.get_inputs() if value.name == f"past_key_values.{names[0]}")
    dtype, length = DTYPES[past.type], past.shape[2]
    if isinstance(length, int) and length != manifest.max_context:
        raise IntegrityError(
            f"{part.file}: its kv cache has {length:,} rows, the manifest promises {manifest.max_context:,}: export "
            "the bundle again"
        )
    size = (1, shape.num_key_value_heads, manifest.max_context, shape.head_size)
    cache: Cache = CACHES[part.cache](names, size, memory_on(graph.device, dtype))
    return cache


def _logits_of(graph: Graph) -> tuple[bool, type[np.generic]]:
    """Whether the graph gives the logits of every row, and their type."""
    logits = next((value for value in graph.session.get_outputs() if value.name == "logits"), None)
    if logits is None:
        raise IntegrityError(f"{graph.name}: the graph gives no logits: export the bundle again")
    fixed = len(logits.shape) == 3 and logits.shape[1] == 1
    keeps = any(value.name == "num_logits_to_keep" for value in graph.session.get_inputs())
    return not (fixed or keeps), DTYPES.get(logits.type, np.float32)


def _check_decoder(graph: Graph, shape: DecoderShape) -> None:
    """Refuse a decoder whose kv cache is not the one that the manifest describes; sizes that are free fit."""
    heads = (shape.num_key_value_heads, shape.head_size)
    caches = {
        value.name: (value.shape[1], value.shape[3])
        for value in graph.session.get_inputs()
        if len(value.shape) == 4 and value.type in DTYPES
    }
    found = {
        name: tuple(
            promised if not isinstance(size, int) else size for size, promised in zip(sizes, heads, strict=True)
        )
        for name, sizes in caches.items()
    }
    if found != {f"past_key_values.{name}": heads for name in cache_names(shape)}:
        raise IntegrityError(
            f"{graph.name}: the manifest promises a kv cache of {shape.num_layers} layers with "
            f"{heads[0]} heads of {heads[1]}, the graph has another: export the bundle again"
        )


def _check_inputs(part: PartFile, types: Mapping[str, str]) -> None:
    """Refuse a graph that wants what this runtime does not give, or does not take what it gives."""
    for names in (("inputs_embeds",), (MASK, WRITTEN)):
        if not any(name in types for name in names):
            wanted = " or ".join(names)
            raise UnsupportedError(f"{part.file}: the decoder has no input {wanted}; it takes {', '.join(types)}")
    known = ("inputs_embeds", MASK, WRITTEN, *OPTIONAL)
    unknown = [name for name in types if not name.startswith("past_key_values.") and name not in known]
    if unknown:
        raise UnsupportedError(f"{part.file}: the decoder wants {', '.join(unknown)}, which nobody can give it here")
