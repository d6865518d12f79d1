"""The stages of a model in the order of its data flow, and how one is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from numpy.typing import NDArray

CAUSES = {
    "pixels": "the image specification is not the training one: size, fit, filter, rounding, mean or std",
    "image_features": "vision_encoder: a changed weight, a wrongly folded norm, or an operator that differs",
    "input_ids": "tokenizer or chat template: the prompt becomes other ids",
    "inputs_embeds": "embed_tokens: changed or reordered rows",
    "fused_embeds": "fusion: a changed weight, its rotary positions, or the fusion_cache of vision_encoder",
    "prefill_logits": "decoder: a changed weight, other rotary positions (rope_theta), or the attention mask",
    "decode_logits": "decoder: the kv cache is read or written at the wrong place",
    "greedy_ids": "the parts agree one by one but not together: check the prompt, the vision rows and the stop tokens",
    "task": "answers differ although the stages agree: check the stop tokens and how answers end",
}


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One stage compared: the largest difference, and ways to read its size.

    ``max_reference``: the largest absolute value of the reference, with which ``tolerance`` grows.  ``kl`` (nats)
    and ``top1_agreement`` are for logits only.
    """

    stage: str
    max_abs: float
    tolerance: float
    passed: bool
    max_reference: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    note: str = ""

    @property
    def cause(self) -> str:
        """What most likely broke, if this stage did."""
        return CAUSES[self.stage]


def compare(
    stage: str, reference: NDArray[np.float32], candidate: NDArray[np.float32], tolerance: float
) -> StageResult:
    """Compare two tensors of one shape; another shape or a value that is no number fails."""
    if reference.shape != candidate.shape:
        note = f"shape {candidate.shape}, expected {reference.shape}"
        return StageResult(stage=stage, max_abs=float("inf"), tolerance=tolerance, passed=False, note=note)
    if not np.isfinite(candidate).all():
        note = "holds NaN or infinity"
        return StageResult(stage=stage, max_abs=float("inf"), tolerance=tolerance, passed=False, note=note)
    expected, found = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    max_abs = float(np.abs(expected - found).max(initial=0.0))
    is_logits = stage.endswith("_logits")
    return StageResult(
        stage=stage,
        max_abs=max_abs,
        tolerance=tolerance,
        passed=max_abs <= tolerance,
        max_reference=float(np.abs(expected).max(initial=0.0)),
        relative_l2=_ratio(np.linalg.norm(expected - found), np.linalg.norm(expected)),
        cosine=_ratio(np.dot(expected, found), np.linalg.norm(expected) * np.linalg.norm(found)),
        kl=_kl(reference, candidate) if is_logits else None,
        top1_agreement=float(np.mean(reference.argmax(-1) == candidate.argmax(-1))) if is_logits else None,
    )


def compare_ids(stage: str, reference: NDArray[np.int64], candidate: NDArray[np.int64]) -> StageResult:
    """Compare two runs of token ids; ``max_abs`` counts the places that differ."""
    if reference.shape != candidate.shape:
        note = f"{len(candidate)} ids, expected {len(reference)}"
        return StageResult(stage=stage, max_abs=float("inf"), tolerance=0.0, passed=False, note=note)
    differ = int((reference != candidate).sum())
    first = int(np.argmax(reference != candidate))
    note = f"{len(reference) - differ} of {len(reference)} ids equal" + (
        f", the first other at {first}" if differ else ""
    )
    return StageResult(stage=stage, max_abs=float(differ), tolerance=0.0, passed=not differ, note=note)


def worst(results: Sequence[StageResult]) -> StageResult:
    """Of several comparisons of one stage, a failed one, else the one that uses most of what is allowed."""
    return max(results, key=lambda result: (not result.passed, result.max_abs / (result.tolerance or 1.0)))


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
