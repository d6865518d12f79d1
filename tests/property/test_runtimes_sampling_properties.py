"""Top-k and top-p against the plainest possible reference."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgevlm.runtimes.sampling import Sampling, distribution, draw, greedy, sampler, top_p
from edgevlm.runtimes.session import Float

LOGITS = arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-20, 20, width=16).map(lambda value: round(value, 2))
)
OPTIONS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.03125, 0.3, 0.5, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 99),
)


def reference(logits: Float, options: Sampling) -> tuple[dict[int, float], dict[int, float]]:
    """Token by token, likeliest first, of equal ones the lower id: its share, and the shares before it."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    smallest = logits[order[min(options.top_k or len(order), len(order)) - 1]]
    kept = [token for token in order if logits[token] >= smallest]
    weights = [math.exp(float(logits[token] - logits[kept[0]]) / options.temperature) for token in kept]
    shares = [weight / sum(weights) for weight in weights]
    before = [0.0, *accumulate(shares)][: len(kept)]
    return dict(zip(kept, shares, strict=True)), dict(zip(kept, before, strict=True))


@given(LOGITS, OPTIONS)
def test_the_distribution_is_the_references(logits: Float, options: Sampling) -> None:
    tokens, probabilities = distribution(logits, options)
    shares, before = reference(logits, options)
    rounding = 1e-5  # a token so close to the edge may fall on either side of it
    surely = {token for token in shares if before[token] < options.top_p - rounding}
    perhaps = {token for token in shares if before[token] < options.top_p + rounding}
    assert surely <= set(tokens.tolist()) <= perhaps
    total = sum(shares[token] for token in tokens.tolist())
    assert probabilities.tolist() == pytest.approx([shares[token] / total for token in tokens.tolist()], abs=1e-5)


@given(LOGITS, OPTIONS)
def test_a_draw_is_a_token_that_may_be_drawn(logits: Float, options: Sampling) -> None:
    assert sampler(options)(logits) in distribution(logits, options)[0]


@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_every_number_in_the_unit_interval_draws_a_token(logits: Float, uniform: float) -> None:
    tokens, probabilities = distribution(logits, Sampling(temperature=1.0))
    assert draw(tokens, probabilities, uniform) in tokens


@given(LOGITS, OPTIONS)
def test_the_likeliest_token_may_always_be_drawn(logits: Float, options: Sampling) -> None:
    assert greedy(logits) in distribution(logits, options)[0]


@given(st.integers(1, 3000), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_the_shortcut_for_small_probabilities_changes_nothing(size: int, p: float) -> None:
    weights = np.random.default_rng(size).exponential(size=size) ** 4
    probabilities = (weights / weights.sum()).astype(np.float32)
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order], dtype=np.float64) - probabilities[order]
    assert top_p(probabilities, p).tolist() == sorted(order[before < p].tolist())


@given(LOGITS, st.sampled_from([1e-30, 1e-6, 1e-3]))
def test_a_temperature_near_zero_draws_one_of_the_largest(logits: Float, temperature: float) -> None:
    token = sampler(Sampling(temperature=temperature))(logits)
    assert logits[token] >= logits.max() - 0.2
