"""``edgevlm inspect`` on what people have: checkpoints, bundles, and things that are neither."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from edgevlm.cli.app import app


def test_a_bundle_lists_its_files(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tiny_bundle)])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("in the bundle") == 3


def test_a_checkpoint_and_its_bundle_have_the_same_card(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    cards = [
        json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout)
        for path in (tiny_checkpoint, tiny_bundle)
    ]
    assert cards[0]["parts"] == cards[1]["parts"]
    assert (len(cards[0]["bundle"]), len(cards[1]["bundle"])) == (0, 3)


def test_an_image_size_that_the_encoder_cannot_take_ends_with_code_3(tiny_checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tiny_checkpoint), "--image-size", "33"])
    assert result.exit_code == 3
    assert "multiple of 16" in result.stderr
