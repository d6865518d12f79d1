"""LLaVA-Mini: CLIP and a Llama decoder, with a compressor and modality pre-fusion between them.

Source: Zhang et al. 2025, arXiv:2501.03895, as the released code behaves.  Its script sends two tokens
``<|begin_of_text|>``, its training one: so do we.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgevlm.core.config import from_mapping
from edgevlm.families.decoders import decoder_config
from edgevlm.families.family import Family, Placement, Placements, thirds
from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava_layout import IMAGE_TOKEN, llava_image_spec, llava_projector, llava_vision, place_llava
from edgevlm.families.reading import read_stop_ids, read_template, read_tokenizer
from edgevlm.families.values import require
from edgevlm.processing.chat import ChatTemplate
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.processor import Processor, PromptSpec
from edgevlm.processing.split import Crops
from edgevlm.shapes.config import DecoderConfig, VlmConfig
from edgevlm.shapes.fusion import FusionConfig

COMPRESSOR, LAYERS = "model.compressor.", "model.prefusion_layers."
QUERY = f"{COMPRESSOR}query"
# What the released code does where config.json leaves a key out.
DEFAULTS: Mapping[str, Any] = {"compressor_size": 2, "prefusion_layer_num": 4, "resolution_ratio": 1}
EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("flat", None),
    "mm_use_im_start_end": (False, None),
    "image_aspect_ratio": ("square", "pad", None),  # the code takes tiles for the frames of a video
}
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
LLAMA_3 = (
    "{%- for message in messages -%}"
    "{{- '<|begin_of_text|>' if loop.first else '' -}}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
)
# Templates of text models read plain text alone; a picture is a line of its own before the question.
AS_TEXT = (
    "{%- set all = namespace(turns=[], text='') -%}"
    "{%- if messages[0]['role'] != 'system' -%}"
    f"{{%- set all.turns = [{{'role': 'system', 'content': {json.dumps(SYSTEM)}}}] -%}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set all.text = message['content'] if message['content'] is string else '' -%}"
    "{%- for part in message['content'] if message['content'] is not string -%}"
    f"{{%- set all.text = all.text + ('{IMAGE_TOKEN}\\n' if part['type'] == 'image' else part['text']) -%}}"
    "{%- endfor -%}"
    "{%- set all.turns = all.turns + [{'role': message['role'], 'content': all.text}] -%}"
    "{%- endfor -%}{%- set messages = all.turns -%}"
)


def config(folder: ModelFolder) -> VlmConfig:
    """The model that config.json describes; the compressor's size as the weights have it.

    Raises UnsupportedError for settings that the released code does not survive or we do not have.
    """
    where = str(folder.path / "config.json")
    require(folder.config, EXPECTED, where=where)
    return VlmConfig(
        vision=llava_vision(folder),
        projector=llava_projector(folder),
        decoder=_decoder(folder, where),
        fusion=_fusion(folder, where),
        model_type="llava_mini_llama",
    )


def processor(folder: ModelFolder, config: VlmConfig) -> Processor:
    """Pictures as CLIP reads them, cut where the model was trained so; prompts as Llama 3's template writes them."""
    tokenizer = read_tokenizer(folder, placeholder=IMAGE_TOKEN)
    return Processor(
        image_spec=_image_spec(folder, config),
        prompt_spec=PromptSpec(
            image_token=IMAGE_TOKEN,
            num_vision_tokens=config.num_vision_tokens,
            stop_token_ids=read_stop_ids(folder, tokenizer, known=ENDS),
        ),
        tokenizer=tokenizer,
        template=whole_template(read_template(folder, LLAMA_3)),
    )


def whole_template(template: ChatTemplate) -> ChatTemplate:
    """``template`` for pictures and text, with the system text of training and an assistant's header at the end."""
    ending = (
        f"{{%- if add_generation_prompt and not prompt.endswith({json.dumps(HEADER)}) -%}}"
        f"{{{{- {json.dumps(HEADER)} -}}}}{{%- endif -%}}"
    )
    source = f"{AS_TEXT}{{% set prompt %}}{template.source}{{% endset %}}{{{{- prompt -}}}}{ending}"
    return ChatTemplate(source, template.special_tokens)


def place(name: str, config: VlmConfig) -> Placements | None:
    """Where a tensor of ``LlavaMiniLlamaForCausalLM`` goes."""
    if name.startswith(LAYERS):
        return (Placement(name=f"fusion.layers.{name.removeprefix(LAYERS)}"),)
    if not name.startswith(COMPRESSOR):
        return place_llava(name, config)
    inner = name.removeprefix(COMPRESSOR)
    if inner.startswith("attn.in_proj_"):
        return thirds("fusion.compressor", inner.removeprefix("attn.in_proj_"))
    return (Placement(name=f"fusion.compressor.{inner.removeprefix('attn.')}"),)


def _decoder(folder: ModelFolder, where: str) -> DecoderConfig:
    """Llama's, no longer than the rows that the reference ever gives it."""
    decoder = decoder_config(folder.config, "llama", where=where)
    longest = folder.config.get("tokenizer_model_max_length")
    if type(longest) is not int or longest < 1:
        return decoder
    return replace(decoder, max_position_embeddings=min(longest, decoder.max_position_embeddings))


def _fusion(folder: ModelFolder, where: str) -> FusionConfig:
    values = {**DEFAULTS, **{name: value for name, value in folder.config.items() if value is not None}}
    fields = {
        "num_layers": values["prefusion_layer_num"],
        "grid_size": _side_of_queries(folder) or values["compressor_size"],
        "resolution_ratio": values["resolution_ratio"],
        "skip_token_zero": True,
    }
    return from_mapping(FusionConfig, fields, strict=True, where=where)


def _side_of_queries(folder: ModelFolder) -> int | None:
    """The side of the square of queries in the weights; None where these are not there."""
    query = folder.tensor(QUERY)
    return math.isqrt(query.shape[0]) if query is not None and query.shape else None


def _image_spec(folder: ModelFolder, config: VlmConfig) -> ImageSpec:
    assert config.fusion is not None
    ratio = config.fusion.resolution_ratio
    return replace(
        llava_image_spec(folder, config.vision.image_size), split=Crops(per_side=ratio) if ratio > 1 else None
    )


FAMILY = Family(name="llava_mini", config=config, processor=processor, place=place)
