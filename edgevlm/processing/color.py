"""Every mode that Pillow decodes to, as 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

from edgevlm.core.errors import InputError

Color = tuple[int, int, int]


def to_rgb(image: Image.Image, background: Color) -> Image.Image:
    """A new RGB picture without metadata: alpha over ``background``, 16-bit grey scaled to 8.

    Colour profiles are not applied, as in every reference processor.  Raises InputError for floating-point
    and 32-bit pixels, which do not say what white is.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        rgb = _from_16_bit(image).convert("RGB")
    elif image.mode == "F":
        raise InputError("floating-point pixels do not say what white is; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        rgb = _over(image.convert("RGBA"), background)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # an orientation left in there would be applied a second time
    return rgb


def _over(image: Image.Image, background: Color) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65_535:
        raise InputError("32-bit pixels do not say what white is; save it with 8 or 16 bits")
    return Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8))
