from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgevlm.core.config import to_json
from edgevlm.core.hardware import compute_cores, probe, run_tool
from edgevlm.core.jetson import Tool

X86_CORE = "processor\t: {n}\nphysical id\t: 0\ncore id\t\t: {core}\nmodel name\t: Test CPU\nflags\t\t: fpu {flags}\n"
ARM_CORE = "processor\t: {n}\nFeatures\t: fp asimd asimdhp {flags}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"
ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "proc/meminfo": "MemTotal: 7990000 kB\nMemAvailable: 6000000 kB\nCmaTotal: 262144 kB\nCmaFree: 131072 kB\n",
    "proc/cpuinfo": "\n".join(ARM_CORE.format(n=n, flags="asimddp", part="0xd42") for n in range(6)),
}


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def tool(answers: Mapping[str, str]) -> Tool:
    def run(command: Sequence[str]) -> str | None:
        return answers.get(" ".join(command), answers.get(command[0]))

    return run


def test_this_machine_can_be_described() -> None:
    hardware = probe()
    assert hardware.cpu.usable_cores > 0
    assert hardware.cpu.physical_cores <= hardware.cpu.logical_cores
    assert json.loads(to_json(hardware))["cpu"]["model"]


def test_an_empty_machine_is_described_without_an_error(tmp_path: Path) -> None:
    hardware = probe(tmp_path, system="Linux")
    assert hardware.memory.total_bytes is None
    assert (hardware.gpus, hardware.jetson, hardware.board) == ((), None, None)


def test_hyper_threads_are_not_counted_as_cores(tmp_path: Path) -> None:
    cores = [X86_CORE.format(n=n, core=n // 2, flags="avx2 avx512f avx512_vnni amx_int8 sse4a") for n in range(4)]
    cpu = probe(machine(tmp_path, {"proc/cpuinfo": "\n".join(cores)}), system="Linux").cpu
    assert (cpu.model, cpu.physical_cores, cpu.logical_cores, cpu.usable_cores) == ("Test CPU", 2, 4, 4.0)
    assert cpu.features == ("avx2", "avx512f", "avx512_vnni", "amx_int8")


def test_sysfs_knows_siblings_better_than_cpuinfo(tmp_path: Path) -> None:
    topology = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}\n" for n in range(4)
    }
    files = {"proc/cpuinfo": "\n".join(f"processor: {n}\nmodel name: VM\n" for n in range(4)), **topology}
    assert probe(machine(tmp_path, files), system="Linux").cpu.physical_cores == 2


def test_features_of_big_little_are_those_of_every_core(tmp_path: Path) -> None:
    little = ARM_CORE.format(n=0, flags="asimddp", part="0xd05")
    big = ARM_CORE.format(n=1, flags="asimddp i8mm sve", part="0xd0b")
    cpu = probe(machine(tmp_path, {"proc/cpuinfo": f"{little}\n{big}\nHardware\t: board\n"}), system="Linux").cpu
    assert cpu.model == "1x Cortex-A55 + 1x Cortex-A76"
    assert cpu.features == ("neon", "fp16", "dotprod")
    assert cpu.logical_cores == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/status": "Cpus_allowed_list:\t0-1,3\n"}, 3.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4.0),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2.0),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
    ],
)
def test_usable_cores_respect_affinity_and_quota(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    cpuinfo = "\n".join(X86_CORE.format(n=n, core=n, flags="") for n in range(4))
    assert probe(machine(tmp_path, {"proc/cpuinfo": cpuinfo, **files}), system="Linux").cpu.usable_cores == cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("900000 100000", 2)]
)
def test_computing_takes_physical_cores_but_no_more_than_the_quota(tmp_path: Path, quota: str, cores: int) -> None:
    cpuinfo = "\n".join(X86_CORE.format(n=n, core=n // 2, flags="") for n in range(4))
    files = {"proc/cpuinfo": cpuinfo, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota}
    assert compute_cores(machine(tmp_path, files), system="Linux") == cores


@pytest.mark.parametrize(
    ("files", "limit", "available"),
    [
        ({}, None, 6000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "4096000\n",
                "sys/fs/cgroup/memory.current": "3000000\n",
                "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 1000000\n",
            },
            4096000,
            2096000,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None, 6000 * 1024),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "4096000",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "96000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            4096000,
            4000000,
        ),
    ],
)
def test_memory_respects_the_limit_of_a_container(
    tmp_path: Path, files: dict[str, str], limit: int | None, available: int
) -> None:
    meminfo = {"proc/meminfo": "MemTotal:  8000 kB\nMemAvailable:  6000 kB\nSwapTotal: 0 kB\n"}
    memory = probe(machine(tmp_path, {**meminfo, **files}), system="Linux").memory
    assert memory.total_bytes == 8000 * 1024
    assert (memory.limit_bytes, memory.available_bytes, memory.swap_bytes) == (limit, available, 0)


