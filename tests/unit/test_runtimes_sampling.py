"""How the next token is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgevlm.core.errors import ConfigError, EdgeVLMError
from edgevlm.runtimes.sampling import Sampling, distribution, penalize, sampler, top_k, top_p
from edgevlm.runtimes.session import Float


def logits(*values: float) -> Float:
    return np.array(values, np.float32)


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert sampler(Sampling())(logits(0, 3, 1)) == 1


def test_of_equal_logits_the_lowest_index_wins() -> None:
    assert sampler(Sampling())(logits(0, 3, 3)) == 1


def test_top_k_keeps_ties_with_the_last() -> None:
    assert top_k(logits(1, 5, 3, 3), 2).tolist() == [1, 2, 3]


def test_top_p_keeps_the_token_that_crosses_the_share() -> None:
    assert top_p(logits(0.2, 0.5, 0.3), 0.6).tolist() == [1, 2]


def test_top_p_keeps_at_least_one_token() -> None:
    assert top_p(logits(0.2, 0.5, 0.3), 0.01).tolist() == [1]


def test_low_temperature_sharpens() -> None:
    _, flat = distribution(logits(1, 2), Sampling(temperature=1.0))
    _, sharp = distribution(logits(1, 2), Sampling(temperature=0.5))
    assert sharp.max() > flat.max()


def test_probabilities_are_those_of_a_softmax() -> None:
    _, probabilities = distribution(np.log(logits(1, 2, 5)), Sampling(temperature=1.0))
    assert probabilities == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_the_penalty_makes_what_was_said_less_likely_on_both_sides_of_zero() -> None:
    assert penalize(logits(4, -4, 4), [0, 1], 2.0).tolist() == [2, -8, 4]


def test_the_penalty_leaves_the_given_logits_alone() -> None:
    given = logits(4, 4)
    penalize(given, [0], 2.0)
    assert given.tolist() == [4, 4]


def test_the_penalty_counts_the_prompt() -> None:
    assert sampler(Sampling(repetition_penalty=2.0), history=[0])(logits(4, 3)) == 1


def test_the_penalty_counts_what_was_sampled() -> None:
    sample = sampler(Sampling(repetition_penalty=2.0))
    assert [sample(logits(4, 3)), sample(logits(4, 3))] == [0, 1]


def test_equal_seeds_draw_equal_tokens() -> None:
    options = Sampling(temperature=1.0, seed=7)
    one, two = sampler(options), sampler(options)
    flat = np.zeros(50, np.float32)
    assert [one(flat) for _ in range(20)] == [two(flat) for _ in range(20)]


def test_different_seeds_draw_different_tokens() -> None:
    one, two = (sampler(Sampling(temperature=1.0, seed=seed)) for seed in (1, 2))
    flat = np.zeros(50, np.float32)
    assert [one(flat) for _ in range(20)] != [two(flat) for _ in range(20)]


def test_draws_follow_the_probabilities() -> None:
    sample = sampler(Sampling(temperature=1.0, seed=3))
    drawn = [sample(np.log(logits(1, 3))) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("options", [Sampling(), Sampling(temperature=1.0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(options: Sampling, bad: float) -> None:
    with pytest.raises(EdgeVLMError, match="the model is damaged or too imprecise"):
        sampler(options)(logits(1, bad, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
