"""The stages of a model in the order of its data flow, and how one is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsFloat, TypeAlias

import numpy as np
from numpy.typing import NDArray

Measure: TypeAlias = Literal["max_abs", "relative_l2", "kl"]

MEASURES = {  # as a sentence names them
    "max_abs": "largest difference",
    "relative_l2": "relative L2 error",
    "kl": "KL divergence in nats",
}
CAUSES = {
    "pixels": "the image specification is not the training one: size, fit, filter, rounding, mean or std",
    "image_features": "vision_encoder: a changed weight, a wrongly folded norm, or an operator that differs",
    "fp32_features": "vision_encoder: too much is lost by its precision; calibrate with pictures of its kind (--calib)",
    "input_ids": "tokenizer or chat template: the prompt becomes other ids",
    "inputs_embeds": "embed_tokens: changed or reordered rows",
    "fused_embeds": "fusion: a changed weight, its rotary positions, or the fusion_cache of vision_encoder",
    "prefill_logits": "decoder: a changed weight, other rotary positions (rope_theta), or the attention mask",
    "decode_logits": "decoder: the kv cache is read or written at the wrong place",
    "answer_logits": "too much is lost by these precisions together: take smaller blocks, or more bits for one half",
    "greedy_ids": "the parts agree one by one but not together: check the prompt, the vision rows and the stop tokens",
    "task": "answers differ although the stages agree: check the stop tokens and how answers end",
}


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One stage compared: what was measured, what was allowed, and other ways to read its size.

    ``measure`` says which of ``max_abs``, ``relative_l2`` and ``kl`` (nats) is judged: the one that ``tolerance``
    allows.  ``max_reference``: the largest absolute value of the reference.  ``kl`` and ``top1_agreement`` are for
    logits only.
    """

    stage: str
    max_abs: float
    tolerance: float
    passed: bool
    measure: Measure = "max_abs"
    max_reference: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    note: str = ""

    @property
    def found(self) -> float:
        """The value that is judged; infinity where there was nothing to measure."""
        found = {"max_abs": self.max_abs, "relative_l2": self.relative_l2, "kl": self.kl}[self.measure]
        return float("inf") if found is None else found

    @property
    def complaint(self) -> str:
        """What is wrong with it, as half a sentence."""
        note = f" ({self.note})" if self.note else ""
        return f"{MEASURES[self.measure]} {self.found:.3g}, allowed {self.tolerance:.3g}{note}"

    @property
    def cause(self) -> str:
        """What most likely broke, if this stage did."""
        return CAUSES[self.stage]


def compare(
    stage: str,
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    tolerance: float,
    measure: Measure = "max_abs",
) -> StageResult:
    """Compare two tensors of one shape; another shape or a value that is no number fails."""
    if reference.shape != candidate.shape:
        return failed(stage, tolerance, measure, f"shape {candidate.shape}, expected {reference.shape}")
    if not np.isfinite(candidate).all():
        return failed(stage, tolerance, measure, "holds NaN or infinity")
    expected, found = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    is_logits = stage.endswith("_logits")
    values = {
        "max_abs": float(np.abs(expected - found).max(initial=0.0)),
        "relative_l2": relative_l2(reference, candidate),
        "kl": _kl(reference, candidate) if is_logits else 0.0,
    }
    return StageResult(
        stage=stage,
        max_abs=values["max_abs"],
        tolerance=tolerance,
        passed=values[measure] <= tolerance,
        measure=measure,
        max_reference=float(np.abs(expected).max(initial=0.0)),
        relative_l2=values["relative_l2"],
        cosine=_ratio(np.dot(expected, found), np.linalg.norm(expected) * np.linalg.norm(found)),
        kl=values["kl"] if is_logits else None,
        top1_agreement=float(np.mean(reference.argmax(-1) == candidate.argmax(-1))) if is_logits else None,
    )


def relative_l2(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
    """The norm of the difference, relative to the reference's."""
    expected, found = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    return _ratio(np.linalg.norm(expected - found), np.linalg.norm(expected))


def failed(stage: str, tolerance: float, measure: Measure, note: str) -> StageResult:
    """A stage that gave nothing to compare, and why."""
    return StageResult(stage=stage, max_abs=float("inf"), tolerance=tolerance, passed=False, measure=measure, note=note)


def compare_ids(
    stage: str, reference: NDArray[np.int64], candidate: NDArray[np.int64], *, required: bool = True
) -> StageResult:
    """Compare two runs of token ids; ``max_abs`` counts the places that differ.

    Where they are not ``required`` to be equal, the count is only reported.
    """
    if reference.shape != candidate.shape:
        return failed(stage, 0.0, "max_abs", f"{len(candidate)} ids, expected {len(reference)}")
    differ = int((reference != candidate).sum())
    first = int(np.argmax(reference != candidate))
    note = f"{len(reference) - differ} of {len(reference)} ids equal" + (
        f", the first other at {first}" if differ else ""
    )
    allowed = 0 if required else len(reference)
    return StageResult(
        stage=stage, max_abs=float(differ), tolerance=float(allowed), passed=differ <= allowed, note=note
    )


def worst(results: Sequence[StageResult]) -> StageResult:
    """Of several comparisons of one stage, a failed one, else the one that uses most of what is allowed."""
    return max(results, key=lambda result: (not result.passed, result.found / (result.tolerance or 1.0)))


def _ratio(numerator: SupportsFloat, denominator: SupportsFloat) -> float:
    return float(numerator) / float(denominator) if float(denominator) else 0.0


def _kl(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
    """Mean over rows of KL(reference ‖ candidate) of the next-token distributions, in nats."""
    expected, found = _log_softmax(reference), _log_softmax(candidate)
    return max(0.0, float(np.mean((np.exp(expected) * (expected - found)).sum(-1))))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))
