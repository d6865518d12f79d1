"""Projectors: features (B, H·W, features) to vision tokens (B, N, D)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from edgevlm.core.registry import Registry
from edgevlm.shapes.config import VlmConfig

# From the ``type`` of a projector config to what makes it, of the whole model's config.
PROJECTORS: Registry[Callable[[VlmConfig], nn.Module]] = Registry(
    "projector",
    {
        "mlp": "edgevlm.models.projectors.mlp:make_projector",
        "pool": "edgevlm.models.projectors.mlp:make_projector",
        "queries": "edgevlm.models.projectors.queries:QueryProjector",
        "unshuffle": "edgevlm.models.projectors.mlp:make_projector",
    },
)
