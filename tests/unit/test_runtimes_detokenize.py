"""Pieces of text while tokens come."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgevlm.runtimes.detokenize import StopStrings, TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose ids are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """A tokenizer that drops the first space of a text, as SentencePiece does."""
    return "".join(f" word{id}" for id in ids).removeprefix(" ")


def pieces(ids: Sequence[int], stops: Sequence[str] = ()) -> list[str]:
    stream = TextStream(decode_bytes, stops)
    shown = []
    for id in ids:
        shown.append(stream.push(id))
        if stream.stopped:
            break
    return [*shown, stream.flush()]


def test_a_character_waits_for_its_last_byte() -> None:
    assert pieces("aé".encode()) == ["a", "", "é", ""]


def test_four_bytes_make_one_emoji() -> None:
    assert pieces("🙂".encode()) == ["", "", "", "🙂", ""]


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_shows_it() -> None:
    assert "".join(pieces("né".encode()[:-1])) == "n\ufffd"


def test_spaces_between_words_survive_a_tokenizer_that_drops_the_first() -> None:
    stream = TextStream(decode_words)
    assert [stream.push(1), stream.push(2), stream.flush()] == ["word1", " word2", ""]


@pytest.mark.parametrize("text", ["abc<end>def", "abc<<end>", "abc<en<end>"])
def test_nothing_of_a_stop_string_is_shown(text: str) -> None:
    shown = pieces(text.encode(), ["<end>"])
    assert "".join(shown) == text[: text.index("<end>")]


def test_what_only_looked_like_a_stop_string_is_shown_late() -> None:
    assert pieces(b"a<en!", ["<end>"]) == ["a", "", "", "", "<en!", ""]


def test_an_unfinished_stop_string_is_text() -> None:
    assert "".join(pieces(b"a<en", ["<end>"])) == "a<en"


def test_the_stop_string_that_is_complete_first_ends_the_text() -> None:
    stops = StopStrings(["bcd", "c"])
    assert (stops.push("abcd"), stops.found) == ("ab", True)


def test_of_two_stop_strings_that_end_together_the_longer_counts() -> None:
    stops = StopStrings(["c", "bc"])
    assert stops.push("abc") == "a"


def test_a_stop_string_in_the_last_waiting_bytes_counts() -> None:
    stream = TextStream(decode_bytes, ["\ufffd"])
    stream.push(ord("a"))
    stream.push(0xC3)
    assert (stream.flush(), stream.text, stream.stopped) == ("", "a", True)
