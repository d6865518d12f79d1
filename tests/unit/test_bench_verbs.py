"""`edgevlm bench`, `report` and `compare`, as typed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import edgevlm.bench.measuring
import edgevlm.runtimes.open
from edgevlm.bench.record import read_measurement
from edgevlm.cli.app import app
from edgevlm.runtimes.answer import Answer
from edgevlm.runtimes.clock import STAGES, Timings


class SteadyVlm:
    """A model whose every answer takes ten milliseconds to the first token and two for each other."""

    name, max_context = "steady", 512
    info: dict[str, Any] = {"runtime": "fake"}  # noqa: RUF012

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.processor = SimpleNamespace(
            image_spec=SimpleNamespace(height=32, width=32, split=None),
            input_ids=lambda messages, grids: messages[0]["content"][1]["text"].split(),
        )

    def __enter__(self) -> SteadyVlm:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def ask(self, image: Any, prompt: str, *, max_tokens: int, use_image_cache: bool, ignore_eos: bool) -> Answer:
        self.prompts.append(prompt)
        timings = Timings(
            stages_ms=dict.fromkeys(STAGES, 1.0),
            ttft_user_ms=10.0,
            ttft_engine_ms=8.0,
            tpot_ms=2.0 if max_tokens > 1 else None,
            end_to_end_ms=8.0 + 2.0 * max_tokens,
            token_times_ms=tuple(10.0 + 2.0 * i for i in range(max_tokens)),
        )
        return Answer(
            text="x",
            token_ids=(1,) * max_tokens,
            finish_reason="length",
            num_prompt_tokens=len(prompt.split()),
            num_vision_tokens=0,
            num_cached_tokens=0,
            image_from_cache=False,
            timings=timings,
        )


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch) -> SteadyVlm:
    """What `edgevlm bench` opens, whatever it is told to."""
    steady = SteadyVlm()
    monkeypatch.setattr(edgevlm.runtimes.open, "open_as_wished", lambda *args, **options: steady)
    return steady


def edgevlm_(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def saved(vlm: SteadyVlm, tmp_path: Path) -> Path:
    """A run on disk."""
    assert edgevlm_("bench", "steady", "-r", 6, "--save", tmp_path / "a.jsonl").exit_code == 0
    return tmp_path / "a.jsonl"


def test_bench_prints_a_table_and_saves_the_raw_run(vlm: SteadyVlm, tmp_path: Path) -> None:
    done = edgevlm_("bench", "steady", "-r", 6, "-n", 4, "--save", tmp_path / "run.jsonl")
    assert done.exit_code == 0, done.output
    assert "| TTFT engine (ms)" in done.stdout
    run = read_measurement(tmp_path / "run.jsonl")
    assert len(run.repetitions) == 6
    assert run.num_new_tokens() == (4, 4)


@pytest.mark.parametrize("output", ["md", "csv", "json", "jsonl"])
def test_bench_prints_every_format_of_llama_bench(vlm: SteadyVlm, output: str) -> None:
    done = edgevlm_("bench", "steady", "-r", 2, "-o", output)
    assert done.exit_code == 0, done.output
    assert "ttft_user_ms" in done.stdout or "TTFT user" in done.stdout


def test_bench_json_is_alone_on_stdout(vlm: SteadyVlm) -> None:
    assert json.loads(edgevlm_("bench", "steady", "-r", 2, "--json").stdout)["workload"]["regime"] == "warm-new-image"


def test_bench_lengthens_the_prompt(vlm: SteadyVlm) -> None:
    assert edgevlm_("bench", "steady", "-r", 1, "-p", 50).exit_code == 0
    assert {len(prompt.split()) for prompt in vlm.prompts} == {50}


def test_bench_keeps_an_earlier_run_unless_told(saved: Path) -> None:
    before = saved.read_bytes()
    done = edgevlm_("bench", "steady", "-r", 6, "--save", saved)
    assert (done.exit_code, saved.read_bytes()) == (2, before)
    assert edgevlm_("bench", "steady", "-r", 6, "--save", saved, "--overwrite").exit_code == 0


def test_bench_with_a_wrong_golden_answer_exits_with_nine_and_saves_nothing(
    vlm: SteadyVlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vlm, "info", {"bundle": str(tmp_path / "steady.bundle")})
    monkeypatch.setattr(edgevlm.bench.measuring, "golden_answers_match", lambda vlm: "said cat")
    done = edgevlm_("bench", "steady", "--save", tmp_path / "run.jsonl")
    assert done.exit_code == 9
    assert "said cat" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bench_refuses_an_unknown_format_before_it_opens_anything(vlm: SteadyVlm) -> None:
    done = edgevlm_("bench", "steady", "-o", "jsn")
    assert done.exit_code == 2
    assert "Did you mean 'json'?" in done.stderr
    assert vlm.prompts == []


def test_bench_refuses_a_folder_to_save_to(vlm: SteadyVlm, tmp_path: Path) -> None:
    assert edgevlm_("bench", "steady", "--save", tmp_path).exit_code == 2
    assert vlm.prompts == []


def test_report_writes_one_file_and_prints_its_path(saved: Path, tmp_path: Path) -> None:
    done = edgevlm_("report", saved, "-o", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert "steady" in (tmp_path / "report.html").read_text()


def test_report_shows_what_verify_found(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text('{"stages": [{"stage": "pixels", "passed": true}]}')
    edgevlm_("report", saved, "-o", tmp_path / "report.html", "--verify", tmp_path / "verify.json")
    assert "pixels" in (tmp_path / "report.html").read_text()


def test_report_never_writes_over_what_it_reads(saved: Path) -> None:
    before = saved.read_bytes()
    assert edgevlm_("report", saved, "-o", saved).exit_code == 2
    assert saved.read_bytes() == before


def test_report_on_a_damaged_run_exits_with_two_and_writes_nothing(saved: Path, tmp_path: Path) -> None:
    saved.write_text(saved.read_text()[:-30])
    done = edgevlm_("report", saved, "-o", tmp_path / "report.html")
    assert done.exit_code == 2
    assert f"{saved}, line 7: not valid JSON" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_report_tells_runs_with_the_same_file_name_apart(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / saved.name
    other.parent.mkdir()
    other.write_bytes(saved.read_bytes())
    assert edgevlm_("report", saved, other, "-o", tmp_path / "report.html").exit_code == 0
    assert str(other) in (tmp_path / "report.html").read_text()


def test_compare_prints_a_verdict_per_figure(saved: Path) -> None:
    done = edgevlm_("compare", saved, saved)
    assert done.exit_code == 0, done.output
    assert "no difference shown" in done.stdout


def test_compare_json_holds_ratio_interval_and_verdict(saved: Path) -> None:
    row = json.loads(edgevlm_("compare", saved, saved, "--json").stdout)["rows"][0]
    assert row["figure"] == "ttft_user_ms"
    assert row["ratio"]["value"] == 1
    assert row["verdict"] == "no difference shown"


def test_compare_with_a_missing_file_exits_with_two(saved: Path, tmp_path: Path) -> None:
    done = edgevlm_("compare", saved, tmp_path / "none.jsonl")
    assert done.exit_code == 2
    assert "none.jsonl" in done.stderr
