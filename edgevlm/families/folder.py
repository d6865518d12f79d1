"""A checkpoint's folder: its JSON files, and nothing of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgevlm.core.config import read_json


@dataclass(frozen=True)
class ModelFolder:
    """The folder ``path`` with config.json and what stands beside it."""

    path: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json.  Raises InputError when there is none."""
        return read_json(self.path / "config.json")

    def json(self, name: str) -> Mapping[str, Any]:
        """The JSON file ``name``; empty where there is none.  Raises InputError when it is no JSON object."""
        return read_json(self.path / name) if self.has(name) else {}

    def has(self, name: str) -> bool:
        """Whether the folder holds the file ``name``."""
        return (self.path / name).is_file()
