from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fakes.trt import fake_tensorrt
from fakes.trt_bundle import write_trt_bundle

from edgevlm import shipped
from edgevlm.bundle.manifest import TensorSpec
from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.bundle.recipe import PartRecipe, Profile, read_recipe, write_recipe
from edgevlm.core.errors import ConfigError, DoesNotFitError, UnsupportedError, UsageError
from edgevlm.runtimes.trt import build as build_module
from edgevlm.runtimes.trt import memory
from edgevlm.runtimes.trt.api import api_of
from edgevlm.runtimes.trt.build import BuildOptions, BuildPlan, build_engines, plan_build, ways_out
from edgevlm.runtimes.trt.device import Device
from edgevlm.runtimes.trt.memory import (
    MIB,
    Need,
    Room,
    Work,
    default_workspace_mb,
    io_bytes,
    predicted_build,
    predicted_engine_bytes,
)
from edgevlm.runtimes.trt.store import read_index

ORIN = Device(name="Orin", compute_capability=(8, 7), room=Room(host_bytes=6 << 30, shared=True), is_jetson=True)
ADA = Device(name="RTX 4090", compute_capability=(8, 9), room=Room(host_bytes=64 << 30, device_bytes=20 << 30))
MEASURED = Path(__file__).parents[2] / "bench/results/tensorrt_build_memory.json"
ENCODER, DECODER = "vision_encoder", "decoder_model_merged"
DECODERS = ("fp16", "int4-b64", "fp8", "nvfp4", "bf16")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_trt_bundle(tmp_path / "tiny.bundle", decoders=DECODERS))


def planned(bundle: Bundle, module: ModuleType, device: Device = ORIN, **options: Any) -> BuildPlan:
    return plan_build(bundle, BuildOptions(**options), api_of(module), device)


def built(bundle: Bundle, module: ModuleType, device: Device = ORIN, **options: Any) -> tuple[Any, list[str]]:
    told: list[str] = []
    run = {name: options.pop(name) for name in ("overwrite", "timing_cache", "room_now") if name in options}
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


def test_the_views_of_one_picture_are_no_batch(bundle: Bundle) -> None:
    recipe, encoder = read_recipe(bundle), bundle.manifest.part("vision_encoder", target="tensorrt")
    views = Profile(name="batch-1", shapes={"pixel_values": ((5, 3, 2, 2), (5, 3, 2, 2), (5, 3, 4, 4))})
    write_recipe(bundle.root, replace(recipe, parts={**recipe.parts, encoder.part: PartRecipe(profiles=(views,))}))
    pixels = replace(encoder.inputs[0], shape=(5, 3, "height", "width"))
    parts = [one if one.part != encoder.part else replace(one, inputs=(pixels,)) for one in bundle.manifest.parts]
    mini = replace(bundle, manifest=replace(bundle.manifest, parts=tuple(parts)))
    assert planned(mini, fake_tensorrt("10.3.0"), batch=1).engines[0].profiles == (views,)


