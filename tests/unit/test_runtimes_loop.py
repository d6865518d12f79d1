"""The one generation loop."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.runtimes.loop import generate
from edgevlm.runtimes.session import Float, ImageFeatures, Ints

STOP = 9


class ScriptedSession:
    """Says the tokens of a script, one after the other, and counts what it was asked to do."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.fed = script, list[int]()
        self.position, self.max_context = 0, 100

    def encode(self, pixel_values: Float) -> ImageFeatures:
        raise NotImplementedError

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        raise NotImplementedError

    def embed(self, input_ids: Ints) -> Float:
        raise NotImplementedError

    def prefill(self, inputs_embeds: Float) -> Float:
        self.position += inputs_embeds.shape[1]
        return self._logits()

    def decode(self, token: int) -> Float:
        self.fed.append(token)
        self.position += 1
        return self._logits()

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        pass

    def _logits(self) -> Float:
        logits = np.zeros(10, np.float32)
        logits[self.script[len(self.fed)]] = 1
        return logits


def answer(script: list[int], max_tokens: int = 10) -> tuple[list[int], ScriptedSession]:
    session = ScriptedSession(script)
    embeds = np.zeros((1, 3, 4), np.float32)
    stream = generate(session, embeds, sample=lambda logits: int(logits.argmax()), stop={STOP}, max_tokens=max_tokens)
    return list(stream), session


def test_stop_token_is_not_part_of_the_answer() -> None:
    assert answer([4, 5, STOP])[0] == [4, 5]


def test_an_answer_may_be_empty() -> None:
    assert answer([STOP])[0] == []


def test_the_answer_ends_at_max_tokens() -> None:
    assert answer([4, 5, 6, 7], max_tokens=2)[0] == [4, 5]


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_the_last_token_is_not_fed_back(max_tokens: int) -> None:
    ids, session = answer([4, 5, 6, 7], max_tokens)
    assert session.fed == ids[:-1]


def test_the_prompt_is_prefilled_once() -> None:
    _, session = answer([4, 5, STOP])
    assert session.position == 3 + 2
