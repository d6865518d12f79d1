"""``edgevlm bench BUNDLE``: how fast a bundle answers on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from edgevlm.cli.console import Json, print_json, progress, say
from edgevlm.cli.opening import MODEL_HELP, NO_WISHES, open_model, takes_wishes
from edgevlm.core.errors import UsageError
from edgevlm.core.registry import unknown_name
from edgevlm.runtimes.choices import Wishes

if TYPE_CHECKING:
    from edgevlm.bench.measurement import Measurement
    from edgevlm.bench.suite import SuiteResult
    from edgevlm.runtimes.vlm import RuntimeVlm


@takes_wishes
def command(
    bundle: Annotated[str, typer.Argument(help=MODEL_HELP)],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Ask about this file (repeatable); default: generated scenes."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this instead of the standard question.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", "-p", help="Lengthen the prompt to this many tokens.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="New tokens per answer.")] = 32,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Timed answers.")] = 20,
    output: Annotated[
        str, typer.Option("--output", "-o", help="md, csv, json or jsonl; with --suite the file to write.")
    ] = "md",
    suite: Annotated[
        str | None, typer.Option("--suite", help="jetson: build, verify and measure every precision, into one file.")
    ] = None,
    any_device: Annotated[
        bool, typer.Option("--any-device", help="Run the suite on a machine that it is not for.")
    ] = False,
    wishes: Wishes = NO_WISHES,
    save: Annotated[Path | None, typer.Option("--save", help="Write the raw run to this .jsonl file.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file that --save, or -o of a suite, names.")
    ] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    as_json: Json = False,
) -> None:
    """Measure BUNDLE after warm-up: a new scene in every repetition, or the given images in turn."""
    from edgevlm.bench.record import write_measurement
    from edgevlm.bench.table import FORMATS

    if suite is not None:
        _refuse_with_suite({"--image": image, "--prompt": prompt, "--prompt-tokens": prompt_tokens, "--save": save})
        plan = SuiteArguments(suite, wishes, repetitions, max_tokens, any_device, check)
        _run_suite(bundle, plan, _suite_file(output, overwrite), as_json=as_json)
        return
    output = "json" if as_json else output
    if output not in FORMATS:
        raise UsageError(unknown_name("output format", output, list(FORMATS)))
    if save is not None and save.is_dir():
        raise UsageError(f"--save {save} is a folder: name a file, such as {save / 'run.jsonl'}")
    if save is not None and save.exists() and save.is_file() and not overwrite:
        raise UsageError(f"--save {save} exists already: choose another name or pass --overwrite")
    with open_model(bundle, wishes, check=check) as vlm:
        question = _question(vlm, prompt, prompt_tokens)
        measurement = _measure(vlm, image or [], question, repetitions, max_tokens)
    typer.echo(FORMATS[output](measurement))
    if save is not None:
        write_measurement(save, measurement)


class SuiteArguments(NamedTuple):
    """What the flags say of a suite."""

    suite: str
    wishes: Wishes
    repetitions: int
    max_tokens: int
    any_device: bool
    check: bool


def _refuse_with_suite(options: dict[str, object]) -> None:
    if given := [name for name, value in options.items() if value]:
        raise UsageError(f"--suite asks its own question about its own pictures: leave {', '.join(given)} out")


def _suite_file(output: str, overwrite: bool) -> Path:
    """The file that -o names, before anything is measured."""
    from edgevlm.bench.table import FORMATS

    path = Path(output)
    if output in FORMATS or path.is_dir():
        raise UsageError("--suite writes one JSON file: name it, such as -o jetson.json")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: choose another name or pass --overwrite")
    return path


def _run_suite(bundle: str, arguments: SuiteArguments, file: Path, *, as_json: bool) -> None:
    from edgevlm.bench.suite import SuitePlan, require_figures, run_suite, write_suite

    with progress(f"suite {arguments.suite}") as advance:

        def report(step: str) -> None:
            say(f"  {step}")
            advance(1)

        result = run_suite(bundle, SuitePlan(**arguments._asdict()), report=report)
    write_suite(file, result)
    for line in result.advice:
        say(f"advice: {line}")
    if as_json:
        print_json(result)
    else:
        _show_suite(result)
        typer.echo(f"written: {file}")
    require_figures(result)


def _show_suite(result: SuiteResult) -> None:
    from edgevlm.bench.table import mebibytes, number

    shown = ("vision_ms", "prefill_ms", "ttft_engine_ms", "tpot_ms")
    titles = [name.removesuffix("_ms").replace("_", " ") for name in shown]
    typer.echo(f"{'encoder':<14} {'decoder':<14} " + " ".join(f"{title:>12}" for title in titles) + "   peak")
    for pair in result.pairs:
        names = f"{pair.encoder_precision:<14} {pair.decoder_precision:<14}"
        if pair.measured is None:
            typer.echo(f"{names} {pair.complaint}")
            continue
        figures = [pair.measured.figures.get(name) for name in shown]
        medians = " ".join(f"{number(one.median if one else None):>12}" for one in figures)
        measured, on_board = pair.measured, result.hardware.jetson is not None
        peak = measured.system_peak_bytes if on_board else measured.process_peak_bytes
        typer.echo(f"{names} {medians}   {mebibytes(peak)}")
    typer.echo("medians in ms; peak: of the process; on a Jetson, by how much available memory fell")


def _measure(vlm: RuntimeVlm, images: list[Path], prompt: str | None, repetitions: int, max_tokens: int) -> Measurement:
    from edgevlm.bench.measuring import measure

    with progress("warm-up, then repetitions", repetitions) as advance:
        return measure(
            vlm,
            image=images or None,
            prompt=prompt,
            repetitions=repetitions,
            max_tokens=max_tokens,
            command=shlex.join(["edgevlm", *sys.argv[1:]]),
            on_repetition=lambda: advance(1),
        )


def _question(vlm: RuntimeVlm, prompt: str | None, prompt_tokens: int | None) -> str | None:
    from edgevlm.bench import workload

    if prompt_tokens is None:
        return prompt
    question = workload.prompt_of_length(vlm, prompt_tokens, workload.PROMPT if prompt is None else prompt)
    if (found := workload.prompt_tokens(vlm, question, workload.scene_grid(vlm))) != prompt_tokens:
        say(f"the prompt has {found} tokens: nothing that this vocabulary knows makes it {prompt_tokens}")
    return question
