"""What holds for every weight that is rounded to floats of few bits, or with the scales that TensorRT reads."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgevlm.quant.floats import E2M1, global_scale, nearest_e2m1
from edgevlm.quant.rounding import QuantizedWeight, relative_error, round_weight
from edgevlm.quant.schemes import Float4, Scheme, scheme_of

PRECISIONS = ("int4", "int4-b64-rtn", "int8-static", "fp8", "nvfp4", "nvfp4-rtn")
precisions = st.sampled_from(PRECISIONS)
CODE_ENDS = {"int4": (0, 15), "int8-static": (-127, 127), "fp8": (-448, 448), "nvfp4": (0, 15)}


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A few rows of any length, of sizes that float16 holds, some of them zeros, with outliers."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(rows, columns, generator=generator) ** draw(st.sampled_from((1, 3)))
    values[torch.rand(rows, columns, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))] = 0.0
    return values * 10.0 ** draw(st.integers(-6, 2))


def scheme(precision: str, weight: Tensor) -> Scheme:
    found = scheme_of(precision, "tensorrt")
    assert found is not None
    return replace(found, global_scale=global_scale(float(weight.abs().max()))) if isinstance(found, Float4) else found


def rounded(weight: Tensor, precision: str) -> QuantizedWeight:
    return round_weight(weight, scheme(precision, weight))


@given(weight=weights(), precision=precisions)
@settings(deadline=None)
def test_codes_fit_their_bits_and_scales_are_what_tensorrt_reads(weight: Tensor, precision: str) -> None:
    found = rounded(weight, precision)
    low, high = next(ends for kind, ends in CODE_ENDS.items() if precision.startswith(kind))
    assert low <= float(found.codes.float().min()) <= float(found.codes.float().max()) <= high
    assert bool((found.scales > 0).all())
    assert torch.equal(found.scales.half().float(), found.scales)
    assert bool(torch.isfinite(found.dequantize()).all())


@given(weight=weights())
@settings(deadline=None)
def test_float16_holds_what_floats_of_four_bits_stand_for(weight: Tensor) -> None:
    values = rounded(weight, "nvfp4").dequantize()
    assert torch.equal(values.half().float(), values)


@given(weight=weights())
@settings(deadline=None)
def test_no_block_of_float4_loses_by_the_search(weight: Tensor) -> None:
    assert (
        relative_error(weight, rounded(weight, "nvfp4")) <= relative_error(weight, rounded(weight, "nvfp4-rtn")) + 1e-9
    )


@given(weight=weights(), precision=st.sampled_from(("fp8", "nvfp4-rtn", "int4-b64-rtn")))
@settings(deadline=None)
def test_rows_are_rounded_each_for_itself(weight: Tensor, precision: str) -> None:
    kind, whole = scheme(precision, weight), rounded(weight, precision)
    for number, row in enumerate(weight):
        alone = round_weight(row[None], kind)
        assert torch.equal(alone.dequantize()[0], whole.dequantize()[number])


@given(values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=64))
def test_the_nearest_number_is_the_nearest(values: list[float]) -> None:
    wide = torch.tensor(values, dtype=torch.float64)
    known = torch.tensor([*E2M1, *(-number for number in E2M1)], dtype=torch.float64)
    distances = (wide[:, None] - known).abs().amin(1)
    assert torch.equal((nearest_e2m1(wide) - wide).abs(), distances)


@given(weight=weights())
@settings(deadline=None)
def test_eight_bits_of_float_keep_three_of_mantissa(weight: Tensor) -> None:
    """A weight is wrong by a sixteenth at most, or by half the smallest step of its row."""
    found = rounded(weight, "fp8")
    allowed = torch.maximum(weight.abs() / 16, found.scales * 2.0**-10)
    assert bool(((found.dequantize() - weight).abs() <= allowed).all())
