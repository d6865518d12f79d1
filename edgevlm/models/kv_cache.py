"""Keys and values of the positions that a decoder has seen."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edgevlm.core.errors import DoesNotFitError, UsageError
from edgevlm.shapes.config import DecoderConfig


class KeyValues(Protocol):
    """What a layer needs of a cache."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new rows ``(B, K, T, head_dim)`` of ``layer``; return all rows that it now holds."""
        ...


class KVCache:
    """One buffer ``(B, K, max_context, head_dim)`` per layer for keys and one for values, filled from the left.

    Rows take memory as they are filled.  Raises DoesNotFitError when there can never be enough for all of them.
    """

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
        self.keys, self.values = _zeros(shape, dtype), _zeros(shape, dtype)
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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of which the system hands out no page before it is written; ``torch.zeros`` writes them all."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        memory = np.zeros(num_bytes, np.uint8)
    except (MemoryError, ValueError, OverflowError) as error:
        raise DoesNotFitError(
            f"the kv cache for {shape[3]:,} rows takes {2 * num_bytes:,} bytes, more than can be had: "
            f"ask for fewer rows (max_context, --max-context)"
        ) from error
    return torch.from_numpy(memory).view(dtype).reshape(shape)


class GrowingCache:
    """Keys and values ``(B, K, rows, head_dim)`` of each layer, joined anew with every append: it can be traced."""

    def __init__(self, layers: Tensor | None = None) -> None:
        """``layers`` (L, 2, K, rows, head_dim): what each layer of one picture holds already, keys before values."""
        self._layers = {} if layers is None else {i: (both[0][None], both[1][None]) for i, both in enumerate(layers)}

    @property
    def num_rows(self) -> int:
        """Rows that the first layer holds."""
        return self._layers[0][0].shape[2] if self._layers else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new rows of ``layer``; return all rows that it now holds."""
        if layer in self._layers:
            old_key, old_value = self._layers[layer]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        self._layers[layer] = (key, value)
        return key, value

    def stacked(self) -> Tensor:
        """All of it for one picture (L, 2, K, rows, head_dim)."""
        return torch.stack([torch.cat(pair) for _, pair in sorted(self._layers.items())])
