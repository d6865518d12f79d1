"""The decoder, once for all: Llama, Qwen2, Qwen3, SmolLM2 and GPT-2 differ in the fields of DecoderConfig.

Module names follow transformers' Llama inside ``layers``, so that those checkpoints need no renaming there.
Sources: Touvron et al. 2023, arXiv:2302.13971; RoPE: Su et al. 2021, arXiv:2104.09864; its stretching: Grattafiori et
al. 2024, arXiv:2407.21783; grouped queries: Ainslie et al. 2023, arXiv:2305.13245; SwiGLU: Shazeer 2020,
arXiv:2002.05202; RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.models.kv_cache import KeyValues, KVCache
from edgevlm.shapes.config import DecoderConfig, Llama3Scaling

Rotary: TypeAlias = tuple[Tensor, Tensor]  # cosine and sine (B, 1, T, head_dim / 2)


class Decoder(nn.Module):
    """``inputs_embeds`` (B, T, D) to hidden states (B, T, D) after the last norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config)

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
        hidden, rotary = self._placed(inputs_embeds, positions)
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask, kv_cache)
        if kv_cache:
            kv_cache.advance(T)
        return self.norm(hidden)

    def _placed(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Rotary | None]:
        """Rows that know where they stand, or the angles by which the layers tell them."""
        if self.config.positions == "learned":
            return hidden + self.embed_positions(positions).to(hidden.dtype), None
        return hidden, rotary_table(positions, self.config)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = make_norm(config)
        make_mlp = SwiGLU if config.mlp == "swiglu" else GeluMlp
        self.mlp = make_mlp(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, rotary: Rotary | None, mask: Tensor, kv_cache: KeyValues | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, mask, kv_cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention with grouped key-value heads; ``rotary`` turns them by their positions."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        D, head, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(D, config.num_attention_heads * head, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * head, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, D, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(head, config.rms_norm_eps)
            self.k_norm = RMSNorm(head, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotary: Rotary | None, mask: Tensor, kv_cache: KeyValues | None) -> Tensor:
        B, T, _ = hidden.shape
        query = self._heads(self.q_proj(hidden))
        if self.config.qk_norm:
            query = self.q_norm(query)
        if rotary is not None:
            query = rotate(query, rotary)
        key, value = self.keys_and_values(hidden, rotary)
        if kv_cache:
            key, value = kv_cache.append(self.index, key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))

    def keys_and_values(self, hidden: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """What other rows see of the normed rows ``hidden`` (B, T, D): twice (B, K, T, head_dim)."""
        key, value = self._heads(self.k_proj(hidden)), self._heads(self.v_proj(hidden))
        if self.config.qk_norm:
            key = self.k_norm(key)
        return (key if rotary is None else rotate(key, rotary)), value

    def _heads(self, rows: Tensor) -> Tensor:
        B, T, _ = rows.shape
        return rows.view(B, T, -1, self.config.head_dim).transpose(1, 2)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class GeluMlp(nn.Module):
    """``fc2(gelu(fc1(x)))``, the GELU exact."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


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


def make_norm(config: DecoderConfig) -> RMSNorm | nn.LayerNorm:
    """The norm of a decoder's rows, fresh."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


def rotary_table(positions: Tensor, config: DecoderConfig) -> Rotary:
    """Cosine and sine ``(B, 1, T, head_dim / 2)`` of the angle of every position (B, T) and frequency."""
    angles = positions.float().unsqueeze(-1) * rotary_frequencies(config).to(positions.device)
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotary_frequencies(config: DecoderConfig) -> Tensor:
    """Radians per position ``(head_dim / 2)``: ``theta^(-2i / head_dim)``, stretched as the config says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    return frequencies if config.rope_scaling is None else stretched(frequencies, config.rope_scaling)


def stretched(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """``frequencies`` where they are high, divided by the factor where they are low.

    Between, the share that stays grows with the number of turns in the original context from 0 to 1.
    """
    turns = frequencies * scaling.original_max_position_embeddings / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn element i and element i + head_dim/2 of each head by the angle of its position."""
    cosine, sine = (table.to(heads.dtype) for table in rotary)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def causal_mask(num_rows: int, start: int, device: torch.device) -> Tensor:
    """``(num_rows, start + num_rows)``: row t sees every position up to ``start + t``."""
    rows = torch.arange(start, start + num_rows, device=device).unsqueeze(1)
    return torch.arange(start + num_rows, device=device).unsqueeze(0) <= rows
