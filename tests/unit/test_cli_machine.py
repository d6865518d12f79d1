"""doctor, targets and version: the verbs that look at this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from edgevlm.cli import doctor, targets
from edgevlm.cli.app import app
from edgevlm.core.hardware import Cpu, Gpu, Hardware, Memory
from edgevlm.core.jetson import Clock, Jetson
from edgevlm.core.optional import Library

PLAIN = Hardware(
    system="Linux",
    architecture="aarch64",
    kernel="5.15",
    board=None,
    cpu=Cpu(model="Test CPU", features=("neon",), physical_cores=4, logical_cores=4, usable_cores=4.0),
    memory=Memory(total_bytes=8 << 30, available_bytes=None),
    gpus=(),
    jetson=None,
)
CARD = Gpu(name="NVIDIA T4", vendor="NVIDIA", memory_bytes=16 << 30, driver="550", compute_capability="7.5")
ORIN = Jetson(
    model="NVIDIA Jetson Orin Nano",
    l4t="36.4.3",
    jetpack="6",
    power_mode="15W",
    cma_total_bytes=256 << 20,
    cma_free_bytes=None,
    module="Jetson Orin Nano 8GB",
    compute_capability="8.7",
    power_modes={"15W": 0, "25W": 1, "MAXN_SUPER": 2},
    gpu_clock=Clock(now_hz=306_000_000, least_hz=306_000_000, most_hz=612_000_000, highest_hz=1_020_000_000),
    clocks_locked=False,
    zram_bytes=3 << 30,
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def run_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_doctor_prints_a_table_and_the_same_as_json() -> None:
    diagnosis = run_json("doctor")
    text = run("doctor").stdout
    assert diagnosis["hardware"]["cpu"]["model"] in text
    for library in diagnosis["libraries"]:
        assert library["package"] in text
        assert (library["version"] or library["fix"]) in text


def test_doctor_shows_a_jetson_a_card_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = replace(PLAIN.cpu, usable_cores=1.5)
    hardware = replace(PLAIN, cpu=limited, jetson=ORIN, gpus=(CARD,), board="Orin board", tensorrt="10.3.0.30")
    missing = Library("torch", "workshop", None, "torch", "pip install 'edgevlm[workshop]'")
    monkeypatch.setattr(doctor, "probe", lambda: hardware)
    monkeypatch.setattr(doctor, "libraries", lambda: (missing,))
    text = run("doctor").stdout
    for words in (
        "Orin board",
        "NVIDIA T4, 16.0 GiB, driver 550, compute capability 7.5",
        "36.4.3 (JetPack 6)",
        "15W",
        "Jetson Orin Nano 8GB",
        "306 MHz now, up to 612 of 1020, not locked",
        "0.0 GiB on disk, 3.0 GiB compressed in memory (zram)",
        "10.3.0.30 (the system's)",
        "advice: power mode 15W is not the fastest, MAXN_SUPER is: sudo nvpmodel -m 2",
        "0.2 GiB reserved, unknown free",
        "8.0 GiB in all, unknown available",
        "pip install 'edgevlm[workshop]'",
        "advice: affinity or the container's quota leaves 1.5 of 4 cores",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("hardware", "onnxruntimes", "words"),
    [
        (PLAIN, ("onnxruntime",), []),
        (PLAIN, (), ["pip install onnxruntime"]),
        (replace(PLAIN, gpus=(CARD,)), ("onnxruntime",), []),
        (replace(PLAIN, gpus=(CARD,)), ("onnxruntime-gpu",), []),
        (
            PLAIN,
            ("onnxruntime", "onnxruntime-gpu"),
            ["pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"],
        ),
        (
            replace(PLAIN, jetson=ORIN),
            ("onnxruntime",),
            [
                "sudo nvpmodel -m 2",
                "sudo jetson_clocks",
                "sudo systemctl disable nvzramconfig and restart",
                "add a swap file of 8 GiB",
                "sudo apt install nvidia-jetpack",
            ],
        ),
        (
            replace(
                PLAIN,
                tensorrt="10.3.0",
                jetson=replace(ORIN, power_mode="MAXN_SUPER", clocks_locked=True, swap_bytes=1),
            ),
            ("onnxruntime",),
            [
                "choose a faster power mode with sudo nvpmodel -m",
                "sudo systemctl disable nvzramconfig and restart",
                "sudo apt install python3-libnvinfer, then python3 -m venv --system-site-packages",
            ],
        ),
    ],
)
def test_doctor_gives_the_exact_command(hardware: Hardware, onnxruntimes: tuple[str, ...], words: list[str]) -> None:
    lines = doctor.advice(hardware, onnxruntimes)
    assert [line.partition(": ")[2] for line in lines] == words


def test_targets_lists_names_without_importing_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = set(sys.modules)
    entries = run_json("targets")
    assert {"onnx", "onnxruntime"} <= {entry["name"] for entry in entries}
    assert not {"torch", "onnxruntime"} & (set(sys.modules) - imported)
    for entry in entries:
        assert entry["name"] in run("targets").stdout


def test_targets_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "is_installed", lambda module: module != "onnx")
    text = run("targets").stdout
    assert "needs: pip install 'edgevlm[workshop]'" in text
    assert [entry["installed"] for entry in run_json("targets") if entry["name"] == "onnxruntime"] == [True]


def test_version_lists_installed_libraries() -> None:
    versions = run_json("version")
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "numpy" in versions["libraries"]


def test_bundle_verbs_show_pack_and_unpack(tiny_bundle: Path, tmp_path: Path) -> None:
    shown = run("bundle", "show", str(tiny_bundle))
    assert "tiny (test), schema 1" in shown.stdout
    assert "every file matches its hash" in shown.stdout
    packed = run("bundle", "pack", str(tiny_bundle), str(tmp_path / "tiny.tar"))
    assert packed.stdout == f"{tmp_path / 'tiny.tar'}\n"
    again = run_json("bundle", "unpack", str(tmp_path / "tiny.tar"), str(tmp_path / "again"), "-q")
    assert again == {"bundle": str((tmp_path / "again").resolve()), "name": "tiny"}


def test_bundle_verbs_give_the_right_exit_codes(tiny_bundle: Path, tmp_path: Path) -> None:
    (tiny_bundle / "tokenizer.json").write_text("[]")
    assert run("bundle", "show", str(tiny_bundle)).exit_code == 7
    assert run("bundle", "show", str(tiny_bundle), "--no-check").exit_code == 0
    assert run("bundle", "pack", str(tiny_bundle), str(tmp_path / "x.tar")).exit_code == 7
    assert run("bundle", "unpack", str(tmp_path / "x.tar"), str(tmp_path / "y")).exit_code == 2
    assert run_json("bundle", "show", str(tiny_bundle), "--no-check")["checked"] is False
