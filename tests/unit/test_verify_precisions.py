"""What the gate allows to each precision: own references, divergence, and right answers lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.bundle.golden import save_golden
from edgevlm.bundle.manifest import DecoderShape, Manifest, PartFile, TensorSpec
from edgevlm.core.errors import IntegrityError, ParityError, UnsupportedError, UsageError
from edgevlm.runtimes.choices import Wishes
from edgevlm.verify import Verification, golden, verify_all
from edgevlm.verify.cases import golden_cases
from edgevlm.verify.gate import combinations
from edgevlm.verify.stages import StageResult, compare, compare_ids, failed, worst
from edgevlm.verify.task import TaskResult, task_stage
from edgevlm.verify.thresholds import CAP, DECODERS, ENCODERS, FP32, Combination, Computed, Limit, within

DECODER_NAMES = ("fp16", "int8-b32", "int8-b128", "int8-dynamic", "int4-b128", "int4-b32-asym-head8-rtn")


def combination(encoder: str = "fp32", decoder: str = "fp32", runtime: str = "onnxruntime") -> Combination:
    return Combination(
        encoder=Computed(precision=encoder, runtime=runtime), decoder=Computed(precision=decoder, runtime=runtime)
    )


@pytest.mark.parametrize(
    ("precision", "runtime", "kind"),
    [
        ("fp32", "onnxruntime", "fp32"),
        ("fp32", "openvino-bf16", "bf16"),
        ("fp16", "openvino-bf16", "bf16"),
        ("int4-b32-asym", "onnxruntime", "int4"),
        ("int4-b32-asym", "openvino-bf16", "int4"),
        ("int8-b128", "onnxruntime", "int8"),
        ("int8-dynamic", "openvino", "int8-dynamic"),
    ],
)
def test_a_kind_is_the_precision_without_its_blocks_or_what_the_runtime_computes_in(
    precision: str, runtime: str, kind: str
) -> None:
    assert Computed(precision=precision, runtime=runtime).kind == kind


def test_float32_is_judged_by_its_largest_differences_alone() -> None:
    assert combination().is_exact
    assert combination().rules() == FP32
    assert combination().task == 0


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_every_decoder_precision_has_limits_with_reasons(decoder: str) -> None:
    rules = combination(decoder=decoder).rules()
    assert rules["image_features"] == FP32["image_features"]
    assert rules["prefill_logits"] is rules["decode_logits"]
    assert (rules["prefill_logits"].measure, rules["answer_logits"].measure) == ("relative_l2", "kl")
    assert not combination(decoder=decoder).is_exact


@pytest.mark.parametrize("row", [*ENCODERS.values(), *DECODERS.values()])
def test_every_limit_gives_its_reason(row: Any) -> None:
    assert all(len(limit.reason) > 20 for limit in (row.stage, row.answer, *filter(None, [row.total])))
    assert 0 < row.task <= 0.02


def test_more_bits_are_allowed_less() -> None:
    order = [DECODERS[kind] for kind in ("fp16", "int8", "int4")]
    assert [row.answer.limit for row in order] == sorted(row.answer.limit for row in order)
    assert [row.task for row in order] == sorted(row.task for row in order)


def test_both_halves_may_use_up_their_shares() -> None:
    both = combination("int8", "int4-b128").rules()["answer_logits"]
    assert both.allowed(np.zeros(1, np.float32)) == ENCODERS["int8"].answer.limit + DECODERS["int4"].answer.limit


def test_an_engine_may_differ_by_what_rounding_itself_moves() -> None:
    rounded = Computed(precision="int4-b128")
    assert within(CAP, 0.02, rounded).allowed(np.zeros(1)) == pytest.approx(0.005 + 1.5 * 0.02)
    assert within(CAP, 0.0, rounded).allowed(np.zeros(1)) == pytest.approx(0.005)
    assert within(CAP, 0.5, rounded).allowed(np.zeros(1)) == CAP.limit
    in_bf16 = Computed(precision="int4-b128", runtime="openvino-bf16")
    assert within(CAP, 0.02, in_bf16).allowed(np.zeros(1)) == pytest.approx(DECODERS["bf16"].stage.limit + 0.03)


def test_half_rows_of_the_embedding_round_by_half_a_step() -> None:
    rule = Combination(embedding="fp16", decoder=Computed(precision="int4-b128")).rules()["inputs_embeds"]
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    rounded = values.astype(np.float16).astype(np.float32)
    allowed = rule.allowed(values)
    assert compare("inputs_embeds", values, rounded, allowed, rule.measure).passed
    assert not compare("inputs_embeds", values, rounded * np.float32(1.002), allowed, rule.measure).passed


def test_an_unknown_precision_has_no_limits() -> None:
    with pytest.raises(UnsupportedError, match="no parity thresholds for precision 'int3'; known: fp32, fp16"):
        combination(decoder="int3").rules()


def test_the_judged_value_is_the_one_that_the_rule_measures() -> None:
    reference = np.array([3.0, 4.0], np.float32)
    result = compare("image_features", reference, reference * np.float32(1.01), 0.02, "relative_l2")
    assert result.passed
    assert result.found == pytest.approx(0.01, rel=1e-4)
    assert not compare("image_features", reference, reference * np.float32(1.03), 0.02, "relative_l2").passed


def test_divergence_is_measured_in_nats() -> None:
    even, sure = np.zeros(2, np.float32), np.log(np.array([0.25, 0.75], np.float32))
    result = compare("answer_logits", even[None], sure[None], 0.1, "kl")
    assert result.found == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), rel=1e-5)  # 0.1438
    assert not result.passed
    assert result.complaint == "KL divergence in nats 0.144, allowed 0.1"


def test_a_stage_that_gives_nan_is_infinitely_far_off_in_every_measure() -> None:
    broken = np.array([np.nan], np.float32)
    for measure in ("max_abs", "relative_l2", "kl"):
        result = compare("prefill_logits", np.zeros(1, np.float32), broken, 1e9, measure)  # type: ignore[arg-type]
        assert not result.passed
        assert result.found == float("inf")


def test_the_worst_case_is_found_by_what_is_judged() -> None:
    near = StageResult(stage="answer_logits", max_abs=9, tolerance=1, passed=True, measure="kl", kl=0.1)
    far = StageResult(stage="answer_logits", max_abs=1, tolerance=1, passed=True, measure="kl", kl=0.9)
    assert worst([near, far]) is far
    assert worst([far, failed("answer_logits", 1, "kl", "gone")]).note == "gone"


def test_ids_of_a_rounded_model_are_counted_not_required() -> None:
    expected, found = np.array([1, 2, 3, 4]), np.array([1, 2, 9, 9])
    result = compare_ids("greedy_ids", expected, found, required=False)
    assert result.passed
    assert result.note == "2 of 4 ids equal, the first other at 2"
    assert not compare_ids("greedy_ids", expected, found).passed


def task(lost: int, gained: int, total: int = 512) -> TaskResult:
    return TaskResult(
        suite="scenes",
        num_questions=total,
        num_equal=total - lost - gained,
        accuracy=(400 - lost + gained) / total,
        reference_accuracy=400 / total,
        num_lost=lost,
        num_gained=gained,
    )


def test_a_rounded_model_may_change_answers_but_not_lose_them() -> None:
    rounded = combination(decoder="int4-b128")
    assert task_stage(task(lost=15, gained=12), rounded).passed
    assert task_stage(task(lost=0, gained=30), rounded).passed
    result = task_stage(task(lost=40, gained=2), rounded)
    assert result.max_abs == 38
    assert result.tolerance == pytest.approx(DECODERS["int4"].task * 512 + 2 * 42**0.5)
    assert not result.passed
    assert "40 answers lost, 2 gained of 512" in result.note


def test_an_exact_model_may_change_no_answer() -> None:
    assert task_stage(task(lost=0, gained=0, total=64), combination()).passed
    assert not task_stage(task(lost=0, gained=1, total=64), combination()).passed


def part(name: str, precision: str) -> PartFile:
    spec = TensorSpec("x", "float32", ("batch", 3))
    file = f"onnx/{name}_{precision}.onnx"
    return PartFile(part=name, target="onnx", precision=precision, file=file, inputs=(spec,), outputs=(spec,))


def manifest(encoders: tuple[str, ...], decoders: tuple[str, ...]) -> Manifest:
    return Manifest(
        name="tiny",
        family="test",
        parts=(
            *(part("vision_encoder", precision) for precision in encoders),
            part("embed_tokens", "fp32"),
            *(part("decoder_model_merged", precision) for precision in decoders),
        ),
        image={},
        prompt={},
        num_vision_tokens=4,
        decoder=DecoderShape(2, 1, 4, 8, 16),
        max_context=32,
    )


def test_every_precision_is_combined_with_a_partner_that_hides_nothing() -> None:
    found = combinations(manifest(("int8", "fp32"), ("int4-b128", "int8-dynamic")))
    assert found == [("int8", "int4-b128"), ("fp32", "int8-dynamic"), ("fp32", "int4-b128")]
    assert combinations(manifest(("fp32",), ("fp32",))) == [("fp32", "fp32")]
    assert combinations(manifest(("int8",), ("int4-b32", "fp32"))) == [("int8", "int4-b32"), ("int8", "fp32")]


def test_all_precisions_or_one_that_is_named() -> None:
    with pytest.raises(UsageError, match="either --all or a precision"):
        verify_all("nano", Wishes(decoder_precision="fp32"))


def test_a_failure_names_the_precisions_that_failed() -> None:
    broken = StageResult(
        stage="answer_logits", max_abs=1, tolerance=0.5, passed=False, measure="kl", kl=0.75, top1_agreement=0.5
    )
    verification = Verification(
        bundle="tiny",
        precision="int4-b128",
        encoder_precision="int8",
        runtime={},
        stages=(broken,),
        task=None,
        passed=False,
    )
    sentence = "tiny, int8 encoder with int4-b128 decoder: stage answer_logits differs from PyTorch: KL divergence"
    with pytest.raises(ParityError, match=sentence):
        verification.require()


def write_golden(root: Path, extra: dict[str, np.ndarray]) -> None:
    tensors = {f"0.{name}": np.zeros(2, np.float32) for name in golden.TENSORS}
    save_golden(root, {**tensors, **extra}, {"prompts": ["?"], "task": None})


def test_own_references_are_read_by_precision(tmp_path: Path) -> None:
    own = {"0.int4-b128.prefill_logits": np.ones(3, np.float32), "0.int8.image_features": np.ones(2, np.float32)}
    write_golden(tmp_path, own)
    (case,) = golden_cases(tmp_path)
    assert {precision: list(tensors) for precision, tensors in case.own.items()} == {
        "int4-b128": ["prefill_logits"],
        "int8": ["image_features"],
    }


def test_a_case_that_lacks_a_stage_is_damage(tmp_path: Path) -> None:
    write_golden(tmp_path, {})
    meta = json.loads((tmp_path / "golden" / "golden.json").read_text())
    (tmp_path / "golden" / "golden.json").write_text(json.dumps({**meta, "prompts": ["?", "!"]}))
    with pytest.raises(IntegrityError, match="golden/ is incomplete"):
        golden_cases(tmp_path)


def test_a_limit_is_the_same_for_every_reference() -> None:
    limit = Limit(limit=0.25, reason="test")
    assert limit.allowed(np.full(3, 1e6, np.float32)) == 0.25
