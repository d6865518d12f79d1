from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.bundle.manifest import parse_manifest
from edgevlm.bundle.paths import check_name
from edgevlm.core.errors import IntegrityError

PIECES = st.sampled_from(["..", ".", "", "/", "\\", "a", "onnx", "C:", "~", "\0", "\n", " ", "é"])
NAMES = st.lists(PIECES, max_size=6).map("/".join) | st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "name",
    "family",
    "parts",
    "image",
    "prompt",
    "num_vision_tokens",
    "decoder",
    "max_context",
    "file_bytes",
)


@given(NAMES)
def test_an_accepted_name_stays_below_the_folder_on_every_system(name: str) -> None:
    try:
        check_name(name)
    except IntegrityError:
        return
    root = Path("/some/bundle")
    inside = Path(os.path.normpath(root / name))
    assert root in inside.parents
    assert inside.relative_to(root).as_posix() == name
    assert "\\" not in name
    assert ":" not in name


@given(st.lists(st.from_regex(r"[a-z0-9_]{1,8}(\.[a-z]{1,4})?", fullmatch=True), min_size=1, max_size=4))
def test_ordinary_names_are_accepted(parts: list[str]) -> None:
    assert check_name("/".join(parts)) == "/".join(parts)


@given(st.fixed_dictionaries({"schema": st.just(1) | JSON}, optional=dict.fromkeys(FIELDS, JSON)))
def test_any_json_is_refused_as_a_manifest_with_one_kind_of_error(values: dict[str, object]) -> None:
    with pytest.raises(IntegrityError) as refused:
        parse_manifest(values, where="edgevlm.json")
    assert "\n" not in str(refused.value)
