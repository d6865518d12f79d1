"""The verbs of ``edgevlm``, and what every one of them shares: flags, errors, exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from edgevlm.cli import console
from edgevlm.core.errors import (
    DISK_FULL,
    INTERRUPTED,
    OUT_OF_MEMORY,
    DoesNotFitError,
    EdgeVLMError,
    UsageError,
    is_disk_full,
    is_out_of_memory,
)
from edgevlm.core.optional import missing_library
from edgevlm.core.registry import unknown_name

CLOSED_PIPE = 141  # what a shell shows for a program whose reader went away
MAX_REASON = 400  # letters of an error that nobody foresaw


class Verb(NamedTuple):
    """One verb; its module defines ``command``, a function or (where it has verbs itself) a typer app."""

    name: str
    section: str
    help: str

    @property
    def module(self) -> str:
        """Where the verb is written; imported when it is used."""
        return f"edgevlm.cli.{self.name}"


MACHINE, WORKSHOP, DEVICE, RESULTS = "This machine", "Workshop (PyTorch)", "Device", "Results"
VERBS = (
    Verb("doctor", MACHINE, "Show this machine, and how to install what is missing."),
    Verb("targets", MACHINE, "List export targets and runtimes, and what each needs."),
    Verb("version", MACHINE, "Show the versions of EdgeVLM and what it runs on."),
    Verb("inspect", MACHINE, "Show what a model is made of and what it costs, without its weights."),
    Verb("train", WORKSHOP, "Train a model from a recipe."),
    Verb("export", WORKSHOP, "Turn a model into a verified bundle."),
    Verb("verify", DEVICE, "Check that a bundle still is the model it was made from."),
    Verb("build", DEVICE, "Build the TensorRT engines of a bundle on the device that runs them."),
    Verb("tune", DEVICE, "Find out what runs a bundle best here."),
    Verb("run", DEVICE, "Ask a bundle about an image, once or in a chat."),
    Verb("eval", DEVICE, "Score a bundle on exact-answer questions."),
    Verb("bench", DEVICE, "Measure how fast a bundle answers here."),
    Verb("report", RESULTS, "Draw measurements as one HTML file."),
    Verb("compare", RESULTS, "Compare two measurements."),
    Verb("bundle", RESULTS, "Show a bundle; pack it into one file and back."),
)
BY_NAME = {verb.name: verb for verb in VERBS}


class LazyVerb(TyperCommand):
    """Stands for a verb in help and completion; its module is imported when the verb is parsed."""

    def __init__(self, verb: Verb) -> None:
        super().__init__(verb.name, help=verb.help, rich_markup_mode=None)
        self.verb = verb

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return load(self.verb).make_context(info_name, args, parent=parent, **extra)


class Verbs(TyperGroup):
    """The ``edgevlm`` command: finds verbs in the table, turns every failure into one line and a code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(BY_NAME)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return LazyVerb(BY_NAME[cmd_name]) if cmd_name in BY_NAME else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in BY_NAME and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(unknown_name("verb", args[0], list(BY_NAME)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for section in dict.fromkeys(verb.section for verb in VERBS):
            with formatter.section(section):
                formatter.write_dl([(verb.name, verb.help) for verb in VERBS if verb.section == section])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(CLOSED_PIPE) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run one command line and exit with its code; called by :func:`main` and by typer's test runner."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        console.set_up()
        try:
            code = super().main(args, "edgevlm", complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = _stopped_by(error) or tell(error)
        if code == INTERRUPTED:
            _print_error("interrupted")
        _drop_unwritten_output()
        sys.exit(code or 0)


HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

app = typer.Typer(
    cls=Verbs,
    rich_markup_mode=None,
    context_settings=HELP,
    pretty_exceptions_enable=False,
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only: no progress, no notes.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr, tracebacks with errors.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from edgevlm.cli.version import edgevlm_version

        typer.echo(f"edgevlm {edgevlm_version()}")
        raise typer.Exit


@app.callback()
def edgevlm(
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Vision-language models on edge devices: export, verify, run and measure them."""
    console.set_up(quiet=quiet, verbose=verbose)


def main() -> None:
    """The entry point of the ``edgevlm`` command."""
    for name, handler in (("SIGINT", _interrupt), ("SIGTERM", _leave), ("SIGHUP", _leave)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP for us
            signal.signal(number, handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  it stays open to the end
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="backslashreplace")  # what the terminal cannot show is no reason to fail
    app()


def load(verb: Verb) -> Any:
    """The command behind ``verb``, with the shared flags accepted after it as well."""
    command = import_module(verb.module).command
    if isinstance(command, typer.Typer):
        for info in command.registered_commands:
            info.callback = with_shared_flags(info.callback) if info.callback else None
        command.rich_markup_mode, command.info.context_settings = None, HELP
        return typer.main.get_group(command)
    single = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP)
    single.command(verb.name)(with_shared_flags(command))
    return typer.main.get_command(single)


def with_shared_flags(function: Callable[..., object]) -> Callable[..., None]:
    """``function`` with ``-q`` and ``-v`` added to its signature, where typer looks for options."""
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name not in ("quiet", "verbose")]

    @functools.wraps(function)
    def verb(*args: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        before = console.settings
        console.set_up(quiet=quiet or before.quiet, verbose=verbose or before.verbose)
        function(*args, **options)

    shared = [
        inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
        inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose),
    ]
    combined = signature.replace(parameters=[*own, *shared])
    verb.__signature__ = combined  # type: ignore[attr-defined]
    verb.__annotations__ = {name: parameter.annotation for name, parameter in combined.parameters.items()}
    return verb


def tell(error: Exception) -> int:
    """Print ``error`` as one line on stderr (``-v``: with its traceback) and return the exit code."""
    if console.settings.verbose:
        traceback.print_exception(error)
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    message, code = _explain(error)
    _print_error(f"error: {message}")
    return code


def _explain(error: Exception) -> tuple[str, int]:
    if callable(usage := getattr(error, "format_message", None)):  # typer's own, such as an unknown option
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return f"{usage()}{hint}", int(getattr(error, "exit_code", UsageError.exit_code))
    if isinstance(error, EdgeVLMError):
        return str(error), error.exit_code
    if is_out_of_memory(error):
        return OUT_OF_MEMORY, DoesNotFitError.exit_code
    if is_disk_full(error):
        return f"{getattr(error, 'filename', None) or 'output'}: {DISK_FULL}", DoesNotFitError.exit_code
    if isinstance(error, ModuleNotFoundError) and not (error.name or "edgevlm").startswith("edgevlm"):
        missing = missing_library(error, error.name or "")
        return str(missing), missing.exit_code
    hint = "" if console.settings.verbose else " (run again with -v for the traceback)"
    reason = textwrap.shorten(str(error), MAX_REASON, placeholder=" ...")  # PyTorch adds its own C++ stack
    return f"unexpected {type(error).__name__}: {reason}{hint}", EdgeVLMError.exit_code


def _print_error(line: str) -> None:
    """One line, whatever stood in the message: a file name may hold line breaks or terminal commands."""
    words = " ".join(line.split())
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in words)
    with suppress(OSError, ValueError):  # nobody listens
        typer.echo(text, err=True)


def _drop_unwritten_output() -> None:
    """What could not be written would fail again when Python ends; then it goes nowhere instead."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stopped_by(error: Exception) -> int:
    """The exit code of the signal behind ``error``, else 0.

    A library that a signal interrupts while it is imported may swallow that, and fail of something else, which
    may even have become an error of ours by now.
    """
    return 128 + console.settings.signal if console.settings.signal else 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """On Ctrl-C: what Python does, and remember it."""
    console.settings.signal = number
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """On SIGTERM or SIGHUP: unwind like any exit, so that half-written output is removed; once."""
    signal.signal(number, signal.SIG_IGN)
    console.settings.signal = number
    raise SystemExit(128 + number)
