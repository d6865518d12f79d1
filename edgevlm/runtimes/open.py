"""From a bundle on disk to a model that answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgevlm.bundle.read import Bundle, read_bundle
from edgevlm.core.registry import Registry
from edgevlm.processing.processor import Processor
from edgevlm.runtimes.session import BundleSession
from edgevlm.runtimes.vlm import RuntimeVlm
from edgevlm.shipped import find_bundle

RUNTIMES: Registry[Callable[..., BundleSession]] = Registry(
    "runtime",
    {"onnxruntime": "edgevlm.runtimes.on_onnxruntime:OnnxRuntimeSession"},
    group="edgevlm.runtimes",
)


def open_bundle(
    path: str | Path, runtime: str = "onnxruntime", *, threads: int | None = None, check: bool = True
) -> RuntimeVlm:
    """Load a bundle, given as a folder or as a shipped name such as ``nano``.

    ``check`` compares every file with its hash the first time.  Raises UnsupportedError for an unknown
    ``runtime``, MissingLibraryError when its library is not installed, IntegrityError for a damaged bundle.
    """
    back_end = RUNTIMES[runtime]
    bundle = read_bundle(find_bundle(str(path)), check=check)
    manifest = bundle.manifest
    processor = Processor.from_folder(bundle.root, manifest.image, manifest.prompt)
    session = back_end(bundle, threads=threads)
    info = {"runtime": runtime, **session.info, **_describe(bundle)}
    return RuntimeVlm(session, processor, name=manifest.name, max_context=manifest.max_context, info=info)


def _describe(bundle: Bundle) -> dict[str, Any]:
    """What a measurement must say about the bundle."""
    sums = bundle.root / "SHA256SUMS"
    return {
        "bundle": str(bundle.root),
        "bundle_sha256": hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else None,
        "family": bundle.manifest.family,
        "precisions": {part.part: part.precision for part in bundle.manifest.parts},
    }
