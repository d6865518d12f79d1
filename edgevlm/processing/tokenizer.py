"""Text to ids and back, from a ``tokenizer.json`` or the files that came before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from edgevlm.core.config import read_text
from edgevlm.core.errors import ConfigError, EdgeVLMError, InputError, IntegrityError, UnsupportedError
from edgevlm.core.files import write_text
from edgevlm.processing.byte_bpe import build_byte_bpe, has_byte_bpe, how_to_convert


@dataclass(frozen=True)
class AddedToken:
    """A string that the tokenizer finds before anything else, and the blanks around it that it swallows."""

    id: int
    special: bool  # left out of decoded text
    lstrip: bool
    rstrip: bool


class Tokenizer:
    """A vocabulary with its rules.  What ``tokenizer.json`` says of truncation and padding is ignored."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()  # a prompt that is too long must be noticed, not cut
        inner.no_padding()
        self._inner = inner
        self.added_tokens: Mapping[str, AddedToken] = {
            token.content: AddedToken(id, token.special, token.lstrip, token.rstrip)
            for id, token in inner.get_added_tokens_decoder().items()
        }

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in ``folder``: tokenizer.json, else vocab.json and merges.txt.

        Raises IntegrityError when they are missing or damaged, UnsupportedError for a SentencePiece model.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return cls._from_older_files(folder)
        try:
            text = read_text(path)
            return cls._guarded(lambda: tokenizers.Tokenizer.from_str(text))
        except (InputError, ValueError) as error:
            raise IntegrityError(f"{path}: not a tokenizer ({error}); copy the folder again") from error

    @classmethod
    def _from_older_files(cls, folder: Path) -> Tokenizer:
        if has_byte_bpe(folder):
            try:
                return cls._guarded(lambda: build_byte_bpe(folder))
            except (InputError, ValueError) as error:
                raise IntegrityError(f"{folder}: not a tokenizer ({error}); copy the folder again") from error
        if (folder / "tokenizer.model").is_file():
            raise UnsupportedError(f"{folder}: tokenizer.model alone cannot be read. {how_to_convert(folder)}")
        raise IntegrityError(
            f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, as the tokenizer's "
            "save_pretrained writes them"
        )

    @classmethod
    def _guarded(cls, build: Callable[[], tokenizers.Tokenizer]) -> Tokenizer:
        """Raises ValueError: the library raises bare Exceptions, and a Rust panic is not even that."""
        try:
            return cls(build())
        except EdgeVLMError:
            raise
        except Exception as error:
            raise ValueError(" ".join(str(error).split())) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError("the tokenizer library gave up on it") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; an embedding table may have more rows."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of ``text``, in which added tokens such as ``<|im_end|>`` are read as themselves.

        Nothing is put around the text unless ``add_special_tokens``: chat templates write that themselves.
        Raises InputError for text that is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text holds half a character at position {error.start}; expected UTF-8") from error
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``: bytes that are no character yet as U+FFFD, ids past the vocabulary as nothing.

        Raises InputError for an id that no vocabulary can hold.
        """
        try:
            return self._inner.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise InputError(f"token ids are whole numbers from 0; found {min(ids)} to {max(ids)}") from error

    def token_id(self, token: str) -> int:
        """The id of ``token``.  Raises ConfigError when the vocabulary does not have it."""
        id = self._find(token)
        if id is None:
            raise ConfigError(f"the tokenizer has no token {token!r} among its {self.vocab_size:,}")
        return id

    def has(self, token: str) -> bool:
        """Whether the vocabulary has ``token``."""
        return self._find(token) is not None

    def _find(self, token: str) -> int | None:
        try:
            return self._inner.token_to_id(token)
        except UnicodeEncodeError:  # half a character, which JSON can write and no vocabulary has
            return None

    def token(self, id: int) -> str | None:
        """The vocabulary's own spelling of ``id`` (byte-level ones write a blank as ``Ġ``), if it has one."""
        return self._inner.id_to_token(id)

    def blind_to(self, tokens: Collection[str]) -> Tokenizer:
        """The same tokenizer, for which the strings in ``tokens`` are ordinary text."""
        rules = json.loads(self._inner.to_str())
        for token in rules["added_tokens"]:
            token["special"] = token["content"] in tokens
        rules["post_processor"] = None
        blind = tokenizers.Tokenizer.from_str(json.dumps(rules))
        blind.encode_special_tokens = True
        return Tokenizer(blind)

    def with_special(self, *tokens: str) -> Tokenizer:
        """The same tokenizer, which reads each of ``tokens`` as one special token, new ones with the next free ids.

        Raises ConfigError for one that is not Unicode.
        """
        new = [token for token in tokens if token not in self.added_tokens or not self.added_tokens[token].special]
        if not new:
            return self
        extended = tokenizers.Tokenizer.from_str(self._inner.to_str())
        try:
            extended.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in new])
        except UnicodeEncodeError as error:
            raise ConfigError(f"half a character in one of the special tokens {new}; expected UTF-8") from error
        return Tokenizer(extended)

    def save(self, path: str | Path) -> None:
        """Write the whole tokenizer as one ``tokenizer.json``."""
        write_text(Path(path), self._inner.to_str(pretty=True))
