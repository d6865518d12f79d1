"""The shipped model looks at its picture, and its shipped bundle is the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from edgevlm.evaluation import majority, scenes_suite, score
from edgevlm.evaluation.scenes import make_scene, render
from edgevlm.models.checkpoint import WEIGHTS, load_model
from edgevlm.runtimes.open import open_bundle
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import DEMO_IMAGE, MODELS, find_bundle, find_weights
from edgevlm.verify import verify_bundle

UNSEEN = 7  # a series of scenes that nothing else uses


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def vlm(name: str) -> Iterator[RuntimeVlm]:
    with open_bundle(name) as opened:
        yield opened


def test_it_answers_questions_about_the_demo_picture(vlm: RuntimeVlm) -> None:
    assert vlm.ask(DEMO_IMAGE, "How many objects are there?").text == "5"
    assert "cross" in vlm.ask(DEMO_IMAGE, "Describe the picture.").text


def test_it_looks(vlm: RuntimeVlm) -> None:
    """Thirty points above the same questions about other pictures, and above the most frequent answers."""
    suite = scenes_suite(60, seed=UNSEEN, per_scene=6)

    def answer(image: np.ndarray, prompt: str) -> str:
        return vlm.ask(image, prompt, max_tokens=16).text

    as_it_is = score(suite, answer).overall.accuracy
    assert as_it_is >= score(suite, answer, control="shuffled").overall.accuracy + 0.30
    assert as_it_is >= majority(suite).overall.accuracy + 0.30


def test_the_bundle_passes_its_own_gate(name: str) -> None:
    verification = verify_bundle(name).require()
    assert all(result.max_abs <= 1e-4 for result in verification.stages)
    assert verification.task is not None
    assert verification.task.num_equal == verification.task.num_questions


def test_the_bundle_was_made_from_the_shipped_weights(name: str) -> None:
    from edgevlm.bundle.read import read_bundle

    made_from = read_bundle(find_bundle(name)).manifest.provenance["weights"][WEIGHTS]
    assert made_from == hashlib.sha256((find_weights(name) / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("index", range(4))
def test_64_greedy_ids_equal_those_of_pytorch_on_a_new_picture(name: str, vlm: RuntimeVlm, index: int) -> None:
    reference = load_model(name).open()
    picture = render(make_scene(UNSEEN, index), 200)[20:180]
    answers = [each.ask(picture, "Describe the picture.", max_tokens=64, ignore_eos=True) for each in (vlm, reference)]
    assert len(answers[0].token_ids) == 64
    assert answers[0].token_ids == answers[1].token_ids
