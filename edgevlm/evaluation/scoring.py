"""Exact-match scores, beside the two that keep them honest: other pictures, and the most frequent answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgevlm.core.errors import ConfigError
from edgevlm.evaluation.suites import Image, Item, Suite

Answerer = Callable[[Image, str], str]  # (picture, prompt) -> answer
Control = Literal["shuffled", "blank"]

Z_95 = 1.959964  # the normal distribution holds 95 % within so many standard deviations


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many of how many were right."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 where nothing was asked."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, with every question taken as independent of the others.

        Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
        """
        if not self.total:
            return 0.0, 1.0
        n, p, z2 = self.total, self.accuracy, Z_95**2
        center = (p + z2 / (2 * n)) / (1 + z2 / n)
        reach = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, center - reach), min(1.0, center + reach)

    def record(self) -> dict[str, Any]:
        """The tally as plain values for JSON."""
        low, high = self.interval
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.accuracy,
            "interval_95": [low, high],
        }


@dataclass(frozen=True, kw_only=True)
class Score:
    """A tally of each kind of question, and of all together."""

    suite: str
    control: Control | Literal["majority"] | None
    kinds: Mapping[str, Tally]

    @property
    def overall(self) -> Tally:
        """All questions, each counting the same."""
        return Tally(
            correct=sum(tally.correct for tally in self.kinds.values()),
            total=sum(tally.total for tally in self.kinds.values()),
        )

    def record(self) -> dict[str, Any]:
        """The score as plain values for JSON."""
        return {
            "suite": self.suite,
            "control": self.control,
            "overall": self.overall.record(),
            "kinds": {kind: tally.record() for kind, tally in self.kinds.items()},
        }


def score(
    suite: Suite,
    answer: Answerer,
    *,
    control: Control | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Ask everything in ``suite`` and count the answers that match, but for case and a final full stop.

    ``control="shuffled"`` asks each question of the next picture, ``"blank"`` of a gray one: a model that
    looks scores much lower there.  Questions of one picture come together and hand over the same array, so
    that a runtime that remembers its last picture encodes each one once.  ``progress`` is told (done, total).
    """
    view = _view(suite, control)
    right: list[bool] = []
    shown, picture = -1, None
    for item in suite.items:
        if picture is None or item.image_index != shown:
            shown, picture = item.image_index, view(item.image_index)
        right.append(is_match(answer(picture, item.question.prompt), item.question.answer))
        if progress:
            progress(len(right), len(suite.items))
    return Score(suite=suite.name, control=control, kinds=_tallies(suite.items, right))


def majority(suite: Suite) -> Score:
    """What a model scores that knows each kind's most frequent answer in this suite, and never looks."""
    answers: dict[str, Counter[str]] = {}
    for item in suite.items:
        answers.setdefault(item.question.kind, Counter())[item.question.answer] += 1
    guesses = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}
    right = [item.question.answer == guesses[item.question.kind] for item in suite.items]
    return Score(suite=suite.name, control="majority", kinds=_tallies(suite.items, right))


def is_match(given: str, expected: str) -> bool:
    """Whether two answers are the same but for case, surrounding spaces and a final full stop."""
    return _normalized(given) == _normalized(expected)


def _normalized(answer: str) -> str:
    return answer.strip().casefold().removesuffix(".").rstrip()


def _view(suite: Suite, control: Control | None) -> Callable[[int], Image]:
    """Which picture is shown for an index."""
    if control is None:
        return suite.image
    if control == "blank":
        return lambda index: np.full_like(suite.image(index), 127)
    if control == "shuffled":
        if suite.num_images < 2:
            raise ConfigError("the shuffled control needs at least two pictures, the suite has one")
        return lambda index: suite.image((index + 1) % suite.num_images)
    raise ConfigError(f"no control named {control!r}; known: blank, shuffled")


def _tallies(items: Iterable[Item], right: Iterable[bool]) -> dict[str, Tally]:
    """One tally a kind, in the order in which kinds first occur."""
    correct: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for item, is_right in zip(items, right, strict=True):
        correct[item.question.kind] += is_right
        total[item.question.kind] += 1
    return {kind: Tally(correct=correct[kind], total=total[kind]) for kind in total}
