"""The decoder on TensorRT: a kv cache that stays on the device, and a step per token that is captured and repeated.

A step reads its row and its position from pinned memory and leaves the logits there.  After a first run with the same
shapes and addresses, which lets TensorRT allocate what it likes, it is captured as a CUDA graph, so that a token costs
one launch; a longer bucket captures it once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.recipe import past_buckets
from edgevlm.core.errors import DeviceError, DoesNotFitError, EdgeVLMError, IntegrityError, UnsupportedError
from edgevlm.runtimes.context import Context
from edgevlm.runtimes.engines import Embedding
from edgevlm.runtimes.kv_cache import cache_names
from edgevlm.runtimes.session import Float
from edgevlm.runtimes.trt.api import Shape
from edgevlm.runtimes.trt.cache import PAST, PRESENT, CacheLayout, InPlaceCache, KvCache, RowsCache
from edgevlm.runtimes.trt.cuda import ALIGNMENT, CapturedGraph, CudaDevice
from edgevlm.runtimes.trt.engine import (
    FREE,
    HOST_TYPES,
    OpenEngine,
    ProfileContext,
    closed,
    item_bytes,
    read_numbers,
    write_numbers,
)

logger = logging.getLogger(__name__)

EMBEDS, WRITTEN, LOGITS = "inputs_embeds", "write_indices", "logits"


class RowInputs:
    """The position and the rows of one run, beside each other, so that one copy brings both."""

    def __init__(self, engine: OpenEngine, num_rows: int, width: int) -> None:
        self._dtypes = {name: engine.tensors[name].dtype for name in (EMBEDS, WRITTEN)}
        self._on_host = engine.tensors[WRITTEN].on_host
        self.num_rows, self._width = num_rows, width
        row_bytes = width * item_bytes(engine, EMBEDS)
        self._staging = engine.device.staging(ALIGNMENT + num_rows * row_bytes, "the decoder's input rows")
        self._row_bytes = row_bytes

    def write(self, start: int, rows: Float) -> None:
        """Put ``rows`` [1, T, D], which go behind ``start`` others, into pinned memory; nothing may be on its way."""
        self._staging.view((1,), HOST_TYPES[self._dtypes[WRITTEN]])[0] = start
        whole = self._staging.view((ALIGNMENT + rows.shape[1] * self._row_bytes,), np.uint8)
        view = whole[ALIGNMENT:].view(HOST_TYPES[self._dtypes[EMBEDS]]).reshape(rows.shape)
        write_numbers(view, self._dtypes[EMBEDS], rows)

    def upload(self, num_rows: int) -> None:
        self._staging.upload(ALIGNMENT + num_rows * self._row_bytes)

    def addresses(self) -> dict[str, int]:
        written = self._staging.host_address if self._on_host else self._staging.address
        return {WRITTEN: written, EMBEDS: self._staging.address + ALIGNMENT}

    def close(self) -> None:
        self._staging.close()


class LogitsRoom:
    """Where the logits of the last row go, on the device and on the host."""

    def __init__(self, engine: OpenEngine, vocab_size: int) -> None:
        self._dtype, self._shape = engine.tensors[LOGITS].dtype, (vocab_size,)
        self._staging = engine.device.staging(vocab_size * item_bytes(engine, LOGITS), "the logits")

    @property
    def address(self) -> int:
        return self._staging.address

    def download(self) -> None:
        self._staging.download()

    def read(self) -> Float:
        """The logits [V] that the last download brought, which are the caller's to keep."""
        return read_numbers(self._staging.view(self._shape, HOST_TYPES[self._dtype]), self._dtype)

    def close(self) -> None:
        self._staging.close()


