"""FastVLM as Apple released it: LLaVA's layout (``llava_qwen2``) around a MobileCLIP tower.

The conversation stands in LLaVA's code, not in the folder, whose own template knows no pictures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm.core.config import shown
from edgevlm.core.errors import UnsupportedError
from edgevlm.families.decoders import decoder_config, place_decoder
from edgevlm.families.family import NOT_NEEDED, Family, Placement, Placements
from edgevlm.families.fastvlm import TEMPLATE, TRAINED, make_processor
from edgevlm.families.folder import ModelFolder
from edgevlm.families.values import require
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.image_spec import Fit
from edgevlm.processing.processor import Processor
from edgevlm.shapes.config import FastVitConfig, MlpConfig, VlmConfig
from edgevlm.shapes.fastvit import MCI

TOWER = re.compile(r"(?:.*/)?mobileclip_l_(\d{1,9})")  # the number is the image size
ENCODER = "model.vision_tower.vision_tower.model."
PROJECTOR: Mapping[str, str] = {
    f"model.mm_projector.{theirs}.{kind}": f"projector.{ours}.{kind}"
    for theirs, ours in ((0, 1), (2, 3))
    for kind in ("weight", "bias")
}
FITS: Mapping[str | None, Fit] = {"pad": "pad", "square": "center-crop", None: "center-crop"}
EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "image_aspect_ratio": tuple(FITS),
    "mm_projector_type": ("mlp2x_gelu", None),
    "mm_use_im_start_end": (False, None),  # tokens around a picture
}
# Apple's word for a module, in timm's; those of the training form too.
WORDS: Mapping[str, str] = {
    "patch_embed": "stem",
    "conv_exp": "final_conv",
    "convffn": "mlp",
    "lkb_reparam": "reparam_conv",
    "lkb_origin": "large_conv",
    "rbr_conv": "conv_kxk",
    "rbr_scale": "conv_scale",
    "rbr_skip": "identity",
    "reduce": "fc1",
    "expand": "fc2",
    "pe": "pos_enc",
}


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes, at the image size in the name of its vision tower."""
    values, where = folder.config, str(folder.path / "config.json")
    require(values, EXPECTED, where=where)
    return VlmConfig(
        vision=replace(MCI["fastvit_mci3"], image_size=_image_size(values, where), reparameterized=True),
        projector=MlpConfig(),
        decoder=decoder_config(values, "qwen2", where=where),
        model_type="llava_qwen2",
    )


def processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """Pictures as ``image_aspect_ratio`` says, prompts as the models were trained."""
    side = config.vision.image_size
    image_spec = replace(TRAINED, height=side, width=side, fit=FITS[folder.config.get("image_aspect_ratio")])
    return make_processor(folder, config, image_spec, ChatTemplate(TEMPLATE))


def place(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor of ``LlavaQwen2ForCausalLM`` goes; of MobileCLIP's projection it has no use."""
    if name.startswith(ENCODER):
        assert isinstance(config.vision, FastVitConfig)
        inner = name.removeprefix(ENCODER)
        if inner.startswith("head."):
            return NOT_NEEDED
        return (Placement(name=f"vision_encoder.{timm_name(inner, config.vision)}"),)
    if name in PROJECTOR:
        return (Placement(name=PROJECTOR[name]),)
    return place_decoder(name)


def timm_name(name: str, vision: FastVitConfig) -> str:
    """MobileCLIP's name of a tensor of the encoder, in timm's words; names that are timm's already stay."""
    words = name.split(".")
    if words[0] == "network" and len(words) > 1:
        words[:2] = [_network(vision).get(words[1], f"network.{words[1]}")]
    words = [WORDS.get(word, word) for word in words]
    if words[-1].startswith("layer_scale"):
        words.append("gamma")
    return ".".join(words)


def _network(vision: FastVitConfig) -> dict[str, str]:
    """What each place in MobileCLIP's flat list is: a stage is its downsample, its positions and its blocks."""
    parts = []
    for stage in range(len(vision.depths)):
        parts += [f"stages.{stage}.downsample"] if stage else []
        parts += [f"stages.{stage}.pos_emb"] if vision.has_attention(stage) else []
        parts += [f"stages.{stage}.blocks"]
    return {str(index): part for index, part in enumerate(parts)}


def _image_size(values: Mapping[str, Any], where: str) -> int:
    tower = values.get("mm_vision_tower")
    found = TOWER.fullmatch(tower) if isinstance(tower, str) else None
    if found is None:
        raise UnsupportedError(
            f"{where}: mm_vision_tower is {shown(tower)}; of llava_qwen2 models only those with "
            f"'mobileclip_l_<image size>' (FastVLM) are supported"
        )
    return int(found[1])


FAMILY = Family(name="llava_qwen2", config=config, processor=processor, place=place)
