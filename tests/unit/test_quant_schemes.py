"""What precisions are called, and what their names mean."""

from __future__ import annotations

import pytest

from edgevlm.core.errors import ConfigError
from edgevlm.quant.schemes import (
    DynamicInt8,
    Float4,
    Scheme,
    Static,
    WeightOnly,
    bits_per_weight,
    canonical,
    decoder_precision,
    encoder_precision,
    head_scheme,
    scheme_of,
)

SPELLINGS = {
    "fp32": "fp32",
    "fp16": "fp16",
    "int8": "int8-b32",
    "int8-b64": "int8-b64",
    "int8-dynamic": "int8-dynamic",
    "int4": "int4-b128",
    "int4-b32": "int4-b32",
    "int4-asym": "int4-b128-asym",
    "int4-b64-asym-head8-rtn": "int4-b64-asym-head8-rtn",
    "bf16": "bf16",
    "int8-static": "int8-static",
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "nvfp4-rtn": "nvfp4-rtn",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_name_has_one_canonical_spelling_that_means_the_same(name: str) -> None:
    assert canonical(name) == SPELLINGS[name]
    assert canonical(SPELLINGS[name]) == SPELLINGS[name]
    assert scheme_of(SPELLINGS[name]) == scheme_of(name)


def test_words_of_a_name_become_fields() -> None:
    assert scheme_of("fp32") is None
    assert scheme_of("int8-dynamic") == DynamicInt8()
    assert scheme_of("int8") == WeightOnly(bits=8, group_size=32)
    assert scheme_of("int4-b64-asym-head8-rtn") == WeightOnly(
        bits=4, group_size=64, symmetric=False, search=False, head_bits=8
    )


def test_formats_of_tensorrt() -> None:
    assert scheme_of("bf16") is None
    assert scheme_of("int8-static") == Static(format="int8")
    assert scheme_of("fp8") == Static(format="fp8")
    assert scheme_of("nvfp4-rtn") == Float4(search=False)
    assert scheme_of("int4", "tensorrt") == WeightOnly(half_scales=True)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "onnx") for name in ("bf16", "int8-static", "fp8", "nvfp4")),
        *((name, "tensorrt") for name in ("int8", "int8-dynamic", "int4-b32", "int4-asym", "int4-b64-head8")),
    ],
)
def test_a_target_refuses_what_it_lacks_and_says_what_it_has(name: str, target: str) -> None:
    with pytest.raises(ConfigError, match=rf"{target} bundles have no decoder in {name}; they have .*fp16.*int4"):
        decoder_precision(name, target)


def test_a_target_takes_what_it_has() -> None:
    assert decoder_precision("int4", "onnx") == decoder_precision("int4", "tensorrt") == "int4-b128"
    assert decoder_precision("int4-b64-rtn", "tensorrt") == "int4-b64-rtn"
    assert [decoder_precision(name, "tensorrt") for name in ("fp8", "nvfp4", "bf16")] == ["fp8", "nvfp4", "bf16"]
    assert decoder_precision("int4-b32-asym-head8-rtn", "onnx") == "int4-b32-asym-head8-rtn"
    assert encoder_precision("fp8", "tensorrt") == "fp8"
    with pytest.raises(ConfigError, match="onnx bundles have no encoder in 'fp8'; they have fp32, fp16, int8"):
        encoder_precision("fp8", "onnx")


@pytest.mark.parametrize("name", ["", "int5", "int4-", "int4-b32-rtn-asym", "int8-asym", "fp16-b32", "INT4", "w4a16"])
def test_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no decoder precision named .* known: fp32, fp16, int8"):
        scheme_of(name)


@pytest.mark.parametrize("name", ["int4-b48", "int8-b256", "int4-b1"])
def test_block_that_no_kernel_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="32, 64 or 128 weights"):
        canonical(name)


def test_bits_of_a_weight_count_its_share_of_scales_and_zero_points() -> None:
    found = {name: bits_per_weight(_scheme(name), 1024) for name in ("int4-b32", "int4-b64", "int4", "int4-b64-asym")}
    assert found == {"int4-b32": 5.0, "int4-b64": 4.5, "int4": 4.25, "int4-b64-asym": 4.5625}
    assert bits_per_weight(_scheme("int8"), 1024) == 9.0
    assert bits_per_weight(_scheme("int8-dynamic"), 1024) == 8 + 1 / 32
    assert bits_per_weight(_scheme("fp8"), 1024) == 8 + 1 / 64
    assert bits_per_weight(_scheme("nvfp4"), 1024) == 4.5
    assert bits_per_weight(WeightOnly(half_scales=True), 1024) == 4.125


def test_head_of_8_bits_is_symmetric_with_the_same_blocks() -> None:
    assert head_scheme(_scheme("int4-b64-asym-head8")) == WeightOnly(bits=8, group_size=64)
    assert head_scheme(_scheme("int4-b64-asym")) == _scheme("int4-b64-asym")
    assert head_scheme(DynamicInt8()) == DynamicInt8()


def _scheme(name: str) -> Scheme:
    scheme = scheme_of(name)
    assert scheme is not None
    return scheme
