"""`tune` takes what passes the gate and costs least, and leaves the default alone where it is as good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm.bench import trial, tuning
from edgevlm.bench.trial import Task, Trial, run, try_out
from edgevlm.bench.tuning import Tried, best_choice, candidates, choices_for, cost, tune_bundle
from edgevlm.bundle.read import read_bundle
from edgevlm.core.errors import BenchmarkError, UnsupportedError, UsageError
from edgevlm.core.hardware import compute_cores
from edgevlm.runtimes.choices import Choices, PartChoice
from edgevlm.shipped import find_bundle


def tried(half: str, runtime: str, **found: float | str) -> Tried:
    return Tried(half=half, choice=PartChoice(runtime=runtime), trial=Trial(**found))  # type: ignore[arg-type]


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


def test_where_nothing_passes_the_gate_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "try_out", lambda task: Trial(complaint="the gate: image_features differs"))
    words = (
        r"nano.bundle: nothing .* runs the encoder .*onnxruntime fp32: the gate: image_features differs.*edgevlm verify"
    )
    with pytest.raises(BenchmarkError, match=words) as raised:
        tune_bundle("nano", runtimes=["onnxruntime"], rounds=1)
    assert "decoder" not in str(raised.value)


def test_winners_that_fail_together_leave_the_pair_that_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = PartChoice(precision="fp32", threads=1)
    fast = PartChoice(runtime="openvino", precision="fp32", threads=1)
    seen: list[Task] = []

    def answer(task: Task) -> Trial:
        seen.append(task)
        return Trial(complaint="together they differ")

    monkeypatch.setattr(tuning, "try_out", answer)
    manifest = read_bundle(find_bundle("nano")).manifest
    task = Task(folder="", choices=Choices(), judge=True, repetitions=1, max_tokens=2)
    plan = tuning._Plan(manifest=manifest, task=task, rounds=1, report=lambda step: None)
    halves = [Tried(half=half, choice=fast, trial=Trial(vision_ms=1.0)) for half in ("encoder", "decoder")]
    assert plan.together(halves, "ttft") == Choices(encoder=usual, decoder=fast)
    assert seen == [replace(task, choices=Choices(encoder=fast, decoder=fast))]


def test_what_is_judged_first_is_timed_afterwards_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([0, 100, 900, 300])
    monkeypatch.setattr(tuning, "try_out", lambda task: Trial(peak_bytes=next(peaks), vision_ms=float(not task.judge)))
    manifest = read_bundle(find_bundle("nano")).manifest
    task = Task(folder="", choices=Choices(), judge=True, repetitions=1, max_tokens=2)
    plan = tuning._Plan(manifest=manifest, task=task, rounds=3, report=lambda step: None)
    (found,) = plan.run("encoder", [PartChoice(threads=1)])
    assert (found.trial.peak_bytes, found.trial.vision_ms) == (300, 1.0)


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


ONE_THREAD = Choices(encoder=PartChoice(threads=1), decoder=PartChoice(threads=1))


def task_on_nano(*, judge: bool = False, choices: Choices = ONE_THREAD) -> Task:
    return Task(folder=str(find_bundle("nano")), choices=choices, judge=judge, repetitions=1, max_tokens=4)


def test_a_trial_times_and_weighs_in_a_process_that_no_file_of_this_folder_misleads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("json", "numpy", "edgevlm"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('the wrong module')")
    found = try_out(task_on_nano())
    assert found.complaint is None
    assert found.vision_ms > 0
    assert found.prefill_ms > 0
    assert found.decode_ms > 0
    assert found.peak_bytes > 10e6


def test_a_trial_that_judges_says_no_more_than_whether_it_passed() -> None:
    assert run(task_on_nano(judge=True)) == Trial()


@pytest.mark.parametrize("judge", [True, False])
def test_a_trial_that_cannot_begin_says_why(judge: bool) -> None:
    wrong = Choices(decoder=PartChoice(precision="int2"))
    assert "int2" in (run(task_on_nano(judge=judge, choices=wrong)).complaint or "")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        ("print('{')", "no result that can be read"),
        ("print('{}'); print('[]')", "no result that can be read"),
        ("print('{\"speed\": 1}')", "no key named 'speed'"),
        ("raise SystemExit('one\\nlast words')", "the process ended with 1: last words"),
        ("import os; os.kill(os.getpid(), 9)", "the process was ended by SIGKILL: without a word"),
        ("import time; time.sleep(60)", "no result within 0 hours"),
    ],
)
def test_whatever_happens_to_the_process_is_a_complaint(monkeypatch: pytest.MonkeyPatch, main: str, words: str) -> None:
    monkeypatch.setattr(trial, "MAIN", main)
    monkeypatch.setattr(trial, "TIMEOUT_S", 2)
    assert words in (try_out(task_on_nano()).complaint or "")


def test_wrong_wishes_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(UsageError, match="goal"):
        tune_bundle("nano", optimize="speed")
    with pytest.raises(UsageError, match="rounds"):
        tune_bundle("nano", rounds=0)
    with pytest.raises(UnsupportedError, match="runtime"):
        tune_bundle("nano", runtimes=["onnx-runtime"])


def test_the_other_half_is_what_would_run_untuned_on_as_many_threads() -> None:
    manifest = read_bundle(find_bundle("nano")).manifest
    fast = PartChoice(runtime="openvino", precision="fp32", threads=1)
    usual = PartChoice(runtime="onnxruntime", precision="fp32", threads=1)
    assert choices_for("encoder", fast, manifest) == Choices(encoder=fast, decoder=usual)
    assert choices_for("decoder", fast, manifest) == Choices(encoder=usual, decoder=fast)
