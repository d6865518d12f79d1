"""The PyTorch model behind the same protocol as every runtime: the reference in each comparison."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.bundle.manifest import FusionShape
from edgevlm.core.errors import UnsupportedError
from edgevlm.models.kv_cache import KVCache
from edgevlm.models.vlm import Vlm
from edgevlm.runtimes.session import ImageFeatures
from edgevlm.shapes.config import VlmConfig


class TorchSession:
    """A ``runtimes.Session`` that computes with PyTorch, in float32, on the CPU.

    The kv cache has room for ``max_context`` rows, or for all positions that the decoder knows.
    """

    def __init__(self, model: Vlm, *, max_context: int | None = None) -> None:
        self._model = model.eval()
        self._cache = KVCache(model.config.decoder, max_context=max_context)

    @property
    def max_context(self) -> int:
        """Rows that the kv cache can hold."""
        return self._cache.max_context

    @property
    def position(self) -> int:
        """Rows that the kv cache holds now."""
        return self._cache.position

    @torch.inference_mode()
    def encode(self, pixel_values: NDArray[np.float32]) -> ImageFeatures:
        """Tiles or views ``[S, 3, H, W]`` of one picture to its features; tiles are encoded one by one."""
        pixels = torch.from_numpy(pixel_values)
        if self._model.config.fusion is not None:
            tokens, fusion_cache = self._model.encode_fused(pixels)
            return ImageFeatures(_to_numpy(tokens), _to_numpy(fusion_cache))
        tiles = [self._model.encode(tile.unsqueeze(0)) for tile in pixels]
        return ImageFeatures(_to_numpy(torch.cat(tiles, dim=1)))

    @torch.inference_mode()
    def fuse(self, features: ImageFeatures, inputs_embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Text rows ``[1, T, D]`` that have seen the picture.  Raises UnsupportedError without pre-fusion."""
        if self._model.config.fusion is None or features.fusion_cache is None:
            raise UnsupportedError("this model has no pre-fusion: its text rows go to the decoder as they are")
        cache = torch.from_numpy(features.fusion_cache)
        return _to_numpy(self._model.fuse(cache, torch.from_numpy(inputs_embeds)))

    @torch.inference_mode()
    def embed(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token ids ``[1, T]`` to ``[1, T, D]``."""
        return _to_numpy(self._model.embed_tokens(torch.from_numpy(input_ids)))

    @torch.inference_mode()
    def prefill(self, inputs_embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append the rows ``[1, T, D]`` to the cache; logits ``[V]`` of the last one."""
        return self._next_logits(torch.from_numpy(inputs_embeds))

    @torch.inference_mode()
    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token to the cache; its logits ``[V]``."""
        return self._next_logits(self._model.embed_tokens(torch.tensor([[token]])))

    def rewind(self, position: int) -> None:
        """Forget every row of the cache after the first ``position``."""
        self._cache.rewind(position)

    def close(self) -> None:
        """Nothing to give back: the model belongs to the caller."""

    def _next_logits(self, rows: Tensor) -> NDArray[np.float32]:
        hidden = self._model.decoder(rows, kv_cache=self._cache)
        return _to_numpy(self._model.logits(hidden[0, -1]))


def fusion_shape(config: VlmConfig) -> FusionShape | None:
    """What a runtime must know of the model's pre-fusion, None without."""
    if config.fusion is None:
        return None
    return FusionShape(num_layers=config.fusion.num_layers, skip_token_zero=config.fusion.skip_token_zero)


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.float().numpy())
