"""What a report shows, section by section."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.bench import plots
from edgevlm.bench.markup import Markup, element, join
from edgevlm.bench.measurement import Measurement, Memory
from edgevlm.bench.page import card, cell, fact_table, pill, table, tile, words
from edgevlm.bench.stats import Summary
from edgevlm.bench.table import MIB, interval, label, mebibytes, number

Runs = Mapping[str, Measurement]


@dataclass(frozen=True, kw_only=True)
class QuestionAnswer:
    """A question about the shown picture and what the model said; ``expected`` where that is known."""

    question: str
    answer: str
    expected: str | None = None
    ttft_user_ms: float | None = None


def tiles(run: Measurement) -> Markup:
    """The four figures that most readers came for."""
    summaries = run.summaries()
    shown = [
        _summary_tile("First text, as a user waits", summaries["ttft_user_ms"]),
        _summary_tile("First token, engine alone", summaries["ttft_engine_ms"]),
        _rate_tile(summaries["tpot_ms"]) if "tpot_ms" in summaries else None,
        _memory_tile(run.memory),
    ]
    return element("div", *shown, class_="tiles")


def _summary_tile(what: str, summary: Summary) -> Markup:
    return tile(what, number(summary.median), "ms", f"{interval(summary)} · n = {summary.n}")


def _rate_tile(tpot_ms: Summary) -> Markup:
    rate = f"{1000 / tpot_ms.median:.0f}" if tpot_ms.median > 0 else "-"
    return tile("Tokens per second after it", rate, "", f"{number(tpot_ms.median)} ms per token")


def _memory_tile(memory: Memory) -> Markup:
    parts = {"weight files": memory.weights_bytes, "cache": memory.cache_bytes}
    inside = [f"{size / MIB:.0f} {what}" for what, size in parts.items() if size is not None]
    return tile(f"Peak memory ({memory.kind})", f"{memory.peak_bytes / MIB:.0f}", "MiB", ", ".join(inside))


def comparison(runs: Runs) -> Markup:
    """Several runs side by side, as bars."""
    summaries = {name: run.summaries() for name, run in runs.items()}
    plotted = []
    for figure in ("ttft_user_ms", "ttft_engine_ms", "tpot_ms"):
        rows = [(name, one[figure]) for name, one in summaries.items() if figure in one]
        plotted += [element("h3", label(figure)), plots.bars(rows, "ms")] if rows else []
    peaks = [(name, f"{mebibytes(run.memory.peak_bytes)} ({run.memory.kind})") for name, run in runs.items()]
    about = "Medians; the line across each end is the 95 % interval. Shorter is better."
    return card("Side by side", about, *plotted, element("h3", "Peak memory"), fact_table(peaks))


def asked(answers: Sequence[QuestionAnswer], image_png: bytes | None) -> Markup:
    """The picture beside the questions about it."""
    picture = None
    if image_png is not None:
        source = f"data:image/png;base64,{b64encode(image_png).decode('ascii')}"
        picture = element("img", src=source, alt="The picture that the questions are about")
    lines = [line for one in answers for line in (element("dt", one.question), _answer(one))]
    about = "The picture and what the model on this machine said about it."
    answered = element("div", picture, element("dl", *lines), class_="asked" if picture else None)
    return card("Asked", about, answered)


def _answer(one: QuestionAnswer) -> Markup:
    mark = after = None
    if one.expected is not None:
        right = one.answer.strip().casefold() == one.expected.strip().casefold()
        mark = join(" ", pill("right", True) if right else pill(f"expected {one.expected}", False))
    if one.ttft_user_ms is not None:
        after = element("small", f"{number(one.ttft_user_ms)} ms to the first text")
    return element("dd", one.answer or "(nothing)", mark, after)


def parity(verify: Mapping[str, Any]) -> Markup:
    """What ``verify.json`` holds, whatever that is: values as facts, lists of rows as tables."""
    about = "What was compared with the PyTorch model, and how far apart the two are."
    tables = {name: value for name, value in verify.items() if isinstance(value, list)}
    facts = [
        (words(name), _one_line(value) if isinstance(value, Mapping) else cell(value))
        for name, value in verify.items()
        if name not in tables
    ]
    shown = [_row_table(value) for value in tables.values() if _is_rows(value)]
    return card("The same model", about, fact_table(facts), *shown)


def _is_rows(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(row, Mapping) for row in value)


def _row_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if _is_plain(rows, name)]
    cells = [[cell(row.get(name)) for name in columns] for row in rows]
    return table([words(name) for name in columns], cells)


def _is_plain(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a column holds single values, and at least one of them."""
    values = [row.get(name) for row in rows]
    found = any(_is_known(value) for value in values)
    return found and not any(isinstance(value, (list, Mapping)) for value in values)


