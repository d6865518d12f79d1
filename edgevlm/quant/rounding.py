"""A weight matrix in few bits: codes, and per group of inputs a scale and perhaps a zero point.

Plain rounding takes a group's largest weight as the edge of its range; ``edgevlm.quant.search`` looks for the range
with the least error.  Rows never depend on each other, so matrices may be joined row by row after rounding as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from edgevlm.core.errors import ConfigError
from edgevlm.quant.compensation import FactoredSpan, compensated, factored_spans, num_spans
from edgevlm.quant.floats import (
    E4M3,
    E4M3_LARGEST,
    e2m1_codes,
    e2m1_numbers,
    fit_float4,
    half_scales,
    powers_of_two,
    to_e4m3,
)
from edgevlm.quant.schemes import DynamicInt8, Float4, Scheme, Static, WeightOnly, head_scheme
from edgevlm.quant.search import (
    Codes,
    Fit,
    best_affine,
    best_positive,
    best_symmetric,
    plain_affine,
    plain_positive,
    plain_symmetric,
)

CHUNK_ELEMENTS = 2**18  # weights at work at a time: 1 MiB a copy, which stays in a core's cache
COMPENSATED_ELEMENTS = 2**22  # more where columns come one by one
LEAST_IMPORTANCE = 1e-3  # of the mean: inputs that calibration never saw alive still count a little


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] as codes [N, K] with G = ceil(K / group_size) scales per row; the last group may be short.

    ``zero_points`` None with uint8 codes: a code c stands for (c - 2^(bits-1)) · scale.  With zero points (uint8) it
    stands for (c - zero_point) · scale.  int8 and float8 codes stand for c · scale.  With a ``global_scale`` (uint8) a
    code is that of an E2M1 number, times the scale, which is an E4M3 number times the ``global_scale``.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int
    global_scale: float | None = None

    @property
    def num_bytes(self) -> int:
        """What codes, scales and zero points take when packed, short groups filled up."""
        N, G = self.scales.shape
        codes = N * G * self.group_size * self.bits // 8
        packed_points = 0 if self.zero_points is None else N * -(-G * self.bits // 8)
        return codes + (4 if self.global_scale is None else 1) * N * G + packed_points

    def dequantize(self) -> Tensor:
        """The weight [N, K] that the codes stand for, float32."""
        K = self.codes.shape[1]
        if self.global_scale is not None:
            return e2m1_numbers(self.codes) * self._per_input(self.scales, K)
        if self.zero_points is not None:
            zero = self._per_input(self.zero_points.float(), K)
        else:
            zero = torch.tensor(0.0 if self.codes.dtype in (torch.int8, E4M3) else 2.0 ** (self.bits - 1))
        return (self.codes.float() - zero) * self._per_input(self.scales, K)

    def _per_input(self, per_group: Tensor, num_inputs: int) -> Tensor:
        return per_group.repeat_interleave(self.group_size, dim=1)[:, :num_inputs]


def round_weight(
    weight: Tensor, scheme: Scheme, *, head: bool = False, importance: Tensor | None = None
) -> QuantizedWeight:
    """``weight`` [N, K] by ``scheme``, or as ``scheme`` rounds the output ``head``.

    ``importance`` is the mean square of each input [K], or their second moments in spans [P, S, S], as ``calibration``
    gives them.  The first says how much an error of that input's weights counts; by the second, 4-bit schemes also
    make up for errors.  Schemes of whole channels and those that do not search ignore it.  Raises ConfigError for
    weights that are not finite and an importance of another shape or with negative squares.
    """
    if head:
        scheme = head_scheme(scheme)
    counts = _checked(importance, weight)
    factors = None if counts is None or not makes_up(scheme, counts) else factored_spans(counts, weight.shape[1])
    rows = max(1, (CHUNK_ELEMENTS if factors is None else COMPENSATED_ELEMENTS) // weight.shape[1])
    pieces = [_round_rows(chunk.detach().float(), scheme, counts, factors) for chunk in weight.split(rows)]
    points = [piece.zero_points for piece in pieces if piece.zero_points is not None]
    return QuantizedWeight(
        codes=torch.cat([piece.codes for piece in pieces]),
        scales=torch.cat([piece.scales for piece in pieces]),
        zero_points=torch.cat(points) if points else None,
        bits=pieces[0].bits,
        group_size=pieces[0].group_size,
        global_scale=pieces[0].global_scale,
    )


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Σ(rounded - weight)² / Σ weight², 0 for a weight of zeros."""
    wide = weight.detach().double()
    power = float(wide.square().sum())
    return float((quantized.dequantize().double() - wide).square().sum()) / power if power else 0.0


