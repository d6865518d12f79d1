"""Image features that need not be computed again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from edgevlm.core.errors import ConfigError
from edgevlm.runtimes.session import Float


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a prompt, as ``[1, 3, H, W]`` pixels; equal pixels have the same ``key``."""

    pixel_values: Float
    key: str

    @classmethod
    def of(cls, pixel_values: Float) -> Picture:
        """Name the pixels by their hash (about half a millisecond per million bytes)."""
        return cls(pixel_values, hashlib.sha256(pixel_values.tobytes()).hexdigest())


class ImageCache:
    """Features ``[1, N, D]`` of the last ``size`` pictures asked about, by their keys; 0 keeps none."""

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ConfigError(f"image_cache_size must be 0 (off) or more, got {size}")
        self._size = size
        self._features: OrderedDict[str, Float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: str) -> Float | None:
        """The features under ``key``, which become the last to go."""
        if key in self._features:
            self._features.move_to_end(key)
        return self._features.get(key)

    def put(self, key: str, features: Float) -> None:
        """Keep ``features``; those unused for longest go."""
        self._features[key] = features
        self._features.move_to_end(key)
        while len(self._features) > self._size:
            self._features.popitem(last=False)
