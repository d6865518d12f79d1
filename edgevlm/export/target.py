"""What every export target does."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgevlm.bundle.manifest import PartFile
from edgevlm.export.parts import Part


class Target(Protocol):
    """Lowers one part to one file, by tracing it or by writing the graph directly."""

    def __init__(self, *, half_storage: bool = False) -> None: ...

    def lower(self, part: Part, root: Path) -> PartFile:
        """Write the part's file below the bundle folder ``root`` and say what it is."""
        ...
