"""Every command, link and room that our documents name exists, and the five lines of Python run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from edgevlm import shipped
from edgevlm.cli.app import VERBS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(path for room in ("export", "quant", "runtimes", "bench") for path in (ROOT / room).glob("*.md")),
    ]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(document: Path, *languages: str) -> list[str]:
    """The fenced blocks of one of ``languages``."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if language in languages]


def commands(document: Path) -> list[list[str]]:
    """The ``edgevlm ...`` lines of its shell blocks, continued lines joined, split as a shell does."""
    lines = "\n".join(blocks(document, "sh", "bash", "console")).replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ") for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in typed if line.startswith("edgevlm ")]


@cache
def help_of(*verb: str) -> str:
    """What ``edgevlm VERB --help`` prints, wide and without colours."""
    environment = {"PATH": "", "TERM": "dumb", "COLUMNS": "300", "NO_COLOR": "1", "HOME": "/nonexistent"}
    shown = subprocess.run(
        [sys.executable, "-m", "edgevlm", *verb, "--help"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_documents_exist_with_their_flags(name: str) -> None:
    for command in commands(ROOT / name):
        verb = command[:2] if command[0] == "bundle" else command[:1]
        text = help_of() if command[0].startswith("-") else help_of(*verb)
        for flag in (word.partition("=")[0] for word in command if re.match(r"--?[a-z]", word)):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), f"{' '.join(command)}: no {flag}"


def test_readme_shows_every_verb() -> None:
    shown = {command[0] for command in commands(ROOT / "README.md")}
    assert {verb.name for verb in VERBS} - shown == set()


@pytest.mark.parametrize("name", NAMES)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    document = ROOT / name
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_top_level_room_is_in_the_readme_and_has_its_own() -> None:
    rooms = [room for room in ("export", "quant", "runtimes", "bench") if (ROOT / room).is_dir()]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [room for room in rooms if f"{room}/" not in text or not (ROOT / room / "README.md").exists()] == []


def test_every_package_room_is_in_the_architecture_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (ROOT / "edgevlm").glob("*/__init__.py")]
    assert rooms
    assert [room for room in rooms if f"`{room}`" not in text] == []


@pytest.mark.slow
def test_the_five_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in lines.splitlines() if line]) == 5
    shutil.copy(shipped.DEMO_IMAGE, tmp_path / "table.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "README.md", "exec"), {})
