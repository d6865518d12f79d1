"""What holds for every series of measured values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.bench.stats import percentile, ratio_of_medians, summarize

times = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40)
long_series = st.lists(st.floats(1e-3, 1e6), min_size=6, max_size=40)
few = settings(max_examples=40, deadline=None)


@few
@given(long_series)
def test_the_interval_holds_the_median_and_lies_within_the_values(values: list[float]) -> None:
    one = summarize(values)
    assert one.low is not None
    assert one.high is not None
    assert one.min <= one.low <= one.median <= one.high <= one.max


@few
@given(times, st.randoms())
def test_the_order_of_the_values_does_not_matter(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert summarize(shuffled) == summarize(values)


@few
@given(times, st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    below_or_equal = sum(value <= found for value in values)
    below = sum(value < found for value in values)
    assert found in values
    assert below_or_equal * 100 >= percent * len(values) > below * 100


@few
@given(times)
def test_tails_appear_with_enough_values_only(values: list[float]) -> None:
    one = summarize(values)
    assert (one.low is None) == (len(values) < 6)
    assert (one.p95 is None) == (len(values) < 20)
    assert one.p99 is None


@few
@given(long_series, long_series)
def test_swapping_two_series_inverts_their_ratio(a: list[float], b: list[float]) -> None:
    assert math.isclose(ratio_of_medians(a, b).value * ratio_of_medians(b, a).value, 1.0)


@few
@given(long_series, st.floats(0.1, 10))
def test_a_change_of_unit_scales_the_summary(values: list[float], factor: float) -> None:
    one, scaled = summarize(values), summarize([value * factor for value in values])
    assert scaled.median == pytest.approx(one.median * factor)
    assert scaled.low == pytest.approx((one.low or 0) * factor)


@few
@given(long_series)
def test_a_series_compared_with_itself_shows_no_difference(values: list[float]) -> None:
    ratio = ratio_of_medians(values, values)
    assert ratio.value == 1
    assert (ratio.low or 0) <= 1 <= (ratio.high or 0)
