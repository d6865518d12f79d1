"""Scenes as pixels, in NumPy alone: implicit shapes at twice the size, halved at the end."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import ConfigError
from edgevlm.evaluation.scenes.bodies import BODIES, PATTERNS, SIGN_PLATE_END, Mask, Pixels
from edgevlm.evaluation.scenes.glyphs import bitmap
from edgevlm.evaluation.scenes.world import SHELF_BOARDS, Box, Rgb, Scene, SceneObject, text_box

SMALLEST_PICTURE = 16
SUPERSAMPLE = 2
OUTLINE_DARKNESS = 0.5
TABLE_FRONT, TABLE_SLANT = 0.955, 0.06
DARK_ACCENTS = ("yellow", "orange", "white")  # the rest carry light stripes and dots


def render(scene: Scene, size: int = 128) -> NDArray[np.uint8]:
    """The scene as RGB, [size, size, 3]; text is legible from 128 pixels on."""
    if size < SMALLEST_PICTURE:
        raise ConfigError(f"a scene is drawn at {SMALLEST_PICTURE} pixels or more, got {size}")
    side = size * SUPERSAMPLE
    canvas = np.empty((side, side, 3), np.float32)
    PAINT_SURFACE[scene.surface](canvas, scene)
    for item in scene.objects:
        _paint_shadow(canvas, item, scene.light_side)
    for item in scene.objects:
        _paint_object(canvas, item, scene.light_side)
    halved = canvas[0::2] + canvas[1::2]
    halved = halved[:, 0::2] + halved[:, 1::2]
    halved *= _light(scene, size)
    picture: NDArray[np.uint8] = np.minimum(halved, 255).astype(np.uint8)
    return picture


def _light(scene: Scene, size: int) -> Pixels:
    """What every channel is multiplied by: light from one side, its tint, and the mean over 2x2."""
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    across = 1 + 0.1 * scene.light_side * ramp
    down = 1 - 0.07 * ramp
    field = down[:, None] * across[None, :] * (scene.brightness / SUPERSAMPLE**2)
    warmth = np.float32(0.035 * scene.light_warmth)
    lit: Pixels = field[..., None] * np.array([1 + warmth, 1, 1 - warmth], np.float32)
    return lit


# Surfaces


def _paint_table(canvas: Pixels, scene: Scene) -> None:
    side = len(canvas)
    _fill(canvas, 0, 1, scene.wall)
    back, front = round(scene.horizon * side), round(TABLE_FRONT * side)
    rows = np.arange(back, front, dtype=np.float32)[:, None]
    columns = np.arange(side, dtype=np.float32)[None, :]
    inset = (front - rows) * TABLE_SLANT
    top = (columns >= inset) & (columns <= side - inset)
    canvas[back:front][top] = scene.ground
    inset_at_back = TABLE_SLANT * (TABLE_FRONT - scene.horizon)
    _fill(canvas, scene.horizon - 0.006, scene.horizon, _scaled(scene.ground, 0.8), inset_at_back)
    _fill(canvas, TABLE_FRONT, 1, _scaled(scene.ground, 0.68))


def _paint_shelf(canvas: Pixels, scene: Scene) -> None:
    _fill(canvas, 0, 1, scene.wall)
    _fill(canvas, 0, 0.03, _scaled(scene.ground, 0.8))
    for board in SHELF_BOARDS:
        _fill(canvas, board - 0.012, board + 0.012, scene.ground)
        _fill(canvas, board + 0.012, board + 0.038, _scaled(scene.ground, 0.72))
        _fill(canvas, board + 0.038, board + 0.062, _scaled(scene.wall, 0.84))


def _paint_floor(canvas: Pixels, scene: Scene) -> None:
    side = len(canvas)
    _fill(canvas, 0, 1, scene.wall)
    _fill(canvas, scene.horizon - 0.035, scene.horizon, _scaled(scene.wall, 1.18))
    back = round(scene.horizon * side)
    depth = 1 / (np.arange(back, side, dtype=np.float32) / side - (scene.horizon - 0.35))[:, None]
    across = (np.arange(side, dtype=np.float32)[None, :] / side - 0.5) * depth
    tile = (np.floor(across * 3) + np.floor(depth * 3.4)) % 2
    canvas[back:] = (1 - 0.1 * tile)[..., None] * np.array(scene.ground, np.float32)


PAINT_SURFACE: dict[str, Callable[[Pixels, Scene], None]] = {
    "table": _paint_table,
    "shelf": _paint_shelf,
    "floor": _paint_floor,
}


def _fill(canvas: Pixels, top: float, bottom: float, rgb: Rgb, inset: float = 0.0) -> None:
    side = len(canvas)
    left = round(inset * side)
    canvas[round(top * side) : round(bottom * side), left : side - left] = rgb


# Objects


def _paint_shadow(canvas: Pixels, item: SceneObject, light_side: float) -> None:
    """A soft ellipse under the object, away from the light."""
    x0, _, x1, foot = item.box
    width = x1 - x0
    shift = -0.12 * width * light_side
    center = (x0 + x1) / 2 + shift
    reach, depth = 0.58 * width, max(0.028, 0.12 * width)
    tile, u, v = _tile(canvas, (center - reach, foot - depth, center + reach, foot + depth))
    fade = np.maximum(0, 1 - (2 * u - 1) ** 2 - (2 * v - 1) ** 2)
    tile *= (1 - 0.55 * fade)[..., None]


def _paint_object(canvas: Pixels, item: SceneObject, light_side: float) -> None:
    tile, u, v = _tile(canvas, item.box)
    mask, shade = BODIES[item.shape](u, v)
    shade = shade * (1 + 0.12 * light_side * (2 * u - 1))
    color = np.array(item.tint, np.float32)
    paint = color * shade[..., None] + 70 * np.maximum(0, shade - 1)[..., None]
    if item.texture != "plain":
        accented = PATTERNS[item.texture](tile.shape, len(canvas))
        paint[accented] = _accent(item) * shade[accented][:, None]
    if item.shape == "sign":
        paint[(v > SIGN_PLATE_END)[:, 0]] = (70, 64, 60)
    edge = mask & ~_eroded(mask, max(1, round(len(canvas) * 0.006)))
    paint[edge] *= OUTLINE_DARKNESS
    np.copyto(tile, paint, where=mask[..., None])
    if item.text:
        _paint_text(canvas, item)


def _paint_text(canvas: Pixels, item: SceneObject) -> None:
    box = text_box(item, item.text)
    assert box is not None, "the layout prints only what fits"
    glyphs = bitmap(item.text)
    tile, u, v = _tile(canvas, _snapped(box, glyphs.shape, len(canvas)))
    rows = (v[:, 0] * glyphs.shape[0]).astype(int)
    columns = (u[0] * glyphs.shape[1]).astype(int)
    red, green, blue = item.tint
    is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 135
    tile[glyphs[rows[:, None], columns]] = (22, 22, 26) if is_light else (250, 250, 248)


def _snapped(box: Box, glyph_pixels: tuple[int, ...], side: int) -> Box:
    """The box shrunk around its center until glyph pixels are whole pixels, unless that takes too much."""
    x0, y0, x1, y1 = box
    pixel = math.floor((y1 - y0) * side / glyph_pixels[0])
    if pixel < 3:
        return box
    height, width = (pixel * count / side for count in glyph_pixels)
    left, top = round((x0 + x1 - width) / 2 * side) / side, round((y0 + y1 - height) / 2 * side) / side
    return left, top, left + width, top + height


def _accent(item: SceneObject) -> Pixels:
    """The second tone of a striped or dotted object."""
    color = np.array(item.tint, np.float32)
    accent: Pixels = color * 0.6 if item.color in DARK_ACCENTS else color + (255 - color) * 0.62
    return accent


def _tile(canvas: Pixels, box: Box) -> tuple[Pixels, Pixels, Pixels]:
    """The canvas inside ``box``, with u [1, w] and v [h, 1] running over it from 0 to 1."""
    side = len(canvas)
    x0, y0, x1, y1 = (round(edge * side) for edge in box)
    u = ((np.arange(x0, x1, dtype=np.float32) + 0.5 - x0) / (x1 - x0))[None, :]
    v = ((np.arange(y0, y1, dtype=np.float32) + 0.5 - y0) / (y1 - y0))[:, None]
    left, top = max(0, -x0), max(0, -y0)
    tile = canvas[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
    return tile, u[:, left : left + tile.shape[1]], v[top : top + tile.shape[0]]


def _eroded(mask: Mask, width: int) -> Mask:
    """The mask without its outermost ``width`` pixels."""
    padded = np.pad(mask, width)
    inner = padded[: -2 * width, width:-width] & padded[2 * width :, width:-width]
    inner &= padded[width:-width, : -2 * width] & padded[width:-width, 2 * width :]
    return inner


def _scaled(rgb: Rgb, factor: float) -> Rgb:
    return rgb[0] * factor, rgb[1] * factor, rgb[2] * factor
