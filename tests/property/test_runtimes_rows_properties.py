"""Rows that two prompts share."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.bundle.manifest import FusionShape
from edgevlm.processing.picture import Picture
from edgevlm.runtimes.prompt_rows import PromptRows, Row, common_prefix, fused_positions
from edgevlm.runtimes.session import Float

IMAGE = 9
# A prompt in pieces: text, or a picture by its key; each key always has the same number of vision tokens.
SIZES = {"a": 1, "b": 2, "c": 5}
PIECES = st.lists(st.one_of(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.sampled_from("abc")), max_size=6)


def prompt_of(pieces: list[list[int] | str], *, fused: bool = False) -> PromptRows:
    ids = np.array(
        [id for piece in pieces for id in ([IMAGE] * SIZES[piece] if isinstance(piece, str) else piece)], int
    )
    keys = [piece for piece in pieces if isinstance(piece, str)]
    pixels = np.zeros((1, 3, 1, 1), np.float32)
    positions = np.flatnonzero(ids == IMAGE)
    return PromptRows(
        ids=ids,
        positions=positions,
        pictures=tuple(Picture(pixels, (1, 1), key) for key in keys),
        counts=tuple(SIZES[key] for key in keys),
        fused=fused_positions(ids, positions, FusionShape(num_layers=1, skip_token_zero=True)) if fused else None,
    )


def placed(prompt: PromptRows, start: int) -> Float:
    """The rows after ``start``: text is its id, the n-th vision token of a picture its key's letter and n."""
    embeds: Float = prompt.ids_to_embed()[None, start:, None].astype(np.float32)
    prompt.place([vision_tokens(picture.key) for picture in prompt.pictures_after(start)], embeds, start)
    return embeds


def vision_tokens(key: str) -> Float:
    tokens = np.arange(SIZES[key]) / 10 + ord(key)
    return tokens.astype(np.float32)[None, :, None]


def seen_by_eye(pieces: list[list[int] | str]) -> list[float]:
    rows: list[float] = []
    for piece in pieces:
        rows += [ord(piece) + n / 10 for n in range(SIZES[piece])] if isinstance(piece, str) else piece
    return rows


@given(PIECES)
def test_every_picture_fills_exactly_its_own_places(pieces: list[list[int] | str]) -> None:
    assert np.allclose(placed(prompt_of(pieces), 0)[0, :, 0], seen_by_eye(pieces))


@given(PIECES, st.data())
def test_the_rows_after_any_start_are_those_of_the_whole(pieces: list[list[int] | str], data: st.DataObject) -> None:
    prompt = prompt_of(pieces)
    start = data.draw(st.integers(0, len(prompt)))
    assert np.array_equal(placed(prompt, start), placed(prompt, 0)[:, start:])


@given(PIECES, PIECES)
def test_rows_in_common_are_rows_that_are_equal(old: list[list[int] | str], new: list[list[int] | str]) -> None:
    one, two = prompt_of(old), prompt_of(new)
    shared = common_prefix(one.rows(), two.rows())
    assert np.array_equal(placed(one, 0)[:, :shared], placed(two, 0)[:, :shared])
    if shared < min(len(one), len(two)):
        assert placed(one, 0)[0, shared] != placed(two, 0)[0, shared]


@given(st.lists(st.integers(0, 3), max_size=5), st.sampled_from("abc"), st.lists(st.integers(0, 3), max_size=5))
def test_fused_and_plain_text_and_vision_tokens_make_up_the_prompt(
    before: list[int], key: str, after: list[int]
) -> None:
    prompt = prompt_of([before, key, after], fused=True)
    assert prompt.fused is not None
    rows = prompt.rows()
    for position, (row, id) in enumerate(zip(rows, prompt.ids, strict=True)):
        is_fused = position in prompt.fused
        assert is_fused == (row == (key, "text", int(id)))
        assert is_fused == (id not in (0, IMAGE))


ROWS = st.lists(st.one_of(st.integers(0, 2), st.tuples(st.sampled_from("ab"), st.integers(0, 1))), max_size=8)


@given(ROWS, ROWS)
def test_the_common_prefix_is_common_and_cannot_be_longer(old: list[Row], new: list[Row]) -> None:
    length = common_prefix(old, new)
    assert old[:length] == new[:length]
    assert length in (len(old), len(new)) or old[length] != new[length]


@given(ROWS, ROWS, ROWS)
def test_what_follows_does_not_matter(begin: list[Row], old: list[Row], new: list[Row]) -> None:
    assert common_prefix(begin + old, begin + new) >= len(begin)
