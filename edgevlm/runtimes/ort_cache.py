"""The kv cache of a decoder on ONNX Runtime: a buffer that the graph fills in place, two that take turns, or a copy.

*Shared*: each key and value buffer is bound both as past and as present; the attention writes new rows behind the old
ones, so nothing is copied and rewinding is arithmetic.  *Grown*: the graph makes a new present of the past and the new
rows.  It writes into a buffer that lies ready and is read as the past next time, so the graph's own copy is the only
one; rewinding closes the gaps between the heads.  *Rows*: the graph gives the new rows alone, which are copied behind
the old ones.  It reads the whole buffer, so that is no longer than a bucket that the rows fit into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle.recipe import past_buckets
from edgevlm.core.optional import require
from edgevlm.runtimes.ort_devices import Device

Shape: TypeAlias = tuple[int, ...]


class Memory(Protocol):
    """Room for numbers of one type, on the host or on a device."""

    def bind(self, method: Callable[..., None], name: str, shape: Shape) -> None:
        """Let ``name`` be as many of the first numbers as ``shape`` says."""
        ...

    def read(self, count: int) -> NDArray[Any]:
        """The first ``count`` numbers."""
        ...

    def write(self, numbers: NDArray[Any]) -> None:
        """Put ``numbers`` at the beginning."""
        ...


class HostMemory:
    """Zeros; the system provides the memory as it is written."""

    def __init__(self, size: int, dtype: type[np.generic]) -> None:
        self._numbers = np.zeros(size, dtype)
        self._address, self._dtype = self._numbers.ctypes.data, dtype

    def bind(self, method: Callable[..., None], name: str, shape: Shape) -> None:
        method(name, "cpu", 0, self._dtype, shape, self._address)

    def read(self, count: int) -> NDArray[Any]:
        return self._numbers[:count]

    def write(self, numbers: NDArray[Any]) -> None:
        self._numbers[: numbers.size] = numbers.ravel()

    def put(self, rows: NDArray[Any], shape: Shape, start: int) -> None:
        """Put ``rows`` [B, K, T, head] at row ``start`` of each head, where the first numbers have this ``shape``."""
        self._numbers[: _count(shape)].reshape(shape)[:, :, start : start + rows.shape[2]] = rows


class DeviceMemory:
    """The same on a GPU; written from ONNX Runtime's documentation, not run on hardware yet."""

    def __init__(self, size: int, dtype: type[np.generic], device: Device) -> None:
        self._size, self._dtype, self._device = size, dtype, device
        self._value = require("onnxruntime").OrtValue.ortvalue_from_numpy(
            np.zeros(size, dtype), device.memory, device.index
        )

    def bind(self, method: Callable[..., None], name: str, shape: Shape) -> None:
        method(name, self._device.memory, self._device.index, self._dtype, shape, self._value.data_ptr())

    def read(self, count: int) -> NDArray[Any]:
        numbers: NDArray[Any] = self._value.numpy()
        return numbers[:count]

    def write(self, numbers: NDArray[Any]) -> None:
        whole = numbers.ravel()
        if numbers.size < self._size:
            whole = self._value.numpy()
            whole[: numbers.size] = numbers.ravel()
        self._value.update_inplace(whole)


class Cache(Protocol):
    """Keys and values of all layers."""

    def attach(self, binding: Any) -> None:
        """Bind what stays bound for good."""
        ...

    def before(self, binding: Any, start: int, end: int) -> None:
        """Bind what a run needs that appends the rows from ``start`` up to ``end``."""
        ...

    def after(self, end: int) -> None:
        """The run went well."""
        ...


class SharedCache:
    """One buffer ``[1, K, max_context, head]`` for each of ``names``, such as ``0.key``."""

    def __init__(self, names: Sequence[str], shape: Shape, memory: Callable[[int], Memory]) -> None:
        size = int(np.prod(shape, dtype=object))
        self._shape, self._buffers = shape, {name: memory(size) for name in names}

    def attach(self, binding: Any) -> None:
        for name, buffer in self._buffers.items():
            buffer.bind(binding.bind_input, f"past_key_values.{name}", self._shape)
            buffer.bind(binding.bind_output, f"present.{name}", self._shape)

    def before(self, binding: Any, start: int, end: int) -> None:
        """Nothing: the graph knows from the mask where the rows end."""

    def after(self, end: int) -> None:
        """Nothing: past and present are the same."""


