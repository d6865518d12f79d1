"""How much memory building an engine takes, before it is tried: on a small device the attempt itself is the harm.

The prediction, in bytes, with ``W`` the length of the graph's files, ``P`` the number of profiles and ``A`` the inputs
and outputs of the largest profile:

    engine  =  LAYOUTS · W + PROFILE_BYTES · P
    host    =  HOST_BASE + HOST_COPIES · W + 2 · engine
    device  =  DEVICE_BASE + DEVICE_COPIES · W + ACTIVATIONS · A + workspace

The parser holds the weights once and the builder's network again, and once more where it has several profiles or
rounded weights; the engine stands there twice, as it is put together and serialized.  ``LAYOUTS`` counts how often an
engine keeps its weights: once, but those of a decoder in other precisions than int4 again for profiles that want them
laid otherwise.

Engine and host are fitted to builds by TensorRT-RTX 1.7.1 (bench/results/tensorrt_build_memory.json): never below what
was measured, and no more than a half above.  The device's part is reasoned, not run on hardware yet.  Where the GPU
shares the system's memory (a Jetson), both come out of the same bytes, so the sum must fit; otherwise each must fit its
own.  TensorRT-RTX, building ahead of time, never touches a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from edgevlm.bundle.manifest import TensorSpec
from edgevlm.core.errors import DoesNotFitError

MIB = 1 << 20
HOST_BASE = 256 * MIB  # the libraries and their tables
HOST_COPIES = 2
MORE_HOST_COPIES = 3  # with several profiles, or of rounded weights
FLOATS = ("fp16", "bf16", "fp32")  # every other precision has rounded weights
DEVICE_BASE = 384 * MIB  # a CUDA context with the kernels of the libraries
DEVICE_COPIES = 1.2
ACTIVATIONS = 8.0
WORKSPACE_MB = 1024  # where the device has four times that free; else a quarter of what it has
LEAST_WORKSPACE_MB = 64
LAYOUTS = (1.0, 1.7, 2.3)  # with one profile, with two, with more
PROFILE_BYTES = 42 * MIB  # code and tables: 6 MiB a profile for pictures of 256 pixels, 41 MiB for 1024
BYTES_OF = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}

Largest = Mapping[str, Sequence[int]]  # input -> its largest shape in one profile


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one engine is built of and with: all that a prediction depends on.  ``ahead_of_time``: on the host alone."""

    part: str
    precision: str
    weight_bytes: int
    num_profiles: int = 1
    activation_bytes: int = 0
    workspace_bytes: int = 0
    ahead_of_time: bool = False

    @property
    def host_copies(self) -> int:
        """How often the builder holds the weights, the engine's apart."""
        return HOST_COPIES if self.num_profiles == 1 and self.precision in FLOATS else MORE_HOST_COPIES

    @property
    def layouts(self) -> float:
        """How often the engine keeps its weights.

        More than once was measured of float decoders, and neither of int4 ones nor of FastViTHD; every other decoder
        counts as a float one, every other encoder as FastViTHD.
        """
        if self.part != "decoder_model_merged" or self.precision.startswith("int4"):
            return LAYOUTS[0]
        return LAYOUTS[min(self.num_profiles, len(LAYOUTS)) - 1]


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


def predicted_build(work: Work) -> Need:
    """What building one engine takes; the formula stands at the top of this module."""
    host = HOST_BASE + work.host_copies * work.weight_bytes + 2 * predicted_engine_bytes(work)
    if work.ahead_of_time:
        return Need(host, 0)
    device = DEVICE_BASE + DEVICE_COPIES * work.weight_bytes + ACTIVATIONS * work.activation_bytes
    return Need(host, int(device) + work.workspace_bytes)


def predicted_engine_bytes(work: Work) -> int:
    """What the serialized engine takes on the disk: the weights in every layout, and code for every profile."""
    return ceil(work.layouts * work.weight_bytes) + PROFILE_BYTES * work.num_profiles


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


def told(need: Need, room: Room) -> str:
    """What is needed beside what is free, for people."""
    return ", ".join(
        f"{gib(wanted)} of {name} ({'free: not known' if free is None else f'{gib(free)} free'})"
        for wanted, free, name in _sides(need, room)
    )


def gib(number: int) -> str:
    """Bytes for people."""
    return f"{number / (1 << 30):.2f} GiB"


def _missing(need: Need, room: Room) -> str:
    short = [
        f"about {gib(wanted)} of {name} where {gib(free)} is free"
        for wanted, free, name in _sides(need, room)
        if free is not None and wanted > free
    ]
    return " and ".join(short)


def _sides(need: Need, room: Room) -> list[tuple[int, int | None, str]]:
    """Bytes that are needed and that are free, and of what."""
    if room.shared:
        return [(need.total_bytes, room.host_bytes, "memory, which the GPU shares")]
    return [(need.host_bytes, room.host_bytes, "memory"), (need.device_bytes, room.device_bytes, "GPU memory")]


def _bytes_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in tensor.shape]
    return prod(shape) * BYTES_OF.get(tensor.dtype, 1)
