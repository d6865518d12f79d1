"""Where engines lie and what they were built for: ``tensorrt/engines/<sm>-<flavour><version>/`` inside the bundle.

An engine runs on the device and the version that it was built for, so each stands under its key in ``engine.json``
with its own SHA-256; ``SHA256SUMS`` leaves the folder out, since it is made where the bundle is used.  An engine is
code: build your own (``edgevlm bundle pack`` leaves them behind), and trust a folder of them as you trust a program.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgevlm.bundle.hash_cache import sha256
from edgevlm.bundle.manifest import PartFile
from edgevlm.bundle.paths import ENGINES_FOLDER, RECIPE_FILE, check_name, inside
from edgevlm.bundle.read import Bundle, read_sums
from edgevlm.bundle.recipe import Profile, Recipe, read_recipe
from edgevlm.core.config import from_mapping, read_json, to_json
from edgevlm.core.errors import (
    ConfigError,
    DeviceError,
    EdgeVLMError,
    IntegrityError,
    UnsupportedError,
    translate_disk_errors,
)
from edgevlm.core.files import atomic_file
from edgevlm.runtimes.trt.api import Api, dotted

logger = logging.getLogger(__name__)

SCHEMA = 1
INDEX_FILE = "engine.json"
LOCK_FILE = ".lock"
TIMING_FILE = "timing.cache"
MOST_BYTES = 4 << 20
AMPERE = (8, 0)  # from here on an engine built hardware-compatible runs


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """What an engine was built for and from; equal keys give engines that can stand for each other.

    ``sources``: SHA-256 of the graph's files by name; ``recipe``: :func:`recipe_hash` of what it was built with.
    """

    compute_capability: str
    flavour: str
    version: str
    system: str
    sources: dict[str, str]
    recipe: str
    version_compatible: bool = False
    hardware_compatible: bool = False

    @property
    def folder(self) -> str:
        """The folder of such engines, relative to the bundle."""
        return f"{ENGINES_FOLDER}/{folder_name(self.compute_capability, self.flavour, self.version)}"

    @property
    def place(self) -> str:
        """The device and version, for people."""
        name = "TensorRT-RTX" if self.flavour == "rtx" else "TensorRT"
        return f"{sm(self.compute_capability)} with {name} {self.version} on {self.system}"


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine as ``engine.json`` has it.

    ``profiles`` are the names of its profiles, in the order of their index; ``workspace_mb`` is what it was built with.
    """

    key: EngineKey
    sha256: str
    num_bytes: int
    profiles: tuple[str, ...] = ()
    workspace_mb: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineIndex:
    """The whole of ``engine.json``; ``engines`` by the stem of their file."""

    schema: int = SCHEMA
    engines: dict[str, EngineEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ConfigError(f"schema must be {SCHEMA}, found {self.schema}")


@dataclass(frozen=True)
class FoundEngine:
    """An engine that may run here: its file, its entry, and the graph (a file of the bundle) that it was built from."""

    path: Path
    entry: EngineEntry
    graph: str
    in_place: bool

    @contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """The engine's bytes, mapped and compared with its SHA-256; to be read while the block runs.

        Raises IntegrityError where the file was changed or damaged.
        """
        with translate_disk_errors(str(self.path), reading=True), self.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != self.entry.num_bytes or not self.entry.num_bytes:
                raise IntegrityError(_damaged(self.path))
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                if hashlib.sha256(view).hexdigest() != self.entry.sha256:
                    raise IntegrityError(_damaged(self.path))
                yield view


def sm(compute_capability: str) -> str:
    """``8.7`` as NVIDIA's tools spell it: ``sm_87``."""
    return f"sm_{compute_capability.replace('.', '')}"


def folder_name(compute_capability: str, flavour: str, version: str) -> str:
    """The name of the folder for engines of one device and version, such as ``sm_87-tensorrt10.3.0``."""
    return f"{sm(compute_capability)}-{flavour}{version}"


def this_system() -> str:
    """The operating system and processor, which an engine's own host code belongs to."""
    return f"{sys.platform}-{platform.machine().lower()}"


def graph_of(part: PartFile, api: Api | None) -> tuple[str, bool]:
    """The file of ``part`` that ``api`` builds, and whether it writes its cache in place."""
    in_place = bool(part.in_place) and api is not None and api.has_in_place_cache
    return (part.in_place if in_place else part.file), in_place


def source_files(part: PartFile, graph: str) -> tuple[str, ...]:
    """The files that the engine of ``graph`` is built from: the graph and its weights, not the part's other graph."""
    others = {part.file, part.in_place} - {graph}
    return (graph, *(name for name in part.files if name != graph and name not in others))


def stem_of(graph: str) -> str:
    """What an engine's file is called, without its ending."""
    return check_name(PurePosixPath(graph).stem)


def make_key(
    bundle: Bundle,
    part: PartFile,
    graph: str,
    profiles: Sequence[Profile],
    *,
    max_context: int,
    compute_capability: str,
    flavour: str,
    version: str,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
) -> EngineKey:
    """The key of the engine of ``graph`` with these ``profiles``, in a bundle for ``max_context`` rows."""
    return EngineKey(
        compute_capability=compute_capability,
        flavour=flavour,
        version=version,
        system=this_system(),
        sources=source_hashes(bundle, part, graph),
        recipe=recipe_hash(profiles, max_context),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )


def recipe_hash(profiles: Sequence[Profile], max_context: int) -> str:
    """SHA-256 of what ``tensorrt/build.json`` says about one engine."""
    plain = json.loads(to_json({"max_context": max_context, "profiles": list(profiles)}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def source_hashes(bundle: Bundle, part: PartFile, graph: str) -> dict[str, str]:
    """SHA-256 of the files behind the engine of ``graph``, as ``SHA256SUMS`` has them."""
    sums = read_sums(bundle.root)
    return {name: sums[name] for name in source_files(part, graph)}


def find_engine(bundle: Bundle, part: PartFile, api: Api, compute_capability: tuple[int, int]) -> FoundEngine:
    """The engine of ``part`` that runs here: the one with this device's key, else one built compatible with it.

    An in-place graph goes before one with rows.  One that cannot be used is passed over with a warning.

    Raises UnsupportedError where there is none for this device and version, with what there is; IntegrityError where
    the graph or the recipe of the only ones has changed since, or their entries cannot be read.
    """
    here, recipe = dotted(compute_capability), read_recipe(bundle)
    first = folder_name(here, api.flavour, api.version_text)
    strangers: list[EngineEntry] = []
    complaints: list[str] = []
    for graph in dict.fromkeys((graph_of(part, api)[0], part.file)):
        for folder in sorted(engine_folders(bundle), key=lambda folder: (folder.name != first, folder.name)):
            try:
                entry = _entry(folder, stem_of(graph))
                if entry is None:
                    continue
                if not runs_here(entry.key, api, compute_capability):
                    strangers.append(entry)
                    continue
                path = inside(bundle.root, f"{folder.relative_to(bundle.root).as_posix()}/{stem_of(graph)}.engine")
                found = FoundEngine(path, entry, graph, in_place=graph == part.in_place)
                _check_fresh(bundle, part, found, recipe)
            except IntegrityError as error:
                complaints.append(str(error))
                continue
            for complaint in dict.fromkeys(complaints):
                logger.warning("passed over: %s", complaint)
            return found
    if complaints:
        raise IntegrityError("; ".join(dict.fromkeys(complaints)))
    place = f"{sm(here)} with {api.name} on {this_system()}"
    build = f"edgevlm build {bundle.root}"
    if strangers:
        built_for = "; ".join(dict.fromkeys(entry.key.place for entry in strangers))
        raise UnsupportedError(
            f"{part.part} in {part.precision}: its engine was built for {built_for}, here is {place}: run `{build}`"
        )
    raise UnsupportedError(f"{part.part} in {part.precision} has no engine for {place} yet: run `{build}` first")


def runs_here(key: EngineKey, api: Api, compute_capability: tuple[int, int]) -> bool:
    """Whether an engine of ``key`` runs with ``api`` on a device of ``compute_capability``.

    Built version-compatible, it runs on later versions as well, of the same major version or the next one up from 10;
    built hardware-compatible, on every device from 8.0 on.
    """
    if key.flavour != api.flavour or key.system != this_system():
        return False
    return _fits_version(key, api) and _fits_device(key, compute_capability)


def read_index(folder: Path) -> EngineIndex:
    """``engine.json`` in ``folder``, empty where there is none.

    Raises IntegrityError for one that is damaged or of a newer EdgeVLM.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        return EngineIndex()
    if file.stat().st_size > MOST_BYTES:
        raise IntegrityError(f"{file} is no list of engines: {file.stat().st_size:,} bytes are too many")
    try:
        return from_mapping(EngineIndex, read_json(file), strict=True, where=str(file))
    except EdgeVLMError as error:
        raise IntegrityError(f"{error}; run `edgevlm build --overwrite`") from error


def keep_engine(
    folder: Path, stem: str, engine: Any, key: EngineKey, profiles: Sequence[str], workspace_mb: int
) -> EngineEntry:
    """Write one engine into ``folder``, whole or not at all, and put its entry into ``engine.json``.

    Killed at any moment, it leaves an engine that is listed with its own hash, or none that is listed.
    """
    path = folder / f"{stem}.engine"
    _list_engines(folder, {stem: None})
    with atomic_file(path) as scratch:
        with scratch.open("wb") as stream:
            stream.write(engine)
        entry = EngineEntry(
            key=key,
            sha256=sha256(scratch),
            num_bytes=scratch.stat().st_size,
            profiles=tuple(profiles),
            workspace_mb=workspace_mb,
        )
    _list_engines(folder, {stem: entry})
    return entry


def kept_engine(folder: Path, stem: str, key: EngineKey, workspace_mb: int | None = None) -> EngineEntry | None:
    """The entry of an engine that stands in ``folder`` whole and with this ``key``, else None.

    A ``workspace_mb`` that was asked for counts too; None takes any.
    """
    try:
        entry = read_index(folder).engines.get(stem)
    except IntegrityError:
        return None
    path = folder / f"{stem}.engine"
    if entry is None or workspace_mb not in (None, entry.workspace_mb):
        return None
    if entry.key != key or not path.is_file() or path.is_symlink():
        return None
    return entry if path.stat().st_size == entry.num_bytes and sha256(path) == entry.sha256 else None


def sweep(folder: Path) -> None:
    """Remove what a killed build left half-written in ``folder``; call it with the lock held."""
    for left in folder.glob(".*.partial*"):
        with suppress(OSError):
            left.unlink()


@contextmanager
def locked(bundle: Bundle) -> Iterator[Path]:
    """The folder of engines, made where it was not, while no other build may write there.

    Raises DeviceError where another one does, UsageError where the bundle cannot be written.
    """
    folder = inside(bundle.root, ENGINES_FOLDER)
    with translate_disk_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        file = inside(bundle.root, f"{ENGINES_FOLDER}/{LOCK_FILE}")
        stream = file.open("a+", encoding="ascii")
    with stream:
        if not _try_lock(stream.fileno()):
            stream.seek(0)
            raise DeviceError(
                f"{bundle.root}: another `edgevlm build` writes engines here (process {stream.read(20) or '?'}): "
                "wait for its end, or end it"
            )
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield folder


def engine_folders(bundle: Bundle) -> tuple[Path, ...]:
    """Every folder of engines that the bundle holds."""
    root = bundle.root / PurePosixPath(ENGINES_FOLDER)
    if not root.is_dir() or root.is_symlink():
        return ()
    return tuple(sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.is_symlink()))


def _entry(folder: Path, stem: str) -> EngineEntry | None:
    """What ``folder`` says about the engine called ``stem``, None where it has none.  Raises IntegrityError."""
    entry = read_index(folder).engines.get(stem)
    return entry if (folder / f"{stem}.engine").is_file() else None


def _check_fresh(bundle: Bundle, part: PartFile, found: FoundEngine, recipe: Recipe) -> None:
    """Raises IntegrityError where the engine was cut, or built from another graph or recipe than there is now."""
    again = f"run `edgevlm build {bundle.root}` again"
    if found.path.stat().st_size != found.entry.num_bytes:
        raise IntegrityError(_damaged(found.path))
    if found.entry.key.sources != source_hashes(bundle, part, found.graph):
        raise IntegrityError(f"{found.path} was built from other files than {found.graph} is now: {again}")
    every = {one.name: one for one in recipe.of(part.part, in_place=found.in_place).profiles}
    chosen = [every[name] for name in found.entry.profiles if name in every]
    if found.entry.key.recipe != recipe_hash(chosen, recipe.max_context):
        raise IntegrityError(f"{found.path} was built for other sizes than {RECIPE_FILE} has now: {again}")


def _fits_version(key: EngineKey, api: Api) -> bool:
    if key.version == api.version_text:
        return True
    built = tuple(int(number) for number in key.version.split(".") if number.isdigit())
    pair = (built[0], api.version[0])
    is_known_pair = pair[0] == pair[1] or pair == (10, 11)  # no others cross a major version
    return key.version_compatible and api.flavour == "tensorrt" and is_known_pair and built <= api.version


def _fits_device(key: EngineKey, compute_capability: tuple[int, int]) -> bool:
    if key.compute_capability == dotted(compute_capability):
        return True
    built = tuple(int(number) for number in key.compute_capability.split(".") if number.isdigit())
    return key.hardware_compatible and built >= AMPERE and compute_capability >= AMPERE


def _list_engines(folder: Path, changes: Mapping[str, EngineEntry | None]) -> None:
    """Put ``changes`` into ``engine.json``; None takes an entry out."""
    try:
        index = read_index(folder)
    except IntegrityError:
        index = EngineIndex()
    engines = {stem: entry for stem, entry in {**index.engines, **changes}.items() if entry is not None}
    if engines != index.engines or not index.engines:
        with atomic_file(folder / INDEX_FILE) as scratch:
            scratch.write_text(to_json(replace(index, engines=engines)), encoding="utf-8")


def _try_lock(handle: int) -> bool:
    """Whether this process now holds the lock; where the system has none, it always does."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems do not lock
        return True
    return True


def _damaged(path: Path) -> str:
    return f"{path} was changed or damaged (its SHA-256 differs): run `edgevlm build` again"
