"""The device half alone, in a virtual environment of its own: no PyTorch, and the shipped model answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "How many objects are there?"


def run(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run in ``folder``, away from the checkout, so that nothing is imported from it by chance."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with ``pip install .`` in it, made as a user makes it."""
    folder = tmp_path_factory.mktemp("base")
    made = run([sys.executable, "-m", "venv", "venv"], folder)
    assert made.returncode == 0, made.stderr
    pip = [folder / "venv/bin/python", "-m", "pip"]
    if run([*pip, "download", "--no-deps", "--dest", "probe", "MarkupSafe"], folder).returncode:
        pytest.skip("no package index can be reached: pip has nowhere to install from")
    installed = run([*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", ROOT], folder)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return folder


def test_base_install_has_no_torch(folder: Path) -> None:
    imported = run([folder / "venv/bin/python", "-c", "import torch"], folder)
    assert "ModuleNotFoundError" in imported.stderr


def test_help_answers_without_the_workshop(folder: Path) -> None:
    shown = run([folder / "venv/bin/edgevlm", "--help"], folder)
    assert shown.returncode == 0, shown.stderr
    assert "export" in shown.stdout


def test_shipped_model_answers_as_it_does_in_the_workshop(folder: Path) -> None:
    import edgevlm
    from edgevlm import shipped

    question = ["--image", shipped.DEMO_IMAGE, "--prompt", PROMPT, "--max-tokens", "16"]
    asked = run([folder / "venv/bin/edgevlm", "run", "nano", *question, "--json"], folder)
    assert asked.returncode == 0, asked.stderr
    with edgevlm.open_bundle("nano") as vlm:
        expected = vlm.ask(shipped.DEMO_IMAGE, PROMPT, max_tokens=16)
    assert json.loads(asked.stdout)["text"] == expected.text != ""


def test_workshop_verb_names_the_command_that_installs_it(folder: Path) -> None:
    exported = run([folder / "venv/bin/edgevlm", "export", "nano", "out.bundle", "--target", "onnx"], folder)
    assert exported.returncode == 6
    assert "pip install 'edgevlm[workshop]'" in exported.stderr
    assert not (folder / "out.bundle").exists()


def test_wheel_carries_the_shipped_model_and_the_type_marker(folder: Path) -> None:
    built = run([folder / "venv/bin/python", "-m", "pip", "wheel", "--no-deps", "-w", "wheel", ROOT], folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "edgevlm/py.typed" in names
    assert any(name.startswith("edgevlm/shipped/nano.bundle/") and name.endswith(".onnx") for name in names)
    assert not [name for name in names if not name.startswith(("edgevlm/", "edgevlm-"))]
