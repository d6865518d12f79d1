"""Generated scenes: what stands where, and how it is drawn."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from edgevlm.core.errors import ConfigError
from edgevlm.evaluation.scenes import (
    COLORS,
    GENERATOR_VERSION,
    SHAPES,
    SURFACES,
    TEXTURES,
    Scene,
    make_scene,
    render,
)
from edgevlm.evaluation.scenes.dice import Dice
from edgevlm.evaluation.scenes.draw import PAINT_SURFACE
from edgevlm.evaluation.scenes.glyphs import bitmap, text_width
from edgevlm.evaluation.scenes.world import GAP, WIDTHS, text_box

PIXELS = "6fd5b10dc0748ee8459cad2d1da8294cd93607b51f9314290c3e178f6b969f7a"  # of twelve scenes, version 1


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed=7, index=index) for index in range(500)]


def _pixel_hash() -> str:
    pictures = [render(make_scene(seed=1, index=index)) for index in range(12)]
    return hashlib.sha256(np.stack(pictures).tobytes()).hexdigest()


def test_pixels_stay_those_of_the_generator_version() -> None:
    assert (GENERATOR_VERSION, _pixel_hash()) == (1, PIXELS)


def test_another_process_draws_the_same_bytes() -> None:
    program = (
        "import hashlib; from edgevlm.evaluation.scenes import make_scene, render; "
        "print(hashlib.sha256(render(make_scene(3, 5)).tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(render(make_scene(3, 5)).tobytes()).hexdigest()


@pytest.mark.parametrize("size", [16, 99, 128, 512])
def test_a_picture_is_square_rgb_of_any_size(size: int) -> None:
    picture = render(make_scene(seed=1, index=0), size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8


def test_a_picture_too_small_to_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="16 pixels or more, got 4"):
        render(make_scene(seed=1, index=0), 4)


def test_everything_a_scene_can_hold_occurs(scenes: list[Scene]) -> None:
    items = [item for scene in scenes for item in scene.objects]
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.color for item in items} == set(COLORS)
    assert {item.texture for item in items} == set(TEXTURES)
    assert {scene.surface for scene in scenes} == set(SURFACES) == set(PAINT_SURFACE)
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4, 5, 6}


def test_large_and_small_differ_by_two_fifths(scenes: list[Scene]) -> None:
    assert WIDTHS["large"][0] / WIDTHS["small"][1] > 1.4
    for item in (item for scene in scenes for item in scene.objects if item.shape != "sign"):
        low, high = WIDTHS[item.size]
        assert low - 1e-9 <= item.box[2] - item.box[0] <= high + 1e-9


def test_neighbours_in_a_row_keep_their_gap(scenes: list[Scene]) -> None:
    for scene in scenes:
        for left, right in zip(scene.objects, scene.objects[1:], strict=False):
            assert left.row != right.row or right.box[0] - left.box[2] >= GAP - 1e-9


def test_text_is_nine_pixels_high_at_128_and_stands_out(scenes: list[Scene]) -> None:
    for scene in scenes[:60]:
        picture = render(scene, 128).mean(axis=2)
        for item in (item for item in scene.objects if item.text):
            box = text_box(item, item.text)
            assert box is not None
            x0, y0, x1, y1 = (round(edge * 128) for edge in box)
            ink = picture[y0:y1, x0:x1]
            assert (box[3] - box[1]) * 128 >= 9
            assert ink.max() - ink.min() > 70


def test_objects_stand_out_from_what_is_behind_them(scenes: list[Scene]) -> None:
    for scene in scenes[:60]:
        for item in scene.objects:
            behind = np.array([scene.wall, scene.ground])
            assert np.abs(behind - np.array(item.tint)).max(axis=1).min() > 35


def test_glyphs_are_five_wide_with_one_column_between() -> None:
    assert text_width("TEA") == 17
    assert bitmap("TI").astype(int).tolist()[:2] == [
        [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0],
        [0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0],
    ]


def test_dice_with_one_name_roll_alike() -> None:
    one, two = Dice("a"), Dice("a")
    assert one.shuffled(range(9)) == two.shuffled(range(9))
    assert sorted(one.shuffled(range(9))) == list(range(9))
    assert one.weighted("abc", (0, 1, 0)) == "b"
