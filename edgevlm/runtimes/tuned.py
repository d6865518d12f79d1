"""What was measured to be best on this machine: the bundle's ``tune.json``, which ``edgevlm tune`` writes.

The file lies beside what ``SHA256SUMS`` covers, since it is made where the bundle is used.  So it can choose among
what is known already and nothing more: runtimes of the registry, precisions of the manifest, numbers of threads.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from edgevlm.bundle.manifest import Manifest
from edgevlm.bundle.read import Bundle
from edgevlm.core.config import from_mapping, read_json, to_json
from edgevlm.core.errors import ConfigError, EdgeVLMError, UsageError
from edgevlm.core.files import atomic_file
from edgevlm.core.hardware import Hardware, probe, run_tool
from edgevlm.core.registry import unknown_name
from edgevlm.runtimes.choices import GOALS, Choices, PartChoice, target_of
from edgevlm.runtimes.engines import BackEnd

logger = logging.getLogger(__name__)

BackEndClass: TypeAlias = Callable[..., BackEnd]  # takes device and threads

TUNE_FILE = "tune.json"
SCHEMA = 1
MOST_BYTES = 4 << 20
LIBRARIES = (
    "edgevlm",
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn", "onnxruntime-directml"),
    "openvino",
    *("tensorrt", "tensorrt-rtx"),
)


@dataclass(frozen=True, kw_only=True)
class TunedMachine:
    """The best choices per goal on one machine; ``goal`` is the one to follow unasked.

    ``holds_for``: the ``surroundings`` in which they were found.  ``machine``, ``measurements`` and ``date`` say where
    they come from, for people.
    """

    holds_for: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    goal: str
    choices: dict[str, Choices]
    measurements: list[dict[str, Any]] = field(default_factory=list)
    date: str = ""

    def __post_init__(self) -> None:
        for goal in (self.goal, *self.choices):
            if goal not in GOALS:
                raise ConfigError(unknown_name("goal", goal, GOALS))
        if self.goal not in self.choices:
            raise ConfigError(f"it was tuned for {self.goal}, but says nothing about it")


@dataclass(frozen=True, kw_only=True)
class Tunes:
    """The whole of ``tune.json``; ``machines`` by ``machine_key``."""

    schema: int = SCHEMA
    machines: dict[str, TunedMachine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ConfigError(f"schema must be {SCHEMA}, found {self.schema}")


def machine_key(hardware: Hardware | None = None) -> str:
    """What decides speed here, in one line: machines of equal key share their choices.

    A container's quota and a Jetson's power mode count, since they change which number of threads is best.  Nobody
    waits for ``nvidia-smi``, so of NVIDIA's GPUs it tells nothing.
    """
    found = hardware or _hardware()
    jetson, cpu = found.jetson, found.cpu
    cores = f"{min(cpu.physical_cores, int(cpu.usable_cores))} of {cpu.logical_cores} cores"
    gpus = [gpu.name for gpu in found.gpus]
    mode = [f"power mode {jetson.power_mode}"] if jetson and jetson.power_mode else []
    names = [jetson.model if jetson else cpu.model, cores, *gpus, *mode, found.system, platform.machine()]
    return ", ".join(names)


def surroundings(root: Path, hardware: Hardware | None = None) -> dict[str, str]:
    """What must not have changed since a choice was judged and timed, beside the machine's key, by name.

    The bundle in the folder ``root``, the libraries that compute, and the processor's instructions, which a virtual
    machine may be given or denied under the same name.
    """
    found = {"bundle": sums_hash(root) or "", "cpu features": " ".join((hardware or _hardware()).cpu.features)}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def sums_hash(root: Path) -> str | None:
    """The SHA-256 of a bundle's SHA256SUMS, which stands for all that the bundle holds; None where there is none."""
    sums = root / "SHA256SUMS"
    return hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else None


