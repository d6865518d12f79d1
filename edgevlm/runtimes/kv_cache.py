"""What the tensors of a kv cache are called, in the graphs of every target."""

from __future__ import annotations

from edgevlm.bundle.manifest import DecoderShape


def cache_names(shape: DecoderShape) -> tuple[str, ...]:
    """``0.key``, ``0.value``, ``1.key``, …: what follows ``past_key_values.`` and ``present.``."""
    return tuple(f"{layer}.{kind}" for layer in range(shape.num_layers) for kind in ("key", "value"))
