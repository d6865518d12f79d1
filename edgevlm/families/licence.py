"""Under which licence a checkpoint stands: what its own files say, which is no legal advice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgevlm.core.config import read_text
from edgevlm.core.errors import InputError

FILES = (
    "license",
    "licence",
    "notice",
    "use_policy",
    "copying",
    "acknowledgements",
    "acknowledgments",
)  # and more after
FILE_NAME = re.compile(rf"({'|'.join(FILES)})[\w.-]*", re.IGNORECASE | re.ASCII)
# Not "noncommercially" in the GPL, nor "commercial or non-commercial" where both are allowed.
RESTRICTED = re.compile(
    r"(?<!commercial or )(?<!commercial and )\bnon[- ]?commercial\b(?! (?:or|and) commercial)"
    r"|research purposes|research[- ]only|\bcc-by-nc|\bamlr\b",
    re.IGNORECASE,
)
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
MAX_LETTERS = 80


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What a folder says: a ``name`` (of README.md, else the first line of the text), and the ``files`` of the text.

    ``restricted`` tells that some of it speaks of research or of non-commercial use only.
    """

    name: str
    files: tuple[str, ...]
    restricted: bool

    def __str__(self) -> str:
        where = f", see {', '.join(self.files)}" if self.files else ""
        return f"{self.name or 'not named'}{' (for research or non-commercial use)' if self.restricted else ''}{where}"


def read_licence(folder: Path) -> Licence | None:
    """The licence of the checkpoint in ``folder``; None where nothing is said."""
    files = tuple(sorted(path.name for path in folder.iterdir() if FILE_NAME.fullmatch(path.name) and path.is_file()))
    texts = [_text(folder / name) for name in files]
    name = _named(_text(folder / "README.md")) or next(filter(None, map(_title, texts)), "")
    if not (name or files):
        return None
    return Licence(name=name, files=files, restricted=any(map(_is_restricted, (name, *texts))))


def _named(readme: str) -> str:
    """What the hub's front matter says: ``license_name`` where ``license`` is ``other``."""
    block = FRONT_MATTER.search(readme)
    lines = block[1].splitlines() if block else []
    fields = {key.strip(): value.strip(" \t'\"") for key, _, value in (line.partition(":") for line in lines)}
    names = (fields.get("license_name"), fields.get("license"))
    return _printable(next((name for name in names if name and name != "other"), ""))


def _is_restricted(text: str) -> bool:
    return RESTRICTED.search(" ".join(text.split())) is not None


def _title(text: str) -> str:
    return _printable(next(filter(None, map(str.strip, text.splitlines())), ""))


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text))[:MAX_LETTERS]


def _text(path: Path) -> str:
    try:
        return read_text(path) if path.is_file() else ""
    except InputError:  # not UTF-8; the file is copied all the same
        return ""
