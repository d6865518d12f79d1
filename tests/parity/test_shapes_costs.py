"""Parameters and operations from configs alone, against modules that exist and what PyTorch counts while they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgevlm.models.vision.reparameterize import bake
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import (
    DecoderConfig,
    FastVitConfig,
    FusionConfig,
    HybridConfig,
    MlpConfig,
    PoolConfig,
    QueriesConfig,
    StemVitConfig,
    UnshuffleConfig,
    VitConfig,
    VlmConfig,
)
from edgevlm.shapes.model_cost import num_parameters, part_costs, published_flops
from edgevlm.shapes.vision_cost import COSTS, vision_cost

TEXT = 7

DECODER = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=300,
)
VIT = VitConfig(
    image_size=32, patch_size=8, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3
)
CLIP = replace(VIT, class_token=True, pre_layernorm=True, post_layernorm=False, hidden_act="quick_gelu")
HYBRID = HybridConfig(image_size=64, widths=(16, 32, 64), depths=(1, 2, 1))
FAST = FastVitConfig(image_size=256, depths=(1, 1, 1, 1, 1), widths=(16, 32, 32, 64, 64))
STEM = StemVitConfig(image_size=32, patch_size=16, hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
GPT = replace(
    DECODER,
    norm="layer",
    mlp="gelu",
    positions="learned",
    attention_bias=True,
    output_bias=True,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)

MODELS: dict[str, VlmConfig] = {
    "vit": VlmConfig(vision=VIT, projector=UnshuffleConfig(), decoder=DECODER),
    "vit with one linear layer": VlmConfig(
        vision=VIT, projector=UnshuffleConfig(num_layers=1, bias=False), decoder=DECODER
    ),
    "clip": VlmConfig(vision=CLIP, projector=MlpConfig(), decoder=replace(DECODER, tie_word_embeddings=False)),
    "clip with a row at the end": VlmConfig(vision=CLIP, projector=MlpConfig(end_row=True), decoder=DECODER),
    "hybrid": VlmConfig(vision=HYBRID, projector=PoolConfig(), decoder=replace(DECODER, attention_bias=True)),
    "folded hybrid": VlmConfig(
        vision=replace(HYBRID, reparameterized=True), projector=PoolConfig(), decoder=replace(DECODER, qk_norm=True)
    ),
    "fastvit": VlmConfig(vision=FAST, projector=MlpConfig(), decoder=DECODER),
    "folded fastvit": VlmConfig(vision=replace(FAST, reparameterized=True), projector=MlpConfig(), decoder=DECODER),
    "nanovlms": VlmConfig(vision=STEM, projector=MlpConfig(hidden_size=4 * 48), decoder=GPT),
    "nanovlms with all tokens": VlmConfig(
        vision=replace(STEM, stem="image", visual_tokens="all"), projector=MlpConfig(num_layers=1), decoder=GPT
    ),
    "queries": VlmConfig(
        vision=CLIP, projector=QueriesConfig(num_queries=4, table_size=4, num_heads=4), decoder=DECODER
    ),
    "fusion": VlmConfig(
        vision=CLIP, projector=MlpConfig(), decoder=DECODER, fusion=FusionConfig(num_layers=2, num_heads=4)
    ),
    "fusion of crops": VlmConfig(
        vision=CLIP,
        projector=MlpConfig(),
        decoder=DECODER,
        fusion=FusionConfig(num_layers=1, grid_size=2, num_heads=4, resolution_ratio=2),
    ),
    "pooled fusion": VlmConfig(
        vision=HYBRID, projector=MlpConfig(), decoder=DECODER, fusion=FusionConfig(compressor="pool")
    ),
}
VISION = [config.vision for config in MODELS.values()]


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counted_flops(module: nn.Module, *inputs: Any) -> int:
    """What PyTorch's own counter sees; attention as its two matrix products."""
    module.requires_grad_(False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_module(name: str) -> None:
    with torch.device("meta"):
        assert num_parameters(MODELS[name]) == count_parameters(Vlm(MODELS[name]))


def test_every_vision_encoder_has_a_cost() -> None:
    assert {type(config) for config in VISION} == set(COSTS)


@pytest.mark.parametrize("config", VISION, ids=list(MODELS))
def test_operations_of_an_encoder_are_those_that_pytorch_counts(config: Any) -> None:
    from edgevlm.models.vision import ENCODERS

    encoder = ENCODERS[config.type](config).eval()
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    if not getattr(config, "reparameterized", True):
        pytest.skip("operations are counted as the folded form has them")
    assert vision_cost(config).flops == counted_flops(encoder, pixels)


@pytest.mark.parametrize("name", ["clip", "hybrid", "folded hybrid", "nanovlms"])
def test_operations_of_a_decoder_are_those_that_pytorch_counts(name: str) -> None:
    config = MODELS[name]
    rows = config.num_vision_tokens + TEXT
    decoder = Vlm(config).decoder.eval()
    found = counted_flops(decoder, torch.zeros(1, rows, config.decoder.hidden_size))
    assert part_costs(config, text_tokens=TEXT)["decoder"].flops == found


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.fusion is None])
def test_operations_of_a_projector_are_those_that_pytorch_counts(name: str) -> None:
    config = MODELS[name]
    projector = bake(nn.Sequential(Vlm(config).projector))
    features = torch.zeros(1, config.vision.grid_size**2, config.vision.feature_size)
    assert part_costs(config, text_tokens=TEXT)["projector"].flops == counted_flops(projector, features)


