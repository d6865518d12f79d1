"""``edgevlm build BUNDLE``: turn the graphs of a TensorRT bundle into engines, on the device that runs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgevlm.cli import console

if TYPE_CHECKING:
    from edgevlm.bundle.read import Bundle
    from edgevlm.runtimes.trt.api import Api
    from edgevlm.runtimes.trt.build import BuildPlan, EngineResult


def command(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, exported with --target tensorrt.")],
    encoder_precision: Annotated[
        str | None, typer.Option("--encoder-precision", help="Which of the bundle's vision encoders.")
    ] = None,
    decoder_precision: Annotated[
        str | None, typer.Option("--decoder-precision", help="Which of the bundle's decoders.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures or questions at once, at most: 1, 2 or 4.")] = 1,
    profiles: Annotated[
        str | None,
        typer.Option("--profiles", help="Names of profiles to build, such as prefill; default: all up to --batch."),
    ] = None,
    workspace_mb: Annotated[
        int | None,
        typer.Option("--workspace-mb", min=1, help="MiB that a layer may compute in; default: up to 1024, as fits."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines that later TensorRT versions run too; slower.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Engines for every GPU from Ampere on; slower.")
    ] = False,
    compute_capability: Annotated[
        str | None,
        typer.Option("--compute-capability", help="Build for another GPU, such as 8.9 (TensorRT-RTX or --dry-run)."),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option("--timing-cache", help="File of measured kernels; default: one beside the engines.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Build again what is there already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be built and what it takes; needs no GPU.")
    ] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its hash.")] = True,
    as_json: console.Json = False,
) -> None:
    """Build the engines of BUNDLE for this device and the TensorRT that is installed here.

    Engines lie in the bundle, one folder for every device and version.  Those that are there already are kept, so a
    build that was interrupted goes on where it stopped.  What would run out of memory is refused before it is tried.
    """
    from edgevlm.bundle.read import read_bundle
    from edgevlm.runtimes.trt.build import BuildOptions, build_engines, plan_build
    from edgevlm.runtimes.trt.device import find_device
    from edgevlm.shipped import find_bundle

    options = BuildOptions(
        encoder_precision=encoder_precision,
        decoder_precision=decoder_precision,
        batch=batch,
        profiles=() if profiles is None else tuple(name.strip() for name in profiles.split(",")),
        workspace_mb=workspace_mb,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    opened = read_bundle(find_bundle(bundle), check=check)
    api = _tensorrt(dry_run)
    plan = plan_build(opened, options, api, find_device(api, compute_capability, planning=dry_run))
    if dry_run or api is None:
        _tell_plan(opened, plan, as_json=as_json)
        return
    names = [engine.stem for engine in plan.engines]
    with console.steps(f"build {bundle}", names) as begin:
        results = build_engines(
            opened,
            plan,
            options,
            api,
            overwrite=overwrite,
            timing_cache=timing_cache,
            report=begin,
            room_now=lambda: find_device(api, compute_capability, planning=False).room,
        )
    if as_json:
        console.print_json({"plan": plan, "engines": results})
        return
    _show_results(plan, results)


def _tensorrt(dry_run: bool) -> Api | None:
    """The installed TensorRT; a plan can do without."""
    from edgevlm.core.errors import MissingLibraryError
    from edgevlm.runtimes.trt.api import load_tensorrt

    try:
        return load_tensorrt()
    except MissingLibraryError as error:
        if not dry_run:
            raise
        console.say(f"{error}; planned for a version without in-place caches")
        return None


def _tell_plan(bundle: Bundle, plan: BuildPlan, *, as_json: bool) -> None:
    from edgevlm.runtimes.trt.build import ways_out
    from edgevlm.runtimes.trt.memory import fits, told

    if as_json:
        console.print_json({"plan": plan, "engines": []})
        return
    typer.echo(f"library    {plan.library or 'not installed'}")
    typer.echo(f"device     {plan.device.name} (compute capability {plan.device.capability_text})")
    if plan.device.doubt:
        typer.echo(f"           {plan.device.doubt}")
    typer.echo(f"workspace  {plan.workspace_mb} MiB")
    for engine in plan.engines:
        cache = ", cache in place" if engine.in_place else ""
        typer.echo(f"\n{engine.part} in {engine.precision}: {engine.graph}{cache}")
        typer.echo(f"  engine   {engine.file}")
        typer.echo(f"  takes    {told(engine.need, plan.device.room)}")
        if not fits(engine.need, plan.device.room):
            typer.echo(f"  too much {'; '.join(ways_out(bundle, engine, plan.device.room))}")
        typer.echo(f"  recipe   {engine.key.recipe[:16]}")
        for profile in engine.profiles:
            shapes = ", ".join(
                f"{name} {' .. '.join('x'.join(map(str, shape)) for shape in (three[0], three[2]))}"
                for name, three in profile.shapes.items()
                if "past_key_values" not in name or name.endswith(".0.key")
            )
            typer.echo(f"  {profile.name:<16} {shapes}")
    typer.echo("\nnothing built (--dry-run)")


def _show_results(plan: BuildPlan, results: tuple[EngineResult, ...]) -> None:
    for one in results:
        how = "was there" if one.was_there else f"{one.seconds:.1f} s"
        typer.echo(f"{one.part:<22} {one.precision:<14} {one.num_bytes / 1e6:>9.1f} MB  {how}")
    typer.echo(f"engines: {plan.bundle / plan.folder}")
