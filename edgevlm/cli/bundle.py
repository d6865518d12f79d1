"""``edgevlm bundle``: look into a bundle, make one file of it, unfold it again, or make one of foreign ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgevlm.bundle.pack import pack, unpack
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.cli.console import Json, print_json
from edgevlm.shipped import MODELS, find_bundle

command = typer.Typer(
    add_completion=False, rich_markup_mode=None, help="Show a bundle; pack it into one file and back; import one."
)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@command.command("pack")
def pack_command(
    bundle: Annotated[str, typer.Argument(help="Folder that `edgevlm export` wrote, or a shipped name.")],
    file: Annotated[Path, typer.Argument(help="File to write, for example nano.tar.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make one file of BUNDLE: the same bundle, the same bytes."""
    written = pack(_place(bundle), file, overwrite=overwrite)
    _answer({"file": written, "bytes": written.stat().st_size}, str(written), json)


@command.command("unpack")
def unpack_command(
    file: Annotated[Path, typer.Argument(help="File that `edgevlm bundle pack` wrote.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Unfold FILE into FOLDER and check every hash."""
    opened = unpack(file, folder, overwrite=overwrite)
    _answer({"bundle": opened.root, "name": opened.manifest.name}, str(opened.root), json)


@command.command("import")
def import_command(
    folder: Annotated[Path, typer.Argument(help="Folder with ONNX files in the layout of transformers.js.")],
    out: Annotated[Path, typer.Argument(help="Bundle to write.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Checkpoint that the files were made from: the gate's reference."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Which vision_encoder: fp32, fp16, int8, q8, q4; else the first.")
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option("--decoder", help="Which decoder_model_merged: fp32, fp16, int8, q8, q4; else the first."),
    ] = None,
    max_context: Annotated[
        int | None, typer.Option("--max-context", help="Longest prompt and answer, in tokens.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a bundle of the ONNX files in FOLDER, and pass it through the gate."""
    from edgevlm.export.importing import import_bundle

    written = import_bundle(
        folder, out, model=model, encoder=encoder, decoder=decoder, max_context=max_context, overwrite=overwrite
    )
    opened = read_bundle(written, check=False)
    _answer({"bundle": opened.root, "name": opened.manifest.name}, _summary(opened, True), json)


@command.command("show")
def show_command(
    bundle: Annotated[str, typer.Argument(help="Folder that `edgevlm export` wrote, or a shipped name.")],
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    json: Json = False,
) -> None:
    """Show what BUNDLE holds, after checking it."""
    opened = read_bundle(_place(bundle), check=check)
    _answer({"bundle": opened.root, "checked": check, "manifest": opened.manifest}, _summary(opened, check), json)


def _place(bundle: str) -> Path:
    """The folder of a shipped name, or what was given: ``read_bundle`` says best what is wrong with it."""
    return find_bundle(bundle) if bundle in MODELS else Path(bundle)


def _answer(value: dict[str, object], text: str, json: bool) -> None:
    print_json(value) if json else typer.echo(text)


def _summary(bundle: Bundle, check: bool) -> str:
    manifest = bundle.manifest
    lines = [
        f"{manifest.name} ({manifest.family}), schema {manifest.schema}, {bundle.root}",
        f"  {manifest.num_vision_tokens} vision tokens per image, context of {manifest.max_context} tokens",
    ]
    for part in manifest.parts:
        size = sum(bundle.path(name).stat().st_size for name in part.files) / 2**20
        lines.append(f"  {part.part:22} {part.target:10} {part.precision:8} {size:9.1f} MiB  {part.file}")
    lines.append("  every file matches its hash" if check else "  hashes not checked (--no-check)")
    return "\n".join(lines)
