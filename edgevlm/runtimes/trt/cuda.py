"""CUDA through NVIDIA's own cuda-python: memory, streams and captured graphs, each given back exactly once.

Every call's error code is looked at, and told in one line.  ``DeviceMemory`` and ``PinnedMemory`` are the two kinds of
memory, and ``Staging`` is the way between them: the one place that would change where a Jetson's GPU is to read host
memory itself.  Checked against the signatures of cuda-python 12.9, 13.0 and 13.5 and against a fake over host memory;
not run on hardware yet.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgevlm.core.errors import DeviceError, DoesNotFitError, EdgeVLMError, MissingLibraryError, UnsupportedError
from edgevlm.core.optional import is_installed

logger = logging.getLogger(__name__)

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # cuda-python's layout today, and the one before it
FIX = "pip install cuda-python (beside CUDA 12, as on JetPack 6: pip install 'cuda-python<13')"
ALIGNMENT = 256  # bytes; TensorRT wants every address to be a multiple
OUT_OF_MEMORY = ("cudaErrorMemoryAllocation",)
NO_DEVICE = {  # what to do about it
    "cudaErrorNoDevice": "no NVIDIA GPU is visible here (CUDA_VISIBLE_DEVICES? a container without --gpus all?)",
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver, or one older than this cuda-python: update the driver",
    "cudaErrorStubLibrary": "only a stub of the NVIDIA driver is there: install the driver",
    "cudaErrorSystemDriverMismatch": "the NVIDIA driver was updated while it ran: restart the machine",
    "cudaErrorDevicesUnavailable": "the GPU is busy or reserved: end what uses it",
    "cudaErrorInitializationError": "the NVIDIA driver did not start: see `nvidia-smi`",
    "cudaErrorInvalidDevice": "there is no GPU of that number: see `nvidia-smi -L`",
}

Closing = TypeVar("Closing", bound="_Owned")


@dataclass(frozen=True)
class Cuda:
    """The CUDA runtime as cuda-python gives it; ``call`` is the only way to it."""

    module: Any

    def call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """What the function ``name`` gives beside its error code: nothing, one value or several.

        ``what`` it is for, in words for people.  Raises DoesNotFitError where memory is short, DeviceError where there
        is no GPU or it failed.
        """
        status, *values = getattr(self.module, name)(*arguments)
        if int(status) != 0:
            raise self._error(name, status, what)
        return tuple(values) if len(values) > 1 else values[0] if values else None

    def _error(self, name: str, status: Any, what: str) -> EdgeVLMError:
        self.module.cudaGetLastError()  # so that the next call does not report this one's again
        code, text = (self._said(ask, status) for ask in ("cudaGetErrorName", "cudaGetErrorString"))
        about = f"{what}: " if what else ""
        if code in OUT_OF_MEMORY:
            return DoesNotFitError(
                f"{about}not enough GPU memory{self._free()}; close other programs, or take a smaller model, precision "
                "(int4), image size or batch"
            )
        if code in NO_DEVICE:
            return DeviceError(f"{about}{NO_DEVICE[code]} ({code})")
        return DeviceError(f"{about}CUDA failed in {name}: {text} ({code})")

    def _said(self, ask: str, status: Any) -> str:
        _, text = getattr(self.module, ask)(status)
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)

    def _free(self) -> str:
        status, *sizes = self.module.cudaMemGetInfo()
        return f" ({sizes[0] / 2**20:,.0f} of {sizes[1] / 2**20:,.0f} MiB are free)" if int(status) == 0 else ""


def load_cuda() -> Cuda:
    """The CUDA runtime.  Raises MissingLibraryError without cuda-python, or with one that does not load."""
    for name in MODULES:
        try:
            return Cuda(_imported(name))
        except ModuleNotFoundError as error:
            logger.debug("%s: %s", name, error)
        except (ImportError, OSError) as error:
            raise MissingLibraryError("cuda-python", FIX, f"is installed but does not load ({error})") from error
    reason = "is installed but has no runtime of CUDA" if is_installed("cuda") else "is not installed"
    raise MissingLibraryError("cuda-python", FIX, reason)


def _imported(name: str) -> ModuleType:
    return import_module(name)


# -- what is owned --------------------------------------------------------------------------------------------


class _Owned:
    """Something of the vendor's that must be given back: by ``close``, at the end of ``with``, or when forgotten."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = weakref.finalize(self, give_back)
        self._give_back.atexit = False  # the driver gives everything back when the process ends, and may be gone first

    @property
    def is_closed(self) -> bool:
        return not self._give_back.alive

    def close(self) -> None:
        """Give it back; a second time does nothing."""
        self._give_back()

    def __enter__(self: Closing) -> Closing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _given_back(cuda: Cuda, name: str, handle: Any) -> Callable[[], None]:
    """What gives ``handle`` back; a device that is lost cannot be asked to, which is no error of its own."""

    def give_back() -> None:
        try:
            cuda.call(name, handle)
        except EdgeVLMError as error:
            logger.debug("%s", error)

    return give_back


