"""What ``run``, ``bench``, ``eval`` and ``verify`` share: the flags that say what computes, and the model they open."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgevlm.bundle.paths import MANIFEST_FILE
from edgevlm.core.errors import UsageError
from edgevlm.runtimes.choices import GOALS, PartChoice, Wishes

if TYPE_CHECKING:
    from edgevlm.runtimes.vlm import RuntimeVlm

TORCH = "torch"  # runs the checkpoint that a bundle is made from, whole: there is nothing to choose per part
NO_WISHES = Wishes()
DEFAULT_SUITE = "scenes"  # for a model that names none
MODEL_HELP = "Bundle folder, or a shipped name (nano); with --runtime torch the checkpoint: a folder, hub id or name."
FLAGS: Mapping[str, object] = {  # one for every field of Wishes; None is "not said"
    "runtime": Annotated[
        str | None,
        typer.Option(
            "--runtime", help="What computes, see `edgevlm targets`; default: tuned, else what the bundle is for."
        ),
    ],
    "encoder_runtime": Annotated[
        str | None, typer.Option("--encoder-runtime", help="What computes the vision encoder alone.")
    ],
    "decoder_runtime": Annotated[
        str | None, typer.Option("--decoder-runtime", help="What computes the decoder alone.")
    ],
    "device": Annotated[str | None, typer.Option("--device", help="Where it computes: cpu (default), cuda, ...")],
    "encoder_precision": Annotated[
        str | None, typer.Option("--encoder-precision", help="Which of the bundle's vision encoders.")
    ],
    "decoder_precision": Annotated[
        str | None, typer.Option("--decoder-precision", help="Which of the bundle's decoders.")
    ],
    "threads": Annotated[int | None, typer.Option("--threads", help="Cores to compute with; default: all physical.")],
    "optimize": Annotated[
        str | None, typer.Option("--optimize", help=f"Tuned choices for this goal: {', '.join(GOALS)}.")
    ],
    "image_size": Annotated[
        int | None, typer.Option("--image-size", help="Pixels a side, where the bundle was exported for several sizes.")
    ],
    "huge_pages": Annotated[
        bool | None,
        typer.Option("--huge-pages", help="Lay weights into huge pages: slower to open, faster to run."),
    ],
}


def takes_wishes(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the flags of ``FLAGS`` where its signature, which typer reads, has ``wishes``."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def verb(**options: Any) -> None:
        said = {name: options.pop(name, None) for name in FLAGS}
        command(**options, wishes=Wishes(**said))

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += _flags() if name == "wishes" else [own]
    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return verb


def open_model(model: str, wishes: Wishes, *, check: bool) -> RuntimeVlm:
    """The bundle ``model`` opened as wished or, with ``--runtime torch``, the checkpoint in PyTorch.

    Raises what ``open_bundle`` and ``load_model`` raise; UsageError for flags that PyTorch does not go with.
    """
    if wishes.runtime == TORCH:
        return _open_checkpoint(model, wishes)
    from edgevlm.runtimes.open import open_as_wished

    refuse_torch_for_a_half(wishes)
    return open_as_wished(model, wishes, check=check)


def suite_of(model: str, wishes: Wishes) -> str:
    """The evaluation suite that ``model`` was trained for, as its bundle or checkpoint says."""
    if wishes.runtime == TORCH:
        from edgevlm.families.detect import family_of
        from edgevlm.families.folder import ModelFolder
        from edgevlm.families.hub import find_model

        _refuse_bundle(model)
        folder = ModelFolder(find_model(model).folder)
        return family_of(folder).suite(folder) or DEFAULT_SUITE
    from edgevlm.bundle.read import read_bundle
    from edgevlm.shipped import find_bundle

    return read_bundle(find_bundle(model), check=False).manifest.suite or DEFAULT_SUITE  # hashes: when it is opened


def refuse_torch_for_a_half(wishes: Wishes) -> None:
    """Raise UsageError where one half of a bundle is to run in PyTorch: no bundle holds such a half."""
    for name in ("encoder_runtime", "decoder_runtime"):
        if getattr(wishes, name) == TORCH:
            raise UsageError(f"{_flag(name)} torch: PyTorch runs a checkpoint whole, with --runtime torch")


def _open_checkpoint(model: str, wishes: Wishes) -> RuntimeVlm:
    unheard = {"runtime": TORCH, "device": "cpu", "threads": wishes.threads, "image_size": wishes.image_size}
    others = [_flag(name) for name, value in vars(wishes).items() if value is not None and value != unheard.get(name)]
    if others:
        raise UsageError(
            f"--runtime torch runs a whole checkpoint in float32 on the CPU: leave {', '.join(others)} out"
        )
    _refuse_bundle(model)
    threads = PartChoice(threads=wishes.threads).threads  # which checks it
    import torch

    from edgevlm.core.hardware import compute_cores
    from edgevlm.models.checkpoint import load_model

    torch.set_num_threads(threads or compute_cores())
    checkpoint = load_model(model, image_size=wishes.image_size)
    vlm = checkpoint.open()
    vlm.info |= {
        "threads": torch.get_num_threads(),
        "family": checkpoint.family,
        "source": checkpoint.source,
        "revision": checkpoint.revision,
    }
    return vlm


def _refuse_bundle(model: str) -> None:
    if (Path(model) / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{model} is a bundle, which PyTorch does not run: give --runtime torch the checkpoint that it came from"
        )


def _flags() -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, keyword, default=None, annotation=flag) for name, flag in FLAGS.items()]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
