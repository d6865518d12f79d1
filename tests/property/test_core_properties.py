from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from edgevlm.core.config import from_mapping, to_json
from edgevlm.core.errors import ConfigError
from edgevlm.core.registry import unknown_name


@dataclass(frozen=True)
class Leaf:
    size: int
    share: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...] = ()
    sizes: tuple[int | str, ...] = ()
    by_name: dict[str, int] | None = None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
LEAVES = st.builds(Leaf, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["a", "b"]))
TREES = st.builds(
    Tree,
    st.text(),
    st.lists(LEAVES, max_size=3).map(tuple),
    st.lists(st.integers() | st.text(max_size=4), max_size=3).map(tuple),
    st.none() | st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)


@given(TREES)
def test_a_dataclass_survives_json(tree: Tree) -> None:
    assert from_mapping(Tree, json.loads(to_json(tree)), strict=True, where="x") == tree


@given(st.fixed_dictionaries({}, optional={"name": JSON, "leaves": JSON, "sizes": JSON, "by_name": JSON, "x": JSON}))
def test_any_json_gives_a_dataclass_or_a_clear_error(values: dict[str, object]) -> None:
    refusal = refusal_of(values)
    assert refusal is None or (refusal.startswith("file.json: ") and "\n" not in refusal)


def refusal_of(values: dict[str, object]) -> str | None:
    try:
        from_mapping(Tree, values, strict=True, where="file.json")
    except ConfigError as error:
        return str(error)
    return None


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_json_is_always_valid_and_ends_with_one_line_break(value: dict[str, object]) -> None:
    text = to_json(value)
    assert text.endswith("}\n")
    json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=8), max_size=5))
def test_any_unknown_name_gives_a_message(name: str, known: list[str]) -> None:
    assert unknown_name("thing", name, known).startswith("no thing named ")
