"""Streaming text: however it is cut, the pieces are the text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgevlm.runtimes.detokenize import StopStrings, TextStream


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: any sequence of ids spells some bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


TOKENIZER = byte_level_tokenizer()
STOPS = st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3)


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids)))


def stream(ids: Sequence[int], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """All pieces, the last one included, and whether a stop string was met."""
    text, shown = TextStream(decode, stops), list[str]()
    for id in ids:
        shown.append(text.push(id))
        if text.stopped:
            break
    shown.append(text.flush())
    assert text.text == "".join(shown)
    return shown, text.stopped


def cut_by_hand(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(st.text())
def test_the_pieces_of_a_text_are_the_text_without_half_characters(text: str) -> None:
    shown, _ = stream(TOKENIZER.encode(text).ids)
    assert "".join(shown) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in shown)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_the_pieces_of_any_bytes_are_what_the_tokenizer_says_of_all(ids: list[int]) -> None:
    shown, _ = stream(ids)
    assert "".join(shown) == decode(ids)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_what_was_shown_never_changes(ids: list[int]) -> None:
    shown, _ = stream(ids)
    whole, end = decode(ids), 0
    for piece in shown:
        assert whole.startswith(piece, end)
        end += len(piece)


@given(st.text("ab<>é🙂", max_size=30), STOPS)
def test_a_stop_string_cuts_tokens_as_it_cuts_the_text(text: str, stops: list[str]) -> None:
    shown, stopped = stream(TOKENIZER.encode(text).ids, stops)
    assert "".join(shown) == cut_by_hand(text, stops)
    assert stopped == any(stop in text for stop in stops)


@given(st.text("ab<>", max_size=20), STOPS, st.lists(st.integers(0, 20)))
def test_it_does_not_matter_where_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    watch, shown = StopStrings(stops), ""
    for start, end in pairwise(edges):
        if not watch.found:
            shown += watch.push(text[start:end])
    assert shown + watch.flush() == cut_by_hand(text, stops)
