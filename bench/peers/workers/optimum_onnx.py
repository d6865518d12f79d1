"""optimum-onnx as its users drive it: ``ORTModelForCausalLM`` on the graph that optimum exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.peers.workers.serving import Serving, serve, text_work


class OptimumOnnx:
    """Its forward, with the cache that it returned before."""

    def __init__(self, folder: Path, threads: int) -> None:
        onnxruntime, self._torch = import_module("onnxruntime"), import_module("torch")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._torch.set_num_threads(threads)
        reader = import_module("optimum.onnxruntime").ORTModelForCausalLM
        self._model = reader.from_pretrained(folder, session_options=options, provider="CPUExecutionProvider")
        config = self._model.config
        embedding = 4 * config.vocab_size * config.hidden_size
        self.read_bytes = sum(file.stat().st_size for file in folder.glob("*.onnx*")) - embedding
        self._cache: Any = None
        self._position = 0

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._cache, self._position = None, 0
        return self._next(token_ids)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, token_ids: Sequence[int]) -> int:
        self._position += len(token_ids)
        with self._torch.inference_mode():
            output = self._model(
                input_ids=self._torch.tensor([token_ids]),
                attention_mask=self._torch.ones(1, self._position, dtype=self._torch.int64),
                past_key_values=self._cache,
                use_cache=True,
            )
        self._cache = output.past_key_values
        return int(output.logits[0, -1].argmax())


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a folder of optimum-cli."""
    engine = OptimumOnnx(Path(arguments["model"]), arguments["threads"])
    return Serving(text_work(engine), {"version": version("optimum-onnx"), "read_bytes": engine.read_bytes})


if __name__ == "__main__":
    serve(load)
