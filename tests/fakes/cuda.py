# ruff: noqa: N801, N802, N815 -- the vendor's names
"""The CUDA runtime of cuda-python over host memory: copies really copy, and what is captured runs when it is launched.

``fake_cuda`` makes the module that ``edgevlm.runtimes.trt.cuda`` imports; ``install`` puts it where it is looked for.
A fake engine asks this module's ``CAPTURING``: while it is a list, work is appended to it and not done.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

CAPTURING: list[Callable[[], None]] | None = None


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


OK = (cudaError_t.cudaSuccess,)


@dataclass
class Handle:
    """A stream or a graph; other libraries call it by its number."""

    number: int
    work: list[Callable[[], None]] = field(default_factory=list)

    def __int__(self) -> int:
        return self.number


class FakeCuda(ModuleType):
    """One GPU of ``memory_bytes`` whose memory is the host's.

    ``device`` and ``pinned`` hold what is allocated, by address; ``calls`` counts all, ``freed`` says what was given
    back.  ``fail[name]`` is an error that the function gives from now on.
    """

    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1
    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode

    def __init__(self, name: str, *, memory_bytes: int, num_devices: int, capability: tuple[int, int]) -> None:
        super().__init__(name)
        self.memory_bytes, self.num_devices, self.capability = memory_bytes, num_devices, capability
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.handles: dict[int, Handle] = {}
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, cudaError_t] = {}
        self.freed: list[int] = []
        self.misuse: list[str] = []  # what was given back twice, or never was anybody's
        self.peak_bytes = 0
        self.current = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("cuda") and callable(found) and not isinstance(found, type):
            return self._counted(name, found)
        return found

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            error = self.fail.get(name)
            return function(*arguments) if error is None else (error, None)

        return call

    @property
    def used_bytes(self) -> int:
        return sum(ctypes.sizeof(buffer) for buffer in self.device.values())

    # -- device ---------------------------------------------------------------------------------------------

    def cudaGetDeviceCount(self) -> Any:
        return (cudaError_t.cudaErrorNoDevice, 0) if not self.num_devices else (*OK, self.num_devices)

    def cudaSetDevice(self, device: int) -> Any:
        self.current = device
        return OK if device < self.num_devices else (cudaError_t.cudaErrorInvalidDevice,)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = self.capability
        name = b"Fake GPU"
        return *OK, SimpleNamespace(name=name, major=major, minor=minor, totalGlobalMem=self.memory_bytes, integrated=0)

    def cudaRuntimeGetVersion(self) -> Any:
        return *OK, 12060

    def cudaDriverGetVersion(self) -> Any:
        return *OK, 12080

    def cudaMemGetInfo(self) -> Any:
        return *OK, self.memory_bytes - self.used_bytes, self.memory_bytes

    def cudaGetLastError(self) -> Any:
        return OK

    def cudaGetErrorName(self, error: cudaError_t) -> Any:
        return *OK, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> Any:
        return *OK, b"what the driver says about it"

    # -- memory ---------------------------------------------------------------------------------------------

    def cudaMalloc(self, size: int) -> Any:
        if CAPTURING is not None:
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        if self.used_bytes + size > self.memory_bytes:
            return cudaError_t.cudaErrorMemoryAllocation, None
        address = _allocate(self.device, size)
        ctypes.memset(address, 0xFF, size)  # not-a-numbers: nobody may count on zeros
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return *OK, address

    def cudaFree(self, address: int) -> Any:
        return self._free(self.device, address)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return *OK, _allocate(self.pinned, size)

    def cudaFreeHost(self, address: int) -> Any:
        return self._free(self.pinned, address)

    def _free(self, held: dict[int, Any], address: int) -> Any:
        if held.pop(address, None) is None:
            self.misuse.append(f"memory at {address}")
            return (cudaError_t.cudaErrorInvalidValue,)
        self.freed.append(address)
        return OK

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: cudaMemcpyKind, stream: Handle) -> Any:
        self._check(target, source, count, kind)
        return self._do(lambda: ctypes.memmove(target, source, count))

    def cudaMemcpy2DAsync(
        self, target: int, tpitch: int, source: int, spitch: int, width: int, height: int, kind: Any, stream: Handle
    ) -> Any:
        if width > tpitch or width > spitch:
            return (cudaError_t.cudaErrorInvalidValue,)
        self._check(target, source, 1, kind)
        last_target, last_source = target + (height - 1) * tpitch, source + (height - 1) * spitch
        self._check(last_target, last_source, width, kind)

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * tpitch, source + row * spitch, width)

        return self._do(copy)

    def cudaMemset2DAsync(self, target: int, pitch: int, value: int, width: int, height: int, stream: Handle) -> Any:
        if width > pitch:
            return (cudaError_t.cudaErrorInvalidValue,)
        last = target + (height - 1) * pitch
        assert _holds(self.device, target, last + width - target), "memory that is not there is set"

        def fill() -> None:
            for row in range(height):
                ctypes.memset(target + row * pitch, value, width)

        return self._do(fill)

    def _check(self, target: int, source: int, count: int, kind: cudaMemcpyKind) -> None:
        """Both ends of a copy lie in memory that was allocated and not freed, on the side that ``kind`` says."""
        to_host, from_host = kind.name.endswith("ToHost"), kind.name.startswith("cudaMemcpyHost")
        assert _holds(self.pinned if to_host else self.device, target, count), f"{kind.name}: no such target"
        assert _holds(self.pinned if from_host else self.device, source, count), f"{kind.name}: no such source"

    def _do(self, work: Callable[[], Any]) -> Any:
        if CAPTURING is None:
            work()
        else:
            CAPTURING.append(work)
        return OK

    # -- streams and graphs ---------------------------------------------------------------------------------

    def _handle(self) -> Handle:
        handle = Handle(1000 + len(self.handles) + self.calls.total())
        self.handles[handle.number] = handle
        return handle

    def _destroy(self, handle: Handle) -> Any:
        if self.handles.pop(handle.number, None) is None:
            self.misuse.append(f"handle {handle.number}")
            return (cudaError_t.cudaErrorInvalidValue,)
        return OK

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return *OK, self._handle()

    def cudaStreamSynchronize(self, stream: Handle) -> Any:
        return OK if CAPTURING is None else (cudaError_t.cudaErrorStreamCaptureUnsupported,)

    def cudaStreamDestroy(self, stream: Handle) -> Any:
        return self._destroy(stream)

    def cudaStreamBeginCapture(self, stream: Handle, mode: cudaStreamCaptureMode) -> Any:
        global CAPTURING
        CAPTURING = []
        return OK

    def cudaStreamEndCapture(self, stream: Handle) -> Any:
        global CAPTURING
        work, CAPTURING = CAPTURING, None
        if work is None:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        graph = self._handle()
        graph.work = work
        return *OK, graph

    def cudaGraphInstantiateWithFlags(self, graph: Handle, flags: int) -> Any:
        executable = self._handle()
        executable.work = list(graph.work)
        return *OK, executable

    def cudaGraphLaunch(self, graph: Handle, stream: Handle) -> Any:
        assert graph.number in self.handles, "a graph that was destroyed is launched"
        for work in graph.work:
            self._do(work)
        return OK

    def cudaGraphDestroy(self, graph: Handle) -> Any:
        return self._destroy(graph)

    def cudaGraphExecDestroy(self, graph: Handle) -> Any:
        return self._destroy(graph)


def fake_cuda(*, memory_bytes: int = 1 << 30, num_devices: int = 1, capability: tuple[int, int] = (8, 7)) -> FakeCuda:
    """A CUDA runtime with one GPU, an Orin's by its compute capability."""
    return FakeCuda("cuda.bindings.runtime", memory_bytes=memory_bytes, num_devices=num_devices, capability=capability)


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda, *, layout: str = "cuda.bindings.runtime") -> FakeCuda:
    """Let ``fake`` be what an import of the CUDA runtime finds, in the new layout or as ``cuda.cudart``."""
    names = ("cuda.bindings.runtime", "cuda.cudart")
    packages = ("cuda", "cuda.bindings")
    for name in (*packages, *names):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]  # Python's way to say: not there
    for package in packages[: 1 + layout.count(".bindings")]:
        module = ModuleType(package)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setitem(sys.modules, layout, fake)
    return fake


def _allocate(held: dict[int, Any], size: int) -> int:
    """A multiple of 256, with room around it that is never the neighbour's."""
    buffer = (ctypes.c_uint8 * (size + 256))()
    address = -(-ctypes.addressof(buffer) // 256) * 256
    sized = (ctypes.c_uint8 * size).from_address(address)
    sized._keeps = buffer  # type: ignore[attr-defined]
    held[address] = sized
    return address


def _holds(held: dict[int, Any], address: int, count: int) -> bool:
    return any(start <= address and address + count <= start + ctypes.sizeof(one) for start, one in held.items())
