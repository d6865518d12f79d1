"""What EdgeVLM must know of a kind of checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edgevlm.families.folder import ModelFolder
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint.

    ``config`` reads config.json, ``processor`` the tokenizer and preprocessing files; neither opens the weights.
    ``place`` says where the tensor of a name goes (several places for a fused one), NOT_NEEDED for one that we do not
    compute with, None for a name that this family does not have.  ``suite`` names the evaluation suite that the
    model was trained for, if any.
    """

    name: str
    config: Callable[[ModelFolder], VlmConfig]
    processor: Callable[[ModelFolder, VlmConfig], Processor]
    place: Callable[[str, VlmConfig], Placements | None]
    suite: Callable[[ModelFolder], str] = lambda folder: ""
