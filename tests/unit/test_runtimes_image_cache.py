"""Image features that are kept, and the rows that pictures fill."""

from __future__ import annotations

import numpy as np
import pytest

from edgevlm.core.errors import ConfigError, EdgeVLMError
from edgevlm.processing.picture import Picture
from edgevlm.runtimes.image_cache import ImageCache
from edgevlm.runtimes.prompt_rows import PromptRows, common_prefix
from edgevlm.runtimes.session import Float, ImageFeatures

IMAGE = 99


def features(value: float) -> ImageFeatures:
    return ImageFeatures(vision(value))


def vision(value: float, num_tokens: int = 2) -> Float:
    return np.full((1, num_tokens, 3), value, np.float32)


def picture(value: float) -> Picture:
    return Picture.of(np.full((1, 3, 2, 2), value, np.float32))


def prompt(*ids: int, pictures: tuple[Picture, ...] = ()) -> PromptRows:
    return sized(*ids, pictures=pictures, counts=(2,) * len(pictures))


def sized(*ids: int, pictures: tuple[Picture, ...], counts: tuple[int, ...]) -> PromptRows:
    """A prompt whose pictures have different numbers of vision tokens."""
    array = np.array(ids, np.int64)
    return PromptRows(ids=array, positions=np.flatnonzero(array == IMAGE), pictures=pictures, counts=counts)


def test_the_image_unused_for_longest_goes_first() -> None:
    cache = ImageCache(2)
    cache.put("a", features(1))
    cache.put("b", features(2))
    cache.get("a")
    cache.put("c", features(3))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_a_cache_of_size_zero_keeps_nothing() -> None:
    cache = ImageCache(0)
    cache.put("a", features(1))
    assert len(cache) == 0


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_cache_size"):
        ImageCache(-1)


def test_equal_pixels_have_equal_keys() -> None:
    assert picture(0.5).key == picture(0.5).key != picture(0.25).key


def test_the_same_ids_with_another_picture_are_other_rows() -> None:
    one = prompt(1, IMAGE, IMAGE, 2, pictures=(picture(0.1),))
    two = prompt(1, IMAGE, IMAGE, 2, pictures=(picture(0.2),))
    assert common_prefix(one.rows(), two.rows()) == 1


def test_features_of_several_pictures_go_to_their_places_in_order() -> None:
    rows = prompt(1, IMAGE, IMAGE, 2, IMAGE, IMAGE, pictures=(picture(0.1), picture(0.2)))
    embeds = np.zeros((1, 6, 3), np.float32)
    rows.place([vision(10), vision(20)], embeds, 0)
    assert embeds[0, :, 0].tolist() == [0, 10, 10, 0, 20, 20]


@pytest.mark.parametrize(("start", "num_pictures"), [(0, 2), (2, 2), (3, 1), (5, 1), (6, 0)])
def test_a_picture_is_needed_while_one_of_its_rows_is(start: int, num_pictures: int) -> None:
    rows = prompt(1, IMAGE, IMAGE, 2, IMAGE, IMAGE, pictures=(picture(0.1), picture(0.2)))
    embeds = np.zeros((1, 6 - start, 3), np.float32)
    rows.place([vision(7)] * len(rows.pictures_after(start)), embeds, start)
    assert len(rows.pictures_after(start)) == num_pictures
    assert embeds[0, :, 0].tolist() == [0, 7, 7, 0, 7, 7][start:]


@pytest.mark.parametrize(("start", "expected"), [(0, [1, 1, 0, 2, 2, 2]), (1, [1, 0, 2, 2, 2]), (4, [2, 2])])
def test_pictures_of_different_sizes_each_fill_their_own_places(start: int, expected: list[int]) -> None:
    rows = sized(*[IMAGE] * 2, 1, *[IMAGE] * 3, pictures=(picture(0.1), picture(0.2)), counts=(2, 3))
    tokens = {picture(0.1).key: vision(1, 2), picture(0.2).key: vision(2, 3)}
    embeds = np.zeros((1, 6 - start, 3), np.float32)
    rows.place([tokens[one.key] for one in rows.pictures_after(start)], embeds, start)
    assert embeds[0, :, 0].tolist() == expected


def test_vision_tokens_are_numbered_within_their_picture() -> None:
    one, two = picture(0.1), picture(0.2)
    rows = sized(IMAGE, *[IMAGE] * 2, 5, pictures=(one, two), counts=(1, 2)).rows()
    assert rows == [(one.key, 0), (two.key, 0), (two.key, 1), 5]


def test_the_placeholders_id_is_never_embedded() -> None:
    assert prompt(1, IMAGE, IMAGE, 2, pictures=(picture(0.1),)).ids_to_embed().tolist() == [1, 0, 0, 2]


def test_counts_that_do_not_fill_the_places_are_refused() -> None:
    with pytest.raises(EdgeVLMError, match="2 places for the vision tokens of 1 images, which have 3"):
        sized(IMAGE, IMAGE, pictures=(picture(0.1),), counts=(3,))


def test_text_ids_leave_the_pictures_out() -> None:
    assert prompt(1, IMAGE, IMAGE, 2, pictures=(picture(0.1),)).text_ids() == [1, 2]


def test_places_without_a_picture_are_refused() -> None:
    with pytest.raises(EdgeVLMError, match="2 places for the vision tokens of 0 images"):
        prompt(1, IMAGE, IMAGE)


def test_an_encoder_with_another_number_of_tokens_is_refused() -> None:
    rows = prompt(IMAGE, IMAGE, pictures=(picture(0.1),))
    with pytest.raises(EdgeVLMError, match="3 vision tokens for 2 places"):
        rows.place([vision(1, num_tokens=3)], np.zeros((1, 2, 3), np.float32), 0)
