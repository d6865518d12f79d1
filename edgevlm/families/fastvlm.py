"""FastVLM as transformers keeps it (``fast_vlm``): timm's FastViTHD, Linear-GELU-Linear, a Qwen2 decoder.

Source: Vasu et al. 2024, arXiv:2412.13303.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.core.config import from_mapping
from edgevlm.core.errors import UnsupportedError
from edgevlm.families.decoders import place_decoder, text_decoder
from edgevlm.families.family import Family, Placement, Placements
from edgevlm.families.folder import ModelFolder
from edgevlm.families.reading import read_image_spec, read_stop_ids, read_template, read_tokenizer
from edgevlm.families.templates import AS_PARTS
from edgevlm.families.values import known_name, require, table
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.shapes.config import FastVitConfig, MlpConfig, VlmConfig
from edgevlm.shapes.fastvit import MCI

IMAGE_TOKEN = "<image>"
END_OF_TURN = "<|im_end|>"
# As the models were trained: LLaVA's conversation "qwen_2", pictures before the text.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Padded with black to a square, pixels in [0, 1]; the released preprocessor_config.json crops instead.
TRAINED = ImageSpec(height=1024, width=1024, fit="pad")

ENCODER = "model.vision_tower.timm_model."
PROJECTOR: Mapping[str, str] = {
    f"model.multi_modal_projector.{theirs}.{kind}": f"projector.{ours}.{kind}"
    for theirs, ours in (("linear_1", 1), ("linear_2", 3))
    for kind in ("weight", "bias")
}
# Settings that transformers' class allows one value of.
EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu", None),
    "vision_feature_layer": (-1, None),
    "vision_feature_select_strategy": ("full", None),
}
MODEL_ARGS: Mapping[str, str] = {"inference_mode": "reparameterized", "layers": "depths", "embed_dims": "widths"}


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes, at the image size of preprocessor_config.json."""
    values, where = folder.config, str(folder.path / "config.json")
    require(values, EXPECTED, where=where)
    table(values, "text_config", where=where)
    return VlmConfig(
        vision=_vision(table(values, "vision_config", where=where), _image_size(folder), f"{where}: vision_config"),
        projector=MlpConfig(bias=bool(values.get("multimodal_projector_bias", True))),
        decoder=text_decoder(values, kind="qwen2", where=where),
        model_type="fast_vlm",
    )


def processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """Pictures and prompts as the checkpoint's files say, else as the models were trained."""
    image_spec = read_image_spec(folder, default=TRAINED)
    return make_processor(folder, config, image_spec, _template(folder))


def make_processor(folder: ModelFolder, config: VlmConfig, image_spec: ImageSpec, template: ChatTemplate) -> Processor:
    """A processor with the folder's tokenizer, to which ``<image>`` is added where it is missing."""
    tokenizer = read_tokenizer(folder, placeholder=IMAGE_TOKEN)
    prompt_spec = PromptSpec(
        image_token=IMAGE_TOKEN,
        num_vision_tokens=config.num_vision_tokens,
        stop_token_ids=read_stop_ids(folder, tokenizer, known=(END_OF_TURN,)),
    )
    return Processor(image_spec=image_spec, prompt_spec=prompt_spec, tokenizer=tokenizer, template=template)


def place(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor of ``FastVlmForConditionalGeneration`` goes; our encoder's names are timm's."""
    if name.startswith(ENCODER):
        return (Placement(name=f"vision_encoder.{name.removeprefix(ENCODER)}"),)
    if name in PROJECTOR:
        return (Placement(name=PROJECTOR[name]),)
    return place_decoder(name, prefix="model.language_model.")


def _template(folder: ModelFolder) -> ChatTemplate:
    """The folder's template if it knows pictures; the language model's own does not."""
    found = read_template(folder, TEMPLATE)
    if IMAGE_TOKEN not in found.source:
        return ChatTemplate(TEMPLATE)
    return found if found.source == TEMPLATE else ChatTemplate(AS_PARTS + found.source, found.special_tokens)


def _image_size(folder: ModelFolder) -> int:
    spec = read_image_spec(folder, default=TRAINED)
    if spec.height != spec.width:
        raise UnsupportedError(
            f"{folder.path}: preprocessor_config.json makes pictures of {spec.height}x{spec.width} pixels; "
            f"FastVLM reads squares"
        )
    return spec.height


def _vision(values: Mapping[str, Any], image_size: int, where: str) -> FastVitConfig:
    """timm's architecture and the arguments that change it.  Raises UnsupportedError for others than FastViT's MCi."""
    architecture = values.get("architecture", "fastvit_mci3")
    plain = architecture.split(".")[0] if isinstance(architecture, str) else architecture
    name = known_name("architecture", plain, MCI, where=where)
    arguments = table(values, "model_args", where=where) if values.get("model_args") else {}
    changes: dict[str, Any] = {"image_size": image_size}
    for argument, value in arguments.items():
        changes[MODEL_ARGS[known_name("model_args key", argument, MODEL_ARGS, where=where)]] = value
    return from_mapping(FastVitConfig, {**vars(MCI[name]), **changes}, strict=True, where=where)


FAMILY = Family(name="fast_vlm", config=config, processor=processor, place=place)
