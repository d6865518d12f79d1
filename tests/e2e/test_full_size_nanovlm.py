"""nanoVLM-222M at its real size, with random weights under its own names: from a folder to a bundle's answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.export.pipeline import export_bundle
from edgevlm.models.checkpoint import load_model
from edgevlm.processing.chat import user_message
from edgevlm.runtimes.open import open_bundle

QUESTION = "What is on the table?"
CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_img_size": 224,
    "vit_n_heads": 12,
    "vit_dropout": 0.0,
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
    "lm_dropout": 0.0,
    "lm_n_blocks": 30,
    "lm_attn_scaling": 1.0,
    "lm_eos_token_id": 0,
    "lm_max_length": 79,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-135M",
    "lm_tokenizer": "HuggingFaceTB/cosmo2-tokenizer",
    "mp_pixel_shuffle_factor": 2,
}
# One block each of the vision encoder and of the decoder; a shape without its first axis is a bias.
VISION_BLOCK = {"ln1": (768,), "ln2": (768,), "attn.qkv_proj": (2304, 768), "attn.out_proj": (768, 768)}
VISION_BLOCK |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
TEXT_BLOCK = {"norm1": (576,), "norm2": (576,), "attn.q_proj": (576, 576), "attn.out_proj": (576, 576)}
TEXT_BLOCK |= {"attn.k_proj": (192, 576), "attn.v_proj": (192, 576)}
TEXT_BLOCK |= {"mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536)}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, which holds of the tied pair only the head."""
    found: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (768, 3, 16, 16),
        "vision_encoder.patch_embedding.conv.bias": (768,),
        "vision_encoder.patch_embedding.position_embedding": (1, 196, 768),
        "vision_encoder.layer_norm.weight": (768,),
        "vision_encoder.layer_norm.bias": (768,),
        "MP.proj.weight": (576, 3072),
        "decoder.head.weight": (49_152, 576),
        "decoder.rotary_embd.inv_freq": (32,),
        "decoder.norm.weight": (576,),
    }
    for number in range(12):
        for name, shape in VISION_BLOCK.items():
            at = f"vision_encoder.blocks.{number}.{name}"
            found |= {f"{at}.weight": shape, f"{at}.bias": shape[:1]}
    for number in range(30):
        found |= {f"decoder.blocks.{number}.{name}.weight": shape for name, shape in TEXT_BLOCK.items()}
    return found


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    random_weights: Callable[..., None],
    word_tokenizer: Callable[..., None],
) -> Path:
    """The folder of a checkpoint as the hub has it, with the tokenizer beside it that its config names."""
    folder = tmp_path_factory.mktemp("nanoVLM-222M")
    random_weights(folder, shapes(), "F16")
    word_tokenizer(folder, 49_152, {"<|endoftext|>": 257})
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.slow
def test_nanovlm_222m_answers_alike_in_pytorch_and_from_its_bundle(folder: Path, tmp_path: Path) -> None:
    bundle = export_bundle(folder, out=tmp_path / "nanovlm.bundle")
    assert json.loads((bundle / "verify.json").read_text())["passed"]

    picture = np.random.default_rng(0).integers(0, 256, (100, 400, 3), dtype=np.uint8)
    vlm = open_bundle(bundle)
    exported = vlm.ask(picture, QUESTION, max_tokens=16)
    loaded = load_model(folder).open().ask(picture, QUESTION, max_tokens=16)
    assert exported.num_vision_tokens == 49
    assert exported.token_ids == loaded.token_ids
    assert exported.text == loaded.text != ""

    ids = vlm.processor.input_ids([user_message(QUESTION, num_images=1)])
    assert ids[:49].tolist() == [49_152] * 49  # a row that the embedding does not have, and need not have
    assert vlm.processor.tokenizer.decode(ids[49:].tolist()) == f"Question: {QUESTION} Answer:"
