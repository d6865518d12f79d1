"""The graph of onnxruntime-genai's model builder, driven by ONNX Runtime as well as we know how.

A graph without its embedding cannot be driven by genai's own generator for text; ``genai_generator`` drives one with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors import safe_open

from bench.peers.artifacts import TEXT_MODEL
from bench.peers.workers.serving import Serving, serve, text_work

MOST_ROWS = 1024
EMBEDDING = "model.embed_tokens.weight"


class GenaiGraph:
    """IO binding, one buffer per layer bound as past and present, the embedding as a table beside the graph."""

    def __init__(self, folder: Path, embedding: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern = False
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        self._mask = np.ones((1, MOST_ROWS), np.int64)
        self._positions = np.arange(MOST_ROWS, dtype=np.int64)[None]
        self._names = {value.name for value in self._session.get_inputs()}
        values = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        shape = (1, values["decoder"]["num_key_value_heads"], MOST_ROWS, values["decoder"]["head_size"])
        caches = sorted(name for name in self._names if name.startswith("past_key_values."))
        self._buffers = [self._bind_cache(name, shape) for name in caches]
        self._logits = np.zeros((1, 1, values["vocab_size"]), np.float32)
        self._bind("output", "logits", self._logits)
        with safe_open(embedding, "np") as stored:
            self._table = stored.get_tensor(EMBEDDING).astype(np.float32)
        self._position = 0
        self.read_bytes = (folder / "model.onnx.data").stat().st_size

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._position = 0
        return self._next(token_ids)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, token_ids: Sequence[int]) -> int:
        rows, start = self._table[np.asarray(token_ids)][None], self._position
        self._position = end = start + len(token_ids)
        self._bind("input", "inputs_embeds", rows)
        self._bind("input", "attention_mask", self._mask[:, :end])
        if "position_ids" in self._names:
            self._bind("input", "position_ids", self._positions[:, start:end])
        self._session.run_with_iobinding(self._binding)
        return int(self._logits.argmax())

    def _bind_cache(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        buffer = np.zeros(shape, np.float32)
        self._bind("input", name, buffer)
        self._bind("output", name.replace("past_key_values", "present"), buffer)
        return buffer

    def _bind(self, kind: str, name: str, array: NDArray[Any]) -> None:
        bind = self._binding.bind_input if kind == "input" else self._binding.bind_output
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a folder of the model builder; beside it the text model, for its embedding."""
    folder = Path(arguments["model"])
    engine = GenaiGraph(folder, folder.parent / TEXT_MODEL / "model.safetensors", arguments["threads"])
    found = f"{version('onnxruntime-genai')} (onnxruntime {version('onnxruntime')})"
    return Serving(text_work(engine), {"version": found, "read_bytes": engine.read_bytes})


if __name__ == "__main__":
    serve(load)
