"""Shipped names and paths: a name that could be either is refused, a path is always a path."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgevlm
from edgevlm.core.errors import EdgeVLMError, MissingLibraryError, UnsupportedError, UsageError
from edgevlm.shipped import HERE, find_bundle


def test_a_shipped_name_stands_in_the_package() -> None:
    assert find_bundle("nano") == HERE / "nano.bundle"


@pytest.mark.parametrize("name", ["nanu", "fastvlm-0.5b", "nano.bundel"])
def test_an_unknown_name_is_unsupported(name: str) -> None:
    with pytest.raises(UnsupportedError, match="known: nano"):
        find_bundle(name)


def test_a_folder_called_like_a_shipped_model_must_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"write \./nano"):
        find_bundle("nano")
    assert find_bundle("./nano") == Path("nano")
    assert find_bundle(Path("nano")) == Path("nano")


def test_public_names_come_when_asked_for() -> None:
    assert edgevlm.EdgeVLMError is EdgeVLMError
    assert edgevlm.__version__[0].isdigit()
    assert {"export_bundle", "open_bundle"} <= set(dir(edgevlm))
    with pytest.raises(AttributeError, match="no attribute 'opne_bundle'"):
        edgevlm.opne_bundle  # noqa: B018


def test_the_workshop_without_pytorch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(edgevlm, "import_module", absent)
    with pytest.raises(MissingLibraryError, match=r"pip install 'edgevlm\[workshop\]'"):
        edgevlm.export_bundle  # noqa: B018
