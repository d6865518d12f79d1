"""Where the time of one answer goes, on a monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TypeVar

from edgevlm.runtimes.session import Float, ImageFeatures, Ints, Session

A = TypeVar("A")
B = TypeVar("B")

STAGES = ("load_image", "preprocess", "vision", "embed", "fuse", "prefill", "sample", "decode", "detokenize")
ENGINE_STAGES = ("vision", "embed", "fuse", "prefill")  # plus the first sample


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Times of one answer in milliseconds, from the moment the request was accepted.

    ``stages_ms``: the sum per stage.  ``preprocess`` is pixels, prompt template and tokenizer; ``embed`` is
    the prompt's embedding with the image features put in place; ``fuse``, of models with pre-fusion only, is the
    text seeing the picture; ``decode`` is every step but the first.
    ``ttft_user_ms``: request accepted to the first piece of text, image loading and preprocessing included
    (to the end for an empty answer).  ``ttft_engine_ms``: vision, embed, fuse, prefill and the first
    sample, nothing else.
    ``tpot_ms``: (end to end - ttft_user) / (tokens - 1); None for fewer than two tokens.
    ``token_times_ms``: when each token of the answer was known.  In a stream, the time that the reader of the
    pieces takes counts as well.
    """

    stages_ms: Mapping[str, float]
    ttft_user_ms: float
    ttft_engine_ms: float
    tpot_ms: float | None
    end_to_end_ms: float
    token_times_ms: tuple[float, ...]


class StageClock:
    """Notes when stages begin and end; starts when it is made.  A note costs about a microsecond."""

    def __init__(self) -> None:
        self._started = perf_counter_ns()
        self._spans: list[tuple[str, int, int]] = []
        self._tokens: list[int] = []
        self._first_text: int | None = None

    def stage(self, name: str) -> _Stage:
        """``with clock.stage("vision"):`` notes how long the block takes, also when it raises."""
        return _Stage(self._spans, name)

    def timed(self, name: str, function: Callable[[A], B]) -> Callable[[A], B]:
        """``function``, with every call noted as stage ``name``."""

        def on_clock(argument: A) -> B:
            with self.stage(name):
                return function(argument)

        return on_clock

    def token(self) -> None:
        """A token of the answer is known."""
        self._tokens.append(perf_counter_ns())

    def text(self) -> None:
        """A piece of text leaves; only the first one counts."""
        if self._first_text is None:
            self._first_text = perf_counter_ns()

    def timings(self) -> Timings:
        """The answer is complete now."""
        end = perf_counter_ns()
        first_text = end if self._first_text is None else self._first_text
        rest = len(self._tokens) - 1
        return Timings(
            stages_ms=self._stages_ms(),
            ttft_user_ms=_ms(first_text - self._started),
            ttft_engine_ms=self._engine_ms(),
            tpot_ms=_ms(end - first_text) / rest if rest > 0 else None,
            end_to_end_ms=_ms(end - self._started),
            token_times_ms=tuple(_ms(time - self._started) for time in self._tokens),
        )

    def _stages_ms(self) -> dict[str, float]:
        sums: dict[str, int] = dict.fromkeys(STAGES, 0)
        for name, start, end in self._spans:
            sums[name] = sums.get(name, 0) + end - start
        return {name: _ms(total) for name, total in sums.items()}

    def _engine_ms(self) -> float:
        engine = [end - start for name, start, end in self._spans if name in ENGINE_STAGES]
        samples = [end - start for name, start, end in self._spans if name == "sample"]
        return _ms(sum(engine) + sum(samples[:1]))


class ClockedSession:
    """A session whose work is noted on a clock."""

    def __init__(self, session: Session, clock: StageClock) -> None:
        self._session, self._clock = session, clock

    @property
    def max_context(self) -> int:
        return self._session.max_context

    @property
    def position(self) -> int:
        return self._session.position

    def encode(self, pixel_values: Float) -> ImageFeatures:
        with self._clock.stage("vision"):
            return self._session.encode(pixel_values)

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        with self._clock.stage("fuse"):
            return self._session.fuse(features, inputs_embeds)

    def embed(self, input_ids: Ints) -> Float:
        with self._clock.stage("embed"):
            return self._session.embed(input_ids)

    def prefill(self, inputs_embeds: Float) -> Float:
        with self._clock.stage("prefill"):
            return self._session.prefill(inputs_embeds)

    def decode(self, token: int) -> Float:
        with self._clock.stage("decode"):
            return self._session.decode(token)

    def rewind(self, position: int) -> None:
        self._session.rewind(position)

    def close(self) -> None:
        self._session.close()


class _Stage:
    """A context manager without the generator that contextlib would make on every entry."""

    __slots__ = ("_name", "_spans", "_start")

    def __init__(self, spans: list[tuple[str, int, int]], name: str) -> None:
        self._spans, self._name = spans, name

    def __enter__(self) -> None:
        self._start = perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        self._spans.append((self._name, self._start, perf_counter_ns()))


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6
