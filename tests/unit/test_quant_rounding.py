"""Weights become codes and scales; numbers small enough to check by hand, and how far searching gets below rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgevlm.core.errors import ConfigError
from edgevlm.models.checkpoint import load_model
from edgevlm.quant.rounding import QuantizedWeight, relative_error, round_weight
from edgevlm.quant.schemes import DynamicInt8, Scheme, WeightOnly, scheme_of

NUM = 2**17  # weights per sample: the ratio of two errors then varies by less than 0.5 %

# What searching must reach of plain rounding's squared error.  One range per group can do no more for heavy tails with
# a zero point: 40 scales by 9 zero points find 0.928 where the search finds 0.929.
MOST_SYMMETRIC, MOST_ASYMMETRIC, MOST_ASYMMETRIC_HEAVY = 0.92, 0.92, 0.94


def scheme(precision: str) -> Scheme:
    found = scheme_of(precision)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def samples() -> dict[str, Tensor]:
    """Weights [rows, 512] of three shapes, and the shipped model's own."""
    torch.manual_seed(0)
    decoder = load_model("nano").model.decoder
    real = torch.cat([layer.weight.detach().flatten() for layer in decoder.modules() if isinstance(layer, nn.Linear)])
    flat = {
        "gaussian": torch.randn(NUM),
        "laplace": torch.distributions.Laplace(torch.zeros(()), torch.ones(())).sample((NUM,)),
        "student": torch.distributions.StudentT(torch.full((), 5.0)).sample((NUM,)),
        "nano": real[: len(real) // 512 * 512],
    }
    return {name: values.view(-1, 512) for name, values in flat.items()}


def test_plain_rounding_puts_the_largest_weight_at_minus_8() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([-4.0, 2.0, 0.9])
    rounded = round_weight(weight, scheme("int4-b32-rtn"))
    assert rounded.scales.tolist() == [[0.5]]
    assert rounded.codes[0, :5].tolist() == [0, 12, 10, 8, 8]  # -8, 4, 2 and 0 above the middle, 8
    assert rounded.dequantize()[0, :4].tolist() == [-4.0, 2.0, 1.0, 0.0]


def test_plain_rounding_with_a_zero_point_uses_the_whole_range() -> None:
    weight = torch.linspace(-0.5, 1.0, 16).repeat(1, 2)  # steps of 0.1
    rounded = round_weight(weight, scheme("int4-b32-asym-rtn"))
    assert rounded.zero_points is not None
    assert rounded.zero_points.tolist() == [[5]]
    assert rounded.codes[0].tolist() == [*range(16), *range(16)]
    torch.testing.assert_close(rounded.dequantize(), weight)


def test_dynamic_int8_has_one_scale_per_row_and_codes_up_to_127() -> None:
    weight = torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0]])
    rounded = round_weight(weight, DynamicInt8())
    assert rounded.codes.dtype == torch.int8
    assert rounded.scales.shape == (2, 1)
    assert rounded.codes[0].abs().tolist() == [127, 64, 0]
    torch.testing.assert_close(rounded.dequantize(), weight)


