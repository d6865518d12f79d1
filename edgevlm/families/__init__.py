"""Checkpoints of other projects: what their configs, tensor names and preprocessing mean.  No PyTorch, no weights.

A family is one module here and one line in this table, whose keys are the ``model_type`` of config.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgevlm.core.registry import Registry

if TYPE_CHECKING:
    from edgevlm.families.family import Family

FAMILIES: Registry[Family] = Registry(
    "model family",
    {
        "edgevlm": "edgevlm.families.native:FAMILY",
        "fast_vlm": "edgevlm.families.fastvlm:FAMILY",
        "idefics3": "edgevlm.families.idefics3:FAMILY",
        "llava": "edgevlm.families.llava:FAMILY",
        "llava_llama": "edgevlm.families.llava_original:FAMILY",
        "llava_mini_llama": "edgevlm.families.llava_mini:FAMILY",
        "llava_next": "edgevlm.families.llava:FAMILY",
        "llava_qwen2": "edgevlm.families.fastvlm_original:FAMILY",
        "mqt": "edgevlm.families.mqt:FAMILY",
        "nanovlm": "edgevlm.families.nanovlm:FAMILY",
        "smolvlm": "edgevlm.families.idefics3:FAMILY",
    },
    group="edgevlm.families",
)
