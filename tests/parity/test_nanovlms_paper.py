"""The NanoVLMs paper's models against its formulas, written down a second time and in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgevlm.families.nanovlms import nanovlms
from edgevlm.models.vlm import Vlm
from edgevlm.shapes.config import StemVitConfig, VlmConfig

Weights = dict[str, Tensor]


def small(**options: str) -> VlmConfig:
    """The mini model on 4 patches, with two blocks and two layers; heads of 50 and 12 as they are."""
    config = nanovlms("mini", vocab_size=60, **options)  # type: ignore[arg-type]
    vision = replace(config.vision, image_size=32, num_hidden_layers=2)
    return replace(config, vision=vision, decoder=replace(config.decoder, num_hidden_layers=2))


def spread(config: VlmConfig) -> Vlm:
    """Weights whose effects are as large as a trained model's, norms and biases included."""
    model = Vlm(config)
    model.initialize(0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.embed_tokens.weight.data *= 20.0  # rows of the size of the vision tokens
    return model.eval()


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centered / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def attend(x: Tensor, w: Weights, name: str, heads: int, out: str, *, causal: bool) -> Tensor:
    """Head by head, of one sequence (T, width)."""
    size = x.shape[-1] // heads
    query, key, value = (linear(x, w, f"{name}.{part}_proj") for part in "qkv")
    mixed = []
    for h in range(heads):
        columns = slice(h * size, (h + 1) * size)
        scores = query[:, columns] @ key[:, columns].T / size**0.5
        if causal:
            scores = scores + torch.full_like(scores, float("-inf")).triu(1)
        mixed.append(scores.softmax(-1) @ value[:, columns])
    return linear(torch.cat(mixed, -1), w, f"{name}.{out}")


def block(x: Tensor, w: Weights, name: str, heads: int, norms: tuple[str, str], *, causal: bool) -> Tensor:
    out, mlp = ("o_proj", f"{name}.mlp") if causal else ("out_proj", name)
    x = x + attend(layer_norm(x, w, f"{name}.{norms[0]}"), w, f"{name}.self_attn", heads, out, causal=causal)
    hidden = layer_norm(x, w, f"{name}.{norms[1]}")
    return x + linear(gelu(linear(hidden, w, f"{mlp}.fc1")), w, f"{mlp}.fc2")


def convolved(pixels: Tensor, w: Weights) -> Tensor:
    inner = F.conv2d(pixels, w["stem.conv1.weight"], w["stem.conv1.bias"], padding=1).clamp(min=0)
    return F.conv2d(inner, w["stem.conv2.weight"], w["stem.conv2.bias"], stride=2, padding=1)


def see(pixels: Tensor, w: Weights, config: StemVitConfig) -> Tensor:
    """One picture (3, H, W) to its features."""
    whole, rows = convolved(pixels, w), []
    for y in range(0, config.image_size, 16):
        for x in range(0, config.image_size, 16):
            patch = whole[:, y // 2 : y // 2 + 8, x // 2 : x // 2 + 8]
            if config.stem == "patch":
                patch = convolved(pixels[:, y : y + 16, x : x + 16], w)
            rows.append(linear(layer_norm(patch.flatten(), w, "stem.norm").clamp(min=0), w, "stem.proj"))
    tokens = torch.stack([w["class_embedding.weight"][0], *rows]) + w["position_embedding.weight"]
    for layer in range(config.num_hidden_layers):
        norms = ("layer_norm1", "layer_norm2")
        tokens = block(tokens, w, f"layers.{layer}", config.num_attention_heads, norms, causal=False)
    tokens = layer_norm(tokens, w, "post_layernorm")
    return tokens[:1] if config.visual_tokens == "cls" else tokens[1:]


def connect(features: Tensor, w: Weights) -> Tensor:
    first = gelu(linear(features, w, "1"))
    return linear(first, w, "3") if "3.weight" in w else first


def logits(rows: Tensor, w: Weights, config: VlmConfig) -> Tensor:
    """Rows (T, D) to logits (T, V)."""
    x = rows + w["decoder.embed_positions.weight"][: len(rows)]
    for layer in range(config.decoder.num_hidden_layers):
        norms = ("input_layernorm", "post_attention_layernorm")
        x = block(x, w, f"decoder.layers.{layer}", config.decoder.num_attention_heads, norms, causal=True)
    return layer_norm(x, w, "decoder.norm") @ w["lm_head.weight"].T


def inside(w: Weights, part: str) -> Weights:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in w.items() if name.startswith(f"{part}.")}


OPTIONS: tuple[dict[str, str], ...] = (
    {},
    {"connector": "linear"},
    {"stem": "image"},
    {"visual_tokens": "all"},
    {"stem": "image", "visual_tokens": "all", "connector": "linear"},
)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pictures_and_text_give_the_logits_of_the_formulas(options: dict[str, str]) -> None:
    config = small(**options)
    model = spread(config)
    pixels, ids = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randint(0, 60, (2, 9))
    image_features = model.encode(pixels)
    found = model(torch.cat((image_features, model.embed_tokens(ids)), dim=1))
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    assert isinstance(config.vision, StemVitConfig)
    for number in range(2):
        features = see(pixels[number].double(), inside(w, "vision_encoder"), config.vision)
        seen = connect(features, inside(w, "projector"))
        torch.testing.assert_close(image_features[number].double(), seen, atol=1e-5, rtol=1e-5)
        expected = logits(torch.cat((seen, w["embed_tokens.weight"][ids[number]])), w, config)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found[number].double(), expected, atol=1e-5 * scale, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ten_greedy_steps_are_those_of_the_formulas(
    options: dict[str, str], assert_same_steps: Callable[..., list[int]]
) -> None:
    config = small(**options)
    model = spread(config)
    pixels, ids = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randint(0, 60, (9,))
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    assert isinstance(config.vision, StemVitConfig)
    seen = connect(see(pixels[0].double(), inside(w, "vision_encoder"), config.vision), inside(w, "projector"))

    def reference(generated: list[int]) -> Tensor:
        text = w["embed_tokens.weight"][[*ids.tolist(), *generated]]
        return logits(torch.cat((seen, text)), w, config)

    rows = torch.cat((model.encode(pixels)[0], model.embed_tokens(ids)))
    assert_same_steps(model, rows[None], reference)


@torch.no_grad()
def test_only_a_stem_of_the_image_looks_over_the_borders_of_patches() -> None:
    near, far = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    far[..., :16, 16:] = 1.0  # the second of four patches
    changes = {}
    for stem in ("patch", "image"):
        encoder = spread(small(stem=stem)).vision_encoder.stem
        changes[stem] = [bool(row.any()) for row in (encoder(near) - encoder(far))[0]]
    assert changes == {"patch": [False, True, False, False], "image": [True, True, True, True]}
