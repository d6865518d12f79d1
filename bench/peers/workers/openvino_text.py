"""OpenVINO on a model that optimum-intel exported: its own stateful graph, its own arithmetic.

The head computes the last position alone, as openvino-genai arranges it; without that a prefill would be slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.workers.serving import Serving, serve, text_work

MOST_ROWS = 1024


class OpenVino:
    """One compiled model with one request."""

    def __init__(self, folder: Path, threads: int) -> None:
        openvino = import_module("openvino")
        core = openvino.Core()
        model = core.read_model(folder / "openvino_model.xml")
        slice_before_head(model)
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._inputs = {name for value in model.inputs for name in value.get_names()}
        self._position = 0
        self.read_bytes = bytes_per_token(model)

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._request.reset_state()
        self._position = 0
        return self._next(token_ids)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, token_ids: Sequence[int]) -> int:
        start = self._position
        self._position = end = start + len(token_ids)
        feeds = {
            "input_ids": np.asarray([token_ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: feeds[name] for name in self._inputs}, share_inputs=True)
        return int(self._request.get_output_tensor(0).data[0, -1].argmax())


def slice_before_head(model: Any) -> None:
    """Let the last matrix product see the last row of [1, T, D] alone."""
    opset = import_module("openvino.opset13")
    head = model.outputs[0].get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    bounds = [np.array([number], np.int64) for number in (-1, np.iinfo(np.int64).max, 1, 1)]
    last = opset.slice(head.input_value(0), *bounds)
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def bytes_per_token(model: Any) -> int:
    """All constants but the embedding's, whose rows are looked up."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return sum(node.get_byte_size() for node in constants if "embed_tokens" not in node.get_friendly_name())


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a folder of optimum-intel."""
    engine = OpenVino(Path(arguments["model"]), arguments["threads"])
    return Serving(text_work(engine), {"version": version("openvino"), "read_bytes": engine.read_bytes})


if __name__ == "__main__":
    serve(load)
