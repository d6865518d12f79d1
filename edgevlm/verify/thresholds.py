"""How far a bundle may be from PyTorch float32, per precision and stage.  One table, each number with its reason.

What is allowed is ``max_abs + relative * max|reference|``: rounding errors grow with the numbers that are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Largest difference that passes, a fixed part and one per unit of the largest value, and the reason for both."""

    max_abs: float
    relative: float = 0.0
    reason: str

    def allowed(self, reference: NDArray[np.float32]) -> float:
        """The largest absolute difference to ``reference`` that passes."""
        return self.max_abs + self.relative * float(np.abs(reference).max(initial=0.0))


SUMS = 1e-5  # of the largest value: 80 roundings of float32; a decoder of 30 layers uses a quarter of it


FP32: Mapping[str, Threshold] = {
    "pixels": Threshold(
        max_abs=1.02 / 255,
        reason="one level of 255, where another Pillow rounds the other way; divided by the std",
    ),
    "pixels_mean": Threshold(
        max_abs=0.05 / 255, reason="rounding has no direction: a shift in the mean is a wrong spec"
    ),
    "image_features": Threshold(
        max_abs=2e-5, relative=SUMS, reason="sums in another order; 4e-7 of the largest value is usual"
    ),
    "inputs_embeds": Threshold(max_abs=0.0, reason="a row look-up computes nothing"),
    "fused_embeds": Threshold(max_abs=2e-5, relative=SUMS, reason="as image features, through the fusion's layers"),
    "prefill_logits": Threshold(
        max_abs=2e-5, relative=SUMS, reason="sums in another order; 1e-6 of the largest logit is usual"
    ),
    "decode_logits": Threshold(max_abs=2e-5, relative=SUMS, reason="as prefill, through the kv cache"),
}

TABLE: Mapping[str, Mapping[str, Threshold]] = {"fp32": FP32}


def thresholds(precision: str) -> Mapping[str, Threshold]:
    """The row of the table for ``precision``; UnsupportedError when there is none."""
    if precision not in TABLE:
        raise UnsupportedError(f"no parity thresholds for precision {precision!r}; known: {', '.join(TABLE)}")
    return TABLE[precision]