def test_a_jetson_tells_model_release_power_mode_and_cma(tmp_path: Path) -> None:
    hardware = probe(machine(tmp_path, ORIN), system="Linux")
    jetson = hardware.jetson
    assert jetson is not None
    assert jetson.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (jetson.l4t, jetson.jetpack, jetson.power_mode) == ("36.4.3", "6.2", "MAXN_SUPER")
    assert (jetson.cma_total_bytes, jetson.cma_free_bytes) == (256 << 20, 128 << 20)
    assert hardware.cpu.model == "6x Cortex-A78AE"
    assert [gpu.shared_memory for gpu in hardware.gpus] == [True]


def test_the_power_mode_comes_from_nvpmodel_where_it_answers(tmp_path: Path) -> None:
    answers = tool({"nvpmodel": "NV Power Mode: 7W\n1\n"})
    jetson = probe(machine(tmp_path, ORIN), tool=answers, system="Linux").jetson
    assert jetson is not None
    assert jetson.power_mode == "7W"


def test_a_power_mode_without_a_name_is_its_number(tmp_path: Path) -> None:
    jetson = probe(machine(tmp_path, {**ORIN, "etc/nvpmodel.conf": ""}), system="Linux").jetson
    assert jetson is not None
    assert jetson.power_mode == "2"


def test_nvidia_smi_lists_cards(tmp_path: Path) -> None:
    listing = "NVIDIA RTX 4090, 24564, 550.54.14, 8.9\nOrin (nvgpu), [N/A], 540.4.0, [N/A]\n\n"
    first, second = probe(tmp_path, tool=tool({"nvidia-smi": listing}), system="Linux").gpus
    assert (first.name, first.memory_bytes, first.driver) == ("NVIDIA RTX 4090", 24564 << 20, "550.54.14")
    assert (first.compute_capability, first.shared_memory) == ("8.9", False)
    assert (second.memory_bytes, second.compute_capability, second.shared_memory) == (None, None, True)


def test_without_nvidia_smi_the_driver_lists_its_cards(tmp_path: Path) -> None:
    files = {
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA T4\nIRQ: 1\n",
        "sys/class/drm/card0/device/vendor": "0x8086\n",
    }
    card, graphics = probe(machine(tmp_path, files), system="Linux").gpus
    assert (card.name, card.vendor, card.driver) == ("NVIDIA T4", "NVIDIA", "550.54.14")
    assert (graphics.name, graphics.shared_memory) == ("Intel graphics", True)


def test_a_mac_is_read_through_sysctl(tmp_path: Path) -> None:
    answers = {
        "sysctl -n machdep.cpu.brand_string": "Apple M2\n",
        "sysctl -n hw.logicalcpu": "8\n",
        "sysctl -n hw.physicalcpu": "8\n",
        "sysctl -n hw.memsize": "17179869184\n",
        "sysctl -n hw.optional.arm.FEAT_I8MM": "1\n",
        "sysctl -n hw.optional.arm.FEAT_BF16": "0\n",
        "vm_stat": "Mach (page size of 16384 bytes)\nPages free: 100.\nPages inactive: 20.\nPages speculative: 3.\n",
    }
    hardware = probe(tmp_path, tool=tool(answers), system="Darwin")
    assert (hardware.cpu.model, hardware.cpu.features, hardware.cpu.logical_cores) == (
        "Apple M2",
        ("i8mm",),
        8,
    )
    assert (hardware.memory.total_bytes, hardware.memory.available_bytes) == (16 << 30, 123 * 16384)
    assert [gpu.name for gpu in hardware.gpus] == ["Apple M2 GPU"]


def test_a_tool_that_is_absent_fails_or_hangs_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_tool([sys.executable, "-c", "print('ä'.encode())"]) == "b'\\xc3\\xa4'\n"
    assert run_tool(["no-such-tool-anywhere"]) is None
    assert run_tool([sys.executable, "-c", "raise SystemExit(3)"]) is None

    def hangs(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert run_tool(["nvidia-smi"]) is None
