"""Rows that two prompts share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgevlm.runtimes.prompt_rows import Row, common_prefix

ROWS = st.lists(st.one_of(st.integers(0, 2), st.tuples(st.sampled_from("ab"), st.integers(0, 1))), max_size=8)


@given(ROWS, ROWS)
def test_the_common_prefix_is_common_and_cannot_be_longer(old: list[Row], new: list[Row]) -> None:
    length = common_prefix(old, new)
    assert old[:length] == new[:length]
    assert length in (len(old), len(new)) or old[length] != new[length]


@given(ROWS, ROWS, ROWS)
def test_what_follows_does_not_matter(begin: list[Row], old: list[Row], new: list[Row]) -> None:
    assert common_prefix(begin + old, begin + new) >= len(begin)
