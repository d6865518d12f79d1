"""The JSON files by which transformers.js, and transformers' processors, understand a bundle's folder.

What they read is written from the model itself, beside whatever the checkpoint's own files said: a hub leaves out what
its library has as a default, and names classes that not every reader knows.

Source: transformers.js 4, ``src/configs.js``, ``src/models/session.js`` and the processors of each model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from edgevlm.bundle.manifest import PartFile
from edgevlm.processing.hub_config import preprocessor_config
from edgevlm.processing.processor import Processor
from edgevlm.processing.split import Idefics3Tiles
from edgevlm.shapes.config import DecoderConfig, VlmConfig

Table = Mapping[str, Any]

DTYPES = {"": "fp32", "_fp16": "fp16", "_int8": "int8", "_quantized": "q8", "_q4": "q4"}  # by the suffix of a file
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")  # whose keys are those of ``_numbers``
FASTVLM = ("fast_vlm", "llava_qwen2")
KEPT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class WebModel:
    """What transformers.js calls a kind of model: its ``model_type``, its class, and that of its processor."""

    model_type: str
    architecture: str
    processor: str


LLAVA = WebModel("llava", "LlavaForConditionalGeneration", "LlavaProcessor")
LLAVA_QWEN2 = WebModel("llava_qwen2", "LlavaQwen2ForCausalLM", "LlavaProcessor")
IDEFICS3 = WebModel("idefics3", "Idefics3ForConditionalGeneration", "Idefics3Processor")
SMOLVLM = WebModel("smolvlm", "SmolVLMForConditionalGeneration", "SmolVLMProcessor")


def web_model(config: VlmConfig, processor: Processor) -> WebModel | None:
    """The kind of model that transformers.js takes this one for; None where it has none that computes the same.

    Whatever puts one run of vision rows into a prompt is a LLaVA to it.  It has no pre-fusion, no crops, and no tiles
    but those of Idefics3.
    """
    split, layout = processor.image_spec.split, processor.prompt_spec.layout
    if config.fusion is not None:
        return None
    if isinstance(split, Idefics3Tiles) and layout == "idefics3":
        return SMOLVLM if config.model_type == "smolvlm" else IDEFICS3
    if split is not None or layout != "plain":
        return None
    return LLAVA_QWEN2 if config.model_type in FASTVLM else LLAVA


def config_json(
    source: Table, config: VlmConfig, processor: Processor, web: WebModel, parts: Sequence[PartFile]
) -> dict[str, Any]:
    """config.json: the checkpoint's, with every number of the decoder, the image token's id and the graphs' files."""
    text = {**_text_of(source), **_numbers(config.decoder)}
    flat = web is LLAVA_QWEN2  # the language model's own config, with the picture's keys beside it
    named = {"model_type": web.model_type, "architectures": [web.architecture]}
    if text.get("model_type") not in TEXT_MODELS:
        text["model_type"] = "llama"
    placed = {name: value for name, value in text.items() if name != "model_type"} if flat else {"text_config": text}
    image_id = processor.image_token_id
    tokens = {"image_token_index": image_id, "image_token_id": image_id}
    files = {"transformers.js_config": graph_files(parts)} if parts else {}
    return {**source, **placed, **named, **tokens, **files}


def graph_files(parts: Sequence[PartFile]) -> dict[str, Any]:
    """``transformers.js_config``: the precision of each part to take by itself, and which graphs have data beside them.

    A precision whose file name transformers.js could not ask for is left out.
    """
    dtypes: dict[str, str] = {}
    external: dict[str, int] = {}
    for part in (part for part in parts if part.target == "onnx"):
        name = PurePosixPath(part.file)
        suffix = name.stem.removeprefix(part.part)
        if suffix in DTYPES:
            dtypes.setdefault(part.part, DTYPES[suffix])
            if f"{part.file}_data" in part.extra_files:
                external[name.name] = 1
    return {"dtype": dtypes, **({"use_external_data_format": external} if external else {})}


def preprocessor_json(processor: Processor, web: WebModel | None) -> dict[str, Any]:
    """preprocessor_config.json, with the class of the processor that also writes the prompt."""
    named = {} if web is None else {"processor_class": web.processor}
    return {**preprocessor_config(processor.image_spec), **named}


def processor_json(processor: Processor, web: WebModel) -> dict[str, Any]:
    """processor_config.json: how many placeholders a picture has."""
    spec = processor.prompt_spec
    if spec.layout == "idefics3":
        return {"processor_class": web.processor, "image_seq_len": spec.num_vision_tokens}
    patch, extra = patches(min(processor.image_spec.height, processor.image_spec.width), spec.num_vision_tokens)
    return {
        "processor_class": web.processor,
        "image_token": spec.image_token,
        "patch_size": patch,
        "num_additional_image_tokens": extra,
        "vision_feature_select_strategy": "full",  # "default" takes one off, in transformers but not in the browser
    }


def patches(side: int, num_tokens: int) -> tuple[int, int]:
    """A patch size and a number of further tokens with ``(side // patch)² + further == num_tokens``."""
    across = math.isqrt(num_tokens)
    patch = side // across
    if patch and side // patch == across:
        return patch, num_tokens - across**2
    return side, num_tokens - 1


def tokenizer_json(source: Table, processor: Processor) -> dict[str, Any]:
    """tokenizer_config.json: the checkpoint's, the special tokens, and the chat template, which is read there alone."""
    template = processor.template
    return {**template.special_tokens, **source, "chat_template": template.source}


def generation_json(source: Table, processor: Processor) -> dict[str, Any]:
    """generation_config.json: the checkpoint's, with every token that ends an answer."""
    return {**source, "eos_token_id": list(processor.prompt_spec.stop_token_ids)}


def _text_of(source: Table) -> Table:
    """The language model's table in the checkpoint's config: of its own, or the whole where that is flat."""
    text = source.get("text_config")
    if isinstance(text, Mapping):
        return text
    return {"model_type": source["model_type"].removeprefix("llava_")} if "hidden_size" in source else {}


def _numbers(config: DecoderConfig) -> dict[str, Any]:
    return {
        **{name: getattr(config, name) for name in KEPT},
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
    }
