"""One golden case, stage by stage, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from edgevlm.core.errors import EdgeVLMError, InputError, IntegrityError
from edgevlm.processing.picture import Picture
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.embedding import CachedEncoder
from edgevlm.runtimes.prompt_rows import PromptRows
from edgevlm.runtimes.session import Float, Ints, Session
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.verify import golden
from edgevlm.verify.cases import GoldenCase
from edgevlm.verify.stages import StageResult, compare, compare_ids, failed, relative_l2
from edgevlm.verify.thresholds import FP32, Combination, Rule, Rules, within

LOGITS = ("prefill_logits", "decode_logits")


@dataclass(frozen=True, eq=False, kw_only=True)
class Walk:
    """A case on its way through a session, with what is allowed to the combination that runs it."""

    session: Session
    processor: Processor
    case: GoldenCase
    prompt: PromptRows
    encode: CachedEncoder
    combination: Combination
    rules: Rules

    @property
    def given(self) -> list[int]:
        """The tokens whose logits were recorded: float32's own, whatever this session would choose."""
        tensors = self.case.tensors
        ids: list[int] = tensors["greedy_ids"][: len(tensors["decode_logits"])].tolist()
        return ids

    def close(
        self, stage: str, reference: Float, compute: Callable[[], Float], rule: Rule | None = None
    ) -> StageResult:
        """Compare what ``compute`` gives, by the stage's rule or another; an engine that gives up is the result."""
        rule = rule or self.rules[stage]
        allowed = rule.allowed(reference)
        try:
            return compare(stage, reference, compute(), allowed, rule.measure)
        except EdgeVLMError as error:
            return failed(stage, allowed, rule.measure, str(error))


def begin(session: Session, vlm: RuntimeVlm, case: GoldenCase, combination: Combination) -> Walk:
    """The case before its first stage."""
    return Walk(
        session=session,
        processor=vlm.processor,
        case=case,
        prompt=golden.prompt_of(vlm, case.tensors["input_ids"], case.tensors["pixel_values"]),
        encode=golden.encoder(session),
        combination=combination,
        rules=combination.rules(),
    )


def stages(walk: Walk) -> Iterator[StageResult]:
    """Every stage; all but ``fused_embeds`` and the last two read golden inputs, so a fault stays where it is."""
    picture = _prepared(walk.processor, walk.case)
    yield _pixels(walk, picture)
    yield from _features(walk)
    found = golden.input_ids(walk.processor, walk.case.prompt, picture.grid)
    yield compare_ids("input_ids", walk.case.tensors["input_ids"], found)
    yield from _text_rows(walk)
    yield from _logits(walk)
    yield from whole_way(walk)


def whole_way(walk: Walk) -> Iterator[StageResult]:
    """From pixels to an answer: token by token PyTorch's, or as close to its distributions as the precisions allow."""
    expected = walk.case.tensors["greedy_ids"]
    if not walk.combination.is_exact:
        yield _answer_logits(walk)
    yield compare_ids("greedy_ids", expected, _greedy(walk, len(expected)), required=walk.combination.is_exact)


def _prepared(processor: Processor, case: GoldenCase) -> Picture:
    """The case's picture, as this machine prepares it."""
    try:
        return processor.prepare(case.picture)
    except InputError as error:
        raise IntegrityError(f"golden/ is damaged: {error}; copy or export the bundle again") from error


def _pixels(walk: Walk, picture: Picture) -> StageResult:
    """Single values may round differently; the mean over the picture may not move.

    The table counts in levels of a channel from 0 to 1; the smallest std stretches them most.
    """
    expected, found = walk.case.tensors["pixel_values"], picture.pixel_values
    stretch = 1 / min(walk.processor.image_spec.std)
    result = compare("pixels", expected, found, FP32["pixels"].max_abs * stretch)
    drift = float(np.abs(expected - found).mean()) if result.passed else 0.0
    allowed = FP32["pixels_mean"].max_abs * stretch
    if drift <= allowed:
        return result
    return replace(result, max_abs=drift, tolerance=allowed, passed=False, note="of the mean over all pixels")


