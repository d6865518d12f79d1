"""The tiles or views of a picture, as many at a time as an encoder takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgevlm.bundle.manifest import PartFile
from edgevlm.core.errors import UsageError
from edgevlm.runtimes.session import Float, ImageFeatures


def views_at_once(part: PartFile) -> int:
    """Tiles or views that the vision encoder takes at once: its fixed number, else one."""
    inputs = {tensor.name: tensor.shape for tensor in part.inputs}
    first = inputs.get("pixel_values", (1,))[0]
    return first if isinstance(first, int) else 1


def encode_views(
    pixel_values: Float, num_views: int, run: Callable[[Float], Sequence[Float]], *, fuses: bool
) -> ImageFeatures:
    """``run`` over ``[S, 3, H, W]`` in portions of ``num_views``; tokens come one portion after the other.

    ``run`` gives the tokens, and what a fusion reads where the model ``fuses``; such a model takes one picture at a
    time.  Raises UsageError for a number of views that is no picture.
    """
    count, rest = divmod(len(pixel_values), num_views)
    if rest or not count:
        raise UsageError(f"the vision encoder takes {num_views} views of a picture, got {len(pixel_values)}")
    if fuses and count > 1:
        raise UsageError(f"the vision encoder takes one picture of {num_views} views, got {count}")
    if count == 1:
        return ImageFeatures(*run(pixel_values))
    parts = [run(portion)[0] for portion in np.split(pixel_values, count)]
    return ImageFeatures(np.concatenate(parts, axis=1))
