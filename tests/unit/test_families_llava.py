"""What LLaVA's config files say, in both layouts, and what its prompts look like."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.detect import family_of, model_type
from edgevlm.families.family import NOT_NEEDED, Family, Placement
from edgevlm.families.folder import ModelFolder
from edgevlm.families.llava_layout import place_llava
from edgevlm.processing.chat import user_message
from edgevlm.processing.processor import Processor
from edgevlm.shapes.config import MlpConfig, QueriesConfig, VitConfig, VlmConfig

IDS = {"<s>": 256, "</s>": 257, "<image>": 258}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# config.json of llava-hf/llava-1.5-7b-hf, as published.
LLAVA_HF: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 32_000,
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32_064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
ORIGINAL: dict[str, Any] = {
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32_000,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
}
LAYER_22 = "model.vision_tower.vision_tower.vision_model.encoder.layers.22.mlp.fc1.bias"


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> Callable[..., ModelFolder]:
    """A folder with a config, a tokenizer and no weights."""

    def make(values: dict[str, Any], **settings: Any) -> ModelFolder:
        (tmp_path / "config.json").write_text(json.dumps(values))
        tiny_tokenizer(tmp_path, IDS, bos_token="<s>", eos_token="</s>", **settings)
        return ModelFolder(tmp_path)

    return make


def config_of(folder: ModelFolder) -> VlmConfig:
    return family_of(folder).config(folder)


def processor_of(folder: ModelFolder) -> Processor:
    return family_of(folder).processor(folder, config_of(folder))


def prompt(processor: Processor, *messages: Any) -> str:
    """The prompt as text, with one image token for many."""
    ids = processor.input_ids(list(messages)).tolist()
    image = processor.image_token_id
    once = [id for place, id in enumerate(ids) if id != image or ids[place - 1] != image]
    return processor.tokenizer.decode(once, skip_special_tokens=False)


@pytest.mark.parametrize("values", [LLAVA_HF, ORIGINAL], ids=["transformers", "original"])
def test_llava_1_5_is_the_same_model_in_both_layouts(folder: Callable[..., ModelFolder], values: Any) -> None:
    config = config_of(folder(values))
    vision, decoder = config.vision, config.decoder
    assert isinstance(vision, VitConfig)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.grid_size) == (23, 1024, 24)
    assert (vision.class_token, vision.pre_layernorm, vision.post_layernorm) == (True, True, False)
    assert config.projector == MlpConfig()
    assert (decoder.hidden_size, decoder.intermediate_size, decoder.num_hidden_layers) == (4096, 11_008, 32)
    assert (decoder.max_position_embeddings, decoder.tie_word_embeddings) == (4096, False)
    assert config.num_vision_tokens == 576


@pytest.mark.parametrize(
    ("values", "family"),
    [
        (LLAVA_HF, "llava"),
        ({**LLAVA_HF, "model_type": "llava_next"}, "llava_next"),
        (ORIGINAL, "llava_llama"),
        ({**ORIGINAL, "model_type": "llava"}, "llava_llama"),
        ({**ORIGINAL, "num_visual_tokens": "second_stage"}, "mqt"),
        ({**ORIGINAL, "model_type": "llava", "num_visual_tokens": 36}, "mqt"),
    ],
)
def test_keys_tell_what_model_type_does_not(folder: Callable[..., ModelFolder], values: Any, family: str) -> None:
    assert model_type(folder(values)) == family


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_learned_queries_among_the_weights_tell_an_mqt_without_a_budget(
    folder: Callable[..., ModelFolder], kind: str
) -> None:
    found = folder({**ORIGINAL, "model_type": kind})
    shards = {"model.query_abstractor.query": "model-1.safetensors", LAYER_22: "model-2.safetensors"}
    (found.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert model_type(found) == "mqt"
    assert config_of(found).num_vision_tokens == 256
    del shards["model.query_abstractor.query"]
    (found.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert model_type(ModelFolder(found.path)) == "llava_llama"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"features of several layers \(\[-2, -5\]\)"),
        ({"vision_feature_select_strategy": "full"}, "would keep the class token; expected 'default'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "would drop the first patch; expected 'full'"),
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"text_config": {"model_type": "gemma"}}, "gemma"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; expected 'gelu'"),
    ],
)
def test_what_we_do_not_have_is_refused(folder: Callable[..., ModelFolder], changes: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        config_of(folder({**LLAVA_HF, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-338"}, "Did you mean 'clip-vit-large-patch14-336'"),
        ({"mm_vision_tower": None}, "put its config.json into"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'; expected 'patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; expected False"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
    ],
)
def test_what_the_original_project_can_and_we_cannot_is_refused(
    folder: Callable[..., ModelFolder], changes: Any, words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        config_of(folder({**ORIGINAL, **changes}))


def test_a_table_must_be_a_table(folder: Callable[..., ModelFolder]) -> None:
    with pytest.raises(ConfigError, match="text_config is 'llama'; expected a table"):
        config_of(folder({**LLAVA_HF, "text_config": "llama"}))


def test_weights_without_their_vision_encoder_are_refused_by_its_name(folder: Callable[..., ModelFolder]) -> None:
    found = folder(ORIGINAL)
    save_file({"model.norm.weight": torch.zeros(1)}, found.path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"\('openai/clip-vit-large-patch14-336'\) are not in .*llava-hf"):
        config_of(found)
    save_file({LAYER_22: torch.zeros(1)}, found.path / "model.safetensors")
    assert config_of(ModelFolder(found.path)).num_vision_tokens == 576


def test_a_tower_is_described_by_a_folder_of_its_name(folder: Callable[..., ModelFolder]) -> None:
    found = folder({**ORIGINAL, "mm_vision_tower": "someone/small-clip"})
    (found.path / "small-clip").mkdir()
    (found.path / "small-clip" / "config.json").write_text(json.dumps({"vision_config": {"image_size": 64}}))
    vision = config_of(found).vision
    assert isinstance(vision, VitConfig)
    assert (vision.image_size, vision.patch_size, vision.hidden_size) == (64, 32, 768)


@pytest.mark.parametrize(
    "described",
    [{"model_type": "siglip", "vision_config": {}}, {"vision_config": {"model_type": "siglip_vision_model"}}],
)
def test_a_described_tower_that_is_no_clip_is_refused(folder: Callable[..., ModelFolder], described: Any) -> None:
    found = folder({**ORIGINAL, "mm_vision_tower": "google/siglip-base"})
    (found.path / "siglip-base").mkdir()
    (found.path / "siglip-base" / "config.json").write_text(json.dumps(described))
    with pytest.raises(UnsupportedError, match=r"siglip-base.config.json: model_type is 'siglip.*; expected 'clip'"):
        config_of(found)


@pytest.mark.parametrize("name", ["a/..", "..", "a\\..", "."])
def test_a_tower_is_not_described_outside_the_folder(folder: Callable[..., ModelFolder], name: str) -> None:
    found = folder({**ORIGINAL, "mm_vision_tower": name})
    (found.path.parent / "config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="no mm_vision_tower named"):
        config_of(found)


def test_the_original_projects_names_have_places(folder: Callable[..., ModelFolder]) -> None:
    config = config_of(folder(ORIGINAL))

    def place(name: str) -> Any:
        return place_llava(name, config)

    assert place(LAYER_22) == (Placement(name="vision_encoder.layers.22.fc1.bias"),)
    assert place(LAYER_22.replace("22", "23")) == NOT_NEEDED
    assert place("model.mm_projector.0.weight") == (Placement(name="projector.1.weight"),)
    assert place("model.mm_projector.2.bias") == (Placement(name="projector.3.bias"),)
    assert place("model.mm_projector.weight") == (Placement(name="projector.1.weight"),)
    assert place("model.image_newline") == NOT_NEEDED
    assert place("model.layers.0.mlp.up_proj.weight") == (Placement(name="decoder.layers.0.mlp.up_proj.weight"),)
    assert place("lm_head.weight") == (Placement(name="lm_head.weight"),)
    assert place("model.mm_projector.4.weight") is None
    assert place("model.vision_resampler.query") is None


def test_matryoshka_queries_are_as_many_as_config_json_says(folder: Callable[..., ModelFolder]) -> None:
    for value, count in (("second_stage", 256), (36, 36)):
        config = config_of(folder({**ORIGINAL, "num_visual_tokens": value}))
        assert config.projector == QueriesConfig(num_queries=count)
        assert config.num_vision_tokens == count


@pytest.mark.parametrize(
    ("ratio", "fit", "color"),
    [("pad", "pad", (122, 116, 104)), (None, "center-crop", (0, 0, 0)), ("anyres", "stretch", (0, 0, 0))],
)
def test_image_aspect_ratio_decides_how_a_picture_becomes_a_square(
    folder: Callable[..., ModelFolder], ratio: str | None, fit: str, color: tuple[int, int, int]
) -> None:
    spec = processor_of(folder({**ORIGINAL, "image_aspect_ratio": ratio})).image_spec
    assert (spec.fit, spec.pad_color, spec.filter, spec.height, spec.width) == (fit, color, "bicubic", 336, 336)


@pytest.mark.parametrize("values", [LLAVA_HF, ORIGINAL], ids=["transformers", "original"])
def test_without_a_template_the_prompt_is_vicunas(folder: Callable[..., ModelFolder], values: Any) -> None:
    processor = processor_of(folder(values))
    first = user_message("What is it?", num_images=1)
    assert prompt(processor, first) == f"<s>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    answer, second = {"role": "assistant", "content": "A cat."}, user_message("Sure?")
    assert prompt(processor, first, answer, second) == (
        f"<s>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    )
    assert prompt(processor, first, second).endswith("What is it? USER: Sure? ASSISTANT:")
    system = {"role": "system", "content": "Be brief."}
    assert prompt(processor, system, first) == "<s>Be brief. USER: <image>\nWhat is it? ASSISTANT:"
    assert processor.prompt_spec.stop_token_ids == (257,)
    assert len(processor.image_positions(processor.input_ids([first]))) == 576


def test_a_refusal_names_the_file_that_it_is_about(folder: Callable[..., ModelFolder]) -> None:
    found = folder({**LLAVA_HF, "vision_config": {"image_size": 336, "patch_size": 14, "num_attention_heads": 7}})
    with pytest.raises(ConfigError, match=f"^{re.escape(str(found.path / 'config.json'))}: "):
        config_of(found)
    found = folder({**ORIGINAL, "mm_projector_type": ["linear"]})
    with pytest.raises(UnsupportedError, match=f"^{re.escape(str(found.path / 'config.json'))}: no mm_projector_type"):
        config_of(found)
    refusing = Family(name="mine", config=refuse, processor=lambda folder, config: refuse(folder), place=place_llava)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(found.path / 'config.json'))}: a field$"):
        refusing.config(found)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(found.path))}: a field$"):
        refusing.processor(found, config_of(folder(ORIGINAL)))


def refuse(folder: ModelFolder) -> Any:
    raise ConfigError("a field")


# The form of llava-hf's templates: no <s>, and contents are lists of parts.
OF_PARTS = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def with_first_token(folder: ModelFolder) -> None:
    """Let the tokenizer put <s> in front of whatever it encodes, as Llama's does."""
    path = folder.path / "tokenizer.json"
    rules = json.loads(path.read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": tokens,
    }
    path.write_text(json.dumps(rules))


