"""What `make` does before anything else: does .venv fit the Python that was asked for?"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = sys.version.split()[0]


@pytest.fixture
def environment(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on a folder of its own, in which nothing is installed or created for real."""
    spec = importlib.util.spec_from_file_location("ci_environment", root / ".ci/environment.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv/edgevlm-installed")
    return module


@pytest.fixture
def commands(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What it would have run."""
    ran: list[list[str]] = []
    monkeypatch.setattr(environment, "run", ran.append)
    monkeypatch.setattr(environment, "attempt", lambda command: not command)  # what it may do without fails
    return ran


def hold(environment: ModuleType, version: str) -> None:
    """A finished .venv whose Python calls itself ``version``."""
    environment.PYTHON.parent.mkdir(parents=True)
    environment.PYTHON.write_text(f"#!/bin/sh\necho {version}\n")
    environment.PYTHON.chmod(0o755)
    environment.STAMP.write_text(environment.fingerprint())


@pytest.mark.parametrize(
    ("version", "arguments", "is_built_anew"),
    [("3.10.1", ["--this-python"], True), (HERE, ["--this-python"], False), ("3.10.1", [], False)],
)
def test_a_venv_of_another_python_is_built_anew_when_one_is_named(
    environment: ModuleType,
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    arguments: list[str],
    is_built_anew: bool,
) -> None:
    hold(environment, version)
    monkeypatch.setattr(sys, "argv", ["environment.py", *arguments])
    environment.main()
    assert (["--clear" in command for command in commands] == [True]) is is_built_anew
    assert (f"holds Python {version}, PYTHON asks for {HERE}" in capsys.readouterr().err) is is_built_anew


def test_an_environment_without_the_engine_builder_is_ready(
    environment: ModuleType, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    hold(environment, HERE)
    environment.install()
    assert environment.is_ready()
    assert commands
    assert capsys.readouterr().err.count("no TensorRT-RTX builder") == 1


def test_another_engine_builder_is_another_environment(environment: ModuleType, root: Path) -> None:
    """The packages stand in the script, whose bytes the fingerprint holds."""
    script = (root / ".ci/environment.py").read_text()
    assert all(package in script for package in environment.ENGINE_BUILDER)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(("arguments", "is_named"), [([], False), ([f"PYTHON={sys.executable}"], True)])
def test_make_says_whether_somebody_named_a_python(root: Path, arguments: list[str], is_named: bool) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    shown = subprocess.run(
        ["make", "-n", "environment", *arguments], cwd=root, env=variables, capture_output=True, text=True, check=True
    )
    assert ("--this-python" in shown.stdout) is is_named
