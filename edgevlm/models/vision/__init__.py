"""Vision encoders: pixel values (B, 3, H, W) to features (B, H·W, features)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from edgevlm.core.registry import Registry

# From the ``type`` of a vision config to the module that is made from it.
ENCODERS: Registry[Callable[[Any], nn.Module]] = Registry(
    "vision encoder",
    {
        "fastvit": "edgevlm.models.vision.fastvit:FastVit",
        "hybrid": "edgevlm.models.vision.hybrid:HybridEncoder",
        "stem_vit": "edgevlm.models.vision.stem_vit:StemVit",
        "vit": "edgevlm.models.vision.vit:VisionTransformer",
    },
)
