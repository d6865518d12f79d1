from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fakes.trt import fake_tensorrt
from fakes.trt_bundle import CACHE, CONTEXT, WIDTH, write_trt_bundle

from edgevlm.core.errors import (
    DeviceError,
    DoesNotFitError,
    IntegrityError,
    MissingLibraryError,
    UnsupportedError,
    UsageError,
)
from edgevlm.runtimes.trt import api as api_module
from edgevlm.runtimes.trt.api import MODULES, Api, BuildSettings, api_of, load_tensorrt

SURFACES = (("10.3.0", "tensorrt"), ("10.13.2.6", "tensorrt"), ("11.4.0.106", "tensorrt"), ("1.7.1.116", "rtx"))
EVERY = pytest.mark.parametrize(("version", "flavour"), SURFACES, ids=["10.3", "10.13", "11.4", "rtx"])
ENCODER = "tensorrt/vision_encoder_fp16.onnx"
PIXELS = {"pixel_values": ((1, 3, 2, 2), (1, 3, 2, 2), (2, 3, 2, 2))}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_trt_bundle(tmp_path / "tiny.bundle")


def install(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)


def fake_api(version: str = "10.3.0", flavour: str = "tensorrt", **settings: Any) -> Api:
    return api_of(fake_tensorrt(version, flavour, **settings))


def settings(**others: Any) -> BuildSettings:
    return BuildSettings(profiles=[PIXELS], workspace_bytes=1 << 20, **others)


@pytest.mark.parametrize(
    ("version", "flavour", "in_place", "fp4", "timings", "ahead", "flags"),
    [
        ("10.3.0", "tensorrt", False, False, True, False, 2),
        ("10.13.2.6", "tensorrt", False, True, True, False, 2),
        ("10.16.1", "tensorrt", True, True, True, False, 2),
        ("11.4.0.106", "tensorrt", True, True, True, False, 0),
        ("1.7.1.116", "rtx", True, True, False, True, 0),
    ],
)
def test_a_version_is_judged_by_what_it_offers(
    version: str, flavour: str, in_place: bool, fp4: bool, timings: bool, ahead: bool, flags: int
) -> None:
    api = fake_api(version, flavour)
    found = (api.has_in_place_cache, api.has_timing_cache, api.builds_ahead_of_time, api.network_flags)
    assert found == (in_place, timings, ahead, flags)
    assert (api.has_type("FP4"), api.has_type("INT4")) == (fp4, True)
    assert api.has_version_compatible is api.has_hardware_compatible is (flavour == "tensorrt")


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        ((("11.4.0", "tensorrt"), ("1.7.1", "rtx")), "TensorRT 11.4.0"),
        ((("1.7.1", "rtx"),), "TensorRT-RTX 1.7.1"),
    ],
)
def test_the_installed_library_is_found(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[tuple[str, str], ...], name: str
) -> None:
    install(monkeypatch, *(fake_tensorrt(*one) for one in installed))
    assert load_tensorrt().name == name


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(MissingLibraryError, match="tensorrt is not installed: pip install tensorrt"):
        load_tensorrt()


def test_a_version_from_before_typed_int4_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"TensorRT 8\.5\.2 is too old: 10\.3 or newer is needed"):
        fake_api("8.5.2")


def test_bindings_take_the_version_of_the_library_that_they_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt("11.4.0.106")
    module.__name__ = "tensorrt_bindings"
    monkeypatch.setattr(
        api_module.ctypes, "CDLL", lambda name: type("L", (), {"getInferLibVersion": lambda s: 10701})()
    )
    assert (api_of(module).flavour, api_of(module).version) == ("rtx", (1, 7, 1))


