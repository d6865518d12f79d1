"""Two runs beside each other: by how much, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten

from edgevlm.bench import machine
from edgevlm.bench.measurement import Measurement
from edgevlm.bench.stats import Ratio, Summary, ratio_of_medians, summarize
from edgevlm.bench.table import grid, label, mebibytes, number

NOISE = 0.02  # two runs of the same bundle differ by about as much as the warm-up calls settled


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of both runs; ``ratio`` is B / A, so below 1 means that B takes less time."""

    figure: str
    a: Summary
    b: Summary
    ratio: Ratio
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs between run A and run B; ``warnings`` say why the two may not be comparable."""

    a: str
    b: str
    rows: tuple[Row, ...]
    peak_memory_bytes: tuple[int, int]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return _to_text(self)


def compare(a: Measurement, b: Measurement, *, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Every figure that both runs have, with the ratio of medians B / A and its 95 % interval."""
    ours, theirs = a.series(), b.series()
    shared = [name for name in ours if name in theirs and min(*ours[name], *theirs[name]) > 0]
    rows = [_row(name, ours[name], theirs[name]) for name in shared]
    return Comparison(
        a=names[0],
        b=names[1],
        rows=tuple(rows),
        peak_memory_bytes=(a.memory.peak_bytes, b.memory.peak_bytes),
        warnings=tuple(_warnings(a, b)),
    )


def _row(figure: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    ratio = ratio_of_medians(theirs, ours)
    return Row(figure=figure, a=summarize(ours), b=summarize(theirs), ratio=ratio, verdict=verdict(ratio))


def verdict(ratio: Ratio) -> str:
    """``faster`` or ``slower`` when the whole interval lies beyond the noise, else that nothing was shown."""
    if ratio.low is None or ratio.high is None:
        return "too few repetitions"
    if ratio.high < 1 - NOISE:
        return "faster"
    if ratio.low > 1 + NOISE:
        return "slower"
    return "no difference shown"


ONE_RUN = "one run a side: what drifts from one process to the next is not in the intervals"


def _warnings(a: Measurement, b: Measurement) -> Iterator[str]:
    first, second = _must_agree(a), _must_agree(b)
    for name in first:
        if first[name] != second[name]:
            yield f"{name} differs: {first[name]} and {second[name]}"
    for name, run in (("A", a), ("B", b)):
        yield from (f"{name}: {note}" for note in run.notes())


def _must_agree(run: Measurement) -> dict[str, object]:
    """What has to be the same in two runs for their times to be comparable."""
    fewest, most = run.num_new_tokens()
    return {
        "the device": machine.name_of(run.conditions.device),
        "the regime": run.workload.regime,
        "the prompt": repr(shorten(run.workload.prompt, 50, placeholder=" ...")),
        "where the images came from": run.workload.images,
        "the number of prompt tokens": run.repetitions[0].num_prompt_tokens,
        "the number of vision tokens": run.repetitions[0].num_vision_tokens,
        "the number of new tokens": fewest if fewest == most else f"{fewest} to {most}",
    }


def _to_text(comparison: Comparison) -> str:
    rows = [
        (
            label(row.figure),
            number(row.a.median),
            number(row.b.median),
            number(row.ratio.value),
            _bounds(row.ratio),
            row.verdict,
        )
        for row in comparison.rows
    ]
    table = grid(("figure", "A", "B", "B / A", "95 % interval", "B is"), rows)
    a, b = comparison.peak_memory_bytes
    named = [f"A = {comparison.a}", f"B = {comparison.b}", ""]
    memory = f"peak memory: A {mebibytes(a)}, B {mebibytes(b)}"
    return "\n".join([*named, *table, "", memory, ONE_RUN, *(f"warning: {one}" for one in comparison.warnings)])


def _bounds(ratio: Ratio) -> str:
    return "-" if ratio.low is None else f"{number(ratio.low)} - {number(ratio.high)}"