@pytest.mark.parametrize(("adds_first", "start"), [(True, "<s>"), (False, "")])
def test_the_folders_template_is_used_with_what_its_tokenizer_puts_in_front(
    folder: Callable[..., ModelFolder], adds_first: bool, start: str
) -> None:
    found = folder(LLAVA_HF, chat_template=OF_PARTS)
    if adds_first:
        with_first_token(found)
    messages = user_message("What?", num_images=1), {"role": "assistant", "content": "A cat."}, user_message("Sure?")
    text = prompt(processor_of(found), *messages)
    assert text == f"{start}USER: <image>\nWhat? ASSISTANT: A cat. USER: Sure? ASSISTANT:"


def test_a_template_that_writes_the_first_token_is_left_alone(folder: Callable[..., ModelFolder]) -> None:
    found = folder(LLAVA_HF, chat_template="{{ bos_token }}" + OF_PARTS)
    with_first_token(found)
    assert prompt(processor_of(found), user_message("What?")) == "<s>USER: What? ASSISTANT:"


def test_a_template_that_knows_no_pictures_gives_way_to_vicunas(folder: Callable[..., ModelFolder]) -> None:
    of_text = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    text = prompt(processor_of(folder(ORIGINAL, chat_template=of_text)), user_message("What?", num_images=1))
    assert text == f"<s>{SYSTEM} USER: <image>\nWhat? ASSISTANT:"


def test_the_image_token_is_the_one_whose_id_config_json_names(
    folder: Callable[..., ModelFolder], tiny_tokenizer: Callable[..., Path]
) -> None:
    found = folder({**LLAVA_HF, "image_token_index": 300})
    assert processor_of(found).prompt_spec.image_token == "<image>"  # there is no token 300
    tiny_tokenizer(found.path, {"<s>": 256, "</s>": 257, "[IMG]": 300}, eos_token="</s>")
    processor = processor_of(found)
    assert (processor.prompt_spec.image_token, processor.image_token_id) == ("[IMG]", 300)
    assert "<image>" not in processor.tokenizer.added_tokens
    assert "USER: [IMG]\nWhat?" in prompt(processor, user_message("What?", num_images=1))
