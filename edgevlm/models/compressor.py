"""Token reducers that stand before the projector: a grid of features to C x C of them.

Source: LLaVA-Mini, Zhang et al. 2025, arXiv:2501.03895, as the released code behaves: attention before the
projector, several heads with projections, and norms on both sides, where the paper has none of these.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.models.grid_positions import resized_grid, sine_grid
from edgevlm.models.projectors.mlp import grid_side
from edgevlm.shapes.checks import check_heads
from edgevlm.shapes.config import VlmConfig
from edgevlm.shapes.fusion import FusionConfig

NORM_EPS = 1e-5


def make_compressor(config: VlmConfig) -> nn.Module:
    """``(B, H·W, features)`` to ``(B, C², features)``, as the fusion config of ``config`` says."""
    fusion, width = config.fusion, config.vision.feature_size
    assert fusion is not None
    if fusion.compressor == "pool":
        return PoolCompressor(fusion.grid_size, fusion.side_of_views(config.vision.grid_size))
    check_heads(fusion, width, fusion.num_heads)
    return QueryCompressor(fusion, width, fusion.side_of_views(config.vision.grid_size))


class QueryCompressor(nn.Module):
    """C² learned queries attend to the features; ``side`` is that of the square which these form.

    Positions go into queries and keys, not into values: there is no residual and no MLP.  Of one query (C = 1) the
    keys' positions are all equal, and attention does not change by them.
    """

    def __init__(self, config: FusionConfig, width: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.side = config.num_heads, side
        self.query = nn.Parameter(torch.randn(config.num_vision_tokens, width) * 0.02)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sine_grid(config.grid_size, width))
        self.ln_q = nn.LayerNorm(width, eps=NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=NORM_EPS)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        B, _, width = features.shape
        normed = self.ln_kv(features)
        key = self.k_proj(normed + resized_grid(self.pos_embed, self.side))
        queries = self._queries().expand(B, -1, -1)
        mixed = F.scaled_dot_product_attention(self._heads(queries), self._heads(key), self._heads(self.v_proj(normed)))
        return self.out_proj(mixed.transpose(1, 2).reshape(B, -1, width))

    @torch.no_grad()
    def bake(self) -> BakedCompressor:
        """The same map with everything that does not depend on the picture multiplied out."""
        width = self.query.shape[1]
        baked = BakedCompressor(self.query.shape[0], self.num_heads, width, self.side**2).to(self.query)
        baked.ln_kv, baked.out_proj = self.ln_kv, self.out_proj
        queries = self._heads(self._queries())[0].double()  # (heads, K, head)
        key, value = (part.weight.double().view(self.num_heads, -1, width) for part in (self.k_proj, self.v_proj))
        scores = (queries @ key / key.shape[1] ** 0.5).transpose(0, 1)  # (K, heads, width)
        positions = resized_grid(self.pos_embed, self.side).double()
        baked.scores.copy_(scores.reshape(-1, width))
        baked.bias.copy_((scores.reshape(-1, width) @ positions.T) * (self.query.shape[0] > 1))
        baked.values.copy_(value.transpose(1, 2))
        baked.value_bias.copy_(self.v_proj.bias.view(self.num_heads, 1, -1))
        return baked

    def _queries(self) -> Tensor:
        return self.q_proj(self.ln_q(self.query) + self.pos_embed).unsqueeze(0)

    def _heads(self, rows: Tensor) -> Tensor:
        B, T, width = rows.shape
        return rows.view(B, T, self.num_heads, width // self.num_heads).transpose(1, 2)


class BakedCompressor(nn.Module):
    """What ``QueryCompressor.bake`` gives: one matrix of scores, one softmax, and values of the averages alone.

    Queries are constants, so a head's score of a feature is a fixed linear map of it plus a fixed bias per place, and
    a value's projection can follow the average: no key or value of a feature is ever computed.
    """

    def __init__(self, num_queries: int, num_heads: int, width: int, num_features: int) -> None:
        super().__init__()
        self.num_heads, head = num_heads, width // num_heads
        self.ln_kv = nn.LayerNorm(width, eps=NORM_EPS)
        self.scores = nn.Parameter(torch.zeros(num_queries * num_heads, width))
        self.bias = nn.Parameter(torch.zeros(num_queries * num_heads, num_features))
        self.values = nn.Parameter(torch.zeros(num_heads, width, head))
        self.value_bias = nn.Parameter(torch.zeros(num_heads, 1, head))
        self.out_proj = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        B, _, width = features.shape
        normed = self.ln_kv(features)
        attention = (self.scores @ normed.transpose(1, 2) + self.bias).softmax(-1)
        averages = (attention @ normed).view(B, -1, self.num_heads, width).transpose(1, 2)
        mixed = averages @ self.values + self.value_bias
        return self.out_proj(mixed.transpose(1, 2).reshape(B, -1, width))


class PoolCompressor(nn.Module):
    """The mean of each cell of a C x C grid over the features; cells overlap where C does not divide the side."""

    def __init__(self, grid_size: int, side: int) -> None:
        super().__init__()
        self.shares: Tensor
        cells = F.adaptive_avg_pool1d(torch.eye(side).unsqueeze(0), grid_size)[0].T
        self.register_buffer("shares", cells.contiguous(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        B, N, width = features.shape
        shares, side = self.shares.to(features.dtype), grid_side(N, 1)
        rows = (shares @ features.reshape(B, side, side * width)).view(-1, side, width)
        return (shares @ rows).view(B, -1, width)
