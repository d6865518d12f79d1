"""What every export target does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgevlm.bundle.manifest import PartFile
from edgevlm.export.parts import Part


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """How parts are lowered.

    ``half_storage``: weights that float16 holds exactly are stored so; the numbers stay the same.
    """

    half_storage: bool = False


class Target(Protocol):
    """Lowers one part to one file, by tracing it or by writing the graph directly."""

    def __init__(self, lowering: Lowering) -> None: ...

    def lower(self, part: Part, root: Path) -> PartFile:
        """Write the part's file below the bundle folder ``root`` and say what it is."""
        ...
