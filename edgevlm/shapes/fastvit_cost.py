"""What FastViT costs for one picture.

Operations are those of the re-parameterised form, parameters those of the form that the config names.
"""

from __future__ import annotations

from edgevlm.shapes.cost import Cost, conv, linear, norm, products, table
from edgevlm.shapes.fastvit import FastVitConfig


def fastvit_cost(config: FastVitConfig) -> Cost:
    """Stem, stages and the last convolution, each on its own grid."""
    folded, first, last = config.reparameterized, config.widths[0], config.widths[-1]
    pixels, scale = (config.image_size // 4) ** 2, config.stem_scale_branch
    total = _branches(3, first, 3, 4 * pixels, folded, scale=scale)
    total += _branches(first, first, 3, pixels, folded, groups=first, scale=scale)
    total += _branches(first, first, 1, pixels, folded, identity=True)
    for stage, depth in enumerate(config.depths):
        if stage:
            total += _downsample(config, stage)
        total += _blocks(config, stage).layers(depth)
        if config.has_attention(stage):
            total += conv(
                config.widths[stage], config.widths[stage], 7, _pixels(config, stage), groups=config.widths[stage]
            )
    grid = config.grid_size**2
    return total + _branches(last, 2 * last, 3, grid, folded, groups=last, scale=True) + _gate(2 * last, 2 * last // 16)


def _pixels(config: FastVitConfig, stage: int) -> int:
    return (config.image_size // 4 >> stage) ** 2


def _downsample(config: FastVitConfig, stage: int) -> Cost:
    """The large depthwise convolution (7x7 and, while it trains, 3x3), its gate, and 1x1."""
    before, after = config.widths[stage - 1], config.widths[stage]
    pixels, folded = _pixels(config, stage), config.reparameterized
    total = conv(before, after, 7, pixels, groups=before, bias=folded)
    if not folded:
        total += _weights(conv(before, after, 3, 0, groups=before, bias=False)) + norm(after).layers(2)
    if config.has_gate(stage):
        total += _gate(after, after // 4)
    return total + _branches(after, after, 1, pixels, folded, identity=True)


def _blocks(config: FastVitConfig, stage: int) -> Cost:
    """One block of the stage: RepMixer or attention, then the convolutional MLP."""
    width, pixels = config.widths[stage], _pixels(config, stage)
    hidden = width * config.mlp_ratio
    mlp = conv(width, width, 7, pixels, groups=width, bias=False) + norm(width)
    mlp += conv(width, hidden, 1, pixels) + conv(hidden, width, 1, pixels) + table(1, width)  # and its layer scale
    if config.has_attention(stage):
        qkv = linear(pixels, width, 3 * width, bias=False) + products(pixels, pixels, width)
        return mlp + norm(width) + qkv + linear(pixels, width, width) + table(1, width)
    mixer = _branches(width, width, 3, pixels, config.reparameterized, groups=width, scale=True, identity=True)
    return mlp + mixer if config.reparameterized else mlp + mixer + norm(width) + table(1, width)


def _branches(
    inputs: int,
    outputs: int,
    kernel: int,
    pixels: int,
    folded: bool,
    *,
    groups: int = 1,
    scale: bool = False,
    identity: bool = False,
) -> Cost:
    """A MobileOne block: one convolution, or the branches that it is trained as, each with a norm."""
    total = conv(inputs, outputs, kernel, pixels, groups=groups, bias=folded)
    if folded:
        return total
    total += norm(outputs).layers(1 + scale + identity)
    return total + _weights(conv(inputs, outputs, 1, 0, groups=groups, bias=False)).layers(scale)


def _gate(channels: int, squeezed: int) -> Cost:
    """Squeeze-and-excite: two 1x1 convolutions on one pixel."""
    return conv(channels, squeezed, 1, 1) + conv(squeezed, channels, 1, 1)


def _weights(cost: Cost) -> Cost:
    return Cost(parameters=cost.parameters)
