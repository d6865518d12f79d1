"""The PyTorch model as a session: tiles, views, fusion and room for rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgevlm.bundle.manifest import FusionShape
from edgevlm.core.errors import DoesNotFitError, UnsupportedError, UsageError
from edgevlm.models.as_session import TorchSession, fusion_shape
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes.session import Float, ImageFeatures
from edgevlm.shapes.config import DecoderConfig, HybridConfig, MlpConfig, VlmConfig
from edgevlm.shapes.fusion import FusionConfig

PLAIN = VlmConfig(
    vision=HybridConfig(image_size=16, widths=(8, 16), depths=(1, 1), head_dim=8),
    projector=MlpConfig(),
    decoder=DecoderConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=24,
    ),
)
FUSED = replace(PLAIN, fusion=FusionConfig(num_layers=2, num_heads=2, resolution_ratio=2, skip_token_zero=False))


def session(config: VlmConfig, max_context: int | None = None) -> TorchSession:
    model = Vlm(config)
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return TorchSession(model, max_context=max_context)


def random(*shape: int) -> Float:
    return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


def test_tiles_give_their_tokens_one_after_the_other() -> None:
    plain, tiles = session(PLAIN), random(3, 3, 16, 16)
    joined = plain.encode(tiles)
    assert joined.tokens.shape == (1, 3 * PLAIN.num_vision_tokens, 32)
    assert joined.fusion_cache is None
    alone = [plain.encode(tile[None]).tokens for tile in tiles]
    assert np.array_equal(joined.tokens, np.concatenate(alone, axis=1))


def test_views_of_a_fused_model_are_one_picture_with_a_memory() -> None:
    features = session(FUSED).encode(random(5, 3, 16, 16))
    assert features.fusion_cache is not None
    assert features.tokens.shape == (1, 1, 32)
    assert features.fusion_cache.shape[:3] == (2, 2, 1)


def test_fused_text_depends_on_the_picture_and_on_the_text_before_it_alone() -> None:
    fused, text = session(FUSED), random(1, 6, 32)
    one, two = (fused.encode(random(5, 3, 16, 16) * factor) for factor in (1, 2))
    rows = fused.fuse(one, text)
    assert np.abs(rows - fused.fuse(two, text)).max() > 1e-3
    assert np.abs(rows[:, :4] - fused.fuse(one, text[:, :4])).max() < 1e-5
    assert np.abs(rows[:, 2:] - fused.fuse(one, text[:, 2:])).max() > 1e-3


def test_fusing_leaves_the_memory_of_the_picture_as_it_was() -> None:
    fused, text = session(FUSED), random(1, 6, 32)
    features = fused.encode(random(5, 3, 16, 16))
    assert np.array_equal(fused.fuse(features, text), fused.fuse(features, text))


@pytest.mark.parametrize("config", [PLAIN, FUSED], ids=["plain", "fused"])
def test_features_without_a_memory_cannot_be_fused(config: VlmConfig) -> None:
    with pytest.raises(UnsupportedError, match="no pre-fusion"):
        session(config).fuse(ImageFeatures(random(1, 4, 32)), random(1, 2, 32))


def test_another_number_of_views_is_refused() -> None:
    with pytest.raises(UsageError, match="4 views of one picture; the model takes 5"):
        session(FUSED).encode(random(4, 3, 16, 16))


@pytest.mark.parametrize(("asked", "room"), [(None, 24), (10, 10)])
def test_the_cache_has_as_much_room_as_was_asked_for(asked: int | None, room: int) -> None:
    plain = session(PLAIN, asked)
    assert plain.max_context == room
    plain.prefill(random(1, room, 32))
    with pytest.raises(DoesNotFitError):
        plain.decode(1)


def test_a_runtime_learns_of_the_fusion_what_it_must_know() -> None:
    assert fusion_shape(PLAIN) is None
    assert fusion_shape(FUSED) == FusionShape(num_layers=2, skip_token_zero=False)
