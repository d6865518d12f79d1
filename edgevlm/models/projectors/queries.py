"""Learned queries that mix features by place: the projector of a Matryoshka Query Transformer.

Keys are positions alone, without any content, so the weights of the attention are constants of the checkpoint: every
picture is mixed in the same way.  Rows are independent of each other, so the first m are the same for any m.

Source: Hu et al. 2024, arXiv:2405.19315, as the released code behaves; the resampler's form is Bai et al. 2023,
arXiv:2308.12966.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgevlm.models.grid_positions import resized_grid, sine_grid
from edgevlm.shapes.checks import check_heads
from edgevlm.shapes.config import QueriesConfig, VlmConfig

EPS = 1e-6


class QueryProjector(nn.Module):
    """``(B, N, features)`` to ``(B, num_queries, D)``; N must be the square of the encoder's grid."""

    def __init__(self, config: VlmConfig) -> None:
        super().__init__()
        projector = config.projector
        assert isinstance(projector, QueriesConfig)
        width, size = config.vision.feature_size, projector.table_size
        check_heads(projector, width, projector.num_heads)
        self.num_queries, self.num_heads = projector.num_queries, projector.num_heads
        self.grid_size = config.vision.grid_size
        self.query = nn.Parameter(torch.randn(size, width) * 0.02)
        self.pos_embed = nn.Parameter(sine_grid(math.isqrt(size), width), requires_grad=False)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.proj = nn.Linear(width, config.decoder.hidden_size, bias=False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fill the queries with small normal values; the positions are as they are."""
        self.query.normal_(0.0, 0.02, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        mixed = mix(self.mixing(), self.v_proj(self.ln_v(features)))
        return self.proj(self.out_proj(mixed))

    def mixing(self) -> Tensor:
        """How much of each place every query takes, ``(heads, num_queries, N)``; no picture has a say in it."""
        positions = resized_grid(self.pos_embed, self.grid_size)
        first = slice(self.num_queries)
        query = self.q_proj(self.ln_q(self.query[first] + self.pos_embed[first]))
        key = self.k_proj(self.ln_k(positions))
        query, key = (rows.view(len(rows), self.num_heads, -1).transpose(0, 1) for rows in (query, key))
        return torch.softmax(query @ key.transpose(1, 2) * query.shape[-1] ** -0.5, dim=-1)

    @torch.no_grad()
    def bake(self) -> BakedQueryProjector:
        """The same map with the weights of its attention as constants, and one Linear behind it.

        Each row of those weights sums to 1, so the bias of the values passes through them unchanged.
        """
        heads, queries, places = (mixing := self.mixing()).shape
        width, D = self.v_proj.in_features, self.proj.out_features
        baked = BakedQueryProjector(width, D, (heads, queries, places)).to(mixing)
        baked.ln_v.load_state_dict(self.ln_v.state_dict())
        baked.mixing.copy_(mixing)
        baked.v_proj.weight.copy_(self.v_proj.weight)
        baked.proj.weight.copy_(self.proj.weight @ self.out_proj.weight)
        baked.proj.bias.copy_(self.proj(self.out_proj(self.v_proj.bias)))
        return baked


class BakedQueryProjector(nn.Module):
    """A fixed linear mixing of places, ``(B, N, features)`` to ``(B, num_queries, D)``."""

    def __init__(self, width: int, out_features: int, mixing: tuple[int, int, int]) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(mixing))  # (heads, num_queries, N)
        self.ln_v = nn.LayerNorm(width, eps=EPS)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, out_features)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(mix(self.mixing, self.v_proj(self.ln_v(features))))


def mix(mixing: Tensor, values: Tensor) -> Tensor:
    """Take ``values`` (B, N, width) by the weights ``mixing`` (heads, M, N), each head its part: ``(B, M, width)``."""
    B, N, width = values.shape
    heads = values.view(B, N, len(mixing), -1).transpose(1, 2)
    return (mixing @ heads).transpose(1, 2).reshape(B, -1, width)
