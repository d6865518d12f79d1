"""Idefics3 and SmolVLM: a folder as transformers saves it, loaded by us, gives what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.families.folder import ModelFolder
from edgevlm.families.idefics3 import FAMILY, MAX_GRID, SHARED_POSITIONS, TEMPLATE, check_positions
from edgevlm.models.checkpoint import Checkpoint, load_model
from edgevlm.models.vlm import Vlm
from edgevlm.processing.chat import user_message
from edgevlm.processing.split import Idefics3Tiles
from edgevlm.shapes.config import VitConfig

TILE, NUM_TOKENS = 32, 16
SPECIAL = (
    *("<|im_start|>", "<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
IDS = {token: 256 + number for number, token in enumerate(SPECIAL)}
VISION = {
    "image_size": TILE,
    "patch_size": 4,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 270,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": IDS["<end_of_utterance>"],
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}
CLASSES = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
PROMPT, HALF = "What is it?", (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Pair:
    """transformers' model and processor, and ours, of one folder; one picture and one question to both."""

    reference: nn.Module
    ours: Vlm
    checkpoint: Checkpoint
    pixels: Tensor  # (S, 3, H, W), transformers'
    ids: Tensor  # (1, T), transformers'


def reference_processor(folder: Path, *, splits: bool) -> Idefics3Processor:
    """The processor whose files a folder of such a model holds."""
    settings = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    images = Idefics3ImageProcessorPil(**settings, do_image_splitting=splits)
    images.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return Idefics3Processor(images, tokenizer, image_seq_len=NUM_TOKENS, chat_template=TEMPLATE)


def picture(height: int = 75, width: int = 100) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(
    params=[("idefics3", True, False), ("smolvlm", True, False), ("smolvlm", False, False), ("smolvlm", True, True)],
    ids=["idefics3", "smolvlm", "smolvlm-one-tile", "smolvlm-tied"],
)
def pair(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_tokenizer: Callable[..., Path],
    spread_out: Callable[..., nn.Module],
) -> Pair:
    kind, splits, tied = request.param
    make_config, make_model = CLASSES[kind]
    config = make_config(
        vision_config=VISION,
        text_config={**TEXT, "tie_word_embeddings": tied},
        scale_factor=2,
        image_token_id=IDS["<image>"],
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    reference = spread_out(make_model(config))
    reference.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path, IDS, eos_token="<end_of_utterance>")
    processor = reference_processor(tmp_path, splits=splits)
    text = processor.apply_chat_template([user_message(PROMPT, num_images=1)], add_generation_prompt=True)
    inputs = processor(images=[picture()], text=text, return_tensors="pt", add_special_tokens=False)
    checkpoint = load_model(tmp_path)
    return Pair(reference, checkpoint.model, checkpoint, inputs["pixel_values"][0], inputs["input_ids"])


def rows(pair: Pair) -> Tensor:
    """Our prompt: embeddings (1, T, D) with the vision tokens in their places."""
    embeds = pair.ours.embed_tokens(pair.ids).clone()
    embeds[0, pair.ids[0] == IDS["<image>"]] = pair.ours.encode(pair.pixels).flatten(0, 1)
    return embeds


def reference_logits(pair: Pair, generated: list[int]) -> Tensor:
    """transformers' logits (T, V) of the prompt and what came after."""
    ids = torch.cat((pair.ids, torch.tensor([generated], dtype=torch.long)), 1)
    return pair.reference(input_ids=ids, pixel_values=pair.pixels[None]).logits[0]


def test_pixels_and_prompts_are_those_of_transformers(pair: Pair) -> None:
    processor = pair.checkpoint.processor
    prepared = processor.prepare(picture())
    num_views = 1 if len(pair.pixels) == 1 else 5
    assert prepared.pixel_values.shape == (num_views, 3, TILE, TILE)
    np.testing.assert_allclose(prepared.pixel_values, pair.pixels.numpy(), atol=1e-6)
    ids = processor.input_ids([user_message(PROMPT, num_images=1)], grids=[prepared.grid])
    assert ids.tolist() == pair.ids[0].tolist()
    assert len(processor.image_positions(ids)) == num_views * NUM_TOKENS


@torch.no_grad()
def test_features_and_vision_tokens_are_those_of_transformers(pair: Pair, assert_close: Callable[..., float]) -> None:
    reference = pair.reference.model.get_image_features(pair.pixels[None])
    assert_close(pair.ours.vision_encoder(pair.pixels), reference.last_hidden_state)
    assert_close(pair.ours.encode(pair.pixels).flatten(0, 1), torch.cat(reference.pooler_output))


@torch.no_grad()
def test_the_prompts_logits_and_ten_greedy_steps_are_those_of_transformers(
    pair: Pair, assert_same_steps: Callable[..., list[int]]
) -> None:
    assert_same_steps(pair.ours, rows(pair), partial(reference_logits, pair))


def test_a_prompt_of_two_pictures_and_an_answer_keeps_every_word(pair: Pair) -> None:
    """These templates read lists of parts alone: an answer in plain text would vanish."""
    processor = pair.checkpoint.processor
    messages = [
        user_message("One?", num_images=1),
        {"role": "assistant", "content": "A cat."},
        user_message("And this?", num_images=1),
    ]
    text = processor.tokenizer.decode(processor.input_ids(messages).tolist(), skip_special_tokens=False)
    one = f"<fake_token_around_image><global-img>{'<image>' * NUM_TOKENS}<fake_token_around_image>"
    assert text == (
        f"<|im_start|>User:{one}One?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
        f"User:{one}And this?<end_of_utterance>\nAssistant:"
    )
    assert processor.prompt_spec.stop_token_ids == (IDS["<end_of_utterance>"],)


