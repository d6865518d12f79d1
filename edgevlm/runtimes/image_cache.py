"""Image features that need not be computed again."""

from __future__ import annotations

from collections import OrderedDict

from edgevlm.core.errors import ConfigError
from edgevlm.runtimes.session import ImageFeatures


class ImageCache:
    """What the encoder made of the last ``size`` pictures or frames asked about, by their keys; 0 keeps none."""

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ConfigError(f"image_cache_size must be 0 (off) or more, got {size}")
        self._size = size
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: str) -> ImageFeatures | None:
        """The features under ``key``, which become the last to go."""
        if key in self._features:
            self._features.move_to_end(key)
        return self._features.get(key)

    def put(self, key: str, features: ImageFeatures) -> None:
        """Keep ``features``; those unused for longest go."""
        self._features[key] = features
        self._features.move_to_end(key)
        while len(self._features) > self._size:
            self._features.popitem(last=False)
