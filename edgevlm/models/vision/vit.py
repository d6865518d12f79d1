"""A plain vision transformer.

Source: Dosovitskiy et al. 2020, arXiv:2010.11929, in SigLIP's layout (Zhai et al. 2023, arXiv:2303.15343):
no class token, tanh GELU, a LayerNorm after the last block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.shapes.config import VitConfig


class VisionTransformer(nn.Module):
    """``(B, 3, S, S)`` to ``(B, (S / patch)², hidden_size)``; S must be the config's image_size."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(config.grid_size**2, width) * 0.02)
        self.layers = nn.ModuleList(VitLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding
        for layer in self.layers:
            hidden = layer(hidden)
        return self.post_layernorm(hidden)


class VitLayer(nn.Module):
    """Pre-norm attention over all patches, then a two-layer MLP."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.fc2(F.gelu(self.fc1(self.layer_norm2(hidden)), approximate="tanh"))


class SelfAttention(nn.Module):
    """Every token attends to every token: ``(B, N, width) -> (B, N, width)``."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        B, N, width = hidden.shape
        query, key, value = (
            project(hidden).view(B, N, self.num_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).reshape(B, N, width))
