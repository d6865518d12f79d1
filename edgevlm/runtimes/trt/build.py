"""Build the engines of a bundle on the device that runs them: first a plan, which needs no GPU, then part by part."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.paths import inside
from edgevlm.bundle.read import Bundle
from edgevlm.bundle.recipe import Profile, Recipe, read_recipe
from edgevlm.core.errors import (
    DISK_FULL,
    ConfigError,
    DoesNotFitError,
    UnsupportedError,
    UsageError,
    translate_disk_errors,
)
from edgevlm.core.files import atomic_file
from edgevlm.runtimes.trt.api import Api, BuildSettings, Built, dotted
from edgevlm.runtimes.trt.device import Device
from edgevlm.runtimes.trt.memory import (
    LEAST_WORKSPACE_MB,
    MIB,
    Need,
    Room,
    Work,
    default_workspace_mb,
    fits,
    io_bytes,
    predicted_build,
    predicted_engine_bytes,
    require_room,
)
from edgevlm.runtimes.trt.store import (
    TIMING_FILE,
    EngineKey,
    graph_of,
    keep_engine,
    kept_engine,
    locked,
    make_key,
    source_files,
    stem_of,
    sweep,
)
from edgevlm.shipped import require_writable

logger = logging.getLogger(__name__)

TARGET = "tensorrt"
BUILT_PARTS = ("vision_encoder", "fusion", "decoder_model_merged")  # embed_tokens is a table, read without an engine
BATCHES = (1, 2, 4)
BATCH = "batch_size"  # the name of the free size that counts pictures or questions
PREFILL = "prefill"  # the decoder's profile for any number of rows, one included
MOST_TIMING_BYTES = 256 << 20


@dataclass(frozen=True)
class Demand:
    """What a precision asks of the library (a data type, as its enum spells it) and of the GPU."""

    types: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)
    version: str = ""


DEMANDS = {  # by the first word of a precision
    "bf16": Demand(("BF16",), (8, 0), "10.0"),
    "int4": Demand(("INT4",), (0, 0), "10.0"),
    "fp8": Demand(("FP8",), (8, 9), "10.0"),
    "nvfp4": Demand(("FP4", "FP8"), (10, 0), "10.8"),
}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the user asked for; None takes the bundle's default precision, or a workspace that fits the device.

    An engine with another workspace is built again where ``workspace_mb`` is a number, and kept where it is None.

    ``profiles``: names of those that an engine gets, where its part has one of them; else it gets all up to ``batch``.
    """

    encoder_precision: str | None = None
    decoder_precision: str | None = None
    batch: int = 1
    profiles: tuple[str, ...] = ()
    workspace_mb: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.batch not in BATCHES:
            raise ConfigError(f"--batch is {', '.join(map(str, BATCHES))}, found {self.batch}")
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise ConfigError(f"--workspace-mb is a positive number, found {self.workspace_mb}")


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """One engine to build: which graph of which part, with which profiles, and what that takes."""

    part: str
    precision: str
    graph: str
    in_place: bool
    profiles: tuple[Profile, ...]
    work: Work
    need: Need
    key: EngineKey
    file: str

    @property
    def stem(self) -> str:
        """What the engine's file is called, without its ending."""
        return stem_of(self.graph)


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything that ``edgevlm build`` would do; ``library`` is None where no TensorRT is installed."""

    bundle: Path
    device: Device
    library: str | None
    workspace_mb: int
    folder: str
    engines: tuple[EnginePlan, ...]


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """One engine that now stands there; ``was_there`` already, or built in so many ``seconds``."""

    part: str
    precision: str
    file: str
    num_bytes: int
    was_there: bool
    seconds: float = 0.0


def plan_build(bundle: Bundle, options: BuildOptions, api: Api | None, device: Device) -> BuildPlan:
    """What would be built of ``bundle`` for ``device``.

    Raises UnsupportedError where the bundle was exported for another target, lacks a precision or a profile, or holds a
    precision that the library or the device lacks.
    """
    recipe = read_recipe(bundle)
    workspace_mb = options.workspace_mb or default_workspace_mb(device.room)
    settled = replace(options, workspace_mb=workspace_mb)
    parts = [_part(bundle, name, options) for name in _present(bundle)]
    for part in parts:
        _check_demands(part, api, device)
    _check_profiles(parts, recipe, options, api)
    engines = tuple(_engine_plan(bundle, part, recipe, settled, api, device) for part in parts)
    return BuildPlan(
        bundle=bundle.root,
        device=device,
        library=api.name if api else None,
        workspace_mb=workspace_mb,
        folder=engines[0].key.folder,
        engines=engines,
    )


def build_engines(
    bundle: Bundle,
    plan: BuildPlan,
    options: BuildOptions,
    api: Api,
    *,
    overwrite: bool = False,
    timing_cache: Path | None = None,
    report: Callable[[str], None] = lambda step: None,
    room_now: Callable[[], Room] | None = None,
) -> tuple[EngineResult, ...]:
    """Build what ``plan`` names and is not there yet; ``report`` hears the engine's name, and how far it is.

    Every engine stands by itself: after an interruption the next call goes on with those that lack.  ``room_now`` is
    asked before each that is built, since others take and give back memory meanwhile; None believes the plan.

    Raises DoesNotFitError before a build that would run out of memory or disk, DeviceError where another build is at
    work, UnsupportedError for a device that nobody knows, and what ``Api.build`` raises.
    """
    _check_device(plan.device)
    _check_flags(options, api, plan.device)
    folder = inside(bundle.root, plan.folder)
    try:
        require_writable(bundle.root, "engines", instead="build those of a copy (cp -r)")
    except UsageError:
        if not overwrite and (there := _all_there(plan, folder, options)):
            return there
        raise
    results = []
    with locked(bundle):
        with translate_disk_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        cache_file = timing_cache or folder / TIMING_FILE
        for engine in plan.engines:
            report(engine.stem)
            entry = None if overwrite else kept_engine(folder, engine.stem, engine.key, options.workspace_mb)
            if entry is not None:
                results.append(_result(engine, entry.num_bytes, was_there=True))
                continue
            room = room_now() if room_now else plan.device.room
            settled = _settled(engine, options, room)
            _require_room(bundle, settled, room)
            results.append(_build_one(bundle, settled, plan, api, cache_file, report))
    return tuple(results)


def _all_there(plan: BuildPlan, folder: Path, options: BuildOptions) -> tuple[EngineResult, ...]:
    """What was built before, if that is all of it: then nothing need be written."""
    entries = [kept_engine(folder, engine.stem, engine.key, options.workspace_mb) for engine in plan.engines]
    pairs = zip(plan.engines, entries, strict=True)
    found = tuple(_result(engine, entry.num_bytes, was_there=True) for engine, entry in pairs if entry is not None)
    return found if len(found) == len(plan.engines) else ()


def ways_out(bundle: Bundle, engine: EnginePlan, room: Room) -> tuple[str, ...]:
    """What would fit into ``room`` in place of ``engine``, tried with the same formula; and what always helps."""
    part = next(one for one in bundle.manifest.parts if engine.graph in one.files)
    single = _with_profiles(engine, part, [one for one in engine.profiles if _batch(one, part) == 1])
    prefill = _with_profiles(engine, part, [one for one in engine.profiles if one.name == PREFILL])
    ways = ["--batch 1 would fit"] if single and fits(predicted_build(single), room) else []
    ways += _with_less_workspace("", engine.work, room)
    if prefill is not None:
        way = f"--profiles {PREFILL}"
        fitting = fits(predicted_build(prefill), room)
        ways += [f"{way} would fit"] if fitting else _with_less_workspace(f"{way} ", prefill, room)
    return (*ways, *_other_precisions(bundle, engine, room), _export_smaller(engine), "close other programs")


def _build_one(
    bundle: Bundle, engine: EnginePlan, plan: BuildPlan, api: Api, cache_file: Path, report: Callable[[str], None]
) -> EngineResult:
    started = time.monotonic()
    settings = BuildSettings(
        profiles=[profile.shapes for profile in engine.profiles],
        workspace_bytes=engine.work.workspace_bytes,
        version_compatible=engine.key.version_compatible,
        hardware_compatible=engine.key.hardware_compatible,
        compute_capability=plan.device.compute_capability,
    )
    cache = _read_timing(cache_file) if api.has_timing_cache else None
    built: Built = api.build(
        inside(bundle.root, engine.graph),
        settings,
        report=lambda share: report(f"{engine.stem}: {share}"),
        timing_cache=cache,
    )
    folder = inside(bundle.root, plan.folder)
    names, workspace_mb = [one.name for one in engine.profiles], engine.work.workspace_bytes // MIB
    entry = keep_engine(folder, engine.stem, built.engine, engine.key, names, workspace_mb)
    if built.timing_cache and built.timing_cache != cache:
        with atomic_file(cache_file) as scratch:
            scratch.write_bytes(built.timing_cache)
    return _result(engine, entry.num_bytes, was_there=False, seconds=round(time.monotonic() - started, 1))


def _result(engine: EnginePlan, num_bytes: int, *, was_there: bool, seconds: float = 0.0) -> EngineResult:
    return EngineResult(
        part=engine.part,
        precision=engine.precision,
        file=engine.file,
        num_bytes=num_bytes,
        was_there=was_there,
        seconds=seconds,
    )


# -- plan -----------------------------------------------------------------------------------------------------


def _present(bundle: Bundle) -> list[str]:
    found = {part.part for part in bundle.manifest.parts if part.target == TARGET}
    if not found:
        targets = ", ".join(bundle.manifest.targets())
        raise UnsupportedError(
            f"{bundle.root} was exported for {targets}, which needs no engines: export with --target {TARGET} first"
        )
    return [name for name in BUILT_PARTS if name in found]


def _part(bundle: Bundle, name: str, options: BuildOptions) -> PartFile:
    wished = {"vision_encoder": options.encoder_precision, "decoder_model_merged": options.decoder_precision}
    return bundle.manifest.part(name, target=TARGET, precision=wished.get(name))


def _engine_plan(
    bundle: Bundle, part: PartFile, recipe: Recipe, options: BuildOptions, api: Api | None, device: Device
) -> EnginePlan:
    graph, in_place = graph_of(part, api)
    profiles = _profiles(part, recipe, options, in_place=in_place)
    key = make_key(
        bundle,
        part,
        graph,
        profiles,
        max_context=recipe.max_context,
        compute_capability=device.capability_text,
        flavour=api.flavour if api else TARGET,
        version=api.version_text if api else "?",
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
    )
    work = Work(
        part=part.part,
        precision=part.precision,
        weight_bytes=_weight_bytes(bundle, part, graph),
        num_profiles=len(profiles),
        activation_bytes=_largest_io(part, profiles),
        workspace_bytes=(options.workspace_mb or 0) * MIB,
        ahead_of_time=api is not None and api.builds_ahead_of_time,
    )
    return EnginePlan(
        part=part.part,
        precision=part.precision,
        graph=graph,
        in_place=in_place,
        profiles=profiles,
        work=work,
        need=predicted_build(work),
        key=key,
        file=f"{key.folder}/{stem_of(graph)}.engine",
    )


def _weight_bytes(bundle: Bundle, part: PartFile, graph: str) -> int:
    return sum(bundle.path(name).stat().st_size for name in source_files(part, graph))


def _profiles(part: PartFile, recipe: Recipe, options: BuildOptions, *, in_place: bool) -> tuple[Profile, ...]:
    """Those of the part that were named, in the recipe's order; all up to the batch where none was."""
    every = _up_to_batch(part, recipe, options.batch, in_place=in_place)
    return tuple(profile for profile in every if profile.name in options.profiles) or every


