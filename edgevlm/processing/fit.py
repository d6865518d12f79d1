"""A picture of any size onto the target's grid: geometry once, executed by Pillow or by ``resample``."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm.core.errors import InputError
from edgevlm.processing.image_spec import Filter, ImageSpec
from edgevlm.processing.resample import Axis, Float, apply_taps, picture_taps

Number = TypeVar("Number", bound=np.generic)

PILLOW_FILTERS: dict[Filter, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_CANVAS_SIDE = 65_536
MAX_CANVAS_PIXELS = 100_000_000  # beyond, exactness would cost seconds
STRIP_PIXELS = 8_000_000  # of canvas in memory at once (24 MB)
MAX_OVERSIZE = 16  # a crop may resize this many times the pixels that it keeps


def fit_image(image: Image.Image, spec: ImageSpec) -> Float:
    """The RGB ``image`` as [height, width, 3] levels; whole numbers from 0 to 255 where ``spec`` rounds.

    Raises InputError when padding would make a canvas longer than 65,536 pixels.
    """
    horizontal, vertical = axes(image.size, spec)
    if spec.rounding == "uint8" and spec.antialias:
        return np.asarray(_by_pillow(image, horizontal, vertical, spec), dtype=np.float32)
    levels = _by_numpy(image, horizontal, vertical, spec)
    return np.clip(np.rint(levels), 0, 255) if spec.rounding == "uint8" else levels


def axes(size: tuple[int, int], spec: ImageSpec) -> tuple[Axis, Axis]:
    """The horizontal and the vertical axis of the resize of a picture of ``size`` (width, height)."""
    (w, h), (W, H) = size, (spec.width, spec.height)
    if spec.fit == "pad":
        wider = w * H >= h * W
        canvas = (w, max(h, round(w * H / W))) if wider else (max(w, round(h * W / H)), h)
        return _padded(w, canvas[0], W), _padded(h, canvas[1], H)
    if spec.fit == "center-crop":
        covering = (h * W, w) if w * H <= h * W else (w * H, h)  # the long side as a fraction of target pixels
        long_side = covering[0] // covering[1]
        resized = (W, long_side) if w * H <= h * W else (long_side, H)
        return _cropped(w, resized[0], W), _cropped(h, resized[1], H)
    return _padded(w, w, W), _padded(h, h, H)


def _padded(length: int, canvas: int, size: int) -> Axis:
    if canvas > MAX_CANVAS_SIDE:
        raise InputError(
            f"the picture is too long and thin: padded it would be {canvas:,} pixels a side, "
            f"allowed are {MAX_CANVAS_SIDE:,}; cut it into pieces first"
        )
    return Axis(length=length, canvas=canvas, offset=(canvas - length) // 2, start=0.0, span=float(canvas), size=size)


def _cropped(length: int, resized: int, size: int) -> Axis:
    scale = length / resized
    return Axis(
        length=length,
        canvas=length,
        offset=0,
        start=(resized - size) // 2 * scale,
        span=size * scale,
        size=size,
    )


def _by_numpy(image: Image.Image, horizontal: Axis, vertical: Axis, spec: ImageSpec) -> Float:
    """Resample differences to the pad colour: around the picture they are zero, so no canvas is needed."""
    background = np.asarray(spec.pad_color if spec.fit == "pad" else (0, 0, 0), dtype=np.float32)
    pixels, zero = np.asarray(image), np.zeros(3, dtype=np.float32)
    across = picture_taps(horizontal, spec.filter, spec.antialias)
    down = picture_taps(vertical, spec.filter, spec.antialias)
    if spec.height * image.width <= spec.width * image.height:  # the pass that leaves less goes first
        levels = _turned(apply_taps(across, _turned(apply_taps(down, pixels, background)), zero))
    else:
        levels = apply_taps(down, _turned(apply_taps(across, _turned(pixels), background)), zero)
    return levels + background


def _turned(pixels: NDArray[Number]) -> NDArray[Number]:
    """[H, W, 3] as [W, H, 3]."""
    turned: NDArray[Number] = pixels.transpose(1, 0, 2)
    return turned


def _by_pillow(image: Image.Image, horizontal: Axis, vertical: Axis, spec: ImageSpec) -> Image.Image:
    target, resample = (spec.width, spec.height), PILLOW_FILTERS[spec.filter]
    if spec.fit == "pad":
        return _pad_and_resize(image, horizontal, vertical, spec)
    if spec.fit == "center-crop":
        return _resize_and_crop(image, horizontal, vertical, target, resample)
    return image.resize(target, resample)


def _resize_and_crop(
    image: Image.Image, horizontal: Axis, vertical: Axis, target: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Resize whole, then crop, as others do, bit for bit; of a long thin picture read the window alone.

    That is the same within one level on photos, a few on noise: Pillow keeps the window's corners in single precision.
    """
    width, height = round(horizontal.length / horizontal.scale), round(vertical.length / vertical.scale)
    if width * height > MAX_OVERSIZE * target[0] * target[1]:
        right, bottom = horizontal.start + horizontal.span, vertical.start + vertical.span
        box = (horizontal.start, vertical.start, min(right, image.width), min(bottom, image.height))
        return image.resize(target, resample, box=box)
    left, top = (width - target[0]) // 2, (height - target[1]) // 2
    return image.resize((width, height), resample).crop((left, top, left + target[0], top + target[1]))


def _pad_and_resize(image: Image.Image, horizontal: Axis, vertical: Axis, spec: ImageSpec) -> Image.Image:
    """Pillow's two passes over a padded canvas, of which only strips are ever in memory.

    Pillow resizes rows first and columns then, each row on its own, so strips change no bit of the result.
    Of very tall pictures the columns go first, because most of the canvas would be padding: one level off.
    """
    resample = PILLOW_FILTERS[spec.filter]
    if horizontal.canvas * image.height > MAX_CANVAS_PIXELS and vertical.canvas == image.height:
        image = image.resize((image.width, spec.height), resample)
        vertical = _padded(spec.height, spec.height, spec.height)
    narrowed = Image.new("RGB", (spec.width, vertical.canvas), spec.pad_color)
    rows = max(1, STRIP_PIXELS // horizontal.canvas)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip = Image.new("RGB", (horizontal.canvas, part.height), spec.pad_color)
        strip.paste(part, (horizontal.offset, 0))
        narrowed.paste(strip.resize((spec.width, part.height), resample), (0, vertical.offset + top))
    return narrowed.resize((spec.width, spec.height), resample)
