"""Which of ONNX Runtime's providers computes, and how much another may do for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from edgevlm.core.errors import DeviceError, MissingLibraryError, UnsupportedError
from edgevlm.runtimes import ort_devices
from edgevlm.runtimes.ort_devices import CPU, Device, check_placement, device_of, left_over
from edgevlm.runtimes.ort_graph import session_options
from edgevlm.shipped import find_bundle

CUDA = "CUDAExecutionProvider"
RTX, RTX_PACKAGE = "nv-tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx"
NO_DRIVER = "[ONNXRuntimeError] : 1 : FAIL : Failed to load library x.so with error: libcuda.so.1: cannot open"
GPU = Device("cuda", CUDA)


@pytest.mark.parametrize("name", [None, "cpu", "CPU"])
def test_unasked_it_is_the_cpu(name: str | None) -> None:
    assert device_of(name) == Device("cpu", CPU)
    assert device_of(name).providers == [(CPU, {})]


def install(monkeypatch: pytest.MonkeyPatch, *providers: str) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, CPU])


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("cuda", CUDA),
        ("tensorrt", "TensorrtExecutionProvider"),
        ("nv-tensorrt-rtx", "NvTensorRTRTXExecutionProvider"),
        ("coreml", "CoreMLExecutionProvider"),
        ("qnn", "QNNExecutionProvider"),
        ("xnnpack", "XnnpackExecutionProvider"),
        ("ofanother", "OfAnotherExecutionProvider"),
    ],
)
def test_a_provider_goes_by_its_short_name(monkeypatch: pytest.MonkeyPatch, name: str, provider: str) -> None:
    install(monkeypatch, provider)
    assert device_of(name).provider == provider
    assert [given for given, _ in device_of(name).providers or []] == [provider, CPU]


def test_a_number_picks_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, CUDA)
    assert (device_of("cuda:1").providers or [])[0] == (CUDA, {"device_id": "1"})
    install(monkeypatch, "DmlExecutionProvider")
    assert (device_of("directml:2").providers or [])[0][1] == {"device_id": "2"}
    install(monkeypatch, CUDA)
    assert (device_of("cuda:1").memory, device_of("cpu").memory) == ("cuda", "cpu")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("cuda", "pip install onnxruntime-gpu"),
        ("qnn", "onnxruntime-qnn"),
        ("xnnpack", "built with it"),
        (RTX, "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    ],
)
def test_a_provider_that_is_not_installed_is_missed_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, name: str, fix: str
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(ort_devices, "is_installed", lambda module: False)
    with pytest.raises(MissingLibraryError, match=f"which has cpu.*{fix}"):
        device_of(name)


@pytest.fixture
def shipped() -> Path:
    """A small graph."""
    return find_bundle("nano") / "onnx" / "embed_tokens.onnx"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """A package whose provider is, in truth, the CPU's; what was registered."""
    registered: list[tuple[str, str]] = []
    package = SimpleNamespace(get_ep_name=lambda: CPU, get_library_path=lambda: "x.so")
    monkeypatch.setitem(sys.modules, RTX_PACKAGE, package)
    monkeypatch.setattr(ort_devices, "is_installed", lambda module: module == RTX_PACKAGE)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *pair: registered.append(pair))
    install(monkeypatch)
    ort_devices._registered.cache_clear()
    yield registered
    ort_devices._registered.cache_clear()


def test_a_plugin_is_registered_once_and_computes_what_is_opened_with_it(
    plugin: list[tuple[str, str]], shipped: Path
) -> None:
    device = device_of(RTX)
    assert device_of(f"{RTX}:0") == device == Device(RTX, CPU, plugin=True)
    assert plugin == [(CPU, "x.so")]
    assert (device.providers, device.memory, device.off_host) == (None, "cpu", False)
    options = session_options("embed_tokens", 1, device)
    assert options.has_providers()
    graph = onnxruntime.InferenceSession(str(shipped), options, providers=device.providers)
    assert graph.get_providers() == [CPU]


