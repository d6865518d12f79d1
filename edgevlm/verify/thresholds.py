"""How far a bundle may be from PyTorch float32, per precision and stage.  One table, each number with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.core.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Largest absolute difference that passes, and the reason for the number."""

    max_abs: float
    reason: str


FP32: Mapping[str, Threshold] = {
    "pixels": Threshold(
        max_abs=1.02 / 255,
        reason="one level of 255, where another Pillow rounds the other way; divided by the std",
    ),
    "pixels_mean": Threshold(
        max_abs=0.05 / 255, reason="rounding has no direction: a shift in the mean is a wrong spec"
    ),
    "image_features": Threshold(max_abs=1e-4, reason="sums in another order; 3e-6 is usual"),
    "inputs_embeds": Threshold(max_abs=0.0, reason="a row look-up computes nothing"),
    "prefill_logits": Threshold(max_abs=1e-4, reason="sums in another order; 2e-5 is usual on logits of size 30"),
    "decode_logits": Threshold(max_abs=1e-4, reason="as prefill, through the kv cache"),
}

TABLE: Mapping[str, Mapping[str, Threshold]] = {"fp32": FP32}


def thresholds(precision: str) -> Mapping[str, Threshold]:
    """The row of the table for ``precision``; UnsupportedError when there is none."""
    if precision not in TABLE:
        raise UnsupportedError(f"no parity thresholds for precision {precision!r}; known: {', '.join(TABLE)}")
    return TABLE[precision]
