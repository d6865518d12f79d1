"""Tokenizers built from vocab.json and merges.txt against the tokenizer.json of the same vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as InnerTokenizer
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from edgevlm.processing.tokenizer import Tokenizer

KINDS = {"qwen2": Qwen2Tokenizer, "gpt2": GPT2Tokenizer}
VECTORS = {"qwen2": "qwen2", "gpt2": "gpt-2"}
SEPARATOR = "\n__ggml_vocab_test__\n"
MORE = [
    "Ａｂｃ ｆｕｌｌ",
    "e\u0301 and é",
    "it's IT'S 12345",
    "a\r\n\r\n  b\t\tc   ",
    "<|im_start|>user\nhi<|im_end|>",
    "🦙 क्षि",
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def original(kind: str, test_data: Path) -> InnerTokenizer:
    return InnerTokenizer.from_file(str(test_data / "tokenizers" / kind / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(kind: str, original: InnerTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files as checkpoints had them before tokenizer.json."""
    path = tmp_path_factory.mktemp(kind)
    rules = json.loads(original.to_str())
    (path / "vocab.json").write_text(json.dumps(rules["model"]["vocab"]), encoding="utf-8")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    added = {token["content"]: token["id"] for token in rules["added_tokens"]}
    (path / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    settings = {"tokenizer_class": f"{KINDS[kind].__name__}Fast", "eos_token": "<|endoftext|>"}
    settings["additional_special_tokens"] = [token for token in added if token != "<|endoftext|>"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(kind: str, test_data: Path) -> list[str]:
    vectors = test_data / "tokenizers" / "vectors" / f"{VECTORS[kind]}.inp"
    return [*vectors.read_bytes().decode("utf-8").split(SEPARATOR), *MORE]


def test_ids_and_texts_are_those_of_the_tokenizer_file(
    folder: Path, original: InnerTokenizer, texts: list[str]
) -> None:
    built = Tokenizer.from_folder(folder)
    assert built.vocab_size == original.get_vocab_size(with_added_tokens=True)
    assert len(texts) > 40
    for text in texts:
        ids = original.encode(text, add_special_tokens=False).ids
        assert built.encode(text) == ids, text
        assert built.decode(ids) == original.decode(ids), text


def test_ids_are_those_of_transformers(folder: Path, kind: str, texts: list[str]) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]]
    reference = KINDS[kind](vocab=vocabulary, merges=merges)
    built = Tokenizer.from_folder(folder)
    for text in texts:
        if "<|" not in text:  # tokens that stand in no vocab.json
            assert built.encode(text) == reference(text, add_special_tokens=False)["input_ids"], text


def test_a_placeholder_gets_the_next_id_and_a_saved_tokenizer_is_the_same(
    folder: Path, kind: str, texts: list[str], tmp_path: Path
) -> None:
    extended = Tokenizer.from_folder(folder).with_special("<image>")
    assert extended.token_id("<image>") == {"qwen2": 151_646, "gpt2": 50_257}[kind]
    extended.save(tmp_path / "tokenizer.json")
    opened = Tokenizer.from_folder(tmp_path)
    for text in [*texts, "a <image>\nb"]:
        assert opened.encode(text) == extended.encode(text)
    assert opened.added_tokens == extended.added_tokens
    assert opened.added_tokens["<image>"].special
