"""``edgevlm verify BUNDLE``: the parity gate once more, as a table of stages; exit code 4 when one broke."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli import console
from edgevlm.cli.opening import NO_WISHES, TORCH, refuse_torch_for_a_half, takes_wishes
from edgevlm.core.errors import UsageError
from edgevlm.runtimes.choices import Wishes

if TYPE_CHECKING:
    from edgevlm.verify import Verification


@takes_wishes
def command(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a shipped name (nano).")],
    every: Annotated[bool, typer.Option("--all", help="Every precision of each half, not only the default.")] = False,
    wishes: Wishes = NO_WISHES,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    as_json: console.Json = False,
) -> None:
    """Compare BUNDLE, stage by stage, with what PyTorch computed when it was exported.  Needs no PyTorch."""
    from edgevlm.verify import verify_all, verify_bundle

    _refuse_torch(wishes)
    with console.progress(f"verify {bundle}"):
        found = verify_all(bundle, wishes, check=check) if every else (verify_bundle(bundle, wishes, check=check),)
    if as_json:
        console.print_json(found if every else found[0])
    else:
        for verification in found:
            _show(verification)
    for verification in found:
        verification.require()


def _refuse_torch(wishes: Wishes) -> None:
    if wishes.runtime == TORCH:
        raise UsageError("--runtime torch: PyTorch is what a bundle is compared with; see `edgevlm targets` for others")
    refuse_torch_for_a_half(wishes)


def _show(verification: Verification) -> None:
    typer.echo(f"{verification.bundle} ({verification.combination}) against PyTorch float32")
    typer.echo(f"{'stage':<16} {'measure':<11} {'found':>9} {'allowed':>9} {'cosine':>12}  result")
    for result in verification.stages:
        cosine = "" if result.cosine is None else f"{result.cosine:.9f}"
        outcome = "ok" if result.passed else "BROKEN"
        figures = f"{result.measure:<11} {result.found:>9.2g} {result.tolerance:>9.2g} {cosine:>12}"
        typer.echo(f"{result.stage:<16} {figures}  {outcome}{f' ({result.note})' if result.note else ''}")
