"""The scripts in the rooms at the top run from start to end, and say what they did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("export", "quant", "runtimes", "bench")
SCRIPTS = [path.relative_to(ROOT) for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
EXPORTING = [pytest.mark.slow]
SMALLER = {"tensorrt_build_memory.py": ["--small"]}  # what a script is asked for, where the whole would take minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they write; one folder, so that the second one finds what the first one made."""
    return tmp_path_factory.mktemp("walkthroughs")


@pytest.mark.parametrize(
    "script",
    [pytest.param(each, id=str(each), marks=EXPORTING if each.parts[0] == "export" else []) for each in SCRIPTS],
)
def test_walkthrough_runs(script: Path, folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / script, str(folder), *SMALLER.get(script.name, [])],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "is not installed: pip install" in ran.stderr:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip()
