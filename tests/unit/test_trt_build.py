from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fakes.trt import fake_tensorrt
from fakes.trt_bundle import write_trt_bundle

from edgevlm import shipped
from edgevlm.bundle.manifest import TensorSpec
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.errors import ConfigError, DoesNotFitError, UnsupportedError, UsageError
from edgevlm.runtimes.trt import build as build_module
from edgevlm.runtimes.trt import device as device_module
from edgevlm.runtimes.trt import memory
from edgevlm.runtimes.trt.api import api_of
from edgevlm.runtimes.trt.build import BuildOptions, BuildPlan, build_engines, plan_build
from edgevlm.runtimes.trt.device import Device, find_device, parse_capability
from edgevlm.runtimes.trt.memory import MIB, Need, Room, default_workspace_mb, io_bytes, predicted_build

ORIN = Device(name="Orin", compute_capability=(8, 7), room=Room(host_bytes=6 << 30, shared=True), is_jetson=True)
ADA = Device(name="RTX 4090", compute_capability=(8, 9), room=Room(host_bytes=64 << 30, device_bytes=20 << 30))
SMI = "NVIDIA GeForce RTX 4090, 8.9, 20480\nNVIDIA GeForce RTX 3060, 8.6, 100\n"
DECODERS = ("fp16", "int4-b64", "fp8", "nvfp4", "bf16")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_trt_bundle(tmp_path / "tiny.bundle", decoders=DECODERS))


def planned(bundle: Bundle, module: ModuleType, device: Device = ORIN, **options: Any) -> BuildPlan:
    return plan_build(bundle, BuildOptions(**options), api_of(module), device)


def built(bundle: Bundle, module: ModuleType, device: Device = ORIN, **options: Any) -> tuple[Any, list[str]]:
    told: list[str] = []
    run = {name: options.pop(name) for name in ("overwrite", "timing_cache") if name in options}
    wanted = BuildOptions(**options)
    plan = plan_build(bundle, wanted, api_of(module), device)
    return build_engines(bundle, plan, wanted, api_of(module), report=told.append, **run), told


# -- plan -----------------------------------------------------------------------------------------------------


def test_the_plan_names_graphs_profiles_and_engines(bundle: Bundle) -> None:
    plan = planned(bundle, fake_tensorrt("10.3.0"))
    encoder, decoder = plan.engines
    assert (plan.folder, plan.library) == ("tensorrt/engines/sm_87-tensorrt10.3.0", "TensorRT 10.3.0")
    assert encoder.file == f"{plan.folder}/vision_encoder_fp16.engine"
    assert [profile.name for profile in encoder.profiles] == ["batch-1"]
    assert (decoder.graph, decoder.in_place) == ("tensorrt/decoder_model_merged_fp16.onnx", False)
    assert [profile.name for profile in decoder.profiles] == ["decode", "prefill"]


def test_a_newer_version_builds_the_graph_in_place(bundle: Bundle) -> None:
    decoder = planned(bundle, fake_tensorrt("11.4.0"), ADA, batch=2).engines[1]
    assert (decoder.graph, decoder.in_place) == ("tensorrt/decoder_model_merged_fp16_in_place.onnx", True)
    assert [profile.name for profile in decoder.profiles] == ["decode", "prefill", "decode-batch-2"]


