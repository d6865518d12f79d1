"""A suite: one command on a board that looks at it, builds what lacks, proves every precision and measures it.

Each step runs in a process of its own (``suite_step``), so that memory is counted for one precision alone and a step
that crashes takes no other with it.  The result is one JSON file, ``SuiteResult``, which holds every raw value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from edgevlm.bench.machine import versions
from edgevlm.bench.suite_step import Built, Measured, Proven, SuiteTask, take_step
from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.config import to_json
from edgevlm.core.errors import BenchmarkError, MissingLibraryError, UnsupportedError
from edgevlm.core.files import write_text
from edgevlm.core.hardware import Hardware, probe
from edgevlm.core.jetson import jetson_advice
from edgevlm.core.optional import fix_command
from edgevlm.core.registry import unknown_name
from edgevlm.runtimes.choices import CHECKERS, Choices, Wishes, target_of, usual_choices
from edgevlm.runtimes.open import RUNTIMES
from edgevlm.runtimes.tuned import sums_hash
from edgevlm.shipped import find_bundle
from edgevlm.verify.gate import combinations

SCHEMA_VERSION = 1
SUITES = ("jetson",)
TENSORRT = "tensorrt"

Report = Callable[[str], None]  # told what is done next


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """One precision of each half: built where TensorRT runs it, proven, measured.

    The first ``complaint`` ends it, and what would have come after is None; None without one.
    """

    encoder_precision: str
    decoder_precision: str
    choices: Choices
    complaint: str | None = None
    built: Built | None = None
    proven: Proven | None = None
    measured: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What one run of a suite found; the JSON file holds exactly these fields, times in ms and sizes in bytes.

    ``advice``: what `edgevlm doctor` said against this machine beforehand, such as a low power mode; empty is good.
    """

    schema: int
    suite: str
    started: str  # ISO 8601, UTC
    bundle: str
    bundle_sha256: str | None  # of the bundle's SHA256SUMS file
    hardware: Hardware
    advice: tuple[str, ...]
    versions: Mapping[str, str]
    repetitions: int
    max_tokens: int
    pairs: tuple[PairResult, ...]


@dataclass(frozen=True, kw_only=True)
class SuitePlan:
    """What a suite is told: its name, how often and how long it asks, and whether any machine will do."""

    suite: str = SUITES[0]
    wishes: Wishes = field(default_factory=Wishes)
    repetitions: int = 20
    max_tokens: int = 32
    any_device: bool = False
    check: bool = True


def run_suite(path: str | Path, plan: SuitePlan, *, report: Report = lambda step: None) -> SuiteResult:
    """Build, verify and measure every precision of the bundle at ``path`` (or those that ``plan.wishes`` name).

    Raises UnsupportedError for a suite that nobody knows and on a machine that is no Jetson, unless ``any_device``;
    MissingLibraryError where TensorRT is wanted and lacks.  What goes wrong with one pair is its ``complaint``.
    """
    if plan.suite not in SUITES:
        raise UnsupportedError(unknown_name("suite", plan.suite, SUITES))
    hardware = probe()
    if hardware.jetson is None and not plan.any_device:
        raise UnsupportedError(
            f"the suite {plan.suite} is for a Jetson, this machine is {hardware.board or hardware.cpu.model}: "
            "run it on the board, or try it here with --any-device"
        )
    bundle = read_bundle(find_bundle(str(path)), check=plan.check)
    advice = jetson_advice(hardware.jetson, hardware.memory.total_bytes) if hardware.jetson else ()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    choices = pairs_of(bundle.manifest, plan, complaint=_tensorrt_complaint(bundle, plan))
    pairs = [_pair(bundle, plan, pair, report) for pair in choices]
    return SuiteResult(
        schema=SCHEMA_VERSION,
        suite=plan.suite,
        started=started,
        bundle=bundle.manifest.name,
        bundle_sha256=sums_hash(bundle.root),
        hardware=hardware,
        advice=tuple(advice),
        versions=versions(),
        repetitions=plan.repetitions,
        max_tokens=plan.max_tokens,
        pairs=tuple(pairs),
    )


def pairs_of(manifest: Manifest, plan: SuitePlan, *, complaint: str | None = None) -> list[Choices]:
    """What is tried: every precision of each half beside a partner, as `verify --all` pairs them, or those wished for.

    ``complaint``: why TensorRT does not load here.  Raises MissingLibraryError where the bundle is for TensorRT then;
    ``any_device`` takes the runtime that checks such bundles on the CPU instead.
    """
    wishes = plan.wishes
    if complaint is not None and not plan.any_device:
        raise MissingLibraryError(TENSORRT, fix_command(TENSORRT), f"cannot be used ({complaint})")
    if complaint is not None:
        wishes = replace(wishes, runtime=CHECKERS[TENSORRT])
    chosen = wishes.over(usual_choices(manifest), usual_choices(manifest))
    targets = [target_of(RUNTIMES[name]) for name in _runtimes(chosen)]
    pairs = [
        (wishes.encoder_precision or encoder, wishes.decoder_precision or decoder)
        for encoder, decoder in combinations(manifest, *targets)
    ]
    return [
        Choices(encoder=replace(chosen.encoder, precision=encoder), decoder=replace(chosen.decoder, precision=decoder))
        for encoder, decoder in dict.fromkeys(pairs)
    ]


def write_suite(path: Path, result: SuiteResult) -> None:
    """Write ``result`` to ``path``, whole or not at all."""
    write_text(path, to_json(result))


def require_figures(result: SuiteResult) -> None:
    """Raises BenchmarkError where no pair could be measured."""
    if all(pair.complaint for pair in result.pairs):
        complaints = "; ".join(f"{_named(pair.choices)}: {pair.complaint}" for pair in result.pairs)
        raise BenchmarkError(f"{result.bundle}: nothing could be measured ({complaints})")


def _pair(bundle: Bundle, plan: SuitePlan, choices: Choices, report: Report) -> PairResult:
    """Build where TensorRT runs it, verify, measure; the first complaint ends it."""
    found = PairResult(
        encoder_precision=choices.encoder.precision or "",
        decoder_precision=choices.decoder.precision or "",
        choices=choices,
    )
    for step in (*(("build",) if TENSORRT in _runtimes(choices) else ()), "verify", "measure"):
        report(f"{step}: {_named(choices)}")
        task = _task(bundle, plan, choices, step)
        gave = {name: value for name, value in vars(take_step(task)).items() if value is not None}
        found = replace(found, **gave)
        if found.complaint is not None:
            break
    return found


def _tensorrt_complaint(bundle: Bundle, plan: SuitePlan) -> str | None:
    """Why TensorRT does not load, tried in a process of its own; None where it does or nobody wants it unasked."""
    usual = usual_choices(bundle.manifest)
    if plan.wishes.runtime or TENSORRT not in _runtimes(usual):
        return None
    return take_step(_task(bundle, plan, usual, "load")).complaint


def _task(bundle: Bundle, plan: SuitePlan, choices: Choices, step: str) -> SuiteTask:
    folder = str(bundle.root)
    return SuiteTask(
        step=step, folder=folder, choices=choices, repetitions=plan.repetitions, max_tokens=plan.max_tokens
    )


def _runtimes(choices: Choices) -> tuple[str, str]:
    return choices.encoder.runtime, choices.decoder.runtime


def _named(choices: Choices) -> str:
    return f"{choices.encoder.precision} encoder, {choices.decoder.precision} decoder"
