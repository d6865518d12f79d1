"""A plain vision transformer: SigLIP's and CLIP's, which differ in the fields of VitConfig.

Sources: Dosovitskiy et al. 2020, arXiv:2010.11929; SigLIP: Zhai et al. 2023, arXiv:2303.15343 (no class token, tanh
GELU, a LayerNorm after the last block); CLIP: Radford et al. 2021, arXiv:2103.00020 (a class token, a LayerNorm before
the first block, quick GELU, no bias in the patch embedding).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.shapes.config import VitConfig


def quick_gelu(hidden: Tensor) -> Tensor:
    """``x · sigmoid(1.702 x)`` (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return hidden * torch.sigmoid(1.702 * hidden)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class VisionTransformer(nn.Module):
    """``(B, 3, S, S)`` to ``(B, (S / patch)², hidden_size)``; S must be the config's image_size.

    A class token takes part in every block and is dropped at the end.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, eps, patch = config.hidden_size, config.layer_norm_eps, config.patch_size
        num_positions = config.grid_size**2 + config.class_token
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=not config.pre_layernorm)
        self.position_embedding = nn.Parameter(torch.randn(num_positions, width) * 0.02)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02) if config.class_token else None
        self.pre_layernorm = nn.LayerNorm(width, eps=eps) if config.pre_layernorm else nn.Identity()
        self.layers = nn.ModuleList(VitLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=eps) if config.post_layernorm else nn.Identity()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill what is no layer's weight, positions and class token, with small normal values."""
        self.position_embedding.normal_(0.0, 0.02, generator=generator)
        if self.class_embedding is not None:
            self.class_embedding.normal_(0.0, 0.02, generator=generator)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            hidden = torch.cat((self.class_embedding.expand(hidden.shape[0], 1, -1), hidden), dim=1)
        hidden = self.pre_layernorm(hidden + self.position_embedding)
        for layer in self.layers:
            hidden = layer(hidden)
        patches = hidden if self.class_embedding is None else hidden[:, 1:]
        return self.post_layernorm(patches)


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
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.fc2(self.activation(self.fc1(self.layer_norm2(hidden))))


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
