"""A tokenizer from ``vocab.json`` and ``merges.txt``, where nobody wrote a ``tokenizer.json``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from edgevlm.core.config import read_json, read_text
from edgevlm.core.errors import IntegrityError, UnsupportedError

VOCABULARY, MERGES, SETTINGS = "vocab.json", "merges.txt", "tokenizer_config.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS_OF_SPECIAL = ("additional_special_tokens", "extra_special_tokens")

# Qwen2 (arXiv 2407.10671) splits where GPT-4 does, but puts every digit by itself.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_byte_bpe(folder: Path) -> bool:
    """Whether ``folder`` holds the two files of a byte-level BPE."""
    return (folder / VOCABULARY).is_file() and (folder / MERGES).is_file()


def build_byte_bpe(folder: Path) -> Tokenizer:
    """The tokenizer that ``tokenizer_config.json`` calls Qwen2's or GPT-2's, its added tokens included.

    Raises UnsupportedError for another kind, IntegrityError where files contradict each other.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind not in RULES:
        raise UnsupportedError(
            f"{folder}: no tokenizer.json, and its tokenizer_config.json names {kind}; from vocab.json and merges.txt "
            f"{' and '.join(RULES)} can be built. {how_to_convert(folder)}"
        )
    vocabulary = read_json(folder / VOCABULARY)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(folder / MERGES)))
    RULES[kind](tokenizer, bool(settings.get("add_prefix_space")))
    _add_tokens(tokenizer, folder, settings)
    return tokenizer


def how_to_convert(folder: Path) -> str:
    """The command that writes a tokenizer.json, for a shell to take as it stands."""
    code = (
        f"from transformers import AutoTokenizer as A; A.from_pretrained({str(folder)!r}).save_pretrained('converted')"
    )
    return (
        "Convert it once on any machine with `pip install transformers sentencepiece`, and copy "
        f"converted/tokenizer.json into the folder: python -c {shlex.quote(code)}"
    )


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    lines = lines[1:] if lines and lines[0].startswith("#version") else lines
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines]
    if any(len(pair) != 2 for pair in pairs):
        raise IntegrityError(f"{path}: a line of merges must hold two tokens; copy the file again")
    return [(first, second) for first, second in pairs]


def _as_gpt2(tokenizer: Tokenizer, add_prefix_space: bool) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()


def _as_qwen2(tokenizer: Tokenizer, add_prefix_space: bool) -> None:
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()


RULES: Mapping[str, Callable[[Tokenizer, bool], None]] = {"Qwen2Tokenizer": _as_qwen2, "GPT2Tokenizer": _as_gpt2}


def _add_tokens(tokenizer: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """In the order of their ids, as the library numbers them; those without one come last."""
    wanted = _numbered(folder, settings)
    special = {text for text in _special(settings) if text}
    for id, token in sorted(wanted.items()):
        token.special = token.special or token.content in special
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != id:
            found = tokenizer.token_to_id(token.content)
            raise IntegrityError(
                f"{folder}: token {token.content!r} should have id {id}, but gets {found} after those of "
                f"{VOCABULARY}; copy the folder again"
            )
    known = {token.content for token in wanted.values()}
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special - known])


def _numbered(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    path = folder / "added_tokens.json"
    plain = read_json(path) if path.is_file() else {}
    tokens = {int(id): AddedToken(text, normalized=False) for text, id in plain.items()}
    detailed = settings.get("added_tokens_decoder") or {}
    return {**tokens, **{int(id): _added_token(values) for id, values in detailed.items()}}


def _added_token(values: Mapping[str, Any]) -> AddedToken:
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return AddedToken(str(values["content"]), **{flag: bool(values.get(flag)) for flag in flags})


def _special(settings: Mapping[str, Any]) -> Iterator[str]:
    named = [settings.get(name) for name in SPECIAL_NAMES]
    for name in LISTS_OF_SPECIAL:
        listed = settings.get(name) or []
        named += listed.values() if isinstance(listed, dict) else listed
    for value in named:
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield text
