"""PyTorch's compiled code of the text model, so that a measurement finds it in the cache.

    python -m bench.peers.makers.compiled MODEL OUT

OUT says how long a first and a second run took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter_ns

import torch
import transformers

from bench.peers.artifacts import PREFILL_TOKENS
from bench.peers.rounds import prompt_ids
from bench.peers.torchvision_operators import define_missing_operators
from bench.peers.workers.serving import since_ms
from bench.peers.workers.transformers_text import Compiled

THREADS = 2


def main(model: str, out: Path) -> None:
    """A prompt and three steps in both types, twice."""
    torch.set_num_threads(THREADS)
    times = {name: compile_once(model, dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    out.write_text(json.dumps(times), encoding="utf-8")


def compile_once(model: str, dtype: torch.dtype) -> list[float]:
    """Milliseconds of the run that compiles and of the one after it."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    engine, times = Compiled(loaded.train(False)), []
    for number in range(2):
        started, token = perf_counter_ns(), engine.prefill(prompt_ids(number, PREFILL_TOKENS))
        for _ in range(3):
            token = engine.step(token)
        times.append(since_ms(started))
    return times


if __name__ == "__main__":
    define_missing_operators()
    main(sys.argv[1], Path(sys.argv[2]))