class DeviceMemory(_Owned):
    """``num_bytes`` on the GPU at ``address``, a multiple of 256; ``what`` they are for, in words for people.

    Raises DoesNotFitError where there is no room.
    """

    def __init__(self, cuda: Cuda, num_bytes: int, what: str) -> None:
        self.num_bytes = num_bytes
        told = f"{what}, {num_bytes / 2**20:,.1f} MiB"
        self.address = int(cuda.call("cudaMalloc", max(num_bytes, ALIGNMENT), what=told))
        super().__init__(_given_back(cuda, "cudaFree", self.address))


class PinnedMemory(_Owned):
    """``num_bytes`` of host memory that the GPU copies from and to without a detour.

    ``bytes`` is a NumPy view of them, which nobody may hold beyond ``close``.  Raises DoesNotFitError.
    """

    def __init__(self, cuda: Cuda, num_bytes: int, what: str) -> None:
        self.num_bytes = num_bytes
        told = f"{what}, {num_bytes / 2**20:,.1f} MiB of pinned host memory"
        flags = cuda.module.cudaHostAllocDefault
        self.address = int(cuda.call("cudaHostAlloc", max(num_bytes, ALIGNMENT), flags, what=told))
        super().__init__(_given_back(cuda, "cudaFreeHost", self.address))
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def view(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The first bytes as numbers; nobody may hold the view beyond ``close``."""
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self.bytes[:count].view(dtype).reshape(shape)


class CapturedGraph(_Owned):
    """Work that was captured once and is given to a stream as one piece."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda, self._handle = cuda, handle
        super().__init__(_given_back(cuda, "cudaGraphExecDestroy", handle))

    def launch(self, stream: Stream) -> None:
        self._cuda.call("cudaGraphLaunch", self._handle, stream.handle, what="a captured step")


class Stream(_Owned):
    """One queue of work for the GPU, done in order; ``number`` is what other libraries call it by."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cudaStreamCreateWithFlags", cuda.module.cudaStreamNonBlocking, what="a CUDA stream")
        self.number = int(self.handle)
        super().__init__(_given_back(cuda, "cudaStreamDestroy", self.handle))

    def to_device(self, target: int, source: int, num_bytes: int) -> None:
        """Copy from the host address ``source``, which must stay as it is until the copy is done."""
        self._copy(target, source, num_bytes, "cudaMemcpyHostToDevice")

    def to_host(self, target: int, source: int, num_bytes: int) -> None:
        """Copy to the host address ``target``, which is filled once the stream has been waited for."""
        self._copy(target, source, num_bytes, "cudaMemcpyDeviceToHost")

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, count: int) -> None:
        """``count`` pieces of ``width`` bytes from one place on the GPU to another; pitches are bytes from one on."""
        kind = self._cuda.module.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._cuda.call(
            "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, count, kind, self.handle
        )

    def zero_rows(self, target: int, pitch: int, width: int, count: int) -> None:
        """Set ``count`` pieces of ``width`` bytes on the GPU to zero; ``pitch`` bytes from one on to the next."""
        self._cuda.call("cudaMemset2DAsync", target, pitch, 0, width, count, self.handle)

    def wait(self) -> None:
        """Come back once everything is done.  Raises DeviceError for whatever failed on the way."""
        self._cuda.call("cudaStreamSynchronize", self.handle, what="the GPU's work")

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """What ``work`` gives to this stream, kept and not done.  Raises DeviceError for work that cannot be kept."""
        modes = self._cuda.module.cudaStreamCaptureMode
        self._cuda.call("cudaStreamBeginCapture", self.handle, modes.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            self._abandon()
            raise
        graph = self._cuda.call("cudaStreamEndCapture", self.handle, what="capturing a step")
        try:
            return CapturedGraph(self._cuda, self._instantiated(graph))
        finally:
            self._cuda.call("cudaGraphDestroy", graph)

    def _instantiated(self, graph: Any) -> Any:
        """The one spelling that cuda-python 11 to 13 share goes first; the other one lost two arguments in 12."""
        if hasattr(self._cuda.module, "cudaGraphInstantiateWithFlags"):
            return self._cuda.call("cudaGraphInstantiateWithFlags", graph, 0, what="capturing a step")
        return self._cuda.call("cudaGraphInstantiate", graph, 0, what="capturing a step")

    def _abandon(self) -> None:
        """End a capture whose work failed; the stream can be used again."""
        status, *graph = self._cuda.module.cudaStreamEndCapture(self.handle)
        self._cuda.module.cudaGetLastError()
        if int(status) == 0 and graph:
            self._cuda.module.cudaGraphDestroy(graph[0])

    def _copy(self, target: int, source: int, num_bytes: int, direction: str) -> None:
        kind = getattr(self._cuda.module.cudaMemcpyKind, direction)
        self._cuda.call("cudaMemcpyAsync", target, source, num_bytes, kind, self.handle)


# -- the device -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a measurement must say about a GPU; versions as CUDA counts them, 12060 being 12.6."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    is_integrated: bool
    runtime_version: int
    driver_version: int


class CudaDevice:
    """One GPU with one stream and one workspace, shared by all that is opened on it.

    Who opens something calls ``acquire``, and ``release`` when it is closed: with the last one, stream and workspace
    are given back.  Raises DeviceError without such a GPU, MissingLibraryError without cuda-python.
    """

    def __init__(self, index: int = 0) -> None:
        self.cuda, self.index, self._num_users = load_cuda(), index, 0
        self._stream: Stream | None = None
        self.workspace = Workspace(self.cuda)
        count = self.cuda.call("cudaGetDeviceCount")
        if index >= count:
            raise DeviceError(f"there is no GPU number {index}: {count} found (see `nvidia-smi -L`)")
        self.enter()

    @property
    def stream(self) -> Stream:
        """The one queue; its first user makes it."""
        if self._stream is None:
            self._stream = Stream(self.cuda)
        return self._stream

    @cached_property
    def facts(self) -> DeviceFacts:
        call, index = self.cuda.call, self.index
        properties = call("cudaGetDeviceProperties", index)
        name = properties.name.decode("utf-8", "replace") if isinstance(properties.name, bytes) else properties.name
        return DeviceFacts(
            name=str(name).rstrip("\0"),
            compute_capability=(int(properties.major), int(properties.minor)),
            memory_bytes=int(properties.totalGlobalMem),
            is_integrated=bool(properties.integrated),
            runtime_version=int(call("cudaRuntimeGetVersion")),
            driver_version=int(call("cudaDriverGetVersion")),
        )

    def enter(self) -> None:
        """Let this thread's calls go to this GPU: every thread begins with the first one."""
        self.cuda.call("cudaSetDevice", self.index)

    def acquire(self) -> None:
        self._num_users += 1

    def release(self) -> None:
        self._num_users -= 1
        if self._num_users > 0:
            return
        self.workspace.close()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def memory(self, num_bytes: int, what: str) -> DeviceMemory:
        """Room on this GPU."""
        return DeviceMemory(self.cuda, num_bytes, what)

    def staging(self, num_bytes: int, what: str) -> Staging:
        """Room on this GPU with a counterpart on the host."""
        return Staging(self, num_bytes, what)


class Workspace:
    """Scratch memory for engines that run one after the other: as large as the one that needs most.

    ``version`` changes with ``address``: what was captured with another one is void.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.version = cuda, 0
        self._memory: DeviceMemory | None = None

    @property
    def address(self) -> int:
        return self._memory.address if self._memory else 0

    @property
    def num_bytes(self) -> int:
        return self._memory.num_bytes if self._memory else 0

    def reserve(self, num_bytes: int) -> None:
        """Let there be ``num_bytes``; call it while nothing runs.

        Raises DoesNotFitError, and then there is as much as before.
        """
        if num_bytes <= self.num_bytes:
            return
        try:
            larger = self._room(num_bytes)
        except DoesNotFitError:
            larger = self._instead(num_bytes)
        self.close()
        self._memory = larger

    def close(self) -> None:
        memory, self._memory = self._memory, None
        self.version += 1
        if memory is not None:
            memory.close()

    def _instead(self, num_bytes: int) -> DeviceMemory:
        """So much memory where there is no room for both: the old goes first, and comes back where that is no help."""
        had = self.num_bytes
        self.close()
        try:
            return self._room(num_bytes)
        except DoesNotFitError:
            if had:
                self._memory = self._room(had)
            raise

    def _room(self, num_bytes: int) -> DeviceMemory:
        return DeviceMemory(self._cuda, num_bytes, "the engines' workspace")


class Staging:
    """A tensor's way to the GPU and back: pinned memory here, as much memory there, and the copies between them.

    Where host and GPU share one memory (a Jetson) the copies could be spared, by mapping the pinned memory with
    ``cudaHostGetDevicePointer`` and letting ``upload`` and ``download`` do nothing.  That is left until it can be
    measured: the GPU then reads past its own cache.
    """

    def __init__(self, device: CudaDevice, num_bytes: int, what: str) -> None:
        self._device, self.num_bytes = device, num_bytes
        self._pinned = PinnedMemory(device.cuda, num_bytes, what)
        try:
            self._memory = device.memory(num_bytes, what)
        except BaseException:
            self._pinned.close()
            raise

    @property
    def address(self) -> int:
        """Where an engine finds the tensor."""
        return self._memory.address

    @property
    def host_address(self) -> int:
        """Where an engine finds a tensor that it reads on the host."""
        return self._pinned.address

    def view(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The host's side; to be written before ``upload`` and read after ``download`` and waiting."""
        return self._pinned.view(shape, dtype)

    def upload(self, num_bytes: int | None = None) -> None:
        """Put the first ``num_bytes``, or all, on the stream to the GPU."""
        self._device.stream.to_device(self._memory.address, self._pinned.address, num_bytes or self.num_bytes)

    def download(self, num_bytes: int | None = None) -> None:
        """Put the first ``num_bytes``, or all, on the stream to the host."""
        self._device.stream.to_host(self._pinned.address, self._memory.address, num_bytes or self.num_bytes)

    def close(self) -> None:
        self._memory.close()
        self._pinned.close()


def device_index(name: str | None) -> int:
    """The number in ``cuda:1``; 0 for None, ``cuda`` and ``gpu``.  Raises UnsupportedError for another device."""
    kind, _, number = (name or "cuda").lower().partition(":")
    if kind in ("cuda", "gpu") and (not number or (number.isascii() and number.isdigit())):
        return int(number or 0)
    raise UnsupportedError(f"TensorRT runs on the devices cuda, cuda:1, ..., not on {name!r}: leave --device out")
