"""The hybrid encoder and the projectors."""

from __future__ import annotations

import pytest
import torch

from edgevlm.core.errors import ConfigError
from edgevlm.models.projectors.mlp import AveragePool, SpaceToDepth
from edgevlm.models.vision.hybrid import HybridEncoder
from edgevlm.models.vision.reparameterize import reparameterize
from edgevlm.shapes.config import HybridConfig, PoolConfig, VitConfig, VlmConfig

CONFIG = HybridConfig(image_size=64, widths=(16, 32, 64), depths=(1, 2, 1))


@pytest.fixture
def encoder() -> HybridEncoder:
    """Random statistics in every batch norm: fresh ones are the identity and hide mistakes."""
    torch.manual_seed(0)
    encoder = HybridEncoder(CONFIG)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
            module.running_mean = 0.2 * torch.randn(module.num_features)
            module.running_var = torch.rand(module.num_features) + 0.5
    return encoder.eval()


@torch.no_grad()
def test_the_folded_encoder_computes_the_same(encoder: HybridEncoder) -> None:
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(reparameterize(encoder)(pixels), encoder(pixels), atol=2e-5, rtol=1e-5)


def test_the_folded_encoder_has_no_batch_norm(encoder: HybridEncoder) -> None:
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in reparameterize(encoder).modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules())


def test_a_folded_config_takes_folded_weights(encoder: HybridEncoder) -> None:
    folded = HybridEncoder(HybridConfig(**{**vars(CONFIG), "reparameterized": True}))
    folded.load_state_dict(reparameterize(encoder).state_dict())


@torch.no_grad()
def test_features_stand_on_a_grid_of_a_sixteenth(encoder: HybridEncoder) -> None:
    assert encoder(torch.randn(1, 3, 64, 96)).shape == (1, 4 * 6, 64)


def test_space_to_depth_keeps_neighbours_together() -> None:
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert SpaceToDepth(2)(tokens)[0, 0].tolist() == [0, 1, 4, 5]


def test_pooling_averages_squares() -> None:
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert AveragePool(2)(tokens)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("reducer", [SpaceToDepth(3), AveragePool(3)])
def test_a_grid_that_does_not_divide_is_refused(reducer: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="16 vision tokens are not a square grid divisible by 3"):
        reducer(torch.zeros(1, 16, 4))


def test_configs_refuse_what_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="not a multiple of the encoder's stride 16"):
        HybridConfig(image_size=60)
    with pytest.raises(ConfigError, match="smaller than patch_size"):
        VitConfig(
            image_size=6,
            patch_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )


def test_a_projector_must_divide_the_grid() -> None:
    from edgevlm.shapes.config import DecoderConfig

    decoder = DecoderConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8,
    )
    with pytest.raises(ConfigError, match="4x4 features does not divide by the projector's factor 3"):
        VlmConfig(vision=CONFIG, projector=PoolConfig(factor=3), decoder=decoder)
