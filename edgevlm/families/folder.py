"""A checkpoint's folder: its JSON files, and of its weights names and shapes alone; each is read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgevlm.core.config import read_json
from edgevlm.families.tensors import WEIGHTS, StoredTensor, read_header, read_headers, read_index


@dataclass(frozen=True)
class ModelFolder:
    """The folder ``path`` with config.json and what stands beside it."""

    path: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json.  Raises InputError when there is none."""
        return read_json(self.path / "config.json")

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the weights by name.  Raises what ``read_headers`` raises: all files must be there."""
        return read_headers(self.path)

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """The names in the weights, or in an index whose files need not be there; none without either."""
        return frozenset(self.tensors if self.has(WEIGHTS) else read_index(self.path))

    def tensor(self, name: str) -> StoredTensor | None:
        """The tensor ``name``; None where the weights lack it, or its file is not there."""
        if self.has(WEIGHTS):
            return self.tensors.get(name)
        file = read_index(self.path).get(name, WEIGHTS)
        found = read_header(self.path / file) if self.has(file) else []
        return next((tensor for tensor in found if tensor.name == name), None)

    def json(self, name: str) -> Mapping[str, Any]:
        """The JSON file ``name``; empty where there is none.  Raises InputError when it is no JSON object."""
        if name not in self._read:
            self._read[name] = read_json(self.path / name) if self.has(name) else {}
        return self._read[name]

    @cached_property
    def _read(self) -> dict[str, Mapping[str, Any]]:
        return {}

    def has(self, name: str) -> bool:
        """Whether the folder holds the file ``name``."""
        return (self.path / name).is_file()
