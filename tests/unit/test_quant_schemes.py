"""What precisions are called, and what their names mean."""

from __future__ import annotations

import pytest

from edgevlm.core.errors import ConfigError
from edgevlm.quant.schemes import DynamicInt8, WeightOnly, bits_per_weight, canonical, head_scheme, scheme_of

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


def test_head_of_8_bits_is_symmetric_with_the_same_blocks() -> None:
    assert head_scheme(_scheme("int4-b64-asym-head8")) == WeightOnly(bits=8, group_size=64)
    assert head_scheme(_scheme("int4-b64-asym")) == _scheme("int4-b64-asym")
    assert head_scheme(DynamicInt8()) == DynamicInt8()


def _scheme(name: str) -> WeightOnly | DynamicInt8:
    scheme = scheme_of(name)
    assert scheme is not None
    return scheme
