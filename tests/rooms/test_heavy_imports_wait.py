"""What is not needed is not imported: help is quick because PyTorch is not asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "numpy", "PIL", "tokenizers")

SHOW_HEAVY = f"""
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {{statement}}
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def heavy_modules_after(statement: str, root: Path) -> list[str]:
    """Which heavy modules a fresh Python holds after ``statement``."""
    code = SHOW_HEAVY.format(statement=statement)
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    loaded: list[str] = json.loads(ran.stdout)
    return loaded


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["run", "--help"], ["export", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str], root: Path) -> None:
    statement = f"sys.argv = ['edgevlm', *{arguments!r}]; from edgevlm.cli.app import main; main()"
    assert heavy_modules_after(statement, root) == []


def test_importing_the_package_imports_nothing_heavy(root: Path) -> None:
    assert heavy_modules_after("import edgevlm", root) == []
