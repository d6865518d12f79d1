"""Pictures from files, bytes, Pillow or NumPy to ``pixel_values``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgevlm.core.errors import ConfigError, DoesNotFitError, InputError
from edgevlm.processing.color import Color, to_rgb
from edgevlm.processing.fit import fit_image
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.resample import Float

ImageSource: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]

# What cameras, browsers and screenshots write, and whose decoders are fuzzed in the open.  Left out:
# EPS (runs Ghostscript), WMF (asks the operating system to draw), TGA (no signature: any file may pass for
# one), PSD, ICO and ICNS (containers of other formats), FITS, HDF5, GRIB, BUFR and MPEG (stubs without a
# decoder), textures and the scanner formats of other decades (BLP, DDS, FTEX, FLI, PCD, SGI, SUN, XPM, …).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")

WHITE: Color = (255, 255, 255)

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """The largest picture that is decoded; checked against the header, before any pixel is."""

    max_bytes: int = 256 * 2**20  # of the file
    max_pixels: int = 128_000_000  # a 108-megapixel phone passes; 384 MB as RGB
    max_side: int = 32_768  # pixels

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_pixels, self.max_side) < 1:
            raise ConfigError(f"image limits must be 1 or more; found {self}")


def load_image(source: ImageSource, limits: ImageLimits | None = None, *, background: Color = WHITE) -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, first frame of several, alpha over ``background``.

    ``source`` is a path, the bytes of a file, a Pillow picture, or uint8 levels [H, W, 3] (RGB), [H, W, 4]
    (RGBA) or [H, W] (grey).  Sixteen-bit grey is scaled to 8 bits, CMYK and palettes are converted, colour profiles are
    ignored.  Raises InputError for what is missing, too large, damaged or no picture, DoesNotFitError when
    memory is short.
    """
    limits = limits or ImageLimits()
    if isinstance(source, np.ndarray):
        return _from_array(source, limits, background)
    if isinstance(source, Image.Image):
        return _decode(source, "the picture", limits, background)
    name, data = _read(source, limits)
    with _pillow_errors(name, limits), Image.open(BytesIO(data), formats=_formats()) as opened:
        return _decode(opened, name, limits, background)


def pixel_values(image: Image.Image, spec: ImageSpec) -> Float:
    """``image``, an RGB picture from ``load_image``, as float32 [1, 3, height, width], the way ``spec`` says.

    ``split`` is not looked at.  Raises InputError when ``image`` is not RGB or too long and thin to pad.
    """
    if image.mode != "RGB":
        raise InputError(f"expected an RGB picture, found mode {image.mode}; load_image converts it")
    return normalized(fit_image(image, spec), spec)


def normalized(levels: Float, spec: ImageSpec) -> Float:
    """``levels`` [height, width, 3] from 0 to 255 as [1, 3, height, width], the way ``spec`` says."""
    mean, std = np.asarray(spec.mean, dtype=np.float32), np.asarray(spec.std, dtype=np.float32)
    values = (levels * np.float32(1 / 255) - mean) / std
    if spec.channel_order == "bgr":
        values = values[..., ::-1]
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None], dtype=np.float32)


def _decode(image: Image.Image, name: str, limits: ImageLimits, background: Color) -> Image.Image:
    _check_size(name, *image.size, limits)
    with _pillow_errors(name, limits):
        image.load()
        _check_size(name, *image.size, limits)
        return _upright(image, to_rgb(image, background))


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb`` turned as the EXIF data of ``image`` says; damaged EXIF says nothing, as in browsers."""
    orientation = 1
    with suppress(Exception):
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    turn = UPRIGHT.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _from_array(levels: NDArray[np.uint8], limits: ImageLimits, background: Color) -> Image.Image:
    is_picture = levels.ndim == 2 or (levels.ndim == 3 and levels.shape[2] in (3, 4))
    if levels.dtype != np.uint8 or not is_picture or levels.size == 0:
        raise InputError(
            f"a picture in an array is uint8 [H, W, 3], [H, W, 4] or [H, W]; found {levels.dtype} {list(levels.shape)}"
        )
    _check_size("the array", levels.shape[1], levels.shape[0], limits)
    return to_rgb(Image.fromarray(np.ascontiguousarray(levels)), background)


def _read(source: str | Path | bytes, limits: ImageLimits) -> tuple[str, bytes]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "the picture", bytes(source)
        _check_bytes(name, len(data), limits)
    elif isinstance(source, (str, Path)):
        name, data = str(source), _read_file(Path(source), limits)
    else:
        raise InputError(f"a picture is a path, bytes, a Pillow image or an array; found {type(source).__name__}")
    if not data:
        raise InputError(f"{name}: empty, 0 bytes; expected a picture")
    return name, data


def _read_file(path: Path, limits: ImageLimits) -> bytes:
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder; give one picture")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file; give a picture")
        _check_bytes(str(path), path.stat().st_size, limits)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the path of a picture on this machine") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _check_bytes(name: str, num_bytes: int, limits: ImageLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise InputError(f"{name}: {num_bytes:,} bytes, allowed are {limits.max_bytes:,}; save it smaller first")


def _check_size(name: str, width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name}: {width} x {height} pixels, which is no picture")
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise InputError(
            f"{name}: {width:,} x {height:,} pixels, allowed are {limits.max_pixels:,} in all and "
            f"{limits.max_side:,} a side; make it smaller first"
        )


def _formats() -> list[str]:
    """The allowed formats that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _pillow_errors(name: str, limits: ImageLimits) -> Iterator[None]:
    """Pillow's many exceptions as one line about ``name``; our own limits make its warnings needless."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(name) else f"{name}: {message}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a picture that can be read; expected {', '.join(_formats())}") from error
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        num_pixels = f"{int(found.group()):,}" if found else "too many"
        raise InputError(
            f"{name}: {num_pixels} pixels, allowed are {limits.max_pixels:,}; make it smaller first"
        ) from error
    except MemoryError as error:
        raise DoesNotFitError(f"{name}: not enough memory to decode it; make it smaller first") from error
    except Exception as error:
        raise InputError(f"{name}: damaged or cut off ({_one_line(error)}); copy or save it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
