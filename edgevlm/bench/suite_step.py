"""One step of a suite in a process of its own: load TensorRT, build the engines of a pair, verify it, or measure it.

The process reads a ``SuiteTask`` from standard input and writes a ``StepResult`` to standard output.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from edgevlm.bench.measurement import Measurement
from edgevlm.bench.measuring import measure
from edgevlm.bench.memory import Peak, watch_peak
from edgevlm.bench.stats import Summary, summarize
from edgevlm.bench.trial import in_own_process
from edgevlm.bench.workload import PROMPT, scene_pictures
from edgevlm.bundle.read import read_bundle
from edgevlm.core.config import from_mapping, to_json, to_plain
from edgevlm.core.errors import EdgeVLMError
from edgevlm.core.hardware import probe
from edgevlm.runtimes.choices import Choices
from edgevlm.runtimes.open import open_chosen
from edgevlm.runtimes.vlm import RuntimeVlm

MAIN = "from edgevlm.bench.suite_step import main; main()"
STAGES = {"vision_ms": ("vision", "fuse"), "prefill_ms": ("prefill",)}  # figure: stages of the clock that it adds up


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """Take ``step`` (load, build, verify or measure) with the bundle at ``folder`` and these ``choices``."""

    step: str
    folder: str
    choices: Choices
    repetitions: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Built:
    """The engines of a pair: where they lie, their bytes, and whether they were there already; all in ``seconds``."""

    seconds: float
    engines: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Proven:
    """What the parity gate said; ``verification`` is the whole result of `verify --json`."""

    passed: bool
    verification: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a pair costs.

    ``figures`` in milliseconds: ``vision_ms`` is the encoder with its fusion, ``prefill_ms`` the decoder's first run,
    the others are those of every measurement.  ``process_peak_bytes``: this process while it opened the bundle and
    answered once; ``system_peak_bytes``: by how much the machine's available memory fell meanwhile, which on a board
    counts the GPU's memory too, and other programs'.  ``gpu_clock_hz``: before and after the timed answers, None where
    nobody tells.  ``measurement`` is the whole result of `bench --json`.
    """

    figures: dict[str, Summary]
    process_peak_bytes: int
    system_peak_bytes: int
    gpu_clock_hz: tuple[int | None, int | None]
    measurement: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gave; ``complaint`` says why it gave nothing, or nothing that counts."""

    complaint: str | None = None
    built: Built | None = None
    proven: Proven | None = None
    measured: Measured | None = None


def take_step(task: SuiteTask) -> StepResult:
    """Run ``task`` in a process of its own; a failure of any kind becomes the complaint."""
    answer, complaint = in_own_process(MAIN, to_json(task))
    if complaint is not None:
        return StepResult(complaint=complaint)
    try:
        return from_mapping(StepResult, json.loads(answer), strict=True, where="step")
    except (ValueError, EdgeVLMError) as error:
        return StepResult(complaint=f"the process gave no result that can be read ({error})")


def run(task: SuiteTask) -> StepResult:
    """Take the step in this process."""
    try:
        return STEPS[task.step](task)
    except EdgeVLMError as error:
        return StepResult(complaint=f"{task.step}: {error}")


def _load(task: SuiteTask) -> StepResult:
    from edgevlm.runtimes.trt.api import load_tensorrt

    load_tensorrt()
    return StepResult()


def _build(task: SuiteTask) -> StepResult:
    from edgevlm.runtimes.trt.api import load_tensorrt
    from edgevlm.runtimes.trt.build import BuildOptions, build_engines, plan_build
    from edgevlm.runtimes.trt.device import find_device

    bundle, api, choices = read_bundle(task.folder, check=False), load_tensorrt(), task.choices
    options = BuildOptions(encoder_precision=choices.encoder.precision, decoder_precision=choices.decoder.precision)
    started = time.monotonic()
    plan = plan_build(bundle, options, api, find_device(api, None, planning=False))
    engines = build_engines(bundle, plan, options, api, room_now=lambda: find_device(api, None, planning=False).room)
    seconds = round(time.monotonic() - started, 1)
    return StepResult(built=Built(seconds=seconds, engines=tuple(to_plain(one) for one in engines)))


def _verify(task: SuiteTask) -> StepResult:
    from edgevlm.verify import verify_chosen

    found = verify_chosen(read_bundle(task.folder, check=False), task.choices)
    proven = Proven(passed=found.passed, verification=to_plain(found))
    broken = found.broken
    complaint = None if broken is None else f"verify: {broken.stage}: {broken.complaint}"
    return StepResult(complaint=complaint, proven=proven)


def _measure(task: SuiteTask) -> StepResult:
    bundle = read_bundle(task.folder, check=False)
    with watch_peak() as peak:  # before anything is timed: who watches takes time from who answers
        vlm = open_chosen(bundle, task.choices)
        image = vlm.processor.image_spec
        picture = next(scene_pictures(max(image.height, image.width)))
        vlm.ask(picture.source, PROMPT, max_tokens=task.max_tokens, use_image_cache=False)
    with vlm:
        return StepResult(measured=_measured(vlm, task, peak))


def _measured(vlm: RuntimeVlm, task: SuiteTask, peak: Peak) -> Measured:
    before = _gpu_clock_hz()
    command = shlex.join(["edgevlm", *sys.argv[1:]])
    found = measure(vlm, repetitions=task.repetitions, max_tokens=task.max_tokens, command=command)
    return Measured(
        figures=figures_of(found),
        process_peak_bytes=peak.peak_bytes,
        system_peak_bytes=peak.system_bytes,
        gpu_clock_hz=(before, _gpu_clock_hz()),
        measurement=to_plain(found),
    )


def figures_of(measurement: Measurement) -> dict[str, Summary]:
    """The headline figures, and those of ``STAGES``, in milliseconds."""
    times = [one.stages_ms for one in measurement.repetitions]
    added = {name: [sum(one.get(stage, 0.0) for stage in stages) for one in times] for name, stages in STAGES.items()}
    headline = {name: found for name, found in measurement.series().items() if not name.startswith("stage.")}
    return {name: summarize(values) for name, values in {**added, **headline}.items()}


def _gpu_clock_hz() -> int | None:
    jetson = probe().jetson
    return jetson.gpu_clock.now_hz if jetson else None


STEPS = {"load": _load, "build": _build, "verify": _verify, "measure": _measure}


def main() -> None:
    """Read the task, answer with the result."""
    task = from_mapping(SuiteTask, json.loads(sys.stdin.read()), strict=True, where="task")
    with redirect_stdout(sys.stderr):  # whatever a library prints
        found = run(task)
    sys.stdout.write(to_json(found))
