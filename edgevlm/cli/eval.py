"""``edgevlm eval BUNDLE``: exact-match scores, each beside those of controls that cannot see the picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgevlm.cli import console
from edgevlm.cli.opening import MODEL_HELP, NO_WISHES, open_model, suite_of, takes_wishes
from edgevlm.core.optional import versions
from edgevlm.runtimes.choices import Wishes

if TYPE_CHECKING:
    from edgevlm.evaluation import Control, Score, Suite
    from edgevlm.runtimes.vlm import RuntimeVlm

LIBRARIES = ("edgevlm", "numpy", "pillow", "onnxruntime", "tokenizers")
MAX_TOKENS = 32


@takes_wishes
def command(
    bundle: Annotated[str, typer.Argument(help=MODEL_HELP)],
    suite: Annotated[str | None, typer.Option("--suite", help="Questions to ask; default: the model's own.")] = None,
    num_scenes: Annotated[int, typer.Option("--num-scenes", min=2, help="Pictures to ask about.")] = 200,
    controls: Annotated[
        bool,
        typer.Option("--controls/--no-controls", help="Ask again with shuffled and with blank pictures."),
    ] = True,
    wishes: Wishes = NO_WISHES,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    as_json: console.Json = False,
) -> None:
    """Score BUNDLE on exact-answer questions, beside what a model would score that does not look."""
    from edgevlm.evaluation import EVAL_SEED, SUITES, majority

    questions = SUITES[suite or suite_of(bundle, wishes)](num_scenes, seed=EVAL_SEED)
    asked: Sequence[Control | None] = (None, "shuffled", "blank") if controls else (None,)
    with open_model(bundle, wishes, check=check) as vlm:
        scores = [*(_ask(vlm, questions, control) for control in asked), majority(questions)]
    if as_json:
        console.print_json(_record(vlm, questions, EVAL_SEED, scores))
    else:
        _show(scores, num_scenes)


def _ask(vlm: RuntimeVlm, questions: Suite, control: Control | None) -> Score:
    from edgevlm.evaluation import score

    with console.progress(f"{questions.name}, {control or 'as it is'}", len(questions.items)) as advance:
        return score(
            questions,
            lambda image, prompt: vlm.ask(image, prompt, max_tokens=MAX_TOKENS).text,
            control=control,
            progress=lambda done, total: advance(1),
        )


def _record(vlm: RuntimeVlm, questions: Suite, seed: int, scores: Sequence[Score]) -> dict[str, Any]:
    """The scores with all that it takes to get them again."""
    encoder = vlm.info.get("encoder", {})
    libraries = dict.fromkeys((*LIBRARIES, vlm.info["library"], encoder.get("library", "numpy")))
    return {
        "name": vlm.name,
        "bundle_sha256": vlm.info.get("bundle_sha256"),  # none of a checkpoint in PyTorch
        "runtime": vlm.info["runtime"],
        "encoder_runtime": encoder.get("runtime", vlm.info["runtime"]),
        "precisions": vlm.info.get("precisions"),
        "suite": questions.name,
        "num_scenes": questions.num_images,
        "num_questions": len(questions.items),
        "seed": seed,
        "max_tokens": MAX_TOKENS,
        "versions": {"python": platform.python_version(), **versions(libraries)},
        "scores": [one.record() for one in scores],
    }


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
