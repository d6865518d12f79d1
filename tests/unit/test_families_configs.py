"""The configs of published models, reduced to the keys that matter: what a card says of them without any weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgevlm.families import FAMILIES
from edgevlm.families.card import make_card
from edgevlm.families.detect import model_type
from edgevlm.families.folder import ModelFolder

QWEN2_05B = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
QWEN2_7B = {
    **QWEN2_05B,
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
APPLE = {
    "model_type": "llava_qwen2",
    "mm_vision_tower": "mobileclip_l_1024",
    "mm_hidden_size": 3072,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "pad",
}
VICUNA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LLAMA_31_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
}
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SMOL_TEXT = {
    "model_type": "llama",
    "vocab_size": 49_280,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
}
SMOL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
NANOVLM_222M = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_img_size": 224,
    "vit_n_heads": 12,
    "vit_n_blocks": 12,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip-base-patch16-224",
    "lm_hidden_dim": 576,
    "lm_inter_dim": 1536,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100_000,
    "lm_max_position_embeddings": 8192,
    "lm_vocab_size": 49_152,
    "lm_n_heads": 9,
    "lm_n_kv_heads": 3,
    "lm_n_blocks": 30,
    "lm_attn_scaling": 1.0,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-135M",
    "lm_tokenizer": "HuggingFaceTB/cosmo2-tokenizer",
    "lm_eos_token_id": 0,
    "mp_pixel_shuffle_factor": 2,
}


class Published:
    """A config, and what the model is known to be: parameters that we compute with, vision tokens, cache bytes."""

    def __init__(self, family: str, config: Mapping[str, Any], parameters: int, tokens: int, cache: int) -> None:
        self.family, self.config = family, config
        self.parameters, self.tokens, self.cache = parameters, tokens, cache


FAST_VLM = {
    "model_type": "fast_vlm",
    "image_token_index": 151_646,
    "text_config": {**QWEN2_05B, "model_type": "qwen2", "vocab_size": 152_000},
    "vision_config": {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "model_args": {"inference_mode": True},
        "hidden_size": 3072,
    },
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
# Of CLIP's 303.5 M parameters the last block and the last norm are not computed with.
CLIP_UNUSED = 12_596_224 + 2048
MODELS = {
    "FastVLM-0.5B": Published("llava_qwen2", {**APPLE, **QWEN2_05B}, 756_438_752, 256, 12 * 1024),
    "FastVLM-7B": Published("llava_qwen2", {**APPLE, **QWEN2_7B}, 7_762_192_992, 256, 56 * 1024),
    "FastVLM-0.5B in transformers": Published("fast_vlm", FAST_VLM, 756_438_752 + 2 * 64 * 896, 256, 12 * 1024),
    "LLaVA-1.5-7B": Published(
        "llava",
        {
            "model_type": "llava",
            "text_config": {**VICUNA, "model_type": "llama", "vocab_size": 32_064},
            "vision_config": CLIP_L_336,
            "image_token_index": 32_000,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        7_063_427_072 - CLIP_UNUSED,
        576,
        512 * 1024,
    ),
    "SmolVLM-256M": Published(
        "idefics3",
        {
            "model_type": "idefics3",
            "scale_factor": 4,
            "image_token_id": 49_190,
            "text_config": SMOL_TEXT,
            "vision_config": SMOL_VISION,
            "tie_word_embeddings": False,
        },
        256_484_928,
        64,
        2 * 30 * 3 * 64 * 2,
    ),
    "nanoVLM-222M": Published("nanovlm", NANOVLM_222M, 222_081_600, 49, 2 * 30 * 3 * 64 * 2),
    "LLaVA-Mini": Published(
        "llava_mini",
        {
            **LLAMA_31_8B,
            "model_type": "llava_mini_llama",
            "compressor_size": 1,
            "prefusion_layer_num": 4,
            "resolution_ratio": 1,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_hidden_size": 1024,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "flat",
        },
        8_030_261_248 + 872_448_000 + 20_979_712 + 4_203_520 + 303_507_456 - CLIP_UNUSED,
        1,
        128 * 1024,
    ),
}


@pytest.fixture(params=MODELS)
def published(request: pytest.FixtureRequest) -> Published:
    return MODELS[request.param]


@pytest.fixture
def folder(published: Published, tmp_path: Path) -> ModelFolder:
    (tmp_path / "config.json").write_text(json.dumps(published.config))
    return ModelFolder(tmp_path)


def test_its_family_is_recognised(folder: ModelFolder, published: Published) -> None:
    assert FAMILIES[model_type(folder)].name == published.family


def test_its_card_is_that_of_the_published_model(folder: ModelFolder, published: Published) -> None:
    card = make_card(folder)
    assert card.vision_tokens == published.tokens
    assert card.cache_bytes_per_token["fp16"] == published.cache
    assert card.parameters == published.parameters


def test_fastvithd_takes_other_sizes_and_clip_does_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["FastVLM-0.5B"].config))
    assert make_card(ModelFolder(tmp_path), image_size=512).vision_tokens == 64