def test_what_the_key_says_follows_what_was_asked_for(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    keys = [planned(bundle, module, **options).engines[1].key for options in ({}, {"batch": 2}, {"workspace_mb": 9})]
    assert keys[0].recipe != keys[1].recipe
    assert keys[0] == keys[2]
    assert keys[0] == planned(bundle, module).engines[1].key


def test_profiles_that_are_named_are_those_that_engines_get(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    every, alone = planned(bundle, module), planned(bundle, module, profiles=("prefill",))
    encoder, decoder = alone.engines
    assert [profile.name for profile in decoder.profiles] == ["prefill"]
    assert (encoder.key, encoder.profiles) == (every.engines[0].key, every.engines[0].profiles)  # has none of the name
    assert decoder.key != every.engines[1].key
    assert decoder.need.host_bytes < every.engines[1].need.host_bytes
    both = planned(bundle, module, profiles=("prefill", "decode")).engines[1]
    assert both.key == every.engines[1].key  # in the recipe's order


def test_engines_with_other_profiles_are_built_anew(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    built(bundle, module)
    results, _ = built(bundle, module, profiles=("prefill",))
    assert [one.was_there for one in results] == [True, False]
    assert len(module.fake.builds) == 3


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("prefil",), r"no profile 'prefil' up to --batch 1; there are batch-1 \(vision_encoder\), decode \(decoder"),
        (("prefill", "decode-batch-2"), r"no profile 'decode-batch-2' up to --batch 1; .*, prefill \(decoder"),
    ],
)
def test_profiles_that_nobody_has_are_refused(bundle: Bundle, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        planned(bundle, fake_tensorrt("10.3.0"), profiles=names)


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


@pytest.mark.parametrize("precision", ["fp8", "bf16", "int4-b64"])
def test_what_the_device_has_is_planned(bundle: Bundle, precision: str) -> None:
    assert planned(bundle, fake_tensorrt("10.3.0"), ADA, decoder_precision=precision).engines[1].precision == precision


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


def test_a_workspace_counts_where_it_was_asked_for(bundle: Bundle) -> None:
    module = fake_tensorrt("10.3.0")
    built(bundle, module, workspace_mb=100)
    small = replace(ORIN, room=Room(host_bytes=3 << 30, shared=True))
    again, _ = built(bundle, module, small)  # for which another workspace would be chosen
    assert [one.was_there for one in again] == [True, True]
    same, _ = built(bundle, module, workspace_mb=100)
    assert [one.was_there for one in same] == [True, True]
    other, _ = built(bundle, module, workspace_mb=90)
    assert [one.was_there for one in other] == [False, False]
    entries = read_index(bundle.root / planned(bundle, module).folder).engines.values()
    assert [entry.workspace_mb for entry in entries] == [90, 90]


def test_what_is_free_is_read_before_every_engine_that_is_built(bundle: Bundle) -> None:
    module, rooms = fake_tensorrt("10.3.0"), [Room(host_bytes=3 << 30, shared=True), Room(host_bytes=0, shared=True)]
    waiting = iter(rooms)
    with pytest.raises(DoesNotFitError, match=r"building decoder_model_merged in fp16 .* where 0\.00 GiB is free"):
        built(bundle, module, room_now=lambda: next(waiting))
    (first,) = module.fake.builds
    assert first.config.pools[0] == 768 * MIB  # a quarter of what is free now, not of the plan's 6 GiB
    again, _ = built(bundle, module, room_now=lambda: Room())
    assert [one.was_there for one in again] == [True, False]


def test_a_device_that_nobody_knows_is_planned_for_and_not_built_for(bundle: Bundle) -> None:
    module, unknown = fake_tensorrt("10.3.0"), replace(ORIN, compute_capability=None)
    with pytest.raises(UnsupportedError, match="Orin: its compute capability is not known"):
        built(bundle, module, unknown)
    assert not (bundle.root / "tensorrt/engines").exists()


def test_a_device_that_may_be_the_wrong_one_is_told(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    built(bundle, fake_tensorrt("10.3.0"), replace(ADA, doubt="the first of several"))
    assert "building for RTX 4090, the first of several" in caplog.text


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


def test_a_workspace_that_would_fit_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROFILE_BYTES", 0)
    tight = Device(name="Orin", compute_capability=(8, 7), room=Room(host_bytes=800 * MIB, shared=True))
    with pytest.raises(DoesNotFitError, match=r"--workspace-mb 1\d\d would fit") as error:
        built(bundle, fake_tensorrt("10.3.0"), tight, workspace_mb=512)
    fitting = int(str(error.value).split("--workspace-mb ")[1].split()[0])
    assert built(bundle, fake_tensorrt("10.3.0"), tight, workspace_mb=fitting)


def test_a_precision_that_would_fit_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOST_COPIES", "MORE_HOST_COPIES"):
        monkeypatch.setattr(memory, name, 1_000_000)
    data = bundle.root / "tensorrt/decoder_model_merged_fp16.onnx_data"
    data.write_bytes(bytes(4096))
    tight = Device(name="GPU", compute_capability=(8, 9), room=Room(host_bytes=4 << 30))
    with pytest.raises(DoesNotFitError, match="--decoder-precision int4-b64 would fit"):
        built(bundle, fake_tensorrt("10.3.0"), tight)


@pytest.mark.parametrize(("host_mib", "way"), [(1050, ""), (950, r"--workspace-mb \d+ ")])
def test_fewer_profiles_are_named_where_they_would_fit(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, host_mib: int, way: str
) -> None:
    monkeypatch.setattr(memory, "PROFILE_BYTES", 100 * MIB)
    tight = Device(name="Orin", compute_capability=(8, 7), room=Room(host_bytes=host_mib * MIB, shared=True))
    plan = planned(bundle, fake_tensorrt("10.3.0"), tight, workspace_mb=200)
    encoder, decoder = plan.engines
    assert not any("--profiles" in one for one in ways_out(bundle, encoder, tight.room))
    ways = "; ".join(ways_out(bundle, decoder, tight.room))
    assert re.search(f"--profiles prefill {way}would fit", ways)


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


def test_engines_that_are_all_there_need_no_writing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt("10.3.0")
    built(bundle, module)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    again, _ = built(bundle, module)
    assert [one.was_there for one in again] == [True, True]


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
    nano, api = read_bundle(shipped.find_bundle("nano"), check=False), api_of(fake_tensorrt("10.3.0"))
    plan = BuildPlan(bundle=nano.root, device=ORIN, library=api.name, workspace_mb=1, folder="none", engines=())
    with pytest.raises(UsageError, match="belongs to the package: build those of a copy"):
        build_engines(nano, plan, BuildOptions(), api)


# -- memory ---------------------------------------------------------------------------------------------------


def test_the_prediction_is_the_documented_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HOST_BASE", 10), ("PROFILE_BYTES", 4), ("DEVICE_BASE", 20), ("DEVICE_COPIES", 2)):
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(memory, "ACTIVATIONS", 5)
    work = Work(part=ENCODER, precision="fp16", weight_bytes=100, activation_bytes=7, workspace_bytes=1000)
    assert predicted_build(work) == Need(10 + 200 + 2 * 104, 20 + 200 + 35 + 1000)
    assert predicted_build(replace(work, ahead_of_time=True)) == Need(418, 0)
    assert predicted_build(replace(work, precision="int8")).host_bytes == 10 + 300 + 2 * 104
    assert predicted_build(replace(work, num_profiles=2)).host_bytes == 10 + 300 + 2 * 108
    assert predicted_build(replace(work, part=DECODER, num_profiles=2)).host_bytes == 10 + 300 + 2 * 178


@pytest.mark.parametrize(
    ("part", "precision", "expected"),
    [
        (ENCODER, "fp16", [104, 108, 124]),
        (DECODER, "fp16", [104, 178, 254]),
        (DECODER, "fp8", [104, 178, 254]),
        (DECODER, "int4-b64-rtn", [104, 108, 124]),
    ],
)
def test_an_engine_grows_with_its_profiles(
    monkeypatch: pytest.MonkeyPatch, part: str, precision: str, expected: list[int]
) -> None:
    monkeypatch.setattr(memory, "PROFILE_BYTES", 4)
    works = [Work(part=part, precision=precision, weight_bytes=100, num_profiles=number) for number in (1, 2, 6)]
    assert [predicted_engine_bytes(work) for work in works] == expected


@pytest.mark.parametrize("row", json.loads(MEASURED.read_text(encoding="utf-8"))["builds"])
def test_the_prediction_is_above_what_was_measured_by_no_more_than_a_half(row: dict[str, Any]) -> None:
    work = Work(
        part=ENCODER if "FastViTHD" in row["graph"] else DECODER,
        precision=row["precision"],
        weight_bytes=row["weights_mib"] * MIB,
        num_profiles=row["num_profiles"],
        ahead_of_time=True,
    )
    host = predicted_build(work).host_bytes / MIB
    assert row["peak_mib"] <= host <= 1.5 * row["peak_mib"]
    assert row["predicted_mib"] == pytest.approx(host, rel=0.01)
    assert row["engine_mib"] <= predicted_engine_bytes(work) / MIB


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


def test_a_bundle_that_cannot_be_written_is_told_first(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt("10.3.0")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="may not be written, so no engines can lie there"):
        built(bundle, module)
    assert module.fake.builds == []
