"""The vision transformer of the NanoVLMs paper: a convolutional stem, a class token, a few blocks.

Source: Agarwalla et al. 2025, arXiv:2502.07838, sections on the visual encoder.  StemVitConfig says what we chose
where the paper leaves it open.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.models.vision.vit import VitLayer
from edgevlm.shapes.config import VitConfig
from edgevlm.shapes.stem_vit import MLP_RATIO, STEM_CHANNELS, StemVitConfig


class StemVit(nn.Module):
    """``(B, 3, S, S)`` to ``(B, 1 or patches, hidden_size)``; S must be the config's image_size."""

    def __init__(self, config: StemVitConfig) -> None:
        super().__init__()
        self.config = config
        width, block = config.hidden_size, block_config(config)
        self.stem = Stem(config)
        self.class_embedding = nn.Embedding(1, width)
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)
        self.layers = nn.ModuleList(VitLayer(block) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.stem(pixel_values)
        first = self.class_embedding.weight.expand(patches.shape[0], 1, -1)
        hidden = torch.cat((first, patches), dim=1) + self.position_embedding.weight
        for layer in self.layers:
            hidden = layer(hidden)
        kept = hidden[:, :1] if self.config.visual_tokens == "cls" else hidden[:, 1:]
        return self.post_layernorm(kept)


class Stem(nn.Module):
    """Two convolutions, then each patch's numbers normed and projected: ``(B, 3, S, S)`` to ``(B, patches, width)``."""

    def __init__(self, config: StemVitConfig) -> None:
        super().__init__()
        self.config = config
        first, second = STEM_CHANNELS
        size = second * (config.patch_size // 2) ** 2
        self.conv1 = nn.Conv2d(3, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.proj = nn.Linear(size, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        B, patch = pixel_values.shape[0], self.config.patch_size
        if self.config.stem == "patch":
            maps = self._convolved(cut(pixel_values, patch).flatten(0, 1))
        else:
            maps = cut(self._convolved(pixel_values), patch // 2)
        rows = maps.reshape(B, self.config.num_patches, -1)
        return self.proj(F.relu(self.norm(rows)))

    def _convolved(self, pixels: Tensor) -> Tensor:
        """Half the side, 64 channels."""
        return self.conv2(F.relu(self.conv1(pixels)))


def cut(maps: Tensor, size: int) -> Tensor:
    """Squares of ``size``, row by row: ``(B, C, H, W)`` to ``(B, squares, C, size, size)``."""
    B, C, H, W = maps.shape
    grid = maps.reshape(B, C, H // size, size, W // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def block_config(config: StemVitConfig) -> VitConfig:
    """The same blocks as a plain vision transformer's."""
    return VitConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=MLP_RATIO * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        hidden_act="gelu",
    )
