"""Where ONNX Runtime computes: its execution providers by short names, and what each one took of a graph.

A provider takes the nodes that it knows and leaves the rest to the CPU.  That is told, and beyond a share of the graph
it is an error: nobody who asks for a GPU wants the CPU's speed under the GPU's name.  Of the providers below only the
CPU's has run on hardware so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.core.errors import DeviceError, MissingLibraryError, UnsupportedError
from edgevlm.core.optional import require
from edgevlm.core.registry import unknown_name

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "directml": "DmlExecutionProvider",
}
FIXES = {
    "cuda": "pip uninstall -y onnxruntime; pip install onnxruntime-gpu (they overwrite each other's files)",
    "tensorrt": "pip uninstall -y onnxruntime; pip install onnxruntime-gpu, beside TensorRT 10",
    "nv-tensorrt-rtx": "install an onnxruntime that was built with TensorRT for RTX",
    "coreml": "pip install onnxruntime on macOS, whose package has it",
    "qnn": "pip uninstall -y onnxruntime; pip install onnxruntime-qnn",
    "directml": "pip uninstall -y onnxruntime; pip install onnxruntime-directml",
}
OWN_MEMORY = {"cuda": "cuda", "tensorrt": "cuda", "nv-tensorrt-rtx": "cuda"}  # where the kv cache lies off the host
NUMBERED = (*OWN_MEMORY, "directml")  # a machine may have several, and the provider takes which
MOST_ELSEWHERE = 0.1  # share of the nodes that may be left to another provider
SHAPE_ONLY = frozenset({"Constant", "ConstantOfShape", "Cast", "Range", "Shape", "Size", "Squeeze", "Unsqueeze"})
HOLDS_CACHE = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
NODES_TOLD = 8  # kinds of nodes that a message names


@dataclass(frozen=True)
class Device:
    """An execution provider: ``name`` as the user says it, ``memory`` as ONNX Runtime calls where its tensors lie."""

    name: str
    provider: str
    index: int = 0

    @property
    def memory(self) -> str:
        return OWN_MEMORY.get(self.name, "cpu")

    @property
    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """What a graph is opened with: beside a device the CPU, where it can be told afterwards what it did."""
        options = {"device_id": str(self.index)} if self.name in NUMBERED else {}
        beside = [(CPU, dict[str, str]())] if self.provider != CPU and _tells() else []
        return [(self.provider, options), *beside]


def device_of(name: str | None) -> Device:
    """The device that is called ``name``, ``cuda:1`` for the second of its kind; None is the CPU.

    Raises UnsupportedError for a name that nobody knows or a number where there is only one, MissingLibraryError for a
    provider that this onnxruntime was built without.
    """
    kind, _, index = (name or "cpu").lower().partition(":")
    available = {_short(provider): provider for provider in require("onnxruntime").get_available_providers()}
    if kind in available and (not index or index.isdigit()):
        if index and kind not in NUMBERED:
            raise UnsupportedError(f"the device {kind} takes no number, got {name!r}: say {kind}")
        return Device(kind, available[kind], int(index or 0))
    known = {**{_short(provider): provider for provider in require("onnxruntime").get_all_providers()}, **available}
    if kind in known and not (index and not index.isdigit()):
        raise MissingLibraryError(
            f"onnxruntime's {known[kind]}",
            FIXES.get(kind, "install an onnxruntime that was built with it"),
            f"is not in the installed package, which has {', '.join(sorted(available))}",
        )
    raise UnsupportedError(unknown_name("device", name or "cpu", sorted(known)))


def check_placement(part: str, device: Device, graph: Any) -> Mapping[str, int]:
    """The kinds of nodes, with their number, that ``graph`` computes elsewhere than on ``device``.

    Raises DeviceError when the provider did not start, UnsupportedError when too much, or the attention with its kv
    cache, is left to another.
    """
    if device.provider not in graph.get_providers():
        raise DeviceError(
            f"{part}: {device.provider} did not start, onnxruntime took {', '.join(graph.get_providers())} instead: "
            f"check the driver and libraries of {device.name}, or leave --device out"
        )
    if device.provider == CPU or not _tells():
        return {}  # an older onnxruntime was told to refuse, see ``refuse_fallback``
    nodes = [
        (piece.ep_name, node.op_type)
        for piece in graph.get_provider_graph_assignment_info()
        for node in piece.get_nodes()
    ]
    return left_over(part, device, nodes)


def left_over(part: str, device: Device, nodes: Sequence[tuple[str, str]]) -> Mapping[str, int]:
    """Of ``nodes``, pairs of provider and kind, those that ``device`` left to others; raises as ``check_placement``."""
    computing = [(provider, kind) for provider, kind in nodes if kind not in SHAPE_ONLY]
    elsewhere = Counter(kind for provider, kind in computing if provider != device.provider)
    count = elsewhere.total()
    if count > MOST_ELSEWHERE * len(computing) or not HOLDS_CACHE.isdisjoint(elsewhere):
        told = ", ".join(f"{number} {kind}" for kind, number in elsewhere.most_common(NODES_TOLD))
        raise UnsupportedError(
            f"{part}: {device.provider} leaves {count} of {len(computing)} nodes to the CPU ({told}): "
            "leave --device out, or take a precision that it computes"
        )
    return dict(elsewhere.most_common())


def refuse_fallback(options: Any, device: Device) -> None:
    """Make onnxruntime note who computes what, or refuse leftovers altogether where it is too old to note."""
    if device.provider == CPU:
        return
    entry = "session.record_ep_graph_assignment_info" if _tells() else "session.disable_cpu_ep_fallback"
    options.add_session_config_entry(entry, "1")


def _tells() -> bool:
    """Whether this onnxruntime can say which provider computes which node."""
    return hasattr(require("onnxruntime").InferenceSession, "get_provider_graph_assignment_info")


def _short(provider: str) -> str:
    """``cuda`` for ``CUDAExecutionProvider``."""
    names = {full: name for name, full in PROVIDERS.items()}
    return names.get(provider, provider.removesuffix("ExecutionProvider").lower())
