"""Libraries that an extra brings: how they are imported, and what is said when they are not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgevlm.core import optional
from edgevlm.core.optional import fix_command, libraries, require


def write_modules(folder: Path, **sources: str) -> None:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to import from: ``asking`` wants ``reporter``, and does without."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(optional, "NOT_WANTED_BY", {"asking": "reporter"})
    write_modules(
        tmp_path,
        reporter="",
        asking="try:\n    import reporter\n    REPORTS = True\nexcept ImportError:\n    REPORTS = False\n",
        broken="raise OSError('no such shared library')",
    )
    for name in ("asking", "reporter"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_what_a_library_would_report_with_is_hidden_while_it_is_imported(modules: Path) -> None:
    assert require("asking").REPORTS is False
    assert require("reporter").__name__ == "reporter"  # and there again afterwards


def test_what_somebody_else_imported_already_stays(modules: Path) -> None:
    reporter = require("reporter")
    assert require("asking").REPORTS is True
    assert sys.modules["reporter"] is reporter


def test_telemetry_of_openvino_is_what_is_hidden() -> None:
    assert optional.NOT_WANTED_BY == {"openvino": "openvino_telemetry"}


def test_openvino_is_one_of_the_libraries_with_its_extra() -> None:
    assert fix_command("openvino") == "pip install 'edgevlm[openvino]'"
    (found,) = (library for library in libraries() if library.module == "openvino")
    assert found.used_for.startswith("device")
    assert (found.version is None) == (found.fix is not None)