@pytest.mark.parametrize("precision", ["int4-b32", "int4-b32-asym", "int4-b128-rtn", "int8-b64"])
def test_last_group_may_be_short(precision: str) -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    rounded = round_weight(weight, scheme(precision))
    num_groups = -(-200 // rounded.group_size)
    assert rounded.codes.shape == (5, 200)
    assert rounded.scales.shape == (5, num_groups)
    assert relative_error(weight, rounded) < 0.02
    packed_points = 0 if rounded.zero_points is None else 5 * -(-num_groups // 2)
    assert rounded.num_bytes == 5 * num_groups * (rounded.group_size * rounded.bits // 8 + 4) + packed_points


@pytest.mark.parametrize("precision", ["int4", "int4-asym", "int4-rtn", "int4-asym-rtn", "int8", "int8-dynamic"])
def test_zeros_stay_zeros(precision: str) -> None:
    weight = torch.zeros(2, 256)
    weight[1, :64] = torch.linspace(0.5, 1.0, 64)  # far from 0 on one side, beside zeros
    values = round_weight(weight, scheme(precision)).dequantize()
    assert values[0].abs().max() == 0
    assert values[1, 64:].abs().max() == 0


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "student", "nano"])
def test_search_is_8_percent_below_plain_rounding(samples: dict[str, Tensor], name: str, block: int) -> None:
    assert _ratio(samples[name], f"int4-b{block}") < MOST_SYMMETRIC


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "student", "nano"])
def test_search_with_zero_points_is_below_plain_rounding(samples: dict[str, Tensor], name: str, block: int) -> None:
    heavy = name in ("laplace", "student")
    assert _ratio(samples[name], f"int4-b{block}-asym") < (MOST_ASYMMETRIC_HEAVY if heavy else MOST_ASYMMETRIC)


def test_eight_bits_are_searched_too(samples: dict[str, Tensor]) -> None:
    plain = round_weight(samples["gaussian"], WeightOnly(bits=8, group_size=32, search=False))
    searched = round_weight(samples["gaussian"], scheme("int8-b32"))
    assert relative_error(samples["gaussian"], searched) < 0.97 * relative_error(samples["gaussian"], plain)


@pytest.mark.parametrize("precision", ["int4-b32", "int4-b128", "int4-b128-asym"])
def test_important_inputs_lose_less(samples: dict[str, Tensor], precision: str) -> None:
    weight, important = samples["gaussian"], torch.arange(512) % 8 == 0
    counts = torch.where(important, 100.0, 1.0)
    plain, weighted = (round_weight(weight, scheme(precision), importance=i).dequantize() for i in (None, counts))
    before, after = (((values - weight).square() * counts).mean() for values in (plain, weighted))
    assert after < 0.85 * before


def test_scale_of_importance_means_nothing_and_zero_means_almost_nothing(samples: dict[str, Tensor]) -> None:
    weight = samples["gaussian"][:8]
    counts = torch.rand(512, generator=torch.Generator().manual_seed(0))
    few, many = (round_weight(weight, scheme("int4"), importance=counts * factor) for factor in (1.0, 1024.0))
    assert torch.equal(few.codes, many.codes)
    dead = round_weight(weight, scheme("int4"), importance=torch.zeros(512))
    assert torch.equal(dead.codes, round_weight(weight, scheme("int4")).codes)


def test_head_is_rounded_as_the_scheme_says_of_the_head() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    assert round_weight(weight, scheme("int4-head8"), head=True).bits == 8
    assert round_weight(weight, scheme("int4-head8")).bits == 4


def test_half_precision_weights_are_rounded_as_their_float32_values() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).half()
    half, single = round_weight(weight, scheme("int4")), round_weight(weight.float(), scheme("int4"))
    assert torch.equal(half.codes, single.codes)
    assert half.scales.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = value
    with pytest.raises(ConfigError, match="NaN or infinite"):
        round_weight(weight, scheme("int4"))


@pytest.mark.parametrize("counts", [torch.ones(63), torch.full((64,), -1.0), torch.full((64,), float("nan"))])
def test_importance_of_another_model_is_refused(counts: Tensor) -> None:
    with pytest.raises(ConfigError, match="64 finite numbers"):
        round_weight(torch.ones(2, 64), scheme("int4"), importance=counts)


def _ratio(weight: Tensor, precision: str) -> float:
    """Squared error of the search as a share of plain rounding's, at equal bytes."""
    searched, plain = round_weight(weight, scheme(precision)), round_weight(weight, scheme(f"{precision}-rtn"))
    assert _stored(searched) == _stored(plain)
    return relative_error(weight, searched) / relative_error(weight, plain)


def _stored(rounded: QuantizedWeight) -> int:
    return rounded.num_bytes
