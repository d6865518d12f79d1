from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edgevlm.core.config import (
    from_mapping,
    from_recipe,
    read_json,
    to_json,
)
from edgevlm.core.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ConfigError(f"bits must be 2 or 4, got {self.bits}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    layers: tuple[Inner, ...] = ()
    mean: tuple[float, float] = (0, 0)
    fit: Literal["pad", "crop"] = "pad"
    level: Literal[1, 2] = 1
    maybe: int | None = None
    number: float | int = 1
    either: int | str = 1
    inner_or_none: Inner | None = None
    table: Mapping[str, Inner] = field(default_factory=dict)
    names: Sequence[str] = ()
    listed: list[int] = field(default_factory=list)
    picked: frozenset[int] = frozenset()
    flag: bool = False
    path: Path = Path()
    anything: dict[str, Any] = field(default_factory=dict)
    bare: tuple = ()  # type: ignore[type-arg]


def strict(values: dict[str, Any]) -> Outer:
    return from_mapping(Outer, {"name": "n", **values}, strict=True, where="recipe.toml")


def test_nested_dataclasses_are_built_wherever_they_stand() -> None:
    outer = strict(
        {
            "inner": {"bits": 2},
            "layers": [{"bits": 2}, {}],
            "table": {"a": {"bits": 2}},
            "inner_or_none": {"bits": 2},
        }
    )
    assert outer.inner == outer.table["a"] == outer.inner_or_none == Inner(bits=2)
    assert outer.layers == (Inner(bits=2), Inner(bits=4))


def test_plain_values_become_the_annotated_types() -> None:
    outer = strict({"mean": [1, 2.5], "names": ["a"], "listed": [1], "picked": [1, 1], "path": "a/b", "bare": [1]})
    assert outer.mean == (1.0, 2.5)
    assert isinstance(outer.mean[0], float)
    assert (outer.names, outer.listed, outer.picked) == (("a",), [1], frozenset({1}))
    assert (outer.path, outer.bare) == (Path("a/b"), (1,))


def test_a_union_keeps_the_type_that_was_written() -> None:
    assert isinstance(strict({"number": 3}).number, int)
    assert strict({"either": "x"}).either == "x"
    assert strict({"maybe": None}).maybe is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nmae": "x"}, "no key named 'nmae'.* Did you mean 'name'"),
        ({"inner": {"bts": 2}}, "recipe.toml: inner: no key named 'bts'"),
        ({"inner": {"bits": 3}}, "recipe.toml: inner: bits must be 2 or 4, got 3"),
        ({"layers": [{}, {"bits": "x"}]}, r"layers\[1\]: bits must be int; found 'x'"),
        ({"table": {"a": {"bits": True}}}, "table: a: bits must be int; found True"),
        ({"table": [1]}, "table must be a table"),
        ({"inner": 3}, "expected a table for Inner, found 3"),
        ({"mean": [1]}, "mean must hold 2 values; found 1"),
        ({"mean": "ab"}, "mean must be a list"),
        ({"mean": [1, True]}, r"mean\[1\] must be float"),
        ({"mean": [1, 10**400]}, r"mean\[1\] must be float"),
        ({"fit": "pda"}, "fit must be one of pad, crop; found 'pda'"),
        ({"fit": ["pad"]}, "fit must be one of"),
        ({"level": True}, "level must be one of 1, 2; found True"),
        ({"maybe": "x"}, "maybe must be int; found 'x'"),
        ({"either": 1.5}, "either must be int or str; found 1.5"),
        ({"inner_or_none": {"bits": 9}}, "inner_or_none: bits must be 2 or 4"),
        ({"flag": 1}, "flag must be bool; found 1"),
        ({"names": "abc"}, "names must be a list"),
        ({"name": ["x" * 500]}, r"name must be str; found \['x+\.\.\.$"),
    ],
)
def test_a_wrong_recipe_says_where_and_what(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strict(values)


def test_missing_fields_are_named() -> None:
    with pytest.raises(ConfigError, match=r"missing name \(needed by Outer\)"):
        from_mapping(Outer, {}, strict=False, where="x")


def test_a_hub_config_may_hold_more_than_we_know() -> None:
    config = from_mapping(
        Outer,
        {"name": "n", "architectures": ["X"], "inner": {"bits": 2, "extra": 1}},
        strict=False,
        where="config.json",
    )
    assert config.inner.bits == 2


def test_a_recipe_file_is_read_and_its_errors_carry_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text('name = "n"\n[inner]\nbits = 2\n')
    assert from_recipe(Outer, recipe).inner.bits == 2
    recipe.write_text("name = ")
    with pytest.raises(ConfigError, match=r"a\.toml: not valid TOML"):
        from_recipe(Outer, recipe)
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        from_recipe(Outer, tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, "nan nan"])
def test_bad_json_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_json_from_windows_is_read_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_json(tmp_path / "a.json")


def test_json_holds_numbers_as_numbers_and_never_nan() -> None:
    value = {
        "inner": Inner(),
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "rows": np.arange(4).reshape(2, 2),
        "nan": float("nan"),
        "set": {2, 1},
        "path": Path("a/b"),
        "listed": (Inner(bits=2),),
    }
    assert json.loads(to_json(value)) == {
        "inner": {"bits": 4},
        "scalar": 0.5,
        "count": 3,
        "rows": [[0, 1], [2, 3]],
        "nan": None,
        "set": [1, 2],
        "path": "a/b",
        "listed": [{"bits": 2}],
    }


def test_json_refuses_what_has_no_json_form() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        to_json({"a": object()})
    with pytest.raises(TypeError, match="bytes has no JSON form"):
        to_json(b"abc")


def test_json_of_a_file_name_that_is_no_utf8_can_be_written() -> None:
    to_json({"file": "\udcff", "word": "ä"}).encode("utf-8")
