"""What one benchmark run says: its workload, its surroundings and every repetition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.bench.stats import Summary, summarize
from edgevlm.runtimes.clock import STAGES

HEADLINE = "warm-new-image"
GIVEN_IMAGES = "warm-given-images"  # the user's, which repeat; the image cache is off
BUSY = 0.15  # share of the processors from which other programs deserve a note


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What was asked, how often, about how many different images."""

    prompt: str
    images: str  # where the images came from, in words
    num_distinct_images: int
    image_cache: bool
    num_new_tokens: int
    regime: str = HEADLINE


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Repetitions thrown away; ``settled`` when three consecutive medians agreed within 2 %."""

    num_repetitions: int
    settled: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak of this process over one extra, untimed repetition; ``kind`` names the counter (PSS or RSS).

    Weights and cache are counted from the bundle and the cache's shape, None where that is not known.
    """

    kind: str
    peak_bytes: int
    num_samples: int
    weights_bytes: int | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything about the machine and the model that a figure depends on."""

    started: str  # ISO 8601, UTC
    command: str
    model: str
    golden: str  # "matched" or "not checked"
    bundle_sha256: str | None  # of the bundle's SHA256SUMS file
    runtime: Mapping[str, Any]
    device: Mapping[str, Any]
    versions: Mapping[str, Any]
    clocks_mhz_before: tuple[float, ...] = ()
    clocks_mhz_after: tuple[float, ...] = ()
    other_load: float | None = None  # share of all processors that other programs used meanwhile


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """One question answered; times in milliseconds.

    ``ttft_user_ms``: request accepted to first piece of text, image loading and preprocessing included.
    ``ttft_engine_ms``: vision, embed, prefill and the first sample, nothing else.
    ``tpot_ms``: (end to end - ttft_user) / (tokens - 1), None for a single token.
    ``token_gaps_ms``: between consecutive tokens, one fewer than tokens.
    """

    image: str
    stages_ms: Mapping[str, float]
    ttft_user_ms: float
    ttft_engine_ms: float
    tpot_ms: float | None
    end_to_end_ms: float
    token_gaps_ms: tuple[float, ...]
    num_prompt_tokens: int
    num_vision_tokens: int
    num_new_tokens: int
    finish_reason: str
    image_from_cache: bool


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One benchmark run, whole; ``print`` shows it as a table."""

    workload: Workload
    warm_up: WarmUp
    memory: Memory
    conditions: Conditions
    repetitions: tuple[Repetition, ...]

    def series(self) -> dict[str, tuple[float, ...]]:
        """One value per repetition (ms) for each headline figure, then each stage (``stage.vision_ms``)."""
        columns = {
            "ttft_user_ms": [one.ttft_user_ms for one in self.repetitions],
            "ttft_engine_ms": [one.ttft_engine_ms for one in self.repetitions],
            "tpot_ms": [one.tpot_ms for one in self.repetitions if one.tpot_ms is not None],
            "end_to_end_ms": [one.end_to_end_ms for one in self.repetitions],
        }
        columns |= {f"stage.{stage}_ms": [one.stages_ms[stage] for one in self.repetitions] for stage in self.stages()}
        return {name: tuple(values) for name, values in columns.items() if values}

    def summaries(self) -> dict[str, Summary]:
        """Every figure summarized, by the names of ``series``; ``token_gap_ms`` where there are gaps."""
        gaps = [gap for one in self.repetitions for gap in one.token_gaps_ms]
        pooled = {"token_gap_ms": summarize(gaps, interval=False)} if gaps else {}
        return {name: summarize(values) for name, values in self.series().items()} | pooled

    def stages(self) -> tuple[str, ...]:
        """The stages that every repetition has, in the order of the clock."""
        return tuple(name for name in STAGES if all(name in one.stages_ms for one in self.repetitions))

    def num_new_tokens(self) -> tuple[int, int]:
        """Fewest and most tokens that a repetition really wrote."""
        counts = [one.num_new_tokens for one in self.repetitions]
        return min(counts), max(counts)

    def notes(self) -> tuple[str, ...]:
        """What a reader must know before trusting the figures, one sentence each."""
        (fewest, most), asked = self.num_new_tokens(), self.workload.num_new_tokens
        warm_ups, images = self.warm_up.num_repetitions, self.workload.num_distinct_images
        load = self.conditions.other_load or 0.0
        said = {
            f"warm-up did not settle within 2 % in {warm_ups} repetitions": not self.warm_up.settled,
            f"answers ended early: {fewest} to {most} tokens instead of {asked}": fewest != asked,
            f"only {images} different images, with the image cache off": images < len(self.repetitions),
            f"other programs used {load:.0%} of the processors meanwhile": load > BUSY,
            "the golden answer was not checked": self.conditions.golden != "matched",
        }
        return tuple(sentence for sentence, holds in said.items() if holds)

    def __str__(self) -> str:
        from edgevlm.bench.table import to_markdown

        return to_markdown(self)
