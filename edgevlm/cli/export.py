"""``edgevlm export MODEL OUT``: a bundle that has passed the parity gate, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgevlm.cli import console


def command(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, shipped name (nano) or hub id (owner/name).")],
    out: Annotated[Path | None, typer.Argument(help="Bundle folder to write.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The same, as an option.")] = None,
    target: Annotated[str, typer.Option("--target", "-t", help="See `edgevlm targets`.")] = "onnx",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing bundle, once the new one is whole.")
    ] = False,
    half_storage: Annotated[
        bool,
        typer.Option("--half-storage", help="Store weights that float16 holds exactly in half the bytes."),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="Of both halves: fp32, fp16, int8, int4 (whose encoder stays float)."),
    ] = None,
    encoder_precision: Annotated[
        str | None,
        typer.Option(
            "--encoder-precision",
            help="fp32, fp16, int8, for tensorrt also bf16, fp8; several joined by commas, the first the default.",
        ),
    ] = None,
    decoder_precision: Annotated[
        str | None,
        typer.Option(
            "--decoder-precision",
            help="fp32, fp16, int8, int8-dynamic, int4, ..., for tensorrt fp32, fp16, bf16, int4, int8-static, fp8, "
            "nvfp4; several likewise.",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="A decoder of standard ONNX operators alone, for other engines.")
    ] = False,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="An encoder that takes one picture at a time.")
    ] = False,
    calib: Annotated[
        Path | None,
        typer.Option("--calib", help="Folder of pictures to fit the rounding to; without it generated scenes."),
    ] = None,
    calib_samples: Annotated[
        int, typer.Option("--calib-samples", min=1, help="How many pictures the rounding is fitted to.")
    ] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Of the generated scenes, or of the choice of pictures.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep a bundle that failed the gate as OUT.failed.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id; also owner/name@revision.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Take a hub id from the cache, ask no network.")] = False,
    image_size: Annotated[
        str | None,
        typer.Option("--image-size", help="Pixels a side; several joined by commas make one encoder for all of them."),
    ] = None,
    image_fit: Annotated[
        str | None,
        typer.Option("--image-fit", help="What is done to pictures that are not square: pad, center-crop, stretch."),
    ] = None,
    image_splitting: Annotated[
        bool | None,
        typer.Option("--image-splitting/--no-image-splitting", help="Whether large pictures are cut into tiles."),
    ] = None,
    vision_tokens: Annotated[
        int | None, typer.Option("--vision-tokens", min=1, help="Tokens a picture, where the model leaves a choice.")
    ] = None,
    max_context: Annotated[
        int | None, typer.Option("--max-context", min=1, help="Rows that the kv cache holds; fewer take less memory.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Export MODEL to a bundle that a runtime can open, and prove that it is the same model."""
    folder = _one_folder(out, output)
    from edgevlm.bundle.read import read_bundle
    from edgevlm.core.config import read_json
    from edgevlm.export.pipeline import export_bundle, steps
    from edgevlm.export.precisions import precisions
    from edgevlm.families.licence import Licence

    encoder, decoder = _halves(target, precision, encoder_precision, decoder_precision)
    with console.steps(f"export {model}", steps(precisions(encoder, decoder, target))) as begin:
        bundle = export_bundle(
            model,
            target=target,
            out=folder,
            overwrite=overwrite,
            half_storage=half_storage,
            encoder_precision=encoder,
            decoder_precision=decoder,
            plain=plain,
            static_batch=static_batch,
            calib=calib,
            calib_samples=calib_samples,
            seed=seed,
            keep=keep,
            report=begin,
            revision=revision,
            offline=offline,
            image_size=_sides(image_size),
            image_fit=image_fit,
            image_splitting=image_splitting,
            vision_tokens=vision_tokens,
            max_context=max_context,
        )
    if as_json:
        console.print_json({"bundle": str(bundle), "verify": read_json(bundle / "verify.json")})
        return
    manifest = read_bundle(bundle, check=False).manifest
    num_bytes = sum(manifest.file_bytes.values())
    typer.echo(
        f"{bundle}: {manifest.name} for {target}, {len(manifest.parts)} parts, {num_bytes / 1e6:.1f} MB, verified"
    )
    if licence := manifest.provenance.get("licence"):
        typer.echo(f"licence of the weights: {Licence(**{**licence, 'files': tuple(licence['files'])})}")
    run = f"edgevlm run {bundle} --image PICTURE --prompt QUESTION"
    builds = target == "tensorrt"
    typer.echo(
        f"next: copy {bundle} to the device, then: edgevlm build {bundle} && {run}" if builds else f"next: {run}"
    )


def _halves(target: str, both: str | None, encoder: str | None, decoder: str | None) -> tuple[str, str]:
    """The precisions of encoder and decoder; one that is given for its half counts more than one for both."""
    from edgevlm.export.precisions import both_halves, default_precision

    of_encoder, of_decoder = both_halves(both, target) if both else (default_precision(target),) * 2
    return encoder or of_encoder, decoder or of_decoder


def _sides(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise typer.BadParameter(
            f"--image-size takes pixels a side, several joined by commas (512,1024); found {text!r}"
        )
    return tuple(map(int, words))


def _one_folder(out: Path | None, output: Path | None) -> Path:
    given = [folder for folder in (out, output) if folder is not None]
    if len(given) != 1:
        raise typer.BadParameter("give the bundle folder once: as the last argument, or with -o")
    return given[0]
