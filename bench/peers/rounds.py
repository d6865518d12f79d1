"""A B A B: every engine once per round, in an order that turns, with the machine's ceilings in between."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from bench.peers.artifacts import PREFILL_TOKENS, read_workload
from bench.peers.checkpoint import SPECIAL
from bench.peers.engines import CEILINGS, Engine
from bench.peers.processes import Worker, WorkerLostError

T = TypeVar("T")
Say = Callable[[str], None]

WARM_UPS = 2
FIGURES: Mapping[str, tuple[str, ...]] = {
    "text": ("prefill_ms", "step_ms"),
    "whole": ("ttft_user_ms", "ttft_engine_ms", "tpot_ms", "engine_tpot_ms", "encode_ms"),
    "encoder": ("encode_ms",),
}
CEILING_FIGURES = ("read_gb_per_s", "gemm_fp32_gflop_per_s", "gemm_bf16_gflop_per_s")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often, how long and with how many threads; ``seconds`` ends a section after a whole round."""

    rounds: int = 8
    threads: int = 2
    num_steps: int = 32
    num_new_tokens: int = 64
    seconds: float = 300.0


@dataclass
class Series:
    """One engine: what it said of itself, one value per round of every figure, and its latest tokens."""

    section: str
    about: Mapping[str, Any]
    figures: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)

    def add(self, answer: Mapping[str, Any], names: Sequence[str]) -> None:
        for name in names:
            if answer.get(name) is not None:
                self.figures.setdefault(name, []).append(float(answer[name]))
        self.tokens = list(answer.get("tokens", ()))


@dataclass
class Section:
    """The series of all engines that ran, and the reason of every one that did not."""

    series: dict[str, Series] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    num_rounds: int = 0


def run_section(section: str, engines: Sequence[Engine], folder: Path, plan: Plan, say: Say) -> Section:
    """Load the engines of one section, warm each up, then go round; one that is lost is left out with its reason."""
    found = Section()
    with ExitStack() as stack:
        workers = _load(engines, folder, plan, found, stack, say)
        running = [engine for engine in (*engines, CEILINGS) if engine.process in workers]
        requests = _requests(section, folder, plan)
        for _ in range(WARM_UPS):
            _round(running, workers, found, next(requests), None, say)
        until, gc_was = monotonic() + plan.seconds, gc.isenabled()
        gc.disable()  # our own collector must not run beside an engine
        for number in range(plan.rounds):
            if number and monotonic() > until:
                say(f"{section}: time is up after {number} of {plan.rounds} rounds")
                break
            _round(rotated(running, number), workers, found, next(requests), section, say)
            found.num_rounds = number + 1
        if gc_was:
            gc.enable()
    return found


def rotated(things: Sequence[T], number: int) -> list[T]:
    """Every second round goes backwards, and each pair begins one further: no engine always follows the same."""
    start = number // 2 % len(things)
    turned = [*things[start:], *things[:start]]
    return turned[::-1] if number % 2 else turned


def prompt_ids(number: int, length: int, most: int = min(SPECIAL.values())) -> list[int]:
    """Random ids, others in every round: an engine that keeps prefixes has nothing to reuse."""
    return [int(id) for id in np.random.default_rng(number).integers(0, most, length)]


def _load(
    engines: Sequence[Engine], folder: Path, plan: Plan, found: Section, stack: ExitStack, say: Say
) -> dict[Any, Worker]:
    workers: dict[Any, Worker] = {}
    lost: dict[Any, str] = {}
    for engine in (*engines, CEILINGS):
        if reason := engine.lacks(folder):
            found.left_out[engine.name] = reason
            continue
        if reason := lost.get(engine.process):
            found.left_out[engine.name] = reason
            continue
        say(f"loading {engine.name}")
        try:
            if engine.process not in workers:
                workers[engine.process] = worker = Worker(engine, folder, plan.threads)
                stack.callback(worker.close)
        except WorkerLostError as error:
            lost[engine.process] = found.left_out[engine.name] = str(error)
            say(f"left out: {error}")
            continue
        found.series[engine.name] = Series(engine.section, workers[engine.process].about)
    return workers


def _round(
    engines: Sequence[Engine],
    workers: Mapping[Any, Worker],
    found: Section,
    request: Mapping[str, Any],
    section: str | None,
    say: Say,
) -> None:
    """One turn each; without ``section`` it is a warm-up, and nothing is kept."""
    for engine in engines:
        if engine.name in found.left_out:
            continue
        asked = {"do": "ceilings"} if engine is CEILINGS else {**request, "mode": engine.mode}
        try:
            answer = workers[engine.process].ask(asked)
        except WorkerLostError as error:
            workers[engine.process].close()
            _leave_out([one for one in engines if one.process == engine.process], str(error), found)
            say(f"left out: {error}")
            continue
        if section is not None:
            names = CEILING_FIGURES if engine is CEILINGS else FIGURES[section]
            found.series[engine.name].add(answer, names)


def _leave_out(engines: Sequence[Engine], reason: str, found: Section) -> None:
    """Those that shared a lost process, with what was measured of them until then."""
    for engine in engines:
        found.left_out[engine.name] = reason
        found.series.pop(engine.name, None)


def _requests(section: str, folder: Path, plan: Plan) -> Iterator[dict[str, Any]]:
    """What is asked in each round, the same of every engine."""
    number = 0
    while True:
        if section == "text":
            ids = prompt_ids(number, PREFILL_TOKENS)
            yield {"do": "text", "token_ids": ids, "num_new_tokens": plan.num_steps}
        elif section == "whole":
            yield {"do": "whole", "num_new_tokens": plan.num_new_tokens, **read_workload(folder)}
        else:
            yield {"do": "encoder"}
        number += 1