def test_a_plugin_without_a_driver_says_what_it_needs(
    plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*pair: str) -> None:
        raise RuntimeError(NO_DRIVER)

    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", fails)
    with pytest.raises(DeviceError, match=r"does not load \(libcuda.so.1: cannot open\); it needs an NVIDIA GPU"):
        device_of(RTX)


@pytest.mark.parametrize(("name", "found"), [(RTX, "it finds none"), (f"{RTX}:3", "it finds 1")])
def test_a_plugin_without_that_gpu_says_what_it_found(
    plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    if "none" in found:
        monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    with pytest.raises(DeviceError, match=found):
        device_of(name)


def test_a_plugin_needs_an_onnxruntime_that_takes_plugins(
    plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(MissingLibraryError, match=r"takes no plugins: pip install 'onnxruntime>=1.24'"):
        device_of(RTX)


@pytest.mark.parametrize("name", ["cpu:0", "CPU:1", "coreml:1"])
def test_a_number_where_there_is_only_one_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, "CoreMLExecutionProvider")
    kind = name.lower().partition(":")[0]
    with pytest.raises(UnsupportedError, match=f"{kind} takes no number, got '{name}': say {kind}"):
        device_of(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:first"])
def test_an_unknown_device_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"no device named '{name}'; known: .*coreml, cpu, cuda"):
        device_of(name)


def nodes(on_gpu: int, **on_cpu: int) -> list[tuple[str, str]]:
    return [(CUDA, "MatMul")] * on_gpu + [(CPU, kind) for kind, count in on_cpu.items() for _ in range(count)]


def test_a_few_nodes_may_be_computed_elsewhere_and_are_told() -> None:
    assert left_over("decoder", GPU, nodes(18, Slice=1, Gather=1)) == {"Slice": 1, "Gather": 1}


def test_what_only_speaks_of_shapes_does_not_count() -> None:
    assert left_over("decoder", GPU, nodes(9, Shape=20, Cast=20, Gather=1)) == {"Gather": 1}


def test_above_a_tenth_it_is_an_error_that_lists_them() -> None:
    with pytest.raises(UnsupportedError, match=r"decoder: CUDA.* leaves 3 of 20 nodes to the CPU \(2 Gelu, 1 Slice\)"):
        left_over("decoder", GPU, nodes(17, Gelu=2, Slice=1))


def test_the_kv_cache_must_lie_where_it_was_asked_for() -> None:
    with pytest.raises(UnsupportedError, match="1 GroupQueryAttention"):
        left_over("decoder", GPU, nodes(99, GroupQueryAttention=1))


def opened(providers: Sequence[str], pieces: Sequence[tuple[str, str]]) -> Any:
    """What an opened graph says of itself."""
    infos = [
        SimpleNamespace(ep_name=provider, get_nodes=lambda kind=kind: [SimpleNamespace(op_type=kind)])
        for provider, kind in pieces
    ]
    return SimpleNamespace(get_providers=lambda: list(providers), get_provider_graph_assignment_info=lambda: infos)


def test_a_provider_that_did_not_start_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"vision_encoder: CUDA.* did not start, onnxruntime took CPU"):
        check_placement("vision_encoder", GPU, opened([CPU], [(CPU, "MatMul")]))


def test_the_graph_itself_says_who_computes_what() -> None:
    assert check_placement("decoder", GPU, opened([CUDA, CPU], nodes(10, Slice=1))) == {"Slice": 1}
    with pytest.raises(UnsupportedError, match="2 of 12"):
        check_placement("decoder", GPU, opened([CUDA, CPU], nodes(10, Slice=2)))


def test_on_the_cpu_nothing_is_elsewhere() -> None:
    assert check_placement("decoder", device_of("cpu"), opened([CPU], [(CPU, "MatMul")])) == {}
