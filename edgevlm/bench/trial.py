"""One trial: a bundle opened in one way, in a process of its own, and judged, or timed and weighed.

A process of its own, because what one library allocated or kept spinning would be counted against the next one, and
because a back end that crashes must not take the others' results with it.  It reads a ``Task`` from standard input
and writes a ``Trial`` to standard output.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from statistics import median

from edgevlm.bench.measurement import Workload
from edgevlm.bench.memory import watch_peak
from edgevlm.bench.workload import PROMPT, ask_once, scene_pictures
from edgevlm.bundle.read import read_bundle
from edgevlm.core.config import from_mapping, to_json
from edgevlm.core.errors import EdgeVLMError
from edgevlm.runtimes.choices import Choices
from edgevlm.runtimes.open import open_chosen

NUM_WARM_UP = 2
TIMEOUT_S = 2 * 3600  # the gate's questions, on a slow board, with a large model: what takes longer has hung
MAIN = "from edgevlm.bench.trial import main; main()"
WORK = "scene generator, a new picture each time"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Try the bundle at ``folder`` with these ``choices``; ``judge``: ask only whether it passes the gate."""

    folder: str
    choices: Choices
    judge: bool
    repetitions: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Medians in milliseconds (``decode_ms``: of one token) and the peak memory of the process in bytes.

    ``complaint``: why there is nothing to count, None where all went well.  One that was only judged has no figures.
    """

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    peak_bytes: int = 0
    complaint: str | None = None


def try_out(task: Task) -> Trial:
    """Run ``task`` in a process of its own; a failure of any kind becomes the trial's complaint."""
    answer, complaint = in_own_process(MAIN, to_json(task))
    if complaint is not None:
        return Trial(complaint=complaint)
    try:
        return from_mapping(Trial, json.loads(answer), strict=True, where="trial")
    except (ValueError, EdgeVLMError) as error:
        return Trial(complaint=f"the process gave no result that can be read ({error})")


def in_own_process(main: str, request: str) -> tuple[str, str | None]:
    """What ``main``, lines of Python, answers to ``request`` in a process of its own, or the complaint."""
    # It imports from where this process does, so that no file of the current folder stands in for a module.
    command = [sys.executable, "-X", "utf8", "-c", f"import sys; sys.path[:] = {sys.path!r}; {main}"]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return "", f"no result within {TIMEOUT_S // 3600} hours"
    except OSError as error:
        return "", f"no process could be started: {error.strerror or error}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return "", f"the process {_ending(done.returncode)}: {last}"
    return done.stdout, None


def run(task: Task) -> Trial:
    """Judge, or time and weigh, in this process."""
    try:
        return Trial(complaint=_complaint(task)) if task.judge else _measured(task)
    except EdgeVLMError as error:
        return Trial(complaint=str(error))


def _ending(code: int) -> str:
    """``was ended by SIGKILL``, which is also how Linux frees memory."""
    if code > 0:
        return f"ended with {code}"
    return f"was ended by {signal.Signals(-code).name if -code in set(signal.Signals) else -code}"


def _complaint(task: Task) -> str | None:
    """The gate's complaint, None when it passes."""
    from edgevlm.verify import verify_chosen

    broken = verify_chosen(read_bundle(task.folder, check=False), task.choices).broken
    return None if broken is None else f"the gate: {broken.stage}: {broken.complaint}"


def _measured(task: Task) -> Trial:
    work = Workload(
        prompt=PROMPT, images=WORK, num_distinct_images=0, image_cache=False, num_new_tokens=task.max_tokens
    )
    with watch_peak() as opening:
        vlm = open_chosen(read_bundle(task.folder, check=False), task.choices)
    with vlm:
        image = vlm.processor.image_spec
        pictures = scene_pictures(max(image.height, image.width))
        answers = [ask_once(vlm, work, next(pictures)) for _ in range(NUM_WARM_UP + task.repetitions)][NUM_WARM_UP:]
        with watch_peak() as answering:  # one more, since who watches takes time from who answers
            ask_once(vlm, work, next(pictures))
    return Trial(
        vision_ms=median(one.stages_ms["vision"] + one.stages_ms["fuse"] for one in answers),
        prefill_ms=median(one.stages_ms["prefill"] for one in answers),
        decode_ms=median(one.stages_ms["decode"] / max(1, one.num_new_tokens - 1) for one in answers),
        peak_bytes=max(opening.peak_bytes, answering.peak_bytes),
    )


def main() -> None:
    """Read the task, answer with the trial."""
    task = from_mapping(Task, json.loads(sys.stdin.read()), strict=True, where="task")
    with redirect_stdout(sys.stderr):  # whatever a library prints
        found = run(task)
    sys.stdout.write(to_json(found))
