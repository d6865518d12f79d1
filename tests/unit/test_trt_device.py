from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes.cuda import cudaError_t, fake_cuda, install
from fakes.trt import fake_tensorrt

from edgevlm.core.errors import DeviceError, UsageError
from edgevlm.core.hardware import probe
from edgevlm.core.jetson import Jetson
from edgevlm.runtimes.trt import device as device_module
from edgevlm.runtimes.trt.api import api_of
from edgevlm.runtimes.trt.device import find_device, parse_capability
from edgevlm.runtimes.trt.memory import MIB

SMI = "NVIDIA GeForce RTX 4090, 8.9, 20480\nNVIDIA GeForce RTX 3060, 8.6, 100\n"
TENSORRT, RTX = api_of(fake_tensorrt("10.3.0")), api_of(fake_tensorrt("1.7.1", "rtx"))
MEMORY = 96 * MIB


def smi(command: Sequence[str]) -> str | None:
    return SMI if "memory.free" in " ".join(command) else None


def nothing(command: Sequence[str]) -> str | None:
    return None


@pytest.fixture(autouse=True)
def without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the CUDA of the machine that it runs on."""
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is a Jetson whose chip nobody has listed yet."""
    board = Jetson(
        model="Jetson Next", l4t=None, jetpack=None, power_mode=None, cma_total_bytes=None, cma_free_bytes=None
    )
    found = replace(probe(tool=nothing), jetson=board)
    monkeypatch.setattr(device_module, "probe", lambda *, tool: found)


def put_cuda(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    return install(monkeypatch, fake_cuda(memory_bytes=MEMORY, **settings))


def test_a_build_is_for_the_gpu_that_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    put_cuda(monkeypatch, capability=(8, 6), num_devices=2)
    device = find_device(TENSORRT, None, planning=False, tool=smi)
    assert (device.name, device.compute_capability, device.doubt) == ("Fake GPU", (8, 6), "")
    assert device.room.device_bytes == MEMORY


def test_without_cuda_python_nvidia_smi_is_believed_and_that_is_said() -> None:
    device = find_device(TENSORRT, None, planning=False, tool=smi)
    assert (device.name, device.compute_capability) == ("NVIDIA GeForce RTX 4090", (8, 9))
    assert device.room.device_bytes == 20480 * MIB
    assert "CUDA may take another: pip install cuda-python" in device.doubt


def test_a_plan_takes_no_memory_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = put_cuda(monkeypatch)
    assert find_device(TENSORRT, None, planning=True, tool=smi).compute_capability == (8, 9)
    assert not cuda.calls
    assert find_device(TENSORRT, None, planning=True, tool=nothing).name == "Fake GPU"


def test_a_gpu_that_cuda_cannot_reach_is_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = put_cuda(monkeypatch)
    cuda.fail["cudaGetDeviceCount"] = cudaError_t.cudaErrorInsufficientDriver
    with pytest.raises(DeviceError, match=r"no NVIDIA GPU was found here \(there is no NVIDIA driver"):
        find_device(TENSORRT, None, planning=False, tool=smi)
    assert find_device(TENSORRT, None, planning=True, tool=smi).compute_capability == (8, 9)


@pytest.mark.usefixtures("jetson")
@pytest.mark.parametrize("planning", [True, False])
def test_an_unknown_jetson_is_asked_through_cuda(monkeypatch: pytest.MonkeyPatch, planning: bool) -> None:
    cuda = put_cuda(monkeypatch, capability=(11, 3))
    properties = cuda.cudaGetDeviceProperties(0)[1]
    properties.integrated = 1
    monkeypatch.setattr(cuda, "cudaGetDeviceProperties", lambda index: (cudaError_t.cudaSuccess, properties))
    device = find_device(TENSORRT, None, planning=planning, tool=nothing)
    assert (device.compute_capability, device.is_jetson) == ((11, 3), True)
    assert (device.room.device_bytes, device.room.shared) == (None, True)


@pytest.mark.usefixtures("jetson")
def test_an_unknown_jetson_without_cuda_python_stays_unknown() -> None:
    device = find_device(TENSORRT, None, planning=False, tool=nothing)
    assert (device.name, device.compute_capability) == ("Jetson Next", None)


def test_without_a_gpu_only_rtx_builds_and_only_for_a_named_one() -> None:
    with pytest.raises(DeviceError, match="no NVIDIA GPU was found here"):
        find_device(TENSORRT, None, planning=False, tool=nothing)
    with pytest.raises(DeviceError, match="name one with --compute-capability, such as"):
        find_device(RTX, None, planning=False, tool=nothing)
    with pytest.raises(UsageError, match="only TensorRT-RTX builds for another"):
        find_device(TENSORRT, "8.9", planning=False, tool=nothing)
    named = find_device(RTX, "8.9", planning=False, tool=nothing)
    assert (named.compute_capability, named.is_here, named.room.device_bytes) == ((8, 9), False, None)


def test_a_plan_needs_no_gpu_and_no_library() -> None:
    device = find_device(None, None, planning=True, tool=nothing)
    assert (device.compute_capability, device.capability_text) == (None, "?")
    assert find_device(None, "10.0", planning=True, tool=nothing).compute_capability == (10, 0)


def test_naming_the_device_that_is_here_is_fine() -> None:
    assert find_device(TENSORRT, "8.9", planning=False, tool=smi).is_here


@pytest.mark.parametrize("text", ["8", "sm_89", "8.90", "", "8.x"])
def test_a_compute_capability_is_two_numbers(text: str) -> None:
    with pytest.raises(UsageError, match=r"two numbers such as 8\.9"):
        parse_capability(text)
