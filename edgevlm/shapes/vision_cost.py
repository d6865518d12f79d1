"""What each kind of vision encoder costs for one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from edgevlm.shapes.config import FastVitConfig, HybridConfig, StemVitConfig, VitConfig
from edgevlm.shapes.cost import Cost, conv, linear, norm, products, table
from edgevlm.shapes.fastvit_cost import fastvit_cost
from edgevlm.shapes.stem_vit import MLP_RATIO, STEM_CHANNELS


def vision_cost(config: object) -> Cost:
    """One picture of the config's own size through the encoder."""
    return COSTS[type(config)](config)


def vit_cost(config: VitConfig) -> Cost:
    """Patches, positions, blocks and the norms that the config has."""
    width, patches = config.hidden_size, config.grid_size**2
    tokens = patches + config.class_token
    total = conv(3, width, config.patch_size, patches, bias=not config.pre_layernorm) + table(tokens, width)
    total += table(config.class_token, width) + norm(width).layers(config.pre_layernorm + config.post_layernorm)
    return total + block_cost(tokens, width, config.intermediate_size).layers(config.num_hidden_layers)


def block_cost(tokens: int, width: int, intermediate_size: int) -> Cost:
    """Two norms, attention over all tokens, and a two-layer MLP."""
    attention = linear(tokens, width, width).layers(4) + products(tokens, tokens, width)
    mlp = linear(tokens, width, intermediate_size) + linear(tokens, intermediate_size, width)
    return norm(width).layers(2) + attention + mlp


def stem_vit_cost(config: StemVitConfig) -> Cost:
    """Two convolutions, the projection of each patch, and the blocks over patches and class token."""
    width, patches, (first, second) = config.hidden_size, config.num_patches, STEM_CHANNELS
    pixels, size = config.image_size**2, second * (config.patch_size // 2) ** 2
    stem = conv(3, first, 3, pixels) + conv(first, second, 3, pixels // 4)
    stem += norm(size) + linear(patches, size, width) + table(patches + 2, width) + norm(width)
    return stem + block_cost(patches + 1, width, MLP_RATIO * width).layers(config.num_hidden_layers)


def hybrid_cost(config: HybridConfig) -> Cost:
    """Stem, blocks and downsamplings, each on the grid of its stage."""
    widths, side, last = config.widths, config.image_size // 4, len(config.widths) - 1
    sides = [side >> stage for stage in range(len(widths))]
    total = _conv_norm(config, 3, widths[0] // 2, 3, (2 * side) ** 2)
    total += _conv_norm(config, widths[0] // 2, widths[0], 3, side**2) + norm(widths[-1])
    for (before, after), out in zip(pairwise(widths), sides[1:], strict=True):
        total += _conv_norm(config, before, before, config.kernel_size, out**2, groups=before)
        total += _conv_norm(config, before, after, 1, out**2)
    for stage, (width, depth, out) in enumerate(zip(widths, config.depths, sides, strict=True)):
        total += _hybrid_block(config, width, out**2, attends=stage == last).layers(depth)
    return total


def _hybrid_block(config: HybridConfig, width: int, pixels: int, *, attends: bool) -> Cost:
    total = _conv_norm(config, width, width, config.kernel_size, pixels, groups=width)
    total += _conv_norm(config, width, width * config.mlp_ratio, 1, pixels)
    total += _conv_norm(config, width * config.mlp_ratio, width, 1, pixels)
    if attends:
        total += norm(width) + linear(pixels, width, width).layers(4) + products(pixels, pixels, width)
    return total


def _conv_norm(config: HybridConfig, inputs: int, outputs: int, kernel: int, pixels: int, *, groups: int = 1) -> Cost:
    """A convolution with its batch norm, or with a bias once that is folded."""
    folded = config.reparameterized
    total = conv(inputs, outputs, kernel, pixels, groups=groups, bias=folded)
    return total if folded else total + norm(outputs)


COSTS: Mapping[type, Callable[[Any], Cost]] = {
    FastVitConfig: fastvit_cost,
    HybridConfig: hybrid_cost,
    StemVitConfig: stem_vit_cost,
    VitConfig: vit_cost,
}
