"""The scripts in the rooms at the top run from start to end, and say what they did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for room in ("export", "quant", "runtimes", "bench")
    for path in (ROOT / room).glob("*.py")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they write; one folder, so that the second one finds what the first one made."""
    return tmp_path_factory.mktemp("walkthroughs")


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_walkthrough_runs(script: Path, folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / script, str(folder)], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip()
