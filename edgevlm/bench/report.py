"""One HTML file that shows runs: no network, no script, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgevlm.bench import machine, sections
from edgevlm.bench.markup import Markup, element
from edgevlm.bench.sections import QuestionAnswer, Runs
from edgevlm.core.errors import InputError
from edgevlm.core.files import write_text

__all__ = ["QuestionAnswer", "report_html", "write_report"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    path: Path,
    runs: Runs,
    *,
    verify: Mapping[str, Any] | None = None,
    answers: Sequence[QuestionAnswer] = (),
    image_png: bytes | None = None,
) -> None:
    """Write the report on ``runs`` (name to measurement) to ``path``, whole or not at all.

    ``verify`` is the content of a bundle's ``verify.json``; ``answers`` stand beside ``image_png``.
    Raises InputError when there is no run.
    """
    write_text(path, report_html(runs, verify=verify, answers=answers, image_png=image_png))


def report_html(
    runs: Runs,
    *,
    verify: Mapping[str, Any] | None = None,
    answers: Sequence[QuestionAnswer] = (),
    image_png: bytes | None = None,
) -> str:
    """The report as text; see ``write_report``."""
    if not runs:
        raise InputError("a report needs at least one run: `edgevlm bench BUNDLE --save run.jsonl` makes one")
    body = element(
        "main",
        _header(runs),
        *_notes(runs),
        sections.tiles(next(iter(runs.values()))) if len(runs) == 1 else sections.comparison(runs),
        sections.asked(answers, image_png) if answers or image_png else None,
        sections.parity(verify) if verify else None,
        sections.stages(runs),
        sections.first_token(runs),
        sections.token_gaps(runs),
        *(sections.figures(name, run) for name, run in runs.items()),
        *(sections.conditions(name, run) for name, run in runs.items()),
        element("footer", "Medians with 95 % bootstrap intervals. p95 needs 20 values, p99 needs 100."),
    )
    return f"<!doctype html>\n{element('html', _head(runs), element('body', body), lang='en')}\n"


def _head(runs: Runs) -> Markup:
    style = files("edgevlm.bench").joinpath("report.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{' and '.join(_models(runs))} - EdgeVLM report"),
        element("style", Markup(style)),
    )


def _models(runs: Runs) -> list[str]:
    return list(dict.fromkeys(run.conditions.model for run in runs.values()))


def _header(runs: Runs) -> Markup:
    first = next(iter(runs.values()))
    machines = list(dict.fromkeys(machine.name_of(run.conditions.device) for run in runs.values()))
    return element(
        "header",
        element("div", "EdgeVLM report", class_="brand"),
        element("h1", " and ".join(_models(runs))),
        element(
            "p",
            f"{' · '.join(machines)} · {first.workload.regime} · {first.conditions.started[:10]}",
            class_="sub",
        ),
    )


def _notes(runs: Runs) -> Iterator[Markup]:
    for name, run in runs.items():
        for note in run.notes():
            said = note[0].upper() + note[1:] + "."
            yield element("div", said if len(runs) == 1 else f"{name}: {said}", class_="note")
