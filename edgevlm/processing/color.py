"""Every mode that Pillow decodes to, as 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

from edgevlm.core.errors import InputError

Color = tuple[int, int, int]

SIXTEEN_BIT_INTEGERS = ("PNG", "PPM")  # formats whose 16-bit grey some versions of Pillow read as mode "I"


def to_rgb(image: Image.Image, background: Color) -> Image.Image:
    """A new RGB picture without metadata: alpha over ``background``, 16-bit grey scaled to 8.

    Colour profiles are not applied, as in every reference processor.  Raises InputError for floating-point
    and 32-bit pixels, which do not say what white is.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT_INTEGERS):
        rgb = _from_16_bit(image).convert("RGB")
    elif image.mode == "I":
        raise InputError("32-bit pixels do not say what white is; save it with 8 or 16 bits")
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
    return Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8))
