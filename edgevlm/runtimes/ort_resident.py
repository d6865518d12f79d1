"""What a decoder on a GPU keeps bound there for good: the row of a token, its logits, and the mask.

A token then costs one row on the way there and its logits on the way back; nothing is allocated or bound anew but the
mask's length.  Not run on hardware yet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.runtimes.ort_cache import DeviceMemory
from edgevlm.runtimes.ort_devices import Device
from edgevlm.runtimes.session import Float


class Resident:
    """Memory on ``device`` for one row [1, 1, D], the logits [1, 1, V] of one position, and a mask of ones."""

    def __init__(
        self, device: Device, row: NDArray[Any], logits_dtype: type[np.generic], vocabulary: int, max_context: int
    ) -> None:
        """``row``: one of the shape and type that the graph takes."""
        self._shape, self._vocabulary = row.shape, vocabulary
        self._row_dtype: type[np.generic] = row.dtype.type
        self._row = DeviceMemory(row.size, self._row_dtype, device)
        self._logits = DeviceMemory(vocabulary, logits_dtype, device)
        self._mask = DeviceMemory(max_context, np.int64, device)
        self._mask.write(np.ones(max_context, np.int64))

    def attach_row(self, binding: Any) -> None:
        """Let ``inputs_embeds`` be the row."""
        self._row.bind(binding.bind_input, "inputs_embeds", self._shape)

    def attach_logits(self, binding: Any) -> None:
        """Let ``logits`` be those of one position."""
        self._logits.bind(binding.bind_output, "logits", (1, 1, self._vocabulary))

    def bind_mask(self, binding: Any, name: str, end: int) -> None:
        """Let ``name`` be ``end`` ones."""
        self._mask.bind(binding.bind_input, name, (1, end))

    def put_row(self, row: Float) -> None:
        """Copy ``row`` [1, 1, D] to the device."""
        self._row.write(row.astype(self._row_dtype, copy=False))

    def take_logits(self) -> Float:
        """The logits [V], copied from the device; the caller keeps them."""
        return np.array(self._logits.read(self._vocabulary), np.float32)
