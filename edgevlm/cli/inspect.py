"""``edgevlm inspect MODEL``: what a model is made of and what it costs, before its weights are touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli.console import Json, print_json

if TYPE_CHECKING:
    from edgevlm.bundle.read import Bundle
    from edgevlm.families.card import Card


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint, bundle or hub id, or a shipped name (nano).")],
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=1, help="Pixels a side, where the encoder takes others than its own."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=0, help="Text tokens of the prompt.")] = 43,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id; also owner/name@revision.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Take a hub id from the cache, ask no network.")] = False,
    json: Json = False,
) -> None:
    """Show parts, parameters, operations, bytes and vision tokens of MODEL without loading its weights."""
    from edgevlm.export import TARGETS
    from edgevlm.families.card import bundle_card, make_card
    from edgevlm.families.folder import ModelFolder
    from edgevlm.families.hub import find_model

    bundle = _bundle(model) if revision is None else None
    if bundle is not None:
        card = bundle_card(bundle, image_size=image_size, prompt_tokens=prompt_tokens)
    else:
        found = find_model(model, revision=revision, offline=offline, weights=False)
        card = make_card(ModelFolder(found.folder), name=found.name, image_size=image_size, prompt_tokens=prompt_tokens)
    if json:
        files = bundle.manifest.parts if bundle else ()
        print_json({**asdict(card), "targets": list(TARGETS), "bundle": [asdict(part) for part in files]})
        return
    typer.echo("\n".join([*_lines(card, list(TARGETS)), *(_files(bundle) if bundle else ())]))


def _lines(card: Card, targets: list[str]) -> Iterator[str]:
    kind = card.config.model_type
    yield f"{card.name} ({card.family if kind == card.family else f'{card.family}, {kind}'})"
    yield f"  {'part':16}{'kind':14}{'parameters':>14}{'GFLOP':>12}{'attention':>12}"
    for part in card.parts:
        flops, attention = part.linear_flops / 1e9, part.attention_flops / 1e9
        yield f"  {part.part:16}{part.type:14}{part.parameters:>14,}{flops:>12.2f}{attention:>12.2f}"
    attention = sum(part.attention_flops for part in card.parts) / 1e9
    yield f"  {'total':16}{'':14}{card.parameters:>14,}{card.flops / 1e9 - attention:>12.2f}{attention:>12.2f}"
    yield (
        f"  FLOP to the first token, one {card.image_size} x {card.image_size} picture and {card.prompt_tokens} text "
        f"tokens; as published tables count: {card.published_flops / 1e12:.3f} TFLOP"
    )
    sizes = ", ".join(f"{name} {_size(count)}" for name, count in card.weight_bytes.items())
    yield f"  weights        {sizes}"
    yield f"  vision tokens  {card.vision_tokens} per picture or tile{_other_sizes(card)}"
    cache = card.cache_bytes_per_token
    yield f"  kv cache       {_size(cache['fp16'])} a token in fp16, {_size(cache['fp32'])} in fp32"
    if kept := card.fusion_cache_bytes_per_image["fp16"]:
        yield f"  fusion cache   {_size(kept)} a picture in fp16"
    yield f"  context        {card.max_context:,} tokens"
    yield f"  targets        {', '.join(targets)}"


def _other_sizes(card: Card) -> str:
    others = {f"{side} px": tokens for side, tokens in card.vision_tokens_by_image_size.items()}
    if len(others) < 2:
        others = dict(card.vision_tokens_by_picture)
    return f" ({', '.join(f'{size}: {tokens}' for size, tokens in others.items())})" if others else ""


def _size(num_bytes: float) -> str:
    """``1.51 GB``, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def _files(bundle: Bundle) -> Iterator[str]:
    """What the bundle's parts weigh on disk."""
    for part in bundle.manifest.parts:
        num_bytes = sum(bundle.path(name).stat().st_size for name in part.files)
        yield f"  in the bundle  {part.part:22}{part.target:12}{part.precision:8}{_size(num_bytes):>10}"


def _bundle(model: str) -> Bundle | None:
    """The bundle in the folder ``model``; None for everything else."""
    from edgevlm.bundle.paths import MANIFEST_FILE
    from edgevlm.bundle.read import read_bundle

    return read_bundle(Path(model), check=False) if (Path(model) / MANIFEST_FILE).is_file() else None
