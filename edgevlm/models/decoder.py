"""The decoder, once for all: Llama, Qwen2, Qwen3 and SmolLM2 differ in the fields of DecoderConfig.

Module names follow transformers inside ``layers``, so that those checkpoints need no renaming there.
Sources: Touvron et al. 2023, arXiv:2302.13971; RoPE: Su et al. 2021, arXiv:2104.09864; grouped queries:
Ainslie et al. 2023, arXiv:2305.13245; SwiGLU: Shazeer 2020, arXiv:2002.05202; RMSNorm: Zhang & Sennrich 2019,
arXiv:1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.models.kv_cache import KVCache
from edgevlm.shapes.config import DecoderConfig


class Decoder(nn.Module):
    """``inputs_embeds`` (B, T, D) to hidden states (B, T, D) after the last norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        *,
        kv_cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Run every layer; with ``kv_cache`` the rows continue those that it holds.

        ``positions`` (B, T) and ``mask`` (B, 1, T, T; true where attention is allowed) are for packed
        training sequences; without them rows are consecutive and causal.
        """
        T = inputs_embeds.shape[1]
        start = kv_cache.position if kv_cache else 0
        if positions is None:
            positions = torch.arange(start, start + T, device=inputs_embeds.device).unsqueeze(0)
        if mask is None:
            mask = causal_mask(T, start, inputs_embeds.device)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask, kv_cache)
        if kv_cache:
            kv_cache.advance(T)
        return self.norm(hidden)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each with its residual."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, kv_cache: KVCache | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, mask, kv_cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention with grouped key-value heads and rotary positions."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        D, head, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(D, config.num_attention_heads * head, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * head, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, D, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(head, config.rms_norm_eps)
            self.k_norm = RMSNorm(head, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, kv_cache: KVCache | None) -> Tensor:
        B, T, _ = hidden.shape
        query, key, value = (
            project(hidden).view(B, T, -1, self.config.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if kv_cache:
            key, value = kv_cache.append(self.index, key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(nn.Module):
    """``weight · x / sqrt(mean(x²) + eps)`` over the last axis, in float32 whatever the input's type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(B, 1, T, head_dim / 2)`` of every position and frequency ``theta^(-2i / head_dim)``."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn element i and element i + head_dim/2 of each head by the angle of its position."""
    cosine, sine = (table.to(heads.dtype) for table in rotary)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def causal_mask(num_rows: int, start: int, device: torch.device) -> Tensor:
    """``(num_rows, start + num_rows)``: row t sees every position up to ``start + t``."""
    rows = torch.arange(start, start + num_rows, device=device).unsqueeze(1)
    return torch.arange(start + num_rows, device=device).unsqueeze(0) <= rows
