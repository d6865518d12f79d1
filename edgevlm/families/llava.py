"""LLaVA and LLaVA-NeXT in transformers' layout: CLIP or SigLIP, two Linears, a Llama, Mistral, Qwen2 or Qwen3.

LLaVA-NeXT cuts large pictures into tiles; here it sees the whole picture alone, in one tile, and behind it the row
that ends a line of tiles.
Sources: Liu et al. 2023, arXiv:2310.03744; LLaVA-NeXT's notes of January 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.core.config import shown
from edgevlm.core.errors import UnsupportedError
from edgevlm.families.decoders import place_decoder, text_decoder
from edgevlm.families.encoders import place_vit, vision_config
from edgevlm.families.family import NOT_NEEDED, Family, Placement, Placements
from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava_layout import IMAGE_TOKEN
from edgevlm.families.reading import CLIP_COLOURS, HALVES, has_id, read_image_spec, read_stop_ids
from edgevlm.families.templates import template_of
from edgevlm.families.values import require, table
from edgevlm.processing.image_spec import Fit, ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.shapes.config import MlpConfig, VitConfig, VlmConfig

# The encoder where config.json describes none.
CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
EXPECTED: Mapping[str, tuple[Any, ...]] = {"projector_hidden_act": ("gelu", None)}
# Where the parts of today's layout stood before transformers 5.
OLDER = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.": "model.vision_tower.",
    "image_newline": "model.image_newline",
}
TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
LINEARS = {"linear_1": "projector.1", "linear_2": "projector.3"}
END_ROW = "projector.4.row"


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes.

    Raises UnsupportedError for features of several layers or with the class token, and for parts we do not have.
    """
    values, where = folder.config, str(folder.path / "config.json")
    require(values, EXPECTED, where=where)
    return VlmConfig(
        vision=_vision(values, where),
        projector=MlpConfig(
            bias=bool(values.get("multimodal_projector_bias", True)),
            end_row=values["model_type"] == "llava_next" and bool(values.get("use_image_newline_parameter", True)),
        ),
        decoder=text_decoder(values, kind="llama", where=where),
        model_type=str(values["model_type"]),
    )


def processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """Pictures and prompts as the checkpoint's files say, else as LLaVA-1.5 was trained."""
    tokenizer = Tokenizer.from_folder(folder.path)
    image_token = _image_token(folder, tokenizer)
    tokenizer = tokenizer.with_special(image_token)
    return Processor(
        image_spec=read_image_spec(folder, default=_image_spec(config)),
        prompt_spec=PromptSpec(
            image_token=image_token,
            num_vision_tokens=config.num_vision_tokens,
            stop_token_ids=read_stop_ids(folder, tokenizer),
        ),
        tokenizer=tokenizer,
        template=template_of(folder, tokenizer, image_token),
    )


def place(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor of ``LlavaForConditionalGeneration`` or ``LlavaNextForConditionalGeneration`` goes."""
    for older, today in OLDER.items():
        if name.startswith(older):
            name = today + name[len(older) :]
            break
    if name == "model.image_newline":
        has_row = isinstance(config.projector, MlpConfig) and config.projector.end_row
        return (Placement(name=END_ROW),) if has_row else NOT_NEEDED
    if name.startswith(PROJECTOR):
        linear, _, rest = name.removeprefix(PROJECTOR).partition(".")
        return (Placement(name=f"{LINEARS[linear]}.{rest}"),) if linear in LINEARS else None
    if name.startswith(TOWER):
        return _place_vision(name.removeprefix(TOWER).removeprefix("vision_model."), config)
    return place_decoder(name, prefix="model.language_model.")


def _place_vision(name: str, config: VlmConfig) -> Placements | None:
    assert isinstance(config.vision, VitConfig)
    return place_vit(name, prefix="", config=config.vision)


def _vision(values: Mapping[str, Any], where: str) -> VitConfig:
    described = table(values, "vision_config", where=where) if values.get("vision_config") else CLIP_LARGE
    kind = described.get("model_type", "clip_vision_model")
    vision = vision_config(
        described,
        kind,
        feature_layer=values.get("vision_feature_layer", -2),
        where=f"{where}: vision_config",
    )
    strategy = values.get("vision_feature_select_strategy", "default")
    expected = "default" if vision.class_token else "full"
    if strategy != expected:
        raise UnsupportedError(
            f"{where}: vision_feature_select_strategy is {shown(strategy)}, which with a {kind} would "
            f"{'keep the class token' if vision.class_token else 'drop the first patch'}; expected {expected!r}"
        )
    return vision


def _image_token(folder: ModelFolder, tokenizer: Tokenizer) -> str:
    """The token whose id config.json names, else ``<image>``."""
    id = folder.config.get("image_token_index", folder.config.get("image_token_id"))
    token = tokenizer.token(id) if has_id(tokenizer, id) else None
    return token if token is not None and token in tokenizer.added_tokens else IMAGE_TOKEN


def _image_spec(config: VlmConfig) -> ImageSpec:
    """The preprocessing of CLIP, which crops, or of SigLIP, which stretches."""
    vision = config.vision
    assert isinstance(vision, VitConfig)
    side, colours = vision.image_size, CLIP_COLOURS if vision.class_token else HALVES
    mean, std = ((red, green, blue) for red, green, blue in (colours["image_mean"], colours["image_std"]))
    fit: Fit = "center-crop" if vision.class_token else "stretch"
    return ImageSpec(height=side, width=side, fit=fit, filter="bicubic", mean=mean, std=std)


FAMILY = Family(name="llava", config=config, processor=processor, place=place)
