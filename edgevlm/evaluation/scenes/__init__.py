"""Generated pictures of simple objects, with questions that have exactly one right answer.

    scene = make_scene(seed=1, index=0)
    picture = render(scene, 128)
    for question in questions(scene): ...

Everything follows from ``(seed, index)`` by additions, products and square roots alone, so that the same pair
gives the same bytes in every process and on every machine.
"""

from edgevlm.evaluation.scenes.asking import KINDS, Question, caption, questions
from edgevlm.evaluation.scenes.draw import render
from edgevlm.evaluation.scenes.world import (
    COLORS,
    SHAPES,
    SURFACES,
    TEXTURES,
    WORDS,
    Scene,
    SceneObject,
    make_scene,
)

GENERATOR_VERSION = 1  # raise it with every change of pixels, wording or distribution

__all__ = [
    "COLORS",
    "GENERATOR_VERSION",
    "KINDS",
    "SHAPES",
    "SURFACES",
    "TEXTURES",
    "WORDS",
    "Question",
    "Scene",
    "SceneObject",
    "caption",
    "make_scene",
    "questions",
    "render",
]
