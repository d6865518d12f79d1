"""Runs on disk, as tables, as a report, and beside each other."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgevlm.bench.comparing import compare, verdict
from edgevlm.bench.measurement import Conditions, Measurement, Memory, Repetition, WarmUp, Workload
from edgevlm.bench.plots import Axis, axis_for, nice_step
from edgevlm.bench.record import read_measurement, to_jsonl, write_measurement
from edgevlm.bench.report import QuestionAnswer, report_html, write_report
from edgevlm.bench.stats import Ratio
from edgevlm.bench.table import FORMATS, number
from edgevlm.core.errors import InputError

PNG = b"\x89PNG\r\n\x1a\n"


def repetition(i: int, scale: float = 1.0, tokens: int = 5) -> Repetition:
    wobble = scale * (1 + 0.001 * (i % 5))
    return Repetition(
        image=f"scene {i}",
        stages_ms={"load_image": 1.0 * wobble, "vision": 10.0 * wobble, "decode": 8.0 * wobble},
        ttft_user_ms=20.0 * wobble,
        ttft_engine_ms=15.0 * wobble,
        tpot_ms=2.0 * wobble if tokens > 1 else None,
        end_to_end_ms=28.0 * wobble,
        token_gaps_ms=(2.0 * wobble,) * (tokens - 1),
        num_prompt_tokens=30,
        num_vision_tokens=16,
        num_new_tokens=tokens,
        finish_reason="length",
        image_from_cache=False,
    )


def a_run(scale: float = 1.0, n: int = 20, tokens: int = 5, prompt: str = "Describe the picture.") -> Measurement:
    return Measurement(
        workload=Workload(
            prompt=prompt, images="scenes", num_distinct_images=n, image_cache=True, num_new_tokens=tokens
        ),
        warm_up=WarmUp(num_repetitions=4, settled=True),
        memory=Memory(kind="PSS", peak_bytes=64 << 20, num_samples=9, weights_bytes=32 << 20, cache_bytes=None),
        conditions=Conditions(
            started="2026-01-02T03:04:05+00:00",
            command="edgevlm bench tiny",
            model="tiny",
            golden="matched",
            bundle_sha256="ab" * 32,
            runtime={"runtime": "onnxruntime", "threads": 2, "precisions": {"decoder_model_merged": "fp32"}},
            device={"name": "Test CPU", "usable_cores": 2.0},
            versions={"python": "3.11"},
            clocks_mhz_before=(2400.0, 2500.0),
            other_load=0.02,
        ),
        repetitions=tuple(repetition(i, scale, tokens) for i in range(n)),
    )


def with_device(run: Measurement, name: str) -> Measurement:
    return replace(run, conditions=replace(run.conditions, device={"name": name}))


# On disk


def test_a_run_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    run = a_run(prompt="Was ist das? \u2028 日本")
    write_measurement(tmp_path / "run.jsonl", run)
    assert read_measurement(tmp_path / "run.jsonl") == run


def test_a_command_with_a_file_name_that_is_not_utf_8_is_kept(tmp_path: Path) -> None:
    run = replace(a_run(n=2), conditions=replace(a_run().conditions, command="edgevlm bench --image caf\udce9.png"))
    write_measurement(tmp_path / "run.jsonl", run)
    assert read_measurement(tmp_path / "run.jsonl") == run


def test_a_file_holds_a_header_and_a_line_per_repetition() -> None:
    lines = [json.loads(line) for line in to_jsonl(a_run(n=3)).splitlines()]
    assert [line["kind"] for line in lines] == ["run", "repetition", "repetition", "repetition"]
    assert lines[0]["num_repetitions"] == 3


def drop_last_line(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


def change(line: int, **values: Any) -> Callable[[str], str]:
    def apply(text: str) -> str:
        lines = text.splitlines()
        lines[line] = json.dumps({**json.loads(lines[line]), **values})
        return "\n".join(lines) + "\n"

    return apply


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: "", "is empty"),
        (lambda text: "\n", "line 1: not valid JSON"),
        (drop_last_line, "line 3: the file ends after 2 of 3 repetitions"),
        (lambda text: text[:-40], "line 4: not valid JSON"),
        (lambda text: "[1]\n" + text, "line 1: expected a JSON object, found list"),
        (lambda text: text.replace('"image": "scene 1"', '"image": 1'), "line 3: image must be"),
        (lambda text: text.replace("\n", "\n\n", 1), "line 2: not valid JSON"),
        (lambda text: text + text, "line 5: expected a repetition, found 'run'"),
        (lambda text: "[" * 100_000, "line 1: not valid JSON"),
        (change(0, schema=2), "schema 2 is not known"),
        (change(0, kind="x"), "expected the header"),
        (change(0, conditions={}), "line 1: conditions: missing"),
        (change(2, ttft_user_ms=float("nan")), "line 3: not valid JSON (NaN is not a number)"),
        (change(2, ttft_user_ms=-1.0), "line 3: ttft_user_ms must be a time"),
        (change(2, ttft_user_ms=None), "line 3: ttft_user_ms must be"),
        (change(2, stages_ms={"vision": "x"}), "line 3: stages_ms"),
        (change(2, token_gaps_ms=[1e999]), "line 3: "),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_line(
    damage: Callable[[str], str], complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(damage(to_jsonl(a_run(n=3))), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(complaint)) as error:
        read_measurement(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_measurement(tmp_path / "run.jsonl")


# Tables


def test_printing_a_run_shows_both_first_token_times_with_interval_and_count() -> None:
    text = str(a_run())
    assert re.search(r"TTFT user \(ms\) +\| +20\.0 \| +20\.0 - 20\.1 \| +20\.1 \| +- \| +20\.1 \| +20 \|", text)
    assert "TTFT engine (ms)" in text
    assert "warm-new-image · 20 repetitions after 4 warm-ups" in text
    assert "peak memory (PSS) 64.0 MiB; weight files 32.0 MiB" in text


def test_too_few_repetitions_show_neither_interval_nor_p95() -> None:
    line = next(line for line in str(a_run(n=5)).splitlines() if "TTFT user" in line)
    assert [cell.strip() for cell in line.split("|")[2:6]] == ["20.0", "-", "-", "-"]


def test_csv_has_a_row_per_figure() -> None:
    rows = {row["figure"]: row for row in csv.DictReader(io.StringIO(FORMATS["csv"](a_run())))}
    assert float(rows["tpot_ms"]["median"]) == pytest.approx(2.004)
    assert rows["ttft_user_ms"]["p99"] == ""
    assert "stage.vision_ms" in rows


def test_json_holds_raw_repetitions_and_summary() -> None:
    value = json.loads(FORMATS["json"](a_run(n=6)))
    assert len(value["repetitions"]) == 6
    assert value["summary"]["ttft_engine_ms"]["n"] == 6


def test_jsonl_output_is_the_file() -> None:
    assert FORMATS["jsonl"](a_run(n=2)) + "\n" == to_jsonl(a_run(n=2))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.000"), (0.1234, "0.123"), (1.5, "1.50"), (123.4, "123"), (12345.6, "12346")],
)
def test_numbers_keep_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


# Side by side


def test_a_run_compared_with_itself_shows_no_difference() -> None:
    rows = compare(a_run(), a_run()).rows
    assert {row.verdict for row in rows} == {"no difference shown"}
    assert {row.ratio.value for row in rows} == {1.0}


def test_half_the_time_is_faster_and_the_reverse_slower() -> None:
    assert {row.verdict for row in compare(a_run(), a_run(0.5)).rows} == {"faster"}
    assert {row.verdict for row in compare(a_run(0.5), a_run()).rows} == {"slower"}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.9, 0.97, "faster"),
        (0.9, 0.99, "no difference shown"),  # excludes 1, but not by more than the noise
        (1.01, 1.2, "no difference shown"),
        (1.03, 1.2, "slower"),
        (None, None, "too few repetitions"),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_the_noise(low: float | None, high: float | None, said: str) -> None:
    assert verdict(Ratio(value=1.0, low=low, high=high)) == said


def test_a_comparison_warns_of_what_makes_it_unfair() -> None:
    other = with_device(a_run(tokens=3, prompt="Count."), "Other CPU")
    text = " ".join(compare(a_run(), other).warnings)
    for what in (
        "the device differs: Test CPU and Other CPU",
        "the prompt differs",
        "number of new tokens differs: 5 and 3",
    ):
        assert what in text


def test_a_comparison_keeps_the_figures_that_both_runs_have() -> None:
    figures = [row.figure for row in compare(a_run(), a_run(tokens=1)).rows]
    assert "tpot_ms" not in figures
    assert "ttft_user_ms" in figures


def test_printing_a_comparison_names_both_runs() -> None:
    text = str(compare(a_run(), a_run(0.5), names=("old.jsonl", "new.jsonl")))
    assert "A = old.jsonl\nB = new.jsonl" in text
    assert re.search(r"TTFT user \(ms\) +\| +20\.0 \| +10\.0 \| +0\.500 \| +0\.\d+ - 0\.\d+ \| +faster \|", text)


# Report


class Tags(HTMLParser):
    """Checks that every element is closed where it should be."""

    OPEN = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.stack:
            assert self.stack.pop() == tag


def test_a_report_is_one_well_formed_file_without_network_or_script() -> None:
    html = report_html({"tiny": a_run()}, image_png=PNG, answers=[QuestionAnswer(question="q", answer="a")])
    tags = Tags(html)
    assert tags.stack == []
    assert not {"script", "link", "iframe", "object"} & set(tags.seen)
    assert re.findall(r"https?:", html) == []
    assert re.findall(r'src="(\w+:)', html) == ["data:"]
    assert "default-src &#x27;none&#x27;" in html


def test_a_report_shows_figures_interval_device_and_command() -> None:
    html = report_html({"tiny": a_run()})
    for text in (
        "Test CPU",
        "edgevlm bench tiny",
        "20.0 - 20.1",
        "TTFT engine",
        "prefers-color-scheme: dark",
    ):
        assert text in html


def test_text_from_outside_is_escaped_everywhere() -> None:
    evil = "<script>alert('x')</script>"
    run = with_device(a_run(prompt=evil), evil)
    run = replace(run, conditions=replace(run.conditions, model=evil, command=evil))
    verify = {evil: evil, "stages": [{evil: evil}], "runtime": {evil: evil}}
    answers = [QuestionAnswer(question=evil, answer=evil, expected=evil)]
    html = report_html({evil: run, f"{evil}2": run}, verify=verify, answers=answers)
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_answers_are_marked_right_or_wrong_where_the_right_one_is_known() -> None:
    answers = [
        QuestionAnswer(question="colour?", answer="Red", expected="red"),
        QuestionAnswer(question="count?", answer="3", expected="4"),
    ]
    html = report_html({"tiny": a_run()}, answers=answers)
    assert ">right<" in html
    assert ">expected 4<" in html


def test_verify_results_become_tables_and_facts() -> None:
    verify = {
        "passed": False,
        "stages": [{"name": "pixels", "max_abs": 1.5e-6, "passed": True, "detail": [1, 2], "remark": ""}],
        "task": {"accuracy": 0.5},
        "by_part": {"decoder": {"cosine": 1.0}},
        "files": ["a", "b"],
        "nothing": None,
        "empty": [],
    }
    html = report_html({"tiny": a_run()}, verify=verify)
    for text in (">fail<", ">pass<", "1.50e-06", "max abs", "accuracy 0.5", "decoder"):
        assert text in html
    assert "detail" not in html
    assert "remark" not in html


def test_several_runs_are_compared_with_bars() -> None:
    html = report_html({"a": a_run(), "b": a_run(0.5, tokens=1)})
    assert "Side by side" in html
    assert "Side by side" not in report_html({"a": a_run()})


@pytest.mark.parametrize("run", [a_run(n=1), a_run(tokens=1), a_run(n=1, tokens=2), a_run(0.0), a_run(n=150)])
def test_odd_runs_can_be_shown(run: Measurement) -> None:
    assert Tags(report_html({"odd": run})).stack == []
    assert str(run)
    compare(run, run)


def test_a_report_without_runs_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run"):
        write_report(tmp_path / "report.html", {})
    assert list(tmp_path.iterdir()) == []


def test_axis_ticks_are_round_numbers_inside() -> None:
    assert nice_step(0.34) == 0.5
    assert Axis(0, 10).ticks(4) == (0.0, 2.5, 5.0, 7.5, 10.0)
    assert Axis(19.2, 25.0).ticks(3) == (20.0, 22.0, 24.0)


def test_equal_values_still_have_an_axis() -> None:
    axis = axis_for([5.0, 5.0])
    assert axis.low < 5 < axis.high
    assert axis.at(5.0) == pytest.approx(50)
