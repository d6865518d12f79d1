"""Matryoshka Query Transformer on LLaVA-1.5: learned queries in the place of the two Linears, 1 to 256 tokens.

``num_visual_tokens`` in config.json is the budget m.  Training leaves a word there (``first_stage``, ``second_stage``),
for which we take all queries; give a number, or ``vision_tokens`` when loading, for less.

Source: Hu et al. 2024, arXiv:2405.19315.
"""

from __future__ import annotations

import re
from typing import Any

from edgevlm.core.config import shown
from edgevlm.core.errors import ConfigError
from edgevlm.families.decoders import decoder_config
from edgevlm.families.detect import QUERIES
from edgevlm.families.family import Family, Placement, Placements, thirds
from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava_layout import llava_processor, llava_vision, place_llava
from edgevlm.shapes.config import QueriesConfig, VlmConfig

NUM_QUERIES = 256
DIGITS = re.compile(r"\d{1,9}")
STAGES = ("first_stage", "second_stage")
KEPT = ("query", "pos_embed", *(f"{name}.{kind}" for name in ("ln_q", "ln_k", "ln_v") for kind in ("weight", "bias")))


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes.  Raises ConfigError for a budget that is no number from 1 to 256."""
    values, where = folder.config, str(folder.path / "config.json")
    budget = num_queries(values.get("num_visual_tokens"), where=where)
    return VlmConfig(
        vision=llava_vision(folder),
        projector=QueriesConfig(num_queries=budget, table_size=NUM_QUERIES),
        decoder=decoder_config(values, "llama", where=where),
        model_type="mqt",
    )


def num_queries(value: Any, *, where: str) -> int:
    """The budget that ``num_visual_tokens`` states: a number, a number as text, or a stage of training for all."""
    if value is None or value in STAGES:
        return NUM_QUERIES
    number = int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else value
    if type(number) is not int or not 1 <= number <= NUM_QUERIES:
        raise ConfigError(
            f"{where}: num_visual_tokens is {shown(value)}; expected 1 to {NUM_QUERIES}, or {' or '.join(STAGES)} "
            f"for all"
        )
    return number


def place(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor of the queries goes, or of the parts that are LLaVA's."""
    return place_queries(name.removeprefix(QUERIES)) if name.startswith(QUERIES) else place_llava(name, config)


def place_queries(name: str) -> Placements | None:
    """Where a tensor of the abstractor goes; its attention keeps query, key and value in one matrix."""
    if name in KEPT:
        return (Placement(name=f"projector.{name}"),)
    if name == "proj":
        return (Placement(name="projector.proj.weight", transpose=True),)
    if name.startswith("attn.out_proj."):
        return (Placement(name=f"projector.{name.removeprefix('attn.')}"),)
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        return thirds("projector", name.removeprefix("attn.in_proj_"))
    return None


FAMILY = Family(name="mqt", config=config, processor=llava_processor, place=place)