def test_what_the_key_says_follows_what_was_asked_for(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    keys = [planned(bundle, module, **options).engines[1].key for options in ({}, {"batch": 2}, {"workspace_mb": 9})]
    assert len({(key.recipe, key.workspace_mb) for key in keys}) == 3
    assert keys[0] == planned(bundle, module).engines[1].key


@pytest.mark.parametrize(
    ("module", "device", "precision", "words"),
    [
        (fake_tensorrt("10.3.0"), ORIN, "nvfp4", r"nvfp4 needs TensorRT 10\.8 or newer, here is TensorRT 10\.3\.0"),
        (fake_tensorrt("10.13.2"), ADA, "nvfp4", r"compute capability 10\.0 or higher, RTX 4090 has 8\.9"),
        (fake_tensorrt("10.13.2"), ORIN, "fp8", r"compute capability 8\.9 or higher, Orin has 8\.7"),
        (fake_tensorrt("10.13.2"), ORIN, "int8", r"no precision 'int8'; it has fp16, int4-b64, fp8, nvfp4, bf16"),
    ],
)
def test_what_the_version_or_the_device_lacks_is_refused(
    bundle: Bundle, module: ModuleType, device: Device, precision: str, words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        planned(bundle, module, device, decoder_precision=precision)


@pytest.mark.parametrize("precision", ["fp8", "bf16", "int4"])
def test_what_the_device_has_is_planned(bundle: Bundle, precision: str) -> None:
    assert (
        planned(bundle, fake_tensorrt("10.3.0"), ADA, decoder_precision=precision).engines[1].precision[:3]
        in (precision[:3])
    )


def test_a_bundle_for_another_target_is_told_to_export(tmp_path: Path) -> None:
    nano = read_bundle(shipped.find_bundle("nano"), check=False)
    with pytest.raises(UnsupportedError, match="--target tensorrt"):
        planned(nano, fake_tensorrt("10.3.0"))


@pytest.mark.parametrize("options", [{"batch": 3}, {"workspace_mb": 0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        BuildOptions(**options)  # type: ignore[arg-type]


# -- build ----------------------------------------------------------------------------------------------------


def test_engines_are_built_once(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    first, told = built(bundle, module)
    assert [one.was_there for one in first] == [False, False]
    assert told[:4] == ["vision_encoder_fp16", *(f"vision_encoder_fp16: {n} of 3" for n in (1, 2, 3))]
    again, _ = built(bundle, module)
    assert [one.was_there for one in again] == [True, True]
    assert len(module.fake.builds) == 2
    built(bundle, module, overwrite=True)
    assert len(module.fake.builds) == 4


def test_a_build_goes_on_where_it_stopped(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt("10.3.0")
    kept, calls = build_module.keep_engine, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(*arguments)

    monkeypatch.setattr(build_module, "keep_engine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(bundle, module)
    results, _ = built(bundle, module)
    assert [one.was_there for one in results] == [True, False]


def test_what_a_killed_build_left_is_removed(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    built(bundle, module)
    folder = bundle.root / planned(bundle, module).folder
    (folder / ".vision_encoder_fp16.engine.0123abcd.partial.engine").write_bytes(b"half")
    built(bundle, module)
    assert not list(folder.glob(".*"))


def test_timings_are_kept_beside_the_engines_and_used_again(bundle: Bundle, tmp_path: Path) -> None:
    module, elsewhere = fake_tensorrt("10.3.0"), tmp_path / "timings"
    built(bundle, module)
    folder = bundle.root / planned(bundle, module).folder
    assert (folder / "timing.cache").read_bytes().count(b";") == 2
    built(bundle, module, overwrite=True, timing_cache=elsewhere)
    assert elsewhere.read_bytes().count(b";") == 2
    rtx = fake_tensorrt("1.7.1", "rtx")
    built(bundle, rtx, ADA)
    assert not (bundle.root / planned(bundle, rtx, ADA).folder / "timing.cache").exists()


def test_memory_that_is_short_is_told_before_the_attempt(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    tight = Device(name="Orin", compute_capability=(8, 7), room=Room(host_bytes=700 * MIB, shared=True))
    words = r"building vision_encoder in fp16 takes about .* of memory, which the GPU shares where 0\.68 GiB is free"
    with pytest.raises(DoesNotFitError, match=words) as error:
        built(bundle, module, tight, workspace_mb=512)
    assert "smaller --image-size" in str(error.value)
    assert module.fake.builds == []


def test_a_workspace_that_would_fit_is_named(bundle: Bundle) -> None:
    tight = Device(name="Orin", compute_capability=(8, 7), room=Room(host_bytes=800 * MIB, shared=True))
    with pytest.raises(DoesNotFitError, match=r"--workspace-mb 1\d\d would fit") as error:
        built(bundle, fake_tensorrt("10.3.0"), tight, workspace_mb=512)
    fitting = int(str(error.value).split("--workspace-mb ")[1].split()[0])
    assert built(bundle, fake_tensorrt("10.3.0"), tight, workspace_mb=fitting)


def test_a_precision_that_would_fit_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HOST_COPIES", 1e6)
    data = bundle.root / "tensorrt/decoder_model_merged_fp16.onnx_data"
    data.write_bytes(bytes(4096))
    tight = Device(name="GPU", compute_capability=(8, 9), room=Room(host_bytes=4 << 30))
    with pytest.raises(DoesNotFitError, match="--decoder-precision int4-b64 would fit"):
        built(bundle, fake_tensorrt("10.3.0"), tight)


def test_a_vendor_that_runs_out_of_memory_leaves_nothing_half_written(bundle: Bundle) -> None:
    with pytest.raises(DoesNotFitError, match="out of memory"):
        built(bundle, fake_tensorrt("10.3.0", memory=10))
    assert not list((bundle.root / "tensorrt/engines").rglob("*.engine"))


def test_a_disk_that_is_too_small_is_told_before_the_attempt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt("10.3.0")
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DoesNotFitError, match="where 10 are free"):
        built(bundle, module)
    assert module.fake.builds == []


@pytest.mark.parametrize(
    ("module", "device", "options", "words"),
    [
        (fake_tensorrt("1.7.1", "rtx"), ADA, {"version_compatible": True}, "has no --version-compatible"),
        (fake_tensorrt("10.3.0"), ORIN, {"hardware_compatible": True}, "no such engines on a Jetson"),
    ],
)
def test_compatible_engines_are_refused_where_there_are_none(
    bundle: Bundle, module: ModuleType, device: Device, options: dict[str, bool], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        built(bundle, module, device, **options)
    assert module.fake.builds == []


def test_the_shipped_bundle_is_left_alone() -> None:
    with pytest.raises(UsageError, match="belongs to the package: build the engines of a copy"):
        build_module.require_writable(shipped.HERE / "nano.bundle")


# -- memory ---------------------------------------------------------------------------------------------------


def test_the_prediction_is_the_documented_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HOST_BASE", 10), ("HOST_COPIES", 3), ("DEVICE_BASE", 20), ("DEVICE_COPIES", 2)):
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(memory, "ACTIVATIONS", 5)
    assert predicted_build(100, 7, 1000) == Need(310, 20 + 200 + 35 + 1000)
    assert predicted_build(100, 7, 1000, ahead_of_time=True) == Need(310, 0)


def test_an_engine_grows_with_its_profiles() -> None:
    one, two = (memory.predicted_engine_bytes(1000, number) for number in (1, 2))
    assert (one - memory.PROFILE_BYTES, two - one) == (1100, memory.PROFILE_BYTES)


def test_inputs_and_outputs_count_at_their_largest() -> None:
    inputs = [TensorSpec("x", "float32", ("batch", 3)), TensorSpec("i", "int64", ("batch",))]
    outputs = [TensorSpec("y", "float16", ("batch", "free", 2))]
    assert io_bytes(inputs, outputs, {"x": (4, 3)}) == 4 * 3 * 4 + 4 * 8 + 4 * 1 * 2 * 2


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (Room(), 1024),
        (Room(host_bytes=100 << 30, device_bytes=2 << 30), 512),
        (Room(host_bytes=2 << 30, device_bytes=None, shared=True), 512),
        (Room(host_bytes=1 << 20, shared=True), 64),
        (Room(device_bytes=100 << 30), 1024),
    ],
)
def test_the_workspace_fits_the_device(room: Room, expected: int) -> None:
    assert default_workspace_mb(room) == expected


@pytest.mark.parametrize(
    ("room", "fits"),
    [
        (Room(), True),
        (Room(host_bytes=10, device_bytes=20), True),
        (Room(host_bytes=9, device_bytes=20), False),
        (Room(host_bytes=10, device_bytes=19), False),
        (Room(host_bytes=30, shared=True), True),
        (Room(host_bytes=29, shared=True), False),
    ],
)
def test_shared_memory_must_hold_the_sum(room: Room, fits: bool) -> None:
    assert memory.fits(Need(10, 20), room) is fits


# -- device ---------------------------------------------------------------------------------------------------


def smi(command: Sequence[str]) -> str | None:
    return SMI if "memory.free" in " ".join(command) else None


def nothing(command: Sequence[str]) -> str | None:
    return None


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the CUDA of the machine that it runs on."""
    monkeypatch.setattr(device_module, "_by_cuda", lambda host: None)


def test_the_first_gpu_is_the_one_to_build_for() -> None:
    device = find_device(api_of(fake_tensorrt("10.3.0")), None, planning=False, tool=smi)
    assert (device.name, device.compute_capability) == ("NVIDIA GeForce RTX 4090", (8, 9))
    assert device.room.device_bytes == 20480 * MIB


def test_without_a_gpu_only_rtx_builds_and_only_for_a_named_one() -> None:
    tensorrt, rtx = api_of(fake_tensorrt("10.3.0")), api_of(fake_tensorrt("1.7.1", "rtx"))
    with pytest.raises(UnsupportedError, match="no NVIDIA GPU was found here"):
        find_device(tensorrt, None, planning=False, tool=nothing)
    with pytest.raises(UnsupportedError, match="name it with --compute-capability"):
        find_device(rtx, None, planning=False, tool=nothing)
    with pytest.raises(UsageError, match="only TensorRT-RTX builds for another"):
        find_device(tensorrt, "8.9", planning=False, tool=nothing)
    named = find_device(rtx, "8.9", planning=False, tool=nothing)
    assert (named.compute_capability, named.is_here, named.room.device_bytes) == ((8, 9), False, None)


def test_a_plan_needs_no_gpu_and_no_library() -> None:
    device = find_device(None, None, planning=True, tool=nothing)
    assert (device.compute_capability, device.capability_text) == (None, "?")
    assert find_device(None, "10.0", planning=True, tool=nothing).compute_capability == (10, 0)


def test_naming_the_device_that_is_here_is_fine() -> None:
    assert find_device(api_of(fake_tensorrt("10.3.0")), "8.9", planning=False, tool=smi).is_here


@pytest.mark.parametrize("text", ["8", "sm_89", "8.90", "", "8.x"])
def test_a_compute_capability_is_two_numbers(text: str) -> None:
    with pytest.raises(UsageError, match=r"two numbers such as 8\.9"):
        parse_capability(text)


def test_a_bundle_that_cannot_be_written_is_told_first(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt("10.3.0")
    monkeypatch.setattr(build_module.os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="may not be written, so no engines can lie there"):
        built(bundle, module)
    assert module.fake.builds == []