def _checked(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    """``importance`` with a mean of 1, and nothing that counts for nothing."""
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(
            "a weight is NaN or infinite and cannot be rounded: the checkpoint is damaged, fetch it again"
        )
    if importance is None:
        return None
    K = weight.shape[1]
    counts = counted(importance, K)
    if counts is None or not bool(torch.isfinite(importance).all()) or bool((counts < 0).any()):
        raise ConfigError(
            f"importance must be {K} finite numbers of at least 0, one per input of the weight, or the second moments "
            f"of those inputs; found shape {tuple(importance.shape)}: calibrate with this model"
        )
    mean = counts.double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    scaled = (importance.detach().double() / mean).float()
    return scaled.clamp(min=LEAST_IMPORTANCE) if scaled.dim() == 1 else scaled


def counted(importance: Tensor, num_inputs: int) -> Tensor | None:
    """Mean squares (K) in an importance of either form; None for one that belongs to another number of inputs."""
    if importance.shape == (num_inputs,):
        return importance
    num, width = num_spans(num_inputs)
    if importance.shape != (num, width, width):
        return None
    return importance.diagonal(dim1=1, dim2=2).flatten()[:num_inputs]


def _round_rows(
    rows: Tensor, scheme: Scheme, importance: Tensor | None, factors: Sequence[FactoredSpan] | None
) -> QuantizedWeight:
    """Some rows [n, K] of a weight; ``factors`` are those of the ``importance`` where errors are made up for."""
    if isinstance(scheme, Static) and scheme.format == "fp8":
        return _per_channel_fp8(rows)
    if isinstance(scheme, (DynamicInt8, Static)):
        return _per_channel(rows, scheme)
    counts = None if importance is None else counted(importance, rows.shape[1])
    if counts is not None:
        counts = counts.clamp(min=LEAST_IMPORTANCE)
    span = _codes(scheme)
    if factors is not None:
        codes, fit = compensated(rows, factors, scheme.group_size, span, partial(_fit, scheme, span))
    else:
        groups = _grouped(rows, scheme.group_size)
        per_input = None if counts is None else _grouped(counts.unsqueeze(0), scheme.group_size)[0]
        fit = _fit(scheme, span, groups, per_input)
        codes = fit.codes(groups, span).flatten(1)[:, : rows.shape[1]]
    if isinstance(scheme, Float4):
        return _float4(codes, fit, scheme)
    return QuantizedWeight(
        codes=(codes - span.low).to(torch.uint8),
        scales=fit.scales,
        zero_points=None if fit.zero_points is None else fit.zero_points.to(torch.uint8),
        bits=scheme.bits,
        group_size=scheme.group_size,
    )


def makes_up(scheme: Scheme, importance: Tensor) -> bool:
    """Whether later inputs make up for earlier ones: with 4 bits; with 8 there is nothing left to gain."""
    if isinstance(scheme, (DynamicInt8, Static)) or importance.dim() != 3:
        return False
    return scheme.search and (isinstance(scheme, Float4) or scheme.bits == 4)


def _codes(scheme: WeightOnly | Float4) -> Codes:
    """Around 0 for symmetric schemes; from 0 where a zero point says which code stands for 0."""
    if isinstance(scheme, Float4):
        return Codes(low=-6, high=6)  # the ends of what floats are rounded to
    if scheme.symmetric:
        return Codes(low=-(2 ** (scheme.bits - 1)), high=2 ** (scheme.bits - 1) - 1)
    return Codes(low=0, high=2**scheme.bits - 1)


def _fit(scheme: WeightOnly | Float4, span: Codes, groups: Tensor, counts: Tensor | None) -> Fit:
    if isinstance(scheme, Float4):
        return fit_float4(groups, counts, scheme)
    if scheme.half_scales:
        fit = best_positive(groups, counts, span) if scheme.search else plain_positive(groups, span)
        return Fit(scales=half_scales(fit.scales))
    if scheme.symmetric:
        return best_symmetric(groups, counts, span) if scheme.search else plain_symmetric(groups, span)
    return best_affine(groups, counts, span) if scheme.search else plain_affine(groups, span)


def _float4(numbers: Tensor, fit: Fit, scheme: Float4) -> QuantizedWeight:
    return QuantizedWeight(
        codes=e2m1_codes(numbers),
        scales=fit.scales,
        zero_points=None,
        bits=4,
        group_size=scheme.group_size,
        global_scale=scheme.global_scale,
    )


def _per_channel_fp8(rows: Tensor) -> QuantizedWeight:
    """One power of two per row, E4M3 codes."""
    scales = powers_of_two(rows.abs().amax(1, keepdim=True) / E4M3_LARGEST)
    return QuantizedWeight(
        codes=to_e4m3(rows / scales), scales=scales, zero_points=None, bits=8, group_size=rows.shape[1]
    )


def _per_channel(rows: Tensor, scheme: DynamicInt8 | Static) -> QuantizedWeight:
    """One scale per row; int8 codes from -127 to 127, the range that has no rest when a sign is turned.

    Every input counts the same, so that codes do not depend on whether another precision beside them is calibrated.
    Static scales follow from the largest weight: a graph may hold the row in another order, or with zeros in it.
    """
    span, groups = Codes(low=-127, high=127), rows.unsqueeze(1)
    if isinstance(scheme, Static):
        fit = Fit(scales=half_scales(plain_symmetric(groups, span).scales))
    else:
        fit = best_symmetric(groups, None, span)
    codes = fit.codes(groups, span)[:, 0].to(torch.int8)
    return QuantizedWeight(codes=codes, scales=fit.scales, zero_points=None, bits=8, group_size=rows.shape[1])


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    """[n, K] to [n, G, group_size], the last group filled up with zeros."""
    padded: Tensor = F.pad(rows, (0, -rows.shape[1] % group_size))
    return padded.view(len(rows), -1, group_size)
