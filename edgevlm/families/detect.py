"""Which family a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Collection

from edgevlm.core.errors import UnsupportedError
from edgevlm.families import FAMILIES
from edgevlm.families.family import Family
from edgevlm.families.folder import ModelFolder


def family_of(folder: ModelFolder) -> Family:
    """The family that config.json names, or that its keys tell.  Raises UnsupportedError for an unknown one."""
    return FAMILIES[model_type(folder)]


def model_type(folder: ModelFolder) -> str:
    """The key in FAMILIES; some projects write none, or that of the project they started from."""
    config = folder.config
    found = config.get("model_type")
    if found is None and "vit_model_type" in config:
        return "nanovlm"
    if isinstance(found, str) and found.startswith("llava"):
        return _kind_of_llava(found, config.keys())
    if not isinstance(found, str):
        raise UnsupportedError(f"{folder.path / 'config.json'} names no model_type; known: {', '.join(FAMILIES)}")
    return found


def _kind_of_llava(found: str, keys: Collection[str]) -> str:
    """The original project and its children wrote ``llava``, too; ``mm_vision_tower`` is a key of theirs alone.

    ``num_visual_tokens`` is the budget of a Matryoshka Query Transformer, whose ``model_type`` is its parent's.
    """
    if "num_visual_tokens" in keys and "mm_vision_tower" in keys:
        return "mqt"
    if found == "llava" and "mm_vision_tower" in keys:
        return "llava_llama"
    return found
