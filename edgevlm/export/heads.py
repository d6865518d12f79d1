"""Attention heads as wide as ``GroupQueryAttention`` wants them.

It takes heads of a multiple of 8, and turns those of a multiple of 16.  A narrower head gets zeros: zero rows of query
and key add nothing to their product, zero rows of value meet zero columns of the output projection.  With the scale
of the true width the graph computes the same, and its kv cache has the wide heads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.export.matmuls import Projection, projection
from edgevlm.models.decoder import RMSNorm, rotary_table
from edgevlm.shapes.config import DecoderConfig


def cache_head_size(config: DecoderConfig) -> int:
    """Width of a head in the graph and in its kv cache."""
    step = 16 if config.positions == "rotary" else 8
    return -(-config.head_dim // step) * step


def widen(tensor: Tensor, config: DecoderConfig) -> Tensor:
    """``(heads · head_dim, …)`` to ``(heads · cache_head_size, …)``, with zeros where the true head has nothing."""
    heads = tensor.unflatten(0, (-1, config.head_dim))
    wide = tensor.new_zeros(heads.shape[0], cache_head_size(config), *heads.shape[2:])
    wide[:, _places(config)] = heads
    return wide.flatten(0, 1)


def into_heads(path: str, layer: nn.Linear, config: DecoderConfig) -> Projection:
    """A query, key or value projection that writes wide heads."""
    narrow = projection(path, layer)
    if cache_head_size(config) == config.head_dim:
        return narrow
    return replace(
        narrow,
        num_outputs=narrow.num_outputs // config.head_dim * cache_head_size(config),
        weight=lambda: widen(layer.weight.detach(), config),
        bias=None if layer.bias is None else widen(layer.bias.detach(), config),
    )


def out_of_heads(path: str, layer: nn.Linear, config: DecoderConfig) -> Projection:
    """An output projection that reads wide heads."""
    narrow = projection(path, layer)
    if cache_head_size(config) == config.head_dim:
        return narrow
    return replace(
        narrow,
        num_inputs=narrow.num_inputs // config.head_dim * cache_head_size(config),
        weight=lambda: widen(layer.weight.detach().T, config).T,
    )


@torch.no_grad()
def head_norm(norm: RMSNorm, config: DecoderConfig) -> RMSNorm:
    """The norm of a wide head that equals ``norm`` of the true one.

    Its mean counts the zeros, too: with share = head_dim / wide, the mean of squares is share times the true one.
    """
    share = config.head_dim / cache_head_size(config)
    wide = RMSNorm(cache_head_size(config), norm.eps * share)
    wide.weight.copy_(widen(norm.weight * share**0.5, config))
    return wide


def rotary_caches(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(max_position_embeddings, cache_head_size / 2)``; the zeros of a wide head do not turn."""
    positions = torch.arange(config.max_position_embeddings).unsqueeze(0)
    cosine, sine = (table[0, 0] for table in rotary_table(positions, config))
    room = (0, (cache_head_size(config) - config.head_dim) // 2)
    return F.pad(cosine, room, value=1.0), F.pad(sine, room)


def _places(config: DecoderConfig) -> Tensor:
    """Where a true head's elements stand in a wide one: rotary positions pair element i with i + half."""
    if config.positions == "learned":
        return torch.arange(config.head_dim)
    half = torch.arange(config.head_dim // 2)
    return torch.cat((half, half + cache_head_size(config) // 2))
