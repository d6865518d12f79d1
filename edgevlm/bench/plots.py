"""Plots as inline SVG: sizes in per cent across and pixels down, so that text keeps its size on a phone.

A plot has no viewBox.  Marks that must stretch (bands, lines) sit in an inner SVG that has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from edgevlm.bench.markup import Markup, element, join
from edgevlm.bench.stats import Summary, percentile
from edgevlm.bench.table import number

DOT_ROW, BAR_ROW = 68, 54  # pixels from one row of marks to the next
PALETTE = 8  # the style sheet has colours --c0 to --c7


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high``, drawn from ``start`` to ``end`` per cent of the width."""

    low: float
    high: float
    start: float = 2.0
    end: float = 98.0

    def at(self, value: float) -> float:
        """Where ``value`` lies, in per cent of the width."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 4) -> tuple[float, ...]:
        """Round values inside the axis, roughly ``about`` of them."""
        step = nice_step((self.high - self.low) / max(1, about))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(round(i * step, 12) for i in range(first, last + 1))


def nice_step(width: float) -> float:
    """The round number (1, 2, 2.5 or 5 times a power of ten) next above ``width``."""
    power = 10.0 ** math.floor(math.log10(width))
    return next((factor * power for factor in (1.0, 2.0, 2.5, 5.0) if factor * power >= width * 0.999), 10.0 * power)


def axis_for(values: Sequence[float], *, from_zero: bool = False) -> Axis:
    """An axis that holds all ``values`` with some air; from zero where lengths are compared."""
    low, high = min(values), max(values)
    air = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return Axis(0.0, high + air if high > 0 else 1.0) if from_zero else Axis(low - air, high + air)


def stacked_bar(parts: Sequence[tuple[str, float]], longest: float) -> Markup:
    """One bar cut by share, as wide as its sum is of ``longest``; each part in its colour with a tooltip."""
    total, longest = sum(value for _, value in parts) or 1.0, longest or 1.0
    starts = accumulate((value for _, value in parts), initial=0.0)
    marks = [
        element(
            "rect",
            element("title", f"{name}: {number(value)} ms, {value / total:.0%}"),
            x=_percent(100 * start / longest),
            width=_percent(100 * value / longest),
            y=0,
            height=36,
            style=_fill(i),
        )
        for i, ((name, value), start) in enumerate(zip(parts, starts, strict=False))
    ]
    return _plot(36, *marks, label="share of each stage", class_="plot stack")


@dataclass(frozen=True, kw_only=True)
class Dots:
    """One row of a dot plot; ``color`` counts through the palette."""

    name: str
    values: Sequence[float]
    summary: Summary
    color: int = 0


def dot_rows(rows: Sequence[Dots], unit: str) -> Markup:
    """Every value as a dot, one row per series, with the median and its interval."""
    axis = axis_for([value for row in rows for value in row.values])
    height = len(rows) * DOT_ROW
    marks = [_dot_row(axis, i * DOT_ROW + 42, row, unit) for i, row in enumerate(rows)]
    return _plot(height + 26, _vertical_grid(axis, height, unit), *marks, label=f"each repetition, {unit}")


def bars(rows: Sequence[tuple[str, Summary]], unit: str) -> Markup:
    """Medians as bars from zero, with their intervals as whiskers."""
    axis = Axis(0.0, max(one.high or one.median for _, one in rows) * 1.16 or 1.0, start=0.0)
    height = len(rows) * BAR_ROW
    marks = [_bar(axis, i, *row, unit) for i, row in enumerate(rows)]
    return _plot(height + 26, _vertical_grid(axis, height, unit), *marks, label=f"medians, {unit}")


def gap_lines(series: Sequence[tuple[str, Sequence[Sequence[float]]]], unit: str) -> Markup:
    """Median gap by token position, one line per series; the band holds the middle half of the repetitions.

    A series is one sequence of gaps per position.
    """
    shown = [(name, [_quartiles(gaps) for gaps in positions if gaps]) for name, positions in series]
    longest = max(len(points) for _, points in shown)
    highest = max(upper for _, points in shown for _, _, upper in points)
    down = Axis(0.0, highest * 1.1 or 1.0, start=190.0, end=10.0)
    across = Axis(2.0, max(3.0, longest + 1.0), start=16.0, end=98.0)
    lines = [_gap_line(across, down, i, points) for i, (_, points) in enumerate(shown)]
    box = {"viewBox": "0 0 100 200", "preserveAspectRatio": "none", "width": "100%", "height": 200}
    stretched = element("svg", *lines, **box)
    return _plot(
        232,
        *[_horizontal_rule(down, tick, unit) for tick in down.ticks(4)],
        stretched,
        *[_tick_text(across, tick, 216, f"{tick:.0f}") for tick in across.ticks(5) if tick == int(tick)],
        element("text", "token", x="100%", y=230, text_anchor="end", class_="dim"),
        label=f"gap before each token, {unit}",
    )


def _dot_row(axis: Axis, middle: float, row: Dots, unit: str) -> Markup:
    color = _fill(row.color)
    dots = [
        element(
            "circle",
            element("title", f"repetition {i + 1}: {number(value)} {unit}"),
            cx=_percent(axis.at(value)),
            cy=middle + _jitter(i),
            r=3.5,
            style=color,
            class_="dot",
        )
        for i, value in enumerate(row.values)
    ]
    where = _percent(axis.at(row.summary.median))
    median = element("line", x1=where, x2=where, y1=middle - 15, y2=middle + 15, class_="median")
    text = _row_text(middle - 22, row.name, f"{number(row.summary.median)} {unit}")
    return join(_interval_band(axis, middle, row.summary, color), *dots, median, text)


def _interval_band(axis: Axis, middle: float, summary: Summary, color: str) -> Markup | None:
    if summary.low is None or summary.high is None:
        return None
    left, right = axis.at(summary.low), axis.at(summary.high)
    return element(
        "rect",
        x=_percent(left),
        width=_percent(right - left),
        y=middle - 13,
        height=26,
        rx=3,
        style=color,
        opacity="0.22",
    )


def _bar(axis: Axis, row: int, name: str, summary: Summary, unit: str) -> Markup:
    top = row * BAR_ROW + 23
    width = _percent(axis.at(summary.median))
    bar = element("rect", x=0, width=width, y=top, height=20, rx=3, style=_fill(row))
    whisker = None
    if summary.low is not None and summary.high is not None:
        low, high = _percent(axis.at(summary.low)), _percent(axis.at(summary.high))
        whisker = element("line", x1=low, x2=high, y1=top + 10, y2=top + 10, class_="median")
    return join(bar, whisker, _row_text(top - 7, name, f"{number(summary.median)} {unit}"))


def _row_text(y: float, name: str, value: str) -> Markup:
    left = element("text", name, x=0, y=y, class_="name")
    return join(left, element("text", value, x="100%", y=y, text_anchor="end", class_="value"))


def _gap_line(across: Axis, down: Axis, color: int, points: Sequence[tuple[float, float, float]]) -> Markup:
    places = [across.at(i + 2) for i in range(len(points))]
    line = " ".join(f"{x:.3f},{down.at(median):.2f}" for x, (_, median, _) in zip(places, points, strict=True))
    upper = [f"{x:.3f},{down.at(high):.2f}" for x, (_, _, high) in zip(places, points, strict=True)]
    lower = [f"{x:.3f},{down.at(low):.2f}" for x, (low, _, _) in zip(places, points, strict=True)]
    around = " ".join([*upper, *reversed(lower)])
    shade = element("polygon", points=around, style=_fill(color), opacity="0.2")
    stroke = f"stroke:var(--c{color % PALETTE})"
    return join(shade, element("polyline", points=line, style=stroke, class_="line"))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    return percentile(values, 25), percentile(values, 50), percentile(values, 75)


def _vertical_grid(axis: Axis, height: float, unit: str) -> Markup:
    ticks = [tick for tick in axis.ticks(4) if 6 <= axis.at(tick) <= 94 or tick == 0]
    rules = [
        element("line", x1=_percent(axis.at(tick)), x2=_percent(axis.at(tick)), y1=0, y2=height, class_="grid")
        for tick in ticks
    ]
    texts = [f"{tick:g} {unit}" if tick == ticks[-1] else f"{tick:g}" for tick in ticks]
    labels = [_tick_text(axis, tick, height + 18, text) for tick, text in zip(ticks, texts, strict=True)]
    return join(*rules, *labels)


def _horizontal_rule(down: Axis, value: float, unit: str) -> Markup:
    y = down.at(value)
    rule = element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid")
    return join(rule, element("text", f"{value:g} {unit}", x=0, y=y - 5, class_="dim") if value else None)


def _tick_text(axis: Axis, value: float, y: float, text: str) -> Markup:
    place = axis.at(value)
    anchor = "start" if place < 2 else "end" if place > 96 else "middle"
    return element("text", text, x=_percent(place), y=y, text_anchor=anchor, class_="dim")


def _plot(height: float, *marks: object, label: str, class_: str = "plot") -> Markup:
    return element("svg", *marks, width="100%", height=height, role="img", aria_label=label, class_=class_)


def _jitter(i: int) -> float:
    """A fixed spread of ±9 pixels that keeps neighbours apart (golden ratio sequence)."""
    return round(18 * ((i * 0.6180339887) % 1) - 9, 2)


def _fill(color: int) -> str:
    return f"fill:var(--c{color % PALETTE})"


def _percent(value: float) -> str:
    return f"{value:.3f}%"