@EVERY
def test_an_engine_computes_what_its_graph_does(bundle: Path, version: str, flavour: str) -> None:
    api = fake_api(version, flavour)
    built = api.build(bundle / ENCODER, settings(compute_capability=(8, 9)))
    engine = api.deserialize(built.engine)
    assert [(one.name, one.is_input, one.shape) for one in engine.tensors()] == [
        ("pixel_values", True, (-1, 3, 2, 2)),
        ("image_features", False, (-1, 4, 3)),
    ]
    assert engine.profile_shape("pixel_values", 0)[2] == (2, 3, 2, 2)
    context = engine.create_context()
    context.set_shape("pixel_values", (2, 3, 2, 2))
    assert context.shape("image_features") == (2, 4, 3)
    pixels, features = np.arange(24, dtype=np.float32), np.zeros(24, np.float32)
    with pytest.raises(DeviceError, match="could not run the engine"):
        context.enqueue(0)
    rows = [aligned(pixels), aligned(features)]
    context.set_address("pixel_values", ctypes.addressof(rows[0]))
    context.set_address("image_features", ctypes.addressof(rows[1]))
    context.enqueue(0)
    found = np.frombuffer(rows[1], np.float32).reshape(2, 4, 3)
    assert found[0].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def aligned(values: Any) -> Any:
    """A copy of ``values`` at an address that is a multiple of 256."""
    room = ctypes.create_string_buffer(values.nbytes + 256)
    address = -(-ctypes.addressof(room) // 256) * 256
    memory = (ctypes.c_char * values.nbytes).from_address(address)
    memory.raw = values.tobytes()
    memory._keeps = room
    return memory


def test_an_engine_in_place_says_which_memory_is_shared(bundle: Path) -> None:
    api = fake_api("11.4.0")
    rows = dict.fromkeys(CACHE, ((1, 1, CONTEXT, 2),) * 3)
    shapes = {"inputs_embeds": ((1, 1, WIDTH),) * 3, "write_indices": ((1,),) * 3, **rows}
    one = BuildSettings(profiles=[shapes], workspace_bytes=1 << 20)
    built = api.build(bundle / "tensorrt/decoder_model_merged_fp16_in_place.onnx", one)
    shared = {tensor.name: tensor.shares for tensor in api.deserialize(built.engine).tensors() if tensor.shares}
    assert shared == {"present.0.key": CACHE[0], "present.0.value": CACHE[1]}


def test_a_graph_that_the_version_cannot_read_names_the_operator(bundle: Path) -> None:
    one = BuildSettings(profiles=[], workspace_bytes=1 << 20)
    with pytest.raises(UnsupportedError, match=r"TensorRT 10\.3\.0 cannot read it: .*TensorScatter"):
        fake_api().build(bundle / "tensorrt/decoder_model_merged_fp16_in_place.onnx", one)


def test_a_graph_that_the_version_cannot_build_says_why(bundle: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot build it: .*no optimization profile has been defined"):
        fake_api().build(bundle / ENCODER, BuildSettings(profiles=[], workspace_bytes=1 << 20))


@EVERY
def test_memory_that_ends_during_the_build_is_told_as_such(bundle: Path, version: str, flavour: str) -> None:
    with pytest.raises(DoesNotFitError, match=r"building vision_encoder_fp16.onnx: out of memory.*--workspace-mb"):
        fake_api(version, flavour, memory=10).build(bundle / ENCODER, settings())


def test_progress_counts_the_steps_of_the_outer_phase(bundle: Path) -> None:
    told: list[str] = []
    fake_api().build(bundle / ENCODER, settings(), report=told.append)
    assert told == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_signal_ends_the_build_at_its_next_step(bundle: Path) -> None:
    told: list[str] = []

    def press(text: str) -> None:
        told.append(text)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)  # the main thread looks several times a second

    with pytest.raises(KeyboardInterrupt):
        fake_api().build(bundle / ENCODER, settings(), report=press)
    assert told == ["1 of 3"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_vendor_computes_beside_the_thread_that_takes_signals(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, threads = fake_tensorrt("10.3.0"), []
    for kind, name in ((module.Builder, "__init__"), (module.Builder, "build_serialized_network")):
        done = getattr(kind, name)

        def noted(*arguments: Any, done: Any = done) -> Any:
            threads.append(threading.current_thread())
            return done(*arguments)

        monkeypatch.setattr(kind, name, noted)
    api_of(module).build(bundle / ENCODER, settings())
    assert len(threads) == 2
    assert len(set(threads)) == 1  # it is one and the same, whose CUDA device nobody changed
    assert threading.main_thread() not in threads


def test_a_build_that_nobody_waits_for_ends(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def late(text: str) -> None:
        told.append(text)
        time.sleep(0.5)

    def gone(*arguments: Any, **more: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(api_module, "wait", gone)
    with pytest.raises(TimeoutError):
        fake_api().build(bundle / ENCODER, settings(), report=late)
    assert len(told) < 3


def test_progress_that_cannot_be_shown_does_not_stop_a_build(bundle: Path) -> None:
    def broken(text: str) -> None:
        raise BrokenPipeError

    assert fake_api().build(bundle / ENCODER, settings(), report=broken).engine


def test_a_timing_cache_grows_and_one_of_another_version_is_ignored(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = fake_api().build(bundle / ENCODER, settings()).timing_cache
    assert first is not None
    again = fake_api().build(bundle / ENCODER, settings(), timing_cache=first).timing_cache
    assert again == first + b"vision_encoder_fp16.onnx;"
    other = fake_api("10.13.2").build(bundle / ENCODER, settings(), timing_cache=first).timing_cache
    assert other is not None
    assert other.startswith(b"timings of 10.13.2:")
    assert "timing cache is ignored" in caplog.text


def test_rtx_keeps_no_timings_and_builds_for_the_named_device(bundle: Path) -> None:
    module = fake_tensorrt("1.7.1", "rtx")
    built = api_of(module).build(bundle / ENCODER, settings(compute_capability=(8, 9)), timing_cache=b"x")
    config = module.fake.builds[0].config
    assert (built.timing_cache, config.timing_cache) == (None, None)
    assert (config.num_compute_capabilities, config.compute_capability.name) == (1, "SM89")


def test_rtx_builds_for_later_devices_without_being_told_which(bundle: Path) -> None:
    module = fake_tensorrt("1.7.1", "rtx")
    api_of(module).build(bundle / ENCODER, settings(compute_capability=(12, 1)))
    assert module.fake.builds[0].config.num_compute_capabilities == 0
    with pytest.raises(UnsupportedError, match=r"cannot build for compute capability 7\.2"):
        api_of(module).build(bundle / ENCODER, settings(compute_capability=(7, 2)))


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible"])
def test_compatible_engines_are_asked_for_where_there_are_such(bundle: Path, option: str) -> None:
    module = fake_tensorrt("10.3.0")
    api_of(module).build(bundle / ENCODER, settings(**{option: True}))
    config = module.fake.builds[0].config
    is_asked = (bool(config.flags & 1 << 12), config.hardware_compatibility_level.name == "AMPERE_PLUS")
    assert is_asked == (option == "version_compatible", option == "hardware_compatible")
    with pytest.raises(UsageError, match=f"TensorRT-RTX 1.7.1 has no --{option.replace('_', '-')}: leave it out"):
        fake_api("1.7.1", "rtx").build(bundle / ENCODER, settings(**{option: True}))


def test_an_engine_with_code_for_the_host_runs_on_a_later_version_when_allowed(bundle: Path) -> None:
    built = fake_api("10.3.0").build(bundle / ENCODER, settings(version_compatible=True))
    newer = fake_api("10.13.2")
    with pytest.raises(IntegrityError, match=r"refuses the engine .*host code"):
        newer.deserialize(built.engine)
    assert newer.deserialize(built.engine, host_code=True).num_profiles == 1


@pytest.mark.parametrize("damage", [b"no engine", b""])
def test_an_engine_of_another_version_or_of_none_is_refused(bundle: Path, damage: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"TensorRT 10.3.0 refuses the engine .*build it again"):
        fake_api().deserialize(damage)
    other = fake_api("10.13.2").build(bundle / ENCODER, settings()).engine
    with pytest.raises(IntegrityError, match="Version tag does not match"):
        fake_api().deserialize(other)


def test_a_shape_that_no_profile_covers_says_what_to_build(bundle: Path) -> None:
    api = fake_api()
    context = api.deserialize(api.build(bundle / ENCODER, settings()).engine).create_context()
    with pytest.raises(UnsupportedError, match=r"no pixel_values of shape \(3, 3, 2, 2\) .*larger --batch"):
        context.set_shape("pixel_values", (3, 3, 2, 2))
    with pytest.raises(DeviceError, match="refuses optimization profile 7"):
        context.set_profile(7, 0)


def test_an_engine_without_a_driver_is_not_blamed(bundle: Path) -> None:
    api = fake_api("1.7.1", "rtx", has_driver=False)
    with pytest.raises(DeviceError, match=r"cannot reach a GPU: .*driver version is insufficient.*nvidia-smi"):
        api.deserialize(api.build(bundle / ENCODER, settings()).engine)
