"""What is asked of scenes, taken together: every kind occurs, and no answer can be guessed."""

from collections import Counter

import pytest

from edgevlm.evaluation.scenes import (
    COLORS,
    KINDS,
    Question,
    Scene,
    SceneObject,
    caption,
    make_scene,
    questions,
)

NUM_SCENES = 2000


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return [question for index in range(NUM_SCENES) for question in questions(make_scene(2, index))]


def _answers(asked: list[Question], kind: str) -> Counter[str]:
    return Counter(question.answer for question in asked if question.kind == kind)


def test_a_scene_is_asked_about_nine_questions_of_all_kinds(asked: list[Question]) -> None:
    kinds = Counter(question.kind for question in asked)
    assert set(kinds) == set(KINDS)
    assert 8 < len(asked) / NUM_SCENES <= 9
    assert min(kinds.values()) / len(asked) > 0.12
    assert max(kinds.values()) / len(asked) < 0.21


def test_yes_and_no_are_equally_frequent(asked: list[Question]) -> None:
    answers = _answers(asked, "exists")
    assert 0.48 < answers["yes"] / answers.total() < 0.52


def test_every_color_is_an_answer_about_as_often(asked: list[Question]) -> None:
    answers = _answers(asked, "color")
    assert set(answers) == set(COLORS)
    assert max(answers.values()) < 1.35 * min(answers.values())


def test_counts_run_from_zero_to_six_and_none_prevails(asked: list[Question]) -> None:
    answers = _answers(asked, "count")
    assert set(answers) == set("0123456")
    assert max(answers.values()) / answers.total() < 0.25


def test_the_right_one_of_two_stands_first_half_of_the_time(asked: list[Question]) -> None:
    size = [question for question in asked if question.kind == "size"]
    first = sum(f"the {question.answer} or" in question.prompt for question in size)
    assert 0.46 < first / len(size) < 0.54


def test_few_words_are_used(asked: list[Question]) -> None:
    texts = [f"{question.prompt} {question.answer}" for question in asked]
    texts += [caption(make_scene(2, index)) for index in range(500)]
    words = {word.strip("?.,") for text in texts for word in text.split()}
    assert len(words) < 230


def _item(shape: str, color: str, row: int, text: str = "") -> SceneObject:
    return SceneObject(
        shape=shape,
        color=color,
        texture="plain",
        size="large",
        box=(0, 0, 0.3, 0.3),
        tint=(0, 0, 0),
        row=row,
        text=text,
    )


def _scene(surface: str, num_rows: int, *items: SceneObject) -> Scene:
    gray = (128, 128, 128)
    return Scene(
        surface=surface, objects=items, num_rows=num_rows, wall=gray, ground=gray, horizon=0.3,
        light_side=0, light_warmth=0, brightness=1, seed=0, index=0,
    )  # fmt: skip


def test_a_caption_names_each_row_from_left_to_right() -> None:
    sign, ball = _item("sign", "orange", 0, "STOP"), _item("ball", "red", 0, "7")
    star = _item("star", "blue", 1)
    assert caption(_scene("shelf", 2, sign, ball, star)) == (
        "An orange sign saying STOP and a red ball with 7 are on the upper shelf. A blue star is on the lower shelf."
    )
    assert caption(_scene("floor", 1, _item("cross", "white", 0))) == "A white cross is on the floor."
