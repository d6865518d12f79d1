"""What decides speed on a Jetson: module, JetPack, power mode, clocks, reserved memory, swap.

Read from the files that NVIDIA's Linux writes, below a ``root``, so a tree of files stands in for a board in the tests.
JetPack 5 and 6 name the GPU's clock ``17000000.ga10b`` or ``17000000.gpu``, JetPack 7 on Thor ``gpu-gpc-0``; the
memory's clock (EMC) lies in debugfs, which only root reads, and on Thor in ``bwmgr``.  Not run on hardware yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgevlm.core.system_files import field_of, kilobytes_of, number_of, text_of

Tool = Callable[[Sequence[str]], "str | None"]  # a command line -> its standard output, None where it is absent

ROOT = Path("/")
SOCS = {  # system on chip, as the device tree names it: (family, compute capability of its GPU)
    "tegra264": ("Thor", "11.0"),
    "tegra234": ("Orin", "8.7"),
    "tegra194": ("Xavier", "7.2"),
    "tegra186": ("TX2", "6.2"),
    "tegra210": ("Nano", "5.3"),
}
MODULES = {  # part number, which the device tree names too
    "p3834-0008": "Jetson Thor T5000",
    "p3767-0000": "Jetson Orin NX 16GB",
    "p3767-0001": "Jetson Orin NX 8GB",
    "p3767-0003": "Jetson Orin Nano 8GB",
    "p3767-0004": "Jetson Orin Nano 4GB",
    "p3767-0005": "Jetson Orin Nano 8GB (developer kit)",
    "p3701-0000": "Jetson AGX Orin",
    "p3701-0004": "Jetson AGX Orin 32GB",
    "p3701-0005": "Jetson AGX Orin 64GB",
    "p3701-0008": "Jetson AGX Orin Industrial",
    "p3668-0000": "Jetson Xavier NX (developer kit)",
    "p3668-0001": "Jetson Xavier NX",
    "p3668-0003": "Jetson Xavier NX 16GB",
    "p2888-0001": "Jetson AGX Xavier 16GB",
    "p2888-0004": "Jetson AGX Xavier 32GB",
    "p2888-0005": "Jetson AGX Xavier 64GB",
    "p2888-0008": "Jetson AGX Xavier Industrial",
}
JETPACKS = {
    "39.2.1": "7.2.1",
    "39.2.0": "7.2",
    "38.4.0": "7.1",
    "38.2.2": "7.0",
    "38.2.1": "7.0",
    "38.2.0": "7.0",
    "36.5.0": "6.2.2",
    "36.4.7": "6.2.1",
    "36.4.4": "6.2.1",
    "36.4.3": "6.2",
    "36.4.0": "6.1",
    "36.3.0": "6.0",
    "35.6.4": "5.1.6",
    "35.6.3": "5.1.5",
    "35.6.2": "5.1.5",
    "35.6.1": "5.1.5",
    "35.6.0": "5.1.4",
    "35.5.0": "5.1.3",
    "35.4.1": "5.1.2",
    "35.3.1": "5.1.1",
    "35.2.1": "5.1",
    "35.1.0": "5.0.2",
}
MAJOR_JETPACKS = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}  # of a release that is not above
OLDEST_JETPACK = (6, 1)  # the first with TensorRT 10.3
GPU_CLOCKS = {"gpu-gpc-0": "Thor", "ga10b": "Orin", "gv11b": "Xavier", "gp10b": "TX2", "gpu": ""}  # devfreq: family
DEVFREQ = "sys/class/devfreq"
EMC_RATES = "sys/kernel/debug/bpmp/debug/clk/emc"
EMC_CAPS = ("sys/kernel/nvpmodel_clk_cap/emc", "sys/kernel/nvpmodel_emc_cap/emc_iso_cap")
SMALL_CMA_BYTES = 128 << 20
SMALL_MEMORY_BYTES = 20 << 30  # modules of up to 16 GB, where zram and a missing swap file are felt


@dataclass(frozen=True, kw_only=True)
class Clock:
    """One clock in Hz; ``least_hz`` and ``most_hz`` are its limits now, ``highest_hz`` what it reaches in any mode."""

    now_hz: int | None = None
    least_hz: int | None = None
    most_hz: int | None = None
    highest_hz: int | None = None

    @property
    def locked(self) -> bool | None:
        """Whether it cannot move, as after ``jetson_clocks``; None where a limit is not known."""
        return None if None in (self.least_hz, self.most_hz) else self.least_hz == self.most_hz

    @property
    def capped(self) -> bool:
        """Whether the power mode keeps it below what the module reaches."""
        return self.most_hz is not None and self.highest_hz is not None and self.most_hz < self.highest_hz


@dataclass(frozen=True, kw_only=True)
class Jetson:
    """What decides speed on a Jetson.

    ``model`` is the board's name, ``module`` what is plugged into it.  ``power_mode`` is its name (``MAXN_SUPER``) or
    number, ``power_modes`` all names with their numbers.  CMA is memory that the kernel can hand out in one piece, for
    devices that need it so; ``zram_bytes`` is swap that lies compressed in memory, ``swap_bytes`` all other.
    ``clocks_locked``: whether ``jetson_clocks`` is on, None where nobody may tell.
    """

    model: str
    l4t: str | None
    jetpack: str | None
    power_mode: str | None
    cma_total_bytes: int | None
    cma_free_bytes: int | None
    module: str | None = None
    compute_capability: str | None = None
    power_modes: Mapping[str, int] = field(default_factory=dict)
    gpu_clock: Clock = Clock()
    cpu_clock: Clock = Clock()
    memory_clock: Clock = Clock()
    clocks_locked: bool | None = None
    zram_bytes: int = 0
    swap_bytes: int = 0


def jetson_model(root: Path = ROOT) -> str:
    """What the device tree calls this board, empty where it is no Jetson (or a container hides the device tree)."""
    model = text_of(root / "proc/device-tree/model")
    return model if "jetson" in model.lower() or "nvidia" in model.lower() else ""


def read_jetson(root: Path, tool: Tool) -> Jetson | None:
    """The Jetson whose files lie under ``root``, None for any other machine; ``tool`` may run ``nvpmodel``."""
    model, l4t = jetson_model(root), _l4t(root)
    if not model and not l4t:
        return None
    meminfo, swaps = text_of(root / "proc/meminfo"), _swaps(root)
    gpu, cpu = _gpu_clock(root), _cpu_clock(root)
    modes = _power_modes(root)
    return Jetson(
        model=model or "unknown Jetson",
        l4t=l4t,
        jetpack=_jetpack(l4t),
        power_mode=_power_mode(root, tool, modes),
        cma_total_bytes=kilobytes_of(meminfo, "CmaTotal"),
        cma_free_bytes=kilobytes_of(meminfo, "CmaFree"),
        module=_module(root),
        compute_capability=_compute_capability(root, model),
        power_modes=modes,
        gpu_clock=gpu,
        cpu_clock=cpu,
        memory_clock=_memory_clock(root),
        clocks_locked=_all_locked(gpu, cpu),
        zram_bytes=sum(size for name, size in swaps if "zram" in name),
        swap_bytes=sum(size for name, size in swaps if "zram" not in name),
    )


def jetson_advice(jetson: Jetson, total_bytes: int | None) -> tuple[str, ...]:
    """What costs speed or memory on this board, one sentence with its command each; ``total_bytes`` of memory."""
    return (*_old_jetpack(jetson), *_slow_clocks(jetson), *_short_memory(jetson, total_bytes))


# -- what it is ---------------------------------------------------------------------------------------------


def _compatible(root: Path) -> str:
    """The device tree's names of module, carrier and chip, in one line."""
    return text_of(root / "proc/device-tree/compatible").replace("\0", " ")


