"""Pictures with questions that have exactly one right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import ConfigError
from edgevlm.core.registry import Registry
from edgevlm.evaluation.scenes import Question, make_scene, questions, render

Image = NDArray[np.uint8]  # [H, W, 3], RGB

TRAIN_SEED = 1  # the series that a shipped model may have seen
EVAL_SEED = 2  # the series that it is scored on
GOLDEN_SEED = 3  # the series that the parity gate asks about
HELD_OUT_SEEDS = frozenset({EVAL_SEED, GOLDEN_SEED})  # never trained on


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one of the suite's pictures."""

    image_index: int
    question: Question


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Questions in the order of their pictures; a picture is drawn or read only when asked for."""

    name: str
    num_images: int
    image: Callable[[int], Image]
    items: tuple[Item, ...]


SUITES: Registry[Callable[..., Suite]] = Registry(
    "evaluation suite",
    {"scenes": "edgevlm.evaluation.suites:scenes_suite"},
    group="edgevlm.suites",
)


def scenes_suite(num_scenes: int, seed: int = EVAL_SEED, size: int = 128, per_scene: int | None = None) -> Suite:
    """The first ``num_scenes`` of a series of generated scenes, ``size`` pixels square.

    ``per_scene`` keeps so many questions of each; they come in random order, so every kind stays in.
    """
    if num_scenes < 1 or (per_scene is not None and per_scene < 1):
        raise ConfigError(f"a suite needs at least one scene and one question each, got {num_scenes} and {per_scene}")
    scenes = [make_scene(seed, index) for index in range(num_scenes)]
    items = tuple(
        Item(image_index=index, question=question)
        for index, scene in enumerate(scenes)
        for question in questions(scene)[:per_scene]
    )
    return Suite(name="scenes", num_images=num_scenes, image=lambda index: render(scenes[index], size), items=items)
