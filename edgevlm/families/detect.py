"""Which family a checkpoint belongs to."""

from __future__ import annotations

from edgevlm.core.config import shown
from edgevlm.core.errors import UnsupportedError
from edgevlm.families import FAMILIES
from edgevlm.families.family import Family
from edgevlm.families.folder import ModelFolder
from edgevlm.families.values import known_name

TYPO = 0.85  # families have names like each other's, and are not each other
QUERIES = "model.query_abstractor."  # in the weights of an MQT


def family_of(folder: ModelFolder) -> Family:
    """The family that config.json names, or that its keys tell.  Raises UnsupportedError for an unknown one."""
    where = str(folder.path / "config.json")
    return FAMILIES[known_name("model family", model_type(folder), FAMILIES, where=where, likeness=TYPO)]


def model_type(folder: ModelFolder) -> str:
    """The key in FAMILIES; some projects write none, or that of the project they started from."""
    config = folder.config
    found = config.get("model_type")
    if found is None and "vit_model_type" in config:
        return "nanovlm"
    if isinstance(found, str) and found.startswith("llava"):
        return _kind_of_llava(found, folder)
    if not isinstance(found, str):
        what = "names no model_type" if found is None else f"has the model_type {shown(found)}"
        raise UnsupportedError(f"{folder.path / 'config.json'} {what}; known: {', '.join(FAMILIES)}")
    return found


def _kind_of_llava(found: str, folder: ModelFolder) -> str:
    """The original project and its children wrote ``llava``, too; ``mm_vision_tower`` is a key of theirs alone.

    A Matryoshka Query Transformer, whose ``model_type`` is its parent's, has a budget ``num_visual_tokens`` in its
    config, or at least learned queries among its weights.
    """
    if "mm_vision_tower" not in folder.config:
        return found
    if "num_visual_tokens" in folder.config or any(name.startswith(QUERIES) for name in folder.tensor_names):
        return "mqt"
    return "llava_llama" if found == "llava" else found
