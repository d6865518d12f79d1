"""The layout that LLaVA's own project writes, and its descendants with it.

Config keys begin with ``mm_``, the vision encoder is named and not described, and the tensors lie under
``model.layers``, ``model.mm_projector`` and ``model.vision_tower.vision_tower.vision_model``.

Source: LLaVA-1.5, Liu et al. 2023, arXiv:2310.03744.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgevlm.core.config import read_json, shown
from edgevlm.core.errors import UnsupportedError
from edgevlm.families.decoders import place_decoder
from edgevlm.families.encoders import place_vit, vision_config
from edgevlm.families.family import NOT_NEEDED, Placement, Placements
from edgevlm.families.folder import ModelFolder
from edgevlm.families.reading import CLIP_COLOURS, mean_color, read_image_spec, read_stop_ids, read_tokenizer
from edgevlm.families.templates import template_of
from edgevlm.families.values import known_name, require, table, unknown
from edgevlm.processing.image_spec import Fit, ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.shapes.config import MlpConfig, VitConfig, VlmConfig

IMAGE_TOKEN = "<image>"
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
CLIP = "clip_vision_model"
PLAIN = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")  # a folder's name, and no way out of the folder
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# What the config.json of a named vision encoder says; only the last part of a name counts.
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "clip-vit-large-patch14-336": {**LARGE, "image_size": 336, "patch_size": 14},
    "clip-vit-large-patch14": {**LARGE, "image_size": 224, "patch_size": 14},
    "clip-vit-base-patch16": {"image_size": 224, "patch_size": 16},
    "clip-vit-base-patch32": {"image_size": 224, "patch_size": 32},
}
EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": ("patch", None),
    "mm_use_im_start_end": (False, None),  # tokens around a picture
    "s2": (False, None),  # features of several sizes
}
FITS: Mapping[object, Fit] = {"pad": "pad", "anyres": "stretch"}  # of image_aspect_ratio


def llava_vision(folder: ModelFolder) -> VitConfig:
    """The vision encoder that ``mm_vision_tower`` names: of TOWERS, or described in a sub-folder of that name.

    Raises UnsupportedError for an unknown one, for features and prompts we do not have, and where the checkpoint's
    files lack its weights.
    """
    values, where = folder.config, str(folder.path / "config.json")
    require(values, EXPECTED, where=where)
    name = values.get("mm_vision_tower") or ""
    _require_weights(folder, name)
    return vision_config(
        _tower(folder, name),
        CLIP,
        feature_layer=values.get("mm_vision_select_layer", -2),
        where=f"{where}: mm_vision_tower {shown(name)}",
    )


def llava_projector(folder: ModelFolder) -> MlpConfig:
    """What stands between encoder and decoder.  Raises UnsupportedError for anything but one or two Linears."""
    found, where = folder.config.get("mm_projector_type", "linear"), str(folder.path / "config.json")
    kind = known_name("mm_projector_type", found, ("linear", "mlp2x_gelu"), where=where)
    return MlpConfig(num_layers=1 if kind == "linear" else 2)


def llava_processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """Pictures as ``image_aspect_ratio`` says, prompts by the folder's template or else by Vicuna's."""
    tokenizer = read_tokenizer(folder, placeholder=IMAGE_TOKEN)
    return Processor(
        image_spec=llava_image_spec(folder, config.vision.image_size),
        prompt_spec=PromptSpec(
            image_token=IMAGE_TOKEN,
            num_vision_tokens=config.num_vision_tokens,
            stop_token_ids=read_stop_ids(folder, tokenizer),
        ),
        tokenizer=tokenizer,
        template=template_of(folder, tokenizer, IMAGE_TOKEN),
    )


def llava_image_spec(folder: ModelFolder, side: int) -> ImageSpec:
    """CLIP's preprocessing, but ``image_aspect_ratio`` decides how a picture becomes a square.

    ``pad`` puts bars of the mean colour beside it, ``anyres`` stretches it (its tiles are not cut), anything else
    crops the middle.
    """
    ratio = folder.config.get("image_aspect_ratio")
    fit = FITS.get(ratio, "center-crop") if isinstance(ratio, str) else "center-crop"
    mean, std = ((red, green, blue) for red, green, blue in (CLIP_COLOURS["image_mean"], CLIP_COLOURS["image_std"]))
    clip = ImageSpec(height=side, width=side, fit="center-crop", filter="bicubic", mean=mean, std=std)
    spec = read_image_spec(folder, default=clip)
    return replace(spec, fit=fit, pad_color=mean_color(spec.mean) if fit == "pad" else (0, 0, 0))


def place_llava(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor of the encoder, the projector or the decoder goes; None for any other."""
    if name.startswith(TOWER) and isinstance(config.vision, VitConfig):
        return place_vit(name, prefix=TOWER, config=config.vision)
    if name.startswith(PROJECTOR):
        return place_projector(name.removeprefix(PROJECTOR))
    if name == "model.image_newline":  # between tiles
        return NOT_NEEDED
    return place_decoder(name)


def place_projector(name: str) -> Placements | None:
    """Where ``0.weight`` and ``2.bias`` of two Linears go, or the ``weight`` of one."""
    if name in ("weight", "bias"):
        return (Placement(name=f"projector.1.{name}"),)
    position, _, rest = name.partition(".")
    places = {"0": "1", "2": "3"}  # behind the token reducer
    return (Placement(name=f"projector.{places[position]}.{rest}"),) if position in places else None


def _tower(folder: ModelFolder, name: object) -> Mapping[str, Any]:
    """transformers' config of the named vision encoder.  Raises UnsupportedError unless it is CLIP's."""
    last = PurePosixPath(name.replace("\\", "/")).name if isinstance(name, str) else ""
    if PLAIN.fullmatch(last) and (described := folder.path / last / "config.json").is_file():
        return _described(described)
    if last not in TOWERS:
        where, place = folder.path / "config.json", folder.path / (last if PLAIN.fullmatch(last) else "NAME")
        hint = f"Of another CLIP, put its config.json into {place}."
        raise unknown("mm_vision_tower", name, TOWERS, where=str(where), hint=hint)
    return TOWERS[last]


def _described(file: Path) -> Mapping[str, Any]:
    """The encoder in the config.json of CLIP, which describes a text encoder beside it, or of its encoder alone."""
    values = read_json(file)
    inner = table(values, "vision_config", where=str(file)) if "vision_config" in values else values
    kind = values.get("model_type", inner.get("model_type", CLIP))
    if kind not in (CLIP, "clip"):
        raise UnsupportedError(f"{file}: model_type is {shown(kind)}; expected 'clip' or '{CLIP}'")
    return inner


def _require_weights(folder: ModelFolder, name: object) -> None:
    """Raise UnsupportedError where the checkpoint has weights, but none of its vision encoder."""
    names = folder.tensor_names
    if names and not any(tensor.startswith(TOWER) for tensor in names):
        raise UnsupportedError(
            f"{folder.path}: the weights of the vision encoder ({shown(name) if name else 'mm_vision_tower'}) are not "
            f"in this checkpoint, which was written without them; take the same model in transformers' layout, which "
            f"holds them (for LLaVA-1.5: llava-hf/llava-1.5-7b-hf)"
        )
