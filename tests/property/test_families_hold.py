"""Whatever stands in the files of a checkpoint, its family reads it or refuses it with an error of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from edgevlm.core.config import to_plain
from edgevlm.core.errors import EdgeVLMError
from edgevlm.families.detect import family_of
from edgevlm.families.folder import ModelFolder
from edgevlm.processing.layout import layout_tokens
from edgevlm.shapes.config import DecoderConfig, HybridConfig, UnshuffleConfig, VlmConfig

DEEP = 900  # what Python's own reader still takes, and a message no longer writes
# What may stand anywhere, as JSON.
HOSTILE = (
    *("null", "[]", '["x"]', "{}", '{"x": 1}', '""', '"x"', '"a/.."', '"\\u0000\\ud800/\\ud800"'),
    *(f'"{"x" * 5000}"', f'"{"9" * 5000}"', "-1", "0", "0.5", "1e300", "Infinity", "NaN", str(2**40), f"1{'0' * 400}"),
    *("[" * DEEP + "]" * DEEP, '{"x":' * DEEP + "1" + "}" * DEEP),
)
Place: TypeAlias = tuple[str, ...]  # a key, the key of the table in it, ...
PLACE = "here stands what is hostile"

TOKENIZER = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": "{{ bos_token }}<image>", "add_bos_token": True}
NAMES = ("<s>", "</s>", "<image>", *layout_tokens("idefics3", (4, 4)))
IDS = {name: 256 + k for k, name in enumerate(dict.fromkeys(NAMES))}
TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "rope_parameters": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}
SCALED = {
    **TEXT,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": 258,
    "image_token_id": None,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "use_image_newline_parameter": True,
    "image_grid_pinpoints": [[32, 32]],
    "text_config": {**SCALED, "model_type": "llama"},
    "vision_config": {**VISION, "model_type": "clip_vision_model"},
}
ORIGINAL = {
    **SCALED,
    "model_type": "llava_llama",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_patch_merge_type": "flat",
    "s2": False,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 64,
}
NATIVE = VlmConfig(
    vision=HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1)),
    projector=UnshuffleConfig(factor=2),
    decoder=DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
    ),
)
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "edgevlm": to_plain(NATIVE),
    "fast_vlm": {
        **LLAVA,
        "model_type": "fast_vlm",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {"architecture": "fastvit_mci3", "model_args": {"inference_mode": True, "layers": [1] * 5}},
    },
    "idefics3": {
        "model_type": "idefics3",
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "hidden_act": "gelu_pytorch_tanh"},
    },
    "llava": LLAVA,
    "llava_llama": ORIGINAL,
    "llava_mini_llama": {
        **ORIGINAL,
        "model_type": "llava_mini_llama",
        "compressor_size": 2,
        "prefusion_layer_num": 1,
        "resolution_ratio": 2,
    },
    "llava_next": {**LLAVA, "model_type": "llava_next", "text_config": {**TEXT, "model_type": "mistral"}},
    "llava_qwen2": {**ORIGINAL, **TEXT, "model_type": "llava_qwen2", "mm_vision_tower": "mobileclip_l_1024"},
    "mqt": {**ORIGINAL, "num_visual_tokens": "36"},
    "nanovlm": {
        "vit_model_type": "google/siglip",
        "vit_hidden_dim": 32,
        "vit_inter_dim": 64,
        "vit_patch_size": 8,
        "vit_img_size": 32,
        "vit_n_heads": 2,
        "vit_n_blocks": 1,
        "vit_ln_eps": 1e-6,
        "vit_cls_flag": False,
        "lm_hidden_dim": 64,
        "lm_inter_dim": 128,
        "lm_rms_eps": 1e-5,
        "lm_re_base": 10_000,
        "lm_max_position_embeddings": 128,
        "lm_vocab_size": 300,
        "lm_n_heads": 2,
        "lm_n_kv_heads": 1,
        "lm_n_blocks": 1,
        "lm_attn_scaling": 1.0,
        "lm_tie_weights": True,
        "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct",
        "lm_base_vocab_size": 256 + len(IDS),
        "lm_eos_token_id": 257,
        "lm_chat_template": "{{ messages[0]['content'] }}",
        "mp_pixel_shuffle_factor": 2,
        "mp_image_token_length": 4,
        "max_img_size": None,
        "resize_to_max_side_len": False,
        "vlm_extra_tokens": {"image_token": "<|image|>"},
    },
    "smolvlm": {
        "model_type": "smolvlm",
        "scale_factor": 2,
        "text_config": {**SCALED, "model_type": "qwen3"},
        "vision_config": VISION,
    },
}
SMALL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255, "resample": 3}
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": True, "do_pad": True}
PREPROCESSING: Mapping[str, Mapping[str, Any]] = {
    "LlavaImageProcessor": {**SMALL, **STEPS, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "LlavaNextImageProcessor": {**SMALL, **STEPS, "size": {"shortest_edge": 32}, "crop_size": 32},
    "SiglipImageProcessor": {**SMALL, "size": {"height": 32, "width": 32}},
    "Idefics3ImageProcessor": {
        **SMALL,
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
    },
}
DECODERS = ("llava_llama", "fast_vlm", "nanovlm")
# Of config.json, what processors read; everything else they have from the model's config.
READ_BY_PROCESSORS = (
    *("image_token_index", "image_token_id", "image_token", "image_aspect_ratio", "eos_token_id", "vlm_extra_tokens"),
    *("lm_eos_token_id", "lm_chat_template", "lm_base_vocab_size", "max_img_size"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are written anew for each case."""

    path: Path

    def write(self, name: str, text: str) -> None:
        (self.path / f"{name}.json").write_text(text, encoding="utf-8")

    def read(self, *, with_processor: bool) -> bool:
        """Whether the family can read it.  Lets pass whatever is no error of ours."""
        folder = ModelFolder(self.path)
        try:
            family = family_of(folder)
            config = family.config(folder)
            if with_processor:
                family.processor(folder, config)
        except EdgeVLMError:
            return False
        return True


