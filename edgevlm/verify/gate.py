"""The gate: a bundle against its golden tensors, with no PyTorch in sight."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.bundle.golden import load_golden
from edgevlm.bundle.read import read_bundle
from edgevlm.core.errors import EdgeVLMError, InputError, IntegrityError, ParityError
from edgevlm.evaluation.scenes import GENERATOR_VERSION
from edgevlm.processing.picture import Picture
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.embedding import Encode
from edgevlm.runtimes.open import open_bundle
from edgevlm.runtimes.prompt_rows import PromptRows
from edgevlm.runtimes.session import Float, Ints, Session
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import find_bundle
from edgevlm.verify import golden
from edgevlm.verify.stages import StageResult, compare, compare_ids, worst
from edgevlm.verify.thresholds import Threshold, thresholds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Exact-match accuracy of the bundle and of PyTorch on the same questions, and how many answers are equal."""

    suite: str
    num_questions: int
    num_equal: int
    accuracy: float
    reference_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared, with which result."""

    bundle: str
    precision: str
    runtime: Mapping[str, Any]
    stages: tuple[StageResult, ...]
    task: TaskResult | None
    passed: bool

    @property
    def broken(self) -> StageResult | None:
        """The first stage that failed."""
        return next((result for result in self.stages if not result.passed), None)

    def require(self) -> Verification:
        """Itself when it passed; ParityError naming the first broken stage and the likely cause when not."""
        broken = self.broken
        if broken is None:
            return self
        note = f" ({broken.note})" if broken.note else ""
        raise ParityError(
            f"{self.bundle}: stage {broken.stage} differs from PyTorch: largest difference {broken.max_abs:.3g}, "
            f"allowed {broken.tolerance:.3g}{note}. Likely {broken.cause}"
        )


def verify_bundle(path: Path | str, *, runtime: str = "onnxruntime", check: bool = True) -> Verification:
    """Compare a bundle (folder or shipped name) with its golden tensors.

    Raises what opening raises; a difference is a result, not an exception: see ``Verification.require``.
    """
    root = find_bundle(path)
    manifest = read_bundle(root, check=check).manifest
    table = thresholds(manifest.part("decoder_model_merged").precision)
    with open_bundle(root, runtime, check=False) as vlm:
        stages = _compared(vlm, _cases(root), table)
        task = _task(vlm, load_golden(root)[1]) if all(result.passed for result in stages) else None
        if task:
            stages.append(_task_stage(task))
        return Verification(
            bundle=manifest.name,
            precision=manifest.part("decoder_model_merged").precision,
            runtime=vlm.info,
            stages=tuple(stages),
            task=task,
            passed=all(result.passed for result in stages),
        )


def golden_answers_match(vlm: RuntimeVlm) -> str | None:
    """None when the model still gives its golden ids, else the complaint; a benchmark times only what is right.

    A model that was not opened from a bundle has nothing to be compared with, and passes.
    """
    root = vlm.info.get("bundle")
    if root is None:
        return None
    with vlm.exclusive() as session:
        for number, case in enumerate(_cases(Path(root))):
            prompt = golden.prompt_of(vlm, case.tensors["input_ids"], case.tensors["pixel_values"])
            found = _greedy(session, prompt, golden.encoder(session), len(case.tensors["greedy_ids"]))
            result = compare_ids("greedy_ids", case.tensors["greedy_ids"], found)
            if not result.passed:
                return f"golden case {number}: {result.note}"
    return None


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A recorded case: its picture's file, its prompt and every stage's tensors."""

    picture: Path
    prompt: str
    tensors: golden.Tensors


def _cases(root: Path) -> list[GoldenCase]:
    """Raises IntegrityError when ``golden/`` lacks something that ``golden.record`` writes."""
    tensors, meta = load_golden(root)
    cases = []
    try:
        for number, prompt in enumerate(meta["prompts"]):
            own = {name: tensors[f"{number}.{name}"] for name in golden.TENSORS}
            cases.append(GoldenCase(picture=golden.picture(root, number), prompt=prompt, tensors=own))
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{root}: golden/ is incomplete ({error}): export the bundle again") from error
    if not cases:
        raise IntegrityError(f"{root}: golden/ holds no case, so nothing can be compared: export the bundle again")
    return cases


def _compared(vlm: RuntimeVlm, cases: Sequence[GoldenCase], table: Mapping[str, Threshold]) -> list[StageResult]:
    """Each stage's worst case; a case ends at its first broken stage, since what follows would only repeat it."""
    by_stage: dict[str, list[StageResult]] = {}
    with vlm.exclusive() as session:
        for case in cases:
            for result in _stages(session, vlm, case, table):
                by_stage.setdefault(result.stage, []).append(result)
                if not result.passed:
                    break
    return [worst(results) for results in by_stage.values()]


