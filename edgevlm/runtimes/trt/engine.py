"""An engine on its device: contexts for every profile that is used, bound by name, computing in shared memory.

A context is bound again only where a shape, an address or the workspace changed, and counts such changes: whoever
captured its work knows by ``version`` whether that still holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.core.errors import EdgeVLMError, IntegrityError, UnsupportedError, UsageError
from edgevlm.runtimes.session import Float
from edgevlm.runtimes.trt.api import Context, Engine, EngineTensor, Shape
from edgevlm.runtimes.trt.cuda import CudaDevice, Staging

FREE = -1  # a size that changes from call to call, in TensorRT's words
BFLOAT16 = "bfloat16"
HOST_TYPES: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "float32": np.float32,
        "float16": np.float16,
        BFLOAT16: np.uint16,  # which NumPy lacks: its bits
        "int64": np.int64,
        "int32": np.int32,
    }
)


@dataclass(frozen=True)
class Bounds:
    """What one profile takes: of every input with free sizes, the smallest and the largest shape."""

    smallest: Mapping[str, Shape]
    largest: Mapping[str, Shape]

    def hold(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these ``shapes`` lie inside."""
        return all(_between(low, shapes[name], self.largest[name]) for name, low in self.smallest.items())

    @property
    def size(self) -> int:
        """Numbers in the largest inputs: engines are the faster the less their profile spans."""
        return sum(prod(shape) for shape in self.largest.values())


class ProfileContext:
    """An execution context for one profile; ``repeats``: it is to run many times with the same shapes."""

    def __init__(self, device: CudaDevice, engine: Engine, profile: int, *, repeats: bool) -> None:
        self._device, self._needed = device, engine.memory_of_profile(profile)
        device.workspace.reserve(self._needed)
        self._context: Context = engine.create_context(own_memory=self._needed == 0, repeats=repeats)
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._workspace: tuple[int, int] | None = None  # its version and address
        self.version, self.has_run = 0, False
        if profile or engine.num_profiles > 1:
            self._context.set_profile(profile, device.stream.number)
            device.stream.wait()

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Let inputs have these ``shapes`` and tensors lie at these ``addresses``; others stay as they were."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._context.set_shape(name, shape)
                self._shapes[name] = shape
                self._changed()
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._context.set_address(name, address)
                self._addresses[name] = address
                self._changed()
        self._use_workspace()

    def shape(self, name: str) -> Shape:
        """The shape of ``name`` for the shapes that are bound.  Raises UnsupportedError where only a run would tell."""
        shape = self._context.shape(name)
        if any(size < 0 for size in shape):
            raise UnsupportedError(f"the size of {name} depends on what is computed, which no runtime here can follow")
        return shape

    def run(self) -> None:
        """Put one run on the device's stream.  Raises what ``Context.enqueue`` raises."""
        self._context.enqueue(self._device.stream.number)
        self.has_run = True

    def _use_workspace(self) -> None:
        workspace = self._device.workspace
        workspace.reserve(self._needed)  # it is there, unless another's growth failed and took it
        if self._needed == 0 or self._workspace == (workspace.version, workspace.address):
            return
        self._context.set_memory(workspace.address, workspace.num_bytes)
        self._workspace = (workspace.version, workspace.address)
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self.has_run = False