class Step:
    """Work that is enqueued, and from the second time with the same binding on launched as one captured piece.

    ``captures`` False, or a capture that failed: it is always enqueued.  ``num_captured`` counts captures,
    ``num_launched`` launches.
    """

    def __init__(self, device: CudaDevice, enqueue: Callable[[], None], *, captures: bool) -> None:
        self._device, self._enqueue, self._captures = device, enqueue, captures
        self._graph: CapturedGraph | None = None
        self._version = -1
        self.num_captured, self.num_launched = 0, 0

    def run(self, context: ProfileContext) -> None:
        """Put one run on the stream; ``context`` is bound."""
        if self._version != context.version:
            self.close()
        if self._graph is None and self._captures and context.has_run:
            self._capture(context)
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch(self._device.stream)
            self.num_launched += 1

    def close(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def _capture(self, context: ProfileContext) -> None:
        try:
            self._graph = self._device.stream.capture(self._enqueue)
        except (DeviceError, DoesNotFitError) as error:
            self._captures = False  # for good: a failed capture takes longer than the launches that one saves
            logger.warning("decoding without CUDA graphs, which is slower: %s", error)
            return
        self._version = context.version
        self.num_captured += 1


class TensorRtDecoder:
    """A ``DecoderEngine`` over one engine, which it owns; ``embedding`` gives it the row of the token that was chosen.

    Raises IntegrityError for an engine whose kv cache is not the promised one, UnsupportedError for one that wants
    more than rows and their position, DoesNotFitError for a cache larger than the device's memory.
    """

    def __init__(self, engine: OpenEngine, manifest: Manifest, embedding: Embedding, *, in_place: bool) -> None:
        self._engine: OpenEngine | None = engine
        self._context, self._embedding, self._device = Context(manifest.max_context), embedding, engine.device
        self._width = manifest.decoder.hidden_size
        self._row = np.zeros((1, 1, self._width), np.float32)
        self._chunk_rows = 1
        self._chunk: RowInputs | None = None
        self._step_context: ProfileContext | None = None
        self._step_binding: tuple[int, ...] = ()
        self._is_spoiled = False  # whether rows behind the position may hold what is no number
        self._closers: list[Callable[[], None]] = []
        try:
            self._open(engine, manifest, in_place=in_place)
        except BaseException:
            self.close()
            raise

    @property
    def max_context(self) -> int:
        return self._context.max_context

    @property
    def position(self) -> int:
        return self._context.position

    def prefill(self, inputs_embeds: Float) -> Float:
        return self._append(inputs_embeds)

    def decode(self, token: int) -> Float:
        self._opened()
        self._context.end(1)
        self._embedding.write_row(token, self._row)
        return self._append(self._row)

    def rewind(self, position: int) -> None:
        self._opened()
        self._context.rewind(position)

    def close(self) -> None:
        """Give engine, cache and captured step back; a second time does nothing."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with suppress(EdgeVLMError):
            self._device.stream.wait()
        self._step_context = None
        while self._closers:
            self._closers.pop()()
        if self._chunk is not None:
            self._chunk.close()
        engine.close()

    def _open(self, engine: OpenEngine, manifest: Manifest, *, in_place: bool) -> None:
        engine.device.enter()
        layout = cache_layout(engine, manifest, in_place=in_place)
        self._shape_of, self._past_names = layout.shape, [f"{PAST}{name}" for name in layout.names]
        self._cache = _cache(engine.device, layout, manifest.max_context, in_place=in_place)
        self._closers.append(self._cache.close)
        self._one = RowInputs(engine, 1, self._width)
        self._closers.append(self._one.close)
        self._logits = LogitsRoom(engine, manifest.decoder.vocab_size)
        self._closers.append(self._logits.close)
        captures = not engine.captures_itself and not engine.tensors[WRITTEN].on_host
        self.step = Step(engine.device, self._enqueue_step, captures=captures)
        self._closers.append(self.step.close)
        self._chunk_rows = min(max(engine.sizes(EMBEDS, 1)), manifest.max_context)
        for count in {1, self._chunk_rows}:  # what does not fit is told now, not with the first question
            engine.context(self._shapes(0, count), repeats=count == 1)

    def _opened(self) -> OpenEngine:
        if self._engine is None:
            raise closed()
        return self._engine

    def _append(self, rows: Float) -> Float:
        """Logits [V] of the last of ``rows`` [1, T, D]; with an error, or Ctrl-C, the position is as it was."""
        engine, start, end = self._opened(), self._context.position, self._context.end(rows.shape[1])
        self._device.enter()
        try:
            if self._is_spoiled:
                self._cache.clear(start)
            self._is_spoiled = True
            for first in range(start, end, self._chunk_rows):
                last = min(first + self._chunk_rows, end)
                self._run(engine, rows[:, first - start : last - start], first)
        except BaseException:
            with suppress(EdgeVLMError):
                self._device.stream.wait()  # nothing may be on its way when the pinned rows are written again
            raise
        logits = self._logits.read()
        self._is_spoiled = not np.isfinite(logits[0])
        self._context.position = end
        return logits

    def _run(self, engine: OpenEngine, rows: Float, start: int) -> None:
        """Append ``rows``, no more than a profile takes, and wait until that is done."""
        count = rows.shape[1]
        if count == 1:
            self._one.write(start, rows)
            self.step.run(self._context_of_step(engine, start))
        else:
            inputs = self._inputs(engine, count)
            inputs.write(start, rows)
            context = self._bound(engine, inputs, start, count)
            inputs.upload(count)
            context.run()
            self._logits.download()
        self._cache.after(start, start + count)
        self._device.stream.wait()

    def _enqueue_step(self) -> None:
        assert self._step_context is not None
        self._one.upload(1)
        self._step_context.run()
        self._logits.download()

    def _context_of_step(self, engine: OpenEngine, start: int) -> ProfileContext:
        """The context of single rows, bound; where nothing changed since the last one, that is little work."""
        known, place = self._step_context, (self._cache.version, self._cache.length(start))
        if known is None or self._step_binding != (*place, known.version):
            known = self._step_context = self._bound(engine, self._one, start, 1)
        else:
            known.bind({}, {})  # the workspace may have moved
        self._step_binding = (*place, known.version)
        return known

    def _bound(self, engine: OpenEngine, inputs: RowInputs, start: int, count: int) -> ProfileContext:
        shapes = self._shapes(start, count)
        context = engine.context(shapes, repeats=count == 1)
        context.bind(shapes, self._cache.addresses(count) | inputs.addresses() | {LOGITS: self._logits.address})
        return context

    def _shapes(self, start: int, count: int) -> dict[str, Shape]:
        """Of all inputs, in a run that appends ``count`` rows behind the first ``start``."""
        past = self._shape_of(self._cache.length(start))
        return {EMBEDS: (1, count, self._width), WRITTEN: (1,), **dict.fromkeys(self._past_names, past)}

    def _inputs(self, engine: OpenEngine, count: int) -> RowInputs:
        """Room for ``count`` rows, kept from the last time where it is large enough."""
        if self._chunk is None or self._chunk.num_rows < count:
            old, self._chunk = self._chunk, None
            if old is not None:
                old.close()
            self._chunk = RowInputs(engine, count, self._width)
        return self._chunk


def cache_layout(engine: OpenEngine, manifest: Manifest, *, in_place: bool) -> CacheLayout:
    """How the engine's kv cache lies in memory.

    Raises IntegrityError where it is not the one that the manifest describes, UnsupportedError for an engine that
    wants more than rows and their position.
    """
    shape = manifest.decoder
    names = cache_names(shape)
    _check_names(engine, names)
    length = manifest.max_context if in_place else FREE
    for name in names:
        _check_cache(engine, name, (shape.num_key_value_heads, length, shape.head_size), in_place=in_place)
    row_bytes = shape.head_size * item_bytes(engine, f"{PAST}{names[0]}")
    return CacheLayout(names, shape.num_key_value_heads, shape.head_size, row_bytes)


def _check_names(engine: OpenEngine, names: Sequence[str]) -> None:
    own = {EMBEDS, WRITTEN, LOGITS}
    unknown = [name for name in engine.tensors if name not in own and not name.startswith((PAST, PRESENT))]
    if unknown:
        raise UnsupportedError(f"{engine.name}: the decoder has {', '.join(unknown)}, which nobody knows here")
    expected = own | {f"{prefix}{name}" for prefix in (PAST, PRESENT) for name in names}
    if expected != set(engine.tensors):
        odd = ", ".join(sorted(expected ^ set(engine.tensors))[:4])
        raise IntegrityError(
            f"{engine.name}: the manifest promises a kv cache of {len(names) // 2} layers, the engine has another "
            f"({odd}): export the bundle and build it again"
        )


def _check_cache(engine: OpenEngine, name: str, sizes: Shape, *, in_place: bool) -> None:
    past, present = engine.tensors[f"{PAST}{name}"], engine.tensors[f"{PRESENT}{name}"]
    if past.shape[1:] != sizes:
        raise IntegrityError(
            f"{engine.name}: the manifest promises a kv cache of {' x '.join(map(str, sizes))}, the engine has one of "
            f"{' x '.join(map(str, past.shape[1:]))}: export the bundle and build it again"
        )
    if in_place and present.shares not in (None, past.name):
        raise IntegrityError(f"{engine.name}: {present.name} is written into {present.shares}: export the bundle again")


def _cache(device: CudaDevice, layout: CacheLayout, max_context: int, *, in_place: bool) -> KvCache:
    if in_place:
        return InPlaceCache(device, layout, max_context)
    return RowsCache(device, layout, past_buckets(max_context))
