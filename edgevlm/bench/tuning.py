"""The best back end, precision and thread count for each half of a bundle on this machine, found by trying them.

Only what passes the parity gate here is taken.  Every candidate is judged, then timed, in processes of its own, all of
them once per round, so that a machine that slows down meanwhile slows all of them; the median over the rounds counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from edgevlm.bench.machine import device, versions
from edgevlm.bench.trial import Task, Trial, try_out
from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.config import to_plain
from edgevlm.core.errors import BenchmarkError, DeviceError, MissingLibraryError, UnsupportedError, UsageError
from edgevlm.core.hardware import compute_cores
from edgevlm.core.registry import unknown_name
from edgevlm.runtimes.choices import CHECKERS, GOALS, Choices, PartChoice, target_of, usual_choices
from edgevlm.runtimes.open import RUNTIMES
from edgevlm.runtimes.tuned import TunedMachine, machine_key, surroundings, write_tune
from edgevlm.shipped import find_bundle

logger = logging.getLogger(__name__)

HALVES = {"encoder": "vision_encoder", "decoder": "decoder_model_merged"}
CLOSE = 1.03  # a difference below 3 % is noise: then the choice nearer to the default is taken

Report = Callable[[str], None]  # told what is tried next


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate for one half, with the medians over all rounds; ``trial.complaint`` says why it was dropped."""

    half: str
    choice: PartChoice
    trial: Trial


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was tried and what came out best per goal; ``goal`` is the one that ``open_bundle`` follows unasked."""

    goal: str
    choices: Mapping[str, Choices]
    tried: tuple[Tried, ...]
    date: str


def tune_bundle(
    path: str | Path,
    *,
    optimize: str = "ttft",
    runtimes: Sequence[str] | None = None,
    rounds: int = 3,
    repetitions: int = 5,
    max_tokens: int = 32,
    check: bool = True,
    report: Report = lambda step: None,
) -> Tuning:
    """Try what is installed here on the bundle at ``path`` and say what is best for each of ``GOALS``.

    Raises UsageError for an unknown goal, UnsupportedError for an unknown runtime, BenchmarkError when nothing
    passes the gate.
    """
    if optimize not in GOALS:
        raise UsageError(unknown_name("goal", optimize, GOALS))
    if rounds < 1 or repetitions < 1 or max_tokens < 2:
        raise UsageError("rounds and repetitions must be 1 or more, max_tokens 2 or more")
    bundle = read_bundle(find_bundle(str(path)), check=check)
    usable = [name for name in RUNTIMES if name not in CHECKERS.values()]
    names = _installed(usable if runtimes is None else runtimes, required=runtimes is not None)
    task = Task(folder=str(bundle.root), choices=Choices(), judge=True, repetitions=repetitions, max_tokens=max_tokens)
    plan = _Plan(manifest=bundle.manifest, task=task, rounds=rounds, report=report)
    tried: list[Tried] = []
    for half in HALVES:
        first = plan.run(half, list(candidates(bundle.manifest, half, names)))
        if all(one.trial.complaint is not None for one in first):
            raise _nothing_passed(half, first, bundle)
        fewer = [replace(best, threads=count) for best in _winners(first) for count in _fewer_threads()]
        tried += [*first, *plan.run(half, fewer)]
    choices = {goal: plan.together(tried, goal) for goal in GOALS}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Tuning(goal=optimize, choices=choices, tried=tuple(tried), date=date)


def save(path: str | Path, tuning: Tuning) -> Path:
    """Write ``tuning`` for this machine to the bundle's tune.json; what it says of other machines stays."""
    bundle = read_bundle(find_bundle(str(path)), check=False)
    tuned = TunedMachine(
        holds_for=surroundings(bundle.root),
        machine={**device(), **versions()},
        goal=tuning.goal,
        choices=dict(tuning.choices),
        measurements=[to_plain(one) for one in tuning.tried],
        date=tuning.date,
    )
    return write_tune(bundle.root, tuned, key=machine_key(), manifest=bundle.manifest, known=RUNTIMES)


def candidates(manifest: Manifest, half: str, runtimes: Sequence[str]) -> Iterator[PartChoice]:
    """Every runtime with every precision that the bundle holds of ``half`` for its target, on all cores."""
    for runtime in runtimes:
        target = target_of(RUNTIMES.get(runtime))
        for part in manifest.parts:
            if (part.part, part.target) == (HALVES[half], target):
                yield PartChoice(runtime=runtime, precision=part.precision, threads=compute_cores())


def best_choice(tried: Sequence[Tried], half: str, goal: str) -> PartChoice:
    """The candidate for ``half`` that serves ``goal`` best; of several as good as each other the first one tried.

    One at least must have passed.
    """
    passed = [one for one in tried if one.half == half and one.trial.complaint is None]
    least = min(cost(one, goal) for one in passed)
    return next(one.choice for one in passed if cost(one, goal) <= least * CLOSE)


