"""Vision-language models on edge devices.

bundle = edgevlm.export_bundle("nano", target="onnx", out="nano.bundle")   # needs the workshop extra
vlm = edgevlm.open_bundle(bundle)
print(vlm.ask("kitchen.jpg", "What is on the table?").text)
print(edgevlm.measure(vlm, image="kitchen.jpg"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from edgevlm.core.optional import missing_library, package_version

if TYPE_CHECKING:
    __version__: str

    from edgevlm.bench.measuring import measure
    from edgevlm.core.errors import EdgeVLMError
    from edgevlm.export.pipeline import export_bundle
    from edgevlm.models.checkpoint import load_model
    from edgevlm.runtimes.open import open_bundle
    from edgevlm.runtimes.sampling import Sampling
    from edgevlm.runtimes.video import Video
    from edgevlm.verify import verify_bundle

_HOMES = {  # where each public name lives; imported when it is first used, so that a device never loads PyTorch
    "EdgeVLMError": "edgevlm.core.errors",
    "Sampling": "edgevlm.runtimes.sampling",
    "Video": "edgevlm.runtimes.video",
    "export_bundle": "edgevlm.export.pipeline",
    "load_model": "edgevlm.models.checkpoint",
    "measure": "edgevlm.bench.measuring",
    "open_bundle": "edgevlm.runtimes.open",
    "verify_bundle": "edgevlm.verify",
}

__all__ = [
    "EdgeVLMError",
    "Sampling",
    "Video",
    "__version__",
    "export_bundle",
    "load_model",
    "measure",
    "open_bundle",
    "verify_bundle",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return package_version("edgevlm") or "unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'edgevlm' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise missing_library(error, name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