class OpenEngine:
    """A part's ``engine`` on ``device``; ``name`` it in messages."""

    def __init__(self, device: CudaDevice, engine: Engine, name: str) -> None:
        self.device, self.name = device, name
        self.tensors: Mapping[str, EngineTensor] = {tensor.name: tensor for tensor in engine.tensors()}
        self._engine: Engine | None = engine
        self._contexts: dict[tuple[int, bool], ProfileContext] = {}  # several may share a profile, from TensorRT 10 on
        self._bounds = _bounds(engine, self.tensors.values())
        device.acquire()

    @property
    def captures_itself(self) -> bool:
        """Whether its contexts make CUDA graphs of their own, so that nobody else should."""
        return self._opened().api.captures_itself

    def sizes(self, name: str, axis: int) -> tuple[int, ...]:
        """The largest size of the input ``name`` along ``axis`` in each profile, or its only one."""
        fixed = self.tensors[name].shape[axis]
        if fixed != FREE:
            return (fixed,)
        return tuple(bounds.largest[name][axis] for bounds in self._bounds)

    def context(self, shapes: Mapping[str, Shape], *, repeats: bool = False) -> ProfileContext:
        """The context of the narrowest profile that takes inputs of these ``shapes``, made where it is the first use.

        What ``repeats`` has one of its own, even where a profile serves both: other shapes in between would undo it.

        Raises UnsupportedError where no profile does, DoesNotFitError where its memory does not fit.
        """
        fitting = [index for index, bounds in enumerate(self._bounds) if bounds.hold(shapes)]
        if not fitting:
            told = ", ".join(f"{name} {_by(shape)}" for name, shape in self._free(shapes).items())
            built = "; ".join(_told(bounds) for bounds in self._bounds)
            raise UnsupportedError(
                f"{self.name}: the engine was not built for {told}; it takes {built}: build it with a larger --batch, "
                "or export for these sizes"
            )
        profile = min(fitting, key=lambda index: self._bounds[index].size)
        if (profile, repeats) not in self._contexts:
            made = ProfileContext(self.device, self._opened(), profile, repeats=repeats)
            self._contexts[profile, repeats] = made
        return self._contexts[profile, repeats]

    def close(self) -> None:
        """Give contexts and engine back; a second time does nothing."""
        engine, self._engine = self._engine, None
        self._contexts.clear()
        if engine is not None:
            del engine
            self.device.release()

    def _opened(self) -> Engine:
        if self._engine is None:
            raise closed()
        return self._engine

    def _free(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Those of ``shapes`` that a profile decides about, caches of many layers told once."""
        free = {name: shape for name, shape in shapes.items() if name in self._bounds[0].smallest}
        kept = {shape: name for name, shape in reversed(free.items())}
        return {name: shape for name, shape in free.items() if kept[shape] == name}


class HostGraph:
    """An engine that is fed from the host and read back to it, for parts that keep nothing on the device."""

    def __init__(self, engine: OpenEngine) -> None:
        self._engine: OpenEngine | None = engine
        self._rooms: dict[str, Staging] = {}

    @property
    def engine(self) -> OpenEngine:
        """Raises UsageError once it is closed."""
        if self._engine is None:
            raise closed()
        return self._engine

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[Float]:
        """The ``outputs`` in float32, which are the caller's to keep; all others are computed and left."""
        engine = self.engine
        engine.device.enter()
        try:
            shapes = self._put_on_stream(engine, feeds, outputs)
            engine.device.stream.wait()
        except BaseException:
            with suppress(EdgeVLMError):
                engine.device.stream.wait()  # nothing may be on its way when the memory is used again
            raise
        return [self._read(name, shapes[name]) for name in outputs]

    def close(self) -> None:
        """Give memory and engine back."""
        engine, self._engine = self._engine, None
        for room in self._rooms.values():
            room.close()
        self._rooms.clear()
        if engine is not None:
            engine.close()

    def _put_on_stream(
        self, engine: OpenEngine, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> dict[str, Shape]:
        """Upload, run and download; returns the shape of every output."""
        shapes = {name: array.shape for name, array in feeds.items()}
        context = engine.context(shapes)
        context.bind(shapes, {})
        results = {name: context.shape(name) for name, tensor in engine.tensors.items() if not tensor.is_input}
        rooms = {name: self._filled(name, array) for name, array in feeds.items()}
        rooms |= {name: self._room(name, shape) for name, shape in results.items()}
        context.bind({}, {name: room.address for name, room in rooms.items()})
        context.run()
        for name in outputs:
            rooms[name].download(self._num_bytes(name, results[name]))
        return results

    def _filled(self, name: str, array: NDArray[Any]) -> Staging:
        room, tensor = self._room(name, array.shape), self.engine.tensors[name]
        write_numbers(room.view(array.shape, HOST_TYPES[tensor.dtype]), tensor.dtype, array)
        room.upload(self._num_bytes(name, array.shape))
        return room

    def _read(self, name: str, shape: Shape) -> Float:
        dtype = self.engine.tensors[name].dtype
        return read_numbers(self._rooms[name].view(shape, HOST_TYPES[dtype]), dtype)

    def _room(self, name: str, shape: Shape) -> Staging:
        """Room for ``name``, kept from the last time where it is large enough."""
        needed, room = self._num_bytes(name, shape), self._rooms.get(name)
        if room is None or room.num_bytes < needed:
            if room is not None:
                del self._rooms[name]
                room.close()
            room = self.engine.device.staging(needed, f"{self.engine.name}'s {name}")
            self._rooms[name] = room
        return room

    def _num_bytes(self, name: str, shape: Shape) -> int:
        return prod(shape) * item_bytes(self.engine, name)


def item_bytes(engine: OpenEngine, name: str) -> int:
    """Bytes of one number of the tensor ``name``.  Raises IntegrityError for a type that no part has outside."""
    dtype = engine.tensors[name].dtype
    if dtype not in HOST_TYPES:
        raise IntegrityError(f"{engine.name}: {name} is {dtype}, expected one of {', '.join(HOST_TYPES)}")
    return np.dtype(HOST_TYPES[dtype]).itemsize


def write_numbers(view: NDArray[Any], dtype: str, array: NDArray[Any]) -> None:
    """``array`` into ``view``, in the type that a tensor of ``dtype`` has on the host."""
    if dtype == BFLOAT16:
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        view[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even
    else:
        view[...] = array


def read_numbers(view: NDArray[Any], dtype: str) -> Float:
    """A copy of ``view`` in float32."""
    if dtype == BFLOAT16:
        return (view.astype(np.uint32) << 16).view(np.float32)
    return np.array(view, np.float32)


def closed() -> UsageError:
    """What a call after ``close`` gets."""
    return UsageError("this session is closed: open the bundle again")


def _bounds(engine: Engine, tensors: Any) -> tuple[Bounds, ...]:
    free = [tensor.name for tensor in tensors if tensor.is_input and FREE in tensor.shape]
    found = []
    for profile in range(engine.num_profiles):
        shapes = {name: engine.profile_shape(name, profile) for name in free}
        smallest, largest = ({name: shape[which] for name, shape in shapes.items()} for which in (0, 2))
        found.append(Bounds(smallest, largest))
    return tuple(found)


def _between(low: Shape, shape: Shape, high: Shape) -> bool:
    return len(low) == len(shape) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


def _told(bounds: Bounds) -> str:
    """A profile in words, caches of many layers once."""
    ranges = {name: (bounds.smallest[name], bounds.largest[name]) for name in bounds.smallest}
    seen = {span: name for name, span in reversed(ranges.items())}
    told = [f"{name} {_by(low)} to {_by(high)}" for (low, high), name in reversed(seen.items())]
    return ", ".join(told) or "fixed sizes"


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape))
