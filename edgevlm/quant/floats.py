"""Floats of 8 and 4 bits: rounding to the nearest, and the scales that bring weights into their range.

E4M3 has 4 bits of exponent and 3 of mantissa, ends at 448 and has no infinity; E2M1 has the magnitudes of ``E2M1``
alone.  A tie goes to the number whose last bit is 0, as everywhere in IEEE 754.

Sources: Micikevicius et al. 2022, arXiv:2209.05433; Open Compute Project, Microscaling Formats (MX) 1.0, section 5.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edgevlm.quant.schemes import Float4
from edgevlm.quant.search import Codes, Fit

E4M3 = torch.float8_e4m3fn
E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9  # of the positive ones
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by their codes; 8 and above are the same below zero
E2M1_LARGEST, E2M1_SIGN = E2M1[-1], 8
HALF_SMALLEST, HALF_NORMAL, HALF_LARGEST = 2.0**-24, 2.0**-14, 65504.0  # of float16's positive numbers

# The largest weight of a block over 6, times these, are the scales tried: at 1 it becomes 6, at 1.5 it becomes 4.
FACTORS = (1.0, 0.72, 0.78, 0.84, 0.9, 0.95, 1.07, 1.14, 1.22, 1.31, 1.4, 1.5, 1.6, 1.75, 2.0)


def to_e4m3(values: Tensor) -> Tensor:
    """The nearest E4M3 numbers, dtype float8_e4m3fn; what is larger than 448 becomes 448."""
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(E4M3)


def nearest_e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 numbers, as floats; what is larger than 6 becomes 6."""
    magnitudes = values.abs().clamp(max=E2M1_LARGEST)
    steps = torch.where(magnitudes < 2, 0.5, torch.where(magnitudes < 4, 1.0, 2.0))
    return torch.copysign((magnitudes / steps).round() * steps, values)


def e2m1_codes(numbers: Tensor) -> Tensor:
    """Codes (uint8) of numbers that are E2M1's own."""
    codes = torch.searchsorted(torch.tensor(E2M1), numbers.abs().contiguous()).to(torch.uint8)
    return codes + E2M1_SIGN * torch.signbit(numbers).to(torch.uint8)


def e2m1_numbers(codes: Tensor) -> Tensor:
    """What codes (uint8) stand for, float32."""
    magnitudes = torch.tensor(E2M1)
    return torch.cat((magnitudes, -magnitudes))[codes.long()]


def half_scales(scales: Tensor) -> Tensor:
    """Positive float32 scales, each the smallest that is no smaller and that float16 holds.

    Upwards, so that the largest weight still fits where float16 has few bits left.
    """
    wide = scales.clamp(HALF_SMALLEST, HALF_LARGEST)
    near = wide.half()
    above = (near.view(torch.int16) + (near.float() < wide).to(torch.int16)).view(torch.float16)
    return above.float()


def power_of_two(least: float) -> float:
    """The smallest power of two that is at least ``least`` and a normal number of float16.

    Codes that are floats lose nothing by such a scale, the values they stand for are exact in float16, and there is
    room above for values that calibration has not seen.
    """
    return 2.0 ** max(-14, math.ceil(math.log2(least))) if least > 0 else HALF_NORMAL


def powers_of_two(least: Tensor) -> Tensor:
    """``power_of_two`` of every number."""
    return torch.tensor([power_of_two(number) for number in least.flatten().tolist()]).view(least.shape)


def global_scale(largest: float) -> float:
    """The ``Float4.global_scale`` with which weights up to ``largest`` find a scale."""
    return power_of_two(largest / (E2M1_LARGEST * E4M3_LARGEST))


@dataclass(frozen=True, kw_only=True, eq=False)
class Float4Fit(Fit):
    """Scales of blocks whose codes are E2M1 numbers, kept as floats."""

    def codes(self, groups: Tensor, codes: Codes) -> Tensor:
        """The nearest numbers; ``codes`` says nothing here."""
        return nearest_e2m1(groups / self.scales.unsqueeze(-1))


def fit_float4(groups: Tensor, counts: Tensor | None, scheme: Float4) -> Float4Fit:
    """Scales [n, G] of ``groups`` [n, G, 16]: plain, or those of the least error where ``scheme`` searches.

    ``counts`` [G, 16] weigh the inputs.
    """
    plain = groups.abs().amax(-1) / E2M1_LARGEST
    scales = _block_scales(plain, scheme)
    if not scheme.search:
        return Float4Fit(scales=scales)
    least = _errors(groups, counts, scales)
    for factor in FACTORS[1:]:
        tried = _block_scales(plain * factor, scheme)
        errors = _errors(groups, counts, tried)
        scales, least = torch.where(errors < least, tried, scales), torch.minimum(errors, least)
    return Float4Fit(scales=scales)


def _block_scales(wanted: Tensor, scheme: Float4) -> Tensor:
    """The nearest scales that a block can have; never 0."""
    return to_e4m3((wanted / scheme.global_scale).clamp(min=E4M3_SMALLEST)).float() * scheme.global_scale


def _errors(groups: Tensor, counts: Tensor | None, scales: Tensor) -> Tensor:
    wide = scales.unsqueeze(-1)
    errors = (nearest_e2m1(groups / wide) * wide - groups).square_()
    return (errors if counts is None else errors.mul_(counts)).sum(-1)
