"""Rounding by second moments: what the outputs lose, not the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgevlm.core.errors import ConfigError
from edgevlm.quant.calibration import SecondMoments
from edgevlm.quant.compensation import DAMPING, factored, num_spans
from edgevlm.quant.rounding import QuantizedWeight, round_weight
from edgevlm.quant.schemes import Scheme, scheme_of

NUM_INPUTS = 192


def scheme(precision: str) -> Scheme:
    found = scheme_of(precision)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Rows [2000, 192] that live near 24 directions, as activations do."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, NUM_INPUTS, generator=generator)
    noise = 0.3 * torch.randn(2000, NUM_INPUTS, generator=generator)
    return torch.randn(2000, 24, generator=generator) @ directions / 5 + noise


@pytest.fixture(scope="module")
def moments(inputs: Tensor) -> Tensor:
    num, width = num_spans(NUM_INPUTS)
    filled = torch.zeros(num, width, width)
    filled[0, :NUM_INPUTS, :NUM_INPUTS] = inputs.T @ inputs / len(inputs)
    return filled


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(40, NUM_INPUTS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", ["int4-b32", "int4-b64-asym", "int4-b128"])
def test_outputs_lose_a_third_less_than_by_the_squares_alone(
    precision: str, inputs: Tensor, moments: Tensor, weight: Tensor
) -> None:
    squares = moments[0].diagonal()[:NUM_INPUTS]
    by_squares = round_weight(weight, scheme(precision), importance=squares)
    by_moments = round_weight(weight, scheme(precision), importance=moments)
    assert _lost(by_moments, weight, inputs) < 0.67 * _lost(by_squares, weight, inputs)


def test_inputs_that_never_come_together_leave_nothing_to_make_up_for(weight: Tensor, moments: Tensor) -> None:
    alone = torch.diag_embed(torch.ones_like(moments.diagonal(dim1=1, dim2=2)))
    ones = torch.ones(NUM_INPUTS)
    found, expected = (round_weight(weight, scheme("int4-b64"), importance=each) for each in (alone, ones))
    torch.testing.assert_close(found.scales, expected.scales)
    assert int((found.codes != expected.codes).sum()) <= 2  # halves may round either way


def test_rows_do_not_depend_on_each_other(weight: Tensor, moments: Tensor) -> None:
    whole = round_weight(weight, scheme("int4-b32-asym"), importance=moments)
    half = round_weight(weight[:7], scheme("int4-b32-asym"), importance=moments)
    assert whole.zero_points is not None
    assert half.zero_points is not None
    assert torch.equal(whole.codes[:7], half.codes)
    assert torch.equal(whole.zero_points[:7], half.zero_points)


def test_layers_wider_than_a_span_are_rounded_span_by_span() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, weight = torch.randn(3000, 1100, generator=generator), torch.randn(3, 1100, generator=generator)
    rows[:, 1024:] += rows[:, :1] * 2
    moments = _moments(rows)
    assert moments.shape == (2, 1024, 1024)
    whole = round_weight(weight, scheme("int4-b128"), importance=moments)
    second = round_weight(weight[:, 1024:], scheme("int4-b128"), importance=moments[1:, :128, :128])
    assert whole.scales.shape == (3, 9)
    assert torch.equal(whole.codes[:, 1024:], second.codes)


def test_eight_bits_take_the_squares_alone(weight: Tensor, moments: Tensor) -> None:
    squares = moments[0].diagonal()[:NUM_INPUTS]
    by_both = [round_weight(weight, scheme("int8-b32"), importance=each).codes for each in (moments, squares)]
    assert torch.equal(*by_both)


def test_dynamic_eight_bits_are_the_same_beside_a_precision_that_is_calibrated(weight: Tensor, moments: Tensor) -> None:
    alone, beside = (round_weight(weight, scheme("int8-dynamic"), importance=each) for each in (None, moments))
    assert torch.equal(alone.codes, beside.codes)
    assert torch.equal(alone.scales, beside.scales)


def test_factor_inverts_the_damped_moments() -> None:
    moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    upper = factored(moment)
    assert upper[1, 0] == 0
    inverse = torch.linalg.inv(moment / 2 + DAMPING * torch.eye(2))
    torch.testing.assert_close(upper.T @ upper, inverse)


def test_inputs_that_were_always_zero_do_no_harm(weight: Tensor, moments: Tensor) -> None:
    dead = moments.clone()
    dead[:, 64:] = dead[:, :, 64:] = 0
    rounded = round_weight(weight, scheme("int4-b32"), importance=dead).dequantize()
    assert float((rounded[:, 64:] - weight[:, 64:]).square().mean()) < 0.01
    nothing = round_weight(weight, scheme("int4-b32"), importance=torch.zeros_like(moments)).dequantize()
    assert float((nothing - weight).square().mean()) < 0.01


def test_moments_of_another_width_are_refused(moments: Tensor) -> None:
    with pytest.raises(ConfigError, match="second moments"):
        round_weight(torch.ones(2, 1100), scheme("int4"), importance=moments)


def _moments(rows: Tensor) -> Tensor:
    seen = SecondMoments(rows.shape[1])
    seen.add(rows)
    return seen.mean()


def _lost(rounded: QuantizedWeight, weight: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (rounded.dequantize() - weight).T).square().mean())
