"""CUDA's memory, stream and graphs, on a runtime over host memory that counts what is given back."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from fakes.cuda import FakeCuda, cudaError_t, fake_cuda, install

from edgevlm.core.errors import DeviceError, DoesNotFitError, EdgeVLMError, MissingLibraryError, UnsupportedError
from edgevlm.runtimes.trt.cuda import (
    MODULES,
    CudaDevice,
    DeviceMemory,
    PinnedMemory,
    Staging,
    Stream,
    device_index,
    load_cuda,
)

MIB = 1 << 20


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch, fake_cuda(memory_bytes=8 * MIB))


@pytest.mark.parametrize("layout", MODULES)
def test_both_layouts_of_cuda_python_are_found(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    fake = install(monkeypatch, fake_cuda(), layout=layout)
    assert load_cuda().module is fake


def test_without_cuda_python_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", *MODULES):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match=r"cuda-python .*: pip install cuda-python"):
        load_cuda()


def test_memory_that_does_not_fit_is_told_with_what_is_free(fake: FakeCuda) -> None:
    with (
        DeviceMemory(load_cuda(), 6 * MIB, "the kv cache"),
        pytest.raises(DoesNotFitError, match=r"the kv cache, 6\.0 MiB: not enough GPU memory \(2 of 8 MiB are free\)"),
    ):
        DeviceMemory(load_cuda(), 6 * MIB, "the kv cache")
    assert not fake.device


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (cudaError_t.cudaErrorNoDevice, DeviceError, "no NVIDIA GPU is visible here"),
        (cudaError_t.cudaErrorInsufficientDriver, DeviceError, "update the driver"),
        (cudaError_t.cudaErrorMemoryAllocation, DoesNotFitError, "not enough GPU memory"),
        (cudaError_t.cudaErrorLaunchFailure, DeviceError, "CUDA failed in cudaStreamSynchronize: what the driver says"),
    ],
)
def test_every_error_code_becomes_a_line(
    fake: FakeCuda, error: cudaError_t, kind: type[EdgeVLMError], words: str
) -> None:
    stream = Stream(load_cuda())
    fake.fail["cudaStreamSynchronize"] = error
    with pytest.raises(kind, match=words) as raised:
        stream.wait()
    assert error.name in str(raised.value) or kind is DoesNotFitError
    assert fake.calls["cudaGetLastError"] == 1


def test_memory_is_given_back_exactly_once(fake: FakeCuda) -> None:
    with DeviceMemory(load_cuda(), 1000, "a test") as memory, PinnedMemory(load_cuda(), 1000, "a test") as pinned:
        assert memory.address in fake.device
        assert pinned.address in fake.pinned
    memory.close()
    assert memory.is_closed
    assert fake.freed == [pinned.address, memory.address]


def test_memory_that_is_forgotten_is_given_back(fake: FakeCuda) -> None:
    memory = DeviceMemory(load_cuda(), 1000, "a test")
    address = memory.address
    del memory
    assert fake.freed == [address]


def test_a_lost_device_does_not_stop_giving_back(fake: FakeCuda) -> None:
    memory = DeviceMemory(load_cuda(), 1000, "a test")
    fake.fail["cudaFree"] = cudaError_t.cudaErrorLaunchFailure
    memory.close()
    assert memory.is_closed


def test_numbers_go_to_the_device_and_back(fake: FakeCuda) -> None:
    device = CudaDevice()
    there, back = (Staging(device, 24, "a test") for _ in range(2))
    there.view((2, 3), np.float32)[...] = [[1, 2, 3], [4, 5, 6]]
    there.upload()
    device.stream.copy_rows(back.address, 12, there.address + 8, 4, 4, 2)  # the third and fourth number, 12 bytes apart
    device.stream.zero_rows(back.address + 4, 12, 8, 2)
    back.download()
    device.stream.wait()
    assert back.view((2, 3), np.float32).tolist() == [[3, 0, 0], [4, 0, 0]]


def test_captured_work_is_done_when_it_is_launched(fake: FakeCuda) -> None:
    device = CudaDevice()
    staging = Staging(device, 4, "a test")
    number = staging.view((1,), np.int32)
    number[0] = 1
    with device.stream.capture(staging.upload) as graph:
        number[0] = 2
        graph.launch(device.stream)
        number[0] = 0
        staging.download()
    assert number[0] == 2
    assert [handle for handle in fake.handles.values() if handle.work] == []


def test_a_capture_that_fails_leaves_the_stream_usable(fake: FakeCuda) -> None:
    device = CudaDevice()
    with pytest.raises(DeviceError, match="cudaErrorStreamCaptureUnsupported"):
        device.stream.capture(lambda: device.stream.wait())
    device.stream.wait()
    with pytest.raises(KeyboardInterrupt):
        device.stream.capture(_interrupt)
    device.stream.wait()
    assert list(fake.handles) == [device.stream.number]


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_the_last_user_gives_stream_and_workspace_back(fake: FakeCuda) -> None:
    device = CudaDevice()
    for _ in range(2):
        device.acquire()
    device.workspace.reserve(1000)
    assert device.stream.number in fake.handles
    device.release()
    assert len(fake.device) == len(fake.handles) == 1
    device.release()
    assert not fake.device
    assert not fake.handles
    assert device.stream.number in fake.handles  # and who opens again gets a new one


def test_a_workspace_grows_and_says_so(fake: FakeCuda) -> None:
    workspace = CudaDevice().workspace
    workspace.reserve(1000)
    version = workspace.version
    workspace.reserve(500)
    assert (workspace.version, workspace.num_bytes) == (version, 1000)
    workspace.reserve(2000)
    assert workspace.version > version
    assert len(fake.device) == 1


def test_a_workspace_without_room_for_old_and_new_gives_the_old_back_first(fake: FakeCuda) -> None:
    workspace = CudaDevice().workspace
    workspace.reserve(5 * MIB)
    workspace.reserve(6 * MIB)
    assert workspace.num_bytes == 6 * MIB
    assert list(fake.device) == [workspace.address]


def test_a_workspace_that_cannot_grow_stays_as_large_as_it_was(fake: FakeCuda) -> None:
    workspace = CudaDevice().workspace
    workspace.reserve(5 * MIB)
    version = workspace.version
    with pytest.raises(DoesNotFitError, match="the engines' workspace, 9"):
        workspace.reserve(9 * MIB)
    assert workspace.num_bytes == 5 * MIB
    assert list(fake.device) == [workspace.address]
    assert workspace.version > version  # whoever captured with the old address must not go on
    workspace.close()
    with pytest.raises(DoesNotFitError):
        workspace.reserve(9 * MIB)
    assert (workspace.num_bytes, workspace.address) == (0, 0)


def test_a_device_is_described(fake: FakeCuda) -> None:
    facts = CudaDevice().facts
    assert (facts.name, facts.compute_capability, facts.runtime_version) == ("Fake GPU", (8, 7), 12060)


def test_a_machine_without_a_gpu_or_that_many_says_so(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    with pytest.raises(DeviceError, match="no GPU number 3: 1 found"):
        CudaDevice(3)
    install(monkeypatch, fake_cuda(num_devices=0))
    with pytest.raises(DeviceError, match="no NVIDIA GPU is visible"):
        CudaDevice()


@pytest.mark.parametrize(("name", "index"), [(None, 0), ("cuda", 0), ("GPU", 0), ("cuda:2", 2)])
def test_a_device_is_asked_for_by_number(name: str | None, index: int) -> None:
    assert device_index(name) == index


@pytest.mark.parametrize("name", ["cpu", "cuda:x", "cuda:-1", "tensorrt"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="runs on the devices cuda"):
        device_index(name)
