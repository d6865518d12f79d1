"""openvino-genai as its users drive it: an ``LLMPipeline``, whose own metrics give the times."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np

from bench.peers.workers.openvino_text import bytes_per_token
from bench.peers.workers.serving import Answer, Serving, serve


def load(arguments: Mapping[str, Any]) -> Serving:
    """``model``: a folder of optimum-intel with a converted tokenizer."""
    openvino, genai = import_module("openvino"), import_module("openvino_genai")
    settings = {"INFERENCE_NUM_THREADS": arguments["threads"], "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    read_bytes = bytes_per_token(openvino.Core().read_model(f"{arguments['model']}/openvino_model.xml"))
    pipeline = genai.LLMPipeline(arguments["model"], "CPU", **settings)

    def text(request: Mapping[str, Any]) -> Answer:
        config = genai.GenerationConfig()
        config.max_new_tokens = request["num_new_tokens"] + 1
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        result = pipeline.generate(openvino.Tensor(np.asarray([request["token_ids"]], np.int64)), config)
        moments = np.asarray(result.perf_metrics.raw_metrics.m_new_token_times, np.float64)
        steps_ms = [float(gap) for gap in np.diff(moments)]
        return {
            "prefill_ms": float(result.perf_metrics.get_ttft().mean),
            "step_ms": float(np.median(steps_ms)),
            "steps_ms": steps_ms,
            "tokens": [int(token) for token in result.tokens[0]],
        }

    return Serving({"text": text}, {"version": version("openvino-genai"), "read_bytes": read_bytes})


if __name__ == "__main__":
    serve(load)
