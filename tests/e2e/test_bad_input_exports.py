"""Checkpoints that are damaged, and output folders that must not be touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., str]


def edit(file: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda c: (c / "model.safetensors").write_bytes(b""), 7, "not a readable safetensors file"),
        (lambda c: os.truncate(c / "model.safetensors", 90_000), 7, "not a readable safetensors file"),
        (lambda c: (c / "model.safetensors").unlink(), 2, "model.safetensors is missing"),
        (lambda c: (c / "tokenizer.json").unlink(), 7, "no tokenizer; expected tokenizer.json"),
        (lambda c: (c / "tokenizer.json").write_text("{}"), 7, "not a tokenizer"),
        (lambda c: (c / "processor.json").unlink(), 2, "processor.json: cannot be read"),
        (lambda c: (c / "config.json").write_text("{"), 2, "config.json: not valid JSON"),
        (lambda c: (c / "config.json").unlink(), 2, "is a folder without config.json"),
    ],
    ids=["no weights", "cut", "missing", "tokenizer gone", "tokenizer", "processor", "config", "config gone"],
)
def test_a_damaged_checkpoint_is_told_and_how(
    tmp_path: Path, checkpoint: Path, refused: Refused, damage: Callable[[Path], object], code: int, words: str
) -> None:
    damage(checkpoint)
    refused(code, (str(checkpoint), words), "export", checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda c: c.update(model_type="lava"), 3, "no model family named 'lava'; known: edgevlm"),
        (lambda c: c.pop("model_type"), 3, "names no model_type; known: edgevlm"),
        (lambda c: c.pop("decoder"), 2, "missing decoder"),
        (lambda c: c["decoder"].update(hidden_size="wide"), 2, "decoder: hidden_size must be int; found 'wide'"),
        (lambda c: c["decoder"].update(num_attention_heads=0), 2, "num_attention_heads must be at least 1, got 0"),
        (lambda c: c["decoder"].update(hidden_size=128), 7, "does not fit its config.json"),
        (lambda c: c["vision"].update(image_size=33), 2, "image_size 33 is not a multiple of the encoder's stride"),
        (lambda c: c["vision"].update(widths=[0, 32]), 2, "widths (0, 32) must be at least 1 each"),
        (lambda c: c["vision"].update(type="cnn"), 2, "vision must be HybridConfig or VitConfig"),
        (lambda c: c["decoder"].update(hidden_size=10**12), 2, "hidden_size must be at most 16,777,216"),
    ],
    ids=["family", "no family", "no decoder", "type", "heads", "shapes", "stride", "widths", "encoder", "too wide"],
)
def test_a_wrong_config_is_told_and_how(
    tmp_path: Path, checkpoint: Path, refused: Refused, change: Callable[[Any], object], code: int, words: str
) -> None:
    edit(checkpoint / "config.json", change)
    refused(code, words, "export", checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda p: p.update(extra=1), 2, "processor.json: no key named 'extra'"),
        (lambda p: p["prompt"].update(image_token="<nope>"), 2, "the tokenizer has no token '<nope>'"),
        (lambda p: p["image"].update(std=[0, 1, 1]), 2, "image std must be three numbers above 0"),
    ],
    ids=["key", "token", "std"],
)
def test_a_wrong_processor_is_told_and_how(
    tmp_path: Path, checkpoint: Path, refused: Refused, change: Callable[[Any], object], code: int, words: str
) -> None:
    edit(checkpoint / "processor.json", change)
    refused(code, words, "export", checkpoint, tmp_path / "out")


def test_memory_that_runs_out_is_told(
    tmp_path: Path, tiny_checkpoint: Path, bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(target: object, part: object, root: Path, *more: object) -> None:
        (root / "half").write_text("x")
        raise MemoryError

    monkeypatch.setattr("edgevlm.export.to_onnx.OnnxTarget.lower", run_out)
    refused(5, "out of memory", "export", tiny_checkpoint, tmp_path / "out")
    refused(5, "out of memory", "export", tiny_checkpoint, bundle, "--overwrite")


def test_what_is_no_checkpoint_is_told(tmp_path: Path, tiny_bundle: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    refused(2, "does not exist: give a checkpoint's folder, or a shipped name (nano)", "export", tmp_path / "none", out)
    refused(2, "is a bundle, not a model", "export", tiny_bundle, out)
    refused(2, "give the bundle folder once", "export", tiny_bundle)
    refused(2, "give the bundle folder once", "export", tiny_bundle, out, "-o", out)


def test_an_existing_folder_is_only_replaced_when_asked_and_a_bundle(
    tmp_path: Path, tiny_checkpoint: Path, bundle: Path, refused: Refused
) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    exists = "exists already: choose another name or pass --overwrite"
    refused(2, exists, "export", tiny_checkpoint, bundle)
    refused(2, exists, "export", tiny_checkpoint, thesis)
    never = "holds no edgevlm.json, so it is not replaced"
    refused(2, never, "export", tiny_checkpoint, thesis, "--overwrite")
    refused(2, never, "export", tiny_checkpoint, thesis / "chapter.txt", "--overwrite")
    refused(2, "part of it is a file", "export", tiny_checkpoint, thesis / "chapter.txt" / "out")
    refused(2, "the name is too long", "export", tiny_checkpoint, tmp_path / ("x" * 300))


def test_the_current_folder_is_never_replaced(
    tiny_checkpoint: Path, bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle)
    refused(2, "holds the current or the home folder", "export", tiny_checkpoint, bundle, "--overwrite")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, tiny_checkpoint: Path, refused: Refused) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(2, "permission denied; choose another folder", "export", tiny_checkpoint, tmp_path / "locked" / "out")
