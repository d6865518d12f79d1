"""Medians, percentiles and intervals on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from edgevlm.bench.stats import percentile, ratio_of_medians, summarize
from edgevlm.core.errors import InputError


def test_percentiles_are_nearest_rank() -> None:
    values = [float(i) for i in range(1, 21)]
    assert [percentile(values, p) for p in (1, 50, 95, 96, 100)] == [1, 10, 19, 20, 20]


def test_a_single_value_has_a_median_and_nothing_else() -> None:
    one = summarize([4.0])
    assert (one.n, one.median, one.low, one.high, one.p95, one.p99) == (1, 4.0, None, None, None, None)


def test_equal_values_give_an_interval_of_no_width() -> None:
    one = summarize([3.0] * 100)
    assert (one.low, one.high, one.p95, one.p99) == (3.0, 3.0, 3.0, 3.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [float(i % 7) for i in range(30)]
    assert summarize(values, seed=3) == summarize(values, seed=3)


def test_a_long_series_is_resampled_in_pieces() -> None:
    one = summarize([float(i) for i in range(2001)])  # 2000 resamples of these are more than a million picks
    assert one.median == 1000
    assert one.low is not None
    assert 900 < one.low < 1000


def test_gaps_that_depend_on_each_other_get_no_interval() -> None:
    assert summarize([1.0] * 50, interval=False).low is None


def test_a_ratio_needs_six_values_on_both_sides_for_an_interval() -> None:
    assert ratio_of_medians([2.0] * 20, [1.0] * 5).low is None
    assert ratio_of_medians([2.0] * 20, [1.0] * 6).low == 2.0


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_that_mean_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(InputError):
        summarize(values)


def test_a_ratio_with_zero_is_refused() -> None:
    with pytest.raises(InputError, match="positive"):
        ratio_of_medians([1.0], [0.0])