def tuned_choices(bundle: Bundle, goal: str | None, *, known: Mapping[str, BackEndClass]) -> Choices | None:
    """What ``tune.json`` says about this machine, None where it says nothing.

    A file that cannot be used, or that was made for another bundle, library or processor, is ignored with a warning.
    Raises UsageError where a ``goal`` was asked for by name and nothing is tuned for it here.
    """
    found = _of_this_machine(bundle, goal, known)
    if found is None and goal is not None:
        raise UsageError(
            f"{bundle.root}: nothing is tuned for {goal} on this machine: run `edgevlm tune {bundle.root}` first, "
            "or leave --optimize out"
        )
    return found


def _hardware() -> Hardware:
    return probe(tool=_quick_tool)


def _quick_tool(command: Sequence[str]) -> str | None:
    return None if command[0] == "nvidia-smi" else run_tool(command)


def read_tunes(root: Path, manifest: Manifest, *, known: Mapping[str, BackEndClass]) -> Tunes:
    """``tune.json`` in the folder ``root``, empty where there is none.

    Raises InputError when it cannot be read, ConfigError for anything missing, unknown or wrongly typed, and for a
    runtime that is not ``known`` or a precision that the bundle lacks.
    """
    file = root / TUNE_FILE
    if not file.is_file():
        return Tunes()
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ConfigError(f"{file}: {size:,} bytes are too many (at most {MOST_BYTES:,})")
    tunes = from_mapping(Tunes, read_json(file), strict=True, where=str(file))
    for machine in tunes.machines.values():
        for choices in machine.choices.values():
            _check(choices.encoder, "vision_encoder", manifest, known, file)
            _check(choices.decoder, "decoder_model_merged", manifest, known, file)
    return tunes


def write_tune(
    root: Path, tuned: TunedMachine, *, key: str, manifest: Manifest, known: Mapping[str, BackEndClass]
) -> Path:
    """Put what was found for the machine ``key`` into ``tune.json``; what it says of others stays."""
    file = root / TUNE_FILE
    try:
        machines = read_tunes(root, manifest, known=known).machines
    except EdgeVLMError as error:
        logger.warning("%s is replaced: %s", file, error)
        machines = {}
    with atomic_file(file) as scratch:
        scratch.write_text(to_json(Tunes(machines={**machines, key: tuned})), encoding="utf-8")
    return file


def _of_this_machine(bundle: Bundle, goal: str | None, known: Mapping[str, BackEndClass]) -> Choices | None:
    try:
        machines = read_tunes(bundle.root, bundle.manifest, known=known).machines
        hardware = _hardware() if machines else None  # most bundles need not ask
        machine = machines.get(machine_key(hardware)) if machines else None
        if machine:
            _check_unchanged(machine.holds_for, surroundings(bundle.root, hardware))
        choices = machine.choices.get(goal or machine.goal) if machine else None
        for choice in (choices.encoder, choices.decoder) if choices else ():
            known[choice.runtime](device=None, threads=choice.threads)
    except EdgeVLMError as error:
        logger.warning("%s is ignored: %s; `edgevlm tune` writes it again", bundle.root / TUNE_FILE, error)
        return None
    return choices


def _check_unchanged(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises ConfigError naming what is another since the machine was tuned."""
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    if changed:
        raise ConfigError(f"it was tuned with another {', '.join(changed)}")


def _check(choice: PartChoice, part: str, manifest: Manifest, known: Mapping[str, BackEndClass], file: Path) -> None:
    if choice.runtime not in known:
        raise ConfigError(f"{file}: " + unknown_name("runtime", choice.runtime, list(known)))
    if choice.device is not None:
        raise ConfigError(f"{file}: it may not choose a device, found {choice.device!r}: name it with --device")
    if choice.precision is not None:
        target = target_of(known[choice.runtime])
        precisions = [one.precision for one in manifest.parts if (one.part, one.target) == (part, target)]
        if choice.precision not in precisions:
            raise ConfigError(f"{file}: the bundle has no {part} in {choice.precision!r}, but {', '.join(precisions)}")