def stages(runs: Runs) -> Markup:
    """One bar per run, cut into stages; as long as the run's answers took."""
    about = "Median of each stage over one whole answer, from the file to the last word."
    content: list[Markup] = []
    medians = {name: _stage_medians(run) for name, run in runs.items()}
    longest = max(sum(value for _, value in parts) for parts in medians.values())
    for name, parts in medians.items():
        content += [element("h3", name)] if len(runs) > 1 else []
        content += [plots.stacked_bar(parts, longest), _legend(parts)]
    return card("Where the time goes", about, *content)


def _stage_medians(run: Measurement) -> list[tuple[str, float]]:
    summaries = run.summaries()
    return [(stage.replace("_", " "), summaries[f"stage.{stage}_ms"].median) for stage in run.stages()]


def _legend(parts: Sequence[tuple[str, float]]) -> Markup:
    total = sum(value for _, value in parts) or 1.0
    lines = [
        element(
            "li",
            element("i", style=f"background:var(--c{i % plots.PALETTE})"),
            name,
            element("b", f"{number(value)} ms"),
            element("span", f"{value / total:.0%}", class_="share"),
        )
        for i, (name, value) in enumerate(parts)
    ]
    return element("ul", *lines, class_="legend")


def first_token(runs: Runs) -> Markup:
    """Both times to the first token of every repetition."""
    about = (
        "Each dot is one repetition; the line is the median, the shade its 95 % interval. User: from the "
        "request to the first text. Engine: vision, embedding, prefill and the first sample alone."
    )
    rows = [
        plots.Dots(
            name=what if len(runs) == 1 else f"{name}, {what}",
            values=run.series()[figure],
            summary=run.summaries()[figure],
            color=i,
        )
        for i, (name, run) in enumerate(runs.items())
        for figure, what in (("ttft_user_ms", "TTFT user"), ("ttft_engine_ms", "TTFT engine"))
    ]
    return card("Time to the first token", about, plots.dot_rows(rows, "ms"))


def token_gaps(runs: Runs) -> Markup | None:
    """The gap before each token by its position; None where nobody wrote a second token."""
    series = [(name, _by_position(run)) for name, run in runs.items()]
    series = [(name, positions) for name, positions in series if positions]
    if not series:
        return None
    keys = element("ul", *[_key(i, name) for i, (name, _) in enumerate(series)], class_="legend")
    about = "How long each token took after the one before: median and middle half of the repetitions."
    return card("Token by token", about, plots.gap_lines(series, "ms"), keys if len(series) > 1 else None)


def _key(i: int, name: str) -> Markup:
    return element("li", element("i", style=f"background:var(--c{i % plots.PALETTE})"), name)


def _by_position(run: Measurement) -> list[list[float]]:
    longest = max(len(one.token_gaps_ms) for one in run.repetitions)
    return [[one.token_gaps_ms[i] for one in run.repetitions if i < len(one.token_gaps_ms)] for i in range(longest)]


def figures(name: str, run: Measurement) -> Markup:
    """Every figure of a run in numbers."""
    header = ["", "median", "95 % interval", "p95", "p99", "min", "max", "n"]
    rows = [[label(figure), *_figure_cells(one)] for figure, one in run.summaries().items()]
    about = f"{name}: {len(run.repetitions)} repetitions after {run.warm_up.num_repetitions} warm-ups."
    return card("Figures", about, table(header, rows))


def _figure_cells(one: Summary) -> tuple[object, ...]:
    tails = (number(value) for value in (one.p95, one.p99, one.min, one.max))
    return (number(one.median), interval(one), *tails, one.n)


def conditions(name: str, run: Measurement) -> Markup:
    """What the figures of a run depend on."""
    work, where = run.workload, run.conditions
    facts: list[tuple[str, object]] = [
        ("command", element("code", where.command)),
        ("started", where.started),
        ("prompt", work.prompt),
        ("images", work.images),
        ("golden answer", where.golden),
        ("bundle", element("code", where.bundle_sha256 or "-")),
    ]
    groups = {"runtime": where.runtime, "device": where.device, "versions": where.versions}
    facts += [(what, _one_line(values)) for what, values in groups.items() if values]
    clocks = [("clocks before", where.clocks_mhz_before), ("clocks after", where.clocks_mhz_after)]
    facts += [(what, f"{min(mhz):.0f} to {max(mhz):.0f} MHz") for what, mhz in clocks if mhz]
    if where.other_load is not None:
        facts.append(("other programs", f"{where.other_load:.0%} of the processors"))
    return card("How it was measured", name, fact_table(facts))


def _one_line(values: Mapping[str, Any]) -> str:
    return " · ".join(f"{words(key)} {_value(value)}" for key, value in values.items() if value not in (None, ""))


def _value(value: object) -> str:
    return ", ".join(f"{key}: {one}" for key, one in value.items()) if isinstance(value, Mapping) else str(value)


def _is_known(value: object) -> bool:
    return value is not None and value != ""
