"""``edgevlm report RUN...``: measurements as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgevlm.cli.console import Json, print_json
from edgevlm.core.errors import UsageError


def command(
    runs: Annotated[list[Path], typer.Argument(help="Files from `edgevlm bench --save`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path("report.html"),
    verify: Annotated[Path | None, typer.Option("--verify", help="Show this verify.json of a bundle as well.")] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file about RUNS, with plots inside; it needs no network."""
    from edgevlm.bench.record import read_measurement
    from edgevlm.bench.report import write_report
    from edgevlm.core.config import read_json

    if out.resolve() in {path.resolve() for path in (*runs, *([verify] if verify else ()))}:
        raise UsageError(f"{out} is one of the files to read: name another one with -o")
    if out.is_dir():
        raise UsageError(f"{out} is a folder: name a file, such as {out / 'report.html'}")
    measurements = {name: read_measurement(path) for name, path in _named(runs).items()}
    write_report(out, measurements, verify=read_json(verify) if verify else None)
    print_json({"report": str(out)}) if as_json else typer.echo(out)


def _named(runs: list[Path]) -> dict[str, Path]:
    """Files by their short names, or by their whole ones where two would be the same."""
    short = [path.stem for path in runs]
    return {path.stem if short.count(path.stem) == 1 else str(path): path for path in runs}
