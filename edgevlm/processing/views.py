"""One picture to the views that its ImageSpec asks for: itself, its tiles, or crops of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from edgevlm.core.errors import InputError
from edgevlm.processing.fit import PILLOW_FILTERS, fit_image
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import normalized, pixel_values
from edgevlm.processing.picture import Grid
from edgevlm.processing.resample import Float
from edgevlm.processing.split import Crops, Idefics3Tiles, NanoVlmTiles

MAX_IDEFICS3_EDGE = 4096  # what its reference shrinks to, whatever its config says
Size = tuple[int, int]  # height, width


def picture_views(image: Image.Image, spec: ImageSpec) -> tuple[Float, Grid]:
    """The views [S, 3, height, width] of an RGB ``image``, and the grid of its tiles.

    Raises InputError for a picture that is too small or too thin to cut.
    """
    if isinstance(spec.split, Idefics3Tiles):
        return _idefics3(image, spec, spec.split)
    if isinstance(spec.split, NanoVlmTiles):
        return _nanovlm(image, spec, spec.split)
    if isinstance(spec.split, Crops):
        return _crops(image, spec, spec.split.per_side), (1, 1)
    return pixel_values(image, spec), (1, 1)


def grid_of(size: Size, spec: ImageSpec) -> Grid:
    """The rows and columns of tiles that a picture of ``size`` gets."""
    tile, split = (spec.height, spec.width), spec.split
    if isinstance(split, Idefics3Tiles) and split.enabled:
        return _grid(idefics3_sizes(size, tile, split.longest_edge)[1], tile)
    if isinstance(split, NanoVlmTiles) and split.enabled:
        return _grid(nanovlm_size(size, tile, split), tile)
    return (1, 1)


def idefics3_sizes(size: Size, tile: Size, longest_edge: int) -> tuple[Size, Size]:
    """What a picture of ``size`` is resized to first, and then to be cut: the second is a multiple of ``tile``.

    The formulas of transformers, whose roundings decide how many tiles there are.
    """
    first = _scaled(size, longest_edge, even=True)
    first = _scaled(first, MAX_IDEFICS3_EDGE, even=False) if max(first) > MAX_IDEFICS3_EDGE else first
    (height, width), ratio = first, first[1] / first[0]
    if width >= height:
        width = _up(width, tile[1])
        return first, (_up(max(1, int(width / ratio)), tile[0]), width)
    height = _up(height, tile[0])
    return first, (height, _up(max(1, int(height * ratio)), tile[1]))


def nanovlm_size(size: Size, tile: Size, split: NanoVlmTiles) -> Size:
    """What a picture of ``size`` is resized to, a multiple of ``tile``.

    In floating point as its reference does it, where a few pictures of round proportions get a row more than
    whole numbers would give them.
    """
    height, width = size
    if width >= height:
        long = _nanovlm_edge(width, tile[1], split)
        return min(_up(height * (long / width), tile[0]), long), long
    long = _nanovlm_edge(height, tile[0], split)
    return long, min(_up(width * (long / height), tile[1]), long)


def _nanovlm_edge(edge: int, tile: int, split: NanoVlmTiles) -> int:
    return split.longest_edge if split.enlarge else min(split.longest_edge, _up(edge, tile))


def _scaled(size: Size, longest_edge: int, *, even: bool) -> Size:
    """The longest edge as ``longest_edge``, the other one cut to a whole number (up to an ``even`` one)."""
    height, width = size
    ratio = width / height
    if width >= height:
        return _cut(longest_edge / ratio, even), longest_edge
    return longest_edge, _cut(longest_edge * ratio, even)


def _cut(length: float, even: bool) -> int:
    whole = int(length)
    return max(1, whole + whole % 2 if even else whole)


def _up(length: float, step: int) -> int:
    return math.ceil(length / step) * step


def _idefics3(image: Image.Image, spec: ImageSpec, split: Idefics3Tiles) -> tuple[Float, Grid]:
    tile = (spec.height, spec.width)
    first, second = idefics3_sizes((image.height, image.width), tile, split.longest_edge)
    resized = _resized(image, first, spec)
    if split.enabled:
        resized = _resized(resized, second, spec)
    whole = _resized(resized, tile, spec)
    tiles = [*_tiles(resized, tile)] if split.enabled and second != tile else []
    return _stacked([*tiles, whole], spec), _grid(second, tile) if tiles else (1, 1)


def _nanovlm(image: Image.Image, spec: ImageSpec, split: NanoVlmTiles) -> tuple[Float, Grid]:
    tile = (spec.height, spec.width)
    size = nanovlm_size((image.height, image.width), tile, split) if split.enabled else tile
    resized = _resized(image, size, spec)
    if size == tile:
        return _stacked([resized], spec), (1, 1)
    smooth = replace(spec, filter="bilinear", rounding="float", split=None)
    whole = normalized(fit_image(resized, smooth), spec)
    return np.concatenate([whole, _stacked([*_tiles(resized, tile)], spec)]), _grid(size, tile)


def _crops(image: Image.Image, spec: ImageSpec, per_side: int) -> Float:
    width, height = image.width // per_side, image.height // per_side
    if not width or not height:
        raise InputError(
            f"a picture of {image.width} x {image.height} pixels cannot be cut into {per_side} x {per_side}; "
            f"give a larger one"
        )
    one, places = replace(spec, split=None), range(per_side)
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in places for x in places]
    return np.concatenate([pixel_values(part, one) for part in [*map(image.crop, boxes), image]])


def _resized(image: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    return image.resize((size[1], size[0]), PILLOW_FILTERS[spec.filter])


def _tiles(image: Image.Image, tile: Size) -> Iterator[Image.Image]:
    """Row by row."""
    for top in range(0, image.height, tile[0]):
        for left in range(0, image.width, tile[1]):
            yield image.crop((left, top, left + tile[1], top + tile[0]))


def _grid(size: Size, tile: Size) -> Grid:
    return size[0] // tile[0], size[1] // tile[1]


def _stacked(views: list[Image.Image], spec: ImageSpec) -> Float:
    return np.concatenate([normalized(np.asarray(view, dtype=np.float32), spec) for view in views])
