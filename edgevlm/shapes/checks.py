"""What every config checks of itself."""

from __future__ import annotations

import math

from edgevlm.core.errors import ConfigError


def check_positive(config: object, *names: str) -> None:
    """Raise ConfigError unless every named field is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{type(config).__name__}.{name} must be at least 1, got {getattr(config, name)}")


def check_above_zero(config: object, *names: str) -> None:
    """Raise ConfigError unless every named field is a number above 0 and below infinity."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{type(config).__name__}.{name} must be above 0 and finite, got {getattr(config, name)}")


def check_heads(config: object, width: int, num_heads: int) -> None:
    """Raise ConfigError unless ``width`` divides into ``num_heads`` heads."""
    if width % num_heads:
        raise ConfigError(f"{type(config).__name__}: width {width} does not divide by {num_heads} heads")
