"""The gate: a bundle against its golden tensors, with no PyTorch in sight."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgevlm.bundle.golden import load_golden
from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.errors import (
    DeviceError,
    EdgeVLMError,
    IntegrityError,
    MissingLibraryError,
    ParityError,
    UnsupportedError,
    UsageError,
)
from edgevlm.runtimes.choices import CHECKERS, DEFAULT_RUNTIME, Choices, PartChoice, Wishes, target_of, usual_choices
from edgevlm.runtimes.open import RUNTIMES, open_chosen
from edgevlm.runtimes.tuned import tuned_choices
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import find_bundle
from edgevlm.verify.cases import GoldenCase, golden_cases
from edgevlm.verify.stages import StageResult, worst
from edgevlm.verify.task import TaskResult, task_result, task_stage
from edgevlm.verify.thresholds import FLOATS, Combination, Computed
from edgevlm.verify.walk import begin, stages, whole_way

logger = logging.getLogger(__name__)

NO_WISHES = Wishes()
IN_PLACE = "in-place"  # the device by which a checking runtime takes the decoder that fills its cache itself


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared, with which result.

    ``precision`` is the decoder's; ``image_size`` pixels a side, where the bundle has several sizes.
    """

    bundle: str
    precision: str
    encoder_precision: str = "fp32"
    image_size: int | None = None
    runtime: Mapping[str, Any]
    stages: tuple[StageResult, ...]
    task: TaskResult | None
    passed: bool

    @property
    def combination(self) -> str:
        """The precisions of both halves, and picture size and kv cache where they need saying, as a sentence names
        them."""
        size = f" at {self.image_size} pixels" if self.image_size else ""
        cache = " in place" if self.runtime.get("kv_cache") == "in place" else ""
        return f"{self.encoder_precision} encoder with {self.precision} decoder{cache}{size}"

    @property
    def broken(self) -> StageResult | None:
        """The first stage that failed."""
        return next((result for result in self.stages if not result.passed), None)

    def require(self) -> Verification:
        """Itself when it passed; ParityError naming the first broken stage and the likely cause when not."""
        broken = self.broken
        if broken is None:
            return self
        exact = self.encoder_precision == self.precision == "fp32" and not self.image_size
        what = self.bundle if exact else f"{self.bundle}, {self.combination}"
        raise ParityError(
            f"{what}: stage {broken.stage} differs from PyTorch: {broken.complaint}. Likely {broken.cause}"
        )


def verify_bundle(path: Path | str, wishes: Wishes = NO_WISHES, *, check: bool = True) -> Verification:
    """Compare a bundle (folder or shipped name) with its golden tensors.

    What ``wishes`` leave open is the bundle's own default: what was tuned counts only where ``optimize`` asks for it.
    The task's questions are asked at the default picture size.  Raises what opening raises, with how else the bundle
    can be checked here; a difference is a result, not an exception: see ``Verification.require``.
    """
    bundle = read_bundle(find_bundle(path), check=check)
    return verify_chosen(bundle, _asked_for(bundle, wishes), image_size=wishes.image_size)


def verify_chosen(bundle: Bundle, choices: Choices, *, image_size: int | None = None, ask: bool = True) -> Verification:
    """``verify_bundle`` with exactly these ``choices`` of back ends, precisions and threads.

    ``ask``: also the task's questions.
    """
    root, manifest = bundle.root, bundle.manifest
    with _opened(bundle, choices, image_size) as vlm:
        combination, side = combination_of(vlm), vlm.processor.image_spec.height
        results = _compared(vlm, golden_cases(root, side), combination)
        sound = all(result.passed for result in results)
        asks = ask and sound and side == manifest.image.get("height")
        task = task_result(vlm, load_golden(root)[1], combination) if asks else None
        if task:
            results.append(task_stage(task, combination))
        return Verification(
            bundle=vlm.name,
            precision=combination.decoder.precision,
            encoder_precision=combination.encoder.precision,
            image_size=side if manifest.image_sizes else None,
            runtime=vlm.info,
            stages=tuple(results),
            task=task,
            passed=all(result.passed for result in results),
        )


def verify_all(path: Path | str, wishes: Wishes = NO_WISHES, *, check: bool = True) -> tuple[Verification, ...]:
    """``verify_bundle`` for the default combination of precisions, then each other precision of each half.

    At every picture size but the first, every encoder with the default decoder.  A runtime that checks what another
    one will run also tries decoders that fill their cache in place, if its library can.  Raises UsageError for
    ``wishes`` that name a precision or a size.
    """
    if wishes.encoder_precision or wishes.decoder_precision or wishes.image_size:
        raise UsageError(
            "all precisions and image sizes are verified, or those that are named: give either --all or a precision "
            "or size"
        )
    root = find_bundle(path)
    bundle = read_bundle(root, check=check)
    choices = _asked_for(bundle, wishes)
    found = [verify_bundle(root, one, check=False) for one in _every(bundle.manifest, wishes, choices)]
    if choices.decoder.runtime in CHECKERS.values() and wishes.device is None:
        found += _verified_in_place(bundle, wishes, choices)
    return tuple(found)


def _asked_for(bundle: Bundle, wishes: Wishes) -> Choices:
    usual = usual_choices(bundle.manifest)
    tuned = tuned_choices(bundle, wishes.optimize, known=RUNTIMES) if wishes.optimize else None
    return wishes.over(tuned or usual, usual)


