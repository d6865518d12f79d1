"""ONNX Runtime on the CPU: three graphs, or four with pre-fusion, and a kv cache that nothing copies.

Each key and value buffer is bound both as ``past_key_values`` and as ``present``: GroupQueryAttention writes
new rows behind the old ones, and learns from the length of ``attention_mask`` where that is.  Rewinding is
arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from edgevlm.bundle.manifest import DecoderShape, Manifest
from edgevlm.bundle.read import Bundle
from edgevlm.core.errors import (
    ConfigError,
    DoesNotFitError,
    EdgeVLMError,
    IntegrityError,
    UnsupportedError,
    UsageError,
)
from edgevlm.core.hardware import compute_cores
from edgevlm.core.optional import require
from edgevlm.runtimes.session import Float, ImageFeatures, Ints

MOST_THREADS = 256  # each has a stack, and starts before the first question
SILENT = 4  # the library's log level "fatal": its errors reach the user as ours, in one line
OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")
UNKNOWN_OPERATOR = ("not a registered function", "could not find an implementation")


class OnnxRuntimeSession:
    """A ``Session`` over the ONNX parts of a bundle, on the CPU.

    ``threads``: cores to compute with; by default the physical ones that this process may use, affinity and
    a container's quota respected.  Raises
    IntegrityError for a file that is not the graph it should be, UnsupportedError for a part or operator that
    is missing, DoesNotFitError when memory is short, MissingLibraryError without onnxruntime.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise ConfigError(f"threads must be 1 to {MOST_THREADS}, got {threads}")
        self._threads = threads or compute_cores()
        self._max_context, self._position = bundle.manifest.max_context, 0
        self._graphs: _Graphs | None = _Graphs(bundle, self._threads)

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def position(self) -> int:
        return self._position

    @property
    def info(self) -> Mapping[str, Any]:
        version = require("onnxruntime").__version__
        return {"library": "onnxruntime", "version": version, "device": "cpu", "threads": self._threads}

    def encode(self, pixel_values: Float) -> ImageFeatures:
        return self._opened().encode(pixel_values)

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        return self._opened().fuse(features, inputs_embeds)

    def embed(self, input_ids: Ints) -> Float:
        return self._opened().embed(input_ids)

    def prefill(self, inputs_embeds: Float) -> Float:
        num_rows = inputs_embeds.shape[1]
        graphs, end = self._opened(), self._end(num_rows)
        logits = graphs.prefill(inputs_embeds, end)
        self._position = end
        return logits

    def decode(self, token: int) -> Float:
        graphs, end = self._opened(), self._end(1)
        logits = graphs.decode(token, end)
        self._position = end
        return logits

    def rewind(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise UsageError(f"cannot rewind to row {position}: the kv cache holds {self._position}")
        self._position = position

    def close(self) -> None:
        self._graphs = None

    def _opened(self) -> _Graphs:
        if self._graphs is None:
            raise UsageError("this session is closed: open the bundle again")
        return self._graphs

    def _end(self, num_rows: int) -> int:
        """The cache's length after ``num_rows`` more; checked before the engine runs out of buffer."""
        end = self._position + num_rows
        if num_rows < 1:
            raise UsageError("a prefill needs at least one row")
        if end > self._max_context:
            raise DoesNotFitError(
                f"{end} rows do not fit into the context of {self._max_context} "
                f"({self._position} are taken): shorten the prompt or rewind"
            )
        return end


class _Graphs:
    """The graphs, every fixed buffer bound once."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        shape = bundle.manifest.decoder
        self._vision = _open_graph(bundle, "vision_encoder", threads)
        self._num_views = _num_views(bundle.manifest)
        self._fusion = _open_graph(bundle, "fusion", threads) if bundle.manifest.fusion else None
        self._embed = _open_graph(bundle, "embed_tokens", 1)  # it looks up rows: nothing to share
        self._decoder = _open_graph(bundle, "decoder_model_merged", threads)
        _check_decoder(self._decoder, shape)
        with _errors(f"a kv cache of {bundle.manifest.max_context:,} rows"):
            self._cache = _empty_cache(shape, bundle.manifest.max_context)
            self._mask = np.ones((1, bundle.manifest.max_context), np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._row = np.zeros((1, 1, shape.hidden_size), np.float32)
        self._logits = np.zeros((1, 1, shape.vocab_size), np.float32)
        self._prefill = self._bind_decoder()
        self._step = self._bind_decoder()
        _bind(self._step.bind_input, "inputs_embeds", self._row)
        self._lookup = self._embed.io_binding()
        _bind(self._lookup.bind_input, "input_ids", self._token)
        _bind(self._lookup.bind_output, "inputs_embeds", self._row)

    def encode(self, pixel_values: Float) -> ImageFeatures:
        """As many tiles or views at a time as the graph takes; what it returns is the caller's to keep."""
        num_views = self._num_views
        if len(pixel_values) % num_views:
            raise UsageError(f"the vision encoder takes {num_views} views of a picture, got {len(pixel_values)}")
        outputs = ["image_features", "fusion_cache"] if self._fusion else ["image_features"]
        with _errors("vision_encoder"):
            parts = [
                self._vision.run(outputs, {"pixel_values": pixel_values[first : first + num_views]})
                for first in range(0, len(pixel_values), num_views)
            ]
        if self._fusion:
            if len(parts) > 1:
                raise UsageError(f"the vision encoder takes one picture of {num_views} views, got {len(parts)}")
            return ImageFeatures(*parts[0])
        return ImageFeatures(parts[0][0] if len(parts) == 1 else np.concatenate([part[0] for part in parts], axis=1))

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        """One allocation: the rows, which the caller keeps."""
        if self._fusion is None or features.fusion_cache is None:
            raise UnsupportedError("this model has no pre-fusion: its text rows go to the decoder as they are")
        feeds = {"inputs_embeds": inputs_embeds, "fusion_cache": features.fusion_cache}
        with _errors("fusion"):
            fused: Float = self._fusion.run(["fused_embeds"], feeds)[0]
        return fused

    def embed(self, input_ids: Ints) -> Float:
        """One allocation: the rows, which the caller keeps."""
        with _errors("embed_tokens"):
            embeds: Float = self._embed.run(["inputs_embeds"], {"input_ids": input_ids})[0]
        return embeds

    def prefill(self, inputs_embeds: Float, end: int) -> Float:
        """Rows ``[1, T, D]``, of which the last becomes row ``end - 1``."""
        embeds = np.ascontiguousarray(inputs_embeds, np.float32)
        with _errors("decoder_model_merged"):
            _bind(self._prefill.bind_input, "inputs_embeds", embeds)
            return self._next_logits(self._prefill, end)

    def decode(self, token: int, end: int) -> Float:
        """One token as row ``end - 1``; its embedding goes from graph to graph in place."""
        self._token[0, 0] = token
        with _errors("decoder_model_merged"):
            self._embed.run_with_iobinding(self._lookup)
            return self._next_logits(self._step, end)

    def _bind_decoder(self) -> Any:
        binding = self._decoder.io_binding()
        for name, buffer in self._cache.items():
            _bind(binding.bind_input, f"past_key_values.{name}", buffer)
            _bind(binding.bind_output, f"present.{name}", buffer)
        _bind(binding.bind_output, "logits", self._logits)
        return binding

    def _next_logits(self, binding: Any, end: int) -> Float:
        # All that changes from token to token is the length of the mask: a view of ones that lie ready.  The
        # logits are copied (about 0.02 ms for 150,000), so that a caller may keep those of several steps.
        _bind(binding.bind_input, "attention_mask", self._mask[:, :end])
        self._decoder.run_with_iobinding(binding)
        return np.array(self._logits[0, 0])


def session_options(part: str, threads: int) -> Any:
    """How ONNX Runtime is set up for ``part``, with the reasons."""
    options = require("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graphs are chains: there is nothing to run side by side
    options.log_severity_level = SILENT
    if part == "vision_encoder":
        # Every session has threads of its own, which after a run spin for some 15 ms in case there is more.
        # What comes is the decoder, on other threads but the same cores: those of the encoder must get off.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        # A memory plan pays when the shapes it was made for come again; here lengths differ every time.
        options.enable_mem_pattern = False
    return options


def _open_graph(bundle: Bundle, part: str, threads: int) -> Any:
    file = bundle.path(bundle.manifest.part(part, target="onnx").file)
    with _errors(str(file), otherwise=IntegrityError):
        graph = require("onnxruntime").InferenceSession(
            str(file), session_options(part, threads), providers=["CPUExecutionProvider"]
        )
    return graph


def _num_views(manifest: Manifest) -> int:
    """Tiles or views that the vision encoder takes at once: its fixed number, else one."""
    inputs = {tensor.name: tensor.shape for tensor in manifest.part("vision_encoder", target="onnx").inputs}
    first = inputs.get("pixel_values", (1,))[0]
    return first if isinstance(first, int) else 1


def _check_decoder(graph: Any, shape: DecoderShape) -> None:
    """Refuse a decoder whose kv cache is not the one that the manifest describes."""
    inputs = {value.name: value.shape for value in graph.get_inputs() if len(value.shape) == 4}
    found = {name: (dims[1], dims[3]) for name, dims in inputs.items()}
    heads = (shape.num_key_value_heads, shape.head_size)
    if found != {f"past_key_values.{name}": heads for name in _cache_names(shape)}:
        raise IntegrityError(
            f"decoder_model_merged: the manifest promises a kv cache of {shape.num_layers} layers with "
            f"{heads[0]} heads of {heads[1]}, the graph has another: export the bundle again"
        )


def _cache_names(shape: DecoderShape) -> list[str]:
    return [f"{layer}.{kind}" for layer in range(shape.num_layers) for kind in ("key", "value")]


def _empty_cache(shape: DecoderShape, max_context: int) -> dict[str, Float]:
    """Zeros ``[1, K, max_context, head]`` per name; the system provides the memory as rows are written."""
    size = (1, shape.num_key_value_heads, max_context, shape.head_size)
    return {name: np.zeros(size, np.float32) for name in _cache_names(shape)}


def _bind(bind: Any, name: str, array: Float | Ints) -> None:
    """Let ``name`` be the memory of ``array`` (which must outlive the run), with its present shape."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


@contextmanager
def _errors(what: str, *, otherwise: type[EdgeVLMError] = EdgeVLMError) -> Iterator[None]:
    """Turn the library's exceptions into one clear line about ``what``."""
    try:
        yield
    except EdgeVLMError:
        raise
    except Exception as error:
        raise _translated(what, error, otherwise) from error


def _translated(what: str, error: Exception, otherwise: type[EdgeVLMError]) -> EdgeVLMError:
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    lowered = message.lower()
    if isinstance(error, MemoryError) or any(words in lowered for words in OUT_OF_MEMORY):
        return DoesNotFitError(f"{what}: not enough memory ({message}); close other programs or take a smaller model")
    if type(error).__name__ == "NotImplemented" or any(words in lowered for words in UNKNOWN_OPERATOR):
        return UnsupportedError(f"{what}: this onnxruntime lacks an operator ({message}); install a newer one")
    if otherwise is IntegrityError:
        return IntegrityError(f"{what}: cannot be loaded ({message}); copy or export the bundle again")
    return otherwise(f"{what}: onnxruntime failed ({message})")
