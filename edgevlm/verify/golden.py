"""What is asked of the reference once, and of every bundle afterwards.

``record`` runs the cases through a session (PyTorch's, at export) and keeps pictures, prompts and tensors in
the bundle's ``golden/``.  The pictures are generated scenes, of other sizes than the model's own, so that
size, fit and filter matter; a model that cuts pictures into tiles gets one that makes several, but few.
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
from edgevlm.core.errors import DoesNotFitError, IntegrityError
from edgevlm.evaluation.scenes import GENERATOR_VERSION, make_scene, render
from edgevlm.evaluation.scoring import is_match
from edgevlm.evaluation.suites import GOLDEN_SEED, SUITES, Suite
from edgevlm.processing.chat import user_message
from edgevlm.processing.picture import Grid, Picture
from edgevlm.processing.processor import Processor
from edgevlm.processing.split import Crops
from edgevlm.runtimes.clock import StageClock
from edgevlm.runtimes.embedding import CachedEncoder, Encode, embed_prompt
from edgevlm.runtimes.image_cache import ImageCache
from edgevlm.runtimes.prompt_rows import PromptRows, fused_positions
from edgevlm.runtimes.session import Float, Ints, Session
from edgevlm.runtimes.vlm import RuntimeVlm

NUM_GREEDY_IDS = 32  # at export; a bundle says itself how many it has
NUM_LOGIT_STEPS = 8  # decode steps whose logits are kept
TASK_SCENES, TASK_QUESTIONS = 16, 4
MOST_TILES = 9  # of a golden picture: some seconds each with a large encoder on two cores
PICTURE = "golden"  # the key of the one picture of a case

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


def cases(processor: Processor) -> tuple[Case, ...]:
    """A wide picture that shrinks and a tall one that grows, at most model sizes."""
    wide, tall, large = (
        render(make_scene(GOLDEN_SEED, 0), 400)[:300],
        render(make_scene(GOLDEN_SEED, 1), 120)[:, :84],
        render(make_scene(GOLDEN_SEED, 0), 1200)[:600],
    )
    return (
        Case(image=_fitting(processor, (wide, wide[:200], wide[:100], large)), prompt="What is in the picture?"),
        Case(image=_fitting(processor, (tall, tall[:, :30])), prompt="Describe the picture."),
    )


def _fitting(processor: Processor, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The first of ``images``; where they are cut into tiles, the one with the most that are not too many."""
    split = processor.image_spec.split
    if split is None or isinstance(split, Crops):
        return images[0]
    counts = [len(processor.pixels(image)) for image in images]
    most = max((count for count in counts if count <= MOST_TILES), default=min(counts))
    return images[counts.index(most)]


def record(vlm: RuntimeVlm, root: Path, suite: str) -> None:
    """Run every case, and the task ``suite`` if there is one, and write ``golden/`` of the bundle at ``root``."""
    tensors: Tensors = {}
    asked = cases(vlm.processor)
    for number, case in enumerate(asked):
        tensors |= {f"{number}.{name}": tensor for name, tensor in _record_case(vlm, case).items()}
    task = _task_record(vlm, suite) if suite else None
    save_golden(root, tensors, {"prompts": [case.prompt for case in asked], "task": task})
    for number, case in enumerate(asked):
        Image.fromarray(case.image).save(picture(root, number))


def picture(root: Path, number: int) -> Path:
    """The file of a case's picture in the bundle at ``root``."""
    return root / "golden" / f"{number}.png"


def _record_case(vlm: RuntimeVlm, case: Case) -> Tensors:
    """Every stage's tensors for one case."""
    with vlm.exclusive() as session:
        return _run_case(session, vlm, case)


def _run_case(session: Session, vlm: RuntimeVlm, case: Case) -> Tensors:
    picture = vlm.processor.prepare(case.image)
    ids = input_ids(vlm.processor, case.prompt, picture.grid)
    prompt, encode = prompt_of(vlm, ids, picture.pixel_values), encoder(session)
    features = encode(PICTURE, picture.pixel_values).tokens
    embeds = session.embed(prompt.ids_to_embed()[None])
    rows = prompt_rows(session, prompt, encode)
    steps = min(NUM_GREEDY_IDS, vlm.max_context - len(ids))
    if steps < 2:
        raise DoesNotFitError(
            f"a context of {vlm.max_context} is too short to verify: the golden prompt has {len(ids)} tokens"
        )
    greedy, prefill, decode = continue_greedily(session, rows, steps)
    if not np.isfinite(prefill).all():
        raise IntegrityError(
            f"{vlm.name}: the checkpoint itself computes NaN or infinity, before any export: its weights or its "
            "config.json are damaged; fetch them again"
        )
    return {
        "pixel_values": picture.pixel_values,
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


def input_ids(processor: Processor, prompt: str, grid: Grid) -> Ints:
    """Ids [T] of a question about one picture of ``grid`` tiles."""
    return processor.input_ids([user_message(prompt, num_images=1)], grids=[grid])


def prompt_of(vlm: RuntimeVlm, ids: Ints, pixel_values: Float) -> PromptRows:
    """The prompt with these ids [T], about one picture of all the views ``pixel_values`` [S, 3, H, W]."""
    positions = vlm.processor.image_positions(ids)
    return PromptRows(
        ids=ids,
        positions=positions,
        pictures=(Picture(pixel_values, (1, 1), PICTURE),),
        counts=(len(positions),),
        fused=None if vlm.fusion is None else fused_positions(ids, positions, vlm.fusion),
    )


def encoder(session: Session) -> CachedEncoder:
    """Encodes the picture of a case once, however many stages need its features."""
    return CachedEncoder(session, ImageCache(1))


def prompt_rows(session: Session, prompt: PromptRows, encode: Encode) -> Float:
    """Rows [1, T, D] as the decoder reads them, made as for every question."""
    return embed_prompt(session, prompt, encode, StageClock())


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
