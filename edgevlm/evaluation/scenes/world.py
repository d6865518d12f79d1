"""What a scene holds, and where: two to six objects in one or two rows on a table, a shelf or a floor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgevlm.evaluation.scenes.dice import Dice
from edgevlm.evaluation.scenes.glyphs import GLYPH_HEIGHT, text_width

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, relative to the picture's side
Rgb = tuple[float, float, float]

SHAPES = ("ball", "cube", "cone", "cylinder", "star", "ring", "heart", "cross", "sign")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
SURFACES = ("table", "shelf", "floor")
WORDS = (
    *("BOX", "BUS", "CUP", "DOG", "HOT", "KEY", "MAP", "SUN", "TEA", "TOY", "WAY", "ZOO"),
    *("BOOK", "CAFE", "EXIT", "FISH", "GAME", "HOME", "MILK", "OPEN", "PARK", "SALT", "STOP", "TAXI"),
)

RGB: dict[str, Rgb] = {
    "red": (212, 36, 40),
    "green": (40, 156, 62),
    "blue": (36, 88, 208),
    "yellow": (246, 210, 36),
    "orange": (243, 126, 22),
    "purple": (134, 54, 178),
    "white": (242, 242, 240),
    "black": (36, 36, 40),
}
WALLS: tuple[Rgb, ...] = ((168, 178, 188), (190, 178, 160), (158, 176, 164), (182, 168, 178), (176, 176, 172))
GROUNDS: tuple[Rgb, ...] = (
    (150, 124, 100),
    (136, 140, 146),
    (128, 142, 130),
    (164, 146, 122),
    (132, 128, 150),
)

WIDTHS = {"small": (0.16, 0.185), "large": (0.265, 0.3)}  # largest small to smallest large: a factor of 1.4
SIGN_WIDTHS = (0.305, 0.335)
HEIGHT_OF_WIDTH = {"cone": 1.05, "cylinder": 1.05, "sign": 0.66}  # the rest are as high as wide
PRINTED_PART: dict[str, Box] = {  # where text goes, relative to the object's own box
    "sign": (0.055, 0.1, 0.945, 0.72),
    "cube": (0.06, 0.3, 0.74, 0.92),
    "ball": (0.14, 0.2, 0.86, 0.8),
    "cylinder": (0.1, 0.36, 0.9, 0.88),
}
SMALLEST_GLYPH_PIXEL = 0.0104  # cap height 7 · 0.0104 · 128 = 9.3 pixels, the least that stays legible
LARGEST_GLYPH_PIXEL = 0.0165

MARGIN, GAP = 0.02, 0.02  # free space at the frame, and between neighbours
SHELF_BOARDS = (0.47, 0.93)  # upper edge of each board
LONGEST_ROW = 3
COLUMNS = (0.18, 0.5, 0.82)


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One thing in the picture; no two in a scene share both color and shape."""

    shape: str
    color: str
    texture: str
    size: str  # of a sign always "large", and never asked about
    box: Box
    tint: Rgb  # the color as painted, jittered
    row: int = 0  # 0 is the upper or only row, or the back one
    text: str = ""

    @property
    def name(self) -> str:
        """Color and shape, which single this object out."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that is needed to draw a picture and to answer questions about it."""

    surface: str
    objects: tuple[SceneObject, ...]  # row by row, each from left to right
    num_rows: int
    wall: Rgb
    ground: Rgb
    horizon: float  # where the wall ends, relative to the picture's side
    light_side: float  # -1 from the left, 1 from the right
    light_warmth: float  # -1 cool, 1 warm
    brightness: float
    seed: int
    index: int


def make_scene(seed: int, index: int) -> Scene:
    """The scene number ``index`` of the endless series ``seed``."""
    dice = Dice(f"scene/{seed}/{index}")
    surface = dice.pick(SURFACES)
    row_lengths = _split_into_rows(dice, surface, 2 + dice.below(5))
    looks = iter(_distinct_looks(dice, sum(row_lengths)))
    rows = [[_furnish(dice, *next(looks), row) for _ in range(length)] for row, length in enumerate(row_lengths)]
    baselines = _baselines(dice, surface, row_lengths)
    placed: list[SceneObject] = []
    for row, baseline in zip(rows, baselines, strict=True):
        placed += _place(dice, surface, _fit(row), baseline)
    return Scene(
        surface=surface,
        objects=tuple(_print_texts(dice, placed)),
        num_rows=len(row_lengths),
        wall=_jittered(dice, dice.pick(WALLS), 10),
        ground=_jittered(dice, dice.pick(GROUNDS), 8),
        horizon=dice.between(0.2, 0.3) if len(row_lengths) == 2 else dice.between(0.28, 0.5),
        light_side=dice.between(-1, 1),
        light_warmth=dice.between(-1, 1),
        brightness=dice.between(0.86, 1.04),
        seed=seed,
        index=index,
    )


def text_box(item: SceneObject, text: str) -> Box | None:
    """Where ``text`` is printed on ``item``, relative to the picture; None if that is too small to read."""
    if item.shape not in PRINTED_PART:
        return None
    x0, y0, x1, y1 = item.box
    left, top, right, bottom = PRINTED_PART[item.shape]
    width, height = (right - left) * (x1 - x0), (bottom - top) * (y1 - y0)
    pixel = min(width / text_width(text), height / GLYPH_HEIGHT, LARGEST_GLYPH_PIXEL)
    if pixel < SMALLEST_GLYPH_PIXEL:
        return None
    center_x, center_y = x0 + (left + right) / 2 * (x1 - x0), y0 + (top + bottom) / 2 * (y1 - y0)
    half_width, half_height = pixel * text_width(text) / 2, pixel * GLYPH_HEIGHT / 2
    return center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height


