"""Encoder, projector, embedding and decoder joined into one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.models.decoder import Decoder
from edgevlm.models.kv_cache import KVCache
from edgevlm.models.projectors import PROJECTORS
from edgevlm.models.vision import ENCODERS
from edgevlm.shapes.config import VlmConfig


class Vlm(nn.Module):
    """A vision-language model in four parts, each of which exports on its own."""

    def __init__(self, config: VlmConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.decoder
        self.vision_encoder = ENCODERS[config.vision.type](config.vision)
        self.projector = PROJECTORS[config.projector.type](config)
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.decoder = Decoder(decoder)
        self.lm_head: nn.Linear | None = None
        if not decoder.tie_word_embeddings:
            self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """``pixel_values`` (B, 3, H, W) to ``image_features`` (B, N, D)."""
        return self.projector(self.vision_encoder(pixel_values))

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, D) that turns hidden states into logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) to logits (…, V)."""
        return F.linear(hidden, self.head_weight)

    def forward(self, inputs_embeds: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """``inputs_embeds`` (B, T, D) to the logits of every row (B, T, V)."""
        return self.logits(self.decoder(inputs_embeds, kv_cache=kv_cache))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill linear, convolution and embedding weights with small normal values, reproducibly."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                fan_in = module.weight[0].numel()
                deviation = 0.02 if isinstance(module, nn.Embedding) else fan_in**-0.5
                module.weight.normal_(0.0, deviation, generator=generator)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                module.bias.zero_()
