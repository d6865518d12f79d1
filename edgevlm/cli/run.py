"""``edgevlm run``: one question, or a conversation on the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgevlm.cli import console
from edgevlm.cli.console import Json, print_json, say
from edgevlm.cli.opening import MODEL_HELP, NO_WISHES, open_model, takes_wishes
from edgevlm.core.errors import EdgeVLMError, UsageError
from edgevlm.runtimes import MAX_TOKENS
from edgevlm.runtimes.choices import Wishes

if TYPE_CHECKING:
    from edgevlm.runtimes.answer import Answer, AnswerStream
    from edgevlm.runtimes.chat import Chat
    from edgevlm.runtimes.video import Video

HELP = "/image PATH adds a picture to the next question, /reset forgets all, /quit or Ctrl-D leaves"


@takes_wishes
def command(
    bundle: Annotated[str, typer.Argument(help=MODEL_HELP)],
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to ask about.")] = None,
    frames: Annotated[
        list[Path] | None, typer.Option(help="A picture of a video, one a second, in order; repeatable.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The question; a chat without.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = MAX_TOKENS,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds draw equal answers.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    wishes: Wishes = NO_WISHES,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    json: Json = False,
) -> None:
    """Ask BUNDLE about an image, or the frames of a video, once with --prompt, else in a chat."""
    if json and prompt is None:
        raise UsageError("--json needs --prompt: a chat is for people")
    if image and frames:
        raise UsageError("--image and --frames are both given: ask about one picture or about one video")
    from edgevlm.runtimes.sampling import Sampling
    from edgevlm.runtimes.video import Video

    shown = Video(frames=frames) if frames else image
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop or ()}
    with open_model(bundle, wishes, check=check) as vlm:
        if prompt is None:
            say(f"{vlm.name}: {HELP}; Ctrl-C stops an answer")
            Conversation(vlm.chat(), shown, options).run(read_lines())
        elif json:
            print_json(vlm.ask(shown, prompt, **options))
        else:
            show(vlm.stream(shown, prompt, **options))


def show(stream: AnswerStream) -> Answer:
    """Write the pieces to stdout as they come, and with ``-v`` the times to stderr."""
    for piece in stream:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
    if console.settings.verbose:
        say(times(stream.answer))
    return stream.answer


def times(answer: Answer) -> str:
    """``first text after 41 ms (engine 33 ms), 2.1 ms per token, 12 tokens, stop``"""
    timings = answer.timings
    pace = "" if timings.tpot_ms is None else f"{timings.tpot_ms:.1f} ms per token, "
    return (
        f"first text after {timings.ttft_user_ms:.0f} ms (engine {timings.ttft_engine_ms:.0f} ms), {pace}"
        f"{len(answer.token_ids)} tokens, {answer.finish_reason}"
    )


class Conversation:
    """Obeys the lines of a user: questions, and commands that begin with a slash."""

    def __init__(self, chat: Chat, image: Path | Video | None, options: dict[str, Any]) -> None:
        self.chat, self.image, self.options = chat, image, options

    def run(self, lines: Iterator[str]) -> None:
        """Until the lines end or one says ``/quit``.

        On a terminal an error is shown and the conversation goes on; read from a pipe it is raised.
        """
        for line in lines:
            if line == "/quit":
                return
            try:
                self.obey(line)
            except EdgeVLMError as error:
                if not sys.stdin.isatty():
                    raise
                typer.echo(f"error: {error}", err=True)

    def obey(self, line: str) -> None:
        """One line."""
        word, _, rest = line.partition(" ")
        if word == "/image":
            self.image = existing_file(rest.strip())
        elif word == "/reset":
            self.chat.reset()
            self.image = None
        elif word.startswith("/"):
            raise UsageError(f"no command {word}: {HELP}")
        else:
            self.ask(line)

    def ask(self, prompt: str) -> None:
        """Put a question, with the picture that waits for one."""
        image, self.image = self.image, None
        stream = self.chat.say(prompt, image, **self.options)
        with interrupts(stream.cancel):
            show(stream)


def existing_file(name: str) -> Path:
    """The path of a picture; whether it is one shows when it is asked about."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"no file at {name or 'an empty path'}: give one picture, as in /image table.png")
    return path


def read_lines() -> Iterator[str]:
    """What the user types or pipes in, without empty lines; Ctrl-C at the prompt only starts a new line."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            if sys.stdin.isatty():
                typer.echo()
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            console.settings.signal = 0  # it asked for a new line, not for an end
            say("\n(/quit or Ctrl-D leaves)")
            continue
        if line.strip():
            yield line.strip()


@contextmanager
def interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``stop`` while the block runs."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
