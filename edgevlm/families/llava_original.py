"""LLaVA in its own project's layout: CLIP, one or two Linears, Llama or Vicuna.

``model_type`` is ``llava_llama``, or ``llava`` in older files.  A checkpoint without the vision encoder, which its
config only names, is refused, since nothing here downloads.  A model trained on tiles (``anyres``) sees the whole
picture alone.

Source: Liu et al. 2023, arXiv:2310.03744.
"""

from __future__ import annotations

from edgevlm.families.decoders import decoder_config
from edgevlm.families.family import Family
from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava_layout import llava_processor, llava_projector, llava_vision, place_llava
from edgevlm.shapes.config import VlmConfig


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes.  Raises UnsupportedError where the vision encoder is missing or unknown."""
    return VlmConfig(
        vision=llava_vision(folder),
        projector=llava_projector(folder),
        decoder=decoder_config(folder.config, "llama", where=str(folder.path / "config.json")),
        model_type="llava_llama",
    )


FAMILY = Family(name="llava_llama", config=config, processor=llava_processor, place=place_llava)
