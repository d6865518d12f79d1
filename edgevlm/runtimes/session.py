"""What a back end must be able to do; everything else is written once, above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]


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

    def encode(self, pixel_values: Float) -> Float:
        """Pixels ``[1, 3, H, W]`` to image features ``[1, N, D]``; the cache is not touched."""
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


class BundleSession(Session, Protocol):
    """A session that a runtime opened from a bundle, and can say what it runs on."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Library, version, device and threads: what a measurement must carry."""
        ...
