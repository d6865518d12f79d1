"""Medians, percentiles and bootstrap intervals: as much as the number of values allows, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import InputError

P95_NEEDS = 20
P99_NEEDS = 100
INTERVAL_NEEDS = 6  # the whole range of n values covers the median with 1 - 2^(1-n): 94 % for five, 97 % for six
RESAMPLES = 2000
MOST_PICKS = 1_000_000

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What ``n`` values say: the median, its 95 % bootstrap interval and the tails that ``n`` allows.

    ``low`` and ``high`` are None below six values, ``p95`` below 20 and ``p99`` below 100.
    """

    n: int
    median: float
    low: float | None
    high: float | None
    p95: float | None
    p99: float | None
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median of one series over the median of another; ``low`` and ``high`` bound it with 95 %."""

    value: float
    low: float | None
    high: float | None


def summarize(values: Sequence[float], *, seed: int = 0, interval: bool = True) -> Summary:
    """Summary of ``values`` in their own unit; ``interval=False`` where they are not independent.

    Raises InputError for no values, or for one that is not finite.
    """
    ordered = _ordered(values)
    low, high = median_interval(values, seed=seed) if interval else (None, None)
    return Summary(
        n=len(ordered),
        median=float(np.median(ordered)),
        low=low,
        high=high,
        p95=percentile(values, 95) if len(ordered) >= P95_NEEDS else None,
        p99=percentile(values, 99) if len(ordered) >= P99_NEEDS else None,
        min=float(ordered[0]),
        max=float(ordered[-1]),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that ``percent`` of all do not exceed (nearest rank, 1 to 100)."""
    if not 1 <= percent <= 100:
        raise InputError(f"a percentile lies between 1 and 100; found {percent}")
    ordered = _ordered(values)
    rank = -(-len(ordered) * percent // 100)
    return float(ordered[rank - 1])


def median_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float | None, float | None]:
    """The 95 % percentile-bootstrap interval of the median; ``(None, None)`` below six values.

    The same values in any order, with the same seed, give the same interval.
    """
    ordered = _ordered(values)
    if len(ordered) < INTERVAL_NEEDS:
        return None, None
    return _middle_95(_resampled_medians(ordered, np.random.default_rng(seed)))


def ratio_of_medians(values: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Ratio:
    """``median(values) / median(reference)`` with its interval; both series must be positive."""
    above, below = _ordered(values), _ordered(reference)
    if above[0] <= 0 or below[0] <= 0:
        raise InputError("a ratio of medians needs positive values")
    low = high = None
    if min(len(above), len(below)) >= INTERVAL_NEEDS:
        random = np.random.default_rng(seed)
        low, high = _middle_95(_resampled_medians(above, random) / _resampled_medians(below, random))
    return Ratio(value=float(np.median(above) / np.median(below)), low=low, high=high)


def _ordered(values: Sequence[float]) -> Doubles:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.size == 0:
        raise InputError("no values to summarize")
    if not np.isfinite(ordered).all():
        raise InputError("a measured value is not a finite number")
    return ordered


def _resampled_medians(ordered: Doubles, random: np.random.Generator) -> Doubles:
    n = len(ordered)
    at_once = max(1, MOST_PICKS // n)  # bounds the memory of a long run
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    return np.concatenate([np.median(ordered[random.integers(0, n, (size, n))], axis=1) for size in sizes])


def _middle_95(estimates: Doubles) -> tuple[float, float]:
    low, high = np.percentile(estimates, (2.5, 97.5))
    return float(low), float(high)
