"""``edgevlm train RECIPE OUT``: runs the recipe to its end, from wherever an earlier run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgevlm.cli import console


def command(
    recipe: Annotated[Path, typer.Argument(help="TOML file, such as edgevlm/shipped/nano/recipe.toml.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run; an interrupted run in it goes on.")],
    cache: Annotated[
        Path, typer.Option("--cache", help="Folder for rendered pictures (48 kB each at 128 pixels).")
    ] = Path("runs/cache"),
) -> None:
    """Train a model as RECIPE says.  Stop it at any time; the same command goes on from the last checkpoint.

    On several cores: torchrun --nproc-per-node N -m edgevlm train RECIPE OUT.
    """
    from edgevlm.core.config import from_recipe
    from edgevlm.distill.recipe import TrainRecipe
    from edgevlm.distill.trainer import train

    plan = from_recipe(TrainRecipe, recipe)
    with console.progress(f"train {plan.name}", plan.optimization.steps) as advance:
        train(plan, out, cache, report=lambda entry: _report(entry, advance, plan.log_every))
    typer.echo(f"{out}: {plan.name} is trained; next: edgevlm export {out} BUNDLE")


def _report(entry: dict[str, float], advance: console.Advance, steps: int) -> None:
    advance(steps)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in entry.items())
    console.say(shown)
