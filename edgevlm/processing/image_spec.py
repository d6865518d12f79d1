"""How one model wants its pictures: the data that ``pixel_values`` executes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from edgevlm.core.errors import ConfigError
from edgevlm.processing.split import Crops, Idefics3Tiles, NanoVlmTiles, Split, most_tiles

Fit = Literal["pad", "center-crop", "stretch"]
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Rounding = Literal["uint8", "float"]
ChannelOrder = Literal["rgb", "bgr"]

MAX_SIDE = 16_384
MAX_TILES_PER_SIDE = 16
POINT_FILTERS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Everything between a decoded picture and ``pixel_values`` ``[S, 3, height, width]``, S = 1 without ``split``.

    ``fit``: ``pad`` adds ``pad_color`` around the picture until it has the target's proportions, then
    resizes (of an odd gap the smaller half is at the top or left); ``center-crop`` resizes until the picture
    covers the target and keeps the middle; ``stretch`` gives up the proportions.

    ``filter`` with ``antialias`` means Pillow's kernels, widened when shrinking (bicubic: a = -0.5).
    Without, it means point sampling as ``torch.nn.functional.interpolate`` does it with
    ``align_corners=False``, for nearest, bilinear and bicubic only (bicubic: a = -0.75; nearest: the source
    pixel at ``floor(i * scale)``).

    ``rounding``: ``uint8`` rounds to whole levels after the resize, as Pillow does; ``float`` keeps
    fractions, and the overshoot of bicubic and lanczos beyond 0 and 255 with them.

    ``mean`` and ``std`` belong to pixels in [0, 1].  They and ``pad_color`` are written in the order R, G, B
    whatever ``channel_order`` says, which only arranges the result.

    ``split`` cuts the picture into views of ``height`` x ``width``.  Tiles are stretched, with Pillow's kernels.
    """

    height: int
    width: int
    fit: Fit
    filter: Filter = "bicubic"
    antialias: bool = True
    rounding: Rounding = "uint8"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pad_color: tuple[int, int, int] = (0, 0, 0)
    channel_order: ChannelOrder = "rgb"
    split: Split | None = None

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            _check(_is_int(value) and 1 <= value <= MAX_SIDE, name, f"1 to {MAX_SIDE} pixels", value)
        for name, kind in (
            ("fit", Fit),
            ("filter", Filter),
            ("rounding", Rounding),
            ("channel_order", ChannelOrder),
        ):
            choices = get_args(kind)
            _check(getattr(self, name) in choices, name, f"one of {', '.join(choices)}", getattr(self, name))
        _check(isinstance(self.antialias, bool), "antialias", "true or false", self.antialias)
        _check(
            self.antialias or self.filter in POINT_FILTERS,
            "filter",
            f"one of {', '.join(POINT_FILTERS)} where antialias is false",
            self.filter,
        )
        _check(_is_triple(self.mean) and all(map(_is_finite, self.mean)), "mean", "three numbers", self.mean)
        _check(
            _is_triple(self.std) and all(_is_finite(value) and value > 0 for value in self.std),
            "std",
            "three numbers above 0",
            self.std,
        )
        _check(
            _is_triple(self.pad_color) and all(_is_int(value) and 0 <= value <= 255 for value in self.pad_color),
            "pad_color",
            "three whole numbers from 0 to 255",
            self.pad_color,
        )
        self._check_split()

    def _check_split(self) -> None:
        split, side = self.split, f"{self.height} x {self.width}"
        _check(split is None or isinstance(split, (Idefics3Tiles, NanoVlmTiles, Crops)), "split", "a Split", split)
        if isinstance(split, (Idefics3Tiles, NanoVlmTiles)):
            _check(self.fit == "stretch", "fit", "stretch where split makes tiles", self.fit)
            _check(self.antialias, "antialias", "true where split makes tiles", self.antialias)
            _check(self.rounding == "uint8", "rounding", "uint8 where split makes tiles", self.rounding)
            edge = split.longest_edge
            whole = edge % self.height == 0 and edge % self.width == 0
            _check(whole and edge % 2 == 0, "split longest_edge", f"even, and a multiple of the tile's {side}", edge)
            few = max(most_tiles(split, (self.height, self.width))) <= MAX_TILES_PER_SIDE
            _check(few, "split longest_edge", f"at most {MAX_TILES_PER_SIDE} times the tile's {side}", edge)


def _check(holds: bool, name: str, wanted: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"image {name} must be {wanted}; found {found!r}")


def _is_triple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
