"""What a bundle of EdgeVLM holds, for the workers that open one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgevlm.bundle.manifest import Manifest, PartFile
from edgevlm.bundle.read import read_bundle
from edgevlm.shipped import find_bundle

ENCODER, DECODER = "vision_encoder", "decoder_model_merged"
RUNTIMES = ("runtime", "encoder_runtime", "decoder_runtime")
PRECISIONS = {"encoder_precision": ENCODER, "decoder_precision": DECODER}
CACHE_NUMBER_BYTES = 4


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a bundle's folder, or of a shipped bundle; nothing is checked."""
    return read_bundle(find_bundle(str(folder)), check=False).manifest


def choices_of(arguments: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    """What ``open_bundle`` is told: ``int4`` stands for the bundle's first precision of that kind."""
    found = {name: str(arguments[name]) for name in RUNTIMES if arguments.get(name)}
    for name, part in PRECISIONS.items():
        if arguments.get(name):
            found[name] = chosen(manifest, part, arguments[name]).precision
    return found


def chosen(manifest: Manifest, part: str, precision: str | None) -> PartFile:
    """The bundle's first file of a part in ``precision``, or in the first precision of that kind, or its first.

    Raises SystemExit where there is none.
    """
    files = [one for one in manifest.parts if one.part == part]
    same = [one for one in files if one.precision == precision]
    kind = [one for one in files if precision is None or one.precision.split("-b")[0] == precision]
    for found in (*same, *kind):
        return found
    raise SystemExit(f"no {part} in {precision}; the bundle has {', '.join(one.precision for one in files)}")


def accounted_bytes(manifest: Manifest, precisions: Mapping[str, str]) -> dict[str, int]:
    """The files of the parts that were opened, and the kv cache: what memory must at least hold.

    ``precisions``: of every opened part, as ``info["precisions"]`` says it.  A part with a table of rows is apart, as
    ``mapped_bytes``: its file is mapped, and only the rows that were asked for are read.
    """
    opened = [chosen(manifest, part, precision) for part, precision in precisions.items()]
    mapped = {name for part in opened if part.table for name in part.files}
    loaded = {name for part in opened if not part.table for name in part.files}
    shape = manifest.decoder
    numbers = 2 * shape.num_layers * shape.num_key_value_heads * manifest.max_context * shape.head_size
    return {
        "weights_bytes": sum(manifest.file_bytes.get(name, 0) for name in loaded),
        "mapped_bytes": sum(manifest.file_bytes.get(name, 0) for name in mapped),
        "cache_bytes": numbers * CACHE_NUMBER_BYTES,
    }


def fingerprint(folder: Path) -> str:
    """What tells one bundle from another that was made in its place: the hash of its list of hashes."""
    return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()