def _opened(bundle: Bundle, choices: Choices, image_size: int | None) -> RuntimeVlm:
    """Where a runtime needs what is not here, a library, a device or its engines, the error says what does without."""
    checkers = [CHECKERS[one.runtime] for one in (choices.encoder, choices.decoder) if one.runtime in CHECKERS]
    try:
        return open_chosen(bundle, choices, image_size=image_size)
    except (MissingLibraryError, DeviceError, IntegrityError, UnsupportedError) as error:
        if not checkers:
            raise
        advice = f"without a device, `edgevlm verify {bundle.root} --runtime {checkers[0]}` checks it"
        raise _with_advice(error, advice) from error


def _with_advice(error: EdgeVLMError, advice: str) -> EdgeVLMError:
    """``error``, of its own class, with ``advice`` behind what it says."""
    if isinstance(error, MissingLibraryError):
        return MissingLibraryError(error.library, f"{error.fix}; {advice}", error.reason)
    return type(error)(f"{error}; {advice}")


def _every(manifest: Manifest, wishes: Wishes, choices: Choices) -> Iterator[Wishes]:
    """``wishes`` with everything that is there to be verified with the back ends of ``choices``."""
    encoder_target, decoder_target = (_target(choice) for choice in (choices.encoder, choices.decoder))
    pairs = combinations(manifest, encoder_target, decoder_target)
    for encoder, decoder in pairs:
        yield replace(wishes, encoder_precision=encoder, decoder_precision=decoder)
    for size in manifest.image_sizes[1:]:
        for encoder in _precisions(manifest, "vision_encoder", encoder_target):
            resized = replace(wishes, image_size=size.image_size)
            yield replace(resized, encoder_precision=encoder, decoder_precision=pairs[0][1])


def _verified_in_place(bundle: Bundle, wishes: Wishes, choices: Choices) -> Iterator[Verification]:
    """Every decoder that fills its cache in place; none, and said so, where the library lacks the operator.

    The task's questions were answered with the same weights.
    """
    beside = _partner(_precisions(bundle.manifest, "vision_encoder", _target(choices.encoder)))
    for part in bundle.manifest.parts:
        if (part.part, part.target) != ("decoder_model_merged", _target(choices.decoder)) or not part.in_place:
            continue
        one = replace(wishes, device=IN_PLACE, encoder_precision=beside, decoder_precision=part.precision)
        try:
            yield verify_chosen(bundle, _asked_for(bundle, one), ask=False)
        except UnsupportedError as error:
            logger.warning("%s is not checked: %s", part.in_place, error)


def _target(choice: PartChoice) -> str:
    return target_of(RUNTIMES[choice.runtime])


def combinations(
    manifest: Manifest, encoder_target: str = "onnx", decoder_target: str = "onnx"
) -> list[tuple[str, str]]:
    """Precisions of encoder and decoder: the defaults, then each other one beside a partner.

    A decoder's partner is the first float encoder, so that what is found is the decoder's; an encoder's is the
    default decoder.  Raises UnsupportedError where a half was not exported for its target.
    """
    encoders = _precisions(manifest, "vision_encoder", encoder_target)
    decoders = _precisions(manifest, "decoder_model_merged", decoder_target)
    partner = _partner(encoders)
    pairs = [
        (encoders[0], decoders[0]),
        *((partner, decoder) for decoder in decoders[1:]),
        *((encoder, decoders[0]) for encoder in encoders[1:]),
    ]
    return list(dict.fromkeys(pairs))


def _partner(encoders: Sequence[str]) -> str:
    """The first float one."""
    return next((precision for precision in encoders if precision in FLOATS), encoders[0])


def golden_answers_match(vlm: RuntimeVlm) -> str | None:
    """None when the model still answers its golden cases as it may, else the complaint.

    A benchmark times only what is right: greedy ids must be PyTorch's, or, where precisions round, the logits of the
    whole way near enough.  A model that was not opened from a bundle has nothing to be compared with, and passes.
    """
    root = vlm.info.get("bundle")
    if root is None:
        return None
    with vlm.exclusive() as session:
        for number, case in enumerate(golden_cases(Path(root), vlm.processor.image_spec.height)):
            for result in whole_way(begin(session, vlm, case, combination_of(vlm))):
                if not result.passed:
                    return f"golden case {number}: {result.note or result.complaint}"
    return None


def combination_of(vlm: RuntimeVlm) -> Combination:
    """What an opened bundle runs on, and in which precisions."""
    info, precisions = vlm.info, vlm.info.get("precisions", {})
    encoder, runtime = info.get("encoder", {}), str(info.get("runtime", DEFAULT_RUNTIME))
    return Combination(
        encoder=Computed(
            precision=encoder.get("precision") or precisions.get("vision_encoder", "fp32"),
            runtime=encoder.get("runtime", runtime),
        ),
        decoder=Computed(precision=precisions.get("decoder_model_merged", "fp32"), runtime=runtime),
        embedding=precisions.get("embed_tokens", "fp32"),
    )


def _precisions(manifest: Manifest, part: str, target: str) -> list[str]:
    """Those of ``part`` for ``target``.  Raises UnsupportedError where there is none."""
    manifest.part(part, target)
    return [file.precision for file in manifest.parts if (file.part, file.target) == (part, target)]


def _compared(vlm: RuntimeVlm, cases: Sequence[GoldenCase], combination: Combination) -> list[StageResult]:
    """Each stage's worst case."""
    by_stage: dict[str, list[StageResult]] = {}
    for result in _results(vlm, cases, combination):
        by_stage.setdefault(result.stage, []).append(result)
    return [worst(results) for results in by_stage.values()]


def _results(vlm: RuntimeVlm, cases: Sequence[GoldenCase], combination: Combination) -> Iterator[StageResult]:
    """A case ends at its first broken stage, since what follows would only repeat it."""
    with vlm.exclusive() as session:
        for case in cases:
            for result in stages(begin(session, vlm, case, combination)):
                yield result
                if not result.passed:
                    break
