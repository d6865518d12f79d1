"""How much memory building an engine takes, before it is tried: on a small device the attempt itself is the harm.

The prediction, in bytes, with ``W`` the length of the graph's files and ``A`` the inputs and outputs of the largest
profile:

    host    =  HOST_BASE + HOST_COPIES · W
    device  =  DEVICE_BASE + DEVICE_COPIES · W + ACTIVATIONS · A + workspace

The parser holds the weights once, the builder's network again, and the serialized engine is a third copy; on the
device the candidates for a layer run with its weights and the workspace.  Where the GPU shares the system's memory (a
Jetson), both come out of the same bytes, so the sum must fit; otherwise each must fit its own.  TensorRT-RTX, building
ahead of time, never touches a device.  What a version really takes differs by a few tenths either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.core.errors import DoesNotFitError

MIB = 1 << 20
HOST_BASE = 256 * MIB  # the libraries and their tables
HOST_COPIES = 3.2
DEVICE_BASE = 384 * MIB  # a CUDA context with the kernels of the libraries
DEVICE_COPIES = 1.2
ACTIVATIONS = 8.0
WORKSPACE_MB = 1024  # where the device has four times that free; else a quarter of what it has
LEAST_WORKSPACE_MB = 64
ENGINE_COPIES = 1.1
PROFILE_BYTES = 6 * MIB  # code; 2 to 5 MB a profile were seen with TensorRT-RTX 1.7.1
BYTES_OF = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}

Largest = Mapping[str, Sequence[int]]  # input -> its largest shape in one profile


@dataclass(frozen=True)
class Need:
    """Bytes that building one engine takes at its peak."""

    host_bytes: int
    device_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum, which is what counts where the GPU shares the system's memory."""
        return self.host_bytes + self.device_bytes


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that are free; None is not known, which refuses nothing.  ``shared``: the GPU uses the system's memory."""

    host_bytes: int | None = None
    device_bytes: int | None = None
    shared: bool = False


def predicted_build(
    weight_bytes: int, activation_bytes: int, workspace_bytes: int, *, ahead_of_time: bool = False
) -> Need:
    """What building one engine takes; the formula stands at the top of this module."""
    host = HOST_BASE + HOST_COPIES * weight_bytes
    if ahead_of_time:
        return Need(int(host), 0)
    device = DEVICE_BASE + DEVICE_COPIES * weight_bytes + ACTIVATIONS * activation_bytes + workspace_bytes
    return Need(int(host), int(device))


def predicted_engine_bytes(weight_bytes: int, num_profiles: int) -> int:
    """What the serialized engine takes on the disk: the weights, and code for every profile."""
    return int(ENGINE_COPIES * weight_bytes) + PROFILE_BYTES * num_profiles


def io_bytes(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], largest: Largest) -> int:
    """Inputs and outputs at the largest shape of one profile; a free size that it leaves open counts as 1."""
    sizes: dict[str, int] = {}
    tensors = list(inputs)
    for tensor in tensors:
        for size, number in zip(tensor.shape, largest.get(tensor.name, ()), strict=False):
            if isinstance(size, str):
                sizes[size] = max(sizes.get(size, 1), number)
    return sum(_bytes_of(tensor, sizes) for tensor in (*tensors, *outputs))


def default_workspace_mb(room: Room) -> int:
    """``WORKSPACE_MB``, or a quarter of what is free where that is less."""
    free = room.host_bytes if room.shared else room.device_bytes
    if free is None:
        return WORKSPACE_MB
    return max(LEAST_WORKSPACE_MB, min(WORKSPACE_MB, free // 4 // MIB))


def fits(need: Need, room: Room) -> bool:
    """Whether there is room, as far as anybody knows."""
    return not _missing(need, room)


def require_room(what: str, need: Need, room: Room, *, ways_out: Sequence[str]) -> None:
    """Raises DoesNotFitError, which says what is missing where and what would fit (``ways_out``)."""
    if missing := _missing(need, room):
        ways = "; ".join(ways_out)
        raise DoesNotFitError(f"building {what} takes {missing}: {ways}")


def gib(number: int) -> str:
    """Bytes for people."""
    return f"{number / (1 << 30):.2f} GiB"


def _missing(need: Need, room: Room) -> str:
    pairs = [(need.host_bytes, room.host_bytes, "memory"), (need.device_bytes, room.device_bytes, "GPU memory")]
    if room.shared:
        pairs = [(need.total_bytes, room.host_bytes, "memory, which the GPU shares")]
    short = [
        f"about {gib(wanted)} of {name} where {gib(free)} is free"
        for wanted, free, name in pairs
        if free is not None and wanted > free
    ]
    return " and ".join(short)


def _bytes_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in tensor.shape]
    return prod(shape) * BYTES_OF.get(tensor.dtype, 1)
