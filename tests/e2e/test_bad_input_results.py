"""Measurements and recipes that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: "", "the file is empty; expected a run written by `edgevlm bench --save`"),
        (lambda text: text[:-40], "line 3: not valid JSON"),
        (lambda text: "".join(text.splitlines(True)[:-1]), "ends after 1 of 2 repetitions; it was cut off"),
        (lambda text: text.split("\n", 1)[1], "line 1: expected the header of a run"),
        (lambda text: "[]\n" + text, "line 1: expected a JSON object, found list"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema 2 is not known (expected 1); upgrade"),
        (lambda text: text.replace('"ttft_user_ms": ', '"ttft_user_ms": -'), "must be a time in milliseconds"),
        (lambda text: text.replace('"tpot_ms": ', '"tpot_ms": NaN, "x": '), "line 2: not valid JSON (NaN"),
        (lambda text: text.replace('"kind": "repetition"', '"kind": "guess"'), "expected a repetition, found 'guess'"),
        (lambda text: "\x00\ufffd" * 100, "line 1: not valid JSON"),
    ],
    ids=["empty", "cut", "short", "headless", "list", "newer", "negative", "nan", "kind", "noise"],
)
def test_a_corrupt_run_is_told_with_its_line(
    tmp_path: Path, run_file: Path, refused: Refused, damage: Callable[[str], str], words: str
) -> None:
    corrupt, report = tmp_path / "corrupt.jsonl", tmp_path / "report.html"
    corrupt.write_text(damage(run_file.read_text()))
    report.write_text("the old one")
    refused(2, (str(corrupt), words), "report", run_file, corrupt, "-o", report)
    refused(2, (str(corrupt), words), "compare", run_file, corrupt)


def test_a_run_that_is_not_there_and_one_that_is_not_text_are_told(
    tmp_path: Path, run_file: Path, refused: Refused
) -> None:
    (tmp_path / "picture.jsonl").write_bytes(b"\xff\xd8\xff")
    refused(2, "none.jsonl: cannot be read (No such file or directory)", "compare", run_file, tmp_path / "none.jsonl")
    refused(2, "picture.jsonl: not UTF-8 text", "compare", tmp_path / "picture.jsonl", run_file)


def test_a_report_never_replaces_what_it_reads(tmp_path: Path, run_file: Path, refused: Refused) -> None:
    own = tmp_path / "run.jsonl"
    own.write_text(run_file.read_text())
    refused(2, "is one of the files to read", "report", own, "-o", own)
    refused(2, "is a folder: name a file", "report", own, "-o", tmp_path)
    refused(2, "not valid JSON", "report", own, "--verify", own, "-o", tmp_path / "report.html")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name =", "nam =", ("no key named 'nam'", "Did you mean 'name'?")),
        ("steps =", "stepz =", ("optimization: no key named 'stepz'", "Did you mean 'steps'?")),
        ("name =", "name", "not valid TOML"),
    ],
    ids=["unknown key", "unknown key in a table", "no TOML"],
)
def test_a_recipe_that_cannot_be_used_is_told(
    root: Path, tmp_path: Path, refused: Refused, old: str, new: str, words: str
) -> None:
    text = (root / "edgevlm" / "shipped" / "nano" / "recipe.toml").read_text()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text.replace(old, new, 1))
    assert recipe.read_text() != text
    refused(2, (str(recipe), *([words] if isinstance(words, str) else words)), "train", recipe, tmp_path / "run")


def test_a_recipe_that_is_not_there_is_told(tmp_path: Path, refused: Refused) -> None:
    refused(2, "none.toml: cannot be read", "train", tmp_path / "none.toml", tmp_path / "run")
