"""How far a bundle may be from PyTorch, per precision and stage.  Each number stands with its reason.

Three questions, of which float32 has only the first:

    is it this model?        each stage against its reference.  For rounded weights that is PyTorch with the same
                             rounding (the "own reference"), and how far rounding moves it sets the limit
    how much is lost?        ``answer_logits``, the whole way from pixels, against PyTorch float32: KL divergence
    does it matter?          ``task``: right answers lost, against PyTorch float32

Rows of the table are kinds of precision; a float file counts as bf16 where it says so or the runtime computes in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import UnsupportedError
from edgevlm.runtimes.choices import DEFAULT_RUNTIME


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Largest difference that passes, a fixed part and one per unit of the largest value, and the reason for both.

    Rounding errors grow with the numbers that are rounded.
    """

    max_abs: float
    relative: float = 0.0
    reason: str

    @property
    def measure(self) -> Literal["max_abs"]:
        return "max_abs"

    def allowed(self, reference: NDArray[np.float32]) -> float:
        """The largest absolute difference to ``reference`` that passes."""
        return self.max_abs + self.relative * float(np.abs(reference).max(initial=0.0))


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The largest relative L2 error, or KL divergence in nats, that passes, whatever the size of the numbers."""

    measure: Literal["relative_l2", "kl"] = "relative_l2"
    limit: float
    reason: str

    def allowed(self, reference: NDArray[np.float32]) -> float:
        """The limit; the same for every reference."""
        return self.limit


Rule: TypeAlias = Threshold | Limit
Rules: TypeAlias = Mapping[str, Rule]

SUMS = 1e-5  # of the largest value: 80 roundings of float32; a decoder of 30 layers uses a quarter of it
HALF = 2.0**-11  # half a step of float16, relative to the value

FP32: Mapping[str, Threshold] = {
    "pixels": Threshold(
        max_abs=1.02 / 255,
        reason="one level of 255, where another Pillow rounds the other way; divided by the std",
    ),
    "pixels_mean": Threshold(
        max_abs=0.05 / 255, reason="rounding has no direction: a shift in the mean is a wrong spec"
    ),
    "image_features": Threshold(
        max_abs=2e-5, relative=SUMS, reason="sums in another order; 4e-7 of the largest value is usual"
    ),
    "inputs_embeds": Threshold(max_abs=0.0, reason="a row look-up computes nothing"),
    "fused_embeds": Threshold(max_abs=2e-5, relative=SUMS, reason="as image features, through the fusion's layers"),
    "prefill_logits": Threshold(
        max_abs=2e-5, relative=SUMS, reason="sums in another order; 1e-6 of the largest logit is usual"
    ),
    "decode_logits": Threshold(max_abs=2e-5, relative=SUMS, reason="as prefill, through the kv cache"),
}

HALF_ROWS = Threshold(max_abs=2.0**-25, relative=HALF, reason="rows kept in float16: half a step of each value")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one half may do in a kind of precision.

    ``stage``: its features or logits against their reference (its own one for rounded weights, else float32).
    ``total``: its features against float32, where the reference is its own (encoder only).  ``answer``: its share in
    the divergence of answers.  ``task``: the share of questions that it may lose, beyond chance.
    """

    stage: Limit
    total: Limit | None = None
    answer: Limit
    task: float


# "usual" below: the trained `nano` (4 layers) first, then a decoder of 24 layers of random weights, on x86-64; for fp8,
# int8-static and nvfp4 nano alone.
BF16_STAGE = Limit(limit=0.03, reason="8 bits of mantissa: 2^-9 a rounding, which adds up; 0.003 is usual")
BF16_ANSWER = Limit(measure="kl", limit=0.02, reason="3e-5 nats are usual; models of billions of weights reach 0.005")
FP16_STAGE = Limit(limit=0.01, reason="11 bits of mantissa: 2^-12 a rounding, which adds up; 0.001 to 0.002 is usual")
FP16_ANSWER = Limit(measure="kl", limit=0.005, reason="under 1e-6 nats is usual; more means overflow or a lost weight")
CAP = Limit(
    limit=0.15,
    reason="however much rounding moves a model, what is broken moves it more: swapped halves of bytes, shifted blocks "
    "or rows, scales in another order by 0.1 to 2",
)

ENCODERS: Mapping[str, Row] = {
    "fp16": Row(stage=FP16_STAGE, answer=FP16_ANSWER, task=0.005),
    "bf16": Row(stage=BF16_STAGE, answer=BF16_ANSWER, task=0.005),
    "int8": Row(
        stage=CAP,
        total=Limit(limit=0.2, reason="0.018 and 0.06 are usual; at 0.2 the cosine is 0.98, and answers change"),
        answer=Limit(measure="kl", limit=0.05, reason="2e-4 and 1e-3 nats are usual; 0.05 changes one answer in ten"),
        task=0.015,
    ),
    "fp8": Row(
        stage=CAP,
        total=Limit(limit=0.2, reason="0.024 to 0.032 is usual: 3 bits of mantissa round by 2^-5; as int8 from there"),
        answer=Limit(measure="kl", limit=0.05, reason="0.0014 nats are usual; 0.05 changes one answer in ten"),
        task=0.015,
    ),
}

