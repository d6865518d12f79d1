"""Encoder, projector, embedding and decoder joined into one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgevlm.core.errors import UnsupportedError, UsageError
from edgevlm.models.decoder import Decoder
from edgevlm.models.fusion import Fusion
from edgevlm.models.kv_cache import GrowingCache, KVCache
from edgevlm.models.projectors import PROJECTORS
from edgevlm.models.projectors.queries import QueryProjector
from edgevlm.models.vision import ENCODERS
from edgevlm.models.vision.vit import VisionTransformer
from edgevlm.shapes.config import VlmConfig


class Vlm(nn.Module):
    """A vision-language model in parts, each of which exports on its own.

    With ``fusion`` pictures go through ``encode_fused`` and the text around them through ``fuse``.
    """

    def __init__(self, config: VlmConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.decoder
        self.vision_encoder = ENCODERS[config.vision.type](config.vision)
        self.projector = PROJECTORS[config.projector.type](config)
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.fusion = Fusion(config) if config.fusion is not None else None
        self.decoder = Decoder(decoder)
        self.lm_head: nn.Linear | None = None
        if not decoder.tie_word_embeddings:
            self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """``pixel_values`` (B, 3, H, W) to ``image_features`` (B, N, D)."""
        return self.projector(self.vision_encoder(pixel_values))

    def encode_fused(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The S views (S, 3, H, W) of one picture to its tokens (1, K, D) and the cache by which text sees it.

        The cache is (layers, 2, key-value heads, rows, head_dim): every feature's row, then the K tokens'.
        Raises UsageError for another number of views than the config's.
        """
        tokens, cache = self._seen(pixel_values.unsqueeze(0))
        return tokens, cache.stacked()

    def fuse(self, cache: Tensor, text_rows: Tensor) -> Tensor:
        """Embeddings (1, T, D) of the text around a picture, in order and without it, as they are after seeing it."""
        return self._fusion().read(text_rows, GrowingCache(cache))

    def forward_fused(self, pixel_values: Tensor, text_rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, S, 3, H, W) and embeddings (B, T, D) to tokens (B, K, D) and fused rows (B, T, D), to train.

        ``kept`` (B, T) is false for padding, answers and whatever else is not fused: such rows come back as they are.
        No gradient reaches the embeddings.
        """
        text_rows = text_rows.detach()
        tokens, cache = self._seen(pixel_values)
        return tokens, self._fusion().read(text_rows, cache, kept)

    def _seen(self, views: Tensor) -> tuple[Tensor, GrowingCache]:
        fusion, (B, S) = self._fusion(), views.shape[:2]
        if self.config.num_views != S:
            raise UsageError(f"{S} views of one picture; the model takes {self.config.num_views}")
        features = self.vision_encoder(views.flatten(0, 1))
        return fusion.see(features.unflatten(0, (B, S)), self.projector)

    def _fusion(self) -> Fusion:
        if self.fusion is None:
            raise UnsupportedError("this model has no pre-fusion: its config.json has no 'fusion'")
        return self.fusion

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
        """Fill linear, convolution and embedding weights with small normal values, which follow from ``seed`` alone."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                fan_in = module.weight[0].numel()
                deviation = 0.02 if isinstance(module, nn.Embedding) else fan_in**-0.5
                module.weight.normal_(0.0, deviation, generator=generator)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                module.bias.zero_()
        if self.fusion is not None:
            self.fusion.initialize(self.decoder, generator)
        for part in (self.vision_encoder, self.projector):
            if isinstance(part, (VisionTransformer, QueryProjector)):
                part.initialize(generator)
