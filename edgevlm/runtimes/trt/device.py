"""Which NVIDIA GPU engines are built for, and how much memory is free there.

A build asks the CUDA runtime, which is what TensorRT builds with.  A plan reads ``nvidia-smi`` or, on a Jetson, the
system's files, and asks CUDA last, since asking it takes memory on the device.  Not run on hardware yet.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from edgevlm.core.errors import DeviceError, EdgeVLMError, MissingLibraryError, UsageError
from edgevlm.core.hardware import Hardware, probe, run_tool
from edgevlm.core.jetson import Tool
from edgevlm.runtimes.trt.api import Api, dotted
from edgevlm.runtimes.trt.cuda import CudaDevice
from edgevlm.runtimes.trt.memory import MIB, Room

logger = logging.getLogger(__name__)

ON_ITS_DEVICE = "TensorRT builds engines on the device that runs them"
BY_NVIDIA_SMI = "the first that nvidia-smi shows; CUDA may take another: pip install cuda-python to ask it"


@dataclass(frozen=True, kw_only=True)
class Device:
    """The GPU that engines are built for; ``is_here`` is false for one that was only named.

    ``compute_capability`` is None where no GPU was found, which a plan can do without.  ``doubt``: why it may be
    another one than CUDA takes.
    """

    name: str
    compute_capability: tuple[int, int] | None
    room: Room
    is_here: bool = True
    is_jetson: bool = False
    doubt: str = ""

    @property
    def capability_text(self) -> str:
        """The compute capability such as "8.7", "?" where nobody knows."""
        return dotted(self.compute_capability) if self.compute_capability else "?"


def find_device(api: Api | None, named: str | None, *, planning: bool, tool: Tool = run_tool) -> Device:
    """The device to build for: the one ``named`` by its compute capability ("8.9"), else the GPU that is here.

    Raises UsageError for a name that is no compute capability, or where ``api`` cannot build for a device that is not
    here; DeviceError where there is no GPU.  A plan (``planning``) may name any device, and needs none.
    """
    hardware = probe(tool=tool)
    here, reason = _here(hardware, tool, planning=planning)
    host = hardware.memory.available_bytes
    if named is not None:
        capability = parse_capability(named)
        if here is not None and here.compute_capability == capability:
            return here
        if not planning and (api is None or not api.builds_ahead_of_time):
            raise UsageError(f"--compute-capability {named}: {ON_ITS_DEVICE}; only TensorRT-RTX builds for another")
        name = "a GPU that is not here"
        return Device(name=name, compute_capability=capability, room=Room(host_bytes=host), is_here=False)
    if here is not None:
        return here
    if planning:
        return Device(name="no NVIDIA GPU", compute_capability=None, room=Room(host_bytes=host), is_here=False)
    hint = (
        "name one with --compute-capability, such as 8.9"
        if api and api.builds_ahead_of_time
        else f"{ON_ITS_DEVICE}: go there"
    )
    raise DeviceError(f"no NVIDIA GPU was found here ({reason}): {hint}")


def parse_capability(text: str) -> tuple[int, int]:
    """``8.9`` as two numbers.  Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text)
    if not match:
        raise UsageError(f"--compute-capability is two numbers such as 8.9, found {text!r}")
    return int(match[1]), int(match[2])


def _here(hardware: Hardware, tool: Tool, *, planning: bool) -> tuple[Device | None, str]:
    """The GPU of this machine, or None and the reason."""
    listed = _listed(hardware, tool)
    if planning and listed is not None and listed.compute_capability is not None:
        return listed, ""
    try:
        return _by_cuda(hardware), ""
    except MissingLibraryError as error:
        return listed, f"nvidia-smi shows none, and {error}"
    except EdgeVLMError as error:
        logger.debug("no GPU through CUDA: %s", error)
        return (listed if planning else None), str(error)


def _listed(hardware: Hardware, tool: Tool) -> Device | None:
    """What can be told without asking CUDA."""
    host = hardware.memory.available_bytes
    if hardware.jetson is None:
        return _by_nvidia_smi(tool, host)
    named = hardware.jetson.compute_capability
    return Device(
        name=hardware.jetson.model,
        compute_capability=parse_capability(named) if named else None,
        room=Room(host_bytes=host, shared=True),
        is_jetson=True,
    )


def _by_nvidia_smi(tool: Tool, host: int | None) -> Device | None:
    """The first GPU of its list, which is sorted by another rule than CUDA's."""
    listing = tool(["nvidia-smi", "--query-gpu=name,compute_cap,memory.free", "--format=csv,noheader,nounits"]) or ""
    for line in listing.splitlines():
        name, capability, mebibytes = (cell.strip() for cell in f"{line},,".split(",")[:3])
        if re.fullmatch(r"\d{1,2}\.\d", capability):
            free = int(mebibytes) * MIB if mebibytes.isdigit() else None
            room = Room(host_bytes=host, device_bytes=free, shared=free is None)
            return Device(name=name, compute_capability=parse_capability(capability), room=room, doubt=BY_NVIDIA_SMI)
    return None


def _by_cuda(hardware: Hardware) -> Device:
    """The device that CUDA takes unasked, which is its first; raises what :class:`CudaDevice` raises."""
    cuda = CudaDevice()
    facts, (free, _) = cuda.facts, cuda.cuda.call("cudaMemGetInfo")
    room = Room(
        host_bytes=hardware.memory.available_bytes,
        device_bytes=None if facts.is_integrated else int(free),
        shared=facts.is_integrated,
    )
    is_jetson = hardware.jetson is not None and facts.is_integrated
    return Device(name=facts.name, compute_capability=facts.compute_capability, room=room, is_jetson=is_jetson)