def _module(root: Path) -> str | None:
    numbers = re.findall(r"p\d{4}-\d{4}", _compatible(root))
    return next((MODULES[number] for number in numbers if number in MODULES), None)


def _compute_capability(root: Path, model: str) -> str | None:
    """By the chip, else by the board's name, else by how the GPU's clock is called."""
    compatible = _compatible(root)
    if chip := next((chip for chip in SOCS if chip in compatible), None):
        return SOCS[chip][1]
    clock = next((family for folder, family in _gpu_folders(root) if family), "")
    capabilities = dict(SOCS.values())
    named = [capability for family, capability in capabilities.items() if family.lower() in model.lower()]
    return named[0] if named else capabilities.get(clock)


def _l4t(root: Path) -> str | None:
    """The release of NVIDIA's Linux, from its own file or from its package."""
    if match := re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text_of(root / "etc/nv_tegra_release")):
        return f"{match[1]}.{match[2]}"
    package = package_version_of(root, r"nvidia-l4t-core")
    return package.partition("-")[0] if package else None


def _jetpack(l4t: str | None) -> str | None:
    if l4t is None:
        return None
    return JETPACKS.get(l4t) or JETPACKS.get(f"{l4t}.0") or MAJOR_JETPACKS.get(l4t.partition(".")[0])


