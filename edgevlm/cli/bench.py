"""``edgevlm bench BUNDLE``: how fast a bundle answers on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli.console import Json, progress, say
from edgevlm.cli.opening import MODEL_HELP, NO_WISHES, open_model, takes_wishes
from edgevlm.core.errors import UsageError
from edgevlm.core.registry import unknown_name
from edgevlm.runtimes.choices import Wishes

if TYPE_CHECKING:
    from edgevlm.bench.measurement import Measurement
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
    output: Annotated[str, typer.Option("--output", "-o", help="md, csv, json or jsonl.")] = "md",
    wishes: Wishes = NO_WISHES,
    save: Annotated[Path | None, typer.Option("--save", help="Write the raw run to this .jsonl file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --save names.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    as_json: Json = False,
) -> None:
    """Measure BUNDLE after warm-up: a new scene in every repetition, or the given images in turn."""
    from edgevlm.bench.record import write_measurement
    from edgevlm.bench.table import FORMATS

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
