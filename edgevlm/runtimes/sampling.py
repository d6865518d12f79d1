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
Probabilities: TypeAlias = NDArray[np.float64]


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


def distribution(logits: Float, sampling: Sampling) -> tuple[NDArray[np.intp], Probabilities]:
    """The tokens that may be drawn, and their probabilities (sum 1).

    First temperature, then top-k, then top-p, in the order and with the edges of transformers: ties with the
    k-th logit stay; the token that crosses ``top_p`` stays.  Of equal probabilities the lower id comes first.
    """
    tokens = top_k(logits, sampling.top_k)
    scaled = logits[tokens].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if sampling.top_p == 1:
        return tokens, probabilities
    kept = top_p(probabilities, sampling.top_p)
    return tokens[kept], probabilities[kept] / probabilities[kept].sum()


def top_k(logits: Float, k: int) -> NDArray[np.intp]:
    """Ids of the ``k`` largest logits and of those equal to the last of them; all for 0."""
    if not 0 < k < len(logits):
        return np.arange(len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def top_p(probabilities: Probabilities, p: float) -> NDArray[np.intp]:
    """Indices of the fewest largest probabilities that reach ``p`` together, largest first."""
    # All below (1 - p) / n together weigh less than 1 - p, so none of them survives: no need to sort those.
    # The factor leaves the borderline, where rounding decides, to the exact rule below.
    able = np.flatnonzero(probabilities >= 0.999 * (1 - p) / len(probabilities))
    able = able[np.argsort(-probabilities[able], kind="stable")]
    before = np.cumsum(probabilities[able]) - probabilities[able]
    return able[: max(1, int(np.count_nonzero(before < p)))]


def draw(tokens: NDArray[np.intp], probabilities: Probabilities, uniform: float) -> int:
    """The token in whose share of [0, 1) the number ``uniform`` falls."""
    index = int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))
    return int(tokens[min(index, len(tokens) - 1)])
