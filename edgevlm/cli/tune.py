"""``edgevlm tune BUNDLE``: find out what runs each half of a bundle best on this machine, and remember it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli import console

if TYPE_CHECKING:
    from edgevlm.bench.tuning import Tried, Tuning


def command(
    bundle: Annotated[str, typer.Argument(help="Bundle folder.")],
    optimize: Annotated[
        str, typer.Option("--optimize", help="What `open_bundle` follows unasked: ttft, throughput or memory.")
    ] = "ttft",
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="Try only this one; repeatable.  Default: all installed.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every candidate is started and timed.")] = 3,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Timed answers a start.")] = 5,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=2, help="New tokens per answer.")] = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and show, but write no tune.json.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    as_json: console.Json = False,
) -> None:
    """Measure back ends, precisions and threads for BUNDLE here, and write the best choices to its tune.json.

    Only choices that pass the parity gate count.  `run`, `bench`, `eval` and `open_bundle` follow the file on machines
    like this one; what is asked for by name goes before it.
    """
    from edgevlm.bench.tuning import save, tune_bundle
    from edgevlm.runtimes.tuned import TUNE_FILE
    from edgevlm.shipped import find_bundle, require_writable

    if not dry_run:
        instead = "tune a copy (`edgevlm export`, or cp -r), or give --dry-run"
        require_writable(find_bundle(bundle), TUNE_FILE, instead=instead)
    with console.progress(f"tune {bundle}") as advance:

        def report(step: str) -> None:
            console.say(f"  {step}")
            advance(1)

        tuning = tune_bundle(
            bundle,
            optimize=optimize,
            runtimes=runtime,
            rounds=rounds,
            repetitions=repetitions,
            max_tokens=max_tokens,
            check=check,
            report=report,
        )
    file = None if dry_run else save(bundle, tuning)
    if as_json:
        console.print_json({"file": file, "tuning": tuning})
        return
    _show(tuning)
    typer.echo(f"written: {file}" if file else "nothing written (--dry-run)")


def _show(tuning: Tuning) -> None:
    typer.echo(f"{'half':<8} {'runtime':<14} {'precision':<14} {'threads':>7} {'ms':>9} {'peak MB':>8}  result")
    for one in tuning.tried:
        choice, trial = one.choice, one.trial
        name = f"{choice.runtime:<14} {choice.precision or '':<14} {choice.threads or 0:>7}"
        figures = f"{'':>9} {'':>8}" if trial.complaint else f"{_ms(one):>9} {trial.peak_bytes / 1e6:>8.0f}"
        result = trial.complaint or ", ".join(
            goal for goal, choices in tuning.choices.items() if getattr(choices, one.half) == choice
        )
        typer.echo(f"{one.half:<8} {name} {figures}  {result}")
    typer.echo("ms: vision of the encoder; prefill + one token of the decoder")
    typer.echo(f"open_bundle follows: {tuning.goal}")


def _ms(one: Tried) -> str:
    if one.half == "encoder":
        return f"{one.trial.vision_ms:.1f}"
    return f"{one.trial.prefill_ms:.1f}+{one.trial.decode_ms:.2f}"
