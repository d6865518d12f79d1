"""Token ids to text while they come: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not, or not yet, a character


class Detokenizer:
    """Pieces of text whose concatenation is exactly ``decode`` of all ids pushed.

    A piece ends where a character ends.  Text that ends in a replacement character waits, because the next
    token may complete it.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the tokens of the last piece, as context, and those that wait
        self._num_shown = 0  # how many of them belong to the last piece
        self._shown = ""  # and their text

    def push(self, token: int) -> str:
        """The text that ``token`` completes; often empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """Whatever still waits, complete or not."""
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str:
        # What follows is decoded with this piece in front, since some tokenizers drop a text's first space.
        piece = text[len(self._shown) :]
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        self._shown = self._decode(self._ids)
        return piece


class StopStrings:
    """Lets text through up to the first stop string; what could become one waits.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first
    ends the text, the longest of several.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._waiting = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show and was not shown yet."""
        if not self._stops:
            return text
        self._waiting += text
        start = self._first_stop()
        self.found = start is not None
        safe = len(self._waiting) - self._num_doubtful() if start is None else start
        shown, self._waiting = self._waiting[:safe], "" if self.found else self._waiting[safe:]
        return shown

    def flush(self) -> str:
        """What waited in vain."""
        shown, self._waiting = self._waiting, ""
        return shown

    def _first_stop(self) -> int | None:
        """Where the stop string begins that ends first."""
        starts = ((self._waiting.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in starts if start >= 0]
        return min(ends)[1] if ends else None

    def _num_doubtful(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = min(len(self._waiting), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._waiting[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of an answer while it is written: a detokenizer, then a watch for stop strings."""

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._detokenizer, self._stops = Detokenizer(decode), StopStrings(stops)
        self.token_ids: list[int] = []
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; no more tokens are wanted then."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that can be shown now; often empty."""
        self.token_ids.append(token)
        return self._note(self._stops.push(self._detokenizer.push(token)))

    def flush(self) -> str:
        """The last text, once no more tokens come."""
        if self.stopped:
            return ""
        return self._note(self._stops.push(self._detokenizer.flush()) + self._stops.flush())

    def _note(self, piece: str) -> str:
        self.text += piece
        return piece
