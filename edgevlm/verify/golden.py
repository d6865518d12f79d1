"""What is asked of the reference once, and of every bundle afterwards.

``record`` runs the cases through a session (PyTorch's, at export) and keeps pictures, prompts and tensors in
the bundle's ``golden/``.  The pictures are generated scenes, of other sizes than the model's own, so that
size, fit and filter matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm.bundle.golden import save_golden
from edgevlm.core.errors import DoesNotFitError
from edgevlm.evaluation.scenes import GENERATOR_VERSION, make_scene, render
from edgevlm.evaluation.scoring import is_match
from edgevlm.evaluation.suites import GOLDEN_SEED, SUITES, Suite
from edgevlm.processing.chat import user_message
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.session import Float, Ints, Session
from edgevlm.runtimes.vlm import RuntimeVlm

NUM_GREEDY_IDS = 64
NUM_LOGIT_STEPS = 8  # decode steps whose logits are kept
TASK_SCENES, TASK_QUESTIONS = 16, 4

TENSORS = (
    *("pixel_values", "image_features", "input_ids", "inputs_embeds", "prompt_rows"),
    *("prefill_logits", "decode_logits", "greedy_ids"),
)
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture [H, W, 3] and one prompt."""

    image: NDArray[np.uint8]
    prompt: str


def cases() -> tuple[Case, ...]:
    """A wide picture that shrinks and a tall one that grows, at most model sizes."""
    wide, tall = (
        render(make_scene(GOLDEN_SEED, 0), 400)[:300],
        render(make_scene(GOLDEN_SEED, 1), 120)[:, :84],
    )
    return (
        Case(image=wide, prompt="What is in the picture?"),
        Case(image=tall, prompt="Describe the picture."),
    )


def record(vlm: RuntimeVlm, root: Path, suite: str) -> None:
    """Run every case, and the task ``suite`` if there is one, and write ``golden/`` of the bundle at ``root``."""
    tensors: Tensors = {}
    for number, case in enumerate(cases()):
        tensors |= {f"{number}.{name}": tensor for name, tensor in _record_case(vlm, case).items()}
    task = _task_record(vlm, suite) if suite else None
    save_golden(root, tensors, {"prompts": [case.prompt for case in cases()], "task": task})
    for number, case in enumerate(cases()):
        Image.fromarray(case.image).save(picture(root, number))


def picture(root: Path, number: int) -> Path:
    """The file of a case's picture in the bundle at ``root``."""
    return root / "golden" / f"{number}.png"


def _record_case(vlm: RuntimeVlm, case: Case) -> Tensors:
    """Every stage's tensors for one case."""
    with vlm.exclusive() as session:
        return _run_case(session, vlm.processor, case, vlm.max_context)


def _run_case(session: Session, processor: Processor, case: Case, max_context: int) -> Tensors:
    pixels = processor.pixels(case.image)
    features = session.encode(pixels)
    ids = input_ids(processor, case.prompt)
    embeds = session.embed(ids[None])
    rows = place(embeds, features, processor.image_positions(ids))
    steps = min(NUM_GREEDY_IDS, max_context - len(ids))
    if steps < 2:
        raise DoesNotFitError(
            f"a context of {max_context} is too short to verify: the golden prompt has {len(ids)} tokens"
        )
    greedy, prefill, decode = continue_greedily(session, rows, steps)
    return {
        "pixel_values": pixels,
        "image_features": features,
        "input_ids": ids,
        "inputs_embeds": embeds,
        "prompt_rows": rows,
        "prefill_logits": prefill,
        "decode_logits": decode,
        "greedy_ids": greedy,
    }


def continue_greedily(session: Session, rows: Float, steps: int) -> tuple[Ints, Float, Float]:
    """``steps`` greedy ids, stop tokens included, the logits of the prompt [V] and of the first decode steps [K, V]."""
    prefill = logits = prefill_logits(session, rows)
    ids = [int(prefill.argmax())]
    kept: list[Float] = []
    while len(ids) < steps:
        logits = session.decode(ids[-1])
        if len(kept) < NUM_LOGIT_STEPS:
            kept.append(logits)
        ids.append(int(logits.argmax()))
    return np.array(ids, np.int64), prefill, np.stack(kept)


def prefill_logits(session: Session, rows: Float) -> Float:
    """Logits [V] of the prompt's last row, from an empty cache."""
    session.rewind(0)
    return session.prefill(rows)


def input_ids(processor: Processor, prompt: str) -> Ints:
    """Ids [T] of a question about one picture."""
    return processor.input_ids([user_message(prompt, num_images=1)])


def place(embeds: Float, features: Float, positions: Ints) -> Float:
    """``embeds`` [1, T, D] with the vision tokens [1, N, D] at ``positions``."""
    rows: Float = embeds.copy()
    rows[0, positions] = features[0]
    return rows


def task_suite(name: str) -> Suite:
    """The questions of the suite ``name`` that the gate asks."""
    return SUITES[name](TASK_SCENES, seed=GOLDEN_SEED, per_scene=TASK_QUESTIONS)


def task_answers(vlm: RuntimeVlm, suite: Suite) -> list[str]:
    """The answers to all of the suite's questions, greedily."""
    images = {index: suite.image(index) for index in range(suite.num_images)}
    return [vlm.ask(images[item.image_index], item.question.prompt, max_tokens=32).text for item in suite.items]


def accuracy(suite: Suite, answers: Sequence[str]) -> float:
    """The share of ``answers`` that are right."""
    right = [is_match(answer, item.question.answer) for answer, item in zip(answers, suite.items, strict=True)]
    return sum(right) / len(right)


def _task_record(vlm: RuntimeVlm, suite_name: str) -> dict[str, Any]:
    """What the reference answers, as plain data for golden.json."""
    suite = task_suite(suite_name)
    answers = task_answers(vlm, suite)
    return {
        "suite": suite_name,
        "generator_version": GENERATOR_VERSION,
        "answers": answers,
        "accuracy": accuracy(suite, answers),
    }
