"""llama.cpp through the C interface that llama-cpp-python binds: ids in, the last position's logits out."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np

from bench.peers.workers.serving import Serving, serve, text_work

MOST_ROWS = 1024


class LlamaCpp:
    """One GGUF file, with llama.cpp's own defaults but for the threads and the size of the cache."""

    def __init__(self, file: str, threads: int) -> None:
        self._llama = llama = import_module("llama_cpp.llama_cpp")
        self._quiet = llama.llama_log_callback(lambda level, text, user_data: None)
        llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._context = llama.llama_init_from_model(model, self._settings(threads))
        self.read_bytes = _bytes_per_token(file)

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        return self._next(token_ids)

    def step(self, token: int) -> int:
        return self._next([token])

    def _settings(self, threads: int) -> Any:
        settings = self._llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = MOST_ROWS, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        return settings

    def _next(self, token_ids: Sequence[int]) -> int:
        ids = (self._llama.llama_token * len(token_ids))(*token_ids)
        if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(ids, len(token_ids))):
            raise SystemExit("llama.cpp could not decode")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a GGUF file."""
    engine = LlamaCpp(arguments["model"], arguments["threads"])
    about = {"version": version("llama-cpp-python"), "read_bytes": engine.read_bytes}
    return Serving(text_work(engine), about)


def _bytes_per_token(file: str) -> int:
    reader = import_module("gguf").GGUFReader(file)
    return sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.name != "token_embd.weight")


if __name__ == "__main__":
    serve(load)
