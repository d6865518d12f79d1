"""What the files of a FastVLM say, without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevlm.core.errors import UnsupportedError
from edgevlm.families.detect import family_of
from edgevlm.families.folder import ModelFolder
from edgevlm.processing.chat import user_message
from edgevlm.processing.tokenizer import Tokenizer
from edgevlm.shapes.config import MlpConfig, VlmConfig
from edgevlm.shapes.fastvit import MCI

TEXT = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151_645,
}
LLAVA = {
    "model_type": "llava_qwen2",
    "mm_vision_tower": "mobileclip_l_1024",
    "mm_hidden_size": 3072,
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    **TEXT,
}
HUB = {
    "model_type": "fast_vlm",
    "image_token_index": 151_646,
    "text_config": {**TEXT, "model_type": "qwen2", "vocab_size": 152_000},
    "vision_config": {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "model_args": {"inference_mode": True},
    },
}
IDS = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


def folder_of(path: Path, **files: Any) -> ModelFolder:
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return ModelFolder(path)


def config_of(path: Path, **files: Any) -> VlmConfig:
    folder = folder_of(path, **files)
    return family_of(folder).config(folder)


@pytest.mark.parametrize("values", [LLAVA, HUB], ids=["original", "transformers"])
def test_both_layouts_describe_fastvithd_and_256_tokens(tmp_path: Path, values: dict[str, Any]) -> None:
    config = config_of(tmp_path, config=values)
    assert (config.vision.depths, config.vision.widths) == ((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536))
    assert config.vision.reparameterized
    assert config.num_vision_tokens == 256
    assert config.projector == MlpConfig()
    assert (config.decoder.attention_bias, config.decoder.head_dim, config.decoder.rope_theta) == (True, 64, 1e6)
    assert config.decoder.max_position_embeddings == 32_768


@pytest.mark.parametrize(("tower", "side"), [("mobileclip_l_512", 512), ("checkpoints/mobileclip_l_1536", 1536)])
def test_the_tower_names_the_image_size(tmp_path: Path, tower: str, side: int) -> None:
    assert config_of(tmp_path, config={**LLAVA, "mm_vision_tower": tower}).vision.image_size == side


def test_the_preprocessor_names_the_image_size(tmp_path: Path) -> None:
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 512}, "resample": 3}
    crop = {"crop_size": {"height": 512, "width": 512}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    config = config_of(tmp_path, config=HUB, preprocessor_config={**preprocessor, **crop})
    assert config.num_vision_tokens == 64


def test_other_proportions_of_the_encoder_can_be_given(tmp_path: Path) -> None:
    arguments = {"inference_mode": False, "layers": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 64]}
    vision = {"architecture": "fastvit_mci0.apple_mclip", "model_args": arguments}
    config = config_of(tmp_path, config={**HUB, "vision_config": vision}).vision
    assert (config.depths, config.widths, config.reparameterized) == ((1, 1, 1, 1), (16, 32, 64, 64), False)
    assert config.num_gated_downsamples == MCI["fastvit_mci0"].num_gated_downsamples


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAVA, {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "mm_vision_tower is 'openai/clip-vit"),
        (LLAVA, {"mm_vision_tower": None}, "mm_vision_tower is None"),
        (LLAVA, {"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; expected 'pad' or 'square'"),
        (LLAVA, {"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; expected 'mlp2x_gelu'"),
        (LLAVA, {"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        (HUB, {"vision_feature_layer": -2}, "vision_feature_layer is -2; expected -1"),
        (HUB, {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; expected 'gelu'"),
        (HUB, {"vision_config": {"architecture": "resnet50"}}, "no architecture named 'resnet50'"),
        (HUB, {"vision_config": {"model_args": {"depth": 3}}}, "no model_args key named 'depth'"),
    ],
)
def test_what_fastvlm_does_not_use_is_refused(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config_of(tmp_path, config={**base, **change})


@pytest.mark.parametrize("values", [LLAVA, HUB], ids=["original", "transformers"])
def test_pictures_are_padded_with_black_where_no_file_says_otherwise(
    tmp_path: Path, values: dict[str, Any], tiny_tokenizer: Callable[..., Path]
) -> None:
    folder = folder_of(tiny_tokenizer(tmp_path, IDS, eos_token="<|im_end|>"), config=values)
    family = family_of(folder)
    processor = family.processor(folder, family.config(folder))
    image = processor.image_spec
    assert (image.height, image.width, image.fit, image.pad_color) == (1024, 1024, "pad", (0, 0, 0))
    assert (image.filter, image.mean, image.std) == ("bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert processor.prompt_spec.stop_token_ids == (258,)
    assert processor.image_token_id == 259


def test_a_template_of_the_folder_that_knows_pictures_is_used(
    tmp_path: Path, tiny_tokenizer: Callable[..., Path]
) -> None:
    own = (
        "{% for message in messages %}{{ message['role'] }}:"
        "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }};{% endfor %}"
        "{% endfor %}"
    )
    folder = folder_of(tiny_tokenizer(tmp_path, IDS, eos_token="<|im_end|>", chat_template=own), config=HUB)
    family = family_of(folder)
    template = family.processor(folder, family.config(folder)).template
    messages = [user_message("What is it?", num_images=1), {"role": "assistant", "content": "A cat."}]
    assert template.render(messages) == "user:<image>What is it?;assistant:A cat.;"


@pytest.mark.parametrize("values", [LLAVA, HUB], ids=["original", "transformers"])
def test_a_template_for_text_alone_gives_way_to_that_of_the_training(
    tmp_path: Path, values: dict[str, Any], tiny_tokenizer: Callable[..., Path]
) -> None:
    text_alone = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    folder = folder_of(tiny_tokenizer(tmp_path, IDS, eos_token="<|im_end|>", chat_template=text_alone), config=values)
    family = family_of(folder)
    processor = family.processor(folder, family.config(folder))
    assert processor.template.render([user_message("What is it?", num_images=1)]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert processor.template.render([{"role": "system", "content": "Be brief."}, *asked], False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    )


def test_a_question_has_the_ids_that_the_models_were_trained_with(tmp_path: Path, test_data: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((test_data / "tokenizers" / "qwen2" / name).read_bytes())
    folder = folder_of(tmp_path, config=LLAVA)
    family = family_of(folder)
    processor = family.processor(folder, family.config(folder))
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    expected = [*system, 151644, 872, 198, *[151646] * 256, 198]
    expected += [*Tokenizer.from_folder(tmp_path).encode("What is on the table?"), 151645, 198, 151644, 77091, 198]
    assert processor.input_ids([user_message("What is on the table?", num_images=1)]).tolist() == expected
    assert processor.prompt_spec.stop_token_ids == (151645,)
