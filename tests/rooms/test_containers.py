"""The container files: what they copy is there, what they run on is NVIDIA's, and what nobody tried says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgevlm.cli.app import BY_NAME

FILES = sorted((Path(__file__).resolve().parents[2] / "export" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_container_copies_what_is_there_and_runs_edgevlm(file: Path, root: Path) -> None:
    text = file.read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    assert [name for name in copied if not (root / name).exists()] == []
    assert 'ENTRYPOINT ["edgevlm"]' in text
    assert f"docker build -f {file.relative_to(root)}" in text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_container_stands_on_nvidias_image_and_says_that_nobody_ran_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    images = re.findall(r"^(?:FROM|ARG BASE=)\s*(\S+)", text, re.MULTILINE)
    assert [image for image in images if not image.startswith(("nvcr.io/nvidia/", "${BASE}"))] == []
    assert "Not run on hardware yet." in text


def test_every_container_is_explained_with_a_verb_that_exists(root: Path) -> None:
    text = (root / "export" / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in FILES if file.name not in text] == []
    runs = re.findall(r"^\s+edgevlm:jetpack\d (\w+)", text, re.MULTILINE)
    assert runs
    assert set(runs) <= set(BY_NAME)
