"""Training data: what the decoder sees, what it is asked to say, and when."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgevlm.core.errors import ConfigError
from edgevlm.distill.data import IGNORED, collate, normalized, pack
from edgevlm.distill.facts import CLASSES, labels
from edgevlm.distill.recipe import Optimization
from edgevlm.distill.trainer import epoch_slice
from edgevlm.evaluation.scenes import COLORS, SHAPES, Question, make_scene, render
from edgevlm.processing.image_spec import ImageSpec
from edgevlm.processing.images import pixel_values

IDS = {"<|user|>": [1], "<|image|>": [2], "<|assistant|>": [3], "<|end|>": [4], "ask": [10, 11], "say": [20]}
ASKED = [Question(kind="exists", prompt="ask", answer="say")] * 2


def encode(text: str) -> list[int]:
    return IDS[text]


def test_each_question_continues_the_picture_alone() -> None:
    packed = pack(ASKED, encode, 2, chained=False)
    assert packed.input_ids == [1, 2, 2, 10, 11, 3, 20, 4, 10, 11, 3, 20, 4]
    assert packed.positions == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 7]
    assert packed.blocks == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]


def test_the_loss_looks_at_answers_and_their_end_only() -> None:
    packed = pack(ASKED[:1], encode, 2, chained=False)
    assert packed.targets == [IGNORED] * 5 + [20, 4] + [IGNORED]


def test_a_chain_is_one_conversation() -> None:
    packed = pack(ASKED, encode, 1, chained=True)
    assert packed.input_ids == [1, 2, 10, 11, 3, 20, 4, 1, 10, 11, 3, 20, 4]
    assert packed.positions == list(range(13))
    assert set(packed.blocks) == {0}


def test_a_block_sees_the_prefix_and_itself() -> None:
    packed = [pack(ASKED, encode, 1, chained=False), pack(ASKED[:1], encode, 1, chained=False)]
    mask = collate(packed, torch.zeros(2), []).mask
    second_question = mask[0, 0, 7]
    assert second_question.nonzero().flatten().tolist() == [0, 1, 7]
    padding_is_seen = mask[1, 0, :7, 7:].any()
    assert not padding_is_seen


def test_training_pixels_are_those_of_the_processor() -> None:
    picture = render(make_scene(1, 0), 64)
    spec = ImageSpec(height=64, width=64, fit="pad", mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
    ours = normalized(picture[None], spec.mean, spec.std).numpy()
    np.testing.assert_allclose(ours, pixel_values_of(picture, spec), atol=1e-6)


def pixel_values_of(picture: np.ndarray, spec: ImageSpec) -> np.ndarray:
    from edgevlm.processing.images import load_image

    return pixel_values(load_image(picture), spec)


def test_facts_say_what_stands_in_which_cell() -> None:
    scene = make_scene(1, 0)
    number, cell, facts = labels([scene], 8)
    assert len(number) == len(scene.objects)
    first = scene.objects[0]
    x0, y0, x1, y1 = first.box
    assert cell[0] == int((y0 + y1) / 2 * 8) * 8 + int((x0 + x1) / 2 * 8)
    assert facts[0, :2].tolist() == [SHAPES.index(first.shape), COLORS.index(first.color)]
    assert all(int(fact) < size for fact, size in zip(facts[0], CLASSES, strict=True))


def test_every_epoch_visits_every_scene_once_in_another_order() -> None:
    first = np.concatenate([epoch_slice(12, step, 4, 0) for step in range(3)])
    second = np.concatenate([epoch_slice(12, step, 4, 0) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    plan = Optimization(steps=10, warmup_steps=2, decay_steps=4, learning_rate=1.0)
    assert [plan.rate(step) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="exceed steps"):
        Optimization(steps=5, warmup_steps=3, decay_steps=3)
