"""A model's card, from its config alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm.core.errors import UnsupportedError
from edgevlm.families.card import make_card
from edgevlm.families.folder import ModelFolder
from edgevlm.shapes.config import HybridConfig
from edgevlm.shipped import find_weights

IDEFICS3 = {
    "model_type": "idefics3",
    "scale_factor": 2,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    },
}


@pytest.fixture
def config_alone(tmp_path: Path, tiny_checkpoint: Path) -> ModelFolder:
    """A folder that holds config.json and nothing else."""
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    return ModelFolder(tmp_path)


def test_a_card_needs_the_config_alone(config_alone: ModelFolder) -> None:
    card = make_card(config_alone)
    assert card.family == "edgevlm"
    assert card.parameters == sum(part.parameters for part in card.parts)
    assert card.weight_bytes["fp16"] * 2 == card.weight_bytes["fp32"]


def test_the_card_of_nano_counts_what_is_in_its_file() -> None:
    card = make_card(ModelFolder(find_weights("nano")))
    assert card.parameters == 6_042_816
    assert card.vision_tokens == 16
    assert card.cache_bytes_per_token["fp32"] == 2 * 4 * 1 * 64 * 4 * 2


def test_a_larger_picture_has_more_vision_tokens(config_alone: ModelFolder) -> None:
    small, large = make_card(config_alone), make_card(config_alone, image_size=64)
    assert (small.vision_tokens, large.vision_tokens) == (4, 16)
    assert large.flops > small.flops
    assert large.parameters == small.parameters


def test_a_size_that_the_encoder_cannot_take_is_refused_with_the_unit(config_alone: ModelFolder) -> None:
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        make_card(config_alone, image_size=40)


def test_every_size_listed_is_one_that_the_encoder_takes(config_alone: ModelFolder) -> None:
    card = make_card(config_alone)
    assert isinstance(card.config.vision, HybridConfig)
    unit = card.config.vision.stride * card.config.projector.factor
    assert all(side % unit == 0 for side in card.vision_tokens_by_image_size)
    assert card.vision_tokens_by_image_size[card.image_size] == card.vision_tokens


def test_the_verb_prints_the_card_without_torch_and_without_weights(config_alone: ModelFolder) -> None:
    program = "import sys; from edgevlm.cli.app import main; sys.argv[1:] = ['inspect', sys.argv[1], '--json']\n"
    program += "try: main()\nfinally: assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", program, str(config_alone.path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["targets"] == ["onnx", "tensorrt"]


def test_tiles_are_counted_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(IDEFICS3))
    (tmp_path / "tokenizer.json").write_text("broken")  # never looked at
    counts = make_card(ModelFolder(tmp_path), name="mine").vision_tokens_by_picture
    assert counts["512x512"] == 17 * 4
    tiles = {"image_processor_type": "SmolVLMImageProcessor", "max_image_size": {"longest_edge": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**tiles, "size": {"longest_edge": 128}}))
    counts = make_card(ModelFolder(tmp_path)).vision_tokens_by_picture
    assert (counts["512x512"], counts["1080x1920"]) == (5 * 4, 5 * 4)


def test_what_stands_in_a_folder_is_read_once(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path)
    assert folder.json("a.json") == folder.json("a.json") == {}
    (tmp_path / "b.json").write_text('{"a": 1}')
    assert folder.json("b.json") is folder.json("b.json")
    assert (folder.tensor_names, folder.tensor("x")) == (frozenset(), None)
