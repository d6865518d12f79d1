"""The cache whose graph gives new rows alone: where they go, how long the buffer is, and what rewinding leaves."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgevlm.runtimes.ort_cache import HostMemory, RowsCache

KEY = "0.key"


class Binding:
    """Keeps what was bound, as arrays over the same memory."""

    def __init__(self) -> None:
        self.bound: dict[str, NDArray[np.float32]] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        count = int(np.prod(shape))
        memory = (ctypes.c_float * count).from_address(address)
        self.bound[name] = np.frombuffer(memory, np.float32, count).reshape(shape)

    bind_output = bind_input


def append(cache: RowsCache, binding: Binding, start: int, values: list[float]) -> NDArray[np.float32]:
    """Run a graph that gives the rows ``values``, the same in both heads; returns the past that it read."""
    end = start + len(values)
    cache.before(binding, start, end)
    past = binding.bound[f"past_key_values.{KEY}"].copy()
    binding.bound[f"present.{KEY}"][:] = np.array(values, np.float32)[:, None]
    cache.after(end)
    return past


@pytest.fixture
def cache() -> RowsCache:
    return RowsCache([KEY], (1, 2, 1000, 3), lambda size: HostMemory(size, np.float32))


def test_new_rows_stand_behind_the_old_ones_in_every_head(cache: RowsCache) -> None:
    binding = Binding()
    assert append(cache, binding, 0, [1, 2]).shape == (1, 2, 256, 3)
    append(cache, binding, 2, [3])
    past = append(cache, binding, 3, [4])
    assert past[0, 1, :5, 2].tolist() == [1, 2, 3, 0, 0]


def test_buffers_grow_in_powers_of_two_up_to_the_context_and_keep_their_rows(cache: RowsCache) -> None:
    binding = Binding()
    append(cache, binding, 0, [float(n) for n in range(1, 257)])
    assert append(cache, binding, 256, [257]).shape[2] == 256  # the old rows fill it exactly
    past = append(cache, binding, 257, [258.0] * 300)
    assert past.shape[2] == 512
    assert past[0, 1, :258, 0].tolist() == [*range(1, 258), 0]
    assert append(cache, binding, 557, [1]).shape[2] == 1000


def test_rewinding_leaves_zeros_and_the_shortest_buffer(cache: RowsCache) -> None:
    binding = Binding()
    append(cache, binding, 0, [np.inf] * 600)
    past = append(cache, binding, 0, [1])
    assert past.shape[2] == 256
    assert not past.any()
    assert append(cache, binding, 1, [2])[0, :, :3, 0].tolist() == [[1, 0, 0]] * 2


def test_a_run_that_failed_leaves_the_cache_as_it_was(cache: RowsCache) -> None:
    binding = Binding()
    append(cache, binding, 0, [1, 2])
    cache.before(binding, 2, 900)  # and no `after`
    assert append(cache, binding, 2, [3])[0, 0, :3, 0].tolist() == [1, 2, 0]