def package_version_of(root: Path, name: str) -> str | None:
    """The version of an installed Debian package whose name matches the pattern ``name``."""
    status = text_of(root / "var/lib/dpkg/status")
    for match in re.finditer(rf"^Package: (?:{name})$((?:\n.+)*)", status, re.MULTILINE):
        if field_of(match[1], "Status").endswith(" installed"):
            return field_of(match[1], "Version") or None
    return None


# -- clocks -------------------------------------------------------------------------------------------------


def _gpu_folders(root: Path) -> Iterator[tuple[Path, str]]:
    """Where the GPU's clock may lie, with the family that calls it so."""
    for folder in sorted(root.glob(f"{DEVFREQ}/*")):
        name = folder.name if folder.name in GPU_CLOCKS else folder.name.rpartition(".")[2]
        if name in GPU_CLOCKS:
            yield folder, GPU_CLOCKS[name]
    for folder in sorted(root.glob("sys/devices/platform/*.gpu/devfreq_dev")):
        yield folder, ""


def _gpu_clock(root: Path) -> Clock:
    folder = next((folder for folder, _ in _gpu_folders(root)), None)
    return Clock() if folder is None else _devfreq(folder)


def _devfreq(folder: Path) -> Clock:
    rates = [number_of(word) or 0 for word in text_of(folder / "available_frequencies").split()]
    now, least, most = (number_of(text_of(folder / f"{name}_freq")) for name in ("cur", "min", "max"))
    return Clock(now_hz=now, least_hz=least, most_hz=most, highest_hz=max(rates, default=None))


def _cpu_clock(root: Path) -> Clock:
    """Of the cores that clock highest; they go together on every module since Xavier."""
    policies = [_policy(folder) for folder in sorted(root.glob("sys/devices/system/cpu/cpufreq/policy[0-9]*"))]
    return max(policies, key=lambda clock: clock.most_hz or 0, default=Clock())


def _policy(folder: Path) -> Clock:
    names = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq", "cpuinfo_max_freq")
    kilohertz = [number_of(text_of(folder / name)) for name in names]
    now, least, most, highest = (None if one is None else one * 1000 for one in kilohertz)
    return Clock(now_hz=now, least_hz=least, most_hz=most, highest_hz=highest)


def _memory_clock(root: Path) -> Clock:
    if (root / DEVFREQ / "bwmgr").is_dir():
        return _devfreq(root / DEVFREQ / "bwmgr")
    now, least, most = (number_of(text_of(root / EMC_RATES / name)) for name in ("rate", "min_rate", "max_rate"))
    if text_of(root / EMC_RATES / "mrq_rate_locked") == "1":
        least = most = now
    cap = next((cap for path in EMC_CAPS if (cap := number_of(text_of(root / path)))), None)  # 0: not capped
    return Clock(now_hz=now, least_hz=least, most_hz=min(filter(None, (most, cap)), default=None), highest_hz=most)


