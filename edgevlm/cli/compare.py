"""``edgevlm compare A B``: what changed between two measurements, and whether it is more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgevlm.cli.console import Json, print_json


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="File from `edgevlm bench --save`, the reference.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="File to compare with it.")],
    as_json: Json = False,
) -> None:
    """Compare run B with run A: ratio of medians, its interval and a verdict for every figure."""
    from edgevlm.bench.comparing import compare
    from edgevlm.bench.record import read_measurement

    comparison = compare(read_measurement(a), read_measurement(b), names=(str(a), str(b)))
    print_json(comparison) if as_json else typer.echo(str(comparison))
