"""Modality pre-fusion: text rows see every vision feature before the decoder, which then reads few vision tokens.

    V  projected features of every view       ┐
    c  projected compressed features          ├─ layers, causal ─► c' to the decoder, in the picture's place
    T  embeddings of the prompt's text        ┘                    T' to the decoder, in the text's place

What V and c leave behind, a cache of keys and values, does not depend on the text: it is computed once per picture.

Source: LLaVA-Mini, Zhang et al. 2025, arXiv:2501.03895, as the released code behaves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgevlm.models.compressor import QueryCompressor, make_compressor
from edgevlm.models.decoder import Decoder, DecoderLayer, causal_mask, rotary_table
from edgevlm.models.kv_cache import GrowingCache
from edgevlm.shapes.config import VlmConfig


class Fusion(nn.Module):
    """A compressor, and decoder layers of the decoder's own config without a norm after them."""

    def __init__(self, config: VlmConfig) -> None:
        super().__init__()
        assert config.fusion is not None
        self.config, self.decoder_config = config.fusion, config.decoder
        self.compressor = make_compressor(config)
        self.layers = nn.ModuleList(DecoderLayer(config.decoder, index) for index in range(config.fusion.num_layers))

    @torch.no_grad()
    def initialize(self, decoder: Decoder, generator: torch.Generator) -> None:
        """Start as the decoder's own first layers, the queries as small normal values."""
        for mine, its in zip(self.layers, decoder.layers, strict=False):
            mine.load_state_dict(its.state_dict())
        if isinstance(self.compressor, QueryCompressor):
            self.compressor.query.normal_(0.0, 0.02, generator=generator)

    def see(self, features: Tensor, projector: nn.Module) -> tuple[Tensor, GrowingCache]:
        """Features (B, S, N, width) of S views to tokens (B, K, D), and what text will look at."""
        S = features.shape[1]
        crops = one_raster(features[:, :-1]) if S > 1 else features[:, 0]
        compressed = projector(self.compressor(crops))
        every = torch.cat((crops, features[:, -1]), dim=1) if S > 1 else crops
        rows = torch.cat((projector(every), compressed), dim=1)
        return self._run_prefix(rows, compressed.shape[1])

    def read(self, text: Tensor, cache: GrowingCache, kept: Tensor | None = None) -> Tensor:
        """Text rows (B, T, D) as they are after the cached ones, at consecutive positions: (B, T, D).

        ``kept`` (B, T) is false for rows that are not part of the text; those come back as they were.
        """
        T, start, device = text.shape[1], cache.num_rows, text.device
        mask, positions = causal_mask(T, start, device), torch.arange(start, start + T, device=device).unsqueeze(0)
        if kept is not None:
            seen = torch.cat((kept.new_ones(kept.shape[0], start), kept), dim=1)
            mask, positions = mask & seen[:, None, None, :], (start + kept.cumsum(1) - 1).clamp(min=0)
        rotary, hidden = self._rotary(positions), text
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask, cache)
        return hidden if kept is None else torch.where(kept.unsqueeze(-1), hidden, text)

    def _run_prefix(self, rows: Tensor, num_kept: int) -> tuple[Tensor, GrowingCache]:
        """The last ``num_kept`` rows after every layer; of the others the last layer needs keys and values alone."""
        cache, num_rows = GrowingCache(), rows.shape[1]
        rotary = self._rotary(torch.arange(num_rows, device=rows.device).unsqueeze(0))
        mask = causal_mask(num_rows, 0, rows.device)
        *before, last = self.layers
        for layer in before:
            rows = layer(rows, rotary, mask, cache)
        assert isinstance(last, DecoderLayer)
        first, (cosine, sine) = num_rows - num_kept, rotary
        before_it = (cosine[:, :, :first], sine[:, :, :first])
        cache.append(len(before), *last.self_attn.keys_and_values(last.input_layernorm(rows[:, :first]), before_it))
        its_own = (cosine[:, :, first:], sine[:, :, first:])
        return last(rows[:, first:], its_own, mask[first:], cache), cache

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, self.decoder_config)


def one_raster(crops: Tensor) -> Tensor:
    """Features (B, n², g², width) of crops in reading order to those of the whole (B, (n·g)², width), row by row."""
    B, S, N, width = crops.shape
    n, g = round(S**0.5), round(N**0.5)
    return crops.view(B, n, n, g, g, width).transpose(2, 3).reshape(B, S * N, width)
