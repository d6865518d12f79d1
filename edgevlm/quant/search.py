"""The range of codes that a group of weights is rounded into: plain, or the one that causes the least error.

A group's weights x become whole numbers q = round(x · inverse), cut off at the ends of the codes.  For given q the best
scale is that of least squares, Σ w x q / Σ w q², and the error that it leaves is Σ w x² minus the *gain*
(Σ w x q)² / Σ w q².  So a candidate needs two sums, and the one with the largest gain wins; afterwards scale and codes
are improved in turns, which can only lower the error.  w is 1, or says how much an error of that input counts.

The idea of a grid followed by least squares is that of llama.cpp's ``make_qx_quants`` (Kawrakow 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Bound: TypeAlias = Tensor | float
Candidate: TypeAlias = tuple[Tensor, Tensor | None]  # inverse scales and zero points [n, G, 1]

SMALLEST = 1e-30  # a group whose largest weight is below counts as zeros: its inverse scale would overflow
NUM_TURNS = 2  # improving codes and scale in turns; a third changes the error by less than 0.1 %
ZERO_SHIFTS = (-1, 0, 1)  # zero points around the one that the middle of the range asks for

# How much larger than plain the inverse scale may be; above 1 the largest weights are cut off.  Twelve steps come
# within 0.3 % of the error that sixty find.  Eight bits gain nothing from cutting much.
FACTORS = {4: tuple(0.85 + 0.05 * step for step in range(14)), 8: tuple(0.98 + 0.01 * step for step in range(8))}


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The whole numbers from ``low`` to ``high`` that a group is rounded to."""

    low: int
    high: int

    @property
    def factors(self) -> Sequence[float]:
        """Inverse scales worth trying, as multiples of the plain one."""
        return FACTORS[4 if self.high < 16 else 8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """Scales [n, G] and zero points [n, G] (None: zero) of groups [n, G, group_size]."""

    scales: Tensor
    zero_points: Tensor | None = None

    def codes(self, groups: Tensor, codes: Codes) -> Tensor:
        """The nearest codes, as whole floats of the groups' shape."""
        zero = None if self.zero_points is None else self.zero_points.unsqueeze(-1)
        rounded = _rounded(groups / self.scales.unsqueeze(-1), zero, codes)
        return rounded if zero is None else rounded + zero

    def values(self, codes: Tensor) -> Tensor:
        """What codes [n, G] stand for, one of each group."""
        return (codes if self.zero_points is None else codes - self.zero_points) * self.scales


def plain_symmetric(groups: Tensor, codes: Codes) -> Fit:
    """The largest weight becomes the largest code: -8 of 4 bits, as in llama.cpp's Q4_0, but ±127 of 8 bits."""
    extreme = _extreme(groups)[..., 0]
    scales = extreme / codes.low if codes.high < 16 else extreme.abs() / codes.high
    return Fit(scales=_or_one(scales))


def plain_positive(groups: Tensor, codes: Codes) -> Fit:
    """The smallest positive scale that cuts nothing off."""
    low, high = _ends(groups)
    return Fit(scales=_or_one(torch.maximum(high / codes.high, low / codes.low))[..., 0])


def plain_affine(groups: Tensor, codes: Codes) -> Fit:
    """The smallest weight or 0 becomes the lowest code, the largest weight or 0 the highest."""
    low, high = _ends(groups)
    scales = _or_one((high - low) / codes.high)
    return Fit(scales=scales[..., 0], zero_points=(-low / scales).round().clamp(codes.low, codes.high)[..., 0])


def best_symmetric(groups: Tensor, counts: Tensor | None, codes: Codes) -> Fit:
    """The scale, of either sign, with the least error; ``counts`` [G, group_size] weigh the inputs."""
    return _best(groups, counts, codes, _symmetric_candidates(groups, codes))


def best_positive(groups: Tensor, counts: Tensor | None, codes: Codes) -> Fit:
    """The positive scale with the least error; ``counts`` [G, group_size] weigh the inputs."""
    return _best(groups, counts, codes, _positive_candidates(groups, codes))


def best_affine(groups: Tensor, counts: Tensor | None, codes: Codes) -> Fit:
    """The scale and whole zero point with the least error; ``counts`` [G, group_size] weigh the inputs."""
    return _best(groups, counts, codes, _affine_candidates(groups, codes))


def _symmetric_candidates(groups: Tensor, codes: Codes) -> Iterator[Candidate]:
    """The largest weight at either end: one end is a step further from 0 than the other."""
    extreme = _or_one(_extreme(groups))
    ends = (codes.low, codes.high) if codes.low + codes.high else (codes.high,)
    for end in ends:
        for factor in codes.factors:
            yield end * factor / extreme, None


def _positive_candidates(groups: Tensor, codes: Codes) -> Iterator[Candidate]:
    """What ``plain_positive`` says, times the factors."""
    plain = plain_positive(groups, codes).scales.unsqueeze(-1)
    for factor in codes.factors:
        yield factor / plain, None


def _affine_candidates(groups: Tensor, codes: Codes) -> Iterator[Candidate]:
    """Shorter and longer ranges around the middle of the group's own, and shifted by one code."""
    low, high = _ends(groups)
    plain, middle = codes.high / _or_one(high - low), (high + low) / 2
    for factor in codes.factors:
        inverse = plain * factor
        zero = codes.high / 2 - inverse * middle
        for shift in ZERO_SHIFTS:
            yield inverse, (zero + shift).round_().clamp_(codes.low, codes.high)


def _best(groups: Tensor, counts: Tensor | None, codes: Codes, candidates: Iterator[Candidate]) -> Fit:
    """The candidate with the largest gain, then improved."""
    weighted = groups if counts is None else groups * counts
    gains, scales, zeros = groups.new_full(groups.shape[:2], -1.0), groups.new_ones(groups.shape[:2]), None
    for inverse, zero in candidates:
        cross, square = _sums(_rounded(groups * inverse, zero, codes), weighted, counts)
        better = cross.square() / square > gains  # not so for a group of zeros, where it is NaN
        gains = torch.where(better, cross.square() / square, gains)
        scales = torch.where(better, cross / square, scales)
        if zero is not None:
            zeros = zero[..., 0] if zeros is None else torch.where(better, zero[..., 0], zeros)
    return _improved(groups, weighted, counts, codes, Fit(scales=_or_one(scales), zero_points=zeros))


def _improved(groups: Tensor, weighted: Tensor, counts: Tensor | None, codes: Codes, fit: Fit) -> Fit:
    """Nearest codes for the scale and the best scale for those codes, in turns; the zero points stay."""
    zero = None if fit.zero_points is None else fit.zero_points.unsqueeze(-1)
    scales = fit.scales
    for _ in range(NUM_TURNS):
        cross, square = _sums(_rounded(groups / scales.unsqueeze(-1), zero, codes), weighted, counts)
        scales = _or_one(torch.where(square > 0, cross / square, scales))
    return Fit(scales=scales, zero_points=fit.zero_points)


def _rounded(scaled: Tensor, zero: Tensor | None, codes: Codes) -> Tensor:
    """``scaled`` rounded in place to code - zero."""
    if zero is None:
        return scaled.round_().clamp_(codes.low, codes.high)
    return scaled.round_().clamp_(codes.low - zero, codes.high - zero)


def _sums(rounded: Tensor, weighted: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ w x q and Σ w q² of every group."""
    cross = (rounded * weighted).sum(-1)
    square = rounded.square() if counts is None else rounded.square_().mul_(counts)
    return cross, square.sum(-1)


def _extreme(groups: Tensor) -> Tensor:
    """The weight furthest from 0 of every group, with its sign: [n, G, 1]."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def _ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of a group's weights and 0: twice [n, G, 1]."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)


def _or_one(scales: Tensor) -> Tensor:
    """1 in place of what nothing can be divided by."""
    return torch.where(scales.abs() < SMALLEST, torch.ones_like(scales), scales)