def _up_to_batch(part: PartFile, recipe: Recipe, batch: int, *, in_place: bool) -> tuple[Profile, ...]:
    """The profiles up to ``batch`` sequences or pictures at once."""
    every = recipe.of(part.part, in_place=in_place).profiles
    chosen = tuple(profile for profile in every if _batch(profile, part) <= batch)
    if not chosen:
        raise UnsupportedError(f"{part.part} was exported for larger batches than {batch}: give a larger --batch")
    return chosen


def _batch(profile: Profile, part: PartFile) -> int:
    """How many pictures or questions at once; a first size that is fixed counts something else, such as views."""
    first = part.inputs[0]
    shapes = profile.shapes.get(first.name)
    return shapes[2][0] if shapes and first.shape[0] == BATCH else 1


def _largest_io(part: PartFile, profiles: Sequence[Profile]) -> int:
    largest = [{name: shapes[2] for name, shapes in profile.shapes.items()} for profile in profiles]
    return max(io_bytes(part.inputs, part.outputs, shapes) for shapes in largest)


# -- checks ---------------------------------------------------------------------------------------------------


def _check_demands(part: PartFile, api: Api | None, device: Device) -> None:
    demand = DEMANDS.get(part.precision.partition("-")[0], Demand())
    what = f"{part.part} in {part.precision}"
    if api is not None and not all(map(api.has_type, demand.types)):
        raise UnsupportedError(
            f"{what} needs TensorRT {demand.version} or newer, here is {api.name}: choose another precision"
        )
    if device.compute_capability is not None and device.compute_capability < demand.capability:
        raise UnsupportedError(
            f"{what} needs a GPU of compute capability {dotted(demand.capability)} or higher, {device.name} has "
            f"{device.capability_text}: choose another precision"
        )


