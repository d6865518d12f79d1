"""``edgevlm doctor``: what this machine is, and what to install."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.cli.console import Json, print_json
from edgevlm.core.hardware import Cpu, Gpu, Hardware, Memory, probe
from edgevlm.core.jetson import Clock, Jetson, jetson_advice
from edgevlm.core.optional import Library, installed_variants, is_installed, libraries


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The machine, the libraries, and what could be better: one sentence with its command each."""

    hardware: Hardware
    libraries: tuple[Library, ...]
    advice: tuple[str, ...]


def command(json: Json = False) -> None:
    """Show processor, memory, GPUs, Jetson settings and back ends, and how to install what is missing."""
    diagnosis = diagnose()
    if json:
        print_json(diagnosis)
    else:
        _print(diagnosis)


def diagnose() -> Diagnosis:
    """Look at this machine.  Nothing heavy is imported and nothing is changed."""
    hardware, found = probe(), libraries()
    return Diagnosis(hardware=hardware, libraries=found, advice=advice(hardware, installed_variants("onnxruntime")))


def advice(hardware: Hardware, onnxruntimes: tuple[str, ...]) -> tuple[str, ...]:
    """What to do on this machine, given the installed packages that bring ``onnxruntime``."""
    lines = []
    if len(onnxruntimes) > 1:
        names = " ".join(onnxruntimes)
        lines.append(f"{names} overwrite each other: pip uninstall -y {names} && pip install onnxruntime")
    if not onnxruntimes:
        lines.append("no bundle can run without ONNX Runtime: pip install onnxruntime")
    if hardware.cpu.usable_cores < hardware.cpu.logical_cores:
        cores = f"{hardware.cpu.usable_cores:g} of {hardware.cpu.logical_cores}"
        lines.append(f"affinity or the container's quota leaves {cores} cores: more threads than that only wait")
    if hardware.jetson:
        lines += jetson_advice(hardware.jetson, hardware.memory.total_bytes)
        lines += _system_tensorrt(hardware)
    return tuple(lines)


def _system_tensorrt(hardware: Hardware) -> list[str]:
    """JetPack's TensorRT comes with a Python module of the system's own Python, which an environment may not see."""
    if hardware.tensorrt is None:
        return ["TensorRT is not installed: sudo apt install nvidia-jetpack"]
    if is_installed("tensorrt"):
        return []
    command = "sudo apt install python3-libnvinfer, then python3 -m venv --system-site-packages"
    return [f"Python does not see the system's TensorRT {hardware.tensorrt}: {command}"]


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    machine = Table.grid(padding=(0, 2))
    for name, value in _machine_rows(diagnosis.hardware):
        machine.add_row(Text(name, style="bold"), Text(value))
    back_ends = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("library", "version", "used for", "to install"):
        back_ends.add_column(title, overflow="fold")
    for library in diagnosis.libraries:
        version = Text(library.version or "missing", style="green" if library.version else "yellow")
        back_ends.add_row(Text(library.package), version, Text(library.used_for), Text(library.fix or ""))
    screen = Console(highlight=False)
    screen.print(machine)
    screen.print()
    screen.print(back_ends)
    for line in diagnosis.advice:
        screen.print()
        screen.print(Text(f"advice: {line}"), soft_wrap=True)


def _machine_rows(hardware: Hardware) -> list[tuple[str, str]]:
    rows = [
        ("system", f"{hardware.system} {hardware.kernel} {hardware.architecture}"),
        *([("board", hardware.board)] if hardware.board else []),
        ("processor", hardware.cpu.model),
        ("features", " ".join(hardware.cpu.features) or "none that matter here"),
        ("cores", _cores(hardware.cpu)),
        ("memory", _memory(hardware.memory)),
    ]
    rows += [("GPU", _gpu(gpu)) for gpu in hardware.gpus] or [("GPU", "none found")]
    rows += [("TensorRT", f"{hardware.tensorrt} (the system's)")] if hardware.tensorrt else []
    return rows + (_jetson_rows(hardware.jetson) if hardware.jetson else [])


def _cores(cpu: Cpu) -> str:
    usable = f"{cpu.usable_cores:g} usable by this process"
    return f"{cpu.physical_cores} physical, {cpu.logical_cores} logical, {usable}"


def _memory(memory: Memory) -> str:
    text = f"{_gib(memory.total_bytes)} in all, {_gib(memory.available_bytes)} available"
    return text if memory.limit_bytes is None else f"{text} (container limit {_gib(memory.limit_bytes)})"


def _gpu(gpu: Gpu) -> str:
    size = "shares the system's memory" if gpu.shared_memory else _gib(gpu.memory_bytes)
    driver = [f"driver {gpu.driver}"] if gpu.driver else []
    capability = [f"compute capability {gpu.compute_capability}"] if gpu.compute_capability else []
    return ", ".join([gpu.name, size, *driver, *capability])


def _jetson_rows(jetson: Jetson) -> list[tuple[str, str]]:
    jetpack = f" (JetPack {jetson.jetpack})" if jetson.jetpack else ""
    locked = {True: ", locked", False: ", not locked", None: ""}[jetson.clocks_locked]
    return [
        ("Jetson", jetson.model),
        *([("module", jetson.module)] if jetson.module else []),
        ("L4T", f"{jetson.l4t or 'unknown'}{jetpack}"),
        ("power mode", jetson.power_mode or "unknown: run `sudo nvpmodel -q`"),
        ("GPU clock", f"{_clock(jetson.gpu_clock)}{locked}"),
        ("CPU clock", f"{_clock(jetson.cpu_clock)}{locked}"),
        ("memory clock", _clock(jetson.memory_clock)),
        ("swap", f"{_gib(jetson.swap_bytes)} on disk, {_gib(jetson.zram_bytes)} compressed in memory (zram)"),
        ("CMA", f"{_gib(jetson.cma_total_bytes)} reserved, {_gib(jetson.cma_free_bytes)} free"),
    ]


def _clock(clock: Clock) -> str:
    """``306 MHz now, up to 612 of 1020``"""
    if clock.now_hz is None and clock.most_hz is None:
        return "unknown: only root reads it, or the system does not say"
    now, most, highest = (
        None if one is None else f"{one / 1e6:.0f}" for one in (clock.now_hz, clock.most_hz, clock.highest_hz)
    )
    limit = f"up to {most} of {highest}" if clock.capped else f"up to {most or highest or 'unknown'}"
    return f"{now or 'unknown'} MHz now, {limit}"


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
