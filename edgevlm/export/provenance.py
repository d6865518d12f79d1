"""Where a bundle came from: the weights by their hashes, the repository, the licence, the tools."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

from edgevlm.bundle.hash_cache import sha256
from edgevlm.core.optional import versions
from edgevlm.families.licence import Licence
from edgevlm.models.checkpoint import Checkpoint

LIBRARIES = (
    "edgevlm",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "pillow",
    "tokenizers",
)


def provenance(checkpoint: Checkpoint, licence: Licence | None) -> dict[str, Any]:
    """Plain data for the manifest.  ``revision`` is the repository's commit, ``weights`` has every file's SHA-256."""
    return {
        "source": checkpoint.source,
        **({"revision": checkpoint.revision} if checkpoint.revision else {}),
        "weights": {file.name: sha256(file) for file in checkpoint.files},
        **({"licence": asdict(licence)} if licence else {}),
        "versions": {"python": platform.python_version(), **versions(LIBRARIES)},
    }
