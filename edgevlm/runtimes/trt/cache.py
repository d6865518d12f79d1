"""The kv cache of a decoder on the device: one buffer that the graph fills in place, or rows that are copied there.

*In place*, the graph writes new rows into its cache itself: past and present are one buffer of the whole context.
*Rows*, it gives them, and one copy on the device puts them behind the rows that are there; the cache is as long as a
bucket, and is laid out anew when that is full.  Rows that nobody has written yet are zeros: the graph multiplies them
by shares of zero, which only makes nothing of what is a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from edgevlm.core.errors import EdgeVLMError
from edgevlm.runtimes.trt.api import Shape
from edgevlm.runtimes.trt.cuda import ALIGNMENT, CudaDevice

PAST, PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class CacheLayout:
    """Caches ``[1, num_heads, S, head]`` of all ``names`` ("0.key"), one behind the other; ``row_bytes`` a head."""

    names: tuple[str, ...]
    num_heads: int
    head_size: int
    row_bytes: int

    def shape(self, num_rows: int) -> Shape:
        return (1, self.num_heads, num_rows, self.head_size)

    def stride(self, num_rows: int) -> int:
        """Bytes from one cache to the next, a multiple of what TensorRT wants."""
        return -(-self.num_heads * num_rows * self.row_bytes // ALIGNMENT) * ALIGNMENT

    def num_bytes(self, num_rows: int) -> int:
        return len(self.names) * self.stride(num_rows)

    def is_even(self, num_rows: int) -> bool:
        """Whether every head begins so many bytes behind the one before it, across all caches."""
        return self.stride(num_rows) == self.num_heads * num_rows * self.row_bytes


class KvCache(Protocol):
    """Keys and values of all layers, on the device; ``version`` changes with the addresses of single steps."""

    version: int

    def length(self, start: int) -> int:
        """Rows that the past has in a run that appends rows behind the first ``start``."""
        ...

    def addresses(self, num_rows: int) -> dict[str, int]:
        """Where past and present lie in a run that appends ``num_rows``."""
        ...

    def after(self, start: int, end: int) -> None:
        """The run that appends the rows from ``start`` to ``end`` is on the stream."""
        ...

    def clear(self, start: int) -> None:
        """Set every row from ``start`` on to zero."""
        ...

    def close(self) -> None: ...


class Rows:
    """Memory for ``num_rows`` rows of every cache in ``layout``; raises DoesNotFitError where there is no room."""

    def __init__(self, device: CudaDevice, layout: CacheLayout, num_rows: int, what: str) -> None:
        self._stream, self.layout, self.num_rows = device.stream, layout, num_rows
        self._memory = device.memory(layout.num_bytes(num_rows), what)

    def addresses(self, prefix: str, num_rows: int | None = None) -> dict[str, int]:
        """Where the tensor of each name lies, with ``prefix`` before it; ``num_rows``: were it so many rows long."""
        stride = self.layout.stride(num_rows or self.num_rows)
        return {f"{prefix}{name}": self._memory.address + i * stride for i, name in enumerate(self.layout.names)}

    def clear(self, start: int = 0) -> None:
        """Set the rows from ``start`` on to zero; beyond the last one there is nothing."""
        row, length = self.layout.row_bytes, self.num_rows
        if start >= length:
            return
        for address, count in self._pieces(length, start):
            self._stream.zero_rows(address, length * row, (length - start) * row, count)

    def take(self, source: Rows, count: int, start: int = 0, *, source_length: int | None = None) -> None:
        """Put the first ``count`` rows of ``source``, were it ``source_length`` rows long, at row ``start``."""
        row, length, given = self.layout.row_bytes, self.num_rows, source_length or source.num_rows
        together = self.layout.is_even(length) and self.layout.is_even(given)
        pairs = zip(
            self._pieces(length, start, together=together), source._pieces(given, 0, together=together), strict=True
        )
        for (target, num_heads), (address, _) in pairs:
            self._stream.copy_rows(target, length * row, address, given * row, count * row, num_heads)

    def close(self) -> None:
        self._memory.close()

    def _pieces(self, length: int, start: int, *, together: bool = True) -> list[tuple[int, int]]:
        """Addresses of row ``start``, each with how many heads follow evenly: all of them, or those of one cache."""
        layout, first = self.layout, self._memory.address + start * self.layout.row_bytes
        if together and layout.is_even(length):
            return [(first, len(layout.names) * layout.num_heads)]
        return [(first + index * layout.stride(length), layout.num_heads) for index in range(len(layout.names))]


class InPlaceCache:
    """One buffer ``[1, K, max_context, head]`` for each name, bound as past and as present."""

    def __init__(self, device: CudaDevice, layout: CacheLayout, max_context: int) -> None:
        self.version, self._rows = 0, Rows(device, layout, max_context, "the kv cache")
        self._rows.clear()

    def length(self, start: int) -> int:
        return self._rows.num_rows

    def addresses(self, num_rows: int) -> dict[str, int]:
        return self._rows.addresses(PAST) | self._rows.addresses(PRESENT)

    def after(self, start: int, end: int) -> None:
        """Nothing: the rows are where they belong."""

    def clear(self, start: int) -> None:
        self._rows.clear(start)

    def close(self) -> None:
        self._rows.close()


class RowsCache:
    """Buffers as long as one of ``buckets``, one for each name, and room for the new rows of a run."""

    def __init__(self, device: CudaDevice, layout: CacheLayout, buckets: Sequence[int]) -> None:
        self.version, self._device, self._layout, self._buckets = 0, device, layout, tuple(buckets)
        self._past = Rows(device, layout, self._buckets[0], "the kv cache")
        self._many: Rows | None = None
        try:
            self._past.clear()
            self._one = Rows(device, layout, 1, "the kv cache's new row")
        except BaseException:
            self._past.close()
            raise

    def length(self, start: int) -> int:
        """While nothing is written any length will do, and the shortest computes least."""
        return self._past.num_rows if start else self._buckets[0]

    def addresses(self, num_rows: int) -> dict[str, int]:
        return self._past.addresses(PAST) | self._new(num_rows).addresses(PRESENT, num_rows)

    def after(self, start: int, end: int) -> None:
        if end > self._past.num_rows:
            self._grow(start, next(bucket for bucket in self._buckets if bucket >= end))
        count = end - start
        self._past.take(self._new(count), count, start, source_length=count)

    def clear(self, start: int) -> None:
        self._past.clear(start)

    def close(self) -> None:
        for rows in (self._past, self._one, self._many):
            if rows is not None:
                rows.close()

    def _new(self, num_rows: int) -> Rows:
        """Room for the present; that of a single row never moves, since captured steps write there."""
        if num_rows == 1:
            return self._one
        if self._many is None or self._many.num_rows < num_rows:
            old, self._many = self._many, None
            if old is not None:
                old.close()
            self._many = Rows(self._device, self._layout, num_rows, "the kv cache's new rows")
        return self._many

    def _grow(self, num_rows: int, bucket: int) -> None:
        """Lay the first ``num_rows`` out with ``bucket`` rows a head; on an error all is as it was."""
        larger = Rows(self._device, self._layout, bucket, f"a kv cache of {bucket:,} rows")
        try:
            larger.clear()
            if num_rows:
                larger.take(self._past, num_rows)
            self._device.stream.wait()
        except BaseException:
            with suppress(EdgeVLMError):
                self._device.stream.wait()
            larger.close()
            raise
        self.version += 1  # before the exchange: whoever is interrupted here binds again
        old, self._past = self._past, larger
        old.close()
