"""``edgevlm inspect`` on what people have: checkpoints, bundles, and things that are neither."""

from __future__ import annotations

import json
import shutil
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


def test_a_bundle_without_the_config_of_its_graphs_is_read_by_its_config_json(
    tmp_path: Path, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    new = Path(shutil.copytree(tiny_bundle, tmp_path / "new"))
    old = Path(shutil.copytree(tiny_bundle, tmp_path / "old"))
    values = json.loads((old / "edgevlm.json").read_text())
    assert values.pop("model")["decoder"]["hidden_size"] == 64
    (old / "edgevlm.json").write_text(json.dumps({**values, "max_context": 77}))
    shutil.copyfile(tiny_checkpoint / "config.json", old / "config.json")  # such bundles held the checkpoint's own
    (new / "config.json").write_text("{}")  # never looked at
    for folder, max_context in ((new, 128), (old, 77)):
        result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["max_context"] == max_context


def test_a_manifest_whose_model_is_none_is_damage(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    values = json.loads((bundle / "edgevlm.json").read_text())
    values["model"]["decoder"]["hidden_size"] = "64"
    (bundle / "edgevlm.json").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert result.exit_code == 7
    assert "edgevlm.json: model: decoder: hidden_size must be int" in result.stderr


def test_a_revision_of_what_is_no_hub_id_ends_with_code_2(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    for path in (tiny_checkpoint, tiny_bundle):
        result = CliRunner().invoke(app, ["inspect", str(path), "--revision", "v1"])
        assert result.exit_code == 2
        assert "is no hub id, so it has no revision 'v1'" in result.stderr
