"""The rooms import downwards only, and the device half never meets PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEVICE_ROOMS = ("core", "shipped", "bundle", "processing", "shapes", "runtimes", "verify", "evaluation", "bench")

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "timm"):
    sys.modules[name] = None  # importing it now raises ImportError
for room in sys.argv[1:]:
    package = importlib.import_module(f"edgevlm.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"edgevlm.{room}."):
        importlib.import_module(module.name)
"""


def test_import_contracts_are_kept(root: Path) -> None:
    command = [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"]
    linted = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_every_device_module_imports_where_torch_cannot_be_imported(root: Path) -> None:
    imported = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, *DEVICE_ROOMS], cwd=root, capture_output=True, text=True
    )
    assert imported.returncode == 0, imported.stderr