class GrownCache:
    """Two buffers for each of ``names``: the past, and the one that the present goes to."""

    def __init__(self, names: Sequence[str], shape: Shape, memory: Callable[[int], Memory]) -> None:
        size = int(np.prod(shape, dtype=object))
        self._batch, self._heads, _, self._width = shape
        self._buffers = {name: (memory(size), memory(size)) for name in names}
        self._length, self._turn = 0, 0

    def attach(self, binding: Any) -> None:
        """Nothing: shapes and turns change with every run."""

    def before(self, binding: Any, start: int, end: int) -> None:
        if start != self._length:
            self._cut(start)
        for name, buffers in self._buffers.items():
            past, present = buffers[self._turn], buffers[1 - self._turn]
            past.bind(binding.bind_input, f"past_key_values.{name}", self._rows(start))
            present.bind(binding.bind_output, f"present.{name}", self._rows(end))

    def after(self, end: int) -> None:
        self._length, self._turn = end, 1 - self._turn

    def _rows(self, length: int) -> Shape:
        return (self._batch, self._heads, length, self._width)

    def _cut(self, length: int) -> None:
        """Keep the first ``length`` rows of every head, close together in the other buffer."""
        count = int(np.prod(self._rows(self._length)))
        for buffers in self._buffers.values():
            rows = buffers[self._turn].read(count).reshape(self._rows(self._length))
            buffers[1 - self._turn].write(rows[:, :, :length])
        self._length, self._turn = length, 1 - self._turn


class RowsCache:
    """A buffer on the host for each of ``names`` that is as long as a bucket, and one for the new rows of a run.

    Rows of the bucket that are not filled are zeros, whatever stood there before: the graph multiplies them by shares
    of zero, which makes nothing of numbers alone.
    """

    def __init__(self, names: Sequence[str], shape: Shape, memory: Callable[[int], HostMemory]) -> None:
        self._batch, self._heads, max_context, self._width = shape
        self._buckets = past_buckets(max_context)
        self._memory, self._start, self._end = memory, 0, 0
        self._bucket, self._num_new = self._bucket_of(0), 0
        self._past = {name: self._room(self._bucket) for name in names}
        self._new: dict[str, HostMemory] = {}

    def attach(self, binding: Any) -> None:
        """Nothing: buckets and rows change."""

    def before(self, binding: Any, start: int, end: int) -> None:
        if start != self._end:
            self._lay(start, self._bucket_of(start))
        if end - start != self._num_new:
            self._new = {name: self._room(end - start) for name in self._past}
            self._num_new = end - start
        for name, past in self._past.items():
            past.bind(binding.bind_input, f"past_key_values.{name}", self._rows(self._bucket))
            self._new[name].bind(binding.bind_output, f"present.{name}", self._rows(end - start))
        self._start = start

    def after(self, end: int) -> None:
        if end > self._bucket:
            self._lay(self._start, self._bucket_of(end))
        shape = self._rows(end - self._start)
        for name, past in self._past.items():
            rows = self._new[name].read(_count(shape)).reshape(shape)
            past.put(rows, self._rows(self._bucket), self._start)
        self._end = end

    def _lay(self, length: int, bucket: int) -> None:
        """Keep the first ``length`` rows, in buffers of ``bucket`` rows."""
        old = self._rows(self._bucket)
        for name, past in self._past.items():
            room = self._room(bucket)
            room.put(past.read(_count(old)).reshape(old)[:, :, :length], self._rows(bucket), 0)
            self._past[name] = room
        self._bucket, self._end = bucket, length

    def _bucket_of(self, length: int) -> int:
        """The fewest rows of a bucket that hold ``length``."""
        return next(bucket for bucket in self._buckets if bucket >= length)

    def _room(self, num_rows: int) -> HostMemory:
        return self._memory(_count(self._rows(num_rows)))

    def _rows(self, length: int) -> Shape:
        return (self._batch, self._heads, length, self._width)


def _count(shape: Shape) -> int:
    return int(np.prod(shape, dtype=object))


def memory_on(device: Device, dtype: type[np.generic]) -> Callable[[int], Memory]:
    """What gives memory for so many numbers where ``device`` computes."""
    if device.off_host:
        return lambda size: DeviceMemory(size, dtype, device)
    return lambda size: HostMemory(size, dtype)
