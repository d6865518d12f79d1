"""How much of an answer's time is not the engine's?  Python between two tokens, measured on one bundle.

    python bench/overhead.py [FOLDER] [BUNDLE]

Every answer is timed twice at once: TPOT by the clock of the runtime, and inside it the time that ONNX Runtime spent
computing.  What is left is Python: sampling, the embedding's row, bindings, the copy of the logits, detokenizing.
Writes the figures to FOLDER/overhead.json, `runs` by default; BUNDLE is `nano` by default.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import edgevlm
from edgevlm.bench.machine import device, versions
from edgevlm.core.config import to_json
from edgevlm.core.files import write_text
from edgevlm.core.optional import require
from edgevlm.runtimes.vlm import RuntimeVlm

NUM_ANSWERS, NUM_WARM_UP, NUM_TOKENS = 10, 3, 64


class EngineClock:
    """Adds up how long each run of every ONNX Runtime graph takes, until it is left."""

    def __init__(self) -> None:
        self.runs_ms: list[float] = []
        self._engine = require("onnxruntime").InferenceSession
        self._plain = self._engine.run_with_iobinding

    def __enter__(self) -> EngineClock:
        plain, runs_ms = self._plain, self.runs_ms

        def timed(session: Any, *arguments: Any, **options: Any) -> Any:
            start = perf_counter()
            result = plain(session, *arguments, **options)
            runs_ms.append(1000 * (perf_counter() - start))
            return result

        self._engine.run_with_iobinding = timed
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.run_with_iobinding = self._plain


def main(folder: Path, bundle: str) -> None:
    """Ask, and print the medians."""
    with edgevlm.open_bundle(bundle, runtime="onnxruntime") as vlm:
        pairs = [answer_ms(vlm, number) for number in range(NUM_WARM_UP + NUM_ANSWERS)][NUM_WARM_UP:]
    shares = [100 * (tpot - engine) / tpot for tpot, engine in pairs]
    found = {
        "bundle": bundle,
        "tpot_ms": median(tpot for tpot, _ in pairs),
        "engine_ms": median(engine for _, engine in pairs),
        "overhead_percent": median(shares),
        "overhead_percent_range": [min(shares), max(shares)],
        "num_answers": NUM_ANSWERS,
        "num_tokens": NUM_TOKENS,
        "device": device(),
        "versions": versions(),
    }
    write_text(folder / "overhead.json", to_json(found))
    print(
        f"TPOT {found['tpot_ms']:.3f} ms, of it the engine {found['engine_ms']:.3f} ms: "
        f"{found['overhead_percent']:.1f} % overhead ({min(shares):.1f} to {max(shares):.1f})"
    )


def answer_ms(vlm: RuntimeVlm, number: int) -> tuple[float, float]:
    """TPOT of one answer, and the engine's share of it: both over the tokens after the first."""
    size = vlm.processor.image_spec.height
    picture = np.full((size, size, 3), 20 * number % 256, np.uint8)
    with EngineClock() as engine:
        answer = vlm.ask(picture, "Describe the picture.", max_tokens=NUM_TOKENS, ignore_eos=True)
    steps = len(answer.token_ids) - 1
    tpot = answer.timings.tpot_ms
    assert tpot is not None
    return tpot, sum(engine.runs_ms[-steps:]) / steps


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0] if given else "runs"), given[1] if len(given) > 1 else "nano")
