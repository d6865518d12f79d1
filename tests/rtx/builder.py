"""Engines by TensorRT-RTX's parser and builder, which need no GPU: every build is a process of its own.

    python tests/rtx/builder.py < request.json > answer.json       (with LD_LIBRARY_PATH as `environment` gives it)

Two wheels bring them, `PACKAGES`: an ONNX Runtime provider that carries the libraries, and TensorRT's Python bindings.
The bindings ask for libraries by TensorRT's names; a folder of links gives them those of TensorRT-RTX.  That this fits
is so for this pair of versions and promised by nobody, so it is good for tests alone.  What is built here is what a
device would build; none of it runs here.

A request: {"graph": FILE, "profiles": [{INPUT: [least, usual, largest]}], "compute_capability": [8, 9] or null,
"layers": whether to count the network's layers}.
An answer: the fields of `Outcome`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

PACKAGES = {"onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0", "tensorrt-cu13-bindings": "11.4.0.106"}
LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"  # the module of the first
LINKS = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1.7.1",
    "libtensorrt_rtx.so.1": "libtensorrt_rtx.so.1.7.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1.7.1",
    "libtensorrt_onnxparser_rtx.so.1": "libtensorrt_onnxparser_rtx.so.1.7.1",
    "libcudart.so.13": "libcudart.so.13.4.36",
}
PLUGINS = "libnvinfer_plugin.so.11"  # the bindings look it up when they are imported; our graphs need none
PLUGIN_SOURCE = "int initLibNvInferPlugins(void *logger, const char *names) { return 1; }\n"
WORKSPACE_BYTES = 1 << 30
MOST_SECONDS = 900
KILOBYTE = 1024

Profile: TypeAlias = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one build.

    ``error`` is empty where there is an engine of ``engine_bytes``; ``messages`` are the library's warnings and errors.
    ``baseline_bytes``: resident memory when the libraries were loaded; ``peak_bytes``: the most during the build, the
    weights' file included where it is mapped.  ``layers``: how many of each kind the parser made, where that was asked.
    """

    library: str
    error: str = ""
    messages: tuple[str, ...] = ()
    engine_bytes: int = 0
    seconds: float = 0.0
    baseline_bytes: int = 0
    peak_bytes: int = 0
    layers: Mapping[str, int] = field(default_factory=dict)


class RtxBuilder:
    """Builds engines through ``edgevlm.runtimes.trt.api``, with the libraries in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(
        self,
        graph: Path,
        profiles: Sequence[Profile] = (),
        *,
        compute_capability: tuple[int, int] | None = None,
        layers: bool = False,
    ) -> Outcome:
        """Build the ONNX file ``graph``.  A process that dies is an AssertionError with its last words."""
        request = {
            "graph": str(graph),
            "profiles": list(profiles),
            "compute_capability": compute_capability,
            "layers": layers,
        }
        child = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(request),
            env=environment(self.folder),
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
        assert not child.returncode, f"{graph.name}: the build ended with {child.returncode}: {child.stderr[-2000:]}"
        fields = json.loads(child.stdout.splitlines()[-1])
        return Outcome(**{**fields, "messages": tuple(fields["messages"])})


def missing() -> str | None:
    """Why nothing can be built here; None where it can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "TensorRT-RTX's builder comes for Linux on x86_64"
    for package, wanted in PACKAGES.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            return f"{package} is not installed: pip install --no-deps {package}=={wanted}"
        if found != wanted:
            return f"{package} is {found}, the libraries fit each other in {wanted}"
    return None if shutil.which("cc") else "no C compiler (cc) for the one-line library of plugins"


def assemble(folder: Path) -> RtxBuilder:
    """Put the libraries into ``folder`` under the names that the bindings ask for."""
    spec = find_spec(LIBRARIES)
    assert spec is not None
    assert spec.origin is not None
    for name, target in LINKS.items():
        (folder / name).symlink_to(Path(spec.origin).parent / target)
    source = folder / "plugins.c"
    source.write_text(PLUGIN_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / PLUGINS), str(source)], check=True)
    return RtxBuilder(folder)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that loads what lies in ``folder``."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


# -- in the child ---------------------------------------------------------------------------------------------


class Messages(logging.Handler):
    """Keeps what TensorRT says."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Remember one message, without its place in the library's source."""
        self.texts.append(record.getMessage().removeprefix("TensorRT: "))


def answer(request: Mapping[str, Any]) -> Outcome:
    """Build what ``request`` asks for."""
    from edgevlm.core.errors import EdgeVLMError
    from edgevlm.runtimes.trt.api import BuildSettings, load_tensorrt

    messages = _listen()
    api = load_tensorrt()
    capability = request["compute_capability"]
    settings = BuildSettings(
        profiles=request["profiles"],
        workspace_bytes=WORKSPACE_BYTES,
        compute_capability=None if capability is None else (capability[0], capability[1]),
    )
    baseline, started, error, size = _forget_peak(), time.monotonic(), "", 0
    try:
        size = len(api.build(Path(request["graph"]), settings).engine)
    except EdgeVLMError as refused:
        error = str(refused)
    return Outcome(
        library=api.name,
        error=error,
        messages=tuple(messages.texts),
        engine_bytes=size,
        seconds=round(time.monotonic() - started, 2),
        baseline_bytes=baseline,
        peak_bytes=_status("VmHWM"),
        layers=_layers(api.module, request["graph"]) if request["layers"] else {},
    )


def _layers(trt: Any, graph: str) -> Mapping[str, int]:
    """How many layers of each kind the parser makes of ``graph``."""
    log = trt.Logger()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse_from_file(graph)
    return dict(Counter(network.get_layer(index).type.name for index in range(network.num_layers)))


def _listen() -> Messages:
    messages, log = Messages(), logging.getLogger("edgevlm.runtimes.trt.api")
    log.addHandler(messages)
    log.setLevel(logging.DEBUG)
    return messages


def _forget_peak() -> int:
    """Resident bytes now, from which the peak counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes of one line of this process's status, which has them in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * KILOBYTE


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(answer(json.load(sys.stdin)))))
