"""Recorded trees of boards: what the probe reads from JetPack 5, 6 and 7, and what it advises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgevlm.core.hardware import Hardware, probe
from edgevlm.core.jetson import Clock, Jetson, jetson_advice


def policy(now: int, least: int, most: int, highest: int) -> dict[str, str]:
    values = {"scaling_cur_freq": now, "scaling_min_freq": least, "scaling_max_freq": most, "cpuinfo_max_freq": highest}
    return {f"sys/devices/system/cpu/cpufreq/policy0/{name}": f"{value}\n" for name, value in values.items()}


def devfreq(folder: str, now: int, least: int, most: int, rates: str = "") -> dict[str, str]:
    values = {"cur_freq": now, "min_freq": least, "max_freq": most, "available_frequencies": rates}
    return {f"sys/class/devfreq/{folder}/{name}": f"{value}\n" for name, value in values.items()}


ORIN_NANO_JETPACK_6 = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": (
        "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n"
    ),
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "var/lib/dpkg/status": (
        "Package: libnvinfer-bin\nStatus: install ok installed\nVersion: 9.9\n\n"
        "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.6.2-1\n\n"
        "Package: libnvinfer10\nStatus: install ok installed\nArchitecture: arm64\nVersion: 10.3.0.30-1+cuda12.5\n"
    ),
    "proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable: 6000000 kB\nCmaTotal: 262144 kB\nCmaFree: 65536 kB\n",
    "proc/swaps": (
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/zram0                              partition\t649996\t\t0\t\t5\n"
        "/dev/zram1                              partition\t649996\t\t0\t\t5\n"
    ),
    **devfreq("17000000.gpu", 306_000_000, 306_000_000, 612_000_000, "306000000 612000000 1020000000"),
    **devfreq("15340000.vic", 115_200_000, 115_200_000, 435_200_000),
    **policy(729_600, 729_600, 1_497_600, 1_728_000),
    "sys/kernel/nvpmodel_clk_cap/emc": "2133000000\n",
}
AGX_ORIN_JETPACK_5 = {
    "proc/device-tree/model": "Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=MODE_50W >\n",
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
    **devfreq("17000000.ga10b", 1_300_500_000, 1_300_500_000, 1_300_500_000, "306000000 1300500000"),
    **policy(2_201_600, 2_201_600, 2_201_600, 2_201_600),
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/min_rate": "204000000\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/max_rate": "3199000000\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked": "1\n",
    "sys/kernel/nvpmodel_emc_cap/emc_iso_cap": "0\n",
}
THOR_JETPACK_7 = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3971-0089+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "etc/nv_tegra_release": "# R39 (release), REVISION: 2.0, GCID: 0, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
    "var/lib/nvpmodel/status": "pmode:0001\n",
    "usr/include/aarch64-linux-gnu/NvInferVersion.h": (
        "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 16\n#define TRT_PATCH_ENTERPRISE 1\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.\n"
    ),
    "proc/meminfo": "MemTotal: 128000000 kB\nMemAvailable: 120000000 kB\n",
    **devfreq("gpu-gpc-0", 1_386_000_000, 315_000_000, 1_386_000_000, "315000000 1386000000 1575000000"),
    **devfreq("gpu-nvd-0", 1, 1, 1),
    **devfreq("bwmgr", 4_266_000_000, 665_600_000, 4_266_000_000),
}


def machine(root: Path, files: Mapping[str, str]) -> Hardware:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return probe(root, system="Linux")


def board(root: Path, files: Mapping[str, str]) -> Jetson:
    found = machine(root, files).jetson
    assert found is not None
    return found


def test_orin_nano_on_jetpack_6(tmp_path: Path) -> None:
    hardware = machine(tmp_path, ORIN_NANO_JETPACK_6)
    jetson = hardware.jetson
    assert jetson is not None
    assert jetson.module == "Jetson Orin Nano 8GB (developer kit)"
    assert (jetson.l4t, jetson.jetpack, jetson.power_mode) == ("36.4.3", "6.2", "15W")
    assert jetson.gpu_clock == Clock(
        now_hz=306_000_000, least_hz=306_000_000, most_hz=612_000_000, highest_hz=1_020_000_000
    )
    assert (jetson.cpu_clock.most_hz, jetson.memory_clock.most_hz) == (1_497_600_000, 2_133_000_000)
    assert (jetson.clocks_locked, jetson.zram_bytes, jetson.swap_bytes) == (False, 1_299_992 * 1024, 0)
    assert hardware.tensorrt == "10.3.0.30"
    assert [(gpu.compute_capability, gpu.shared_memory) for gpu in hardware.gpus] == [("8.7", True)]


def test_agx_orin_on_jetpack_5_with_locked_clocks(tmp_path: Path) -> None:
    hardware = machine(tmp_path, AGX_ORIN_JETPACK_5)
    jetson = hardware.jetson
    assert jetson is not None
    assert (jetson.module, jetson.jetpack, jetson.power_mode) == ("Jetson AGX Orin", "5.1.2", "MAXN")
    assert (jetson.clocks_locked, jetson.memory_clock.locked) == (True, True)
    assert hardware.tensorrt is None
    assert [line.partition(" ")[0] for line in jetson_advice(jetson, hardware.memory.total_bytes)] == ["JetPack"]


def test_thor_on_jetpack_7(tmp_path: Path) -> None:
    hardware = machine(tmp_path, THOR_JETPACK_7)
    jetson = hardware.jetson
    assert jetson is not None
    assert (jetson.module, jetson.jetpack, jetson.power_mode) == ("Jetson Thor T5000", "7.2", "120W")
    assert (jetson.compute_capability, hardware.tensorrt) == ("11.0", "10.16.1")
    assert (jetson.gpu_clock.capped, jetson.clocks_locked) == (True, False)
    assert jetson.memory_clock.now_hz == 4_266_000_000
    assert len(jetson_advice(jetson, hardware.memory.total_bytes)) == 2  # a faster mode, and the clocks


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("R36 (release), REVISION: 4.7", "6.2.1"),
        ("R36 (release), REVISION: 5.0", "6.2.2"),
        ("R38 (release), REVISION: 4.0", "7.1"),
        ("R39 (release), REVISION: 9.9", "7"),
        ("R99 (release), REVISION: 1.0", None),
    ],
)
def test_the_release_of_the_system_tells_the_jetpack(tmp_path: Path, release: str, jetpack: str | None) -> None:
    assert board(tmp_path, {"etc/nv_tegra_release": f"# {release}, GCID: 1\n"}).jetpack == jetpack


def test_a_container_that_hides_the_device_tree_is_known_by_package_and_clock(tmp_path: Path) -> None:
    status = "Package: nvidia-l4t-core\nStatus: install ok installed\nVersion: 36.4.3-20250107174145\n"
    files = {"var/lib/dpkg/status": status, **devfreq("17000000.ga10b", 1, 1, 2)}
    jetson = board(tmp_path, files)
    assert (jetson.model, jetson.module) == ("unknown Jetson", None)
    assert (jetson.l4t, jetson.compute_capability) == ("36.4.3", "8.7")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["nvpmodel -m 2", "jetson_clocks", "cma=512M", "nvzramconfig", "swap file"]),
        ({"power_mode": "MAXN_SUPER"}, ["612 of 1020 MHz", "jetson_clocks", "cma=512M", "nvzramconfig", "swap file"]),
        (
            {"power_mode": "MAXN_SUPER", "gpu_clock": Clock(), "clocks_locked": None, "cma_free_bytes": None},
            ["nvzramconfig", "swap file"],
        ),
        (
            {"power_mode": None, "gpu_clock": Clock(), "clocks_locked": True, "zram_bytes": 0, "swap_bytes": 1},
            ["cma=512M"],
        ),
    ],
)
def test_what_costs_speed_or_memory_is_told_with_its_command(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    hardware = machine(tmp_path, ORIN_NANO_JETPACK_6)
    assert hardware.jetson is not None
    lines = jetson_advice(replace(hardware.jetson, **change), hardware.memory.total_bytes)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_a_clock_of_unknown_limits_is_neither_locked_nor_capped() -> None:
    assert (Clock().locked, Clock().capped) == (None, False)
    assert Clock(least_hz=1, most_hz=1, highest_hz=1).locked
