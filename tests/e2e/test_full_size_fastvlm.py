"""FastVLM-0.5B at its real size, with random weights under transformers' names: from a folder to a bundle's answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgevlm.export.pipeline import export_bundle
from edgevlm.families.fastvlm import FAMILY
from edgevlm.families.folder import ModelFolder
from edgevlm.models.checkpoint import load_model
from edgevlm.models.weights import empty_model
from edgevlm.runtimes.open import open_bundle

QUESTION = "What is on the table?"
SPECIAL = {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645, "<image>": 151_646}
CONTEXT = 1024  # published: 32,768, of which a picture takes 256
TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152_000,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151_645,
}
VISION = {
    "model_type": "timm_wrapper",
    "architecture": "fastvit_mci3",
    "model_args": {"inference_mode": True},
    "hidden_size": 3072,
    "num_classes": 0,
}
CONFIG: dict[str, Any] = {
    "model_type": "fast_vlm",
    "image_token_index": 151_646,
    "image_seq_length": 256,
    "vision_config": VISION,
    "text_config": TEXT,
    "tie_word_embeddings": False,
}
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 1024},
    "crop_size": {"height": 1024, "width": 1024},
    "resample": 3,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers has them."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    config = FastVlmConfig(**{name: value for name, value in CONFIG.items() if name != "model_type"})
    with torch.device("meta"):
        model = FastVlmForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def lifelike(name: str, values: Tensor) -> Tensor:
    """Variances above 0, small layer scales, and mixers that leave most of what they mix as it is."""
    if name.endswith("running_var"):
        return 1.0 + values.square()
    if name.endswith("gamma"):
        return 0.1 * values
    if name.endswith(("token_mixer.reparam_conv.weight", "pos_emb.reparam_conv.weight")):
        middle = values.shape[-1] // 2
        values = 0.3 * values
        values[:, :, middle, middle] += 1.0
    return values


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    random_weights: Callable[..., None],
    word_tokenizer: Callable[..., None],
) -> Path:
    """The folder of a checkpoint as the hub has it, but for the values of its weights."""
    folder = tmp_path_factory.mktemp("FastVLM-0.5B")
    stored = {name: shape for name, shape in shapes().items() if not name.endswith("num_batches_tracked")}
    random_weights(folder, stored, "F16", lifelike)
    word_tokenizer(folder, 151_647, SPECIAL)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def test_fastvlm_05b_has_the_tensors_that_transformers_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = FAMILY.config(ModelFolder(tmp_path))
    theirs = shapes()
    placed = {place.name: shape for name, shape in theirs.items() for place in FAMILY.place(name, config) or ()}
    ours = empty_model(config)
    assert len(theirs) == len(placed) == 923
    assert placed == {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == 756_438_752 + 2 * 64 * 896  # rows up to 152,000


@pytest.mark.slow
def test_fastvlm_05b_answers_alike_in_pytorch_and_from_its_bundle(folder: Path, tmp_path: Path) -> None:
    bundle = export_bundle(folder, out=tmp_path / "fastvlm.bundle", half_storage=True, max_context=CONTEXT)
    verification = json.loads((bundle / "verify.json").read_text())
    assert verification["passed"]

    picture = np.random.default_rng(0).integers(0, 256, (120, 400, 3), dtype=np.uint8)
    exported = open_bundle(bundle).ask(picture, QUESTION, max_tokens=16)
    loaded = load_model(folder, max_context=CONTEXT).open().ask(picture, QUESTION, max_tokens=16)
    assert exported.num_vision_tokens == loaded.num_vision_tokens == 256
    assert exported.num_prompt_tokens == loaded.num_prompt_tokens
    assert exported.token_ids == loaded.token_ids
    assert exported.text == loaded.text != ""
