"""Which frames of a video are read, and at which size (LLaVA-Mini, arXiv 2501.03895)."""

from __future__ import annotations

from PIL import Image

from edgevlm.core.errors import InputError
from edgevlm.processing.fit import fit_image
from edgevlm.processing.image_spec import ImageSpec


def sample_frames(num_frames: int, fps: float) -> tuple[int, ...]:
    """Indices into ``num_frames`` frames, one for each second at ``fps`` frames a second, at least one.

    Each is the middle of its stretch of the video; halves go to the even number.  Raises InputError for numbers
    that no video has.
    """
    if num_frames < 1 or not 0 < fps < float("inf"):
        raise InputError(f"a video has frames, so many a second; found {num_frames} frames at {fps} a second")
    count = max(1, min(num_frames, int(num_frames // fps)))
    step = (num_frames - 1) / count
    return tuple((round(step * index) + round(step * (index + 1))) // 2 for index in range(count))


def square_frame(frame: Image.Image, spec: ImageSpec) -> Image.Image:
    """``frame`` at the encoder's own size, stretched, each pixel the one at ``floor(i * scale)``."""
    nearest = ImageSpec(height=spec.height, width=spec.width, fit="stretch", filter="nearest", antialias=False)
    return Image.fromarray(fit_image(frame, nearest).astype("uint8"))
