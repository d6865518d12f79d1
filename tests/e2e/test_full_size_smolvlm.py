"""SmolVLM-256M at its real size, with random weights under transformers' names: from a folder to a bundle's answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from edgevlm.export.pipeline import export_bundle
from edgevlm.models.checkpoint import load_model
from edgevlm.runtimes.open import open_bundle
from edgevlm.verify import golden

QUESTION = "What is on the table?"
TILE, LONGEST_EDGE = 512, 1024  # published: 2048, which would take twice the time
PLACES = {f"<row_{row + 1}_col_{column + 1}>": 49_153 + 6 * row + column for row in range(6) for column in range(6)}
SPECIAL = {
    "<|im_start|>": 257,
    "<global-img>": 49_152,
    **PLACES,
    "<fake_token_around_image>": 49_189,
    "<image>": 49_190,
    "<end_of_utterance>": 49_279,
}
CONFIG: dict[str, Any] = {
    "model_type": "idefics3",
    "scale_factor": 4,
    "image_token_id": 49_190,
    "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 768, "image_size": TILE, "patch_size": 16, "num_attention_heads": 12},
    "text_config": {
        "model_type": "llama",
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
    },
}
PREPROCESSING = {
    "image_processor_type": "Idefics3ImageProcessor",
    "size": {"longest_edge": LONGEST_EDGE},
    "max_image_size": {"longest_edge": TILE},
    "do_image_splitting": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 1,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers has them."""
    config = Idefics3Config(**{name: value for name, value in CONFIG.items() if name != "model_type"})
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    random_weights: Callable[..., None],
    word_tokenizer: Callable[..., None],
) -> Path:
    """The folder of a checkpoint as the hub has it, but for the values of its weights."""
    folder = tmp_path_factory.mktemp("SmolVLM-256M")
    random_weights(folder, shapes(), "BF16")
    word_tokenizer(folder, 49_280, SPECIAL)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 49_279}))
    return folder


@pytest.mark.slow
def test_smolvlm_256m_answers_alike_in_pytorch_and_from_its_bundle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "MOST_TILES", 3)  # a tile is 0.2 TFLOP, and every comparison encodes them again
    bundle = export_bundle(folder, out=tmp_path / "smolvlm.bundle")
    verification = json.loads((bundle / "verify.json").read_text())
    assert verification["passed"]

    picture = np.random.default_rng(0).integers(0, 256, (100, 400, 3), dtype=np.uint8)  # two tiles and the whole
    exported = open_bundle(bundle).ask(picture, QUESTION, max_tokens=16)
    loaded = load_model(folder).open().ask(picture, QUESTION, max_tokens=16)
    assert exported.num_vision_tokens == loaded.num_vision_tokens == 3 * 64
    assert exported.num_prompt_tokens == loaded.num_prompt_tokens
    assert exported.token_ids == loaded.token_ids
    assert exported.text == loaded.text != ""
