"""The shapes, and the patterns on them, as functions of where a pixel lies.

A shape is asked with ``u`` [1, w], running right, and ``v`` [h, 1], running down, both from 0 to 1 over the
object's box.  It answers with where the object is and how bright it is there, 1 being its own color.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.floating[Any]]  # always float32, which NumPy's stubs lose where a Python float joins in
Mask = NDArray[np.bool_]
Body = tuple[Mask, Pixels]

STRIPE_PERIOD, DOT_PERIOD = 0.056, 0.062  # relative to the picture's side
STAR_TIPS = ((0.0, 1.0), (0.9511, 0.309), (-0.9511, 0.309), (0.5878, -0.809), (-0.5878, -0.809))
SIGN_PLATE_END = 0.82  # the legs are below


def _ball(u: Pixels, v: Pixels) -> Body:
    x, y = 2 * u - 1, 2 * v - 1
    glare = (x + 0.3) ** 2 + (y + 0.4) ** 2
    return x * x + y * y <= 1, 1.28 - 0.26 * glare


def _cube(u: Pixels, v: Pixels) -> Body:
    front, slant = 0.8, 0.2
    is_front = (u <= front) & (v >= slant)
    is_top = (v < slant) & (u >= slant - v) & (u <= 1 - v)
    is_side = (u > front) & (v >= 1 - u) & (v <= 1 + front - u)
    shade = np.where(is_top, np.float32(1.3), np.where(is_side, np.float32(0.66), np.float32(1)))
    return is_front | is_top | is_side, shade


def _cone(u: Pixels, v: Pixels) -> Body:
    x, base = 2 * u - 1, 0.88
    is_slope = (v <= base) & (np.abs(x) <= v / base)
    is_foot = (v > base) & (x * x + ((v - base) / (1 - base)) ** 2 <= 1)
    across = x / np.maximum(v / base, 0.05)
    shade = 1.2 - 0.24 * (across + 0.35) ** 2
    return is_slope | is_foot, np.maximum(shade, 0.6)


def _cylinder(u: Pixels, v: Pixels) -> Body:
    x, bend = (2 * u - 1) / 0.88, 0.13
    is_lid = x * x + ((v - bend) / bend) ** 2 <= 1
    is_foot = x * x + ((v - 1 + bend) / bend) ** 2 <= 1
    is_wall = (np.abs(x) <= 1) & (v >= bend) & (v <= 1 - bend)
    shade = 1.12 - 0.24 * (x + 0.3) ** 2
    return is_lid | is_foot | is_wall, np.where(is_lid, np.float32(1.32), shade)


def _star(u: Pixels, v: Pixels) -> Body:
    x, y = (2 * u - 1) * 0.9511, 1 - v * 1.809
    mask = np.zeros((v.shape[0], u.shape[1]), bool)
    for tip_x, tip_y in STAR_TIPS:  # each tip and the center span a kite
        along, aside = tip_x * x + tip_y * y, np.abs(tip_y * x - tip_x * y)
        mask |= (aside <= (1 - along) * 0.47) & (aside <= along * 0.7266)
    return mask, _bevel(u, v)


def _ring(u: Pixels, v: Pixels) -> Body:
    x, y = 2 * u - 1, 2 * v - 1
    radius = np.sqrt(x * x + y * y)
    shade = 1.2 - 1.2 * np.abs(radius - 0.73) - 0.12 * y
    return (radius <= 1) & (radius >= 0.5), shade


def _heart(u: Pixels, v: Pixels) -> Body:
    x, y = (2 * u - 1) * 1.14, 1.24 - v * 2.24
    swell = x * x + y * y - 1
    return swell * swell * swell - x * x * y * y * y <= 0, _bevel(u, v)


def _cross(u: Pixels, v: Pixels) -> Body:
    x, y = np.abs(2 * u - 1), np.abs(2 * v - 1)
    return (x <= 0.36) | (y <= 0.36), _bevel(u, v)


def _sign(u: Pixels, v: Pixels) -> Body:
    is_leg = (v > SIGN_PLATE_END) & (np.abs(np.abs(2 * u - 1) - 0.6) < 0.06)
    return is_leg | (v <= SIGN_PLATE_END), 1.06 - 0.1 * v + 0 * u


def _bevel(u: Pixels, v: Pixels) -> Pixels:
    return 1.16 - 0.16 * u - 0.16 * v


def _stripes(shape: tuple[int, ...], side: int) -> Mask:
    x, y = np.arange(shape[1])[None, :], np.arange(shape[0])[:, None]
    period = STRIPE_PERIOD * side
    stripes: Mask = (x + y) * np.float32(0.7) % period < 0.42 * period
    return stripes


def _dots(shape: tuple[int, ...], side: int) -> Mask:
    period = DOT_PERIOD * side
    y = np.arange(shape[0])[:, None] / period
    x = np.arange(shape[1])[None, :] / period + (np.floor(y) % 2) / 2
    dots: Mask = (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.1
    return dots


BODIES: dict[str, Callable[[Pixels, Pixels], Body]] = {
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "cylinder": _cylinder,
    "star": _star,
    "ring": _ring,
    "heart": _heart,
    "cross": _cross,
    "sign": _sign,
}
PATTERNS: dict[str, Callable[[tuple[int, ...], int], Mask]] = {"striped": _stripes, "dotted": _dots}
