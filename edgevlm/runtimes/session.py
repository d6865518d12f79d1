"""What a back end must be able to do; everything else is written once, above it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What a vision encoder makes of one picture.

    ``tokens`` [1, N, D] are what the decoder reads.  ``fusion_cache`` [layers, 2, K, rows, head_dim], of models with
    modality pre-fusion only, holds the keys and values by which text sees the whole picture before the decoder.
    """

    tokens: Float
    fusion_cache: Float | None = None


class Session(Protocol):
    """One loaded model with one kv cache.  Arrays that it returns are the caller's to keep and change."""

    @property
    def max_context(self) -> int:
        """Rows that the kv cache can hold."""
        ...

    @property
    def position(self) -> int:
        """Rows that the kv cache holds now."""
        ...

    def encode(self, pixel_values: Float) -> ImageFeatures:
        """Pixels ``[S, 3, H, W]`` of one picture, its S tiles or views, to its features; the cache is not touched.

        Tiles that the model encodes one by one give their tokens one after the other.
        """
        ...

    def fuse(self, features: ImageFeatures, inputs_embeds: Float) -> Float:
        """Text rows ``[1, T, D]`` that have seen the picture, for features with a ``fusion_cache``.

        The rows are the prompt's text alone, in order; the kv cache is not touched.  Raises UnsupportedError for a
        model without pre-fusion.
        """
        ...

    def embed(self, input_ids: Ints) -> Float:
        """Token ids ``[1, T]`` to ``[1, T, D]``; the cache is not touched."""
        ...

    def prefill(self, inputs_embeds: Float) -> Float:
        """Append the rows ``[1, T, D]`` to the cache; logits ``[V]`` of the last one.

        Raises DoesNotFitError, with the cache as it was, when they exceed ``max_context``.
        """
        ...

    def decode(self, token: int) -> Float:
        """Append one token to the cache; its logits ``[V]``.  Raises like ``prefill``."""
        ...

    def rewind(self, position: int) -> None:
        """Forget every row of the cache after the first ``position``; 0 forgets all.

        Raises UsageError, with the cache as it was, for a negative number or one beyond ``position``.
        """
        ...

    def close(self) -> None:
        """Give the memory back; the session cannot be used afterwards."""
        ...