def _check_profiles(parts: Sequence[PartFile], recipe: Recipe, options: BuildOptions, api: Api | None) -> None:
    known = {
        profile.name: part.part
        for part in parts
        for profile in _up_to_batch(part, recipe, options.batch, in_place=graph_of(part, api)[1])
    }
    if unknown := [name for name in options.profiles if name not in known]:
        raise UnsupportedError(
            f"--profiles: no profile {', '.join(map(repr, unknown))} up to --batch {options.batch}; "
            f"there are {', '.join(f'{name} ({part})' for name, part in known.items())}"
        )


def _check_device(device: Device) -> None:
    if device.compute_capability is None:
        raise UnsupportedError(
            f"{device.name}: its compute capability is not known, so engines would be nobody's: pip install "
            "cuda-python, which asks the GPU"
        )
    if device.doubt:
        logger.warning("building for %s, %s", device.name, device.doubt)


def _check_flags(options: BuildOptions, api: Api, device: Device) -> None:
    if options.version_compatible:
        api.require_compatible("--version-compatible", api.has_version_compatible)
    if options.hardware_compatible:
        api.require_compatible("--hardware-compatible", api.has_hardware_compatible)
        if device.is_jetson:
            raise UsageError("--hardware-compatible: TensorRT has no such engines on a Jetson: leave it out")
        if (device.compute_capability or (0, 0)) < (8, 0):
            raise UsageError(
                f"--hardware-compatible starts at compute capability 8.0, {device.name} has {device.capability_text}"
            )


