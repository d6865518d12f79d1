"""`edgevlm tune` through the command line: what it finds is followed, and what others found stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from typer.testing import CliRunner

from edgevlm import open_bundle
from edgevlm.cli.app import app
from edgevlm.core.hardware import compute_cores
from edgevlm.runtimes.choices import Wishes
from edgevlm.verify import verify_bundle

Reseal: TypeAlias = Callable[..., None]
SHORT = ["--runtime", "onnxruntime", "--rounds", "1", "-r", "1", "-n", "2"]


def tune(bundle: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["tune", str(bundle), *SHORT, *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_was_tuned_is_followed_and_other_machines_keep_theirs(bundle: Path) -> None:
    file = bundle / "tune.json"
    found = json.loads(tune(bundle, "--json"))
    assert Path(found["file"]) == file
    assert {one["half"] for one in found["tuning"]["tried"]} == {"encoder", "decoder"}
    assert all(one["trial"]["peak_bytes"] > 0 for one in found["tuning"]["tried"])
    ((key, ours),) = json.loads(file.read_text())["machines"].items()
    best = ours["choices"]["ttft"]
    with open_bundle(bundle) as vlm:
        assert vlm.info["threads"] == best["decoder"]["threads"]
        assert vlm.info["encoder"]["threads"] == best["encoder"]["threads"]

    best["encoder"]["threads"] = compute_cores() + 1  # what nobody would choose
    file.write_text(json.dumps({"schema": 1, "machines": {key: ours, "another machine": ours}}))
    with open_bundle(bundle) as vlm:
        assert vlm.info["encoder"]["threads"] == best["encoder"]["threads"]
    asked = [verify_bundle(bundle, wishes).runtime for wishes in (Wishes(), Wishes(optimize="ttft"))]
    assert [one["encoder"]["threads"] == best["encoder"]["threads"] for one in asked] == [False, True]

    assert "open_bundle follows: throughput" in tune(bundle, "--optimize", "throughput")
    machines = json.loads(file.read_text())["machines"]
    assert machines["another machine"] == ours
    assert machines[key]["goal"] == "throughput"
    assert machines[key]["choices"]["ttft"]["encoder"]["threads"] <= compute_cores()


def test_a_bundle_of_which_nothing_passes_the_gate_is_not_tuned(bundle: Path, reseal: Reseal) -> None:
    def other_colours(manifest: dict[str, Any]) -> None:
        manifest["image"]["mean"] = [0.2, 0.2, 0.2]

    reseal(bundle, other_colours)
    result = CliRunner().invoke(app, ["tune", str(bundle), *SHORT])
    assert result.exit_code == 9
    assert "passes the gate, so there is nothing to choose" in result.stderr
    assert not (bundle / "tune.json").exists()