DECODERS: Mapping[str, Row] = {
    "fp16": Row(stage=FP16_STAGE, answer=FP16_ANSWER, task=0.005),
    "bf16": Row(stage=BF16_STAGE, answer=BF16_ANSWER, task=0.005),
    "int8": Row(
        stage=CAP,
        answer=Limit(measure="kl", limit=0.01, reason="5e-5 and 1e-4 nats are usual; GGUF's Q8_0 is held to as much"),
        task=0.005,
    ),
    "int8-dynamic": Row(
        stage=CAP,
        answer=Limit(
            measure="kl",
            limit=0.1,
            reason="0.002 and 2e-4 nats are usual; one scale for a whole call costs more where single inputs are large",
        ),
        task=0.01,
    ),
    "int4": Row(
        stage=CAP,
        answer=Limit(
            measure="kl",
            limit=0.3,
            reason="0.004 to 0.008 nats are usual; of a model of half a billion weights Q4_0 loses some 0.1, and the "
            "mean over nine rows varies by as much again",
        ),
        task=0.015,
    ),
    "int8-static": Row(
        stage=CAP,
        answer=Limit(
            measure="kl",
            limit=0.1,
            reason="0.003 nats are usual; one scale for all tokens costs more where single inputs are large",
        ),
        task=0.015,
    ),
    "fp8": Row(
        stage=CAP,
        answer=Limit(measure="kl", limit=0.05, reason="4e-4 nats are usual, nearly all from the activations"),
        task=0.015,
    ),
    "nvfp4": Row(
        stage=CAP,
        answer=Limit(
            measure="kl",
            limit=0.2,
            reason="0.001 nats are usual, 0.004 as nvfp4-rtn: blocks of 16 lose less than int4's of 128",
        ),
        task=0.015,
    ),
}

FLOOR = 5e-3  # relative L2: an engine may round activations in groups of its own, which moves logits by 0.004 to 0.009
APART = 1.5  # two engines that round in different places differ by the root of 2, if each rounds at random

FLOATS = ("fp32", "fp16", "bf16")
BF16_RUNTIME = "-bf16"  # how the names of runtimes end that compute in bf16


def within(rule: Rule, spread: float, computed: Computed) -> Rule:
    """What an engine may differ by, where rounding alone moves the numbers by ``spread`` (relative L2).

    A number near the edge between two codes falls to either side, and what follows differs as if it had been rounded
    anew: two right engines may be as far apart as rounded and unrounded are.
    """
    if isinstance(rule, Threshold) or rule.measure != "relative_l2":
        return rule
    floor = BF16_STAGE.limit if computed.in_bf16 else FP16_STAGE.limit if computed.rest_in_half else FLOOR
    return replace(rule, limit=min(rule.limit, floor + APART * spread))


@dataclass(frozen=True, kw_only=True)
class Computed:
    """In which precision a half is stored, and on which runtime it runs."""

    precision: str = "fp32"
    runtime: str = DEFAULT_RUNTIME

    @property
    def in_bf16(self) -> bool:
        return self.precision == "bf16" or self.runtime.endswith(BF16_RUNTIME)

    @property
    def rounds(self) -> bool:
        """Whether weights are codes, so that float32 is no reference for a kernel."""
        return self.precision not in FLOATS

    @property
    def rest_in_half(self) -> bool:
        """Whether all is computed in float16 that is not rounded further: graphs for TensorRT say so."""
        return self.runtime.startswith("tensorrt")

    @property
    def kind(self) -> str:
        """The row of the table: a weight-only precision without its blocks, a float one as it is computed."""
        kind = self.precision.split("-b")[0].removesuffix("-rtn")
        return "bf16" if self.in_bf16 and kind in FLOATS else kind


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How both halves, and the embedding, are stored and run."""

    encoder: Computed = Computed()
    decoder: Computed = Computed()
    embedding: str = "fp32"

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded, so that answers must be PyTorch's token by token."""
        return (self.encoder.kind, self.decoder.kind, self.embedding) == ("fp32", "fp32", "fp32")

    @property
    def task(self) -> float:
        """The share of questions that may be lost beyond chance: the larger one of the halves'."""
        rows = (_row(ENCODERS, self.encoder), _row(DECODERS, self.decoder))
        return max((row.task for row in rows if row is not None), default=0.0)

    def rules(self) -> Rules:
        """What is allowed, by stage.  Raises UnsupportedError for a precision that the table does not know."""
        encoder, decoder = _row(ENCODERS, self.encoder), _row(DECODERS, self.decoder)
        rules: dict[str, Rule] = dict(FP32)
        if self.embedding != "fp32":
            rules["inputs_embeds"] = HALF_ROWS
        if encoder is not None:
            rules |= {"image_features": encoder.stage, "fused_embeds": encoder.total or encoder.stage}
            rules |= {"fp32_features": encoder.total} if encoder.total else {}
        if decoder is not None:
            rules |= {"prefill_logits": decoder.stage, "decode_logits": decoder.stage}
        if not self.is_exact:
            rules["answer_logits"] = _sum([row.answer for row in (encoder, decoder) if row is not None])
        return rules


def _row(table: Mapping[str, Row], computed: Computed) -> Row | None:
    """None for fp32, which has thresholds of its own."""
    if computed.kind == "fp32":
        return None
    if computed.kind not in table:
        known = ", ".join(("fp32", *table))
        raise UnsupportedError(f"no parity thresholds for precision {computed.precision!r}; known: {known}")
    return table[computed.kind]


def _sum(limits: list[Limit]) -> Limit:
    """Each half may use up its own share; half rows of the embedding alone have none."""
    if not limits:
        return DECODERS["fp16"].answer
    reason = "; ".join(limit.reason for limit in limits)
    return Limit(measure="kl", limit=sum(limit.limit for limit in limits), reason=reason)