def _stages(
    session: Session, vlm: RuntimeVlm, case: GoldenCase, table: Mapping[str, Threshold]
) -> Iterator[StageResult]:
    """Every stage in the order of the data; all but the last read golden inputs, so a fault stays where it is.

    ``fused_embeds`` alone reads what the encoder just gave, whose memory of the picture is too large to store.
    """
    expected, picture = case.tensors, _prepared(vlm.processor, case)
    prompt = golden.prompt_of(vlm, expected["input_ids"], expected["pixel_values"])
    encode = golden.encoder(session)

    def close(stage: str, reference: Float, compute: Callable[[], Float]) -> StageResult:
        allowed = table[stage].allowed(reference)
        try:
            return compare(stage, reference, compute(), allowed)
        except EdgeVLMError as error:  # the engine gave up: that is this stage's result
            return StageResult(stage=stage, max_abs=float("inf"), tolerance=allowed, passed=False, note=str(error))

    def text(rows: Float) -> Float:
        return np.delete(rows, prompt.positions, axis=1)

    yield _pixels(vlm.processor, expected["pixel_values"], picture.pixel_values, table)
    yield close(
        "image_features",
        expected["image_features"],
        lambda: encode(golden.PICTURE, expected["pixel_values"]).tokens,
    )
    found = golden.input_ids(vlm.processor, case.prompt, picture.grid)
    yield compare_ids("input_ids", expected["input_ids"], found)
    embeds = text(expected["inputs_embeds"])
    yield close("inputs_embeds", embeds, lambda: text(session.embed(prompt.ids_to_embed()[None])))
    if prompt.fused is not None:
        fused = expected["prompt_rows"][:, prompt.fused]
        yield close("fused_embeds", fused, lambda: golden.prompt_rows(session, prompt, encode)[:, prompt.fused])
    rows, given = expected["prompt_rows"], expected["greedy_ids"][: len(expected["decode_logits"])].tolist()
    yield close("prefill_logits", expected["prefill_logits"], lambda: golden.prefill_logits(session, rows))
    steps = expected["decode_logits"]
    yield close("decode_logits", steps, lambda: np.stack([session.decode(token) for token in given]))
    ids = expected["greedy_ids"]
    yield compare_ids("greedy_ids", ids, _greedy(session, prompt, encode, len(ids)))


def _prepared(processor: Processor, case: GoldenCase) -> Picture:
    """The case's picture, as this machine prepares it."""
    try:
        return processor.prepare(case.picture)
    except InputError as error:
        raise IntegrityError(f"golden/ is damaged: {error}; copy or export the bundle again") from error


def _pixels(processor: Processor, expected: Float, found: Float, table: Mapping[str, Threshold]) -> StageResult:
    """Single values may round differently; the mean over the picture may not move.

    The table counts in levels of a channel from 0 to 1; the smallest std stretches them most.
    """
    stretch = 1 / min(processor.image_spec.std)
    result = compare("pixels", expected, found, table["pixels"].max_abs * stretch)
    drift = float(np.abs(expected - found).mean()) if result.passed else 0.0
    allowed = table["pixels_mean"].max_abs * stretch
    if drift <= allowed:
        return result
    return replace(result, max_abs=drift, tolerance=allowed, passed=False, note="of the mean over all pixels")


def _greedy(session: Session, prompt: PromptRows, encode: Encode, steps: int) -> Ints:
    """Greedy ids by the bundle's own parts from pixels on."""
    rows = golden.prompt_rows(session, prompt, encode)
    return golden.continue_greedily(session, rows, steps)[0]


def _task(vlm: RuntimeVlm, meta: Mapping[str, Any]) -> TaskResult | None:
    """The task score, where the model has a task; skipped, and said so, when the generator draws other pictures now."""
    task = meta.get("task")
    if not task:
        return None
    if task["generator_version"] != GENERATOR_VERSION:
        logger.warning("task score skipped: the bundle was made with scene generator %s", task["generator_version"])
        return None
    suite = golden.task_suite(task["suite"])
    answers = golden.task_answers(vlm, suite)
    return TaskResult(
        suite=task["suite"],
        num_questions=len(answers),
        num_equal=_num_equal(answers, task["answers"]),
        accuracy=golden.accuracy(suite, answers),
        reference_accuracy=task["accuracy"],
    )


def _num_equal(found: Sequence[str], expected: Sequence[str]) -> int:
    if len(found) != len(expected):
        raise EdgeVLMError(f"{len(found)} task answers, the golden ones are {len(expected)}: export the bundle again")
    return sum(a == b for a, b in zip(found, expected, strict=True))


def _task_stage(task: TaskResult) -> StageResult:
    differ = task.num_questions - task.num_equal
    note = f"{task.num_equal} of {task.num_questions} answers equal, exact match {task.accuracy:.3f}"
    return StageResult(stage="task", max_abs=float(differ), tolerance=0.0, passed=not differ, note=note)
