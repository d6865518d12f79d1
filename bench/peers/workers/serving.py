"""What every worker shares: requests and answers as JSON lines, and one way to time a prefill and a step.

A worker is a process that loads one engine, says so, and then answers one request after another until its input ends.
It may be stopped (SIGSTOP) between two requests, never within one.  Only the standard library and numpy are imported
here, because workers run in the environments of other projects.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np

PR_SET_PDEATHSIG = 1  # of linux/prctl.h

Answer = dict[str, Any]
Work = Callable[[Mapping[str, Any]], Answer]


class TextEngine(Protocol):
    """A decoder with one cache.  ``read_bytes``: weights that one decoded token reads, the embedding's row aside."""

    read_bytes: int

    def prefill(self, token_ids: Sequence[int]) -> int:
        """From an empty cache; the likeliest next token."""
        ...

    def step(self, token: int) -> int:
        """One token more; the likeliest next one."""
        ...


@dataclass
class Serving:
    """One loaded engine: what it can be asked, and what is to be said about it."""

    work: Mapping[str, Work]
    about: Mapping[str, Any]


def serve(load: Callable[[Mapping[str, Any]], Serving]) -> None:
    """Load what the first argument (JSON) describes, then answer requests ``{"do": NAME, ...}`` until input ends.

    Whatever a library prints goes to stderr: stdout belongs to the answers.
    """
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with redirect_stdout(sys.stderr):
        started = perf_counter_ns()
        serving = load(json.loads(sys.argv[1]))
        _say(answers, {**serving.about, "can": sorted(serving.work), "load_ms": since_ms(started)})
        for line in sys.stdin:
            request = json.loads(line)
            _say(answers, serving.work[request["do"]](request))


def die_with_parent() -> None:
    """On Linux: be killed when the thread that started this process ends, however it does, even while standing still.

    One that nobody has stopped ends by itself when its input does: everywhere, and where the other ended before this.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def text_work(engine: TextEngine) -> dict[str, Work]:
    """``text``: prefill the prompt, then decode; times in milliseconds.

    A step's time is from one token known to the next one known: embedding, engine and argmax.
    """

    def text(request: Mapping[str, Any]) -> Answer:
        started = perf_counter_ns()
        token = engine.prefill(request["token_ids"])
        prefill_ms, steps_ms, tokens = since_ms(started), [], [token]
        for _ in range(request["num_new_tokens"]):
            started = perf_counter_ns()
            token = engine.step(token)
            steps_ms.append(since_ms(started))
            tokens.append(token)
        return {"prefill_ms": prefill_ms, "step_ms": float(np.median(steps_ms)), "steps_ms": steps_ms, "tokens": tokens}

    return {"text": text}


def since_ms(started: int) -> float:
    """Milliseconds since ``perf_counter_ns`` gave ``started``."""
    return (perf_counter_ns() - started) / 1e6


def _say(answers: Any, message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
