"""Separable resampling in NumPy: Pillow's kernels before rounding, and torch's point sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevlm.processing.image_spec import Filter

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 32  # target rows per matrix product: they share most of their source rows
FEW_TAPS = 4  # so few are added up faster than multiplied as a matrix


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One side of a resize: ``size`` target pixels read the window ``start`` to ``start + span`` of a canvas.

    The canvas is ``canvas`` pixels long; the picture, ``length`` pixels long, lies on it at ``offset``.
    """

    length: int
    canvas: int
    offset: int
    start: float
    span: float
    size: int

    @property
    def scale(self) -> float:
        """Source pixels per target pixel."""
        return self.span / self.size


@dataclass(frozen=True)
class Taps:
    """Which source pixels make a target pixel: ``indices`` and ``weights``, both [size, taps]."""

    indices: Ints
    weights: Double


def picture_taps(axis: Axis, filter: Filter, antialias: bool) -> Taps:
    """Taps in the picture's coordinates; canvas around it weighs nothing, so rows may sum to less than 1."""
    taps = _kernel_taps(axis, filter) if antialias and filter != "nearest" else _point_taps(axis, filter, antialias)
    indices = taps.indices - axis.offset
    inside = (indices >= 0) & (indices < axis.length)
    return Taps(np.clip(indices, 0, axis.length - 1), np.where(inside, taps.weights, 0.0))


def apply_taps(taps: Taps, values: NDArray[np.generic], background: Float) -> Float:
    """``values`` [length, M, 3] less ``background``, resampled along the first axis to [size, M, 3]."""
    if taps.indices.shape[1] <= FEW_TAPS:
        return _gather(taps, values, background)
    result = np.empty((len(taps.indices), *values.shape[1:]), dtype=np.float32)
    for first in range(0, len(result), BLOCK):
        rows, weights = taps.indices[first : first + BLOCK], taps.weights[first : first + BLOCK]
        low, high = int(rows.min()), int(rows.max()) + 1
        matrix = np.zeros((len(rows), high - low), dtype=np.float64)
        np.add.at(matrix, (np.arange(len(rows))[:, None], rows - low), weights)
        source = values[low:high].astype(np.float32) - background
        result[first : first + BLOCK] = np.tensordot(matrix.astype(np.float32), source, axes=1)
    return result


def _gather(taps: Taps, values: NDArray[np.generic], background: Float) -> Float:
    result = np.zeros((len(taps.indices), *values.shape[1:]), dtype=np.float32)
    for rows, weights in zip(taps.indices.T, taps.weights.T.astype(np.float32), strict=True):
        result += (values[rows].astype(np.float32) - background) * weights[:, None, None]
    return result


def _kernel_taps(axis: Axis, filter: Filter) -> Taps:
    """Pillow's rule: a kernel widened by the scale when shrinking, cut at the edges and normalised."""
    kernel, support = KERNELS[filter]
    stretch = max(axis.scale, 1.0)
    reach = support * stretch
    centers = axis.start + (np.arange(axis.size) + 0.5) * axis.scale
    first = np.maximum(np.trunc(centers - reach + 0.5).astype(np.int64), 0)
    last = np.minimum(np.trunc(centers + reach + 0.5).astype(np.int64), axis.canvas)
    indices = first[:, None] + np.arange(int((last - first).max()))
    weights = kernel((indices - centers[:, None] + 0.5) / stretch)
    weights = np.where(indices < last[:, None], weights, 0.0)
    return Taps(indices, weights / weights.sum(axis=1, keepdims=True))


def _point_taps(axis: Axis, filter: Filter, antialias: bool) -> Taps:
    """torch's rule: one, two or four neighbours, the edge pixel repeated beyond the edge."""
    if filter == "nearest":
        nearest = _under_the_centre(axis) if antialias else _under_the_corner(axis)
        return Taps(np.clip(nearest, 0, axis.canvas - 1)[:, None], np.ones((axis.size, 1)))
    centers = axis.start + (np.arange(axis.size) + 0.5) * axis.scale - 0.5
    first = np.floor(centers).astype(np.int64)
    neighbours = np.arange(2) if filter == "bilinear" else np.arange(-1, 3)
    indices = first[:, None] + neighbours
    distances = indices - centers[:, None]
    weights = _triangle(distances) if filter == "bilinear" else _cubic(distances, -0.75)
    return Taps(np.clip(indices, 0, axis.canvas - 1), weights)


def _under_the_centre(axis: Axis) -> Ints:
    """Pillow's nearest: it walks by adding, and ties fall as the sums round."""
    steps = np.full(axis.size, axis.scale)
    steps[0] = axis.start + axis.scale * 0.5
    positions: Double = np.cumsum(steps)
    return positions.astype(np.int64)


def _under_the_corner(axis: Axis) -> Ints:
    """torch's nearest: it multiplies in single precision, and ties fall as the products round."""
    steps: Float = np.arange(axis.size, dtype=np.float32) * np.float32(axis.scale)
    positions: Float = np.floor(axis.start + steps)
    return positions.astype(np.int64)


def _box(x: Double) -> Double:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _triangle(x: Double) -> Double:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _hamming(x: Double) -> Double:
    return np.where(np.abs(x) < 1.0, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0.0)


def _cubic(x: Double, a: float = -0.5) -> Double:
    """Keys 1981, the cubic convolution kernel with slope ``a`` at 1."""
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: Double) -> Double:
    return np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3.0), 0.0)


KERNELS: dict[Filter, tuple[Callable[[Double], Double], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_triangle, 1.0),
    "hamming": (_hamming, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
