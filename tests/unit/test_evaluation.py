"""Suites and the scores on them."""

import json

import numpy as np
import pytest

from edgevlm.core.errors import ConfigError, UnsupportedError
from edgevlm.evaluation import (
    EVAL_SEED,
    SUITES,
    TRAIN_SEED,
    Item,
    Suite,
    Tally,
    is_match,
    majority,
    scenes_suite,
    score,
)
from edgevlm.evaluation.scenes import Question, make_scene, questions, render
from edgevlm.evaluation.suites import Image


def _suite(*answers: str) -> Suite:
    """A picture an answer, its brightness the picture's number; two kinds of question about each."""
    items = tuple(
        Item(image_index=index, question=Question(kind=kind, prompt=kind, answer=answer))
        for index, answer in enumerate(answers)
        for kind in ("color", "count")
    )
    return Suite(
        name="fake",
        num_images=len(answers),
        image=lambda index: np.full((2, 2, 3), index, np.uint8),
        items=items,
    )


def _brightness(image: Image, prompt: str) -> str:
    return str(image[0, 0, 0])


def test_the_score_counts_right_answers_by_kind() -> None:
    result = score(_suite("0", "1", "5"), _brightness)
    assert result.kinds == {"color": Tally(correct=2, total=3), "count": Tally(correct=2, total=3)}
    assert result.overall == Tally(correct=4, total=6)
    assert result.overall.accuracy == pytest.approx(2 / 3)


def test_shuffling_shows_the_next_picture() -> None:
    assert score(_suite("0", "1", "2"), _brightness, control="shuffled").overall.correct == 0
    assert score(_suite("1", "2", "0"), _brightness, control="shuffled").overall.correct == 6


def test_blank_pictures_are_gray() -> None:
    assert score(_suite("127", "127", "0"), _brightness, control="blank").overall.correct == 4


def test_one_picture_cannot_be_shuffled() -> None:
    with pytest.raises(ConfigError, match="at least two pictures"):
        score(_suite("0"), _brightness, control="shuffled")


def test_an_unknown_control_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no control named 'mirrored'; known: blank, shuffled"):
        score(_suite("0"), _brightness, control="mirrored")  # type: ignore[arg-type]


def test_questions_of_one_picture_hand_over_the_same_array() -> None:
    seen: list[Image] = []

    def remember(image: Image, prompt: str) -> str:
        seen.append(image)
        return prompt

    score(_suite("0", "1"), remember)
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[1] is not seen[2]


def test_progress_is_told_after_each_question() -> None:
    told: list[tuple[int, int]] = []
    score(_suite("0", "1"), _brightness, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_majority_answers_each_kind_with_its_most_frequent_answer() -> None:
    result = majority(_suite("red", "blue", "red"))
    assert result.kinds["color"] == Tally(correct=2, total=3)
    assert result.control == "majority"


@pytest.mark.parametrize("given", ["Red Ball", " red ball. ", "red ball"])
def test_case_spaces_and_a_final_stop_do_not_matter(given: str) -> None:
    assert is_match(given, "red ball")


@pytest.mark.parametrize("given", ["ball", "the red ball", "red ball..", ""])
def test_anything_else_does_matter(given: str) -> None:
    assert not is_match(given, "red ball")


def test_the_interval_is_wilsons() -> None:
    # z² = 3.8415, n = 100, p = 0.5: center 0.5, reach sqrt(0.25/100 + 3.8415/40000) · 1.96 / 1.0384 = 0.0962
    assert Tally(correct=50, total=100).interval == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert Tally(correct=0, total=10).interval == pytest.approx((0, 0.2775), abs=1e-4)
    assert Tally(correct=0, total=0).interval == (0, 1)


def test_a_score_can_be_written_as_json() -> None:
    record = json.loads(json.dumps(score(_suite("0"), _brightness).record()))
    assert record["overall"]["accuracy"] == 1
    assert record["kinds"]["count"]["total"] == 1
    assert record["control"] is None


def test_the_scenes_suite_asks_what_the_generator_asks() -> None:
    suite = SUITES["scenes"](num_scenes=3, size=32)
    scene = make_scene(EVAL_SEED, 1)
    assert tuple(item.question for item in suite.items if item.image_index == 1) == questions(scene)
    assert np.array_equal(suite.image(1), render(scene, 32))


def test_a_suite_can_ask_fewer_questions_of_each_scene() -> None:
    assert len(scenes_suite(5, per_scene=2).items) == 10


def test_an_empty_suite_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one scene"):
        scenes_suite(0)


def test_a_misspelt_suite_is_met_with_the_right_name() -> None:
    with pytest.raises(UnsupportedError, match="Did you mean 'scenes'"):
        SUITES["scene"]


def test_scores_come_from_scenes_that_training_never_sees() -> None:
    assert TRAIN_SEED != EVAL_SEED
    assert make_scene(TRAIN_SEED, 0).objects != make_scene(EVAL_SEED, 0).objects


def test_who_knows_the_suite_scores_all_and_the_majority_little() -> None:
    suite = scenes_suite(60)
    answers = iter(item.question.answer for item in suite.items)
    assert score(suite, lambda image, prompt: next(answers)).overall.accuracy == 1
    assert majority(suite).overall.accuracy < 0.3
