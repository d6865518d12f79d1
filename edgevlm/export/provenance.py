"""Where a bundle came from: the weights by their hashes, the repository, the licence, the tools, the rounding."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgevlm.bundle.hash_cache import sha256
from edgevlm.core.optional import versions
from edgevlm.evaluation.scenes import GENERATOR_VERSION
from edgevlm.export.precisions import Precisions
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


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What roundings are fitted to: ``num_samples`` pictures of a folder, or generated scenes that follow from
    ``seed``."""

    folder: Path | None = None
    num_samples: int = 32
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """Plain data that names no folder of this machine."""
        pictures = f"scenes, generator {GENERATOR_VERSION}" if self.folder is None else "pictures of the user"
        return {"pictures": pictures, "num_samples": self.num_samples, "seed": self.seed}


def provenance(
    checkpoint: Checkpoint, licence: Licence | None, precisions: Precisions, calibration: Calibration
) -> dict[str, Any]:
    """Plain data for the manifest.  ``revision`` is the repository's commit, ``weights`` has every file's SHA-256.

    ``rounding`` has how each decoder's weights were rounded, ``calibration`` what by.
    """
    rounding = {
        precision: {"scheme": type(scheme).__name__, **asdict(scheme)}
        for precision, scheme in precisions.schemes.items()
    }
    return {
        "source": checkpoint.source,
        **({"revision": checkpoint.revision} if checkpoint.revision else {}),
        "weights": {file.name: sha256(file) for file in checkpoint.files},
        **({"licence": asdict(licence)} if licence else {}),
        **({"rounding": rounding} if rounding else {}),
        **({"calibration": calibration.record()} if precisions.calibrates else {}),
        "versions": {"python": platform.python_version(), **versions(LIBRARIES)},
    }
