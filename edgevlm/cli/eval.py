"""``edgevlm eval``"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli import console

if TYPE_CHECKING:
    from edgevlm.evaluation import Score


def command(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a shipped name (nano).")],
    suite: Annotated[str, typer.Option("--suite", help="Questions to ask.")] = "scenes",
    num_scenes: Annotated[int, typer.Option("--num-scenes", min=2, help="Pictures to ask about.")] = 200,
    controls: Annotated[
        bool,
        typer.Option("--controls/--no-controls", help="Ask again with shuffled and with blank pictures."),
    ] = True,
    runtime: Annotated[str, typer.Option("--runtime", help="See `edgevlm targets`.")] = "onnxruntime",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: the physical cores.")] = None,
    as_json: console.Json = False,
) -> None:
    """Score BUNDLE on exact-answer questions, beside what a model would score that does not look."""
    from edgevlm.evaluation import SUITES, majority, score
    from edgevlm.runtimes.open import open_bundle

    questions = SUITES[suite](num_scenes)
    asked: Sequence[str | None] = (None, "shuffled", "blank") if controls else (None,)
    with open_bundle(bundle, runtime, threads=threads) as vlm:
        scores = []
        for control in asked:
            with console.progress(f"{suite}, {control or 'as it is'}", len(questions.items)) as advance:
                scores.append(
                    score(
                        questions,
                        lambda image, prompt: vlm.ask(image, prompt, max_tokens=32).text,
                        control=control,  # type: ignore[arg-type]
                        progress=lambda done, total: advance(1),
                    )
                )
    scores.append(majority(questions))
    if as_json:
        console.print_json([one.record() for one in scores])
    else:
        _show(scores, num_scenes)


def _show(scores: Sequence[Score], num_scenes: int) -> None:
    names = [one.control or "score" for one in scores]
    typer.echo(f"exact match in %, {num_scenes} scenes, {scores[0].overall.total} questions")
    typer.echo(f"{'kind':<10}{'asked':>7}" + "".join(f"{name:>10}" for name in names))
    for kind, tally in scores[0].kinds.items():
        figures = "".join(f"{100 * one.kinds[kind].accuracy:>10.1f}" for one in scores)
        typer.echo(f"{kind:<10}{tally.total:>7}{figures}")
    low, high = scores[0].overall.interval
    figures = "".join(f"{100 * one.overall.accuracy:>10.1f}" for one in scores)
    typer.echo(f"{'overall':<10}{scores[0].overall.total:>7}{figures}   (95 %: {100 * low:.1f} to {100 * high:.1f})")
