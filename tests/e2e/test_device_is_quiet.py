"""A device process leaves no identifiers behind, and works for a parent that closed its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgevlm.shipped import DEMO_IMAGE

RUN = [
    sys.executable,
    "-m",
    "edgevlm",
    "run",
    "nano",
    "--image",
    str(DEMO_IMAGE),
    "--prompt",
    "How many objects are there?",
]


def test_a_fresh_home_holds_nothing_but_our_own_cache(tmp_path: Path) -> None:
    """ONNX Runtime would write a device id on import and try to reach its maker."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "EDGEVLM_CACHE": str(tmp_path / "edgevlm")}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run([*RUN, "-q"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "5", "")
    others = [path for path in tmp_path.rglob("*") if path.is_file() and "edgevlm" not in path.parts]
    assert others == []


def test_a_closed_stdout_is_no_crash() -> None:
    command = " ".join(f"'{word}'" for word in RUN) + " >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
