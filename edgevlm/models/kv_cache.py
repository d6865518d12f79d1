"""Keys and values of the positions that a decoder has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from edgevlm.core.errors import DoesNotFitError, UsageError
from edgevlm.shapes.config import DecoderConfig


class KVCache:
    """One buffer ``(B, K, max_context, head_dim)`` per layer for keys and one for values, filled from the left."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        max_context: int | None = None,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.max_context = max_context or config.max_position_embeddings
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            self.max_context,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self.position = 0  # rows that every layer holds

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new rows of ``layer`` after ``position``; return all rows that it now holds."""
        end = self.position + key.shape[2]
        if end > self.max_context:
            raise DoesNotFitError(f"the cache holds {self.max_context} positions, {end} were asked for")
        self.keys[layer, :, :, self.position : end] = key
        self.values[layer, :, :, self.position : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_rows: int) -> None:
        """Count rows that every layer has stored."""
        self.position += num_rows

    def rewind(self, position: int) -> None:
        """Forget every row after the first ``position``.  Raises UsageError when there are fewer."""
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot rewind to row {position}: the kv cache holds {self.position}")
        self.position = position
