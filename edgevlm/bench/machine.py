"""Where a benchmark ran: device, versions, clocks and what else was going on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from edgevlm.core.hardware import Hardware, probe

LIBRARIES = ("edgevlm", "numpy", "pillow", "onnxruntime", "openvino", "torch", "tokenizers")
GIB = 1024**3
CLOCKS = Path("/sys/devices/system/cpu")


@dataclass
class OtherLoad:
    """Share of all processors, 0 to 1, that other programs used; None until the block ended."""

    share: float | None = None


def device(machine: Hardware | None = None) -> dict[str, Any]:
    """What this machine is, in plain values; ``name`` first.  Unknown ones are left out."""
    found = machine or probe()
    jetson, cpu = found.jetson, found.cpu
    values = {
        "name": jetson.model if jetson else cpu.model,
        "board": found.board,
        "cpu": cpu.model,
        "usable_cores": cpu.usable_cores,
        "logical_cores": cpu.logical_cores,
        "cpu_features": " ".join(cpu.features),
        "memory_gib": round(found.memory.total_bytes / GIB, 1) if found.memory.total_bytes else None,
        "gpus": ", ".join(gpu.name for gpu in found.gpus),
        "power_mode": jetson.power_mode if jetson else None,
        "jetpack": jetson.jetpack if jetson else None,
        "architecture": found.architecture,
        "kernel": f"{found.system} {found.kernel}",
    }
    return {name: value for name, value in values.items() if value}


def versions() -> dict[str, str]:
    """Python and the installed libraries that a figure depends on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def clocks_mhz(folder: Path = CLOCKS) -> tuple[float, ...]:
    """The clock of every processor now; empty where the system does not say."""
    files = sorted(folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"), key=lambda file: int(file.parts[-3][3:]))
    try:
        return tuple(int(file.read_text(encoding="ascii")) / 1000 for file in files)
    except (OSError, ValueError):
        return ()


@contextmanager
def watch_other_load() -> Iterator[OtherLoad]:
    """What the rest of the machine did while the block ran."""
    load = OtherLoad()
    before, ours_before = _busy_and_total_s(), _ours_s()
    yield load
    after, ours_after = _busy_and_total_s(), _ours_s()
    total = after[1] - before[1]
    if total > 0:
        others = (after[0] - before[0]) - (ours_after - ours_before)
        load.share = min(1.0, max(0.0, others / total))


def name_of(device: Mapping[str, Any]) -> str:
    """The shortest honest name of a device."""
    return str(device.get("name") or device.get("cpu") or "unknown device")


def _busy_and_total_s() -> tuple[float, float]:
    times = psutil.cpu_times()
    total = float(sum(times)) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # already in user
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _ours_s() -> float:
    times = os.times()
    return times.user + times.system