def _settled(engine: EnginePlan, options: BuildOptions, room: Room) -> EnginePlan:
    """``engine`` with a workspace that suits what is free now, where none was asked for."""
    if options.workspace_mb is not None:
        return engine
    smallest = min(engine.work.workspace_bytes, default_workspace_mb(room) * MIB)
    work = replace(engine.work, workspace_bytes=smallest)
    return replace(engine, work=work, need=predicted_build(work))


def _require_room(bundle: Bundle, engine: EnginePlan, room: Room) -> None:
    what = f"{engine.part} in {engine.precision}"
    if not fits(engine.need, room):
        require_room(what, engine.need, room, ways_out=ways_out(bundle, engine, room))
    free = shutil.disk_usage(bundle.root).free
    wanted = predicted_engine_bytes(engine.work)
    if wanted > free:
        raise DoesNotFitError(
            f"{bundle.root}: the engine of {what} takes about {wanted:,} bytes where {free:,} are free; {DISK_FULL}"
        )


def _other_precisions(bundle: Bundle, engine: EnginePlan, room: Room) -> list[str]:
    """The bundle's other precisions of the part that fit."""
    ways = []
    half = "encoder" if engine.part == "vision_encoder" else "decoder"
    for other in bundle.manifest.parts:
        if (other.part, other.target) == (engine.part, TARGET) and other.precision != engine.precision:
            weights = _weight_bytes(bundle, other, other.in_place if engine.in_place else other.file)
            work = replace(engine.work, precision=other.precision, weight_bytes=weights)
            if fits(predicted_build(work), room):
                ways.append(f"--{half}-precision {other.precision} would fit")
    return ways


def _with_profiles(engine: EnginePlan, part: PartFile, profiles: Sequence[Profile]) -> Work | None:
    """The work with these ``profiles`` alone; None where there are none, or no fewer."""
    if len(profiles) in (0, len(engine.profiles)):
        return None
    return replace(engine.work, num_profiles=len(profiles), activation_bytes=_largest_io(part, profiles))


def _with_less_workspace(before: str, work: Work, room: Room) -> list[str]:
    """The largest workspace with which ``work`` fits, as an option behind ``before``; empty where there is none."""
    need = predicted_build(work)
    over = need.total_bytes - (room.host_bytes or 0) if room.shared else _over_on_device(need, room)
    workspace_mb = work.workspace_bytes // MIB - max(0, over) // MIB - 1
    if workspace_mb < LEAST_WORKSPACE_MB:
        return []
    smaller = predicted_build(replace(work, workspace_bytes=workspace_mb * MIB))
    return [f"{before}--workspace-mb {workspace_mb} would fit"] if fits(smaller, room) else []


def _over_on_device(need: Need, room: Room) -> int:
    return need.device_bytes - room.device_bytes if room.device_bytes is not None else 0


def _export_smaller(engine: EnginePlan) -> str:
    if engine.part == "vision_encoder":
        return "or export with a smaller --image-size"
    return "or export with --decoder-precision int4" if "4" not in engine.precision else "or export a smaller model"


def _read_timing(file: Path) -> bytes | None:
    """The timing cache, None where there is none that can be used."""
    try:
        return file.read_bytes() if file.stat().st_size <= MOST_TIMING_BYTES else None
    except OSError:
        return None