def _all_locked(*clocks: Clock) -> bool | None:
    known = [clock.locked for clock in clocks if clock.locked is not None]
    return all(known) if known else None


# -- power mode and memory ----------------------------------------------------------------------------------


def _power_modes(root: Path) -> dict[str, int]:
    found = re.findall(r"POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", text_of(root / "etc/nvpmodel.conf"))
    return {name: int(number) for number, name in found}


def _power_mode(root: Path, tool: Tool, modes: Mapping[str, int]) -> str | None:
    """What ``nvpmodel -q`` says, or else the saved number, with its name where /etc/nvpmodel.conf has one."""
    if named := field_of(tool(["nvpmodel", "-q"]) or "", "NV Power Mode"):
        return named
    match = re.search(r"pmode:(\d+)", text_of(root / "var/lib/nvpmodel/status"))
    if not match:
        return None
    return next((name for name, number in modes.items() if number == int(match[1])), str(int(match[1])))


def _swaps(root: Path) -> list[tuple[str, int]]:
    """Name and bytes of each line of /proc/swaps."""
    rows = [line.split() for line in text_of(root / "proc/swaps").splitlines()[1:]]
    return [(row[0], (number_of(row[2]) or 0) * 1024) for row in rows if len(row) >= 3]


# -- advice -------------------------------------------------------------------------------------------------


def _old_jetpack(jetson: Jetson) -> Iterator[str]:
    numbers = tuple(int(word) for word in re.findall(r"\d+", jetson.jetpack or ""))
    if numbers and (numbers[0] < OLDEST_JETPACK[0] or (len(numbers) > 1 and numbers[:2] < OLDEST_JETPACK)):
        yield f"JetPack {jetson.jetpack} brings a TensorRT older than 10.3: bundles need JetPack 6.1 or newer"


def _slow_clocks(jetson: Jetson) -> Iterator[str]:
    fastest = max((name for name in jetson.power_modes if "MAXN" in name), key=len, default=None)
    if jetson.power_mode and fastest and jetson.power_mode != fastest:
        command = f"sudo nvpmodel -m {jetson.power_modes[fastest]}"
        yield f"power mode {jetson.power_mode} is not the fastest, {fastest} is: {command}"
    elif jetson.gpu_clock.capped:
        most, highest = _megahertz(jetson.gpu_clock.most_hz), _megahertz(jetson.gpu_clock.highest_hz)
        yield f"the GPU may run at {most} of {highest} MHz: choose a faster power mode with sudo nvpmodel -m"
    if jetson.clocks_locked is False:
        yield "the clocks move, so times scatter: sudo jetson_clocks"


def _short_memory(jetson: Jetson, total_bytes: int | None) -> Iterator[str]:
    free = jetson.cma_free_bytes
    if free is not None and free < SMALL_CMA_BYTES:
        yield (
            f"{free >> 20} MiB of reserved memory (CMA) are free, and the GPU's driver may ask for more in one piece: "
            "add cma=512M to the APPEND line of /boot/extlinux/extlinux.conf and restart"
        )
    if total_bytes is None or total_bytes > SMALL_MEMORY_BYTES:
        return
    if jetson.zram_bytes:
        yield (
            f"{jetson.zram_bytes / 2**30:.1f} GiB of swap (zram) lie in the memory that the GPU shares: "
            "sudo systemctl disable nvzramconfig and restart"
        )
    if not jetson.swap_bytes:
        yield "no swap on a disk, and building an engine takes more memory than running it: add a swap file of 8 GiB"


def _megahertz(hertz: int | None) -> str:
    return "?" if hertz is None else f"{hertz / 1e6:.0f}"
