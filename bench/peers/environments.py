"""The peers' own virtual environments, because their pins conflict with each other's and with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN = "edgevlm"  # the interpreter that runs the comparison: EdgeVLM with its workshop and openvino extras
ASK_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Packages that are installed together, by exact version, and variables that building them needs."""

    packages: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def requirements(self) -> list[str]:
        return [f"{name}=={version}" for name, version in self.packages.items()]


# torch is named first and by version everywhere, so that nothing brings a build for CUDA instead of it.
ENVIRONMENTS: Mapping[str, Environment] = {
    "llama": Environment(
        packages={"llama-cpp-python": "0.3.36", "gguf": "0.19.0", "numpy": "2.4.6"},
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        note="compiled from source: about five minutes, needs a C++ compiler and cmake",
    ),
    "genai": Environment(
        packages={
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "onnx": "1.23.2",
            "onnx-ir": "1.1.0",
            "onnxruntime": "1.31.1",
            "onnxruntime-genai": "0.18.0",
        },
    ),
    "ovgenai": Environment(
        packages={
            "torch": "2.13.0",
            "torchvision": "0.28.0",
            "optimum-intel": "2.2.0",
            "openvino": "2026.4.1",
            "openvino-genai": "2026.4.1.0",
            "nncf": "3.4.0",
        },
    ),
    "optimum": Environment(
        packages={"torch": "2.13.0", "optimum-onnx": "0.1.0", "onnxruntime": "1.31.1", "onnx": "1.23.2"},
    ),
}
# Workers find our modules, ask no network, and tell nobody that they ran.
VARIABLES: Mapping[str, str] = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "CI": "true",  # openvino-telemetry's own switch
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of environment ``name`` below ``folder``."""
    return Path(sys.executable) if name == OWN else folder / name / "bin" / "python"


def environment_variables(folder: Path) -> dict[str, str]:
    """What every worker and maker sees; PyTorch's compiled code is kept below ``folder`` from one run to the next."""
    return {**os.environ, **VARIABLES, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def missing(name: str, folder: Path) -> dict[str, str | None]:
    """The packages of ``name`` that are absent (None) or there in another version; empty where all is well."""
    wanted = ENVIRONMENTS[name].packages
    if not python_of(name, folder).exists():
        return dict.fromkeys(wanted)
    asked = [str(python_of(name, folder)), "-c", ASK_VERSIONS, *wanted]
    found = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    return {package: found[package] for package in wanted if found[package] != wanted[package]}


def set_up(name: str, folder: Path) -> None:
    """Create the environment and install what is missing.  Raises CalledProcessError where pip fails."""
    environment = ENVIRONMENTS[name]
    if not python_of(name, folder).exists():
        venv.create(folder / name, with_pip=True)
    command = [str(python_of(name, folder)), "-m", "pip", "install", "--quiet", *environment.requirements]
    subprocess.run(command, check=True, env={**os.environ, **environment.variables})