@pytest.mark.parametrize("name", ["fusion", "fusion of crops"])
def test_operations_of_the_fusion_are_those_that_pytorch_counts(name: str) -> None:
    """The picture's and the text's rows; the compressor before its constants are multiplied out."""
    config = MODELS[name]
    model = Vlm(config).eval()
    views = torch.zeros(config.num_views, 3, config.vision.image_size, config.vision.image_size)
    picture = counted_flops(Seeing(model), views)
    text = counted_flops(Reading(model), model.encode_fused(views)[1], torch.zeros(1, TEXT, config.decoder.hidden_size))
    costs = part_costs(config, text_tokens=TEXT)
    expected = sum(costs[part].flops for part in ("vision_encoder", "projector", "fusion"))
    assert expected == picture + text


class Seeing(nn.Module):
    """A model's way with a picture."""

    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode_fused(pixel_values)


class Reading(Seeing):
    """A model's way with the text around it."""

    def forward(self, cache: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
        return self.model.fuse(cache, rows)


VICUNA = DecoderConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
LLAVA = VlmConfig(
    vision=VitConfig(  # the whole tower: the published tables count its unused last block
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        class_token=True,
        pre_layernorm=True,
        post_layernorm=False,
        hidden_act="quick_gelu",
    ),
    projector=MlpConfig(),
    decoder=VICUNA,
)


@pytest.mark.parametrize(
    ("fusion", "published"),
    [
        (None, 8.55),
        (FusionConfig(), 1.96),
        (FusionConfig(num_layers=1), 1.21),
        (FusionConfig(num_layers=2), 1.46),
        (FusionConfig(grid_size=2), 2.01),
        (FusionConfig(resolution_ratio=2), 7.19),
        (FusionConfig(resolution_ratio=2, grid_size=8), 8.13),
    ],
)
def test_the_published_operations_of_llava_mini_are_reproduced(fusion: FusionConfig | None, published: float) -> None:
    found = published_flops(replace(LLAVA, fusion=fusion), text_tokens=43) / 1e12
    assert found == pytest.approx(published, rel=0.003)


def test_llava_mini_saves_seventy_seven_percent() -> None:
    mini = published_flops(replace(LLAVA, fusion=FusionConfig()), text_tokens=43)
    assert 1 - mini / published_flops(LLAVA, text_tokens=43) == pytest.approx(0.771, abs=0.001)


def test_without_the_unused_block_the_figures_stay_within_a_percent() -> None:
    used = replace(LLAVA, vision=replace(LLAVA.vision, num_hidden_layers=23))
    mini = published_flops(replace(used, fusion=FusionConfig()), text_tokens=43) / 1e12
    assert published_flops(used, text_tokens=43) / 1e12 == pytest.approx(8.55, rel=0.01)
    assert mini == pytest.approx(1.96, rel=0.01)


@pytest.mark.parametrize(("side", "gflop"), [(256, 29.6), (512, 119.1), (768, 270.4), (1024, 486.7)])
def test_the_operations_of_fastvithd_are_the_published_ones(side: int, gflop: float) -> None:
    config = FastVitConfig(image_size=side, reparameterized=True)
    assert vision_cost(config).flops / 1e9 == pytest.approx(gflop, rel=0.002)
