"""The exact-answer task: what the bundle answers, beside what PyTorch float32 answered at export."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.core.errors import EdgeVLMError
from edgevlm.evaluation.scenes import GENERATOR_VERSION
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.verify import golden
from edgevlm.verify.stages import StageResult
from edgevlm.verify.thresholds import Combination

logger = logging.getLogger(__name__)

CHANCE = 2.0  # standard deviations: what 19 of 20 harmless changes stay within


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Exact-match accuracy of the bundle and of PyTorch on the same questions, and how many answers are equal.

    ``num_lost`` questions only PyTorch answers right, ``num_gained`` only the bundle.
    """

    suite: str
    num_questions: int
    num_equal: int
    accuracy: float
    reference_accuracy: float
    num_lost: int = 0
    num_gained: int = 0


def task_result(vlm: RuntimeVlm, meta: Mapping[str, Any], combination: Combination) -> TaskResult | None:
    """The score, where the model has a task; skipped, and said so, when the generator draws other pictures now.

    A model that is exact is asked few questions, since every answer must be PyTorch's; one that rounds is asked all
    that were recorded.
    """
    task = meta.get("task")
    if not task:
        return None
    if task["generator_version"] != GENERATOR_VERSION:
        logger.warning("task score skipped: the bundle was made with scene generator %s", task["generator_version"])
        return None
    num_scenes = golden.TASK_SCENES if combination.is_exact else task.get("num_scenes", golden.TASK_SCENES)
    suite = golden.task_suite(task["suite"], num_scenes)
    expected = task["answers"][: len(suite.items)]
    found = golden.task_answers(vlm, suite)
    if len(found) != len(expected):
        raise EdgeVLMError(f"{len(found)} task answers, the golden ones are {len(expected)}: export the bundle again")
    right, right_before = golden.right(suite, found), golden.right(suite, expected)
    pairs = list(zip(right, right_before, strict=True))
    return TaskResult(
        suite=task["suite"],
        num_questions=len(found),
        num_equal=sum(a == b for a, b in zip(found, expected, strict=True)),
        accuracy=sum(right) / len(right),
        reference_accuracy=sum(right_before) / len(right),
        num_lost=sum(before and not now for now, before in pairs),
        num_gained=sum(now and not before for now, before in pairs),
    )


def task_stage(task: TaskResult, combination: Combination) -> StageResult:
    """Equal answers where nothing is rounded; else no more right answers lost than the table and chance allow."""
    return _equal(task) if combination.is_exact else _as_good(task, combination.task)


def _equal(task: TaskResult) -> StageResult:
    differ = task.num_questions - task.num_equal
    note = f"{task.num_equal} of {task.num_questions} answers equal, exact match {task.accuracy:.3f}"
    return StageResult(stage="task", max_abs=float(differ), tolerance=0.0, passed=not differ, note=note)


def _as_good(task: TaskResult, share: float) -> StageResult:
    """Judges the questions lost on balance.  Were answers to change by chance alone, lost and gained would be the
    same number, and their difference would vary by the root of their sum (McNemar's test)."""
    lost = task.num_lost - task.num_gained
    allowed = share * task.num_questions + CHANCE * math.sqrt(task.num_lost + task.num_gained)
    note = (
        f"exact match {task.accuracy:.3f}, PyTorch {task.reference_accuracy:.3f}: {task.num_lost} answers lost, "
        f"{task.num_gained} gained of {task.num_questions}"
    )
    return StageResult(stage="task", max_abs=float(max(lost, 0)), tolerance=allowed, passed=lost <= allowed, note=note)
