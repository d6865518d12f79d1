"""Profiles, kv caches and numbers around an engine, on fakes of TensorRT and of CUDA."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fakes.cuda import FakeCuda, fake_cuda, install
from fakes.trt import fake_tensorrt
from fakes.trt_bundle import CONTEXT, WIDTH, write_trt_bundle
from numpy.typing import NDArray

from edgevlm.bundle.read import read_bundle
from edgevlm.core.errors import DoesNotFitError, IntegrityError, UnsupportedError
from edgevlm.runtimes.embedding_table import EmbeddingTable
from edgevlm.runtimes.on_tensorrt import TensorRt
from edgevlm.runtimes.trt.api import MODULES, load_tensorrt
from edgevlm.runtimes.trt.build import BuildOptions, build_engines, plan_build
from edgevlm.runtimes.trt.cache import CacheLayout, InPlaceCache, KvCache, Rows, RowsCache
from edgevlm.runtimes.trt.cuda import CudaDevice
from edgevlm.runtimes.trt.device import Device
from edgevlm.runtimes.trt.engine import read_numbers, write_numbers
from edgevlm.runtimes.trt.memory import Room

LAYOUTS = {  # with a head of so many numbers
    "even": CacheLayout(("0.key", "0.value", "1.key"), 2, 32, 128),
    "uneven": CacheLayout(("0.key", "0.value", "1.key"), 3, 5, 20),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch, fake_cuda())


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Callable[..., tuple[Any, TensorRt]]:
    """The tiny bundle with its engines, and a back end for it."""

    def open_it(*profiles: str) -> tuple[Any, TensorRt]:
        for name in MODULES:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0"))
        bundle, api = read_bundle(write_trt_bundle(tmp_path / "tiny.bundle")), load_tensorrt()
        options = BuildOptions(workspace_mb=64, profiles=profiles)
        device = Device(name="Fake GPU", compute_capability=(8, 7), room=Room())
        build_engines(bundle, plan_build(bundle, options, api, device), options, api)
        return bundle, TensorRt()

    return open_it


def new_rows(layout: CacheLayout, count: int, seed: int) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(layout.shape(count)).astype(np.float32) for name in layout.names}


def put(device: CudaDevice, cache: KvCache, rows: dict[str, NDArray[np.float32]], start: int) -> None:
    """What a run of a graph of the kind "rows" does."""
    count = next(iter(rows.values())).shape[2]
    addresses = cache.addresses(count)
    for name, array in rows.items():
        staging = device.staging(array.nbytes, "a test")
        staging.view(array.shape, np.float32)[...] = array
        device.stream.to_device(addresses[f"present.{name}"], staging.host_address, array.nbytes)
        staging.close()
    cache.after(start, start + count)


def held(device: CudaDevice, cache: KvCache, layout: CacheLayout, start: int = 1) -> dict[str, NDArray[np.float32]]:
    """Everything that the next run would see as its past."""
    found, shape = {}, layout.shape(cache.length(start))
    for name in layout.names:
        staging = device.staging(4 * int(np.prod(shape)), "a test")
        device.stream.to_host(staging.host_address, cache.addresses(1)[f"past_key_values.{name}"], staging.num_bytes)
        found[name] = staging.view(shape, np.float32).copy()
        staging.close()
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_stay_where_they_are_while_the_cache_grows(cuda: FakeCuda, layout: CacheLayout) -> None:
    device = CudaDevice()
    cache = RowsCache(device, layout, (8, 16, 20))
    parts, position = [], 0
    for seed, count in enumerate((5, 1, 2, 1, 7, 3, 1)):  # up to the last row of the last bucket
        assert cache.length(position) == next(b for b in (8, 16, 20) if b >= position)
        parts.append(new_rows(layout, count, seed))
        put(device, cache, parts[-1], position)
        position += count
        found = held(device, cache, layout)
        for name in layout.names:
            expected = np.concatenate([part[name] for part in parts], axis=2)
            assert np.array_equal(found[name][:, :, :position], expected)
            assert not found[name][:, :, position:].any()
    assert cache.version == 2
    assert cache.length(0) == 8  # while nothing is written
    cache.close()
    assert not cuda.device
    assert cuda.misuse == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_can_be_cleared_from_any_on(cuda: FakeCuda, layout: CacheLayout) -> None:
    device = CudaDevice()
    cache, rows = RowsCache(device, layout, (8, 16)), new_rows(layout, 8, 0)
    put(device, cache, rows, 0)
    cache.clear(3)
    found = held(device, cache, layout)
    for name in layout.names:
        assert np.array_equal(found[name][:, :, :3], rows[name][:, :, :3])
        assert not found[name][:, :, 3:].any()
    cuda.calls.clear()
    for start in (8, 12):  # beyond the bucket there is nothing
        cache.clear(start)
    assert cuda.calls["cudaMemset2DAsync"] == 0
    cache.close()


def test_a_cache_that_is_even_is_moved_in_one_copy(cuda: FakeCuda) -> None:
    device = CudaDevice()
    for name, num_copies in (("even", 1), ("uneven", 3)):
        cache = RowsCache(device, LAYOUTS[name], (8,))
        cuda.calls.clear()
        cache.after(0, 1)
        assert cuda.calls["cudaMemcpy2DAsync"] == num_copies
        cache.close()


def test_a_cache_in_place_is_one_buffer_for_past_and_present(cuda: FakeCuda) -> None:
    layout, device = LAYOUTS["uneven"], CudaDevice()
    cache = InPlaceCache(device, layout, 8)
    addresses = cache.addresses(3)
    for name in layout.names:
        assert addresses[f"past_key_values.{name}"] == addresses[f"present.{name}"]
        assert addresses[f"present.{name}"] % 256 == 0
        assert not held(device, cache, layout)[name].any()
    assert (cache.length(0), cache.length(7)) == (8, 8)
    cache.close()
    assert not cuda.device


def test_a_cache_that_does_not_fit_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["even"]
    cuda = install(monkeypatch, fake_cuda(memory_bytes=layout.num_bytes(8) + 256))
    with pytest.raises(DoesNotFitError, match="the kv cache's new row"):
        RowsCache(CudaDevice(), layout, (8,))
    assert not cuda.device
    with pytest.raises(DoesNotFitError, match="a kv cache of 16 rows"):
        Rows(CudaDevice(), layout, 16, "a kv cache of 16 rows")


def test_numbers_of_bfloat16_are_rounded_as_everywhere() -> None:
    numbers = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 100
    bits = np.zeros(1000, np.uint16)
    write_numbers(bits, "bfloat16", numbers)
    assert np.array_equal(bits, numbers.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.array_equal(read_numbers(bits, "bfloat16"), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numbers_that_are_read_are_the_callers_own(dtype: str) -> None:
    view = np.zeros(3, dtype)
    write_numbers(view, dtype, np.array([1, 2, 3], np.float32))
    found = read_numbers(view, dtype)
    view[...] = 0
    assert found.dtype == np.float32
    assert found.tolist() == [1, 2, 3]


def test_the_narrowest_profile_is_taken(opened: Callable[..., tuple[Any, TensorRt]]) -> None:
    bundle, back_end = opened()
    part = bundle.manifest.part("decoder_model_merged", "tensorrt")
    engine, _ = back_end._open(bundle, part)

    def shapes(count: int) -> dict[str, tuple[int, ...]]:
        past = dict.fromkeys(("past_key_values.0.key", "past_key_values.0.value"), (1, 1, CONTEXT, 2))
        return {"inputs_embeds": (1, count, WIDTH), "write_indices": (1,), **past}

    one, many = engine.context(shapes(1)), engine.context(shapes(5))
    assert one is not many
    assert engine.context(shapes(1)) is one
    with pytest.raises(UnsupportedError, match=r"was not built for inputs_embeds 1 x 17 x 4, .*it takes .*--batch"):
        engine.context(shapes(CONTEXT + 1))
    engine.close()


def test_a_workspace_that_was_lost_is_reserved_again(opened: Callable[..., tuple[Any, TensorRt]]) -> None:
    bundle, back_end = opened()
    engine, _ = back_end._open(bundle, bundle.manifest.part("vision_encoder", "tensorrt"))
    shapes, workspace = {"pixel_values": (1, 3, 2, 2)}, engine.device.workspace
    context = engine.context(shapes)
    context.bind(shapes, {})
    needed = workspace.num_bytes
    workspace.close()
    context.bind(shapes, {})
    assert workspace.num_bytes == needed > 0
    engine.close()


def test_one_profile_has_a_context_for_prompts_and_one_for_what_repeats(
    opened: Callable[..., tuple[Any, TensorRt]],
) -> None:
    bundle, back_end = opened("prefill")
    engine, _ = back_end._open(bundle, bundle.manifest.part("decoder_model_merged", "tensorrt"))
    past = dict.fromkeys(("past_key_values.0.key", "past_key_values.0.value"), (1, 1, CONTEXT, 2))
    one, many = ({"inputs_embeds": (1, count, WIDTH), "write_indices": (1,), **past} for count in (1, 5))
    prompt, step = engine.context(many), engine.context(one, repeats=True)
    assert prompt is not step
    assert engine.context(one) is prompt
    assert engine.context(one, repeats=True) is step
    engine.close()


@pytest.mark.parametrize("profiles", [(), ("prefill",), ("decode",)])
def test_the_tiny_bundle_runs(
    opened: Callable[..., tuple[Any, TensorRt]], cuda: FakeCuda, profiles: tuple[str, ...]
) -> None:
    bundle, back_end = opened(*profiles)
    manifest = bundle.manifest
    table = manifest.part("embed_tokens", "tensorrt").table
    assert table is not None
    embedding = EmbeddingTable(bundle, table)
    encoder = back_end.open_encoder(bundle, manifest.part("vision_encoder", "tensorrt"))
    decoder = back_end.open_decoder(bundle, manifest.part("decoder_model_merged", "tensorrt"), embedding)
    pixels = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    tokens = encoder.encode(pixels).tokens
    assert np.array_equal(tokens[0], pixels.reshape(2, 3, 4).transpose(0, 2, 1).reshape(8, 3))
    row = embedding.embed(np.array([[5]]))[0, 0]
    weights = np.arange(32, dtype=np.float32).reshape(4, 8)
    for _ in range(CONTEXT):
        assert np.allclose(decoder.decode(5), row @ weights)
    with pytest.raises(DoesNotFitError, match="17 rows do not fit"):
        decoder.decode(5)
    for part in (encoder, decoder):
        part.close()
    assert not cuda.device
    assert not cuda.handles
    assert cuda.misuse == []


def test_an_embedding_without_a_table_is_refused(opened: Callable[..., tuple[Any, TensorRt]]) -> None:
    bundle, back_end = opened()
    with pytest.raises(UnsupportedError, match="does not say where its rows lie"):
        back_end.open_embedding(bundle, bundle.manifest.part("embed_tokens", "tensorrt"))


def test_an_encoder_without_its_output_is_refused(opened: Callable[..., tuple[Any, TensorRt]], cuda: FakeCuda) -> None:
    bundle, back_end = opened()
    decoder = bundle.manifest.part("decoder_model_merged", "tensorrt")
    with pytest.raises(IntegrityError, match="its engine has no pixel_values"):
        back_end.open_encoder(bundle, decoder)
    assert not cuda.device
    assert not cuda.handles
