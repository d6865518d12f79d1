"""Top-k and top-p against the plainest possible reference."""

from __future__ import annotations

import numpy as np
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


def reference(logits: Float, options: Sampling) -> dict[int, float]:
    """Token by token, likeliest first; of equal ones the lower id."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    smallest = logits[order[min(options.top_k or len(order), len(order)) - 1]]
    kept = [token for token in order if logits[token] >= smallest]
    weights = np.exp([float(logits[token] - logits[kept[0]]) / options.temperature for token in kept])
    shares = weights / weights.sum()
    before = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
    chosen = {
        token: share for token, share, seen in zip(kept, shares, before, strict=True) if seen < options.top_p
    }
    return {token: share / sum(chosen.values()) for token, share in chosen.items()}


@given(LOGITS, OPTIONS)
def test_the_distribution_is_the_references(logits: Float, options: Sampling) -> None:
    tokens, probabilities = distribution(logits, options)
    expected = reference(logits, options)
    found = dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))
    # A share within rounding of top_p may fall on either side.
    assert {
        token for token in found.keys() ^ expected.keys() if expected.get(token, found.get(token)) > 1e-6
    } == set()
    for token in found.keys() & expected.keys():
        assert abs(found[token] - expected[token]) < 1e-5


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
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    assert top_p(probabilities, p).tolist() == order[before < p].tolist()
