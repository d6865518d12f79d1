"""What holds for every weight that is rounded."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.quant.rounding import QuantizedWeight, round_weight
from edgevlm.quant.schemes import DynamicInt8, Scheme, scheme_of

PRECISIONS = (
    "int4-b32",
    "int4-b64-asym",
    "int4-b128",
    "int4-b32-rtn",
    "int4-b128-asym-rtn",
    "int8-b64",
    "int8-dynamic",
)
precisions = st.sampled_from(PRECISIONS)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A few rows of any length, of sizes from 1e-12 to 1e12, some of them zeros, with outliers."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(rows, columns, generator=generator) ** draw(st.sampled_from((1, 3)))
    values[torch.rand(rows, columns, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0.0
    return values * 10.0 ** draw(st.integers(-12, 12))


def scheme(precision: str) -> Scheme:
    found = scheme_of(precision)
    assert found is not None
    return found


@given(weight=weights(), precision=precisions)
@settings(deadline=None)
def test_codes_fit_their_bits_and_values_are_finite(weight: Tensor, precision: str) -> None:
    rounded = round_weight(weight, scheme(precision))
    low, high = (-127, 127) if scheme(precision) == DynamicInt8() else (0, 2**rounded.bits - 1)
    assert low <= int(rounded.codes.min()) <= int(rounded.codes.max()) <= high
    assert bool(torch.isfinite(rounded.dequantize()).all())
    assert bool((rounded.scales != 0).all())


@given(weight=weights(), block=st.sampled_from((32, 64, 128)), asym=st.sampled_from(("", "-asym")))
@settings(deadline=None)
def test_no_group_loses_by_the_search(weight: Tensor, block: int, asym: str) -> None:
    searched, plain = (_group_errors(weight, f"int4-b{block}{asym}{rtn}") for rtn in ("", "-rtn"))
    allowance = 1e-4 * _per_group(weight.double().square(), block)  # plain itself is no candidate of the grid
    assert bool((searched <= 1.02 * plain + allowance).all())


@given(weight=weights(), precision=precisions, seed=st.integers(0, 100))
@settings(deadline=None)
def test_rows_do_not_depend_on_each_other(weight: Tensor, precision: str, seed: int) -> None:
    counts = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    whole = round_weight(weight, scheme(precision), importance=counts)
    rows = [round_weight(row.unsqueeze(0), scheme(precision), importance=counts) for row in weight]
    assert torch.equal(whole.codes, torch.cat([row.codes for row in rows]))
    assert torch.equal(whole.scales, torch.cat([row.scales for row in rows]))


@given(weight=weights())
@settings(deadline=None)
def test_rounding_twice_plainly_is_rounding_once(weight: Tensor) -> None:
    once = round_weight(weight, scheme("int4-b32-rtn"))
    assert torch.equal(round_weight(once.dequantize(), scheme("int4-b32-rtn")).codes, once.codes)


def _group_errors(weight: Tensor, precision: str) -> Tensor:
    rounded: QuantizedWeight = round_weight(weight, scheme(precision))
    return _per_group((rounded.dequantize().double() - weight.double()).square(), rounded.group_size)


def _per_group(values: Tensor, block: int) -> Tensor:
    return torch.cat([chunk.sum(1) for chunk in values.split(block, dim=1)])
