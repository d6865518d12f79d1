"""Exports that are not quite the checkpoint: another size, a shorter context; and what travels with the weights."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgevlm.cli.app import app
from edgevlm.export import pipeline
from edgevlm.export.texts import write_texts
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.runtimes.open import open_bundle
from edgevlm.shipped import DEMO_IMAGE


def manifest(bundle: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((bundle / "edgevlm.json").read_text())
    return values


def test_a_larger_picture_and_a_shorter_context_are_verified_as_such(tmp_path: Path, checkpoint: Path) -> None:
    bundle = tmp_path / "large"
    pipeline.export_bundle(checkpoint, out=bundle, image_size=64, image_fit="center-crop", max_context=96)
    written = manifest(bundle)
    assert (written["image"]["height"], written["image"]["fit"]) == (64, "center-crop")
    assert (written["num_vision_tokens"], written["prompt"]["num_vision_tokens"]) == (16, 16)
    assert written["max_context"] == 96
    assert written["parts"][0]["inputs"][0]["shape"] == ["batch_size", 3, 64, 64]
    with open_bundle(bundle) as vlm:
        assert vlm.max_context == 96
        assert isinstance(vlm.ask(DEMO_IMAGE, "How many?", max_tokens=3).text, str)


def test_a_licence_travels_and_is_shown(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "LICENSE").write_text("Some Model Licence\n\nFor research purposes only.\n")
    (checkpoint / "NOTICE.txt").write_text("Made by someone.\n")
    (checkpoint / "README.md").write_text("---\nlicense: other\nlicense_name: some-amlr\n---\n# A model\n")
    shown = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    sentence = "licence of the weights: some-amlr (for research or non-commercial use), see LICENSE, NOTICE.txt"
    assert sentence in shown.stdout
    assert sentence in shown.stderr
    assert (tmp_path / "out" / "NOTICE.txt").read_text() == "Made by someone.\n"
    assert "LICENSE" in (tmp_path / "out" / "SHA256SUMS").read_text()
    assert manifest(tmp_path / "out")["provenance"]["licence"]["restricted"] is True


def test_what_the_checkpoint_says_already_is_copied_byte_by_byte(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tiny_bundle / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert "licence" not in manifest(tiny_bundle)["provenance"]


def test_a_template_from_elsewhere_and_a_token_more_are_written(tmp_path: Path, checkpoint: Path) -> None:
    template = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    loaded = load_model(checkpoint)
    grown = replace(loaded.processor, tokenizer=loaded.processor.tokenizer.with_special("<placeholder>"))
    write_texts(replace(loaded, processor=grown), tmp_path, None)
    assert Tokenizer.from_folder(tmp_path).has("<placeholder>")
    assert not Tokenizer.from_folder(checkpoint).has("<placeholder>")
    assert (tmp_path / "chat_template.jinja").read_text() == template
    assert ChatTemplate.from_folder(tmp_path).source == template


def test_the_weights_are_out_of_memory_before_the_gate_opens_the_bundle(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Checkpoint] = []

    def load(*arguments: Any, **options: Any) -> Checkpoint:
        loaded.append(load_model(*arguments, **options))
        return loaded[0]

    def verify(root: Path, **options: Any) -> None:
        assert {tensor.numel() for tensor in loaded[0].model.parameters()} == {0}
        raise InterruptedError

    monkeypatch.setattr(pipeline, "load_model", load)
    monkeypatch.setattr(pipeline, "verify_all", verify)
    with pytest.raises(InterruptedError):
        pipeline.export_bundle(checkpoint, out=tmp_path / "out")


def test_a_licence_without_a_name_is_told_by_its_first_line(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "LICENSE").write_text("Apache License\nVersion 2.0\n")
    with caplog.at_level(logging.INFO, "edgevlm"):
        pipeline.export_bundle(checkpoint, out=tmp_path / "out")
    assert "licence of the weights: Apache License, see LICENSE" in caplog.text
