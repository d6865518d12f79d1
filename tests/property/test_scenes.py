"""What holds for every scene: objects in the frame, and questions whose answers a second reading confirms."""

import re
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgevlm.evaluation.scenes import KINDS, SceneObject, caption, make_scene, questions, render

SEEDS, INDICES = st.integers(0, 2**32), st.integers(0, 2**32)
SINGULAR = {"crosses": "cross"}


@given(SEEDS, INDICES)
@settings(max_examples=200, deadline=None)
def test_every_answer_is_the_only_one_that_the_objects_allow(seed: int, index: int) -> None:
    scene = make_scene(seed, index)
    asked = questions(scene)
    assert len({question.prompt for question in asked}) == len(asked)
    for question in asked:
        assert question.kind in KINDS
        assert RIGHT_ANSWERS[question.kind](question.prompt, scene.objects) == [question.answer]


@given(SEEDS, INDICES)
@settings(max_examples=200, deadline=None)
def test_objects_lie_in_the_frame_and_never_overlap(seed: int, index: int) -> None:
    items = make_scene(seed, index).objects
    for item in items:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
    for i, one in enumerate(items):
        assert not any(_overlap(one, two) for two in items[i + 1 :])


@given(SEEDS, INDICES)
@settings(max_examples=15, deadline=None)
def test_one_pair_of_numbers_gives_one_scene(seed: int, index: int) -> None:
    scene, again = make_scene(seed, index), make_scene(seed, index)
    assert scene == again
    assert questions(scene) == questions(again)
    assert np.array_equal(render(scene, 64), render(again, 64))


@given(SEEDS, INDICES)
@settings(max_examples=100, deadline=None)
def test_color_and_shape_single_out_an_object_and_the_caption_names_each_once(seed: int, index: int) -> None:
    scene = make_scene(seed, index)
    text = caption(scene).lower()
    assert all(text.count(item.name) == 1 for item in scene.objects)


def _overlap(one: SceneObject, two: SceneObject) -> bool:
    (a0, b0, a1, b1), (c0, d0, c1, d1) = one.box, two.box
    return a0 < c1 and c0 < a1 and b0 < d1 and d0 < b1


# A second reading of prompts, from their words and the boxes alone


def _matching(noun: str, items: Sequence[SceneObject]) -> list[SceneObject]:
    """The objects that every word of ``noun`` is true of."""
    return [item for item in items if set(noun.split()) <= {item.color, item.shape, item.texture, item.size, "object"}]


def _the_only(noun: str, items: Sequence[SceneObject]) -> SceneObject:
    (item,) = _matching(noun, items)
    return item


def _exists(prompt: str, items: Sequence[SceneObject]) -> list[str]:
    noun = re.sub(r"^(Is there|Do you see|Can you see) an? |\?$", "", prompt)
    return ["yes" if _matching(noun, items) else "no"]


def _count(prompt: str, items: Sequence[SceneObject]) -> list[str]:
    noun = re.sub(r"^How many | are there\?| do you see\?|^Count the |\.$", "", prompt)
    singular = " ".join(
        SINGULAR.get(word, word.removesuffix("s")) if word == noun.split()[-1] else word for word in noun.split()
    )
    return [str(len(_matching(singular, items)))]


def _color(prompt: str, items: Sequence[SceneObject]) -> list[str]:
    return [_the_only(re.findall(r"the ([a-z ]+)[?.]", prompt.replace("the color of ", ""))[0], items).color]


def _position(prompt: str, items: Sequence[SceneObject]) -> list[str]:
    relation, noun = re.findall(r"(left|right|above|below)(?: of)? the ([a-z ]+)[?.]", prompt)[0]
    of = _the_only(noun, items)
    level = [item for item in items if item is not of and abs(item.box[3] - of.box[3]) < 0.1]
    lower = [item for item in items if item.box[3] - of.box[3] > 0.1]
    upper = [item for item in items if of.box[3] - item.box[3] > 0.1]
    if relation == "left":
        return [max((item.box[2], item.name) for item in level if item.box[2] <= of.box[0])[1]]
    if relation == "right":
        return [min((item.box[0], item.name) for item in level if item.box[0] >= of.box[2])[1]]
    middle = (of.box[0] + of.box[2]) / 2
    others = sorted(
        (abs((item.box[0] + item.box[2]) / 2 - middle), item.name) for item in (upper if relation == "above" else lower)
    )
    assert len(others) == 1 or others[1][0] > others[0][0] + 0.1
    return [others[0][1]]


def _size(prompt: str, items: Sequence[SceneObject]) -> list[str]:
    word, first, second = re.findall(r"is (\w+), the ([a-z ]+) or the ([a-z ]+)\?", prompt)[0]
    small, large = sorted(
        (_the_only(noun, items) for noun in (first, second)), key=lambda item: item.box[2] - item.box[0]
    )
    assert (large.box[2] - large.box[0]) / (small.box[2] - small.box[0]) > 1.4
    return [(small if word == "smaller" else large).name]


def _read(prompt: str, items: Sequence[SceneObject]) -> list[str]:
    (noun,) = re.findall(r"(?:on|does|Read) the ([a-z ]+?)(?: say)?[?.]", re.sub("the (word|number) on ", "", prompt))
    return [_the_only(noun, items).text]


RIGHT_ANSWERS = {
    "exists": _exists,
    "count": _count,
    "color": _color,
    "position": _position,
    "size": _size,
    "read": _read,
}
