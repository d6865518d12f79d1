"""What every verb prints with: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from edgevlm.core.config import to_json

Json = Annotated[bool, typer.Option("--json", help="Print the result for machines, alone on stdout.")]
Advance = Callable[[int], None]

PLAIN_AFTER_S = 2.0  # work that is done sooner needs no line in a log
PLAIN_EVERY_S = 10.0


@dataclass
class Settings:
    """How much to say: ``quiet`` leaves errors, ``verbose`` adds debug lines and tracebacks.

    ``signal`` is the last one that asked this process to stop, 0 without.
    """

    quiet: bool = False
    verbose: bool = False
    signal: int = 0


settings = Settings()  # of this process; `-q` and `-v` set it before a verb runs


def set_up(*, quiet: bool = False, verbose: bool = False) -> None:
    """Remember the flags and send the log of every room to stderr."""
    settings.quiet, settings.verbose = quiet, verbose
    logger = logging.getLogger("edgevlm")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbose else "%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)


def print_json(value: object) -> None:
    """Print a dataclass or plain data as JSON on stdout."""
    text = to_json(value)
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        text = json.dumps(json.loads(text), indent=2) + "\n"  # escapes what this terminal cannot show
    sys.stdout.write(text)


def say(text: str) -> None:
    """A line for people on stderr, unless ``-q``."""
    if not settings.quiet:
        typer.echo(text, err=True)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Advance]:
    """Show that work goes on, and yield ``advance(steps)``.

    On a terminal a bar that goes away at the end; otherwise a line now and then, when the work takes more
    than two seconds; nothing with ``-q``.  ``total=None`` is work of unknown length.
    """
    if settings.quiet:
        yield lambda steps: None
    elif sys.stderr.isatty():
        with _bar(description, total) as advance:
            yield advance
    else:
        yield _PlainProgress(description, total).advance


@contextmanager
def steps(description: str, names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Progress over named steps: yields ``begin(name)``, to be called as each begins; some may be left out.

    A name with a colon says how far its step is (``calibrate: 5 of 32``), and is shown now and then.
    """
    with progress(description, len(names)) as advance:
        done, next_share = 0, 0.0

        def advance_to(position: int) -> None:
            nonlocal done
            advance(position - done)
            done = position

        def begin(name: str) -> None:
            nonlocal next_share
            now, is_share = time.monotonic(), ": " in name
            if is_share and now < next_share:
                return
            if not is_share:
                advance_to(names.index(name))
            next_share = now + PLAIN_EVERY_S
            say(f"  {name}")

        yield begin
        advance_to(len(names))


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    counts = (MofNCompleteColumn(), TimeRemainingColumn()) if total else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(description, total=total)
        yield lambda steps: bars.advance(task, steps)


class _PlainProgress:
    """Progress for a log file: few lines, none for quick work."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self.started = time.monotonic()
        self.next_line = self.started + PLAIN_AFTER_S

    def advance(self, steps: int) -> None:
        self.done += steps
        now = time.monotonic()
        if now >= self.next_line:
            self.next_line = now + PLAIN_EVERY_S
            share = f"{self.done} of {self.total}" if self.total else str(self.done)
            typer.echo(f"{self.description}: {share} ({now - self.started:.0f} s)", err=True)
