"""One trial: a bundle opened as wished, in a process of its own, judged, timed and weighed.

A process of its own, because what one library allocated or kept spinning would be counted against the next one, and
because a back end that crashes must not take the others' results with it.  ``python -m edgevlm.bench.trial`` reads a
``Task`` from standard input and writes a ``Trial`` to standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from statistics import median

from edgevlm.bench.measurement import Workload
from edgevlm.bench.memory import watch_peak
from edgevlm.bench.workload import PROMPT, ask_once, scene_pictures
from edgevlm.core.config import from_mapping, to_json
from edgevlm.core.errors import EdgeVLMError
from edgevlm.runtimes.choices import Wishes
from edgevlm.runtimes.open import open_as_wished

NUM_WARM_UP = 2
WORK = "scene generator, a new picture each time"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Try the bundle at ``folder`` with these ``wishes``; ``judge``: it must pass the gate first."""

    folder: str
    wishes: Wishes
    judge: bool
    repetitions: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Medians in milliseconds (``decode_ms``: of one token) and the peak memory of the process in bytes.

    ``complaint``: why nothing was measured, None where it was.
    """

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    peak_bytes: int = 0
    complaint: str | None = None


def try_out(task: Task) -> Trial:
    """Run ``task`` in a process of its own; a failure of any kind becomes the trial's complaint."""
    command = [sys.executable, "-m", "edgevlm.bench.trial"]
    done = subprocess.run(command, input=to_json(task), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return Trial(complaint=f"the process ended with {done.returncode}: {last}")
    return from_mapping(Trial, json.loads(done.stdout), strict=True, where="trial")


def run(task: Task) -> Trial:
    """Judge, time and weigh in this process."""
    try:
        complaint = _complaint(task) if task.judge else None
        return Trial(complaint=complaint) if complaint else _measured(task)
    except EdgeVLMError as error:
        return Trial(complaint=str(error))


def _complaint(task: Task) -> str | None:
    """The gate's complaint, None when it passes."""
    from edgevlm.verify import verify_bundle

    broken = verify_bundle(task.folder, task.wishes, check=False).broken
    return None if broken is None else f"the gate: {broken.stage}: {broken.complaint}"


def _measured(task: Task) -> Trial:
    work = Workload(
        prompt=PROMPT, images=WORK, num_distinct_images=0, image_cache=False, num_new_tokens=task.max_tokens
    )
    with watch_peak() as peak, open_as_wished(task.folder, task.wishes, check=False) as vlm:
        image = vlm.processor.image_spec
        pictures = scene_pictures(max(image.height, image.width))
        answers = [ask_once(vlm, work, next(pictures)) for _ in range(NUM_WARM_UP + task.repetitions)][NUM_WARM_UP:]
    return Trial(
        vision_ms=median(one.stages_ms["vision"] + one.stages_ms["fuse"] for one in answers),
        prefill_ms=median(one.stages_ms["prefill"] for one in answers),
        decode_ms=median(one.stages_ms["decode"] / max(1, one.num_new_tokens - 1) for one in answers),
        peak_bytes=peak.peak_bytes,
    )


def main() -> None:
    """Read the task, answer with the trial."""
    task = from_mapping(Task, json.loads(sys.stdin.read()), strict=True, where="task")
    sys.stdout.write(to_json(run(task)))


if __name__ == "__main__":
    main()