def _features(walk: Walk) -> Iterator[StageResult]:
    """Against what the same rounding gives without fused kernels, and then against float32; else against float32."""
    tensors = walk.case.tensors
    own = walk.case.own.get(walk.combination.encoder.precision, {})

    def features() -> Float:
        return walk.encode(golden.PICTURE, tensors["pixel_values"]).tokens

    if "fp32_features" not in walk.rules:
        yield walk.close("image_features", tensors["image_features"], features)
        return
    if "image_features" in own:
        spread = relative_l2(tensors["image_features"], own["image_features"])
        rule = within(walk.rules["image_features"], spread, walk.combination.encoder)
        yield walk.close("image_features", own["image_features"], features, rule)
    yield walk.close("fp32_features", tensors["image_features"], features)


def _text_rows(walk: Walk) -> Iterator[StageResult]:
    """The embeddings of the text; with pre-fusion also after it has seen the picture.

    ``fused_embeds`` reads what the encoder just gave, whose memory of the picture is too large to store.
    """
    tensors, prompt = walk.case.tensors, walk.prompt

    def text(rows: Float) -> Float:
        return np.delete(rows, prompt.positions, axis=1)

    embeds = text(tensors["inputs_embeds"])
    yield walk.close("inputs_embeds", embeds, lambda: text(walk.session.embed(prompt.ids_to_embed()[None])))
    if prompt.fused is not None:
        fused = tensors["prompt_rows"][:, prompt.fused]
        yield walk.close("fused_embeds", fused, lambda: _rows(walk)[:, prompt.fused])


def _logits(walk: Walk) -> Iterator[StageResult]:
    """The decoder, over the whole prompt and then token by token, against what it is nearest to."""
    rows, session, references = walk.case.tensors["prompt_rows"], walk.session, _references(walk)
    given = walk.given[: len(references[0]["decode_logits"])]
    computations: dict[str, Callable[[], Float]] = {
        "prefill_logits": lambda: golden.prefill_logits(session, rows),
        "decode_logits": lambda: golden.decode_logits(session, given),
    }
    for stage, compute in computations.items():
        found, rule = cache(compute), _logits_rule(walk, stage, references)
        results = [walk.close(stage, reference[stage], found, rule) for reference in references]
        yield min(results, key=lambda result: (not result.passed, result.found))


def _references(walk: Walk) -> list[golden.Tensors]:
    """Of rounded weights two, with rounded activations and without; else float32.

    An engine computes by either one, or something between; whatever broke is far from both.
    """
    precision, own = walk.combination.decoder.precision, walk.case.own
    found = [own[name] for name in (precision, golden.unrounded(precision)) if name in own]
    return found or [walk.case.tensors]


def _logits_rule(walk: Walk, stage: str, references: Sequence[golden.Tensors]) -> Rule:
    """As far apart as the references; without any of its own, all that can be asked is what the rounding costs."""
    decoder = walk.combination.decoder
    if len(references) > 1:
        spread = max(relative_l2(references[0][name], references[1][name]) for name in LOGITS)
        return within(walk.rules[stage], spread, decoder)
    return walk.rules["answer_logits"] if decoder.rounds else walk.rules[stage]


def _answer_logits(walk: Walk) -> StageResult:
    tensors = walk.case.tensors
    expected = np.concatenate((tensors["prefill_logits"][None], tensors["decode_logits"]))

    def logits() -> Float:
        prefill = golden.prefill_logits(walk.session, _rows(walk))
        return np.concatenate((prefill[None], golden.decode_logits(walk.session, walk.given)))

    return walk.close("answer_logits", expected, logits)


def _greedy(walk: Walk, steps: int) -> Ints:
    """Greedy ids by the bundle's own parts from pixels on."""
    return golden.continue_greedily(walk.session, _rows(walk), steps)[0]


def _rows(walk: Walk) -> Float:
    """The prompt's rows by the bundle's own parts from pixels on."""
    return golden.prompt_rows(walk.session, walk.prompt, walk.encode)
