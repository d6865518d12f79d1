"""What every config checks of itself."""

from __future__ import annotations

import math

from edgevlm.core.config import shown
from edgevlm.core.errors import ConfigError

MOST_LAYERS = 4096
MOST = 1 << 24  # of anything else: rows of a vocabulary, positions, widths


def check_positive(config: object, *names: str) -> None:
    """Raise ConfigError unless every named field is at least 1, and no more than any model has."""
    for name in names:
        value, most = getattr(config, name), MOST_LAYERS if name.endswith("_layers") else MOST
        if value < 1:
            raise ConfigError(f"{type(config).__name__}.{name} must be at least 1, got {value}")
        if value > most:
            raise ConfigError(f"{type(config).__name__}.{name} must be at most {most:,}, got {shown(value)}")


def check_stages(config: object, widths: tuple[int, ...], depths: tuple[int, ...]) -> None:
    """Raise ConfigError unless there are as many widths as depths, of sizes that a model can have."""
    if not widths or len(widths) != len(depths):
        raise ConfigError(f"widths {widths} and depths {depths} must be of one length, at least 1")
    if min(widths) < 1 or min(depths) < 0:
        raise ConfigError(f"widths {widths} must be at least 1 each, depths {depths} at least 0")
    if max(widths) > MOST or max(depths) > MOST_LAYERS:
        raise ConfigError(
            f"{type(config).__name__}: widths must be at most {MOST:,}, depths at most {MOST_LAYERS:,}; "
            f"got {shown(widths)} and {shown(depths)}"
        )


def check_above_zero(config: object, *names: str) -> None:
    """Raise ConfigError unless every named field is a number above 0 and below infinity."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{type(config).__name__}.{name} must be above 0 and finite, got {getattr(config, name)}")


def check_heads(config: object, width: int, num_heads: int) -> None:
    """Raise ConfigError unless ``width`` divides into ``num_heads`` heads."""
    if width % num_heads:
        raise ConfigError(f"{type(config).__name__}: width {width} does not divide by {num_heads} heads")
