"""The same model at another input size."""

from __future__ import annotations

from dataclasses import replace

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.shapes.config import FastVitConfig, HybridConfig, VlmConfig


def at_image_size(config: VlmConfig, image_size: int) -> VlmConfig:
    """``config`` for pictures of ``image_size`` pixels a side.

    Raises UnsupportedError for an encoder with a table of positions, which fits its own size alone, and for a size
    that the encoder's stride or the projector does not divide.
    """
    vision = config.vision
    if image_size == vision.image_size:
        return config
    if not isinstance(vision, (FastVitConfig, HybridConfig)):
        raise UnsupportedError(
            f"image size {image_size}: this encoder ({vision.type}) has learned positions for "
            f"{vision.image_size} pixels and takes no other size"
        )
    try:
        return replace(config, vision=replace(vision, image_size=image_size))
    except ConfigError as error:
        unit = vision.stride * config.projector.factor
        raise UnsupportedError(f"image size {image_size}: {error}; take a multiple of {unit}") from error