def spoiled(values: Mapping[str, Any], wanted: Callable[[Place], bool] = lambda place: True) -> Iterator[str]:
    """``values`` as JSON, with each wanted key of it and of its tables in turn replaced by everything hostile."""
    for place in filter(wanted, places(values)):
        text = json.dumps(with_value(values, place))
        yield from (text.replace(f'"{PLACE}"', hostile) for hostile in HOSTILE)


def places(values: Mapping[str, Any]) -> Iterator[Place]:
    for name, value in values.items():
        yield (name,)
        if isinstance(value, Mapping):
            yield from ((name, *inner) for inner in places(value))


def with_value(values: Mapping[str, Any], place: Place) -> dict[str, Any]:
    name, inner = place[0], place[1:]
    return {**values, name: with_value(values[name], inner) if inner else PLACE}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> Checkpoint:
    return Checkpoint(tiny_tokenizer(tmp_path, IDS, **TOKENIZER))


def write_native_processor(checkpoint: Checkpoint, image: Mapping[str, Any]) -> None:
    prompt = {"image_token": "<image>", "num_vision_tokens": 4, "stop_token_ids": [257]}
    checkpoint.write("processor", json.dumps({"image": image, "prompt": prompt}))


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_reads_its_files_as_they_should_be(checkpoint: Checkpoint, family: str) -> None:
    checkpoint.write("config", json.dumps(CONFIGS[family]))
    write_native_processor(checkpoint, {"height": 32, "width": 32, "fit": "pad"})
    assert checkpoint.read(with_processor=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_no_value_of_config_json_gives_another_error_than_ours(checkpoint: Checkpoint, family: str) -> None:
    def is_new(place: Place) -> bool:
        """Decoders are read by one function, whose keys need not be spoiled in every family."""
        return family in DECODERS or not (place[-1] in TEXT and place[0] in (*TEXT, "text_config", "decoder"))

    for text in spoiled(CONFIGS[family], is_new):
        checkpoint.write("config", text)
        checkpoint.read(with_processor=False)


@pytest.mark.parametrize("family", CONFIGS)
def test_no_value_that_processors_read_gives_another_error_than_ours(checkpoint: Checkpoint, family: str) -> None:
    config = CONFIGS[family]
    for text in spoiled(config, lambda place: place[-1] in READ_BY_PROCESSORS):
        checkpoint.write("config", text)
        checkpoint.read(with_processor=True)


@pytest.mark.parametrize("kind", PREPROCESSING)
@pytest.mark.parametrize("family", ["idefics3", "llava_llama"])
def test_no_value_of_preprocessor_config_json_gives_another_error_than_ours(
    checkpoint: Checkpoint, family: str, kind: str
) -> None:
    checkpoint.write("config", json.dumps(CONFIGS[family]))
    values = {"image_processor_type": kind, **PREPROCESSING[kind]}
    for text in spoiled(values):
        checkpoint.write("preprocessor_config", text)
        checkpoint.read(with_processor=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_no_value_of_the_tokenizers_files_gives_another_error_than_ours(checkpoint: Checkpoint, family: str) -> None:
    checkpoint.write("config", json.dumps(CONFIGS[family]))
    write_native_processor(checkpoint, {"height": 32, "width": 32, "fit": "pad"})
    for name, values in (("tokenizer_config", TOKENIZER), ("generation_config", {"eos_token_id": [257]})):
        for text in spoiled(values):
            checkpoint.write(name, text)
            checkpoint.read(with_processor=True)
        checkpoint.write(name, json.dumps(values))
