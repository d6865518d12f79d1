"""What a user writes stays text: control tokens come from the chat template alone.

Before rendering, every control token that a user wrote is broken by a mark, a character that occurs
nowhere else, so that after rendering the unbroken ones are known to be the template's.  An ordinary prompt
has none, and is tokenized whole.  Otherwise the prompt is cut at the template's control tokens, and what
lies between is encoded by a tokenizer that does not know them.  Byte-level vocabularies give the same ids
both ways, because a tokenizer cuts there too, before it merges anything.

A control token is one that is special, that stands in the template's source, or that stands for the image or
for the place of one of its tiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from edgevlm.core.errors import ConfigError, InputError
from edgevlm.processing.chat import ChatTemplate, Message
from edgevlm.processing.tokenizer import AddedToken, Tokenizer

PRIVATE_USE = range(0xE000, 0xF900)
UNTOUCHED_KEYS = ("role", "type")  # checked words, not text; a template compares them


class Guard:
    """Encodes messages so that none of their text becomes a control token."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, image_token: str, layout_tokens: Iterable[str] = ()
    ) -> None:
        self.tokenizer, self.template, self.image_token = tokenizer, template, image_token
        tokens = {
            image_token,
            *layout_tokens,
            *(name for name, token in tokenizer.added_tokens.items() if token.special),
        }
        tokens |= {name for name in tokenizer.added_tokens if name.strip() and name in template.source}
        self.control_ids = {token: tokenizer.token_id(token) for token in sorted(tokens, key=len, reverse=True)}
        choices = "|".join(map(re.escape, self.control_ids))
        self._pattern = re.compile(f"({choices})")
        self._anywhere = re.compile(f"(?=({choices}))", re.IGNORECASE)  # overlapping; a template may change case
        self._openings = tuple({token[:end].lower() for token in tokens for end in range(1, len(token))})
        self._endings = tuple({token[start:].lower() for token in tokens for start in range(1, len(token))})

    def encode(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, pictures: Sequence[str] | None = None
    ) -> list[int]:
        """The ids of the rendered ``messages``, the n-th image token replaced by the text ``pictures[n]``.

        Raises what ``ChatTemplate.render`` raises, ConfigError for a template that loses a picture, and InputError
        where the vocabulary itself makes a control token out of plain text, which byte-level ones cannot.
        """
        mark = _unused_character([self.template.source, *_texts(messages)])
        rendered = self.template.render([self._marked(message, mark) for message in messages], add_generation_prompt)
        rendered = rendered if pictures is None else self._with_pictures(rendered, pictures)
        written = self._pattern.findall(rendered)
        clean = rendered.replace(mark, "")
        if self._pattern.findall(clean) == written:
            ids = self.tokenizer.encode(clean)
            if self._controls_in(ids) == [self.control_ids[token] for token in written]:
                return ids
        return self._encode_in_pieces(rendered, mark)

    def _with_pictures(self, rendered: str, pictures: Sequence[str]) -> str:
        found = self._pattern.findall(rendered).count(self.image_token)
        if found != len(pictures):
            raise ConfigError(
                f"the chat template wrote {found} of {len(pictures)} {self.image_token!r}; "
                f"it must write one for each picture in the messages"
            )
        texts = iter(pictures)
        return self._pattern.sub(lambda match: next(texts) if match[0] == self.image_token else match[0], rendered)

    def _encode_in_pieces(self, rendered: str, mark: str) -> list[int]:
        pieces = self._pattern.split(rendered)  # text, token, text, …, token, text
        tokens: list[str | None] = [None, *pieces[1::2], None]
        ids: list[int] = []
        for text, (before, after) in zip(pieces[::2], pairwise(tokens), strict=True):
            ids += self._plain_ids(self._stripped(text.replace(mark, ""), before, after))
            ids += [] if after is None else [self.control_ids[after]]
        return ids

    def _stripped(self, text: str, before: str | None, after: str | None) -> str:
        """``text`` without the blanks that the tokens around it swallow."""
        text = text.lstrip() if self._added(before).rstrip else text
        return text.rstrip() if self._added(after).lstrip else text

    def _added(self, token: str | None) -> AddedToken:
        return self.tokenizer.added_tokens.get(token or "", AddedToken(-1, False, False, False))

    def _plain_ids(self, text: str) -> list[int]:
        ids = self._blind.encode(text) if text else []
        if self._controls_in(ids):
            raise InputError(f"the vocabulary turns plain text into a control token; rewrite {text!r}")
        return ids

    def _controls_in(self, ids: Iterable[int]) -> list[int]:
        known = set(self.control_ids.values())
        return [id for id in ids if id in known]

    @cached_property
    def _blind(self) -> Tokenizer:
        return self.tokenizer.blind_to(self.control_ids)

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._around(self._inside(value, mark), mark)
        if isinstance(value, Mapping):
            return {
                self._inside(str(key), mark): item if key in UNTOUCHED_KEYS else self._marked(item, mark)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._marked(item, mark) for item in value]
        return value

    def _inside(self, text: str, mark: str) -> str:
        """``text`` with a mark after the first character of every control token in it."""
        breaks = [match.start() + 1 for match in self._anywhere.finditer(text)]
        edges = [0, *breaks, len(text)]
        return mark.join(text[start:end] for start, end in pairwise(edges))

    def _around(self, text: str, mark: str) -> str:
        """``text`` with a mark where it could complete a control token begun outside, or begin one."""
        before = mark if text.lower().startswith(self._endings) else ""
        after = mark if text.lower().endswith(self._openings) else ""
        return f"{before}{text}{after}"


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _unused_character(texts: Iterable[str]) -> str:
    used = set().union(*texts)
    for code in PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise InputError("the messages use every private-use character of Unicode; take one out")
