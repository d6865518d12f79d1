"""What this machine is: processor, memory, GPUs, TensorRT, and on a Jetson what decides its speed.

Read from the files and small tools of the system; no library is needed and none is imported.  Everything is
relative to a ``root``, so a tree of files stands in for a machine in the tests.  The Jetson, macOS and GPU
readers follow the documented formats; they have not been run on such hardware yet.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edgevlm.core.jetson import Jetson, Tool, jetson_model, package_version_of, read_jetson
from edgevlm.core.system_files import field_of, kilobytes_of, number_of, text_of

X86_FEATURES = (
    *("avx", "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
)
ARM_FEATURES = {  # as the kernel says it: as people say it
    "neon": "neon",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
ARM_CORES = {  # (implementer, part) as /proc/cpuinfo numbers them; ARM kernels print no model name
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x41, 0xD84): "Neoverse-V3",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
}
MAC_FEATURES = {
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_FP16": "fp16",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
DRM_VENDORS = {"0x1002": "AMD", "0x8086": "Intel"}


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor; ``usable_cores`` is what affinity and a container's quota leave (2.5: 250 % of one)."""

    model: str
    features: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    usable_cores: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes; ``limit_bytes`` is a container's limit; ``available_bytes`` respects it.  None: not known."""

    total_bytes: int | None
    available_bytes: int | None
    limit_bytes: int | None = None
    swap_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU; ``memory_bytes`` is None where it shares the system's memory or nobody tells."""

    name: str
    vendor: str
    memory_bytes: int | None = None
    driver: str | None = None
    compute_capability: str | None = None
    shared_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine, as `edgevlm doctor` shows it and every measurement carries it.

    ``tensorrt`` is the version of the system's library, None where there is none; Python's own packages do not count.
    """

    system: str
    architecture: str
    kernel: str
    board: str | None
    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...]
    jetson: Jetson | None
    tensorrt: str | None = None


def probe(root: Path = Path("/"), *, tool: Tool | None = None, system: str | None = None) -> Hardware:
    """Describe the machine whose files lie under ``root``; what cannot be read is None or empty.

    ``tool`` runs ``nvidia-smi``, ``nvpmodel`` and ``sysctl``; for a recorded tree none is run by default.
    """
    tool = tool or (run_tool if root == Path("/") else _no_tool)
    system = system or platform.system()
    parts = _probe_mac(tool) if system == "Darwin" else _probe_linux(root, tool)
    board = text_of(root / "proc/device-tree/model") or text_of(root / "sys/class/dmi/id/product_name")
    jetson = read_jetson(root, tool)
    return Hardware(
        system=system,
        architecture=platform.machine(),
        kernel=text_of(root / "proc/sys/kernel/osrelease") or platform.release(),
        board=board or None,
        cpu=parts[0],
        memory=parts[1],
        gpus=tuple(_of_board(gpu, jetson) for gpu in parts[2]),
        jetson=jetson,
        tensorrt=_tensorrt(root),
    )


def compute_cores(root: Path = Path("/"), *, tool: Tool | None = None, system: str | None = None) -> int:
    """Cores worth computing with: the physical ones, but no more than affinity and a container's quota leave.

    Hyper-threads share the arithmetic units that a model keeps busy, so they do not help; a thread beyond the
    quota makes all others wait.  Reads a few files, and on macOS asks ``sysctl``.
    """
    mac = (system or platform.system()) == "Darwin"
    cpu = _mac_cpu(tool or run_tool) if mac else _linux_cpu(root)
    return max(1, min(cpu.physical_cores, int(cpu.usable_cores)))


def run_tool(command: Sequence[str]) -> str | None:
    """The standard output of ``command``, or None when it is absent, fails or takes over ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def _no_tool(command: Sequence[str]) -> str | None:
    return None


def _probe_linux(root: Path, tool: Tool) -> tuple[Cpu, Memory, tuple[Gpu, ...]]:
    return _linux_cpu(root), _linux_memory(root), _linux_gpus(root, tool)


# -- processor ----------------------------------------------------------------------------------------------


def _linux_cpu(root: Path) -> Cpu:
    blocks = _cpuinfo(text_of(root / "proc/cpuinfo"))
    allowed = _cpu_list(field_of(text_of(root / "proc/self/status"), "Cpus_allowed_list"))
    logical = sum("processor" in block for block in blocks) or os.cpu_count() or 1
    quota = _cpu_quota(root)
    usable = float(min(len(allowed) or logical, logical))
    return Cpu(
        model=_cpu_model(blocks),
        features=_cpu_features(blocks),
        physical_cores=_physical_cores(root, blocks) or logical,
        logical_cores=logical,
        usable_cores=min(usable, quota) if quota else usable,
    )