def test_every_tensor_of_a_file_has_one_place_and_any_other_name_has_none(pair: Pair) -> None:
    config, files = pair.ours.config, pair.checkpoint.files
    stored = [name for file in files for name in load_file(file)]
    assert ("lm_head.weight" in stored) != config.decoder.tie_word_embeddings
    places = [place.name for name in stored for place in FAMILY.place(name, config) or ()]
    assert sorted(places) == sorted(pair.ours.state_dict())
    assert FAMILY.place("model.perceiver.latents", config) is None


def reads_plain_positions(side: int) -> bool:
    """Whether transformers gives the patches of a full tile the positions 0, 1, 2, …"""
    vision = {**VISION, "image_size": side, "patch_size": 1, "hidden_size": 1, "num_attention_heads": 1}
    embeddings = SmolVLMVisionEmbeddings(SmolVLMConfig(vision_config=vision).vision_config)
    for parameter in embeddings.parameters():
        parameter.data.zero_()
    embeddings.position_embedding.weight.data[:, 0] = torch.arange(side**2.0)
    found = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))
    return torch.equal(found.flatten(), torch.arange(side**2.0))


def test_grids_on_which_neighbours_share_a_position_are_refused() -> None:
    refused = {side for side in range(2, MAX_GRID + 1) if not reads_plain_positions(side)}
    assert refused == SHARED_POSITIONS
    with pytest.raises(UnsupportedError, match="25x25 patches"):
        check_positions(VitConfig(**{**VISION, "image_size": 25, "patch_size": 1}), where="config.json")


@pytest.fixture
def bare_folder(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> ModelFolder:
    """config.json and a tokenizer, and nothing that says how pictures and prompts are made."""
    values = {"model_type": "smolvlm", "scale_factor": 2, "vision_config": VISION, "text_config": TEXT}
    (tmp_path / "config.json").write_text(json.dumps(values))
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokens = dict.fromkeys([*SPECIAL, *places])
    tiny_tokenizer(tmp_path, {token: 256 + number for number, token in enumerate(tokens)})
    return ModelFolder(tmp_path)


def test_where_no_file_says_so_pictures_are_cut_as_smolvlm_was_trained(bare_folder: ModelFolder) -> None:
    spec = FAMILY.processor(bare_folder, FAMILY.config(bare_folder)).image_spec
    assert (spec.height, spec.fit, spec.filter, spec.mean, spec.std) == (TILE, "stretch", "lanczos", HALF, HALF)
    assert spec.split == Idefics3Tiles(longest_edge=4 * TILE)


def test_the_published_template_and_ours_write_the_same(bare_folder: ModelFolder) -> None:
    config, messages = FAMILY.config(bare_folder), [user_message(PROMPT, num_images=1)]
    ours = FAMILY.processor(bare_folder, config).input_ids(messages, grids=[(2, 1)])
    (bare_folder.path / "chat_template.json").write_text(json.dumps({"chat_template": DEFAULT_CHAT_TEMPLATE}))
    published = FAMILY.processor(bare_folder, config)
    assert published.input_ids(messages, grids=[(2, 1)]).tolist() == ours.tolist()
    said = published.input_ids([*messages, {"role": "assistant", "content": "A cat."}]).tolist()
    assert "Assistant: A cat.<end" in published.tokenizer.decode(said, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"text_config": None}, ConfigError, "text_config is None; expected a table"),
        ({"text_config": {**TEXT, "model_type": "gemma"}}, UnsupportedError, "'gemma'"),
        ({"vision_config": {**VISION, "image_size": 100, "patch_size": 4}}, UnsupportedError, "25x25 patches"),
        ({"scale_factor": "2"}, ConfigError, "factor must be int; found '2'"),
        ({"scale_factor": 3}, ConfigError, "8x8 features does not divide by the projector's factor 3"),
    ],
)
def test_what_no_published_model_has_is_refused(
    bare_folder: ModelFolder, changes: dict[str, object], error: type[Exception], complaint: str
) -> None:
    path = bare_folder.path / "config.json"
    path.write_text(json.dumps({**bare_folder.config, **changes}))
    with pytest.raises(error, match=complaint):
        FAMILY.config(ModelFolder(bare_folder.path))


def smolvlm_256m() -> dict[str, object]:
    """config.json of SmolVLM-256M as published: the encoder's defaults are left out."""
    text = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "vocab_size": 49_280,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000,
        "model_type": "llama",
        "hidden_act": "silu",
    }
    vision = {"hidden_size": 768, "image_size": 512, "patch_size": 16, "num_attention_heads": 12}
    head = {"model_type": "idefics3", "scale_factor": 4, "image_token_id": 49_190, "tie_word_embeddings": False}
    return {**head, "text_config": text, "vision_config": vision}


SMOLVLM_500M = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}


@pytest.mark.parametrize(("changes", "count"), [({}, 256_484_928), (SMOLVLM_500M, 507_482_304)], ids=["256M", "500M"])
def test_published_configs_have_the_published_number_of_parameters(
    tmp_path: Path, changes: dict[str, int], count: int
) -> None:
    values = smolvlm_256m()
    values["text_config"] = {**values["text_config"], **changes}  # type: ignore[dict-item]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = FAMILY.config(ModelFolder(tmp_path))
    with torch.device("meta"):
        model = Vlm(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert config.num_vision_tokens == 64
