"""What a licence allows, as far as its words tell: research alone, or anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.families.licence import read_licence


@pytest.mark.parametrize(
    ("text", "restricted"),
    [
        ("This alternative is allowed only occasionally and noncommercially, and only if", False),  # the GPL
        ("copied in any medium, either commercially or noncommercially", False),
        ("for any purpose, commercial or\n  non-commercial, and by any means", False),
        ("for non-commercial and commercial use alike", False),
        ("You may use it for non-commercial purposes.", True),
        ("NonCommercial means not primarily intended for commercial advantage", True),
        ("only for non\ncommercial use", True),
        ("exclusively for research\npurposes", True),
        ("cc-by-nc-4.0", True),
        ("MIT License", False),
    ],
)
def test_words_that_forbid_commerce_are_told_from_those_that_name_it(
    tmp_path: Path, text: str, restricted: bool
) -> None:
    (tmp_path / "LICENSE").write_text(f"A licence\n\n{text}\n")
    found = read_licence(tmp_path)
    assert found is not None
    assert found.restricted == restricted


@pytest.mark.parametrize("name", ["COPYING", "Copying.LESSER", "acknowledgements.md", "USE_POLICY", "Notice.txt"])
def test_every_usual_name_is_a_licence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("Words\n")
    found = read_licence(tmp_path)
    assert found is not None
    assert found.files == (name,)


def test_a_folder_that_says_nothing_has_no_licence(tmp_path: Path) -> None:
    (tmp_path / "unlicensed.txt").write_text("Words\n")
    assert read_licence(tmp_path) is None