def _split_into_rows(dice: Dice, surface: str, count: int) -> tuple[int, ...]:
    """How many objects stand in each row, at most three; a shelf has two rows, one of which may be empty."""
    fewest = 0 if surface == "shelf" else 1
    if surface != "shelf" and count <= LONGEST_ROW and dice.chance(0.5):
        return (count,)
    low, high = max(fewest, count - LONGEST_ROW), min(LONGEST_ROW, count - fewest)
    upper = low + dice.below(high - low + 1)
    return (upper, count - upper)


def _distinct_looks(dice: Dice, count: int) -> list[tuple[str, str]]:
    """``count`` different (shape, color) pairs; often one shape or color prevails, so that counts vary."""
    num_signs = min(count - 1, dice.weighted((0, 1, 2), (0.35, 0.5, 0.15)))
    main_shape = dice.pick(SHAPES[:-1]) if dice.chance(0.4) else None
    main_color = dice.pick(COLORS) if dice.chance(0.35) else None
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        shape = main_shape if main_shape and dice.chance(0.7) else dice.pick(SHAPES[:-1])
        if len(looks) < num_signs:
            shape = "sign"
        color = main_color if main_color and dice.chance(0.65) else dice.pick(COLORS)
        if (shape, color) not in looks:
            looks.append((shape, color))
    return dice.shuffled(looks)


def _furnish(dice: Dice, shape: str, color: str, row: int) -> SceneObject:
    """An object of that shape and color at the origin, its size and texture chosen."""
    size = "large" if shape == "sign" else dice.pick(SIZES)
    width = dice.between(*(SIGN_WIDTHS if shape == "sign" else WIDTHS[size]))
    texture = "plain" if shape == "sign" else dice.weighted(TEXTURES, (0.5, 0.25, 0.25))
    return SceneObject(
        shape=shape,
        color=color,
        texture=texture,
        size=size,
        box=_box_of_width(shape, width),
        tint=_jittered(dice, RGB[color], 9),
        row=row,
    )


def _box_of_width(shape: str, width: float) -> Box:
    return (0.0, 0.0, width, width * HEIGHT_OF_WIDTH.get(shape, 1.0))


def _fit(row: Sequence[SceneObject]) -> list[SceneObject]:
    """The row with large objects made small, from the left, until all stand side by side."""
    fitted = list(row)
    for position, item in enumerate(row):
        if sum(other.box[2] for other in fitted) + GAP * (len(fitted) - 1) <= 1 - 2 * MARGIN:
            break
        if item.shape != "sign" and item.size == "large":
            least, most = WIDTHS["small"]
            width = min(item.box[2] - WIDTHS["large"][0] + least, most)
            fitted[position] = replace(item, size="small", box=_box_of_width(item.shape, width))
    return fitted


def _baselines(dice: Dice, surface: str, row_lengths: Sequence[int]) -> tuple[float, ...]:
    """Where each row's objects touch what they stand on."""
    if surface == "shelf":
        return SHELF_BOARDS
    if len(row_lengths) == 1:
        return (dice.between(0.66, 0.9),)
    return dice.between(0.49, 0.51), dice.between(0.89, 0.93)


def _place(dice: Dice, surface: str, row: Sequence[SceneObject], baseline: float) -> list[SceneObject]:
    """The row's objects moved to free places, from left to right."""
    on_shelf = surface == "shelf"
    columns = sorted(dice.shuffled(COLUMNS)[: len(row)])
    wobble = 0.035 if on_shelf else 0.05 if len(row) == 3 else 0.1
    centers = sorted(column + dice.between(-wobble, wobble) for column in columns)
    widths = [item.box[2] for item in row]
    lefts = _spread([center - width / 2 for center, width in zip(centers, widths, strict=True)], widths)
    moved = []
    for item, left in zip(row, lefts, strict=True):
        _, _, width, height = item.box
        foot = baseline if on_shelf else baseline + dice.between(-0.015, 0.015)
        moved.append(replace(item, box=(left, foot - height, left + width, foot)))
    return moved


def _spread(lefts: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Left edges pushed apart until neighbours keep their gap and all keep the margin."""
    pushed = list(lefts)
    free_from = MARGIN
    for i, width in enumerate(widths):
        pushed[i] = max(pushed[i], free_from)
        free_from = pushed[i] + width + GAP
    free_to = 1 - MARGIN
    for i in reversed(range(len(widths))):
        pushed[i] = min(pushed[i], free_to - widths[i])
        free_to = pushed[i] - GAP
    return pushed


def _print_texts(dice: Dice, items: Sequence[SceneObject]) -> list[SceneObject]:
    """The objects with text on every sign and on some others, no text twice."""
    printed: list[SceneObject] = []
    for item in items:
        taken = [other.text for other in printed]
        is_sign = item.shape == "sign"
        if is_sign or (item.shape in PRINTED_PART and dice.chance(0.6)):
            text = _number(dice) if dice.chance(0.25 if is_sign else 0.65) else dice.pick(WORDS)
            if text_box(item, text) and text not in taken:
                item = replace(item, text=text, texture="plain")
            elif is_sign:
                item = replace(item, text=dice.pick([word for word in WORDS if word not in taken]))
        printed.append(item)
    return printed


def _number(dice: Dice) -> str:
    return str(dice.below(10) if dice.chance(0.4) else 10 + dice.below(90))


def _jittered(dice: Dice, rgb: Rgb, reach: float) -> Rgb:
    """A color nearby: brighter or darker by up to ``reach``, each channel moved by half of that."""
    shift = dice.between(-reach, reach)
    red, green, blue = (min(255.0, max(0.0, c + shift + dice.between(-reach, reach) / 2)) for c in rgb)
    return red, green, blue
