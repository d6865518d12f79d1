"""Golden tensors: tiny inputs with the answers PyTorch gave, so a device without PyTorch can check itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgevlm.bundle.paths import GOLDEN_FOLDER, META_FILE, TENSORS_FILE, inside
from edgevlm.core.config import read_json, to_json
from edgevlm.core.errors import ConfigError, InputError, IntegrityError
from edgevlm.core.files import atomic_file, write_text


def save_golden(root: Path, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the plain data ``meta`` into the bundle at ``root``.

    Raises ConfigError for an empty set or a dtype that is not a number.  Images that belong to them are the
    caller's to write, as ``golden/*.png``.
    """
    if not tensors:
        raise ConfigError("no golden tensors to save")
    wrong = [name for name, tensor in tensors.items() if tensor.dtype.kind not in "fiub"]
    if wrong:
        raise ConfigError(f"golden tensors hold numbers only; not so: {', '.join(wrong)}")
    (root / GOLDEN_FOLDER).mkdir(parents=True, exist_ok=True)
    with atomic_file(inside(root, TENSORS_FILE)) as scratch:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, scratch)
    write_text(inside(root, META_FILE), to_json(meta))


def load_golden(root: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The golden tensors of the bundle at ``root`` and the data saved beside them.

    Raises IntegrityError when they are missing or cannot be read; nothing in them can run code.
    """
    tensors_file, meta_file = inside(root, TENSORS_FILE), inside(root, META_FILE)
    for file in (tensors_file, meta_file):
        if not file.is_file():
            raise IntegrityError(f"{root}: {file.relative_to(root)} is missing, so it cannot be verified: export again")
    try:
        return dict(load_file(tensors_file)), read_json(meta_file)
    except (SafetensorError, InputError, KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{root}: the golden tensors cannot be read: {error}") from error
