"""Exported parts against PyTorch, for every decoder layout, projector and encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from edgevlm.export.parts import Part, split
from edgevlm.export.target import Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import (
    DecoderConfig,
    HybridConfig,
    MlpConfig,
    PoolConfig,
    UnshuffleConfig,
    VitConfig,
    VlmConfig,
)

HYBRID = HybridConfig(image_size=32, widths=(16, 32), depths=(1, 1))
VIT = VitConfig(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
)
DECODERS = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "untied": {"tie_word_embeddings": False},
    "theta": {"rope_theta": 1_000_000.0},
}
ENCODERS = {
    "hybrid-mlp": (HYBRID, MlpConfig()),
    "hybrid-pool": (HYBRID, PoolConfig()),
    "vit-unshuffle": (VIT, UnshuffleConfig()),
}
K, HEAD, LAYERS = 1, 32, 2


def tiny(vision: HybridConfig | VitConfig = HYBRID, projector: object = None, **decoder: object) -> Vlm:
    """Random weights that float16 holds exactly."""
    sizes = {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": K,
        "head_dim": HEAD,
        "max_position_embeddings": 32,
    }
    config = DecoderConfig(**sizes, **heads, **decoder)  # type: ignore[arg-type]
    model = Vlm(VlmConfig(vision=vision, projector=projector or MlpConfig(), decoder=config))  # type: ignore[arg-type]
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
    return model.eval()


def lower(model: Vlm, name: str, folder: Path, **options: bool) -> onnxruntime.InferenceSession:
    part: Part = next(part for part in split(model) if part.name == name)
    return onnxruntime.InferenceSession(str(folder / OnnxTarget(Lowering(**options)).lower(part, folder).file))


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_and_ten_steps_equal_pytorch(name: str, tmp_path: Path) -> None:
    model = tiny(**DECODERS[name])
    session, reference = lower(model, "decoder_model_merged", tmp_path), TorchSession(model)
    rows = np.random.default_rng(0).standard_normal((1, 5, 64), np.float32)
    past = {
        f"past_key_values.{i}.{k}": np.zeros((1, K, 0, HEAD), np.float32)
        for i in range(LAYERS)
        for k in ("key", "value")
    }
    expected = reference.prefill(rows)
    for step in range(11):
        mask = np.ones((1, 5 + step), np.int64)
        logits, *present = session.run(None, {"inputs_embeds": rows, "attention_mask": mask, **past})
        np.testing.assert_allclose(logits[0, 0], expected, atol=2e-5)
        past = dict(zip(past, present, strict=True))
        token = int(expected.argmax())
        rows, expected = reference.embed(np.array([[token]])), reference.decode(token)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_vision_encoders_equal_pytorch(name: str, batch: int, tmp_path: Path) -> None:
    model = tiny(*ENCODERS[name])
    pixels = np.random.default_rng(0).standard_normal((batch, 3, 32, 32), np.float32)
    (features,) = lower(model, "vision_encoder", tmp_path).run(None, {"pixel_values": pixels})
    np.testing.assert_allclose(features, TorchSession(model).encode(pixels), atol=2e-5)


def test_embedding_rows_are_exact(tmp_path: Path) -> None:
    model = tiny()
    ids = np.array([[0, 79, 5], [1, 2, 3]])
    (rows,) = lower(model, "embed_tokens", tmp_path).run(None, {"input_ids": ids})
    assert np.array_equal(rows, TorchSession(model).embed(ids))


@pytest.mark.parametrize("part", ["vision_encoder", "embed_tokens", "decoder_model_merged"])
def test_half_storage_halves_the_file_and_changes_no_weight(part: str, tmp_path: Path) -> None:
    model = tiny(VIT)  # without batch norms, so that every weight stays one that float16 holds
    (tmp_path / "half").mkdir()
    whole, half = lower(model, part, tmp_path), lower(model, part, tmp_path / "half", half_storage=True)
    feeds = {
        value.name: np.ones(
            [size if isinstance(size, int) else 1 for size in value.shape],
            np.int64 if "int64" in value.type else np.float32,
        )
        for value in whole.get_inputs()
    }
    for name in feeds:
        if name.startswith("past"):
            feeds[name] = feeds[name][:, :, :0]
    for expected, found in zip(whole.run(None, feeds), half.run(None, feeds), strict=True):
        assert np.array_equal(expected, found)
    sizes = [(folder / "onnx" / f"{part}.onnx").stat().st_size for folder in (tmp_path, tmp_path / "half")]
    assert sizes[1] < 0.8 * sizes[0]


def test_graphs_carry_no_path_of_the_machine_that_wrote_them(tmp_path: Path) -> None:
    lower(tiny(), "vision_encoder", tmp_path)
    assert b"site-packages" not in (tmp_path / "onnx" / "vision_encoder.onnx").read_bytes()