def _cpuinfo(text: str) -> list[dict[str, str]]:
    """One mapping per processor (ARM kernels add one for the board)."""
    blocks = []
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
        if values := {name.strip(): value.strip() for name, _, value in pairs}:
            blocks.append(values)
    return blocks


def _cpu_model(blocks: list[dict[str, str]]) -> str:
    if named := next((block["model name"] for block in blocks if "model name" in block), ""):
        return named
    cores = [_arm_core(block) for block in blocks if "CPU part" in block]
    counts = {core: cores.count(core) for core in cores}
    return " + ".join(f"{count}x {core}" for core, count in counts.items()) or platform.processor() or "unknown"


def _arm_core(block: dict[str, str]) -> str:
    implementer, part = block.get("CPU implementer", "0"), block["CPU part"]
    try:
        return ARM_CORES[int(implementer, 16), int(part, 16)]
    except (KeyError, ValueError):
        return f"ARM core {implementer}:{part}"


def _cpu_features(blocks: list[dict[str, str]]) -> tuple[str, ...]:
    """What every core can do: on a big.LITTLE chip a thread may land on any of them."""
    lines = [block.get("flags", block.get("Features")) for block in blocks]
    sets = [set(line.split()) for line in lines if line]
    flags = set.intersection(*sets) if sets else set()
    arm = dict.fromkeys(name for flag, name in ARM_FEATURES.items() if flag in flags)
    return (*(name for name in X86_FEATURES if name in flags), *arm)


def _physical_cores(root: Path, blocks: list[dict[str, str]]) -> int:
    """Cores without counting hyper-threads twice; 0 where neither sysfs nor /proc/cpuinfo tells."""
    siblings = {text_of(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")}
    if siblings - {""}:
        return len(siblings - {""})
    return len({(block.get("physical id"), block["core id"]) for block in blocks if "core id" in block})


def _cpu_list(text: str) -> set[int]:
    """``0-3,8`` as the set of its numbers."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


# -- containers ---------------------------------------------------------------------------------------------


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Every cgroup folder that may limit this process, innermost first, for version 2 and 1."""
    folders: list[Path] = []
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if names else "")
        inner = base / path.strip("/")
        folders += [inner, *(folder for folder in inner.parents if folder == base or base in folder.parents)]
    return folders


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU quota that holds, in cores."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        words = text_of(folder / "cpu.max").split() or [
            text_of(folder / "cpu.cfs_quota_us"),
            text_of(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):  # "max" and -1 mean no quota
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, still free below it) in bytes, for every cgroup that has a limit."""
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, usage_file, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = number_of(text_of(folder / limit_file)), number_of(text_of(folder / usage_file))
            if limit is not None and limit < 2**60:  # version 1 writes almost 2**63 for "no limit"
                cached = number_of(field_of(text_of(folder / "memory.stat"), reclaimable, separator=" ")) or 0
                limits.append((limit, max(0, limit - max(0, (usage or 0) - cached))))
    return limits


# -- memory -------------------------------------------------------------------------------------------------


def _linux_memory(root: Path) -> Memory:
    meminfo = text_of(root / "proc/meminfo")
    total, available = kilobytes_of(meminfo, "MemTotal"), kilobytes_of(meminfo, "MemAvailable")
    limits = [pair for pair in _memory_limits(root) if total is None or pair[0] < total]
    free = [pair[1] for pair in limits] + ([] if available is None else [available])
    return Memory(
        total_bytes=total,
        available_bytes=min(free, default=None),
        limit_bytes=min((pair[0] for pair in limits), default=None),
        swap_bytes=kilobytes_of(meminfo, "SwapTotal"),
    )


# -- GPUs ---------------------------------------------------------------------------------------------------


def _linux_gpus(root: Path, tool: Tool) -> tuple[Gpu, ...]:
    nvidia = _nvidia_smi(tool) or _nvidia_proc(root)
    if not nvidia and (board := jetson_model(root)):
        nvidia = [Gpu(name=f"{board} (integrated)", vendor="NVIDIA", shared_memory=True)]
    return (*nvidia, *_drm_gpus(root))


def _of_board(gpu: Gpu, jetson: Jetson | None) -> Gpu:
    """``gpu``, with the compute capability that its board is known for where the driver does not tell."""
    if jetson is None or gpu.vendor != "NVIDIA" or gpu.compute_capability:
        return gpu
    return replace(gpu, compute_capability=jetson.compute_capability)


def _nvidia_smi(tool: Tool) -> list[Gpu]:
    fields = "name,memory.total,driver_version,compute_cap"
    listing = tool(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]) or ""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines()]
    return [_nvidia_gpu(*row) for row in rows if len(row) == 4]


def _nvidia_gpu(name: str, mebibytes: str, driver: str, capability: str) -> Gpu:
    memory = number_of(mebibytes)  # "[N/A]" on a Jetson, whose GPU shares the system's memory
    return Gpu(
        name=name,
        vendor="NVIDIA",
        memory_bytes=None if memory is None else memory * 2**20,
        driver=_known(driver),
        compute_capability=_known(capability),
        shared_memory=memory is None,
    )


def _nvidia_proc(root: Path) -> list[Gpu]:
    version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text_of(root / "proc/driver/nvidia/version"))
    driver = version[1] if version else None
    cards = sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    return [Gpu(name=field_of(text_of(card), "Model") or "unknown", vendor="NVIDIA", driver=driver) for card in cards]


def _drm_gpus(root: Path) -> list[Gpu]:
    vendors = [text_of(path) for path in sorted(root.glob("sys/class/drm/card[0-9]*/device/vendor"))]
    names = [DRM_VENDORS[vendor] for vendor in vendors if vendor in DRM_VENDORS]
    return [Gpu(name=f"{name} graphics", vendor=name, shared_memory=name == "Intel") for name in names]


# -- TensorRT -----------------------------------------------------------------------------------------------


def _tensorrt(root: Path) -> str | None:
    """By the system's package, else by the header of the library."""
    if package := package_version_of(root, r"libnvinfer\d+"):
        return package.partition("-")[0]
    folders = ("usr/include", "usr/include/*")
    headers = [text_of(path) for folder in folders for path in sorted(root.glob(f"{folder}/NvInferVersion.h"))]
    return next(filter(None, map(_header_version, headers)), None)


