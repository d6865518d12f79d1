"""Floats of 8 and 4 bits, rounded as ml_dtypes rounds them, and the scales around them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.core.errors import ConfigError
from edgevlm.models.checkpoint import load_model
from edgevlm.quant.decoder import quantize_decoder
from edgevlm.quant.fake import RoundedLinear, fake_quantized, round_static
from edgevlm.quant.floats import (
    E2M1,
    e2m1_codes,
    e2m1_numbers,
    global_scale,
    half_scales,
    nearest_e2m1,
    power_of_two,
    to_e4m3,
)
from edgevlm.quant.rounding import relative_error, round_weight
from edgevlm.quant.schemes import Float4, Static, WeightOnly, scheme_of
from edgevlm.quant.search import Codes, plain_positive


def every_half() -> Tensor:
    """All finite numbers of float16, ties of both formats among them, and some between."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).float()
    return torch.cat((halves[torch.isfinite(halves)], torch.linspace(-7, 7, 20_001)))


def test_e2m1_rounds_as_ml_dtypes_to_the_bit() -> None:
    values = every_half()
    expected = np.clip(values.numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    found = nearest_e2m1(values)
    assert np.array_equal(found.numpy(), expected.astype(np.float32))
    assert np.array_equal(e2m1_codes(found).numpy(), expected.view(np.uint8))


def test_e4m3_rounds_as_ml_dtypes_to_the_bit() -> None:
    values = every_half()
    expected = np.clip(values.numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(to_e4m3(values).view(torch.uint8).numpy(), expected.view(np.uint8))


def test_a_tie_goes_to_the_even_code() -> None:
    between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 99.0])
    assert nearest_e2m1(between).tolist() == [0, 1, 1, 2, 2, 4, 4, -4, 6]


def test_codes_stand_for_their_numbers() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    numbers = e2m1_numbers(codes)
    assert numbers[:8].tolist() == list(E2M1)
    assert numbers[8:].tolist() == [-number for number in E2M1]
    assert torch.equal(e2m1_codes(numbers), codes)


def test_half_scales_are_positive_and_never_too_small() -> None:
    wanted = torch.tensor([0.0, 1e-9, 1e-7, 1e-5, 0.01, 1.0, 3.14159, 1e6])
    found = half_scales(wanted)
    assert torch.equal(found.half().float(), found)
    assert bool((found > 0).all())
    assert bool((found[:-1] >= wanted[:-1]).all())
    assert found[0] == found[1] == 2.0**-24
    assert found[5] == 1.0
    assert found[-1] == 65504.0


@pytest.mark.parametrize(("least", "scale"), [(1.0, 1.0), (1.01, 2.0), (0.5, 0.5), (1e-9, 2.0**-14), (0.0, 2.0**-14)])
def test_scales_of_floats_are_powers_of_two_of_float16(least: float, scale: float) -> None:
    assert power_of_two(least) == scale


def test_a_block_of_float4_is_as_the_format_says() -> None:
    """The largest weight, 3, becomes 6 at a scale of 0.5, which E4M3 holds."""
    weight = torch.tensor([[3.0, -1.5, 0.25, 0.13, *12 * [0.0]]])
    rounded = round_weight(weight, Float4(search=False, global_scale=2.0**-8))
    assert rounded.scales.tolist() == [[0.5]]
    assert rounded.codes[0, :4].tolist() == [7, 8 + 5, 1, 1]
    assert rounded.dequantize()[0, :4].tolist() == [3.0, -1.5, 0.25, 0.25]
    assert rounded.num_bytes == 9


def test_float16_holds_every_weight_of_float4_exactly() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) ** 3 * 0.03
    scheme = Float4(global_scale=global_scale(float(weight.abs().max())))
    values = round_weight(weight, scheme).dequantize()
    assert torch.equal(values.half().float(), values)


def test_searching_pays_and_blocks_of_sixteen_lose_less_than_larger_ones() -> None:
    weight = 0.05 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    plain, searched = (relative_error(weight, round_weight(weight, Float4(search=search))) for search in (False, True))
    assert searched < 0.8 * plain
    assert searched < relative_error(weight, round_weight(weight, WeightOnly(half_scales=True)))


def test_float4_makes_up_for_errors_where_inputs_come_together() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    inputs += 0.1 * torch.randn(512, 128, generator=generator)
    weight, moments = torch.randn(32, 128, generator=generator), (inputs.T @ inputs / 512)[None]

    def lost(importance: Tensor | None) -> float:
        rounded = round_weight(weight, Float4(), importance=importance)
        return float((inputs @ (rounded.dequantize() - weight).T).square().mean())

    assert lost(moments) < 0.5 * lost(None)


@pytest.mark.parametrize("precision", ["int4", "int4-b64-rtn", "int8-static", "fp8"])
def test_scales_for_tensorrt_are_positive_numbers_of_float16(precision: str) -> None:
    """Its parser refuses others; the ONNX target's 4-bit scales have either sign."""
    weight, scheme = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)), scheme_of(precision, "tensorrt")
    assert scheme is not None
    scales = round_weight(weight, scheme).scales
    assert bool((scales > 0).all())
    assert torch.equal(scales.half().float(), scales)
    assert bool((round_weight(weight, WeightOnly()).scales < 0).any())


def test_a_plain_positive_scale_cuts_nothing_off() -> None:
    groups = torch.tensor([[[7.0, -1.0], [1.0, -8.0], [0.0, 0.0]]])
    assert plain_positive(groups, Codes(low=-8, high=7)).scales.tolist() == [[1.0, 1.0, 1.0]]


def test_static_activations_saturate() -> None:
    values = torch.tensor([-1000.0, -0.6, 0.5, 1.5, 1000.0])
    assert round_static(values, 1.0, Static(format="int8")).tolist() == [-128, -1, 0, 2, 127]
    assert round_static(values, 1.0, Static(format="fp8")).tolist() == [-448, -0.625, 0.5, 1.5, 448]


def test_a_decoder_has_one_global_scale_and_static_ones_need_theirs() -> None:
    model = load_model("nano").model
    quantized = quantize_decoder(model, "nvfp4-rtn", target="tensorrt")
    largest = max(float(weight.dequantize().abs().max()) for weight in quantized.weights.values())
    assert len({weight.global_scale for weight in quantized.weights.values()}) == 1
    assert isinstance(quantized.scheme, Float4)
    assert quantized.scheme.global_scale * 6 * 448 >= largest
    with pytest.raises(ConfigError, match="calibrate the graph first"):
        quantize_decoder(model, "fp8", target="tensorrt")


@pytest.mark.parametrize("precision", ["int4-b64-rtn", "nvfp4-rtn"])
def test_weights_alone_leave_activations_as_they_are_for_tensorrt(precision: str) -> None:
    model = load_model("nano").model
    rounded = fake_quantized(model, quantize_decoder(model, precision, target="tensorrt"))
    layer = rounded.get_submodule("decoder.layers.0.mlp.down_proj")
    assert isinstance(layer, RoundedLinear)
    inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(inputs), torch.nn.functional.linear(inputs, layer.weight))
