"""The Jetson suite: whom it refuses, which pairs it tries, what one that fails leaves, and what is in its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgevlm.bench import suite, suite_step
from edgevlm.bench.stats import summarize
from edgevlm.bench.suite import SuitePlan, pairs_of, require_figures, run_suite
from edgevlm.bench.suite_step import Built, Measured, Proven, StepResult, SuiteTask
from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.read import read_bundle
from edgevlm.cli.app import app
from edgevlm.core.errors import BenchmarkError, MissingLibraryError, UnsupportedError
from edgevlm.core.hardware import probe
from edgevlm.core.jetson import Clock, Jetson
from edgevlm.runtimes.choices import Choices, PartChoice, Wishes
from edgevlm.shipped import find_bundle

BOARD = Jetson(
    model="NVIDIA Jetson Orin Nano",
    l4t="36.4.3",
    jetpack="6.2",
    power_mode="15W",
    cma_total_bytes=None,
    cma_free_bytes=None,
    power_modes={"15W": 0, "MAXN_SUPER": 2},
    gpu_clock=Clock(now_hz=306_000_000),
)
ONE = summarize([1.0, 2.0, 3.0])
FIGURES = Measured(
    figures={"vision_ms": ONE, "prefill_ms": ONE, "ttft_engine_ms": ONE, "tpot_ms": ONE},
    process_peak_bytes=3 << 20,
    system_peak_bytes=5 << 20,
    gpu_clock_hz=(306_000_000, None),
    measurement={},
)
ANSWERS = {
    "load": StepResult(),
    "build": StepResult(built=Built(seconds=1.5, engines=())),
    "verify": StepResult(proven=Proven(passed=True, verification={})),
    "measure": StepResult(measured=FIGURES),
}


def edgevlm_(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were taken, none of them really."""
    taken: list[str] = []

    def answer(task: SuiteTask) -> StepResult:
        taken.append(task.step)
        return ANSWERS[task.step]

    monkeypatch.setattr(suite, "take_step", answer)
    return taken


@pytest.fixture
def manifest() -> Manifest:
    """Of a bundle for TensorRT, with two encoders."""
    shipped = read_bundle(find_bundle("nano"), check=False).manifest
    parts = [replace(part, target="tensorrt") for part in shipped.parts]
    second = [replace(part, precision="fp16") for part in parts if part.part == "vision_encoder"]
    return replace(shipped, parts=(*parts, *second))


def test_another_machine_is_refused_with_exit_code_three(steps: list[str], tmp_path: Path) -> None:
    done = edgevlm_("bench", "--suite", "jetson", "nano", "-o", tmp_path / "a.json")
    assert (done.exit_code, steps) == (3, [])
    assert "try it here with --any-device" in done.stderr


def test_a_board_is_measured_with_what_doctor_says_against_it(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    board = replace(probe(), jetson=BOARD)
    monkeypatch.setattr(suite, "probe", lambda: board)
    file = tmp_path / "a.json"
    done = edgevlm_("bench", "--suite", "jetson", "nano", "-o", file)
    assert (done.exit_code, steps) == (0, ["verify", "measure"])
    written = json.loads(file.read_text())
    assert written["schema"] == 1
    assert written["hardware"]["jetson"]["power_mode"] == "15W"
    assert "sudo nvpmodel -m 2" in written["advice"][0]
    assert "sudo nvpmodel -m 2" in done.stderr
    (pair,) = written["pairs"]
    assert pair["measured"]["figures"]["tpot_ms"]["median"] == 2.0
    assert pair["proven"]["passed"] is True
    assert "5.0 MiB" in done.stdout


def test_what_tensorrt_runs_is_built_first(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, manifest: Manifest
) -> None:
    monkeypatch.setattr(suite, "target_of", lambda runtime: "tensorrt")
    monkeypatch.setattr(suite, "RUNTIMES", {"tensorrt": object})
    choices = pairs_of(manifest, SuitePlan())
    assert [one.encoder.precision for one in choices] == ["fp32", "fp16"]
    bundle = replace(read_bundle(find_bundle("nano"), check=False), manifest=manifest)
    assert suite._tensorrt_complaint(bundle, SuitePlan()) is None
    found = suite._pair(bundle, SuitePlan(), choices[0], lambda step: None)
    assert steps == ["load", "build", "verify", "measure"]
    assert found.built == ANSWERS["build"].built


def test_without_tensorrt_it_is_missed_or_checked_on_the_cpu(manifest: Manifest) -> None:
    with pytest.raises(MissingLibraryError, match=r"tensorrt cannot be used \(no driver\): pip install tensorrt"):
        pairs_of(manifest, SuitePlan(), complaint="no driver")
    plan = SuitePlan(any_device=True, wishes=Wishes(encoder_precision="fp16"))
    checked = pairs_of(manifest, plan, complaint="no driver")
    usual = PartChoice(runtime="tensorrt-on-cpu", precision="fp32")
    assert checked == [Choices(encoder=replace(usual, precision="fp16"), decoder=usual)]


def test_a_pair_that_fails_the_gate_is_not_measured(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = StepResult(complaint="verify: logits: differ", proven=Proven(passed=False, verification={}))
    monkeypatch.setitem(ANSWERS, "verify", broken)
    result = run_suite("nano", SuitePlan(any_device=True))
    assert steps == ["verify"]
    (pair,) = result.pairs
    assert (pair.complaint, pair.measured) == ("verify: logits: differ", None)
    with pytest.raises(BenchmarkError, match=r"nothing could be measured .*fp32 decoder: verify: logits"):
        require_figures(result)
    require_figures(replace(result, pairs=(pair, replace(pair, complaint=None))))


def test_an_unknown_suite_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="no suite named 'orin'; known: jetson"):
        run_suite("nano", SuitePlan(suite="orin"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name it, such as -o jetson.json"),
        (["-o", "json"], "name it, such as -o jetson.json"),
        (["-o", "{there}"], "exists already"),
        (["-o", "x.json", "--prompt", "Why?"], "leave --prompt out"),
    ],
)
def test_what_a_suite_cannot_do_is_a_usage_error(
    steps: list[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    done = edgevlm_("bench", "nano", "--suite", "jetson", *(one.format(there=there) for one in arguments))
    assert (done.exit_code, steps, there.read_text()) == (2, [], "{}")
    assert words in done.stderr


def test_the_steps_really_verify_and_measure_a_bundle() -> None:
    choices = Choices(encoder=PartChoice(precision="fp32"), decoder=PartChoice(precision="fp32"))
    task = SuiteTask(step="verify", folder=str(find_bundle("nano")), choices=choices, repetitions=2, max_tokens=2)
    proven = suite_step.take_step(task).proven
    assert proven is not None
    assert proven.passed
    assert proven.verification["stages"]
    measured = suite_step.take_step(replace(task, step="measure")).measured
    assert measured is not None
    assert set(measured.figures) >= {"vision_ms", "prefill_ms", "ttft_user_ms", "ttft_engine_ms", "tpot_ms"}
    assert measured.process_peak_bytes > 0
    assert measured.measurement["conditions"]["golden"] == "matched"


def test_a_step_that_cannot_be_taken_is_a_complaint() -> None:
    choices = Choices(encoder=PartChoice(precision="int3"))
    task = SuiteTask(step="measure", folder=str(find_bundle("nano")), choices=choices, repetitions=1, max_tokens=1)
    complaint = suite_step.run(task).complaint
    assert complaint is not None
    assert complaint.startswith("measure: ")
    assert "int3" in complaint
