"""What is asked of the reference once, and of every bundle afterwards.

``recorded`` runs the cases through a session (PyTorch's, at export), and pictures, prompts and tensors are kept in
the bundle's ``golden/``.  Every precision that rounds adds what the same rounding gives in PyTorch.  The pictures
are generated scenes, of other sizes than the model's own, so that size, fit and filter matter; a model that cuts
pictures into tiles gets one that makes several, but few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
NUM_OWN_STEPS = 2  # of each precision that rounds: enough to see whether the cache is read where it was written
TASK_SCENES, TASK_QUESTIONS = 16, 4
MANY_SCENES = 128  # for a bundle that rounds: of 512 questions, 3 % changed by chance move the score by 0.8 points
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


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What ``golden/`` will hold: the cases, every tensor by ``{case}.{stage}``, and the task's answers.

    ``image_sizes``: what each case's picture becomes, in pixels a side, for a model that reads several sizes.
    """

    cases: tuple[Case, ...]
    tensors: Tensors
    task: dict[str, Any] | None
    image_sizes: tuple[int, ...] = ()

    def add_decoder(self, precision: str, session: Session) -> None:
        """Record the logits of a decoder that rounds as ``precision`` does, fed what float32 was fed."""
        for number in range(len(self.cases)):
            rows = self.tensors[f"{number}.prompt_rows"]
            num_steps = min(NUM_OWN_STEPS, len(self.tensors[f"{number}.decode_logits"]))
            given = self.tensors[f"{number}.greedy_ids"][:num_steps].tolist()
            self.tensors[f"{number}.{precision}.prefill_logits"] = prefill_logits(session, rows)
            self.tensors[f"{number}.{precision}.decode_logits"] = decode_logits(session, given)

    def add_encoder(self, precision: str, encode: Callable[[Float], Float]) -> None:
        """Record the features of an encoder that rounds as ``precision`` does; ``encode``: one picture's views."""
        for number in range(len(self.cases)):
            features = encode(self.tensors[f"{number}.pixel_values"])
            self.tensors[f"{number}.{precision}.image_features"] = features

    def save(self, root: Path) -> None:
        """Write ``golden/`` of the bundle at ``root``."""
        prompts = [case.prompt for case in self.cases]
        sizes = {"image_sizes": self.image_sizes} if self.image_sizes else {}
        save_golden(root, self.tensors, {"prompts": prompts, "task": self.task, **sizes})
        for number, case in enumerate(self.cases):
            Image.fromarray(case.image).save(picture(root, number))


def unrounded(precision: str) -> str:
    """What the reference of ``precision`` is called that rounds weights alone, where engines may round more or not."""
    return f"{precision}.unrounded"


def record(vlm: RuntimeVlm, root: Path, suite: str) -> None:
    """Run every case, and the task ``suite`` if there is one, and write ``golden/`` of the bundle at ``root``."""
    recorded(vlm, suite).save(root)


def recorded(
    vlm: RuntimeVlm, suite: str, *, num_scenes: int = TASK_SCENES, others: Iterable[RuntimeVlm] = ()
) -> Recording:
    """Every case as ``vlm`` answers it, and its answers to ``num_scenes`` of the task ``suite``, if there is one.

    A bundle that rounds needs ``MANY_SCENES``: only many questions tell how many right answers that costs.  Of the
    ``others``, the same model for other picture sizes, each adds its first case.
    """
    tensors: Tensors = {}
    asked: list[Case] = []
    sides: list[int] = []
    for model, case in _asked(vlm, others):
        tensors |= {f"{len(asked)}.{name}": tensor for name, tensor in _record_case(model, case).items()}
        asked.append(case)
        sides.append(model.processor.image_spec.height)
    task = _task_record(vlm, suite, num_scenes) if suite else None
    image_sizes = tuple(sides) if len(set(sides)) > 1 else ()
    return Recording(cases=tuple(asked), tensors=tensors, task=task, image_sizes=image_sizes)


def _asked(vlm: RuntimeVlm, others: Iterable[RuntimeVlm]) -> Iterator[tuple[RuntimeVlm, Case]]:
    """Who is asked which case."""
    for case in cases(vlm.processor):
        yield vlm, case
    for other in others:
        yield other, cases(other.processor)[0]


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


def decode_logits(session: Session, given: Sequence[int]) -> Float:
    """Logits [K, V] after each of the K tokens ``given``, behind what the cache holds."""
    return np.stack([session.decode(token) for token in given])


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


def task_suite(name: str, num_scenes: int = TASK_SCENES) -> Suite:
    """The questions of the suite ``name`` that the gate asks; more scenes begin with those of fewer."""
    return SUITES[name](num_scenes, seed=GOLDEN_SEED, per_scene=TASK_QUESTIONS)


def task_answers(vlm: RuntimeVlm, suite: Suite) -> list[str]:
    """The answers to all of the suite's questions, greedily."""
    images = {index: suite.image(index) for index in range(suite.num_images)}
    return [vlm.ask(images[item.image_index], item.question.prompt, max_tokens=32).text for item in suite.items]


def right(suite: Suite, answers: Sequence[str]) -> list[bool]:
    """Which of ``answers`` are right."""
    return [is_match(answer, item.question.answer) for answer, item in zip(answers, suite.items, strict=True)]


def _task_record(vlm: RuntimeVlm, suite_name: str, num_scenes: int) -> dict[str, Any]:
    """What the reference answers, as plain data for golden.json."""
    suite = task_suite(suite_name, num_scenes)
    answers = task_answers(vlm, suite)
    return {
        "suite": suite_name,
        "generator_version": GENERATOR_VERSION,
        "num_scenes": num_scenes,
        "answers": answers,
        "accuracy": sum(right(suite, answers)) / len(answers),
    }
