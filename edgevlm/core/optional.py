"""Libraries that an extra brings: imported when needed, and missed with the command that fixes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import cast

from edgevlm.core.errors import MissingLibraryError
from edgevlm.core.jetson import ROOT, read_jetson

EXTRA_OF = {
    "torch": "workshop",
    "transformers": "workshop",
    "onnx": "workshop",
    "onnx_ir": "workshop",
    "onnxscript": "workshop",
    "huggingface_hub": "workshop",
    "openvino": "openvino",
}
PACKAGE_OF = {  # where the name to import is not the name to install
    "PIL": "pillow",
    "onnx_ir": "onnx-ir",
    "huggingface_hub": "huggingface-hub",
    "llama_cpp": "llama-cpp-python",
    "jinja2": "Jinja2",
    "cuda": "cuda-python",
    "tensorrt_rtx": "tensorrt-rtx",
}
FIX_ON_JETSON = {  # JetPack's own: wheels from elsewhere do not fit its CUDA
    "tensorrt": "apt install python3-libnvinfer (JetPack's own; a virtual environment needs --system-site-packages)",
}
# What another library imports if it is there, and does without if it is not: openvino reports every import of itself to
# Google Analytics through this one, unless somebody opted out.
NOT_WANTED_BY = {"openvino": "openvino_telemetry"}
VARIANTS_OF = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    "tensorrt": ("tensorrt", "tensorrt-rtx"),
}


@dataclass(frozen=True)
class Library:
    """A library that EdgeVLM can use: where ``version`` is None it is missing, and ``fix`` installs it."""

    module: str
    used_for: str
    version: str | None
    package: str
    fix: str | None


USED_FOR = {
    "onnxruntime": "device: runs ONNX bundles",
    "numpy": "device: arrays",
    "PIL": "device: images",
    "tokenizers": "device: prompts",
    "safetensors": "device: golden tensors and weights",
    "jinja2": "device: chat templates",
    "openvino": "device: runs ONNX bundles, an alternative on x86",
    "tensorrt": "device: builds and runs TensorRT bundles on NVIDIA GPUs",
    "cuda": "device: GPU memory and streams for TensorRT",
    "torch": "workshop: models, training",
    "transformers": "workshop: checkpoints, reference",
    "onnx": "workshop: export",
    "onnx_ir": "workshop: export",
    "onnxscript": "workshop: export",
    "huggingface_hub": "workshop: downloads",
}
NOT_USED_YET = ("coremltools", "llama_cpp")  # shown where found, so nobody has to ask


def require(module: str) -> ModuleType:
    """Import ``module``, or raise MissingLibraryError with the command that brings it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported: no id, no network
    try:
        with _hidden(NOT_WANTED_BY.get(module.partition(".")[0])):
            return import_module(module)
    except (ImportError, OSError) as error:
        raise missing_library(error, module) from error


@contextmanager
def _hidden(module: str | None) -> Iterator[None]:
    """Make ``module`` look not installed while the block runs, unless this process has imported it already."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    if module is None or module in modules:
        yield
        return
    modules[module] = None  # Python's own way to say so: an import of it raises ModuleNotFoundError
    try:
        yield
    finally:
        del modules[module]


def is_missing(error: ModuleNotFoundError) -> bool:
    """Whether the whole library behind ``error`` lacks, and not just one module of a library that is there."""
    return not is_installed((error.name or "").partition(".")[0])


def missing_library(error: ImportError | OSError, wanted: str) -> MissingLibraryError:
    """The clear error for ``error``: ``wanted``, or a library that it leans on, lacks or does not load."""
    library = (getattr(error, "name", None) or wanted).partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and is_missing(error):
        return MissingLibraryError(library, fix_command(library))
    # it is there, but for another system, in another version or without its shared libraries
    reason = f"is installed but does not load ({' '.join(str(error).split())[:200]})"
    return MissingLibraryError(library, fix_command(library), reason)


def is_installed(module: str) -> bool:
    """Whether ``module`` could be imported, without importing it (of ``a.b``, ``a`` is imported)."""
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def fix_command(module: str) -> str:
    """The command that installs ``module`` on this machine."""
    if module in FIX_ON_JETSON and read_jetson(ROOT, lambda command: None) is not None:
        return FIX_ON_JETSON[module]
    extra = EXTRA_OF.get(module)
    return f"pip install 'edgevlm[{extra}]'" if extra else f"pip install {PACKAGE_OF.get(module, module)}"


def libraries() -> tuple[Library, ...]:
    """What is installed of all that EdgeVLM uses, read from package metadata: nothing is imported."""
    used = [_library(module, purpose) for module, purpose in USED_FOR.items()]
    found = [_library(module, "found; no EdgeVLM back end yet") for module in NOT_USED_YET]
    return (*used, *(library for library in found if library.version))


def package_version(package: str) -> str | None:
    """The installed version of ``package``, or None."""
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that `edgevlm --help` need not pay

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of the packages ``names``, without those that are not installed.

    A variant stands under its own name: ``onnxruntime`` may give ``{"onnxruntime-gpu": "1.23.2"}``.
    """
    packages = [package for name in names for package in installed_variants(name)]
    return {package: version for package in packages if (version := package_version(package))}


def installed_variants(module: str) -> tuple[str, ...]:
    """Every installed package that brings ``module``; two of them overwrite each other's files."""
    names = VARIANTS_OF.get(module, (PACKAGE_OF.get(module, module),))
    return tuple(name for name in names if package_version(name) is not None)


def _library(module: str, used_for: str) -> Library:
    variants = installed_variants(module)
    package = variants[0] if variants else PACKAGE_OF.get(module, module)
    version = package_version(package)
    return Library(module, used_for, version, package, None if version else fix_command(module))
