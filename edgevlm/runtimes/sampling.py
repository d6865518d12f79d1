"""From logits to a token: repetition penalty, temperature, top-k, top-p, and a seeded draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import ConfigError, EdgeVLMError
from edgevlm.runtimes.session import Float

Sampler: TypeAlias = Callable[[Float], int]
Indices: TypeAlias = NDArray[np.intp]

LOWEST_TEMPERATURE = 1e-6  # below, division overflows and nothing but the largest logit is left anyway


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the default is greedy, and repeats exactly.

    ``top_k`` 0 and ``top_p`` 1 keep every token.  With ``temperature`` 0 both, and ``seed``, have no effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # above 1 discourages what the prompt or the answer said before
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")


GREEDY = Sampling()


def sampler(sampling: Sampling, history: Iterable[int] = ()) -> Sampler:
    """A function from logits ``[V]`` to a token id, which remembers what it chose.

    ``history`` holds the ids of the prompt's text, which the repetition penalty counts as said.  The function
    raises EdgeVLMError when the logits hold NaN or infinity.
    """
    random = np.random.Generator(np.random.PCG64(sampling.seed))
    said = set(history)

    def sample(logits: Float) -> int:
        if sampling.repetition_penalty != 1 and said:
            logits = penalize(logits, said, sampling.repetition_penalty)
        token = greedy(logits)
        if sampling.temperature > 0:
            token = draw(*distribution(logits, sampling), random.random())
        said.add(token)
        return token

    return sample


def greedy(logits: Float) -> int:
    """The largest logit's index, the lowest of several; NaN wins every ``argmax`` and is refused here."""
    token = int(np.argmax(logits))
    if not np.isfinite(logits[token]):
        raise EdgeVLMError(
            f"the decoder returned {logits[token]} as a logit, so the model is damaged or too imprecise: "
            "run `edgevlm verify` on the bundle"
        )
    return token


def penalize(logits: Float, said: Iterable[int], penalty: float) -> Float:
    """Divide the positive and multiply the negative logits of the tokens that were ``said``.

    Source: CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1; the two-sided form is transformers'.
    """
    tokens = np.fromiter(said, np.int64)
    logits = logits.copy()
    logits[tokens] = np.where(logits[tokens] > 0, logits[tokens] / penalty, logits[tokens] * penalty)
    return logits


def distribution(logits: Float, sampling: Sampling) -> tuple[Indices, Float]:
    """The ids of the tokens that may be drawn, in order, and their probabilities (sum 1).

    First temperature, then top-k, then top-p, in the order and with the edges of transformers: ties with the
    k-th logit stay; the token that crosses ``top_p`` stays.  Of equal probabilities the lower ids stay.
    """
    tokens = top_k(logits, sampling.top_k)
    below = logits[tokens] - logits.max()
    weights = np.exp(below / max(sampling.temperature, LOWEST_TEMPERATURE))
    probabilities = weights / weights.sum()
    if sampling.top_p == 1:
        return tokens, probabilities
    kept = top_p(probabilities, sampling.top_p)
    return tokens[kept], probabilities[kept] / probabilities[kept].sum()


def top_k(logits: Float, k: int) -> Indices:
    """Ids of the ``k`` largest logits and of those equal to the last of them; all for 0."""
    if not 0 < k < len(logits):
        return np.arange(len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def top_p(probabilities: Float, p: float) -> Indices:
    """Indices of the fewest probabilities, largest first, that reach ``p`` together."""
    # All below (1 - p) / n together weigh less than 1 - p, so none of them survives: no need to sort those.
    # The factor leaves the borderline, where rounding decides, to the exact rule below.
    able = probabilities[probabilities >= 0.999 * (1 - p) / len(probabilities)]
    largest = np.sort(able)[::-1]  # values alone: several times faster than a stable sort of indices
    before = np.cumsum(largest, dtype=np.float64) - largest
    count = max(1, int(np.count_nonzero(before < p)))
    above = np.flatnonzero(probabilities > largest[count - 1])
    ties = np.flatnonzero(probabilities == largest[count - 1])
    return np.sort(np.concatenate([above, ties[: count - len(above)]]))


def draw(tokens: Indices, probabilities: Float, uniform: float) -> int:
    """The token in whose share of [0, 1) the number ``uniform`` falls."""
    ends = np.cumsum(probabilities, dtype=np.float64)
    index = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
    return int(tokens[min(index, len(tokens) - 1)])