def _header_version(header: str) -> str | None:
    """Of ``#define NV_TENSORRT_MAJOR 10``, or of the names that these stand for since TensorRT 10.11."""
    numbers = dict(re.findall(r"#define\s+(\w+)\s+(\d+)", header))
    for names in ("NV_TENSORRT_{}", "TRT_{}_ENTERPRISE"):
        words = [numbers.get(names.format(part)) for part in ("MAJOR", "MINOR", "PATCH")]
        if None not in words:
            return ".".join(filter(None, words))
    return None


# -- macOS --------------------------------------------------------------------------------------------------


def _probe_mac(tool: Tool) -> tuple[Cpu, Memory, tuple[Gpu, ...]]:
    cpu = _mac_cpu(tool)
    memory = Memory(total_bytes=number_of(_sysctl(tool, "hw.memsize")), available_bytes=_mac_available(tool))
    is_apple = cpu.model.startswith("Apple")
    return cpu, memory, (Gpu(name=f"{cpu.model} GPU", vendor="Apple", shared_memory=True),) if is_apple else ()


def _mac_cpu(tool: Tool) -> Cpu:
    setting = partial(_sysctl, tool)
    model = setting("machdep.cpu.brand_string") or "unknown"
    logical = number_of(setting("hw.logicalcpu")) or os.cpu_count() or 1
    features = dict.fromkeys(name for key, name in MAC_FEATURES.items() if setting(key) == "1")
    return Cpu(
        model=model,
        features=tuple(features),
        physical_cores=number_of(setting("hw.physicalcpu")) or logical,
        logical_cores=logical,
        usable_cores=float(logical),
    )


def _sysctl(tool: Tool, name: str) -> str:
    return (tool(["sysctl", "-n", name]) or "").strip()


def _mac_available(tool: Tool) -> int | None:
    text = tool(["vm_stat"]) or ""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = [number_of(field_of(text, f"Pages {kind}").rstrip(".")) for kind in ("free", "inactive", "speculative")]
    return int(size[1]) * sum(page or 0 for page in pages) if size else None


# -- reading ------------------------------------------------------------------------------------------------


def _known(text: str) -> str | None:
    return None if not text or text.strip("[]").upper() == "N/A" else text
