from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgevlm.core.errors import MissingLibraryError, UnsupportedError
from edgevlm.core.optional import fix_command, is_installed, libraries, require, versions
from edgevlm.core.registry import Registry, unknown_name

COLORS: Registry[object] = Registry("color", {"Red": "math:pi", "blue": "math:nowhere", "far": "no_such_lib:x"})


def test_a_name_gives_the_object_behind_its_reference() -> None:
    assert COLORS["Red"] == pytest.approx(3.14159, abs=1e-5)
    assert list(COLORS) == ["Red", "blue", "far"]
    assert len(COLORS) == 3
    assert "Red" in COLORS
    assert COLORS.get("green", "none") == "none"


@pytest.mark.parametrize("wrong", ["red", "RED", "Rad"])
def test_an_unknown_name_lists_the_known_and_suggests_the_nearest(wrong: str) -> None:
    with pytest.raises(UnsupportedError, match=r"known: Red, blue, far\. Did you mean 'Red'\?"):
        COLORS[wrong]


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert unknown_name("key", "zzz", ["alpha"]) == "no key named 'zzz'; known: alpha."
    assert unknown_name("key", "zzz", []) == "no key named 'zzz'; known: none."


def test_an_entry_whose_library_is_missing_tells_how_to_install_it() -> None:
    with pytest.raises(MissingLibraryError, match="no_such_lib is not installed: pip install no_such_lib"):
        COLORS["far"]


@pytest.mark.parametrize("reference", ["json.nosuch:Thing", "edgevlm.nosuch:Thing"])
def test_a_wrong_module_of_an_installed_library_names_the_entry_not_the_library(reference: str) -> None:
    entries: Registry[object] = Registry("color", {"odd": reference})
    with pytest.raises(UnsupportedError, match=f"^color 'odd' does not load from '{reference}': No module named"):
        entries["odd"]


def test_our_own_wrong_reference_is_a_bug_and_shows_as_one() -> None:
    with pytest.raises(AttributeError):
        COLORS["blue"]


def test_another_package_adds_entries_and_its_broken_ones_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "guest-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[test.colors]\ngreen = math:e\nblack = math:nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    colors: Registry[object] = Registry("color", {"red": "math:pi"}, group="test.colors")
    assert list(colors) == ["black", "green", "red"]
    assert colors["green"] == pytest.approx(2.71828, abs=1e-5)
    with pytest.raises(UnsupportedError, match="'black' of another package does not load"):
        colors["black"]


def test_require_gives_the_module_or_the_command() -> None:
    assert require("math").__name__ == "math"
    with pytest.raises(MissingLibraryError) as caught:
        require("no_such_lib.part")
    assert caught.value.fix == "pip install no_such_lib"


def test_require_names_the_library_that_really_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leans_on_another.py").write_text("import no_such_base\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingLibraryError, match=r"^no_such_base is not installed"):
        require("leans_on_another")


def test_a_library_that_does_not_load_is_told_apart_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingLibraryError, match=r"is installed but does not load \(libcudart.so.12"):
        require("broken_library")


def test_a_missing_module_of_an_installed_library_is_told_apart_from_a_missing_library() -> None:
    with pytest.raises(MissingLibraryError, match=r"^json is installed but does not load \(No module named"):
        require("json.nosuch")


def test_is_installed_answers_without_importing() -> None:
    sys.modules.pop("wave", None)
    assert is_installed("wave")
    assert "wave" not in sys.modules
    assert not is_installed("no_such_lib")
    assert not is_installed("no_such_lib.part")


def test_fix_commands_name_the_extra_or_the_package() -> None:
    assert fix_command("torch") == "pip install 'edgevlm[workshop]'"
    assert fix_command("PIL") == "pip install pillow"


def test_libraries_tell_version_or_fix_never_both() -> None:
    for library in libraries():
        assert (library.version is None) != (library.fix is None)


def test_versions_skip_what_is_absent_and_name_the_variant_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "onnxruntime_openvino-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-openvino\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = versions(("numpy", "no-such-package", "onnxruntime"))
    assert found["onnxruntime-openvino"] == "1.2"
    assert set(found) <= {"numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"}
    assert "numpy" in found
