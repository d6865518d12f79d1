"""onnxruntime-genai as its users drive it: a ``Generator``, greedy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.peers.workers.serving import Serving, serve, text_work

MOST_ROWS = 1024


class GenaiGenerator:
    """One model; a generator per prompt, as the library wants it."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._genai = import_module("onnxruntime_genai")
        config = self._genai.Config(str(folder))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = self._genai.Model(config)
        self._generator: Any = None
        values = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        embedding = 4 * values["vocab_size"] * values["decoder"]["hidden_size"]
        self.read_bytes = (folder / "model.onnx.data").stat().st_size - embedding

    def prefill(self, token_ids: Sequence[int]) -> int:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=MOST_ROWS, min_length=MOST_ROWS, do_sample=False)
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(list(token_ids))
        return self.step(0)

    def step(self, token: int) -> int:
        """The generator knows its last token itself."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a folder of the model builder, its embedding in the graph."""
    engine = GenaiGenerator(Path(arguments["model"]), arguments["threads"])
    return Serving(text_work(engine), {"version": version("onnxruntime-genai"), "read_bytes": engine.read_bytes})


if __name__ == "__main__":
    serve(load)