def _nothing_passed(half: str, tried: Sequence[Tried], bundle: Bundle) -> BenchmarkError:
    targets = dict.fromkeys(part.target for part in bundle.manifest.parts if part.part == HALVES[half])
    complaints = "; ".join(f"{one.choice.runtime} {one.choice.precision}: {one.trial.complaint}" for one in tried)
    complaints = complaints or f"no runtime here reads the {half} for {' or '.join(targets)}"
    return BenchmarkError(
        f"{bundle.root}: nothing that is installed here runs the {half} and passes the gate, so there is nothing "
        f"to choose ({complaints}): `edgevlm verify` shows every stage"
    )


def cost(one: Tried, goal: str) -> float:
    """What ``goal`` wants little of: milliseconds, or bytes."""
    if goal == "memory":
        return float(one.trial.peak_bytes)
    if one.half == "encoder":
        return one.trial.vision_ms
    return one.trial.prefill_ms + one.trial.decode_ms if goal == "ttft" else one.trial.decode_ms


def _installed(names: Sequence[str], *, required: bool) -> list[str]:
    """The runtimes that can be made here; one that was asked for by name must be."""
    found = []
    for name in names:
        try:
            RUNTIMES[name](threads=1)
        except (MissingLibraryError, UnsupportedError, DeviceError):
            if required:
                raise
        else:
            found.append(name)
    return found


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How candidates are tried: the task but for its wishes, how many rounds of it, and whom to tell."""

    manifest: Manifest
    task: Task
    rounds: int
    report: Report
    agreed: list[Choices] = field(default_factory=list)  # pairs that passed the gate together

    def run(self, half: str, choices: Sequence[PartChoice]) -> list[Tried]:
        """Every candidate judged, then timed once per round; one that was dropped is not tried again."""
        trials: dict[PartChoice, list[Trial]] = {choice: [] for choice in choices}
        for number in range(self.rounds + 1):
            step = f"round {number} of {self.rounds}" if number else "gate"
            for choice, done in trials.items():
                if done and done[-1].complaint is not None:
                    continue
                self.report(f"{step}: {half} on {described(choice)}")
                task = replace(self.task, choices=choices_for(half, choice, self.manifest), judge=number == 0)
                done.append(try_out(task))
        return [Tried(half=half, choice=choice, trial=_median(done)) for choice, done in trials.items()]

    def together(self, tried: Sequence[Tried], goal: str) -> Choices:
        """The best of each half, if the gate passes them together; else that decoder with the default encoder."""
        best = Choices(**{half: best_choice(tried, half, goal) for half in HALVES})
        judged = [choices_for(half, getattr(best, half), self.manifest) for half in HALVES]
        if best in (*judged, *self.agreed):
            return best
        self.report(f"{goal}: encoder on {described(best.encoder)}, decoder on {described(best.decoder)}")
        trial = try_out(replace(self.task, choices=best, judge=True))
        if trial.complaint is None:
            self.agreed.append(best)
            return best
        logger.warning("%s: together they do not pass (%s), so the encoder keeps its default", goal, trial.complaint)
        return judged[-1]


def described(choice: PartChoice) -> str:
    """``onnxruntime int4-b128, 2 threads``"""
    return f"{choice.runtime} {choice.precision}, {choice.threads} threads"


def choices_for(half: str, choice: PartChoice, manifest: Manifest) -> Choices:
    """``choice`` for one half, and for the other what runs where nothing was tuned, on as many threads."""
    other = "decoder" if half == "encoder" else "encoder"
    usual: PartChoice = getattr(usual_choices(manifest), other)
    precision = manifest.part(HALVES[other], target_of(RUNTIMES[usual.runtime])).precision
    return Choices(**{half: choice, other: replace(usual, precision=precision, threads=choice.threads)})


def _median(trials: Sequence[Trial]) -> Trial:
    """Of those that were timed: the first was judged."""
    if trials[-1].complaint is not None:
        return trials[-1]
    timed = trials[1:]
    return Trial(
        vision_ms=median(one.vision_ms for one in timed),
        prefill_ms=median(one.prefill_ms for one in timed),
        decode_ms=median(one.decode_ms for one in timed),
        peak_bytes=round(median(one.peak_bytes for one in timed)),
    )


def _winners(tried: Sequence[Tried]) -> list[PartChoice]:
    """The best candidates for any goal, once each."""
    return list(dict.fromkeys(best_choice(tried, tried[0].half, goal) for goal in GOALS))


def _fewer_threads() -> list[int]:
    """Half of the cores and one, where that is fewer than all."""
    return sorted({count for count in (1, compute_cores() // 2) if 0 < count < compute_cores()})
