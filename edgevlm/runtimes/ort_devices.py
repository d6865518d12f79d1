"""Where ONNX Runtime computes: its execution providers by short names, and what each one took of a graph.

Most providers are compiled into the onnxruntime that is installed; TensorRT for RTX comes as a package of its own, a
plugin that is registered when it is asked for.

A provider takes the nodes that it knows and leaves the rest to the CPU.  That is told, and beyond a share of the graph
it is an error: nobody who asks for a GPU wants the CPU's speed under the GPU's name.  Of the providers below only the
CPU's has run on hardware so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from edgevlm.core.errors import DeviceError, MissingLibraryError, UnsupportedError
from edgevlm.core.optional import is_installed, require
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
    "nv-tensorrt-rtx": "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "coreml": "pip install onnxruntime on macOS, whose package has it",
    "qnn": "pip uninstall -y onnxruntime; pip install onnxruntime-qnn",
    "directml": "pip uninstall -y onnxruntime; pip install onnxruntime-directml",
}
PLUGINS = {"nv-tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx"}  # device: module that brings its provider
PLUGIN_NEEDS = {"nv-tensorrt-rtx": "an NVIDIA GPU of the RTX 30 series or newer, and a driver for CUDA 13"}
OWN_MEMORY = {"cuda": "cuda", "tensorrt": "cuda", "nv-tensorrt-rtx": "cuda"}  # of providers that are compiled in
NUMBERED = (*OWN_MEMORY, "directml")  # a machine may have several, and the provider takes which
MOST_ELSEWHERE = 0.1  # share of the nodes that may be left to another provider
SHAPE_ONLY = frozenset({"Constant", "ConstantOfShape", "Cast", "Range", "Shape", "Size", "Squeeze", "Unsqueeze"})
HOLDS_CACHE = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
NODES_TOLD = 8  # kinds of nodes that a message names


@dataclass(frozen=True)
class Device:
    """An execution provider: ``name`` as the user says it, ``memory`` as ONNX Runtime calls where its tensors lie.

    ``plugin``: it was registered from a package of its own, so graphs are opened with ``add_to``, not ``providers``.
    """

    name: str
    provider: str
    index: int = 0
    plugin: bool = False

    @property
    def memory(self) -> str:
        """The host's for a plugin: which names, and which copies, reach a plugin's memory differs between releases."""
        if self.plugin:
            return "cpu"
        return OWN_MEMORY.get(self.name, "cpu")

    @property
    def off_host(self) -> bool:
        """Whether tensors that stay bound lie in memory of the device's own."""
        return self.memory != "cpu"

    @property
    def providers(self) -> list[tuple[str, dict[str, str]]] | None:
        """What a graph is opened with: beside a device the CPU, where it can be told afterwards what it did.

        None for a plugin: what ``add_to`` put into the options counts.
        """
        if self.plugin:
            return None
        options = {"device_id": str(self.index)} if self.name in NUMBERED else {}
        beside = [(CPU, dict[str, str]())] if self.provider != CPU and _tells() else []
        return [(self.provider, options), *beside]

    def add_to(self, options: Any) -> None:
        """Make a plugin's device compute the graphs that are opened with these ``options``; else nothing."""
        if self.plugin:
            options.add_provider_for_devices([_plugin_devices(self.provider)[self.index]], {})


def device_of(name: str | None) -> Device:
    """The device that is called ``name``, ``cuda:1`` for the second of its kind; None is the CPU.

    Raises UnsupportedError for a name that nobody knows or a number where there is only one, MissingLibraryError for a
    provider that this onnxruntime was built without or whose package is not installed, DeviceError for a plugin that
    finds no GPU or driver.
    """
    kind, _, index = (name or "cpu").lower().partition(":")
    available = {_short(provider): provider for provider in require("onnxruntime").get_available_providers()}
    if kind in available and (not index or index.isdigit()):
        if index and kind not in NUMBERED:
            raise UnsupportedError(f"the device {kind} takes no number, got {name!r}: say {kind}")
        return Device(kind, available[kind], int(index or 0))
    if kind in PLUGINS and is_installed(PLUGINS[kind]) and (not index or index.isdigit()):
        return _plugin_device(kind, int(index or 0))
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


def _plugin_device(kind: str, index: int) -> Device:
    """The device ``index`` of the plugin for ``kind``, registered.  Raises as ``device_of``."""
    provider = _registered(kind)
    count = len(_plugin_devices(provider))
    if index >= count:
        found = f"it finds {count}" if count else "it finds none"
        raise DeviceError(f"{kind}:{index}: {provider} has no such GPU, {found}; it needs {PLUGIN_NEEDS[kind]}")
    return Device(kind, provider, index, plugin=True)


@cache
def _registered(kind: str) -> str:
    """Register the plugin for ``kind`` with onnxruntime, once, and say its provider's name."""
    onnxruntime = require("onnxruntime")
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        reason = f"is {onnxruntime.__version__}, which takes no plugins"
        raise MissingLibraryError("onnxruntime", "pip install 'onnxruntime>=1.24'", reason)
    package = require(PLUGINS[kind])
    provider: str = package.get_ep_name()
    try:
        onnxruntime.register_execution_provider_library(provider, package.get_library_path())
    except Exception as error:  # the driver's library, libcuda, is not there
        reason = str(error).rpartition("with error: ")[2].splitlines()[0]
        raise DeviceError(f"{kind}: the plugin does not load ({reason}); it needs {PLUGIN_NEEDS[kind]}") from error
    return provider


def _plugin_devices(provider: str) -> list[Any]:
    """What onnxruntime found that ``provider`` can compute on."""
    return [device for device in require("onnxruntime").get_ep_devices() if device.ep_name == provider]


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
