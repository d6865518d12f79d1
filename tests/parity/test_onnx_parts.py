"""Exported parts against PyTorch, for every decoder layout, projector and encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from edgevlm.export.heads import cache_head_size
from edgevlm.export.parts import Part, split
from edgevlm.export.target import Lowering
from edgevlm.export.to_onnx import OnnxTarget
from edgevlm.models.as_session import TorchSession
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import (
    DecoderConfig,
    HybridConfig,
    Llama3Scaling,
    MlpConfig,
    PoolConfig,
    StemVitConfig,
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
STEM = StemVitConfig(image_size=32, patch_size=8, hidden_size=50, num_hidden_layers=1, num_attention_heads=2)
STRETCH = Llama3Scaling(factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=8)
GPT2 = {
    "norm": "layer",
    "mlp": "gelu",
    "positions": "learned",
    "attention_bias": True,
    "output_bias": True,
    "tie_word_embeddings": False,
}
DECODERS: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "untied": {"tie_word_embeddings": False},
    "theta": {"rope_theta": 1_000_000.0},
    "llama3": {"rope_theta": 500.0, "rope_scaling": STRETCH},
    "output-bias": {"output_bias": True},
    "layer-norm": {"norm": "layer"},
    "gelu": {"mlp": "gelu"},
    "learned": {"positions": "learned"},
    "gpt2": GPT2,
    "gpt2-12": {**GPT2, "head_dim": 12, "num_key_value_heads": 2},
    "gpt2-7": {**GPT2, "head_dim": 7},
    "llama-12": {"head_dim": 12},
    "llama3-18": {"head_dim": 18, "rope_theta": 500.0, "rope_scaling": STRETCH},
    "qwen2-24": {"attention_bias": True, "head_dim": 24, "num_key_value_heads": 2},
    "qwen3-20": {"qk_norm": True, "head_dim": 20},
    "qwen3-learned-12": {"qk_norm": True, "head_dim": 12, "positions": "learned"},
}
ENCODERS = {
    "hybrid-mlp": (HYBRID, MlpConfig()),
    "hybrid-pool": (HYBRID, PoolConfig()),
    "vit-unshuffle": (VIT, UnshuffleConfig()),
    "vit-end-row": (VIT, MlpConfig(end_row=True)),
    "stem-of-patches": (STEM, MlpConfig(num_layers=1, final_gelu=True)),
    "stem-of-the-image": (replace(STEM, stem="image", visual_tokens="all"), PoolConfig()),
}
K, HEAD, LAYERS = 1, 32, 2


def tiny(vision: HybridConfig | VitConfig | StemVitConfig = HYBRID, projector: object = None, **decoder: object) -> Vlm:
    """Random weights that float16 holds exactly."""
    sizes = {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": K,
        "head_dim": HEAD,
        "max_position_embeddings": 32,
    }
    config = DecoderConfig(**{**sizes, **heads, **decoder})  # type: ignore[arg-type]
    model = Vlm(VlmConfig(vision=vision, projector=projector or MlpConfig(), decoder=config))  # type: ignore[arg-type]
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
    return model.eval()


def lower(model: Vlm, name: str, folder: Path, **options: bool) -> onnxruntime.InferenceSession:
    part: Part = next(part for part in split(model) if part.name == name)
    return onnxruntime.InferenceSession(str(folder / OnnxTarget(Lowering(**options)).lower(part, folder).file))


class Steps:
    """A decoder's graph, fed by hand."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session, self.num_rows = session, 0
        caches = [value for value in session.get_inputs() if value.name.startswith("past")]
        self.past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits [V] of the last of ``rows`` [1, T, D], which continue those before."""
        self.num_rows += rows.shape[1]
        mask = np.ones((1, self.num_rows), np.int64)
        logits, *present = self.session.run(None, {"inputs_embeds": rows, "attention_mask": mask, **self.past})
        self.past = dict(zip(self.past, present, strict=True))
        return np.asarray(logits[0, 0])


def rows(length: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((batch, length, 64), np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_and_ten_steps_equal_pytorch(name: str, tmp_path: Path) -> None:
    model = tiny(**DECODERS[name])
    steps, reference = Steps(lower(model, "decoder_model_merged", tmp_path)), TorchSession(model)
    embeds, expected = rows(5), reference.prefill(rows(5))
    for _ in range(11):
        assert_close(steps.logits(embeds), expected)
        token = int(expected.argmax())
        embeds, expected = reference.embed(np.array([[token]])), reference.decode(token)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefill_in_chunks_equals_pytorch(name: str, tmp_path: Path) -> None:
    model = tiny(**DECODERS[name])
    steps, reference = Steps(lower(model, "decoder_model_merged", tmp_path)), TorchSession(model)
    for length in (1, 7, 4, 1, 2):
        assert_close(steps.logits(rows(length)), reference.prefill(rows(length)))


@pytest.mark.parametrize("name", ["llama", "gpt2-12"])
def test_a_sequence_in_a_batch_is_as_alone(name: str, tmp_path: Path) -> None:
    """Of three sequences the second is padded at its end; one step later each stands where it belongs."""
    model = tiny(**DECODERS[name])
    session, batch = lower(model, "decoder_model_merged", tmp_path), rows(6, batch=3)
    lengths, mask = (6, 4, 6), np.ones((3, 6), np.int64)
    mask[1, 4:] = 0
    caches = [value for value in session.get_inputs() if value.name.startswith("past")]
    past = {value.name: np.zeros((3, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}
    first = session.run(None, {"inputs_embeds": batch, "attention_mask": mask, **past})
    past = dict(zip(past, first[1:], strict=True))
    mask = np.concatenate((mask[:, :4], mask[:, 5:], np.ones((3, 1), np.int64), mask[:, 4:5]), axis=1)
    step = rows(1, batch=3)
    logits = session.run(None, {"inputs_embeds": step, "attention_mask": mask, **past})[0]
    for number, length in enumerate(lengths):
        reference = TorchSession(model)
        reference.prefill(batch[number : number + 1, :length])
        assert_close(logits[number, 0], reference.prefill(step[number : number + 1]))


@pytest.mark.parametrize(
    ("head_dim", "positions", "size"), [(12, "rotary", 16), (12, "learned", 16), (8, "learned", 8)]
)
def test_the_cache_is_as_wide_as_the_operator_wants_it(
    head_dim: int, positions: str, size: int, tmp_path: Path
) -> None:
    model = tiny(head_dim=head_dim, positions=positions)
    assert cache_head_size(model.config.decoder) == size
    steps = Steps(lower(model, "decoder_model_merged", tmp_path))
    steps.logits(rows(3))
    assert all(cache.shape == (1, K, 3, size) for cache in steps.past.values())


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_vision_encoders_equal_pytorch(name: str, batch: int, tmp_path: Path) -> None:
    model = tiny(*ENCODERS[name])
    pixels = np.random.default_rng(0).standard_normal((batch, 3, 32, 32), np.float32)
    (features,) = lower(model, "vision_encoder", tmp_path).run(None, {"pixel_values": pixels})
    with torch.inference_mode():
        assert_close(features, model.encode(torch.from_numpy(pixels)).numpy())


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
    sizes = [
        sum(file.stat().st_size for file in (folder / "onnx").glob(f"{part}.*"))
        for folder in (tmp_path, tmp_path / "half")
    ]
    assert sizes[1] < 0.8 * sizes[0]


def test_graphs_carry_no_path_of_the_machine_that_wrote_them(tmp_path: Path) -> None:
    lower(tiny(), "vision_encoder", tmp_path)
    assert b"site-packages" not in (tmp_path / "onnx" / "vision_encoder.onnx").read_bytes()
