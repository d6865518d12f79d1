"""`tune` takes what passes the gate and costs least, and leaves the default alone where it is as good."""

from __future__ import annotations

import pytest

from edgevlm.bench.trial import Task, Trial, run
from edgevlm.bench.tuning import Tried, best_choice, candidates, cost, tune_bundle, wishes_for
from edgevlm.bundle.read import read_bundle
from edgevlm.core.errors import BenchmarkError, UnsupportedError, UsageError
from edgevlm.core.hardware import compute_cores
from edgevlm.runtimes.choices import PartChoice, Wishes
from edgevlm.shipped import find_bundle


def tried(half: str, runtime: str, **trial: float | str) -> Tried:
    return Tried(half=half, choice=PartChoice(runtime=runtime), trial=Trial(**trial))  # type: ignore[arg-type]


def test_each_goal_takes_what_it_wants_little_of() -> None:
    short = tried("decoder", "short", prefill_ms=10.0, decode_ms=4.0, peak_bytes=900)
    long = tried("decoder", "long", prefill_ms=30.0, decode_ms=2.0, peak_bytes=800)
    small = tried("decoder", "small", prefill_ms=40.0, decode_ms=5.0, peak_bytes=100)
    found = {
        goal: best_choice([short, long, small], "decoder", goal).runtime for goal in ("ttft", "throughput", "memory")
    }
    assert found == {"ttft": "short", "throughput": "long", "memory": "small"}


def test_an_encoder_is_judged_by_the_time_for_a_picture() -> None:
    assert cost(tried("encoder", "any", vision_ms=7.0, prefill_ms=90.0), "ttft") == 7.0
    assert cost(tried("encoder", "any", vision_ms=7.0, prefill_ms=90.0), "throughput") == 7.0


def test_what_fails_the_gate_is_not_taken_however_fast() -> None:
    fast = tried("encoder", "fast", vision_ms=1.0, complaint="the gate: image_features differs")
    slow = tried("encoder", "slow", vision_ms=9.0)
    assert best_choice([fast, slow], "encoder", "ttft").runtime == "slow"
    with pytest.raises(BenchmarkError, match=r"fast.*image_features"):
        best_choice([fast], "encoder", "ttft")


def test_a_difference_within_the_noise_leaves_the_first() -> None:
    first, second = tried("encoder", "first", vision_ms=10.2), tried("encoder", "second", vision_ms=10.0)
    assert best_choice([first, second], "encoder", "ttft").runtime == "first"
    better = tried("encoder", "better", vision_ms=9.0)
    assert best_choice([first, better], "encoder", "ttft").runtime == "better"


def test_candidates_are_every_runtime_with_every_precision() -> None:
    manifest = read_bundle(find_bundle("nano")).manifest
    found = list(candidates(manifest, "decoder", ["onnxruntime", "other"]))
    assert [(one.runtime, one.precision, one.threads) for one in found] == [
        ("onnxruntime", "fp32", compute_cores()),
        ("other", "fp32", compute_cores()),
    ]


def test_a_trial_judges_times_and_weighs() -> None:
    task = Task(folder=str(find_bundle("nano")), wishes=Wishes(threads=1), judge=True, repetitions=1, max_tokens=4)
    found = run(task)
    assert found.complaint is None
    assert found.vision_ms > 0
    assert found.prefill_ms > 0
    assert found.decode_ms > 0
    assert found.peak_bytes > 10e6


def test_a_trial_that_cannot_begin_says_why() -> None:
    task = Task(
        folder=str(find_bundle("nano")),
        wishes=Wishes(decoder_precision="int2"),
        judge=False,
        repetitions=1,
        max_tokens=4,
    )
    assert "int2" in (run(task).complaint or "")


def test_wrong_wishes_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(UsageError, match="goal"):
        tune_bundle("nano", optimize="speed")
    with pytest.raises(UsageError, match="rounds"):
        tune_bundle("nano", rounds=0)
    with pytest.raises(UnsupportedError, match="runtime"):
        tune_bundle("nano", runtimes=["onnx-runtime"])


def test_a_trial_says_everything_so_that_nothing_tuned_creeps_in() -> None:
    manifest = read_bundle(find_bundle("nano")).manifest
    found = wishes_for("encoder", PartChoice(runtime="openvino", precision="fp32", threads=1), manifest)
    assert found == Wishes(
        encoder_runtime="openvino",
        decoder_runtime="onnxruntime",
        encoder_precision="fp32",
        decoder_precision="fp32",
        threads=1,
    )
