"""How one picture becomes several views, each as large as the vision encoder reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgevlm.core.errors import ConfigError

MAX_EDGE = 16_384
MAX_PER_SIDE = 16


@dataclass(frozen=True, kw_only=True)
class Idefics3Tiles:
    """The longest edge becomes ``longest_edge``, both sides go up to whole tiles; the whole picture comes last.

    ``enabled`` false keeps the last view alone.  Idefics3 (arXiv 2408.12637), SmolVLM (arXiv 2504.05299).
    """

    type: Literal["idefics3"] = "idefics3"
    longest_edge: int = 2048
    enabled: bool = True

    def __post_init__(self) -> None:
        _check_int("longest_edge", self.longest_edge, MAX_EDGE)


@dataclass(frozen=True, kw_only=True)
class NanoVlmTiles:
    """The long side becomes ``longest_edge``, the short one goes up to whole tiles; the whole picture comes first.

    ``enlarge`` false takes the next whole tile above the long side where that is less.  A picture of one tile
    is that tile alone, and ``enabled`` false makes every picture one.  nanoVLM's current default.
    """

    type: Literal["nanovlm"] = "nanovlm"
    longest_edge: int = 2048
    enlarge: bool = True
    enabled: bool = True

    def __post_init__(self) -> None:
        _check_int("longest_edge", self.longest_edge, MAX_EDGE)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """``per_side``² crops of the picture, each preprocessed by itself, then the whole picture.

    They are views of one picture, which the model compresses together.  LLaVA-Mini HD (arXiv 2501.03895).
    """

    type: Literal["crops"] = "crops"
    per_side: int = 2

    def __post_init__(self) -> None:
        _check_int("per_side", self.per_side, MAX_PER_SIDE, least=2)


Split: TypeAlias = Idefics3Tiles | NanoVlmTiles | Crops


def most_tiles(split: Split | None, tile: tuple[int, int]) -> tuple[int, int]:
    """The most rows and columns of tiles (height, width) that a picture can have."""
    if not isinstance(split, (Idefics3Tiles, NanoVlmTiles)) or not split.enabled:
        return (1, 1)
    return -(-split.longest_edge // tile[0]), -(-split.longest_edge // tile[1])


def _check_int(name: str, value: object, most: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"image split {name} must be a whole number from {least} to {most}; found {value!r}")
