"""`edgevlm eval`: scores with all that it takes to get them again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgevlm.bundle.write import write_sums
from edgevlm.cli.app import app
from edgevlm.evaluation import EVAL_SEED


def evaluate(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--num-scenes", "2", "--json", "-q"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_record_names_the_bundle_the_questions_and_the_versions(tiny_bundle: Path) -> None:
    record = evaluate(tiny_bundle)
    assert record["bundle_sha256"] == hashlib.sha256((tiny_bundle / "SHA256SUMS").read_bytes()).hexdigest()
    assert (record["suite"], record["num_scenes"]) == ("scenes", 2)
    assert record["seed"] == EVAL_SEED
    assert {"python", "edgevlm", "numpy"} <= record["versions"].keys()
    assert [score["control"] for score in record["scores"]] == [None, "shuffled", "blank", "majority"]
    assert record["scores"][0]["overall"]["total"] == record["num_questions"]


@pytest.mark.parametrize("suite", ["", "scenes"])
def test_the_suite_is_that_of_the_bundle_or_else_the_scenes(tiny_bundle: Path, tmp_path: Path, suite: str) -> None:
    bundle = with_suite(tiny_bundle, tmp_path, suite)
    assert evaluate(bundle, "--no-controls")["suite"] == "scenes"


def test_a_bundle_whose_suite_nobody_knows_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_suite(tiny_bundle, tmp_path, "photos")
    result = CliRunner().invoke(app, ["eval", str(bundle)])
    assert result.exit_code == 3
    assert "no evaluation suite named 'photos'; known: scenes" in result.stderr
    assert evaluate(bundle, "--suite", "scenes", "--no-controls")["suite"] == "scenes"


@pytest.mark.parametrize("verb", ["eval", "verify"])
def test_hashes_are_compared_unless_told_otherwise(tiny_bundle: Path, tmp_path: Path, verb: str) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with (bundle / "tokenizer.json").open("a") as stream:
        stream.write("\n")
    options = ["--num-scenes", "2", "--no-controls"] if verb == "eval" else []
    assert CliRunner().invoke(app, [verb, str(bundle), *options]).exit_code == 7
    result = CliRunner().invoke(app, [verb, str(bundle), "--no-check", *options])
    assert result.exit_code == 0, result.stderr


def with_suite(bundle: Path, folder: Path, suite: str) -> Path:
    """A copy whose manifest names ``suite``."""
    copy = Path(shutil.copytree(bundle, folder / "copy"))
    manifest = json.loads((copy / "edgevlm.json").read_text())
    (copy / "edgevlm.json").write_text(json.dumps({**manifest, "suite": suite}))
    write_sums(copy)
    return copy
