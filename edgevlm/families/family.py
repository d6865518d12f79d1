"""What EdgeVLM must know of a kind of checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.folder import ModelFolder
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor
from edgevlm.shapes.config import VlmConfig


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a tensor of a checkpoint goes: ``name`` in our model, after the changes in the order of the fields.

    ``squeeze`` drops leading axes of 1, ``part`` (k, n) takes the k-th of n equal blocks of rows, ``transpose``
    swaps the two axes of a matrix.
    """

    name: str
    squeeze: bool = False
    part: tuple[int, int] = (0, 1)
    transpose: bool = False


Placements: TypeAlias = tuple[Placement, ...]
NOT_NEEDED: Placements = ()  # known, and no part of what we compute


def thirds(inside: str, kind: str) -> Placements:
    """Where a matrix or bias goes in which the query, key and value projections of ``inside`` are stacked."""
    return tuple(Placement(name=f"{inside}.{part}_proj.{kind}", part=(k, 3)) for k, part in enumerate("qkv"))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint.

    ``config`` reads config.json, ``processor`` the tokenizer and preprocessing files; neither opens the weights.
    ``place`` says where the tensor of a name goes (several places for a fused one), NOT_NEEDED for one that we do not
    compute with, None for a name that this family does not have.  ``suite`` names the evaluation suite that the
    model was trained for, if any.  ``tiles``, of families that cut pictures into tiles, says how, without the
    tokenizer's files.
    """

    name: str
    config: Callable[[ModelFolder], VlmConfig]
    processor: Callable[[ModelFolder, VlmConfig], Processor]
    place: Callable[[str, VlmConfig], Placements | None]
    suite: Callable[[ModelFolder], str] = lambda folder: ""
    tiles: Callable[[ModelFolder, VlmConfig], ImageSpec] | None = None

    def __post_init__(self) -> None:
        read, prepare = self.config, self.processor

        def config(folder: ModelFolder) -> VlmConfig:
            with _naming(folder, folder.path / "config.json"):
                return read(folder)

        def processor(folder: ModelFolder, config: VlmConfig) -> Processor:
            with _naming(folder, folder.path):
                return prepare(folder, config)

        object.__setattr__(self, "config", config)
        object.__setattr__(self, "processor", processor)


@contextmanager
def _naming(folder: ModelFolder, where: Path) -> Iterator[None]:
    """Put ``where`` in front of a refusal that does not say which file or folder it is about."""
    try:
        yield
    except (ConfigError, UnsupportedError) as error:
        if str(error).startswith((str(folder.path), str(where))):
            raise
        raise type(error)(f"{where}: {error}") from error
