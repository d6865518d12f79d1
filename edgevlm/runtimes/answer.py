"""What comes back from a question: at once, or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from threading import Event
from types import TracebackType
from typing import Literal

from edgevlm.core.errors import ConfigError, InputError, UsageError
from edgevlm.runtimes.clock import Timings
from edgevlm.runtimes.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The text, and how it came about.

    ``token_ids``: all tokens of the answer without the stop token; those that spelled a stop string included.
    ``finish_reason``: "stop" (stop token or stop string), "length" (``max_tokens`` or the end of the context)
    or "cancelled".
    ``num_prompt_tokens``: rows of the prompt, vision tokens included; ``num_cached_tokens`` of them were in
    the kv cache already (chat only).
    ``image_from_cache``: the prompt has an image and the vision encoder did not run for this answer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_vision_tokens: int
    num_cached_tokens: int
    image_from_cache: bool
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class Request:
    """How one question wants to be answered."""

    prompt: str
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    use_image_cache: bool
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("the prompt is empty: ask something")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, got {self.max_tokens}")
        if "" in self.stop:
            raise ConfigError("a stop string is empty: every text contains it")


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several, as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop)


class AnswerStream:
    """An iterator over pieces of text; ``answer`` holds the whole once it has ended.

    The model serves nobody else until the stream has ended or was closed; a dropped stream closes itself.
    Read and close it in one thread; ``cancel`` may come from another.
    """

    def __init__(self, pieces: Generator[str, None, Answer], cancelled: Event, release: Callable[[], None]) -> None:
        self._pieces, self._cancelled = pieces, cancelled
        self._release: Callable[[], None] | None = release
        self._answer: Answer | None = None

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._answer = self._answer or end.value
            self._let_go()
            raise
        except BaseException:
            self._let_go()
            raise

    @property
    def answer(self) -> Answer:
        """The whole answer.  Raises UsageError before the stream has ended."""
        if self._answer is None:
            raise UsageError("the answer is not complete: read the stream to its end first")
        return self._answer

    def read(self) -> Answer:
        """Run to the end and return the whole answer."""
        for _ in self:
            pass
        return self.answer

    def cancel(self) -> None:
        """End the answer after at most one more token, with finish reason "cancelled"; from any thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Give the model back without an answer; in a chat the question counts as never asked."""
        self._pieces.close()
        self._let_go()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _let_go(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()
