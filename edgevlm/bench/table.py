"""A measurement as text: a table for people, rows for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from edgevlm.bench.measurement import Measurement
from edgevlm.bench.record import to_jsonl
from edgevlm.bench.stats import Summary
from edgevlm.core.config import to_json

MIB = 1024 * 1024
LABELS = {
    "ttft_user_ms": "TTFT user (ms)",
    "ttft_engine_ms": "TTFT engine (ms)",
    "tpot_ms": "TPOT (ms per token)",
    "end_to_end_ms": "end to end (ms)",
    "token_gap_ms": "token gap (ms)",
}


def label(name: str) -> str:
    """What a figure is called in tables and plots."""
    return LABELS.get(name, name.removeprefix("stage.").removesuffix("_ms").replace("_", " ") + " (ms)")


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and no exponent; ``-`` for None."""
    if value is None:
        return "-"
    decimals = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits
    return f"{value:.{decimals}f}"


def interval(summary: Summary) -> str:
    """``12.3 - 12.9``, or ``-`` where there are too few values."""
    return "-" if summary.low is None else f"{number(summary.low)} - {number(summary.high)}"


def mebibytes(num_bytes: int | None) -> str:
    """``48.2 MiB``, or ``-`` for None."""
    return "-" if num_bytes is None else f"{num_bytes / MIB:.1f} MiB"


def headline(measurement: Measurement) -> str:
    """One line: model, regime, counts and tokens."""
    work, fewest_most = measurement.workload, measurement.num_new_tokens()
    tokens = " to ".join(str(count) for count in sorted(set(fewest_most)))
    first = measurement.repetitions[0]
    return (
        f"{measurement.conditions.model} · {work.regime} · {len(measurement.repetitions)} repetitions "
        f"after {measurement.warm_up.num_repetitions} warm-ups · {first.num_prompt_tokens} prompt tokens, "
        f"{first.num_vision_tokens} of them vision · {tokens} new tokens"
    )


def memory_line(measurement: Measurement) -> str:
    """Peak memory and what is known to be in it."""
    memory = measurement.memory
    parts = {"weight files": memory.weights_bytes, "cache": memory.cache_bytes}
    inside = ", ".join(f"{name} {mebibytes(size)}" for name, size in parts.items() if size is not None)
    return f"peak memory ({memory.kind}) {mebibytes(memory.peak_bytes)}" + (f"; {inside}" if inside else "")


def to_markdown(measurement: Measurement) -> str:
    """A Markdown table of all figures, with a line above that says what was run and notes below."""
    rows = [
        (
            label(name),
            number(one.median),
            interval(one),
            number(one.p95),
            number(one.p99),
            number(one.max),
            str(one.n),
        )
        for name, one in measurement.summaries().items()
    ]
    table = grid(("figure", "median", "95 % interval", "p95", "p99", "max", "n"), rows)
    rate = measurement.summaries().get("tpot_ms")
    lines = [headline(measurement), "", *table, ""]
    lines += [f"{1000 / rate.median:.1f} tokens per second after the first"] if rate and rate.median > 0 else []
    lines += [memory_line(measurement), *(f"note: {note}" for note in measurement.notes())]
    return "\n".join(lines)


def to_csv(measurement: Measurement) -> str:
    """One row per figure: name, n, median, low, high, p95, p99, min, max."""
    text = io.StringIO()
    columns = ["n", "median", "low", "high", "p95", "p99", "min", "max"]
    writer = csv.DictWriter(text, ["model", "regime", "figure", *columns], lineterminator="\n")
    writer.writeheader()
    for name, summary in measurement.summaries().items():
        about = {"model": measurement.conditions.model, "regime": measurement.workload.regime, "figure": name}
        writer.writerow({**about, **asdict(summary)})
    return text.getvalue().rstrip("\n")


def to_plain_json(measurement: Measurement) -> str:
    """The whole run and its summaries as one JSON object."""
    return to_json(as_dict(measurement)).rstrip("\n")


def as_dict(measurement: Measurement) -> dict[str, Any]:
    """The run as plain data, with ``summary`` and ``notes`` beside the raw repetitions."""
    summary = {name: asdict(one) for name, one in measurement.summaries().items()}
    return {**asdict(measurement), "summary": summary, "notes": list(measurement.notes())}


def _jsonl(measurement: Measurement) -> str:
    return to_jsonl(measurement).rstrip("\n")


FORMATS: dict[str, Callable[[Measurement], str]] = {
    "md": to_markdown,
    "csv": to_csv,
    "json": to_plain_json,
    "jsonl": _jsonl,
}


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown rows whose columns line up in a terminal; all but the first are set right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join((first, *rest)) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return [line(header), rule, *map(line, rows)]
