"""``edgevlm build`` as a user types it, over a module that stands for TensorRT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from fakes.trt import fake_tensorrt
from fakes.trt_bundle import write_trt_bundle
from typer.testing import CliRunner

from edgevlm.bundle.read import read_bundle
from edgevlm.cli.app import app
from edgevlm.core.errors import DISK_FULL
from edgevlm.runtimes.trt import device as device_module
from edgevlm.runtimes.trt.api import MODULES, load_tensorrt
from edgevlm.runtimes.trt.device import Device
from edgevlm.runtimes.trt.memory import MIB, Room
from edgevlm.runtimes.trt.store import find_engine

Refused = Callable[..., str]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_trt_bundle(tmp_path / "tiny.bundle", decoders=("fp16", "int4", "nvfp4"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType | None]:
    """Makes this a machine with a given TensorRT (None: without) and GPU ("": without)."""

    def make(
        version: str | None = "10.3.0", flavour: str = "tensorrt", gpu: str = "Fake GPU, 8.7, 30000"
    ) -> ModuleType | None:
        def tool(command: Sequence[str]) -> str | None:
            return gpu if "memory.free" in " ".join(command) else None

        for name in ("cuda.bindings.runtime", "cuda.cudart"):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(device_module.find_device, "__kwdefaults__", {"tool": tool})
        for name in MODULES:
            monkeypatch.setitem(sys.modules, name, None)
        if version is None:
            return None
        module = fake_tensorrt(version, flavour)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return make


def edgevlm(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_engines_are_built_found_and_not_built_twice(bundle: Path, machine: Callable[..., ModuleType]) -> None:
    module = machine()
    out = edgevlm("build", bundle, "-q")
    assert "vision_encoder" in out
    assert f"engines: {bundle / 'tensorrt/engines/sm_87-tensorrt10.3.0'}" in out
    opened = read_bundle(bundle)
    part = opened.manifest.part("decoder_model_merged", target="tensorrt")
    found = find_engine(opened, part, load_tensorrt(), (8, 7))
    assert found.entry.profiles == ("decode", "prefill")
    assert edgevlm("build", bundle, "-q").count("was there") == 2
    assert len(module.fake.builds) == 2


def test_json_tells_the_plan_and_every_engine(bundle: Path, machine: Callable[..., ModuleType]) -> None:
    machine("11.4.0")
    told = json.loads(edgevlm("build", bundle, "--json", "--batch", 2, "--workspace-mb", 128, "-q"))
    assert [one["was_there"] for one in told["engines"]] == [False, False]
    decoder = told["plan"]["engines"][1]
    assert (decoder["in_place"], told["plan"]["workspace_mb"]) == (True, 128)
    assert [profile["name"] for profile in decoder["profiles"]] == ["decode", "prefill", "decode-batch-2"]


def test_an_engine_with_one_profile_is_asked_for_by_its_name(bundle: Path, machine: Callable[..., ModuleType]) -> None:
    machine()
    told = json.loads(edgevlm("build", bundle, "--json", "--profiles", "prefill, batch-1", "-q"))
    names = [[profile["name"] for profile in engine["profiles"]] for engine in told["plan"]["engines"]]
    assert names == [["batch-1"], ["prefill"]]


@pytest.mark.parametrize("version", ["10.3.0", None])
def test_a_dry_run_needs_no_gpu_and_writes_nothing(
    bundle: Path, machine: Callable[..., ModuleType], version: str | None
) -> None:
    machine(version, gpu="")
    out = edgevlm("build", bundle, "--dry-run")
    assert "nothing built (--dry-run)" in out
    assert "decoder_model_merged in fp16: tensorrt/decoder_model_merged_fp16.onnx" in out
    assert "prefill" in out
    assert not (bundle / "tensorrt/engines").exists()
    told = json.loads(edgevlm("build", bundle, "--dry-run", "--json", "--compute-capability", "10.0", "-q"))
    assert told["plan"]["engines"][0]["key"]["compute_capability"] == "10.0"


def test_rtx_builds_for_a_device_that_is_not_here(bundle: Path, machine: Callable[..., ModuleType]) -> None:
    machine("1.7.1", "rtx", gpu="")
    edgevlm("build", bundle, "--compute-capability", "8.9", "-q")
    folder = bundle / "tensorrt/engines/sm_89-rtx1.7.1"
    assert {file.name for file in folder.iterdir()} == {
        "engine.json",
        "vision_encoder_fp16.engine",
        "decoder_model_merged_fp16_in_place.engine",
    }


def test_tensorrt_builds_on_its_device_alone(
    bundle: Path, machine: Callable[..., ModuleType], refused: Refused
) -> None:
    machine(gpu="")
    refused(2, "only TensorRT-RTX builds for another", "build", bundle, "--compute-capability", "8.9")
    refused(8, "no NVIDIA GPU was found here", "build", bundle)


def test_without_tensorrt_the_command_that_brings_it_is_told(
    bundle: Path, machine: Callable[..., ModuleType], refused: Refused
) -> None:
    machine(None)
    refused(6, "tensorrt is not installed: pip install tensorrt", "build", bundle)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--decoder-precision", "nvfp4"), 3, "needs TensorRT 10.8 or newer"),
        (("--decoder-precision", "int9"), 3, "it has fp16, int4, nvfp4"),
        (("--batch", "3"), 2, "--batch is 1, 2, 4"),
        (("--profiles", "prefil"), 3, "there are batch-1 (vision_encoder), decode (decoder_model_merged), prefill"),
        (("--workspace-mb", "0"), 2, "--workspace-mb"),
        (("--compute-capability", "sm89"), 2, "two numbers such as 8.9"),
    ],
)
def test_what_cannot_be_built_is_refused(
    bundle: Path,
    machine: Callable[..., ModuleType],
    refused: Refused,
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    machine()
    refused(code, words, "build", bundle, *options)


def test_a_bundle_for_onnx_needs_no_engines(machine: Callable[..., ModuleType], refused: Refused) -> None:
    machine()
    refused(3, "--target tensorrt", "build", "nano")


def test_a_build_that_would_not_fit_is_refused_with_a_way_out(
    bundle: Path, machine: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = machine()
    small = Device(name="Small", compute_capability=(8, 7), room=Room(host_bytes=100 * MIB, shared=True))
    monkeypatch.setattr(device_module, "_by_nvidia_smi", lambda tool, host: small)
    result = CliRunner().invoke(app, ["build", str(bundle), "-q"])
    assert result.exit_code == 5
    assert "of memory, which the GPU shares where 0.10 GiB is free" in result.stderr
    assert module.fake.builds == []


def test_a_dry_run_shows_what_is_free_and_the_ways_out(
    bundle: Path, machine: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    small = Device(name="Small", compute_capability=(8, 7), room=Room(host_bytes=1 << 30, device_bytes=100 * MIB))
    monkeypatch.setattr(device_module, "_by_nvidia_smi", lambda tool, host: small)
    out = edgevlm("build", bundle, "--dry-run", "--batch", 2)
    assert "of memory (1.00 GiB free)" in out
    assert "of GPU memory (0.10 GiB free)" in out
    assert "  too much or export with a smaller --image-size; close other programs" in out
    unknown = Device(name="GPU", compute_capability=(8, 7), room=Room())
    monkeypatch.setattr(device_module, "_by_nvidia_smi", lambda tool, host: unknown)
    out = edgevlm("build", bundle, "--dry-run")
    assert "of GPU memory (free: not known)" in out
    assert "too much" not in out


def test_memory_that_others_took_meanwhile_counts(
    bundle: Path, machine: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = machine()
    rooms = iter([Room(host_bytes=8 << 30, shared=True)] * 2 + [Room(host_bytes=1, shared=True)])
    monkeypatch.setattr(
        device_module,
        "_by_nvidia_smi",
        lambda tool, host: Device(name="GPU", compute_capability=(8, 7), room=next(rooms)),
    )
    result = CliRunner().invoke(app, ["build", str(bundle), "-q"])
    assert (result.exit_code, len(module.fake.builds)) == (5, 1)


def test_a_full_disk_leaves_no_half_engine(
    bundle: Path, machine: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    opened = Path.open

    def full(path: Path, mode: str = "r", *others: object, **more: object) -> object:
        if path.name.endswith(".engine") and "w" in mode:
            raise OSError(28, "No space left on device")
        return opened(path, mode, *others, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    result = CliRunner().invoke(app, ["build", str(bundle), "-q"])
    assert result.exit_code == 5
    assert DISK_FULL in result.stderr
    assert not list((bundle / "tensorrt/engines").rglob("*.engine"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_bundle_that_cannot_be_written_is_told_first(
    bundle: Path, machine: Callable[..., ModuleType], refused: Refused
) -> None:
    machine()
    bundle.chmod(0o555)
    refused(2, "may not be written, so no engines can lie there", "build", bundle)
    bundle.chmod(0o755)


SLOW_BUILD = """
import signal, sys, time
sys.path.insert(0, {tests!r})
from fakes.trt import fake_tensorrt
from edgevlm.cli import app
from edgevlm.runtimes.trt import api, device
module = fake_tensorrt("10.3.0", num_steps=10_000)
sys.modules["tensorrt"] = module
sys.modules["cuda.bindings.runtime"] = sys.modules["cuda.cudart"] = None
device.find_device.__kwdefaults__["tool"] = lambda command: "Fake GPU, 8.7, 30000"
told = module.IProgressMonitor
monitor = api._monitor
def slow(*arguments):
    made = monitor(*arguments)
    step = made.step_complete
    def wait(name, number):
        if number == 3:
            print("building", flush=True)
        time.sleep(0.01)
        return step(name, number)
    made.step_complete = wait
    return made
api._monitor = slow
sys.argv = ["edgevlm", "build", {bundle!r}]
app.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_a_build_and_the_next_one_goes_on(
    bundle: Path, machine: Callable[..., ModuleType], root: Path, number: signal.Signals, code: int
) -> None:
    script = SLOW_BUILD.format(tests=str(root / "tests"), bundle=str(bundle))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert ("interrupted" in stderr) == (number == signal.SIGINT)
    assert not list((bundle / "tensorrt/engines").rglob("*.engine"))
    machine()
    assert edgevlm("build", bundle, "-q").count(" s\n") == 2
