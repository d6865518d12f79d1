"""``edgevlm verify BUNDLE``: the parity gate once more, as a table of stages; exit code 4 when one broke."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli import console

if TYPE_CHECKING:
    from edgevlm.verify import Verification


def command(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a shipped name (nano).")],
    runtime: Annotated[str, typer.Option("--runtime", help="See `edgevlm targets`.")] = "onnxruntime",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    as_json: console.Json = False,
) -> None:
    """Compare BUNDLE, stage by stage, with what PyTorch computed when it was exported.  Needs no PyTorch."""
    from edgevlm.verify import verify_bundle

    with console.progress(f"verify {bundle}"):
        verification = verify_bundle(bundle, runtime=runtime, check=check)
    if as_json:
        console.print_json(verification)
    else:
        _show(verification)
    verification.require()


def _show(verification: Verification) -> None:
    typer.echo(f"{verification.bundle} ({verification.precision}) against PyTorch float32")
    typer.echo(f"{'stage':<16} {'max abs':>9} {'allowed':>9} {'cosine':>12}  result")
    for result in verification.stages:
        cosine = "" if result.cosine is None else f"{result.cosine:.9f}"
        outcome = "ok" if result.passed else "BROKEN"
        figures = f"{result.max_abs:>9.2g} {result.tolerance:>9.2g} {cosine:>12}"
        typer.echo(f"{result.stage:<16} {figures}  {outcome}{f' ({result.note})' if result.note else ''}")
