"""The PyTorch model behind the same protocol as every runtime: the reference in each comparison."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevlm.models.kv_cache import KVCache
from edgevlm.models.vlm import Vlm


class TorchSession:
    """A ``runtimes.Session`` that computes with PyTorch, in float32, on the CPU."""

    def __init__(self, model: Vlm) -> None:
        self._model = model.eval()
        self._cache = KVCache(model.config.decoder)

    @property
    def max_context(self) -> int:
        """Rows that the kv cache can hold."""
        return self._cache.max_context

    @property
    def position(self) -> int:
        """Rows that the kv cache holds now."""
        return self._cache.position

    @torch.inference_mode()
    def encode(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pixels ``[1, 3, H, W]`` to image features ``[1, N, D]``."""
        return _to_numpy(self._model.encode(torch.from_numpy(pixel_values)))

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


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.float().numpy())
